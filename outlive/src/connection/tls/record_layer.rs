//! The record layer of a TLS connection that has left rustls, because it was parked or handed over.
//!
//! [`RecordLayer`] encrypts and decrypts records with `ring` (`record_layer/protection.rs`), as in RFC 8446 section 5
//! for TLS 1.3, and RFC 5246 section 6 for TLS 1.2. rustls cannot be given traffic secrets, so it cannot continue such
//! a connection; it serves each connection until it leaves.
//!
//! | RFC 8446 | here |
//! | --- | --- |
//! | 5.1: a handshake message may be split over several records, with no others between them | `handle_handshake_message` |
//! | 5.2: a fragment has at most 2^14 bytes with its padding | `FRAGMENT_LIMIT`; longer ones are `record_overflow` |
//! | 5.2: `opaque_type` is 23, `legacy_record_version` 0x0303, authenticated header | `RecordProtection::open`, `seal` |
//! | 5.3: the nonce is the sequence number, from 0 without wrapping, XOR the IV | `RecordProtection::nonce` |
//! | 5.4: zeros after the content type are padding; a record of only padding is refused | `remove_padding` |
//! | 5.5: a key encrypts a limited number of records (2^24.5 with AES-GCM) | `RecordProtection::record_limit`, then a KeyUpdate |
//! | 6.1: `close_notify` ends a direction; nothing is sent after it | `poll_read`, `poll_shutdown` |
//! | 6.2: other alerts and records that cannot be decrypted are fatal; one alert is sent | `RecordLayer::fail` |
//! | 4.6.3: a KeyUpdate changes the key of one direction and may request the other's | `handle_handshake_message`, `update_keys` |
//! | 4.6: a server expects no other messages after the handshake | `unexpected_message` |
//!
//! With TLS 1.2 these parts differ:
//!
//! | RFC | here |
//! | --- | --- |
//! | 5246, 6.2.3.3; 5288, 3; 7905, 2: the format of records | `protection.rs` |
//! | 5246, 7.2.2 and 7.4.1.2: a renegotiation may be refused with the warning `no_renegotiation` | `refuse_renegotiation` |
//! | 5246, 7.2: a peer may send other warnings | `handle_alert` |
//! | there is no KeyUpdate | the connection closes with a response before the limit of its key |
//!
//! Where the RFC leaves a choice, the behaviour is that of rustls, so that a client cannot tell the two apart: how many
//! empty records, alerts without effect and KeyUpdates are accepted, and which alert answers which fault. The tests
//! send the same bytes to both. SECURITY.md lists the remaining differences.
//!
//! If the traffic secrets of a TLS 1.3 connection are not known (see `Direction::secret`), a KeyUpdate of the peer cannot be
//! followed: it ends the input like `close_notify`, and the connection closes after the response in flight.
//!
//! There is no early data, because rustls is not configured to accept any.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use protection::RecordProtection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::transport::client_certificate::ClientCertificate;
use crate::transport::stream::Stream;
use crate::transport::tls_traffic::{MESSAGE_HEADER_LENGTH, PeerState, Suite, TlsTrafficState, Version};

/// The largest fragment of a record, in bytes.
pub(in crate::connection) const FRAGMENT_LIMIT: usize = 1 << 14;
/// A record whose header names this length or more, in bytes, is refused before its content arrives, as in rustls. The
/// limit has room for the overhead of every TLS version.
const SEALED_LIMIT: usize = FRAGMENT_LIMIT + 2048;
/// The authentication tag of each suite, in bytes.
const TAG_LENGTH: usize = 16;
/// The header of a record, in bytes.
pub(in crate::connection) const HEADER_LENGTH: usize = 5;
/// How many empty records in a row are accepted, as in rustls and BoringSSL. They cost the server more than the peer.
const EMPTY_RECORDS_LIMIT: u8 = 32;
/// How many alerts without effect are accepted on a connection, as in rustls and BoringSSL.
const WARNINGS_LIMIT: u8 = 4;
/// How many KeyUpdates are accepted without application data between them, as in rustls and BoringSSL, because each
/// costs a key schedule.
const KEY_UPDATES_LIMIT: u8 = 32;
/// How many renegotiations are refused with a warning on a connection, as in rustls. The next one ends the connection.
const RENEGOTIATIONS_LIMIT: u8 = 1;
/// While so many encrypted bytes are unsent, no further data is encrypted.
const UNSENT_LIMIT: usize = 64 * 1024;
/// How much is read at once, in bytes.
const READ_LENGTH: usize = 16 * 1024;

/// Content types (section 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const HEARTBEAT: u8 = 24;

/// The type of the handshake message that begins a renegotiation of TLS 1.2 (RFC 5246 section 7.4.1.2).
const CLIENT_HELLO: u8 = 1;
/// The type of a handshake message (section 4), and its `request_update` values (section 4.6.3).
const KEY_UPDATE: u8 = 24;
const UPDATE_NOT_REQUESTED: u8 = 0;
const UPDATE_REQUESTED: u8 = 1;

/// Alert levels (section 6).
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// Descriptions of alerts (section 6).
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

/// The alert `user_canceled`, which has no effect.
const USER_CANCELED: u8 = 90;
/// The warning with which a renegotiation of TLS 1.2 is refused (RFC 5246 section 7.2.2).
const NO_RENEGOTIATION: u8 = 100;

/// Why reading failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The peer receives this alert.
    Alert(Alert, &'static str),
    /// The peer receives only `close_notify` when the connection closes, as from rustls.
    NoAlert(&'static str),
    /// The peer has sent this fatal alert, so it expects no answer.
    PeerFailed(u8),
}

const UNEXPECTED_MESSAGE: Refusal =
    Refusal::Alert(Alert::UnexpectedMessage, "received a handshake message after the handshake");

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alert(alert, reason) => write!(f, "TLS: {reason}; sent the alert {alert:?}"),
            Self::NoAlert(reason) => write!(f, "TLS: {reason}"),
            Self::PeerFailed(alert) => write!(f, "TLS: received the fatal alert {alert}"),
        }
    }
}

/// The bytes are not the beginning of a record header. rustls refuses them with `decode_error`.
#[derive(Debug)]
pub(in crate::connection) struct NoHeader;

/// The length of the record that begins with `bytes`, without its header. None if the header is incomplete. As in
/// rustls, a wrong type or version is refused before the header is complete.
pub(in crate::connection) fn sealed_length(bytes: &[u8]) -> Result<Option<usize>, NoHeader> {
    let is_kind = |kind: u8| (CHANGE_CIPHER_SPEC..=HEARTBEAT).contains(&kind);
    // The major version of TLS is 3. The others are SSL 2 and DTLS, which rustls accepts in a header.
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

/// Whether `bytes` begin with a whole record, or with what no record begins with: the record layer can process them although
/// no further bytes arrive.
pub(in crate::connection) fn begins_with_record(bytes: &[u8]) -> bool {
    match sealed_length(bytes) {
        Ok(Some(length)) => bytes.len() >= HEADER_LENGTH + length,
        Ok(None) => false,
        Err(NoHeader) => true,
    }
}

/// The state of the direction from the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Incoming {
    Open,
    /// The peer has sent `close_notify`.
    Ended,
    /// The peer has changed to a key that is not known here, so no further record can be decrypted.
    Deaf,
    /// The peer has closed the connection without `close_notify`.
    CutOff,
    /// The peer broke the protocol, or sent a fatal alert.
    Failed(Refusal),
}

/// The state of the direction to the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outgoing {
    Open,
    /// `close_notify` or a fatal alert was sent.
    Ended,
}

/// TLS on a socket, after the handshake.
pub(in crate::connection) struct RecordLayer {
    stream: Stream,
    suite: Suite,
    from_peer: RecordProtection,
    to_peer: RecordProtection,
    /// Bytes that were read and not decrypted.
    sealed: BytesMut,
    /// Data that was decrypted and not delivered.
    opened: BytesMut,
    /// Records that were encrypted and not sent.
    unsent: BytesMut,
    incoming: Incoming,
    outgoing: Outgoing,
    peer: PeerState,
    client: Option<ClientCertificate>,
}

impl RecordLayer {
    pub(in crate::connection) fn new(stream: Stream, session: TlsTrafficState) -> Self {
        let TlsTrafficState { suite, from_peer, to_peer, unread, peer, client } = session;
        Self {
            stream,
            suite,
            from_peer: RecordProtection::new(suite, from_peer),
            to_peer: RecordProtection::new(suite, to_peer),
            sealed: unread.into(),
            opened: BytesMut::new(),
            unsent: BytesMut::new(),
            incoming: Incoming::Open,
            outgoing: Outgoing::Open,
            peer,
            client,
        }
    }

    pub(in crate::connection) fn client(&self) -> Option<&ClientCertificate> {
        self.client.as_ref()
    }

    /// Whether the connection should close soon: the peer uses a key that is not known here, or the key to the peer is
    /// near its limit and cannot be updated.
    pub(in crate::connection) fn is_near_key_limit(&self) -> bool {
        self.is_read_closed() || self.to_peer.is_near_limit()
    }

    /// Whether the peer uses a key that is not known here.
    pub(in crate::connection) fn is_read_closed(&self) -> bool {
        self.incoming == Incoming::Deaf
    }

    /// Whether another process can continue the connection: it is open in both directions, and everything is sent.
    pub(in crate::connection) fn is_movable(&self) -> bool {
        let is_open = self.incoming == Incoming::Open && self.outgoing == Outgoing::Open;
        is_open && !self.is_near_key_limit() && self.unsent.is_empty()
    }

    /// Takes the connection apart: its socket, the state that another process needs, and the data that was decrypted
    /// and not delivered.
    pub(in crate::connection) fn into_parts(self) -> (Stream, TlsTrafficState, Bytes) {
        let Self { stream, suite, sealed, opened, peer, client, .. } = self;
        let (from_peer, to_peer) = (self.from_peer.direction, self.to_peer.direction);
        (
            stream,
            TlsTrafficState { suite, from_peer, to_peer, unread: sealed.freeze(), peer, client },
            opened.freeze(),
        )
    }

    /// Decrypts whole records until there is data to deliver or the input has ended. False if more bytes must be read
    /// from the socket first.
    fn open(&mut self) -> Result<bool, Refusal> {
        while self.opened.is_empty() && self.incoming == Incoming::Open {
            let length = sealed_length(&self.sealed)
                .map_err(|NoHeader| Refusal::Alert(Alert::DecodeError, "invalid record header"))?;
            let Some(length) = length.filter(|length| self.sealed.len() >= HEADER_LENGTH + length) else {
                return Ok(false);
            };
            let mut header = [0; HEADER_LENGTH];
            self.sealed.copy_to_slice(&mut header);
            let mut record = self.sealed.split_to(length);
            let has_part = !self.peer.message.is_empty() || self.peer.awaited > 0;
            if header[0] == CHANGE_CIPHER_SPEC && !has_part {
                // TLS 1.3 does not encrypt such a record, and both versions permit it only in a handshake.
                let alert = if record[..] == [1] { Alert::UnexpectedMessage } else { Alert::DecodeError };
                return Err(Refusal::Alert(alert, "received change_cipher_spec after the handshake"));
            }
            let kind = self.from_peer.open(header, &mut record)?;
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
                ALERT => self.handle_alert(&record)?,
                HANDSHAKE => match self.suite.version {
                    Version::Tls13 => self.handle_handshake_message(&record)?,
                    Version::Tls12 => self.refuse_renegotiation(&record)?,
                },
                _ => return Err(Refusal::Alert(Alert::DecodeError, "unknown record type")),
            }
        }
        Ok(true)
    }

    fn handle_alert(&mut self, alert: &[u8]) -> Result<(), Refusal> {
        let [level, description] = *alert else {
            return Err(Refusal::Alert(Alert::DecodeError, "invalid alert length: expected two bytes"));
        };
        match level {
            WARNING | FATAL if description == Alert::CloseNotify as u8 => self.incoming = Incoming::Ended,
            FATAL => return Err(Refusal::PeerFailed(description)),
            WARNING => {
                count(&mut self.peer.warnings, WARNINGS_LIMIT, "received too many warning alerts")?;
                if description != USER_CANCELED && self.suite.version == Version::Tls13 {
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

    /// Handles a handshake message of TLS 1.3 or a part of one. After the handshake a server expects only KeyUpdate.
    fn handle_handshake_message(&mut self, part: &[u8]) -> Result<(), Refusal> {
        let mut message = std::mem::take(&mut self.peer.message);
        message.extend_from_slice(part);
        let Some((header, body)) = message.split_first_chunk::<MESSAGE_HEADER_LENGTH>() else {
            self.peer.message = message;
            return Ok(());
        };
        let (kind, length) = parse_message_header(*header)?;
        // rustls refuses such a message too, but only when it is complete.
        if kind != KEY_UPDATE {
            return Err(UNEXPECTED_MESSAGE);
        }
        if length != 1 {
            return Err(Refusal::Alert(Alert::DecodeError, "invalid KeyUpdate length"));
        }
        let Some((request, behind)) = body.split_first() else {
            self.peer.message = message;
            return Ok(());
        };
        if !behind.is_empty() {
            // Data after a KeyUpdate must be encrypted with the new key, so it cannot be in the same record.
            return Err(Refusal::Alert(
                Alert::UnexpectedMessage,
                "received data behind a KeyUpdate in the same record",
            ));
        }
        count(&mut self.peer.key_updates, KEY_UPDATES_LIMIT, "received too many KeyUpdate messages")?;
        match *request {
            UPDATE_NOT_REQUESTED => {}
            // One KeyUpdate answers any number of requests; otherwise a peer that never reads could fill the memory.
            UPDATE_REQUESTED => self.peer.wants_key_update = true,
            _ => {
                return Err(Refusal::Alert(
                    Alert::IllegalParameter,
                    "unknown request_update value in a KeyUpdate",
                ));
            }
        }
        if !self.from_peer.update_keys() {
            self.incoming = Incoming::Deaf;
        }
        Ok(())
    }

    /// Handles handshake messages of TLS 1.2. After the handshake a client can send only a ClientHello, which requests
    /// a renegotiation. It is answered with a warning and not read, and the connection continues.
    fn refuse_renegotiation(&mut self, mut part: &[u8]) -> Result<(), Refusal> {
        while !part.is_empty() {
            let PeerState { message, awaited, .. } = &mut self.peer;
            if *awaited == 0 {
                let (head, rest) = part.split_at(part.len().min(MESSAGE_HEADER_LENGTH - message.len()));
                message.extend_from_slice(head);
                part = rest;
                let Some(header) = message.first_chunk() else { return Ok(()) };
                let (kind, length) = parse_message_header(*header)?;
                if kind != CLIENT_HELLO {
                    return Err(UNEXPECTED_MESSAGE);
                }
                message.clear();
                *awaited = length;
            }
            let skipped = part.len().min(usize::from(*awaited));
            part = &part[skipped..];
            *awaited -= u16::try_from(skipped).expect("at most as many bytes are skipped as are awaited");
            if *awaited > 0 {
                return Ok(());
            }
            count(&mut self.peer.renegotiations, RENEGOTIATIONS_LIMIT, "received too many renegotiations")?;
            if self.outgoing == Outgoing::Open {
                // Fails only if the key has reached its limit. Then the next write fails too.
                let _ = self.seal(ALERT, &[WARNING, NO_RENEGOTIATION]);
            }
        }
        Ok(())
    }

    /// Sends a KeyUpdate and changes the key if the peer has requested that, or if the key has reached its limit.
    fn update_keys(&mut self) -> io::Result<()> {
        let direction = &self.to_peer.direction;
        let request = if self.peer.wants_key_update {
            UPDATE_NOT_REQUESTED
        } else if direction.sequence >= self.to_peer.record_limit() - 1 {
            UPDATE_REQUESTED
        } else {
            return Ok(());
        };
        if direction.secret.is_none() {
            return Ok(());
        }
        self.peer.wants_key_update = false;
        self.to_peer.seal(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, request], &mut self.unsent)?;
        self.to_peer.update_keys();
        Ok(())
    }

    /// Encrypts a record, with a KeyUpdate before it if one is due.
    fn seal(&mut self, kind: u8, content: &[u8]) -> io::Result<()> {
        self.update_keys()?;
        self.to_peer.seal(kind, content, &mut self.unsent)
    }

    /// Sends the alert for `refusal`, once. A failure to send is ignored, because the connection ends in any case.
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
            let has_sent_all = this.unsent.is_empty();
            let is_news = this.open().unwrap_or_else(|refusal| {
                this.fail(cx, refusal);
                true
            });
            // Sends a warning that `open` has queued. If older records are unsent, another task may wait to send them;
            // it sends the warning too, and a send here would replace its waker.
            if has_sent_all && !this.unsent.is_empty() {
                let _ = this.poll_send(cx);
            }
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
                // Without `close_notify` an attacker may have cut off the data, so this must not look like a regular
                // end.
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

/// The type and the length of a handshake message (RFC 8446 section 4, the same in TLS 1.2). As in rustls, the longest one
/// has 0xffff bytes besides its header.
fn parse_message_header(header: [u8; MESSAGE_HEADER_LENGTH]) -> Result<(u8, u16), Refusal> {
    match header {
        [kind, 0, high, low] => Ok((kind, u16::from_be_bytes([high, low]))),
        _ => Err(Refusal::NoAlert("a handshake message is too long")),
    }
}

/// Increments a counter, or fails if it has reached `limit`.
fn count(counted: &mut u8, limit: u8, reason: &'static str) -> Result<(), Refusal> {
    if *counted >= limit {
        return Err(Refusal::NoAlert(reason));
    }
    *counted += 1;
    Ok(())
}

mod protection;
#[cfg(test)]
mod rustls_tests;
#[cfg(test)]
mod tests;
