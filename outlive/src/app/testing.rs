//! Helpers for unit tests of routes.

use std::sync::Arc;

use axum::{Extension, Router};
use tokio_util::sync::CancellationToken;

use crate::app::context::RequestContext;
use crate::app::process::Process;
use crate::transport::stream::Peer;

/// Adds the context of a request to `routes`, so that a test can call them without a server. Handlers can take
/// [`Process`] (generation 1), [`Shutdown`](crate::Shutdown) (never cancelled) and [`Peer`] (a Unix socket) as
/// arguments. Without it, such a handler answers 500.
///
/// ```
/// use axum::{Router, body::Body, http::Request, routing::get};
/// use tower::ServiceExt;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let routes = Router::new().route("/", get(async |process: outlive::Process| process.generation.to_string()));
/// let routes = outlive::testing::with_context(routes);
/// let response = routes.oneshot(Request::new(Body::empty())).await.unwrap();
/// assert_eq!(response.status(), 200);
/// # }
/// ```
pub fn with_context(routes: Router) -> Router {
    let context = RequestContext {
        process: Process::begin(1),
        shutdown: CancellationToken::new(),
        peer: Peer::Unix,
        client_certificate: None,
    };
    routes.layer(Extension(Arc::new(context)))
}
