//! When a connection can move: frames of new streams are held until the open ones have ended.

use bytes::{Bytes, BytesMut};

use super::{HELD_BESIDE_UPLOADS, HELD_LIMIT, HoldState, Interposer, Unanswered, WAITING_LIMIT};
use crate::connection::http2::frame::{Disposition, FrameParser, put_goaway};
use crate::transport::http2_state::{Http2State, Table};

impl Interposer {
    /// Holds streams that begin from now on.
    pub fn hold(&mut self) {
        if self.hold_state == HoldState::Open {
            self.hold_state = HoldState::Holding;
        }
    }

    /// Lets go on what was held.
    pub fn release(&mut self) {
        if self.hold_state == HoldState::Holding {
            self.hold_state = HoldState::Releasing;
            self.release_held();
        }
    }

    /// Whether it cannot move any more, whatever it does.
    pub fn is_immovable(&self) -> bool {
        self.is_ending || self.state.table == Table::InUse
    }

    /// Whether the client sends too much to be held any longer.
    pub fn is_full(&self) -> bool {
        self.hold_state == HoldState::Holding && self.held.len() > HELD_LIMIT
    }

    /// Whether more waits for the client to grant a window than a client in good faith lets accumulate.
    pub fn has_too_much_waiting(&self) -> bool {
        self.waiting.len() > WAITING_LIMIT
    }

    /// Whether what is held takes so much of the connection's window that an upload which is open hardly gets any.
    pub fn starves_uploads(&self) -> bool {
        self.held.len() > HELD_BESIDE_UPLOADS
    }

    /// Whether it could go on with a fresh h2: nothing is open, under way or unanswered.
    pub fn is_quiescent(&self) -> bool {
        self.hold_state == HoldState::Holding && self.is_settled()
    }

    /// The same, but for streams that may still begin.
    pub(super) fn is_settled(&self) -> bool {
        self.open.is_empty()
            && self.is_between_frames()
            && self.preface_left == 0
            && self.preamble.is_none()
            && self.from_h2.is_start()
            && [&self.to_h2, &self.partial, &self.to_client, &self.waiting]
                .into_iter()
                .all(BytesMut::is_empty)
            && matches!(self.unanswered, Unanswered { ours: 0, theirs: 0, pings: 0, .. })
            && !self.is_immovable()
    }

    /// Whether the client owes what it takes to come to rest, and is owed nothing itself: it has not sent the whole
    /// preface, has not acknowledged our settings, or has begun a header block and not ended it. As long as it stays
    /// silent, no other process can go on with this connection.
    pub fn is_stuck(&self) -> bool {
        self.owes_nothing() && !self.is_settled()
    }

    /// Whether no request that the client has sent whole is unanswered. A stream whose header block has not ended is not
    /// a request yet.
    pub fn owes_nothing(&self) -> bool {
        let is_begun = |stream| self.block == Some(Disposition::Forward) && stream == self.state.last_stream;
        self.waiting.is_empty() && self.open.iter().all(|(stream, _)| is_begun(*stream))
    }

    /// What is left to send where h2 is not waited for any longer: GOAWAY with the last stream that h2 knows of.
    pub fn final_goaway(mut self) -> BytesMut {
        let is_between_frames = self.from_h2.is_start() && self.partial.is_empty();
        let mut bytes = std::mem::take(self.for_client());
        // Inside another frame it would be taken for a part of that frame.
        if is_between_frames {
            put_goaway(self.state.last_stream, &mut bytes);
        }
        bytes
    }

    /// Comes to rest where nothing is in its way; else nothing changes.
    pub fn park_if_quiescent(&mut self) -> bool {
        if self.hold_state != HoldState::Open {
            return false;
        }
        self.hold();
        let is_quiescent = self.is_quiescent();
        if !is_quiescent {
            self.release();
        }
        is_quiescent
    }

    /// What another process has to know, and what was not consumed.
    pub fn into_state(self) -> (Http2State, Bytes) {
        let mut unread = self.held;
        unread.extend_from_slice(&self.from_client.buffered());
        (self.state, unread.freeze())
    }

    #[cfg(test)]
    pub fn state(&self) -> &Http2State {
        &self.state
    }

    /// Whether no frame of the client's has gone on in part.
    pub(super) fn is_between_frames(&self) -> bool {
        let is_resumed =
            |disposition: &Disposition| matches!(disposition, Disposition::Forward | Disposition::Discard);
        !matches!(&self.from_client, FrameParser::Payload(disposition, _) if is_resumed(disposition))
            && !self.block.as_ref().is_some_and(is_resumed)
    }

    pub(super) fn release_held(&mut self) {
        if self.hold_state != HoldState::Releasing || !self.is_between_frames() {
            return;
        }
        self.hold_state = HoldState::Open;
        self.block = None;
        let held = std::mem::take(&mut self.held);
        let buffered = std::mem::replace(&mut self.from_client, FrameParser::START).buffered();
        self.receive(&held);
        self.receive(&buffered);
    }
}
