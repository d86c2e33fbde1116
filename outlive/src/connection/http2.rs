//! Drives HTTP/2 on one connection. It cannot move: when asked to end it sends GOAWAY, finishes its
//! streams and closes.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tracing::{debug, warn};

use super::exchange::Service;
use super::io::Io;
use crate::registry::{Entry, Stage};

/// A peer that answers no ping for this long is gone.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that one connection may have in flight.
const MAX_STREAMS: u32 = 200;

pub(super) async fn drive(io: Io, service: Service, entry: &Entry) {
    let mut connection = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(io), service);
    entry.pin();
    entry.enter(Stage::Waiting);
    let mut told = false;
    let result = poll_fn(|cx| {
        loop {
            if let Poll::Ready(result) = entry.turn(cx, |cx| Pin::new(&mut connection).poll(cx)) {
                return Poll::Ready(result);
            }
            let is_overdue = entry.is_overdue();
            if is_overdue && entry.stage() == Stage::InFlight {
                warn!(peer = %entry.peer, "the peer takes no more of its answers: cut off");
                return Poll::Ready(Ok(()));
            }
            if is_overdue && told {
                return Poll::Ready(Ok(()));
            }
            if told || !(is_overdue || entry.is_to_end()) {
                return Poll::Pending;
            }
            told = true;
            // As long again for the peer to close.
            entry.touch();
            Pin::new(&mut connection).graceful_shutdown();
        }
    })
    .await;
    if let Err(error) = result {
        debug!(peer = %entry.peer, %error, "connection ended");
    }
}
