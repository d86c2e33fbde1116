//! The frames on the channel: one message of a `SOCK_SEQPACKET` socket each.
//!
//! ```text
//! message   4  "hand"                            the same in every version
//!           2  version                           the same in every version
//!           2  kind                              versions 1 and 2 from here on
//!           2  N, sockets in this frame
//!           8  generation of the sender
//!           8  when its last answer was out, nanoseconds of CLOCK_MONOTONIC
//!           .  text, UTF-8, up to 512 bytes
//! fds       1  a memfd with N records, if N > 0
//!           N  sockets: connections, or listeners
//! record    4  length of all that follows        version 2 only
//!           2  kind of the connection            version 2 only; the sum of 1: HTTP/2, 2: TLS
//!           2  length of the listener's name
//!           4  length of the payload
//!           .  the listener's name
//!           .  of a connection: the bytes read from it and not consumed; of a listener: who holds it
//!           .  of HTTP/2: 4, a length; what is agreed upon (`state.rs`)
//!           .  of TLS: 4, a length; what seals and opens its records (`tls_session.rs`)
//!           .  what a later release has to say   version 2 only
//! ```
//! Numbers are little-endian. The records are in a memfd because a message may not be larger than the
//! socket's buffer, and all messages together may not either.
//!
//! Version 1 is written where it does, so that the releases before may take this one's place at any moment. In version
//! 2 a connection of a kind that is not known is refused, and no other with it.

use std::fmt;
use std::io;
use std::str::Utf8Error;

use bytes::{Buf, BufMut, Bytes};
use zeroize::Zeroizing;

use super::Origin;

/// The oldest that is read and written: of HTTP/1.1 and listeners.
pub(super) const FIRST_VERSION: u16 = 1;
/// The newest.
pub(super) const LAST_VERSION: u16 = 2;
pub(super) const HEADER_LENGTH: usize = 26;
pub(super) const TEXT_LIMIT: usize = 512;
/// `SCM_MAX_FD` of Linux is 253; one is the memfd.
pub const MAX_SOCKETS: usize = 252;

const MAGIC: &[u8; 4] = b"hand";

/// What a frame says. Connections, tickets and totals alone travel at a restart; the others are the words of a takeover
/// (`takeover.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum MessageType {
    /// Go on with these.
    Connections,
    /// The successor: here I am; the text is my pid.
    Hello,
    /// Who started the successor: it is now a child of the service manager.
    Go,
    /// The predecessor: listen on these, and here are my credentials; the text is my `WATCHDOG_USEC`.
    Listeners,
    /// The successor: I could serve.
    Ready,
    /// The predecessor: do.
    Commit,
    /// The successor: I accept connections.
    Accepting,
    /// The predecessor: you are the main process.
    Main,
    /// Either: no; the text says why.
    Refused,
    /// The predecessor, last of all: the text is what it has counted (`metrics::totals`).
    Totals,
    /// The predecessor: go on with these keys of session tickets (`tickets.rs`); the sockets mean nothing.
    Tickets,
}

impl MessageType {
    const ALL: [Self; 11] = [
        Self::Connections,
        Self::Hello,
        Self::Go,
        Self::Listeners,
        Self::Ready,
        Self::Commit,
        Self::Accepting,
        Self::Main,
        Self::Refused,
        Self::Totals,
        Self::Tickets,
    ];
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u16,
    pub(super) message_type: MessageType,
    pub(super) sockets: u16,
    pub(super) origin: Origin,
    pub(super) text: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketRecord {
    pub listener: String,
    pub payload: Bytes,
    /// Of an HTTP/2 connection: what is agreed upon.
    pub http2: Option<Bytes>,
    /// Of a TLS connection: its keys, and more. Or keys of session tickets.
    pub tls: Option<Secret>,
}

/// Wiped when it is dropped, and not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Zeroizing<Vec<u8>>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Why bytes are not a frame, or a record in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    NotAFrame,
    Version(u16),
    /// The length of the message, in bytes.
    Length(usize),
    MessageType(u16),
    /// More sockets than a message can carry.
    Sockets(u16),
    Text(Utf8Error),
    /// A record ends before its last field.
    TruncatedRecord,
    /// The record is whole, and its protocols are those of a later release. The records after it can be read.
    UnsupportedProtocols(u16),
    /// File descriptors in the message, and how many its header announces.
    Descriptors {
        received: usize,
        expected: usize,
    },
    /// The records could not be read.
    Records(io::ErrorKind),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAFrame => f.write_str("not a handover frame"),
            Self::Version(version) => write!(
                f,
                "unsupported frame version {version}: this binary supports {FIRST_VERSION} to {LAST_VERSION}"
            ),
            Self::Length(length) => write!(f, "invalid frame length {length}"),
            Self::MessageType(number) => write!(f, "unknown message type {number}"),
            Self::Sockets(count) => {
                write!(f, "invalid frame: {count} sockets, expected at most {MAX_SOCKETS}")
            }
            Self::Text(error) => write!(f, "invalid text in a frame: {error}"),
            Self::TruncatedRecord => f.write_str("truncated record"),
            Self::UnsupportedProtocols(bits) => write!(f, "unsupported connection type {bits}"),
            Self::Descriptors { received, expected } => {
                write!(f, "received {received} file descriptors in a message, expected {expected}")
            }
            Self::Records(kind) => write!(f, "could not read the records of a message: {kind}"),
        }
    }
}

impl std::error::Error for FrameError {}

impl Header {
    /// A longer text is cut.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LENGTH + self.text.len());
        bytes.put_slice(MAGIC);
        bytes.put_u16_le(self.version);
        bytes.put_u16_le(self.message_type as u16);
        bytes.put_u16_le(self.sockets);
        bytes.put_u64_le(self.origin.generation);
        bytes.put_u64_le(self.origin.rested_at);
        bytes.put_slice(&self.text.as_bytes()[..self.text.floor_char_boundary(TEXT_LIMIT)]);
        bytes
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Result<Self, FrameError> {
        if bytes.len() < 6 || bytes[..4] != *MAGIC {
            return Err(FrameError::NotAFrame);
        }
        bytes.advance(4);
        let version = bytes.get_u16_le();
        if !(FIRST_VERSION..=LAST_VERSION).contains(&version) {
            return Err(FrameError::Version(version));
        }
        let lengths = HEADER_LENGTH - 6..=HEADER_LENGTH - 6 + TEXT_LIMIT;
        if !lengths.contains(&bytes.len()) {
            return Err(FrameError::Length(6 + bytes.len()));
        }
        let message_type = bytes.get_u16_le();
        let message_type =
            *MessageType::ALL.get(usize::from(message_type)).ok_or(FrameError::MessageType(message_type))?;
        let sockets = bytes.get_u16_le();
        if usize::from(sockets) > MAX_SOCKETS {
            return Err(FrameError::Sockets(sockets));
        }
        let origin = Origin { generation: bytes.get_u64_le(), rested_at: bytes.get_u64_le() };
        let text = std::str::from_utf8(bytes).map_err(FrameError::Text)?.to_owned();
        Ok(Self { version, message_type, sockets, origin, text })
    }
}

impl SocketRecord {
    /// The first version that can say it.
    pub(super) fn version(&self) -> u16 {
        if self.protocols() == HTTP1 { FIRST_VERSION } else { LAST_VERSION }
    }

    /// Bits of [`HTTP2`] and [`TLS`].
    fn protocols(&self) -> u16 {
        (if self.http2.is_some() { HTTP2 } else { 0 }) | (if self.tls.is_some() { TLS } else { 0 })
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        self.http2.as_deref().into_iter().chain(self.tls.as_ref().map(|tls| &tls.0[..]))
    }

    /// How long it is, in bytes; in version 1 a little less.
    pub(super) fn length(&self) -> usize {
        let parts: usize = self.parts().map(|part| 4 + part.len()).sum();
        6 + BODY_LENGTH + self.listener.len() + self.payload.len() + parts
    }

    pub(super) fn encode(&self, version: u16, into: &mut Vec<u8>) -> Result<(), std::num::TryFromIntError> {
        if version > FIRST_VERSION {
            into.put_u32_le((self.length() - 4).try_into()?);
            into.put_u16_le(self.protocols());
        }
        into.put_u16_le(self.listener.len().try_into()?);
        into.put_u32_le(self.payload.len().try_into()?);
        into.put_slice(self.listener.as_bytes());
        into.put_slice(&self.payload);
        for part in self.parts() {
            into.put_u32_le(part.len().try_into()?);
            into.put_slice(part);
        }
        Ok(())
    }

    /// Takes one record off the front of `bytes`. After [`FrameError::UnsupportedProtocols`], the next record follows.
    pub(super) fn decode(version: u16, bytes: &mut &[u8]) -> Result<Self, FrameError> {
        if version == FIRST_VERSION {
            return Self::decode_body(bytes);
        }
        let length = bytes.try_get_u32_le().map_err(|_| FrameError::TruncatedRecord)?;
        let mut body = take(bytes, length)?;
        let protocols = body.try_get_u16_le().map_err(|_| FrameError::TruncatedRecord)?;
        if protocols & !(HTTP2 | TLS) != 0 {
            return Err(FrameError::UnsupportedProtocols(protocols));
        }
        let mut record = Self::decode_body(&mut body)?;
        let mut part = || {
            let length = body.try_get_u32_le().map_err(|_| FrameError::TruncatedRecord)?;
            take(&mut body, length)
        };
        if protocols & HTTP2 != 0 {
            record.http2 = Some(Bytes::copy_from_slice(part()?));
        }
        if protocols & TLS != 0 {
            record.tls = Some(Secret(Zeroizing::new(part()?.to_vec())));
        }
        Ok(record)
    }

    fn decode_body(bytes: &mut &[u8]) -> Result<Self, FrameError> {
        let name = bytes.try_get_u16_le().map_err(|_| FrameError::TruncatedRecord)?;
        let payload = bytes.try_get_u32_le().map_err(|_| FrameError::TruncatedRecord)?;
        let listener = std::str::from_utf8(take(bytes, name.into())?).map_err(FrameError::Text)?.into();
        let payload = Bytes::copy_from_slice(take(bytes, payload)?);
        Ok(Self { listener, payload, http2: None, tls: None })
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: u32) -> Result<&'a [u8], FrameError> {
    let (taken, rest) = bytes.split_at_checked(length as usize).ok_or(FrameError::TruncatedRecord)?;
    *bytes = rest;
    Ok(taken)
}

/// A connection that speaks HTTP/1.1, or nothing yet.
const HTTP1: u16 = 0;
/// A connection that speaks HTTP/2.
const HTTP2: u16 = 1;
/// A connection that speaks TLS, whatever inside.
const TLS: u16 = 2;
/// The two lengths.
const BODY_LENGTH: usize = 6;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(sockets: u16, text: &str) -> Header {
        let origin = Origin { generation: 3, rested_at: 5 };
        Header {
            version: FIRST_VERSION,
            message_type: MessageType::Connections,
            sockets,
            origin,
            text: text.into(),
        }
    }

    fn record() -> impl Strategy<Value = SocketRecord> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        (".{0,40}", bytes(), prop::option::of(bytes()), prop::option::of(bytes())).prop_map(
            |(listener, payload, http2, tls)| {
                let tls = tls.map(|bytes| Secret(Zeroizing::new(bytes.to_vec())));
                SocketRecord { listener, payload, http2, tls }
            },
        )
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_went(
            version in FIRST_VERSION..=LAST_VERSION,
            message_type in 0..MessageType::ALL.len(),
            sockets in 0..=252_u16,
            generation: u64,
            rested_at: u64,
            text in ".{0,100}",
        ) {
            let origin = Origin { generation, rested_at };
            let header = Header { version, message_type: MessageType::ALL[message_type], sockets, origin, text };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn records_come_back_as_they_went(records in prop::collection::vec(record(), 0..20)) {
            let version = records.iter().map(SocketRecord::version).max().unwrap_or(FIRST_VERSION);
            for version in version..=LAST_VERSION {
                let mut bytes = Vec::new();
                for record in &records {
                    record.encode(version, &mut bytes).expect("short enough");
                }
                let mut bytes = &bytes[..];
                for record in &records {
                    prop_assert_eq!(SocketRecord::decode(version, &mut bytes), Ok(record.clone()));
                }
                prop_assert!(bytes.is_empty());
            }
        }

        #[test]
        fn a_kind_that_is_not_known_is_refused_and_no_other_with_it(
            records in prop::collection::vec((record(), any::<bool>()), 0..20),
        ) {
            let mut bytes = Vec::new();
            for (record, is_known) in &records {
                let at = bytes.len() + 4;
                record.encode(LAST_VERSION, &mut bytes).expect("short enough");
                if !is_known {
                    bytes[at] = 7;
                }
            }
            let mut bytes = &bytes[..];
            for (record, is_known) in records {
                let read = SocketRecord::decode(LAST_VERSION, &mut bytes);
                if is_known {
                    prop_assert_eq!(read, Ok(record));
                } else {
                    prop_assert!(matches!(read, Err(FrameError::UnsupportedProtocols(_))), "{:?}", read);
                }
            }
            prop_assert!(bytes.is_empty());
        }

        #[test]
        fn a_header_that_is_cut_or_of_another_version_is_refused(
            length in 0..HEADER_LENGTH, version in (LAST_VERSION + 1)..,
        ) {
            let mut bytes = header(1, "").encode();
            prop_assert!(Header::decode(&bytes[..length]).is_err());
            bytes[4..6].copy_from_slice(&version.to_le_bytes());
            prop_assert_eq!(Header::decode(&bytes), Err(FrameError::Version(version)));
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_frame_readers() {
        crate::fuzz::target!("handover_frames").for_each(|bytes| {
            let _ = Header::decode(bytes);
            // Also what begins well.
            let start = bytes.first().map_or(0, |first| usize::from(*first).min(HEADER_LENGTH));
            let _ = Header::decode(&[&header(1, "").encode()[..start], bytes].concat());
            for version in FIRST_VERSION..=LAST_VERSION {
                let mut bytes = bytes;
                while SocketRecord::decode(version, &mut bytes).is_ok() {}
            }
        });
    }

    #[test]
    fn more_sockets_than_a_message_can_carry_are_refused() {
        assert!(Header::decode(&header(253, "").encode()).is_err());
    }

    #[test]
    fn a_long_text_is_cut_and_not_refused() {
        let decoded = Header::decode(&header(0, &"ä".repeat(400)).encode()).expect("a header");
        assert_eq!(decoded.text, "ä".repeat(256));
    }
}
