//! The records of a TLS 1.3 connection that has moved: sealed and opened with `ring`, as RFC 8446 section 5 says. Those
//! of a connection that was made here are rustls' affair.
//!
//! | RFC 8446 | here |
//! | --- | --- |
//! | 5.1: a record's fragment is no longer than 2^14 bytes | `FRAGMENT_LIMIT`; longer ones are `record_overflow` |
//! | 5.2: `opaque_type` is 23, `legacy_record_version` 0x0303 and ignored, the header is the additional data | `Half::open`, `Half::seal` |
//! | 5.2: sealed, no longer than 2^14 + 256 | `SEALED_LIMIT` |
//! | 5.3: the nonce is the sequence number, big-endian, XOR the IV; it counts from 0 and does not wrap | `Half::nonce` |
//! | 5.4: zeros behind the content type are padding; a record of nothing else is `unexpected_message` | `Half::open` |
//! | 5.5: no key seals more records than is safe (2^24.5 with AES-GCM) | `SEALED_RECORDS_LIMIT` |
//! | 6.1: `close_notify` ends what comes from a peer; ours is the last that we send | `poll_read`, `poll_shutdown` |
//! | 6.2: any other alert is fatal, and so is a record that does not open; we say why once | `Records::fail` |
//! | 4.6.3: after a peer's KeyUpdate its records have another key, which we do not know | as `close_notify`, and we are worn |
//! | 4.6: of other messages after the handshake a server expects none | `unexpected_message` |
//!
//! No early data: rustls was not told to take any.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ring::aead::{self, AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stream::Stream;
use crate::tls_session::{Direction, IV_LENGTH, Suite, TlsSession};

/// The most that a record carries, in bytes.
const FRAGMENT_LIMIT: usize = 1 << 14;
/// The most that it is long, sealed, in bytes.
const SEALED_LIMIT: usize = FRAGMENT_LIMIT + 256;
/// Of the authentication of each suite, in bytes.
const TAG_LENGTH: usize = 16;
const HEADER_LENGTH: usize = 5;
/// After so many records a connection is told to end; half of what is safe, so that there is room for its last answer.
const WORN_AT: u64 = 1 << 23;
/// No more are sealed with one key.
const SEALED_RECORDS_LIMIT: u64 = 1 << 24;
/// What is sealed and not sent, in bytes; until it is out no more is sealed.
const UNSENT_LIMIT: usize = 64 * 1024;
/// How much is read at once, in bytes.
const READ_LENGTH: usize = 16 * 1024;

/// Content types (section 5.1).
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
/// The type of a handshake message (section 4).
const KEY_UPDATE: u8 = 24;

/// Alerts (section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Alert {
    CloseNotify = 0,
    UnexpectedMessage = 10,
    BadRecordMac = 20,
    RecordOverflow = 22,
    DecodeError = 50,
}

/// Why no more is read.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Ours(Alert),
    /// The peer's alert.
    #[expect(dead_code, reason = "shown in the log")]
    PeerFailed(u8),
}

impl From<Alert> for Refusal {
    fn from(alert: Alert) -> Self {
        Self::Ours(alert)
    }
}

/// `user_canceled`, which says nothing.
const USER_CANCELED: u8 = 90;

/// One direction, ready for use.
struct Half {
    direction: Direction,
    key: LessSafeKey,
}

impl Half {
    fn new(suite: Suite, direction: Direction) -> Self {
        let algorithm: &aead::Algorithm = match suite {
            Suite::Aes128Gcm => &AES_128_GCM,
            Suite::Aes256Gcm => &AES_256_GCM,
            Suite::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, &direction.key).expect("a key of the suite's length");
        Self { direction, key: LessSafeKey::new(key) }
    }

    fn nonce(&self) -> Nonce {
        let mut nonce = *self.direction.iv;
        let sequence = self.direction.sequence.to_be_bytes();
        for (byte, with) in nonce[IV_LENGTH - sequence.len()..].iter_mut().zip(sequence) {
            *byte ^= with;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Opens a record; gives its content and its type.
    fn open(&mut self, header: [u8; HEADER_LENGTH], sealed: &mut BytesMut) -> Result<u8, Alert> {
        let length = self
            .key
            .open_in_place(self.nonce(), Aad::from(header), sealed)
            .map_err(|_| Alert::BadRecordMac)?
            .len();
        // No peer sends as many.
        self.direction.sequence = self.direction.sequence.checked_add(1).ok_or(Alert::BadRecordMac)?;
        sealed.truncate(length);
        let end = sealed.iter().rposition(|byte| *byte != 0).ok_or(Alert::UnexpectedMessage)?;
        let kind = sealed[end];
        sealed.truncate(end);
        if sealed.len() > FRAGMENT_LIMIT { Err(Alert::RecordOverflow) } else { Ok(kind) }
    }

    /// Seals a record of `content` onto `into`.
    fn seal(&mut self, kind: u8, content: &[u8], into: &mut BytesMut) -> io::Result<()> {
        if self.direction.sequence >= SEALED_RECORDS_LIMIT {
            return Err(io::Error::other("a key has sealed as many records as is safe"));
        }
        let length = content.len() + 1 + TAG_LENGTH;
        let mut header = [APPLICATION_DATA, 3, 3, 0, 0];
        header[3..].copy_from_slice(&u16::try_from(length).map_err(io::Error::other)?.to_be_bytes());
        into.put_slice(&header);
        let at = into.len();
        into.put_slice(content);
        into.put_u8(kind);
        let sealed = self.key.seal_in_place_separate_tag(self.nonce(), Aad::from(header), &mut into[at..]);
        let tag = sealed.map_err(|_| io::Error::other("a record could not be sealed"))?;
        into.put_slice(tag.as_ref());
        self.direction.sequence += 1;
        Ok(())
    }
}

pub(super) struct Records {
    stream: Stream,
    suite: Suite,
    from_peer: Half,
    to_peer: Half,
    /// What was read, and is still sealed.
    sealed: BytesMut,
    /// What was opened, and is not read.
    opened: BytesMut,
    /// What is sealed, and not sent.
    unsent: BytesMut,
    /// Whether the peer has said its last.
    has_ended: bool,
    /// Whether we have.
    has_said_end: bool,
    /// Whether what the peer says is sealed with a key that we do not know.
    is_deaf: bool,
}

impl Records {
    pub(super) fn new(stream: Stream, session: TlsSession) -> Self {
        let TlsSession { suite, from_peer, to_peer, unread } = session;
        Self {
            stream,
            suite,
            from_peer: Half::new(suite, from_peer),
            to_peer: Half::new(suite, to_peer),
            sealed: unread.into(),
            opened: BytesMut::new(),
            unsent: BytesMut::new(),
            has_ended: false,
            has_said_end: false,
            is_deaf: false,
        }
    }

    /// Whether the connection should end soon: its keys are not to be used much longer, or the peer has others.
    pub(super) fn is_worn(&self) -> bool {
        self.is_deaf || self.to_peer.direction.sequence >= WORN_AT
    }

    /// Whether the peer says more than we can hear.
    pub(super) fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    /// Whether nothing was said that keeps it here.
    pub(super) fn is_movable(&self) -> bool {
        !self.has_ended && !self.has_said_end && !self.is_worn() && self.unsent.is_empty()
    }

    /// What it takes to go on elsewhere, and what was opened and not read.
    pub(super) fn into_parts(self) -> (Stream, TlsSession, Bytes) {
        let (from_peer, to_peer) = (self.from_peer.direction, self.to_peer.direction);
        let session = TlsSession { suite: self.suite, from_peer, to_peer, unread: self.sealed.freeze() };
        (self.stream, session, self.opened.freeze())
    }

    /// Opens what there is of whole records, until there is something to read or the peer has ended; false where more
    /// has to come.
    fn open(&mut self) -> Result<bool, Refusal> {
        while self.opened.is_empty() && !self.has_ended {
            let Some(header) = self.sealed.first_chunk::<HEADER_LENGTH>().copied() else { return Ok(false) };
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            match header[0] {
                APPLICATION_DATA if length > SEALED_LIMIT => return Err(Alert::RecordOverflow.into()),
                APPLICATION_DATA => {}
                // After the handshake nothing comes unsealed (section 5).
                _ => return Err(Alert::UnexpectedMessage.into()),
            }
            if self.sealed.len() < HEADER_LENGTH + length {
                return Ok(false);
            }
            self.sealed.advance(HEADER_LENGTH);
            let mut record = self.sealed.split_to(length);
            match self.from_peer.open(header, &mut record)? {
                APPLICATION_DATA => self.opened = record,
                ALERT => self.hear(&record)?,
                HANDSHAKE if record.first() == Some(&KEY_UPDATE) => {
                    self.has_ended = true;
                    self.is_deaf = true;
                }
                _ => return Err(Alert::UnexpectedMessage.into()),
            }
        }
        Ok(true)
    }

    fn hear(&mut self, alert: &[u8]) -> Result<(), Refusal> {
        match *alert {
            [_, said] if said == Alert::CloseNotify as u8 => self.has_ended = true,
            [_, USER_CANCELED] => {}
            [_, said] => {
                // It has given up, and does not listen any more.
                self.has_said_end = true;
                return Err(Refusal::PeerFailed(said));
            }
            _ => return Err(Alert::DecodeError.into()),
        }
        Ok(())
    }

    /// Says why, once; whether it arrives is no longer our affair.
    fn fail(&mut self, cx: &mut Context<'_>, refusal: Refusal) -> io::Error {
        const FATAL: u8 = 2;
        self.has_ended = true;
        if let Refusal::Ours(alert) = refusal
            && !self.has_said_end
        {
            self.has_said_end = true;
            if self.to_peer.seal(ALERT, &[FATAL, alert as u8], &mut self.unsent).is_ok() {
                let _ = self.poll_send(cx);
            }
        }
        io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {refusal:?}"))
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

impl AsyncRead for Records {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let is_news = match this.open() {
                Ok(is_news) => is_news,
                Err(refusal) => return Poll::Ready(Err(this.fail(cx, refusal))),
            };
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
                // Cut off without a close_notify: what came may not be all.
                this.has_ended = true;
                this.has_said_end = true;
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            this.sealed.extend_from_slice(read.filled());
        }
    }
}

impl AsyncWrite for Records {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.has_said_end {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.unsent.len() >= UNSENT_LIMIT {
            ready!(this.poll_send(cx))?;
        }
        let content = &bytes[..bytes.len().min(FRAGMENT_LIMIT)];
        if !content.is_empty() {
            this.to_peer.seal(APPLICATION_DATA, content, &mut this.unsent)?;
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
        const WARNING: u8 = 1;
        let this = self.get_mut();
        if !this.has_said_end {
            this.has_said_end = true;
            this.to_peer.seal(ALERT, &[WARNING, Alert::CloseNotify as u8], &mut this.unsent)?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
