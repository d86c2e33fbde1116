//! The context of a request: the process that serves it, its shutdown, and the peer. `connection` attaches it to each
//! request as an extension, and handlers take its parts as arguments (axum extractors).

use std::sync::Arc;

use axum::extract::{FromRequestParts, OptionalFromRequestParts};
use hyper::StatusCode;
use hyper::http::request::Parts;
use tokio_util::sync::CancellationToken;

use crate::app::process::Process;
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::stream::Peer;

/// A token that is cancelled when this process begins to drain. A handler of a response that does not end by itself,
/// such as a long poll or a stream of gRPC, takes it as an argument, and ends the response when the token is cancelled.
/// Otherwise the response is cut off at `--drain-timeout`, after a reload at `--linger-timeout`, and the end of the process is
/// delayed until then.
///
/// The handler of a WebSocket has to end it too. Otherwise it is cut off at `--drain-timeout`. If the process still sends
/// responses after a reload at that time, the WebSocket is cut off at their end.
///
/// The handler of a WebSocket can take a [`Carry`](crate::Carry) instead, that of an event stream can return an
/// [`EventStream`](crate::EventStream), and that of a gRPC stream can mark its response as [`Resumable`](crate::Resumable), so
/// that the connection does not have to end.
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

/// The context of a request. All requests of a connection share one, unless a proxy reports the client of each.
#[derive(Clone)]
pub struct RequestContext {
    pub process: Process,
    pub shutdown: CancellationToken,
    pub peer: Peer,
    /// Present if the client has presented one.
    pub client_certificate: Option<ClientCertificate>,
}

/// The response to a request without a context, which can only be one that a unit test made.
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

impl<S: Sync> FromRequestParts<S> for ClientCertificate {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        let certificate = of(parts)?.client_certificate.clone();
        certificate.ok_or((StatusCode::FORBIDDEN, "this request needs a client certificate\n"))
    }
}

impl<S: Sync> OptionalFromRequestParts<S> for ClientCertificate {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Option<Self>, Missing> {
        of(parts).map(|context| context.client_certificate.clone())
    }
}
