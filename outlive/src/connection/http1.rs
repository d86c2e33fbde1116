//! Drives HTTP/1.1 on one connection until it closes or becomes quiescent.
//!
//! [`drive`] polls hyper's `http1::Connection`. To park the connection or hand it over, it takes hyper apart between
//! two requests: the socket and the bytes that hyper has read but not consumed continue elsewhere.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1::{Builder, UpgradeableConnection};
use hyper_util::rt::TokioIo;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::exchange::Service;
use super::io::{Io, Parts};
use super::upgraded::{UpgradableIo, Upgrade, close_unadopted};
use crate::registry::{DriverHandle, Stage};
use crate::transport::replay::Replay;

/// The largest head of a request, in bytes; a larger one is answered with 431.
const HEAD_LIMIT: usize = 64 * 1024;

/// How long the handler may take to answer a replayed request. The client waits for messages meanwhile.
const REPLAY_LIMIT: Duration = Duration::from_secs(10);

/// The response to a request whose head does not arrive within `--head-timeout`.
const TIMEOUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

type HyperConnection = UpgradeableConnection<TokioIo<UpgradableIo>, Service>;

pub(super) enum Http1Outcome {
    Closed,
    /// The connection, the bytes that hyper has read and not consumed, and the event stream that was sent.
    Quiescent(Parts, Bytes, Option<Box<Replay>>),
}

/// Why the driver stops polling hyper.
enum Turn {
    /// hyper has ended the connection: the peer closed it, the last response announced the end, or it failed.
    Done(hyper::Result<()>),
    Quiescent,
    Overdue(Stage),
    /// The response to a replayed request does not continue the connection, or is late.
    ReplayRefused,
}

pub(super) async fn drive(io: Io, service: Service, driver: &DriverHandle) -> Http1Outcome {
    let is_plain = io.is_plain();
    let upgrade = service.upgrade();
    let (head, kind) = service.replayed().unzip();
    // Present until the replayed request is answered.
    let mut replay_deadline = kind.is_some().then(|| Box::pin(sleep(REPLAY_LIMIT)));
    let io = UpgradableIo::new(io, upgrade.clone(), head);
    // A connection can be served more than once in this process (after parking), each time by a new hyper instance.
    let started_before = driver.started();
    let mut connection = Builder::new()
        .header_read_timeout(None) // the registry enforces the time limits
        .half_close(is_plain) // `Io` detects a closed peer with a peek; hyper would allocate a buffer
        .max_header_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    // Set once hyper was asked to end. To ask again would change nothing, but withhold input again.
    let mut is_ending = false;
    let turn = poll_fn(|cx| {
        let mut has_looked_again = false;
        loop {
            if !is_plain && driver.keeps_state() {
                driver.forbid_handover();
            }
            if let Poll::Ready(result) = driver.poll_driver(cx, |cx| Pin::new(&mut connection).poll(cx)) {
                return Poll::Ready(Turn::Done(result));
            }
            if upgrade.is_continued() {
                replay_deadline = None;
            }
            if let Some(deadline) = &mut replay_deadline
                && (upgrade.is_refused() || deadline.as_mut().poll(cx).is_ready())
            {
                upgrade.refuse();
                return Poll::Ready(Turn::ReplayRefused);
            }
            let state = driver.state();
            if driver.is_overdue() {
                return Poll::Ready(Turn::Overdue(state.stage()));
            }
            if !state.is_quiescent() || !driver.must_quiesce() {
                return Poll::Pending;
            }
            // If a handler has not read the whole request body, hyper notices that in its next poll, and reads the
            // remainder or ends the connection. Without that poll the next process would take the remainder for the
            // beginning of a request.
            if state.has_left_body() && !std::mem::replace(&mut has_looked_again, true) {
                continue;
            }
            // The flag is set before the phase is, but both may have been set after the check at the head of the loop.
            // Without this second check the connection would go to a process that does not adopt TLS connections.
            if !is_plain && driver.keeps_state() {
                continue;
            }
            // This hyper instance has served no request, so it holds at most a part of a head, and `into_parts`
            // returns that. Shut down, it would wait for the remainder, which `Io` withholds until the handover.
            if driver.started() == started_before {
                return Poll::Ready(Turn::Quiescent);
            }
            if std::mem::replace(&mut is_ending, true) {
                return Poll::Pending;
            }
            return end(Pin::new(&mut connection), &upgrade, cx);
        }
    })
    .await;

    let stream = match connection.into_parts() {
        Some(parts) => Some((parts.io.into_inner(), parts.read_buf)),
        None => upgrade.recover_declined(),
    };
    // A handler has accepted the upgrade and owns the stream.
    let Some((io, read)) = stream else { return Http1Outcome::Closed };
    let io = io.into_io();
    if let Some(kind) = kind
        && !upgrade.is_continued()
    {
        debug!(peer = %driver.peer(), ?kind, "closing a connection: this process does not answer its request as the one before did");
        close_unadopted(io, kind).await;
        return Http1Outcome::Closed;
    }
    if let Some(replay) = upgrade.take_handed_on() {
        return match io.into_parts() {
            Some(parts) => Http1Outcome::Quiescent(parts, read, Some(Box::new(replay))),
            None => Http1Outcome::Closed,
        };
    }
    match turn {
        Turn::Quiescent => {
            if let Some(parts) = io.into_parts() {
                return Http1Outcome::Quiescent(parts, read, None);
            }
        }
        Turn::ReplayRefused => {}
        Turn::Overdue(Stage::Head) => io.refuse(TIMEOUT).await,
        Turn::Overdue(Stage::InFlight) => {
            warn!(peer = %driver.peer(), "closed the connection: the client stopped reading the response (--request-timeout)");
        }
        // Without TLS the socket is closed at once, because there is no `close_notify` to send.
        Turn::Overdue(_) if io.is_plain() => {}
        Turn::Overdue(_) => io.close().await,
        Turn::Done(result) => {
            if let Err(error) = result {
                debug!(peer = %driver.peer(), %error, "connection failed");
            }
            io.close().await;
        }
    }
    Http1Outcome::Closed
}

/// Shuts hyper down. hyper ends at once, without sending a byte, if it considers the connection idle. Otherwise it has more to
/// send, and ends in a later poll.
fn end(mut connection: Pin<&mut HyperConnection>, upgrade: &Upgrade, cx: &mut Context<'_>) -> Poll<Turn> {
    upgrade.withhold_input(true);
    connection.as_mut().graceful_shutdown();
    let ended = connection.as_mut().poll(cx);
    upgrade.withhold_input(false);
    match ended {
        Poll::Ready(Ok(())) => Poll::Ready(Turn::Quiescent),
        Poll::Ready(Err(error)) => Poll::Ready(Turn::Done(Err(error))),
        // Withheld input does not wake this task, so hyper has to ask for input again.
        Poll::Pending => connection.poll(cx).map(Turn::Done),
    }
}
