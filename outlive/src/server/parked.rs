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
pub struct Sleeper {
    pub connection: Connection,
    /// Its slot under `--max-connections`.
    pub slot: Option<OwnedSemaphorePermit>,
    /// Since when it is idle, by the registry's clock.
    pub since: u64,
}

/// Somebody was heard, who is woken by [`Sleepers::wake_heard`].
pub type Heard<'a> = AsyncFdReadyGuard<'a, OwnedFd>;

pub struct Sleepers {
    registry: Arc<Registry>,
    epoll: AsyncFd<OwnedFd>,
    asleep: Mutex<HashMap<RawFd, Sleeper>>,
    leaving: UnboundedSender<Connection>,
}

impl Sleepers {
    /// And where connections go that come to rest for the next process.
    pub fn new(registry: Arc<Registry>) -> io::Result<(Self, UnboundedReceiver<Connection>)> {
        let epoll = sys::watch(epoll::create(epoll::CreateFlags::CLOEXEC)?)?;
        let (leaving, left) = unbounded_channel();
        Ok((Self { registry, epoll, asleep: Mutex::default(), leaving }, left))
    }

    /// A connection that has come to rest sleeps, or leaves where the phase asks for it. Gives it back where it is to
    /// be served: there is something to do for it.
    pub fn take(
        &self,
        connection: Connection<Stream>,
        mut registration: Registration,
    ) -> io::Result<Option<(Connection<Stream>, Registration)>> {
        let connection = connection.unwatched()?;
        if self.registry.phase().rests() && self.can_move(&connection) {
            // Sent before it leaves the registry, so that a done registry means a full channel. Where nobody collects
            // any more, the process is ending.
            let _ = self.leaving.send(connection);
            return Ok(None);
        }
        let since = registration.entry.since();
        match self.put(Sleeper { connection, slot: registration.slot.take(), since }) {
            Ok(()) => Ok(None),
            Err(Sleeper { connection, slot, .. }) => {
                registration.slot = slot;
                // It does not try again at once.
                registration.entry.touch();
                Ok(Some((connection.watched()?.0, registration)))
            }
        }
    }

    /// Puts a connection to sleep. Gives it back where it is to be served.
    pub fn put(&self, sleeper: Sleeper) -> Result<(), Sleeper> {
        let mut asleep = lock(&self.asleep);
        // Asked behind the lock: whoever wakes or takes them all finds this one, or it finds the phase.
        let phase = self.registry.phase();
        let is_to_go = phase.rests() || phase.ends(self.can_move(&sleeper.connection));
        // What was read belongs to a request.
        if is_to_go || !sleeper.connection.unread.is_empty() {
            return Err(sleeper);
        }
        let socket = &sleeper.connection.socket;
        let key = epoll::EventData::new_u64(u64::try_from(socket.as_raw_fd()).unwrap_or(u64::MAX));
        // Once: who has left goes on speaking, to the next process.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        if let Err(error) = epoll::add(self.epoll.get_ref(), socket, key, flags) {
            debug!(%error, "could not park an idle connection");
            return Err(sleeper);
        }
        asleep.insert(socket.as_raw_fd(), sleeper);
        self.registry.set_asleep(asleep.len());
        Ok(())
    }

    /// Waits until a peer has said something.
    pub async fn heard(&self) -> io::Result<Heard<'_>> {
        self.epoll.readable().await
    }

    /// Those whose peers have said something, not all at once.
    pub fn wake_heard(&self, mut heard: Heard<'_>) -> io::Result<Vec<Sleeper>> {
        let mut events = [MaybeUninit::uninit(); BATCH];
        let (events, others) = epoll::wait(self.epoll.get_ref(), &mut events, Some(&Timespec::default()))?;
        // Whoever is heard from here on makes it ready anew.
        if others.is_empty() {
            heard.retain_ready();
        } else {
            heard.clear_ready();
        }
        let mut asleep = lock(&self.asleep);
        let keys = events.iter().filter_map(|event| RawFd::try_from(event.data.u64()).ok());
        let woken = keys.filter_map(|key| asleep.remove(&key)).collect();
        Ok(self.forget(&asleep, woken))
    }

    /// Those that have been idle for too long.
    pub fn wake_overdue(&self) -> Vec<Sleeper> {
        self.wake(|sleeper| self.registry.is_idle_for_too_long(sleeper.since))
    }

    /// Those that are to be told to end.
    pub fn wake_ending(&self) -> Vec<Sleeper> {
        let phase = self.registry.phase();
        self.wake(|sleeper| phase.ends(self.can_move(&sleeper.connection)))
    }

    fn wake(&self, wanted: impl Fn(&Sleeper) -> bool) -> Vec<Sleeper> {
        let mut asleep = lock(&self.asleep);
        let woken = asleep.extract_if(|_, sleeper| wanted(sleeper)).map(|(_, woken)| woken).collect();
        self.forget(&asleep, woken)
    }

    fn forget(&self, asleep: &HashMap<RawFd, Sleeper>, woken: Vec<Sleeper>) -> Vec<Sleeper> {
        for Sleeper { connection, .. } in &woken {
            // It was added.
            let _ = epoll::delete(self.epoll.get_ref(), &connection.socket);
        }
        self.registry.set_asleep(asleep.len());
        woken
    }

    /// Whether it can go on in the next process.
    fn can_move(&self, connection: &Connection) -> bool {
        connection.is_plain_http1() || !self.registry.keeps_all_but_http1()
    }

    /// All of them, for the next process. They are not heard any more.
    pub fn take_all(&self) -> Vec<Connection> {
        let mut asleep = lock(&self.asleep);
        self.registry.set_asleep(0);
        std::mem::take(&mut *asleep).into_values().map(|sleeper| sleeper.connection).collect()
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

    fn sleepers() -> (Arc<Registry>, Sleepers) {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        let (sleepers, _) = Sleepers::new(registry.clone()).expect("an epoll");
        (registry, sleepers)
    }

    /// One, and its peer.
    fn sleeper() -> (Sleeper, UnixStream) {
        let (ours, peer) = UnixStream::pair().expect("a pair");
        let listener = Name::default();
        let connection =
            Connection { socket: ours.into(), listener, unread: Bytes::new(), http2: None, tls: None };
        (Sleeper { connection, slot: None, since: 0 }, peer)
    }

    async fn heard(sleepers: &Sleepers) -> Vec<RawFd> {
        let heard = timeout(Duration::from_secs(120), sleepers.heard()).await.expect("in time");
        let woken = sleepers.wake_heard(heard.expect("it is heard")).expect("no error");
        woken.iter().map(|sleeper| sleeper.connection.socket.as_raw_fd()).collect()
    }

    #[tokio::test]
    async fn whoever_is_spoken_to_or_hung_up_on_is_woken_and_nobody_else() {
        let (registry, sleepers) = sleepers();
        let mut peers = Vec::new();
        for _ in 0..10 {
            let (sleeper, peer) = sleeper();
            let fd = sleeper.connection.socket.as_raw_fd();
            assert!(sleepers.put(sleeper).is_ok());
            peers.push((fd, peer));
        }
        assert_eq!(registry.counts().connections, 10);
        let (third, mut peer) = peers.remove(3);
        peer.write_all(b"x").expect("sent");
        assert_eq!(heard(&sleepers).await, [third]);
        let (sixth, peer) = peers.remove(6);
        drop(peer);
        assert_eq!(heard(&sleepers).await, [sixth]);
        assert!(timeout(Duration::from_millis(50), sleepers.heard()).await.is_err());
        assert_eq!(registry.counts().connections, 8);
        assert_eq!(sleepers.take_all().len(), 8);
        assert_eq!(registry.counts().connections, 0);
    }

    #[tokio::test]
    async fn who_has_left_is_not_heard_again_and_again() {
        let (_registry, sleepers) = sleepers();
        let (sleeper, mut peer) = sleeper();
        assert!(sleepers.put(sleeper).is_ok());
        let left = sleepers.take_all();
        peer.write_all(b"x").expect("sent");
        assert!(heard(&sleepers).await.is_empty());
        assert!(timeout(Duration::from_millis(50), sleepers.heard()).await.is_err());
        drop(left);
    }

    #[tokio::test]
    async fn what_comes_before_a_connection_sleeps_wakes_it_at_once() {
        let (_registry, sleepers) = sleepers();
        let (sleeper, mut peer) = sleeper();
        peer.write_all(b"x").expect("sent");
        let fd = sleeper.connection.socket.as_raw_fd();
        assert!(sleepers.put(sleeper).is_ok());
        assert_eq!(heard(&sleepers).await, [fd]);
    }

    #[tokio::test]
    async fn nobody_sleeps_who_is_to_move_or_to_end_or_of_whom_something_was_read() {
        let (registry, sleepers) = sleepers();
        let (mut sleeper, _peer) = sleeper();
        sleeper.connection.unread = Bytes::from_static(b"x");
        let mut sleeper = sleepers.put(sleeper).expect_err("it is to be served");
        sleeper.connection.unread = Bytes::new();
        for phase in [Phase::Resting, Phase::Lingering, Phase::Closing] {
            registry.set_phase(phase);
            sleeper = sleepers.put(sleeper).expect_err("it is to be told");
        }
        registry.set_phase(Phase::Draining);
        assert!(sleepers.put(sleeper).is_ok());
        registry.set_phase(Phase::Lingering);
        assert_eq!(sleepers.wake_ending().len(), 1);
    }
}
