//! One connection's life, from its first byte to its end or its rest.

mod body_chunks;
mod exchange;
mod http1;
mod http2;
mod io;
#[cfg(test)]
pub mod tests;
pub mod tls;
#[cfg(test)]
mod unread_tests;
mod upgrade;
#[cfg(test)]
mod upgrade_tests;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::app::context::RequestContext;
use crate::app::process::Process;
use crate::registry::{Entry, Registration, Stage};
use crate::requests::Routes;
use crate::transport::http2_state::Http2State;
use crate::transport::listener_name::{ListenerRole, Name};
use crate::transport::stream::{Connection, Stream};
use crate::transport::tls_config::Tls;
use io::{Io, Wire};

/// What the listeners lead to, by their kind.
pub struct Services {
    pub routes: Routes,
    pub admin: Routes,
    /// Where a listener is named https.
    pub tls: Option<Tls>,
    pub process: Process,
    pub shutdown: CancellationToken,
    /// For a connection that is busy all the time to come to rest; then it is told to end.
    pub quiesce_limit: Duration,
}

impl Services {
    /// What hyper calls for each request of a connection.
    fn service(&self, routes: &Routes, entry: &Arc<Entry>) -> exchange::Service {
        let Self { process, shutdown, .. } = self;
        let context = RequestContext { process: *process, shutdown: shutdown.clone(), peer: entry.peer };
        exchange::Service::new(routes.clone(), context, entry.clone())
    }
}

/// How a connection's time in this process ended.
pub enum ConnectionOutcome {
    Closed,
    /// Nothing is in flight, nothing is unsent: it can sleep, or go on in another process.
    Quiescent(Connection<Stream>, Registration),
}

/// What HTTP/2 clients with prior knowledge send first (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

/// How the wait for a connection's first bytes ended.
enum FirstBytes {
    /// They are there, not taken: this many.
    Bytes(usize),
    /// They have begun to come, and did not all come in time.
    Late,
    /// None came in time.
    Idle,
    /// It is to rest, and does: nothing was taken from it.
    Quiescent,
    Gone,
}

/// Serves `connection` until it closes or comes to rest.
pub async fn serve(
    connection: Connection<Stream>,
    registration: Registration,
    services: &Services,
) -> ConnectionOutcome {
    match (connection.listener.role(), &services.tls) {
        (ListenerRole::Http, _) => serve_plain(connection, registration, services, &services.routes).await,
        (ListenerRole::Admin, _) => serve_plain(connection, registration, services, &services.admin).await,
        (ListenerRole::Https, Some(tls)) => {
            Box::pin(tls::handshake::serve(connection, registration, services, tls)).await
        }
        (ListenerRole::Https, None) => {
            unreachable!("a certificate is loaded where a listener is named https")
        }
    }
}

async fn serve_plain(
    connection: Connection<Stream>,
    registration: Registration,
    services: &Services,
    routes: &Routes,
) -> ConnectionOutcome {
    let entry = registration.entry.clone();
    let mut bytes = [0; PREFACE.len()];
    let is_resumed = connection.http2.is_some();
    let arrived = if connection.unread.is_empty() {
        let is_enough =
            |bytes: &[u8]| is_resumed || bytes.len() == PREFACE.len() || !PREFACE.starts_with(bytes);
        first_bytes(&connection.socket, &entry, &mut bytes, is_enough).await
    } else {
        entry.received();
        FirstBytes::Bytes(0)
    };
    let protocol = match arrived {
        // It is told that it ends, where it has been idle for too long.
        FirstBytes::Bytes(_) | FirstBytes::Late | FirstBytes::Idle if is_resumed => Protocol::Http2,
        FirstBytes::Quiescent if is_resumed && entry.keeps_http2_and_tls() => Protocol::Http2,
        FirstBytes::Bytes(length) if &bytes[..length] == PREFACE => Protocol::Http2,
        // HTTP/1 answers a head that does not come, and closes.
        FirstBytes::Bytes(_) | FirstBytes::Late => Protocol::Http1,
        FirstBytes::Quiescent => return ConnectionOutcome::Quiescent(connection, registration),
        FirstBytes::Gone | FirstBytes::Idle => return ConnectionOutcome::Closed,
    };
    let Connection { socket, listener, unread, http2: state, .. } = connection;
    let io = Io::new(Wire::Left(socket), unread, registration, protocol);
    // Boxed, so that a connection that has not spoken yet takes little memory.
    Box::pin(drive(io, protocol, state, listener, services, routes)).await
}

/// Speaks HTTP, until the connection closes or comes to rest.
async fn drive(
    io: Io,
    protocol: Protocol,
    state: Option<Box<Http2State>>,
    listener: Name,
    services: &Services,
    routes: &Routes,
) -> ConnectionOutcome {
    let entry = io.registration().entry.clone();
    let service = services.service(routes, &entry);
    let (parts, http2, unread) = match protocol {
        Protocol::Http1 => match http1::drive(io, service, &entry).await {
            http1::Http1Outcome::Quiescent(parts, unread) => (parts, None, unread),
            http1::Http1Outcome::Closed => return ConnectionOutcome::Closed,
        },
        Protocol::Http2 => {
            let state = state.map(|state| *state);
            match http2::drive(io, state, service, &entry, services.quiesce_limit).await {
                http2::Http2Outcome::Quiescent(parts, state, unread) => (parts, Some(state), unread),
                http2::Http2Outcome::Closed => return ConnectionOutcome::Closed,
            }
        }
    };
    let io::Parts { stream, registration, tls, unread: behind } = parts;
    let unread = io::join(unread, behind);
    ConnectionOutcome::Quiescent(Connection { socket: stream, listener, unread, http2, tls }, registration)
}

/// Waits for a connection's first bytes, up to where they are `enough`, and takes none.
async fn first_bytes(
    stream: &Stream,
    entry: &Entry,
    bytes: &mut [u8],
    enough: impl Fn(&[u8]) -> bool,
) -> FirstBytes {
    poll_fn(|cx| {
        entry.wake_on_change(cx);
        let is_enough = |bytes: &[u8]| {
            entry.received();
            enough(bytes)
        };
        if let Poll::Ready(length) = stream.poll_peek(cx, bytes, is_enough) {
            return Poll::Ready(match length {
                Ok(0) => FirstBytes::Gone,
                Ok(length) => FirstBytes::Bytes(length),
                Err(error) => {
                    debug!(peer = %entry.peer, %error, "connection failed");
                    FirstBytes::Gone
                }
            });
        }
        if entry.is_overdue() {
            return Poll::Ready(if entry.stage() == Stage::Head {
                FirstBytes::Late
            } else {
                FirstBytes::Idle
            });
        }
        if entry.must_quiesce() { Poll::Ready(FirstBytes::Quiescent) } else { Poll::Pending }
    })
    .await
}
