//! What `traces.rs` has, without the feature `otlp`: nothing is traced, and nothing costs time.

use std::time::Duration;

use hyper::{HeaderMap, StatusCode, Version};

use crate::os::exit::Result;
use crate::transport::stream::Peer;

#[expect(clippy::unnecessary_wraps, reason = "with the feature it can fail")]
pub fn check() -> Result<()> {
    Ok(())
}

#[expect(clippy::unnecessary_wraps, reason = "with the feature it can fail")]
pub fn start(_service: &str) -> Result<()> {
    Ok(())
}

#[expect(clippy::unused_async, reason = "nothing is to be done")]
pub async fn flush(_limit: Duration) {}

pub struct RequestTrace;

impl RequestTrace {
    pub fn none() -> Self {
        Self
    }

    pub fn begin(
        _headers: &HeaderMap,
        _method: &'static str,
        _path: &str,
        _version: Version,
        _peer: Option<Peer>,
    ) -> Self {
        Self
    }

    #[expect(clippy::unused_self, reason = "with the feature it has a span")]
    pub fn enter(&self) -> Option<()> {
        None
    }

    #[expect(clippy::unused_self, reason = "with the feature it has a span")]
    pub fn answered(&mut self, _method: &'static str, _route: Option<&'static str>, _status: StatusCode) {}
}
