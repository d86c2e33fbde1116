//! TLS on one connection. From the handshake on it cannot move: what it is encrypted with stays here.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::io::{Io, Wire};
use super::{Arrived, End, Protocol, Services, first_bytes, http1, http2};
use crate::registry::{Entry, Phase, Registration, Stage};
use crate::stream::{Connection, Stream};
use crate::tls;

/// What every TLS connection begins with: the type of a handshake record (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;
/// The answer to whoever speaks HTTP without TLS.
const NOT_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n\
    content-length: 33\r\n\r\nThis port speaks TLS: https://\xe2\x80\xa6";

/// Serves a connection of an https listener until it closes, or, where it has not begun, comes to rest.
pub(super) async fn serve(
    connection: Connection,
    registration: Registration,
    services: &Services,
    tls: &TlsAcceptor,
) -> End {
    let entry = registration.entry.clone();
    let mut first = [0];
    match first_bytes(&connection.stream, &entry, &mut first, |_| true).await {
        // The next process shakes hands.
        Arrived::AtRest => return End::AtRest(connection, registration),
        Arrived::Bytes(_) if entry.phase() == Phase::Resting => {
            return End::AtRest(connection, registration);
        }
        Arrived::Bytes(_) => {}
        Arrived::Late | Arrived::Idle | Arrived::Gone => return End::Closed,
    }
    entry.pin();
    if first != [HANDSHAKE] {
        let io = Io::new(Wire::Left(connection.stream), Bytes::new(), registration, Protocol::Http1);
        io.refuse(NOT_TLS).await;
        return End::Closed;
    }
    let Some(stream) = shake_hands(connection.stream, &entry, tls).await else { return End::Closed };
    // The time for a request counts from here.
    entry.enter(Stage::Waiting);
    let protocol = if stream.get_ref().1.alpn_protocol() == Some(tls::HTTP2) {
        Protocol::Http2
    } else {
        Protocol::Http1
    };
    let io = Io::new(Wire::Right(Box::new(stream)), Bytes::new(), registration, protocol);
    let service = services.service(&services.routes, &entry);
    match protocol {
        Protocol::Http2 => {
            http2::drive(io, None, service, &entry, services.rest_limit).await;
        }
        Protocol::Http1 => {
            http1::drive(io, service, &entry).await;
        }
    }
    End::Closed
}

async fn shake_hands(stream: Stream, entry: &Entry, tls: &TlsAcceptor) -> Option<TlsStream<Stream>> {
    let mut handshake = pin!(tls.accept(stream));
    poll_fn(|cx| {
        entry.wake_on_change(cx);
        match handshake.as_mut().poll(cx) {
            Poll::Ready(Ok(stream)) => Poll::Ready(Some(stream)),
            Poll::Ready(Err(error)) => {
                debug!(peer = %entry.peer, %error, "no TLS");
                Poll::Ready(None)
            }
            Poll::Pending if entry.is_overdue() => {
                debug!(peer = %entry.peer, "no TLS: the handshake took too long");
                Poll::Ready(None)
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
