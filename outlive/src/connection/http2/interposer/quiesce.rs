//! Decides when the connection is quiescent, and holds the frames of new streams until the open ones have ended.

use std::task::Waker;

use bytes::{Bytes, BytesMut};

use super::{HELD_BESIDE_UPLOADS, HELD_LIMIT, HoldState, Interposer, Unanswered, WAITING_LIMIT};
use crate::connection::http2::frame::{Disposition, FrameParser, put_goaway};
use crate::transport::http2_state::Http2State;

impl Interposer {
    /// Holds streams that begin from now on. See [`HoldState`].
    pub fn hold(&mut self) {
        if self.hold_state == HoldState::Open {
            self.hold_state = HoldState::Holding;
        }
    }

    /// Passes the held frames on to h2, and lets new streams begin.
    pub fn release(&mut self) {
        self.endless.allow_all();
        if self.hold_state == HoldState::Holding {
            self.hold_state = HoldState::Releasing;
            self.release_held();
        }
    }

    /// Whether the connection can never be handed over: it is ending, or the header table of its client is not known.
    pub fn is_immovable(&self) -> bool {
        self.is_ending || self.client_table.is_none()
    }

    /// Whether the held frames must be released: they exceed their limit, or an older stream cannot end before them.
    pub fn is_full(&self) -> bool {
        self.hold_state == HoldState::Holding && (self.held.len() > HELD_LIMIT || self.must_release)
    }

    /// Whether more bytes wait for a WINDOW_UPDATE than a well-behaved client lets accumulate.
    pub fn has_too_much_waiting(&self) -> bool {
        self.waiting.len() > WAITING_LIMIT
    }

    /// Whether held frames take so much of the connection's window that uploads in flight hardly get any.
    pub fn starves_uploads(&self) -> bool {
        self.held.len() > HELD_BESIDE_UPLOADS
    }

    /// Whether a fresh h2 could continue the connection: new streams are held, and nothing is open, unsent or
    /// unanswered.
    pub fn is_quiescent(&self) -> bool {
        self.hold_state == HoldState::Holding && self.is_settled()
    }

    /// As `is_quiescent`, except that new streams may still begin.
    pub(super) fn is_settled(&self) -> bool {
        self.have_endless_stopped()
            && self.is_between_frames()
            && self.preface_left == 0
            && self.preamble.is_none()
            && !self.is_replaying()
            && !self.replays.discards_block
            && self.replays.acknowledgement.is_none()
            && self.from_h2.is_start()
            && [&self.to_h2, &self.between_frames, &self.partial, &self.to_client, &self.waiting]
                .into_iter()
                .all(BytesMut::is_empty)
            && matches!(self.unanswered, Unanswered { ours: 0, theirs: 0, pings: 0, .. })
            && !self.is_immovable()
            && self.can_restore_table()
    }

    /// Whether a fresh h2 can receive the client's header table: in a request on a stream that has ended, or with the
    /// requests of the open ones (`resume.rs`).
    fn can_restore_table(&self) -> bool {
        let is_each_open = self.open.len() as u64 * 2 == u64::from(self.state.last_stream) + 1;
        !is_each_open
            || self
                .client_table
                .as_ref()
                .is_some_and(|table| table.is_made_by(&self.endless.stopped_blocks()))
    }

    /// Whether no stream is open, except those whose response has no end and has stopped.
    fn have_endless_stopped(&self) -> bool {
        let have_clients_ended = self.open.iter().all(|(_, ended)| ended.client);
        self.open.is_empty() || have_clients_ended && self.has_only_endless() && self.endless.have_stopped()
    }

    fn has_only_endless(&self) -> bool {
        self.open.len() == self.endless.count_endless()
    }

    /// Asks the responses without end to stop, if all other streams have ended.
    pub fn stop_endless(&self, driver: &Waker) {
        if !self.open.is_empty() && self.has_only_endless() {
            self.endless.stop(driver);
        }
    }

    pub fn count_open(&self) -> usize {
        self.open.len()
    }

    /// Whether only the client can make the connection quiescent: h2 has read everything and no request is unanswered, but
    /// the client has not sent the whole preface, has not acknowledged our settings, or has not completed a header block.
    /// While it stays silent, no other process can continue the connection.
    pub fn is_stuck(&self) -> bool {
        self.to_h2.is_empty() && self.owes_nothing() && !self.is_settled()
    }

    /// Whether every complete request is answered. A stream with an incomplete header block is not a request yet.
    pub fn owes_nothing(&self) -> bool {
        let is_begun = |stream| self.block == Some(Disposition::Forward) && stream == self.state.last_stream;
        self.waiting.is_empty() && self.open.iter().all(|(stream, _)| is_begun(*stream))
    }

    /// The last bytes to send if h2 does not end the connection in time: GOAWAY with the last stream that h2 has seen.
    pub fn final_goaway(mut self) -> BytesMut {
        let is_between_frames = self.from_h2.is_start() && self.partial.is_empty();
        let mut bytes = std::mem::take(self.for_client());
        // The client would take a GOAWAY inside another frame for a part of that frame.
        if is_between_frames {
            put_goaway(self.state.last_stream, &mut bytes);
        }
        bytes
    }

    /// Holds new streams if that makes the connection quiescent, and returns whether it does; otherwise changes
    /// nothing.
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

    /// The state for another process, and the bytes that h2 has not consumed.
    pub fn into_state(self) -> (Http2State, Bytes) {
        let mut unread = self.held;
        unread.extend_from_slice(&self.from_client.buffered());
        let streams = self.endless.take_stopped();
        let header_table = self.client_table.map_or_else(Bytes::new, |table| table.pack());
        let state = Http2State { header_table, streams, ..self.state };
        (state, unread.freeze())
    }

    #[cfg(test)]
    pub fn state(&self) -> &Http2State {
        &self.state
    }

    /// Whether no frame or header block of the client was passed on only in part.
    pub(super) fn is_between_frames(&self) -> bool {
        let is_resumed =
            |disposition: &Disposition| matches!(disposition, Disposition::Forward | Disposition::Discard);
        !matches!(&self.from_client, FrameParser::Payload(disposition, _) if is_resumed(disposition))
            && !self.block.as_ref().is_some_and(is_resumed)
    }

    /// Passes the held frames on if they are to be released and the current frame is complete.
    pub(super) fn release_held(&mut self) {
        if self.hold_state != HoldState::Releasing || !self.is_between_frames() {
            return;
        }
        self.hold_state = HoldState::Open;
        self.must_release = false;
        self.block = None;
        let held = std::mem::take(&mut self.held);
        if !held.is_empty() {
            self.catch_up.begin(held.len());
        }
        let buffered = std::mem::replace(&mut self.from_client, FrameParser::START).buffered();
        self.receive(&held);
        self.receive(&buffered);
    }
}
