//! [`Stream`], a TCP or Unix socket that the runtime watches, and [`Peer`], the address of its other end.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketAddrAny};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// Slices of at most so many bytes in total are copied into one, because `send` with one slice takes 0.2 µs less than
/// `writev` with two. That is 3 % of the time of a small request, and more than the copy takes.
const COPIED_LIMIT: usize = 1024;

pub struct Stream {
    /// Present until [`Stream::into_socket`] takes it.
    socket: Option<Socket>,
    has_duplicate: bool,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The client of a request or connection. A handler takes it as an argument.
///
/// It is the other end of the connection. If that is one of `--trusted-proxies`, it is the client that the proxy reports: in
/// a PROXY header on the listeners of `--proxy-protocol`, or for each request in the field of `--forwarded-header`. The port
/// is 0 if the proxy reports none.
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
    /// A client that is connected over TCP. An IPv4 client of an IPv6 socket has its IPv4 address here, and not the
    /// IPv4-mapped one.
    Tcp(SocketAddr),
    /// A client on this machine that is connected over a Unix socket.
    Unix,
}

impl Peer {
    /// An IPv4-mapped address becomes the IPv4 address.
    pub(crate) fn tcp(ip: IpAddr, port: u16) -> Self {
        Self::Tcp(SocketAddr::new(ip.to_canonical(), port))
    }

    /// The peer at an address from `getpeername(2)` or `accept(2)`.
    pub(crate) fn at(address: Option<SocketAddrAny>) -> io::Result<Self> {
        let address = address.ok_or(io::ErrorKind::NotConnected)?;
        match SocketAddr::try_from(address.clone()) {
            Ok(address) => Ok(Self::tcp(address.ip(), address.port())),
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
    /// Registers a connected, non-blocking socket with the current runtime. `has_duplicate`: see
    /// [`Stream::has_duplicate`].
    pub fn new(socket: OwnedFd, peer: Peer, has_duplicate: bool) -> io::Result<Self> {
        let socket = match peer {
            Peer::Tcp(_) => Socket::Tcp(TcpStream::from_std(socket.into())?),
            Peer::Unix => Socket::Unix(UnixStream::from_std(socket.into())?),
        };
        Ok(Self { socket: Some(socket), has_duplicate })
    }

    /// Whether systemd's store may have a duplicate of the socket (`handover/backup.rs`). To close the socket would then not
    /// close the connection, so it is shut down first.
    pub fn has_duplicate(&self) -> bool {
        self.has_duplicate
    }

    /// Deregisters the socket from the runtime.
    pub fn into_socket(mut self) -> io::Result<OwnedFd> {
        Ok(match self.socket.take() {
            Some(Socket::Tcp(stream)) => stream.into_std()?.into(),
            Some(Socket::Unix(stream)) => stream.into_std()?.into(),
            None => return Err(io::ErrorKind::NotConnected.into()),
        })
    }

    fn socket(&self) -> &Socket {
        self.socket.as_ref().expect("the socket is present until it is taken")
    }

    fn socket_mut(&mut self) -> &mut Socket {
        self.socket.as_mut().expect("the socket is present until it is taken")
    }

    /// Peeks at the bytes that have arrived, without consuming them. Ready when they are `enough` or the peer sends no
    /// more; ready with 0 at the end of the stream.
    pub fn poll_peek(
        &self,
        cx: &mut Context<'_>,
        into: &mut [u8],
        enough: impl Fn(&[u8]) -> bool,
    ) -> Poll<io::Result<usize>> {
        loop {
            std::task::ready!(match self.socket() {
                Socket::Tcp(stream) => stream.poll_read_ready(cx),
                Socket::Unix(stream) => stream.poll_read_ready(cx),
            })?;
            // The closure returns WouldBlock if the bytes are not enough. `try_io` then clears the readiness, so that
            // this task sleeps until more bytes arrive instead of polling in a loop. A byte that arrives in between is
            // not missed, because `try_io` clears only the readiness that it has seen.
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

    /// Consumes `length` bytes that have arrived, as [`Stream::poll_peek`] has shown.
    pub fn consume(&self, length: usize) -> io::Result<()> {
        let mut bytes = vec![0; length];
        let (read, _) = rustix::net::recv(self, &mut bytes[..], RecvFlags::DONTWAIT)?;
        if read == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// How many bytes have arrived and are not read; 0 if that is unknown (`FIONREAD` in ioctl_tty(2)).
    pub fn queued(&self) -> u64 {
        rustix::io::ioctl_fionread(self).unwrap_or_default()
    }

    fn try_read_io<R>(&self, read: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<R> {
        match self.socket() {
            Socket::Tcp(stream) => stream.try_io(Interest::READABLE, || read(stream.as_fd())),
            Socket::Unix(stream) => stream.try_io(Interest::READABLE, || read(stream.as_fd())),
        }
    }
}

fn sends_no_more(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(&fd, PollFlags::RDHUP)];
    retry_on_intr(|| poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))?;
    Ok(polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR))
}

#[cfg(test)]
impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self { socket: Some(Socket::Tcp(stream)), has_duplicate: false }
    }
}

#[cfg(test)]
impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self { socket: Some(Socket::Unix(stream)), has_duplicate: false }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.has_duplicate
            && let Some(socket) = &self.socket
        {
            // An error means that the peer has disconnected.
            let _ = match socket {
                Socket::Tcp(stream) => rustix::net::shutdown(stream, Shutdown::Both),
                Socket::Unix(stream) => rustix::net::shutdown(stream, Shutdown::Both),
            };
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self.socket() {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().socket_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, into),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut().socket_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // h2 often passes one slice, for which `writev` takes as long as for two.
        if let [only] = slices {
            return self.poll_write(cx, only);
        }
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        if length <= COPIED_LIMIT {
            let mut joined = [MaybeUninit::uninit(); COPIED_LIMIT];
            let mut joined = ReadBuf::uninit(&mut joined);
            for slice in slices {
                joined.put_slice(slice);
            }
            return self.poll_write(cx, joined.filled());
        }
        match self.get_mut().socket_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().socket_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().socket_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
