//! Accepts connections, and serves each in a task of its own.
//!
//! [`Server`] accepts from the listeners (`listeners/`) within `--max-connections`, registers each connection
//! (`registry/`), and serves it (`connection/`). A connection that becomes quiescent is parked (`parked.rs`), or
//! added to the queue of the drain (`handover_queue.rs`), which hands it over (`lifecycle/drain.rs`). Handlers give
//! upgraded connections back to [`Server::serve_returned`]. [`Server::adopt`] continues connections of the predecessor
//! (`takeover/adopter.rs`).

pub mod allocator;
mod handover_queue;
mod parked;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, acceptfrom_with, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::connection::{
    self, Connection, ConnectionContext, ConnectionOutcome, Endpoint, EndpointKind, ReturnedConnection,
    ReturnedConnections, Succession,
};
use crate::handover::{Backup, Overflow, Secret, has_store};
use crate::listeners::{Listener, ListeningSocket, Ownership};
use crate::os::lock::lock;
use crate::os::pressure::MemoryPressure;
use crate::os::rlimit::{self, FdRoom};
use crate::os::{sys, task};
use crate::registry::{Phase, Registration, Registry};
pub use crate::server::handover_queue::HandoverQueue;
use crate::server::parked::{EVICT_AFTER, ParkedConnection, ParkedConnections};
use crate::transport::stream::{Peer, Stream};
use crate::transport::tickets::Tickets;

/// The pause after a failed accept(2), for example because file descriptors ran out. Without it, the task would use a
/// whole core until the cause is gone.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The minimum time between two log lines about failures to accept.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// How long a TCP connection is silent before the kernel sends the first keepalive probe (`TCP_KEEPIDLE` of tcp(7)).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// The time between two keepalive probes (`TCP_KEEPINTVL`).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// After so many probes without an answer the kernel closes the connection (`TCP_KEEPCNT`), unless `TCP_USER_TIMEOUT` is set.
const KEEPALIVE_PROBES: u32 = 6;
/// The value of `TCP_USER_TIMEOUT` (tcp(7)): after this time the kernel closes a connection whose client acknowledges neither data
/// nor probes. Without the option unacknowledged data takes about 15 minutes, because the kernel sends no probes meanwhile.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(120);

/// How long a new connection waits for a slot before idle ones are closed for it. Each of them may take some time to close,
/// because its client has to close too.
const EVICTION_INTERVAL: Duration = Duration::from_millis(20);
/// During [`REACTION_TIME`], at most so many connections are closing at a time to make room for a new one. Each call of `evict`
/// closes at most so many, also after that time.
const EVICTION: usize = 4;
/// The time after which [`LATER_EVICTION`] applies, because the clients have not closed within a round trip.
const REACTION_TIME: Duration = Duration::from_millis(200);
/// The maximum number of connections that are closing for a new one after [`REACTION_TIME`].
const LATER_EVICTION: usize = 32;
/// The maximum number of connections that are closed at once because memory is short. While they close, each of them takes
/// the memory of an active connection, about 14 kB.
const PRESSURE_EVICTION: usize = 256;
/// The share of the idle connections that is closed at once because memory is short: one of so many. A short pressure then
/// costs few connections; the kernel reports a longer one again.
const PRESSURE_SHARE: usize = 8;

/// How often idle connections are added to the backup.
const BACKUP_INTERVAL: Duration = Duration::from_secs(1);
/// How many descriptors in flight the backup leaves to others: the records of frames, and messages to systemd.
const BACKUP_RESERVE: u64 = 1024;

/// The maximum number of connections to the admin listeners.
const ADMIN_CONNECTIONS: usize = 64;

/// Accepts and serves connections. Clones share the registry and the limits.
#[derive(Clone)]
pub struct Server {
    context: Arc<ConnectionContext>,
    /// One for each listener.
    endpoints: Arc<[Arc<Endpoint>]>,
    registry: Arc<Registry>,
    slots: Arc<Semaphore>,
    /// Separate from `slots`, so that the admin listeners answer when all slots are in use.
    admin_slots: Arc<Semaphore>,
    parked: Arc<ParkedConnections>,
    /// The tasks that accept from listeners with [`Ownership::Bound`], which no other process has open.
    own_ports: TaskTracker,
    queues: Queues,
    /// Connections for which there are no file descriptors.
    overflow: Arc<Overflow>,
}

/// The accept queues of the open listeners, for a metric.
#[derive(Clone, Default)]
pub struct Queues(Arc<Mutex<Vec<Weak<Acceptor>>>>);

impl Queues {
    /// How many connections wait to be accepted, with the label of each TCP listener.
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
    /// Fails if epoll_create(2) fails.
    pub fn new(
        (context, returned): (ConnectionContext, ReturnedConnections),
        endpoints: &[Arc<Endpoint>],
        registry: Arc<Registry>,
        max_connections: u32,
        queues: Queues,
    ) -> anyhow::Result<Self> {
        let parked = ParkedConnections::new(registry.clone())
            .context("could not create an epoll instance for parked connections")?;
        let parked = Arc::new(parked);
        let slots = Arc::new(Semaphore::new(max_connections as usize));
        let admin_slots = Arc::new(Semaphore::new(ADMIN_CONNECTIONS));
        let own_ports = TaskTracker::new();
        let context = Arc::new(context);
        let overflow = Arc::default();
        let endpoints = endpoints.into();
        let server =
            Self { context, endpoints, registry, slots, admin_slots, parked, own_ports, queues, overflow };
        task::spawn(server.clone().serve_unparked());
        task::spawn(server.clone().serve_returned(returned));
        Ok(server)
    }

    /// Starts a task that accepts connections in each phase that permits it.
    pub fn accept_from(&self, acceptor: Acceptor) {
        let acceptor = Arc::new(acceptor);
        self.queues.add(&acceptor);
        let is_own = matches!(acceptor.ownership, Ownership::Bound(_));
        let accept = self.clone().accept(acceptor);
        if is_own {
            task::spawn(self.own_ports.track_future(accept))
        } else {
            task::spawn(accept)
        };
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// What is served on each listener of this process.
    pub fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.endpoints
    }

    /// None if this process hands no TLS connections over.
    fn tickets(&self) -> Option<&Tickets> {
        self.endpoints.iter().find_map(|endpoint| endpoint.tls()?.tickets())
    }

    /// The TLS session ticket keys, for the next process. None if this process hands no TLS connections over.
    pub fn ticket_keys(&self) -> Option<Secret> {
        self.tickets().map(|tickets| Secret(tickets.encode()))
    }

    /// Uses the predecessor's session ticket keys, so that clients can resume TLS sessions that began there.
    pub fn adopt_ticket_keys(&self, keys: Option<Secret>) {
        if let (Some(tickets), Some(keys)) = (self.tickets(), keys)
            && !tickets.adopt_keys(&keys.0)
        {
            debug!("invalid TLS ticket keys from the predecessor; clients will do full handshakes");
        }
    }

    #[cfg(test)]
    pub fn registered(&self, peer: Peer) -> Registration {
        self.registry.register(peer, None)
    }

    /// Whether this process has bound listeners itself. Their ports close with it.
    pub fn owns_ports(&self) -> bool {
        !self.own_ports.is_empty()
    }

    /// Waits until the listeners that this process bound itself are closed, and the connections in their queues are
    /// accepted. They close in the phase `Lingering`.
    pub async fn own_ports_closed(&self) {
        self.own_ports.close();
        self.own_ports.wait().await;
    }

    /// Parks or serves a connection that another process handed over, even above `--max-connections`, because it is
    /// open already and would have to be closed otherwise.
    pub fn adopt(&self, connection: Connection) {
        let slot = self.slots(&connection.endpoint).clone().try_acquire_owned().ok();
        let since = self.registry.now();
        if connection.endpoint.is_refusing() {
            if let Some((connection, registration)) =
                self.registered_again(ParkedConnection::new(connection, slot, since))
            {
                registration.evict();
                self.serve(connection, registration);
            }
            return;
        }
        if let Err(unparked) = self.parked.put(ParkedConnection::new(connection, slot, since)) {
            self.serve_unparked_connection(unparked);
        }
    }

    /// Serves a connection, and closes it after its next response.
    pub fn finish(&self, connection: Connection) {
        self.finish_with(connection, None);
    }

    /// As [`Server::finish`], for a connection of which a handover channel still holds a descriptor: the socket is also shut
    /// down, because that descriptor would keep it open.
    pub fn finish_copy(&self, connection: Connection) {
        let copy = connection.socket.try_clone().ok();
        self.finish_with(connection, copy);
    }

    fn finish_with(&self, connection: Connection, copy: Option<OwnedFd>) {
        let since = self.registry.now();
        match connection.watched() {
            Ok((connection, peer)) => {
                let registration = self.registry.register_since(peer, None, since);
                registration.close_after_response();
                let context = self.context.clone();
                task::spawn(async move {
                    drop(connection::serve(connection, registration, &context).await);
                    // Closing is not enough, because the descriptor in the channel keeps the connection open.
                    if let Some(copy) = copy {
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

    /// Keeps duplicates of the parked connections in systemd's store until a drain begins, if the unit has a store.
    /// `predecessor_gone` is cancelled when the predecessor can store no further descriptor. The predecessor has emptied its own
    /// backup at the beginning of its drain.
    pub async fn back_up(self, generation: u64, predecessor_gone: CancellationToken) {
        match has_store().await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                return warn!(%error, "could not find out whether systemd stores file descriptors; until the next restart, a crash closes idle connections too");
            }
        }
        // `clear_store` is called only when `predecessor_gone` is cancelled. An earlier call could remove a channel that the
        // predecessor has stored.
        let mut is_cleared = predecessor_gone.is_cancelled();
        if is_cleared {
            self.overflow.clear_store();
        }
        // The kernel limits the descriptors in flight of a user to this number (ETOOMANYREFS in unix(7)).
        let limit = rlimit::limit().saturating_sub(BACKUP_RESERVE);
        match Backup::new(generation, usize::try_from(limit).unwrap_or(usize::MAX)) {
            Ok(backup) => self.parked.begin_backup(backup),
            Err(error) => {
                return warn!(%error, "could not create the backup of idle connections; until the next restart, a crash closes idle connections too");
            }
        }
        self.store_backup();
        let mut clock = interval(BACKUP_INTERVAL);
        while self.registry.phase() == Phase::Serving {
            tokio::select! {
                _ = clock.tick() => {}
                () = predecessor_gone.cancelled(), if !is_cleared => {
                    is_cleared = true;
                    self.overflow.clear_store();
                    self.store_backup();
                    continue;
                }
            }
            loop {
                match self.parked.back_up() {
                    Ok(true) => tokio::task::yield_now().await,
                    Ok(false) => break,
                    Err(error) => {
                        debug!(%error, "could not add idle connections to the backup; retrying");
                        break;
                    }
                }
            }
        }
    }

    /// Stores the backup with systemd, also again after the descriptors of its name were removed.
    pub fn store_backup(&self) {
        if let Err(error) = self.overflow.store_beside(|| self.parked.store_backup()) {
            warn!(%error, "could not store the backup of idle connections; until the next restart, a crash closes idle connections too");
        }
    }

    /// Makes the duplicates of the parked connections invalid, and closes them. Returns whether there was a backup.
    pub fn end_backup(&self) -> bool {
        self.parked.end_backup()
    }

    fn slots(&self, endpoint: &Endpoint) -> &Arc<Semaphore> {
        match endpoint.kind {
            EndpointKind::Http | EndpointKind::Https(_) | EndpointKind::Socket(_) => &self.slots,
            EndpointKind::Admin => &self.admin_slots,
        }
    }

    /// Sets a phase, and serves the parked connections that have to close in it.
    pub fn enter(&self, phase: Phase) {
        let _accepting = self.registry.accepting();
        self.registry.set_phase(phase);
        for idle in self.parked.unpark_ending() {
            self.serve_unparked_connection(idle);
        }
    }

    /// The connections for the drain to hand over, without the parked ones.
    pub fn handover_queue(&self) -> &HandoverQueue {
        &self.parked.handover_queue
    }

    pub fn take_parked(&self) -> Vec<Connection> {
        self.parked.take_all()
    }

    /// Serves parked connections that are readable, closed by their peers, or idle for too long. Never returns.
    async fn serve_unparked(self) {
        let registry = &self.registry;
        let mut clock = interval(registry.interval());
        loop {
            // In a phase that hands connections over, the next process reads the input of parked ones.
            registry.wait_for_phase(|phase| !phase.quiesces()).await;
            let unparked = tokio::select! {
                ready = self.parked.readable() => {
                    ready.and_then(|ready| self.wake(|parked| parked.unpark_readable(ready)))
                }
                _ = clock.tick() => self.wake(|parked| Ok(parked.unpark_overdue())),
            };
            if let Err(error) = unparked {
                warn!(%error, "epoll on parked connections failed; retrying");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }

    /// Continues the upgraded connections that their handlers have given back, or closes them.
    async fn serve_returned(self, mut returned: ReturnedConnections) {
        while let Some(connection) = returned.recv().await {
            task::spawn(self.clone().continue_returned(connection));
        }
    }

    async fn continue_returned(self, mut returned: ReturnedConnection) {
        if let Err(error) = returned.flush().await {
            debug!(%error, "closed an upgraded connection: its client does not receive the last messages");
            return;
        }
        if !returned.was_requested() {
            // Its handler waits for the shutdown, which begins with `Draining`. Continued in this phase, it would return
            // at once, again and again. The drain must not wait for it meanwhile.
            let waiting = returned.handle();
            let _awaits = waiting.awaits_handover();
            self.registry.wait_for_phase(|phase| phase != Phase::Draining).await;
        }
        let can_continue = match self.registry.phase() {
            Phase::Serving | Phase::Announcing => returned.was_requested(),
            Phase::Draining | Phase::Quiescing | Phase::Holding => !returned.handle().keeps_upgrade(),
            Phase::Lingering | Phase::Closing | Phase::Finishing => false,
        };
        if !can_continue {
            return returned.close().await;
        }
        match returned.succession() {
            Succession::Continues(connection, registration) => {
                registration.restart();
                match self.parked.take(connection, registration) {
                    Ok(None) => {}
                    // A drain that has not succeeded continues in the phase `Draining`, and a reload may fail.
                    Ok(Some((connection, registration))) => self.serve(connection, registration),
                    Err(error) => {
                        debug!(%error, "a client disconnected while its connection was handed over");
                    }
                }
            }
            Succession::Ends(returned) => returned.close().await,
            Succession::Lost => debug!("closed an upgraded connection: its TLS state could not be extracted"),
        }
    }

    /// Serves the connections that `unpark` returns, unless the phase hands them over.
    fn wake(
        &self,
        unpark: impl FnOnce(&ParkedConnections) -> io::Result<Vec<ParkedConnection>>,
    ) -> io::Result<()> {
        // Unparked connections are neither parked nor registered for a moment. Without this count, a drain could end in
        // that moment, and they would be closed.
        let _accepting = self.registry.accepting();
        if !self.registry.phase().quiesces() {
            for idle in unpark(&self.parked)? {
                self.serve_unparked_connection(idle);
            }
        }
        Ok(())
    }

    fn serve_unparked_connection(&self, idle: ParkedConnection) {
        if let Some((connection, registration)) = self.registered_again(idle) {
            self.serve(connection, registration);
        }
    }

    /// Registers a connection that was parked. None if its client has disconnected.
    fn registered_again(&self, idle: ParkedConnection) -> Option<(Connection<Stream>, Registration)> {
        let ParkedConnection { connection, slot, since, .. } = idle;
        match connection.watched() {
            Ok((connection, peer)) => Some((connection, self.registry.register_since(peer, slot, since))),
            Err(error) => {
                debug!(%error, "a client disconnected while its connection was parked");
                None
            }
        }
    }

    fn begin(&self, connection: Connection<Stream>, peer: Peer, slot: Option<OwnedSemaphorePermit>) {
        let registration = self.registry.register(peer, slot);
        self.serve(connection, registration);
    }

    fn serve(&self, connection: Connection<Stream>, registration: Registration) {
        let (context, parked) = (self.context.clone(), self.parked.clone());
        tokio::spawn(async move {
            let mut next = Some((connection, registration));
            while let Some((connection, registration)) = next {
                let ConnectionOutcome::Quiescent(connection, registration) =
                    connection::serve(connection, registration, &context).await
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
        let mut room = FdRoom::default();
        loop {
            let registry = &self.registry;
            let is_over = |phase: Phase| phase == Phase::Holding || acceptor.is_last(phase.ends(true));
            registry.wait_for_phase(|phase| phase.accepts() || is_over(phase)).await;
            if registry.phase() == Phase::Holding {
                // No later phase accepts. A process that lingers must not keep the port open.
                return;
            }
            if acceptor.is_last(registry.phase().ends(true)) {
                self.empty(&acceptor);
                return;
            }
            let _accepting = registry.accepting();
            if !registry.phase().accepts() {
                continue;
            }
            let accepted = async {
                let mut ready = acceptor.socket.readable().await?;
                // A slot is acquired only when a connection waits; otherwise an idle listener would keep one from the
                // others. Until there is one, the connection waits in the accept queue of the socket.
                let slot = self.acquire_slot(&acceptor.endpoint).await;
                if !room.take_for_connection() {
                    return Err(Errno::MFILE.into());
                }
                let connection = acceptor.accept()?;
                if connection.is_none() {
                    ready.clear_ready();
                }
                io::Result::Ok((connection, slot))
            };
            tokio::select! {
                () = registry.wait_for_phase(|phase| !phase.accepts() || acceptor.is_last(phase.ends(true))) => {}
                accepted = accepted => match accepted {
                    Ok((Some((connection, peer)), slot)) => self.begin(connection, peer, slot),
                    // Another process has accepted the connection, or the client has closed it.
                    Ok((None, _)) => {}
                    Err(error) => errors.handle(&error).await,
                },
            }
        }
    }

    /// Waits for a slot. If there is none, closes the connections that have been idle longest until there is one.
    async fn acquire_slot(&self, endpoint: &Endpoint) -> Option<OwnedSemaphorePermit> {
        let slots = self.slots(endpoint);
        let begun = Instant::now();
        loop {
            match timeout(EVICTION_INTERVAL, slots.clone().acquire_owned()).await {
                Ok(slot) => return slot.ok(),
                Err(_) if begun.elapsed() < REACTION_TIME => self.evict(slots, EVICTION),
                Err(_) => self.evict(slots, LATER_EVICTION),
            }
        }
    }

    /// Closes some of the longest-idle connections that have one of `slots`, so that at most `limit` of them are closing.
    fn evict(&self, slots: &Arc<Semaphore>, limit: usize) {
        let count = limit.saturating_sub(self.registry.evicted(slots)).min(EVICTION);
        let count = self.close_longest_idle(count, Some(slots));
        if count > 0 {
            debug!(count, "closed idle connections to make room for another one (--max-connections)");
        }
    }

    /// Closes some of the longest-idle connections each time that memory is short.
    pub async fn relieve(self, mut pressure: MemoryPressure) {
        loop {
            if let Err(error) = pressure.reported().await {
                return warn!(%error, "could not watch MEMORY_PRESSURE_WATCH any longer; idle connections stay open");
            }
            let idle = self.registry.parked() + self.registry.idle_for(EVICT_AFTER).len();
            let count = self.close_longest_idle((idle / PRESSURE_SHARE).clamp(1, PRESSURE_EVICTION), None);
            if count > 0 {
                warn!(
                    count,
                    "memory is short: closing {count} of {idle} idle connections, the longest idle first"
                );
            }
        }
    }

    /// Closes up to `count` of the longest-idle connections; with `slots`, only those that hold one of its permits. Returns how
    /// many it closes, which is 0 during a drain.
    fn close_longest_idle(&self, count: usize, slots: Option<&Arc<Semaphore>>) -> usize {
        let _accepting = self.registry.accepting();
        if self.registry.phase() != Phase::Serving {
            return 0;
        }
        // The connections that are not parked because they cannot be.
        let mut others = self.registry.idle_for(EVICT_AFTER);
        others.retain(|entry| slots.is_none_or(|slots| entry.has_slot_of(slots)));
        others.sort_unstable_by_key(|entry| entry.since());
        others.truncate(count);
        let times: Vec<_> = others.iter().map(|entry| entry.since()).collect();
        let has_slot = |idle: &ParkedConnection| {
            let own = idle.slot.as_ref().map(OwnedSemaphorePermit::semaphore);
            slots.is_none_or(|slots| own.is_some_and(|own| Arc::ptr_eq(own, slots)))
        };
        let unparked = self.parked.unpark_longest_idle(count, &times, has_slot);
        others.truncate(count - unparked.len());
        for entry in &others {
            entry.evict();
        }
        let evicted = unparked.into_iter().filter_map(|idle| self.registered_again(idle));
        others.len()
            + evicted
                .map(|(connection, registration)| {
                    registration.evict();
                    self.serve(connection, registration);
                })
                .count()
    }

    /// Accepts the connections in the queue of a listener that only this process has open, because closing the listener
    /// would reset them. A socket file is removed first, so that no more connections enter the queue.
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
    endpoint: Arc<Endpoint>,
    /// Declared before `socket`, so that the socket file is removed before the listener closes.
    ownership: Ownership,
    socket: AsyncFd<OwnedFd>,
}

impl Acceptor {
    /// `stall`: how long a client may take to read the next part of a response. Fails if the runtime cannot watch the socket
    /// (file descriptors ran out).
    pub fn new(listener: Listener, endpoint: Arc<Endpoint>, stall: Duration) -> anyhow::Result<Self> {
        let label = listener.label();
        Self::watching(listener, endpoint, stall).with_context(|| format!("could not listen on {label}"))
    }

    fn watching(listener: Listener, endpoint: Arc<Endpoint>, stall: Duration) -> io::Result<Self> {
        let label = listener.label();
        let Listener { socket, ownership, .. } = listener;
        let socket = match socket {
            ListeningSocket::Tcp(socket) => {
                if let Err(error) = detect_dead_peers(&socket, stall) {
                    warn!(%error, listener = label, "could not set TCP keepalive or TCP_USER_TIMEOUT; connections of clients that have disappeared may stay open");
                }
                socket.into()
            }
            ListeningSocket::Unix(socket) => socket.into(),
        };
        Ok(Self { label, endpoint, ownership, socket: sys::watch(socket, Interest::READABLE)? })
    }

    /// Accepts the first connection of the queue. None if the queue is empty.
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
        Ok(Some((Connection::begun(Stream::new(fd, peer, false)?, self.endpoint.clone()), peer)))
    }

    fn queue(&self) -> Option<u32> {
        sys::accept_queue(&self.socket)
    }

    /// Whether the listener has to close because the process is `ending` and no other process can accept from it.
    fn is_last(&self, ending: bool) -> bool {
        ending && matches!(self.ownership, Ownership::Bound(_))
    }
}

/// Lets the kernel close connections whose peers have disappeared without a FIN. An idle WebSocket has no other time limit. An
/// event stream to such a peer would end only after about 15 minutes without `TCP_USER_TIMEOUT`. On Linux an accepted connection inherits these
/// options from its listener.
fn detect_dead_peers(listener: impl AsFd, stall: Duration) -> io::Result<()> {
    sockopt::set_socket_keepalive(&listener, true)?;
    sockopt::set_tcp_keepidle(&listener, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&listener, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&listener, KEEPALIVE_PROBES)?;
    // The kernel also closes a client that acknowledges but reads nothing. If `stall` permits that for longer, the option is not
    // set (0). A longer limit would not do, because it would also replace the count of probes for idle connections.
    let unacknowledged = if stall < UNACKNOWLEDGED_LIMIT { UNACKNOWLEDGED_LIMIT } else { Duration::ZERO };
    sockopt::set_tcp_user_timeout(&listener, u32::try_from(unacknowledged.as_millis()).unwrap_or(0))?;
    Ok(())
}

/// Whether an error concerns only the accepted connection, and not the listener; see "Error handling" in accept(2).
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, InvalidInput, NotConnected};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | NotConnected | InvalidInput
    )
}

/// Logs failures to accept, at most once in [`ACCEPT_LOG_INTERVAL`].
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

    use axum::Router;

    use super::*;
    use crate::connection::tests::endpoint;
    use crate::transport::listener_name::Name;

    #[tokio::test]
    async fn accepted_connections_have_nodelay_and_keepalive_and_a_limit_for_lost_clients_unless_stalls_may_last_longer()
     {
        for (stall, limit) in [(30, 120_000), (119, 120_000), (120, 0), (u64::MAX, 0)] {
            assert_options_of_accepted(Duration::from_secs(stall), limit);
        }
    }

    fn assert_options_of_accepted(stall: Duration, unacknowledged: u32) {
        let socket = TcpListener::bind("127.0.0.1:0").expect("could not bind");
        socket.set_nonblocking(true).expect("could not set the socket non-blocking");
        let address = socket.local_addr().expect("the socket has no address");
        let socket = ListeningSocket::Tcp(socket);
        let listener = Listener { name: Name::default(), socket, ownership: Ownership::Inherited };
        let acceptor = Acceptor::new(listener, endpoint(Router::new(), None), stall)
            .expect("could not watch the listener");
        let _peer = TcpStream::connect(address).expect("could not connect");
        let stream = acceptor.accept().expect("could not accept").expect("the queue is empty").0.socket;
        assert_eq!(sockopt::tcp_nodelay(&stream), Ok(true));
        assert_eq!(sockopt::socket_keepalive(&stream), Ok(true));
        assert_eq!(sockopt::tcp_keepidle(&stream), Ok(KEEPALIVE_IDLE));
        assert_eq!(sockopt::tcp_keepintvl(&stream), Ok(KEEPALIVE_INTERVAL));
        assert_eq!(sockopt::tcp_keepcnt(&stream), Ok(KEEPALIVE_PROBES));
        assert_eq!(sockopt::tcp_user_timeout(&stream), Ok(unacknowledged));
    }
}
