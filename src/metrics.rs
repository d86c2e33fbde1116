//! What is counted. Your own go beside these: whatever is registered with the `prometheus` crate's default
//! registry is at `/metrics` of the admin listeners.

use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::extract::MatchedPath;
use hyper::{Method, Request, Response};
use pin_project_lite::pin_project;
use prometheus::{
    HistogramVec, IntCounter, IntGauge, IntGaugeVec, register_histogram_vec, register_int_counter,
    register_int_gauge, register_int_gauge_vec,
};
use tower::{Layer, Service};

/// Upper bounds of the latency histogram, in seconds.
const LATENCIES: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

macro_rules! metric {
    ($register:ident, $name:literal, $help:literal $(, $more:expr)*) => {
        LazyLock::new(|| $register!($name, $help $(, $more)*).expect("each name is registered once"))
    };
}

/// From a request's arrival at the router to the head of its answer.
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

/// Measures each request of a router's routes.
#[derive(Clone, Copy)]
pub struct MeasureLayer;

#[derive(Clone)]
pub struct Measure<S> {
    inner: S,
}

impl<S> Layer<S> for MeasureLayer {
    type Service = Measure<S>;

    fn layer(&self, inner: S) -> Measure<S> {
        Measure { inner }
    }
}

impl<S: Service<Request<Body>, Response = Response<B>>, B> Service<Request<Body>> for Measure<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Measuring<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Measuring<S::Future> {
        Measuring {
            begun: Instant::now(),
            route: request.extensions().get::<MatchedPath>().cloned(),
            method: name(request.method()),
            future: self.inner.call(request),
        }
    }
}

pin_project! {
    pub struct Measuring<F> {
        begun: Instant,
        route: Option<MatchedPath>,
        method: &'static str,
        #[pin]
        future: F,
    }
}

impl<F: Future<Output = Result<Response<B>, E>>, B, E> Future for Measuring<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let result = std::task::ready!(this.future.poll(cx));
        if let Ok(response) = &result {
            let route = this.route.as_ref().map_or("", MatchedPath::as_str);
            REQUESTS
                .with_label_values(&[route, this.method, response.status().as_str()])
                .observe(this.begun.elapsed().as_secs_f64());
        }
        Poll::Ready(result)
    }
}

/// A client may make methods up, and each would be counted for ever.
fn name(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PATCH", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}
