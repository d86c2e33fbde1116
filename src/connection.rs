//! One connection's life, from its first byte to its end or its rest.

mod exchange;
mod http1;
mod http2;
mod io;

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use axum::body::Body;
use bytes::Bytes;
use hyper::{Request, Response};
use tower::Service;
use tracing::debug;

use crate::registry::{Entry, Phase, Registration, Stage};
use crate::stream::{Peer, Stream};
use io::Io;

/// The service behind every connection.
pub trait Handler:
    Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}
impl<S> Handler for S where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// A connection at rest, with what it takes to go on with it: here, or in the next process.
pub struct Connection {
    pub stream: Stream,
    pub peer: Peer,
    /// The name of the listener that it came from.
    pub listener: Arc<str>,
    /// What was read from it and not consumed.
    pub unread: Bytes,
}

/// How a connection's time in this process ended.
pub enum End {
    Closed,
    /// Nothing is in flight, nothing is unsent: it can go on in another process.
    AtRest(Connection, Registration),
}

/// What HTTP/2 clients with prior knowledge send first (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

enum Sniffed {
    As(Protocol),
    /// The phase asks for it: fresh connections are at rest.
    AtRest,
    Gone,
}

/// Serves `connection` until it closes or comes to rest.
pub async fn serve(connection: Connection, registration: Registration, handler: impl Handler) -> End {
    let entry = registration.entry.clone();
    let sniffed = if connection.unread.is_empty() {
        sniff(&connection.stream, &entry).await
    } else {
        entry.received();
        Sniffed::As(Protocol::Http1)
    };
    let protocol = match sniffed {
        Sniffed::As(protocol) => protocol,
        Sniffed::AtRest => return End::AtRest(connection, registration),
        Sniffed::Gone => return End::Closed,
    };
    let Connection { stream, peer, listener, unread } = connection;
    let io = Io::new(stream, unread, registration, protocol);
    let service = exchange::service(handler, entry.clone());
    // Boxed, so that a connection that has not spoken yet takes little memory.
    match protocol {
        Protocol::Http2 => {
            Box::pin(http2::drive(io, service, &entry)).await;
            End::Closed
        }
        Protocol::Http1 => match Box::pin(http1::drive(io, service, &entry)).await {
            http1::End::AtRest(io, unread) => {
                let (stream, registration) = io.into_parts();
                End::AtRest(Connection { stream, peer, listener, unread }, registration)
            }
            http1::End::Closed => End::Closed,
        },
    }
}

/// Tells HTTP/1 from HTTP/2 by the first bytes, and consumes none.
async fn sniff(stream: &Stream, entry: &Entry) -> Sniffed {
    let mut bytes = [0; PREFACE.len()];
    poll_fn(|cx| {
        entry.wake_on_change(cx);
        let decided = |bytes: &[u8]| {
            entry.received();
            bytes.len() == PREFACE.len() || !PREFACE.starts_with(bytes)
        };
        if let Poll::Ready(length) = stream.poll_peek(cx, &mut bytes, decided) {
            return Poll::Ready(match length {
                Ok(0) => Sniffed::Gone,
                Ok(length) if &bytes[..length] == PREFACE => Sniffed::As(Protocol::Http2),
                Ok(_) => Sniffed::As(Protocol::Http1),
                Err(error) => {
                    debug!(peer = %entry.peer, %error, "connection lost");
                    Sniffed::Gone
                }
            });
        }
        if entry.is_overdue() {
            return Poll::Ready(match entry.stage() {
                // HTTP/1 answers a head that does not come, and closes.
                Stage::Head => Sniffed::As(Protocol::Http1),
                _ => Sniffed::Gone,
            });
        }
        if entry.phase() == Phase::Resting { Poll::Ready(Sniffed::AtRest) } else { Poll::Pending }
    })
    .await
}
