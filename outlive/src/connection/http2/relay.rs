//! The IO that h2 reads and writes: the connection's `Io` with an `Interposer` in between.
//!
//! The driver shares it with hyper, so that it can control the interposer, and take the connection away from hyper when
//! it is quiescent.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::interposer::Interposer;
use crate::connection::io::Io;
use crate::os::lock::lock;

/// How many bytes h2 reads in one turn of its task while it catches up. A cancelled request has at least 23 bytes (HEADERS 10,
/// RST_STREAM 13), so h2 reads at most 20 of them in one turn, which is the number that it permits before it accepts them.
const TURN_LIMIT: usize = 20 * 23;

/// While so many bytes are unsent, h2 cannot write more.
const UNSENT_LIMIT: usize = 64 * 1024;

/// hyper has one clone, and the driver another. Both use the same connection.
#[derive(Clone)]
pub struct Relay {
    inner: Arc<Mutex<Option<Inner>>>,
    is_write_vectored: bool,
}

struct Inner {
    io: Io,
    interposer: Interposer,
    /// How many bytes h2 may still read in this turn, while it catches up.
    turn_left: usize,
}

impl Relay {
    pub fn new(io: Io, interposer: Interposer) -> Self {
        let is_write_vectored = io.is_write_vectored();
        Self {
            inner: Arc::new(Mutex::new(Some(Inner { io, interposer, turn_left: TURN_LIMIT }))),
            is_write_vectored,
        }
    }

    /// Takes the connection away from hyper, which then reads the end of the stream.
    pub fn take(&self) -> Option<(Io, Interposer)> {
        lock(&self.inner).take().map(|Inner { io, interposer, .. }| (io, interposer))
    }

    /// Permits h2 to read more while it catches up. The task of the connection calls this each time it is polled.
    pub fn begin_turn(&self) {
        if let Some(inner) = &mut *lock(&self.inner) {
            inner.turn_left = TURN_LIMIT;
        }
    }

    /// Calls `work` with the interposer. None after `take`.
    pub fn with<T>(&self, work: impl FnOnce(&mut Interposer) -> T) -> Option<T> {
        lock(&self.inner).as_mut().map(|inner| work(&mut inner.interposer))
    }

    fn poll<T>(&self, gone: T, poll: impl FnOnce(&mut Inner) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match lock(&self.inner).as_mut() {
            Some(inner) => poll(inner),
            None => Poll::Ready(Ok(gone)),
        }
    }
}

impl Inner {
    fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let is_catching_up = !self.interposer.catch_up().is_over();
            if is_catching_up && self.turn_left == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let for_h2 = self.interposer.for_h2();
            if !for_h2.is_empty() {
                let limit = if is_catching_up { self.turn_left } else { usize::MAX };
                let length = for_h2.len().min(into.remaining()).min(limit);
                into.put_slice(&for_h2[..length]);
                for_h2.advance(length);
                if for_h2.is_empty() {
                    // An idle connection keeps no buffer.
                    *for_h2 = BytesMut::new();
                }
                self.turn_left = self.turn_left.saturating_sub(length);
                self.interposer.catch_up().has_read(length);
                return Poll::Ready(Ok(()));
            }
            // Nothing is read from the client now. `rewrite` wakes h2 when the preamble is complete. In the other cases
            // the driver acts after this poll: it takes the connection away, or releases the held frames.
            if !self.interposer.is_begun() || self.interposer.is_quiescent() || self.interposer.is_full() {
                return Poll::Pending;
            }
            if is_catching_up {
                let Poll::Ready(result) = self.poll_piece(cx) else { return self.wait(cx) };
                if !result? {
                    self.interposer.catch_up().end();
                }
                continue;
            }
            let before = into.filled().len();
            let Poll::Ready(result) = Pin::new(&mut self.io).poll_read(cx, into) else {
                return self.wait(cx);
            };
            result?;
            let read = &into.filled()[before..];
            if read.is_empty() {
                self.interposer.release();
                if self.interposer.for_h2().is_empty() {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let passed = self.interposer.receive_in_place(read);
            into.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Waits for the client, because none of its bytes have arrived.
    fn wait<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        // A WINDOW_UPDATE of the client may have released frames that h2 considers sent and does not flush again.
        if !self.interposer.for_client().is_empty() {
            let _ = self.poll_flush(cx)?;
        }
        Poll::Pending
    }

    /// Reads at most [`TURN_LIMIT`] bytes of the client and passes them to the interposer. Ready with false at the end of the
    /// stream.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut piece = [0; TURN_LIMIT];
        let mut piece = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut piece))?;
        self.interposer.receive(piece.filled());
        Poll::Ready(Ok(!piece.filled().is_empty()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if !self.interposer.must_rewrite() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
            self.interposer.sent(&bytes[..written]);
            return Poll::Ready(Ok(written));
        }
        ready!(self.poll_room(cx))?;
        self.rewrite(cx, bytes);
        if self.interposer.has_too_much_waiting() {
            return Poll::Ready(Err(io::Error::other(
                "too many responses are queued: the client sends requests but no WINDOW_UPDATE for the connection",
            )));
        }
        let _ = self.poll_send(cx)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.interposer.must_rewrite() {
            let first = slices.iter().find(|slice| !slice.is_empty());
            return self.poll_write(cx, first.map_or(&[], |slice| slice));
        }
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices))?;
        let mut left = written;
        for slice in slices {
            let length = slice.len().min(left);
            self.interposer.sent(&slice[..length]);
            left -= length;
        }
        Poll::Ready(Ok(written))
    }

    fn rewrite(&mut self, cx: &Context<'_>, bytes: &[u8]) {
        let was_begun = self.interposer.is_begun();
        self.interposer.rewrite(bytes);
        if !self.interposer.for_h2().is_empty() || self.interposer.is_begun() != was_begun {
            // h2 has something to read, for which no event of the socket wakes it.
            cx.waker().wake_by_ref();
        }
    }

    /// Ready when h2 may write more.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.interposer.for_client().len() < UNSENT_LIMIT {
            Poll::Ready(Ok(()))
        } else {
            self.poll_send(cx)
        }
    }

    /// Ready when everything that the client's windows permit is written to the socket.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, interposer, .. } = self;
        let for_client = interposer.for_client();
        if for_client.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !for_client.is_empty() {
            let written = ready!(Pin::new(&mut *io).poll_write(cx, for_client))?;
            for_client.advance(written);
        }
        *for_client = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl AsyncRead for Relay {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll((), |inner| inner.poll_read(cx, into))
    }
}

impl AsyncWrite for Relay {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(bytes.len(), |inner| inner.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = slices.iter().map(|slice| slice.len()).sum();
        self.poll(all, |inner| inner.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.is_write_vectored
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll((), |inner| inner.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll((), |inner| inner.poll_shutdown(cx))
    }
}
