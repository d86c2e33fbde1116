//! [`RequestHandle`], the registry as the requests of a connection use it. A guard counts each part that another process
//! could not continue: [`RequestGuard`] a request, [`BodyGuard`] its body, [`PendingFrame`] a frame of its response.

use std::sync::Arc;

use hyper::Uri;
use hyper::http::uri::PathAndQuery;
use tokio::time::Instant;

use super::entry::{Entry, InFlight};
use super::state::{BodyEnd, Event, Stage};
use super::upgrade_handle::UpgradeHandle;
use crate::transport::stream::Peer;

pub struct RequestHandle(Arc<Entry>);

impl RequestHandle {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self(entry)
    }

    pub fn upgrade_handle(&self) -> UpgradeHandle {
        UpgradeHandle::new(self.0.clone())
    }

    /// A request begins.
    pub fn begin(&self, uri: &Uri) -> RequestGuard {
        let number = self.0.count_started();
        self.0.apply(Event::RequestBegins);
        let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let in_flight = InFlight { number, path, peer: self.0.peer(), since: Instant::now() };
        RequestGuard { entry: self.0.clone(), in_flight, is_tracked: false, is_replay: false }
    }
}

/// A request that is in flight until this is dropped: then hyper has the last byte of the response, or the request was
/// cancelled.
pub struct RequestGuard {
    entry: Arc<Entry>,
    in_flight: InFlight,
    is_tracked: bool,
    is_replay: bool,
}

impl RequestGuard {
    pub fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    /// A trusted proxy has reported the client of the request.
    pub fn identify(&mut self, client: Peer) {
        self.in_flight.peer = client;
    }

    /// The request is answered again, because its response has moved here. It was counted when it began.
    pub fn was_counted_before(&mut self) {
        if !self.is_replay {
            self.is_replay = true;
            self.entry.count_replay();
        }
    }

    /// Adds it to the requests that the registry can list. A request that is answered in its first poll need not be
    /// added, so it takes no lock.
    pub fn track(&mut self) {
        if !self.is_tracked {
            self.is_tracked = true;
            self.entry.track(self.in_flight.clone());
        }
    }

    /// Another process can continue the response at any time (HTTP/2), so a drain need not wait for its end. The request
    /// has to be tracked.
    pub fn await_handover(&self) {
        self.entry.await_handover(&self.in_flight);
    }

    pub fn upgrade_handle(&self) -> UpgradeHandle {
        UpgradeHandle::new(self.entry.clone())
    }

    /// See [`DriverHandle::must_close`](super::DriverHandle::must_close).
    pub fn must_close(&self) -> bool {
        self.entry.must_close()
    }

    /// The response grants an upgrade, so a handler owns the connection from now on.
    pub fn upgrade(&self) {
        self.entry.enter(Stage::Upgraded);
    }

    /// A handler has the body of the request.
    pub fn begin_body(&self) -> BodyGuard {
        self.entry.apply(Event::BodyBegins);
        BodyGuard { entry: self.entry.clone(), end: BodyEnd::Unread }
    }

    /// A frame of the response waits for room in the client's windows.
    pub fn pending_frame(&self) -> PendingFrame {
        self.entry.begin_pending_frame();
        PendingFrame(self.entry.clone())
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        if self.is_tracked {
            self.entry.untrack(&self.in_flight);
        }
        if self.is_replay {
            // Before it ends, because otherwise it would count as answered for a moment.
            self.entry.count_ended_replay();
        }
        self.entry.apply(Event::RequestEnds);
    }
}

/// A request body that is being read until this is dropped.
pub struct BodyGuard {
    entry: Arc<Entry>,
    /// `Unread` until it is set.
    pub end: BodyEnd,
}

impl Drop for BodyGuard {
    fn drop(&mut self) {
        self.entry.apply(Event::BodyEnds(self.end));
    }
}

/// Counts one response frame as waiting for room in the client's windows, until it is dropped. While frames wait and
/// none is sent for `Limits::stall`, the connection is overdue.
pub struct PendingFrame(Arc<Entry>);

impl Drop for PendingFrame {
    fn drop(&mut self) {
        self.0.end_pending_frame();
    }
}
