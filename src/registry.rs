//! Every open connection, as the rest of the process sees it: counted, told of each phase, watched for
//! its time limits. A connection's own task writes its entry, with plain stores where nobody waits for what
//! they say; a request that is answered at once takes no lock.

use std::collections::HashMap;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use hyper::Uri;
use hyper::http::uri::PathAndQuery;
use tokio::sync::{Notify, OwnedSemaphorePermit};

use crate::life::Shutdown;
use crate::lock::lock;
use crate::stream::Peer;

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
    /// There is nobody to move to: all connections are told to end. Others still hold the port, so
    /// what they pass is accepted.
    Lingering,
    /// As `Lingering`, and nothing is accepted.
    Closing,
}

impl Phase {
    const ALL: [Self; 6] =
        [Self::Serving, Self::Announcing, Self::Draining, Self::Resting, Self::Lingering, Self::Closing];

    pub fn accepts(self) -> bool {
        matches!(self, Self::Serving | Self::Announcing | Self::Draining | Self::Lingering)
    }

    /// Whether a connection is told to end with its next answer.
    pub fn ends(self, movable: bool) -> bool {
        match self {
            Self::Serving | Self::Announcing => false,
            Self::Draining | Self::Resting => !movable,
            Self::Lingering | Self::Closing => true,
        }
    }
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing of a request has arrived.
    Waiting,
    /// Some of a request's head has arrived.
    Head,
    /// A request is being answered, or the answer is still on its way out.
    InFlight,
    /// The connection belongs to a handler (WebSocket).
    Upgraded,
    /// The last answer is out; the peer is given time to take it.
    Closing,
}

impl Stage {
    /// As `/metrics` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Head => "head",
            Self::InFlight => "in_flight",
            Self::Upgraded => "upgraded",
            Self::Closing => "closing",
        }
    }

    pub const ALL: [Self; 5] = [Self::Waiting, Self::Head, Self::InFlight, Self::Upgraded, Self::Closing];
}

/// Time limits that the registry watches over.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub head: Duration,
    pub idle: Duration,
    /// For a peer to take the next piece of an answer.
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
    shutdown: Shutdown,
    phase: AtomicU8,
    /// The phase has changed; or, but in `Serving`, a connection has come to rest or closed.
    changed: Notify,
    open: Mutex<HashMap<u64, Arc<Entry>>>,
    /// How many of these have their last answer still to give.
    talking: AtomicU64,
    /// Tasks that may be holding a connection which is not in `open` yet.
    accepting: AtomicU32,
    /// Predecessors whose connections still come.
    arriving: AtomicU32,
    next_id: AtomicU64,
    /// Requests answered on connections that are closed.
    answered: AtomicU64,
    /// Milliseconds since `born`, as of the last look: a clock that costs nothing to read.
    now: AtomicU64,
}

/// One open connection.
pub struct Entry {
    pub id: u64,
    pub peer: Peer,
    registry: Arc<Registry>,
    opened: Instant,
    stage: AtomicU8,
    /// When it came to this stage, by the registry's clock.
    since: AtomicU64,
    task: Mutex<Option<Waker>>,
    /// Whether there is none in `task`.
    is_woken: AtomicBool,
    /// Request bodies being read.
    reading: AtomicU32,
    unflushed: AtomicBool,
    /// Pieces of answers that wait for room in the peer's windows (HTTP/2).
    untaken: AtomicU32,
    /// When one of them came or was taken last, by the registry's clock.
    last_taken: AtomicU64,
    /// Requests that have begun; one task alone counts them.
    started: AtomicU64,
    /// Of these, how many are over.
    ended: AtomicU64,
    /// Those in flight that were not answered at once.
    listed: Mutex<Vec<InFlight>>,
    /// Whether it can go on in another process.
    movable: AtomicBool,
    open: AtomicBool,
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
pub struct Remaining {
    pub peer: Peer,
    pub age: Duration,
    pub requests: Vec<InFlight>,
}

/// See [`Registry::unfinished`].
pub struct Unfinished {
    entry: Arc<Entry>,
    started: u64,
}

impl Unfinished {
    pub fn is_so(&self) -> bool {
        let entry = &self.entry;
        let same_request = entry.stage() == Stage::InFlight && entry.started() == self.started;
        entry.has_more_to_say() && (same_request || !entry.is_movable())
    }
}

/// Sums over all open connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub connections: usize,
    pub in_flight: usize,
    pub answered: u64,
}

/// Keeps a connection in the registry, and its slot under `--max-connections`, until dropped.
pub struct Registration {
    pub entry: Arc<Entry>,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Registry {
    /// `shutdown` begins with the first phase that is no business as usual.
    pub fn new(limits: Limits, shutdown: Shutdown) -> Arc<Self> {
        Arc::new(Self {
            born: Instant::now(),
            limits,
            shutdown,
            phase: AtomicU8::new(Phase::Serving as u8),
            changed: Notify::new(),
            open: Mutex::default(),
            talking: AtomicU64::new(0),
            accepting: AtomicU32::new(0),
            arriving: AtomicU32::new(0),
            next_id: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            now: AtomicU64::new(0),
        })
    }

    pub fn register(self: &Arc<Self>, peer: Peer, slot: Option<OwnedSemaphorePermit>) -> Registration {
        let id = self.next_id.fetch_add(1, SeqCst);
        let entry = Arc::new(Entry {
            id,
            peer,
            registry: self.clone(),
            opened: Instant::now(),
            stage: AtomicU8::new(Stage::Waiting as u8),
            since: AtomicU64::new(self.now.load(SeqCst)),
            task: Mutex::default(),
            is_woken: AtomicBool::new(true),
            reading: AtomicU32::new(0),
            unflushed: AtomicBool::new(false),
            untaken: AtomicU32::new(0),
            last_taken: AtomicU64::new(0),
            started: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            listed: Mutex::default(),
            movable: AtomicBool::new(true),
            open: AtomicBool::new(true),
        });
        self.talking.fetch_add(1, SeqCst);
        lock(&self.open).insert(id, entry.clone());
        Registration { entry, _slot: slot }
    }

    pub fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(SeqCst))]
    }

    /// Sets a phase after `Serving`.
    pub fn set_phase(&self, phase: Phase) {
        let before = self.phase();
        self.phase.store(phase as u8, SeqCst);
        self.changed.notify_waiters();
        if phase == Phase::Announcing {
            return;
        }
        self.shutdown.begin();
        // Business goes on for most: that is no news to wake thousands for.
        let is_first = matches!(before, Phase::Serving | Phase::Announcing);
        let is_old = |entry: &Entry| is_first && phase == Phase::Draining && entry.is_movable();
        for entry in self.entries().iter().filter(|entry| !is_old(entry)) {
            entry.wake();
        }
    }

    /// Waits until the phase is one that `wanted` says yes to.
    pub async fn until_phase(&self, wanted: impl Fn(Phase) -> bool) {
        self.until(|| wanted(self.phase())).await;
    }

    /// Waits until `done`, which is asked again each time that a connection of a process that no longer
    /// just serves comes to rest or closes.
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

    fn notify_of_change(&self) {
        match self.phase() {
            Phase::Serving | Phase::Announcing => {}
            // By the thousand, and only the last one matters.
            Phase::Resting if !self.is_done() => {}
            _ => self.changed.notify_waiters(),
        }
    }

    /// While this is held, a connection may come.
    pub fn accepting(&self) -> Accepting<'_> {
        self.accepting.fetch_add(1, SeqCst);
        Accepting(self)
    }

    /// While this is held, a predecessor passes connections on.
    pub fn arriving(&self) -> Arriving<'_> {
        self.arriving.fetch_add(1, SeqCst);
        Arriving(self)
    }

    pub fn is_arriving(&self) -> bool {
        self.arriving.load(SeqCst) > 0
    }

    /// Whether the last answer of every connection is out, and no connection comes any more.
    pub fn is_done(&self) -> bool {
        self.accepting.load(SeqCst) == 0 && !self.is_arriving() && self.talking.load(SeqCst) == 0
    }

    pub fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.open).values().cloned().collect()
    }

    pub fn counts(&self) -> Counts {
        let entries = self.entries();
        entries.iter().fold(
            Counts { connections: entries.len(), in_flight: 0, answered: self.answered.load(SeqCst) },
            |counts, entry| {
                let answered = entry.ended.load(Acquire);
                let in_flight = usize::try_from(entry.started().saturating_sub(answered)).unwrap_or(0);
                Counts {
                    in_flight: counts.in_flight + in_flight,
                    answered: counts.answered + answered,
                    ..counts
                }
            },
        )
    }

    /// What has to end before the others can move on without waiting for it: the requests in flight
    /// now, and the connections that cannot move.
    pub fn unfinished(&self) -> Vec<Unfinished> {
        let unfinished = |entry: Arc<Entry>| Unfinished { started: entry.started(), entry };
        let mut all: Vec<_> = self.entries().into_iter().map(unfinished).collect();
        all.retain(Unfinished::is_so);
        all
    }

    /// What would be lost if the process ended now.
    pub fn remaining(&self) -> Vec<Remaining> {
        let remaining = |entry: Arc<Entry>| Remaining {
            peer: entry.peer,
            age: entry.opened.elapsed(),
            requests: lock(&entry.listed).clone(),
        };
        self.entries().into_iter().map(remaining).collect()
    }

    /// Looks at the time limits of every connection, for as long as the process lives.
    pub async fn watch(self: Arc<Self>) {
        let mut clock = tokio::time::interval(self.limits.interval());
        loop {
            clock.tick().await;
            let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.now.store(now, SeqCst);
            for entry in self.entries() {
                if entry.is_overdue() {
                    entry.wake();
                }
            }
        }
    }
}

/// See [`Registry::accepting`].
pub struct Accepting<'a>(&'a Registry);

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        self.0.accepting.fetch_sub(1, SeqCst);
        self.0.notify_of_change();
    }
}

/// See [`Registry::arriving`].
pub struct Arriving<'a>(&'a Registry);

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.0.arriving.fetch_sub(1, SeqCst);
        self.0.notify_of_change();
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let registry = &self.entry.registry;
        registry.answered.fetch_add(self.entry.started(), SeqCst);
        lock(&registry.open).remove(&self.entry.id);
        self.entry.open.store(false, SeqCst);
        if self.entry.stage() != Stage::Closing {
            registry.talking.fetch_sub(1, SeqCst);
        }
        registry.notify_of_change();
    }
}

/// A piece of an answer that an HTTP/2 connection has for its peer, until there is room for it.
pub struct Untaken(Arc<Entry>);

impl Untaken {
    pub fn new(entry: &Arc<Entry>) -> Self {
        entry.untaken.fetch_add(1, Relaxed);
        entry.last_taken.store(entry.registry.now.load(Relaxed), Relaxed);
        Self(entry.clone())
    }
}

impl Drop for Untaken {
    fn drop(&mut self) {
        let entry = &self.0;
        entry.untaken.fetch_sub(1, Relaxed);
        entry.last_taken.store(entry.registry.now.load(Relaxed), Relaxed);
    }
}

impl Entry {
    pub fn stage(&self) -> Stage {
        Stage::ALL[usize::from(self.stage.load(SeqCst))]
    }

    pub fn set_stage(&self, stage: Stage) {
        self.touch();
        if !matches!(stage, Stage::Waiting | Stage::Closing) {
            self.stage.store(stage as u8, Release);
            return;
        }
        // Somebody may wait for this: what they read is not to be older than the phase that we read.
        let before = self.stage.swap(stage as u8, SeqCst);
        if stage == Stage::Closing && before != Stage::Closing as u8 {
            self.registry.talking.fetch_sub(1, SeqCst);
        }
        self.registry.notify_of_change();
    }

    pub fn phase(&self) -> Phase {
        self.registry.phase()
    }

    /// Whether the connection is open, and its last answer is not out yet.
    pub fn has_more_to_say(&self) -> bool {
        self.open.load(SeqCst) && self.stage() != Stage::Closing
    }

    /// Makes the task of `cx`, which is the same each time, the one that is woken when the phase changes or a
    /// limit has passed.
    pub fn wake_on_change(&self, cx: &Context<'_>) {
        // Whoever wakes it says so first: a task that reads here that it will be woken will be.
        if self.is_woken.load(Acquire) {
            self.wake_instead(cx);
        }
    }

    /// As `wake_on_change`, for the task of a handler whose connection it is now.
    pub fn wake_instead(&self, cx: &Context<'_>) {
        let mut task = lock(&self.task);
        *task = Some(cx.waker().clone());
        self.is_woken.store(false, Relaxed);
    }

    /// Whether the connection has been too long in this stage.
    pub fn is_overdue(&self) -> bool {
        let limits = self.registry.limits;
        let (limit, since) = match self.stage() {
            Stage::Waiting => (limits.idle, &self.since),
            Stage::Head => (limits.head, &self.since),
            Stage::InFlight | Stage::Upgraded if !self.is_flushed() => (limits.stall, &self.since),
            Stage::InFlight if self.untaken.load(Relaxed) > 0 => (limits.stall, &self.last_taken),
            Stage::InFlight | Stage::Upgraded => return false,
            Stage::Closing => (limits.close, &self.since),
        };
        let spent = self.registry.now.load(Relaxed).saturating_sub(since.load(Relaxed));
        u128::from(spent) > limit.as_millis()
    }

    /// The time in this stage counts from now.
    pub fn touch(&self) {
        self.since.store(self.registry.now.load(Relaxed), Relaxed);
    }

    fn wake(&self) {
        let waker = {
            let mut task = lock(&self.task);
            self.is_woken.store(true, Relaxed);
            task.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The connection stays in this process until it ends.
    pub fn set_immovable(&self) {
        self.movable.store(false, SeqCst);
    }

    /// Whether the connection is told to end with its next answer.
    pub fn is_to_end(&self) -> bool {
        self.phase().ends(self.is_movable())
    }

    pub fn is_movable(&self) -> bool {
        self.movable.load(SeqCst)
    }

    // ---- what the connection's IO reports ----

    /// Bytes have arrived.
    pub fn received(&self) {
        if self.stage() == Stage::Waiting {
            self.set_stage(Stage::Head);
        }
    }

    /// The connection has something to send.
    pub fn writing(&self) {
        if self.is_flushed() {
            self.unflushed.store(true, Release);
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
        self.unflushed.store(false, Release);
    }

    pub fn is_flushed(&self) -> bool {
        !self.unflushed.load(Acquire)
    }

    // ---- what the connection's requests report ----

    /// A request begins.
    pub fn begin(&self, uri: &Uri) -> InFlight {
        if self.stage() != Stage::InFlight {
            self.set_stage(Stage::InFlight);
        }
        let number = self.started();
        self.started.store(number + 1, Release);
        let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        InFlight { number, path, since: Instant::now() }
    }

    /// A request is not answered at once.
    pub fn list(&self, request: InFlight) {
        lock(&self.listed).push(request);
    }

    pub fn unlist(&self, request: &InFlight) {
        lock(&self.listed).retain(|other| other.number != request.number);
    }

    /// The last byte of a request's answer has been given to the connection, or the request was given up.
    pub fn answered(&self) {
        self.ended.fetch_add(1, Release);
    }

    /// Whether a request has begun that is not over.
    pub fn is_in_flight(&self) -> bool {
        self.ended.load(Acquire) != self.started()
    }

    pub fn begin_reading(&self) {
        self.reading.fetch_add(1, Relaxed);
    }

    pub fn end_reading(&self) {
        self.reading.fetch_sub(1, Release);
    }

    /// Whether a request's body is still being read.
    pub fn is_reading(&self) -> bool {
        self.reading.load(Acquire) > 0
    }

    /// How many requests have begun on this connection in this process.
    pub fn started(&self) -> u64 {
        self.started.load(Acquire)
    }

    /// Called by the driver after each turn: a connection whose answers are all out waits again.
    pub fn settle(&self) {
        let is_busy = self.is_in_flight() || self.is_reading();
        if self.stage() == Stage::InFlight && !is_busy && self.is_flushed() {
            self.set_stage(Stage::Waiting);
        }
    }
}
