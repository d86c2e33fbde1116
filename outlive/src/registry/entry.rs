//! One open connection: what its own tasks report of it, and what others may ask.

use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Clock;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::Uri;
use hyper::http::uri::PathAndQuery;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::state::{BodyEnd, Event, Stage, State};
use super::{Phase, Registry};
use crate::registry::sync::{AtomicU64, Mutex, lock};
use crate::transport::stream::Peer;

/// A connection that is idle for this long sleeps, until its peer says something.
const PARK_AFTER: Duration = Duration::from_millis(1500);

/// One open connection.
pub struct Entry {
    pub(super) id: u64,
    pub peer: Peer,
    registry: Arc<Registry>,
    /// When it came to be awake here, by the registry's clock.
    registered: u64,
    /// A packed [`State`].
    state: AtomicU64,
    /// When it came to its stage, or its peer last took something, by the registry's clock.
    since: Clock,
    /// Who drives it. That there is one, the state says too; both are changed under this lock.
    task: Mutex<Option<Waker>>,
    pending: Pending,
    /// Requests that have begun; one task alone counts them.
    started: AtomicU64,
    /// Those in flight that were not answered at once.
    tracked: Mutex<Vec<InFlight>>,
}

/// A request being answered.
#[derive(Clone)]
pub struct InFlight {
    /// Of those of its connection.
    pub number: u64,
    pub path: PathAndQuery,
    pub since: Instant,
}

/// A connection that the process had to cut off.
pub struct CutOffConnection {
    pub peer: Peer,
    pub age: Duration,
    pub requests: Vec<InFlight>,
}

/// See [`Registry::pending_work`].
pub struct PendingWork {
    entry: Arc<Entry>,
    started: u64,
}

impl PendingWork {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self { started: entry.started(), entry }
    }

    pub fn is_pending(&self) -> bool {
        let state = self.entry.state();
        match state.stage {
            Stage::Closing | Stage::Closed => false,
            Stage::Ending | Stage::Discarding => true,
            Stage::InFlight if self.entry.started() == self.started => true,
            // Of several at once (HTTP/2).
            Stage::InFlight if self.entry.has_tracked_before(self.started) => true,
            _ => !state.is_movable(),
        }
    }
}

/// Keeps a connection in the registry, and its slot under `--max-connections`, until dropped.
pub struct Registration {
    pub entry: Arc<Entry>,
    pub slot: Option<OwnedSemaphorePermit>,
}

impl Registration {
    pub(super) fn new(
        registry: &Arc<Registry>,
        id: u64,
        peer: Peer,
        slot: Option<OwnedSemaphorePermit>,
        since: u64,
    ) -> Self {
        let entry = Entry {
            id,
            peer,
            registry: registry.clone(),
            registered: registry.now(),
            state: AtomicU64::new(State::NEW.pack()),
            since: Clock::new(since),
            task: Mutex::new(None),
            pending: Pending(AtomicU64::new(0)),
            started: AtomicU64::new(0),
            tracked: Mutex::new(Vec::new()),
        };
        Self { entry: Arc::new(entry), slot }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.entry.registry.remove(&self.entry);
        self.entry.enter(Stage::Closed);
    }
}

impl Entry {
    pub fn state(&self) -> State {
        State::unpack(self.state.load(Acquire))
    }

    pub fn stage(&self) -> Stage {
        self.state().stage
    }

    pub fn phase(&self) -> Phase {
        self.registry.phase()
    }

    /// See [`Registry::keep_http2_and_tls`].
    pub fn keeps_http2_and_tls(&self) -> bool {
        self.registry.keeps_http2_and_tls()
    }

    /// Whether the connection has its last answer still to give.
    pub fn is_unanswered(&self) -> bool {
        self.stage().is_unanswered()
    }

    /// Whether the connection is told to end with its next answer.
    pub fn must_close(&self) -> bool {
        let state = self.state();
        state.closes_after_response() || self.phase().ends(state.is_movable())
    }

    /// From now on, whoever waits in [`Registry::wait_until`] hears of what changes here. What had changed before, the caller
    /// sees: one of the two comes first in this word.
    pub(super) fn watch(&self) {
        self.state.fetch_or(State::WATCHED, AcqRel);
    }

    /// Changes the state, and tells whoever has to hear of it. Gives the state before.
    fn apply(&self, event: Event) -> State {
        let mut word = self.state.load(Acquire);
        let (before, next, effects) = loop {
            let before = State::unpack(word);
            let (next, effects) = before.after(event);
            if next == before {
                break (before, next, effects);
            }
            if next.stage != before.stage {
                self.touch();
            }
            match self.state.compare_exchange_weak(word, next.pack(), AcqRel, Acquire) {
                Ok(_) => break (before, next, effects),
                Err(changed) => word = changed,
            }
        };
        self.registry.count_unanswered(before.stage, next.stage);
        if effects.waiters {
            self.registry.notify_of_watched();
        }
        if effects.driver {
            self.wake();
        }
        before
    }

    /// The driver's turn: `poll`, and then a look at whether the connection waits again.
    pub fn poll_driver<T>(
        &self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if !self.apply(Event::DriverPolled).has_waker {
            self.replace_waker(cx);
        }
        let polled = poll(cx);
        self.apply(Event::DriverReturned);
        polled
    }

    pub fn enter(&self, stage: Stage) {
        self.apply(Event::Enters(stage));
    }

    /// The connection stays in this process until it ends.
    pub fn forbid_handover(&self) {
        self.apply(Event::HandoverForbidden);
    }

    /// It may move again.
    pub fn allow_handover(&self) {
        self.apply(Event::HandoverAllowed);
    }

    /// The connection is told to end with its next answer, whatever the phase.
    pub fn close_after_response(&self) {
        self.apply(Event::ClosesAfterResponse);
    }

    // ---- who is woken ----

    /// Makes the task of `cx`, which is the same each time, the one that is woken when the phase changes or a
    /// limit has passed.
    pub fn wake_on_change(&self, cx: &Context<'_>) {
        // A task that reads here that it will be woken will be, if it has not been: it is polled again.
        if !self.state().has_waker {
            self.replace_waker(cx);
        }
    }

    /// As `wake_on_change`, for the task of a handler whose connection it is now.
    pub fn replace_waker(&self, cx: &Context<'_>) {
        let mut task = lock(&self.task);
        *task = Some(cx.waker().clone());
        self.apply(Event::WakerLeft);
    }

    pub(super) fn wake(&self) {
        let waker = {
            let mut task = lock(&self.task);
            self.apply(Event::WakerTaken);
            task.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    // ---- rest ----

    /// Whether the connection is to come to rest as soon as it can: for the next process, or because it is idle.
    pub fn must_quiesce(&self) -> bool {
        self.phase().quiesces() || self.is_parkable()
    }

    /// When it came to its stage, by the registry's clock.
    pub fn since(&self) -> u64 {
        self.since.load(Relaxed)
    }

    /// Whether it has been idle for so long that it is to sleep.
    pub fn is_parkable(&self) -> bool {
        let state = self.state();
        let is_idle = state.stage == Stage::Waiting && state.is_quiescent();
        // Whoever has just been woken is given time to see what for.
        let since = self.since().max(self.registered);
        is_idle && self.registry.age(since) >= PARK_AFTER && !self.must_close()
    }

    // ---- time limits ----

    /// Whether the connection has been too long in this stage.
    pub fn is_overdue(&self) -> bool {
        let limits = self.registry.limits();
        let state = self.state();
        if state.stage == Stage::Waiting && self.phase().closes_idle(state.is_movable()) {
            // The first request of a new connection may be on its way.
            return self.registry.age(self.since().max(self.registered)) >= PARK_AFTER;
        }
        let (limit, since) = match state.stage {
            Stage::Waiting => (limits.idle, self.since()),
            Stage::Head => (limits.head, self.since()),
            Stage::InFlight | Stage::Upgraded if !state.is_flushed() => (limits.stall, self.since()),
            Stage::InFlight => match self.pending.since() {
                Some(since) => (limits.stall, since),
                None => return false,
            },
            Stage::Ending => (limits.stall, self.since()),
            Stage::Discarding | Stage::Closing => (limits.close, self.since()),
            Stage::Upgraded | Stage::Closed => return false,
        };
        self.registry.age(since) > limit
    }

    /// The time in this stage counts from now.
    pub fn touch(&self) {
        self.since.store(self.registry.now(), Relaxed);
    }

    // ---- what the connection's IO reports ----

    /// Bytes have arrived.
    pub fn received(&self) {
        self.apply(Event::Received);
    }

    /// The connection has something to send.
    pub fn writing(&self) {
        if self.state().is_flushed() {
            self.apply(Event::Writing);
            self.touch_unless_idle();
        }
    }

    /// The peer's side has taken some of it.
    pub fn wrote(&self) {
        self.touch_unless_idle();
    }

    /// Pings are no reason to keep an idle connection.
    fn touch_unless_idle(&self) {
        if self.stage() != Stage::Waiting {
            self.touch();
        }
    }

    /// All of it is out.
    pub fn flushed(&self) {
        self.apply(Event::Flushed);
    }

    // ---- what the connection's requests report ----

    /// A request begins.
    pub fn begin(&self, uri: &Uri) -> InFlight {
        let number = self.started();
        self.started.store(number + 1, Release);
        self.apply(Event::RequestBegins);
        let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        InFlight { number, path, since: Instant::now() }
    }

    /// The last byte of a request's answer has been given to the connection, or the request was given up.
    pub fn end(&self) {
        self.apply(Event::RequestEnds);
    }

    pub fn begin_body(&self) {
        self.apply(Event::BodyBegins);
    }

    pub fn end_body(&self, end: BodyEnd) {
        self.apply(Event::BodyEnds(end));
    }

    /// A request is not answered at once.
    pub fn track(&self, request: InFlight) {
        lock(&self.tracked).push(request);
    }

    /// Whether one of the first `count` requests is still in flight, of those that were not answered at once.
    fn has_tracked_before(&self, count: u64) -> bool {
        lock(&self.tracked).iter().any(|request| request.number < count)
    }

    pub fn untrack(&self, request: &InFlight) {
        lock(&self.tracked).retain(|other| other.number != request.number);
    }

    /// How many requests have begun on this connection in this process.
    pub fn started(&self) -> u64 {
        self.started.load(Acquire)
    }

    /// When the last of its requests in flight began. One that is answered, and whose answer is not sent yet, counts
    /// from when the peer last took something.
    pub(super) fn last_request(&self) -> Option<Instant> {
        let tracked = lock(&self.tracked).iter().map(|request| request.since).max();
        let is_in_flight = self.stage() == Stage::InFlight;
        tracked
            .or_else(|| is_in_flight.then(|| Instant::now().checked_sub(self.registry.age(self.since())))?)
    }

    pub(super) fn remaining(&self) -> CutOffConnection {
        CutOffConnection {
            peer: self.peer,
            age: self.registry.age(self.registered),
            requests: lock(&self.tracked).clone(),
        }
    }
}

/// Frames of answers that wait for room in the peer's windows (HTTP/2), and when one of them came or was taken
/// last. Both in one word: nobody ever sees one without the other.
struct Pending(AtomicU64);

impl Pending {
    /// Bits of the time, in milliseconds; the others count.
    const TIME: u32 = 44;

    /// When one came or was taken last. None where none waits.
    fn since(&self) -> Option<u64> {
        let word = self.0.load(Acquire);
        (word >> Self::TIME > 0).then_some(word & ((1 << Self::TIME) - 1))
    }

    fn count(&self, change: impl Fn(u64) -> u64, now: u64) {
        let next = |word: u64| Some(change(word >> Self::TIME) << Self::TIME | now);
        // It always gives one.
        let _ = self.0.fetch_update(AcqRel, Acquire, next);
    }
}

/// A frame of an answer that an HTTP/2 connection has for its peer, until there is room for it.
pub struct PendingFrame(Arc<Entry>);

impl PendingFrame {
    pub fn new(entry: &Arc<Entry>) -> Self {
        entry.pending.count(|count| count + 1, entry.registry.now());
        Self(entry.clone())
    }
}

impl Drop for PendingFrame {
    fn drop(&mut self) {
        self.0.pending.count(|count| count - 1, self.0.registry.now());
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::registry::Limits;

    /// A process that is older than every limit.
    fn old_registry() -> Arc<Registry> {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        registry.set_now(1_000_000);
        registry
    }

    /// One thread answers, another looks at the time limits, as often as it takes to meet in each moment.
    #[test]
    fn the_first_frame_of_an_old_process_is_not_overdue_at_any_moment() {
        let registry = old_registry();
        let (give, given) = mpsc::sync_channel::<Arc<Entry>>(0);
        let watcher = thread::spawn(move || {
            let mut overdue = 0;
            while let Ok(entry) = given.recv() {
                while entry.stage() != Stage::Closed {
                    overdue += u32::from(entry.is_overdue());
                }
            }
            overdue
        });
        for _ in 0..5_000 {
            let registration = registry.register(Peer::Unix, None);
            let request = registration.entry.begin(&Uri::from_static("/"));
            give.send(registration.entry.clone()).expect("it watches");
            drop(PendingFrame::new(&registration.entry));
            registration.entry.untrack(&request);
        }
        drop(give);
        assert_eq!(watcher.join().expect("no panic"), 0);
    }

    /// Of several requests at once (HTTP/2): a new one does not show that an old one is over.
    #[test]
    fn a_connection_is_unfinished_for_as_long_as_a_request_that_was_there_before() {
        let registry = old_registry();
        let registration = registry.register(Peer::Unix, None);
        let entry = registration.entry.clone();
        let slow = entry.begin(&Uri::from_static("/slow"));
        entry.track(slow.clone());
        let pending_work = PendingWork::new(entry.clone());
        let quick = entry.begin(&Uri::from_static("/quick"));
        entry.track(quick.clone());
        assert!(pending_work.is_pending());
        entry.untrack(&slow);
        entry.end();
        assert!(!pending_work.is_pending(), "the other one came later");
    }

    #[test]
    fn frames_that_the_peer_does_not_take_are_overdue() {
        let registry = old_registry();
        let registration = registry.register(Peer::Unix, None);
        let entry = registration.entry.clone();
        entry.begin(&Uri::from_static("/"));
        let (first, second) = (PendingFrame::new(&entry), PendingFrame::new(&entry));
        registry.set_now(1_000_900);
        drop(first);
        registry.set_now(1_001_800);
        assert!(!entry.is_overdue(), "one was taken less than a second ago");
        registry.set_now(1_002_000);
        assert!(entry.is_overdue());
        drop(second);
        assert!(!entry.is_overdue(), "the handler may take its time");
    }
}
