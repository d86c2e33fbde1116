//! The metrics of the library. They are in the default registry of the `prometheus` crate, all of which `/metrics` of
//! the admin listeners shows, so that the metrics of an application and of other crates appear beside them.

mod durations;

use std::sync::LazyLock;

use anyhow::Context;
use hyper::Method;
use prometheus::core::Collector;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

pub use durations::answered;
#[cfg(test)]
pub use durations::count;

macro_rules! metric {
    ($kind:ident, $name:literal, $help:literal) => {
        LazyLock::new(|| $crate::observe::metrics::registered($kind::new($name, $help)))
    };
    ($kind:ident, $name:literal, $help:literal, $labels:expr) => {
        LazyLock::new(|| {
            $crate::observe::metrics::registered($kind::new(prometheus::Opts::new($name, $help), $labels))
        })
    };
}

// After the macro, which they use.
pub mod process;
pub mod runtime;

pub static IN_FLIGHT: LazyLock<IntGauge> =
    metric!(IntGauge, "http_requests_in_flight", "Requests in flight.");
pub static CONNECTIONS: LazyLock<IntGaugeVec> =
    metric!(IntGaugeVec, "outlive_connections", "Open connections by stage.", &["stage"]);
pub static HANDED_OVER: LazyLock<IntCounter> = metric!(
    IntCounter,
    "outlive_connections_handed_over_total",
    "Connections handed over to the next process, by this process and its predecessors."
);
pub static TAKEN_OVER: LazyLock<IntCounter> = metric!(
    IntCounter,
    "outlive_connections_taken_over_total",
    "Connections taken over from the predecessor."
);
pub static BACKED_UP: LazyLock<IntGauge> = metric!(
    IntGauge,
    "outlive_connections_backed_up",
    "Parked connections that stay open if this process crashes."
);
pub static CUT_OFF: LazyLock<IntCounter> = metric!(
    IntCounter,
    "outlive_requests_cut_off_total",
    "Requests cut off at the end of a drain, by this process and its predecessors."
);
pub static REFUSED: LazyLock<IntCounterVec> = metric!(
    IntCounterVec,
    "outlive_requests_refused_total",
    "Requests that this process answered with 503 because too many were in flight, by the option that limits them.",
    &["limit"]
);
pub static LOG_DROPPED: LazyLock<IntCounter> = metric!(
    IntCounter,
    "outlive_log_messages_dropped_total",
    "Log messages of this process that were dropped because journald or standard error did not accept them in time. \
     Messages that journald refused are not counted."
);
#[cfg(feature = "otlp")]
pub static SPANS_DROPPED: LazyLock<IntCounter> = metric!(
    IntCounter,
    "outlive_spans_dropped_total",
    "Spans of this process that were dropped because the queue was full or the collector did not accept them."
);
pub static PROXY_HEADERS_REFUSED: LazyLock<IntCounterVec> = metric!(
    IntCounterVec,
    "outlive_proxy_headers_refused_total",
    "Connections that this process closed because they did not begin with a valid PROXY header of a trusted proxy, by reason.",
    &["reason"]
);
pub static ACCEPT_QUEUE: LazyLock<IntGaugeVec> = metric!(
    IntGaugeVec,
    "outlive_accept_queue_length",
    "Connections waiting to be accepted, by TCP listener.",
    &["listener"]
);
pub static GENERATION: LazyLock<IntGauge> =
    metric!(IntGauge, "outlive_generation", "Number of this process in the handover chain; the first is 1.");
pub static UPTIME: LazyLock<IntGauge> =
    metric!(IntGauge, "outlive_uptime_seconds", "Seconds since this process started.");

/// Registers all metrics of the library. The application registers its own only after that, so that it cannot take one of
/// these names, such as `http_request_duration_seconds`.
pub fn register() {
    durations::register();
    process::register();
    runtime::register();
    for gauge in [&IN_FLIGHT, &BACKED_UP, &GENERATION, &UPTIME] {
        LazyLock::force(gauge);
    }
    for counter in [&HANDED_OVER, &TAKEN_OVER, &CUT_OFF, &LOG_DROPPED] {
        LazyLock::force(counter);
    }
    #[cfg(feature = "otlp")]
    LazyLock::force(&SPANS_DROPPED);
    for counters in [&REFUSED, &PROXY_HEADERS_REFUSED] {
        LazyLock::force(counters);
    }
    for gauges in [&CONNECTIONS, &ACCEPT_QUEUE] {
        LazyLock::force(gauges);
    }
}

/// Registers a metric. Not inlined, so that the binary has this code once for each type of metric.
#[inline(never)]
fn registered<M: Collector + Clone + 'static>(metric: prometheus::Result<M>) -> M {
    let metric = metric.expect("the names and labels are valid");
    // It fails if a metric of this name was registered before `start`, as the feature `process` of the prometheus crate does at
    // its first use. `/metrics` then shows that metric, and not the one of the library.
    let _ = prometheus::register(Box::new(metric.clone()));
    metric
}

/// The counters that the next process continues. They are incremented at the end of a process, when no request for
/// `/metrics` can reach it any more, so their values would otherwise never be seen.
pub fn totals() -> String {
    format!("{} {}", HANDED_OVER.get(), CUT_OFF.get())
}

/// As [`totals`], for a successor that adds them at once. They begin at zero again, because a process that lingers sends
/// them a second time at its end.
pub fn take_totals() -> String {
    let taken = totals();
    HANDED_OVER.reset();
    CUT_OFF.reset();
    taken
}

/// Adds the totals of the process before this one.
pub fn restore_totals(totals: &str) -> anyhow::Result<()> {
    let (handed_over, cut_off) = totals.split_once(' ').context("expected two numbers")?;
    let (handed_over, cut_off) = (handed_over.parse()?, cut_off.parse()?);
    HANDED_OVER.inc_by(handed_over);
    CUT_OFF.inc_by(cut_off);
    Ok(())
}

/// The label for `method`. Unknown methods share one label, because a client could otherwise create any number of time
/// series.
pub fn method(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PATCH", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restored_totals_are_added_and_invalid_ones_change_nothing() {
        let before = (HANDED_OVER.get(), CUT_OFF.get());
        for text in ["", "1", "1 ", "1 x", "-1 2", "1 2 3", "1 99999999999999999999"] {
            assert!(restore_totals(text).is_err(), "{text}");
        }
        assert_eq!((HANDED_OVER.get(), CUT_OFF.get()), before);
        restore_totals("5 2").expect("two numbers are valid totals");
        assert_eq!(totals(), format!("{} {}", before.0 + 5, before.1 + 2));
    }
}
