//! The sockets that an application claims by their names, and [`SocketStream`], a connection of such a socket.
//!
//! `listeners/named.rs` has the sockets, and `connection/socket.rs` serves the connections of [`Setup::serve`].
//!
//! [`Setup::serve`]: super::setup::Setup::serve

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use crate::app::carry::Continuation;
use crate::transport::stream::Peer;

/// What an application expects of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    TcpListener,
    UnixListener,
    UdpSocket,
    UnixDatagram,
    /// Any file descriptor that systemd can pass.
    Any,
}

/// The sockets that this process has for the application.
pub trait SocketSource: Send + Sync {
    /// Takes the socket called `name`. Fails if there is not exactly one, or if it is of another kind.
    fn claim(&self, name: &str, kind: SocketKind) -> anyhow::Result<OwnedFd>;

    /// Takes all sockets called `name`, for the library to accept connections from. Fails if there are none, or if one of
    /// them is not a listening stream socket.
    fn claim_listeners(&self, name: &str) -> anyhow::Result<()>;

    /// The names of all sockets, in alphabetical order.
    fn names(&self) -> Vec<String>;
}

/// Serves one connection of a socket. Its error is logged.
pub type SocketHandler = Arc<
    dyn Fn(SocketStream, Arc<Continuation>, CancellationToken) -> BoxFuture<'static, anyhow::Result<()>>
        + Send
        + Sync,
>;

/// A byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

/// The owner of what a [`SocketStream`] reads and writes.
pub trait SocketIo: Send {
    fn io(&mut self) -> Pin<&mut dyn Duplex>;
}

/// A TCP or Unix connection that was accepted from a socket of [`Setup::serve`](crate::Setup::serve).
///
/// A write fails with [`TimedOut`](io::ErrorKind::TimedOut) if the peer reads nothing for `--request-timeout`. Reads have
/// no time limit. When the stream is dropped, the peer receives everything that was written, and the connection is closed
/// unless the handler has called [`Carry::hand_on`](crate::Carry::hand_on).
pub struct SocketStream {
    io: Box<dyn SocketIo>,
    peer: Peer,
}

impl SocketStream {
    pub(crate) fn new(io: impl SocketIo + 'static, peer: Peer) -> Self {
        Self { io: Box::new(io), peer }
    }

    /// The address of the other end.
    ///
    /// ```
    /// # async fn handle(stream: outlive::SocketStream) {
    /// tracing::info!(peer = %stream.peer(), "a device has connected");
    /// # }
    /// ```
    pub fn peer(&self) -> Peer {
        self.peer
    }
}

impl fmt::Debug for SocketStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl AsyncRead for SocketStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io.io().poll_read(cx, into)
    }
}

impl AsyncWrite for SocketStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.io.io().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io.io().poll_write_vectored(cx, slices)
    }

    /// True, because the IO is a socket without TLS.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.io().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.io().poll_shutdown(cx)
    }
}
