//! Accepts connections, and serves each in a task of its own.

mod parked;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, acceptfrom_with, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{interval, sleep};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::connection::{self, ConnectionOutcome, Services};
use crate::handover::{Overflow, Secret};
use crate::listeners::{Listener, ListeningSocket, Ownership};
use crate::os::lock::lock;
use crate::os::sys;
use crate::registry::{Phase, Registration, Registry};
use crate::server::parked::{ParkedConnection, ParkedConnections};
use crate::transport::listener_name::{ListenerRole, Name};
use crate::transport::stream::{Connection, Peer, Stream};

/// While the system has no fd or memory for another connection, this long between tries.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often it is logged that accepting fails.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// A peer of which nothing is heard for this long is asked whether it is there (`tcp(7)`) ...
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// ... again after each of these ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// ... and is gone when it has not answered as many times.
const KEEPALIVE_PROBES: u32 = 6;

/// How many connections may be open to the admin listeners.
const ADMIN_CONNECTIONS: usize = 64;

/// Serves connections. A clone serves in the same registry.
#[derive(Clone)]
pub struct Server {
    services: Arc<Services>,
    registry: Arc<Registry>,
    slots: Arc<Semaphore>,
    /// Of their own, so that a service with no slot left can still be looked at.
    admin_slots: Arc<Semaphore>,
    parked: Arc<ParkedConnections>,
    /// The tasks that accept from listeners that nobody else holds.
    own_ports: TaskTracker,
    queues: Queues,
    /// Connections for which there are no file descriptors.
    overflow: Arc<Overflow>,
}

/// The queues of the listeners, for as long as they are open.
#[derive(Clone, Default)]
pub struct Queues(Arc<Mutex<Vec<Weak<Acceptor>>>>);

impl Queues {
    /// How many connections wait to be accepted, by TCP listener.
    pub fn lengths(&self) -> Vec<(String, u32)> {
        let acceptors = lock(&self.0);
        let open = acceptors.iter().filter_map(Weak::upgrade);
        open.filter_map(|acceptor| Some((acceptor.label.clone(), acceptor.queue()?))).collect()
    }

    fn add(&self, acceptor: &Arc<Acceptor>) {
        lock(&self.0).push(Arc::downgrade(acceptor));
    }
}

impl Server {
    /// The server, and where its connections go that leave for the next process.
    pub fn new(
        services: Services,
        registry: Arc<Registry>,
        max_connections: u32,
        queues: Queues,
    ) -> anyhow::Result<(Self, mpsc::UnboundedReceiver<Connection>)> {
        let (parked, quiescent) = ParkedConnections::new(registry.clone())
            .context("could not create an epoll instance for parked connections")?;
        let parked = Arc::new(parked);
        let slots = Arc::new(Semaphore::new(max_connections as usize));
        let admin_slots = Arc::new(Semaphore::new(ADMIN_CONNECTIONS));
        let own_ports = TaskTracker::new();
        let services = Arc::new(services);
        let overflow = Arc::default();
        let server = Self { services, registry, slots, admin_slots, parked, own_ports, queues, overflow };
        tokio::spawn(server.clone().serve_unparked());
        Ok((server, quiescent))
    }

    /// Accepts from now on, whenever the phase allows.
    pub fn accept_from(&self, acceptor: Acceptor) {
        let acceptor = Arc::new(acceptor);
        self.queues.add(&acceptor);
        let is_own = matches!(acceptor.ownership, Ownership::Bound(_));
        let accept = self.clone().accept(acceptor);
        if is_own {
            self.own_ports.spawn(accept)
        } else {
            tokio::spawn(accept)
        };
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The keys of session tickets, for the next process.
    pub fn tickets(&self) -> Option<Secret> {
        let tickets = self.services.tls.as_ref()?.tickets.as_ref()?;
        Some(Secret(tickets.encode()))
    }

    /// Goes on with those of the process before this one, where it left any.
    pub fn adopt_ticket_keys(&self, keys: Option<Secret>) {
        let tickets = self.services.tls.as_ref().and_then(|tls| tls.tickets.as_ref());
        if let (Some(tickets), Some(keys)) = (tickets, keys)
            && !tickets.adopt_keys(&keys.0)
        {
            debug!("invalid TLS ticket keys from the predecessor; clients will do full handshakes");
        }
    }

    /// A connection that nobody drives.
    #[cfg(test)]
    pub fn registered(&self, peer: Peer) -> Registration {
        self.registry.register(peer, None)
    }

    /// Whether there are listeners that nobody else holds.
    pub fn owns_ports(&self) -> bool {
        !self.own_ports.is_empty()
    }

    /// Waits until the listeners that nobody else holds are closed, and what was in their queues is
    /// served. They close when the phase ends all connections.
    pub async fn own_ports_closed(&self) {
        self.own_ports.close();
        self.own_ports.wait().await;
    }

    /// Goes on with a connection, above `--max-connections` if need be: it is there already.
    pub fn adopt(&self, connection: Connection) {
        let slot = self.slots(&connection.listener).clone().try_acquire_owned().ok();
        let since = self.registry.now();
        // Whoever has said nothing goes on sleeping.
        if let Err(awake) = self.parked.put(ParkedConnection { connection, slot, since }) {
            self.serve_unparked_connection(awake);
        }
    }

    /// Serves a connection that ends with its next response, and of which a channel has another descriptor.
    pub fn finish(&self, connection: Connection) {
        let since = self.registry.now();
        let copy = connection.socket.try_clone();
        match connection.watched() {
            Ok((connection, peer)) => {
                let registration = self.registry.register_since(peer, None, since);
                registration.entry.close_after_response();
                let services = self.services.clone();
                tokio::spawn(async move {
                    drop(connection::serve(connection, registration, &services).await);
                    // The descriptor in the channel would keep the connection open.
                    if let Ok(copy) = copy {
                        let _ = rustix::net::shutdown(&copy, Shutdown::Both);
                    }
                });
            }
            Err(error) => {
                debug!(%error, "a client disconnected while its connection waited for a file descriptor");
            }
        }
    }

    pub fn overflow(&self) -> &Overflow {
        &self.overflow
    }

    fn slots(&self, listener: &Name) -> &Arc<Semaphore> {
        if listener.role() == ListenerRole::Admin { &self.admin_slots } else { &self.slots }
    }

    /// Sets a phase, and wakes those that are to be told to end in it.
    pub fn enter(&self, phase: Phase) {
        let _accepting = self.registry.accepting();
        self.registry.set_phase(phase);
        for idle in self.parked.unpark_ending() {
            self.serve_unparked_connection(idle);
        }
    }

    /// All connections that sleep, for the next process.
    pub fn take_parked(&self) -> Vec<Connection> {
        self.parked.take_all()
    }

    /// Serves each connection that was asleep, when there is something to do for it.
    async fn serve_unparked(self) {
        let registry = &self.registry;
        let mut clock = interval(registry.interval());
        loop {
            // What its peer says is for the next process.
            registry.wait_for_phase(|phase| !phase.quiesces()).await;
            let woken = tokio::select! {
                heard = self.parked.heard() => {
                    heard.and_then(|heard| self.wake(|parked| parked.unpark_readable(heard)))
                }
                _ = clock.tick() => self.wake(|parked| Ok(parked.unpark_overdue())),
            };
            if let Err(error) = woken {
                warn!(%error, "epoll on parked connections failed; retrying");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }

    fn wake(
        &self,
        those: impl FnOnce(&ParkedConnections) -> io::Result<Vec<ParkedConnection>>,
    ) -> io::Result<()> {
        // Between their sleep and the registry they are nowhere.
        let _accepting = self.registry.accepting();
        if !self.registry.phase().quiesces() {
            for idle in those(&self.parked)? {
                self.serve_unparked_connection(idle);
            }
        }
        Ok(())
    }

    fn serve_unparked_connection(&self, idle: ParkedConnection) {
        let ParkedConnection { connection, slot, since } = idle;
        match connection.watched() {
            Ok((connection, peer)) => {
                let registration = self.registry.register_since(peer, slot, since);
                self.serve(connection, registration);
            }
            Err(error) => debug!(%error, "a client disconnected while its connection was parked"),
        }
    }

    fn begin(&self, connection: Connection<Stream>, peer: Peer, slot: Option<OwnedSemaphorePermit>) {
        let registration = self.registry.register(peer, slot);
        self.serve(connection, registration);
    }

    fn serve(&self, connection: Connection<Stream>, registration: Registration) {
        let (services, parked) = (self.services.clone(), self.parked.clone());
        tokio::spawn(async move {
            let mut next = Some((connection, registration));
            while let Some((connection, registration)) = next {
                let ConnectionOutcome::Quiescent(connection, registration) =
                    connection::serve(connection, registration, &services).await
                else {
                    return;
                };
                next = parked.take(connection, registration).unwrap_or_else(|error| {
                    debug!(%error, "a client disconnected while its connection was being parked");
                    None
                });
            }
        });
    }

    async fn accept(self, acceptor: Arc<Acceptor>) {
        let mut errors = AcceptErrors::default();
        loop {
            let registry = &self.registry;
            registry.wait_for_phase(|phase| phase.accepts() || acceptor.is_last(phase.ends(true))).await;
            if acceptor.is_last(registry.phase().ends(true)) {
                self.empty(&acceptor);
                return;
            }
            let _accepting = registry.accepting();
            if !registry.phase().accepts() {
                continue;
            }
            let accepted = async {
                let mut asked = acceptor.socket.readable().await?;
                // No sooner, so that an idle listener keeps none from another; what cannot be served yet waits
                // in the socket's queue.
                let slot = self.slots(&acceptor.name).clone().acquire_owned().await.ok();
                let connection = acceptor.accept()?;
                if connection.is_none() {
                    asked.clear_ready();
                }
                io::Result::Ok((connection, slot))
            };
            tokio::select! {
                () = registry.wait_for_phase(|phase| !phase.accepts() || acceptor.is_last(phase.ends(true))) => {}
                accepted = accepted => match accepted {
                    Ok((Some((connection, peer)), slot)) => self.begin(connection, peer, slot),
                    // It was another process's, or has gone.
                    Ok((None, _)) => {}
                    Err(error) => errors.handle(&error).await,
                },
            }
        }
    }

    /// Takes what waits in the queue of a listener that nobody else holds: closing would refuse it. Nobody joins the
    /// queue by a socket file that is gone.
    fn empty(&self, acceptor: &Acceptor) {
        if let Ownership::Bound(Some(path)) = &acceptor.ownership {
            path.remove();
        }
        loop {
            match acceptor.accept() {
                Ok(Some((connection, peer))) => self.begin(connection, peer, None),
                Err(error) if is_of_one_connection(&error) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// A listener that is ready to be accepted from.
pub struct Acceptor {
    label: String,
    name: Name,
    /// Before the socket: what has a file goes before it closes.
    ownership: Ownership,
    socket: AsyncFd<OwnedFd>,
}

impl Acceptor {
    /// Fails where the runtime cannot watch the socket.
    pub fn new(listener: Listener) -> anyhow::Result<Self> {
        let label = listener.label();
        Self::watching(listener).with_context(|| format!("could not listen on {label}"))
    }

    fn watching(listener: Listener) -> io::Result<Self> {
        let label = listener.label();
        let Listener { name, socket, ownership } = listener;
        let socket = match socket {
            ListeningSocket::Tcp(socket) => {
                if let Err(error) = keep_alive(&socket) {
                    warn!(%error, listener = label, "could not enable TCP keepalive; dead peers will not be detected");
                }
                socket.into()
            }
            ListeningSocket::Unix(socket) => socket.into(),
        };
        Ok(Self { label, name, ownership, socket: sys::watch(socket)? })
    }

    /// Who is first in the queue, if there is anybody.
    fn accept(&self) -> io::Result<Option<(Connection<Stream>, Peer)>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (fd, peer) = match acceptfrom_with(&self.socket, flags) {
            Err(Errno::AGAIN) => return Ok(None),
            accepted => accepted?,
        };
        let peer = Peer::at(peer)?;
        if matches!(peer, Peer::Tcp(_)) {
            sockopt::set_tcp_nodelay(&fd, true)?;
        }
        Ok(Some((Connection::begun(Stream::new(fd, peer)?, self.name.clone()), peer)))
    }

    fn queue(&self) -> Option<u32> {
        sys::accept_queue(&self.socket)
    }

    /// Whether this process, which is ending, is the only one that ever accepts here.
    fn is_last(&self, ending: bool) -> bool {
        ending && matches!(self.ownership, Ownership::Bound(_))
    }
}

/// Has the kernel find out which peers are gone without a word: a WebSocket has no other limit. On Linux a
/// connection has the options that its listener had when it came.
fn keep_alive(listener: impl AsFd) -> io::Result<()> {
    sockopt::set_socket_keepalive(&listener, true)?;
    sockopt::set_tcp_keepidle(&listener, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&listener, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&listener, KEEPALIVE_PROBES)?;
    Ok(())
}

/// Errors that say something of the connection accepted, not of the listener; accept(2) has the list.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, InvalidInput, NotConnected};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | NotConnected | InvalidInput
    )
}

/// Failures to accept, logged no more than once in `ACCEPT_LOG_INTERVAL`.
#[derive(Default)]
struct AcceptErrors {
    logged: Option<Instant>,
    unlogged: u64,
}

impl AcceptErrors {
    async fn handle(&mut self, error: &io::Error) {
        if is_of_one_connection(error) {
            debug!(%error, "a client disconnected before its connection was accepted");
            return;
        }
        self.unlogged += 1;
        if self.logged.is_none_or(|logged| logged.elapsed() >= ACCEPT_LOG_INTERVAL) {
            warn!(
                %error,
                times = self.unlogged,
                "could not accept connections; check that LimitNOFILE= is above --max-connections"
            );
            self.logged = Some(Instant::now());
            self.unlogged = 0;
        }
        sleep(ACCEPT_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_connection_sends_at_once_and_finds_out_that_its_peer_is_gone() {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a listener");
        socket.set_nonblocking(true).expect("an option");
        let address = socket.local_addr().expect("an address");
        let socket = ListeningSocket::Tcp(socket);
        let listener = Listener { name: Name::default(), socket, ownership: Ownership::Inherited };
        let acceptor = Acceptor::new(listener).expect("an acceptor");
        let _peer = TcpStream::connect(address).expect("a connection");
        let stream = acceptor.accept().expect("no error").expect("a connection").0.socket;
        assert_eq!(sockopt::tcp_nodelay(&stream), Ok(true));
        assert_eq!(sockopt::socket_keepalive(&stream), Ok(true));
        assert_eq!(sockopt::tcp_keepidle(&stream), Ok(KEEPALIVE_IDLE));
        assert_eq!(sockopt::tcp_keepintvl(&stream), Ok(KEEPALIVE_INTERVAL));
        assert_eq!(sockopt::tcp_keepcnt(&stream), Ok(KEEPALIVE_PROBES));
    }
}
