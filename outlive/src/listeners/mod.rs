//! The listening sockets: [`inherit`] takes those that were passed to this process, and [`Inherited::listen`] binds
//! others if there are none. The first of these sources that has any is used:
//!
//! 1. `listen_fds.rs`: `LISTEN_FDS` and `LISTEN_FDNAMES` from systemd, systemd-socket-activate or systemfd;
//!    sd_listen_fds(3)
//! 2. `server_starter.rs`: `SERVER_STARTER_PORT` from Server::Starter's `start_server`
//! 3. `address.rs`: `--listen`, by default 127.0.0.1:8080 in a process that systemd did not start
//!
//! `server` accepts connections from those whose names select a protocol of the library. The application claims the others
//! by their names (`named.rs`).

mod address;
mod listen_fds;
mod named;
mod server_starter;
mod socket_file;

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::warn;

pub use address::Listen;
pub use named::{NamedSocket, NamedSockets, Others, Purpose};
pub use socket_file::{SocketFile, SocketFiles};

use crate::handover::{self, SocketRecord};
use crate::os::credentials::Credentials;
use crate::os::exit::{Failure, Result};
use crate::os::systemd;
use crate::transport::listener_name::{ListenerRole, Name};

/// The maximum number of listeners. A reload passes them to the successor in one frame, with the credentials directory.
const MAX_LISTENERS: usize = handover::MAX_SOCKETS - 1;

/// Everything that the process received from its environment or its predecessor at the start.
pub struct Inherited {
    pub listeners: Vec<Listener>,
    /// The sockets that the application can claim.
    pub named: Vec<NamedSocket>,
    /// The handover channels from systemd's store. A descriptor that is not a channel is an error, which must not
    /// prevent the start, because the listeners are usable all the same.
    pub channels: Vec<anyhow::Result<OwnedFd>>,
    pub credentials: Credentials,
    /// The generation of this process, if it comes from Server::Starter or the predecessor.
    pub generation: Option<u64>,
    /// The watchdog timeout of the service manager.
    pub watchdog: Option<Duration>,
    /// Whether this process may remove the files of its Unix sockets.
    pub socket_files: SocketFiles,
}

/// One listening stream socket.
pub struct Listener {
    pub name: Name,
    /// Declared before `socket`, so that it is dropped first: the socket file has to be removed before the listener
    /// closes.
    pub ownership: Ownership,
    pub socket: ListeningSocket,
}

pub enum ListeningSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Whether another process has the socket open, which decides what happens to the port when this process closes its
/// listener.
pub enum Ownership {
    /// The process that passed the socket on keeps it open, so connections wait in its queue for the next process.
    Inherited,
    /// No other process has the socket, so the kernel refuses connections when it is closed. A Unix socket with a path
    /// has a file.
    Bound(Option<SocketFile>),
}

/// Takes the sockets and credentials that were passed through the environment. `addresses` are those of `--listen`.
///
/// Must be called before any thread exists, because it reads and changes the environment.
pub fn inherit(addresses: &[Listen]) -> Result<Inherited> {
    let listen_fds::Passed { mut listeners, named, channels } =
        listen_fds::inherit(addresses).map_err(Failure::config)?;
    let generation = number("SERVER_STARTER_GENERATION").map_err(Failure::config)?;
    if listeners.is_empty() && named.is_empty() {
        listeners = server_starter::inherit().map_err(Failure::config)?;
    }
    let credentials = Credentials::of_environment().map_err(Failure::config)?;
    Ok(Inherited {
        listeners,
        named,
        channels,
        credentials,
        generation,
        watchdog: systemd::watchdog(),
        socket_files: SocketFiles::owned(),
    })
}

impl Inherited {
    /// Binds `addresses`, or the default address if there are none, unless a listener was inherited. Fails if there
    /// are too many listeners.
    ///
    /// Also fails if systemd passed no socket, or only the admin socket. After a change of `ListenStream=`, systemd does
    /// not pass the socket until its unit is restarted. A service that then bound another port, or answered only
    /// `/readyz`, would look healthy while no client reaches it.
    ///
    /// The caller must watch signals already, because a client of the port can cause one to be sent.
    pub fn listen(&mut self, addresses: &[Listen], service: &str) -> Result<()> {
        if let Some(reason) = self.missing_socket(addresses, service) {
            return Err(Failure::config(anyhow!(reason)));
        }
        self.warn_of_ignored(addresses);
        self.bind_unless_inherited(addresses)
    }

    /// The error if systemd started this process without a socket for the clients of the service.
    fn missing_socket(&self, addresses: &[Listen], service: &str) -> Option<String> {
        // A listener that the predecessor has bound is one of --listen.
        let is_of_admin_unit = |listener: &Listener| {
            listener.role() == ListenerRole::Admin && matches!(listener.ownership, Ownership::Inherited)
        };
        let serves = !self.named.is_empty() || !self.listeners.iter().all(is_of_admin_unit);
        if serves || !systemd::started_this_process() {
            return None;
        }
        let remedy = format!("run `systemctl restart {service}.socket`");
        match (self.listeners.is_empty(), addresses) {
            (true, []) => Some(format!(
                "systemd passed no listening socket (LISTEN_FDS): {remedy}, or set --listen if this service has no \
                 socket unit"
            )),
            (true, _) => None,
            (false, []) => {
                Some(format!("systemd passed no listening socket besides admin (LISTEN_FDS): {remedy}"))
            }
            (false, addresses) => {
                let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                Some(format!(
                    "systemd passed no listening socket besides admin (LISTEN_FDS), and --listen {} is ignored beside \
                     it: {remedy}, or set --listen for admin too and disable {service}-admin.socket",
                    addresses.join(" ")
                ))
            }
        }
    }

    /// Logs the `addresses` on which no inherited listener listens. A successor inherits those that its predecessor bound.
    fn warn_of_ignored(&self, addresses: &[Listen]) {
        let is_ignored = |address: &&Listen| {
            address.role() != ListenerRole::Application
                && !self.listeners.iter().any(|listener| address.is_that_of(listener))
        };
        let ignored: Vec<_> = addresses.iter().filter(is_ignored).map(ToString::to_string).collect();
        if !self.listeners.is_empty() && !ignored.is_empty() {
            let (ignored, used) = (ignored.join(" "), labels(&self.listeners));
            warn!("--listen {ignored} is ignored, because this process inherited its sockets: {used}");
        }
    }

    /// As [`Inherited::listen`], for a process that only checks its configuration: systemd passes no sockets to
    /// `ExecStartPre=`.
    pub fn listen_for_check(&mut self, addresses: &[Listen]) -> Result<()> {
        self.bind_unless_inherited(addresses)
    }

    /// The addresses with names of the application are bound when it claims them.
    fn bind_unless_inherited(&mut self, addresses: &[Listen]) -> Result<()> {
        if self.listeners.is_empty() && self.named.is_empty() {
            let default = [Listen::default()];
            let addresses = if addresses.is_empty() { &default } else { addresses };
            let bound = addresses
                .iter()
                .filter(|address| address.role() != ListenerRole::Application)
                .map(|address| address.bind(&self.socket_files))
                .collect::<anyhow::Result<_>>();
            self.listeners = bound.map_err(Failure::unavailable)?;
        }
        let count = self.listeners.len() + self.named.len();
        if count > MAX_LISTENERS {
            let reason = anyhow!(
                "too many sockets (ListenStream=, --listen): {count}, expected at most {MAX_LISTENERS}"
            );
            return Err(Failure::config(reason));
        }
        Ok(())
    }
}

impl Inherited {
    /// Adds a socket that the predecessor has packed into `record`.
    pub fn add(&mut self, fd: OwnedFd, record: &SocketRecord) -> anyhow::Result<()> {
        let name: Name = record.listener.parse()?;
        let ownership = Ownership::of_record(record, &self.socket_files);
        if name.role() == ListenerRole::Application {
            self.named.push(NamedSocket { name, fd, ownership });
        } else {
            self.listeners.push(Listener { ownership, ..Listener::inherited(name, listening(fd)?)? });
        }
        Ok(())
    }
}

/// `http([::]:8080) admin(/run/x.sock)`: as `systemctl status` shows them.
pub fn labels(listeners: &[Listener]) -> String {
    listeners.iter().map(Listener::description).collect::<Vec<_>>().join(" ")
}

impl Listener {
    /// `http(8080)`, `http(/run/x.sock)`: as metrics name it.
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

    /// `http([::]:8080)`: as [`Listener::label`], but with the whole address of a TCP socket.
    pub fn description(&self) -> String {
        match &self.socket {
            ListeningSocket::Tcp(socket) => match socket.local_addr() {
                Ok(address) => format!("{}({address})", self.name),
                Err(_) => self.label(),
            },
            ListeningSocket::Unix(_) => self.label(),
        }
    }

    /// A command with which to try a listener that this process bound itself.
    pub fn example_command(&self) -> Option<String> {
        let (ListeningSocket::Tcp(socket), Ownership::Bound(_)) = (&self.socket, &self.ownership) else {
            return None;
        };
        let address = socket.local_addr().ok()?;
        Some(match self.role() {
            ListenerRole::Http => format!("curl http://{address}/"),
            ListenerRole::Https => format!("curl --insecure https://{address}/"),
            ListenerRole::Admin => format!("curl http://{address}/metrics"),
            ListenerRole::Application => return None,
        })
    }

    pub fn role(&self) -> ListenerRole {
        self.name.role()
    }

    /// A duplicate of the socket, and its record for the successor.
    pub fn pack(&self) -> io::Result<(OwnedFd, SocketRecord)> {
        let fd = match &self.socket {
            ListeningSocket::Tcp(socket) => socket.as_fd().try_clone_to_owned()?,
            ListeningSocket::Unix(socket) => socket.as_fd().try_clone_to_owned()?,
        };
        Ok((fd, self.ownership.record(&self.name)))
    }

    fn inherited(name: Name, socket: ListeningSocket) -> anyhow::Result<Self> {
        match &socket {
            ListeningSocket::Tcp(socket) => socket.set_nonblocking(true)?,
            ListeningSocket::Unix(socket) => socket.set_nonblocking(true)?,
        }
        Ok(Self { name, socket, ownership: Ownership::Inherited })
    }
}

fn abstract_name(address: &std::os::unix::net::SocketAddr) -> Option<String> {
    use std::os::linux::net::SocketAddrExt;
    address.as_abstract_name().map(|name| String::from_utf8_lossy(name).into_owned())
}

const NOT_LISTENING: &str =
    "not a listening stream socket; use ListenStream= and Accept=no in the socket unit";

fn require_listening(socket: impl AsFd) -> anyhow::Result<()> {
    if sockopt::socket_acceptconn(socket)? { Ok(()) } else { bail!("{NOT_LISTENING}") }
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

/// The value of an environment variable. An empty one counts as not set.
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

#[cfg(all(test, feature = "fuzz-tests"))]
mod tests {
    use super::*;

    #[test]
    fn fuzzed_text_does_not_panic_the_parsers() {
        crate::fuzz::target!("listener_parsers").with_type::<String>().for_each(|text| {
            let _ = text.parse::<Listen>();
            let _ = server_starter::server_starter_pair(text);
            let _ = listen_fds::listener_name(text);
        });
    }
}
