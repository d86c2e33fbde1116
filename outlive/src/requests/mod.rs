//! [`Routes`], the layer between a connection and the application's router. Each request gets an id, a span, limits of
//! time, size and number, and an entry in the metrics. A request whose handler panics is answered with 500.
//!
//! `connection/exchange.rs` calls [`Routes::answer`]. This is one future and not a stack of layers around the router,
//! because each layer of a router costs two allocations for each request.

mod forwarded;
mod limited_body;
mod request_limits;
mod route_labels;

use std::cell::Cell;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::DefaultBodyLimit;
use axum::routing::future::RouteFuture;
use http_body::Body as HttpBody;
use humantime::FormattedDuration;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Request, Response, StatusCode, Version};
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep_until};
use tower::layer::layer_fn;
use tower::{BoxError, Service, service_fn};
use tracing::field::Empty;
use tracing::{Span, debug, debug_span, error, info};

use crate::app::context::RequestContext;
use crate::observe::traces::RequestTrace;
use crate::observe::{log, metrics};
use crate::registry::InFlight;
use crate::transport::stream::Peer;
pub use forwarded::{ForwardedHeader, Proxies};
use limited_body::Within;
use request_limits::Permit;
pub use request_limits::RequestLimits;
use route_labels::RouteLabels;

/// The log target of requests: `--log info,request=debug` logs each request, and adds its fields to the events of
/// handlers.
const TARGET: &str = "request";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The maximum length of a client's request id in bytes. A longer one is replaced, because each log line and the
/// response repeat it.
const REQUEST_ID_LIMIT: usize = 128;
/// How many bytes of a path or method a log line shows. A client may send 64 KiB of each.
const LOGGED_LIMIT: usize = 1024;

/// In the extensions of a response whose status of the class 5xx is no failure, such as that of `/readyz` during a drain.
#[derive(Clone, Copy, Debug)]
pub struct Intended;

/// In the extensions of a request that is answered again, because its response has moved here. It was counted when it began.
#[derive(Clone, Copy, Debug)]
pub struct CountedBefore;

/// A router behind the limits of the configuration. Each connection has its own clone, because threads that share one
/// would wait for each other.
#[derive(Clone)]
pub struct Routes {
    router: Router,
    /// The same router with [`RouteLabels`], for requests whose label is not known before the router has matched the
    /// path.
    recording: Router,
    /// The same routes, but all of them answer 413, for requests whose body is too large. It is a router too, so that
    /// these requests are counted under the label of their route.
    refusing: Router,
    labels: RouteLabels,
    body_limit: usize,
    limit: Duration,
    access_log: AccessLog,
    /// None without `--max-requests` and `--max-requests-per-client`, and for admin routes.
    admission: Option<Admission>,
}

/// Whether a line is logged for each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessLog {
    On,
    Off,
}

/// The limits of the number of requests, and the routes for those above a limit: all of them answer 503, under the label of
/// the route.
#[derive(Clone)]
struct Admission {
    limits: Arc<RequestLimits>,
    overloaded: Router,
}

impl Routes {
    /// `body_limit` is in bytes. `limit` is the time until the response begins, and the time between two chunks of a
    /// request body.
    pub fn new(router: Router, body_limit: u64, limit: Duration) -> Self {
        let labels = RouteLabels::new();
        let refuse = layer_fn(|_| {
            service_fn(async |_| {
                Ok::<_, Infallible>(answer(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n"))
            })
        });
        // `with_state` builds the router here. Without it, axum would do so for each request.
        Self {
            router: router.clone().with_state(()),
            recording: router.clone().layer(labels).with_state(()),
            refusing: router.layer(refuse).layer(labels).with_state(()),
            labels,
            body_limit: usize::try_from(body_limit).unwrap_or(usize::MAX),
            limit,
            access_log: AccessLog::Off,
            admission: None,
        }
    }

    /// With a line in the log for each request, if `access_log` is on.
    #[must_use]
    pub fn with_access_log(self, access_log: AccessLog) -> Self {
        Self { access_log, ..self }
    }

    /// The same routes with `limits` on the number of requests.
    pub fn limited_by(self, limits: Option<Arc<RequestLimits>>) -> Self {
        let refuse = layer_fn(|_| service_fn(async |_| Ok::<_, Infallible>(overloaded())));
        let routes = || self.recording.clone().layer(refuse).layer(self.labels).with_state(());
        let admission = limits.map(|limits| Admission { limits, overloaded: routes() });
        Self { admission, ..self }
    }

    /// Starts to answer a request. `body` is `None` if the request has no body, which saves the wrappers of the body.
    pub fn answer<B>(&mut self, head: Parts, body: Option<B>) -> ResponseFuture
    where
        B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let id = request_id(&head.headers).cloned().unwrap_or_else(new_id);
        let is_counted = head.extensions.get::<CountedBefore>().is_none();
        let span = Some(span(&head, &id)).filter(|span| !span.is_disabled()).map(Box::new);
        let access = (is_counted && self.access_log == AccessLog::On).then_some(head.version);
        let method = metrics::method(&head.method);
        let trace = if is_counted {
            let path = logged(head.uri.path());
            RequestTrace::begin(&head.headers, method, path, head.version, peer(&head))
        } else {
            RequestTrace::none()
        };
        let route = self.labels.of_path(head.uri.path());
        let is_too_large =
            |body: &B| body.size_hint().lower() > u64::try_from(self.body_limit).unwrap_or(u64::MAX);
        let admitted = self.admission.as_mut().map(|admission| admission.admit(&head, is_counted));
        let (permit, overloaded) = match admitted {
            Some(Ok(permit)) => (Some(permit), None),
            Some(Err(overloaded)) => (None, Some(overloaded)),
            None => (None, None),
        };
        let router = match (overloaded, route, &body) {
            (Some(overloaded), _, _) => overloaded,
            (None, _, Some(body)) if is_too_large(body) => &mut self.refusing,
            (None, Some(_), _) => &mut self.router,
            (None, None, _) => &mut self.recording,
        };
        let request = match body {
            Some(body) => {
                let body = Body::new(Within::new(body, self.body_limit, self.limit));
                let mut request = Request::from_parts(head, body);
                DefaultBodyLimit::disable().apply(&mut request);
                request
            }
            None => Request::from_parts(head, Body::empty()),
        };
        ResponseFuture {
            span,
            trace,
            access,
            id: Some(id),
            method,
            is_counted,
            route,
            limit: self.limit,
            late: None,
            permit: permit.map(Box::new),
            future: router.call(request),
        }
    }
}

impl Admission {
    /// A permit for the request, or the routes that refuse it. `begins`: its response has not begun in another process.
    fn admit(&mut self, head: &Parts, begins: bool) -> Result<Permit, &mut Router> {
        // Requests of unit tests have no context, and no peer.
        let peer = head.extensions.get::<Arc<RequestContext>>().map_or(Peer::Unix, |context| context.peer);
        if begins {
            self.limits.admit(peer).map_err(|_| &mut self.overloaded)
        } else {
            Ok(self.limits.admit_continued(peer))
        }
    }
}

pin_project! {
    /// The future of a response: a request until its response begins. Fields that few requests need are boxed, because the
    /// future is moved several times, and because glibc needs 2.5 times the instructions to allocate the task of an HTTP/2
    /// stream with 896 bytes as with 768.
    pub struct ResponseFuture {
        // Present if it is enabled.
        span: Option<Box<Span>>,
        trace: RequestTrace,
        // The version of the request, if it is to be in the access log.
        access: Option<Version>,
        id: Option<HeaderValue>,
        method: &'static str,
        is_counted: bool,
        route: Option<&'static str>,
        limit: Duration,
        // Created at the first pending poll, because most responses are ready at once and need no timer.
        late: Option<Pin<Box<Sleep>>>,
        // Present if the number of requests is limited, until the response begins. Its body has it then.
        permit: Option<Box<Permit>>,
        #[pin]
        future: RouteFuture<Infallible>,
    }
}

impl ResponseFuture {
    /// Ready with the response to `request`, whose beginning is the start of the time limit.
    pub fn poll(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, request: &InFlight) -> Poll<Response<Body>> {
        let mut this = self.project();
        let _traced = this.trace.enter();
        let _entered = this.span.as_deref().map(Span::enter);
        let polled = catch_unwind(AssertUnwindSafe(|| this.future.as_mut().poll(cx)));
        *this.route = route_labels::matched().or(*this.route);
        let mut reason = String::new();
        let mut response = match polled {
            Ok(Poll::Ready(Ok(response))) => response,
            Ok(Poll::Pending) => {
                let deadline = request.since + *this.limit;
                let late = this.late.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                std::task::ready!(late.as_mut().poll(cx));
                let limit = humantime::format_duration(*this.limit);
                reason = format!(": no response began within {limit} (--request-timeout)");
                answer(StatusCode::SERVICE_UNAVAILABLE, "the service did not respond in time\n")
            }
            // The panic hook has logged it (`log::init`).
            Err(_panic) => answer(StatusCode::INTERNAL_SERVER_ERROR, "internal error\n"),
        };
        // The application may have set and logged its own id, as `PropagateRequestIdLayer` of tower-http does.
        if let Some(id) = request_id(response.headers()) {
            *this.id = Some(id.clone());
        }
        let took = request.since.elapsed();
        let status = response.status();
        if *this.is_counted {
            metrics::answered(*this.route, this.method, status, took);
        }
        let (id, method, route) = (&*this.id, *this.method, *this.route);
        let of_request = || (id.as_ref().and_then(|id| id.to_str().ok()), logged(request.path.path()));
        let code = status.as_u16();
        if status.is_server_error() && response.extensions().get::<Intended>().is_none() {
            let latency = latency(took);
            if this.span.as_deref().is_some_and(log::shows) {
                error!(target: TARGET, status = code, %latency, "request failed{reason}");
            } else {
                // The span would add these fields. It is disabled by default, but a failure needs them to be found.
                let (id, path) = of_request();
                error!(
                    target: TARGET,
                    request_id = id,
                    method,
                    path,
                    status = code,
                    %latency,
                    "request failed{reason}"
                );
            }
        } else {
            debug!(target: TARGET, status = code, latency = %latency(took), "answered");
        }
        this.trace.answered(method, route, status);
        if let Some(version) = *this.access {
            let (id, path) = of_request();
            // Without the span, which would repeat some of the fields.
            info!(
                target: log::ACCESS,
                parent: None,
                request_id = id,
                method,
                path,
                route,
                status = code,
                latency_ms = milliseconds(took),
                peer = %request.peer,
                version = ?version,
                "{method} {path} {code}"
            );
        }
        if let Some(span) = this.span.as_deref() {
            // After the events, which have fields of the same names.
            span.record("route", route);
            span.record("status", code);
        }
        if let Some(mut id) = this.id.take() {
            // h2 does not enter such a value into the header table of the client (RFC 7541 section 7.1.3). Otherwise each id
            // would evict another field, and h2 would compare each id with those in the table.
            id.set_sensitive(true);
            response.headers_mut().insert(REQUEST_ID, id);
        }
        if let Some(permit) = this.permit.take() {
            response = response.map(|body| permit.until_end_of(body));
        }
        Poll::Ready(response)
    }
}

fn span(head: &Parts, id: &HeaderValue) -> Span {
    debug_span!(
        target: TARGET,
        "request",
        request_id = id.to_str().ok(),
        method = logged(head.method.as_str()),
        path = logged(head.uri.path()),
        peer = peer(head).map(tracing::field::display),
        route = Empty,
        status = Empty,
    )
}

fn peer(head: &Parts) -> Option<Peer> {
    head.extensions.get::<Arc<RequestContext>>().map(|context| context.peer)
}

/// In milliseconds, to the microsecond.
fn milliseconds(took: Duration) -> f64 {
    (took.as_secs_f64() * 1e6).round() / 1e3
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

/// The response to a request above a limit of the number of requests.
fn overloaded() -> Response<Body> {
    let mut response =
        answer(StatusCode::SERVICE_UNAVAILABLE, "too many requests are in flight; try again later\n");
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    // `RequestLimits` logs refusals, but not each one.
    response.extensions_mut().insert(Intended);
    response
}

/// The beginning of `text`, which comes from a client, as it is logged.
pub fn logged(text: &str) -> &str {
    &text[..text.floor_char_boundary(LOGGED_LIMIT)]
}

/// The id in these fields, if it can be logged and returned unchanged. Accepted are 1 to [`REQUEST_ID_LIMIT`] letters, digits
/// and characters of `-._~:/+=,@`.
fn request_id(headers: &HeaderMap) -> Option<&HeaderValue> {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~:/+=,@".contains(byte);
    let is_accepted = |id: &&HeaderValue| {
        (1..=REQUEST_ID_LIMIT).contains(&id.len()) && id.as_bytes().iter().all(is_allowed)
    };
    // A scan, because for the number of fields that most messages have it takes fewer instructions than to hash the name.
    let wanted = REQUEST_ID;
    headers.iter().find(|(name, _)| **name == wanted).map(|(_, id)| id).filter(is_accepted)
}

/// How many numbers a thread reserves at once, so that threads seldom contend for the shared counter.
const BLOCK: u64 = 1024;

/// A new id, which is unique across processes: 14 hexadecimal digits of the time at which this process made its first
/// id, in microseconds, and 10 of a number.
fn new_id() -> HeaderValue {
    static FIRST_USE: LazyLock<[u8; 14]> = LazyLock::new(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        hexadecimal(u64::try_from(now.as_micros()).unwrap_or(0))
    });
    static BLOCKS: AtomicU64 = AtomicU64::new(0);
    thread_local! {
        static NEXT: Cell<u64> = const { Cell::new(0) };
    }
    let mut number = NEXT.get();
    if number.is_multiple_of(BLOCK) {
        number = BLOCKS.fetch_add(BLOCK, Ordering::Relaxed);
    }
    NEXT.set(number + 1);
    let mut digits = [0; 24];
    digits[..14].copy_from_slice(&*FIRST_USE);
    digits[14..].copy_from_slice(&hexadecimal::<10>(number));
    HeaderValue::from_bytes(&digits).expect("digits are visible ASCII")
}

/// The last `DIGITS` hexadecimal digits of `number`.
fn hexadecimal<const DIGITS: usize>(number: u64) -> [u8; DIGITS] {
    std::array::from_fn(|place| b"0123456789abcdef"[(number >> (4 * (DIGITS - 1 - place)) & 15) as usize])
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::num::NonZeroU32;
    use std::pin::pin;

    use axum::routing::{delete, get, post, put};
    use futures_util::stream;
    use http_body_util::BodyExt;
    use tempfile::NamedTempFile;
    use tokio::time::Instant;
    use tracing::subscriber::DefaultGuard;
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::prelude::*;

    use super::*;
    use crate::observe::metrics::count;

    const LIMIT: Duration = Duration::from_secs(30);

    async fn answer_to(routes: &mut Routes, request: Request<Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let path = head.uri.path_and_query().cloned().expect("the request has a path");
        let in_flight = InFlight { number: 0, path, peer: Peer::Unix, since: Instant::now() };
        let mut answering = pin!(routes.answer(head, (!body.is_end_stream()).then_some(body)));
        poll_fn(|cx| answering.as_mut().poll(cx, &in_flight)).await
    }

    async fn ask(request: Request<Body>) -> (StatusCode, String) {
        async fn panics() {
            panic!("on purpose");
        }
        let length = |body: Bytes| async move { body.len().to_string() };
        let router = Router::new().route("/panics", get(panics)).route("/length", post(length));
        let response = answer_to(&mut Routes::new(router, 4 << 20, LIMIT), request).await;
        let status = response.status();
        let body = response.into_body().collect().await.expect("the body is complete").to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    async fn request_id_after(sent: &[u8]) -> HeaderValue {
        let sent = HeaderValue::from_bytes(sent).expect("the bytes are valid in a field value");
        let request =
            Request::get("/").header(REQUEST_ID, sent).body(Body::empty()).expect("the request is valid");
        let response = answer_to(&mut Routes::new(Router::new(), 0, LIMIT), request).await;
        response.headers()[REQUEST_ID].clone()
    }

    #[tokio::test]
    async fn request_id_of_allowed_characters_is_returned_and_any_other_is_replaced() {
        let longest = "x".repeat(REQUEST_ID_LIMIT);
        for id in ["7", "Root=1-5759e988-bd862e3fe1be46a994272793", "a-._~:/+=,@Z", &longest] {
            assert_eq!(request_id_after(id.as_bytes()).await, id);
        }
        let too_long = "x".repeat(REQUEST_ID_LIMIT + 1);
        for id in ["", "a b", "a\tb", "\"quoted\"", "a;b", "{}", "\u{e4}", &too_long, &"x".repeat(60_000)] {
            let replaced = request_id_after(id.as_bytes()).await;
            assert_ne!(replaced, id);
            assert_eq!(replaced.len(), 24, "{id:?} is replaced by an id of this process");
        }
    }

    #[tokio::test]
    async fn valid_request_id_of_the_application_is_kept_and_an_invalid_one_is_replaced() {
        let application = Router::new()
            .route("/accepted", get(async || [(REQUEST_ID, "theirs")]))
            .route("/replaced", get(async || [(REQUEST_ID, "{}")]));
        let (log, _guard) = access_log_to_file();
        let mut routes = Routes::new(application, 0, LIMIT).with_access_log(AccessLog::On);
        for path in ["/accepted", "/replaced"] {
            let request = Request::get(path).body(Body::empty()).expect("the request is valid");
            let response = answer_to(&mut routes, request).await;
            let id = response.headers()[REQUEST_ID].to_str().expect("visible ASCII").to_owned();
            assert_eq!(id == "theirs", path == "/accepted", "{id}");
            let logged = logged_in(&log);
            assert!(logged.contains(&format!("request_id=\"{id}\"")), "{logged}");
        }
    }

    #[tokio::test]
    async fn request_id_stays_out_of_the_header_table_of_the_client() {
        for sent in ["mine", "is replaced"] {
            assert!(request_id_after(sent.as_bytes()).await.is_sensitive(), "{sent}");
        }
    }

    #[test]
    fn logged_text_is_cut_at_a_character() {
        assert_eq!(logged("/short"), "/short");
        assert_eq!(logged(&"x".repeat(2 * LOGGED_LIMIT)).len(), LOGGED_LIMIT);
        assert_eq!(logged(&format!("x{}", "\u{e4}".repeat(LOGGED_LIMIT))).len(), LOGGED_LIMIT - 1);
    }

    #[tokio::test]
    async fn panic_in_a_handler_is_answered_with_500() {
        let request = Request::get("/panics").body(Body::empty()).expect("the request is valid");
        assert_eq!(ask(request).await, (StatusCode::INTERNAL_SERVER_ERROR, "internal error\n".into()));
    }

    /// `router`, of which one request may be in flight.
    fn limited_to_one(router: Router) -> Routes {
        let limits = RequestLimits::new(NonZeroU32::new(1), None);
        Routes::new(router, 1024, LIMIT).limited_by(limits)
    }

    fn request_for(path: &str) -> Request<Body> {
        Request::get(path).body(Body::empty()).expect("the request is valid")
    }

    #[tokio::test]
    async fn request_counts_until_its_response_body_is_dropped() {
        let mut routes = limited_to_one(Router::new().route("/limited/{name}", get(async || "all")));
        let mut of_other_connection = routes.clone();
        let first = answer_to(&mut routes, request_for("/limited/1")).await;
        assert_eq!(first.body().size_hint().exact(), Some(3), "the length of the body is unknown");
        let refused = answer_to(&mut of_other_connection, request_for("/limited/2")).await;
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.headers()[RETRY_AFTER], "1");
        assert!(refused.headers().contains_key(REQUEST_ID));
        assert_eq!(count("/limited/{name}", "GET", "503"), 1);
        drop(first);
        let next = answer_to(&mut of_other_connection, request_for("/limited/2")).await;
        assert_eq!(next.status(), StatusCode::OK, "a refused request counts");
    }

    #[tokio::test]
    async fn request_whose_client_disconnects_before_the_response_no_longer_counts() {
        let pending = Router::new().route("/", get(std::future::pending::<()>));
        let mut routes = limited_to_one(pending.route("/other", get(async || ())));
        let (head, _) = request_for("/").into_parts();
        let path = head.uri.path_and_query().cloned().expect("the request has a path");
        let mut pending = Box::pin(routes.answer(head, None::<Body>));
        let in_flight = InFlight { number: 0, path, peer: Peer::Unix, since: Instant::now() };
        poll_fn(|cx| {
            assert!(pending.as_mut().poll(cx, &in_flight).is_pending());
            Poll::Ready(())
        })
        .await;
        let mut status = async || answer_to(&mut routes, request_for("/other")).await.status();
        assert_eq!(status().await, StatusCode::SERVICE_UNAVAILABLE);
        drop(pending);
        assert_eq!(status().await, StatusCode::OK);
    }

    #[tokio::test]
    async fn request_whose_handler_panics_no_longer_counts_after_its_response() {
        async fn panics() {
            panic!("on purpose");
        }
        let mut routes = limited_to_one(Router::new().route("/", get(panics)));
        for _ in 0..2 {
            let response = answer_to(&mut routes, request_for("/")).await;
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        }
    }

    #[tokio::test]
    async fn response_that_began_in_another_process_is_not_refused() {
        let mut routes = limited_to_one(Router::new().route("/", get(async || ())));
        let _first = answer_to(&mut routes, request_for("/")).await;
        let mut continued = request_for("/");
        continued.extensions_mut().insert(CountedBefore);
        assert_eq!(answer_to(&mut routes, continued).await.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn refused_requests_are_logged_once_with_the_option_and_not_as_errors() {
        let mut routes = limited_to_one(Router::new().route("/", get(async || ())));
        let _first = answer_to(&mut routes, request_for("/")).await;
        let (file, _guard) = log_to_file();
        for _ in 0..3 {
            answer_to(&mut routes, request_for("/")).await;
        }
        let lines = logged_in(&file);
        assert_eq!(
            lines.matches("the limit of 1 in flight is reached (--max-requests)").count(),
            1,
            "{lines}"
        );
        assert!(!lines.contains("ERROR"), "{lines}");
    }

    /// A file with what this thread logs until the guard is dropped.
    fn log_to_file() -> (NamedTempFile, DefaultGuard) {
        let file = NamedTempFile::new().expect("the file is created");
        let writer = Arc::new(file.reopen().expect("the file is opened"));
        let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false);
        let subscriber = subscriber.with_max_level(tracing::Level::TRACE).finish();
        (file, tracing::subscriber::set_default(subscriber))
    }

    fn logged_in(file: &NamedTempFile) -> String {
        std::fs::read_to_string(file.path()).expect("the file is readable")
    }

    #[tokio::test]
    async fn response_with_an_intended_status_5xx_is_not_logged_as_an_error() {
        let answer = |intended: bool| async move {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            if intended {
                response.extensions_mut().insert(Intended);
            }
            response
        };
        let router = Router::new()
            .route("/intended", get(move || answer(true)))
            .route("/other", get(move || answer(false)));
        let mut service = Routes::new(router, 1024, LIMIT);
        for (path, level) in [("/intended", "DEBUG"), ("/other", "ERROR")] {
            let (file, _guard) = log_to_file();
            let request = Request::get(path).body(Body::empty()).expect("the request is valid");
            assert_eq!(answer_to(&mut service, request).await.status(), StatusCode::SERVICE_UNAVAILABLE);
            let lines = logged_in(&file);
            let line = lines.lines().find(|line| line.contains("503")).expect(&lines);
            assert!(line.contains(level), "{path}: {lines}");
        }
    }

    #[tokio::test]
    async fn failure_is_logged_with_its_request_although_only_another_layer_receives_the_span() {
        let file = NamedTempFile::new().expect("the file is created");
        let writer = Arc::new(file.reopen().expect("the file is opened"));
        let log = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
        let other =
            tracing_subscriber::fmt::layer().with_writer(std::io::sink).with_filter(LevelFilter::TRACE);
        let subscriber = tracing_subscriber::registry().with(other).with(log.with_filter(LevelFilter::ERROR));
        let _guard = tracing::subscriber::set_default(subscriber);
        let application = Router::new().route("/fails", get(async || StatusCode::BAD_GATEWAY));
        let request = Request::get("/fails").body(Body::empty()).expect("the request is valid");
        answer_to(&mut Routes::new(application, 1024, LIMIT), request).await;
        let lines = logged_in(&file);
        assert!(lines.contains("method=\"GET\" path=\"/fails\" status=502"), "{lines}");
    }

    /// The access log as it is without `request=debug`.
    fn access_log_to_file() -> (NamedTempFile, DefaultGuard) {
        let file = NamedTempFile::new().expect("the file is created");
        let writer = Arc::new(file.reopen().expect("the file is opened"));
        let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
        let lines = lines.with_filter(Targets::new().with_target("access", LevelFilter::INFO));
        (file, tracing::subscriber::set_default(tracing_subscriber::registry().with(lines)))
    }

    #[tokio::test(start_paused = true)]
    async fn access_log_has_a_line_for_each_request_and_for_one_that_panics_or_is_late_too() {
        let application = Router::new()
            .route("/users/{id}", put(async || StatusCode::CREATED))
            .route("/panics", get(async || panic!("on purpose") as ()))
            .route("/late", get(std::future::pending::<()>));
        let mut routes = Routes::new(application, 1024, LIMIT).with_access_log(AccessLog::On);
        for (method, path, wanted) in [
            (
                "PUT",
                "/users/7",
                "PUT /users/7 201 request_id=\"mine\" method=\"PUT\" path=\"/users/7\" \
                route=\"/users/{id}\" status=201 latency_ms=0.0 peer=unix version=HTTP/1.1",
            ),
            ("GET", "/panics", "route=\"/panics\" status=500 latency_ms=0.0"),
            ("GET", "/late", "route=\"/late\" status=503 latency_ms=30"),
            ("GET", "/none", "path=\"/none\" status=404"),
        ] {
            let (file, _guard) = access_log_to_file();
            let request = Request::builder().method(method).uri(path).header("x-request-id", "mine");
            let request = request.body(Body::empty()).expect("the request is valid");
            answer_to(&mut routes, request).await;
            let lines = logged_in(&file);
            assert_eq!(lines.lines().count(), 1, "{lines}");
            assert!(lines.contains("INFO access: ") && lines.contains(wanted), "{wanted}: {lines}");
        }
    }

    #[tokio::test]
    async fn access_log_is_off_by_default_and_has_no_line_for_a_response_that_moved() {
        for (access_log, is_counted) in [(AccessLog::Off, true), (AccessLog::On, false)] {
            let (file, _guard) = access_log_to_file();
            let mut request = Request::new(Body::empty());
            if !is_counted {
                request.extensions_mut().insert(CountedBefore);
            }
            let mut routes = Routes::new(Router::new(), 1024, LIMIT);
            if access_log == AccessLog::On {
                routes = routes.with_access_log(access_log);
            }
            answer_to(&mut routes, request).await;
            assert_eq!(logged_in(&file), "");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn request_without_a_response_in_time_is_logged_with_the_limit() {
        let router = Router::new().route("/", get(std::future::pending::<()>));
        let (file, _guard) = log_to_file();
        let request = Request::get("/").body(Body::empty()).expect("the request is valid");
        let response = answer_to(&mut Routes::new(router, 1024, LIMIT), request).await;
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        let lines = logged_in(&file);
        assert!(
            lines.contains("request failed: no response began within 30s (--request-timeout)"),
            "{lines}"
        );
    }

    #[tokio::test]
    async fn body_limit_is_the_configured_one_and_not_the_default_of_axum() {
        let request = |length| {
            Request::post("/length").body(Body::from(vec![0; length])).expect("the request is valid")
        };
        assert_eq!(ask(request(3 << 20)).await, (StatusCode::OK, (3 << 20).to_string()));
        assert_eq!(ask(request((4 << 20) + 1)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test]
    async fn body_of_unknown_length_above_the_limit_is_refused_with_413() {
        let request = |chunks| {
            let chunks = stream::iter((0..chunks).map(|_| Ok::<_, Infallible>(vec![0; 1 << 20])));
            Request::post("/length").body(Body::from_stream(chunks)).expect("the request is valid")
        };
        assert_eq!(ask(request(4)).await, (StatusCode::OK, (4 << 20).to_string()));
        assert_eq!(ask(request(5)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test]
    async fn body_with_a_length_above_the_limit_is_refused_with_413_before_the_handler_is_called() {
        async fn unread(_: Body) {
            panic!("the handler was called");
        }
        let mut routes = Routes::new(Router::new().route("/refused/{name}", put(unread)), 1024, LIMIT);
        let request =
            Request::put("/refused/me").body(Body::from(vec![0; 1025])).expect("the request is valid");
        assert_eq!(answer_to(&mut routes, request).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(count("/refused/{name}", "PUT", "413"), 1);
    }

    #[tokio::test]
    async fn request_is_counted_by_the_template_of_its_route() {
        let plan = || Router::new().route("/counted/by/{name}", delete(async || ()));
        let mut routes = Routes::new(plan().route("/counted/fixed", delete(async || ())), 1024, LIMIT);
        let mut others = Routes::new(plan(), 1024, LIMIT);
        let request = |path: &str| Request::delete(path).body(Body::empty()).expect("the request is valid");
        for path in ["/counted/fixed", "/counted/fixed", "/counted/by/me", "/counted/by/{name}"] {
            answer_to(&mut routes, request(path)).await;
        }
        answer_to(&mut others, request("/counted/fixed")).await;
        assert_eq!(count("/counted/fixed", "DELETE", "200"), 2);
        assert_eq!(count("/counted/by/{name}", "DELETE", "200"), 2);
        assert_eq!(count("/counted/fixed", "DELETE", "404"), 0, "the route belongs to another router");
        assert_eq!(count("", "DELETE", "404"), 1);
    }

    #[tokio::test]
    async fn response_has_the_request_id_of_the_client_or_a_new_one() {
        let mut routes = Routes::new(Router::new(), 1024, LIMIT);
        let mut id = async |request: Request<Body>| {
            let response = answer_to(&mut routes, request).await;
            response.headers()["x-request-id"].to_str().expect("the text is valid").to_owned()
        };
        let request = || Request::get("/").body(Body::empty()).expect("the request is valid");
        assert_ne!(id(request()).await, id(request()).await);
        let mut named = request();
        named.headers_mut().insert("x-request-id", HeaderValue::from_static("mine"));
        assert_eq!(id(named).await, "mine");
    }
}
