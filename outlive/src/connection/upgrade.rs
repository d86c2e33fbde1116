//! Upgrades that a client offered and no handler accepted.
//!
//! hyper prepares an upgrade for each CONNECT and each request with an `Upgrade` field (RFC 9110 section 7.8). If the
//! response does not grant it, HTTP/1.1 continues on the connection, but hyper keeps the upgrade pending: when the
//! connection ends, hyper gives its stream to the pending upgrade instead of to its driver. Without this module the
//! driver could neither hand such a connection over nor park it, so every client that offers an upgrade with each
//! request (the JDK's HttpClient does) would lose its connections at each restart.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::FutureExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use super::io::Io;
use crate::os::lock::lock;

/// The receiving end of the last upgrade that no response granted. The service of a connection and its driver share it.
#[derive(Clone, Default)]
pub(super) struct DeclinedUpgrade(Arc<Mutex<Option<OnUpgrade>>>);

impl DeclinedUpgrade {
    /// Replaces the upgrade of an earlier request, which hyper has replaced too.
    pub(super) fn keep(&self, upgrade: OnUpgrade) {
        *lock(&self.0) = Some(upgrade);
    }

    /// The stream that hyper gave to the pending upgrade when the connection ended, and the bytes that hyper had read
    /// and not consumed. None if there was no such upgrade, or if a handler took the stream.
    pub(super) fn recover(&self) -> Option<(Io, Bytes)> {
        let upgraded = lock(&self.0).take()?.now_or_never()?.ok()?;
        let parts = upgraded.downcast::<TokioIo<Io>>().ok()?;
        Some((parts.io.into_inner(), parts.read_buf))
    }
}
