//! A connection's stream as hyper reads and writes it, reporting to the registry what passes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::Protocol;
use crate::registry::{Entry, Phase, Registration, Stage};
use crate::stream::Stream;

/// How much a peer may still send while we wait for it to take our last answer, in bytes.
const DISCARD_LIMIT: usize = 256 * 1024;

pub(super) struct Io {
    stream: Stream,
    /// Bytes that came with the connection, read before any others.
    unread: Bytes,
    registration: Registration,
    protocol: Protocol,
}

impl Io {
    pub(super) fn new(stream: Stream, unread: Bytes, registration: Registration, protocol: Protocol) -> Self {
        Self { stream, unread, registration, protocol }
    }

    pub(super) fn into_parts(self) -> (Stream, Registration) {
        (self.stream, self.registration)
    }

    fn entry(&self) -> &Entry {
        &self.registration.entry
    }

    /// Ends the connection so that the peer gets the last answer whole: closing with unread bytes
    /// in the socket would reset it (RFC 9112 section 9.6). Bounded by the registry's close limit.
    pub(super) async fn close(mut self) {
        self.entry().set_stage(Stage::Closing);
        if self.stream.shutdown().await.is_err() {
            return;
        }
        let mut discard = [0; 4096];
        let mut left = DISCARD_LIMIT;
        while left > 0 {
            let read = std::future::poll_fn(|cx| {
                self.registration.entry.wake_on_change(cx);
                let mut into = ReadBuf::new(&mut discard);
                match Pin::new(&mut self.stream).poll_read(cx, &mut into) {
                    Poll::Ready(Ok(())) => Poll::Ready(into.filled().len()),
                    Poll::Ready(Err(_)) => Poll::Ready(0),
                    Poll::Pending if self.registration.entry.is_overdue() => Poll::Ready(0),
                    Poll::Pending => Poll::Pending,
                }
            });
            match read.await {
                0 => return,
                length => left = left.saturating_sub(length),
            }
        }
    }

    /// Answers a request whose head did not come in time, and closes.
    pub(super) async fn refuse(mut self) {
        const TIMEOUT: &[u8] =
            b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        // A fresh socket buffer takes it at once; where it does not, the peer does not read anyway.
        if self.stream.write(TIMEOUT).await.is_ok() {
            self.close().await;
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let entry = &this.registration.entry;
        // The next request belongs to the next process; the body of one that has begun does not.
        // The driver is woken when the phase changes, and reads again then.
        let held = entry.phase() == Phase::Resting && entry.is_movable() && !entry.is_reading();
        if held {
            return Poll::Pending;
        }
        if this.unread.has_remaining() {
            let length = this.unread.remaining().min(into.remaining());
            into.put_slice(&this.unread.split_to(length));
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        std::task::ready!(Pin::new(&mut this.stream).poll_read(cx, into))?;
        if this.protocol == Protocol::Http1 && into.filled().len() > before {
            entry.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.entry().writing();
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if written.is_ready() {
            self.entry().wrote();
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.entry().writing();
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        if written.is_ready() {
            self.entry().wrote();
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes when all that it had to send has been written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            self.entry().flushed();
        }
        flushed
    }

    /// hyper's way to say that it is done. The drivers close the stream themselves (`close`), or hand it
    /// over; an upgraded one belongs to its handler.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.entry().stage() {
            Stage::Upgraded => Pin::new(&mut self.stream).poll_shutdown(cx),
            _ => Poll::Ready(Ok(())),
        }
    }
}
