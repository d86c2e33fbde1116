//! The synchronization primitives of the registry: `AtomicU64` and `Mutex` of the standard library, `Notify` of tokio.
//! The model tests (`make models`, `registry/models.rs`) use loom's instead, so that they run with every interleaving
//! and every value that the memory model permits.
//!
//! Clocks and counters for metrics use the standard library directly, because no task waits for them, and each modelled
//! access multiplies the number of executions that loom has to try.

#[cfg(not(all(test, feature = "model-tests")))]
pub use std::sync::{Mutex, atomic::AtomicU64};

#[cfg(not(all(test, feature = "model-tests")))]
pub use tokio::sync::Notify;

#[cfg(not(all(test, feature = "model-tests")))]
pub use crate::os::lock::lock;

#[cfg(all(test, feature = "model-tests"))]
pub use modelled::*;

#[cfg(all(test, feature = "model-tests"))]
mod modelled {
    use std::pin::Pin;
    use std::sync::PoisonError;
    use std::task::{Context, Poll, Waker};

    pub use loom::sync::atomic::AtomicU64;
    pub use loom::sync::{Mutex, MutexGuard};

    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of tokio's `Notify` that the registry uses. Like tokio's, a `Notified` becomes ready at the first
    /// `notify_waiters` after it was created, even if it was not polled before.
    pub struct Notify(Mutex<Waiters>);

    #[derive(Default)]
    struct Waiters {
        generation: u64,
        waiting: Vec<Waker>,
    }

    impl Notify {
        pub fn new() -> Self {
            Self(Mutex::new(Waiters::default()))
        }

        pub fn notify_waiters(&self) {
            let waiting = {
                let mut waiters = lock(&self.0);
                waiters.generation += 1;
                std::mem::take(&mut waiters.waiting)
            };
            waiting.into_iter().for_each(Waker::wake);
        }

        pub fn notified(&self) -> Notified<'_> {
            Notified { notify: self, generation: lock(&self.0).generation }
        }
    }

    pub struct Notified<'a> {
        notify: &'a Notify,
        generation: u64,
    }

    impl Notified<'_> {
        /// Does nothing, because a `Notified` is registered when it is created.
        pub fn enable(self: Pin<&mut Self>) -> bool {
            false
        }
    }

    impl Future for Notified<'_> {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            let mut waiters = lock(&self.notify.0);
            if waiters.generation != self.generation {
                return Poll::Ready(());
            }
            waiters.waiting.push(cx.waker().clone());
            Poll::Pending
        }
    }
}
