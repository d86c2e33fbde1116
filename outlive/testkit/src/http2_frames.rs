//! HTTP/2 frames (RFC 9113 section 4.1), for tests that encode and read single frames. `client::Http2` is a client for
//! all other tests.

use crate::client::Connection;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;

/// A flag of DATA and HEADERS.
pub const END_STREAM: u8 = 1;
/// A flag of HEADERS.
pub const END_HEADERS: u8 = 4;
/// A flag of SETTINGS and PING.
pub const ACK: u8 = 1;

/// The head and the payload of a frame.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Whether it is DATA or HEADERS with END_STREAM.
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// The last stream of a GOAWAY, which must have the code NO_ERROR.
    pub fn last_stream(&self) -> u32 {
        let (stream, error) = self.payload.split_first_chunk().expect("the payload has a stream id");
        assert_eq!(error, [0; 4], "NO_ERROR");
        u32::from_be_bytes(*stream)
    }
}

/// The bytes of a frame whose payload has at most 255 bytes.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("the payload is short");
    [&[0, 0, length, kind, flags][..], &stream.to_be_bytes(), payload].concat()
}

/// The next frame; `None` after the server has closed the connection.
pub async fn next(connection: &mut Connection) -> Option<Frame> {
    if connection.unread().is_empty()
        && connection.read_more().await.expect("the connection is not reset") == 0
    {
        return None;
    }
    let head = connection.take(9).await.expect("a frame arrives");
    let length = usize::from(head[1]) << 8 | usize::from(head[2]);
    let payload = connection.take(length).await.expect("the payload arrives");
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some(Frame { kind: head[3], flags: head[4], stream, payload })
}

/// Reads until a frame is `wanted`, and returns it.
pub async fn next_that(connection: &mut Connection, wanted: impl Fn(&Frame) -> bool) -> Frame {
    loop {
        let frame = next(connection).await.expect("the server sends further frames");
        if wanted(&frame) {
            return frame;
        }
    }
}
