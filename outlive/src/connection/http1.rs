//! Drives HTTP/1.1 on one connection, and brings it to rest.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use bytes::Bytes;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::TokioIo;
use tracing::{debug, warn};

use super::exchange::Service;
use super::io::{Io, Parts};
use crate::registry::{Entry, Stage};

/// The largest head of a request, in bytes; a larger one is answered with 431.
const HEAD_LIMIT: usize = 64 * 1024;

/// The answer to a request whose head does not come in time.
const TIMEOUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

pub(super) enum Http1Outcome {
    Closed,
    /// With what was read and not consumed.
    Quiescent(Parts, Bytes),
}

enum Turn {
    /// hyper is done with the connection: the peer closed it, or the last answer said so.
    Done(hyper::Result<()>),
    Quiescent,
    Overdue(Stage),
}

pub(super) async fn drive(io: Io, service: Service, entry: &Entry) -> Http1Outcome {
    let is_plain = io.is_plain();
    let declined = service.declined_upgrade();
    // A connection can be served more than once in this process (after parking), each time by a new hyper instance.
    let started_before = entry.started();
    let mut connection = Builder::new()
        .header_read_timeout(None) // the registry watches over the time limits
        .half_close(is_plain) // `Io` sees it when a peer gives up, and takes no new buffer to look with
        .max_header_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    let turn = poll_fn(|cx| {
        let mut has_looked_again = false;
        loop {
            if !is_plain && entry.keeps_http2_and_tls() {
                entry.forbid_handover();
            }
            if let Poll::Ready(result) = entry.poll_driver(cx, |cx| Pin::new(&mut connection).poll(cx)) {
                return Poll::Ready(Turn::Done(result));
            }
            let state = entry.state();
            if entry.is_overdue() {
                return Poll::Ready(Turn::Overdue(state.stage));
            }
            if !state.is_quiescent() || !entry.must_quiesce() {
                return Poll::Pending;
            }
            // hyper learns in its next turn that a handler has left a part of the request's body: it then reads the
            // remainder at once, or ends the connection. Without that turn the next process would receive the
            // remainder as the beginning of a request.
            if state.has_left_body() && !std::mem::replace(&mut has_looked_again, true) {
                continue;
            }
            // It was said before the phase was, and after we looked.
            if !is_plain && entry.keeps_http2_and_tls() {
                continue;
            }
            // This hyper instance has served no request, so it holds at most a part of a head, and `into_parts`
            // returns that. Shut down, it would wait for the remainder, which `Io` withholds until the handover.
            if entry.started() == started_before {
                return Poll::Ready(Turn::Quiescent);
            }
            // hyper ends a connection that it holds to be idle without sending a byte. One that it does
            // not hold to be idle has more to say, and ends by itself.
            Pin::new(&mut connection).graceful_shutdown();
            return Pin::new(&mut connection).poll(cx).map(|result| match result {
                Ok(()) => Turn::Quiescent,
                Err(error) => Turn::Done(Err(error)),
            });
        }
    })
    .await;

    let stream = match connection.into_parts() {
        Some(parts) => Some((parts.io.into_inner(), parts.read_buf)),
        None => declined.recover(),
    };
    // A handler has accepted the upgrade and owns the stream.
    let Some((io, read)) = stream else { return Http1Outcome::Closed };
    match turn {
        Turn::Quiescent => {
            if let Some(rest) = io.into_parts() {
                return Http1Outcome::Quiescent(rest, read);
            }
        }
        Turn::Overdue(Stage::Head) => io.refuse(TIMEOUT).await,
        Turn::Overdue(Stage::InFlight) => {
            warn!(peer = %entry.peer, "closed the connection: the client stopped reading the response (--request-timeout)");
        }
        // What is not encrypted just ends.
        Turn::Overdue(_) if io.is_plain() => {}
        Turn::Overdue(_) => io.close().await,
        Turn::Done(result) => {
            if let Err(error) = result {
                debug!(peer = %entry.peer, %error, "connection failed");
            }
            io.close().await;
        }
    }
    Http1Outcome::Closed
}
