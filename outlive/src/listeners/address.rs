//! Addresses that this process binds itself: `--listen`, parsed as [`Listen`].

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, ensure};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Listener, ListeningSocket, NamedSocket, Ownership, SocketFile, SocketFiles, abstract_name};
use crate::app::sockets::SocketKind;
use crate::transport::listener_name::{ListenerRole, Name};

/// The address of a process that inherits no listener and has no `--listen`.
const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// The maximum length of the accept queue (listen(2)); the kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// An address to bind, and the listener's name: `127.0.0.1:8080`, `https=127.0.0.1:8443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    name: Name,
    address: Address,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_name = |start: &str| start.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        let (name, address) = match text.split_once('=') {
            Some((name, address)) if is_name(name) => {
                (name.parse().map_err(|error: anyhow::Error| error.to_string())?, address)
            }
            _ => (Name::default(), text),
        };
        Ok(Self { name, address: address.parse()? })
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self { name: Name::default(), address: Address::Tcp(DEFAULT_ADDRESS) }
    }
}

impl Listen {
    pub fn name(&self) -> &Name {
        &self.name
    }

    pub fn role(&self) -> ListenerRole {
        self.name.role()
    }

    /// An address that is free on each machine, for a check without the socket of the unit.
    pub fn substitute(name: Name, kind: SocketKind) -> Self {
        let address = match kind {
            SocketKind::TcpListener | SocketKind::UdpSocket | SocketKind::Any => {
                Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0))
            }
            SocketKind::UnixListener | SocketKind::UnixDatagram => {
                Address::Abstract(format!("{name}-{}", std::process::id()))
            }
        };
        Self { name, address }
    }

    pub fn bind(&self, files: &SocketFiles) -> anyhow::Result<Listener> {
        let (socket, path) = self.address.bind(Type::STREAM, files)?;
        let socket = match self.address {
            Address::Tcp(_) => ListeningSocket::Tcp(socket.into()),
            Address::Path(_) | Address::Abstract(_) => ListeningSocket::Unix(socket.into()),
        };
        Ok(Listener { name: self.name.clone(), socket, ownership: Ownership::Bound(path) })
    }

    /// Binds a socket that the application claims.
    pub fn bind_as(&self, kind: SocketKind, files: &SocketFiles) -> anyhow::Result<NamedSocket> {
        let kind = match kind {
            SocketKind::UdpSocket | SocketKind::UnixDatagram => Type::DGRAM,
            SocketKind::TcpListener | SocketKind::UnixListener | SocketKind::Any => Type::STREAM,
        };
        let (socket, path) = self.address.bind(kind, files)?;
        Ok(NamedSocket { name: self.name.clone(), fd: socket.into(), ownership: Ownership::Bound(path) })
    }

    /// Whether `listener` has this name, and this address or one that the kernel chose for it (port 0).
    pub fn is_that_of(&self, listener: &Listener) -> bool {
        self.name == listener.name
            && match (&self.address, &listener.socket) {
                (Address::Tcp(ours), ListeningSocket::Tcp(socket)) => {
                    socket.local_addr().is_ok_and(|theirs| {
                        let is_chosen = ours.port() == 0 || ours.port() == theirs.port();
                        is_chosen && ours.ip() == theirs.ip()
                    })
                }
                (Address::Path(path), ListeningSocket::Unix(socket)) => {
                    socket.local_addr().is_ok_and(|address| address.as_pathname() == Some(path))
                }
                (Address::Abstract(name), ListeningSocket::Unix(socket)) => {
                    socket.local_addr().is_ok_and(|address| abstract_name(&address).as_ref() == Some(name))
                }
                _ => false,
            }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name != Name::default() {
            write!(f, "{}=", self.name)?;
        }
        self.address.fmt(f)
    }
}

/// An address to bind.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Address {
    Tcp(SocketAddr),
    Path(PathBuf),
    Abstract(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text));
        match path {
            Some("" | "@") => Err("expected a path or @name after unix:".into()),
            Some(path) => Ok(match path.strip_prefix('@') {
                Some(name) => Self::Abstract(name.to_owned()),
                None => Self::Path(path.into()),
            }),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                if has_invalid_port(text) {
                    return "expected a port from 0 to 65535".into();
                }
                "expected an address such as 127.0.0.1:8080, [::1]:8080, /run/x.sock or unix:@name".into()
            }),
        }
    }
}

/// Whether a TCP address is valid except for its port.
fn has_invalid_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(ip, port)| {
        port.parse::<u16>().is_err() && format!("{ip}:0").parse::<SocketAddr>().is_ok()
    })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

impl Address {
    fn bind(&self, kind: Type, files: &SocketFiles) -> anyhow::Result<(Socket, Option<SocketFile>)> {
        self.try_bind(kind, files).with_context(|| format!("could not listen on {self}"))
    }

    fn try_bind(&self, kind: Type, files: &SocketFiles) -> anyhow::Result<(Socket, Option<SocketFile>)> {
        match self {
            Self::Tcp(address) => {
                let socket = Socket::new(Domain::for_address(*address), kind, None)?;
                // Not for datagrams, because a second process could then take them away from the first one.
                if kind == Type::STREAM {
                    socket.set_reuse_address(true)?;
                }
                Ok((listen(socket, kind, &(*address).into())?, None))
            }
            Self::Path(path) => {
                remove_if_stale(path, kind)?;
                let socket = Socket::new(Domain::UNIX, kind, None)?;
                let socket = listen(socket, kind, &unix_address(path)?)?;
                Ok((socket, Some(files.add(path.clone()))))
            }
            Self::Abstract(name) => {
                let socket = Socket::new(Domain::UNIX, kind, None)?;
                Ok((listen(socket, kind, &unix_address(format!("\0{name}"))?)?, None))
            }
        }
    }
}

fn unix_address(path: impl AsRef<Path>) -> anyhow::Result<SockAddr> {
    let length = path.as_ref().as_os_str().len();
    SockAddr::unix(path)
        .with_context(|| format!("the path or name has {length} bytes: use one of at most 107"))
}

fn listen(socket: Socket, kind: Type, address: &SockAddr) -> io::Result<Socket> {
    socket.bind(address)?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Removes the socket file at `path` if no process has the socket, for example after a crash. Otherwise `bind` would
/// fail with `EADDRINUSE` from then on.
///
/// # Errors
///
/// If the file is not a socket. connect(2) refuses connections to such a file, too.
fn remove_if_stale(path: &Path, kind: Type) -> anyhow::Result<()> {
    let Ok(file) = std::fs::metadata(path) else { return Ok(()) };
    ensure!(
        file.file_type().is_socket(),
        "a file that is not a socket exists there: remove it or choose another path"
    );
    let socket = Socket::new(Domain::UNIX, kind, None)?;
    // Otherwise `connect` would wait for ever if the queue of the listener is full, because its process hangs.
    socket.set_nonblocking(true)?;
    let connected = socket.connect(&unix_address(path)?);
    if connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        // If it cannot be removed, `bind` returns the error.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn addresses_are_displayed_as_they_are_parsed() {
        for text in ["127.0.0.1:8080", "[::1]:8080", "/run/x.sock", "unix:@x"] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
        assert_eq!("unix:/run/x.sock".parse(), Ok(Address::Path("/run/x.sock".into())));
        for text in ["", "8080", "localhost:x", "unix:", "unix:@", "127.0.0.1:99999"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        for (text, expected) in [
            ("127.0.0.1:99999", "a port from 0 to 65535"),
            ("[::1]:x", "a port from 0 to 65535"),
            ("localhost:99999", "an address such as"),
            ("127.0.0.1", "an address such as"),
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert!(error.starts_with(&format!("expected {expected}")), "{text}: {error}");
        }
    }

    #[test]
    fn inherited_listener_has_the_address_that_it_was_bound_to_or_a_port_that_was_chosen_for_it() {
        let files = SocketFiles::owned();
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let path = format!("admin={}", folder.path().join("x.sock").display());
        let name = format!("unix:@{}", folder.path().display());
        for text in ["127.0.0.1:0", &path, &name] {
            let listen: Listen = text.parse().expect(text);
            assert_eq!(listen.to_string(), text);
            let listener = listen.bind(&files).expect("the address can be bound");
            assert!(listen.is_that_of(&listener), "{text}");
            for other in ["127.0.0.2:0", "127.0.0.1:1", "https=127.0.0.1:0", "/x.sock", "unix:@x"] {
                assert!(!other.parse::<Listen>().expect(other).is_that_of(&listener), "{text}: {other}");
            }
        }
    }

    #[test]
    fn address_may_have_a_name_prefix() {
        let read = |text: &str| {
            text.parse().map(|Listen { name, address }| (name.as_str().to_owned(), address.to_string()))
        };
        let pair = |name: &str, address: &str| Ok((name.to_owned(), address.to_owned()));
        assert_eq!(read("127.0.0.1:80"), pair("http", "127.0.0.1:80"));
        assert_eq!(read("https=[::1]:443"), pair("https", "[::1]:443"));
        assert_eq!(read("stats_d.2=127.0.0.1:80"), pair("stats_d.2", "127.0.0.1:80"));
        assert_eq!(read("admin=/run/a=b.sock"), pair("admin", "/run/a=b.sock"));
        assert_eq!(read("/run/a=b.sock"), pair("http", "/run/a=b.sock"));
        assert!(
            read("connections=127.0.0.1:80")
                .is_err_and(|error| error.contains("invalid socket name \"connections\""))
        );
        assert!(read("https=").is_err() && read("=127.0.0.1:80").is_err());
    }

    #[test]
    fn socket_file_of_another_process_at_the_same_path_is_not_removed() {
        let files = SocketFiles::owned();
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let path = folder.path().join("x.sock");
        let address = Address::Path(path.clone());
        let (_ours, bound) = address.bind(Type::STREAM, &files).expect("the path can be bound");
        std::fs::remove_file(&path).expect("the file can be removed");
        let (_other, other) = address.bind(Type::STREAM, &files).expect("the path can be bound again");
        drop(bound);
        assert!(UnixStream::connect(&path).is_ok(), "the file of the other process was removed");
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    fn bind_to_the_path_of_a_file_fails_and_keeps_the_file() {
        let files = SocketFiles::owned();
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let path = folder.path().join("orders.db");
        std::fs::write(&path, "data").expect("the file can be written");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("the link can be made");
        for path in [path, link] {
            for kind in [Type::STREAM, Type::DGRAM] {
                let bound = Address::Path(path.clone()).bind(kind, &files);
                let error = format!("{:#}", bound.err().expect("the file is not a socket"));
                assert!(error.contains("a file that is not a socket exists there"), "{error}");
                assert_eq!(std::fs::read_to_string(&path).expect("the file is still there"), "data");
            }
        }
    }

    /// The process that has the socket accepts no connections, for example because it is stopped.
    #[test]
    fn bind_to_the_path_of_a_listener_with_a_full_queue_fails_at_once() {
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let path = folder.path().join("x.sock");
        let at = unix_address(&path).expect("the path is short");
        let new = || Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket is made");
        let listener = new();
        listener.bind(&at).expect("the path can be bound");
        listener.listen(0).expect("the socket listens");
        let mut waiting = Vec::new();
        loop {
            let client = new();
            client.set_nonblocking(true).expect("the option is set");
            if client.connect(&at).is_err() {
                break;
            }
            waiting.push(client);
        }
        let (result, bound) = mpsc::channel();
        let address = Address::Path(path.clone());
        std::thread::spawn(move || result.send(address.bind(Type::STREAM, &SocketFiles::owned()).err()));
        let error = bound.recv_timeout(Duration::from_secs(60)).expect("bind does not wait for the process");
        let error = format!("{:#}", error.expect("the path is in use"));
        assert!(error.contains("Address already in use") && path.exists(), "{error}");
    }

    #[test]
    fn error_for_a_path_that_is_too_long_names_the_path() {
        let name = "x".repeat(200);
        for text in [format!("/tmp/{name}"), format!("unix:@{name}")] {
            let address: Address = text.parse().expect("it is an address");
            let error = address.bind(Type::STREAM, &SocketFiles::owned()).err().expect("it is too long");
            assert!(format!("{error:#}").contains(&text), "{error:#}");
        }
    }

    #[test]
    fn error_of_a_socket_that_cannot_be_made_names_the_address() {
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        for text in ["127.0.0.1:0", "[::1]:0", &format!("{}/x.sock", folder.path().display()), "unix:@x"] {
            let address: Address = text.parse().expect("it is an address");
            // The kernel has no such type of sockets.
            let bound = address.bind(Type::from(99), &SocketFiles::owned());
            let error = bound.err().expect("there is no such socket");
            assert!(format!("{error:#}").starts_with(&format!("could not listen on {text}: ")), "{error:#}");
        }
    }

    #[test]
    fn bind_to_a_path_in_use_fails_until_its_file_is_removed() {
        let files = SocketFiles::owned();
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let address = Address::Path(folder.path().join("x.sock"));
        let (_ours, bound) = address.bind(Type::STREAM, &files).expect("the path can be bound");
        assert!(address.bind(Type::STREAM, &files).is_err(), "the path is in use");
        // The socket itself is still open.
        bound.as_ref().expect("the listener has a socket file").remove();
        let (_next, _file) = address.bind(Type::STREAM, &files).expect("the path can be bound again");
        drop(bound);
        assert!(address.bind(Type::STREAM, &files).is_err(), "the file of the next process was removed");
    }
}
