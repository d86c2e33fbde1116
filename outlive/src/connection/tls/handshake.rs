//! Serves a connection of an https listener: performs the TLS handshake with rustls, or continues a connection with the
//! keys of an earlier handshake. A connection cannot be handed over during its handshake.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use tokio_rustls::rustls::SupportedCipherSuite;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::record_layer::RecordLayer;
use super::record_reader::{self, RecordAligned};
use crate::connection::io::{Io, Tls, Wire};
use crate::connection::{
    Connection, ConnectionContext, ConnectionOutcome, FirstBytes, Protocol, drive, first_bytes,
};
use crate::registry::{DriverHandle, Protocols, Registration, Stage};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::stream::Stream;
use crate::transport::tls_config::{self, Handshake};
use crate::transport::tls_traffic::{TlsTrafficState, Version};

/// The first byte of each TLS connection: the content type of a handshake record (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;
/// The response to a client that speaks HTTP without TLS.
const NOT_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n\
    content-length: 33\r\n\r\nThis port speaks TLS: https://\xe2\x80\xa6";

/// Serves a connection of an https listener until it closes or becomes quiescent.
pub(in crate::connection) async fn serve(
    mut connection: Connection<Stream>,
    registration: Registration,
    context: &ConnectionContext,
    tls: &tls_config::Tls,
) -> ConnectionOutcome {
    if let Some(session) = connection.tls.take() {
        return resume(connection, session, registration, context, tls).await;
    }
    let driver = registration.driver();
    let mut first = [0];
    let has_begun = |_: &[u8]| {
        driver.received();
        true
    };
    match first_bytes(&connection.socket, &driver, &mut first, has_begun).await {
        // Nothing of the handshake was consumed, so the next process performs it.
        FirstBytes::Quiescent => return ConnectionOutcome::Quiescent(connection, registration),
        FirstBytes::Bytes(_) if driver.phase().quiesces() && driver.state().is_movable() => {
            return ConnectionOutcome::Quiescent(connection, registration);
        }
        FirstBytes::Bytes(_) => {}
        FirstBytes::Late | FirstBytes::Idle | FirstBytes::Gone => return ConnectionOutcome::Closed,
    }
    driver.forbid_handover();
    if first != [HANDSHAKE] {
        let io = Io::new(Wire::Left(connection.socket), Bytes::new(), registration, Protocol::Http1);
        io.refuse(NOT_TLS).await;
        return ConnectionOutcome::Closed;
    }
    let Some((handshake, mut stream)) = perform_handshake(connection.socket, &driver, tls).await else {
        return ConnectionOutcome::Closed;
    };
    let (below, session) = stream.get_mut();
    let client = match handshake.client_certificate(session.peer_certificates()) {
        Ok(client) => client,
        // rustls has refused the other clients in the handshake.
        Err(refusal) => {
            debug!(peer = %driver.peer(), "closed a connection whose session was resumed: {refusal}");
            return ConnectionOutcome::Closed;
        }
    };
    let is_movable = client.as_ref().is_none_or(ClientCertificate::is_movable);
    if Version::negotiated(session.protocol_version()) == Some(Version::Tls12) {
        registration.require(Protocols::Tls12);
    }
    if tls.hands_over() && is_movable {
        driver.allow_handover();
    }
    if client.is_some() {
        registration.require(Protocols::CertificatesAndTables);
    }
    below.set_client(client);
    if let Some(SupportedCipherSuite::Tls12(suite)) = session.negotiated_cipher_suite() {
        // rustls closes the connection at its limit, even within a response, because TLS 1.2 has no KeyUpdate. Half of the
        // limit leaves room for the response in flight.
        below.limit_records(suite.common.confidentiality_limit / 2);
    }
    // The time limits of the first request begin after the handshake.
    driver.enter(Stage::Waiting);
    let protocol = if stream.get_ref().1.alpn_protocol() == Some(tls_config::HTTP2) {
        Protocol::Http2
    } else {
        Protocol::Http1
    };
    let io = Io::new(Wire::Right(Tls::Left(Box::new(stream))), Bytes::new(), registration, protocol);
    drive(io, protocol, None, None, connection.endpoint, context).await
}

/// Continues a connection whose handshake was performed by another process, or by this one before it was parked.
async fn resume(
    mut connection: Connection<Stream>,
    session: Box<TlsTrafficState>,
    registration: Registration,
    context: &ConnectionContext,
    tls: &tls_config::Tls,
) -> ConnectionOutcome {
    let driver = registration.driver();
    if !tls.hands_over() {
        driver.forbid_handover();
    }
    if session.client.is_some() {
        registration.require(Protocols::CertificatesAndTables);
    }
    if session.suite.version == Version::Tls12 {
        registration.require(Protocols::Tls12);
    }
    if !connection.has_endless_response() && connection.unread.is_empty() && session.unread.is_empty() {
        // The first byte of a record does not show whether a request begins.
        let has_input = |_: &[u8]| {
            driver.noticed_input();
            true
        };
        match first_bytes(&connection.socket, &driver, &mut [0], has_input).await {
            FirstBytes::Quiescent
                if !(driver.keeps_state() || connection.http2.is_some() && driver.keeps_http2()) =>
            {
                connection.tls = Some(session);
                return ConnectionOutcome::Quiescent(connection, registration);
            }
            FirstBytes::Quiescent | FirstBytes::Bytes(_) | FirstBytes::Late | FirstBytes::Idle => {}
            FirstBytes::Gone => return ConnectionOutcome::Closed,
        }
    }
    driver.enter(Stage::Waiting);
    let Connection { socket, endpoint, unread, http2, replay, .. } = connection;
    let protocol = if http2.is_some() { Protocol::Http2 } else { Protocol::Http1 };
    let records = RecordLayer::new(socket, *session);
    // As in `Io::note_written`.
    if records.is_near_key_limit() {
        driver.forbid_handover();
    }
    let io = Io::new(Wire::Right(Tls::Right(Box::new(records))), unread, registration, protocol);
    drive(io, protocol, http2, replay, endpoint, context).await
}

async fn perform_handshake(
    stream: Stream,
    driver: &DriverHandle,
    tls: &tls_config::Tls,
) -> Option<(Handshake, TlsStream<RecordAligned>)> {
    let (handshake, accept) = record_reader::accept(stream, tls);
    let mut accept = pin!(accept);
    let stream = poll_fn(|cx| {
        driver.wake_on_change(cx);
        match accept.as_mut().poll(cx) {
            Poll::Ready(Ok(stream)) => Poll::Ready(Some(stream)),
            Poll::Ready(Err(error)) => {
                debug!(peer = %driver.peer(), %error, "TLS handshake failed");
                Poll::Ready(None)
            }
            Poll::Pending if driver.is_overdue() => {
                debug!(peer = %driver.peer(), "TLS handshake timed out (--head-timeout)");
                Poll::Ready(None)
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await?;
    Some((handshake, stream))
}
