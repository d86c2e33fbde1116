//! Memory that connections no longer need goes back to the system. jemalloc does it in a thread of its own (the feature of
//! that name; `sys.rs` has its settings). glibc keeps free pages that lie below used ones, such as the little that parked
//! connections keep, so without the feature its heap is trimmed whenever there are fewer connections that are not parked.

#[cfg(feature = "jemalloc")]
pub use with_jemalloc::give_memory_back;
#[cfg(not(feature = "jemalloc"))]
pub use with_malloc::give_memory_back;

#[cfg(feature = "jemalloc")]
mod with_jemalloc {
    use std::sync::Arc;

    use tikv_jemallocator::Jemalloc;
    use tracing::debug;

    use crate::registry::Registry;
    use crate::sys;

    #[global_allocator]
    static ALLOCATOR: Jemalloc = Jemalloc;

    /// jemalloc does it in a thread of its own, whatever the registry counts.
    pub fn give_memory_back(_: Arc<Registry>) {
        if let Err(error) = sys::give_memory_back() {
            debug!(%error, "could not start jemalloc's background thread; freed memory returns to the system late");
        }
    }
}

#[cfg(not(feature = "jemalloc"))]
mod with_malloc {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::task::spawn_blocking;
    use tokio::time::interval;

    use crate::registry::Registry;
    use crate::sys;

    const INTERVAL: Duration = Duration::from_secs(1);
    /// Trimming walks through the whole heap. This many connections have about 1 MB.
    const ENOUGH: usize = 64;

    /// Trims the heap after connections were parked or closed. On a thread for blocking work, because 10,000 connections
    /// take up to 100 ms.
    pub fn give_memory_back(registry: Arc<Registry>) {
        tokio::spawn(async move {
            let mut clock = interval(INTERVAL);
            loop {
                clock.tick().await;
                if registry.fewer_awake(ENOUGH) {
                    // It fails only when the runtime ends.
                    let _ = spawn_blocking(sys::trim_heap).await;
                }
            }
        });
    }
}
