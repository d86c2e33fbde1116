//! How a process ends without losing a request, and, where there is a next process to leave them to,
//! without closing a connection.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Interval, interval, sleep, sleep_until};
use tracing::{info, warn};

use crate::connection::{Connection, Handler};
use crate::handover::{Channel, Kind, Parking, Sender, pack};
use crate::log::message_id;
use crate::registry::{Phase, Registry, Unfinished};
use crate::server::Server;
use crate::signals::Signals;
use crate::systemd;

/// How long all connections may stand still at first, waiting for the last answers, before they are
/// served on for a while; twice as long at each further try.
const STANDSTILL: Duration = Duration::from_millis(100);
/// For connections that do not fit into the handover channel to hear that they are to close, while the
/// others wait for the next process.
const OVERFLOW_LINGER: Duration = Duration::from_secs(1);
/// What is asked of systemd beyond each report, so that one late report does not end the drain.
const MORE_TIME: Duration = Duration::from_secs(5);

/// Ends this process's serving, within `limit` or until a second signal.
pub async fn drain(
    server: &Server<impl Handler>,
    rested: &mut UnboundedReceiver<Connection>,
    signals: &mut Signals,
    limit: Duration,
    generation: u64,
) {
    let registry = server.registry();
    let begun = Instant::now();
    let counts = registry.counts();
    info!(
        message_id = message_id::DRAINING,
        connections = counts.connections,
        in_flight = counts.in_flight,
        "draining: {} in flight on {} connections, up to {}",
        counts.in_flight,
        counts.connections,
        humantime::format_duration(limit),
    );
    systemd::stopping(&status(registry, limit));

    let mut limit = Limit::new(registry, signals, begun + limit);
    // A port that closes with us is no place to come back to: its connections are told to end.
    let parking = if server.owns_ports() { None } else { Parking::open().await };
    let handed_over = if let Some(parking) = parking {
        hand_over(server, rested, &mut limit, parking, generation).await
    } else {
        linger(server, &mut limit).await;
        0
    };
    let cut_off = limit.passed.map_or(0, |reason| log_remaining(registry, reason));

    let finished = counts.in_flight.saturating_sub(cut_off);
    systemd::status(&log_end(registry, begun, handed_over, finished, cut_off));
}

/// Says how it ended; gives the line.
fn log_end(
    registry: &Registry,
    begun: Instant,
    handed_over: usize,
    finished: usize,
    cut_off: usize,
) -> String {
    let answered = registry.counts().answered;
    let drain_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let line = format!(
        "handed over {handed_over} connections, {finished} in flight finished, {cut_off} cut off, in {drain_ms} ms; \
         {answered} answered in all"
    );
    info!(message_id = message_id::STOPPED, handed_over, finished, cut_off, answered, drain_ms, "{line}");
    line
}

/// Leaves all connections that can move to the next process; gives their number.
///
/// They go on being served until the requests now in flight, and the connections that cannot move, have
/// ended. Then all come to rest at once; if that takes long, because of a slow request that came
/// meanwhile, they are served on, and it is tried again when that one is done.
async fn hand_over(
    server: &Server<impl Handler>,
    rested: &mut UnboundedReceiver<Connection>,
    limit: &mut Limit<'_>,
    parking: Parking,
    generation: u64,
) -> usize {
    let registry = server.registry();
    let mut standstill = STANDSTILL;
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
                    () = &mut finished => break,
                    () = limit.passes() => break,
                    Some(connection) = rested.recv() => server.adopt(connection),
                }
            }
        }
        registry.set_phase(Phase::Resting);
        let was_last = limit.passed.is_some();
        tokio::select! {
            () = registry.until(|| registry.is_done()) => break,
            () = sleep(standstill) => {}
            () = limit.passes(), if !was_last => {}
        }
        if was_last {
            break;
        }
        standstill *= 2;
    }
    let mut connections = Vec::new();
    while let Ok(connection) = rested.try_recv() {
        connections.push(connection);
    }
    let all = connections.len();
    let left = parking.leave(Sender::now(generation), connections);
    let handed_over = all - left.len();
    if !left.is_empty() {
        registry.set_phase(Phase::Closing);
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

/// Leaves the connections to a successor that is there, each as it comes to rest, within `limit` or until
/// two signals: one may be meant for both of us.
pub async fn pass_on(
    server: &Server<impl Handler>,
    rested: &mut UnboundedReceiver<Connection>,
    signals: &mut Signals,
    limit: Duration,
    generation: u64,
    successor: Channel,
) {
    let registry = server.registry();
    let begun = Instant::now();
    let counts = registry.counts();
    let mut limit = Limit::new(registry, signals, begun + limit);
    limit.is_main = false;
    limit.signals_left = 2;
    let mut handed_over = 0;
    registry.set_phase(Phase::Resting);
    loop {
        let connection = tokio::select! {
            connection = rested.recv() => connection,
            () = registry.until(|| registry.is_done()) => rested.try_recv().ok(),
            () = limit.passes() => rested.try_recv().ok(),
        };
        let Some(connection) = connection else { break };
        let mut connections = vec![connection];
        while let Ok(connection) = rested.try_recv() {
            connections.push(connection);
        }
        let sent = successor.send(Kind::Connections, Sender::now(generation), &pack(&connections), "").await;
        if let Err(error) = sent {
            warn!(%error, connections = connections.len(), "the successor takes no more connections");
            limit.passed = Some("the successor's end");
            break;
        }
        handed_over += connections.len();
    }
    let cut_off = limit.passed.map_or(0, |reason| log_remaining(registry, reason));
    log_end(registry, begun, handed_over, counts.in_flight.saturating_sub(cut_off), cut_off);
}

/// Tells all connections to end with their next answer. Those that were there before are told first;
/// only then are no more accepted.
async fn linger(server: &Server<impl Handler>, limit: &mut Limit<'_>) {
    let registry = server.registry();
    registry.set_phase(Phase::Lingering);
    let told = async {
        server.own_ports_closed().await;
        let mut before = registry.entries();
        registry
            .until(|| {
                before.retain(|entry| entry.has_more_to_say());
                before.is_empty()
            })
            .await;
        registry.set_phase(Phase::Closing);
        registry.until(|| registry.is_done()).await;
    };
    tokio::select! {
        () = told => {}
        () = limit.passes() => {}
    }
}

/// The end of a drain, if it does not end by itself; meanwhile systemd is told how it goes.
struct Limit<'a> {
    registry: &'a Registry,
    signals: &'a mut Signals,
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
    fn new(registry: &'a Registry, signals: &'a mut Signals, deadline: Instant) -> Self {
        let report = interval(systemd::STATUS_INTERVAL);
        Self { registry, signals, deadline, report, is_main: true, signals_left: 1, passed: None }
    }

    /// Waits for it.
    async fn passes(&mut self) {
        while self.passed.is_none() {
            tokio::select! {
                () = sleep_until(self.deadline) => self.passed = Some("the drain limit"),
                () = self.signals.terminated() => {
                    self.signals_left -= 1;
                    if self.signals_left == 0 {
                        self.passed = Some("a second signal");
                    }
                }
                _ = self.report.tick(), if self.is_main => {
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    systemd::still_stopping(&status(self.registry, left), MORE_TIME);
                }
            }
        }
    }
}

fn status(registry: &Registry, left: Duration) -> String {
    let counts = registry.counts();
    let left = left.as_secs_f64().round();
    format!("draining: {} in flight on {} connections, {left} s left", counts.in_flight, counts.connections)
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
                path = request.uri.path(),
                %age,
                request_ms = u64::try_from(request.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                "cut off at {reason}: {} for {}",
                request.uri.path(),
                remaining.peer,
            );
        }
    }
    requests
}
