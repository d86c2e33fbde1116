//! Returns memory that connections no longer need to the system. With the feature `jemalloc`, a thread of jemalloc does
//! this (`os/sys.rs` has its settings). glibc keeps free pages that lie below used ones, such as the few that parked
//! connections keep, so without the feature the heap is trimmed whenever the number of active connections has dropped.

#[cfg(feature = "jemalloc")]
pub use with_jemalloc::return_memory;
#[cfg(not(feature = "jemalloc"))]
pub use with_malloc::return_memory;

#[cfg(feature = "jemalloc")]
mod with_jemalloc {
    use std::sync::Arc;

    use tikv_jemallocator::Jemalloc;
    use tracing::debug;

    use crate::os::sys;
    use crate::registry::Registry;

    #[global_allocator]
    static ALLOCATOR: Jemalloc = Jemalloc;

    /// Starts jemalloc's background thread, which does not depend on the registry.
    pub fn return_memory(_: Arc<Registry>) {
        if let Err(error) = sys::give_memory_back() {
            debug!(%error, "could not start jemalloc's background thread; freed memory returns to the system late");
        }
    }
}

#[cfg(not(feature = "jemalloc"))]
mod with_malloc {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::time::interval;

    use crate::os::{sys, task};
    use crate::registry::Registry;

    const INTERVAL: Duration = Duration::from_secs(1);
    /// Trimming walks through the whole heap, so it must be worth it. This many active connections have about 1 MB.
    const ENOUGH: usize = 64;

    /// Trims the heap after connections were parked or closed, on a thread of its own, because that takes up to 100 ms after
    /// 10,000 connections.
    pub fn return_memory(registry: Arc<Registry>) {
        task::spawn(async move {
            let mut clock = interval(INTERVAL);
            loop {
                clock.tick().await;
                if registry.active_has_dropped_by(ENOUGH) {
                    // If no thread can be started, the memory is given back after the next connections.
                    if let Ok(trimmed) = task::on_thread(sys::trim_heap) {
                        let _ = trimmed.await;
                    }
                }
            }
        });
    }
}
