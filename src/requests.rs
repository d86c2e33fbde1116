//! What every request passes through before it reaches `app.rs`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, MatchedPath};
use humantime::FormattedDuration;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep_until};
use tower::{Layer, Service, ServiceBuilder};
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::map_response_body::MapResponseBodyLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::{Span, debug, debug_span, error};

use crate::config::Config;
use crate::context::Context;
use crate::metrics;

/// `--log info,request=debug` shows each request, and names it in whatever a handler logs.
const TARGET: &str = "request";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A router behind the limits of the configuration.
#[derive(Clone)]
pub struct Routes {
    /// For requests without a body, which are most: what limits bodies costs them nothing.
    bodiless: Router,
    with_body: Router,
}

impl Routes {
    pub fn new(router: Router, config: &Config) -> Self {
        let care = CareLayer { ids: Numbers::new(), limit: config.request_timeout };
        let limits = ServiceBuilder::new()
            .layer(care.clone())
            .layer(MapResponseBodyLayer::new(Body::new))
            .layer(RequestBodyTimeoutLayer::new(config.request_timeout))
            .layer(DefaultBodyLimit::disable())
            .layer(RequestBodyLimitLayer::new(usize::try_from(config.body_limit.0).unwrap_or(usize::MAX)));
        // With its state, if only (), a router is built once, and not anew for each request.
        Self {
            bodiless: router.clone().layer(care).with_state(()),
            with_body: router.layer(limits).with_state(()),
        }
    }

    pub fn for_request(&self, has_body: bool) -> &Router {
        if has_body { &self.with_body } else { &self.bodiless }
    }
}

/// Names, traces and measures each request, and answers where the router does not: after a panic, and when it
/// takes too long.
#[derive(Clone)]
struct CareLayer {
    ids: Numbers,
    limit: Duration,
}

#[derive(Clone)]
struct Care<S> {
    inner: S,
    layer: CareLayer,
}

impl<S> Layer<S> for CareLayer {
    type Service = Care<S>;

    fn layer(&self, inner: S) -> Care<S> {
        Care { inner, layer: self.clone() }
    }
}

impl<S: Service<Request<Body>, Response = Response<Body>>> Service<Request<Body>> for Care<S> {
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Caring<S::Future>;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Caring<S::Future> {
        let id = request.headers().get(REQUEST_ID).cloned().unwrap_or_else(|| self.layer.ids.next());
        Caring {
            span: span(&request, &id),
            id: Some(id),
            route: request.extensions().get::<MatchedPath>().cloned(),
            method: metrics::method(request.method()),
            uri: request.uri().clone(),
            begun: Instant::now(),
            limit: self.layer.limit,
            late: None,
            future: self.inner.call(request),
        }
    }
}

pin_project! {
    struct Caring<F> {
        span: Span,
        id: Option<HeaderValue>,
        route: Option<MatchedPath>,
        method: &'static str,
        uri: Uri,
        begun: Instant,
        limit: Duration,
        // Most answers are there at once, and need no timer.
        late: Option<Pin<Box<Sleep>>>,
        #[pin]
        future: F,
    }
}

impl<F: Future<Output = Result<Response<Body>, E>>, E> Future for Caring<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        let _entered = this.span.enter();
        let polled = catch_unwind(AssertUnwindSafe(|| this.future.as_mut().poll(cx)));
        let mut response = match polled {
            Ok(Poll::Ready(Ok(response))) => response,
            Ok(Poll::Ready(Err(error))) => return Poll::Ready(Err(error)),
            Ok(Poll::Pending) => {
                let deadline = *this.begun + *this.limit;
                let late = this.late.get_or_insert_with(|| Box::pin(sleep_until(deadline.into())));
                std::task::ready!(late.as_mut().poll(cx));
                answer(StatusCode::SERVICE_UNAVAILABLE, "no answer in time\n")
            }
            // Logged where it happened (`log::init`).
            Err(_panic) => answer(StatusCode::INTERNAL_SERVER_ERROR, "internal error\n"),
        };
        let took = this.begun.elapsed();
        metrics::answered(this.route.as_ref(), this.method, response.status(), took);
        let status = response.status();
        if status.is_server_error() {
            let (status, latency) = (status.as_u16(), latency(took));
            if this.span.is_disabled() {
                // Nobody asked for spans; whoever reads of a failure wants to know of which request.
                let id = this.id.as_ref().and_then(|id| id.to_str().ok());
                let (method, path) = (*this.method, this.uri.path());
                error!(target: TARGET, request_id = id, method, path, status, %latency, "failed");
            } else {
                error!(target: TARGET, status, %latency, "failed");
            }
        } else {
            debug!(target: TARGET, status = status.as_u16(), latency = %latency(took), "answered");
        }
        if let Some(id) = this.id.take() {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        Poll::Ready(Ok(response))
    }
}

fn span(request: &Request<Body>, id: &HeaderValue) -> Span {
    debug_span!(
        target: TARGET,
        "request",
        request_id = id.to_str().ok(),
        method = %request.method(),
        path = request.uri().path(),
        peer = request.extensions().get::<Arc<Context>>().map(|context| tracing::field::display(context.peer)),
    )
}

fn latency(took: Duration) -> FormattedDuration {
    humantime::format_duration(Duration::from_micros(u64::try_from(took.as_micros()).unwrap_or(u64::MAX)))
}

fn answer(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Request ids that differ over restarts, and cost a counter: when the process was born, and a number.
#[derive(Clone)]
struct Numbers(Arc<(u64, AtomicU64)>);

impl Numbers {
    fn new() -> Self {
        let born = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(Arc::new((u64::try_from(born.as_micros()).unwrap_or(0), AtomicU64::new(0))))
    }

    /// 24 hexadecimal digits: 14 of the birth, 10 of the number.
    fn next(&self) -> HeaderValue {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let (born, next) = &*self.0;
        let number = next.fetch_add(1, Ordering::Relaxed);
        let id = u128::from(*born) << 40 | u128::from(number & 0xff_ffff_ffff);
        let digits: [u8; 24] = std::array::from_fn(|place| DIGITS[(id >> (4 * (23 - place))) as usize & 15]);
        HeaderValue::from_bytes(&digits).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use axum::routing::{get, post};
    use clap::Parser;
    use http_body::Body as _;
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
        let has_body = !request.body().is_end_stream();
        let response = Routes::new(router, &config)
            .for_request(has_body)
            .clone()
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
        let routes = Routes::new(Router::new(), &config);
        let id = async |request: Request<Body>| {
            let response = routes.for_request(false).clone().oneshot(request).await.expect("infallible");
            response.headers()["x-request-id"].to_str().expect("text").to_owned()
        };
        let request = || Request::get("/").body(Body::empty()).expect("a request");
        assert_ne!(id(request()).await, id(request()).await);
        let mut named = request();
        named.headers_mut().insert("x-request-id", HeaderValue::from_static("mine"));
        assert_eq!(id(named).await, "mine");
    }
}
