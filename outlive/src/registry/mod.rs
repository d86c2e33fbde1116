//! The registry of all active connections: it counts them, wakes their drivers when the [`Phase`] of the process
//! changes, and checks their time limits.
//!
//! [`Registry`] holds one [`Entry`] (`entry.rs`) for each connection that has a task; of parked connections
//! (`server/parked.rs`) it has only the number. `server/` registers connections; their drivers, their IO and their
//! requests in `connection/` report what happens on them, each through a handle from [`Registration`]; and
//! `lifecycle/drain.rs` sets the phases and waits in [`Registry::wait_until`]. Each connection's state is one atomic
//! (`state.rs`), and so are the phase and the counts that a drain waits for (`phase_word.rs`); so an HTTP/1.1 request that
//! is answered at once takes no lock here. `models.rs` checks with loom that no notification is missed.

mod driver_handle;
mod entry;
mod io_handle;
#[cfg(all(test, feature = "model-tests"))]
mod models;
mod phase_word;
mod protocols;
mod registration;
mod request_handle;
mod state;
mod sync;
mod upgrade_handle;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU64 as Clock, AtomicUsize};
use std::time::Duration;

pub use driver_handle::DriverHandle;
pub use entry::{CutOffConnection, Entry, InFlight, PendingWork};
pub use io_handle::IoHandle;
use phase_word::{PendingCount, PhaseWord};
pub use protocols::Protocols;
pub use registration::Registration;
pub use request_handle::{BodyGuard, PendingFrame, RequestGuard, RequestHandle};
pub use state::{BodyEnd, Stage};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
pub use upgrade_handle::{Demand, UpgradeHandle};

use crate::registry::sync::{Mutex, Notify, lock};
use crate::transport::stream::Peer;

/// The phase of the process, which decides what happens to its connections. `lifecycle/drain.rs` sets it; each driver
/// reads it and acts on it.
///
/// ```text
/// end, with a store        Serving -> [Announcing] -> Draining <-> Quiescing -> Holding
///                                                        |                        ^
///                                                        `------------------------'
///                          Quiescing, Holding -> Closing   (only if the channel has no room for all connections)
/// reload                   Serving -> Quiescing -> Holding
/// end, without a store     Serving -> [Announcing] -> Lingering -> Closing -> Finishing
/// ```
///
/// A drain ends in each phase as soon as there is no more work to wait for. `Announcing` is left out without
/// `--drain-delay`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Connections are accepted and served.
    Serving,
    /// As `Serving`, while `/readyz` answers 503, so that load balancers stop sending traffic (`--drain-delay`).
    Announcing,
    /// As `Serving`, but connections that cannot be handed over close after their next response.
    Draining,
    /// No connection is accepted. Connections that can be handed over are, as soon as they are quiescent; the others
    /// close after their next response.
    Quiescing,
    /// As `Quiescing`, and no more requests begin: HTTP/2 frames of new streams are held until the open streams have
    /// ended, and connections that cannot be handed over close when they are idle.
    Holding,
    /// No process can adopt the connections, so all of them close after their next response. Connections are still
    /// accepted from inherited listeners, because these stay open in the process that passed them.
    Lingering,
    /// As `Lingering`, but no connection is accepted.
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

    /// Whether a connection closes after its next response. `movable`: whether it can be handed over.
    pub fn ends(self, movable: bool) -> bool {
        match self {
            Self::Serving | Self::Announcing => false,
            Self::Draining | Self::Quiescing | Self::Holding => !movable,
            Self::Lingering | Self::Closing | Self::Finishing => true,
        }
    }

    /// Whether connections that can be handed over are, as soon as they are quiescent.
    pub fn quiesces(self) -> bool {
        matches!(self, Self::Quiescing | Self::Holding)
    }

    /// Whether a connection closes when it is idle: a request that begins now would be cut off at the end of the drain.
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

/// The time limits that the registry enforces: it wakes the driver of a connection that has exceeded one, and the
/// driver answers 408, sends GOAWAY or closes the connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the first byte of a request's head to its last (`--head-timeout`).
    pub head: Duration,
    /// Without a request (`--idle-timeout`).
    pub idle: Duration,
    /// Without progress while a response is sent (`--request-timeout`).
    pub stall: Duration,
    /// From the last byte that is sent until the peer closes the connection too.
    pub close: Duration,
}

impl Limits {
    /// How often to check: the shortest limit is exceeded by at most a quarter of it.
    fn interval(self) -> Duration {
        let shortest = self.head.min(self.idle).min(self.stall).min(self.close);
        (shortest / 4).clamp(Duration::from_millis(5), Duration::from_secs(1))
    }
}

/// All active connections of the process, and its [`Phase`].
pub struct Registry {
    created_at: Instant,
    limits: Limits,
    shutdown: CancellationToken,
    /// The phase, and the counts of the work that a drain waits for.
    phase_word: PhaseWord,
    /// Notified when the phase or a watched connection has changed, and when the last pending work has ended.
    changed: Notify,
    /// The phase again, for the handlers of upgraded connections. They have a channel of their own, because `changed`
    /// would wake all of them at each change of a watched connection.
    handler_phase: watch::Sender<Phase>,
    /// See [`Registry::limit_handover`].
    next_adopts: AtomicU8,
    connections: Mutex<Connections>,
    /// The number of parked connections (`server/parked.rs`), which are not in `connections`.
    parked: AtomicUsize,
    /// Milliseconds since `created_at`, updated at each [`Registry::interval`]. Several events of each request read the time,
    /// and this is only a load, not a call of the system's clock.
    now: Clock,
}

#[derive(Default)]
struct Connections {
    next_id: u64,
    /// The hasher has no random keys, which is safe because this process assigns the ids: no peer can choose them to
    /// make them collide.
    open: HashMap<u64, Arc<Entry>, BuildHasherDefault<DefaultHasher>>,
    /// How many requests were answered on connections that are closed.
    answered: u64,
    /// The highest number of open connections since [`Registry::active_has_dropped_by`] last returned true.
    most: usize,
}

/// Sums over all connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Open connections, with the parked ones.
    pub connections: usize,
    /// Requests in flight.
    pub in_flight: usize,
    /// Requests answered by this process. One whose response has moved here is not among them.
    pub answered: u64,
}

impl Registry {
    /// A registry in the phase `Serving`. It cancels `shutdown` at the first phase after `Announcing`.
    pub fn new(limits: Limits, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            created_at: Instant::now(),
            limits,
            shutdown,
            phase_word: PhaseWord::new(),
            changed: Notify::new(),
            handler_phase: watch::Sender::new(Phase::Serving),
            next_adopts: AtomicU8::new(Protocols::ALL as u8),
            connections: Mutex::new(Connections::default()),
            parked: AtomicUsize::new(0),
            now: Clock::new(0),
        })
    }

    pub fn register(self: &Arc<Self>, peer: Peer, slot: Option<OwnedSemaphorePermit>) -> Registration {
        self.register_since(peer, slot, self.now())
    }

    /// As [`Registry::register`], for a connection that has been idle `since` then, in milliseconds of
    /// [`Registry::now`].
    pub fn register_since(
        self: &Arc<Self>,
        peer: Peer,
        slot: Option<OwnedSemaphorePermit>,
        since: u64,
    ) -> Registration {
        let mut connections = lock(&self.connections);
        let id = connections.next_id;
        connections.next_id += 1;
        let slots = slot.as_ref().map(|slot| slot.semaphore().clone());
        let registration = Registration { entry: Arc::new(Entry::new(self, id, peer, slots, since)), slot };
        self.phase_word.acquire(PendingCount::Unanswered);
        connections.open.insert(id, registration.entry.clone());
        connections.most = connections.most.max(connections.open.len());
        registration
    }

    /// Moves the connection's requests to the sum of closed connections under the same lock; otherwise
    /// [`Registry::counts`] could count them twice or not at all.
    fn remove(&self, entry: &Entry) {
        let mut connections = lock(&self.connections);
        if connections.open.remove(&entry.id).is_some() {
            connections.answered += entry.begun_here();
        }
    }

    fn count_unanswered(&self, before: Stage, after: Stage) {
        match (before.is_unanswered(), after.is_unanswered()) {
            (true, false) => self.release(PendingCount::Unanswered),
            (false, true) => self.phase_word.acquire(PendingCount::Unanswered),
            _ => {}
        }
    }

    /// Ends one piece of pending work. After the last one, it notifies the tasks in [`Registry::wait_until`], but not
    /// in `Serving` and `Announcing`, in which no task waits for it and the last one ends often.
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

    pub fn interval(&self) -> Duration {
        self.limits.interval()
    }

    /// Milliseconds since this registry was created, as of the last check of the time limits.
    pub fn now(&self) -> u64 {
        self.now.load(Relaxed)
    }

    /// The time since `since`, which is in milliseconds of [`Registry::now`].
    pub fn age(&self, since: u64) -> Duration {
        Duration::from_millis(self.now().saturating_sub(since))
    }

    pub fn is_idle_for_too_long(&self, since: u64) -> bool {
        self.age(since) > self.limits.idle
    }

    /// Sets the number of parked connections, which [`Registry::counts`] adds to the active ones.
    pub fn set_parked(&self, count: usize) {
        self.parked.store(count, Relaxed);
    }

    pub fn parked(&self) -> usize {
        self.parked.load(Relaxed)
    }

    /// Whether there are at least `enough` fewer active connections than at the highest point since this last returned
    /// true.
    #[cfg(not(feature = "jemalloc"))]
    pub fn active_has_dropped_by(&self, enough: usize) -> bool {
        let mut connections = lock(&self.connections);
        let has_dropped = connections.most - connections.open.len() >= enough;
        if has_dropped {
            connections.most = connections.open.len();
        }
        has_dropped
    }

    pub fn set_now(&self, now: u64) {
        self.now.store(now, Relaxed);
    }

    pub fn phase(&self) -> Phase {
        self.phase_word.now().phase()
    }

    /// Sets a phase after `Serving`, and wakes the drivers and the tasks in [`Registry::wait_until`].
    pub fn set_phase(&self, phase: Phase) {
        let before = self.phase_word.enter(phase);
        self.changed.notify_waiters();
        self.handler_phase.send_replace(phase);
        if phase == Phase::Announcing {
            return;
        }
        self.shutdown.cancel();
        // Draining changes nothing for connections that can be handed over. To wake thousands of drivers that have
        // nothing to do would delay the requests in flight.
        let is_first = matches!(before.phase(), Phase::Serving | Phase::Announcing);
        let affects_only_immovable = is_first && phase == Phase::Draining && self.next_adopts_http2();
        let is_unaffected =
            |entry: &Entry| affects_only_immovable && entry.state().is_movable() && !entry.keeps_state();
        for entry in self.entries().iter().filter(|entry| !is_unaffected(entry)) {
            entry.wake();
        }
    }

    /// Does not hand over the connections that the next process cannot adopt; they close after their next response. If
    /// it adopts no upgraded connections, their handlers have to return as soon as the process drains. Must be called
    /// before the phase `Quiescing`; otherwise some of them could be handed over before.
    pub fn limit_handover(&self, next_adopts: Protocols) {
        self.next_adopts.store(next_adopts as u8, SeqCst);
        self.handler_phase.send_modify(|_| {});
    }

    /// Which connections the next process can adopt. See [`Registry::limit_handover`].
    pub fn next_adopts(&self) -> Protocols {
        Protocols::from_number(self.next_adopts.load(SeqCst))
    }

    /// Whether the next process can adopt HTTP/2 connections, whose clients may use a header table in this release.
    pub fn next_adopts_http2(&self) -> bool {
        self.next_adopts() >= Protocols::CertificatesAndTables
    }

    /// Waits until the handlers of upgraded connections have to return.
    async fn handlers_must_return(&self) {
        let mut phase = self.handler_phase.subscribe();
        // The sender is not dropped before, because it is in this registry.
        let _ = phase.wait_for(|phase| self.handlers_return_in(*phase)).await;
    }

    /// Whether the handlers of upgraded connections have to return in this phase.
    fn handlers_return_in(&self, phase: Phase) -> bool {
        let is_draining = !matches!(phase, Phase::Serving | Phase::Announcing);
        phase.quiesces() || phase.ends(true) || is_draining && self.next_adopts() < Protocols::Upgrades
    }

    pub async fn wait_for_phase(&self, wanted: impl Fn(Phase) -> bool) {
        self.wait_until(|| wanted(self.phase())).await;
    }

    /// Waits until `done` returns true. `done` is called at once, and again
    ///
    /// - at each change of the phase;
    /// - when [`Registry::is_drained`] becomes true, and when [`Registry::is_arriving`] becomes false, in a phase after
    ///   `Announcing`;
    /// - at each change of a connection that [`Registry::subscribe_all`] returned, except in the phase `Quiescing`.
    pub async fn wait_until(&self, mut done: impl FnMut() -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before `done` is called; otherwise a change between the call and the await would be missed.
            changed.as_mut().enable();
            if done() {
                return;
            }
            changed.await;
        }
    }

    /// Notifies the tasks in [`Registry::wait_until`] that a watched connection has changed.
    fn notify_of_watched(&self) {
        // In `Quiescing` the drain waits only for the last connection, which `release` notifies it of. Thousands of
        // connections change in this phase, and to notify it of each would only slow down the handover.
        if self.phase() != Phase::Quiescing {
            self.changed.notify_waiters();
        }
    }

    /// Counts as pending work until the guard is dropped. A task holds it while it has a connection that is not
    /// registered yet, or may accept one; otherwise a drain could end before that connection is registered.
    pub fn accepting(&self) -> Accepting<'_> {
        self.phase_word.acquire(PendingCount::Accepting);
        Accepting(self)
    }

    /// Counts as pending work until the guard is dropped. It is held while a predecessor may still send connections.
    pub fn arriving(&self) -> Arriving<'_> {
        self.phase_word.acquire(PendingCount::Arriving);
        Arriving(self)
    }

    /// Whether a predecessor may still send connections.
    pub fn is_arriving(&self) -> bool {
        self.phase_word.now().is_arriving()
    }

    /// Whether every connection has sent its last response or has left the registry, no task is accepting one, and no
    /// predecessor may send one.
    pub fn is_drained(&self) -> bool {
        self.phase_word.now().is_drained()
    }

    /// Whether no connection is unanswered, except upgraded ones. A process that lingers does not wait for upgraded
    /// connections, because their handlers had the whole drain to return.
    pub fn has_only_upgraded(&self) -> bool {
        let is_upgraded = |entry: &Arc<Entry>| !entry.is_unanswered() || entry.stage() == Stage::Upgraded;
        self.is_drained() || self.phase_word.now().is_settled() && self.entries().iter().all(is_upgraded)
    }

    /// How many responses are not fully sent.
    pub fn responses(&self) -> usize {
        let entries = self.entries();
        let states =
            entries.iter().map(|entry| entry.state()).filter(|state| state.stage() == Stage::InFlight);
        // A request ends when hyper has the last byte of the response, of which some may not have been sent.
        states.map(|state| usize::try_from(state.in_flight().max(1)).unwrap_or(usize::MAX)).sum()
    }

    /// The oldest of the requests in flight.
    pub fn oldest_request(&self) -> Option<InFlight> {
        let remaining = self.remaining().into_iter().flat_map(|connection| connection.requests);
        remaining.min_by_key(|request| request.since)
    }

    /// All active connections; parked ones are not among them.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.connections).open.values().cloned().collect()
    }

    /// The connections that have been idle for at least `time`, although they are not parked: those that cannot be handed
    /// over, and those of HTTP/2 on which the client has not sent a whole frame or not acknowledged the settings.
    pub fn idle_for(&self, time: Duration) -> Vec<Arc<Entry>> {
        let connections = lock(&self.connections);
        connections.open.values().filter(|entry| entry.is_idle_for(time)).cloned().collect()
    }

    /// The number of connections that have one of `slots`, and are closing because another connection needs it.
    pub fn evicted(&self, slots: &Arc<Semaphore>) -> usize {
        let connections = lock(&self.connections);
        connections
            .open
            .values()
            .filter(|entry| entry.state().is_evicted() && entry.has_slot_of(slots))
            .count()
    }

    /// All active connections, watched from now on: each change of one of them notifies the tasks in
    /// [`Registry::wait_until`].
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
            // In this order, because a request that begins between the two loads would otherwise count as answered.
            let started = entry.started();
            let in_flight = entry.state().in_flight();
            Counts {
                in_flight: counts.in_flight + usize::try_from(in_flight).unwrap_or(usize::MAX),
                answered: counts.answered + started.saturating_sub(in_flight + entry.ended_replays()),
                ..counts
            }
        })
    }

    /// The work that has to end before all connections can be handed over within a short time: the requests in flight
    /// now, the connections that are ending, and those that cannot be handed over. Newer requests are not part of it.
    /// The connections are watched, as by [`Registry::subscribe_all`].
    pub fn pending_work(&self) -> Vec<PendingWork> {
        let mut all: Vec<_> = self.subscribe_all().into_iter().map(PendingWork::new).collect();
        all.retain(PendingWork::is_pending);
        all
    }

    pub fn last_request(&self) -> Option<Instant> {
        self.entries().iter().filter_map(|entry| entry.last_request()).max()
    }

    /// The connections that would be cut off if the process exited now.
    pub fn remaining(&self) -> Vec<CutOffConnection> {
        self.entries().iter().map(|entry| entry.remaining()).collect()
    }

    /// Checks the time limits of every connection at each [`Registry::interval`]. Never returns.
    pub async fn watch(self: Arc<Self>) {
        let mut clock = tokio::time::interval(self.interval());
        loop {
            clock.tick().await;
            self.check_limits(u64::try_from(self.created_at.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
    }

    /// Sets the clock, and wakes the driver of each connection that is overdue or has to be parked.
    fn check_limits(&self, now: u64) {
        self.set_now(now);
        for entry in self.entries() {
            if entry.is_overdue() || entry.is_parkable() {
                entry.wake();
            }
        }
    }

    /// Advances the clock in a test that does not run [`Registry::watch`].
    #[cfg(test)]
    pub fn advance(&self, by: Duration) {
        self.check_limits(self.now() + u64::try_from(by.as_millis()).unwrap_or(u64::MAX));
    }
}

/// The guard of [`Registry::accepting`].
pub struct Accepting<'a>(&'a Registry);

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        self.0.release(PendingCount::Accepting);
    }
}

/// The guard of [`Registry::arriving`].
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

    fn registry() -> Arc<Registry> {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        Registry::new(limits, CancellationToken::new())
    }

    #[test]
    #[cfg(not(feature = "jemalloc"))]
    fn drop_of_active_connections_is_reported_once_even_after_a_short_peak() {
        let registry = registry();
        let mut open: Vec<_> = (0..10).map(|_| registry.register(Peer::Unix, None)).collect();
        assert!(!registry.active_has_dropped_by(1));
        open.truncate(6);
        assert!(!registry.active_has_dropped_by(5));
        open.truncate(5);
        assert!(registry.active_has_dropped_by(5) && !registry.active_has_dropped_by(1));
        drop((0..5).map(|_| registry.register(Peer::Unix, None)).collect::<Vec<_>>());
        assert!(registry.active_has_dropped_by(5) && !registry.active_has_dropped_by(1));
    }

    #[test]
    fn requests_of_a_connection_that_closes_during_counts_are_counted_once() {
        let registry = registry();
        let (begun, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(SeqCst) {
                    let answered = registry.counts().answered;
                    let begun = begun.load(SeqCst);
                    assert!(answered <= begun, "counted {answered} answered requests of {begun}");
                }
            });
            for _ in 0..20_000 {
                let connection = registry.register(Peer::Unix, None);
                begun.fetch_add(1, SeqCst);
                drop(connection.requests().begin(&Uri::from_static("/")));
            }
            is_over.store(true, SeqCst);
        });
        assert_eq!(registry.counts(), Counts { connections: 0, in_flight: 0, answered: 20_000 });
    }
}
