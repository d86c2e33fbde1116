//! [`Runtime`], the tokio runtime of a process.

use anyhow::Context;
use futures_util::FutureExt;

use crate::os::exit::Result;

/// The tokio runtime. Its drop does not wait for tasks that still run, because [`Serving::stop`] has already given them
/// their time. The drop of tokio's own runtime would wait for a handler that blocks its thread, for any length of time.
///
/// [`Serving::stop`]: crate::lifecycle::serve::Serving::stop
pub struct Runtime(Option<tokio::runtime::Runtime>);

impl Runtime {
    pub fn new() -> Result<Self> {
        Ok(Self(Some(tokio::runtime::Runtime::new().context("could not start the runtime")?)))
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
