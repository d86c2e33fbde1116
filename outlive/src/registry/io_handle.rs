//! [`IoHandle`], the registry as the IO of a connection uses it: the IO reports what was read, written and flushed, and
//! the steps of closing.

use std::task::Context;

use super::Phase;
use super::entry::Entry;
use super::state::{Event, Stage, State};

#[derive(Clone, Copy)]
pub struct IoHandle<'a>(&'a Entry);

impl<'a> IoHandle<'a> {
    pub(super) fn new(entry: &'a Entry) -> Self {
        Self(entry)
    }

    pub fn state(self) -> State {
        self.0.state()
    }

    pub fn stage(self) -> Stage {
        self.0.stage()
    }

    pub fn phase(self) -> Phase {
        self.0.phase()
    }

    /// Whether the connection has been too long in this stage.
    pub fn is_overdue(self) -> bool {
        self.0.is_overdue()
    }

    pub fn enter(self, stage: Stage) {
        self.0.enter(stage);
    }

    /// The connection closes after its next response, in every phase.
    pub fn close_after_response(self) {
        self.0.apply(Event::ClosesAfterResponse);
    }

    /// See [`DriverHandle::forbid_handover`](super::DriverHandle::forbid_handover).
    pub fn forbid_handover(self) {
        self.0.apply(Event::HandoverForbidden);
    }

    /// See [`DriverHandle::wake_on_change`](super::DriverHandle::wake_on_change).
    pub fn wake_on_change(self, cx: &Context<'_>) {
        self.0.wake_on_change(cx);
    }

    /// As [`IoHandle::wake_on_change`], but replaces a waker that is stored already. After an upgrade the connection
    /// belongs to the task of a handler, and the stored waker would wake the wrong task.
    pub fn replace_waker(self, cx: &Context<'_>) {
        self.0.replace_waker(cx);
    }

    pub fn received(self) {
        self.0.apply(Event::Received);
    }

    pub fn writing(self) {
        self.0.begin_writing();
    }

    /// The socket has accepted some of the bytes to send, so the limit for a stalled peer starts again.
    pub fn wrote(self) {
        self.0.touch_unless_idle();
    }

    /// The socket has accepted all bytes that hyper had to send.
    pub fn flushed(self) {
        self.0.apply(Event::Flushed);
    }
}
