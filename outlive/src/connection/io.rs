//! The IO that hyper reads and writes: a socket, or TLS on it.
//!
//! [`Io`] reports to the registry what was read, written and flushed, because the state and the time limits of the
//! connection depend on that. It withholds new requests from hyper in a phase that hands connections over. At the end
//! the driver closes it (`close`, `refuse`, `refuse_and_wait`) or takes it apart for the next process
//! (`into_parts`).

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

use super::Protocol;
use super::tls::record_layer::RecordLayer;
use super::tls::record_reader::{self, RecordAligned};
use crate::registry::{IoHandle, Registration, Stage};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::stream::Stream;
use crate::transport::tls_traffic::TlsTrafficState;

/// How much is read and discarded while a peer receives the last response, in bytes.
const DISCARD_LIMIT: usize = 256 * 1024;

/// How long a peer may take to receive the last message and to answer it.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How many bytes from the peer are read and discarded before its answer. The buffers of both sockets can hold
/// about 10 MB.
const UNANSWERED_LIMIT: usize = 16 * 1024 * 1024;

/// The size of the read that shows whether a client has disconnected while requests are withheld, in bytes.
const WITHHELD_LENGTH: usize = 1024;

/// What `Io` reads and writes: the socket itself (`Left`), or TLS on it (`Right`).
pub(super) type Wire = Either<Stream, Tls>;
/// TLS by rustls if this process performed the handshake (`Left`), or by `RecordLayer` after that (`Right`).
pub(super) type Tls = Either<Box<TlsStream<RecordAligned>>, Box<RecordLayer>>;

/// What is needed to continue the connection in another process, or here after it was parked.
pub(super) struct Parts {
    pub stream: Stream,
    pub registration: Registration,
    pub tls: Option<Box<TlsTrafficState>>,
    /// Bytes that hyper has not read: those that came with the connection, then those that TLS has decrypted.
    pub unread: Bytes,
}

pub(super) struct Io {
    wire: Wire,
    /// Bytes that came with the connection, or were read while requests are withheld. They are read before any others.
    unread: Bytes,
    registration: Registration,
    protocol: Protocol,
    end: CloseState,
}

/// The progress of closing the connection.
#[derive(Clone, Copy)]
enum CloseState {
    No,
    /// Shutting down the sending direction, for TLS with `close_notify`.
    Shutting,
    /// Discarding up to so many bytes until the peer closes too.
    Discarding(usize),
}

impl Io {
    pub(super) fn new(wire: Wire, unread: Bytes, registration: Registration, protocol: Protocol) -> Self {
        Self { wire, unread, registration, protocol, end: CloseState::No }
    }

    pub(super) fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Takes the connection apart. None if TLS cannot continue in another process.
    pub(super) fn into_parts(self) -> Option<Parts> {
        let registration = self.registration;
        let (stream, tls, opened) = match self.wire {
            Wire::Left(stream) => (stream, None, Bytes::new()),
            Wire::Right(Tls::Left(tls)) => {
                let (stream, session, opened) = record_reader::into_parts(*tls)?;
                (stream, Some(Box::new(session)), opened)
            }
            Wire::Right(Tls::Right(records)) => {
                if !records.is_movable() {
                    return None;
                }
                let (stream, session, opened) = records.into_parts();
                (stream, Some(Box::new(session)), opened)
            }
        };
        Some(Parts { stream, registration, tls, unread: join(self.unread, opened) })
    }

    fn handle(&self) -> IoHandle<'_> {
        self.registration.io()
    }

    /// Closes the connection so that the peer receives the whole last response: closing a socket that has unread bytes
    /// resets the connection, which can destroy the response (RFC 9112 section 9.6). The time limits of the registry
    /// apply.
    pub(super) async fn close(mut self) {
        poll_fn(|cx| {
            self.handle().wake_on_change(cx);
            self.poll_close(cx)
        })
        .await;
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let is_overdue = self.handle().is_overdue();
            let next = match self.end {
                CloseState::No => {
                    self.handle().enter(Stage::Ending);
                    CloseState::Shutting
                }
                CloseState::Shutting => match Pin::new(&mut self.wire).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => CloseState::Discarding(DISCARD_LIMIT),
                    Poll::Pending if !is_overdue => return Poll::Pending,
                    Poll::Ready(Err(_)) | Poll::Pending => return Poll::Ready(()),
                },
                CloseState::Discarding(left) => {
                    let mut discard = [0; 4096];
                    let mut into = ReadBuf::new(&mut discard);
                    match Pin::new(&mut self.wire).poll_read(cx, &mut into) {
                        Poll::Ready(Ok(())) if !into.filled().is_empty() && left > into.filled().len() => {
                            self.handle().enter(Stage::Discarding);
                            CloseState::Discarding(left - into.filled().len())
                        }
                        Poll::Pending if !is_overdue => {
                            if self.handle().stage() == Stage::Ending {
                                self.handle().enter(self.stage_of_silence());
                            }
                            return Poll::Pending;
                        }
                        Poll::Ready(_) | Poll::Pending => return Poll::Ready(()),
                    }
                }
            };
            self.end = next;
        }
    }

    /// The stage of a connection that has sent its last byte, and whose peer has sent nothing since.
    fn stage_of_silence(&self) -> Stage {
        if self.handle().state().has_left_body() { Stage::Discarding } else { Stage::Closing }
    }

    /// The certificate of the client, if it has presented one.
    pub(super) fn client_certificate(&self) -> Option<&ClientCertificate> {
        match &self.wire {
            Wire::Left(_) => None,
            Wire::Right(Tls::Left(tls)) => tls.get_ref().0.client(),
            Wire::Right(Tls::Right(records)) => records.client(),
        }
    }

    pub(super) fn is_plain(&self) -> bool {
        matches!(self.wire, Wire::Left(_))
    }

    /// The number of bytes that can be read without a wait for the peer. 0 with TLS, where the number of whole records
    /// is unknown.
    pub(super) fn queued(&self) -> u64 {
        match &self.wire {
            Wire::Left(stream) => stream.queued(),
            Wire::Right(_) => 0,
        }
    }

    /// Whether the peer of an HTTP/1.1 connection has closed it while its request is being answered. With TLS hyper
    /// detects that, because a peek at the socket sees only encrypted records.
    fn is_given_up(&self, cx: &mut Context<'_>) -> bool {
        let Wire::Left(stream) = &self.wire else { return false };
        let handle = self.handle();
        let state = handle.state();
        let waits = state.stage() == Stage::InFlight && state.is_in_flight() && !state.is_reading();
        if self.protocol != Protocol::Http1 || !waits || self.unread.has_remaining() {
            return false;
        }
        // A byte that can be read belongs to the next request, so the peer still waits for this response.
        matches!(stream.poll_peek(cx, &mut [0], |_| true), Poll::Ready(Ok(0) | Err(_)))
    }

    /// Applies the stall limit to the writes of a handler that owns an upgraded connection (WebSocket): an error if
    /// the peer has taken nothing for that long. Without this a peer that never reads would keep the connection open.
    #[inline]
    fn limit_handler<T>(&self, cx: &Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if self.handle().stage() == Stage::Upgraded { self.limit_upgraded(cx, polled) } else { polled }
    }

    fn limit_upgraded<T>(&self, cx: &Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let handle = self.handle();
        if polled.is_ready() {
            // A handler need not flush, so what it has written counts as flushed. Otherwise the stall limit would apply
            // while it has nothing to send.
            handle.flushed();
            return polled;
        }
        handle.writing();
        handle.replace_waker(cx);
        if handle.is_overdue() { Poll::Ready(Err(io::ErrorKind::TimedOut.into())) } else { Poll::Pending }
    }

    fn note_written(&mut self, written: &Poll<io::Result<usize>>) {
        if written.is_ready() {
            self.handle().wrote();
        }
        match (written, &mut self.wire) {
            (Poll::Ready(Ok(length)), Wire::Right(Tls::Left(tls))) => tls.get_mut().0.note_sealed(*length),
            // Near the limit of its key a connection cannot move (`RecordLayer::is_movable`). It stays here until a response
            // announces its end, because a drain would otherwise close it without notice.
            (_, Wire::Right(Tls::Right(records))) if records.is_near_key_limit() => {
                self.handle().forbid_handover();
            }
            _ => {}
        }
    }

    /// Sends `answer`, which hyper does not produce (408, 400, GOAWAY), and closes.
    pub(super) async fn refuse(mut self, answer: &[u8]) {
        if self.send_last(answer).await.is_ok() {
            self.close().await;
        }
    }

    /// Sends `message`, discards what the peer sends until `is_answered` returns true for a part of it, and closes. The
    /// send and the wait take at most [`ANSWER_LIMIT`]; a drain waits for both.
    pub(super) async fn refuse_and_wait(mut self, message: &[u8], is_answered: impl FnMut(&[u8]) -> bool) {
        let deadline = Instant::now() + ANSWER_LIMIT;
        if !matches!(timeout_at(deadline, self.send_last(message)).await, Ok(Ok(()))) {
            return;
        }
        let _ = timeout_at(deadline, self.discard_until(is_answered)).await;
        self.close().await;
    }

    async fn send_last(&mut self, message: &[u8]) -> io::Result<()> {
        // In this stage the stall limit applies to the message.
        self.handle().enter(Stage::Ending);
        self.in_time(|io, cx| io.poll_write(cx, message)).await?;
        self.in_time(Self::poll_flush).await
    }

    /// Also ends if the peer has closed the connection, or has sent more than [`UNANSWERED_LIMIT`].
    async fn discard_until(&mut self, mut is_end: impl FnMut(&[u8]) -> bool) {
        if is_end(&std::mem::take(&mut self.unread)) {
            return;
        }
        let mut left = UNANSWERED_LIMIT;
        poll_fn(|cx| {
            loop {
                let mut discard = [0; 4096];
                let mut into = ReadBuf::new(&mut discard);
                let read = std::task::ready!(Pin::new(&mut self.wire).poll_read(cx, &mut into));
                let read_bytes = into.filled();
                if read.is_err() || read_bytes.is_empty() || read_bytes.len() > left || is_end(read_bytes) {
                    return Poll::Ready(());
                }
                left -= read_bytes.len();
            }
        })
        .await;
    }

    /// The result of `poll`, or `TimedOut` if the peer takes nothing for as long as the stage allows.
    async fn in_time<T>(
        &mut self,
        mut poll: impl FnMut(Pin<&mut Self>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        poll_fn(|cx| {
            self.handle().wake_on_change(cx);
            match poll(Pin::new(self), cx) {
                Poll::Pending if self.handle().is_overdue() => {
                    Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
                }
                polled => polled,
            }
        })
        .await
    }

    /// The result of a read while the next request is withheld. With TLS only a read shows that the client has disconnected
    /// during a response. What the client has sent is kept in `unread` for the next process.
    fn poll_withheld(&mut self, cx: &mut Context<'_>, is_in_flight: bool) -> Poll<io::Result<()>> {
        if !is_in_flight || self.is_plain() || !self.unread.is_empty() {
            return Poll::Pending;
        }
        let mut bytes = [0; WITHHELD_LENGTH];
        let mut read = ReadBuf::new(&mut bytes);
        std::task::ready!(Pin::new(&mut self.wire).poll_read(cx, &mut read))?;
        let has_disconnected = read.filled().is_empty() && !self.has_stopped_reading();
        self.unread = Bytes::copy_from_slice(read.filled());
        if has_disconnected { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Whether TLS reads no more, because it does not know the key that the client uses now.
    fn has_stopped_reading(&self) -> bool {
        matches!(&self.wire, Wire::Right(Tls::Right(records)) if records.is_read_closed())
    }
}

/// `first` followed by `second`; copies only if neither is empty.
pub(super) fn join(first: Bytes, second: Bytes) -> Bytes {
    match (first.is_empty(), second.is_empty()) {
        (true, _) => second,
        (_, true) => first,
        (false, false) => [first, second].concat().into(),
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let handle = this.registration.io();
        // In a phase that hands connections over, the next request is left unread for the next process. The body of a
        // request in flight is still read. The driver is woken when the phase changes, and hyper then reads again.
        let state = handle.state();
        let held = this.protocol == Protocol::Http1
            && state.is_movable()
            && !state.is_reading()
            // If the handler left a part of the body, hyper reads what has arrived of it. If this read were withheld, hyper
            // would close the connection.
            && !state.has_left_body()
            && handle.phase().quiesces();
        if held {
            return this.poll_withheld(cx, state.is_in_flight());
        }
        if this.unread.has_remaining() {
            let length = this.unread.remaining().min(into.remaining());
            into.put_slice(&this.unread.split_to(length));
            // These bytes begin the head of a request. A connection that counted as idle would be parked again while
            // hyper holds them, and would never answer that request.
            if this.protocol == Protocol::Http1 {
                handle.received();
            }
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        std::task::ready!(Pin::new(&mut this.wire).poll_read(cx, into))?;
        let is_near_key_limit = match &this.wire {
            Wire::Left(_) => false,
            Wire::Right(Tls::Left(tls)) => tls.get_ref().0.is_near_key_limit(),
            Wire::Right(Tls::Right(records)) => records.is_near_key_limit(),
        };
        if is_near_key_limit {
            handle.close_after_response();
        }
        // At the end of the input hyper would abort the response in flight, so it learns of the end only after that response
        // is sent.
        if this.has_stopped_reading() && into.filled().len() == before && state.is_in_flight() {
            return Poll::Pending;
        }
        // If the handler did not read the whole body, these bytes may be the rest of the body, so they do not start the time
        // limit of a head. If they begin a head, the limit starts when the connection would be parked and is served again.
        if this.protocol == Protocol::Http1 && into.filled().len() > before && !state.has_left_body() {
            handle.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.handle().writing();
        let written = Pin::new(&mut self.wire).poll_write(cx, bytes);
        self.note_written(&written);
        self.limit_handler(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.handle().writing();
        let written = Pin::new(&mut self.wire).poll_write_vectored(cx, slices);
        self.note_written(&written);
        self.limit_handler(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }

    /// hyper flushes after it has written all that it had to send, and at the end of each poll.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.wire).poll_flush(cx);
        std::task::ready!(self.limit_handler(cx, flushed))?;
        self.handle().flushed();
        if self.is_given_up(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Ready(Ok(()))
    }

    /// hyper shuts the stream down when it has finished. For HTTP/1.1 that does nothing, because the driver closes the
    /// stream (`close`) or hands it over; the handler that owns an upgraded stream does shut it down.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match (self.protocol, self.handle().stage()) {
            (Protocol::Http2, _) => self.poll_close(cx).map(Ok),
            (Protocol::Http1, Stage::Upgraded) => {
                let shut = Pin::new(&mut self.wire).poll_shutdown(cx);
                self.limit_handler(cx, shut)
            }
            (Protocol::Http1, _) => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use testkit::certificate::{Certificate, ClientConfig};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::timeout;
    use tokio_rustls::TlsConnector;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::connection::upgraded::{UpgradableIo, Upgrade};
    use crate::registry::{Limits, Registry};
    use crate::transport::stream::Peer;
    use crate::transport::tls_tests::tls_of;

    /// Both ends of a TCP connection: the server's and the peer's.
    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("the port is bound");
        let address = listener.local_addr().expect("the listener has an address");
        let (ours, peer) = tokio::join!(listener.accept(), TcpStream::connect(address));
        (ours.expect("the connection is made").0, peer.expect("the connection is made"))
    }

    /// Fills the buffers of the sockets; the peer reads nothing.
    async fn fill(stream: &mut Stream) {
        while timeout(Duration::from_millis(50), stream.write(&[0; 16 * 1024])).await.is_ok() {}
    }

    /// An `Io` whose time limits are all 20 ms, and are enforced.
    fn io(wire: Wire) -> Io {
        io_that_idles(wire, Duration::from_millis(20))
    }

    /// The same, with another idle limit.
    fn io_that_idles(wire: Wire, idle: Duration) -> Io {
        let short = Duration::from_millis(20);
        io_within(wire, Limits { head: short, idle, stall: short, close: short })
    }

    fn io_within(wire: Wire, limits: Limits) -> Io {
        let registry = Registry::new(limits, CancellationToken::new());
        let registration = registry.register(Peer::Unix, None);
        tokio::spawn(registry.watch());
        Io::new(wire, Bytes::new(), registration, Protocol::Http1)
    }

    async fn assert_ends(end: impl Future<Output = ()>) {
        timeout(Duration::from_secs(120), end).await.expect("the stall limit applies");
    }

    /// On a busy machine a request can have waited for so long that its connection counts as idle. If the connection was
    /// parked, the request would have to wait again.
    #[tokio::test]
    async fn parkable_connection_is_read_until_its_driver_withholds_input() {
        let (ours, mut peer) = connection().await;
        let io = io_that_idles(Wire::Left(ours.into()), Duration::from_secs(60));
        let driver = io.registration().driver();
        let upgrade = Upgrade::default();
        let mut io = UpgradableIo::new(io, upgrade.clone(), None);
        while !driver.is_parkable() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        peer.write_all(b"GET").await.expect("the bytes are sent");
        let mut read = [0; 1];
        let reading = timeout(Duration::from_secs(60), io.read_exact(&mut read)).await;
        reading.expect("the input is not withheld").expect("the input is read");
        assert!(!driver.is_parkable());
        upgrade.withhold_input(true);
        assert!(timeout(Duration::from_millis(50), io.read_exact(&mut read)).await.is_err());
    }

    #[tokio::test]
    async fn refusal_ends_at_the_stall_limit_if_the_peer_reads_nothing() {
        let (ours, _peer) = connection().await;
        let mut stream = Stream::from(ours);
        fill(&mut stream).await;
        assert_ends(io(Wire::Left(stream)).refuse(b"HTTP/1.1 408 Request Timeout\r\n\r\n")).await;
    }

    /// Checks that `refuse_and_wait` takes at most its limit and a second, although the stall limit is an hour.
    async fn assert_refusal_ends_in_time(stream: Stream) {
        let (short, long) = (Duration::from_millis(20), Duration::from_secs(3600));
        let io = io_within(Wire::Left(stream), Limits { head: long, idle: long, stall: long, close: short });
        let before = Instant::now();
        io.refuse_and_wait(b"bye", |_| false).await;
        assert!(before.elapsed() < ANSWER_LIMIT + Duration::from_secs(1), "{:?}", before.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn refusal_waits_no_longer_than_its_limit_for_an_answer() {
        let (ours, _peer) = connection().await;
        assert_refusal_ends_in_time(ours.into()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn refusal_waits_no_longer_than_its_limit_for_a_peer_that_reads_nothing() {
        let (ours, _peer) = connection().await;
        let mut stream = Stream::from(ours);
        fill(&mut stream).await;
        assert_refusal_ends_in_time(stream).await;
    }

    /// The clock does not advance while there is input, so only the number of bytes ends this.
    #[tokio::test(start_paused = true)]
    async fn refusal_reads_a_limited_number_of_bytes() {
        let (ours, mut peer) = connection().await;
        let sending = tokio::spawn(async move {
            let mut sent = 0;
            while let Ok(length) = peer.write(&[0; 16 * 1024]).await {
                sent += length;
            }
            sent
        });
        assert_refusal_ends_in_time(ours.into()).await;
        let sent = timeout(Duration::from_secs(120), sending).await.expect("the connection is closed");
        assert!(sent.expect("no panic") > UNANSWERED_LIMIT);
    }

    #[tokio::test]
    async fn connection_stays_open_until_the_peer_has_answered_a_refusal() {
        let (ours, mut peer) = connection().await;
        let long = Duration::from_secs(3600);
        let io =
            io_within(Wire::Left(ours.into()), Limits { head: long, idle: long, stall: long, close: long });
        let entry = io.registration().driver();
        let mut all = Vec::new();
        let refusing = tokio::spawn(io.refuse_and_wait(b"bye", move |bytes| {
            all.extend_from_slice(bytes);
            all.ends_with(b"message bye")
        }));
        let mut read = [0; 3];
        peer.read_exact(&mut read).await.expect("the connection is open");
        for part in ["mess", "age ", "by"] {
            peer.write_all(part.as_bytes()).await.expect("the connection is open");
            assert!(timeout(Duration::from_millis(20), peer.read_exact(&mut [0])).await.is_err());
            assert_eq!(entry.stage(), Stage::Ending, "a drain does not wait");
        }
        peer.write_all(b"e").await.expect("the connection is open");
        assert_eq!(peer.read(&mut read).await.expect("no error occurs"), 0);
        drop(peer);
        refusing.await.expect("no panic");
    }

    /// A TLS connection of which this process has performed the handshake, and its client.
    async fn tls_connection(
        client: &dyn Fn(&Certificate) -> Arc<ClientConfig>,
    ) -> (Box<TlsStream<RecordAligned>>, tokio_rustls::client::TlsStream<TcpStream>) {
        let certificate = Certificate::new().expect("openssl makes a certificate");
        let (ours, peer) = connection().await;
        let name = "localhost".try_into().expect("the name is valid");
        let ours = record_reader::accept(ours.into(), &tls_of(&certificate)).1;
        let (ours, peer) = tokio::join!(ours, TlsConnector::from(client(&certificate)).connect(name, peer));
        (Box::new(ours.expect("the handshake succeeds")), peer.expect("the handshake succeeds"))
    }

    /// At the limit rustls would close the connection within a response.
    #[tokio::test]
    async fn tls_1_2_connection_closes_with_a_response_before_the_limit_of_its_key() {
        let client = |certificate: &Certificate| {
            certificate.client_over_tls12(None, &[]).expect("the client configuration is valid")
        };
        let (mut ours, mut peer) = tls_connection(&client).await;
        ours.get_mut().0.limit_records(3);
        let mut io = io_that_idles(Wire::Right(Tls::Left(ours)), Duration::from_secs(60));
        // The second write takes two records.
        for (length, closes) in [(1, false), (16 * 1024 + 1, true)] {
            io.write_all(&vec![7; length]).await.expect("the client reads");
            peer.read_exact(&mut vec![0; length]).await.expect("the bytes arrive");
            peer.write_all(b"x").await.expect("the bytes are sent");
            io.read_exact(&mut [0]).await.expect("the bytes arrive");
            assert_eq!(io.handle().state().closes_after_response(), closes);
        }
    }

    #[tokio::test]
    async fn tls_close_ends_at_the_stall_limit_if_the_peer_reads_nothing() {
        let client =
            |certificate: &Certificate| certificate.client(&[]).expect("the client configuration is valid");
        let (mut ours, _peer) = tls_connection(&client).await;
        fill(ours.get_mut().0.stream()).await;
        assert_ends(io(Wire::Right(Tls::Left(ours))).close()).await;
    }
}
