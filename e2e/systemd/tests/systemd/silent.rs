//! HTTP/2 clients that stop sending before their connection can be handed over. They receive GOAWAY, and the drain does
//! not wait for them until its limit.

use std::time::{Duration, Instant};

use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2};
use testkit::container::{Container, Systemd};
use testkit::http2_frames::{
    ACK, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PREFACE, SETTINGS, frame, next, next_that,
};
use testkit::{on_each_systemd, wait_until};

use crate::{boot_with_tls, tls_target};

/// A third of the drain limit of the unit. A drain that takes longer has waited for the limit.
const SOON: Duration = Duration::from_secs(10);

on_each_systemd! {
    restart_sends_goaway_to_silent_http2_clients_and_does_not_wait_for_them
    reload_sends_goaway_to_silent_http2_clients_and_does_not_wait_for_them
}

/// How far a client has come when it stops sending.
#[derive(Clone, Copy, Debug)]
enum Silence {
    /// It has connected, and over TLS completed the handshake with HTTP/2 as protocol.
    Connected,
    HalfPreface,
    /// It has sent the preface, but no SETTINGS.
    Preface,
    /// It has received a response, but has not acknowledged the SETTINGS of the server.
    Unacknowledged,
    /// It has received a response, and has sent the first part of a header block.
    HalfHeaders,
}

impl Silence {
    const ALL: [Self; 5] =
        [Self::Connected, Self::HalfPreface, Self::Preface, Self::Unacknowledged, Self::HalfHeaders];

    async fn begin(self, connection: &mut Connection) {
        let hello = [PREFACE, &frame(SETTINGS, 0, 0, b"")].concat();
        let get = frame(HEADERS, END_STREAM | END_HEADERS, 1, GET);
        match self {
            Self::Connected => {}
            Self::HalfPreface => connection.send(&PREFACE[..10]).await.expect("the bytes are sent"),
            Self::Preface => {
                connection.send(PREFACE).await.expect("the bytes are sent");
                read_until(connection, |frame| frame.kind == SETTINGS).await;
            }
            Self::Unacknowledged => {
                connection.send(&[hello, get].concat()).await.expect("the bytes are sent");
                read_until(connection, Frame::ends_stream).await;
            }
            Self::HalfHeaders => {
                connection.send(&hello).await.expect("the bytes are sent");
                read_until(connection, |frame| frame.kind == SETTINGS && frame.flags == 0).await;
                let acknowledged = frame(SETTINGS, ACK, 0, b"");
                let half = frame(HEADERS, END_STREAM, 3, GET);
                // In one write, so that a server that has answered stream 1 has also read the half block.
                connection.send(&[acknowledged, get, half].concat()).await.expect("the bytes are sent");
                read_until(connection, Frame::ends_stream).await;
            }
        }
    }

    /// Whether the connection can be handed over: without TLS nothing is consumed before the preface is complete.
    fn can_be_handed_over(self, is_tls: bool) -> bool {
        !is_tls && matches!(self, Self::Connected | Self::HalfPreface)
    }

    /// The remaining bytes of a request on a connection that was handed over.
    fn remaining_bytes(self) -> Vec<u8> {
        let sent = if matches!(self, Self::HalfPreface) { 10 } else { 0 };
        let settings = frame(SETTINGS, 0, 0, b"");
        [&PREFACE[sent..], &settings, &frame(HEADERS, END_STREAM | END_HEADERS, 1, GET)].concat()
    }

    /// The last stream of which the server has received a frame.
    fn last_stream(self) -> u32 {
        match self {
            Self::Connected | Self::HalfPreface | Self::Preface => 0,
            Self::Unacknowledged => 1,
            Self::HalfHeaders => 3,
        }
    }
}

/// The header block of a GET for /, with a dynamic table of size 0.
const GET: &[u8] = b"\x20\x82\x86\x84\x41\x01x";

async fn read_until(connection: &mut Connection, wanted: impl Fn(&Frame) -> bool) {
    let read = next_that(connection, |frame| frame.kind == GOAWAY || wanted(frame)).await;
    assert_ne!(read.kind, GOAWAY);
}

/// Reads to the end of the stream; returns the last stream id of each GOAWAY.
async fn goaways(connection: &mut Connection) -> Vec<u32> {
    let mut named = Vec::new();
    while let Some(frame) = next(connection).await {
        if frame.kind == GOAWAY {
            named.push(frame.last_stream());
        }
    }
    named
}

/// Runs `systemctl VERB` beside silent clients, and waits until the old process has exited.
fn check_silent_clients(systemd: Systemd, verb: &str) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let tls = tls_target(&certificate, "h2");
    container.inside(async || {
        let mut polite = Http2::open(&tls).await.expect("the connection is established");
        polite.get("/").await.expect("the request is answered").expect("the server sends no GOAWAY");
        let mut clients = Vec::new();
        for silence in Silence::ALL {
            for (is_tls, target) in [(false, &Container::target()), (true, &tls)] {
                let mut connection = Connection::open(target).await.expect("the connection is established");
                silence.begin(&mut connection).await;
                clients.push((silence, is_tls, connection));
            }
        }
        let old = container.show("MainPID").expect("systemctl show succeeds");
        let old = container.path("proc").join(old);
        let begun = Instant::now();
        container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
        wait_until("the old process exits", || !old.exists());
        let took = begun.elapsed();
        eprintln!("{verb}: the old process ended after {} ms", took.as_millis());
        assert!(took < SOON, "{took:?}");
        for (silence, is_tls, mut connection) in clients {
            if silence.can_be_handed_over(is_tls) {
                connection.send(&silence.remaining_bytes()).await.expect("the bytes are sent");
                read_until(&mut connection, Frame::ends_stream).await;
                continue;
            }
            let named = goaways(&mut connection).await;
            assert_eq!(named.last(), Some(&silence.last_stream()), "{silence:?}, TLS: {is_tls}: {named:?}");
        }
        let answer =
            polite.get("/").await.expect("the request is answered").expect("the server sends no GOAWAY");
        assert_eq!(answer.0, 200);
    });
}

fn restart_sends_goaway_to_silent_http2_clients_and_does_not_wait_for_them(systemd: Systemd) {
    check_silent_clients(systemd, "restart");
}

fn reload_sends_goaway_to_silent_http2_clients_and_does_not_wait_for_them(systemd: Systemd) {
    check_silent_clients(systemd, "reload");
}
