//! What is counted. Your own go beside these: whatever is registered with the `prometheus` crate's default
//! registry is at `/metrics` of the admin listeners.

mod durations;

use std::sync::LazyLock;

use anyhow::Context;
use hyper::Method;
use prometheus::{
    IntCounter, IntGauge, IntGaugeVec, register_int_counter, register_int_gauge, register_int_gauge_vec,
};

pub use durations::answered;
#[cfg(test)]
pub use durations::count;

macro_rules! metric {
    ($register:ident, $name:literal, $help:literal $(, $more:expr)*) => {
        LazyLock::new(|| $register!($name, $help $(, $more)*).expect("each name is registered once"))
    };
}

// After the macro, which it uses.
pub mod process;

pub static IN_FLIGHT: LazyLock<IntGauge> =
    metric!(register_int_gauge, "http_requests_in_flight", "Requests in flight.");
pub static CONNECTIONS: LazyLock<IntGaugeVec> =
    metric!(register_int_gauge_vec, "connections", "Open connections by stage.", &["stage"]);
pub static HANDED_OVER: LazyLock<IntCounter> = metric!(
    register_int_counter,
    "connections_handed_over_total",
    "Connections handed over to the next process, by this process and its predecessors."
);
pub static TAKEN_OVER: LazyLock<IntCounter> = metric!(
    register_int_counter,
    "connections_taken_over_total",
    "Connections taken over from the predecessor."
);
pub static CUT_OFF: LazyLock<IntCounter> = metric!(
    register_int_counter,
    "requests_cut_off_total",
    "Requests cut off at the end of a drain, by this process and its predecessors."
);
pub static LOG_DROPPED: LazyLock<IntCounter> = metric!(
    register_int_counter,
    "log_messages_dropped_total",
    "Log messages of this process that were dropped because journald or standard error did not accept them in time. \
     Messages that journald refused are not counted."
);
pub static ACCEPT_QUEUE: LazyLock<IntGaugeVec> = metric!(
    register_int_gauge_vec,
    "accept_queue_length",
    "Connections waiting to be accepted, by TCP listener.",
    &["listener"]
);
pub static GENERATION: LazyLock<IntGauge> = metric!(
    register_int_gauge,
    "generation",
    "Number of this process in the handover chain; the first is 1."
);
pub static UPTIME: LazyLock<IntGauge> =
    metric!(register_int_gauge, "uptime_seconds", "Seconds since this process started.");

/// For the next process to go on from: what is counted at a process's end, nobody could ask it for.
pub fn totals() -> String {
    format!("{} {}", HANDED_OVER.get(), CUT_OFF.get())
}

/// Goes on from the totals of the process before this one.
pub fn go_on_from(totals: &str) -> anyhow::Result<()> {
    let (handed_over, cut_off) = totals.split_once(' ').context("expected two numbers")?;
    let (handed_over, cut_off) = (handed_over.parse()?, cut_off.parse()?);
    HANDED_OVER.inc_by(handed_over);
    CUT_OFF.inc_by(cut_off);
    Ok(())
}

/// A client may make methods up, and each would be counted for ever.
pub fn method(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PATCH", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_gone_on_from_and_what_is_none_counts_nothing() {
        let before = (HANDED_OVER.get(), CUT_OFF.get());
        for text in ["", "1", "1 ", "1 x", "-1 2", "1 2 3", "1 99999999999999999999"] {
            assert!(go_on_from(text).is_err(), "{text}");
        }
        assert_eq!((HANDED_OVER.get(), CUT_OFF.get()), before);
        go_on_from("5 2").expect("two numbers");
        assert_eq!(totals(), format!("{} {}", before.0 + 5, before.1 + 2));
    }
}
