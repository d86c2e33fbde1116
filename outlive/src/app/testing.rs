//! For unit tests of routes.

use std::sync::Arc;

use axum::{Extension, Router};
use tokio_util::sync::CancellationToken;

use crate::app::context::RequestContext;
use crate::app::process::Process;
use crate::transport::stream::Peer;

/// `routes` as they are served, with no server: handlers may ask for [`Process`] (generation 1),
/// [`Shutdown`](crate::Shutdown) (never) and [`Peer`] (a Unix socket).
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
    let context =
        RequestContext { process: Process::begin(1), shutdown: CancellationToken::new(), peer: Peer::Unix };
    routes.layer(Extension(Arc::new(context)))
}
