//! How a process ends without losing a request, and, where there is a next process to leave them to,
//! without closing a connection.

mod schedule;

use std::io;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Interval, interval, sleep, sleep_until, timeout, timeout_at};
use tracing::{info, warn};

use crate::handover::{
    Channel, FdStore, MAX_SOCKETS, MessageType, Origin, Protocols, pack, pack_channel, pack_tickets,
};
use crate::observe::log::message_id;
use crate::observe::metrics;
use crate::os::signals::Signals;
use crate::os::systemd;
use crate::registry::{Counts, PendingWork, Phase, Registry};
use crate::requests::logged;
use crate::server::Server;
use crate::takeover::Successor;
use crate::transport::stream::Connection;
use schedule::{Schedule, Step};

/// For connections with nothing in flight to come to rest, where the limit has passed already.
const QUIESCE_LIMIT: Duration = Duration::from_millis(100);
/// For connections that do not fit into the handover channel to hear that they are to close, while the
/// others wait for the next process.
const OVERFLOW_LINGER: Duration = Duration::from_secs(1);
/// For a successor that is alive to take what is left for it at the end.
const SUCCESSOR_LINGER: Duration = Duration::from_secs(1);
/// What is asked of systemd beyond each report, so that one late report does not end the drain.
const MORE_TIME: Duration = Duration::from_secs(5);

const SECOND_SIGNAL: &str = "a second stop signal";

/// What the end of a process's serving leaves for what comes after it.
pub struct TaskBudget {
    pub deadline: Instant,
    /// It is the last of so many further signals that cuts it off.
    pub signals: u32,
}

/// The end of a process's serving, under way.
pub struct Drain<'a> {
    server: &'a Server,
    quiescent: &'a mut UnboundedReceiver<Connection>,
    generation: u64,
    begun: Instant,
    /// Requests in flight at the beginning.
    in_flight: usize,
    limit: Limit<'a>,
}

impl<'a> Drain<'a> {
    /// A drain that ends within `limit`, or at a further signal.
    pub fn new(
        server: &'a Server,
        quiescent: &'a mut UnboundedReceiver<Connection>,
        signals: &'a mut Signals,
        limit: Duration,
        generation: u64,
    ) -> Self {
        let limit = Limit::new(server.registry(), signals, limit);
        Self { server, quiescent, generation, begun: Instant::now(), in_flight: 0, limit }
    }

    /// Serves on for `delay`, with only `/readyz` saying that it will end.
    async fn announce(&mut self, delay: Duration) {
        self.limit.begun += delay;
        self.server.registry().set_phase(Phase::Announcing);
        info!("accepting connections for another {} (--drain-delay)", humantime::format_duration(delay));
        tokio::select! {
            () = sleep(delay) => {}
            () = self.limit.passes() => {}
        }
    }

    fn begin(&mut self) {
        self.begun = Instant::now();
        let Counts { connections, in_flight, .. } = self.server.registry().counts();
        self.in_flight = in_flight;
        info!(
            message_id = message_id::DRAINING,
            connections,
            in_flight,
            "draining: {in_flight} requests in flight on {connections} connections, limit {}",
            humantime::format_duration(self.limit.length),
        );
    }

    /// Ends with no successor there: what can move waits in systemd's store for the next process, where
    /// there is one.
    /// Before it begins, it is announced for `delay`. `next_adopts`: which connections the next process can adopt.
    pub async fn leave(mut self, delay: Duration, next_adopts: Protocols) -> TaskBudget {
        systemd::stopping(&self.limit.status());
        if !delay.is_zero() {
            self.announce(delay).await;
        }
        // The next process finds them in the store.
        drop(self.server.overflow().hand_over());
        self.begin();
        // A port that closes with us is no place to come back to: its connections are told to end.
        let store = if self.server.owns_ports() { None } else { FdStore::open().await };
        if next_adopts == Protocols::PlainHttp1 {
            self.server.registry().keep_http2_and_tls();
        }
        let handed_over = if let Some(store) = &store {
            self.hand_over(store).await
        } else {
            self.linger().await;
            0
        };
        systemd::status(&self.log_end(handed_over));
        if let Some(store) = store {
            if next_adopts == Protocols::All
                && let Some(keys) = self.server.tickets()
            {
                store.put_tickets(Origin::now(self.generation), keys);
            }
            store.say_totals(Origin::now(self.generation));
        }
        self.limit.remaining()
    }

    /// Leaves all connections that can move in `store`; gives their number.
    ///
    /// The schedule says when requests that arrive are served and when they are held. Connections that cannot move are
    /// waited for like requests in flight.
    async fn hand_over(&mut self, store: &FdStore) -> usize {
        let Self { server, quiescent, limit, .. } = self;
        let registry = server.registry();
        let mut schedule = Schedule::new(limit.length);
        let mut step = schedule.first(limit.elapsed());
        loop {
            step = match step {
                Step::Serve { at_most } => {
                    let have_ended = serve_on(server, quiescent, limit, at_most).await;
                    schedule.after_serving(limit.elapsed(), have_ended)
                }
                Step::Try { at_most } => {
                    server.enter(Phase::Quiescing);
                    tokio::select! {
                        biased;
                        () = registry.wait_until(|| registry.is_drained()) => break,
                        () = limit.passes() => Step::Hold,
                        () = sleep(at_most) => schedule.after_failed_try(limit.elapsed()),
                    }
                }
                Step::Hold => {
                    server.enter(Phase::Holding);
                    let at_rest_by = Instant::now() + QUIESCE_LIMIT;
                    tokio::select! {
                        biased;
                        () = registry.wait_until(|| registry.is_drained()) => {}
                        () = limit.passes() => {
                            // What has nothing in flight has the time that it takes to come to rest, and no more.
                            let _ = timeout_at(at_rest_by, registry.wait_until(|| registry.is_drained())).await;
                        }
                    }
                    break;
                }
            };
        }
        let mut connections = take_all(quiescent);
        connections.extend(server.take_parked());
        let all = connections.len();
        let left = store.put(Origin::now(self.generation), connections);
        let handed_over = all - left.len();
        if !left.is_empty() {
            server.enter(Phase::Closing);
            for connection in left {
                server.adopt(connection);
            }
            tokio::select! {
                () = registry.wait_until(|| registry.is_drained()) => {}
                () = sleep(OVERFLOW_LINGER) => {}
            }
        }
        handed_over
    }

    /// Tells all connections to end with their next answer. Those that were there before are told first;
    /// only then are no more accepted. When the limit has passed, no more requests begin, and those that began
    /// meanwhile have the rest of their time.
    async fn linger(&mut self) {
        let Self { server, limit, .. } = self;
        let registry = server.registry();
        server.enter(Phase::Lingering);
        let told = async {
            server.own_ports_closed().await;
            let mut before = registry.subscribe_all();
            registry
                .wait_until(|| {
                    before.retain(|entry| entry.is_unanswered());
                    before.is_empty()
                })
                .await;
            server.enter(Phase::Closing);
            registry.wait_until(|| registry.is_drained()).await;
        };
        let first_deadline = limit.first_deadline();
        tokio::select! {
            biased;
            () = told => return,
            () = limit.passes() => return,
            () = sleep_until(first_deadline) => {}
        }
        server.enter(Phase::Finishing);
        tokio::select! {
            () = registry.wait_until(|| registry.is_drained()) => {}
            () = limit.passes() => {}
        }
    }

    /// Ends with a successor there: each connection goes to it as it comes to rest. `stop_signals`: how
    /// many stop signals came already.
    /// Gives the successor's channel back, which it takes for our end when it is closed.
    pub async fn pass_on(mut self, successor: Successor, stop_signals: u32) -> (Channel, TaskBudget) {
        let Successor { channel: successor, adopts } = successor;
        self.begin();
        let Self { server, quiescent, limit, generation, .. } = &mut self;
        let registry = server.registry();
        limit.is_main = false;
        // The first signal may be meant for both of us, and we are ending already.
        limit.expect_signals(2_u32.saturating_sub(stop_signals));
        let origin = Origin::now(*generation);
        if adopts == Protocols::PlainHttp1 {
            registry.keep_http2_and_tls();
        } else if let Some(packed) = server.tickets().and_then(|keys| pack_tickets(keys).ok()) {
            let _ =
                timeout(SUCCESSOR_LINGER, successor.send(MessageType::Tickets, origin, &packed, "")).await;
        }
        let mut handed_over = 0;
        for waiting in server.overflow().hand_over() {
            let packed = pack_channel(&waiting);
            let sent =
                timeout(SUCCESSOR_LINGER, successor.send(MessageType::Connections, origin, &packed, ""))
                    .await;
            if let Err(error) = sent.map_err(io::Error::from).flatten() {
                warn!(%error, "could not hand over connections that wait for file descriptors; the next restart will");
            }
        }
        server.enter(Phase::Quiescing);
        let mut idle = server.take_parked();
        loop {
            // Whoever was served until now goes first.
            let mut connections = take_all(quiescent);
            if connections.is_empty() {
                connections = idle.split_off(idle.len().saturating_sub(MAX_SOCKETS));
            }
            if connections.is_empty() {
                let first_deadline = limit.first_deadline();
                let connection = tokio::select! {
                    connection = quiescent.recv() => connection,
                    () = registry.wait_until(|| registry.is_drained()) => quiescent.try_recv().ok(),
                    () = limit.passes() => quiescent.try_recv().ok(),
                    // Connections that could not move have begun requests meanwhile; from now on none begins.
                    () = sleep_until(first_deadline), if registry.phase() == Phase::Quiescing => {
                        server.enter(Phase::Holding);
                        continue;
                    }
                };
                let Some(connection) = connection else { break };
                connections.push(connection);
            }
            let packed = pack(&connections);
            let sent = tokio::select! {
                sent = successor.send(MessageType::Connections, origin, &packed, "") => sent,
                () = async { limit.passes().await; sleep(SUCCESSOR_LINGER).await } => {
                    Err(io::ErrorKind::TimedOut.into())
                }
            };
            if let Err(error) = sent {
                warn!(%error, connections = connections.len(), "could not hand over connections; they will be closed");
                limit.passed.get_or_insert("the successor's exit");
                break;
            }
            handed_over += connections.len();
        }
        self.log_end(handed_over);
        // One that hangs or has gone will not miss them.
        let totals = metrics::totals();
        let _ = timeout(SUCCESSOR_LINGER, successor.say(MessageType::Totals, origin, &totals)).await;
        (successor, self.limit.remaining())
    }

    /// Counts and says how it ended; gives the line.
    fn log_end(&self, handed_over: usize) -> String {
        let registry = self.server.registry();
        let cut_off = self.limit.passed.map_or(0, |reason| log_remaining(registry, reason));
        metrics::CUT_OFF.inc_by(cut_off as u64);
        metrics::HANDED_OVER.inc_by(handed_over as u64);
        let finished = self.in_flight.saturating_sub(cut_off);
        let answered = registry.counts().answered;
        let drain_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let line = format!(
            "handed over {handed_over} connections; {finished} requests in flight finished, {cut_off} cut off, in \
             {drain_ms} ms; {answered} answered in total"
        );
        info!(message_id = message_id::STOPPED, handed_over, finished, cut_off, answered, drain_ms, "{line}");
        line
    }
}

/// Serves until all that was unfinished at the beginning has ended, and no longer than `at_most`; gives whether it has.
async fn serve_on(
    server: &Server,
    quiescent: &mut UnboundedReceiver<Connection>,
    limit: &mut Limit<'_>,
    at_most: Duration,
) -> bool {
    let registry = server.registry();
    registry.set_phase(Phase::Draining);
    let mut pending_work = registry.pending_work();
    let finished = registry.wait_until(|| {
        pending_work.retain(PendingWork::is_pending);
        pending_work.is_empty() && !registry.is_arriving()
    });
    let time_over = sleep(at_most);
    tokio::pin!(finished, time_over);
    loop {
        tokio::select! {
            biased;
            () = limit.passes() => return false,
            () = &mut finished => return true,
            () = &mut time_over => return false,
            Some(connection) = quiescent.recv() => server.adopt(connection),
        }
    }
}

/// All connections that have come to rest so far.
fn take_all(quiescent: &mut UnboundedReceiver<Connection>) -> Vec<Connection> {
    std::iter::from_fn(|| quiescent.try_recv().ok()).collect()
}

/// The end of a drain, if it does not end by itself; meanwhile systemd is told how it goes.
///
/// Each request has the whole limit: from the beginning of the drain if it was in flight then, otherwise from its own
/// beginning. Each way to drain sees to it that no request begins once the limit has passed for the first time, so a
/// drain ends within twice the limit.
struct Limit<'a> {
    registry: &'a Registry,
    signals: &'a mut Signals,
    length: Duration,
    begun: Instant,
    report: Interval,
    /// Whether this is the main process, of which systemd wants to hear.
    is_main: bool,
    /// Signals that it takes to end it.
    signals_left: u32,
    /// What ended it.
    passed: Option<&'static str>,
}

impl<'a> Limit<'a> {
    fn new(registry: &'a Registry, signals: &'a mut Signals, length: Duration) -> Self {
        let begun = Instant::now();
        let report = interval(systemd::STATUS_INTERVAL);
        Self { registry, signals, length, begun, report, is_main: true, signals_left: 1, passed: None }
    }

    fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// For requests that were in flight at the beginning.
    fn first_deadline(&self) -> Instant {
        self.begun + self.length
    }

    /// The next one: the first, until it has passed; then that of the requests that are in flight now.
    fn deadline(&self) -> Instant {
        let first = self.first_deadline();
        if Instant::now() < first { first } else { deadline(self.registry, self.begun, self.length) }
    }

    /// It is the last of so many further signals that ends the drain.
    fn expect_signals(&mut self, count: u32) {
        self.signals_left = count;
        if count == 0 {
            self.passed = Some(SECOND_SIGNAL);
        }
    }

    /// Waits for it.
    async fn passes(&mut self) {
        while self.passed.is_none() {
            tokio::select! {
                () = run_out(self.registry, self.begun, self.length) => self.passed = Some("the drain limit"),
                () = self.signals.terminated() => {
                    self.signals_left -= 1;
                    if self.signals_left == 0 {
                        self.passed = Some(SECOND_SIGNAL);
                    }
                }
                _ = self.report.tick(), if self.is_main => {
                    systemd::still_stopping(&self.status(), MORE_TIME);
                }
            }
        }
    }

    /// A drain that a signal has ended leaves one more for what comes after it.
    fn remaining(&self) -> TaskBudget {
        TaskBudget { deadline: self.first_deadline(), signals: self.signals_left.max(1) }
    }

    fn status(&self) -> String {
        let Counts { connections, in_flight, .. } = self.registry.counts();
        let left = self.deadline().saturating_duration_since(Instant::now()).as_secs_f64().round();
        format!("draining: {in_flight} in flight on {connections} connections, {left} s left")
    }
}

/// When no request that is in flight has time left, of those that have `length` each.
fn deadline(registry: &Registry, begun: Instant, length: Duration) -> Instant {
    let last = registry.last_request().map_or(begun, |last| last.max(begun));
    (last + length).min(begun + length + length)
}

/// Waits until no request that is in flight has time left.
async fn run_out(registry: &Registry, begun: Instant, length: Duration) {
    sleep_until(begun + length).await;
    let time_left = || deadline(registry, begun, length).saturating_duration_since(Instant::now());
    if time_left().is_zero() {
        return;
    }
    // So that the end of each is heard.
    registry.subscribe_all();
    while !time_left().is_zero() {
        tokio::select! {
            () = registry.wait_until(|| time_left().is_zero()) => {}
            () = sleep(time_left()) => {}
        }
    }
}

/// Says what is lost; gives the number of requests.
fn log_remaining(registry: &Registry, reason: &str) -> usize {
    let mut requests = 0;
    for remaining in registry.remaining() {
        let age = humantime::format_duration(Duration::from_millis(
            u64::try_from(remaining.age.as_millis()).unwrap_or(u64::MAX),
        ));
        if remaining.requests.is_empty() {
            info!(peer = %remaining.peer, %age, "closed at {reason}: connection without a request");
        }
        for request in remaining.requests {
            requests += 1;
            warn!(
                message_id = message_id::CUT_OFF,
                peer = %remaining.peer,
                path = logged(request.path.path()),
                %age,
                request_ms = u64::try_from(request.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                "cut off at {reason}: request {} from {}",
                logged(request.path.path()),
                remaining.peer,
            );
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::ops::Range;
    use std::rc::Rc;

    use axum::Router;
    use hyper::Uri;
    use proptest::prelude::*;
    use tokio::task::LocalSet;

    use super::*;
    use crate::connection::tests::{Served, serve};
    use crate::transport::stream::Peer;

    /// Hands over with a request that never ends, which comes once the drain has begun; gives how long it took.
    async fn hand_over_beside_an_endless_request(limit: Duration) -> Duration {
        let Served { server, mut quiescent, .. } = serve(Router::new()).await;
        let (store, _store) = FdStore::in_memory();
        let mut signals = Signals::new().expect("signals");
        let endless = server.registered(Peer::Unix);
        // Some of its head has come: the drain does not wait for it, and finds it when all are to rest.
        endless.entry.received();
        let begun = Instant::now();
        let mut drain = Drain::new(&server, &mut quiescent, &mut signals, limit, 1);
        let handed_over = timeout(limit * 2 + Duration::from_secs(10), drain.hand_over(&store)).await;
        assert_eq!(handed_over, Ok(0));
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_passes_while_all_are_to_rest_ends_the_drain() {
        let limit = Duration::from_secs(2);
        assert_eq!(hand_over_beside_an_endless_request(limit).await, limit);
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_passes_as_all_are_told_to_rest_leaves_them_the_time_for_it() {
        assert_eq!(hand_over_beside_an_endless_request(Duration::from_millis(1)).await, QUIESCE_LIMIT);
    }

    // ---- requests of all kinds, in simulated time ----

    const LIMIT: Duration = Duration::from_secs(30);
    /// More than timers are late by, and tasks.
    const ROUNDING: Duration = Duration::from_millis(20);

    /// A request, as its client would send it to a process that is always there.
    #[derive(Clone, Copy, Debug)]
    struct Request {
        /// From the beginning of the simulation on.
        at: Duration,
        takes: Duration,
    }

    /// What became of the requests of a simulation. Its times are since the beginning of the drain.
    #[derive(Debug, Default)]
    struct Outcome {
        /// The drain.
        took: Duration,
        /// What the drain itself says that it cut off.
        cut_off: usize,
        finished: usize,
        /// Since when requests are held, by their number.
        held: HashMap<usize, Instant>,
        longest_wait: Duration,
    }

    impl Outcome {
        fn admit(&mut self, number: usize) {
            let wait = self.held.remove(&number).map_or(Duration::ZERO, |since| since.elapsed());
            self.longest_wait = self.longest_wait.max(wait);
        }
    }

    /// Sends `requests`, each on a connection of its own, and begins to drain at `drain_at`.
    fn simulate(requests: &[Request], drain_at: Duration) -> Outcome {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(LocalSet::new().run_until(drain_beside(requests, drain_at)))
    }

    async fn drain_beside(requests: &[Request], drain_at: Duration) -> Outcome {
        let Served { server, mut quiescent, .. } = serve(Router::new()).await;
        let (store, _store) = FdStore::in_memory();
        let mut signals = Signals::new().expect("signals");
        let outcome = Rc::new(RefCell::new(Outcome::default()));
        for (number, request) in requests.iter().copied().enumerate() {
            let (server, outcome) = (server.clone(), outcome.clone());
            tokio::task::spawn_local(async move {
                sleep(request.at).await;
                outcome.borrow_mut().held.insert(number, Instant::now());
                let registration = loop {
                    server.registry().wait_for_phase(|phase| !phase.quiesces()).await;
                    let _accepting = server.registry().accepting();
                    if !server.registry().phase().quiesces() {
                        break server.registered(Peer::Unix);
                    }
                };
                outcome.borrow_mut().admit(number);
                let entry = &registration.entry;
                let in_flight = entry.begin(&Uri::from_static("/"));
                entry.track(in_flight.clone());
                sleep(request.takes).await;
                entry.untrack(&in_flight);
                entry.end();
                outcome.borrow_mut().finished += 1;
            });
        }
        sleep(drain_at).await;
        let mut drain = Drain::new(&server, &mut quiescent, &mut signals, LIMIT, 1);
        drain.hand_over(&store).await;
        let took = drain.begun.elapsed();
        let cut_off = drain.limit.passed.map_or(0, |_| server.registry().counts().in_flight);
        let left = server.registry().counts().in_flight;
        assert_eq!(left, cut_off, "a drain that ends before its limit leaves no request behind");
        let mut outcome = std::mem::take(&mut *outcome.borrow_mut());
        // Those that the next process serves.
        for number in outcome.held.keys().copied().collect::<Vec<_>>() {
            outcome.admit(number);
        }
        Outcome { took, cut_off, ..outcome }
    }

    /// `clients`, each of which sends a request, waits for the answer, and `thinks` before the next.
    fn steady(clients: u32, takes: Duration, thinks: Duration, until: Duration) -> Vec<Request> {
        let cycle = takes + thinks;
        let all = (0..clients).flat_map(|client| {
            let first = cycle * client / clients;
            (0..).map(move |round| first + cycle * round).take_while(move |at| *at < until)
        });
        all.map(|at| Request { at, takes }).collect()
    }

    #[test]
    fn steady_requests_of_any_duration_below_the_limit_are_not_cut_off_and_others_wait_as_long_as_one_takes()
    {
        for takes in [100, 500, 1_000, 3_000, 6_000, 10_000, 20_000, 29_900].map(Duration::from_millis) {
            let requests = steady(20, takes, Duration::from_secs(2), Duration::from_secs(100));
            let outcome = simulate(&requests, Duration::from_secs(31));
            assert_eq!(outcome.cut_off, 0, "{takes:?}");
            assert!(outcome.longest_wait <= takes + ROUNDING, "{takes:?}: {:?}", outcome.longest_wait);
            assert!(
                outcome.took <= takes * 32 / 10 + Duration::from_millis(500),
                "{takes:?}: {:?}",
                outcome.took
            );
        }
    }

    #[test]
    fn one_slow_request_among_quick_ones_makes_no_other_wait_for_long() {
        let slow = Request { at: Duration::ZERO, takes: Duration::from_secs(28) };
        for takes in [5, 200].map(Duration::from_millis) {
            let mut requests = steady(20, takes, Duration::from_millis(500), Duration::from_secs(60));
            requests.push(slow);
            let outcome = simulate(&requests, Duration::from_secs(3));
            assert_eq!(outcome.cut_off, 0);
            assert!(outcome.took >= Duration::from_secs(25), "it ends with the slow one: {:?}", outcome.took);
            assert!(outcome.longest_wait <= takes + ROUNDING, "{takes:?}: {:?}", outcome.longest_wait);
        }
    }

    #[test]
    fn one_slow_request_that_comes_during_the_drain_makes_no_other_wait_for_long() {
        let takes = Duration::from_millis(5);
        let mut requests = steady(20, takes, Duration::from_millis(500), Duration::from_secs(60));
        let slow = Request { at: Duration::ZERO, takes: Duration::from_secs(8) };
        requests.extend([slow, Request { at: Duration::from_secs(5), ..slow }]);
        let outcome = simulate(&requests, Duration::from_secs(3));
        assert!(outcome.took >= Duration::from_secs(10), "it ends with the second one: {:?}", outcome.took);
        assert!(outcome.longest_wait <= Duration::from_millis(100) + ROUNDING, "{:?}", outcome.longest_wait);
    }

    /// One that began before is cut off at the limit, though one that came meanwhile still has time.
    #[test]
    fn each_request_has_the_limit_from_its_own_beginning_and_no_more() {
        let endless = Request { at: Duration::ZERO, takes: LIMIT * 10 };
        let late = Request { at: Duration::from_secs(21), takes: Duration::from_secs(28) };
        let outcome = simulate(&[endless], Duration::from_secs(1));
        assert_eq!((outcome.cut_off, outcome.took.as_secs()), (1, 30));
        let outcome = simulate(&[endless, late], Duration::from_secs(1));
        assert_eq!((outcome.cut_off, outcome.finished, outcome.took.as_secs()), (1, 1, 48));
        let outcome = simulate(&[endless, Request { takes: LIMIT * 10, ..late }], Duration::from_secs(1));
        assert_eq!((outcome.cut_off, outcome.took.as_secs()), (2, 50));
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let milliseconds = |range: Range<u64>| range.prop_map(Duration::from_millis);
        // As many of each order of magnitude, so that quick and slow ones meet.
        let takes = prop_oneof![
            milliseconds(0..100),
            milliseconds(0..1_000),
            milliseconds(0..10_000),
            milliseconds(0..29_990)
        ];
        (milliseconds(0..60_000), takes).prop_map(|(at, takes)| Request { at, takes })
    }

    proptest! {
        /// Whatever arrives, and whenever.
        #[test]
        fn no_request_that_takes_less_than_the_limit_is_cut_off(
            requests in prop::collection::vec(any_request(), 0..200), drain_at in 0..30_000_u64,
        ) {
            let outcome = simulate(&requests, Duration::from_millis(drain_at));
            prop_assert_eq!(outcome.cut_off, 0);
            prop_assert!(outcome.took <= LIMIT * 2);
            let slowest = requests.iter().map(|request| request.takes).max().unwrap_or_default();
            prop_assert!(outcome.longest_wait <= slowest + ROUNDING);
        }
    }
}
