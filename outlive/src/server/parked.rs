//! Idle connections. [`ParkedConnections`] keeps them without a task, a buffer or an entry in the registry, until their
//! peer sends something.
//!
//! A parked connection costs its socket and its HTTP/2 and TLS state. One epoll(7) instance watches all of them, and
//! the runtime watches that instance as if it were a socket. A drain hands parked connections over without unparking
//! them. `server/mod.rs` serves those that are unparked.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use rustix::event::{Timespec, epoll};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::OwnedSemaphorePermit;
use tracing::debug;

use crate::connection::Connection;
use crate::os::lock::lock;
use crate::os::sys;
use crate::registry::{Registration, Registry};
use crate::server::handover_queue::HandoverQueue;
use crate::transport::stream::Stream;

/// How many connections are unparked at once. Between two batches the task yields to other tasks, so that many
/// connections with input at the same time do not delay the requests in flight.
const BATCH: usize = 128;

/// A connection that is parked, or has just been unparked or adopted.
pub struct ParkedConnection {
    pub connection: Connection,
    /// Its slot under `--max-connections`.
    pub slot: Option<OwnedSemaphorePermit>,
    /// Since when it is idle, in milliseconds of [`Registry::now`].
    pub since: u64,
}

/// The result of [`ParkedConnections::readable`]: at least one parked connection is readable.
/// [`ParkedConnections::unpark_readable`] needs it to clear the readiness of the epoll instance.
pub type ReadyGuard<'a> = AsyncFdReadyGuard<'a, OwnedFd>;

/// The parked connections of the process, and those that wait for the drain to hand them over.
pub struct ParkedConnections {
    registry: Arc<Registry>,
    epoll: AsyncFd<OwnedFd>,
    parked: Mutex<HashMap<RawFd, ParkedConnection>>,
    pub handover_queue: HandoverQueue,
}

impl ParkedConnections {
    pub fn new(registry: Arc<Registry>) -> io::Result<Self> {
        let epoll = sys::watch(epoll::create(epoll::CreateFlags::CLOEXEC)?)?;
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
        let since = registration.since();
        match self.put(ParkedConnection { connection, slot: registration.slot.take(), since }) {
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
        // Unread bytes belong to a request, and epoll would not report them. A response without end needs its handler,
        // which may have something to send.
        if must_leave || !idle.connection.unread.is_empty() || idle.connection.has_endless_response() {
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
        parked.insert(socket.as_raw_fd(), idle);
        self.registry.set_parked(parked.len());
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
        let unparked = keys.filter_map(|key| parked.remove(&key)).collect();
        Ok(self.forget(&parked, unparked))
    }

    /// Unparks the connections that have been idle for longer than `--idle-timeout`.
    pub fn unpark_overdue(&self) -> Vec<ParkedConnection> {
        self.wake(|idle| self.registry.is_idle_for_too_long(idle.since))
    }

    /// Unparks the connections that the phase requires to close, so that their clients receive GOAWAY, or
    /// `Connection: close` with their next response.
    pub fn unpark_ending(&self) -> Vec<ParkedConnection> {
        let phase = self.registry.phase();
        self.wake(|idle| phase.ends(self.can_move(&idle.connection)))
    }

    fn wake(&self, wanted: impl Fn(&ParkedConnection) -> bool) -> Vec<ParkedConnection> {
        let mut parked = lock(&self.parked);
        let unparked = parked.extract_if(|_, idle| wanted(idle)).map(|(_, idle)| idle).collect();
        self.forget(&parked, unparked)
    }

    /// Removes unparked connections from the epoll instance, and updates the count in the registry.
    fn forget(
        &self,
        parked: &HashMap<RawFd, ParkedConnection>,
        unparked: Vec<ParkedConnection>,
    ) -> Vec<ParkedConnection> {
        for ParkedConnection { connection, .. } in &unparked {
            // Cannot fail, because `put` has added the socket.
            let _ = epoll::delete(self.epoll.get_ref(), &connection.socket);
        }
        self.registry.set_parked(parked.len());
        unparked
    }

    /// Whether the next process can adopt the connection.
    fn can_move(&self, connection: &Connection) -> bool {
        let is_kept = connection.replay.is_some() && self.registry.keeps_upgrades()
            || connection.open_streams().is_some() && self.registry.keeps_streams();
        !is_kept && (connection.is_plain_http1() || !self.registry.keeps_http2_and_tls())
    }

    /// Takes all connections, for the next process. Their sockets stay in the epoll instance, which reports each of
    /// them at most once more; [`ParkedConnections::unpark_readable`] ignores that.
    pub fn take_all(&self) -> Vec<Connection> {
        let mut parked = lock(&self.parked);
        self.registry.set_parked(0);
        std::mem::take(&mut *parked).into_values().map(|idle| idle.connection).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use axum::Router;
    use bytes::Bytes;
    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::connection::tests::endpoint;
    use crate::registry::{Limits, Phase};

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
        let connection = Connection {
            socket: ours.into(),
            endpoint,
            unread: Bytes::new(),
            http2: None,
            tls: None,
            replay: None,
        };
        (ParkedConnection { connection, slot: None, since: 0 }, peer)
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
}
