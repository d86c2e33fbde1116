//! Serves one connection from its first byte until it closes or becomes quiescent.
//!
//! [`serve`] chooses the protocol by the endpoint (`endpoint.rs`) and by the first bytes, and runs a driver: `http1.rs` or
//! `http2/mod.rs`. The driver polls hyper on an `Io` (`io.rs`), which reports to the registry what was read and
//! written; for TLS (`tls/`), `Io` encrypts and decrypts. hyper calls `exchange.rs` for each request. The result is a
//! [`ConnectionOutcome`]: `server/` parks a quiescent connection or hands it over. Connections of a socket that the
//! application claims speak its own protocol (`socket.rs`). On the listeners of `--proxy-protocol`, all of that follows a
//! PROXY header (`proxied.rs`).

mod body_chunks;
mod endpoint;
mod exchange;
mod http1;
mod http2;
mod io;
mod proxied;
#[cfg(test)]
mod proxied_tests;
mod resumable;
mod socket;
#[cfg(test)]
mod socket_tests;
#[cfg(test)]
pub mod tests;
pub mod tls;
#[cfg(test)]
mod unread_tests;
#[cfg(test)]
mod upgrade_tests;
mod upgraded;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

pub use endpoint::{Endpoint, EndpointKind};
pub use resumable::Connection;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::app::context::RequestContext;
use crate::app::process::Process;
use crate::registry::{DriverHandle, Registration, Stage};
use crate::requests::Proxies;
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::http2_state::Http2State;
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::replay::Replay;
use crate::transport::stream::{Peer, Stream};
use io::{Io, Wire};
use proxied::HeaderOutcome;
pub use upgraded::{ReturnPath, ReturnedConnection, ReturnedConnections, Succession};

/// What connections of every endpoint need to be served.
pub struct ConnectionContext {
    process: Process,
    shutdown: CancellationToken,
    /// How long a busy HTTP/2 connection may take to become quiescent; after that it receives GOAWAY.
    quiesce_limit: Duration,
    /// Where the handlers of upgraded connections give them back.
    return_path: ReturnPath,
    proxies: Arc<Proxies>,
}

impl ConnectionContext {
    /// Also returns the other end of the path on which the handlers of upgraded connections give them back.
    pub fn new(
        process: Process,
        shutdown: CancellationToken,
        quiesce_limit: Duration,
        proxies: Proxies,
    ) -> (Self, ReturnedConnections) {
        let (return_path, returned) = ReturnPath::new();
        let proxies = Arc::new(proxies);
        (Self { process, shutdown, quiesce_limit, return_path, proxies }, returned)
    }

    /// The hyper service of one connection.
    fn service(
        &self,
        endpoint: &Arc<Endpoint>,
        registration: &Registration,
        peer: Peer,
        client_certificate: Option<ClientCertificate>,
        replay: Option<Box<Replay>>,
    ) -> exchange::Service {
        let Self { process, shutdown, return_path, proxies, .. } = self;
        let shutdown = shutdown.clone();
        let context = RequestContext { process: *process, shutdown, peer, client_certificate };
        let requests = registration.requests();
        let proxies = proxies.report_clients_of(peer).then(|| proxies.clone());
        exchange::Service::new(endpoint.clone(), context, requests, return_path.clone(), replay, proxies)
    }
}

/// How the service of a connection ended.
pub enum ConnectionOutcome {
    Closed,
    /// Nothing is in flight and nothing is unsent: the connection can be parked or handed over.
    Quiescent(Connection<Stream>, Registration),
}

/// The connection preface: HTTP/2 clients send it first (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

/// How the wait for a connection's first bytes ended.
enum FirstBytes {
    /// So many bytes are readable. They were peeked at, not consumed.
    Bytes(usize),
    /// Some bytes arrived, but not all that were needed before the time limit.
    Late,
    /// No byte arrived before the time limit.
    Idle,
    /// The connection must become quiescent, and is, because no byte was consumed.
    Quiescent,
    /// The peer has closed the connection, or reading failed.
    Gone,
}

/// Serves `connection` until it closes or becomes quiescent.
pub async fn serve(
    mut connection: Connection<Stream>,
    registration: Registration,
    context: &ConnectionContext,
) -> ConnectionOutcome {
    match connection.client.as_deref() {
        None => {}
        Some(ProxiedClient::Reported(client)) => registration.identify(*client),
        Some(ProxiedClient::Awaited) => {
            let trusted = &context.proxies.trusted;
            // Boxed, so that other connections do not have the memory of the header.
            match Box::pin(proxied::read_header(&mut connection, &registration, trusted)).await {
                HeaderOutcome::Read => {}
                HeaderOutcome::Quiescent => return ConnectionOutcome::Quiescent(connection, registration),
                HeaderOutcome::Closed => return ConnectionOutcome::Closed,
            }
        }
    }
    let endpoint = connection.endpoint.clone();
    match &endpoint.kind {
        EndpointKind::Http | EndpointKind::Admin => serve_plain(connection, registration, context).await,
        EndpointKind::Https(tls) => {
            Box::pin(tls::handshake::serve(connection, registration, context, tls)).await
        }
        EndpointKind::Socket(handler) => {
            Box::pin(socket::serve(connection, registration, context, handler)).await;
            ConnectionOutcome::Closed
        }
    }
}

async fn serve_plain(
    connection: Connection<Stream>,
    registration: Registration,
    context: &ConnectionContext,
) -> ConnectionOutcome {
    let driver = registration.driver();
    let mut bytes = [0; PREFACE.len()];
    let is_resumed = connection.http2.is_some();
    let arrived = if connection.has_endless_response() {
        FirstBytes::Bytes(0)
    } else if connection.unread.is_empty() {
        let is_enough = |bytes: &[u8]| {
            if is_resumed {
                driver.noticed_input();
                return true;
            }
            driver.received();
            bytes.len() == PREFACE.len() || !PREFACE.starts_with(bytes)
        };
        first_bytes(&connection.socket, &driver, &mut bytes, is_enough).await
    } else {
        driver.received();
        FirstBytes::Bytes(0)
    };
    let protocol = match arrived {
        // A resumed connection is driven even if it was idle for too long or the next process does not adopt HTTP/2:
        // its client then receives GOAWAY.
        FirstBytes::Bytes(_) | FirstBytes::Late | FirstBytes::Idle if is_resumed => Protocol::Http2,
        FirstBytes::Quiescent if is_resumed && driver.keeps_http2() => Protocol::Http2,
        FirstBytes::Bytes(length) if &bytes[..length] == PREFACE => Protocol::Http2,
        // The HTTP/1.1 driver answers an incomplete head with 408, and closes.
        FirstBytes::Bytes(_) | FirstBytes::Late => Protocol::Http1,
        FirstBytes::Quiescent => return ConnectionOutcome::Quiescent(connection, registration),
        FirstBytes::Gone | FirstBytes::Idle => return ConnectionOutcome::Closed,
    };
    let Connection { socket, endpoint, unread, http2: state, replay, .. } = connection;
    let io = Io::new(Wire::Left(socket), unread, registration, protocol);
    // Boxed, so that a connection on which nothing has arrived takes little memory.
    Box::pin(drive(io, protocol, state, replay, endpoint, context)).await
}

/// Drives HTTP on `io` until the connection closes or becomes quiescent.
async fn drive(
    io: Io,
    protocol: Protocol,
    state: Option<Box<Http2State>>,
    replay: Option<Box<Replay>>,
    endpoint: Arc<Endpoint>,
    context: &ConnectionContext,
) -> ConnectionOutcome {
    let driver = io.registration().driver();
    let certificate = io.client_certificate().cloned();
    let service = context.service(&endpoint, io.registration(), driver.peer(), certificate, replay);
    let (parts, http2, unread, replay) = match protocol {
        Protocol::Http1 => match http1::drive(io, service, &driver).await {
            http1::Http1Outcome::Quiescent(parts, unread, replay) => (parts, None, unread, replay),
            http1::Http1Outcome::Closed => return ConnectionOutcome::Closed,
        },
        Protocol::Http2 => {
            let state = state.map(|state| *state);
            match http2::drive(io, state, service, &driver, context.quiesce_limit).await {
                http2::Http2Outcome::Quiescent(parts, state, unread) => (parts, Some(state), unread, None),
                http2::Http2Outcome::Closed => return ConnectionOutcome::Closed,
            }
        }
    };
    let io::Parts { stream, registration, tls, unread: behind } = parts;
    let (unread, has_duplicate) = (io::join(unread, behind), stream.has_duplicate());
    let client = proxied::reported(&registration);
    ConnectionOutcome::Quiescent(
        Connection { socket: stream, endpoint, unread, http2, tls, replay, has_duplicate, client },
        registration,
    )
}

/// Waits until the first bytes are `enough` to decide on. Consumes none of them, so that the connection can still be
/// parked or handed over. `enough` reports to `driver` whether they begin a request; if they do, its time limit applies.
async fn first_bytes(
    stream: &Stream,
    driver: &DriverHandle,
    bytes: &mut [u8],
    enough: impl Fn(&[u8]) -> bool,
) -> FirstBytes {
    poll_fn(|cx| {
        driver.wake_on_change(cx);
        if let Poll::Ready(length) = stream.poll_peek(cx, bytes, &enough) {
            return Poll::Ready(match length {
                Ok(0) => FirstBytes::Gone,
                Ok(length) => FirstBytes::Bytes(length),
                Err(error) => {
                    debug!(peer = %driver.peer(), %error, "connection failed");
                    FirstBytes::Gone
                }
            });
        }
        if driver.is_overdue() {
            return Poll::Ready(if driver.stage() == Stage::Head {
                FirstBytes::Late
            } else {
                FirstBytes::Idle
            });
        }
        // A connection that cannot move has to wait here for its last request: no other process would answer it.
        let must_leave = driver.must_quiesce() && driver.state().is_movable();
        if must_leave { Poll::Ready(FirstBytes::Quiescent) } else { Poll::Pending }
    })
    .await
}
