//! One open connection, as the registry sees it.
//!
//! An [`Entry`] holds the [`State`] of a connection (`state.rs`) and the waker of its driver, the task that serves it
//! (`connection/http1.rs`, `connection/http2/mod.rs`). The registry and the drain read the state, check the time limits
//! and wake the driver. The others report events, each through a handle with the methods that concern it: the driver
//! (`driver_handle.rs`), the connection's IO (`io_handle.rs`) and the requests (`request_handle.rs`).

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64 as Clock};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Waker};
use std::time::Duration;

use hyper::http::uri::PathAndQuery;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::state::{Event, Stage, State};
use super::{Phase, Protocols, Registry};
use crate::registry::sync::{AtomicU64, Mutex, lock};
use crate::transport::stream::Peer;

/// How long a connection is idle before it is parked. A connection that was registered or unparked less than this ago
/// is not parked either, because its driver may not have read the bytes that have arrived.
const PARK_AFTER: Duration = Duration::from_millis(1500);

/// How long the client of an upgraded connection may read nothing while the process drains. It is shorter than the
/// limit at other times, because the handler cannot hand the connection on in the middle of a message.
const DRAIN_STALL: Duration = Duration::from_secs(5);

/// One open connection. It is in the registry until its [`Registration`](super::Registration) is dropped.
pub struct Entry {
    pub(super) id: u64,
    peer: Peer,
    /// The client that a PROXY header has reported.
    reported: OnceLock<Peer>,
    /// What the next process has to adopt because of the TLS version and the client certificate.
    required: AtomicU8,
    pub(super) registry: Arc<Registry>,
    /// The semaphore from which it holds a permit, if any.
    slots: Option<Arc<Semaphore>>,
    /// When it was accepted, adopted or unparked, in milliseconds of [`Registry::now`].
    registered: u64,
    /// When it was registered, or when its driver last noticed input ([`Entry::notice_input`]), in the same unit.
    unparked: Clock,
    /// A packed [`State`].
    state: AtomicU64,
    /// When its stage began, or its peer last received bytes of a response, in milliseconds of [`Registry::now`].
    since: Clock,
    /// The waker of its driver. `State::has_waker` repeats whether there is one, so that the driver can check it at
    /// each poll without this lock. Both are changed under this lock; otherwise they could disagree.
    task: Mutex<Option<Waker>>,
    pending: Pending,
    /// How many requests have begun. Only the driver's task increments it, so a load and a store are enough.
    started: AtomicU64,
    /// How many of them began in another process, and how many of those have ended here. [`Counts`](super::Counts) leaves
    /// them out, because the other process has counted them.
    replays: AtomicU32,
    ended_replays: AtomicU32,
    /// The requests in flight whose response was not ready at once, and those of HTTP/2. The others are only counted,
    /// so that an HTTP/1.1 request that is answered at once takes no lock.
    tracked: Mutex<Vec<Tracked>>,
}

struct Tracked {
    request: InFlight,
    /// Whether another process can continue its response at any time, because it has no end (HTTP/2). An HTTP/1.1
    /// connection has `State::awaits_handover` instead.
    awaits_handover: bool,
}

/// A request in flight.
#[derive(Clone)]
pub struct InFlight {
    /// Which request of its connection it is in this process; the first is 0.
    pub number: u64,
    pub path: PathAndQuery,
    /// The client that sent it.
    pub peer: Peer,
    pub since: Instant,
}

/// A connection that has to be cut off when the process exits, and its requests in flight.
pub struct CutOffConnection {
    pub peer: Peer,
    pub age: Duration,
    pub requests: Vec<InFlight>,
}

/// The work of one connection that a drain waits for; see [`Registry::pending_work`].
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
        match state.stage() {
            Stage::Closing | Stage::Closed => false,
            Stage::Ending | Stage::Discarding => true,
            // It becomes quiescent as soon as the phase asks for it.
            _ if state.awaits_handover() => false,
            Stage::InFlight if self.entry.only_awaits_handover(state) => !state.is_movable(),
            Stage::InFlight if self.entry.started() == self.started => true,
            // HTTP/2: newer requests have begun, and an older one is still in flight beside them.
            Stage::InFlight if self.entry.has_tracked_before(self.started) => true,
            _ => !state.is_movable(),
        }
    }
}

impl Entry {
    /// `slots`: the semaphore from which it holds a permit. `since`: when its stage began.
    pub(super) fn new(
        registry: &Arc<Registry>,
        id: u64,
        peer: Peer,
        slots: Option<Arc<Semaphore>>,
        since: u64,
    ) -> Self {
        Self {
            id,
            peer,
            reported: OnceLock::new(),
            required: AtomicU8::new(Protocols::PlainHttp1 as u8),
            registry: registry.clone(),
            slots,
            registered: registry.now(),
            unparked: Clock::new(registry.now()),
            state: AtomicU64::new(State::NEW.word()),
            since: Clock::new(since),
            task: Mutex::new(None),
            pending: Pending(AtomicU64::new(0)),
            started: AtomicU64::new(0),
            replays: AtomicU32::new(0),
            ended_replays: AtomicU32::new(0),
            tracked: Mutex::new(Vec::new()),
        }
    }

    /// The client, as far as it is known.
    pub(super) fn peer(&self) -> Peer {
        *self.reported.get().unwrap_or(&self.peer)
    }

    pub(super) fn reported(&self) -> Option<Peer> {
        self.reported.get().copied()
    }

    /// A PROXY header has reported the client.
    pub(super) fn identify(&self, client: Peer) {
        // Fails if it is known already, because the connection was parked since.
        let _ = self.reported.set(client);
    }

    pub(super) fn state(&self) -> State {
        State::from_word(self.state.load(Acquire))
    }

    pub fn stage(&self) -> Stage {
        self.state().stage()
    }

    pub(super) fn phase(&self) -> Phase {
        self.registry.phase()
    }

    /// See [`DriverHandle::keeps_state`](super::DriverHandle::keeps_state).
    pub(super) fn keeps_state(&self) -> bool {
        self.registry.next_adopts() < Protocols::Http2AndTls || self.keeps_tls()
    }

    /// Whether the next process cannot adopt the connection because of its client certificate or TLS 1.2.
    pub(super) fn keeps_tls(&self) -> bool {
        self.registry.next_adopts() < Protocols::from_number(self.required.load(Relaxed))
    }

    /// Only a next process that adopts `protocols` can adopt the connection.
    pub(super) fn require(&self, protocols: Protocols) {
        self.required.fetch_max(protocols as u8, Relaxed);
    }

    /// See [`DriverHandle::keeps_http2`](super::DriverHandle::keeps_http2).
    pub(super) fn keeps_http2(&self) -> bool {
        !self.registry.next_adopts_http2() || self.keeps_tls()
    }

    /// See [`Stage::is_unanswered`].
    pub fn is_unanswered(&self) -> bool {
        self.stage().is_unanswered()
    }

    /// Whether the connection closes after its next response, which says so (`Connection: close`, GOAWAY).
    pub(super) fn must_close(&self) -> bool {
        let state = self.state();
        state.closes_after_response() || self.phase().ends(state.is_movable())
    }

    /// Marks the connection as watched: from now on each of its changes notifies the tasks in
    /// [`Registry::wait_until`]. No change is missed, because the mark and the state are in the same atomic: a change
    /// before the mark is visible to the caller, and one after it notifies.
    pub(super) fn watch(&self) {
        self.state.fetch_or(State::WATCHED, AcqRel);
    }

    /// Applies an event to the state, and wakes the tasks that the event concerns. Returns the state before.
    #[expect(
        clippy::inline_always,
        reason = "the compiler knows the event at nearly every call, and removes the code for the others"
    )]
    #[inline(always)]
    pub(super) fn apply(&self, event: Event) -> State {
        let mut word = self.state.load(Acquire);
        let (before, next, effects) = loop {
            let before = State::from_word(word);
            let (next, effects) = before.after(event);
            // An event that changes nothing has no effects.
            if next == before {
                return before;
            }
            if next.stage() != before.stage() {
                self.touch();
            }
            match self.state.compare_exchange_weak(word, next.word(), AcqRel, Acquire) {
                Ok(_) => break (before, next, effects),
                Err(changed) => word = changed,
            }
        };
        self.registry.count_unanswered(before.stage(), next.stage());
        if effects.waiters {
            self.registry.notify_of_watched();
        }
        if effects.driver {
            self.wake();
        }
        before
    }

    pub(super) fn enter(&self, stage: Stage) {
        self.apply(Event::Enters(stage));
    }

    // ---- the waker of the driver ----

    /// Stores the waker of `cx`, so that its task is woken when the phase changes or a time limit has passed. Keeps a
    /// waker that is stored already, so the task must be the same each time.
    pub(super) fn wake_on_change(&self, cx: &Context<'_>) {
        // If another task takes the waker right after this check, it wakes this one, which is then polled again and
        // stores its waker anew.
        if !self.state().has_waker() {
            self.replace_waker(cx);
        }
    }

    /// As [`Entry::wake_on_change`], but replaces a waker that is stored already. After an upgrade the connection
    /// belongs to the task of a handler, and the stored waker would wake the wrong task.
    pub(super) fn replace_waker(&self, cx: &Context<'_>) {
        let mut task = lock(&self.task);
        *task = Some(cx.waker().clone());
        self.apply(Event::WakerStored);
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

    // ---- quiescence ----

    /// Whether the driver has to return the connection as soon as it is quiescent: to hand it over, or to park it.
    pub(super) fn must_quiesce(&self) -> bool {
        self.phase().quiesces() || self.is_parkable()
    }

    /// When its stage began, or its peer last received bytes of a response, in milliseconds of [`Registry::now`].
    pub fn since(&self) -> u64 {
        self.since.load(Relaxed)
    }

    /// Whether it has been idle for long enough to be parked.
    pub fn is_parkable(&self) -> bool {
        let state = self.state();
        let is_idle = state.stage() == Stage::Waiting && state.is_quiescent();
        // A connection that has just been unparked has input; without this, it would be parked before it is read.
        is_idle && self.registry.age(self.quiet_since()) >= PARK_AFTER && !self.must_close()
    }

    /// The later of [`Entry::since`] and the time at which input that need not begin a request was last noticed.
    pub(super) fn quiet_since(&self) -> u64 {
        self.since().max(self.unparked.load(Relaxed))
    }

    /// See [`DriverHandle::noticed_input`](super::DriverHandle::noticed_input).
    pub(super) fn notice_input(&self) {
        self.unparked.store(self.registry.now(), Relaxed);
    }

    // ---- time limits ----

    /// Whether the connection has been too long in this stage.
    pub(super) fn is_overdue(&self) -> bool {
        let limits = self.registry.limits();
        let state = self.state();
        if state.stage() == Stage::Waiting && self.phase().closes_idle(state.is_movable()) {
            // The first request of a connection that has just been accepted or unparked may not have arrived yet.
            return self.registry.age(self.quiet_since()) >= PARK_AFTER;
        }
        let (limit, since) = match state.stage() {
            Stage::Waiting if state.is_evicted() => return true,
            Stage::Waiting => (limits.idle, self.since()),
            Stage::Head => (limits.head, self.since()),
            Stage::Upgraded if !state.is_flushed() && self.phase() != Phase::Serving => {
                (limits.stall.min(DRAIN_STALL), self.since())
            }
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

    /// Restarts the time limit of the current stage.
    pub(super) fn touch(&self) {
        self.since.store(self.registry.now(), Relaxed);
    }

    /// hyper has bytes to send.
    pub(super) fn begin_writing(&self) {
        if self.state().is_flushed() {
            self.apply(Event::Writing);
            self.touch_unless_idle();
        }
    }

    /// An idle HTTP/2 connection stays idle when it answers a PING; otherwise a client that sends PINGs would keep it
    /// open beyond `--idle-timeout`.
    pub(super) fn touch_unless_idle(&self) {
        if self.stage() != Stage::Waiting {
            self.touch();
        }
    }

    /// Whether it is idle, has received nothing for at least `time`, and is not being evicted.
    pub(super) fn is_idle_for(&self, time: Duration) -> bool {
        let state = self.state();
        let is_idle = state.stage() == Stage::Waiting && state.is_flushed() && !state.is_evicted();
        is_idle && self.registry.age(self.quiet_since()) >= time
    }

    /// Whether it holds a permit of this semaphore.
    pub fn has_slot_of(&self, slots: &Arc<Semaphore>) -> bool {
        self.slots.as_ref().is_some_and(|own| Arc::ptr_eq(own, slots))
    }

    /// Closes the connection: HTTP/1.1 at once, HTTP/2 after GOAWAY. A request that has begun is answered before.
    pub fn evict(&self) {
        self.apply(Event::Evicted);
        self.wake();
    }

    // ---- requests ----

    /// Counts a request that begins, and returns its number.
    pub(super) fn count_started(&self) -> u64 {
        let number = self.started();
        self.started.store(number + 1, Release);
        number
    }

    /// Records a request by its number and path, so that a drain can tell it from newer ones, and the log can name it
    /// if it is cut off.
    pub(super) fn track(&self, request: InFlight) {
        lock(&self.tracked).push(Tracked { request, awaits_handover: false });
    }

    /// Records that another process can continue the response to a tracked request at any time.
    pub(super) fn await_handover(&self, request: &InFlight) {
        for tracked in lock(&self.tracked).iter_mut().filter(|other| other.request.number == request.number) {
            tracked.awaits_handover = true;
        }
        if self.state().is_watched() {
            self.registry.notify_of_watched();
        }
    }

    /// Whether another process can continue all requests in flight (HTTP/2).
    fn only_awaits_handover(&self, state: State) -> bool {
        let tracked = lock(&self.tracked);
        let awaiting = tracked.iter().filter(|request| request.awaits_handover).count();
        awaiting > 0 && state.in_flight() == awaiting as u64
    }

    pub(super) fn untrack(&self, request: &InFlight) {
        lock(&self.tracked).retain(|other| other.request.number != request.number);
    }

    /// Counts one more response frame that waits for room in the client's windows.
    pub(super) fn begin_pending_frame(&self) {
        self.pending.count(|count| count + 1, self.registry.now());
    }

    pub(super) fn end_pending_frame(&self) {
        self.pending.count(|count| count - 1, self.registry.now());
    }

    fn has_tracked_before(&self, count: u64) -> bool {
        lock(&self.tracked).iter().any(|other| other.request.number < count && !other.awaits_handover)
    }

    /// How many requests have begun on this connection in this process.
    pub(super) fn started(&self) -> u64 {
        self.started.load(Acquire)
    }

    /// A request that has been counted as started began in another process.
    pub(super) fn count_replay(&self) {
        self.replays.fetch_add(1, AcqRel);
    }

    /// Such a request is about to end.
    pub(super) fn count_ended_replay(&self) {
        self.ended_replays.fetch_add(1, AcqRel);
    }

    /// How many requests have begun in this process.
    pub(super) fn begun_here(&self) -> u64 {
        self.started().saturating_sub(self.replays.load(Acquire).into())
    }

    pub(super) fn ended_replays(&self) -> u64 {
        self.ended_replays.load(Acquire).into()
    }

    /// When its newest request in flight began. For a response that is not tracked and not fully sent, this is when the
    /// peer last received bytes of it.
    pub(super) fn last_request(&self) -> Option<Instant> {
        let tracked = lock(&self.tracked).iter().map(|other| other.request.since).max();
        let is_in_flight = self.stage() == Stage::InFlight;
        tracked
            .or_else(|| is_in_flight.then(|| Instant::now().checked_sub(self.registry.age(self.since())))?)
    }

    pub(super) fn remaining(&self) -> CutOffConnection {
        CutOffConnection {
            peer: self.peer(),
            age: self.registry.age(self.registered),
            requests: lock(&self.tracked).iter().map(|other| other.request.clone()).collect(),
        }
    }
}

/// The number of response frames that wait for room in the client's flow-control windows (HTTP/2), and when that number
/// last changed. Both are in one atomic; otherwise a task could read a new count with an old time, and close a
/// connection whose first frame has just begun to wait.
struct Pending(AtomicU64);

impl Pending {
    /// The bits of the time, in milliseconds of [`Registry::now`]; the bits above are the count.
    const TIME: u32 = 44;

    /// When the number last changed. None if no frame waits.
    fn since(&self) -> Option<u64> {
        let word = self.0.load(Acquire);
        (word >> Self::TIME > 0).then_some(word & ((1 << Self::TIME) - 1))
    }

    fn count(&self, change: impl Fn(u64) -> u64, now: u64) {
        let next = |word: u64| Some(change(word >> Self::TIME) << Self::TIME | now);
        // The closure never returns None, so this cannot fail.
        let _ = self.0.fetch_update(AcqRel, Acquire, next);
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use hyper::Uri;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::registry::Limits;

    /// A registry whose clock is beyond every limit, so that a time of 0 would be overdue.
    fn old_registry() -> Arc<Registry> {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        registry.set_now(1_000_000);
        registry
    }

    /// One thread sends responses and another checks the time limits, 5,000 times, so that the check falls between any
    /// two steps of the other thread.
    #[test]
    fn first_waiting_frame_in_an_old_process_is_never_overdue() {
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
            let request = registration.requests().begin(&Uri::from_static("/"));
            give.send(registration.entry.clone()).expect("the watcher is running");
            drop(request.pending_frame());
        }
        drop(give);
        assert_eq!(watcher.join().expect("the watcher panicked"), 0);
    }

    /// HTTP/2: several requests are in flight at once, so the beginning of a new one does not prove that an older one
    /// has ended.
    #[test]
    fn work_is_pending_until_the_requests_from_before_have_ended() {
        let registry = old_registry();
        let registration = registry.register(Peer::Unix, None);
        let requests = registration.requests();
        let mut slow = requests.begin(&Uri::from_static("/slow"));
        slow.track();
        let pending_work = PendingWork::new(registration.entry.clone());
        let mut quick = requests.begin(&Uri::from_static("/quick"));
        quick.track();
        assert!(pending_work.is_pending());
        drop(slow);
        assert!(!pending_work.is_pending(), "the other request began later");
    }

    #[test]
    fn connection_is_overdue_when_no_waiting_frame_is_sent_within_the_limit() {
        let registry = old_registry();
        let registration = registry.register(Peer::Unix, None);
        let entry = registration.entry.clone();
        let request = registration.requests().begin(&Uri::from_static("/"));
        let (first, second) = (request.pending_frame(), request.pending_frame());
        registry.set_now(1_000_900);
        drop(first);
        registry.set_now(1_001_800);
        assert!(!entry.is_overdue(), "a frame was sent less than a second ago");
        registry.set_now(1_002_000);
        assert!(entry.is_overdue());
        drop(second);
        assert!(!entry.is_overdue(), "no limit applies while only the handler is slow");
    }
}
