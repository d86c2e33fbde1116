//! Drives HTTP/2 on one connection until it closes or becomes quiescent.
//!
//! [`drive`] polls hyper, and with it h2, on a `Relay` (`relay.rs`), through which all bytes pass an `Interposer`
//! (`interposer/`). The interposer records what another process needs to continue the connection, and can hold the
//! frames of new streams. `Quiescer` decides when they are held. A connection that cannot be handed over receives
//! GOAWAY.

pub(super) mod frame;
mod interposer;
#[cfg(test)]
mod reaction_tests;
mod relay;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::{Instant, Sleep, sleep};
use tracing::{debug, warn};

use super::exchange::Service;
use super::io::{Io, Parts};
use crate::registry::{Entry, Phase, Stage};
use crate::transport::http2_state::Http2State;
use interposer::Interposer;
use relay::Relay;

/// The interval of pings, and how long a peer may take to answer one before the connection is closed.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
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

/// How long a client that waits for no response may take to react to GOAWAY when the process is stopping. A reaction
/// takes one round trip. A slower client receives the second GOAWAY, and may repeat the requests on streams above its
/// last stream.
const GOAWAY_LIMIT: Duration = Duration::from_secs(1);

pub(super) enum Http2Outcome {
    Closed,
    /// The connection, its HTTP/2 state, and the bytes that were read and not consumed.
    Quiescent(Parts, Box<Http2State>, Bytes),
}

/// Why the driver stops polling hyper.
enum Outcome {
    /// The connection has ended, or must be cut off.
    Closed,
    Quiescent,
    /// The client does not react to GOAWAY, and waits for no response.
    Silent,
}

/// Drives a connection: a new one, or one that continues with `state` after it was parked or handed over. If it is too
/// busy to become quiescent within `quiesce_limit`, it receives GOAWAY.
pub(super) async fn drive(
    io: Io,
    state: Option<Http2State>,
    service: Service,
    entry: &Entry,
    quiesce_limit: Duration,
) -> Http2Outcome {
    let relay = Relay::new(io, state.map_or_else(Interposer::new, Interposer::resume));
    let mut connection = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW)
        .max_header_list_size(HEADER_LIST_LIMIT)
        .header_table_size(0) // a table of the decoder could not be handed over
        .serve_connection(TokioIo::new(relay.clone()), service);
    entry.enter(Stage::Waiting);
    // Set when GOAWAY is sent: until then the client need not react.
    let mut goaway_deadline: Option<Pin<Box<Sleep>>> = None;
    let mut quiescer = Quiescer::new(quiesce_limit);
    let outcome = poll_fn(|cx| {
        loop {
            let phase = entry.phase();
            let is_stopping = phase != Phase::Serving;
            if is_stopping
                && (entry.keeps_http2_and_tls() || relay.with(|interposer| interposer.is_immovable()) == Some(true))
            {
                entry.forbid_handover();
            }
            // Otherwise the drain would wait until its limit for frames that the silent client never sends.
            if matches!(phase, Phase::Draining | Phase::Quiescing | Phase::Holding)
                && entry.is_parkable()
                && relay.with(|interposer| interposer.is_stuck()) == Some(true)
            {
                entry.forbid_handover();
            }
            if let Poll::Ready(result) = entry.poll_driver(cx, |cx| Pin::new(&mut connection).poll(cx)) {
                if let Err(error) = result {
                    debug!(peer = %entry.peer, %error, "connection failed");
                }
                return Poll::Ready(Outcome::Closed);
            }
            let is_overdue = entry.is_overdue();
            if is_overdue && entry.stage() == Stage::InFlight {
                warn!(peer = %entry.peer, "closed the connection: the client stopped reading its responses (--request-timeout)");
                return Poll::Ready(Outcome::Closed);
            }
            if is_overdue && goaway_deadline.is_some() {
                return Poll::Ready(Outcome::Closed);
            }
            if let Some(limit) = &mut goaway_deadline
                && limit.as_mut().poll(cx).is_ready()
                && is_stopping
                && is_silent(entry, &relay)
            {
                return Poll::Ready(Outcome::Silent);
            }
            if goaway_deadline.is_none() && (is_overdue || entry.must_close()) {
                goaway_deadline = Some(Box::pin(sleep(GOAWAY_LIMIT)));
                entry.forbid_handover();
                // The time limit of the stage begins again, so that the peer has time to close.
                entry.touch();
                relay.with(Interposer::release);
                Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
            match quiescer.advance(cx, entry, &relay) {
                Progress::Quiescent => return Poll::Ready(Outcome::Quiescent),
                Progress::Released => {}
                Progress::Waits => return Poll::Pending,
            }
        }
    })
    .await;
    match (outcome, relay.take()) {
        (Outcome::Quiescent, Some((io, interposer))) => {
            if let Some(parts) = io.into_parts() {
                let (state, unread) = interposer.into_state();
                return Http2Outcome::Quiescent(parts, Box::new(state), unread);
            }
        }
        (Outcome::Silent, Some((io, interposer))) => {
            debug!(peer = %entry.peer, "the client does not react to GOAWAY: closed with a second one");
            io.refuse(&interposer.final_goaway()).await;
        }
        (Outcome::Closed, _) | (_, None) => {}
    }
    Http2Outcome::Closed
}

/// Whether a client that has received GOAWAY waits for no response, and has not begun to close.
fn is_silent(entry: &Entry, relay: &Relay) -> bool {
    let state = entry.state();
    let is_idle = state.stage == Stage::Waiting && state.is_flushed();
    is_idle && relay.with(|interposer| interposer.owes_nothing()) == Some(true)
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

    fn advance(&mut self, cx: &mut Context<'_>, entry: &Entry, relay: &Relay) -> Progress {
        let phase = entry.phase();
        if !phase.quiesces() || !entry.state().is_movable() {
            // If the phase asks for quiescence again later, the connection has the whole limit again.
            self.begun = None;
            if entry.is_parkable() && relay.with(Interposer::park_if_quiescent) == Some(true) {
                return Progress::Quiescent;
            }
            return match std::mem::replace(&mut self.now, Attempt::None) {
                Attempt::Holding(_) | Attempt::HoldingUntilIdle => Self::release(relay),
                Attempt::None | Attempt::Pausing(_) => Progress::Waits,
            };
        }
        if entry.keeps_http2_and_tls() {
            // Both the flag and the phase may have been set after the check in `drive`, which now runs again. Without
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
            return self.hold_until_idle(entry, relay);
        }
        if self.begun.get_or_insert_with(Instant::now).elapsed() >= self.limit {
            self.now = Attempt::None;
            entry.forbid_handover();
            return Self::release(relay);
        }
        loop {
            match &mut self.now {
                Attempt::None | Attempt::HoldingUntilIdle => {
                    relay.with(Interposer::hold);
                    self.now = Attempt::Holding(Box::pin(sleep(self.hold)));
                }
                Attempt::Holding(end) => {
                    let is_quiescent = relay.with(|interposer| interposer.is_quiescent()).unwrap_or(false);
                    if is_quiescent && entry.state().is_quiescent() {
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
    fn hold_until_idle(&mut self, entry: &Entry, relay: &Relay) -> Progress {
        relay.with(Interposer::hold);
        self.now = Attempt::HoldingUntilIdle;
        if relay.with(|interposer| interposer.is_quiescent()) == Some(true) && entry.state().is_quiescent() {
            return Progress::Quiescent;
        }
        let is_full = relay.with(|interposer| interposer.is_full()) == Some(true);
        let is_starving =
            entry.state().is_reading() && relay.with(|interposer| interposer.starves_uploads()) == Some(true);
        if !is_full && !is_starving {
            return Progress::Waits;
        }
        // Held frames take the room that the open streams need to end, so they are released. A connection that stays
        // this busy until the limit receives GOAWAY.
        if self.begun.get_or_insert_with(Instant::now).elapsed() >= self.limit {
            self.now = Attempt::None;
            entry.forbid_handover();
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
