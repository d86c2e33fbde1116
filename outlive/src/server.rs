//! Accepts connections, and serves each in a task of its own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::connection::{self, End, Services};
use crate::handover::Secret;
use crate::kind::{ListenerKind, Name};
use crate::listeners::{Holder, Listener, ListeningSocket};
use crate::lock::lock;
use crate::registry::Registry;
use crate::stream::{Connection, Stream};
use crate::sys;

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
    at_rest: mpsc::UnboundedSender<Connection>,
    /// The tasks that accept from listeners that nobody else holds.
    own_ports: TaskTracker,
    queues: Queues,
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
    /// The server, and where its connections go when they come to rest.
    pub fn new(
        services: Services,
        registry: Arc<Registry>,
        max_connections: u32,
        queues: Queues,
    ) -> (Self, mpsc::UnboundedReceiver<Connection>) {
        let (at_rest, rested) = mpsc::unbounded_channel();
        let slots = Arc::new(Semaphore::new(max_connections as usize));
        let admin_slots = Arc::new(Semaphore::new(ADMIN_CONNECTIONS));
        let own_ports = TaskTracker::new();
        (
            Self { services: Arc::new(services), registry, slots, admin_slots, at_rest, own_ports, queues },
            rested,
        )
    }

    /// Accepts from `listener` from now on, whenever the phase allows.
    pub fn listen(&self, listener: Listener) -> anyhow::Result<()> {
        let label = listener.label();
        let acceptor = Acceptor::new(listener).with_context(|| format!("could not listen on {label}"))?;
        let acceptor = Arc::new(acceptor);
        self.queues.add(&acceptor);
        let is_own = matches!(acceptor.holder, Holder::Nobody(_));
        let accept = self.clone().accept(acceptor);
        if is_own {
            self.own_ports.spawn(accept)
        } else {
            tokio::spawn(accept)
        };
        Ok(())
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
    pub fn go_on_with_tickets(&self, keys: Option<Secret>) {
        let tickets = self.services.tls.as_ref().and_then(|tls| tls.tickets.as_ref());
        if let (Some(tickets), Some(keys)) = (tickets, keys)
            && !tickets.go_on_with(&keys.0)
        {
            debug!("the predecessor's keys of session tickets make no sense");
        }
    }

    /// A connection that nobody drives.
    #[cfg(test)]
    pub fn registered(&self, peer: crate::stream::Peer) -> crate::registry::Registration {
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

    /// Serves a connection, above `--max-connections` if need be: it is there already.
    pub fn adopt(&self, connection: Connection) {
        let slot = self.slots(&connection.listener).clone().try_acquire_owned().ok();
        self.serve(connection, slot);
    }

    fn slots(&self, listener: &Name) -> &Arc<Semaphore> {
        if listener.kind() == ListenerKind::Admin { &self.admin_slots } else { &self.slots }
    }

    fn serve(&self, connection: Connection, slot: Option<OwnedSemaphorePermit>) {
        let registration = self.registry.register(connection.peer, slot);
        let services = self.services.clone();
        let at_rest = self.at_rest.clone();
        tokio::spawn(async move {
            if let End::AtRest(connection, registration) =
                connection::serve(connection, registration, &services).await
            {
                // Sent before it leaves the registry, so that a done registry means a full channel.
                // Where nobody collects any more, the process is ending.
                let _ = at_rest.send(connection);
                drop(registration);
            }
        });
    }

    async fn accept(self, acceptor: Arc<Acceptor>) {
        let mut errors = AcceptErrors::default();
        loop {
            let registry = &self.registry;
            registry.until_phase(|phase| phase.accepts() || acceptor.is_last(phase.ends(true))).await;
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
                () = registry.until_phase(|phase| !phase.accepts() || acceptor.is_last(phase.ends(true))) => {}
                accepted = accepted => match accepted {
                    Ok((Some(connection), slot)) => self.serve(connection, slot),
                    // It was another process's, or has gone.
                    Ok((None, _)) => {}
                    Err(error) => errors.handle(&error).await,
                },
            }
        }
    }

    /// Takes what waits in the queue of a listener that nobody else holds: closing would refuse it.
    fn empty(&self, acceptor: &Acceptor) {
        loop {
            match acceptor.accept() {
                Ok(Some(connection)) => self.adopt(connection),
                Err(error) if is_of_one_connection(&error) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

struct Acceptor {
    label: String,
    socket: AsyncFd<OwnedFd>,
    name: Name,
    holder: Holder,
}

impl Acceptor {
    fn new(listener: Listener) -> io::Result<Self> {
        let label = listener.label();
        let Listener { name, socket, holder } = listener;
        let socket = match socket {
            ListeningSocket::Tcp(socket) => {
                if let Err(error) = keep_alive(&socket) {
                    warn!(%error, listener = label, "peers that are gone are not found out");
                }
                socket.into()
            }
            ListeningSocket::Unix(socket) => socket.into(),
        };
        Ok(Self { label, socket: sys::watch(socket)?, name, holder })
    }

    /// Who is first in the queue, if there is anybody.
    fn accept(&self) -> io::Result<Option<Connection>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (fd, peer) = match acceptfrom_with(&self.socket, flags) {
            Err(Errno::AGAIN) => return Ok(None),
            accepted => accepted?,
        };
        let (stream, peer) = Stream::new(fd, peer)?;
        if let Stream::Tcp(stream) = &stream {
            stream.set_nodelay(true)?;
        }
        Ok(Some(Connection {
            stream,
            peer,
            listener: self.name.clone(),
            unread: Bytes::new(),
            http2: None,
            tls: None,
        }))
    }

    fn queue(&self) -> Option<u32> {
        sys::accept_queue(&self.socket)
    }

    /// Whether this process, which is ending, is the only one that ever accepts here.
    fn is_last(&self, ending: bool) -> bool {
        ending && matches!(self.holder, Holder::Nobody(_))
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
            debug!(%error, "a connection was gone before it was accepted");
            return;
        }
        self.unlogged += 1;
        if self.logged.is_none_or(|logged| logged.elapsed() >= ACCEPT_LOG_INTERVAL) {
            warn!(%error, times = self.unlogged, "could not accept (is LimitNOFILE= above --max-connections?)");
            self.logged = Some(Instant::now());
            self.unlogged = 0;
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
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
        let listener = Listener { name: Name::default(), socket, holder: Holder::Parent };
        let acceptor = Acceptor::new(listener).expect("an acceptor");
        let _peer = TcpStream::connect(address).expect("a connection");
        let stream = acceptor.accept().expect("no error").expect("a connection").stream;
        assert_eq!(sockopt::tcp_nodelay(&stream), Ok(true));
        assert_eq!(sockopt::socket_keepalive(&stream), Ok(true));
        assert_eq!(sockopt::tcp_keepidle(&stream), Ok(KEEPALIVE_IDLE));
        assert_eq!(sockopt::tcp_keepintvl(&stream), Ok(KEEPALIVE_INTERVAL));
        assert_eq!(sockopt::tcp_keepcnt(&stream), Ok(KEEPALIVE_PROBES));
    }
}
