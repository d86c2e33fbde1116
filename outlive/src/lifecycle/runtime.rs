//! [`Runtime`], the tokio runtime of a process.

use std::ffi::OsStr;
use std::panic::catch_unwind;

use anyhow::{Context, ensure};
use futures_util::FutureExt;

use crate::app::tasks::panic_message;
use crate::os::exit::{Failure, Result};

/// The environment variable with the number of tokio's worker threads; the default is one for each CPU.
const WORKER_THREADS: &str = "TOKIO_WORKER_THREADS";
/// The largest number of worker threads that is accepted. tokio panics if the kernel refuses to start a thread, for example
/// because of `TasksMax=`; the panic becomes an error, but the threads that have started wait for the end of the process.
const MAX_WORKER_THREADS: usize = 1024;

/// The tokio runtime. Its drop does not wait for tasks that still run, because [`Serving::stop`] has already given them
/// their time. The drop of tokio's own runtime would wait for a handler that blocks its thread, for any length of time.
///
/// [`Serving::stop`]: crate::lifecycle::serve::Serving::stop
pub struct Runtime(Option<tokio::runtime::Runtime>);

impl Runtime {
    pub fn new() -> Result<Self> {
        if let Some(count) = std::env::var_os(WORKER_THREADS) {
            check_worker_threads(&count).map_err(Failure::config)?;
        }
        let runtime = catch_unwind(tokio::runtime::Runtime::new);
        let runtime = runtime.map_err(|panic| panic_message(&*panic)).and_then(|runtime| Ok(runtime?));
        Ok(Self(Some(runtime.context("could not start the runtime").map_err(Failure::unavailable)?)))
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let runtime = self.0.as_ref().expect("only `drop` takes the runtime");
        // Boxed, so that the binary has tokio's code only once, not for each type of future.
        runtime.block_on(future.boxed_local())
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Fails if tokio would panic because of this value, or would start more threads than [`MAX_WORKER_THREADS`].
fn check_worker_threads(count: &OsStr) -> anyhow::Result<()> {
    let number = count.to_str().and_then(|count| count.parse::<usize>().ok());
    let is_valid = number.is_some_and(|number| (1..=MAX_WORKER_THREADS).contains(&number));
    let count = count.display();
    ensure!(
        is_valid,
        "invalid {WORKER_THREADS} \"{count}\": expected a number from 1 to {MAX_WORKER_THREADS}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_worker_threads_outside_1_to_1024_is_invalid() {
        for count in ["0", "1025", "100000", "18446744073709551616", "-1", "x", ""] {
            assert!(check_worker_threads(OsStr::new(count)).is_err(), "{count}");
        }
        for count in ["1", "1024"] {
            check_worker_threads(OsStr::new(count)).expect("it is valid");
        }
    }
}
