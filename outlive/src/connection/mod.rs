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

use crate::app::context::Context;
use crate::app::process::Process;
use crate::registry::{Entry, Registration, Stage};
use crate::requests::Routes;
use crate::transport::http2_state::Agreement;
use crate::transport::listener_name::{ListenerKind, Name};
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
    pub rest_limit: Duration,
}

impl Services {
    /// What hyper calls for each request of a connection.
    fn service(&self, routes: &Routes, entry: &Arc<Entry>) -> exchange::Service {
        let Self { process, shutdown, .. } = self;
        let context = Context { process: *process, shutdown: shutdown.clone(), peer: entry.peer };
        exchange::Service::new(routes.clone(), context, entry.clone())
    }
}

/// How a connection's time in this process ended.
pub enum End {
    Closed,
    /// Nothing is in flight, nothing is unsent: it can sleep, or go on in another process.
    AtRest(Connection<Stream>, Registration),
}

/// What HTTP/2 clients with prior knowledge send first (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

/// How the wait for a connection's first bytes ended.
enum Arrived {
    /// They are there, not taken: this many.
    Bytes(usize),
    /// They have begun to come, and did not all come in time.
    Late,
    /// None came in time.
    Idle,
    /// It is to rest, and does: nothing was taken from it.
    AtRest,
    Gone,
}

/// Serves `connection` until it closes or comes to rest.
pub async fn serve(connection: Connection<Stream>, registration: Registration, services: &Services) -> End {
    match (connection.listener.kind(), &services.tls) {
        (ListenerKind::Http, _) => serve_plain(connection, registration, services, &services.routes).await,
        (ListenerKind::Admin, _) => serve_plain(connection, registration, services, &services.admin).await,
        (ListenerKind::Https, Some(tls)) => {
            Box::pin(tls::handshake::serve(connection, registration, services, tls)).await
        }
        (ListenerKind::Https, None) => {
            unreachable!("a certificate is loaded where a listener is named https")
        }
    }
}

async fn serve_plain(
    connection: Connection<Stream>,
    registration: Registration,
    services: &Services,
    routes: &Routes,
) -> End {
    let entry = registration.entry.clone();
    let mut bytes = [0; PREFACE.len()];
    let goes_on = connection.http2.is_some();
    let arrived = if connection.unread.is_empty() {
        let is_enough = |bytes: &[u8]| goes_on || bytes.len() == PREFACE.len() || !PREFACE.starts_with(bytes);
        first_bytes(&connection.socket, &entry, &mut bytes, is_enough).await
    } else {
        entry.received();
        Arrived::Bytes(0)
    };
    let protocol = match arrived {
        // It is told that it ends, where it has been idle for too long.
        Arrived::Bytes(_) | Arrived::Late | Arrived::Idle if goes_on => Protocol::Http2,
        Arrived::AtRest if goes_on && entry.keeps_all_but_http1() => Protocol::Http2,
        Arrived::Bytes(length) if &bytes[..length] == PREFACE => Protocol::Http2,
        // HTTP/1 answers a head that does not come, and closes.
        Arrived::Bytes(_) | Arrived::Late => Protocol::Http1,
        Arrived::AtRest => return End::AtRest(connection, registration),
        Arrived::Gone | Arrived::Idle => return End::Closed,
    };
    let Connection { socket, listener, unread, http2: agreement, .. } = connection;
    let io = Io::new(Wire::Left(socket), unread, registration, protocol);
    // Boxed, so that a connection that has not spoken yet takes little memory.
    Box::pin(drive(io, protocol, agreement, listener, services, routes)).await
}

/// Speaks HTTP, until the connection closes or comes to rest.
async fn drive(
    io: Io,
    protocol: Protocol,
    agreement: Option<Box<Agreement>>,
    listener: Name,
    services: &Services,
    routes: &Routes,
) -> End {
    let entry = io.registration().entry.clone();
    let service = services.service(routes, &entry);
    let (parts, http2, unread) = match protocol {
        Protocol::Http1 => match http1::drive(io, service, &entry).await {
            http1::End::AtRest(parts, unread) => (parts, None, unread),
            http1::End::Closed => return End::Closed,
        },
        Protocol::Http2 => {
            let agreement = agreement.map(|agreement| *agreement);
            match http2::drive(io, agreement, service, &entry, services.rest_limit).await {
                http2::End::AtRest(parts, agreement, unread) => (parts, Some(agreement), unread),
                http2::End::Closed => return End::Closed,
            }
        }
    };
    let io::Parts { stream, registration, tls, unread: behind } = parts;
    let unread = io::join(unread, behind);
    End::AtRest(Connection { socket: stream, listener, unread, http2, tls }, registration)
}

/// Waits for a connection's first bytes, up to where they are `enough`, and takes none.
async fn first_bytes(
    stream: &Stream,
    entry: &Entry,
    bytes: &mut [u8],
    enough: impl Fn(&[u8]) -> bool,
) -> Arrived {
    poll_fn(|cx| {
        entry.wake_on_change(cx);
        let is_enough = |bytes: &[u8]| {
            entry.received();
            enough(bytes)
        };
        if let Poll::Ready(length) = stream.poll_peek(cx, bytes, is_enough) {
            return Poll::Ready(match length {
                Ok(0) => Arrived::Gone,
                Ok(length) => Arrived::Bytes(length),
                Err(error) => {
                    debug!(peer = %entry.peer, %error, "connection failed");
                    Arrived::Gone
                }
            });
        }
        if entry.is_overdue() {
            return Poll::Ready(if entry.stage() == Stage::Head { Arrived::Late } else { Arrived::Idle });
        }
        if entry.is_to_rest() { Poll::Ready(Arrived::AtRest) } else { Poll::Pending }
    })
    .await
}
