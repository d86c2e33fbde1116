//! Frames from the client to h2: each is forwarded, held or discarded, and what it changes is recorded.

use bytes::{Bytes, BytesMut};

use super::{CatchUp, Ended, FRAME_LIMIT, HoldState, Interposer, PING_LENGTH, STREAMS_LIMIT, size};
use crate::connection::http2::frame::{
    ACK, CONTINUATION, DATA, Disposition, END_HEADERS, END_STREAM, FrameParser, GOAWAY, HEAD_LENGTH, HEADERS,
    Head, PING, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, increment, put_window_update, take,
};
use crate::connection::http2::header_block::{STREAM_FIELD_LENGTH, put_stream_field};
use crate::connection::http2::header_table::Effect;
use crate::transport::http2_state::{HEADER_TABLE_SIZE, Settings};

impl Interposer {
    /// Whether the client's bytes may reach h2.
    pub fn is_begun(&self) -> bool {
        self.preamble.is_none()
    }

    /// Bytes that h2 reads before any others.
    pub fn for_h2(&mut self) -> &mut BytesMut {
        self.pass_between_frames();
        &mut self.to_h2
    }

    pub fn catch_up(&mut self) -> &mut CatchUp {
        &mut self.catch_up
    }

    fn pass_between_frames(&mut self) {
        if !self.between_frames.is_empty() && self.is_between_frames() {
            self.to_h2.unsplit(std::mem::take(&mut self.between_frames));
        }
    }

    /// Processes bytes of the client without a copy, as far as possible: returns how many of them h2 reads in place.
    /// The bytes after those are processed as by `receive`.
    pub fn receive_in_place(&mut self, all: &[u8]) -> usize {
        let mut bytes = all;
        if self.preface_left > 0 || !self.to_h2.is_empty() {
            self.receive(bytes);
            return 0;
        }
        loop {
            let passed = all.len() - bytes.len();
            match &mut self.from_client {
                FrameParser::Payload(Disposition::Forward, left) => {
                    *left -= take(&mut bytes, *left).len();
                    if *left > 0 {
                        return all.len();
                    }
                    self.end_frame();
                    if !self.to_h2.is_empty() {
                        // The end of this frame has released held frames, which come before the remaining bytes.
                        let passed = all.len() - bytes.len();
                        self.receive(bytes);
                        return passed;
                    }
                }
                FrameParser::Head(_, 0) if bytes.is_empty() => return all.len(),
                FrameParser::Head(_, 0) => {
                    let head = bytes.first_chunk::<HEAD_LENGTH>().map(|head| (*head, Head::decode(*head)));
                    let plain = head.and_then(|(raw, head)| {
                        let payload = &bytes[HEAD_LENGTH..];
                        let effect = self.effect_in_place(head, payload.get(..head.length))?;
                        Some((raw, head, effect))
                    });
                    let Some((raw, head, effect)) = plain else {
                        self.receive(bytes);
                        return passed;
                    };
                    bytes = &bytes[HEAD_LENGTH..];
                    let disposition = self.on_client_frame(head);
                    if disposition != Disposition::Forward {
                        self.begin_payload(raw, head, disposition);
                        self.receive(bytes);
                        return passed;
                    }
                    if effect == Effect::MayChangeTable {
                        self.follow_table(head, &bytes[..head.length]);
                    }
                    self.from_client = FrameParser::Payload(disposition, head.length);
                }
                FrameParser::Head(..) | FrameParser::Payload(..) | FrameParser::Whole(..) => {
                    self.receive(bytes);
                    return passed;
                }
            }
        }
    }

    /// Processes bytes of the client. Those for h2 are then in `for_h2`.
    pub fn receive(&mut self, mut bytes: &[u8]) {
        let preface = take(&mut bytes, self.preface_left);
        self.preface_left -= preface.len();
        self.to_h2.extend_from_slice(preface);
        while !bytes.is_empty() {
            match &mut self.from_client {
                FrameParser::Head(..) => {
                    if let Some(bytes) = self.from_client.take_head(&mut bytes) {
                        self.receive_head(bytes);
                    }
                }
                FrameParser::Payload(disposition, left) => {
                    let part = take(&mut bytes, *left);
                    *left -= part.len();
                    let (disposition, is_whole) = (*disposition, *left == 0);
                    self.go(disposition, part);
                    if is_whole {
                        self.end_frame();
                    }
                }
                FrameParser::Whole(head, _, payload) => {
                    payload.extend_from_slice(take(&mut bytes, head.length - payload.len()));
                    if payload.len() == head.length {
                        self.receive_whole();
                    }
                }
            }
        }
    }

    pub(super) fn receive_head(&mut self, bytes: [u8; HEAD_LENGTH]) {
        let head = Head::decode(bytes);
        // Frames other than DATA are passed on when they are complete, because an incomplete frame of which h2 has seen
        // nothing does not prevent a handover.
        if head.frame_type != DATA && head.length <= FRAME_LIMIT {
            self.from_client = FrameParser::Whole(head, bytes, Vec::with_capacity(head.length));
            if head.length == 0 {
                self.receive_whole();
            }
            return;
        }
        let disposition = self.on_client_frame(head);
        self.begin_payload(bytes, head, disposition);
    }

    pub(super) fn begin_payload(&mut self, bytes: [u8; HEAD_LENGTH], head: Head, disposition: Disposition) {
        self.go(disposition, &bytes);
        self.from_client = FrameParser::Payload(disposition, head.length);
        if head.length == 0 {
            self.end_frame();
        }
    }

    pub(super) fn go(&mut self, disposition: Disposition, bytes: &[u8]) {
        match disposition {
            Disposition::Forward => self.to_h2.extend_from_slice(bytes),
            Disposition::Hold => self.held.extend_from_slice(bytes),
            Disposition::Discard => {}
        }
    }

    pub(super) fn end_frame(&mut self) {
        self.from_client = FrameParser::START;
        self.pass_between_frames();
        self.release_held();
    }

    /// Decides what to do with a frame of the client, and records what it changes.
    pub(super) fn on_client_frame(&mut self, head: Head) -> Disposition {
        let Head { length, frame_type, stream, .. } = head;
        if let Some(disposition) = self.block {
            if frame_type != CONTINUATION {
                // h2 ends the connection when it sees this frame inside a header block (RFC 9113 section 6.10), so the
                // frame must not leave its place.
                self.is_ending = true;
            } else if head.has(END_HEADERS) {
                self.block = None;
            }
            return disposition;
        }
        let is_new = self.hold_state == HoldState::Holding && stream > self.state.last_stream;
        // Header blocks have to be decoded in the order in which the client has sent them, because each one may refer to
        // what the ones before have entered into the table.
        let is_new = is_new || self.keep_order(head);
        let disposition = if is_new { Disposition::Hold } else { Disposition::Forward };
        match frame_type {
            DATA if !is_new => {
                self.state.receive_window -= size(length);
                if head.has(END_STREAM) {
                    self.end_half(stream, |ended| ended.client = true);
                }
            }
            HEADERS => {
                if !is_new {
                    self.begin_stream(stream);
                    if head.has(END_STREAM) {
                        self.end_half(stream, |ended| ended.client = true);
                    }
                }
                self.block = (!head.has(END_HEADERS)).then_some(disposition);
            }
            // A client must not send this frame. h2 refuses it when its header block is complete.
            PUSH_PROMISE => self.block = (!head.has(END_HEADERS)).then_some(disposition),
            RST_STREAM if !is_new => {
                self.end_stream(stream);
                self.end_replay(stream);
            }
            PING if head.has(ACK) && stream == 0 && length == PING_LENGTH => {
                match self.unanswered.own_pings.checked_sub(1) {
                    Some(left) => self.unanswered.own_pings = left,
                    // This answers a ping of a former process. h2 would ignore it, but log a warning.
                    None => return Disposition::Discard,
                }
            }
            PING if !head.has(ACK) => self.unanswered.pings = self.unanswered.pings.saturating_add(1),
            GOAWAY => self.is_ending = true,
            _ => {}
        }
        disposition
    }

    /// Whether a frame has trailers of an older stream that follow held header blocks. They are held too, and the stream
    /// cannot end, so all held frames have to be released.
    fn keep_order(&mut self, head: Head) -> bool {
        let is_overtaking =
            self.hold_state == HoldState::Holding && head.frame_type == HEADERS && !self.held.is_empty();
        self.must_release |= is_overtaking && head.stream <= self.state.last_stream;
        is_overtaking
    }

    pub(super) fn begin_stream(&mut self, stream: u32) {
        // The streams of a client have odd numbers. h2 refuses all others.
        if stream <= self.state.last_stream || stream.is_multiple_of(2) {
            return;
        }
        self.state.last_stream = stream;
        if self.open.len() < STREAMS_LIMIT {
            self.open.push((stream, Ended::default()));
        } else {
            self.is_ending = true;
        }
    }

    pub(super) fn end_half(&mut self, stream: u32, end: impl FnOnce(&mut Ended)) {
        if let Ok(at) = self.open.binary_search_by_key(&stream, |(open, _)| *open) {
            let ended = &mut self.open[at].1;
            end(ended);
            if ended.client && ended.h2 {
                self.open.remove(at);
                self.forget_endless(stream);
            }
        }
    }

    pub(super) fn end_stream(&mut self, stream: u32) {
        self.end_half(stream, |ended| *ended = Ended { client: true, h2: true });
    }

    fn forget_endless(&mut self, stream: u32) {
        if self.maybe_endless.contains(&stream) {
            self.maybe_endless.retain(|other| *other != stream);
            self.endless.end(stream);
        }
    }

    /// Processes a complete frame of the client.
    pub(super) fn receive_whole(&mut self) {
        let FrameParser::Whole(head, mut bytes, mut payload) =
            std::mem::replace(&mut self.from_client, FrameParser::START)
        else {
            unreachable!("only called when a frame is complete")
        };
        // Before this frame, because `Replays::acknowledgement` counts the SETTINGS before.
        self.pass_between_frames();
        let disposition = match head {
            // Inside a header block every frame except CONTINUATION is an error, which h2 must see unchanged.
            _ if self.block.is_some() => {
                let disposition = self.on_client_frame(head);
                if disposition == Disposition::Forward {
                    self.follow_table(head, &payload);
                }
                disposition
            }
            Head { frame_type: WINDOW_UPDATE, stream: 0, length: 4, .. } => {
                self.receive_grant(increment(&payload).expect("four bytes"));
                Disposition::Discard
            }
            Head { frame_type: SETTINGS, stream: 0, length: 0, .. } if head.has(ACK) => {
                self.receive_acknowledgement()
            }
            Head { frame_type: SETTINGS, stream: 0, .. } if !head.has(ACK) => {
                let window = self.initial_window();
                // Settings that cannot be recorded cannot be handed over. h2 refuses those that are invalid.
                self.is_ending |= !self.state.theirs.set(&payload);
                self.unanswered.theirs = self.unanswered.theirs.saturating_add(1);
                if !self.maybe_endless.is_empty() {
                    self.endless.change_windows(self.initial_window() - window);
                }
                if self.is_replaying() && payload.len().is_multiple_of(6) {
                    self.owes_size_update |= self.state.theirs.has_small_table();
                    // h2 must not use its table yet. Of two values of a setting the last one counts.
                    payload.extend(Settings::default().or(HEADER_TABLE_SIZE, 0).payload());
                    bytes = Head { length: payload.len(), ..head }.encode();
                }
                Disposition::Forward
            }
            Head { frame_type: WINDOW_UPDATE, stream, length: 4, .. }
                if self.maybe_endless.contains(&stream) =>
            {
                let granted = increment(&payload).expect("four bytes");
                let left = self.endless.granted(stream, granted);
                if left == granted {
                    Disposition::Forward
                } else {
                    if left > 0 {
                        put_window_update(stream, left, &mut self.to_h2);
                    }
                    Disposition::Discard
                }
            }
            _ => {
                let is_new = head.stream > self.state.last_stream;
                let disposition = self.on_client_frame(head);
                let has_begun = is_new && self.state.last_stream == head.stream;
                if disposition == Disposition::Forward
                    && let Some(block) = self.follow_table(head, &payload)
                    && has_begun
                    && has_room_for_stream_field(head, &payload)
                {
                    self.endless.begin(head.stream, block, self.initial_window());
                    self.maybe_endless.push(head.stream);
                    put_stream_field(head.stream, &mut payload);
                    bytes = Head { length: payload.len(), ..head }.encode();
                }
                disposition
            }
        };
        self.go(disposition, &bytes);
        self.go(disposition, &payload);
        self.release_held();
    }

    /// What a frame does to the client's table. None if h2 cannot read the frame in place, because it may have to be changed,
    /// or because it is incomplete and not DATA. `payload`: None if it is incomplete.
    fn effect_in_place(&self, head: Head, payload: Option<&[u8]>) -> Option<Effect> {
        match head.frame_type {
            DATA => return Some(Effect::None),
            SETTINGS => return None,
            WINDOW_UPDATE if head.stream == 0 || self.maybe_endless.contains(&head.stream) => return None,
            _ => {}
        }
        let payload = payload?;
        match &self.client_table {
            Some(table) if matches!(head.frame_type, HEADERS | CONTINUATION) => {
                Some(table.effect(head, payload)).filter(|effect| *effect != Effect::MayBeEndless)
            }
            Some(_) | None => Some(Effect::None),
        }
    }

    /// Updates the copy of the client's table with a frame that h2 receives. h2 decodes even blocks of streams that it
    /// refuses. Returns the fields of a request whose response may have no end.
    fn follow_table(&mut self, head: Head, payload: &[u8]) -> Option<Bytes> {
        let table =
            self.client_table.as_mut().filter(|_| matches!(head.frame_type, HEADERS | CONTINUATION))?;
        let followed = table.follow(head, payload);
        if followed.is_err() {
            self.client_table = None;
        }
        followed.ok().flatten()
    }

    pub(super) fn receive_acknowledgement(&mut self) -> Disposition {
        self.unanswered.ours = self.unanswered.ours.saturating_sub(1);
        match self.unanswered.ours_in_its_name.checked_sub(1) {
            Some(left) => {
                self.unanswered.ours_in_its_name = left;
                Disposition::Discard
            }
            None => Disposition::Forward,
        }
    }

    /// Processes a WINDOW_UPDATE for the connection. h2 receives only what is left after the debt.
    pub(super) fn receive_grant(&mut self, granted: u32) {
        self.state.send_window += i64::from(granted);
        let paid = self.debt.min(granted.into());
        self.debt -= paid;
        let left = granted - u32::try_from(paid).expect("at most what was granted");
        // An increment of zero is an error, which h2 must see to refuse it.
        if left > 0 || granted == 0 {
            put_window_update(0, left, &mut self.to_h2);
        }
        self.send_waiting();
    }
}

/// Whether [`put_stream_field`] can append to the header block in a frame.
fn has_room_for_stream_field(head: Head, payload: &[u8]) -> bool {
    head.whole_block(payload).is_some() && payload.len() + STREAM_FIELD_LENGTH <= FRAME_LIMIT
}
