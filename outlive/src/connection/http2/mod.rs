//! Drives HTTP/2 on one connection, and brings it to rest.

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

/// A peer that answers no ping for this long is gone.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that one connection may have in flight.
const MAX_STREAMS: u32 = 200;
/// How much a client may send ahead, in bytes, on the connection and on each stream. No later release may have less:
/// a client that has moved goes on with what it was granted.
const WINDOW: u32 = 1024 * 1024;
/// How large the headers of a request may be, in bytes as RFC 9113 section 6.5.2 counts them; larger ones get 431.
const HEADER_LIST_LIMIT: u32 = 16 * 1024;

/// How long streams that begin are held at first, for those that are open to end; twice as long at each further try, up
/// to an eighth of the time that there is, with as long a pause before it. What is held takes room from an upload that
/// is open.
const HOLD_LIMIT: Duration = Duration::from_millis(20);

/// How long a client that has no answer to get may take to react to GOAWAY, while the process waits for that to end. It
/// takes a client one round trip; one that is later finds the second GOAWAY, and may send again what came after it.
const GOAWAY_LIMIT: Duration = Duration::from_secs(1);

pub(super) enum Http2Outcome {
    Closed,
    /// With what is agreed upon, and what was read and not consumed.
    Quiescent(Parts, Box<Http2State>, Bytes),
}

/// What becomes of a connection that is not driven any longer.
enum Outcome {
    /// Its end was seen, or it is cut off.
    Closed,
    Quiescent,
    /// The client does not react to GOAWAY, and has no answer to get.
    Silent,
}

/// Drives a connection that begins here, or goes on with what was agreed upon in another process. Where it does not
/// come to rest within `quiesce_limit` after it is asked to, it is told to end.
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
        .header_table_size(0) // so that there is nothing of our decoder's to remember
        .serve_connection(TokioIo::new(relay.clone()), service);
    entry.enter(Stage::Waiting);
    // Once the client is told to end: until when it may stay silent.
    let mut goaway_deadline: Option<Pin<Box<Sleep>>> = None;
    let mut quiescer = Quiescer::new(quiesce_limit);
    let outcome = poll_fn(|cx| {
        loop {
            let phase = entry.phase();
            let is_asked = phase != Phase::Serving;
            if is_asked
                && (entry.keeps_http2_and_tls() || relay.with(|interposer| interposer.is_immovable()) == Some(true))
            {
                entry.forbid_handover();
            }
            // The process would wait until its limit for what such a client does not send.
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
                && is_asked
                && is_silent(entry, &relay)
            {
                return Poll::Ready(Outcome::Silent);
            }
            if goaway_deadline.is_none() && (is_overdue || entry.must_close()) {
                goaway_deadline = Some(Box::pin(sleep(GOAWAY_LIMIT)));
                entry.forbid_handover();
                // As long again for the peer to close.
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

/// Whether a client that is told to end has no answer to get, and has not begun to close.
fn is_silent(entry: &Entry, relay: &Relay) -> bool {
    let state = entry.state();
    let is_idle = state.stage == Stage::Waiting && state.is_flushed();
    is_idle && relay.with(|interposer| interposer.owes_nothing()) == Some(true)
}

/// How a busy connection is brought to rest: streams that begin are held for a while, let go again, and so on.
struct Quiescer {
    limit: Duration,
    begun: Option<Instant>,
    hold: Duration,
    now: Attempt,
}

enum Attempt {
    None,
    Holding(Pin<Box<Sleep>>),
    Pausing(Pin<Box<Sleep>>),
    /// Until the open streams have ended.
    HoldingUntilIdle,
}

enum Progress {
    Quiescent,
    /// There is more for hyper to do.
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
            // The next hold is a try of its own, with as much time.
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
            // It was said before the phase was, and after we looked.
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

    /// Holds streams that begin until the others have ended, because a request that begins now may not have the time
    /// it needs.
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
        // The open streams could not end, so those that are held begin. The connection is told to end if it is so busy
        // for long.
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
        self.hold = (self.hold * 2).min(self.limit / 8).max(HOLD_LIMIT);
    }

    fn release(relay: &Relay) -> Progress {
        relay.with(Interposer::release);
        Progress::Released
    }
}
