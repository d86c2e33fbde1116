//! Idle connections: they sleep, without a task, a buffer or a place in the registry, until their peer says something.
//!
//! What a sleeper costs is its socket, and what its two ends have agreed upon. All sleepers are watched through one
//! epoll(7) of their own, which the runtime watches as if it were a socket. A process that ends hands them over as
//! they lie.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use rustix::event::{Timespec, epoll};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::debug;

use crate::os::lock::lock;
use crate::os::sys;
use crate::registry::{Registration, Registry};
use crate::transport::stream::{Connection, Stream};

/// How many are woken at once, before others have their turn.
const BATCH: usize = 128;

/// A connection that sleeps, or would.
pub struct ParkedConnection {
    pub connection: Connection,
    /// Its slot under `--max-connections`.
    pub slot: Option<OwnedSemaphorePermit>,
    /// Since when it is idle, by the registry's clock.
    pub since: u64,
}

/// Somebody was heard, who is woken by [`ParkedConnections::unpark_readable`].
pub type Heard<'a> = AsyncFdReadyGuard<'a, OwnedFd>;

pub struct ParkedConnections {
    registry: Arc<Registry>,
    epoll: AsyncFd<OwnedFd>,
    parked: Mutex<HashMap<RawFd, ParkedConnection>>,
    leaving: UnboundedSender<Connection>,
}

impl ParkedConnections {
    /// And where connections go that come to rest for the next process.
    pub fn new(registry: Arc<Registry>) -> io::Result<(Self, UnboundedReceiver<Connection>)> {
        let epoll = sys::watch(epoll::create(epoll::CreateFlags::CLOEXEC)?)?;
        let (leaving, left) = unbounded_channel();
        Ok((Self { registry, epoll, parked: Mutex::default(), leaving }, left))
    }

    /// A connection that has come to rest sleeps, or leaves where the phase asks for it. Gives it back where it is to
    /// be served: there is something to do for it.
    pub fn take(
        &self,
        connection: Connection<Stream>,
        mut registration: Registration,
    ) -> io::Result<Option<(Connection<Stream>, Registration)>> {
        let connection = connection.unwatched()?;
        if self.registry.phase().quiesces() && self.can_move(&connection) {
            // Sent before it leaves the registry, so that a done registry means a full channel. Where nobody collects
            // any more, the process is ending.
            let _ = self.leaving.send(connection);
            return Ok(None);
        }
        let since = registration.entry.since();
        match self.put(ParkedConnection { connection, slot: registration.slot.take(), since }) {
            Ok(()) => Ok(None),
            Err(ParkedConnection { connection, slot, .. }) => {
                registration.slot = slot;
                // It does not try again at once.
                registration.entry.touch();
                Ok(Some((connection.watched()?.0, registration)))
            }
        }
    }

    /// Puts a connection to sleep. Gives it back where it is to be served.
    pub fn put(&self, idle: ParkedConnection) -> Result<(), ParkedConnection> {
        let mut parked = lock(&self.parked);
        // Asked behind the lock: whoever wakes or takes them all finds this one, or it finds the phase.
        let phase = self.registry.phase();
        let is_to_go = phase.quiesces() || phase.ends(self.can_move(&idle.connection));
        // What was read belongs to a request.
        if is_to_go || !idle.connection.unread.is_empty() {
            return Err(idle);
        }
        let socket = &idle.connection.socket;
        let key = epoll::EventData::new_u64(u64::try_from(socket.as_raw_fd()).unwrap_or(u64::MAX));
        // Once: who has left goes on speaking, to the next process.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        if let Err(error) = epoll::add(self.epoll.get_ref(), socket, key, flags) {
            debug!(%error, "could not park an idle connection");
            return Err(idle);
        }
        parked.insert(socket.as_raw_fd(), idle);
        self.registry.set_parked(parked.len());
        Ok(())
    }

    /// Waits until a peer has said something.
    pub async fn heard(&self) -> io::Result<Heard<'_>> {
        self.epoll.readable().await
    }

    /// Those whose peers have said something, not all at once.
    pub fn unpark_readable(&self, mut heard: Heard<'_>) -> io::Result<Vec<ParkedConnection>> {
        let mut events = [MaybeUninit::uninit(); BATCH];
        let (events, others) = epoll::wait(self.epoll.get_ref(), &mut events, Some(&Timespec::default()))?;
        // Whoever is heard from here on makes it ready anew.
        if others.is_empty() {
            heard.retain_ready();
        } else {
            heard.clear_ready();
        }
        let mut parked = lock(&self.parked);
        let keys = events.iter().filter_map(|event| RawFd::try_from(event.data.u64()).ok());
        let woken = keys.filter_map(|key| parked.remove(&key)).collect();
        Ok(self.forget(&parked, woken))
    }

    /// Those that have been idle for too long.
    pub fn unpark_overdue(&self) -> Vec<ParkedConnection> {
        self.wake(|idle| self.registry.is_idle_for_too_long(idle.since))
    }

    /// Those that are to be told to end.
    pub fn unpark_ending(&self) -> Vec<ParkedConnection> {
        let phase = self.registry.phase();
        self.wake(|idle| phase.ends(self.can_move(&idle.connection)))
    }

    fn wake(&self, wanted: impl Fn(&ParkedConnection) -> bool) -> Vec<ParkedConnection> {
        let mut parked = lock(&self.parked);
        let woken = parked.extract_if(|_, idle| wanted(idle)).map(|(_, woken)| woken).collect();
        self.forget(&parked, woken)
    }

    fn forget(
        &self,
        parked: &HashMap<RawFd, ParkedConnection>,
        woken: Vec<ParkedConnection>,
    ) -> Vec<ParkedConnection> {
        for ParkedConnection { connection, .. } in &woken {
            // It was added.
            let _ = epoll::delete(self.epoll.get_ref(), &connection.socket);
        }
        self.registry.set_parked(parked.len());
        woken
    }

    /// Whether it can go on in the next process.
    fn can_move(&self, connection: &Connection) -> bool {
        connection.is_plain_http1() || !self.registry.keeps_http2_and_tls()
    }

    /// All of them, for the next process. They are not heard any more.
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

    use bytes::Bytes;
    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::registry::{Limits, Phase};
    use crate::transport::listener_name::Name;

    fn parked() -> (Arc<Registry>, ParkedConnections) {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        let (parked, _) = ParkedConnections::new(registry.clone()).expect("an epoll");
        (registry, parked)
    }

    /// One, and its peer.
    fn idle() -> (ParkedConnection, UnixStream) {
        let (ours, peer) = UnixStream::pair().expect("a pair");
        let listener = Name::default();
        let connection =
            Connection { socket: ours.into(), listener, unread: Bytes::new(), http2: None, tls: None };
        (ParkedConnection { connection, slot: None, since: 0 }, peer)
    }

    async fn heard(parked: &ParkedConnections) -> Vec<RawFd> {
        let heard = timeout(Duration::from_secs(120), parked.heard()).await.expect("in time");
        let woken = parked.unpark_readable(heard.expect("it is heard")).expect("no error");
        woken.iter().map(|idle| idle.connection.socket.as_raw_fd()).collect()
    }

    #[tokio::test]
    async fn whoever_is_spoken_to_or_hung_up_on_is_woken_and_nobody_else() {
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
        peer.write_all(b"x").expect("sent");
        assert_eq!(heard(&parked).await, [third]);
        let (sixth, peer) = peers.remove(6);
        drop(peer);
        assert_eq!(heard(&parked).await, [sixth]);
        assert!(timeout(Duration::from_millis(50), parked.heard()).await.is_err());
        assert_eq!(registry.counts().connections, 8);
        assert_eq!(parked.take_all().len(), 8);
        assert_eq!(registry.counts().connections, 0);
    }

    #[tokio::test]
    async fn who_has_left_is_not_heard_again_and_again() {
        let (_registry, parked) = parked();
        let (idle, mut peer) = idle();
        assert!(parked.put(idle).is_ok());
        let left = parked.take_all();
        peer.write_all(b"x").expect("sent");
        assert!(heard(&parked).await.is_empty());
        assert!(timeout(Duration::from_millis(50), parked.heard()).await.is_err());
        drop(left);
    }

    #[tokio::test]
    async fn what_comes_before_a_connection_sleeps_wakes_it_at_once() {
        let (_registry, parked) = parked();
        let (idle, mut peer) = idle();
        peer.write_all(b"x").expect("sent");
        let fd = idle.connection.socket.as_raw_fd();
        assert!(parked.put(idle).is_ok());
        assert_eq!(heard(&parked).await, [fd]);
    }

    #[tokio::test]
    async fn nobody_sleeps_who_is_to_move_or_to_end_or_of_whom_something_was_read() {
        let (registry, parked) = parked();
        let (mut idle, _peer) = idle();
        idle.connection.unread = Bytes::from_static(b"x");
        let mut idle = parked.put(idle).expect_err("it is to be served");
        idle.connection.unread = Bytes::new();
        for phase in [Phase::Quiescing, Phase::Lingering, Phase::Closing] {
            registry.set_phase(phase);
            idle = parked.put(idle).expect_err("it is to be told");
        }
        registry.set_phase(Phase::Draining);
        assert!(parked.put(idle).is_ok());
        registry.set_phase(Phase::Lingering);
        assert_eq!(parked.unpark_ending().len(), 1);
    }
}
