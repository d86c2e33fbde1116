//! This process, as it may be told to anybody who asks.

use std::time::SystemTime;

/// Who serves. A handler takes it as an argument.
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
    /// The number of the process.
    pub pid: u32,
    /// Which process in the row of those that handed their connections on; the first is 1.
    pub generation: u64,
    /// When it began.
    pub started_at: SystemTime,
}

impl Process {
    pub(crate) fn begin(generation: u64) -> Self {
        Self { pid: std::process::id(), generation, started_at: SystemTime::now() }
    }
}
