//! The records of a TLS 1.3 connection that has moved: sealed and opened with `ring`, as RFC 8446 section 5 says. Those
//! of a connection that was made here are rustls' affair.
//!
//! | RFC 8446 | here |
//! | --- | --- |
//! | 5.1: a handshake message may be cut into several records, with no others between them | `take_message` |
//! | 5.2: a record's fragment is no longer than 2^14 bytes, its padding included | `FRAGMENT_LIMIT`; longer ones are `record_overflow` |
//! | 5.2: `opaque_type` is 23, `legacy_record_version` 0x0303 and ignored, the header is the additional data | `DirectionState::open`, `DirectionState::seal` |
//! | 5.3: the nonce is the sequence number, big-endian, XOR the IV; it counts from 0 and does not wrap | `DirectionState::nonce` |
//! | 5.4: zeros behind the content type are padding; a record of nothing else is refused | `DirectionState::open` |
//! | 5.5: no key seals more records than is safe (2^24.5 with AES-GCM) | `SEALED_RECORDS_LIMIT`: a KeyUpdate of ours comes first |
//! | 6.1: `close_notify` ends what comes from a peer; ours is the last that we send | `poll_read`, `poll_shutdown` |
//! | 6.2: any other alert is fatal, and so is a record that does not open; we say why once | `RecordLayer::fail` |
//! | 4.6.3: a KeyUpdate changes the keys of one direction, and may ask for the other's | `take_message`, `update_keys` |
//! | 4.6: of other messages after the handshake a server expects none | `unexpected_message` |
//!
//! What the RFC leaves open is as in rustls, so that a client cannot tell which of the two it speaks to: how many records
//! without content, alerts without effect and KeyUpdates are taken, and which alert answers what. The tests send the same
//! bytes to both. What still differs stands in SECURITY.md.
//!
//! Where the secrets of a connection are not known, because a release that did not keep them handed it over, a KeyUpdate
//! cannot be followed: it counts as `close_notify`, and the connection is worn.
//!
//! No early data: rustls was not told to take any.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ring::aead::{self, AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::transport::stream::Stream;
use crate::transport::tls_traffic::{
    Direction, IV_LENGTH, MESSAGE_HEADER_LENGTH, PeerState, Suite, TlsTrafficState,
};

/// The most that a record carries, in bytes.
const FRAGMENT_LIMIT: usize = 1 << 14;
/// A record that is as long or longer, sealed, is refused before it has come: as rustls does it, which leaves room for
/// the seals of every version of TLS.
const SEALED_LIMIT: usize = FRAGMENT_LIMIT + 2048;
/// Of the authentication of each suite, in bytes.
const TAG_LENGTH: usize = 16;
pub(in crate::connection) const HEADER_LENGTH: usize = 5;
/// No handshake message is longer, in bytes, as in rustls.
const MESSAGE_LIMIT: usize = 0xffff;
/// So many records without content in a row are taken, as in rustls and BoringSSL: they cost us more than their peer.
const EMPTY_RECORDS_LIMIT: u8 = 32;
/// So many alerts that change nothing are taken from a connection, as in rustls and BoringSSL.
const WARNINGS_LIMIT: u8 = 4;
/// So many KeyUpdates are followed without application data between them, as in rustls and BoringSSL: each costs us a
/// key schedule.
const KEY_UPDATES_LIMIT: u8 = 32;
/// After so many records a connection whose key we cannot update is told to end; half of what is safe, so that there is
/// room for its last answer.
const KEY_LIMIT_SOFT: u64 = 1 << 23;
/// No more are sealed with one key, of which the last is a KeyUpdate.
const SEALED_RECORDS_LIMIT: u64 = 1 << 24;
/// What is sealed and not sent, in bytes; until it is out no more is sealed.
const UNSENT_LIMIT: usize = 64 * 1024;
/// How much is read at once, in bytes.
const READ_LENGTH: usize = 16 * 1024;

/// Content types (section 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const HEARTBEAT: u8 = 24;

/// The type of a handshake message (section 4), and what it asks for (section 4.6.3).
const KEY_UPDATE: u8 = 24;
const UPDATE_NOT_REQUESTED: u8 = 0;
const UPDATE_REQUESTED: u8 = 1;

/// How grave an alert is (section 6).
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// Alerts (section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Alert {
    CloseNotify = 0,
    UnexpectedMessage = 10,
    BadRecordMac = 20,
    RecordOverflow = 22,
    IllegalParameter = 47,
    DecodeError = 50,
}

/// `user_canceled`, which says nothing.
const USER_CANCELED: u8 = 90;

/// Why no more is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The peer gets this alert.
    Alert(Alert, &'static str),
    /// The peer gets `close_notify` with the end of the connection and no other alert, as from rustls.
    NoAlert(&'static str),
    /// It has sent this alert, and expects nothing more.
    PeerFailed(u8),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alert(alert, reason) => write!(f, "TLS: {reason}; sent the alert {alert:?}"),
            Self::NoAlert(reason) => write!(f, "TLS: {reason}"),
            Self::PeerFailed(alert) => write!(f, "TLS: received the fatal alert {alert}"),
        }
    }
}

/// What the beginning of a record's header was, which rustls refuses with `decode_error`.
#[derive(Debug)]
pub(in crate::connection) struct NoHeader;

/// How much follows the header of a record that begins with `bytes`. None where more of the header has to come. A header
/// is refused as soon as in rustls: type and version are looked at before the rest has come.
pub(in crate::connection) fn sealed_length(bytes: &[u8]) -> Result<Option<usize>, NoHeader> {
    let is_kind = |kind: u8| (CHANGE_CIPHER_SPEC..=HEARTBEAT).contains(&kind);
    // Every version of TLS begins with 3; the others are SSL 2 and DTLS, of which rustls knows the numbers.
    let is_version = |version: [u8; 2]| matches!(version, [3, _] | [2, 0] | [0xfe, 0xfc | 0xfd | 0xff]);
    match *bytes {
        [kind, ..] if !is_kind(kind) => Err(NoHeader),
        [_, major, minor, ..] if !is_version([major, minor]) => Err(NoHeader),
        [kind, _, _, high, low, ..] => {
            let length = usize::from(u16::from_be_bytes([high, low]));
            let is_empty = length == 0 && kind != APPLICATION_DATA;
            if is_empty || length >= SEALED_LIMIT { Err(NoHeader) } else { Ok(Some(length)) }
        }
        _ => Ok(None),
    }
}

/// One direction, ready for use.
struct DirectionState {
    direction: Direction,
    key: LessSafeKey,
}

impl DirectionState {
    fn new(suite: Suite, direction: Direction) -> Self {
        let algorithm: &aead::Algorithm = match suite {
            Suite::Aes128Gcm => &AES_128_GCM,
            Suite::Aes256Gcm => &AES_256_GCM,
            Suite::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, &direction.key).expect("a key of the suite's length");
        Self { direction, key: LessSafeKey::new(key) }
    }

    /// Goes on with the keys of the next generation; false where the secret is not known.
    fn update_keys(&mut self, suite: Suite) -> bool {
        let Some(secret) = &self.direction.secret else { return false };
        let next = secret.next(suite);
        let (key, iv) = next.keys(suite);
        *self = Self::new(suite, Direction { key, iv, sequence: 0, secret: Some(next) });
        true
    }

    fn nonce(&self) -> Nonce {
        let mut nonce = *self.direction.iv;
        let sequence = self.direction.sequence.to_be_bytes();
        for (byte, with) in nonce[IV_LENGTH - sequence.len()..].iter_mut().zip(sequence) {
            *byte ^= with;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Opens a record; leaves its content and gives its type.
    fn open(&mut self, sealed: &mut BytesMut) -> Result<u8, Refusal> {
        let length = u16::try_from(sealed.len()).expect("the header has no more").to_be_bytes();
        // Of the header itself only the length counts, as in rustls.
        let header = [APPLICATION_DATA, 3, 3, length[0], length[1]];
        let unsealed = self.key.open_in_place(self.nonce(), Aad::from(header), sealed);
        let wrong =
            Refusal::Alert(Alert::BadRecordMac, "could not decrypt a record with the connection's key");
        let length = unsealed.map_err(|_| wrong)?.len();
        // No peer sends as many.
        self.direction.sequence = self.direction.sequence.checked_add(1).ok_or(wrong)?;
        if length > FRAGMENT_LIMIT + 1 {
            return Err(Refusal::Alert(Alert::RecordOverflow, "a record with its padding is too long"));
        }
        sealed.truncate(length);
        let end = sealed.iter().rposition(|byte| *byte != 0);
        let end = end.ok_or(Refusal::NoAlert("a record contains only padding"))?;
        let kind = sealed[end];
        sealed.truncate(end);
        Ok(kind)
    }

    /// Seals a record of `content` onto `into`.
    fn seal(&mut self, kind: u8, content: &[u8], into: &mut BytesMut) -> io::Result<()> {
        if self.direction.sequence >= SEALED_RECORDS_LIMIT {
            return Err(io::Error::other("the connection's key has encrypted the maximum number of records"));
        }
        let length = content.len() + 1 + TAG_LENGTH;
        let mut header = [APPLICATION_DATA, 3, 3, 0, 0];
        header[3..].copy_from_slice(&u16::try_from(length).map_err(io::Error::other)?.to_be_bytes());
        into.put_slice(&header);
        let at = into.len();
        into.put_slice(content);
        into.put_u8(kind);
        let sealed = self.key.seal_in_place_separate_tag(self.nonce(), Aad::from(header), &mut into[at..]);
        let tag = sealed.map_err(|_| io::Error::other("could not encrypt a record"))?;
        into.put_slice(tag.as_ref());
        self.direction.sequence += 1;
        Ok(())
    }
}

/// What may still come from the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Incoming {
    Open,
    /// It has said `close_notify`.
    Ended,
    /// What it says is sealed with a key that we do not know.
    Deaf,
    /// It has closed the connection without `close_notify`.
    CutOff,
    /// It was refused, or it has failed.
    Failed(Refusal),
}

/// What may still go to the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outgoing {
    Open,
    /// We have said `close_notify`, or which rule the peer broke.
    Ended,
}

pub(in crate::connection) struct RecordLayer {
    stream: Stream,
    suite: Suite,
    from_peer: DirectionState,
    to_peer: DirectionState,
    /// What was read, and is still sealed.
    sealed: BytesMut,
    /// What was opened, and is not read.
    opened: BytesMut,
    /// What is sealed, and not sent.
    unsent: BytesMut,
    incoming: Incoming,
    outgoing: Outgoing,
    peer: PeerState,
}

impl RecordLayer {
    pub(in crate::connection) fn new(stream: Stream, session: TlsTrafficState) -> Self {
        let TlsTrafficState { suite, from_peer, to_peer, unread, peer } = session;
        Self {
            stream,
            suite,
            from_peer: DirectionState::new(suite, from_peer),
            to_peer: DirectionState::new(suite, to_peer),
            sealed: unread.into(),
            opened: BytesMut::new(),
            unsent: BytesMut::new(),
            incoming: Incoming::Open,
            outgoing: Outgoing::Open,
            peer,
        }
    }

    /// Whether the connection should end soon: the peer has a key that we do not know, or ours is not to be used much
    /// longer and we cannot update it.
    pub(in crate::connection) fn is_near_key_limit(&self) -> bool {
        let Direction { sequence, secret, .. } = &self.to_peer.direction;
        self.is_read_closed() || secret.is_none() && *sequence >= KEY_LIMIT_SOFT
    }

    /// Whether the peer says more than we can hear.
    pub(in crate::connection) fn is_read_closed(&self) -> bool {
        self.incoming == Incoming::Deaf
    }

    /// Whether nothing was said that keeps it here.
    pub(in crate::connection) fn is_movable(&self) -> bool {
        let is_open = self.incoming == Incoming::Open && self.outgoing == Outgoing::Open;
        is_open && !self.is_near_key_limit() && self.unsent.is_empty()
    }

    /// What it takes to go on elsewhere, and what was opened and not read.
    pub(in crate::connection) fn into_parts(self) -> (Stream, TlsTrafficState, Bytes) {
        let Self { stream, suite, sealed, opened, peer, .. } = self;
        let (from_peer, to_peer) = (self.from_peer.direction, self.to_peer.direction);
        (
            stream,
            TlsTrafficState { suite, from_peer, to_peer, unread: sealed.freeze(), peer },
            opened.freeze(),
        )
    }

    /// Opens what there is of whole records, until there is something to read or no more will come; false where more
    /// has to come.
    fn open(&mut self) -> Result<bool, Refusal> {
        while self.opened.is_empty() && self.incoming == Incoming::Open {
            let length = sealed_length(&self.sealed)
                .map_err(|NoHeader| Refusal::Alert(Alert::DecodeError, "invalid record header"))?;
            let Some(length) = length.filter(|length| self.sealed.len() >= HEADER_LENGTH + length) else {
                return Ok(false);
            };
            let outer_kind = self.sealed[0];
            self.sealed.advance(HEADER_LENGTH);
            let mut record = self.sealed.split_to(length);
            let has_part = !self.peer.message.is_empty();
            if outer_kind == CHANGE_CIPHER_SPEC && !has_part {
                // It is the only one that comes unsealed, and it belongs into a handshake (section 5).
                let alert = if record[..] == [1] { Alert::UnexpectedMessage } else { Alert::DecodeError };
                return Err(Refusal::Alert(alert, "received change_cipher_spec after the handshake"));
            }
            let kind = self.from_peer.open(&mut record)?;
            if kind == CHANGE_CIPHER_SPEC {
                return Err(Refusal::Alert(
                    Alert::UnexpectedMessage,
                    "received an encrypted change_cipher_spec",
                ));
            }
            if kind != HANDSHAKE && has_part {
                return Err(Refusal::NoAlert("received another record in the middle of a handshake message"));
            }
            if record.is_empty() {
                count(&mut self.peer.empty_records, EMPTY_RECORDS_LIMIT, "received too many empty records")?;
            } else {
                self.peer.empty_records = 0;
            }
            match kind {
                APPLICATION_DATA => {
                    self.peer.key_updates = 0;
                    self.opened = record;
                }
                ALERT => self.take_alert(&record)?,
                HANDSHAKE => self.take_message(&record)?,
                _ => return Err(Refusal::Alert(Alert::DecodeError, "unknown record type")),
            }
        }
        Ok(true)
    }

    fn take_alert(&mut self, alert: &[u8]) -> Result<(), Refusal> {
        let [level, description] = *alert else {
            return Err(Refusal::Alert(Alert::DecodeError, "invalid alert length: expected two bytes"));
        };
        match level {
            WARNING | FATAL if description == Alert::CloseNotify as u8 => self.incoming = Incoming::Ended,
            FATAL => return Err(Refusal::PeerFailed(description)),
            WARNING => {
                count(&mut self.peer.warnings, WARNINGS_LIMIT, "received too many warning alerts")?;
                if description != USER_CANCELED {
                    return Err(Refusal::Alert(
                        Alert::DecodeError,
                        "received a warning alert that must be fatal",
                    ));
                }
            }
            _ => return Err(Refusal::Alert(Alert::IllegalParameter, "unknown alert level")),
        }
        Ok(())
    }

    /// Takes a handshake message, or a part of one: a KeyUpdate, since a server expects no other after the handshake.
    fn take_message(&mut self, part: &[u8]) -> Result<(), Refusal> {
        let mut message = std::mem::take(&mut self.peer.message);
        message.extend_from_slice(part);
        let Some((header, body)) = message.split_first_chunk::<MESSAGE_HEADER_LENGTH>() else {
            self.peer.message = message;
            return Ok(());
        };
        let [kind, length @ ..] = *header;
        let length = length.into_iter().fold(0, |length, byte| length << 8 | usize::from(byte));
        if length > MESSAGE_LIMIT {
            return Err(Refusal::NoAlert("a handshake message is too long"));
        }
        // rustls waits until the message is whole. It has no use for it either.
        if kind != KEY_UPDATE {
            return Err(Refusal::Alert(
                Alert::UnexpectedMessage,
                "received a handshake message after the handshake",
            ));
        }
        if length != 1 {
            return Err(Refusal::Alert(Alert::DecodeError, "invalid KeyUpdate length"));
        }
        let Some((request, behind)) = body.split_first() else {
            self.peer.message = message;
            return Ok(());
        };
        if !behind.is_empty() {
            // The rest of the record should have had the new key.
            return Err(Refusal::Alert(
                Alert::UnexpectedMessage,
                "received data behind a KeyUpdate in the same record",
            ));
        }
        count(&mut self.peer.key_updates, KEY_UPDATES_LIMIT, "received too many KeyUpdate messages")?;
        match *request {
            UPDATE_NOT_REQUESTED => {}
            // One answer is enough, however often it is asked for, so a peer that never reads gets no more.
            UPDATE_REQUESTED => self.peer.wants_key_update = true,
            _ => {
                return Err(Refusal::Alert(
                    Alert::IllegalParameter,
                    "unknown request_update value in a KeyUpdate",
                ));
            }
        }
        if !self.from_peer.update_keys(self.suite) {
            self.incoming = Incoming::Deaf;
        }
        Ok(())
    }

    /// Updates our keys where the peer has asked for it, or the key has sealed as much as is safe.
    fn update_keys(&mut self) -> io::Result<()> {
        let direction = &self.to_peer.direction;
        let request = if self.peer.wants_key_update {
            UPDATE_NOT_REQUESTED
        } else if direction.sequence + 1 >= SEALED_RECORDS_LIMIT {
            UPDATE_REQUESTED
        } else {
            return Ok(());
        };
        if direction.secret.is_none() {
            return Ok(());
        }
        self.peer.wants_key_update = false;
        self.to_peer.seal(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, request], &mut self.unsent)?;
        self.to_peer.update_keys(self.suite);
        Ok(())
    }

    /// Seals a record, with a KeyUpdate before it where one is due.
    fn seal(&mut self, kind: u8, content: &[u8]) -> io::Result<()> {
        self.update_keys()?;
        self.to_peer.seal(kind, content, &mut self.unsent)
    }

    /// Says why, once; whether it arrives is no longer our affair.
    fn fail(&mut self, cx: &mut Context<'_>, refusal: Refusal) {
        self.incoming = Incoming::Failed(refusal);
        if let Refusal::Alert(alert, _) = refusal
            && self.outgoing == Outgoing::Open
        {
            self.outgoing = Outgoing::Ended;
            if self.seal(ALERT, &[FATAL, alert as u8]).is_ok() {
                let _ = self.poll_send(cx);
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unsent))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.advance(written);
        }
        if self.unsent.capacity() > 0 {
            self.unsent = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for RecordLayer {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let is_news = this.open().unwrap_or_else(|refusal| {
                this.fail(cx, refusal);
                true
            });
            match this.incoming {
                Incoming::Open | Incoming::Ended | Incoming::Deaf => {}
                Incoming::CutOff => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Incoming::Failed(refusal) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, refusal.to_string())));
                }
            }
            if is_news {
                let length = this.opened.len().min(into.remaining());
                into.put_slice(&this.opened.split_to(length));
                if this.opened.is_empty() {
                    this.opened = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            if this.sealed.is_empty() {
                this.sealed = BytesMut::new();
            }
            let mut buffer = [const { std::mem::MaybeUninit::uninit() }; READ_LENGTH];
            let mut read = ReadBuf::uninit(&mut buffer);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // What came may not be all.
                this.incoming = Incoming::CutOff;
                continue;
            }
            this.sealed.extend_from_slice(read.filled());
        }
    }
}

impl AsyncWrite for RecordLayer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.outgoing == Outgoing::Ended || matches!(this.incoming, Incoming::Failed(_)) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.unsent.len() >= UNSENT_LIMIT {
            ready!(this.poll_send(cx))?;
        }
        let content = &bytes[..bytes.len().min(FRAGMENT_LIMIT)];
        if !content.is_empty() {
            this.seal(APPLICATION_DATA, content)?;
            let _ = this.poll_send(cx)?;
        }
        Poll::Ready(Ok(content.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.outgoing == Outgoing::Open {
            this.outgoing = Outgoing::Ended;
            this.seal(ALERT, &[WARNING, Alert::CloseNotify as u8])?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.stream).poll_shutdown(cx)
    }
}

/// Counts what is allowed up to `limit`.
fn count(counted: &mut u8, limit: u8, reason: &'static str) -> Result<(), Refusal> {
    if *counted >= limit {
        return Err(Refusal::NoAlert(reason));
    }
    *counted += 1;
    Ok(())
}

#[cfg(test)]
mod rustls_tests;
#[cfg(test)]
mod tests;
