//! Two HTTP/1.1 requests, of which the second arrives in two parts, split at each byte. Both are answered, whether the
//! connection is parked or handed over between the parts, with and without TLS.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use testkit::certificate::Certificate;
use testkit::client::{Connection, Target};
use tokio::time::timeout;

use super::tests::{Served, move_to, serve_with};
use crate::registry::Stage;
use crate::transport::tls_tests::tls_of;
use crate::transport::tls_traffic::Version;

/// Longer than an idle connection stays unparked.
pub const IDLE: Duration = Duration::from_secs(3);
/// How long a test waits for an event before it fails.
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const FIRST: &[u8] = b"GET /first HTTP/1.1\r\nhost: test\r\n\r\n";
pub const SECOND: &[u8] = b"GET /second HTTP/1.1\r\nhost: test\r\n\r\n";

/// What happens to the connections while the second part of the request is missing.
#[derive(Clone, Copy, Debug)]
enum Pause {
    /// The connections are idle for so long that they are parked if they can be.
    Idle,
    /// The connections are handed over to the next process.
    Handover,
}

use Pause::{Handover, Idle};

/// Sequences of pauses between the two parts.
const PAUSES: [&[Pause]; 6] =
    [&[], &[Idle], &[Idle, Idle], &[Handover], &[Idle, Handover], &[Handover, Idle, Handover, Idle]];

pub fn router() -> Router {
    Router::new().route("/first", get("first")).route("/second", get("second"))
}

/// The address of the server, for a client that speaks TLS if there is a certificate.
pub fn target(served: &Served, certificate: Option<&Certificate>) -> Target {
    match certificate {
        Some(certificate) => {
            Target::Tls(served.address, certificate.client(&["http/1.1"]).expect("a client configuration"))
        }
        None => Target::Tcp(served.address),
    }
}

/// Polls until `done`.
pub async fn wait_until(what: &str, done: impl Fn() -> bool) {
    let reached = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("timed out waiting until {what}"));
}

/// Advances the clock, and waits until each connection is parked or waits for the remainder of a head.
async fn idle(served: &Served, parked: usize) {
    let registry = served.registry();
    let all_are_at =
        |stages: &[Stage]| registry.entries().iter().all(|entry| stages.contains(&entry.stage()));
    // A connection becomes idle at the end of its driver's poll, which may be after the client has received the
    // response.
    wait_until("all are idle", || all_are_at(&[Stage::Waiting, Stage::Head])).await;
    registry.advance(IDLE);
    wait_until("the idle connections are parked", || {
        registry.parked() == parked && all_are_at(&[Stage::Head])
    })
    .await;
}

async fn answers_both_requests(pauses: &[Pause], tls: Option<(&Certificate, Version)>) {
    let certificate = tls.map(|(certificate, _)| certificate);
    let of_server = || certificate.map(tls_of);
    let mut served = serve_with(router(), of_server()).await;
    let target = match tls {
        Some((certificate, Version::Tls12)) => {
            let client = certificate.client_over_tls12(None, &["http/1.1"]);
            Target::Tls(served.address, client.expect("a client configuration"))
        }
        _ => target(&served, certificate),
    };
    let mut clients = Vec::new();
    for cut in 0..SECOND.len() {
        let mut client = Connection::open(&target).await.expect("the server accepts");
        client.send(&[FIRST, &SECOND[..cut]].concat()).await.expect("the first part is sent");
        clients.push((cut, client));
    }
    for (cut, client) in &mut clients {
        let answer = timeout(PATIENCE, client.answer()).await.expect("the first answer arrives in time");
        assert_eq!(answer.expect("the server answers").text(), "first", "{pauses:?}, cut at {cut}");
    }
    for pause in pauses {
        match pause {
            // Only the connection that is cut at 0 is between two requests, so only that one is parked.
            Idle => idle(&served, 1).await,
            Handover => {
                let next = serve_with(router(), of_server()).await;
                move_to(&next, served).await;
                served = next;
            }
        }
    }
    for (cut, client) in &mut clients {
        client.send(&SECOND[*cut..]).await.expect("the second part is sent");
        let answer = timeout(PATIENCE, client.answer()).await.expect("the second answer arrives in time");
        let answer = answer.unwrap_or_else(|error| panic!("{pauses:?}, cut at {cut}: {error:#}"));
        assert_eq!((answer.status, answer.text()), (200, "second".to_owned()), "{pauses:?}, cut at {cut}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_split_at_any_byte_is_answered_after_parking_and_handover() {
    for pauses in PAUSES {
        answers_both_requests(pauses, None).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_split_at_any_byte_is_answered_over_tls_after_parking_and_handover() {
    let certificate = Arc::new(Certificate::new().expect("openssl makes a certificate"));
    for pauses in PAUSES {
        for version in [Version::Tls12, Version::Tls13] {
            answers_both_requests(pauses, Some((&certificate, version))).await;
        }
    }
}

/// hyper reads the remainder of the body after the response. It must not be taken for a head, which would be answered with 408
/// at the head limit.
#[tokio::test(flavor = "multi_thread")]
async fn connection_is_idle_after_a_body_that_the_handler_left() {
    /// More than hyper reads together with the head.
    const LENGTH: usize = 12_000;
    let served = serve_with(router(), None).await;
    let left = format!("POST /first HTTP/1.1\r\nhost: test\r\ncontent-length: {LENGTH}\r\n\r\n");
    let left = [left.as_bytes(), &[b'x'; LENGTH]].concat();
    let mut clients = Vec::new();
    for cut in [0, 10] {
        let mut client = Connection::open(&target(&served, None)).await.expect("the server accepts");
        client.send(&[&left, &SECOND[..cut]].concat()).await.expect("the first part is sent");
        assert_eq!(client.answer().await.expect("the server answers").status, 405);
        clients.push((cut, client));
    }
    // Only the connection that is cut at 0 is between two requests.
    idle(&served, 1).await;
    for (cut, client) in &mut clients {
        client.send(&SECOND[*cut..]).await.expect("the second part is sent");
        assert_eq!(client.answer().await.expect("the server answers").text(), "second", "cut at {cut}");
    }
}
