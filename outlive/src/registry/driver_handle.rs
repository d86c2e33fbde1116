//! [`DriverHandle`], the registry as the driver of a connection uses it: the task that waits for the first bytes, performs
//! the TLS handshake and polls hyper.

use std::sync::Arc;
use std::task::{Context, Poll};

use super::Phase;
use super::entry::Entry;
use super::state::{Event, Stage, State};
use crate::transport::stream::Peer;

pub struct DriverHandle(Arc<Entry>);

impl DriverHandle {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self(entry)
    }

    pub fn peer(&self) -> Peer {
        self.0.peer()
    }

    // ---- what the driver decides by ----

    pub fn state(&self) -> State {
        self.0.state()
    }

    pub fn stage(&self) -> Stage {
        self.0.stage()
    }

    pub fn phase(&self) -> Phase {
        self.0.phase()
    }

    /// Whether the next process cannot adopt the TLS state of this connection. See
    /// [`Registry::limit_handover`](super::Registry::limit_handover).
    pub fn keeps_state(&self) -> bool {
        self.0.keeps_state()
    }

    /// As [`DriverHandle::keeps_state`], for an HTTP/2 connection.
    pub fn keeps_http2(&self) -> bool {
        self.0.keeps_http2()
    }

    /// Whether the connection closes after its next response, which says so (`Connection: close`, GOAWAY).
    pub fn must_close(&self) -> bool {
        self.0.must_close()
    }

    /// Whether the driver has to return the connection as soon as it is quiescent: to hand it over, or to park it.
    pub fn must_quiesce(&self) -> bool {
        self.0.must_quiesce()
    }

    /// Whether it has been idle for long enough to be parked.
    pub fn is_parkable(&self) -> bool {
        self.0.is_parkable()
    }

    /// Whether the connection has been too long in this stage.
    pub fn is_overdue(&self) -> bool {
        self.0.is_overdue()
    }

    /// How many requests have begun on this connection in this process.
    pub fn started(&self) -> u64 {
        self.0.started()
    }

    // ---- what the driver reports ----

    /// Calls `poll` on behalf of the driver, and then sets the stage back to `Waiting` if no work is left. Events
    /// during `poll` do not wake the driver, because this check follows. The driver's waker is stored before, so that
    /// an event after the check wakes it.
    pub fn poll_driver<T>(
        &self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if !self.0.apply(Event::DriverPolled).has_waker() {
            self.0.replace_waker(cx);
        }
        let polled = poll(cx);
        self.0.apply(Event::DriverReturned);
        polled
    }

    /// Stores the waker of `cx`, so that its task is woken when the phase changes or a time limit has passed. Keeps a
    /// waker that is stored already, so the task must be the same each time.
    pub fn wake_on_change(&self, cx: &Context<'_>) {
        self.0.wake_on_change(cx);
    }

    pub fn enter(&self, stage: Stage) {
        self.0.enter(stage);
    }

    /// The first bytes have arrived, and hyper has not read them yet.
    pub fn received(&self) {
        self.0.apply(Event::Received);
    }

    /// Bytes that need not begin a request, such as a PING of HTTP/2, have arrived on an idle connection. It stays idle, but is
    /// not parked before they are read.
    pub fn noticed_input(&self) {
        self.0.notice_input();
    }

    /// Restarts the time limit of the current stage.
    pub fn touch(&self) {
        self.0.touch();
    }

    /// The connection stays in this process until it closes, or until [`DriverHandle::allow_handover`].
    pub fn forbid_handover(&self) {
        self.0.apply(Event::HandoverForbidden);
    }

    /// The connection can be handed over again, unless it closes after its response or is upgraded.
    pub fn allow_handover(&self) {
        self.0.apply(Event::HandoverAllowed);
    }
}
