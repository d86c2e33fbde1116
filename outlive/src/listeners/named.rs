//! [`NamedSockets`], the sockets that the application claims by their names while it starts.
//!
//! They come from systemd or from the predecessor of a reload. If there is none of a name, the socket is bound to the address
//! of `--listen NAME=ADDR`, as the kind that the application asks for. The successor of a reload receives a duplicate of each
//! socket, so both processes have it until this one exits.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Mutex;

use anyhow::{Context, anyhow, bail, ensure};
use rustix::fs::{FileType, fstat};
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::{Listen, Listener, Ownership, SocketFile, SocketFiles, listening};
use crate::app::sockets::{SocketKind, SocketSource};
use crate::handover::SocketRecord;
use crate::os::lock::lock;
use crate::transport::listener_name::{ListenerRole, Name};

/// A socket that the application can claim.
pub struct NamedSocket {
    pub name: Name,
    pub fd: OwnedFd,
    pub ownership: Ownership,
}

impl NamedSocket {
    /// A duplicate of the socket, and its record for the successor.
    fn pack(&self) -> io::Result<(OwnedFd, SocketRecord)> {
        Ok((self.fd.try_clone()?, self.ownership.record(&self.name)))
    }
}

/// Why a process starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Serve,
    /// The command `check`, to which systemd passes no sockets. A socket that is missing is replaced by another one.
    Check,
    /// A command of the application, which has no sockets.
    Command,
}

/// See the module documentation.
pub struct NamedSockets {
    purpose: Purpose,
    files: SocketFiles,
    state: Mutex<State>,
}

struct State {
    unclaimed: Vec<NamedSocket>,
    /// The addresses of `--listen` with names of the application to which no socket is bound yet.
    addresses: Vec<Listen>,
    claimed: BTreeSet<String>,
    /// The listeners from which the library accepts connections.
    listeners: Vec<Listener>,
    others: Others,
}

/// The sockets that the application itself uses.
#[derive(Default)]
pub struct Others {
    /// Duplicates for the successor.
    pub duplicates: Vec<(OwnedFd, SocketRecord)>,
    /// The files of the Unix sockets among them that this process bound. To drop a file object removes the file.
    pub files: Vec<SocketFile>,
}

impl NamedSockets {
    /// `addresses` are those of `--listen`; an inherited socket of the same name takes the place of an address.
    pub fn new(
        inherited: Vec<NamedSocket>,
        addresses: &[Listen],
        files: SocketFiles,
        purpose: Purpose,
    ) -> Self {
        let is_missing = |address: &&Listen| {
            address.role() == ListenerRole::Application
                && !inherited.iter().any(|socket| socket.name == *address.name())
        };
        let addresses = addresses.iter().filter(is_missing).cloned().collect();
        let state = State {
            unclaimed: inherited,
            addresses,
            claimed: BTreeSet::new(),
            listeners: Vec::new(),
            others: Others::default(),
        };
        Self { purpose, files, state: Mutex::new(state) }
    }

    /// Ends the claims. Returns the listeners from which the library accepts, and what the successor needs of the other
    /// sockets. Fails if a socket was not claimed, because its clients would wait for ever.
    pub fn finish(&self) -> anyhow::Result<(Vec<Listener>, Others)> {
        let mut state = lock(&self.state);
        state.refuse_connections()?;
        let sockets = state.unclaimed.iter().map(|socket| socket.name.to_string());
        let addresses = state.addresses.iter().map(|address| address.name().to_string());
        let unclaimed: BTreeSet<_> = sockets.chain(addresses).collect();
        if !unclaimed.is_empty() {
            let unclaimed: Vec<_> = unclaimed.into_iter().collect();
            let claimed: Vec<_> = ["admin", "http…", "https…"]
                .into_iter()
                .chain(state.claimed.iter().map(String::as_str))
                .collect();
            bail!(
                "this service does not use a socket with the name {}: expected one of {} (FileDescriptorName= of the \
                 socket unit, --listen NAME=ADDR)",
                unclaimed.join(" "),
                claimed.join(" "),
            );
        }
        Ok((std::mem::take(&mut state.listeners), std::mem::take(&mut state.others)))
    }

    /// Takes all sockets called `name` out of `state`, or binds one.
    fn take(&self, state: &mut State, name: &str, kind: SocketKind) -> anyhow::Result<Vec<NamedSocket>> {
        ensure!(self.purpose != Purpose::Command, "a command of the service has no sockets");
        let is_new = state.claimed.insert(name.to_owned());
        let mut taken: Vec<_> =
            state.unclaimed.extract_if(.., |socket| socket.name.as_str() == name).collect();
        for address in state.addresses.extract_if(.., |address| address.name().as_str() == name) {
            taken.push(address.bind_as(kind, &self.files)?);
        }
        let parsed: Name = name.parse()?;
        ensure!(
            parsed.role() == ListenerRole::Application,
            "the library itself serves the sockets whose names are admin or begin with http"
        );
        ensure!(is_new, "it was already claimed");
        if taken.is_empty() && self.purpose == Purpose::Check {
            taken.push(Listen::substitute(parsed, kind).bind_as(kind, &self.files)?);
        }
        ensure!(
            !taken.is_empty(),
            "no socket has this name{}: add a socket unit with FileDescriptorName={name} and restart the service, \
             because systemd passes sockets at a start only; without systemd add --listen {name}=ADDR, and --listen \
             ADDR for HTTP",
            state.others()
        );
        Ok(taken)
    }
}

impl State {
    /// Fails if an unclaimed socket is a connection. With Accept=yes, systemd passes a connection instead of a listener. Its
    /// default name is `connection`, so an error about an unknown name would hide the cause.
    fn refuse_connections(&self) -> anyhow::Result<()> {
        for NamedSocket { name, fd, .. } in &self.unclaimed {
            let kind = describe(fd);
            ensure!(
                !matches!(kind, TCP_CONNECTION | UNIX_CONNECTION),
                "Accept=yes in the socket unit: systemd passed {kind} ({name}) instead of a listener; set Accept=no in the \
                 socket unit"
            );
        }
        Ok(())
    }

    /// The names of the sockets that are not claimed, for an error: one of them may be misspelt.
    fn others(&self) -> String {
        let sockets = self.unclaimed.iter().map(|socket| socket.name.as_str());
        let addresses = self.addresses.iter().map(|address| address.name().as_str());
        let names: BTreeSet<_> = sockets.chain(addresses).collect();
        if names.is_empty() {
            return String::new();
        }
        format!(" (the others are {})", names.into_iter().collect::<Vec<_>>().join(" "))
    }
}

impl SocketSource for NamedSockets {
    fn claim(&self, name: &str, kind: SocketKind) -> anyhow::Result<OwnedFd> {
        let claim = || {
            let mut state = lock(&self.state);
            let mut taken = self.take(&mut state, name, kind)?;
            ensure!(
                taken.len() == 1,
                "{} sockets have this name: expected one; give each socket unit its own FileDescriptorName=",
                taken.len()
            );
            let socket = taken.remove(0);
            require(&socket.fd, kind)?;
            if kind != SocketKind::Any {
                rustix::io::ioctl_fionbio(&socket.fd, true)?;
            }
            state.others.duplicates.push(socket.pack().context("could not duplicate it")?);
            if let Ownership::Bound(Some(file)) = socket.ownership {
                state.others.files.push(file);
            }
            Ok(socket.fd)
        };
        claim().map_err(|error: anyhow::Error| error.context(format!("could not use the socket {name:?}")))
    }

    fn claim_listeners(&self, name: &str) -> anyhow::Result<()> {
        let claim = || {
            let mut state = lock(&self.state);
            for socket in self.take(&mut state, name, SocketKind::TcpListener)? {
                let NamedSocket { name, fd, ownership } = socket;
                let kind = describe(&fd);
                let socket = listening(fd).map_err(|_| {
                    anyhow!("it is {kind}: expected a listening stream socket (ListenStream= and Accept=no)")
                })?;
                state.listeners.push(Listener { ownership, ..Listener::inherited(name, socket)? });
            }
            Ok(())
        };
        claim().map_err(|error: anyhow::Error| error.context(format!("could not serve the socket {name:?}")))
    }

    fn names(&self) -> Vec<String> {
        let state = lock(&self.state);
        let sockets = state.unclaimed.iter().map(|socket| socket.name.to_string());
        let addresses = state.addresses.iter().map(|address| address.name().to_string());
        let names: BTreeSet<_> = sockets.chain(addresses).chain(state.claimed.iter().cloned()).collect();
        names.into_iter().collect()
    }
}

/// Fails if `fd` is of another kind.
fn require(fd: &OwnedFd, kind: SocketKind) -> anyhow::Result<()> {
    let (expected, unit) = match kind {
        SocketKind::TcpListener => (TCP_LISTENER, "ListenStream=PORT and Accept=no"),
        SocketKind::UnixListener => (UNIX_LISTENER, "ListenStream=/PATH and Accept=no"),
        SocketKind::UdpSocket => (UDP_SOCKET, "ListenDatagram=PORT"),
        SocketKind::UnixDatagram => (UNIX_DATAGRAM, "ListenDatagram=/PATH"),
        SocketKind::Any => return Ok(()),
    };
    let found = describe(fd);
    ensure!(found == expected, "it is {found}: expected {expected} ({unit} in the socket unit)");
    Ok(())
}

const TCP_LISTENER: &str = "a TCP listener";
const TCP_CONNECTION: &str = "a TCP connection";
const UNIX_LISTENER: &str = "a Unix listener";
const UNIX_CONNECTION: &str = "a Unix connection";
const UDP_SOCKET: &str = "a UDP socket";
const UNIX_DATAGRAM: &str = "a Unix datagram socket";

/// What `fd` is, for an error.
fn describe(fd: &OwnedFd) -> &'static str {
    let (Ok(domain), Ok(kind)) = (sockopt::socket_domain(fd), sockopt::socket_type(fd)) else {
        return match fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::Fifo) => "a FIFO",
            Ok(FileType::RegularFile) => "a file",
            Ok(FileType::CharacterDevice) => "a character device",
            _ => "not a socket",
        };
    };
    let is_listening = sockopt::socket_acceptconn(fd.as_fd()).unwrap_or(false);
    match (domain, kind, is_listening) {
        (AddressFamily::INET | AddressFamily::INET6, SocketType::STREAM, true) => TCP_LISTENER,
        (AddressFamily::INET | AddressFamily::INET6, SocketType::STREAM, false) => TCP_CONNECTION,
        (AddressFamily::INET | AddressFamily::INET6, SocketType::DGRAM, _) => UDP_SOCKET,
        (AddressFamily::UNIX, SocketType::STREAM, true) => UNIX_LISTENER,
        (AddressFamily::UNIX, SocketType::STREAM, false) => UNIX_CONNECTION,
        (AddressFamily::UNIX, SocketType::DGRAM, _) => UNIX_DATAGRAM,
        (AddressFamily::UNIX, SocketType::SEQPACKET, _) => "a Unix socket for sequential packets",
        (AddressFamily::NETLINK, ..) => "a netlink socket",
        _ => "a socket of another kind",
    }
}

impl Ownership {
    /// The record of a socket for the successor. The payload is empty for an inherited socket. For one that this process
    /// bound it is `nobody`, followed by the path of its socket file if it has one.
    pub(super) fn record(&self, name: &Name) -> SocketRecord {
        let ownership = match self {
            Self::Inherited => Vec::new(),
            Self::Bound(path) => {
                let path = path.as_ref().map_or(&[][..], |bound| bound.path().as_os_str().as_bytes());
                [b"nobody", path].concat()
            }
        };
        SocketRecord::new(name.to_string(), ownership.into())
    }

    /// Reverses [`Ownership::record`].
    pub(super) fn of_record(record: &SocketRecord, files: &SocketFiles) -> Self {
        match record.payload.strip_prefix(b"nobody") {
            None => Self::Inherited,
            Some(b"") => Self::Bound(None),
            Some(path) => Self::Bound(Some(files.add(std::ffi::OsStr::from_bytes(path).into()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    fn socket(name: &str, fd: impl Into<OwnedFd>) -> NamedSocket {
        let name = name.parse().expect("the name is valid");
        NamedSocket { name, fd: fd.into(), ownership: Ownership::Inherited }
    }

    fn tcp() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").expect("the port is bound")
    }

    fn udp() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").expect("the port is bound")
    }

    fn sockets(inherited: Vec<NamedSocket>, addresses: &[&str], purpose: Purpose) -> NamedSockets {
        let addresses: Vec<Listen> =
            addresses.iter().map(|address| address.parse().expect("the address is valid")).collect();
        NamedSockets::new(inherited, &addresses, SocketFiles::owned(), purpose)
    }

    fn error<T>(result: anyhow::Result<T>) -> String {
        format!("{:#}", result.err().expect("it is refused"))
    }

    #[test]
    fn claimed_sockets_are_passed_on_to_the_successor_with_their_names() {
        let sockets = sockets(vec![socket("a", udp()), socket("b", tcp())], &[], Purpose::Serve);
        assert_eq!(sockets.names(), ["a", "b"]);
        sockets.claim("a", SocketKind::UdpSocket).expect("it is a UDP socket");
        sockets.claim_listeners("b").expect("it is a listener");
        let (listeners, others) = sockets.finish().expect("both are claimed");
        assert_eq!(listeners[0].name.as_str(), "b");
        assert_eq!(others.duplicates[0].1.listener, "a");
    }

    #[test]
    fn command_of_the_application_has_no_sockets() {
        let sockets = sockets(Vec::new(), &[], Purpose::Command);
        let message = error(sockets.claim("a", SocketKind::UdpSocket));
        assert!(message.ends_with("a command of the service has no sockets"), "{message}");
    }

    #[test]
    fn socket_of_another_kind_is_refused_with_both_kinds() {
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let stream = UnixListener::bind(folder.path().join("stream")).expect("the path is bound");
        let datagrams = UnixDatagram::bind(folder.path().join("datagrams")).expect("the path is bound");
        let file = std::fs::File::open("/dev/null").expect("it exists");
        let inherited = vec![
            socket("a", tcp()),
            socket("b", udp()),
            socket("c", stream),
            socket("d", datagrams),
            socket("e", file),
        ];
        let sockets = sockets(inherited, &[], Purpose::Serve);
        assert_eq!(
            error(sockets.claim("a", SocketKind::UdpSocket)),
            "could not use the socket \"a\": it is a TCP listener: expected a UDP socket (ListenDatagram=PORT in the \
             socket unit)"
        );
        for (name, kind, found) in [
            ("b", SocketKind::TcpListener, "a UDP socket: expected a TCP listener"),
            ("c", SocketKind::UnixDatagram, "a Unix listener: expected a Unix datagram socket"),
            ("d", SocketKind::UnixListener, "a Unix datagram socket: expected a Unix listener"),
            ("e", SocketKind::UdpSocket, "a character device: expected a UDP socket"),
        ] {
            let error = error(sockets.claim(name, kind));
            assert!(error.contains(found), "{error}");
        }
    }

    #[test]
    fn only_listening_stream_sockets_are_served() {
        let connection = std::net::TcpStream::connect(tcp().local_addr().expect("it has an address"));
        let connection = connection.expect("the listener exists");
        let sockets = sockets(vec![socket("a", udp()), socket("b", connection)], &[], Purpose::Serve);
        for (name, found) in [("a", "it is a UDP socket"), ("b", "it is a TCP connection")] {
            let error = error(sockets.claim_listeners(name));
            assert!(error.contains(found) && error.contains("expected a listening stream socket"), "{error}");
        }
    }

    #[test]
    fn two_sockets_of_one_name_can_be_served_and_not_claimed() {
        let two = || vec![socket("a", tcp()), socket("a", tcp())];
        let served = sockets(two(), &[], Purpose::Serve);
        served.claim_listeners("a").expect("both are listeners");
        assert_eq!(served.finish().expect("both are claimed").0.len(), 2);
        let error = error(sockets(two(), &[], Purpose::Serve).claim("a", SocketKind::TcpListener));
        assert!(error.contains("2 sockets have this name: expected one"), "{error}");
    }

    #[test]
    fn second_claim_and_names_of_the_library_are_refused() {
        let sockets = sockets(vec![socket("a", tcp())], &[], Purpose::Serve);
        sockets.claim("a", SocketKind::Any).expect("any kind is accepted");
        for (name, expected) in [
            ("a", "it was already claimed"),
            ("https-2", "the library itself serves"),
            ("b", "no socket has this name: add a socket unit with FileDescriptorName=b"),
            ("x:y", "invalid socket name \"x:y\""),
        ] {
            let error = error(sockets.claim(name, SocketKind::Any));
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn unclaimed_sockets_are_named_by_the_error_beside_the_claimed_ones() {
        let sockets =
            sockets(vec![socket("web", tcp()), socket("a", tcp())], &["c=127.0.0.1:0"], Purpose::Serve);
        sockets.claim("a", SocketKind::TcpListener).expect("it is a TCP listener");
        let error = error(sockets.finish());
        let missing = self::error(sockets.claim("wep", SocketKind::TcpListener));
        assert!(missing.contains("no socket has this name (the others are c web): add"), "{missing}");
        assert!(
            error.starts_with(
                "this service does not use a socket with the name c web: expected one of admin http… https… a "
            ),
            "{error}"
        );
    }

    #[test]
    fn address_is_bound_as_the_kind_that_is_claimed_unless_a_socket_of_its_name_was_inherited() {
        let inherited = tcp();
        let port = inherited.local_addr().expect("it has an address").port();
        let addresses = ["a=127.0.0.1:1", "b=127.0.0.1:0", "http=127.0.0.1:1"];
        let sockets = sockets(vec![socket("a", inherited)], &addresses, Purpose::Serve);
        let claimed = sockets.claim("a", SocketKind::TcpListener).expect("it is a TCP listener");
        assert_eq!(TcpListener::from(claimed).local_addr().expect("it has an address").port(), port);
        let claimed = sockets.claim("b", SocketKind::UdpSocket).expect("the address is bound");
        assert_eq!(describe(&claimed), UDP_SOCKET);
        sockets.finish().expect("the address of http is not for the application");
    }

    #[test]
    fn stale_file_of_a_datagram_socket_is_replaced_and_that_of_a_live_one_is_not() {
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let path = folder.path().join("x.sock");
        let address = format!("a={}", path.display());
        drop(UnixDatagram::bind(&path).expect("the path is bound"));
        let first = sockets(Vec::new(), &[&address], Purpose::Serve);
        let _live = first.claim("a", SocketKind::UnixDatagram).expect("the stale file is replaced");
        let second = sockets(Vec::new(), &[&address], Purpose::Serve);
        let error = error(second.claim("a", SocketKind::UnixDatagram));
        assert!(error.contains("could not listen on") && path.exists(), "{error}");
    }

    #[test]
    fn check_without_sockets_claims_substitutes_of_each_kind() {
        let sockets = sockets(Vec::new(), &[], Purpose::Check);
        for (name, kind, expected) in [
            ("a", SocketKind::TcpListener, TCP_LISTENER),
            ("b", SocketKind::UnixListener, UNIX_LISTENER),
            ("c", SocketKind::UdpSocket, UDP_SOCKET),
            ("d", SocketKind::UnixDatagram, UNIX_DATAGRAM),
        ] {
            assert_eq!(describe(&sockets.claim(name, kind).expect("there is a substitute")), expected);
        }
        sockets.claim_listeners("e").expect("there is a substitute");
        sockets.finish().expect("all are claimed");
    }
}
