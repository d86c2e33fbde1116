//! Gives rustls whole TLS records only, and takes a connection out of rustls for a handover.
//!
//! [`RecordAligned`] is the stream below rustls. An incomplete record stays in its buffer, so that at a handover rustls
//! holds nothing but decrypted data. rustls does not give up the encrypted bytes that it has read: if it had read a
//! part of a record, the next process could not decrypt that record.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use rustix::net::{SendFlags, send};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::Accept;
use tokio_rustls::rustls::ServerConnection;
use tokio_rustls::server::TlsStream;

use super::record_layer::{FRAGMENT_LIMIT, HEADER_LENGTH, NoHeader, sealed_length};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::stream::Stream;
use crate::transport::tls_config::{Handshake, Tls};
use crate::transport::tls_traffic::{TlsTrafficState, Version};
use crate::transport::traffic_secret::FirstSecrets;
#[cfg(test)]
use crate::transport::traffic_secret::TrafficSecret;

/// How much is read at once, in bytes.
const READ_LENGTH: usize = 16 * 1024;

/// The socket below rustls, which delivers whole records.
pub(in crate::connection) struct RecordAligned {
    stream: Stream,
    /// Bytes that were read from the socket and not delivered.
    buffer: BytesMut,
    /// The length of the whole records at the beginning of `buffer`, or of bytes that can never become one.
    whole: usize,
    /// Bytes remaining of a record already partly delivered.
    begun: usize,
    /// The first traffic secrets of the connection; rustls stores them here during the handshake.
    secrets: Arc<FirstSecrets>,
    /// The certificate of the client, from the end of the handshake on.
    client: Option<ClientCertificate>,
    /// How many records rustls may seal before the connection has to close with a response.
    records_left: u64,
}

/// Begins the server's side of the handshake on `stream`.
pub(in crate::connection) fn accept(stream: Stream, tls: &Tls) -> (Handshake, Accept<RecordAligned>) {
    let secrets = Arc::new(FirstSecrets::default());
    let handshake = tls.begin(&secrets);
    let accept = handshake.acceptor.accept(RecordAligned {
        stream,
        buffer: BytesMut::new(),
        whole: 0,
        begun: 0,
        secrets,
        client: None,
        records_left: u64::MAX,
    });
    (handshake, accept)
}

impl RecordAligned {
    pub(in crate::connection) fn client(&self) -> Option<&ClientCertificate> {
        self.client.as_ref()
    }

    pub(in crate::connection) fn set_client(&mut self, client: Option<ClientCertificate>) {
        self.client = client;
    }

    /// Lets the connection close with a response when rustls has sealed `count` more records.
    pub(in crate::connection) fn limit_records(&mut self, count: u64) {
        self.records_left = count;
    }

    /// rustls has sealed `length` bytes of data.
    pub(in crate::connection) fn note_sealed(&mut self, length: usize) {
        let records = u64::try_from(length.div_ceil(FRAGMENT_LIMIT)).unwrap_or(u64::MAX);
        self.records_left = self.records_left.saturating_sub(records);
    }

    /// Whether the connection should close soon.
    pub(in crate::connection) fn is_near_key_limit(&self) -> bool {
        self.records_left == 0
    }

    #[cfg(test)]
    pub(in crate::connection) fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// The number of references to the secrets, and the secrets.
    #[cfg(test)]
    pub(in crate::connection) fn secrets(&self) -> (usize, Option<&TrafficSecret>, Option<&TrafficSecret>) {
        (Arc::strong_count(&self.secrets), self.secrets.from_peer.get(), self.secrets.to_peer.get())
    }

    /// Sends all of `bytes` without waiting. None if the socket does not accept all of them.
    fn send_now(&self, bytes: &[u8]) -> Option<()> {
        let sent = send(self.stream.as_fd(), bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).ok()?;
        (sent == bytes.len()).then_some(())
    }

    /// The remainder of a record that was delivered in part.
    pub(in crate::connection) fn remaining(&mut self) -> impl Read + '_ {
        let length = self.begun.min(self.whole);
        self.note_given(length);
        self.whole -= length;
        self.buffer.split_to(length).reader()
    }

    fn count_whole(&mut self) {
        loop {
            match sealed_length(&self.buffer[self.whole..]) {
                Ok(Some(length)) if self.buffer.len() >= self.whole + HEADER_LENGTH + length => {
                    self.whole += HEADER_LENGTH + length;
                }
                Ok(_) => return,
                Err(NoHeader) => {
                    // rustls receives the invalid header at once, and refuses it.
                    self.whole = self.buffer.len();
                    return;
                }
            }
        }
    }

    /// Updates `begun` for the next `length` bytes of the buffer, which are about to be delivered.
    fn note_given(&mut self, mut length: usize) {
        let mut at = 0;
        while length > 0 {
            if self.begun == 0 {
                let header = self.buffer[at..].first_chunk::<HEADER_LENGTH>();
                self.begun = header.map_or(self.buffer.len() - at, |header| record_length(*header));
            }
            let part = self.begun.min(length);
            self.begun -= part;
            length -= part;
            at += part;
        }
    }
}

/// Takes a connection out of rustls: its socket, the state that another process needs, and the data that was decrypted
/// and not read. None if rustls cannot give it up, for example because the peer has closed it, or because a handshake
/// or a write is unfinished.
pub(in crate::connection) fn into_parts(
    tls: TlsStream<RecordAligned>,
) -> Option<(Stream, TlsTrafficState, Bytes)> {
    let (mut below, mut session) = tls.into_inner();
    let mut opened = BytesMut::new();
    // If rustls has only the beginning of a record, the remainder is in the buffer below.
    read_opened(&mut session, &mut opened)?;
    let mut rest = below.remaining();
    while session.read_tls(&mut rest).ok()? > 0 {
        session.process_new_packets().ok()?;
        read_opened(&mut session, &mut opened)?;
    }
    drop(rest);
    if session.is_handshaking() || session.wants_write() {
        return None;
    }
    // When the peer of a TLS 1.3 connection requests a KeyUpdate, rustls changes its key at once, but sends its
    // KeyUpdate only before the next data. This empty write makes rustls produce it now. Otherwise the peer could not
    // decrypt later data.
    let _written = session.writer().write(&[]).ok()?;
    let mut answer = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut answer).ok()?;
    }
    if !answer.is_empty() {
        below.send_now(&answer)?;
    }
    let RecordAligned { stream, buffer, secrets, client, .. } = below;
    let version = Version::negotiated(session.protocol_version())?;
    let extracted = session.dangerous_extract_secrets().ok()?;
    let session = TlsTrafficState::new(version, extracted, &secrets, buffer.freeze(), client)?;
    Some((stream, session, opened.freeze()))
}

/// Reads all decrypted data. None if the peer has sent its last data, or the session has failed.
fn read_opened(session: &mut ServerConnection, into: &mut BytesMut) -> Option<()> {
    let mut buffer = [0; 4096];
    loop {
        match session.reader().read(&mut buffer) {
            Ok(0) => return None,
            Ok(length) => into.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(()),
            Err(_) => return None,
        }
    }
}

/// The length of a record, including its header.
fn record_length(header: [u8; HEADER_LENGTH]) -> usize {
    HEADER_LENGTH + usize::from(u16::from_be_bytes([header[3], header[4]]))
}

impl AsyncRead for RecordAligned {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.whole > 0 {
                let length = this.whole.min(into.remaining());
                this.note_given(length);
                into.put_slice(&this.buffer[..length]);
                this.buffer.advance(length);
                this.whole -= length;
                if this.buffer.is_empty() {
                    this.buffer = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            let mut buffer = [const { std::mem::MaybeUninit::uninit() }; READ_LENGTH];
            let mut read = ReadBuf::uninit(&mut buffer);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // The stream ends inside a record. rustls receives the incomplete record, and then the end.
                this.whole = this.buffer.len();
                if this.whole == 0 {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            this.buffer.extend_from_slice(read.filled());
            this.count_whole();
        }
    }
}

impl AsyncWrite for RecordAligned {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
