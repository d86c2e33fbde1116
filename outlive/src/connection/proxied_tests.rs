//! Connections that begin with a PROXY header, to servers in this process. Tests with several processes are in
//! `tests/proxies.rs`.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use futures_util::FutureExt;
use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::tests::{Served, endpoint, move_to, serve_behind};
use super::{Endpoint, EndpointKind};
use crate::app::carry::Carry;
use crate::app::sockets::SocketStream;
use crate::observe::metrics;
use crate::registry::Stage;
use crate::requests::{Proxies, RequestLimits};
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::proxy_header::{LENGTH_LIMIT, Refusal};
use crate::transport::proxy_tests::{v1, v2};
use crate::transport::stream::Peer;
use crate::transport::tls_config::Tls;
use crate::transport::tls_tests::tls_of;
use crate::transport::trusted_proxies::TrustedProxies;

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";
/// A header of version 2 of a proxy that connects for itself.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

fn client() -> Peer {
    Peer::tcp([192, 0, 2, 7].into(), 4711)
}

/// The address of the client, as the router and the socket below answer it.
const CLIENT: &str = "192.0.2.7:4711";

/// Serves the address of the client behind the proxies of one network, on a free port until the end of the test.
async fn serve_trusting(network: &str, kind: EndpointKind) -> Served {
    let application = Router::new().route("/", get(async |peer: Peer| peer.to_string()));
    let Endpoint { name, routes, .. } = &*endpoint(application, None);
    let (name, routes) = (name.clone(), routes.clone());
    let endpoint = Endpoint::new(name, kind, routes, Some(ProxiedClient::Awaited));
    let trusted = TrustedProxies(vec![network.parse().expect("the network is valid")]);
    serve_behind(Arc::new(endpoint), Proxies { trusted, ..Proxies::default() }).await
}

async fn serve() -> Served {
    serve_trusting("127.0.0.0/8", EndpointKind::Http).await
}

async fn serve_tls(tls: Tls) -> Served {
    serve_trusting("127.0.0.0/8", EndpointKind::Https(tls)).await
}

/// Answers each byte with the address of the client, in a line.
async fn serve_socket() -> Served {
    let answer = async |mut stream: SocketStream, carry: Carry<()>| loop {
        tokio::select! {
            read = stream.read_u8() => {
                read?;
                let line = format!("{}\n", stream.peer());
                stream.write_all(line.as_bytes()).await?;
            }
            () = carry.requested() => {
                carry.hand_on(&());
                return Ok(());
            }
        }
    };
    let handler = move |stream, continuation, shutdown| {
        answer(stream, Carry::of_socket(continuation, shutdown)).boxed()
    };
    serve_trusting("127.0.0.0/8", EndpointKind::Socket(Arc::new(handler))).await
}

async fn answers(connection: &mut Connection, expected: &str, what: &str) {
    let answer = timeout(PATIENCE, connection.answer()).await.expect("the answer arrives in time");
    let answer = answer.unwrap_or_else(|error| panic!("{what}: {error:#}"));
    assert_eq!((answer.status, answer.text()), (200, expected.to_owned()), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn header_cut_at_any_byte_by_a_handover_is_read_by_the_next_process() {
    let mut served = serve().await;
    let mut clients = Vec::new();
    for header in [v1(client()), v2(client(), b"\x04\0\x01x")] {
        for cut in 0..=header.len() {
            let first = Connection::open(&Target::Tcp(served.address)).await;
            let mut connection = first.expect("the server accepts");
            connection.send(&header[..cut]).await.expect("the first part is sent");
            clients.push((connection, [&header[cut..], REQUEST].concat(), cut));
        }
    }
    served.until_connections(clients.len()).await;
    for _ in 0..2 {
        let next = serve().await;
        move_to(&next, served).await;
        served = next;
    }
    for (connection, rest, cut) in &mut clients {
        connection.send(rest).await.expect("the rest is sent");
        answers(connection, CLIENT, &format!("cut at {cut}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_of_a_connection_in_use_is_kept_when_the_connection_moves() {
    let certificate = Certificate::new().expect("openssl makes a certificate");
    for header in [v1(client()), v2(client(), b"")] {
        let served = serve().await;
        let target = Target::Behind(header.clone(), Target::Tcp(served.address).into());
        let mut http1 = Connection::open(&target).await.expect("the server accepts");
        let mut http2 = Http2::open(&target).await.expect("the server accepts");
        let next = serve().await;
        asks_before_and_after_a_move(&mut http1, &mut http2, served, &next).await;

        let served = serve_tls(tls_of(&certificate)).await;
        let target = |protocol| {
            let client = certificate.client(&[protocol]).expect("a client configuration");
            Target::Behind(header.clone(), Target::Tls(served.address, client).into())
        };
        let mut http1 = Connection::open(&target("http/1.1")).await.expect("the server accepts");
        let mut http2 = Http2::open(&target("h2")).await.expect("the server accepts");
        let next = serve_tls(tls_of(&certificate)).await;
        asks_before_and_after_a_move(&mut http1, &mut http2, served, &next).await;
    }
}

async fn asks_before_and_after_a_move(
    http1: &mut Connection,
    http2: &mut Http2,
    served: Served,
    next: &Served,
) {
    let mut served = Some(served);
    for what in ["before the move", "after the move"] {
        http1.send(REQUEST).await.expect("the request is sent");
        answers(http1, CLIENT, what).await;
        let answer = timeout(PATIENCE, http2.get("/")).await.expect("the answer arrives in time");
        let (status, body) = answer.expect("the server answers").expect("the server sends no GOAWAY");
        assert_eq!((status, &body[..]), (200, CLIENT), "{what}");
        if let Some(served) = served.take() {
            move_to(next, served).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn handler_of_a_socket_has_the_client_of_the_header_before_and_after_moves() {
    let mut served = serve_socket().await;
    let mut stream = TcpStream::connect(served.address).await.expect("the server accepts");
    let header = v2(client(), b"");
    stream.write_all(&header[..20]).await.expect("the first part is sent");
    served.until_connections(1).await;
    for part in [&header[20..], b""] {
        let next = serve_socket().await;
        move_to(&next, served).await;
        served = next;
        stream.write_all(&[part, b"x"].concat()).await.expect("the rest is sent");
        let mut line = [0; CLIENT.len() + 1];
        let read = timeout(PATIENCE, stream.read_exact(&mut line)).await.expect("in time");
        read.expect("the connection is open");
        assert_eq!(line[..CLIENT.len()], *CLIENT.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn header_without_a_client_leaves_the_address_of_the_proxy() {
    for header in [LOCAL, b"PROXY UNKNOWN\r\n"] {
        let served = serve().await;
        let stream = TcpStream::connect(served.address).await.expect("the server accepts");
        let proxy = stream.local_addr().expect("the socket has an address").to_string();
        let (mut reader, mut writer) = stream.into_split();
        writer.write_all(&[header, REQUEST].concat()).await.expect("the request is sent");
        let mut answer = vec![0; 4096];
        let length = timeout(PATIENCE, reader.read(&mut answer)).await.expect("in time").expect("it is open");
        let text = String::from_utf8_lossy(&answer[..length]);
        assert!(text.ends_with(&format!("\r\n\r\n{proxy}")), "{text}");
    }
}

/// The connections have one peer, the proxy, which reports another client in each.
#[tokio::test(flavor = "multi_thread")]
async fn limit_of_requests_per_client_applies_to_the_clients_that_a_proxy_reports() {
    let pending = Router::new().route("/pending", get(std::future::pending::<()>));
    let Endpoint { name, routes, .. } = &*endpoint(pending.route("/", get("answer")), None);
    let limits = RequestLimits::new(None, NonZeroU32::new(1));
    let (name, routes) = (name.clone(), routes.clone().limited_by(limits));
    let endpoint = Endpoint::new(name, EndpointKind::Http, routes, None);
    let trusted = TrustedProxies(vec!["127.0.0.1".parse().expect("the address is valid")]);
    let served = serve_behind(Arc::new(endpoint), Proxies { trusted, ..Proxies::default() }).await;
    let request = |path, client| {
        format!("GET {path} HTTP/1.1\r\nhost: test\r\nx-forwarded-for: {client}\r\n\r\n").into_bytes()
    };
    let open = async || Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    let mut first = open().await;
    first.send(&request("/pending", "192.0.2.7")).await.expect("the request is sent");
    served.until_stage(Stage::InFlight).await;
    let mut second = open().await;
    for (client, status) in [("192.0.2.7", 503), ("192.0.2.8", 200)] {
        let answer = second.ask(&request("/", client)).await.expect("the server answers");
        assert_eq!(answer.status, status, "{client}");
    }
}

/// Whether the server closes the connection, with or without a reset, and sends nothing.
async fn is_closed(stream: &mut TcpStream) {
    let mut answer = Vec::new();
    let end = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection ends in time");
    assert!(end.is_err() || answer.is_empty(), "{answer:?}");
}

/// All refusals are in one test, because the counters are shared by all tests of the process.
#[tokio::test(flavor = "multi_thread")]
async fn connection_without_an_acceptable_header_is_closed_and_counted() {
    let refusals =
        |refusal: Refusal| metrics::PROXY_HEADERS_REFUSED.with_label_values(&[refusal.label()]).get();
    let valid = [v2(client(), b""), REQUEST.to_vec()].concat();
    let too_long = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"[..], &vec![0; LENGTH_LIMIT]].concat();
    for (network, bytes, refusal) in [
        ("192.0.2.0/24", valid, Refusal::Untrusted),
        ("127.0.0.0/8", REQUEST.to_vec(), Refusal::Missing),
        ("127.0.0.0/8", b"PROXY TCP4 x\r\n".to_vec(), Refusal::Invalid),
        ("127.0.0.0/8", too_long, Refusal::TooLong),
    ] {
        let served = serve_trusting(network, EndpointKind::Http).await;
        let before = refusals(refusal);
        let mut stream = TcpStream::connect(served.address).await.expect("the server accepts");
        // The server may have closed the connection before.
        let _ = stream.write_all(&bytes).await;
        is_closed(&mut stream).await;
        served.until_connections(0).await;
        assert_eq!(refusals(refusal) - before, 1, "{refusal:?}");
    }
    let served = serve().await;
    let before = refusals(Refusal::Truncated);
    let mut stream = TcpStream::connect(served.address).await.expect("the server accepts");
    stream.write_all(b"PROXY TCP4").await.expect("the beginning is sent");
    stream.shutdown().await.expect("the direction is closed");
    is_closed(&mut stream).await;
    assert_eq!(refusals(Refusal::Truncated) - before, 1);
    for beginning in [&b""[..], b"PROXY TCP4"] {
        let before = refusals(Refusal::Late);
        let mut stream = TcpStream::connect(served.address).await.expect("the server accepts");
        stream.write_all(beginning).await.expect("the beginning is sent");
        served.until_stage(Stage::Head).await;
        served.registry().advance(PATIENCE);
        is_closed(&mut stream).await;
        assert_eq!(refusals(Refusal::Late) - before, 1, "{beginning:?}");
    }
    let before = refusals(Refusal::Late);
    let mut stream = TcpStream::connect(served.address).await.expect("the server accepts");
    served.until_stage(Stage::Head).await;
    let next = serve().await;
    move_to(&next, served).await;
    next.until_stage(Stage::Head).await;
    next.registry().advance(PATIENCE);
    is_closed(&mut stream).await;
    assert_eq!(refusals(Refusal::Late) - before, 1, "the limit applies in the next process too");
}
