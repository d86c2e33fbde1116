//! What is counted. Your own go beside these: whatever is registered with the `prometheus` crate's default
//! registry is at `/metrics` of the admin listeners.

use std::cell::RefCell;
use std::sync::LazyLock;
use std::time::Duration;

use hyper::{Method, StatusCode};
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntGauge, IntGaugeVec, register_histogram_vec, register_int_counter,
    register_int_gauge, register_int_gauge_vec,
};

/// Upper bounds of the latency histogram, in seconds.
const LATENCIES: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

macro_rules! metric {
    ($register:ident, $name:literal, $help:literal $(, $more:expr)*) => {
        LazyLock::new(|| $register!($name, $help $(, $more)*).expect("each name is registered once"))
    };
}

/// From a request's head to that of its answer.
pub static REQUESTS: LazyLock<HistogramVec> = metric!(
    register_histogram_vec,
    "http_request_duration_seconds",
    "Time from a request to the head of its answer, by route template, method and status.",
    &["route", "method", "status"],
    LATENCIES.to_vec()
);
pub static IN_FLIGHT: LazyLock<IntGauge> =
    metric!(register_int_gauge, "http_requests_in_flight", "Requests being answered.");
pub static CONNECTIONS: LazyLock<IntGaugeVec> =
    metric!(register_int_gauge_vec, "connections", "Open connections, by what they are doing.", &["stage"]);
pub static HANDED_OVER: LazyLock<IntCounter> =
    metric!(register_int_counter, "connections_handed_over_total", "Connections left to the next process.");
pub static TAKEN_OVER: LazyLock<IntCounter> = metric!(
    register_int_counter,
    "connections_taken_over_total",
    "Connections that the process before this one left to it."
);
pub static CUT_OFF: LazyLock<IntCounter> =
    metric!(register_int_counter, "requests_cut_off_total", "Requests lost to the drain limit.");
pub static ACCEPT_QUEUE: LazyLock<IntGaugeVec> = metric!(
    register_int_gauge_vec,
    "accept_queue_length",
    "Connections that wait to be accepted, by TCP listener.",
    &["listener"]
);
pub static GENERATION: LazyLock<IntGauge> = metric!(
    register_int_gauge,
    "generation",
    "Which process this is in the row of those that handed their connections on."
);
pub static UPTIME: LazyLock<IntGauge> =
    metric!(register_int_gauge, "uptime_seconds", "Seconds since this process began to live.");

/// One of the series of `REQUESTS`.
struct Series {
    route: Option<&'static str>,
    method: &'static str,
    status: StatusCode,
    histogram: Histogram,
}

thread_local! {
    /// Those that this thread has met: to look through them costs less than to hash three labels. They are no
    /// more than the routes, methods and statuses that there are.
    static MET: RefCell<Vec<Series>> = const { RefCell::new(Vec::new()) };
}

/// A request has been answered, by a route or by none.
pub fn answered(route: Option<&'static str>, method: &'static str, status: StatusCode, took: Duration) {
    let seconds = took.as_secs_f64();
    MET.with_borrow_mut(|met| {
        let is_same =
            |series: &&Series| series.status == status && series.method == method && series.route == route;
        if let Some(series) = met.iter().find(is_same) {
            series.histogram.observe(seconds);
            return;
        }
        let histogram = REQUESTS.with_label_values(&[route.unwrap_or_default(), method, status.as_str()]);
        histogram.observe(seconds);
        met.push(Series { route, method, status, histogram });
    });
}

/// A client may make methods up, and each would be counted for ever.
pub fn method(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PATCH", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}
