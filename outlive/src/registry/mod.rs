//! Every connection that is awake, as the rest of the process sees it: counted, told of each phase, watched for its
//! time limits; those that sleep (`parked.rs`) are a number here. What a connection is doing is one value
//! (`state.rs`) that its own tasks change (`entry.rs`); a request that is answered at once takes no lock.

mod entry;
#[cfg(all(test, feature = "model-tests"))]
mod models;
mod phase_word;
mod state;
mod sync;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64 as Clock, AtomicUsize};
use std::time::Duration;

pub use entry::{CutOffConnection, Entry, InFlight, PendingFrame, PendingWork, Registration};
use phase_word::{PendingCount, PhaseWord};
pub use state::{BodyEnd, Stage};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::registry::sync::{Mutex, Notify, lock};
use crate::transport::stream::Peer;

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
    Quiescing,
    /// As `Quiescing`, and no request begins any more: HTTP/2 streams are held until the others have ended, and
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
        Self::Quiescing,
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
            Self::Draining | Self::Quiescing | Self::Holding => !movable,
            Self::Lingering | Self::Closing | Self::Finishing => true,
        }
    }

    /// Whether connections that can move come to rest and leave.
    pub fn quiesces(self) -> bool {
        matches!(self, Self::Quiescing | Self::Holding)
    }

    /// Whether a connection closes when it is idle, because a request that begins now may not have the time it needs.
    pub fn closes_idle(self, movable: bool) -> bool {
        match self {
            Self::Holding => !movable,
            Self::Finishing => true,
            Self::Serving
            | Self::Announcing
            | Self::Draining
            | Self::Quiescing
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
    phase_word: PhaseWord,
    /// The phase has changed; what is outstanding has come to its end; or, of a connection that somebody waits for,
    /// what it is doing has changed.
    changed: Notify,
    connections: Mutex<Connections>,
    /// Connections that sleep (`parked.rs`), which are not in `connections`.
    parked: AtomicUsize,
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
            phase_word: PhaseWord::new(),
            changed: Notify::new(),
            connections: Mutex::new(Connections::default()),
            parked: AtomicUsize::new(0),
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
        self.phase_word.acquire(PendingCount::Unanswered);
        connections.open.insert(id, registration.entry.clone());
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
            (true, false) => self.release(PendingCount::Unanswered),
            (false, true) => self.phase_word.acquire(PendingCount::Unanswered),
            _ => {}
        }
    }

    /// One less. Whoever waits hears of the last.
    fn release(&self, one: PendingCount) {
        let snapshot = self.phase_word.release(one);
        let is_last = snapshot.is_drained() || one == PendingCount::Arriving && !snapshot.is_arriving();
        if is_last && !matches!(snapshot.phase(), Phase::Serving | Phase::Announcing) {
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
    pub fn set_parked(&self, count: usize) {
        self.parked.store(count, Relaxed);
    }

    pub fn parked(&self) -> usize {
        self.parked.load(Relaxed)
    }

    fn set_now(&self, now: u64) {
        self.now.store(now, Relaxed);
    }

    pub fn phase(&self) -> Phase {
        self.phase_word.now().phase()
    }

    /// Sets a phase after `Serving`.
    pub fn set_phase(&self, phase: Phase) {
        let before = self.phase_word.enter(phase);
        self.changed.notify_waiters();
        if phase == Phase::Announcing {
            return;
        }
        self.shutdown.cancel();
        // Business goes on for most: that is no news to wake thousands for.
        let is_first = matches!(before.phase(), Phase::Serving | Phase::Announcing);
        let goes_on = is_first && phase == Phase::Draining && !before.keeps_http2_and_tls();
        let is_old = |entry: &Entry| goes_on && entry.state().is_movable();
        for entry in self.entries().iter().filter(|entry| !is_old(entry)) {
            entry.wake();
        }
    }

    /// Who comes after does not know how to go on with HTTP/2 and TLS connections: they are told to end. To be said
    /// before the phase that asks them to come to rest.
    pub fn keep_http2_and_tls(&self) {
        self.phase_word.keep_http2_and_tls();
    }

    /// See [`Registry::keep_http2_and_tls`].
    pub fn keeps_http2_and_tls(&self) -> bool {
        self.phase_word.now().keeps_http2_and_tls()
    }

    /// Waits until the phase is one that `wanted` says yes to.
    pub async fn wait_for_phase(&self, wanted: impl Fn(Phase) -> bool) {
        self.wait_until(|| wanted(self.phase())).await;
    }

    /// Waits until `done`, which is asked again at each change of the phase, when [`Registry::is_drained`] comes to be so
    /// in a process that no longer just serves, when the last predecessor has ended, and at each change of a
    /// connection that is [`Registry::subscribe_all`].
    pub async fn wait_until(&self, mut done: impl FnMut() -> bool) {
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
        if self.phase() != Phase::Quiescing {
            self.changed.notify_waiters();
        }
    }

    /// While this is held, a connection may come.
    pub fn accepting(&self) -> Accepting<'_> {
        self.phase_word.acquire(PendingCount::Accepting);
        Accepting(self)
    }

    /// While this is held, a predecessor passes connections on.
    pub fn arriving(&self) -> Arriving<'_> {
        self.phase_word.acquire(PendingCount::Arriving);
        Arriving(self)
    }

    pub fn is_arriving(&self) -> bool {
        self.phase_word.now().is_arriving()
    }

    /// Whether the last answer of every connection is out, and no connection comes any more.
    pub fn is_drained(&self) -> bool {
        self.phase_word.now().is_drained()
    }

    pub fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.connections).open.values().cloned().collect()
    }

    /// Of all that are open, whoever waits in [`Registry::wait_until`] hears.
    pub fn subscribe_all(&self) -> Vec<Arc<Entry>> {
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
        let begun = Counts { connections: entries.len() + self.parked(), in_flight: 0, answered };
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
    /// now, the connections that are ending, and those that cannot move. Whoever waits in [`Registry::wait_until`] hears of
    /// each of them.
    pub fn pending_work(&self) -> Vec<PendingWork> {
        let mut all: Vec<_> = self.subscribe_all().into_iter().map(PendingWork::new).collect();
        all.retain(PendingWork::is_pending);
        all
    }

    /// When the last of the requests in flight began.
    pub fn last_request(&self) -> Option<Instant> {
        self.entries().iter().filter_map(|entry| entry.last_request()).max()
    }

    /// What would be lost if the process ended now.
    pub fn remaining(&self) -> Vec<CutOffConnection> {
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
            if entry.is_overdue() || entry.is_parkable() {
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
        self.0.release(PendingCount::Accepting);
    }
}

/// See [`Registry::arriving`].
pub struct Arriving<'a>(&'a Registry);

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.0.release(PendingCount::Arriving);
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

    use hyper::Uri;

    use super::*;

    #[test]
    fn a_connection_that_closes_while_they_are_summed_up_counts_once() {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
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
