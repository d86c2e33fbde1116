//! HTTP/2 frames (RFC 9113 section 4.1): encodes those that the interposer adds, and finds frames in a byte stream that
//! arrives in pieces of any size ([`FrameParser`]).

use bytes::{Buf, BufMut, BytesMut};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
#[cfg(test)]
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// Flag of DATA and HEADERS.
pub const END_STREAM: u8 = 1;
/// Flag of SETTINGS and PING.
pub const ACK: u8 = 1;
/// Flag of HEADERS and CONTINUATION.
pub const END_HEADERS: u8 = 4;
/// Flags of HEADERS: the payload has padding or a priority before the header block.
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;

/// The header of a frame, in bytes.
pub const HEAD_LENGTH: usize = 9;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub length: usize,
    pub frame_type: u8,
    pub flags: u8,
    pub stream: u32,
}

impl Head {
    pub fn new(frame_type: u8, flags: u8, length: usize) -> Self {
        Self { length, frame_type, flags, stream: 0 }
    }

    pub fn decode(bytes: [u8; HEAD_LENGTH]) -> Self {
        let [a, b, c, frame_type, flags, stream @ ..] = bytes;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        Self { length, frame_type, flags, stream: u32::from_be_bytes(stream) & !(1 << 31) }
    }

    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The header block in the payload of HEADERS. None if the frame is something else, or is padded, or CONTINUATION
    /// follows.
    pub fn whole_block(self, payload: &[u8]) -> Option<&[u8]> {
        let is_whole = self.frame_type == HEADERS && self.has(END_HEADERS);
        let before = 5 * usize::from(self.has(WITH_PRIORITY));
        payload.get(before..).filter(|_| is_whole && !self.has(PADDED))
    }

    /// The part of a header block in the payload of HEADERS or CONTINUATION. None if the payload is malformed.
    pub fn fragment(self, mut payload: &[u8]) -> Option<&[u8]> {
        if self.frame_type != HEADERS {
            return Some(payload);
        }
        let padding = if self.has(PADDED) { payload.try_get_u8().ok()? } else { 0 };
        let before = 5 * usize::from(self.has(WITH_PRIORITY));
        payload = payload.get(before..)?;
        payload.get(..payload.len().checked_sub(padding.into())?)
    }

    pub fn put(self, into: &mut BytesMut) {
        into.put_slice(&self.encode());
    }

    pub fn encode(self) -> [u8; HEAD_LENGTH] {
        let mut bytes = [0; HEAD_LENGTH];
        let [.., high, middle, low] = self.length.to_be_bytes();
        bytes[..5].copy_from_slice(&[high, middle, low, self.frame_type, self.flags]);
        bytes[5..].copy_from_slice(&self.stream.to_be_bytes());
        bytes
    }
}

/// The increment of a WINDOW_UPDATE. None if the payload does not have four bytes.
pub fn increment(payload: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(payload.try_into().ok()?) & !(1 << 31))
}

/// `stream`: 0 for the connection.
pub fn put_window_update(stream: u32, increment: u32, into: &mut BytesMut) {
    Head { stream, ..Head::new(WINDOW_UPDATE, 0, 4) }.put(into);
    into.put_u32(increment);
}

pub fn put_settings(payload: &[u8], into: &mut BytesMut) {
    Head::new(SETTINGS, 0, payload.len()).put(into);
    into.put_slice(payload);
}

pub fn put_settings_ack(into: &mut BytesMut) {
    Head::new(SETTINGS, ACK, 0).put(into);
}

/// Appends an empty DATA frame that ends the stream.
pub fn put_end_of_stream(stream: u32, into: &mut BytesMut) {
    Head { stream, ..Head::new(DATA, END_STREAM, 0) }.put(into);
}

/// Appends the end of a call in gRPC: trailers with the status UNAVAILABLE.
pub fn put_grpc_unavailable(stream: u32, into: &mut BytesMut) -> (Head, &'static [u8]) {
    // A literal field without indexing (RFC 7541 section 6.2.2), so that it does not touch the header table.
    const TRAILERS: &[u8] = b"\x00\x0bgrpc-status\x0214";
    let head = Head { stream, ..Head::new(HEADERS, END_STREAM | END_HEADERS, TRAILERS.len()) };
    head.put(into);
    into.put_slice(TRAILERS);
    (head, TRAILERS)
}

/// Appends RST_STREAM with the error code CANCEL (RFC 9113 section 7).
pub fn put_cancel(stream: u32, into: &mut BytesMut) {
    const CANCEL: u32 = 8;
    Head { stream, ..Head::new(RST_STREAM, 0, 4) }.put(into);
    into.put_u32(CANCEL);
}

/// Appends GOAWAY without an error: streams after `last_stream` were not served (RFC 9113 section 6.8).
pub fn put_goaway(last_stream: u32, into: &mut BytesMut) {
    const NO_ERROR: u32 = 0;
    Head::new(GOAWAY, 0, 8).put(into);
    into.put_u32(last_stream);
    into.put_u32(NO_ERROR);
}

/// Appends a request that begins with the fields of `block`, and whose headers count as `limit` bytes or more (RFC 9113
/// section 6.5.2). A server with this limit refuses the request without calling a handler. It keeps no state of the stream;
/// it would keep the state of a stream that it resets.
pub fn put_oversized_request(stream: u32, block: &[u8], limit: u32, into: &mut BytesMut) {
    // `accept-encoding: gzip, deflate` by its index in the static table (RFC 7541 appendix A).
    const FIELD: u8 = 0x80 | 16;
    const FIELD_SIZE: usize = 15 + 13 + 32;
    let fields = limit as usize / FIELD_SIZE + 1;
    Head { stream, ..Head::new(HEADERS, END_STREAM | END_HEADERS, block.len() + fields) }.put(into);
    into.put_slice(block);
    into.put_bytes(FIELD, fields);
}

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Pass its bytes on as they arrive.
    Forward,
    /// Keep it, and all frames that belong to it, until new streams may begin.
    Hold,
    /// Drop it.
    Discard,
}

/// How much of the current frame has arrived.
#[derive(Debug)]
pub enum FrameParser {
    /// So many bytes of its header.
    Head([u8; HEAD_LENGTH], usize),
    /// What to do with the frame, and how many bytes of its payload are missing.
    Payload(Disposition, usize),
    /// A frame that is processed when it is complete: its header, decoded and raw, and the payload so far.
    Whole(Head, [u8; HEAD_LENGTH], Vec<u8>),
}

impl FrameParser {
    pub const START: Self = Self::Head([0; HEAD_LENGTH], 0);

    /// Whether no byte of a frame has arrived.
    pub fn is_start(&self) -> bool {
        matches!(self, Self::Head(_, 0))
    }

    /// The bytes of the current frame, if none of them were passed on.
    pub fn buffered(&self) -> Vec<u8> {
        match self {
            Self::Head(bytes, have) => bytes[..*have].to_vec(),
            Self::Payload(..) => Vec::new(),
            Self::Whole(_, head, payload) => [&head[..], payload].concat(),
        }
    }

    /// Moves bytes of the header from the front of `bytes`. Returns the header when it is complete.
    pub fn take_head(&mut self, bytes: &mut &[u8]) -> Option<[u8; HEAD_LENGTH]> {
        let Self::Head(head, have) = self else { return None };
        let length = (HEAD_LENGTH - *have).min(bytes.len());
        head[*have..*have + length].copy_from_slice(&bytes[..length]);
        bytes.advance(length);
        *have += length;
        (*have == HEAD_LENGTH).then_some(*head)
    }
}

/// Splits a frame off the front: its header and its payload. None if it is incomplete.
pub fn take_frame<'a>(bytes: &mut &'a [u8]) -> Option<(Head, &'a [u8])> {
    let head = Head::decode(*bytes.first_chunk()?);
    let (frame, rest) = bytes.split_at_checked(HEAD_LENGTH + head.length)?;
    *bytes = rest;
    Some((head, &frame[HEAD_LENGTH..]))
}

/// Splits at most `length` bytes off the front.
pub fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(length.min(bytes.len()));
    *bytes = rest;
    taken
}
