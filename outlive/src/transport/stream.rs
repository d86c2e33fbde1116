//! A connection: its socket at rest, and the stream that it is while it is served. TCP or Unix.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrAny};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::transport::http2_state::Http2State;
use crate::transport::listener_name::Name;
use crate::transport::tls_traffic::TlsTrafficState;

/// A connection with what it takes to go on with it, here or in the next process: at rest a socket, which is
/// nobody's business but the kernel's; served, a [`Stream`].
pub struct Connection<S = OwnedFd> {
    pub socket: S,
    /// Of the listener that it came from.
    pub listener: Name,
    /// What was read from it and not consumed.
    pub unread: Bytes,
    /// Where it speaks HTTP/2: what its two ends have agreed upon.
    pub http2: Option<Box<Http2State>>,
    /// Where it speaks TLS, and has shaken hands.
    pub tls: Option<Box<TlsTrafficState>>,
}

impl Connection {
    /// Whether every release knows how to go on with it.
    pub fn is_plain_http1(&self) -> bool {
        self.http2.is_none() && self.tls.is_none()
    }

    /// To be served, in the runtime that this is called in; and its peer. Fails where that is gone.
    pub fn watched(self) -> io::Result<(Connection<Stream>, Peer)> {
        let Self { socket, listener, unread, http2, tls } = self;
        // It may have been another process's.
        rustix::io::ioctl_fionbio(&socket, true)?;
        let peer = Peer::at(rustix::net::getpeername(&socket)?)?;
        Ok((Connection { socket: Stream::new(socket, peer)?, listener, unread, http2, tls }, peer))
    }
}

impl Connection<Stream> {
    /// One of which nothing has come yet.
    pub fn begun(stream: Stream, listener: Name) -> Self {
        Self { socket: stream, listener, unread: Bytes::new(), http2: None, tls: None }
    }

    /// Comes to rest: the runtime forgets it.
    pub fn unwatched(self) -> io::Result<Connection> {
        let Self { socket, listener, unread, http2, tls } = self;
        Ok(Connection { socket: socket.into_socket()?, listener, unread, http2, tls })
    }
}

pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Who is at the other end of a connection. A handler takes it as an argument.
///
/// ```
/// use outlive::Peer;
///
/// async fn who(peer: Peer) -> String {
///     format!("you are {peer}\n")
/// }
/// # let _: axum::Router = axum::Router::new().route("/", axum::routing::get(who));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A client by TCP; an IPv4 address is shown as such, whatever socket it came in by.
    Tcp(SocketAddr),
    /// A client on this machine, by a Unix socket.
    Unix,
}

impl Peer {
    /// Whoever is at the address that `getpeername(2)` or `accept(2)` gave.
    pub(crate) fn at(address: Option<SocketAddrAny>) -> io::Result<Self> {
        let address = address.ok_or(io::ErrorKind::NotConnected)?;
        match SocketAddr::try_from(address.clone()) {
            Ok(address) => Ok(Self::Tcp(SocketAddr::new(address.ip().to_canonical(), address.port()))),
            Err(_) if address.address_family() == AddressFamily::UNIX => Ok(Self::Unix),
            Err(error) => Err(error.into()),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

impl Stream {
    /// A connected socket that does not block.
    pub fn new(socket: OwnedFd, peer: Peer) -> io::Result<Self> {
        Ok(match peer {
            Peer::Tcp(_) => Self::Tcp(TcpStream::from_std(socket.into())?),
            Peer::Unix => Self::Unix(UnixStream::from_std(socket.into())?),
        })
    }

    fn into_socket(self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(stream) => stream.into_std()?.into(),
            Self::Unix(stream) => stream.into_std()?.into(),
        })
    }

    /// Looks at what has arrived without taking it, once that is `enough` or the peer will send no more.
    /// Ready with 0 at the end of the stream.
    pub fn poll_peek(
        &self,
        cx: &mut Context<'_>,
        into: &mut [u8],
        enough: impl Fn(&[u8]) -> bool,
    ) -> Poll<io::Result<usize>> {
        loop {
            std::task::ready!(match self {
                Self::Tcp(stream) => stream.poll_read_ready(cx),
                Self::Unix(stream) => stream.poll_read_ready(cx),
            })?;
            // "Not enough" is said as WouldBlock inside try_io: what arrives meanwhile wakes us all the same.
            let peeked = self.try_read_io(|fd| {
                let (length, _) = rustix::net::recv(fd, &mut *into, RecvFlags::PEEK)?;
                if length == 0 || enough(&into[..length]) || sends_no_more(fd)? {
                    Ok(length)
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                }
            });
            match peeked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn try_read_io<R>(&self, read: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<R> {
        match self {
            Self::Tcp(stream) => stream.try_io(Interest::READABLE, || read(stream.as_fd())),
            Self::Unix(stream) => stream.try_io(Interest::READABLE, || read(stream.as_fd())),
        }
    }
}

fn sends_no_more(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(&fd, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR))
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, into),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
