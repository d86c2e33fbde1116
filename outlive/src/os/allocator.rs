//! The allocator, where the service wants this one (`jemalloc`): what connections that sleep do not need goes back to
//! the system. Others keep it for next time, between the little that is still in use. `sys.rs` has its settings.

use tikv_jemallocator::Jemalloc;
use tracing::debug;

use crate::os::sys;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// To be called once there may be other threads.
pub fn give_memory_back() {
    if let Err(error) = sys::give_memory_back() {
        debug!(%error, "could not start jemalloc's background thread; freed memory returns to the system late");
    }
}
