//! What every request passes through before it reaches `app.rs`, outermost first.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::extract::{ConnectInfo, DefaultBodyLimit};
use axum::{Extension, Router};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::map_response_body::MapResponseBodyLayer;
use tower_http::request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutLayer};
use tower_http::trace::TraceLayer;
use tracing::{Span, debug, error, info_span};

use crate::config::Config;
use crate::life::{Life, Shutdown};
use crate::metrics::MeasureLayer;
use crate::stream::Peer;

/// `--log info,request=debug` shows each request.
const TARGET: &str = "request";

/// `router` behind the limits of `config`.
pub fn prepare(router: Router, life: Life, shutdown: Shutdown, config: &Config) -> Router {
    let trace = TraceLayer::new_for_http()
        .make_span_with(span)
        .on_request(())
        .on_response(log)
        .on_body_chunk(())
        .on_eos(())
        .on_failure(());
    let layers = ServiceBuilder::new()
        .layer(MeasureLayer)
        .layer(MapResponseBodyLayer::new(Body::new))
        .layer(SetRequestIdLayer::x_request_id(Numbered::new()))
        .layer(trace)
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(CatchPanicLayer::custom(internal_error))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, config.request_timeout))
        .layer(RequestBodyTimeoutLayer::new(config.request_timeout))
        .layer(DefaultBodyLimit::disable())
        .layer(RequestBodyLimitLayer::new(usize::try_from(config.body_limit.0).unwrap_or(usize::MAX)))
        .layer(Extension(life))
        .layer(Extension(shutdown));
    router.layer(layers)
}

fn span<B>(request: &Request<B>) -> Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    let peer = request.extensions().get::<ConnectInfo<Peer>>().map(|ConnectInfo(peer)| peer);
    info_span!(
        target: TARGET,
        "request",
        request_id = id,
        method = %request.method(),
        path = request.uri().path(),
        peer = peer.map(tracing::field::display),
    )
}

fn log<B>(response: &Response<B>, latency: Duration, _span: &Span) {
    let status = response.status().as_u16();
    let latency = humantime::format_duration(Duration::from_micros(
        u64::try_from(latency.as_micros()).unwrap_or(u64::MAX),
    ));
    if response.status().is_server_error() {
        error!(target: TARGET, status, %latency, "failed");
    } else {
        debug!(target: TARGET, status, %latency, "answered");
    }
}

/// The panic itself is logged where it happens (`log::init`).
fn internal_error(_panic: Box<dyn Any + Send>) -> Response<Body> {
    let mut response = Response::new(Body::from("internal error\n"));
    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Request ids that differ over restarts, and cost a counter: when the process was born, and a number.
#[derive(Clone)]
struct Numbered {
    born: u64,
    next: std::sync::Arc<AtomicU64>,
}

impl Numbered {
    fn new() -> Self {
        let born = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { born: u64::try_from(born.as_micros()).unwrap_or(0), next: std::sync::Arc::default() }
    }
}

impl MakeRequestId for Numbered {
    fn make_request_id<B>(&mut self, _request: &Request<B>) -> Option<RequestId> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:x}-{number:x}", self.born);
        HeaderValue::try_from(id).ok().map(RequestId::new)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use axum::routing::{get, post};
    use clap::Parser;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn ask(request: Request<Body>) -> (StatusCode, String) {
        async fn panics() {
            panic!("on purpose");
        }
        let config = Config::parse_from(["x", "--body-limit", "4MiB"]);
        let length = |body: Bytes| async move { body.len().to_string() };
        let router = Router::new().route("/panics", get(panics)).route("/length", post(length));
        let response = prepare(router, Life::begin(1), Shutdown::default(), &config)
            .oneshot(request)
            .await
            .expect("infallible");
        let status = response.status();
        let body = response.into_body().collect().await.expect("a whole body").to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn a_panic_in_a_handler_is_a_500() {
        let request = Request::get("/panics").body(Body::empty()).expect("a request");
        assert_eq!(ask(request).await, (StatusCode::INTERNAL_SERVER_ERROR, "internal error\n".into()));
    }

    #[tokio::test]
    async fn the_body_limit_is_the_flag_and_not_the_default_of_axum() {
        let request = |length| Request::post("/length").body(Body::from(vec![0; length])).expect("a request");
        assert_eq!(ask(request(3 << 20)).await, (StatusCode::OK, (3 << 20).to_string()));
        assert_eq!(ask(request((4 << 20) + 1)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test]
    async fn a_request_id_is_made_or_kept_and_given_back() {
        let config = Config::parse_from(["x"]);
        let service = prepare(Router::new(), Life::begin(1), Shutdown::default(), &config);
        let id = async |request: Request<Body>| {
            let response = service.clone().oneshot(request).await.expect("infallible");
            response.headers()["x-request-id"].to_str().expect("text").to_owned()
        };
        let request = || Request::get("/").body(Body::empty()).expect("a request");
        assert_ne!(id(request()).await, id(request()).await);
        let mut named = request();
        named.headers_mut().insert("x-request-id", HeaderValue::from_static("mine"));
        assert_eq!(id(named).await, "mine");
    }
}
