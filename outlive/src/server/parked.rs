//! Idle connections. [`ParkedConnections`] keeps them without a task, a buffer or an entry in the registry, until their
//! peer sends something.
//!
//! A parked connection costs its socket and its HTTP/2 and TLS state. One epoll(7) instance watches all of them, and
//! the runtime watches that instance as if it were a socket. A drain hands parked connections over without unparking
//! them. `server/mod.rs` serves those that are unparked.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::net::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, warn};

use crate::connection::Connection;
use crate::handover::{Backup, ParkedSockets};
use crate::observe::metrics;
use crate::os::lock::lock;
use crate::os::sys;
use crate::registry::{Phase, Registration, Registry};
use crate::server::handover_queue::HandoverQueue;
use crate::transport::stream::Stream;

/// How many connections are unparked at once. Between two batches the task yields to other tasks, so that many
/// connections with input at the same time do not delay the requests in flight.
const BATCH: usize = 128;

/// How long a connection must have been idle to be closed for a new one, or because memory is short. A shorter pause means
/// that it is still in use.
pub const EVICT_AFTER: Duration = Duration::from_secs(5);

/// How long a connection is idle before it gets a duplicate in the backup. A shorter time would be wasted on connections
/// that send requests at short intervals.
const BACK_UP_AFTER: Duration = Duration::from_secs(3);
/// A connection that has been idle this long gets a duplicate even if its frame has few others.
const BACK_UP_BY: Duration = Duration::from_secs(8);
/// A frame with fewer connections needs much more kernel memory for each of them: 4.9 kB for one, 100 bytes with 64.
const MIN_FRAME: usize = 64;

/// A connection that is parked, or has just been unparked or adopted.
pub struct ParkedConnection {
    pub connection: Connection,
    /// Its slot under `--max-connections`.
    pub slot: Option<OwnedSemaphorePermit>,
    /// Since when it is idle, in milliseconds of [`Registry::now`].
    pub since: u64,
    /// Since when its peer has sent nothing, in milliseconds of [`Registry::now`]. It may have sent a PING of HTTP/2 while it
    /// was idle.
    pub quiet_since: u64,
    /// The number of its duplicate in the backup, if it has one.
    pub backup: Option<NonZeroU64>,
}

impl ParkedConnection {
    pub fn new(connection: Connection, slot: Option<OwnedSemaphorePermit>, since: u64) -> Self {
        Self { connection, slot, since, quiet_since: since, backup: None }
    }
}

/// The result of [`ParkedConnections::readable`]: at least one parked connection is readable.
/// [`ParkedConnections::unpark_readable`] needs it to clear the readiness of the epoll instance.
pub type ReadyGuard<'a> = AsyncFdReadyGuard<'a, OwnedFd>;

/// The parked connections of the process, and those that wait for the drain to hand them over.
pub struct ParkedConnections {
    registry: Arc<Registry>,
    epoll: AsyncFd<OwnedFd>,
    parked: Mutex<Parked>,
    pub handover_queue: HandoverQueue,
}

/// The parked connections and their duplicates, which change together.
#[derive(Default)]
struct Parked {
    connections: HashMap<RawFd, ParkedConnection>,
    /// How many of them have a duplicate in the backup.
    backed_up: usize,
    /// None if the unit has no store, and after the connections are handed over.
    backup: Option<Backup>,
}

impl Parked {
    fn count_backed_up(&mut self, count: usize) {
        self.backed_up = count;
        metrics::BACKED_UP.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Makes all duplicates invalid, and closes them. If that fails, closes the parked connections too.
    fn end_backup(&mut self) {
        let Some(backup) = self.backup.take() else { return };
        self.count_backed_up(0);
        for idle in self.connections.values_mut() {
            idle.backup = None;
        }
        if let Err(error) = backup.end() {
            warn!(%error, "could not make the duplicates of parked connections invalid, so closed these connections; their clients have to reconnect");
            for idle in self.connections.values() {
                let _ = shutdown(&idle.connection.socket, Shutdown::Both);
            }
        }
    }
}

impl ParkedSockets for Parked {
    fn backed_up(&self) -> usize {
        self.backed_up
    }

    fn backed_up_as(&self, socket: RawFd, number: u64) -> Option<&Connection> {
        let parked = self.connections.get(&socket)?;
        (parked.backup.map(NonZeroU64::get) == Some(number)).then_some(&parked.connection)
    }

    fn oldest_number(&self) -> Option<u64> {
        self.connections.values().filter_map(|parked| parked.backup).min().map(NonZeroU64::get)
    }
}

impl ParkedConnections {
    pub fn new(registry: Arc<Registry>) -> io::Result<Self> {
        let epoll = sys::watch(epoll::create(epoll::CreateFlags::CLOEXEC)?, Interest::READABLE)?;
        Ok(Self { registry, epoll, parked: Mutex::default(), handover_queue: HandoverQueue::default() })
    }

    /// Hands a quiescent connection over if the phase requires it, and otherwise parks it. Returns it if it has to be
    /// served instead, for example because the phase has changed and it has to close.
    pub fn take(
        &self,
        connection: Connection<Stream>,
        mut registration: Registration,
    ) -> io::Result<Option<(Connection<Stream>, Registration)>> {
        let connection = connection.unwatched()?;
        if self.registry.phase().quiesces() && self.can_move(&connection) {
            // Added before the registration is dropped, so that when the registry is drained, every connection is
            // already in the queue.
            self.handover_queue.add(connection);
            return Ok(None);
        }
        let (since, quiet_since) = (registration.since(), registration.quiet_since());
        let idle = ParkedConnection::new(connection, registration.slot.take(), since);
        match self.put(ParkedConnection { quiet_since, ..idle }) {
            Ok(()) => Ok(None),
            Err(ParkedConnection { connection, slot, .. }) => {
                registration.slot = slot;
                // Otherwise it would still be idle for long enough to be parked, and would come back here at once.
                registration.touch();
                Ok(Some((connection.watched()?.0, registration)))
            }
        }
    }

    /// Parks a connection. Returns it if it has to be served instead: bytes of it were read and not consumed, the phase
    /// requires it to be handed over or closed, or epoll could not watch it.
    pub fn put(&self, idle: ParkedConnection) -> Result<(), ParkedConnection> {
        let mut parked = lock(&self.parked);
        // Read under the lock. A drain sets the phase before it unparks or takes the parked connections, so either it
        // finds this one, or this reads the new phase. Otherwise the connection could stay parked until the process
        // exits.
        let phase = self.registry.phase();
        let must_leave = phase.quiesces() || phase.ends(self.can_move(&idle.connection));
        let connection = &idle.connection;
        // Input that was read belongs to a request, and epoll would not report it. A response without end needs its handler,
        // which may have something to send. A PROXY header has a time limit, which no parked connection has. A
        // connection that keeps its keys is not parked, because parked connections are handed over.
        if must_leave
            || connection.has_input()
            || connection.has_endless_response()
            || connection.awaits_header()
            || connection.keeps_keys()
        {
            return Err(idle);
        }
        let socket = &idle.connection.socket;
        let key = epoll::EventData::new_u64(u64::try_from(socket.as_raw_fd()).unwrap_or(u64::MAX));
        // ONESHOT, because `take_all` does not remove the sockets from the epoll instance. A socket that was handed
        // over still receives bytes, for the next process, and would make this instance readable again and again.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        if let Err(error) = epoll::add(self.epoll.get_ref(), socket, key, flags) {
            debug!(%error, "could not park an idle connection");
            return Err(idle);
        }
        parked.connections.insert(socket.as_raw_fd(), idle);
        self.registry.set_parked(parked.connections.len());
        Ok(())
    }

    /// Waits until a parked connection is readable or closed by its peer.
    pub async fn readable(&self) -> io::Result<ReadyGuard<'_>> {
        self.epoll.readable().await
    }

    /// Unparks up to [`BATCH`] connections that are readable or closed by their peers.
    pub fn unpark_readable(&self, mut ready: ReadyGuard<'_>) -> io::Result<Vec<ParkedConnection>> {
        let mut events = [MaybeUninit::uninit(); BATCH];
        let (events, others) = epoll::wait(self.epoll.get_ref(), &mut events, Some(&Timespec::default()))?;
        // With a full batch, more connections may be ready, so the readiness is kept. Otherwise it is cleared, and the
        // next event sets it again.
        if others.is_empty() {
            ready.retain_ready();
        } else {
            ready.clear_ready();
        }
        let mut parked = lock(&self.parked);
        let keys = events.iter().filter_map(|event| RawFd::try_from(event.data.u64()).ok());
        let unparked = keys.filter_map(|key| parked.connections.remove(&key)).collect();
        Ok(self.forget(&mut parked, unparked))
    }

    /// Unparks the connections that have been idle for longer than `--idle-timeout`.
    pub fn unpark_overdue(&self) -> Vec<ParkedConnection> {
        self.wake(|idle| self.registry.is_idle_for_too_long(idle.since))
    }

    /// Selects the `count` connections that have been idle longest, and unparks and returns those of them that are parked.
    /// `others` are the times since which connections that are not parked have been idle. `may_close` says which parked
    /// connections can be selected.
    pub fn unpark_longest_idle(
        &self,
        count: usize,
        others: &[u64],
        may_close: impl Fn(&ParkedConnection) -> bool,
    ) -> Vec<ParkedConnection> {
        let mut parked = lock(&self.parked);
        let evictable = parked.connections.iter();
        let evictable =
            evictable.filter(|(_, idle)| may_close(idle) && self.registry.age(idle.since) >= EVICT_AFTER);
        let evictable = evictable.map(|(&socket, idle)| (idle.since, Some(socket)));
        let mut evictable: Vec<_> = evictable.chain(others.iter().map(|since| (*since, None))).collect();
        if evictable.len() > count {
            evictable.select_nth_unstable(count);
            evictable.truncate(count);
        }
        let sockets = evictable.into_iter().filter_map(|(_, socket)| socket);
        let unparked = sockets.filter_map(|socket| parked.connections.remove(&socket)).collect();
        self.forget(&mut parked, unparked)
    }

    /// Unparks the connections that the phase requires to close, so that their clients receive GOAWAY, or
    /// `Connection: close` with their next response.
    pub fn unpark_ending(&self) -> Vec<ParkedConnection> {
        let phase = self.registry.phase();
        self.wake(|idle| phase.ends(self.can_move(&idle.connection)))
    }

    fn wake(&self, wanted: impl Fn(&ParkedConnection) -> bool) -> Vec<ParkedConnection> {
        let mut parked = lock(&self.parked);
        let unparked = parked.connections.extract_if(|_, idle| wanted(idle)).map(|(_, idle)| idle).collect();
        self.forget(&mut parked, unparked)
    }

    /// Removes unparked connections from the epoll instance, clears the marks of their duplicates, and updates the count in
    /// the registry.
    fn forget(&self, parked: &mut Parked, mut unparked: Vec<ParkedConnection>) -> Vec<ParkedConnection> {
        for ParkedConnection { connection, .. } in &unparked {
            // Cannot fail, because `put` has added the socket.
            let _ = epoll::delete(self.epoll.get_ref(), &connection.socket);
        }
        self.registry.set_parked(parked.connections.len());
        unparked.retain_mut(|idle| {
            let Some(number) = idle.backup.take() else { return true };
            parked.count_backed_up(parked.backed_up - 1);
            idle.connection.has_duplicate = true;
            let cleared = parked.backup.as_ref().map_or(Ok(()), |backup| backup.clear(number.get()));
            if let Err(error) = &cleared {
                // After a crash the next process would continue it from an old state.
                warn!(%error, "could not clear the mark of a connection's duplicate, so closed the connection");
                let _ = shutdown(&idle.connection.socket, Shutdown::Both);
            }
            cleared.is_ok()
        });
        unparked
    }

    /// Keeps duplicates of the parked connections from now on.
    pub fn begin_backup(&self, backup: Backup) {
        lock(&self.parked).backup = Some(backup);
    }

    /// Makes all duplicates invalid, and closes them. Returns whether there was a backup.
    pub fn end_backup(&self) -> bool {
        let mut parked = lock(&self.parked);
        let had_backup = parked.backup.is_some();
        parked.end_backup();
        had_backup
    }

    /// Stores the backup with systemd again.
    pub fn store_backup(&self) -> io::Result<()> {
        lock(&self.parked).backup.as_ref().map_or(Ok(()), Backup::store)
    }

    /// Adds duplicates of parked connections to the backup, at most one frame. Returns whether there are more to add.
    pub fn back_up(&self) -> io::Result<bool> {
        let mut parked = lock(&self.parked);
        if self.registry.phase() != Phase::Serving {
            return Ok(false);
        }
        // Taken out while it reads the others.
        let Some(mut backup) = parked.backup.take() else { return Ok(false) };
        let added = self.add_to(&mut backup, &mut parked);
        parked.backup = Some(backup);
        added
    }

    fn add_to(&self, backup: &mut Backup, parked: &mut Parked) -> io::Result<bool> {
        let is_stale = backup.is_stale(parked);
        let without = parked.connections.len() - parked.backed_up;
        let room = backup.room(parked, is_stale).unwrap_or(0);
        let mut new = Vec::new();
        if without > 0 && room > 0 {
            let idle = |idle: &ParkedConnection| self.registry.age(idle.quiet_since);
            let waiting = parked.connections.iter().filter(|(_, parked)| parked.backup.is_none());
            let ready = waiting.filter(|(_, parked)| idle(parked) >= BACK_UP_AFTER);
            let ready: Vec<_> = ready.take(room).map(|(&socket, parked)| (socket, parked)).collect();
            let is_due = ready.iter().any(|(_, parked)| idle(parked) >= BACK_UP_BY);
            if is_due || is_stale || ready.len() >= MIN_FRAME {
                new = ready.into_iter().map(|(socket, parked)| (socket, &parked.connection)).collect();
            }
        }
        if new.is_empty() && !is_stale {
            return Ok(false);
        }
        let numbers = backup.add(&new, parked)?;
        let sockets: Vec<_> = new.into_iter().map(|(socket, _)| socket).collect();
        let is_full = sockets.len() == room;
        let mut backed_up = parked.backed_up;
        for (socket, number) in sockets.into_iter().zip(numbers) {
            if let Some(idle) = parked.connections.get_mut(&socket) {
                // The numbers begin at 1.
                idle.backup = NonZeroU64::new(number);
                backed_up += 1;
            }
        }
        parked.count_backed_up(backed_up);
        Ok(is_full || backup.is_stale(parked))
    }

    /// Whether the next process can adopt the connection.
    fn can_move(&self, connection: &Connection) -> bool {
        self.registry.next_adopts() >= connection.required()
    }

    /// Takes all connections, for the next process. Their sockets stay in the epoll instance, which reports each of
    /// them at most once more; [`ParkedConnections::unpark_readable`] ignores that.
    pub fn take_all(&self) -> Vec<Connection> {
        let mut parked = lock(&self.parked);
        self.registry.set_parked(0);
        // Its duplicates become stale first, so that no connection is continued twice.
        parked.end_backup();
        std::mem::take(&mut parked.connections).into_values().map(|idle| idle.connection).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use axum::Router;
    use bytes::Bytes;
    use proptest::prelude::*;
    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::connection::tests::endpoint;
    use crate::handover::{Next, receive_frame, take_backed_up};
    use crate::os::rlimit;
    use crate::registry::Limits;
    use crate::transport::http2_state::Http2State;

    fn parked() -> (Arc<Registry>, ParkedConnections) {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        let parked = ParkedConnections::new(registry.clone()).expect("could not create an epoll instance");
        (registry, parked)
    }

    /// An idle connection, and the socket of its peer.
    fn idle() -> (ParkedConnection, UnixStream) {
        let (ours, peer) = UnixStream::pair().expect("could not create a socket pair");
        let endpoint = endpoint(Router::new(), None);
        let connection = Connection::begun(ours.into(), endpoint);
        (ParkedConnection::new(connection, None, 0), peer)
    }

    async fn unpark_next(parked: &ParkedConnections) -> Vec<RawFd> {
        let ready = timeout(Duration::from_secs(120), parked.readable()).await.expect("no event in time");
        let ready = ready.expect("could not wait for the epoll instance");
        let unparked = parked.unpark_readable(ready).expect("could not read the events");
        unparked.iter().map(|idle| idle.connection.socket.as_raw_fd()).collect()
    }

    #[tokio::test]
    async fn only_readable_or_closed_connections_are_unparked() {
        let (registry, parked) = parked();
        let mut peers = Vec::new();
        for _ in 0..10 {
            let (idle, peer) = idle();
            let fd = idle.connection.socket.as_raw_fd();
            assert!(parked.put(idle).is_ok());
            peers.push((fd, peer));
        }
        assert_eq!(registry.counts().connections, 10);
        let (third, mut peer) = peers.remove(3);
        peer.write_all(b"x").expect("could not send");
        assert_eq!(unpark_next(&parked).await, [third]);
        let (sixth, peer) = peers.remove(6);
        drop(peer);
        assert_eq!(unpark_next(&parked).await, [sixth]);
        assert!(timeout(Duration::from_millis(50), parked.readable()).await.is_err());
        assert_eq!(registry.counts().connections, 8);
        assert_eq!(parked.take_all().len(), 8);
        assert_eq!(registry.counts().connections, 0);
    }

    #[tokio::test]
    async fn input_on_a_handed_over_connection_is_reported_at_most_once() {
        let (_registry, parked) = parked();
        let (idle, mut peer) = idle();
        assert!(parked.put(idle).is_ok());
        let left = parked.take_all();
        peer.write_all(b"x").expect("could not send");
        assert!(unpark_next(&parked).await.is_empty());
        assert!(timeout(Duration::from_millis(50), parked.readable()).await.is_err());
        drop(left);
    }

    #[tokio::test]
    async fn input_from_before_parking_unparks_a_connection_at_once() {
        let (_registry, parked) = parked();
        let (idle, mut peer) = idle();
        peer.write_all(b"x").expect("could not send");
        let fd = idle.connection.socket.as_raw_fd();
        assert!(parked.put(idle).is_ok());
        assert_eq!(unpark_next(&parked).await, [fd]);
    }

    #[tokio::test]
    async fn connections_with_unread_bytes_or_that_must_move_or_close_are_not_parked() {
        let (registry, parked) = parked();
        let (mut idle, _peer) = idle();
        idle.connection.unread = Bytes::from_static(b"x");
        let mut idle = parked.put(idle).expect_err("parked with unread bytes");
        idle.connection.unread = Bytes::new();
        for phase in [Phase::Quiescing, Phase::Lingering, Phase::Closing] {
            registry.set_phase(phase);
            idle = parked.put(idle).expect_err("parked in a phase that moves or closes it");
        }
        registry.set_phase(Phase::Draining);
        assert!(parked.put(idle).is_ok());
        registry.set_phase(Phase::Lingering);
        assert_eq!(parked.unpark_ending().len(), 1);
    }

    /// What happens to the parked connections of a process.
    #[derive(Clone, Debug)]
    enum Step {
        Accept,
        /// A connection is unparked, and then parked again with another state, or closed.
        Park(prop::sample::Index),
        Close(prop::sample::Index),
        BackUp,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Accept),
            any::<prop::sample::Index>().prop_map(Step::Park),
            any::<prop::sample::Index>().prop_map(Step::Close),
            Just(Step::BackUp),
        ];
        prop::collection::vec(step, 1..120)
    }

    /// The socket and the state of a connection.
    fn identity(socket: &impl AsFd, http2: Option<&Http2State>) -> (u64, u32) {
        let inode = rustix::fs::fstat(socket).expect("the socket is open").st_ino;
        (inode, http2.expect("each connection has a state").last_stream)
    }

    fn parked_again(mut idle: ParkedConnection, parked: &ParkedConnections) {
        let last_stream = idle.connection.http2.map_or(1, |state| state.last_stream + 2);
        idle.connection.http2 = Some(Box::new(Http2State { last_stream, ..Http2State::default() }));
        assert!(parked.put(idle).is_ok());
    }

    /// The connections that the process after a crash continues.
    fn continued(reading_end: &OwnedFd) -> Vec<(u64, u32)> {
        let mut continued = Vec::new();
        while let Next::Frame(frame) = receive_frame(reading_end).expect("the channel is readable") {
            for (socket, record) in take_backed_up(frame).sockets {
                let state = Http2State::decode(&record.http2.expect("each connection has a state"));
                continued.push(identity(&socket, state.as_ref()));
            }
        }
        continued
    }

    proptest! {
        #[test]
        fn crash_keeps_each_backed_up_connection_once_and_in_its_last_state(
            steps in steps(), limit in prop_oneof![Just(12_usize), Just(100), Just(1000)],
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("it starts");
            let _guard = runtime.enter();
            let (registry, parked) = parked();
            let (backup, reading_end) = Backup::in_memory(7, limit);
            parked.begin_backup(backup);
            let mut peers = Vec::new();
            let mut now = 0;
            for step in steps {
                now += 1_000;
                registry.set_now(now);
                let sockets: Vec<_> = lock(&parked.parked).connections.keys().copied().collect();
                let unpark = |index: prop::sample::Index| {
                    let socket = *index.get(&sockets);
                    parked.wake(|idle| idle.connection.socket.as_raw_fd() == socket)
                };
                match step {
                    Step::Accept => {
                        let (idle, peer) = idle();
                        peers.push(peer);
                        parked_again(ParkedConnection { since: now, ..idle }, &parked);
                    }
                    Step::Park(_) | Step::Close(_) if sockets.is_empty() => {}
                    Step::Park(index) => {
                        for idle in unpark(index) {
                            parked_again(ParkedConnection { since: now, ..idle }, &parked);
                        }
                    }
                    Step::Close(index) => drop(unpark(index)),
                    Step::BackUp => {
                        now += 10_000;
                        registry.set_now(now);
                        back_up_all(&parked);
                    }
                }
            }
            let expected: BTreeSet<_> = lock(&parked.parked)
                .connections
                .values()
                .filter(|idle| idle.backup.is_some())
                .map(|idle| identity(&idle.connection.socket, idle.connection.http2.as_deref()))
                .collect();
            let counts = lock(&parked.parked).backed_up;
            let continued = continued(&reading_end);
            prop_assert_eq!(continued.len(), counts, "each connection is continued once");
            prop_assert_eq!(continued.into_iter().collect::<BTreeSet<_>>(), expected);
        }
    }

    /// Calls `back_up` until it adds nothing more. Panics after 1000 rounds, because the backup would replace frames without end.
    fn back_up_all(parked: &ParkedConnections) {
        const ROUNDS: usize = 1000;
        let ends = (0..ROUNDS).any(|_| !parked.back_up().expect("the channel has room"));
        assert!(ends, "the backup does not end within {ROUNDS} rounds");
    }

    #[tokio::test]
    async fn backup_of_connections_that_become_idle_one_by_one_merges_their_frames() {
        const CONNECTIONS: u64 = 200;
        let (registry, parked) = parked();
        let (backup, reading_end) = Backup::in_memory(7, 60_000);
        parked.begin_backup(backup);
        let mut peers = Vec::new();
        for count in 1..=CONNECTIONS {
            let since = count * 10_000;
            let (idle, peer) = idle();
            peers.push(peer);
            parked_again(ParkedConnection { since, ..idle }, &parked);
            registry.set_now(since + 9_000);
            back_up_all(&parked);
        }
        assert_eq!(continued(&reading_end).len() as u64, CONNECTIONS);
    }

    #[tokio::test]
    async fn backup_of_more_connections_than_the_channel_has_room_for_ends() {
        const CONNECTIONS: u32 = 2_700;
        rlimit::make_room(2 * CONNECTIONS);
        let (registry, parked) = parked();
        let (backup, reading_end) = Backup::in_memory(7, 60_000);
        parked.begin_backup(backup);
        let peers: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let (idle, peer) = idle();
                parked_again(idle, &parked);
                peer
            })
            .collect();
        registry.set_now(10_000);
        back_up_all(&parked);
        let continued = continued(&reading_end).len();
        assert!((2_000..peers.len()).contains(&continued), "{continued} are continued");
    }

    #[tokio::test]
    async fn handed_over_connections_are_not_in_the_backup() {
        let (registry, parked) = parked();
        let (backup, reading_end) = Backup::in_memory(7, 1000);
        parked.begin_backup(backup);
        let (idle, _peer) = idle();
        parked_again(idle, &parked);
        registry.set_now(10_000);
        parked.back_up().expect("the channel has room");
        assert_eq!(lock(&parked.parked).backed_up, 1);
        let taken = parked.take_all();
        assert_eq!(taken.len(), 1);
        assert_eq!(continued(&reading_end), []);
    }

    /// A duplicate in systemd's store would otherwise keep a connection open that this process has closed.
    #[tokio::test]
    async fn peer_sees_the_close_of_a_connection_that_has_a_duplicate() {
        let (registry, parked) = parked();
        let (backup, _reading_end) = Backup::in_memory(7, 1000);
        parked.begin_backup(backup);
        let (idle, peer) = idle();
        parked_again(idle, &parked);
        registry.set_now(10_000);
        parked.back_up().expect("the channel has room");
        for idle in parked.wake(|_| true) {
            drop(idle.connection.watched().expect("the peer is connected"));
        }
        peer.set_read_timeout(Some(Duration::from_secs(60))).expect("the timeout is valid");
        let mut peer = peer;
        assert_eq!(peer.read(&mut [0]).expect("the connection is closed in time"), 0);
    }
}
