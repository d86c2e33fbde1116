//! Helpers for unit tests of routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::map_request_with_state;
use tokio_util::sync::CancellationToken;

use crate::app::context::RequestContext;
use crate::app::process::Process;
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::stream::Peer;

/// Adds the context of a request to `routes`, so that a test can call them without a server. Handlers can take
/// [`Process`] (generation 1), [`Shutdown`](crate::Shutdown) (never cancelled), [`Peer`] (a Unix socket) and
/// [`ClientCertificate`] (none) as arguments. Without it, such a handler answers 500.
///
/// A test sets another client as an extension of its request: a [`Peer`], or a [`client_certificate`].
///
/// ```
/// use axum::{Router, body::Body, http::Request, routing::get};
/// use outlive::Peer;
/// use tower::ServiceExt;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let routes = Router::new().route("/", get(async |peer: Peer| peer.to_string()));
/// let routes = outlive::testing::with_context(routes);
/// let client = Peer::Tcp("192.0.2.1:40000".parse().unwrap());
/// let request = Request::builder().uri("/").extension(client).body(Body::empty()).unwrap();
/// let response = routes.oneshot(request).await.unwrap();
/// let body = axum::body::to_bytes(response.into_body(), 100).await.unwrap();
/// assert_eq!(body, "192.0.2.1:40000");
/// # }
/// ```
pub fn with_context(routes: Router) -> Router {
    let template = RequestContext {
        process: Process::begin(1),
        shutdown: CancellationToken::new(),
        peer: Peer::Unix,
        client_certificate: None,
    };
    routes.layer(map_request_with_state(template, insert_context))
}

async fn insert_context(State(template): State<RequestContext>, mut request: Request) -> Request {
    let extensions = request.extensions_mut();
    let peer = extensions.get().copied().unwrap_or(template.peer);
    let client_certificate = extensions.get().cloned();
    extensions.insert(Arc::new(RequestContext { peer, client_certificate, ..template }));
    request
}

/// The certificate of a client, for a request to routes of [`with_context`]. `der` is its encoding as DER (RFC 5280), which is
/// not verified.
///
/// ```
/// use axum::{Router, body::Body, http::Request, routing::get};
/// use outlive::ClientCertificate;
/// use outlive::testing::{client_certificate, with_context};
/// use tower::ServiceExt;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// async fn common_name(certificate: ClientCertificate) -> String {
///     certificate.common_name().unwrap_or("none").to_string()
/// }
///
/// let routes = with_context(Router::new().route("/", get(common_name)));
/// let anonymous = Request::new(Body::empty());
/// assert_eq!(routes.clone().oneshot(anonymous).await.unwrap().status(), 403);
/// // A test has the bytes of a whole certificate here: include_bytes!("partner.der")
/// let der = b"not a certificate";
/// let known = Request::builder().extension(client_certificate(der)).body(Body::empty()).unwrap();
/// assert_eq!(routes.oneshot(known).await.unwrap().status(), 200);
/// # }
/// ```
pub fn client_certificate(der: &[u8]) -> ClientCertificate {
    ClientCertificate::verified(der.to_vec().into(), Vec::new(), Default::default())
}
