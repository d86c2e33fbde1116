//! Connections whose response does not end: those that leave HTTP/1.1 (RFC 9110 section 7.8), such as WebSockets, and
//! event streams (`events.rs`).
//!
//! hyper reads and writes an [`UpgradableIo`], and gives it to the handler when a response grants an upgrade. If the
//! handler has a [`Carry`](crate::Carry), this IO follows the frames that pass through it (`frames.rs`). When the
//! handler has left its state and drops the IO, the IO returns to the server as a [`ReturnedConnection`], which another
//! process continues: there the same request is answered anew, and the head of that response is discarded
//! (`transport/replay.rs`).
//!
//! An upgrade that a client offers and no response grants is a [`Declined`](Upgrade::keep_declined) one: hyper prepares
//! an upgrade for each CONNECT and each request with an `Upgrade` field, and keeps it pending. When the connection ends,
//! hyper gives the stream to the pending upgrade instead of to its driver. Without [`Upgrade::recover_declined`] the
//! driver could neither hand such a connection over nor park it, so every client that offers an upgrade with each
//! request (the JDK's HttpClient does) would lose its connections at each restart.

mod events;
mod frames;
mod returned;
#[cfg(test)]
mod tests;

use std::io;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Endpoint;
use super::io::{Io, join};
use crate::app::carry::Continuation;
use crate::os::lock::lock;
use crate::transport::replay::Replay;
pub(super) use events::{EventBody, Events, LastId, Turn as EventTurn};
use frames::{Inbound, Outbound, Reading};
pub(super) use returned::close_unadopted;
pub use returned::{ReturnPath, ReturnedConnection, ReturnedConnections, Succession};

/// The end of a head in HTTP/1.1.
const BLANK_LINE: &[u8; 4] = b"\r\n\r\n";

/// What the service of a connection, its driver and its IO share: the state of upgrades, and whether input is withheld.
#[derive(Clone, Default)]
pub(super) struct Upgrade(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// The receiving end of the last upgrade that no response granted.
    declined: Mutex<Option<OnUpgrade>>,
    /// Set when a response grants an upgrade to a handler that has a `Carry`.
    granted: OnceLock<Granted>,
    /// Whether the response to a replayed request does not continue the connection.
    is_refused: AtomicBool,
    /// Whether the response to a replayed request continues the connection.
    is_continued: AtomicBool,
    /// Set when an event stream has to continue in another process.
    handed_on: Mutex<Option<Replay>>,
    /// See [`Upgrade::withhold_input`].
    withholds_input: AtomicBool,
}

/// An upgrade whose handler has a `Carry`.
pub(super) struct Granted {
    pub(super) continuation: Arc<Continuation>,
    /// See [`crate::transport::replay::agreement`].
    pub(super) agreement: Bytes,
    pub(super) is_websocket: bool,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) return_path: ReturnPath,
}

impl Granted {
    /// Gives a connection back whose bytes the library does not follow.
    pub(super) fn give_back(&self, io: Io) {
        self.return_path.send(ReturnedConnection::new(io, self, None, true));
    }
}

impl Upgrade {
    /// Replaces the upgrade of an earlier request, which hyper has replaced too.
    pub(super) fn keep_declined(&self, upgrade: OnUpgrade) {
        *lock(&self.0.declined) = Some(upgrade);
    }

    /// The IO that hyper gave to the pending upgrade when the connection ended, and the bytes that hyper had read and
    /// not consumed. None if there was no such upgrade, or if a handler took the IO.
    pub(super) fn recover_declined(&self) -> Option<(UpgradableIo, Bytes)> {
        let upgraded = lock(&self.0.declined).take()?.now_or_never()?.ok()?;
        let parts = upgraded.downcast::<TokioIo<UpgradableIo>>().ok()?;
        Some((parts.io.into_inner(), parts.read_buf))
    }

    /// Must be called before hyper sends the response.
    pub(super) fn grant(&self, granted: Granted) {
        // A connection is upgraded at most once, so the cell is empty.
        let _ = self.0.granted.set(granted);
    }

    fn granted(&self) -> Option<&Granted> {
        self.0.granted.get()
    }

    /// The response to the replayed request does not continue the connection.
    pub(super) fn refuse(&self) {
        self.0.is_refused.store(true, Release);
    }

    /// The response to the replayed request continues the connection.
    pub(super) fn accept(&self) {
        self.0.is_continued.store(true, Release);
    }

    pub(super) fn is_continued(&self) -> bool {
        self.0.is_continued.load(Acquire)
    }

    /// The event stream continues in another process. Its body must not end here.
    fn hand_on(&self, replay: Replay) {
        *lock(&self.0.handed_on) = Some(replay);
    }

    /// The event stream that hyper has stopped sending, because it continues in another process.
    pub(super) fn take_handed_on(&self) -> Option<Replay> {
        lock(&self.0.handed_on).take()
    }

    /// Withholds input from hyper in every phase. The driver sets this while it shuts hyper down; otherwise hyper could answer
    /// a request that has just arrived, and close the connection.
    pub(super) fn withhold_input(&self, withholds: bool) {
        self.0.withholds_input.store(withholds, Release);
    }

    pub(super) fn is_refused(&self) -> bool {
        self.0.is_refused.load(Acquire)
    }
}

/// The IO of an HTTP/1.1 connection, which a handler may take over.
pub(super) struct UpgradableIo {
    /// Present until the connection is taken apart.
    io: Option<Io>,
    upgrade: Upgrade,
    /// Present until the response to a replayed request is discarded.
    replay: Option<Replaying>,
    /// Present once a WebSocket was granted to a handler that has a `Carry`.
    frames: Option<Box<Frames>>,
    /// The last bytes that hyper has read.
    last_read: [u8; BLANK_LINE.len()],
}

/// The exchange that the client does not see.
struct Replaying {
    /// What hyper has not read of the request's head.
    request: Bytes,
    response: ResponseHead,
}

/// The frames of a WebSocket.
#[derive(Default)]
struct Frames {
    inbound: Inbound,
    outbound: Outbound,
    /// Bytes that were read together with a frame, and belong to later frames.
    excess: Bytes,
    /// Present until the head of the response is written, which precedes the first frame.
    response: Option<ResponseHead>,
}

impl UpgradableIo {
    /// `replay`: the head of the request that began the connection in another process.
    pub(super) fn new(io: Io, upgrade: Upgrade, replay: Option<Bytes>) -> Self {
        let replay = replay.map(|request| Replaying { request, response: ResponseHead::default() });
        Self { io: Some(io), upgrade, replay, frames: None, last_read: [0; BLANK_LINE.len()] }
    }

    pub(super) fn into_io(mut self) -> Io {
        self.io.take().expect("the IO is present until it is taken apart")
    }

    fn io(&mut self) -> Pin<&mut Io> {
        Pin::new(self.io.as_mut().expect("the IO is present until it is taken apart"))
    }

    /// Reads for a handler that has a `Carry`. See [`Inbound::admit`] for how much of a WebSocket.
    fn poll_read_upgraded(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io: Some(io), upgrade, frames, .. } = self else { return Poll::Pending };
        let Some(Granted { is_websocket: true, continuation, .. }) = upgrade.granted() else {
            return Pin::new(io).poll_read(cx, into);
        };
        // Present, because the response was written before.
        let Some(frames) = frames else { return Poll::Pending };
        let is_passing = frames.inbound.is_passing();
        if !is_passing {
            continuation.reads_again();
        }
        let before = into.filled().len();
        let polled = if frames.excess.has_remaining() {
            let length = frames.excess.len().min(into.remaining());
            into.put_slice(&frames.excess.split_to(length));
            Poll::Ready(Ok(()))
        } else {
            Pin::new(&mut *io).poll_read(cx, into)
        };
        let read = &into.filled()[before..];
        if read.is_empty() {
            return polled;
        }
        let reading = if continuation.may_read_ahead() { Reading::Ahead } else { Reading::OneFrame };
        // If the handler's buffer has room for more, nothing else has arrived.
        let is_full = into.remaining() == 0;
        let queued = || if is_full && !is_passing { io.queued() } else { 0 };
        let admitted = frames.inbound.admit(read, reading, queued);
        if admitted.frames > 1 || frames.inbound.is_passing() {
            continuation.read_ahead();
        }
        if admitted.length < read.len() {
            frames.excess =
                join(Bytes::copy_from_slice(&read[admitted.length..]), std::mem::take(&mut frames.excess));
            into.set_filled(before + admitted.length);
        }
        polled
    }

    /// Records what a handler has written.
    fn wrote(&mut self, mut bytes: &[u8]) {
        if self.upgrade.granted().is_none_or(|granted| !granted.is_websocket) {
            return;
        }
        let begun = || Box::new(Frames { response: Some(ResponseHead::default()), ..Frames::default() });
        let frames = self.frames.get_or_insert_with(begun);
        if let Some(head) = &mut frames.response {
            let (length, is_complete) = head.length_in(bytes);
            bytes = &bytes[length..];
            if is_complete {
                frames.response = None;
            }
        }
        if frames.outbound.wrote(bytes) {
            frames.inbound.answered();
        }
    }
}

impl Replaying {
    /// Reads of the replayed head. Nothing follows it until its response is discarded, because what the client sends
    /// next is for the handler.
    fn poll_read(&mut self, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.request.is_empty() {
            return Poll::Pending;
        }
        let length = self.request.len().min(into.remaining());
        into.put_slice(&self.request.split_to(length));
        Poll::Ready(Ok(()))
    }
}

/// The head of a response while it is written.
#[derive(Default)]
struct ResponseHead(Vec<u8>);

impl ResponseHead {
    /// How many of the `bytes`, which are written next, belong to the head, and whether it ends with them.
    fn length_in(&mut self, bytes: &[u8]) -> (usize, bool) {
        let before = self.0.len();
        self.0.extend_from_slice(bytes);
        // The blank line may have begun in the bytes before.
        let from = before.saturating_sub(BLANK_LINE.len() - 1);
        match memchr::memmem::find(&self.0[from..], BLANK_LINE) {
            Some(at) => (from + at + BLANK_LINE.len() - before, true),
            None => (bytes.len(), false),
        }
    }
}

impl AsyncRead for UpgradableIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.upgrade.0.withholds_input.load(Acquire) {
            return Poll::Pending;
        }
        if let Some(replay) = &mut this.replay {
            return replay.poll_read(into);
        }
        if this.upgrade.granted().is_some() {
            return this.poll_read_upgraded(cx, into);
        }
        let before = into.filled().len();
        std::task::ready!(this.io().poll_read(cx, into))?;
        let read = &into.filled()[before..];
        if let Some(last) = read.last_chunk() {
            this.last_read = *last;
        } else {
            this.last_read.rotate_left(read.len());
            this.last_read[BLANK_LINE.len() - read.len()..].copy_from_slice(read);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for UpgradableIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.upgrade.is_refused() {
            // The client must not receive the response. With an error hyper leaves the connection to the driver, which
            // closes it. After a whole response hyper could end it, and would give it to the handler whose upgrade is
            // refused.
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Some(replay) = &mut this.replay {
            let (discarded, is_complete) = replay.response.length_in(bytes);
            if is_complete {
                this.replay = None;
                // Until now hyper has read only the replayed head, not the socket. If hyper waits for input now, no event of
                // the socket would wake it, so with TLS hyper would not notice that the client disconnects.
                cx.waker().wake_by_ref();
                this.last_read = *BLANK_LINE;
                let is_websocket = this.upgrade.granted().is_some_and(|granted| granted.is_websocket);
                this.frames = is_websocket.then(Box::default);
            }
            return Poll::Ready(Ok(discarded));
        }
        let written = std::task::ready!(this.io().poll_write(cx, bytes))?;
        this.wrote(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.replay.is_none() && self.upgrade.granted().is_none() {
            return self.io().poll_write_vectored(cx, slices);
        }
        let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&[][..], |slice| slice);
        self.poll_write(cx, first)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.as_ref().is_some_and(Io::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_shutdown(cx)
    }
}

impl Drop for UpgradableIo {
    /// A handler has dropped the upgraded connection. If it was asked to hand it on, or has left its state, the server
    /// takes it back.
    fn drop(&mut self) {
        let (Some(io), Some(granted)) = (self.io.take(), self.upgrade.granted()) else { return };
        if !granted.continuation.has_ended() {
            return;
        }
        // If hyper has read more than the head of the request, the handler has read the remainder before `Frames`
        // could follow it. If it has returned before it consumed all messages, these are lost.
        let is_followed = self.last_read == *BLANK_LINE && !granted.continuation.has_unconsumed();
        let frames = self.frames.take().map(|frames| *frames);
        granted.return_path.send(ReturnedConnection::new(io, granted, frames, is_followed));
    }
}
