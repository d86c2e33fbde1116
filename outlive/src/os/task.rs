//! Tasks that begin rarely.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::task::JoinHandle;

/// Spawns a task as `tokio::spawn` does, but boxed. tokio compiles its code twice for each type of future (11 kB), and
/// all boxes have the same type. The task of an accepted connection is not boxed, because it begins often.
pub fn spawn(work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let work: BoxFuture<'static, ()> = work.boxed();
    tokio::spawn(work)
}
