//! A connection on which an upgrade was offered and not granted stays an HTTP/1.1 connection, and is handed over like
//! any other.

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::routing::any;
use bytes::Bytes;
use hyper::header::UPGRADE;
use testkit::client::{Connection, Target, WEBSOCKET, get};

use super::tests::{move_to, serve};
use crate::registry::Phase;

fn router() -> Router {
    let granted = async |request: Request| {
        let protocol = request.headers()[UPGRADE].clone();
        tokio::spawn(async move { drop(hyper::upgrade::on(request).await) });
        (
            StatusCode::SWITCHING_PROTOCOLS,
            [("connection".to_owned(), "upgrade".to_owned())],
            [(UPGRADE, protocol)],
        )
    };
    Router::new()
        .route("/", any(|| async { "plain" }))
        .route("/error", any(|| async { StatusCode::INTERNAL_SERVER_ERROR }))
        .route("/body", any(|body: Bytes| async move { body }))
        .route("/granted", any(granted))
}

/// Requests that offer an upgrade, and the status of the response that declines it.
fn offers() -> Vec<(String, u16)> {
    let offer = |method: &str, path: &str, fields: &str, body: &str| {
        format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\n{fields}content-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let h2c = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAA\r\n";
    let long = format!("connection: upgrade\r\nupgrade: {}\r\n", "x".repeat(8 * 1024));
    let websocket = "connection: upgrade\r\nupgrade: websocket\r\n";
    vec![
        (offer("GET", "/", h2c, ""), 200),
        (offer("GET", "/", &long, ""), 200),
        (offer("GET", "/error", websocket, ""), 500),
        (offer("GET", "/missing", websocket, ""), 404),
        (offer("POST", "/body", h2c, "0123456789"), 200),
        ("CONNECT test:443 HTTP/1.1\r\nhost: test:443\r\n\r\n".to_owned(), 404),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_with_a_declined_upgrade_is_handed_over() {
    for (offer, status) in offers() {
        let served = serve(router()).await;
        let mut client = Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        // The second request replaces the pending upgrade of the first.
        for _ in 0..2 {
            assert_eq!(
                client.ask(offer.as_bytes()).await.expect("the server answers").status,
                status,
                "{offer}"
            );
        }
        let next = serve(router()).await;
        move_to(&next, served).await;
        assert_eq!(client.ask(&get("/")).await.expect("the server answers").text(), "plain", "{offer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_with_declined_upgrades_are_answered_before_a_handover() {
    let (offer, _) = &offers()[0];
    let served = serve(router()).await;
    let mut client = Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    client.send(offer.repeat(2).as_bytes()).await.expect("both requests are sent");
    for _ in 0..2 {
        assert_eq!(client.answer().await.expect("the server answers").text(), "plain");
    }
    let next = serve(router()).await;
    move_to(&next, served).await;
    assert_eq!(client.ask(&get("/")).await.expect("the server answers").text(), "plain");
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_is_handed_over_after_a_request_that_follows_a_declined_upgrade() {
    let (offer, _) = &offers()[0];
    let served = serve(router()).await;
    let mut client = Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    assert_eq!(client.ask(offer.as_bytes()).await.expect("the server answers").status, 200);
    assert_eq!(client.ask(&get("/")).await.expect("the server answers").status, 200);
    let next = serve(router()).await;
    move_to(&next, served).await;
    assert_eq!(client.ask(&get("/")).await.expect("the server answers").text(), "plain");
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_with_a_granted_upgrade_is_not_handed_over() {
    let served = serve(router()).await;
    let mut client = Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    let upgrade = String::from_utf8_lossy(WEBSOCKET).replace("/socket", "/granted");
    assert_eq!(client.ask(upgrade.as_bytes()).await.expect("the server answers").status, 101);
    // The handler drops the stream.
    assert_eq!(client.read_more().await.expect("the stream ends without an error"), 0);
    served.server.enter(Phase::Quiescing);
    assert_eq!(served.count_quiescent().await, 0);
}
