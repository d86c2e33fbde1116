//! Frames from h2 to the client. They are forwarded unchanged, or rewritten while h2 is sending its preamble or the
//! client's window is smaller than h2 assumes.

use bytes::{Buf, BytesMut};

use super::{Interposer, ToldToH2, size};
use crate::connection::http2::frame::{
    ACK, CONTINUATION, DATA, Disposition, END_HEADERS, END_STREAM, FrameParser, GOAWAY, HEAD_LENGTH, HEADERS,
    Head, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, increment, put_cancel, put_end_of_stream,
    put_grpc_unavailable, put_settings, put_settings_ack, put_window_update, take, take_frame,
};
use crate::connection::http2::header_block::SIZE_UPDATE;
use crate::transport::http2_state::{FIRST_HEADER_TABLE_SIZE, FIRST_WINDOW, HEADER_TABLE_SIZE, Settings};
use crate::transport::stream_replay::StreamKind;

impl Interposer {
    /// Whether the bytes of h2 must pass through `rewrite`. Otherwise they are sent unchanged, and recorded by `sent`.
    pub fn must_rewrite(&self) -> bool {
        self.preamble.is_some()
            || self.is_replaying()
            || self.replays.discards_block
            || self.replays.acknowledgement.is_some()
            || self.debt > 0
            || self.owes_size_update
            || !(self.partial.is_empty() && self.to_client.is_empty() && self.waiting.is_empty())
    }

    /// Bytes for the client, which must be sent before any others.
    pub fn for_client(&mut self) -> &mut BytesMut {
        &mut self.to_client
    }

    /// Records bytes of h2 that were sent unchanged.
    pub fn sent(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.from_h2.is_start()
                && let Some((head, payload)) = take_frame(&mut bytes)
            {
                self.note_sent(head, payload);
                continue;
            }
            match &mut self.from_h2 {
                FrameParser::Head(..) => {
                    let Some(bytes) = self.from_h2.take_head(&mut bytes) else { continue };
                    let head = Head::decode(bytes);
                    let is_seen = head.frame_type == SETTINGS || head.frame_type == WINDOW_UPDATE;
                    self.from_h2 = match head.length {
                        0 => FrameParser::START,
                        length if is_seen => FrameParser::Whole(head, bytes, Vec::with_capacity(length)),
                        length => FrameParser::Payload(Disposition::Forward, length),
                    };
                    if head.length == 0 || !is_seen {
                        self.note_sent(head, &[]);
                    }
                }
                FrameParser::Payload(_, left) => {
                    *left -= take(&mut bytes, *left).len();
                    if *left == 0 {
                        self.from_h2 = FrameParser::START;
                    }
                }
                FrameParser::Whole(head, _, payload) => {
                    payload.extend_from_slice(take(&mut bytes, head.length - payload.len()));
                    if payload.len() == head.length {
                        let (head, payload) = (*head, std::mem::take(payload));
                        self.from_h2 = FrameParser::START;
                        self.note_sent(head, &payload);
                    }
                }
            }
        }
    }

    /// Processes bytes of h2. Those for the client are then in `for_client`.
    pub fn rewrite(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(head) = self.partial.first_chunk::<HEAD_LENGTH>() {
            let mut head = Head::decode(*head);
            if self.partial.len() < HEAD_LENGTH + head.length {
                break;
            }
            let mut frame = self.partial.split_to(HEAD_LENGTH + head.length);
            if self.absorb_preamble(head, &frame[HEAD_LENGTH..]) || self.absorb_replay(head) {
                continue;
            }
            if head.frame_type == HEADERS && std::mem::take(&mut self.owes_size_update) {
                (head, frame) = with_size_update(head, &frame[HEAD_LENGTH..]);
            }
            // Frames of the connection, for example PING, may overtake the waiting frames of its streams. An
            // acknowledgement may not: after one that lowers the client's windows, the waiting DATA would exceed them.
            let is_ordered = match head.frame_type {
                DATA | HEADERS | CONTINUATION | RST_STREAM => true,
                SETTINGS => head.has(ACK),
                _ => false,
            };
            let waits = is_ordered && (!self.waiting.is_empty() || !self.has_room(head));
            if !waits || head.frame_type == SETTINGS {
                // An acknowledgement is recorded at once, because `Replays::acknowledgement` counts those that h2 owes.
                self.note_sent(head, &frame[HEAD_LENGTH..]);
            }
            if waits { self.waiting.unsplit(frame) } else { self.to_client.unsplit(frame) }
        }
        self.send_waiting();
    }

    pub(super) fn has_room(&self, head: Head) -> bool {
        head.frame_type != DATA || size(head.length) <= self.state.send_window.max(0)
    }

    pub(super) fn send_waiting(&mut self) {
        while let Some(bytes) = self.waiting.first_chunk::<HEAD_LENGTH>() {
            let head = Head::decode(*bytes);
            if !self.has_room(head) {
                return self.send_part(head);
            }
            let frame = self.waiting.split_to(HEAD_LENGTH + head.length);
            if head.frame_type != SETTINGS {
                self.note_sent(head, &frame[HEAD_LENGTH..]);
            }
            self.to_client.unsplit(frame);
        }
    }

    /// Sends as much of the first waiting frame, which is DATA, as the client's window has room for, because some clients do
    /// not grant more until little of the window is left. h2 does not pad its frames, so a frame can be split anywhere.
    fn send_part(&mut self, head: Head) {
        let Ok(room @ 1..) = usize::try_from(self.state.send_window) else { return };
        let part = Head { length: room, flags: head.flags & !END_STREAM, ..head };
        part.put(&mut self.to_client);
        self.to_client.extend_from_slice(&self.waiting[HEAD_LENGTH..HEAD_LENGTH + room]);
        self.note_sent(part, &[]);
        // The head of the rest is written over the end of what was sent.
        let rest = Head { length: head.length - room, ..head };
        self.waiting.advance(room);
        self.waiting[..HEAD_LENGTH].copy_from_slice(&rest.encode());
    }

    /// Absorbs the preamble of a fresh h2, because the client received one from the former process. The client receives
    /// only what differs. False if the frame does not belong to the preamble.
    pub(super) fn absorb_preamble(&mut self, head: Head, payload: &[u8]) -> bool {
        let Some(preamble) = &mut self.preamble else { return false };
        match head.frame_type {
            SETTINGS if head.has(ACK) => match preamble.told {
                // This acknowledges the settings that disable the encoder's table.
                ToldToH2::FormerStreams => {}
                ToldToH2::Settings => preamble.told = ToldToH2::All,
                ToldToH2::All => return false,
            },
            // This refuses a request on a stream of the former process. After the last one h2 needs the client's settings.
            HEADERS | RST_STREAM if preamble.refused.contains(&head.stream) => {
                preamble.refused.retain(|stream| *stream != head.stream);
                self.to_h2.unsplit(std::mem::take(&mut preamble.later));
                if preamble.refused.is_empty() && preamble.replays {
                    // h2 has the client's settings already. `end_replay` adds the size of the table.
                    preamble.told = ToldToH2::All;
                } else if preamble.refused.is_empty() {
                    preamble.told = ToldToH2::Settings;
                    let theirs = self.state.theirs.clone().or(HEADER_TABLE_SIZE, FIRST_HEADER_TABLE_SIZE);
                    put_settings(&theirs.payload(), &mut self.to_h2);
                }
            }
            SETTINGS if !preamble.has_sent_settings => {
                preamble.has_sent_settings = true;
                put_settings_ack(&mut self.to_h2);
                let mut ours = Settings::default();
                ours.set(payload);
                if ours != self.state.ours {
                    self.unanswered.ours_in_its_name += 1;
                    self.unanswered.ours += 1;
                    self.state.ours = ours;
                    put_settings(payload, &mut self.to_client);
                }
            }
            WINDOW_UPDATE if head.stream == 0 && !preamble.has_sent_window => {
                preamble.has_sent_window = true;
                let wanted = FIRST_WINDOW + increment(payload).map_or(0, i64::from);
                if let Ok(missing @ 1..) = u32::try_from(wanted - self.state.receive_window) {
                    self.state.receive_window = wanted;
                    put_window_update(0, missing, &mut self.to_client);
                }
            }
            _ => return false,
        }
        if preamble.has_sent_settings && preamble.has_sent_window && preamble.told == ToldToH2::All {
            self.preamble = None;
            self.catch_up.begin(0);
        }
        true
    }

    /// Absorbs the head of a response to a request of the former process, and what belongs to the table size that h2
    /// received because of it. False if the frame is for the client.
    fn absorb_replay(&mut self, head: Head) -> bool {
        match head.frame_type {
            CONTINUATION if self.replays.discards_block => {
                self.replays.discards_block = !head.has(END_HEADERS);
                true
            }
            HEADERS | RST_STREAM if self.replays.awaits(head.stream) => {
                self.replays.discards_block = head.frame_type == HEADERS && !head.has(END_HEADERS);
                if head.frame_type == RST_STREAM || head.has(END_STREAM) {
                    // The response does not continue the stream, so the client receives its end.
                    self.put_end(head.stream);
                    self.end_stream(head.stream);
                }
                self.end_replay(head.stream);
                true
            }
            SETTINGS if head.has(ACK) => match self.replays.acknowledgement {
                Some(0) => {
                    self.replays.acknowledgement = None;
                    true
                }
                Some(before) => {
                    self.replays.acknowledgement = Some(before - 1);
                    false
                }
                None => false,
            },
            _ => false,
        }
    }

    /// Ends a stream of the former process for the client.
    fn put_end(&mut self, stream: u32) {
        match self.replays.kind(stream) {
            Some(StreamKind::Grpc) => {
                let mut frame = BytesMut::new();
                let (head, block) = put_grpc_unavailable(stream, &mut frame);
                if std::mem::take(&mut self.owes_size_update) {
                    (_, frame) = with_size_update(head, block);
                }
                self.to_client.unsplit(frame);
            }
            Some(StreamKind::Events) | None => put_end_of_stream(stream, &mut self.to_client),
        }
    }

    /// h2 has answered a request of the former process, or need not answer it. After the last one, h2 receives the table
    /// size of the client.
    pub(super) fn end_replay(&mut self, stream: u32) {
        if !self.is_replaying() {
            return;
        }
        self.replays.awaited.retain(|(other, _)| *other != stream);
        if !self.is_replaying() {
            let size = self.state.theirs.get(HEADER_TABLE_SIZE).unwrap_or(FIRST_HEADER_TABLE_SIZE);
            let settings = Settings::default().or(HEADER_TABLE_SIZE, size);
            put_settings(&settings.payload(), &mut self.between_frames);
            self.replays.acknowledgement = Some(self.unanswered.theirs);
        }
    }

    /// Ends the streams of the former process whose requests h2 has not answered.
    pub fn end_replays(&mut self) {
        for (stream, _) in self.replays.awaited.clone() {
            put_cancel(stream, &mut self.between_frames);
            self.put_end(stream);
            self.end_stream(stream);
            self.end_replay(stream);
        }
    }

    /// Records what a frame changes that is sent to the client.
    pub(super) fn note_sent(&mut self, head: Head, payload: &[u8]) {
        match head.frame_type {
            DATA => {
                self.state.send_window -= size(head.length);
                if self.maybe_endless.contains(&head.stream) {
                    self.endless.sent(head.stream, head.length);
                }
                if head.has(END_STREAM) {
                    self.end_half(head.stream, |ended| ended.h2 = true);
                }
            }
            HEADERS if head.has(END_STREAM) => self.end_half(head.stream, |ended| ended.h2 = true),
            RST_STREAM => {
                // h2 considers a stream that it resets as begun, whatever frame was the reason. So must the next
                // process.
                if !head.stream.is_multiple_of(2) {
                    self.state.last_stream = self.state.last_stream.max(head.stream);
                }
                self.end_stream(head.stream);
            }
            SETTINGS if head.has(ACK) => self.unanswered.theirs = self.unanswered.theirs.saturating_sub(1),
            SETTINGS => {
                self.is_ending |= !self.state.ours.set(payload);
                self.unanswered.ours += 1;
            }
            PING if head.has(ACK) => self.unanswered.pings = self.unanswered.pings.saturating_sub(1),
            PING => self.unanswered.own_pings += 1,
            WINDOW_UPDATE if head.stream == 0 => {
                self.state.receive_window += increment(payload).map_or(0, i64::from);
            }
            GOAWAY => self.is_ending = true,
            _ => {}
        }
    }
}

/// Puts a dynamic table size update to 0 in front of a header block. h2 does not pad HEADERS. If h2 has filled the frame with
/// 16 KiB of a block, it becomes one byte too long for the client, which then closes the connection.
fn with_size_update(head: Head, block: &[u8]) -> (Head, BytesMut) {
    let head = Head { length: head.length + 1, ..head };
    let mut frame = BytesMut::with_capacity(HEAD_LENGTH + head.length);
    head.put(&mut frame);
    frame.extend_from_slice(&[SIZE_UPDATE]);
    frame.extend_from_slice(block);
    (head, frame)
}
