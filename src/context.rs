//! What a handler may know of the process that it answers in. Any of these may stand among its arguments:
//! `life: Life`, `shutdown: Shutdown`, `peer: Peer`.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use hyper::StatusCode;
use hyper::http::request::Parts;

use crate::life::{Life, Shutdown};
use crate::stream::Peer;

/// Goes with each request of a connection.
pub struct Context {
    pub life: Life,
    pub shutdown: Shutdown,
    pub peer: Peer,
}

/// A request that came by no connection of ours: in a unit test, insert an `Arc<Context>` into its extensions.
type Missing = (StatusCode, &'static str);

fn of(parts: &Parts) -> Result<&Context, Missing> {
    let context = parts.extensions.get::<Arc<Context>>().map(AsRef::as_ref);
    context.ok_or((StatusCode::INTERNAL_SERVER_ERROR, "a request without its context\n"))
}

impl<S: Sync> FromRequestParts<S> for Life {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        of(parts).map(|context| context.life)
    }
}

impl<S: Sync> FromRequestParts<S> for Shutdown {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        of(parts).map(|context| context.shutdown.clone())
    }
}

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = Missing;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Missing> {
        of(parts).map(|context| context.peer)
    }
}
