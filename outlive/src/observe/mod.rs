//! The output for operators: log events (`log.rs`), metrics (`metrics.rs`), and the status line of `systemctl status`
//! (`status.rs`). `log_control.rs` changes the log level while the process runs; `traces.rs` sends traces to a collector;
//! `cpu_profile.rs` and `heap_profile.rs` show where the process spends its time and its memory.

#[cfg(feature = "cpu-profile")]
pub mod cpu_profile;
#[cfg(feature = "heap-profile")]
pub mod heap_profile;
pub mod json_string;
pub mod log;
#[cfg(feature = "log-control")]
pub mod log_control;
pub mod metrics;
pub mod status;
#[cfg_attr(not(feature = "otlp"), path = "no_traces.rs")]
pub mod traces;

/// `1 request`, `2 requests`
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
