//! Tasks that begin rarely.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::task::JoinHandle;

/// Spawns a task as `tokio::spawn` does, in a box. tokio compiles its code for each type of future, twice and with
/// 11 kB, and all boxes have the same type. The task of a connection has no box, because it begins often.
pub fn spawn(work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let work: BoxFuture<'static, ()> = work.boxed();
    tokio::spawn(work)
}
