//! Every connection that is awake, as the rest of the process sees it: counted, told of each phase, watched for its
//! time limits; those that sleep (`sleepers.rs`) are a number here. What a connection is doing is one value
//! (`state.rs`) that its own tasks change (`entry.rs`); a request that is answered at once takes no lock.

mod entry;
#[cfg(all(test, model))]
mod models;
mod state;
mod tally;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64 as Clock, AtomicUsize};
use std::time::Duration;

pub use entry::{Entry, InFlight, PendingFrame, Registration, Remaining, Unfinished};
pub use state::Stage;
use tally::{Outstanding, Tally};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::stream::Peer;
use crate::sync::{Mutex, Notify, lock};

/// What the process wants of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Business as usual.
    Serving,
    /// Business as usual, for load balancers to take notice that it will end (`/readyz`).
    Announcing,
    /// Business goes on; connections that cannot move are told to end.
    Draining,
    /// Nothing is accepted; connections that can move come to rest and leave.
    Resting,
    /// As `Resting`, and no request begins any more: HTTP/2 streams are held until the others have ended, and
    /// connections that cannot move close when they are idle.
    Holding,
    /// There is nobody to move to: all connections are told to end. Others still hold the port, so
    /// what they pass is accepted.
    Lingering,
    /// As `Lingering`, and nothing is accepted.
    Closing,
    /// As `Closing`, and connections close when they are idle.
    Finishing,
}

impl Phase {
    const ALL: [Self; 8] = [
        Self::Serving,
        Self::Announcing,
        Self::Draining,
        Self::Resting,
        Self::Holding,
        Self::Lingering,
        Self::Closing,
        Self::Finishing,
    ];

    pub fn accepts(self) -> bool {
        matches!(self, Self::Serving | Self::Announcing | Self::Draining | Self::Lingering)
    }

    /// Whether a connection is told to end with its next answer.
    pub fn ends(self, movable: bool) -> bool {
        match self {
            Self::Serving | Self::Announcing => false,
            Self::Draining | Self::Resting | Self::Holding => !movable,
            Self::Lingering | Self::Closing | Self::Finishing => true,
        }
    }

    /// Whether connections that can move come to rest and leave.
    pub fn rests(self) -> bool {
        matches!(self, Self::Resting | Self::Holding)
    }

    /// Whether a connection closes when it is idle, because a request that begins now may not have the time it needs.
    pub fn closes_idle(self, movable: bool) -> bool {
        match self {
            Self::Holding => !movable,
            Self::Finishing => true,
            Self::Serving
            | Self::Announcing
            | Self::Draining
            | Self::Resting
            | Self::Lingering
            | Self::Closing => false,
        }
    }
}

/// Time limits that the registry watches over.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub head: Duration,
    pub idle: Duration,
    /// For a peer to take the next chunk of an answer.
    pub stall: Duration,
    /// For a peer to take the last answer and close.
    pub close: Duration,
}

impl Limits {
    /// How often to look: often enough to keep the shortest limit within a quarter.
    fn interval(self) -> Duration {
        let shortest = self.head.min(self.idle).min(self.stall).min(self.close);
        (shortest / 4).clamp(Duration::from_millis(5), Duration::from_secs(1))
    }
}

pub struct Registry {
    born: Instant,
    limits: Limits,
    shutdown: CancellationToken,
    /// The phase, and what keeps the process from ending.
    tally: Tally,
    /// The phase has changed; what is outstanding has come to its end; or, of a connection that somebody waits for,
    /// what it is doing has changed.
    changed: Notify,
    connections: Mutex<Connections>,
    /// Connections that sleep (`sleepers.rs`), which are not in `connections`.
    asleep: AtomicUsize,
    /// Milliseconds since `born`, as of the last look: a clock that costs nothing to read.
    now: Clock,
}

#[derive(Default)]
struct Connections {
    next_id: u64,
    /// Its keys are our own: no peer can choose them.
    open: HashMap<u64, Arc<Entry>, BuildHasherDefault<DefaultHasher>>,
    /// Requests answered on those that are closed.
    answered: u64,
    /// How many were open at the same time, at the most, since `Registry::fewer_awake` was last true.
    most: usize,
}

/// Sums over all open connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub connections: usize,
    pub in_flight: usize,
    pub answered: u64,
}

impl Registry {
    /// `shutdown` is cancelled with the first phase that is no business as usual.
    pub fn new(limits: Limits, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            born: Instant::now(),
            limits,
            shutdown,
            tally: Tally::new(),
            changed: Notify::new(),
            connections: Mutex::new(Connections::default()),
            asleep: AtomicUsize::new(0),
            now: Clock::new(0),
        })
    }

    pub fn register(self: &Arc<Self>, peer: Peer, slot: Option<OwnedSemaphorePermit>) -> Registration {
        self.register_since(peer, slot, self.now())
    }

    /// One that has been idle `since` then, by this registry's clock.
    pub fn register_since(
        self: &Arc<Self>,
        peer: Peer,
        slot: Option<OwnedSemaphorePermit>,
        since: u64,
    ) -> Registration {
        let mut connections = lock(&self.connections);
        let id = connections.next_id;
        connections.next_id += 1;
        let registration = Registration::new(self, id, peer, slot, since);
        self.tally.add(Outstanding::Unanswered);
        connections.open.insert(id, registration.entry.clone());
        connections.most = connections.most.max(connections.open.len());
        registration
    }

    /// Whatever sums up the connections sees it among the open ones, or among the closed.
    fn remove(&self, entry: &Entry) {
        let mut connections = lock(&self.connections);
        if connections.open.remove(&entry.id).is_some() {
            connections.answered += entry.started();
        }
    }

    fn count_unanswered(&self, before: Stage, after: Stage) {
        match (before.is_unanswered(), after.is_unanswered()) {
            (true, false) => self.take(Outstanding::Unanswered),
            (false, true) => self.tally.add(Outstanding::Unanswered),
            _ => {}
        }
    }

    /// One less. Whoever waits hears of the last.
    fn take(&self, one: Outstanding) {
        let standing = self.tally.take(one);
        let is_last = standing.is_done() || one == Outstanding::Arriving && !standing.is_arriving();
        if is_last && !matches!(standing.phase(), Phase::Serving | Phase::Announcing) {
            self.changed.notify_waiters();
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    /// How often to look at time limits.
    pub fn interval(&self) -> Duration {
        self.limits.interval()
    }

    /// Milliseconds since this registry's birth, as of its last look at the time limits.
    pub fn now(&self) -> u64 {
        self.now.load(Relaxed)
    }

    /// How long ago that was.
    fn age(&self, since: u64) -> Duration {
        Duration::from_millis(self.now().saturating_sub(since))
    }

    pub fn is_idle_for_too_long(&self, since: u64) -> bool {
        self.age(since) > self.limits.idle
    }

    /// So many connections sleep: they are open, and need nothing.
    pub fn set_asleep(&self, count: usize) {
        self.asleep.store(count, Relaxed);
    }

    pub fn asleep(&self) -> usize {
        self.asleep.load(Relaxed)
    }

    /// Whether there are at least `enough` fewer open connections, without the parked ones, than at the highest point since
    /// this was last true.
    #[cfg(not(feature = "jemalloc"))]
    pub fn fewer_awake(&self, enough: usize) -> bool {
        let mut connections = lock(&self.connections);
        let is_enough = connections.most - connections.open.len() >= enough;
        if is_enough {
            connections.most = connections.open.len();
        }
        is_enough
    }

    fn set_now(&self, now: u64) {
        self.now.store(now, Relaxed);
    }

    pub fn phase(&self) -> Phase {
        self.tally.now().phase()
    }

    /// Sets a phase after `Serving`.
    pub fn set_phase(&self, phase: Phase) {
        let before = self.tally.enter(phase);
        self.changed.notify_waiters();
        if phase == Phase::Announcing {
            return;
        }
        self.shutdown.cancel();
        // Business goes on for most: that is no news to wake thousands for.
        let is_first = matches!(before.phase(), Phase::Serving | Phase::Announcing);
        let goes_on = is_first && phase == Phase::Draining && !before.keeps_all_but_http1();
        let is_old = |entry: &Entry| goes_on && entry.state().is_movable();
        for entry in self.entries().iter().filter(|entry| !is_old(entry)) {
            entry.wake();
        }
    }

    /// Who comes after does not know how to go on with HTTP/2 and TLS connections: they are told to end. To be said
    /// before the phase that asks them to come to rest.
    pub fn keep_all_but_http1(&self) {
        self.tally.keep_all_but_http1();
    }

    /// See [`Registry::keep_all_but_http1`].
    pub fn keeps_all_but_http1(&self) -> bool {
        self.tally.now().keeps_all_but_http1()
    }

    /// Waits until the phase is one that `wanted` says yes to.
    pub async fn until_phase(&self, wanted: impl Fn(Phase) -> bool) {
        self.until(|| wanted(self.phase())).await;
    }

    /// Waits until `done`, which is asked again at each change of the phase, when [`Registry::is_done`] comes to be so
    /// in a process that no longer just serves, when the last predecessor has ended, and at each change of a
    /// connection that is [`Registry::watched`].
    pub async fn until(&self, mut done: impl FnMut() -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if done() {
                return;
            }
            changed.await;
        }
    }

    /// A connection that somebody waits for has changed.
    fn notify_of_watched(&self) {
        // There it is the last one of all that is waited for (`take`), and they come by the thousand.
        if self.phase() != Phase::Resting {
            self.changed.notify_waiters();
        }
    }

    /// While this is held, a connection may come.
    pub fn accepting(&self) -> Accepting<'_> {
        self.tally.add(Outstanding::Accepting);
        Accepting(self)
    }

    /// While this is held, a predecessor passes connections on.
    pub fn arriving(&self) -> Arriving<'_> {
        self.tally.add(Outstanding::Arriving);
        Arriving(self)
    }

    pub fn is_arriving(&self) -> bool {
        self.tally.now().is_arriving()
    }

    /// Whether the last answer of every connection is out, and no connection comes any more.
    pub fn is_done(&self) -> bool {
        self.tally.now().is_done()
    }

    pub fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.connections).open.values().cloned().collect()
    }

    /// Of all that are open, whoever waits in [`Registry::until`] hears.
    pub fn watched(&self) -> Vec<Arc<Entry>> {
        let entries = self.entries();
        for entry in &entries {
            entry.watch();
        }
        entries
    }

    pub fn counts(&self) -> Counts {
        let (entries, answered) = {
            let connections = lock(&self.connections);
            (connections.open.values().cloned().collect::<Vec<_>>(), connections.answered)
        };
        let begun = Counts { connections: entries.len() + self.asleep(), in_flight: 0, answered };
        entries.iter().fold(begun, |counts, entry| {
            // Asked for in this order, a request that begins meanwhile is not taken for one that is over.
            let started = entry.started();
            let in_flight = entry.state().in_flight();
            Counts {
                in_flight: counts.in_flight + in_flight as usize,
                answered: counts.answered + started.saturating_sub(in_flight.into()),
                ..counts
            }
        })
    }

    /// What has to end before the others can move on without waiting for it: the requests in flight
    /// now, the connections that are ending, and those that cannot move. Whoever waits in [`Registry::until`] hears of
    /// each of them.
    pub fn unfinished(&self) -> Vec<Unfinished> {
        let mut all: Vec<_> = self.watched().into_iter().map(Unfinished::new).collect();
        all.retain(Unfinished::is_so);
        all
    }

    /// When the last of the requests in flight began.
    pub fn last_request(&self) -> Option<Instant> {
        self.entries().iter().filter_map(|entry| entry.last_request()).max()
    }

    /// What would be lost if the process ended now.
    pub fn remaining(&self) -> Vec<Remaining> {
        self.entries().iter().map(|entry| entry.remaining()).collect()
    }

    /// Looks at the time limits of every connection, for as long as the process lives.
    pub async fn watch(self: Arc<Self>) {
        let mut clock = tokio::time::interval(self.interval());
        loop {
            clock.tick().await;
            self.look(u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
    }

    /// Sets the clock, and wakes each connection that a time limit concerns.
    fn look(&self, now: u64) {
        self.set_now(now);
        for entry in self.entries() {
            if entry.is_overdue() || entry.is_drowsy() {
                entry.wake();
            }
        }
    }

    /// Sets the clock forward in a test that does not run [`Registry::watch`].
    #[cfg(test)]
    pub fn advance(&self, by: Duration) {
        self.look(self.now() + u64::try_from(by.as_millis()).unwrap_or(u64::MAX));
    }
}

/// See [`Registry::accepting`].
pub struct Accepting<'a>(&'a Registry);

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        self.0.take(Outstanding::Accepting);
    }
}

/// See [`Registry::arriving`].
pub struct Arriving<'a>(&'a Registry);

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.0.take(Outstanding::Arriving);
    }
}

#[cfg(all(test, not(model)))]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

    use hyper::Uri;

    use super::*;

    fn registry() -> Arc<Registry> {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        Registry::new(limits, CancellationToken::new())
    }

    #[test]
    #[cfg(not(feature = "jemalloc"))]
    fn a_drop_of_open_connections_is_reported_once_even_if_the_peak_was_short() {
        let registry = registry();
        let mut open: Vec<_> = (0..10).map(|_| registry.register(Peer::Unix, None)).collect();
        assert!(!registry.fewer_awake(1));
        open.truncate(6);
        assert!(!registry.fewer_awake(5));
        open.truncate(5);
        assert!(registry.fewer_awake(5) && !registry.fewer_awake(1));
        drop((0..5).map(|_| registry.register(Peer::Unix, None)).collect::<Vec<_>>());
        assert!(registry.fewer_awake(5) && !registry.fewer_awake(1));
    }

    #[test]
    fn a_connection_that_closes_while_they_are_summed_up_counts_once() {
        let registry = registry();
        let (begun, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(SeqCst) {
                    let answered = registry.counts().answered;
                    let begun = begun.load(SeqCst);
                    assert!(answered <= begun, "{answered} answered of {begun}");
                }
            });
            for _ in 0..20_000 {
                let connection = registry.register(Peer::Unix, None);
                begun.fetch_add(1, SeqCst);
                connection.entry.begin(&Uri::from_static("/"));
                connection.entry.end();
            }
            is_over.store(true, SeqCst);
        });
        assert_eq!(registry.counts(), Counts { connections: 0, in_flight: 0, answered: 20_000 });
    }
}
