//! The boundaries of WebSocket messages (RFC 6455 section 5.2), in both directions.
//!
//! A WebSocket can move to another process only where no message is cut in two. [`Inbound`] lets a handler read only
//! one frame at once while the process drains, so that its buffer has no further frame when it returns. `Inbound` also
//! keeps what the handler has read of an incomplete message. [`Outbound`] tells whether the last message that was
//! written is complete. Neither looks at a payload, and neither reports invalid frames: the handler's WebSocket library
//! does that.

use bytes::Bytes;

const FIRST_CONTROL: u8 = 8;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The longest head of a frame: 2 bytes, a length of 8 bytes, and a mask of 4 bytes.
const LONGEST_HEAD: usize = 14;
/// The largest payload of a control frame (RFC 6455 section 5.5).
const CONTROL_LIMIT: u64 = 125;
/// The longest piece of memory for bytes that are kept.
const PIECE: usize = 8 * 1024;
/// How much of an incomplete message is kept, in bytes; the default limit of axum and tungstenite for a message.
const KEPT_LIMIT: usize = 64 * 1024 * 1024;

/// The head of a frame.
#[derive(Clone, Copy, Default)]
struct Head {
    /// Its first byte: the opcode, and whether the frame is the final one of its message.
    first: u8,
    /// The length of the payload.
    payload: u64,
}

impl Head {
    /// The head at the front of `bytes`, and its length. None if it is incomplete there.
    fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let &[first, second, ..] = bytes else { return None };
        let (payload, length) = match second & 0x7f {
            126 => (u64::from(u16::from_be_bytes(*bytes[2..].first_chunk()?)), 4),
            127 => (u64::from_be_bytes(*bytes[2..].first_chunk()?), 10),
            short => (u64::from(short), 2),
        };
        let mask = if second & 0x80 == 0 { 0 } else { 4 };
        (bytes.len() >= length + mask).then_some((Self { first, payload }, length + mask))
    }

    fn opcode(self) -> u8 {
        self.first & 0x0f
    }

    fn is_control(self) -> bool {
        self.opcode() >= FIRST_CONTROL
    }

    fn is_final(self) -> bool {
        self.first & 0x80 != 0
    }
}

/// The position in a sequence of frames.
#[derive(Default)]
struct Position {
    /// The head of the current frame, once it is complete.
    head: Head,
    /// The bytes of an incomplete head.
    begun: [u8; LONGEST_HEAD],
    begun_length: usize,
    /// The bytes of the current frame's payload that are still missing. Zero while its head is incomplete.
    payload_left: u64,
    /// Whether the last data frame was not the final one of its message.
    is_fragmented: bool,
}

impl Position {
    /// Takes bytes from the front of `bytes`, up to the end of a frame. Returns the head of that frame; None if it does
    /// not end in `bytes`.
    fn advance(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        if self.payload_left == 0 {
            self.head = self.take_head(bytes)?;
            self.payload_left = self.head.payload;
        }
        let taken = usize::try_from(self.payload_left).unwrap_or(usize::MAX).min(bytes.len());
        *bytes = &bytes[taken..];
        self.payload_left -= taken as u64;
        if self.payload_left > 0 {
            return None;
        }
        if !self.head.is_control() {
            self.is_fragmented = !self.head.is_final();
        }
        Some(self.head)
    }

    fn take_head(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        if self.begun_length == 0
            && let Some((head, length)) = Head::parse(bytes)
        {
            *bytes = &bytes[length..];
            return Some(head);
        }
        while let Some((first, rest)) = bytes.split_first() {
            self.begun[self.begun_length] = *first;
            self.begun_length += 1;
            *bytes = rest;
            if let Some((head, _)) = Head::parse(&self.begun[..self.begun_length]) {
                self.begun_length = 0;
                return Some(head);
            }
        }
        None
    }

    /// Whether a part of the payload of a data frame is missing.
    fn is_in_data_frame(&self) -> bool {
        self.payload_left > 0 && !self.head.is_control()
    }

    /// Whether some of the payload is missing of the only or last frame of a message.
    fn is_in_final_frame(&self) -> bool {
        self.is_in_data_frame() && self.head.is_final()
    }

    fn is_between_messages(&self) -> bool {
        self.is_between_frames() && !self.is_fragmented
    }

    fn is_between_frames(&self) -> bool {
        self.payload_left == 0 && self.begun_length == 0
    }
}

/// Bytes that are kept, in pieces. One buffer would have to grow with a long message, which copies it again.
#[derive(Default)]
struct Kept {
    pieces: Vec<Vec<u8>>,
    length: usize,
}

impl Kept {
    fn extend_from_slice(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.pieces.last().is_none_or(|last| last.len() == last.capacity()) {
                // As long as everything before it, so that a short message does not need a long piece.
                self.pieces.push(Vec::with_capacity(bytes.len().max(self.length).min(PIECE)));
            }
            let Some(last) = self.pieces.last_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(last.capacity() - last.len()));
            last.extend_from_slice(now);
            self.length += now.len();
            bytes = later;
        }
    }

    fn clear(&mut self) {
        if self.length > 0 {
            *self = Self::default();
        }
    }

    fn extend(&mut self, other: &Self) {
        other.pieces.iter().for_each(|piece| self.extend_from_slice(piece));
    }

    fn to_bytes(&self) -> Bytes {
        self.pieces.concat().into()
    }
}

/// What the handler reads.
#[derive(Default)]
pub(super) struct Inbound {
    position: Position,
    /// The bytes that were read of the current frame, if it is incomplete or may have to be read again.
    frame: Kept,
    /// Whether the bytes of the current frame are not kept, because its remainder has arrived. The handler must read it to
    /// its end before the connection can move.
    is_passing: bool,
    /// The data frames that were read of an incomplete message. Control frames between them are left out.
    message: Kept,
    /// Whether the current message is too long to be kept. The handler must read it to its end before the connection can move.
    is_too_long: bool,
    /// The last Ping that was read and not answered yet. It is enough to answer the last one (RFC 6455 section 5.5.3).
    ping: Option<Bytes>,
    state: InboundState,
}

/// How much a handler may read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Up to the end of a frame, because the handler may have to return after any message.
    OneFrame,
    /// As much as has arrived.
    Ahead,
}

/// What a handler may read now.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    /// The number of bytes.
    pub(super) length: usize,
    /// The number of frames that end in them.
    pub(super) frames: usize,
}

#[derive(Default, PartialEq, Eq)]
enum InboundState {
    #[default]
    Open,
    /// The peer has sent Close.
    Closed,
    /// A frame was invalid.
    Lost,
}

impl Inbound {
    /// How many of the `bytes`, which arrived next, the handler may read now. The caller must give it exactly these, and
    /// the others in a later read.
    ///
    /// If the handler receives several frames in one read, it may return after it has consumed only the first, and the
    /// others are lost. So the caller tells `Carry::requested` not to resolve until the handler reads again: its
    /// WebSocket library does that only when it has consumed all of them.
    ///
    /// `queued` returns how many bytes after these have arrived. A frame that has arrived as a whole is not kept, because
    /// the handler can read it without a wait for the peer; so a long message costs no copy.
    pub(super) fn admit(&mut self, bytes: &[u8], reading: Reading, queued: impl FnOnce() -> u64) -> Admitted {
        let mut rest = bytes;
        let mut frames = 0;
        while self.state == InboundState::Open && !rest.is_empty() {
            let from = rest;
            let end = self.position.advance(&mut rest);
            let (taken, _) = from.split_at(from.len() - rest.len());
            let Some(head) = end else {
                let ends_message = self.position.is_in_final_frame();
                if reading == Reading::Ahead && ends_message && queued() >= self.position.payload_left {
                    self.is_passing = true;
                    self.frame.clear();
                }
                if !self.is_passing {
                    self.keep(taken);
                }
                break;
            };
            self.is_passing = false;
            if head.is_control() {
                self.end_control(head, taken);
            } else {
                self.end_data(head, taken);
            }
            frames += 1;
            if reading == Reading::OneFrame {
                return Admitted { length: bytes.len() - rest.len(), frames };
            }
        }
        Admitted { length: bytes.len(), frames }
    }

    /// Keeps the beginning of a frame that is incomplete.
    fn keep(&mut self, taken: &[u8]) {
        if self.is_too_long && self.position.is_in_data_frame() {
            return;
        }
        self.frame.extend_from_slice(taken);
        if self.frame.length + self.message.length > KEPT_LIMIT {
            self.is_too_long = true;
            self.message.clear();
            // Otherwise these bytes may be the beginning of a Ping.
            if self.position.is_in_data_frame() {
                self.frame.clear();
            }
        }
    }

    fn lose(&mut self) {
        self.state = InboundState::Lost;
        self.frame.clear();
        self.message.clear();
    }

    fn end_control(&mut self, head: Head, taken: &[u8]) {
        if head.payload > CONTROL_LIMIT || !head.is_final() {
            return self.lose();
        }
        if head.opcode() == PING {
            self.frame.extend_from_slice(taken);
            self.ping = Some(self.frame.to_bytes());
        }
        if head.opcode() == CLOSE {
            self.state = InboundState::Closed;
        }
        self.frame.clear();
    }

    fn end_data(&mut self, head: Head, taken: &[u8]) {
        if head.is_final() {
            // The handler has the whole message. The buffers are dropped, because an idle WebSocket should have none.
            self.frame.clear();
            self.message.clear();
            self.is_too_long = false;
        } else {
            if !self.is_too_long {
                self.keep(taken);
            }
            let frame = std::mem::take(&mut self.frame);
            if !self.is_too_long {
                self.message.extend(&frame);
            }
        }
    }

    /// A Pong was written, so no Ping that was read before has to be answered again.
    pub(super) fn answered(&mut self) {
        self.ping = None;
    }

    /// Whether another handler can continue to read: the peer has not sent Close, each frame was valid, and what the
    /// handler has read of an incomplete message is kept.
    pub(super) fn is_movable(&self) -> bool {
        self.state == InboundState::Open && !self.is_passing && !self.is_too_long
    }

    /// Whether the handler is reading a frame that has arrived as a whole and is not kept.
    pub(super) fn is_passing(&self) -> bool {
        self.is_passing
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state == InboundState::Closed
    }

    /// Follows `bytes`, which arrived next and which no handler reads. True if the Close of the peer has arrived, or if
    /// an invalid frame makes it impossible to find.
    pub(super) fn follow_to_end(&mut self, mut bytes: &[u8]) -> bool {
        while self.state != InboundState::Lost
            && let Some(head) = self.position.advance(&mut bytes)
        {
            if head.opcode() == CLOSE {
                return true;
            }
        }
        self.state == InboundState::Lost
    }

    /// The bytes that the handler of the next process has to read again: an unanswered Ping, and what this handler has
    /// read of an incomplete message.
    pub(super) fn unread(self) -> Bytes {
        let Self { ping, mut message, frame, .. } = self;
        message.pieces.insert(0, ping.unwrap_or_default().into());
        message.pieces.extend(frame.pieces);
        message.to_bytes()
    }
}

/// What the handler writes.
#[derive(Default)]
pub(super) struct Outbound {
    position: Position,
    is_closed: bool,
}

impl Outbound {
    /// Records bytes that were written. Returns whether a Pong was among them.
    pub(super) fn wrote(&mut self, mut bytes: &[u8]) -> bool {
        let mut has_pong = false;
        while let Some(head) = self.position.advance(&mut bytes) {
            has_pong |= head.opcode() == PONG;
            self.is_closed |= head.opcode() == CLOSE;
        }
        has_pong
    }

    /// Whether another process may write the next message: the last one is complete, and it was not a Close.
    pub(super) fn is_movable(&self) -> bool {
        self.position.is_between_messages() && !self.is_closed
    }

    /// Whether a Close may follow: the last frame is complete, and it was not a Close.
    pub(super) fn may_close(&self) -> bool {
        self.position.is_between_frames() && !self.is_closed
    }
}

/// A Close frame with this code (RFC 6455 section 7.4), as a server sends it.
pub(super) fn close(code: u16) -> [u8; 4] {
    let [high, low] = code.to_be_bytes();
    [0x80 | CLOSE, 2, high, low]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTINUATION: u8 = 0;

    /// A frame as a client sends it if it has a `mask`, or as a server does.
    fn frame(opcode: u8, is_final: bool, mask: Option<[u8; 4]>, payload: &[u8]) -> Vec<u8> {
        let masked = if mask.is_some() { 0x80 } else { 0 };
        let mut bytes = vec![if is_final { 0x80 } else { 0 } | opcode];
        match payload.len() {
            length @ 0..126 => bytes.push(masked | u8::try_from(length).expect("it is short")),
            length @ 126..65_536 => {
                bytes.push(masked + 126);
                bytes.extend(u16::try_from(length).expect("it is short").to_be_bytes());
            }
            length => {
                bytes.push(masked + 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(mask.into_iter().flatten());
        bytes.extend(payload);
        bytes
    }

    /// What a client sends.
    #[derive(Clone, Debug)]
    enum Sent {
        /// A message in fragments, with a control frame (its opcode) after some of them.
        Message(Vec<(Vec<u8>, Option<u8>)>),
        Control(u8, Vec<u8>),
    }

    fn sent() -> impl Strategy<Value = Sent> {
        let payload = || {
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..10),
                prop::collection::vec(any::<u8>(), 120..140),
                Just(vec![7; 70_000]),
            ]
        };
        let control = || prop_oneof![Just(PING), Just(PONG)];
        prop_oneof![
            3 => prop::collection::vec((payload(), prop::option::of(control())), 1..4).prop_map(Sent::Message),
            1 => (control(), prop::collection::vec(any::<u8>(), 0..126)).prop_map(|(opcode, p)| Sent::Control(opcode, p)),
        ]
    }

    /// Each frame that is sent: its bytes, whether it is a data frame, and whether a message ends with it.
    fn frames(sent: &[Sent]) -> Vec<(Vec<u8>, bool, bool)> {
        let mask = Some([1, 2, 3, 4]);
        let mut frames = Vec::new();
        for one in sent {
            match one {
                Sent::Control(opcode, payload) => {
                    frames.push((frame(*opcode, true, mask, payload), false, true));
                }
                Sent::Message(fragments) => {
                    for (index, (payload, control)) in fragments.iter().enumerate() {
                        let is_last = index + 1 == fragments.len();
                        let opcode = if index == 0 { 2 } else { CONTINUATION };
                        frames.push((frame(opcode, is_last, mask, payload), true, is_last));
                        if let Some(control) = control.filter(|_| !is_last) {
                            frames.push((frame(control, true, mask, b"x"), false, false));
                        }
                    }
                }
            }
        }
        frames
    }

    fn readings() -> impl Strategy<Value = Reading> {
        prop_oneof![Just(Reading::OneFrame), Just(Reading::Ahead)]
    }

    proptest! {
        /// Reads in pieces of any size, and moves after any of them: the data frames that all handlers have read
        /// completely, and those that the last one reads again, are the ones that were sent.
        #[test]
        fn next_handler_reads_each_message_that_no_handler_has_read_completely(
            sent in prop::collection::vec(sent(), 0..6),
            pieces in prop::collection::vec((1..200_usize, any::<bool>(), readings(), any::<bool>()), 1..40),
        ) {
            let frames = frames(&sent);
            let all: Vec<u8> = frames.iter().flat_map(|(bytes, ..)| bytes.clone()).collect();
            let data: Vec<u8> = frames.iter().filter(|frame| frame.1).flat_map(|frame| frame.0.clone()).collect();
            let mut inbound = Inbound::default();
            // What arrives next, and the complete messages that the handlers have read.
            let (mut arriving, mut complete) = (all.clone(), Vec::new());
            // What the current handler has read of an incomplete message.
            let (mut begun, mut handler, mut move_count) = (Vec::new(), Position::default(), 0);
            for (length, moves, reading, is_queued) in pieces.into_iter().cycle() {
                if arriving.is_empty() {
                    break;
                }
                let piece = &arriving[..length.min(arriving.len())];
                let queued = || if is_queued { (arriving.len() - piece.len()) as u64 } else { 0 };
                let admitted = inbound.admit(piece, reading, queued);
                prop_assert!(admitted.length > 0);
                let mut rest = &piece[..admitted.length];
                while !rest.is_empty() {
                    let from = rest;
                    handler.advance(&mut rest);
                    begun.extend_from_slice(&from[..from.len() - rest.len()]);
                    if handler.is_between_messages() {
                        complete.append(&mut begun);
                    }
                }
                arriving.drain(..admitted.length);
                if moves && inbound.is_movable() && move_count < 30 {
                    move_count += 1;
                    handler = Position::default();
                    let ping = inbound.ping.clone().unwrap_or_default();
                    let again = std::mem::take(&mut inbound).unread();
                    prop_assert!(again.starts_with(&ping));
                    // A Pong ends the wait of each Ping here, so that the same one is not read for ever.
                    arriving.splice(..0, again[ping.len()..].iter().copied());
                    begun.clear();
                }
            }
            prop_assert!(begun.is_empty());
            let data_read: Vec<u8> = {
                let mut rest = &complete[..];
                let mut position = Position::default();
                let mut data = Vec::new();
                while !rest.is_empty() {
                    let before = rest;
                    let Some(head) = position.advance(&mut rest) else { break };
                    if !head.is_control() {
                        data.extend_from_slice(&before[..before.len() - rest.len()]);
                    }
                }
                data
            };
            prop_assert!(data_read == data, "{} of {} bytes", data_read.len(), data.len());
        }

        /// A handler has read the first frames up to any byte, and then the library has sent Close.
        #[test]
        fn peer_has_ended_exactly_when_the_last_byte_of_its_close_has_arrived(
            sent in prop::collection::vec(sent(), 0..4),
            has_read in any::<prop::sample::Index>(),
            length in 1..200_usize,
        ) {
            let mut all: Vec<u8> = frames(&sent).into_iter().flat_map(|frame| frame.0).collect();
            let has_read = has_read.index(all.len() + 1);
            all.extend(frame(CLOSE, true, Some([1, 2, 3, 4]), &[3, 244]));
            let end = all.len();
            all.extend(b"what follows is not a frame");
            let mut inbound = Inbound::default();
            inbound.admit(&all[..has_read], Reading::Ahead, || 0);
            let mut at = has_read;
            while at < end {
                let piece = &all[at..(at + length).min(all.len())];
                at += piece.len();
                prop_assert_eq!(inbound.follow_to_end(piece), at >= end);
            }
        }

        #[test]
        fn handler_reads_at_most_one_frame_at_once_in_a_drain(sent in prop::collection::vec(sent(), 1..6)) {
            let frames = frames(&sent);
            let all: Vec<u8> = frames.iter().flat_map(|(bytes, ..)| bytes.clone()).collect();
            let (mut inbound, mut at, mut reads) = (Inbound::default(), 0, 0);
            while at < all.len() {
                let admitted = inbound.admit(&all[at..], Reading::OneFrame, || 0);
                prop_assert_eq!(admitted.frames, 1);
                at += admitted.length;
                reads += 1;
            }
            prop_assert_eq!(reads, frames.len());
        }

        #[test]
        fn handler_reads_all_that_has_arrived_outside_of_a_drain(sent in prop::collection::vec(sent(), 1..6)) {
            let frames = frames(&sent);
            let all: Vec<u8> = frames.iter().flat_map(|(bytes, ..)| bytes.clone()).collect();
            let admitted = Inbound::default().admit(&all, Reading::Ahead, || 0);
            prop_assert_eq!(admitted, Admitted { length: all.len(), frames: frames.len() });
        }

        #[test]
        fn outbound_is_movable_exactly_between_messages(
            messages in prop::collection::vec(prop::collection::vec(0..300_usize, 1..4), 1..5),
        ) {
            let mut outbound = Outbound::default();
            for fragments in messages {
                for (index, length) in fragments.iter().enumerate() {
                    let is_last = index + 1 == fragments.len();
                    let opcode = if index == 0 { 1 } else { CONTINUATION };
                    let bytes = frame(opcode, is_last, None, &vec![0; *length]);
                    for (position, byte) in bytes.iter().enumerate() {
                        prop_assert_eq!(outbound.is_movable(), position == 0 && index == 0);
                        prop_assert!(!outbound.wrote(&[*byte]));
                    }
                }
                prop_assert!(outbound.is_movable());
            }
        }

        #[test]
        fn any_bytes_are_admitted_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300), reading in readings(),
        ) {
            let mut inbound = Inbound::default();
            let mut at = 0;
            while at < bytes.len() {
                let admitted = inbound.admit(&bytes[at..], reading, || 0).length;
                prop_assert!(admitted > 0);
                at += admitted;
            }
            let _ = inbound.unread();
            Inbound::default().follow_to_end(&bytes);
            Outbound::default().wrote(&bytes);
        }
    }

    #[test]
    fn ping_is_read_again_until_a_pong_was_written() {
        let ping = frame(PING, true, Some([1, 2, 3, 4]), b"hello");
        let mut inbound = Inbound::default();
        assert_eq!(inbound.admit(&ping[..3], Reading::OneFrame, || 0), Admitted { length: 3, frames: 0 });
        let admitted = inbound.admit(&ping[3..], Reading::OneFrame, || 0);
        assert_eq!(admitted, Admitted { length: ping.len() - 3, frames: 1 });
        assert_eq!(inbound.unread(), ping);
        let mut inbound = Inbound::default();
        inbound.admit(&ping, Reading::OneFrame, || 0);
        assert!(Outbound::default().wrote(&frame(PONG, true, None, b"hello")));
        inbound.answered();
        assert_eq!(inbound.unread(), "");
    }

    #[test]
    fn websocket_is_not_movable_once_either_side_has_sent_close() {
        let mut inbound = Inbound::default();
        inbound.admit(&frame(CLOSE, true, Some([0; 4]), &[3, 232]), Reading::Ahead, || 0);
        assert!(inbound.is_closed() && !inbound.is_movable());
        let mut outbound = Outbound::default();
        outbound.wrote(&close(1012));
        assert!(!outbound.is_movable() && !outbound.may_close());
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_frames_of_a_websocket_do_not_panic() {
        crate::fuzz::target!("websocket_frames").for_each(|bytes| {
            for reading in [Reading::OneFrame, Reading::Ahead] {
                let mut inbound = Inbound::default();
                let mut at = 0;
                while at < bytes.len() {
                    let admitted = inbound.admit(&bytes[at..], reading, || 0).length;
                    assert!(admitted > 0);
                    at += admitted;
                }
                let _ = inbound.unread();
            }
            Outbound::default().wrote(bytes);
        });
    }

    /// A service may permit messages that are longer than what is kept of them.
    #[test]
    fn connection_is_movable_again_after_a_message_that_was_too_long_to_be_kept() {
        let ping = frame(PING, true, Some([1, 2, 3, 4]), b"p");
        let mut inbound = Inbound::default();
        let mut admit = |bytes: &[u8]| {
            for piece in bytes.chunks(PIECE) {
                inbound.admit(piece, Reading::Ahead, || 0);
            }
            (inbound.is_movable(), inbound.frame.length + inbound.message.length)
        };
        let part = vec![0; KEPT_LIMIT / 4];
        let begin = frame(1, false, Some([0; 4]), &part);
        let middle = frame(CONTINUATION, false, Some([0; 4]), &part);
        let end = frame(CONTINUATION, true, Some([0; 4]), &part);
        admit(&begin);
        admit(&middle);
        let (is_movable, kept) = admit(&middle);
        assert!(is_movable && kept > 3 * part.len());
        assert_eq!(admit(&middle), (false, 0));
        assert_eq!(admit(&middle), (false, 0));
        // In two pieces.
        admit(&ping[..3]);
        assert_eq!(admit(&ping[3..]), (false, 0));
        assert_eq!(admit(&end), (true, 0));
        assert_eq!(admit(&frame(1, true, Some([0; 4]), b"next")), (true, 0));
        assert_eq!(inbound.ping.as_deref(), Some(&ping[..]));
    }

    #[test]
    fn ping_that_begins_where_a_message_becomes_too_long_is_kept_whole() {
        let ping = frame(PING, true, Some([1, 2, 3, 4]), b"p");
        let head = frame(1, false, Some([0; 4]), &vec![0; 1 << 16]).len() - (1 << 16);
        let begin = frame(1, false, Some([0; 4]), &vec![0; KEPT_LIMIT - head]);
        let mut inbound = Inbound::default();
        for bytes in [&begin[..], &ping[..3], &ping[3..]] {
            inbound.admit(bytes, Reading::Ahead, || 0);
        }
        assert!(!inbound.is_movable());
        inbound.admit(&frame(CONTINUATION, true, Some([0; 4]), b"end"), Reading::Ahead, || 0);
        assert!(inbound.is_movable());
        assert_eq!(inbound.ping.as_deref(), Some(&ping[..]));
    }
}
