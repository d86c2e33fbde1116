//! [`UpgradeHandle`], the registry as the handler of an upgraded connection, or of a response without end, uses it.

use std::sync::Arc;

use super::Phase;
use super::entry::Entry;
use super::protocols::Protocols;
use super::state::Event;
use crate::transport::stream::Peer;

#[derive(Clone)]
pub struct UpgradeHandle(Arc<Entry>);

impl UpgradeHandle {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self(entry)
    }

    pub fn peer(&self) -> Peer {
        self.0.peer()
    }

    /// Whether the connection can be handed over before it is upgraded; an upgrade alone forbids the handover.
    pub fn is_movable(&self) -> bool {
        self.0.state().is_movable()
    }

    /// Whether the connection closes after its next response, in every phase.
    pub fn closes_after_response(&self) -> bool {
        self.0.state().closes_after_response()
    }

    /// Whether the socket has all bytes that hyper had to send.
    pub fn is_flushed(&self) -> bool {
        self.0.state().is_flushed()
    }

    /// hyper is about to receive bytes, and counts as unflushed until it has flushed them.
    pub fn writing(&self) {
        self.0.begin_writing();
    }

    /// Whether the process has begun to drain, so that [`Shutdown`](crate::Shutdown) is cancelled.
    pub fn is_draining(&self) -> bool {
        !matches!(self.0.phase(), Phase::Serving | Phase::Announcing)
    }

    /// Waits until the process begins to drain.
    pub async fn drains(&self) {
        let mut phase = self.0.registry.handler_phase.subscribe();
        // The sender is not dropped before, because it is in the registry.
        let _ = phase.wait_for(|phase| !matches!(phase, Phase::Serving | Phase::Announcing)).await;
    }

    /// Waits until an HTTP/2 response without end has to be ended, because the process hands no connection over.
    /// Otherwise the driver of the connection stops or ends the response.
    pub async fn streams_must_end(&self) {
        let mut phase = self.0.registry.handler_phase.subscribe();
        // The sender is not dropped before, because it is in the registry.
        let _ = phase.wait_for(|phase| phase.ends(true)).await;
    }

    /// Whether the handler has to end or hand over its connection in the current phase. Reads the phase once, because it may
    /// change back between two reads.
    pub fn demand(&self) -> Demand {
        let phase = self.handler_phase();
        if !self.0.registry.handlers_return_in(phase) {
            Demand::None
        } else if phase.quiesces() && !self.keeps_upgrade() {
            Demand::HandOver
        } else {
            Demand::End
        }
    }

    /// Whether the next process cannot adopt this connection after its upgrade.
    pub fn keeps_upgrade(&self) -> bool {
        self.0.registry.next_adopts() < Protocols::Upgrades || self.0.keeps_tls()
    }

    /// The phase that [`UpgradeHandle::handover_requested`] has seen, which the registry sets last.
    fn handler_phase(&self) -> Phase {
        *self.0.registry.handler_phase.borrow()
    }

    /// Whether no drain has begun, so that no connection has to move or end.
    pub fn is_serving(&self) -> bool {
        self.0.phase() == Phase::Serving
    }

    /// Waits until the handler has to return, because the phase hands connections over or ends them. Each change of the
    /// phase wakes the task.
    pub async fn handover_requested(self) {
        self.0.registry.handlers_must_return().await;
    }

    /// Until the guard is dropped, the connection counts as one that can be handed over at any time, so a drain does
    /// not wait for it. At other times the handler works, and a drain waits for it as for a request in flight.
    pub fn awaits_handover(&self) -> AwaitsHandover<'_> {
        self.0.apply(Event::HandlerAwaitsHandover);
        AwaitsHandover(&self.0)
    }
}

/// Whether a response without end, or the handler of an upgraded connection, has to end or to hand over in a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// It may continue. This can follow `HandOver`, because a drain that does not succeed at once goes back to the phase
    /// `Draining`.
    None,
    /// The next process continues the connection.
    HandOver,
    End,
}

/// The guard of [`UpgradeHandle::awaits_handover`].
pub struct AwaitsHandover<'a>(&'a Entry);

impl Drop for AwaitsHandover<'_> {
    fn drop(&mut self) {
        self.0.apply(Event::HandlerWorks);
    }
}
