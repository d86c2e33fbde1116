//! What the registry's tasks meet in: atomics and mutexes of the standard library, and tokio's bell; for the models
//! (`make models`, `registry/models.rs`) loom's, which show each value that the memory model allows to be read.
//!
//! Clocks and sums for people to read are not of it: nobody waits for them.

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

    /// As much of tokio's as is used, which promises: whoever holds a `Notified` hears of each `notify_waiters` since
    /// it was made.
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
                let mut bell = lock(&self.0);
                bell.generation += 1;
                std::mem::take(&mut bell.waiting)
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
        /// It hears from its making on.
        pub fn enable(self: Pin<&mut Self>) -> bool {
            false
        }
    }

    impl Future for Notified<'_> {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            let mut bell = lock(&self.notify.0);
            if bell.generation != self.generation {
                return Poll::Ready(());
            }
            bell.waiting.push(cx.waker().clone());
            Poll::Pending
        }
    }
}
