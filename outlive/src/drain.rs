//! How a process ends without losing a request, and, where there is a next process to leave them to,
//! without closing a connection.

use std::io;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Interval, interval, sleep, sleep_until, timeout, timeout_at};
use tracing::{info, warn};

use crate::handover::{Channel, FdStore, Kind, MAX_SOCKETS, Origin, pack, pack_channel, pack_tickets};
use crate::log::message_id;
use crate::metrics;
use crate::registry::{Counts, Phase, Registry, Unfinished};
use crate::requests::logged;
use crate::server::Server;
use crate::signals::Signals;
use crate::stream::Connection;
use crate::systemd;

/// How long all connections may wait at first for the last answers, before they are served on for a while;
/// twice as long at each further try.
const QUIESCE_LIMIT: Duration = Duration::from_millis(100);
/// For connections that do not fit into the handover channel to hear that they are to close, while the
/// others wait for the next process.
const OVERFLOW_LINGER: Duration = Duration::from_secs(1);
/// For a successor that is alive to take what is left for it at the end.
const SUCCESSOR_LINGER: Duration = Duration::from_secs(1);
/// What is asked of systemd beyond each report, so that one late report does not end the drain.
const MORE_TIME: Duration = Duration::from_secs(5);

const SECOND_SIGNAL: &str = "a second signal";

/// What the end of a process's serving leaves for what comes after it.
pub struct Remaining {
    pub deadline: Instant,
    /// It is the last of so many further signals that cuts it off.
    pub signals: u32,
}

/// The end of a process's serving, under way.
pub struct Drain<'a> {
    server: &'a Server,
    rested: &'a mut UnboundedReceiver<Connection>,
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
        rested: &'a mut UnboundedReceiver<Connection>,
        signals: &'a mut Signals,
        limit: Duration,
        generation: u64,
    ) -> Self {
        let limit = Limit::new(server.registry(), signals, limit);
        Self { server, rested, generation, begun: Instant::now(), in_flight: 0, limit }
    }

    /// Serves on for `delay`, with only `/readyz` saying that it will end.
    async fn announce(&mut self, delay: Duration) {
        self.limit.deadline += delay;
        self.server.registry().set_phase(Phase::Announcing);
        info!("serving on for {}", humantime::format_duration(delay));
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
            "draining: {in_flight} in flight on {connections} connections, up to {}",
            humantime::format_duration(self.limit.length),
        );
    }

    /// Ends with no successor there: what can move waits in systemd's store for the next process, where
    /// there is one.
    /// Before it begins, it is announced for `delay`. `takes_all_kinds`: the next process goes on with HTTP/2 and TLS too.
    pub async fn leave(mut self, delay: Duration, takes_all_kinds: bool) -> Remaining {
        systemd::stopping(&self.limit.status());
        if !delay.is_zero() {
            self.announce(delay).await;
        }
        // The next process finds them in the store.
        drop(self.server.overflow().hand_over());
        self.begin();
        // A port that closes with us is no place to come back to: its connections are told to end.
        let store = if self.server.owns_ports() { None } else { FdStore::open().await };
        if !takes_all_kinds {
            self.server.registry().keep_all_but_http1();
        }
        let handed_over = if let Some(store) = &store {
            self.hand_over(store).await
        } else {
            self.linger().await;
            0
        };
        systemd::status(&self.log_end(handed_over));
        if let Some(store) = store {
            if takes_all_kinds && let Some(keys) = self.server.tickets() {
                store.put_tickets(Origin::now(self.generation), keys);
            }
            store.say_totals(Origin::now(self.generation));
        }
        self.limit.remaining()
    }

    /// Leaves all connections that can move in `store`; gives their number.
    ///
    /// They go on being served until the requests now in flight, and the connections that cannot move, have
    /// ended. Then all come to rest at once; if that takes long, because of a slow request that came
    /// meanwhile, they are served on, and it is tried again when that one is done.
    async fn hand_over(&mut self, store: &FdStore) -> usize {
        let Self { server, rested, limit, .. } = self;
        let registry = server.registry();
        let mut quiesce = QUIESCE_LIMIT;
        loop {
            registry.set_phase(Phase::Draining);
            let mut unfinished = registry.unfinished();
            {
                let finished = registry.until(|| {
                    unfinished.retain(Unfinished::is_so);
                    unfinished.is_empty() && !registry.is_arriving()
                });
                tokio::pin!(finished);
                loop {
                    tokio::select! {
                        biased;
                        () = limit.passes() => break,
                        () = &mut finished => break,
                        Some(connection) = rested.recv() => server.adopt(connection),
                    }
                }
            }
            server.enter(Phase::Resting);
            let at_rest_by = Instant::now() + QUIESCE_LIMIT;
            let is_quiet = tokio::select! {
                biased;
                () = registry.until(|| registry.is_done()) => true,
                () = limit.passes() => false,
                () = sleep(quiesce) => false,
            };
            if is_quiet {
                break;
            }
            if limit.passed.is_some() {
                // What has nothing in flight has the time that it takes to come to rest, and no more.
                let _ = timeout_at(at_rest_by, registry.until(|| registry.is_done())).await;
                break;
            }
            quiesce *= 2;
        }
        let mut connections = take_all(rested);
        connections.extend(server.take_sleepers());
        let all = connections.len();
        let left = store.put(Origin::now(self.generation), connections);
        let handed_over = all - left.len();
        if !left.is_empty() {
            server.enter(Phase::Closing);
            for connection in left {
                server.adopt(connection);
            }
            tokio::select! {
                () = registry.until(|| registry.is_done()) => {}
                () = sleep(OVERFLOW_LINGER) => {}
            }
        }
        handed_over
    }

    /// Tells all connections to end with their next answer. Those that were there before are told first;
    /// only then are no more accepted.
    async fn linger(&mut self) {
        let Self { server, limit, .. } = self;
        let registry = server.registry();
        server.enter(Phase::Lingering);
        let told = async {
            server.own_ports_closed().await;
            let mut before = registry.watched();
            registry
                .until(|| {
                    before.retain(|entry| entry.is_unanswered());
                    before.is_empty()
                })
                .await;
            server.enter(Phase::Closing);
            registry.until(|| registry.is_done()).await;
        };
        tokio::select! {
            () = told => {}
            () = limit.passes() => {}
        }
    }

    /// Ends with a successor there: each connection goes to it as it comes to rest. `takes_all_kinds`: also HTTP/2 and
    /// TLS. `terminations`: how often this process has been told to end already.
    /// Gives the successor's channel back, which it takes for our end when it is closed.
    pub async fn pass_on(
        mut self,
        successor: Channel,
        takes_all_kinds: bool,
        terminations: u32,
    ) -> (Channel, Remaining) {
        self.begin();
        let Self { server, rested, limit, generation, .. } = &mut self;
        let registry = server.registry();
        limit.is_main = false;
        // The first signal may be meant for both of us, and we are ending already.
        limit.expect_signals(2_u32.saturating_sub(terminations));
        let origin = Origin::now(*generation);
        if !takes_all_kinds {
            registry.keep_all_but_http1();
        } else if let Some(packed) = server.tickets().and_then(|keys| pack_tickets(keys).ok()) {
            let _ = timeout(SUCCESSOR_LINGER, successor.send(Kind::Tickets, origin, &packed, "")).await;
        }
        let mut handed_over = 0;
        for waiting in server.overflow().hand_over() {
            let packed = pack_channel(&waiting);
            let sent =
                timeout(SUCCESSOR_LINGER, successor.send(Kind::Connections, origin, &packed, "")).await;
            if let Err(error) = sent.map_err(io::Error::from).flatten() {
                warn!(%error, "connections that wait for file descriptors wait for the next restart");
            }
        }
        server.enter(Phase::Resting);
        let mut sleepers = server.take_sleepers();
        loop {
            // Whoever was served until now goes first.
            let mut connections = take_all(rested);
            if connections.is_empty() {
                connections = sleepers.split_off(sleepers.len().saturating_sub(MAX_SOCKETS));
            }
            if connections.is_empty() {
                let connection = tokio::select! {
                    connection = rested.recv() => connection,
                    () = registry.until(|| registry.is_done()) => rested.try_recv().ok(),
                    () = limit.passes() => rested.try_recv().ok(),
                };
                let Some(connection) = connection else { break };
                connections.push(connection);
            }
            let packed = pack(&connections);
            let sent = tokio::select! {
                sent = successor.send(Kind::Connections, origin, &packed, "") => sent,
                () = async { limit.passes().await; sleep(SUCCESSOR_LINGER).await } => {
                    Err(io::ErrorKind::TimedOut.into())
                }
            };
            if let Err(error) = sent {
                warn!(%error, connections = connections.len(), "the successor takes no more connections");
                limit.passed.get_or_insert("the successor's end");
                break;
            }
            handed_over += connections.len();
        }
        self.log_end(handed_over);
        // One that hangs or has gone will not miss them.
        let totals = metrics::totals();
        let _ = timeout(SUCCESSOR_LINGER, successor.say(Kind::Totals, origin, &totals)).await;
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
            "handed over {handed_over} connections, {finished} in flight finished, {cut_off} cut off, in \
             {drain_ms} ms; {answered} answered in all"
        );
        info!(message_id = message_id::STOPPED, handed_over, finished, cut_off, answered, drain_ms, "{line}");
        line
    }
}

/// All connections that have come to rest so far.
fn take_all(rested: &mut UnboundedReceiver<Connection>) -> Vec<Connection> {
    std::iter::from_fn(|| rested.try_recv().ok()).collect()
}

/// The end of a drain, if it does not end by itself; meanwhile systemd is told how it goes.
struct Limit<'a> {
    registry: &'a Registry,
    signals: &'a mut Signals,
    length: Duration,
    deadline: Instant,
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
        let deadline = Instant::now() + length;
        let report = interval(systemd::STATUS_INTERVAL);
        Self { registry, signals, length, deadline, report, is_main: true, signals_left: 1, passed: None }
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
                () = sleep_until(self.deadline) => self.passed = Some("the drain limit"),
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
    fn remaining(&self) -> Remaining {
        Remaining { deadline: self.deadline, signals: self.signals_left.max(1) }
    }

    fn status(&self) -> String {
        let Counts { connections, in_flight, .. } = self.registry.counts();
        let left = self.deadline.saturating_duration_since(Instant::now()).as_secs_f64().round();
        format!("draining: {in_flight} in flight on {connections} connections, {left} s left")
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
            info!(peer = %remaining.peer, %age, "closed at {reason}: a connection with no request");
        }
        for request in remaining.requests {
            requests += 1;
            warn!(
                message_id = message_id::CUT_OFF,
                peer = %remaining.peer,
                path = logged(request.path.path()),
                %age,
                request_ms = u64::try_from(request.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                "cut off at {reason}: {} for {}",
                logged(request.path.path()),
                remaining.peer,
            );
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use axum::Router;

    use super::*;
    use crate::connection::tests::{Served, serve};
    use crate::stream::Peer;

    /// Hands over with a request that never ends, which comes once the drain has begun; gives how long it took.
    async fn hand_over_beside_an_endless_request(limit: Duration) -> Duration {
        let Served { server, mut rested, .. } = serve(Router::new()).await;
        let (store, _store) = FdStore::in_memory();
        let mut signals = Signals::new().expect("signals");
        let endless = server.registered(Peer::Unix);
        // Some of its head has come: the drain does not wait for it, and finds it when all are to rest.
        endless.entry.received();
        let begun = Instant::now();
        let mut drain = Drain::new(&server, &mut rested, &mut signals, limit, 1);
        let handed_over = timeout(limit + Duration::from_secs(10), drain.hand_over(&store)).await;
        assert_eq!(handed_over, Ok(0));
        begun.elapsed()
    }

    /// The limit passes while all connections stand still for 1.6 s: 100 ms, 200, 400 and 800 have passed before.
    #[tokio::test(start_paused = true)]
    async fn a_limit_that_passes_while_all_are_to_rest_ends_the_drain() {
        let limit = Duration::from_secs(2);
        assert_eq!(hand_over_beside_an_endless_request(limit).await, limit);
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_passes_as_all_are_told_to_rest_leaves_them_the_time_for_it() {
        assert_eq!(hand_over_beside_an_endless_request(Duration::from_millis(1)).await, QUIESCE_LIMIT);
    }
}
