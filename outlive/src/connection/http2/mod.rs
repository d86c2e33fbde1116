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
use crate::transport::http2_state::Agreement;
use interposer::Session;
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

pub(super) enum End {
    Closed,
    /// With what is agreed upon, and what was read and not consumed.
    AtRest(Parts, Box<Agreement>, Bytes),
}

/// What becomes of a connection that is not driven any longer.
enum Outcome {
    /// Its end was seen, or it is cut off.
    Closed,
    AtRest,
    /// The client does not react to GOAWAY, and has no answer to get.
    Silent,
}

/// Drives a connection that begins here, or goes on with what was agreed upon in another process. Where it does not
/// come to rest within `rest_limit` after it is asked to, it is told to end.
pub(super) async fn drive(
    io: Io,
    agreement: Option<Agreement>,
    service: Service,
    entry: &Entry,
    rest_limit: Duration,
) -> End {
    let relay = Relay::new(io, agreement.map_or_else(Session::new, Session::resume));
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
    let mut told: Option<Pin<Box<Sleep>>> = None;
    let mut tries = Tries::new(rest_limit);
    let outcome = poll_fn(|cx| {
        loop {
            let phase = entry.phase();
            let is_asked = phase != Phase::Serving;
            if is_asked
                && (entry.keeps_all_but_http1() || relay.with(|session| session.is_immovable()) == Some(true))
            {
                entry.pin();
            }
            // The process would wait until its limit for what such a client does not send.
            if matches!(phase, Phase::Draining | Phase::Resting | Phase::Holding)
                && entry.is_drowsy()
                && relay.with(|session| session.is_stuck()) == Some(true)
            {
                entry.pin();
            }
            if let Poll::Ready(result) = entry.turn(cx, |cx| Pin::new(&mut connection).poll(cx)) {
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
            if is_overdue && told.is_some() {
                return Poll::Ready(Outcome::Closed);
            }
            if let Some(limit) = &mut told
                && limit.as_mut().poll(cx).is_ready()
                && is_asked
                && is_silent(entry, &relay)
            {
                return Poll::Ready(Outcome::Silent);
            }
            if told.is_none() && (is_overdue || entry.is_to_end()) {
                told = Some(Box::pin(sleep(GOAWAY_LIMIT)));
                entry.pin();
                // As long again for the peer to close.
                entry.touch();
                relay.with(Session::release);
                Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
            match tries.go_on(cx, entry, &relay) {
                Step::AtRest => return Poll::Ready(Outcome::AtRest),
                Step::Released => {}
                Step::Waits => return Poll::Pending,
            }
        }
    })
    .await;
    match (outcome, relay.take()) {
        (Outcome::AtRest, Some((io, session))) => {
            if let Some(parts) = io.into_parts() {
                let (agreement, unread) = session.leave();
                return End::AtRest(parts, Box::new(agreement), unread);
            }
        }
        (Outcome::Silent, Some((io, session))) => {
            debug!(peer = %entry.peer, "the client does not react to GOAWAY: closed with a second one");
            io.refuse(&session.farewell()).await;
        }
        (Outcome::Closed, _) | (_, None) => {}
    }
    End::Closed
}

/// Whether a client that is told to end has no answer to get, and has not begun to close.
fn is_silent(entry: &Entry, relay: &Relay) -> bool {
    let state = entry.state();
    let is_idle = state.stage == Stage::Waiting && state.is_flushed();
    is_idle && relay.with(|session| session.owes_nothing()) == Some(true)
}

/// How a busy connection is brought to rest: streams that begin are held for a while, let go again, and so on.
struct Tries {
    limit: Duration,
    begun: Option<Instant>,
    hold: Duration,
    now: Try,
}

enum Try {
    None,
    Holding(Pin<Box<Sleep>>),
    Pausing(Pin<Box<Sleep>>),
    /// Until the open streams have ended.
    HoldingOn,
}

enum Step {
    AtRest,
    /// There is more for hyper to do.
    Released,
    Waits,
}

impl Tries {
    fn new(limit: Duration) -> Self {
        Self { limit, begun: None, hold: HOLD_LIMIT, now: Try::None }
    }

    fn go_on(&mut self, cx: &mut Context<'_>, entry: &Entry, relay: &Relay) -> Step {
        let phase = entry.phase();
        if !phase.rests() || !entry.state().is_movable() {
            // The next hold is a try of its own, with as much time.
            self.begun = None;
            if entry.is_drowsy() && relay.with(Session::falls_asleep) == Some(true) {
                return Step::AtRest;
            }
            return match std::mem::replace(&mut self.now, Try::None) {
                Try::Holding(_) | Try::HoldingOn => Self::release(relay),
                Try::None | Try::Pausing(_) => Step::Waits,
            };
        }
        if entry.keeps_all_but_http1() {
            // It was said before the phase was, and after we looked.
            self.now = Try::None;
            return Self::release(relay);
        }
        if phase == Phase::Holding {
            if let Try::Pausing(end) = &mut self.now
                && end.as_mut().poll(cx).is_pending()
            {
                return Step::Waits;
            }
            return self.hold_on(entry, relay);
        }
        if self.begun.get_or_insert_with(Instant::now).elapsed() >= self.limit {
            self.now = Try::None;
            entry.pin();
            return Self::release(relay);
        }
        loop {
            match &mut self.now {
                Try::None | Try::HoldingOn => {
                    relay.with(Session::hold);
                    self.now = Try::Holding(Box::pin(sleep(self.hold)));
                }
                Try::Holding(end) => {
                    let is_at_rest = relay.with(|session| session.is_at_rest()).unwrap_or(false);
                    if is_at_rest && entry.state().is_at_rest() {
                        return Step::AtRest;
                    }
                    let is_full = relay.with(|session| session.is_full()).unwrap_or(false);
                    if !is_full && end.as_mut().poll(cx).is_pending() {
                        return Step::Waits;
                    }
                    self.pause();
                    return Self::release(relay);
                }
                Try::Pausing(end) => {
                    if end.as_mut().poll(cx).is_pending() {
                        return Step::Waits;
                    }
                    self.now = Try::None;
                }
            }
        }
    }

    /// Holds streams that begin until the others have ended, because a request that begins now may not have the time
    /// it needs.
    fn hold_on(&mut self, entry: &Entry, relay: &Relay) -> Step {
        relay.with(Session::hold);
        self.now = Try::HoldingOn;
        if relay.with(|session| session.is_at_rest()) == Some(true) && entry.state().is_at_rest() {
            return Step::AtRest;
        }
        let is_full = relay.with(|session| session.is_full()) == Some(true);
        let is_starving =
            entry.state().is_reading() && relay.with(|session| session.starves_uploads()) == Some(true);
        if !is_full && !is_starving {
            return Step::Waits;
        }
        // The open streams could not end, so those that are held begin. The connection is told to end if it is so busy
        // for long.
        if self.begun.get_or_insert_with(Instant::now).elapsed() >= self.limit {
            self.now = Try::None;
            entry.pin();
        } else {
            self.pause();
        }
        Self::release(relay)
    }

    fn pause(&mut self) {
        self.now = Try::Pausing(Box::pin(sleep(self.hold)));
        self.hold = (self.hold * 2).min(self.limit / 8).max(HOLD_LIMIT);
    }

    fn release(relay: &Relay) -> Step {
        relay.with(Session::release);
        Step::Released
    }
}
