//! The description of this process that is shown to clients and operators.

use std::time::SystemTime;

/// The process that serves a request. A handler takes it as an argument.
///
/// ```
/// use outlive::Process;
///
/// async fn who(process: Process) -> String {
///     format!("pid {}, generation {}\n", process.pid, process.generation)
/// }
/// # let _: axum::Router = axum::Router::new().route("/", axum::routing::get(who));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// The process id.
    pub pid: u32,
    /// The number of the process in the chain of processes that handed over to each other; the first is 1.
    pub generation: u64,
    /// When the process started.
    pub started_at: SystemTime,
}

impl Process {
    pub(crate) fn begin(generation: u64) -> Self {
        Self { pid: std::process::id(), generation, started_at: SystemTime::now() }
    }
}
