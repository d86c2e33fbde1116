//! Tasks that begin rarely, and work that blocks.

use std::io;
use std::thread;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Spawns a task as `tokio::spawn` does, but boxed. tokio compiles its code twice for each type of future (11 kB), and
/// all boxes have the same type. The task of an accepted connection is not boxed, because it begins often.
pub fn spawn(work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let work: BoxFuture<'static, ()> = work.boxed();
    tokio::spawn(work)
}

/// Runs `work`, which may block, on a thread of its own, and returns the receiver of its result. Fails if the kernel refuses
/// to start a thread, for example because of `TasksMax=` or `LimitNPROC=`.
///
/// tokio's `spawn_blocking` panics then, so that a restart would end the process without a drain. It also waits for a
/// free thread if tasks of the application block all of them (512), and the drain would not begin.
pub fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (done, result) = oneshot::channel();
    thread::Builder::new().name("blocking".to_owned()).spawn(move || {
        // An error means that the caller does not wait for the result any more.
        let _ = done.send(work());
    })?;
    Ok(result)
}
