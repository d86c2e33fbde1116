//! The sockets that this process was born with, or else binds: the first source that has any wins.
//!
//! 1. `LISTEN_FDS`, `LISTEN_FDNAMES`: systemd, systemd-socket-activate, systemfd; `sd_listen_fds(3)`
//! 2. `SERVER_STARTER_PORT`: Server::Starter's `start_server`
//! 3. `--listen`, by default 127.0.0.1:8080 in a process that systemd did not start

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use listenfd::ListenFd;
use rustix::net::{AddressFamily, SocketType, sockopt};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::credentials::Credentials;
use crate::exit::{Failure, Result};
use crate::handover::{self, Record};
use crate::kind::{ListenerKind, Name};
use crate::sys;
use crate::systemd;

/// The address of a process that inherits no listener and has no `--listen`.
const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// Connections that may wait to be accepted, where the system allows as many (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Those that a reload passes on in one frame, with the folder of the credentials.
const MAX_LISTENERS: usize = handover::MAX_SOCKETS - 1;

/// Everything that came from outside at birth.
pub struct Inherited {
    pub listeners: Vec<Listener>,
    /// Where the predecessor left its connections; something else in the place of a channel is no reason
    /// not to start.
    pub channels: Vec<anyhow::Result<OwnedFd>>,
    pub credentials: Credentials,
    /// Which process in a row of restarts this is, where the one who started it counts them.
    pub generation: Option<u64>,
    /// How long the service manager waits for a sign of process.
    pub watchdog: Option<Duration>,
}

/// One listening stream socket.
pub struct Listener {
    pub name: Name,
    /// Before the socket: what has a file goes before it closes.
    pub holder: Holder,
    pub socket: ListeningSocket,
}

pub enum ListeningSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Who keeps the port when this process closes its listener.
pub enum Holder {
    /// The one who passed it on: connections wait in its queue for the next process.
    Parent,
    /// Nobody: whatever waits in the queue would be refused.
    Nobody(Option<BoundPath>),
}

/// A socket file that a process of this service made, removed before its listener closes: who binds the path next
/// finds either us or nothing.
pub struct BoundPath {
    path: PathBuf,
    /// Which file it is, by device and number: somebody may have put another in its place.
    file: Option<(u64, u64)>,
    is_removed: AtomicBool,
}

/// Whether the socket files are this process's to remove: not before it has taken over from the one that serves on
/// them, nor after it has passed them on.
static IS_OWNER: AtomicBool = AtomicBool::new(true);

/// Leaves the socket files to the process before this one, or after it.
pub fn leave_socket_files() {
    IS_OWNER.store(false, Ordering::SeqCst);
}

/// From here on they are this process's.
pub fn own_socket_files() {
    IS_OWNER.store(true, Ordering::SeqCst);
}

impl BoundPath {
    fn new(path: PathBuf) -> Self {
        let file = Self::file(&path);
        Self { path, file, is_removed: AtomicBool::new(false) }
    }

    fn file(path: &Path) -> Option<(u64, u64)> {
        std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
    }

    /// Once.
    pub fn remove(&self) {
        if !IS_OWNER.load(Ordering::SeqCst) || self.is_removed.swap(true, Ordering::SeqCst) {
            return;
        }
        // Gone already, or no longer ours to remove: either way nothing is left to do.
        if self.file.is_some() && Self::file(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Takes the sockets that the environment names. `addresses` are those of `--listen`.
///
/// To be called before any thread exists: the environment is read and changed.
pub fn take(addresses: &[Listen]) -> Result<Inherited> {
    let (mut listeners, channels) = from_listen_fds(addresses).map_err(Failure::config)?;
    let generation = number("SERVER_STARTER_GENERATION").map_err(Failure::config)?;
    if listeners.is_empty() {
        listeners = from_server_starter().map_err(Failure::config)?;
    }
    let credentials = Credentials::of_environment().map_err(Failure::config)?;
    Ok(Inherited { listeners, channels, credentials, generation, watchdog: systemd::watchdog() })
}

impl Inherited {
    /// Binds `addresses`, or the default address if there are none, unless a listener was inherited. Fails if there
    /// are too many listeners, and if systemd started this process without a socket: a socket unit whose
    /// `ListenStream=` was changed passes none until it is restarted, and a service that bound another port instead
    /// would look healthy while no client reaches it.
    ///
    /// The caller must watch signals already, because a client of the port can cause one to be sent.
    pub fn listen(&mut self, addresses: &[Listen], service: &str) -> Result<()> {
        if self.listeners.is_empty() && addresses.is_empty() && systemd::started_this_process() {
            return Err(Failure::config(anyhow!(
                "systemd passed no listening socket (LISTEN_FDS): run `systemctl restart {service}.socket`, or \
                 set --listen if this service has no socket unit"
            )));
        }
        self.bind_unless_inherited(addresses)
    }

    /// As [`Inherited::listen`], for a process that only checks its configuration: systemd passes no sockets to
    /// `ExecStartPre=`.
    pub fn listen_for_check(&mut self, addresses: &[Listen]) -> Result<()> {
        self.bind_unless_inherited(addresses)
    }

    fn bind_unless_inherited(&mut self, addresses: &[Listen]) -> Result<()> {
        if self.listeners.is_empty() {
            let default = [Listen::default()];
            let addresses = if addresses.is_empty() { &default } else { addresses };
            let bound = addresses.iter().map(Listen::bind).collect::<anyhow::Result<_>>();
            self.listeners = bound.map_err(Failure::unavailable)?;
        }
        let count = self.listeners.len();
        if count > MAX_LISTENERS {
            let reason = anyhow!(
                "too many listeners (ListenStream=, --listen): {count}, expected at most {MAX_LISTENERS}"
            );
            return Err(Failure::config(reason));
        }
        Ok(())
    }
}

/// `http(8080) admin(/run/x.sock)`
pub fn labels(listeners: &[Listener]) -> String {
    listeners.iter().map(Listener::label).collect::<Vec<_>>().join(" ")
}

impl Listener {
    /// `http(8080)`, `http(/run/x.sock)`: as `systemctl status` shows it.
    pub fn label(&self) -> String {
        let place = match &self.socket {
            ListeningSocket::Tcp(socket) => {
                socket.local_addr().map_or_else(|_| "?".into(), |address| address.port().to_string())
            }
            ListeningSocket::Unix(socket) => socket.local_addr().map_or_else(
                |_| "?".into(),
                |address| match (address.as_pathname(), abstract_name(&address)) {
                    (Some(path), _) => path.display().to_string(),
                    (None, Some(name)) => format!("@{name}"),
                    (None, None) => "unnamed".into(),
                },
            ),
        };
        format!("{}({place})", self.name)
    }

    /// A command for a person to try, of a listener that this process bound itself.
    pub fn try_it(&self) -> Option<String> {
        let (ListeningSocket::Tcp(socket), Holder::Nobody(_)) = (&self.socket, &self.holder) else {
            return None;
        };
        let address = socket.local_addr().ok()?;
        Some(match self.kind() {
            ListenerKind::Http => format!("curl http://{address}/"),
            ListenerKind::Https => format!("curl --insecure https://{address}/"),
            ListenerKind::Admin => format!("curl http://{address}/metrics"),
        })
    }

    pub fn kind(&self) -> ListenerKind {
        self.name.kind()
    }

    /// For a successor: the socket, and who holds it.
    pub fn pack(&self) -> io::Result<(OwnedFd, Record)> {
        let fd = match &self.socket {
            ListeningSocket::Tcp(socket) => socket.as_fd().try_clone_to_owned()?,
            ListeningSocket::Unix(socket) => socket.as_fd().try_clone_to_owned()?,
        };
        let holder = match &self.holder {
            Holder::Parent => Vec::new(),
            Holder::Nobody(path) => {
                let path = path.as_ref().map_or(&[][..], |bound| bound.path.as_os_str().as_bytes());
                [b"nobody", path].concat()
            }
        };
        Ok((fd, Record { listener: self.name.to_string(), payload: holder.into(), http2: None, tls: None }))
    }

    /// From a predecessor: what it packed.
    pub fn unpack((fd, record): (OwnedFd, Record)) -> anyhow::Result<Self> {
        let listener = Self::inherited(record.listener.parse()?, listening(fd)?)?;
        let holder = match record.payload.strip_prefix(b"nobody") {
            None => Holder::Parent,
            Some(b"") => Holder::Nobody(None),
            Some(path) => Holder::Nobody(Some(BoundPath::new(OsStr::from_bytes(path).into()))),
        };
        Ok(Self { holder, ..listener })
    }

    fn inherited(name: Name, socket: ListeningSocket) -> anyhow::Result<Self> {
        match &socket {
            ListeningSocket::Tcp(socket) => socket.set_nonblocking(true)?,
            ListeningSocket::Unix(socket) => socket.set_nonblocking(true)?,
        }
        Ok(Self { name, socket, holder: Holder::Parent })
    }
}

fn abstract_name(address: &std::os::unix::net::SocketAddr) -> Option<String> {
    use std::os::linux::net::SocketAddrExt;
    address.as_abstract_name().map(|name| String::from_utf8_lossy(name).into_owned())
}

// ---- LISTEN_FDS ----

fn from_listen_fds(addresses: &[Listen]) -> anyhow::Result<(Vec<Listener>, Vec<anyhow::Result<OwnedFd>>)> {
    let mut listeners = Vec::new();
    let mut channels = Vec::new();
    let Some(count) = number::<usize>("LISTEN_FDS")? else { return Ok((listeners, channels)) };
    if let Some(pid) = number::<u32>("LISTEN_PID")?
        && pid != std::process::id()
    {
        // Sockets of another process are not taken, as in sd_listen_fds(3). A process that has an address of its own,
        // for example one that a socket-activated service starts, does not need them.
        if !addresses.is_empty() {
            return Ok((listeners, channels));
        }
        bail!(
            "LISTEN_PID={pid} is not the pid of this process ({}), so LISTEN_FDS={count} is not for it: if a \
             wrapper script starts this program, start it with `exec`; else set --listen",
            std::process::id()
        );
    }
    let first = number::<RawFd>("LISTEN_FDS_FIRST_FD")?.unwrap_or(3);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if limit.is_some_and(|limit| count as u64 > limit) {
        bail!(
            "invalid LISTEN_FDS {count}: this process may have only {} open files (LimitNOFILE=)",
            limit.unwrap_or(0)
        );
    }
    let names = variable("LISTEN_FDNAMES")?;
    let mut passed = ListenFd::from_env();
    if passed.len() == 0 {
        return Ok((listeners, channels));
    }
    let names: Vec<&str> = match &names {
        Some(names) => names.split(':').collect(),
        None => vec!["unknown"; count],
    };
    if names.len() != count {
        bail!(
            "LISTEN_FDNAMES has {} names, but LISTEN_FDS={count}: expected a name for each socket",
            names.len()
        );
    }
    for (index, name) in names.into_iter().enumerate() {
        let fd = first.saturating_add(RawFd::try_from(index)?);
        let place = || format!("LISTEN_FDS: fd {fd} ({name})");
        if name == handover::STORE_NAME {
            channels.push(take_channel(&mut passed, index).with_context(place));
        } else {
            let socket = take_listener(&mut passed, index).with_context(place)?;
            let name = listener_name(name).with_context(place)?;
            listeners.push(Listener::inherited(name, socket).with_context(place)?);
        }
    }
    Ok((listeners, channels))
}

fn take_channel(passed: &mut ListenFd, index: usize) -> anyhow::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX.as_raw().into(), SocketType::SEQPACKET.as_raw().try_into()?);
    let channel = passed.take_custom(index, family, kind, "handover channel (a SOCK_SEQPACKET socket)")?;
    channel.context("the socket was already taken")
}

fn take_listener(passed: &mut ListenFd, index: usize) -> anyhow::Result<ListeningSocket> {
    let socket = if let Ok(Some(socket)) = passed.take_tcp_listener(index) {
        require_listening(&socket)?;
        ListeningSocket::Tcp(socket)
    } else if let Ok(Some(socket)) = passed.take_unix_listener(index) {
        require_listening(&socket)?;
        ListeningSocket::Unix(socket)
    } else {
        bail!("{NOT_LISTENING}");
    };
    Ok(socket)
}

const NOT_LISTENING: &str =
    "not a listening stream socket; use ListenStream= and Accept=no in the socket unit";

fn require_listening(socket: impl AsFd) -> anyhow::Result<()> {
    if sockopt::socket_acceptconn(socket)? { Ok(()) } else { bail!("{NOT_LISTENING}") }
}

/// Where `FileDescriptorName=` is absent, systemd says the name of the unit, and others `unknown`.
fn listener_name(name: &str) -> anyhow::Result<Name> {
    if name.is_empty() || name == "unknown" || Path::new(name).extension().is_some_and(|end| end == "socket")
    {
        Ok(Name::default())
    } else {
        name.parse()
    }
}

// ---- SERVER_STARTER_PORT ----

/// `host:port=fd;port=fd;/path.sock=fd`
fn from_server_starter() -> anyhow::Result<Vec<Listener>> {
    let Some(text) = variable("SERVER_STARTER_PORT")? else { return Ok(Vec::new()) };
    let mut seen = HashSet::new();
    text.split(';')
        .map(|pair| {
            let (place, fd) = server_starter_pair(pair).with_context(|| {
                format!("invalid SERVER_STARTER_PORT {text:?}: expected host:port=fd, got {pair:?}")
            })?;
            if !seen.insert(fd) {
                bail!("invalid SERVER_STARTER_PORT {text:?}: fd {fd} is listed twice");
            }
            adopt(fd)
                .and_then(|socket| Listener::inherited(Name::default(), socket))
                .with_context(|| format!("SERVER_STARTER_PORT: fd {fd} ({place})"))
        })
        .collect()
}

fn server_starter_pair(pair: &str) -> Option<(&str, RawFd)> {
    let (place, fd) = pair.rsplit_once('=')?;
    let fd = fd.parse().ok().filter(|fd| *fd > 2)?;
    (!place.is_empty()).then_some((place, fd))
}

fn adopt(fd: RawFd) -> anyhow::Result<ListeningSocket> {
    let socket = sys::own(fd)?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    listening(socket)
}

fn listening(socket: OwnedFd) -> anyhow::Result<ListeningSocket> {
    let domain = sockopt::socket_domain(&socket).context(NOT_LISTENING)?;
    if sockopt::socket_type(&socket)? != SocketType::STREAM {
        bail!("{NOT_LISTENING}");
    }
    require_listening(&socket)?;
    match domain {
        AddressFamily::INET | AddressFamily::INET6 => Ok(ListeningSocket::Tcp(socket.into())),
        AddressFamily::UNIX => Ok(ListeningSocket::Unix(socket.into())),
        _ => bail!("{NOT_LISTENING}"),
    }
}

// ---- --listen ----

/// An address to bind, and the listener's name: `127.0.0.1:8080`, `https=127.0.0.1:8443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    name: Name,
    endpoint: Endpoint,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let is_name = |start: &str| start.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        let (name, endpoint) = match text.split_once('=') {
            Some((name, endpoint)) if is_name(name) => {
                (name.parse().map_err(|error: anyhow::Error| error.to_string())?, endpoint)
            }
            _ => (Name::default(), text),
        };
        Ok(Self { name, endpoint: endpoint.parse()? })
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self { name: Name::default(), endpoint: Endpoint::Tcp(DEFAULT_ADDRESS) }
    }
}

impl Listen {
    fn bind(&self) -> anyhow::Result<Listener> {
        let (socket, path) = self.endpoint.bind()?;
        Ok(Listener { name: self.name.clone(), socket, holder: Holder::Nobody(path) })
    }
}

/// An address to bind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Tcp(SocketAddr),
    Path(PathBuf),
    Abstract(String),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let path = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text));
        match path {
            Some("" | "@") => Err("expected a path or @name after unix:".into()),
            Some(path) => Ok(match path.strip_prefix('@') {
                Some(name) => Self::Abstract(name.to_owned()),
                None => Self::Path(path.into()),
            }),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                "expected an address such as 127.0.0.1:8080, [::1]:8080, /run/x.sock or unix:@name".into()
            }),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

impl Endpoint {
    fn bind(&self) -> anyhow::Result<(ListeningSocket, Option<BoundPath>)> {
        let (socket, path) = match self {
            Self::Tcp(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                (self.listen(socket, &(*address).into())?, None)
            }
            Self::Path(path) => {
                remove_if_stale(path);
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                (self.listen(socket, &SockAddr::unix(path)?)?, Some(BoundPath::new(path.clone())))
            }
            Self::Abstract(name) => {
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                (self.listen(socket, &SockAddr::unix(format!("\0{name}"))?)?, None)
            }
        };
        let socket = match self {
            Self::Tcp(_) => ListeningSocket::Tcp(socket.into()),
            Self::Path(_) | Self::Abstract(_) => ListeningSocket::Unix(socket.into()),
        };
        Ok((socket, path))
    }

    fn listen(&self, socket: Socket, address: &SockAddr) -> anyhow::Result<Socket> {
        socket
            .bind(address)
            .and_then(|()| socket.listen(BACKLOG))
            .and_then(|()| socket.set_nonblocking(true))
            .with_context(|| format!("could not listen on {self}"))?;
        Ok(socket)
    }
}

/// A socket file where nobody listens any more would keep the path taken for ever.
fn remove_if_stale(path: &Path) {
    let refused =
        UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if refused {
        // If it cannot be removed, bind() says so.
        let _ = std::fs::remove_file(path);
    }
}

// ---- variables ----

/// A variable that is there and not empty.
fn variable(name: &str) -> anyhow::Result<Option<String>> {
    match std::env::var(name) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(error) => Err(anyhow!("invalid {name}: {error}")),
    }
}

fn number<N: FromStr>(name: &str) -> anyhow::Result<Option<N>> {
    variable(name)?
        .map(|text| text.parse().map_err(|_| anyhow!("invalid {name} {text:?}: expected a number")))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_as_they_are_written() {
        for text in ["127.0.0.1:8080", "[::1]:8080", "/run/x.sock", "unix:@x"] {
            assert_eq!(text.parse::<Endpoint>().expect(text).to_string(), text);
        }
        assert_eq!("unix:/run/x.sock".parse(), Ok(Endpoint::Path("/run/x.sock".into())));
        for text in ["", "8080", "localhost:x", "unix:", "unix:@", "127.0.0.1:99999"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_address_may_have_a_name_before_it() {
        let read = |text: &str| {
            text.parse().map(|Listen { name, endpoint }| (name.as_str().to_owned(), endpoint.to_string()))
        };
        let pair = |name: &str, endpoint: &str| Ok((name.to_owned(), endpoint.to_owned()));
        assert_eq!(read("127.0.0.1:80"), pair("http", "127.0.0.1:80"));
        assert_eq!(read("https=[::1]:443"), pair("https", "[::1]:443"));
        assert_eq!(read("admin=/run/a=b.sock"), pair("admin", "/run/a=b.sock"));
        assert_eq!(read("/run/a=b.sock"), pair("http", "/run/a=b.sock"));
        assert!(
            read("web=127.0.0.1:80")
                .is_err_and(|error| error.contains("invalid listener name \"web\": expected admin or"))
        );
        assert!(read("https=").is_err() && read("=127.0.0.1:80").is_err());
    }

    #[test]
    fn a_socket_file_that_another_process_has_put_in_the_place_of_ours_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.sock");
        let endpoint = Endpoint::Path(path.clone());
        let (_ours, bound) = endpoint.bind().expect("bound");
        std::fs::remove_file(&path).expect("removed");
        let (_other, other) = endpoint.bind().expect("bound anew");
        drop(bound);
        assert!(UnixStream::connect(&path).is_ok(), "the other's is there");
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_is_not_taken_from_whoever_listens_there_and_free_once_its_file_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let endpoint = Endpoint::Path(folder.path().join("x.sock"));
        let (_ours, bound) = endpoint.bind().expect("bound");
        assert!(endpoint.bind().is_err(), "it is in use");
        // Its socket is open yet.
        bound.as_ref().expect("a file").remove();
        let (_next, _file) = endpoint.bind().expect("the next process");
        drop(bound);
        assert!(endpoint.bind().is_err(), "the next one's file is there");
    }

    #[test]
    fn server_starter_pairs_are_read_from_the_right() {
        assert_eq!(server_starter_pair("127.0.0.1:80=4"), Some(("127.0.0.1:80", 4)));
        assert_eq!(server_starter_pair("/run/a=b.sock=5"), Some(("/run/a=b.sock", 5)));
        for pair in ["", "80", "80=", "=4", "80=x", "80=-1", "80=2", "80=99999999999"] {
            assert_eq!(server_starter_pair(pair), None, "{pair}");
        }
    }

    #[test]
    fn a_socket_that_nobody_named_is_http() {
        for name in ["", "unknown", "shop.socket", "http"] {
            assert_eq!(listener_name(name).expect(name).as_str(), "http");
        }
        assert_eq!(listener_name("admin").expect("a name").as_str(), "admin");
        assert!(listener_name("web").is_err());
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_text_does_not_panic_the_parsers() {
        crate::fuzz::target!("listener_parsers").with_type::<String>().for_each(|text| {
            let _ = text.parse::<Listen>();
            let _ = server_starter_pair(text);
            let _ = listener_name(text);
        });
    }
}
