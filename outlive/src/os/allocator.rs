//! jemalloc as the global allocator (feature `jemalloc`). It returns the memory that connections have freed to the
//! system when they are parked. Other allocators keep most of it, because it lies between allocations that are still in
//! use. `sys.rs` has its settings.

use tikv_jemallocator::Jemalloc;
use tracing::debug;

use crate::os::sys;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Starts the thread of jemalloc that returns memory. Must be called when threads may exist, that is, after everything
/// that requires a single thread.
pub fn give_memory_back() {
    if let Err(error) = sys::give_memory_back() {
        debug!(%error, "could not start jemalloc's background thread; freed memory returns to the system late");
    }
}
