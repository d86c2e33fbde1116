//! The drain: a process ends without losing a request and, if there is a next process, without closing a connection.
//!
//! [`Drain`] sets the phases of the registry, which the tasks of the connections obey, and waits until they have done
//! so. There are three ways to drain:
//!
//! - [`Drain::leave`] with systemd's store: requests in flight finish, and the connections go into the store, where the
//!   next process finds them (restart).
//! - [`Drain::leave`] without a store: all connections are told to close with their next response.
//! - [`Drain::pass_on`]: each connection goes to the successor as soon as it is quiescent (reload).
//!
//! `schedule.rs` decides when a restart stops serving new requests. `limit.rs` ends a drain that does not end by itself.
//! After a reload `linger.rs` then sends the responses that take longer.

mod limit;
mod linger;
mod schedule;

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::{info, warn};

use crate::app::tasks::Running;
use crate::connection::Connection;
use crate::handover::{
    Channel, FdStore, MAX_SOCKETS, MessageType, Origin, SMALL_FRAME, STORE_NAME, pack, pack_channel,
    pack_tickets,
};
use crate::lifecycle::config::TimeLimit;
use crate::lifecycle::stop::TASKS_MINIMUM;
use crate::observe::log::message_id;
use crate::observe::{counted, metrics};
use crate::os::signals::Signals;
use crate::os::systemd;
use crate::registry::{Counts, PendingWork, Phase, Protocols, Registry};
use crate::requests::logged;
use crate::server::{HandoverQueue, Server};
use crate::takeover::{OldProcesses, Successor};
pub use limit::TaskBudget;
use limit::{EndReason, Limit};
use linger::Route;
use schedule::{Schedule, Step};

/// How long idle connections may take to become quiescent if the drain limit has already passed.
const QUIESCE_LIMIT: Duration = Duration::from_millis(100);
/// The minimum time for which this process serves connections that it could not hand over, so that a response can ask their
/// clients to close. At a restart they did not fit into the handover channel. The time is short, because all connections that
/// did fit wait for the next process meanwhile.
const OVERFLOW_LINGER: Duration = Duration::from_secs(1);
/// How long a message to the successor may take before the successor is taken to hang. For messages with connections,
/// this time is added to the drain limit.
const SUCCESSOR_LINGER: Duration = Duration::from_secs(1);
/// In a reload, how many small frames are sent without delay. After these, connections are collected into larger frames,
/// because the channel holds about 230 frames, and a successor that lacks file descriptors stops receiving.
const FRAMES_AT_ONCE: usize = 16;
/// How long the connections of one frame are collected. They are not served meanwhile.
const COLLECT_TIME: Duration = Duration::from_millis(10);
/// What a process needs to linger after a reload.
pub struct Linger<'a> {
    /// `--linger-timeout`
    pub limit: TimeLimit,
    pub old: &'a OldProcesses,
    /// Its exclusive tasks end before the process lingers.
    pub tasks: &'a Running,
}

/// A drain that is under way.
pub struct Drain<'a> {
    server: &'a Server,
    generation: u64,
    begun: Instant,
    /// The number of requests in flight at the beginning.
    in_flight: usize,
    /// The number of responses that the next process continues.
    moved: usize,
    limit: Limit<'a>,
}

impl<'a> Drain<'a> {
    /// A drain that ends within `limit`, or at a further signal.
    pub fn new(server: &'a Server, signals: &'a mut Signals, limit: Duration, generation: u64) -> Self {
        let limit = Limit::new(server.registry(), signals, limit);
        Self { server, generation, begun: Instant::now(), in_flight: 0, moved: 0, limit }
    }

    /// Serves for another `delay`. Only `/readyz` reports the coming end, so that load balancers stop sending traffic.
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

    /// Drains a process that has no successor. Connections that can move go into systemd's store, if the unit has one;
    /// otherwise all connections are told to close. Before the drain begins, the process announces it for `delay`.
    /// `next_adopts` tells which connections the next process can adopt. The old processes of earlier reloads end too.
    pub async fn leave(mut self, delay: Duration, next_adopts: Protocols, old: &OldProcesses) -> TaskBudget {
        systemd::stopping(&self.limit.status());
        if !delay.is_zero() {
            self.announce(delay).await;
        }
        // The connections that wait for file descriptors stay in the store, where the next process finds them. This
        // process must not take any of them from now on.
        let waiting = self.server.overflow().hand_over();
        self.begin();
        // systemd sends SIGTERM to all processes of the service, and once more to those that are left when the main process
        // has exited, which would cut them off. So this process waits for them, as it waits for its own requests.
        let arriving = self.server.registry().arriving();
        old.stop();
        let old_gone = async {
            old.gone().await;
            drop(arriving);
            std::future::pending::<Infallible>().await
        };
        // A port that this process bound itself closes with it. Its clients could not reconnect to a next process at
        // once, so its connections are told to close.
        let store = if self.server.owns_ports() { None } else { self.open_store(waiting.len()).await };
        self.server.registry().limit_handover(next_adopts);
        let drained = async {
            if let Some(store) = &store {
                self.hand_over(store).await
            } else {
                self.linger().await;
                0
            }
        };
        let handed_over = tokio::select! {
            never = old_gone => match never {},
            handed_over = drained => handed_over,
        };
        metrics::HANDED_OVER.inc_by(handed_over as u64);
        systemd::status(&self.log_end(handed_over));
        if let Some(store) = store {
            if next_adopts >= Protocols::Http2AndTls
                && let Some(keys) = self.server.ticket_keys()
            {
                store.put_tickets(Origin::now(self.generation), keys);
            }
            store.put_totals(Origin::now(self.generation));
        }
        self.limit.remaining()
    }

    /// Opens a channel to systemd's store, which has `waiting` other channels of this process besides the backup.
    ///
    /// The backup ends if the store has no room beside it, as with `FileDescriptorStoreMax=1`, or if it uses up the
    /// descriptors that the user of this process may have in flight (unix(7)). Otherwise all connections would be closed.
    async fn open_store(&self, waiting: usize) -> Option<FdStore> {
        // systemd may close a refused descriptor only after the barrier, so `open` may not notice that the store is full.
        let has_room = systemd::store_size().is_none_or(|size| size > waiting + 1);
        if has_room {
            let opened = FdStore::open().await;
            if opened.is_some() || !self.server.end_backup() {
                return opened;
            }
        } else {
            self.server.end_backup();
        }
        if waiting == 0 {
            systemd::unstore(STORE_NAME);
        }
        FdStore::open().await
    }

    /// Puts all connections that can move into `store`, and returns their number.
    ///
    /// The schedule decides when requests that arrive are served and when they are held. The drain waits for
    /// connections that cannot move as for requests in flight.
    async fn hand_over(&mut self, store: &FdStore) -> usize {
        let Self { server, limit, moved, .. } = self;
        let registry = server.registry();
        let mut schedule = Schedule::new(limit.length);
        let mut step = schedule.first(limit.elapsed());
        loop {
            step = match step {
                Step::Serve { at_most } => {
                    let have_ended = serve_on(server, limit, at_most).await;
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
                    let quiescent_by = Instant::now() + QUIESCE_LIMIT;
                    tokio::select! {
                        biased;
                        () = registry.wait_until(|| registry.is_drained()) => {}
                        () = limit.passes() => {
                            // If the limit passes just after the phase was set, the tasks of idle connections have
                            // not run yet. Without this time their connections would be closed.
                            let _ = timeout_at(quiescent_by, registry.wait_until(|| registry.is_drained())).await;
                        }
                    }
                    break;
                }
            };
        }
        let mut connections = server.handover_queue().take_all();
        connections.extend(server.take_parked());
        let all = connections.len();
        let moving = moving_responses(&connections);
        let left = store.put(Origin::now(self.generation), connections);
        let handed_over = all - left.len();
        *moved = moving - moving_responses(&left);
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

    /// Tells all connections to close with their next response, because there is no process to hand them over to.
    ///
    /// New connections are accepted until all connections that were open at the beginning have received such a
    /// response: a client that reconnects at once still reaches a process. When the limit has passed, no new request
    /// begins, and requests that began meanwhile have the remainder of their own limits.
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

    /// Drains a process that has a successor: each connection goes to it when it becomes quiescent. `stop_signals` is
    /// the number of stop signals that arrived during the reload.
    ///
    /// When the drain limit has passed, it keeps sending the responses that have begun, for as long as `linger`
    /// permits.
    ///
    /// Returns the channel to the successor, unless the process lingered. The successor takes its closing for the end of
    /// this process, so the caller must keep it until the background tasks have ended.
    pub async fn pass_on(
        mut self,
        successor: Successor,
        stop_signals: u32,
        linger: Linger<'_>,
    ) -> (Option<Channel>, TaskBudget) {
        let Successor { channel: successor, adopts } = successor;
        let Linger { limit: linger, old, tasks } = linger;
        self.begin();
        let Self { server, limit, generation, moved, .. } = &mut self;
        let registry = server.registry();
        limit.is_main = false;
        // A service manager may send the first signal to all processes of the service. This process is already ending,
        // so only a second one cuts the drain short.
        limit.expect_signals(2_u32.saturating_sub(stop_signals));
        let origin = Origin::now(*generation);
        registry.limit_handover(adopts);
        pass_tickets(server, &successor, origin, adopts).await;
        pass_overflow(server, &successor, origin).await;
        let mut handed_over = 0;
        let mut route = Route::Handover(successor);
        old.pass_on();
        server.enter(Phase::Quiescing);
        let queue = server.handover_queue();
        let mut idle = server.take_parked();
        // The limit may have passed already, or may pass just after the phase was set. At that moment the tasks of idle
        // connections have not reacted to the phase yet, so without this minimum the drain would close these connections.
        let mut ends_after = Instant::now() + QUIESCE_LIMIT;
        let (mut small_frames, mut has_given_up) = (0, false);
        loop {
            // Connections that become quiescent go first, otherwise they would wait until all parked connections have
            // been sent. The parked ones follow in portions of one message.
            let mut connections = queue.take_all();
            if connections.is_empty() {
                connections = idle.split_off(idle.len().saturating_sub(MAX_SOCKETS));
            }
            if connections.is_empty() {
                // `Holding` must not begin before `ends_after`, because it closes idle connections.
                let first_deadline = limit.first_deadline().max(ends_after);
                let connection = tokio::select! {
                    channel = old.next_to_pass() => {
                        route.pass(channel, origin).await;
                        continue;
                    }
                    connection = queue.next() => Some(connection),
                    () = registry.wait_until(|| registry.is_drained()) => queue.take(),
                    () = async { limit.passes_beside(route.closed()).await; sleep_until(ends_after).await } => queue.take(),
                    // Connections that cannot move have begun further requests. From now on none may begin, because
                    // the drain has to end within twice the limit.
                    () = sleep_until(first_deadline), if registry.phase() == Phase::Quiescing => {
                        server.enter(Phase::Holding);
                        continue;
                    }
                };
                let Some(connection) = connection else { break };
                connections.push(connection);
            }
            if has_given_up {
                finish(server, connections);
                continue;
            }
            small_frames += usize::from(connections.len() < SMALL_FRAME);
            // The parked connections must not wait for others.
            if small_frames > FRAMES_AT_ONCE && idle.is_empty() {
                collect(queue, &mut connections).await;
            }
            let packed = pack(&connections);
            let mut unsent = &packed[..];
            let sent = tokio::select! {
                sent = route.send(&mut unsent, origin) => sent,
                () = async { limit.passes().await; sleep(SUCCESSOR_LINGER).await } => {
                    Err(io::ErrorKind::TimedOut.into())
                }
            };
            let mut left = connections.split_off(packed.len() - unsent.len());
            handed_over += connections.len();
            metrics::HANDED_OVER.inc_by(connections.len() as u64);
            *moved += moving_responses(&connections);
            match sent {
                Ok(()) => {}
                // After the exit of the successor systemd sends a stop signal, which ends the drain. Without a service manager
                // no signal arrives, and no other process serves the clients, so this one does.
                Err(error) if is_exit(&error) => {
                    left.append(&mut idle);
                    warn!(%error, connections = left.len(), "could not hand over connections, because the successor has exited; each will be closed after its next response, or when a stop signal ends the drain");
                    finish(server, left);
                    has_given_up = true;
                }
                // The successor hangs, or file descriptors or memory have run short for too long. This process serves these
                // connections again, and also those that have not been sent yet, because otherwise no process would serve them
                // during further attempts.
                Err(error) => {
                    left.append(&mut idle);
                    left.append(&mut queue.take_all());
                    warn!(%error, connections = left.len(), "could not hand over connections; each will be closed after its next response");
                    finish(server, left);
                    // If the limit has passed, the drain would otherwise close these connections before their clients can send
                    // a request. In that case the drain sends nothing more, because each attempt would delay its end again.
                    ends_after = Instant::now() + OVERFLOW_LINGER;
                    has_given_up = limit.passed.is_some();
                }
            }
        }
        // A channel may have arrived with the last connection of the predecessor.
        while let Some(channel) = old.take_to_pass() {
            route.pass(channel, origin).await;
        }
        if self.is_to_linger(linger) {
            // The drain limit has passed, so the exclusive tasks only have `TASKS_MINIMUM` to end.
            let server = self.server;
            let exclusive_ended = async {
                tasks.finish_exclusive(Instant::now() + TASKS_MINIMUM).await;
                // Waits also until the predecessor has closed its channel, because its exclusive tasks may run until
                // then.
                server.registry().wait_until(|| !server.registry().is_arriving()).await;
            };
            route = self.linger_after_reload(route, linger, old, exclusive_ended, &mut handed_over).await;
        }
        self.log_end(handed_over);
        route.send_totals(origin).await;
        let successor = match route {
            Route::Handover(successor) => Some(successor),
            Route::Linger(_) | Route::Closed => None,
        };
        (successor, self.limit.remaining())
    }

    /// Logs and counts the result of the drain, and returns the log line.
    fn log_end(&self, handed_over: usize) -> String {
        let registry = self.server.registry();
        let cut_off = self.limit.passed.map_or(0, |reason| log_remaining(registry, reason));
        metrics::CUT_OFF.inc_by(cut_off as u64);
        let moved = self.moved;
        let finished = self.in_flight.saturating_sub(cut_off + moved);
        let answered = registry.counts().answered;
        let drain_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let line = format!(
            "handed over {}; {} in flight finished, {cut_off} cut off{}, in {drain_ms} ms; {answered} answered in total",
            counted(handed_over, "connection"),
            counted(finished, "request"),
            if moved > 0 { format!(", {moved} moved") } else { String::new() },
        );
        info!(
            message_id = message_id::STOPPED,
            handed_over, finished, cut_off, moved, answered, drain_ms, "{line}"
        );
        line
    }
}

/// Sends the TLS session ticket keys, without which clients do full handshakes.
async fn pass_tickets(server: &Server, successor: &Channel, origin: Origin, adopts: Protocols) {
    if adopts >= Protocols::Http2AndTls
        && let Some(packed) = server.ticket_keys().and_then(|keys| pack_tickets(keys).ok())
    {
        let _ = timeout(SUCCESSOR_LINGER, successor.send(MessageType::Tickets, origin, &packed, "")).await;
    }
}

/// Sends the channels with connections that wait for file descriptors.
async fn pass_overflow(server: &Server, successor: &Channel, origin: Origin) {
    for waiting in server.overflow().hand_over() {
        let packed = pack_channel(&waiting);
        let sent =
            timeout(SUCCESSOR_LINGER, successor.send(MessageType::Connections, origin, &packed, "")).await;
        if let Err(error) = sent.map_err(io::Error::from).flatten() {
            warn!(%error, "could not hand over connections that wait for file descriptors; the next restart will");
        }
    }
}

/// Serves connections that the successor does not receive, and closes each after its next response.
fn finish(server: &Server, connections: Vec<Connection>) {
    for connection in connections {
        server.finish(connection);
    }
}

/// Whether an error of sending says that the other process has closed the channel.
fn is_exit(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

/// Adds connections that become quiescent soon, until there are enough for a frame.
async fn collect(queue: &HandoverQueue, connections: &mut Vec<Connection>) {
    let enough = async {
        while connections.len() < SMALL_FRAME {
            connections.push(queue.next().await);
        }
    };
    let _ = timeout(COLLECT_TIME, enough).await;
}

fn moving_responses(connections: &[Connection]) -> usize {
    connections.iter().map(Connection::moving_responses).sum()
}

/// Serves until all work that was pending at the beginning has ended, but no longer than `at_most`. Returns whether it
/// has ended.
async fn serve_on(server: &Server, limit: &mut Limit<'_>, at_most: Duration) -> bool {
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
            connection = server.handover_queue().next() => server.adopt(connection),
        }
    }
}

/// Logs each connection and request that the drain cuts off, and returns the number of requests.
fn log_remaining(registry: &Registry, reason: EndReason) -> usize {
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
                peer = %request.peer,
                path = logged(request.path.path()),
                %age,
                request_ms = u64::try_from(request.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                "cut off at {reason}: request {} from {}",
                logged(request.path.path()),
                request.peer,
            );
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::convert::Infallible;
    use std::net::SocketAddr;
    use std::ops::Range;
    use std::os::fd::OwnedFd;
    use std::rc::Rc;
    use std::sync::Arc;

    use axum::Router;
    use axum::extract::Path;
    use axum::response::sse::{Event, Sse};
    use axum::routing::get;
    use futures_util::{StreamExt, stream};
    use hyper::Uri;
    use proptest::prelude::*;
    use testkit::client::{self, Target};
    use tokio::sync::watch;
    use tokio::task::LocalSet;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::app::event_stream::EventStream;
    use crate::app::tasks;
    use crate::connection::tests::{Served, serve};
    use crate::handover::{Next, pair, receive_frame, send_frames};
    use crate::observe::status::Status;
    use crate::registry::Limits;
    use crate::transport::stream::Peer;

    /// Hands over beside a request that arrives during the drain and never ends, and returns the duration of the drain.
    async fn hand_over_beside_an_endless_request(limit: Duration) -> Duration {
        let Served { server, .. } = serve(Router::new()).await;
        let (store, _store) = FdStore::in_memory();
        let mut signals = Signals::new().expect("the signal handlers can be installed");
        let endless = server.registered(Peer::Unix);
        // Only a part of the head has arrived, so the request is not in flight when the drain begins.
        endless.driver().received();
        let begun = Instant::now();
        let mut drain = Drain::new(&server, &mut signals, limit, 1);
        let handed_over = timeout(limit * 2 + Duration::from_secs(10), drain.hand_over(&store)).await;
        assert_eq!(handed_over, Ok(0));
        begun.elapsed()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn response_that_moves_is_neither_finished_nor_cut_off() {
        let events = || {
            let first = stream::iter([Ok::<_, Infallible>(Event::default().comment("first"))]);
            EventStream(Sse::new(first.chain(stream::pending())))
        };
        let Served { server, address } = serve(Router::new().route("/", get(async move || events()))).await;
        let (store, _store) = FdStore::in_memory();
        let mut signals = Signals::new().expect("the signal handlers can be installed");
        let mut client = client::Connection::open(&Target::Tcp(address)).await.expect("the server accepts");
        let request = b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n";
        client.send(request).await.expect("the bytes are sent");
        assert_eq!(client.head().await.expect("the server answers").status, 200);
        let mut drain = Drain::new(&server, &mut signals, Duration::from_secs(60), 1);
        drain.begin();
        let handed_over = drain.hand_over(&store).await;
        let line = drain.log_end(handed_over);
        let expected = "handed over 1 connection; 0 requests in flight finished, 0 cut off, 1 moved, in ";
        assert!(line.starts_with(expected), "{line}");
        assert!(line.ends_with(" ms; 1 answered in total"), "{line}");
    }

    /// How full a channel is at the beginning of a test.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Fill {
        Empty,
        Full,
    }

    /// A successor for [`Drain::pass_on`], and its end of the channel.
    fn successor(fill: Fill) -> (Successor, OwnedFd) {
        let (ours, theirs) = pair().expect("a socket pair is made");
        let send = || send_frames::<OwnedFd>(&ours, MessageType::Main, Origin::now(1), &[], "");
        while fill == Fill::Full && send().1.is_none() {}
        let channel = Channel::new(ours).expect("the socket is watched");
        (Successor { channel, adopts: Protocols::ALL }, theirs)
    }

    /// Passes the connections of `server` on to `successor` within `limit`, without lingering. Returns the time that it
    /// took.
    async fn pass_on(server: Server, successor: Successor, limit: Duration) -> Duration {
        let limits = Limits { head: LIMIT, idle: LIMIT, stall: LIMIT, close: LIMIT };
        let status = Status::new(Registry::new(limits, CancellationToken::new()), String::new());
        let old = OldProcesses::new(server.clone(), Arc::new(status), 1);
        let tasks = tasks::begin(Vec::new(), &CancellationToken::new());
        let linger = Linger { limit: TimeLimit::Limited(Duration::ZERO), old: &old, tasks: &tasks };
        let mut signals = Signals::new().expect("the signal handlers can be installed");
        let begun = Instant::now();
        let drain = Drain::new(&server, &mut signals, limit, 1);
        if limit.is_zero() {
            // It has passed then.
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        drain.pass_on(successor, 0, linger).await;
        begun.elapsed()
    }

    /// The number of connections that wait in a channel.
    fn connections_in(channel: &OwnedFd) -> usize {
        let mut connections = 0;
        while let Next::Frame(frame) = receive_frame(channel).expect("the channel can be read") {
            connections +=
                if frame.message_type == MessageType::Connections { frame.sockets.len() } else { 0 };
        }
        connections
    }

    /// A connection that has received one response.
    async fn used_connection(address: SocketAddr) -> client::Connection {
        let mut client = client::Connection::open(&Target::Tcp(address)).await.expect("the server accepts");
        assert_eq!(client.ask(&client::get("/")).await.expect("the server answers").status, 200);
        client
    }

    #[tokio::test]
    async fn connections_are_served_and_then_closed_if_the_successor_hangs() {
        let served = serve(Router::new().route("/", get("hello"))).await;
        let mut client = used_connection(served.address).await;
        let (successor, _theirs) = successor(Fill::Full);
        // From now on tokio advances its clock only while no task can run.
        tokio::time::pause();
        let passed_on = tokio::spawn(pass_on(served.server.clone(), successor, Duration::ZERO));
        // The drain has the connection, and tries to send it.
        served.until_connections(0).await;
        let answer = client.ask(&client::get("/")).await.expect("the server answers");
        assert!(answer.closes(), "the connection stays open");
        // It tries to send the totals too.
        let limit = QUIESCE_LIMIT + 2 * SUCCESSOR_LINGER + OVERFLOW_LINGER;
        assert!(passed_on.await.expect("the drain ends") <= limit);
    }

    /// The connection of each response that ends would be sent, and each attempt would take a second.
    #[tokio::test]
    async fn responses_that_end_do_not_prolong_the_drain_if_the_successor_hangs() {
        const RESPONSES: u64 = 8;
        let handler = async |Path(seconds): Path<u64>| sleep(Duration::from_secs(seconds)).await;
        let served = serve(Router::new().route("/", get("hello")).route("/{seconds}", get(handler))).await;
        let _idle = used_connection(served.address).await;
        let mut clients = Vec::new();
        for seconds in 1..=RESPONSES {
            let target = Target::Tcp(served.address);
            let mut client = client::Connection::open(&target).await.expect("the server accepts");
            client.send(&client::get(&format!("/{}", 1 + seconds))).await.expect("the bytes are sent");
            clients.push(client);
        }
        while served.registry().counts().in_flight < clients.len() {
            sleep(Duration::from_millis(1)).await;
        }
        let (successor, _theirs) = successor(Fill::Full);
        tokio::time::pause();
        let limit = QUIESCE_LIMIT + 2 * SUCCESSOR_LINGER + OVERFLOW_LINGER;
        assert!(pass_on(served.server, successor, Duration::ZERO).await <= limit);
    }

    #[tokio::test]
    async fn connection_that_was_just_used_is_handed_over_although_the_limit_is_zero() {
        let Served { server, address } = serve(Router::new().route("/", get("hello"))).await;
        let _client = used_connection(address).await;
        let (successor, theirs) = successor(Fill::Empty);
        tokio::time::pause();
        assert!(pass_on(server, successor, Duration::ZERO).await < QUIESCE_LIMIT * 2);
        assert_eq!(connections_in(&theirs), 1);
    }

    /// The channel holds about 230 frames, and a successor without file descriptors does not receive them at once.
    #[tokio::test]
    async fn connections_that_become_quiescent_one_by_one_share_frames() {
        const CONNECTIONS: u64 = 90;
        let (open, gate) = watch::channel(false);
        let handler = async move |Path(ms): Path<u64>| {
            gate.clone().wait_for(|is_open| *is_open).await.expect("the test has ended");
            sleep(Duration::from_millis(ms)).await;
        };
        let Served { server, address } = serve(Router::new().route("/{ms}", get(handler))).await;
        let mut clients = Vec::new();
        for ms in 0..CONNECTIONS {
            let mut client =
                client::Connection::open(&Target::Tcp(address)).await.expect("the server accepts");
            client.send(&client::get(&format!("/{ms}"))).await.expect("the bytes are sent");
            clients.push(client);
        }
        let all = usize::try_from(CONNECTIONS).expect("it is small");
        while server.registry().counts().in_flight < all {
            sleep(Duration::from_millis(1)).await;
        }
        let (successor, theirs) = successor(Fill::Empty);
        let draining = tokio::spawn(pass_on(server.clone(), successor, LIMIT));
        server.registry().wait_for_phase(|phase| phase == Phase::Quiescing).await;
        // From now on tokio advances its clock only while no task can run.
        tokio::time::pause();
        open.send(true).expect("the handlers wait");
        draining.await.expect("the drain ends");
        let (mut frames, mut connections) = (0, 0);
        while let Next::Frame(frame) = receive_frame(&theirs).expect("the channel can be read") {
            if frame.message_type == MessageType::Connections {
                frames += 1;
                connections += frame.sockets.len();
            }
        }
        assert_eq!(connections, all);
        assert!(frames <= all / 2, "{frames} frames");
    }

    #[tokio::test(start_paused = true)]
    async fn limit_that_passes_during_the_hold_ends_the_drain() {
        let limit = Duration::from_secs(2);
        assert_eq!(hand_over_beside_an_endless_request(limit).await, limit);
    }

    #[tokio::test(start_paused = true)]
    async fn limit_that_passes_at_the_beginning_of_the_hold_leaves_the_quiesce_limit() {
        assert_eq!(hand_over_beside_an_endless_request(Duration::from_millis(1)).await, QUIESCE_LIMIT);
    }

    // ---- requests of any duration, in simulated time ----

    const LIMIT: Duration = Duration::from_secs(30);
    /// An upper bound for the delay of timers and tasks.
    const ROUNDING: Duration = Duration::from_millis(20);

    /// A request of a simulation.
    #[derive(Clone, Copy, Debug)]
    struct Request {
        /// Since the beginning of the simulation.
        at: Duration,
        takes: Duration,
    }

    /// The result of a simulation.
    #[derive(Debug, Default)]
    struct Outcome {
        /// The duration of the drain.
        took: Duration,
        /// The number of requests that the drain cut off.
        cut_off: usize,
        finished: usize,
        /// The requests that wait to be served, by their number, with the beginning of the wait.
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
        runtime
            .expect("the runtime can be built")
            .block_on(LocalSet::new().run_until(drain_beside(requests, drain_at)))
    }

    async fn drain_beside(requests: &[Request], drain_at: Duration) -> Outcome {
        let Served { server, .. } = serve(Router::new()).await;
        let (store, _store) = FdStore::in_memory();
        let mut signals = Signals::new().expect("the signal handlers can be installed");
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
                let mut in_flight = registration.requests().begin(&Uri::from_static("/"));
                in_flight.track();
                sleep(request.takes).await;
                drop(in_flight);
                outcome.borrow_mut().finished += 1;
            });
        }
        sleep(drain_at).await;
        let mut drain = Drain::new(&server, &mut signals, LIMIT, 1);
        drain.hand_over(&store).await;
        let took = drain.begun.elapsed();
        let cut_off = drain.limit.passed.map_or(0, |_| server.registry().counts().in_flight);
        let left = server.registry().counts().in_flight;
        assert_eq!(left, cut_off, "a drain that ends before its limit leaves no request behind");
        let mut outcome = std::mem::take(&mut *outcome.borrow_mut());
        // The next process serves these.
        for number in outcome.held.keys().copied().collect::<Vec<_>>() {
            outcome.admit(number);
        }
        Outcome { took, cut_off, ..outcome }
    }

    /// The requests of `clients` clients, each of which waits for the response, and for `thinks` before the next
    /// request.
    fn steady(clients: u32, takes: Duration, thinks: Duration, until: Duration) -> Vec<Request> {
        let cycle = takes + thinks;
        let all = (0..clients).flat_map(|client| {
            let first = cycle * client / clients;
            (0..).map(move |round| first + cycle * round).take_while(move |at| *at < until)
        });
        all.map(|at| Request { at, takes }).collect()
    }

    #[test]
    fn steady_requests_below_the_limit_are_not_cut_off_and_others_wait_no_longer_than_one_takes() {
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
    fn slow_request_before_the_drain_delays_no_quick_request_for_long() {
        let slow = Request { at: Duration::ZERO, takes: Duration::from_secs(28) };
        for takes in [5, 200].map(Duration::from_millis) {
            let mut requests = steady(20, takes, Duration::from_millis(500), Duration::from_secs(60));
            requests.push(slow);
            let outcome = simulate(&requests, Duration::from_secs(3));
            assert_eq!(outcome.cut_off, 0);
            assert!(
                outcome.took >= Duration::from_secs(25),
                "the drain waits for the slow request: {:?}",
                outcome.took
            );
            assert!(outcome.longest_wait <= takes + ROUNDING, "{takes:?}: {:?}", outcome.longest_wait);
        }
    }

    #[test]
    fn slow_request_during_the_drain_delays_no_quick_request_for_long() {
        let takes = Duration::from_millis(5);
        let mut requests = steady(20, takes, Duration::from_millis(500), Duration::from_secs(60));
        let slow = Request { at: Duration::ZERO, takes: Duration::from_secs(8) };
        requests.extend([slow, Request { at: Duration::from_secs(5), ..slow }]);
        let outcome = simulate(&requests, Duration::from_secs(3));
        assert!(
            outcome.took >= Duration::from_secs(10),
            "the drain waits for the second slow request: {:?}",
            outcome.took
        );
        assert!(outcome.longest_wait <= Duration::from_millis(100) + ROUNDING, "{:?}", outcome.longest_wait);
    }

    /// A request that began before the drain is cut off at the limit, although a later one still has time.
    #[test]
    fn each_request_is_cut_off_at_the_limit_from_its_own_beginning() {
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
        // Equally many of each order of magnitude, so that quick and slow requests overlap.
        let takes = prop_oneof![
            milliseconds(0..100),
            milliseconds(0..1_000),
            milliseconds(0..10_000),
            milliseconds(0..29_990)
        ];
        (milliseconds(0..60_000), takes).prop_map(|(at, takes)| Request { at, takes })
    }

    proptest! {
        #[test]
        fn requests_that_take_less_than_the_limit_are_not_cut_off(
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
