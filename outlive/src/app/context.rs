//! What a handler may know of the process that it answers in, and of who asks.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use hyper::StatusCode;
use hyper::http::request::Parts;
use tokio_util::sync::CancellationToken;

use crate::app::process::Process;
use crate::transport::stream::Peer;

/// Cancelled when this process begins to end. A handler that would go on for ever (WebSocket, event stream) takes it
/// as an argument and ends then; it has until the drain limit.
///
/// ```
/// use outlive::Shutdown;
///
/// async fn wait(Shutdown(shutdown): Shutdown) -> &'static str {
///     shutdown.cancelled().await;
///     "the process ends\n"
/// }
/// # let _: axum::Router = axum::Router::new().route("/", axum::routing::get(wait));
/// ```
#[derive(Clone, Debug)]
pub struct Shutdown(pub CancellationToken);

/// Goes with each request of a connection.
pub struct RequestContext {
    pub process: Process,
    pub shutdown: CancellationToken,
    pub peer: Peer,
}

/// A request that came by no connection of ours: a unit test has `outlive::testing::with_context` for it.
type Missing = (StatusCode, &'static str);

fn of(parts: &Parts) -> Result<&RequestContext, Missing> {
    let context = parts.extensions.get::<Arc<RequestContext>>().map(AsRef::as_ref);
    context.ok_or((
        StatusCode::INTERNAL_SERVER_ERROR,
        "this request has no outlive context: in a unit test, use outlive::testing::with_context\n",
    ))
}

impl<S: Sync> FromRequestParts<S> for Process {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        of(parts).map(|context| context.process)
    }
}

impl<S: Sync> FromRequestParts<S> for Shutdown {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        of(parts).map(|context| Self(context.shutdown.clone()))
    }
}

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        of(parts).map(|context| context.peer)
    }
}
