//! Drives HTTP/2 on one connection until it closes or becomes quiescent.
//!
//! [`drive`] polls hyper, and with it h2, on a `Relay` (`relay.rs`), through which all bytes pass an `Interposer`
//! (`interposer/`). The interposer records what another process needs to continue the connection, and can hold the
//! frames of new streams. `Quiescer` decides when they are held. A connection that cannot be handed over receives
//! GOAWAY. Streams whose response has no end (`endless.rs`, `stream_body.rs`) stop when all others have ended, and
//! continue in the next process.

mod endless;
pub(super) mod frame;
mod grpc;
mod header_block;
#[cfg(test)]
mod header_model;
mod header_table;
mod interposer;
#[cfg(test)]
mod reaction_tests;
mod relay;
mod stream_body;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http2::{Builder, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::time::{Instant, Sleep, sleep};
use tracing::{debug, warn};

use super::exchange::Service;
use super::io::{Io, Parts};
use crate::registry::{DriverHandle, Phase, Stage};
use crate::transport::http2_state::{FIRST_HEADER_TABLE_SIZE, Http2State};
pub(super) use endless::{Begun, BodyTurn, EndlessStreams};
pub(super) use grpc::{EndingCall, KeptBody, Messages};
pub(super) use header_block::STREAM_FIELD;
use interposer::Interposer;
use relay::Relay;
pub(super) use stream_body::{Content, StreamBody};

/// How many requests one connection may have in flight.
const MAX_STREAMS: u32 = 200;
/// The receive window of the connection and of each stream, in bytes. No later release may use less, because the client
/// of a connection that is handed over keeps what it was granted.
const WINDOW: u32 = 1024 * 1024;
/// The largest headers of a request, in bytes as RFC 9113 section 6.5.2 counts them; larger ones are answered with 431.
const HEADER_LIST_LIMIT: u32 = 16 * 1024;

/// How long new streams are held in the first attempt, so that the open ones can end. Each further attempt is twice as
/// long, up to an eighth of the quiesce limit and to `LONGEST_HOLD`. A pause of the same length follows each attempt,
/// because held frames take room in the connection's window from uploads that are in flight.
const HOLD_LIMIT: Duration = Duration::from_millis(20);
/// The longest attempt, so that a long quiesce limit does not delay the requests of a connection by minutes.
const LONGEST_HOLD: Duration = Duration::from_secs(2);

/// How long a client that waits for no response may take to react to GOAWAY when the process is stopping, or evicts the
/// connection. A reaction takes one round trip. A slower client receives the second GOAWAY, and may repeat the
/// requests on streams above its last stream.
const GOAWAY_LIMIT: Duration = Duration::from_secs(1);

/// How long the handlers may take to answer the requests that began in another process. Their clients wait for the next
/// events meanwhile.
const REPLAY_LIMIT: Duration = Duration::from_secs(10);

pub(super) enum Http2Outcome {
    Closed,
    /// The connection, its HTTP/2 state, and the bytes that were read and not consumed.
    Quiescent(Parts, Box<Http2State>, Bytes),
}

/// Why the driver stops polling hyper.
enum Turn {
    /// hyper has ended the connection: the peer closed it, the last response after GOAWAY was sent, or it failed.
    Done(hyper::Result<()>),
    Quiescent,
    /// The client must be told to close. hyper is polled again afterwards, because requests may be in flight.
    MustClose,
    /// The client does not react to GOAWAY, and waits for no response.
    Silent,
    /// The client has stopped reading its responses, or has not closed in time after GOAWAY.
    Overdue(Stage),
}

/// Drives a connection: a new one, or one that continues with `state` after it was parked or handed over. If it is too
/// busy to become quiescent within `quiesce_limit`, it receives GOAWAY.
pub(super) async fn drive(
    io: Io,
    state: Option<Http2State>,
    service: Service,
    handle: &DriverHandle,
    quiesce_limit: Duration,
) -> Http2Outcome {
    let interposer = match state.map(Interposer::resume) {
        None => Interposer::new(),
        Some(Ok(interposer)) => interposer,
        Some(Err(_)) => {
            warn!(peer = %handle.peer(), "closed an HTTP/2 connection of the previous process: its header table is invalid");
            return Http2Outcome::Closed;
        }
    };
    let service = service.with_streams(interposer.endless());
    let replay_deadline = interposer.is_replaying().then(|| Box::pin(sleep(REPLAY_LIMIT)));
    let relay = Relay::new(io, interposer);
    let connection = serve_connection(relay.clone(), service);
    handle.enter(Stage::Waiting);
    let quiescer = Quiescer::new(quiesce_limit);
    let mut driver = Driver { connection, relay, handle, goaway_deadline: None, replay_deadline, quiescer };
    loop {
        match poll_fn(|cx| driver.poll_turn(cx)).await {
            Turn::MustClose => driver.send_goaway(),
            Turn::Quiescent => return driver.into_outcome(),
            Turn::Silent => {
                if let Some((io, interposer)) = driver.relay.take() {
                    debug!(peer = %handle.peer(), "the client does not react to GOAWAY: closed with a second one");
                    io.refuse(&interposer.final_goaway()).await;
                }
                return Http2Outcome::Closed;
            }
            Turn::Overdue(Stage::InFlight) => {
                warn!(peer = %handle.peer(), "closed the connection: the client stopped reading its responses (--request-timeout)");
                break;
            }
            Turn::Done(Err(error)) => {
                debug!(peer = %handle.peer(), %error, "connection failed");
                break;
            }
            Turn::Done(Ok(())) | Turn::Overdue(_) => break,
        }
    }
    // Closes the connection now. Otherwise hyper would close it after it has dropped the handlers.
    drop(driver.relay.take());
    Http2Outcome::Closed
}

type HyperConnection = Connection<TokioIo<Relay>, Service, TokioExecutor>;

fn serve_connection(relay: Relay, service: Service) -> HyperConnection {
    Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW)
        .max_header_list_size(HEADER_LIST_LIMIT)
        // The size at the beginning. It is announced because an earlier release may have announced another one.
        .header_table_size(FIRST_HEADER_TABLE_SIZE)
        .serve_connection(TokioIo::new(relay), service)
}

/// What [`drive`] polls.
struct Driver<'a> {
    connection: HyperConnection,
    relay: Relay,
    handle: &'a DriverHandle,
    /// Set when GOAWAY is sent: until then the client need not react.
    goaway_deadline: Option<Pin<Box<Sleep>>>,
    /// Present until the requests that began in another process are answered.
    replay_deadline: Option<Pin<Box<Sleep>>>,
    quiescer: Quiescer,
}

impl Driver<'_> {
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        self.relay.begin_turn();
        loop {
            let phase = self.handle.phase();
            if self.cannot_move(phase) {
                keep(self.handle, &self.relay);
            }
            self.limit_replays(cx);
            let connection = &mut self.connection;
            if let Poll::Ready(result) = self.handle.poll_driver(cx, |cx| Pin::new(connection).poll(cx)) {
                return Poll::Ready(Turn::Done(result));
            }
            if let Some(turn) = self.closing_turn(cx, phase) {
                return Poll::Ready(turn);
            }
            match self.quiescer.advance(cx, self.handle, &self.relay) {
                Progress::Quiescent => return Poll::Ready(Turn::Quiescent),
                Progress::Released => {}
                Progress::Waits => return Poll::Pending,
            }
        }
    }

    /// Ends the streams of another process whose handlers do not answer in time.
    fn limit_replays(&mut self, cx: &mut Context<'_>) {
        let Some(deadline) = &mut self.replay_deadline else { return };
        if self.relay.with(|interposer| interposer.is_replaying()) != Some(true) {
            self.replay_deadline = None;
        } else if deadline.as_mut().poll(cx).is_ready() {
            self.replay_deadline = None;
            debug!(peer = %self.handle.peer(), "ending streams of the previous process: their handlers did not answer in time");
            self.relay.with(Interposer::end_replays);
        }
    }

    /// Whether the connection must stay in this process although it is stopping.
    fn cannot_move(&self, phase: Phase) -> bool {
        let is_stopping = phase != Phase::Serving;
        if is_stopping
            && (self.handle.keeps_http2()
                || self.relay.with(|interposer| interposer.is_immovable()) == Some(true))
        {
            return true;
        }
        // Otherwise the drain would wait until its limit for frames that the silent client never sends.
        matches!(phase, Phase::Draining | Phase::Quiescing | Phase::Holding)
            && self.handle.is_parkable()
            && self.relay.with(|interposer| interposer.is_stuck()) == Some(true)
    }

    /// The turn of a connection that is overdue or has to close. `phase` is that from before the poll of hyper.
    fn closing_turn(&mut self, cx: &mut Context<'_>, phase: Phase) -> Option<Turn> {
        let is_overdue = self.handle.is_overdue();
        if is_overdue && self.handle.stage() == Stage::InFlight {
            return Some(Turn::Overdue(Stage::InFlight));
        }
        let Some(deadline) = &mut self.goaway_deadline else {
            return (is_overdue || self.handle.must_close()).then_some(Turn::MustClose);
        };
        // An evicted connection is overdue at once, but its client may have sent a request before it received GOAWAY.
        let is_evicted = self.handle.state().is_evicted();
        let has_time_to_react = deadline.as_mut().poll(cx).is_pending();
        // An evicted client that does not read cannot receive the second GOAWAY, so its connection is cut off.
        if is_overdue && (!is_evicted || !has_time_to_react && !self.is_silent()) {
            return Some(Turn::Overdue(self.handle.stage()));
        }
        let must_end = phase != Phase::Serving || is_evicted;
        (!has_time_to_react && must_end && self.is_silent()).then_some(Turn::Silent)
    }

    /// Whether a client that has received GOAWAY waits for no response, and has not begun to close.
    fn is_silent(&self) -> bool {
        let state = self.handle.state();
        let is_idle = state.stage() == Stage::Waiting && state.is_flushed();
        is_idle && self.relay.with(|interposer| interposer.owes_nothing()) == Some(true)
    }

    fn send_goaway(&mut self) {
        self.goaway_deadline = Some(Box::pin(sleep(GOAWAY_LIMIT)));
        keep(self.handle, &self.relay);
        // The time limit of the stage begins again, so that the peer has time to close.
        self.handle.touch();
        self.relay.with(Interposer::release);
        Pin::new(&mut self.connection).graceful_shutdown();
    }

    /// Takes a quiescent connection away from hyper. It closes if TLS cannot continue in another process.
    fn into_outcome(self) -> Http2Outcome {
        let Some((io, interposer)) = self.relay.take() else { return Http2Outcome::Closed };
        let Some(parts) = io.into_parts() else { return Http2Outcome::Closed };
        let (state, unread) = interposer.into_state();
        Http2Outcome::Quiescent(parts, Box::new(state), unread)
    }
}

/// Keeps the connection in this process until it closes. Its responses without end have to end, because otherwise it would
/// not close.
fn keep(handle: &DriverHandle, relay: &Relay) {
    handle.forbid_handover();
    relay.with(|interposer| interposer.endless().must_end());
}

/// Makes a busy connection quiescent: holds new streams so that the open ones can end. If they do not end in time, it
/// releases the held streams, pauses, and tries again with more time.
struct Quiescer {
    /// How long to try before the connection receives GOAWAY.
    limit: Duration,
    /// When the first of the current attempts began.
    begun: Option<Instant>,
    /// The length of the next attempt.
    hold: Duration,
    now: Attempt,
}

enum Attempt {
    None,
    Holding(Pin<Box<Sleep>>),
    Pausing(Pin<Box<Sleep>>),
    /// Without a time limit, until the open streams have ended.
    HoldingUntilIdle,
}

enum Progress {
    Quiescent,
    /// Held frames were released, so hyper must be polled again.
    Released,
    Waits,
}

impl Quiescer {
    fn new(limit: Duration) -> Self {
        Self { limit, begun: None, hold: HOLD_LIMIT, now: Attempt::None }
    }

    fn advance(&mut self, cx: &mut Context<'_>, handle: &DriverHandle, relay: &Relay) -> Progress {
        let phase = handle.phase();
        if !phase.quiesces() || !handle.state().is_movable() {
            return self.park_or_release(handle, relay);
        }
        if handle.keeps_http2() {
            // Both the flag and the phase may have been set after `Driver::cannot_move`, which now runs again. Without
            // this check the connection would go to a process that does not adopt HTTP/2.
            self.now = Attempt::None;
            return Self::release(relay);
        }
        if phase == Phase::Holding {
            if let Attempt::Pausing(end) = &mut self.now
                && end.as_mut().poll(cx).is_pending()
            {
                return Progress::Waits;
            }
            return self.hold_until_idle(cx, handle, relay);
        }
        if self.begun.get_or_insert_with(Instant::now).elapsed() >= self.limit {
            self.now = Attempt::None;
            keep(handle, relay);
            return Self::release(relay);
        }
        self.attempt(cx, handle, relay)
    }

    /// The connection need not become quiescent: ends an attempt to make it so, and parks it if it is idle.
    fn park_or_release(&mut self, handle: &DriverHandle, relay: &Relay) -> Progress {
        // If the phase asks for quiescence again later, the connection has the whole limit again.
        self.begun = None;
        if handle.is_parkable() && relay.with(Interposer::park_if_quiescent) == Some(true) {
            return Progress::Quiescent;
        }
        match std::mem::replace(&mut self.now, Attempt::None) {
            Attempt::Holding(_) | Attempt::HoldingUntilIdle => Self::release(relay),
            Attempt::None | Attempt::Pausing(_) => Progress::Waits,
        }
    }

    /// Holds new streams for a limited time, and pauses after each attempt.
    fn attempt(&mut self, cx: &mut Context<'_>, handle: &DriverHandle, relay: &Relay) -> Progress {
        loop {
            match &mut self.now {
                Attempt::None | Attempt::HoldingUntilIdle => {
                    relay.with(Interposer::hold);
                    self.now = Attempt::Holding(Box::pin(sleep(self.hold)));
                }
                Attempt::Holding(end) => {
                    if is_quiescent(cx, handle, relay) {
                        return Progress::Quiescent;
                    }
                    let is_full = relay.with(|interposer| interposer.is_full()).unwrap_or(false);
                    if !is_full && end.as_mut().poll(cx).is_pending() {
                        return Progress::Waits;
                    }
                    self.pause();
                    return Self::release(relay);
                }
                Attempt::Pausing(end) => {
                    if end.as_mut().poll(cx).is_pending() {
                        return Progress::Waits;
                    }
                    self.now = Attempt::None;
                }
            }
        }
    }

    /// Holds new streams until the open ones have ended, however long that takes, because a request that begins this
    /// late in a drain might be cut off.
    fn hold_until_idle(&mut self, cx: &Context<'_>, handle: &DriverHandle, relay: &Relay) -> Progress {
        relay.with(Interposer::hold);
        self.now = Attempt::HoldingUntilIdle;
        if is_quiescent(cx, handle, relay) {
            return Progress::Quiescent;
        }
        let is_full = relay.with(|interposer| interposer.is_full()) == Some(true);
        let is_starving = handle.state().is_reading()
            && relay.with(|interposer| interposer.starves_uploads()) == Some(true);
        if !is_full && !is_starving {
            return Progress::Waits;
        }
        // Held frames take the room that the open streams need to end, so they are released. A connection that stays
        // this busy until the limit receives GOAWAY.
        if self.begun.get_or_insert_with(Instant::now).elapsed() >= self.limit {
            self.now = Attempt::None;
            keep(handle, relay);
        } else {
            self.pause();
        }
        Self::release(relay)
    }

    fn pause(&mut self) {
        self.now = Attempt::Pausing(Box::pin(sleep(self.hold)));
        self.hold = (self.hold * 2).min(self.limit / 8).min(LONGEST_HOLD).max(HOLD_LIMIT);
    }

    fn release(relay: &Relay) -> Progress {
        relay.with(Interposer::release);
        Progress::Released
    }
}

/// Whether the connection can be handed over now. If only responses without end are in flight, asks them to stop, and then
/// wakes the task of `cx`.
fn is_quiescent(cx: &Context<'_>, handle: &DriverHandle, relay: &Relay) -> bool {
    let endless = relay.with(|interposer| {
        interposer.stop_endless(cx.waker());
        interposer.is_quiescent().then(|| interposer.count_open())
    });
    endless.flatten().is_some_and(|endless| handle.state().is_quiescent_beside(endless))
}
