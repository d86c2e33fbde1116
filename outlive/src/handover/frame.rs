//! The wire format of the handover channel. Each frame is one message of a `SOCK_SEQPACKET` socket: a [`Header`], and
//! descriptors with a [`SocketRecord`] each.
//!
//! ```text
//! message   4  "hand"                            the same in every version
//!           2  version                           the same in every version
//!           2  message type                      versions 1 and 2 from here on
//!           2  N, sockets in this frame
//!           8  generation of the sender
//!           8  when its last response was sent, nanoseconds of CLOCK_MONOTONIC
//!           .  text, UTF-8, up to 512 bytes
//! fds       1  a memfd with N records, if N > 0
//!           N  sockets: connections, or listeners
//! record    4  length of all that follows        version 2 only
//!           2  protocols                         version 2 only; the sum of 1: HTTP/2, 2: TLS, 4: upgraded or events,
//!                                                8: open HTTP/2 streams, 16: client certificate
//!           2  length of the listener's name
//!           4  length of the payload
//!           .  the listener's name
//!           .  payload: of a connection, the bytes read and not consumed; of a listener, its ownership; of a duplicate
//!              (`backup.rs`), its number
//!           .  HTTP/2 only: 4, a length; the state (`transport/http2_state.rs`)
//!           .  TLS only: 4, a length; keys and sequence numbers (`transport/tls_traffic.rs`)
//!           .  upgraded, or an event stream, only: 4, a length; the request (`transport/replay.rs`)
//!           .  open HTTP/2 streams only: 4, a length; their requests (`transport/stream_replay.rs`)
//!           .  client certificate only: 4, a length; the certificate (`transport/client_certificate.rs`)
//!           .  more fields                       version 2 only; releases that do not know a field ignore it:
//!              2, its number; 4, its length; its value
//!              1: the client that a proxy has reported (`transport/proxied_client.rs`)
//! ```
//! Numbers are little-endian. The records are in a memfd, because neither one message nor all messages that wait in the
//! channel may be larger than the socket's buffer.
//!
//! A frame is written in version 1 if that can express it, so that an earlier release can take over from this one. In
//! version 2, a record with unknown protocols has a length too, so only this connection is refused, and the others of
//! the frame are adopted.

use std::fmt;
use std::io;
use std::str::Utf8Error;

use bytes::{Buf, BufMut, Bytes};
use zeroize::Zeroizing;

use super::Origin;

/// The oldest version that is read and written. It can express HTTP/1.1 connections and listeners.
pub(super) const FIRST_VERSION: u16 = 1;
/// The newest version that is read and written. It can express HTTP/2 and TLS connections too.
pub(super) const LAST_VERSION: u16 = 2;
pub(super) const HEADER_LENGTH: usize = 26;
pub(super) const TEXT_LIMIT: usize = 512;
/// How many sockets one frame carries at most: the kernel permits 253 descriptors in a message (`SCM_MAX_FD`), and one
/// of them is the memfd.
pub const MAX_SOCKETS: usize = 252;

const MAGIC: &[u8; 4] = b"hand";

/// The type of a message. At a restart only `Connections`, `Tickets` and `Totals` occur, and after a crash `Backup`; the others are the steps of a
/// takeover (`takeover/mod.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum MessageType {
    /// From the predecessor: connections to adopt.
    Connections,
    /// From the successor, as its first message: its pid is the text.
    Hello,
    /// From the takeover command: the successor is a child of the service manager now.
    Go,
    /// From the predecessor: the listeners, and the directory of its credentials. The text is its `WATCHDOG_USEC`.
    Listeners,
    /// From the successor: it has started, and can serve after `Commit`. The text says whether it adopts HTTP/2 and
    /// TLS connections.
    Ready,
    /// From the predecessor: the successor has to accept connections from now on. The text says whether the predecessor
    /// hands open HTTP/2 streams over.
    Commit,
    /// From the successor: it accepts connections. The text says which connections it adopts besides those that the text
    /// of `Ready` says.
    Accepting,
    /// From the predecessor: the successor is the main process of the service.
    Main,
    /// From either: the takeover fails, for the reason in the text.
    Refused,
    /// From the predecessor, as its last message: the text has its counters (`metrics::take_totals`).
    Totals,
    /// From the predecessor: TLS session ticket keys (`transport/tickets.rs`), in the record of a descriptor that has
    /// no meaning.
    Tickets,
    /// Into systemd's store: duplicates of parked connections, for the process that starts after a crash (`backup.rs`).
    Backup,
    /// From an old process that lingers, or from a process that passes its channel on: the text is the number of
    /// responses that the old process still sends. The first such message has a descriptor, a channel to the old
    /// process (`takeover/old_processes.rs`). Earlier releases refuse the message, which closes the channel.
    Lingering,
    /// To an old process that lingers: it has to end within one drain limit.
    Stop,
}

impl MessageType {
    const ALL: [Self; 14] = [
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
        Self::Backup,
        Self::Lingering,
        Self::Stop,
    ];
}

/// The message itself; the sockets are in its ancillary data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u16,
    pub(super) message_type: MessageType,
    pub(super) sockets: u16,
    pub(super) origin: Origin,
    pub(super) text: String,
}

/// The description of one socket in a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketRecord {
    /// The name of the listener that accepted the connection, or of the listener that the socket is.
    pub listener: String,
    /// The bytes that were read from a connection and not consumed, or the ownership of a listener.
    pub payload: Bytes,
    /// The encoded HTTP/2 state of an HTTP/2 connection.
    pub http2: Option<Bytes>,
    /// The encoded keys of a TLS connection, or TLS session ticket keys.
    pub tls: Option<Secret>,
    /// The encoded request of an upgraded connection, and its state.
    pub replay: Option<Bytes>,
    /// The encoded requests of the open streams of an HTTP/2 connection.
    pub streams: Option<Bytes>,
    /// The encoded certificate of the client of a TLS connection. It is a protocol and not one of the fields that an
    /// earlier release ignores: that release would take the client for one without a certificate.
    pub client_certificate: Option<Bytes>,
    /// The encoded client of a proxied connection.
    pub client: Option<Bytes>,
}

/// Bytes that are wiped when they are dropped, and that `Debug` does not print.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Zeroizing<Vec<u8>>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Why a message is not a valid frame, or its records are not valid.
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
    /// The record has protocols of a later release. Its length is known, so the records after it can be decoded.
    UnsupportedProtocols(u16),
    /// The message has another number of file descriptors than its header requires.
    Descriptors {
        received: usize,
        expected: usize,
    },
    /// The memfd with the records could not be read.
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
    /// Truncates a text that is longer than [`TEXT_LIMIT`].
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LENGTH + self.text.len());
        bytes.put_slice(MAGIC);
        bytes.put_u16_le(self.version);
        bytes.put_u16_le(self.message_type as u16);
        bytes.put_u16_le(self.sockets);
        bytes.put_u64_le(self.origin.generation);
        bytes.put_u64_le(self.origin.last_response_at);
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
        let origin = Origin { generation: bytes.get_u64_le(), last_response_at: bytes.get_u64_le() };
        let text = std::str::from_utf8(bytes).map_err(FrameError::Text)?.to_owned();
        Ok(Self { version, message_type, sockets, origin, text })
    }
}

impl SocketRecord {
    /// A record of an HTTP/1.1 connection, or of a socket that is no connection.
    pub fn new(listener: String, payload: Bytes) -> Self {
        Self {
            listener,
            payload,
            http2: None,
            tls: None,
            replay: None,
            streams: None,
            client_certificate: None,
            client: None,
        }
    }

    /// The first version of a frame that can express this record.
    pub(super) fn version(&self) -> u16 {
        if self.protocols() == HTTP1 && self.client.is_none() { FIRST_VERSION } else { LAST_VERSION }
    }

    /// The sum of [`HTTP2`], [`TLS`], [`UPGRADED`], [`STREAMS`] and [`CERTIFICATE`], as they apply.
    fn protocols(&self) -> u16 {
        let parts = [
            (self.http2.is_some(), HTTP2),
            (self.tls.is_some(), TLS),
            (self.replay.is_some(), UPGRADED),
            (self.streams.is_some(), STREAMS),
            (self.client_certificate.is_some(), CERTIFICATE),
        ];
        parts.into_iter().filter(|part| part.0).map(|part| part.1).sum()
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let tls = self.tls.as_ref().map(|tls| &tls.0[..]);
        self.http2
            .as_deref()
            .into_iter()
            .chain(tls)
            .chain(self.replay.as_deref())
            .chain(self.streams.as_deref())
            .chain(self.client_certificate.as_deref())
    }

    /// The encoded length in version 2, in bytes. In version 1 a record is 6 bytes shorter.
    pub(super) fn length(&self) -> usize {
        let parts: usize = self.parts().map(|part| 4 + part.len()).sum();
        let client = self.client.as_ref().map_or(0, |client| FIELD_HEAD_LENGTH + client.len());
        6 + BODY_LENGTH + self.listener.len() + self.payload.len() + parts + client
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
        if let Some(client) = &self.client {
            into.put_u16_le(CLIENT);
            into.put_u32_le(client.len().try_into()?);
            into.put_slice(client);
        }
        Ok(())
    }

    /// Decodes the first record of `bytes`, and advances `bytes` to the next one. After
    /// [`FrameError::UnsupportedProtocols`] too, `bytes` is at the next record.
    pub(super) fn decode(version: u16, bytes: &mut &[u8]) -> Result<Self, FrameError> {
        if version == FIRST_VERSION {
            return Self::decode_body(bytes);
        }
        let length = bytes.try_get_u32_le().map_err(|_| FrameError::TruncatedRecord)?;
        let mut body = take(bytes, length)?;
        let protocols = body.try_get_u16_le().map_err(|_| FrameError::TruncatedRecord)?;
        if protocols & !(HTTP2 | TLS | UPGRADED | STREAMS | CERTIFICATE) != 0 {
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
        if protocols & UPGRADED != 0 {
            record.replay = Some(Bytes::copy_from_slice(part()?));
        }
        if protocols & STREAMS != 0 {
            record.streams = Some(Bytes::copy_from_slice(part()?));
        }
        if protocols & CERTIFICATE != 0 {
            record.client_certificate = Some(Bytes::copy_from_slice(part()?));
        }
        while !body.is_empty() {
            let number = body.try_get_u16_le().map_err(|_| FrameError::TruncatedRecord)?;
            let length = body.try_get_u32_le().map_err(|_| FrameError::TruncatedRecord)?;
            let value = take(&mut body, length)?;
            if number == CLIENT {
                record.client = Some(Bytes::copy_from_slice(value));
            }
        }
        Ok(record)
    }

    fn decode_body(bytes: &mut &[u8]) -> Result<Self, FrameError> {
        let name = bytes.try_get_u16_le().map_err(|_| FrameError::TruncatedRecord)?;
        let payload = bytes.try_get_u32_le().map_err(|_| FrameError::TruncatedRecord)?;
        let listener = std::str::from_utf8(take(bytes, name.into())?).map_err(FrameError::Text)?.into();
        let payload = Bytes::copy_from_slice(take(bytes, payload)?);
        Ok(Self::new(listener, payload))
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: u32) -> Result<&'a [u8], FrameError> {
    let (taken, rest) = bytes.split_at_checked(length as usize).ok_or(FrameError::TruncatedRecord)?;
    *bytes = rest;
    Ok(taken)
}

/// A connection with HTTP/1.1, or on which nothing has arrived.
const HTTP1: u16 = 0;
/// A connection with HTTP/2.
const HTTP2: u16 = 1;
/// A connection with TLS; the bit of HTTP/2 says which protocol is inside.
const TLS: u16 = 2;
/// An upgraded connection; the bit of TLS says whether it is encrypted.
const UPGRADED: u16 = 4;
/// An HTTP/2 connection with open streams.
const STREAMS: u16 = 8;
/// A TLS connection whose client has presented a certificate.
const CERTIFICATE: u16 = 16;
/// The number of the field with the client of a proxied connection.
const CLIENT: u16 = 1;
/// The number and the length of a field, in bytes.
const FIELD_HEAD_LENGTH: usize = 6;
/// The two lengths at the beginning of the body, in bytes.
const BODY_LENGTH: usize = 6;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(sockets: u16, text: &str) -> Header {
        let origin = Origin { generation: 3, last_response_at: 5 };
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
        let part = || prop::option::of(bytes());
        (".{0,40}", bytes(), part(), part(), part(), part(), part(), part()).prop_map(
            |(listener, payload, http2, tls, replay, streams, client_certificate, client)| {
                let tls = tls.map(|bytes| Secret(Zeroizing::new(bytes.to_vec())));
                SocketRecord { listener, payload, http2, tls, replay, streams, client_certificate, client }
            },
        )
    }

    proptest! {
        #[test]
        fn decode_reverses_encode_of_headers(
            version in FIRST_VERSION..=LAST_VERSION,
            message_type in 0..MessageType::ALL.len(),
            sockets in 0..=252_u16,
            generation: u64,
            last_response_at: u64,
            text in ".{0,100}",
        ) {
            let origin = Origin { generation, last_response_at };
            let header = Header { version, message_type: MessageType::ALL[message_type], sockets, origin, text };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn decode_reverses_encode_of_records(records in prop::collection::vec(record(), 0..20)) {
            let version = records.iter().map(SocketRecord::version).max().unwrap_or(FIRST_VERSION);
            for version in version..=LAST_VERSION {
                let mut bytes = Vec::new();
                for record in &records {
                    record.encode(version, &mut bytes).expect("a length above the limit");
                }
                let mut bytes = &bytes[..];
                for record in &records {
                    prop_assert_eq!(SocketRecord::decode(version, &mut bytes), Ok(record.clone()));
                }
                prop_assert!(bytes.is_empty());
            }
        }

        #[test]
        fn only_records_with_unknown_protocols_are_refused(
            records in prop::collection::vec((record(), any::<bool>()), 0..20),
        ) {
            let mut bytes = Vec::new();
            for (record, is_known) in &records {
                let at = bytes.len() + 4;
                record.encode(LAST_VERSION, &mut bytes).expect("a length above the limit");
                if !is_known {
                    bytes[at] = 63;
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
        fn truncated_headers_and_unknown_versions_are_refused(
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
            // The same bytes after a valid beginning, because random bytes seldom have one.
            let start = bytes.first().map_or(0, |first| usize::from(*first).min(HEADER_LENGTH));
            let _ = Header::decode(&[&header(1, "").encode()[..start], bytes].concat());
            for version in FIRST_VERSION..=LAST_VERSION {
                let mut bytes = bytes;
                while SocketRecord::decode(version, &mut bytes).is_ok() {}
            }
        });
    }

    proptest! {
        #[test]
        fn fields_of_later_releases_are_ignored(record in record(), number in 2_u16.., value: Vec<u8>) {
            let mut bytes = Vec::new();
            record.encode(LAST_VERSION, &mut bytes).expect("a length above the limit");
            bytes.extend(u16::to_le_bytes(number));
            bytes.extend(u32::try_from(value.len()).expect("the value is short").to_le_bytes());
            bytes.extend(value);
            let length = u32::try_from(bytes.len() - 4).expect("the record is short");
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            prop_assert_eq!(SocketRecord::decode(LAST_VERSION, &mut &bytes[..]), Ok(record));
        }
    }

    #[test]
    fn a_header_with_more_sockets_than_a_message_can_carry_is_refused() {
        assert!(Header::decode(&header(253, "").encode()).is_err());
    }

    #[test]
    fn a_text_above_the_limit_is_truncated_between_characters() {
        let decoded =
            Header::decode(&header(0, &"ä".repeat(400)).encode()).expect("could not decode the header");
        assert_eq!(decoded.text, "ä".repeat(256));
    }
}
