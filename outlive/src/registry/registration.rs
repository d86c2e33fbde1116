//! [`Registration`], the owner of a connection's place in the registry. Each part of the connection gets a handle from
//! it, with the methods that concern this part.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::driver_handle::DriverHandle;
use super::entry::Entry;
use super::io_handle::IoHandle;
use super::protocols::Protocols;
use super::request_handle::RequestHandle;
use super::state::{Event, Stage};
use crate::transport::stream::Peer;

/// Owns the place of a connection in the registry and its slot under `--max-connections`. To drop it releases both.
pub struct Registration {
    pub(super) entry: Arc<Entry>,
    pub slot: Option<OwnedSemaphorePermit>,
}

impl Registration {
    /// For the task that polls hyper.
    pub fn driver(&self) -> DriverHandle {
        DriverHandle::new(self.entry.clone())
    }

    /// For the IO that hyper reads and writes.
    pub fn io(&self) -> IoHandle<'_> {
        IoHandle::new(&self.entry)
    }

    /// For the hyper service.
    pub fn requests(&self) -> RequestHandle {
        RequestHandle::new(self.entry.clone())
    }

    /// A PROXY header has reported the client, to this process or to an earlier one.
    pub fn identify(&self, client: Peer) {
        self.entry.identify(client);
    }

    /// The client that a PROXY header has reported.
    pub fn reported(&self) -> Option<Peer> {
        self.entry.reported()
    }

    /// Only a next process that adopts `protocols` can adopt the connection.
    pub fn require(&self, protocols: Protocols) {
        self.entry.require(protocols);
    }

    /// When its stage began, in milliseconds of [`Registry::now`](super::Registry::now).
    pub fn since(&self) -> u64 {
        self.entry.since()
    }

    /// The connection begins anew, as one that has just been accepted: an upgraded connection is continued by another
    /// request.
    pub fn restart(&self) {
        self.entry.enter(Stage::Waiting);
        self.entry.apply(Event::HandoverAllowed);
    }

    /// Since when its peer has sent nothing, in milliseconds of [`Registry::now`](super::Registry::now), if it is idle.
    pub fn quiet_since(&self) -> u64 {
        self.entry.quiet_since()
    }

    /// Restarts the time limit of the current stage.
    pub fn touch(&self) {
        self.entry.touch();
    }

    /// The connection closes, because another one needs its slot.
    pub fn evict(&self) {
        self.entry.evict();
    }

    /// The connection closes after its next response, in every phase.
    pub fn close_after_response(&self) {
        self.entry.apply(Event::ClosesAfterResponse);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.entry.registry.remove(&self.entry);
        self.entry.enter(Stage::Closed);
    }
}
