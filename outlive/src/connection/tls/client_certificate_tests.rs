//! Certificates of clients, with servers in this process: they stay with their connections, and neither a session ticket nor
//! a handover lets a client in that the listener would refuse. Tests with several processes are in
//! `e2e/process/tests/process/client_certificates.rs`.

use std::sync::Arc;

use axum::Router;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::{any, get};
use testkit::certificate::{Authority, Certificate};
use testkit::client::{Connection, Http2, Target, WEBSOCKET};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::{ClientConfig, HandshakeKind};

use crate::app::carry::Carry;
use crate::connection::tests::{Served, serve_with};
use crate::connection::unread_tests::{IDLE, PATIENCE, wait_until};
use crate::handover::{MessageType, Next, Origin, pack, pair, receive_frame, send_frames, unpack};
use crate::registry::{Phase, Protocols, Stage};
use crate::transport::client_auth::ClientAuth;
use crate::transport::client_auth::ClientAuth::{Optional, Required};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::tls_config::Tls;
use crate::transport::tls_tests::{material_for, tls_for, tls_of};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";

/// A server certificate, and a client whose certificate an authority has issued.
struct Parties {
    server: Certificate,
    authority: Authority,
    client: Certificate,
}

impl Parties {
    fn new() -> Self {
        let authority = Authority::new("CA").expect("openssl runs");
        let client = authority.issue("/CN=shop", "URI:spiffe://example.org/shop").expect("openssl runs");
        Self { server: Certificate::new().expect("openssl runs"), authority, client }
    }

    fn tls(&self, auth: ClientAuth) -> Tls {
        tls_for(&self.server, Some((auth, &self.authority)))
    }

    /// As [`Self::config`], with TLS 1.2 only.
    fn config_over_tls12(&self, protocol: &str, has_certificate: bool) -> Arc<ClientConfig> {
        let identity = has_certificate.then_some(&self.client);
        self.server.client_over_tls12(identity, &[protocol]).expect("the client configuration is valid")
    }

    /// A client that presents its certificate, if `has_certificate`.
    fn config(&self, protocol: &str, has_certificate: bool) -> Arc<ClientConfig> {
        let config = if has_certificate {
            self.server.client_as(&self.client, &[protocol])
        } else {
            self.server.client(&[protocol])
        };
        config.expect("the client configuration is valid")
    }

    fn target(&self, served: &Served, protocol: &str, has_certificate: bool) -> Target {
        Target::Tls(served.address, self.config(protocol, has_certificate))
    }
}

/// Answers with the names of the client's certificate.
async fn serve(tls: Tls) -> Served {
    let answer = async |certificate: Option<ClientCertificate>| match certificate {
        Some(certificate) => {
            let uris: Vec<_> = certificate.uris().collect();
            format!("{} {}", certificate.common_name().unwrap_or("-"), uris.join(" "))
        }
        None => "none".to_owned(),
    };
    let strict = async |certificate: ClientCertificate| certificate.common_name().unwrap_or("-").to_owned();
    let routes = Router::new().route("/", get(answer)).route("/strict", get(strict));
    serve_with(routes.route("/socket", any(greet)), Some(tls)).await
}

/// Sends the name of the client, in each process again.
async fn greet(certificate: ClientCertificate, carry: Carry<()>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async move |mut socket| {
        let name = certificate.common_name().unwrap_or("-").to_owned();
        socket.send(Message::text(name)).await.expect("the client reads");
        carry.requested().await;
        carry.hand_on(&());
    })
}

const NAMES: &str = "shop spiffe://example.org/shop";

async fn asks(connection: &mut Connection) -> (u16, String) {
    let answer = timeout(PATIENCE, connection.ask(REQUEST)).await.expect("the answer arrives in time");
    let answer = answer.expect("the server answers");
    (answer.status, answer.text())
}

/// Hands all connections over to `next` as to another process, through a handover channel.
async fn move_to(next: &Served, served: Served) {
    served.server.enter(Phase::Quiescing);
    let connections = served.take_quiescent().await;
    let (ours, theirs) = pair().expect("a channel is made");
    let sent = send_frames(&ours, MessageType::Connections, Origin::now(1), &pack(&connections), "");
    assert!(sent.1.is_none(), "{sent:?}");
    let Ok(Next::Frame(frame)) = receive_frame(&theirs) else { panic!("no frame") };
    for (socket, record) in frame.sockets {
        next.server.adopt(unpack(socket, record, next.server.endpoints()).expect("it is adopted"));
    }
}

async fn park_all(served: &Served, count: usize) {
    let registry = served.registry();
    wait_until("all are idle", || registry.entries().iter().all(|entry| entry.stage() == Stage::Waiting))
        .await;
    wait_until("all are parked", || {
        if registry.entries().iter().any(|entry| !entry.is_parkable()) {
            registry.advance(IDLE);
        }
        registry.parked() == count
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_stays_with_its_connection_when_it_is_parked_and_moves() {
    let parties = Parties::new();
    for auth in [Optional, Required] {
        let mut served = serve(parties.tls(auth)).await;
        let mut clients = Vec::new();
        for config in [Parties::config, Parties::config_over_tls12] {
            let target = |protocol| Target::Tls(served.address, config(&parties, protocol, true));
            let http1 = Connection::open(&target("http/1.1")).await.expect("it is accepted");
            clients.push((http1, Http2::open(&target("h2")).await.expect("it is accepted")));
        }
        for is_parked in [false, true, false] {
            if is_parked {
                park_all(&served, 4).await;
            }
            for (http1, http2) in &mut clients {
                for _ in 0..2 {
                    assert_eq!(asks(http1).await, (200, NAMES.to_owned()));
                    let answer = http2.get("/").await.expect("the server answers");
                    assert_eq!(answer, Some((200, NAMES.to_owned())));
                }
            }
            let next = serve(parties.tls(auth)).await;
            move_to(&next, served).await;
            served = next;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_without_a_certificate_is_refused_where_it_is_required() {
    let parties = Parties::new();
    let served = serve(parties.tls(Required)).await;
    for protocol in ["http/1.1", "h2"] {
        // In TLS 1.3 the client has completed the handshake before the server sees that there is no certificate.
        if let Ok(mut connection) = Connection::open(&parties.target(&served, protocol, false)).await {
            timeout(PATIENCE, connection.ask(REQUEST)).await.expect("in time").expect_err("an answer");
        }
    }
    let other = Authority::new("other").and_then(|other| other.issue("/CN=shop", "DNS:shop"));
    let other = other.expect("openssl runs");
    let config = parties.server.client_as(&other, &["http/1.1"]).expect("the client configuration is valid");
    for auth in [Optional, Required] {
        let served = serve(parties.tls(auth)).await;
        if let Ok(mut connection) = Connection::open(&Target::Tls(served.address, config.clone())).await {
            timeout(PATIENCE, connection.ask(REQUEST)).await.expect("in time").expect_err("an answer");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_without_a_certificate_is_answered_with_403_by_a_handler_that_needs_one() {
    let parties = Parties::new();
    let served = serve(parties.tls(Optional)).await;
    let connection = Connection::open(&parties.target(&served, "http/1.1", false)).await;
    let mut connection = connection.expect("it is accepted");
    assert_eq!(asks(&mut connection).await, (200, "none".to_owned()));
    let answer = connection.ask(b"GET /strict HTTP/1.1\r\nhost: test\r\n\r\n").await.expect("an answer");
    assert_eq!((answer.status, answer.text()), (403, "this request needs a client certificate\n".to_owned()));
}

/// Sends a request with a client that keeps its sessions. Returns the kind of the handshake and the body; None if the
/// connection is closed without an answer.
async fn ask_with(config: &Arc<ClientConfig>, served: &Served) -> Option<(HandshakeKind, String)> {
    let stream = TcpStream::connect(served.address).await.expect("the server listens");
    let name = "localhost".try_into().expect("the name is valid");
    let mut stream = TlsConnector::from(config.clone()).connect(name, stream).await.ok()?;
    let kind = stream.get_ref().1.handshake_kind().expect("the handshake is complete");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await.ok()?;
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("in time").ok()?;
    Some((kind, answer.split_once("\r\n\r\n")?.1.to_owned()))
}

fn resuming(config: &ClientConfig) -> Arc<ClientConfig> {
    let mut config = config.clone();
    config.resumption = Resumption::in_memory_sessions(16);
    Arc::new(config)
}

#[tokio::test(flavor = "multi_thread")]
async fn resumed_session_has_the_certificate_of_its_first_handshake() {
    let parties = Parties::new();
    for auth in [Optional, Required] {
        let served = serve(parties.tls(auth)).await;
        for config in [Parties::config, Parties::config_over_tls12] {
            let config = resuming(&config(&parties, "http/1.1", true));
            for kind in [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed] {
                assert_eq!(ask_with(&config, &served).await, Some((kind, NAMES.to_owned())));
            }
        }
    }
}

/// All listeners of a process, and those of the next one, have the same ticket keys.
#[tokio::test(flavor = "multi_thread")]
async fn ticket_of_a_listener_with_another_policy_or_authority_does_not_let_a_client_in() {
    let parties = Parties::new();
    let other = Authority::new("other").expect("openssl runs");
    let mut material = material_for(&parties.server, Some(&parties.authority));
    let mut others = material_for(&parties.server, Some(&other));
    let required = others.tls(Some(Required)).expect("a configuration");
    let keys = material.tls(None).expect("a configuration").tickets().expect("they are handed over").encode();
    assert!(required.tickets().expect("they are handed over").adopt_keys(&keys));
    let required_by_others = serve(required).await;
    let required = serve(material.tls(Some(Required)).expect("a configuration")).await;
    for auth in [None, Some(Optional)] {
        let open = serve(material.tls(auth).expect("a configuration")).await;
        for config in [Parties::config, Parties::config_over_tls12] {
            let config = resuming(&config(&parties, "http/1.1", false));
            for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
                assert_eq!(ask_with(&config, &open).await, Some((kind, "none".to_owned())), "{auth:?}");
            }
            assert_eq!(ask_with(&config, &required).await, None, "{auth:?}");
        }
    }
    for config in [Parties::config, Parties::config_over_tls12] {
        let config = resuming(&config(&parties, "http/1.1", true));
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            assert_eq!(ask_with(&config, &required).await, Some((kind, NAMES.to_owned())));
        }
        assert_eq!(ask_with(&config, &required_by_others).await, None);
    }
}

/// The next process has the ticket keys of the one before.
#[tokio::test(flavor = "multi_thread")]
async fn ticket_of_the_previous_process_resumes_a_session_with_its_certificate() {
    let parties = Parties::new();
    for auth in [None, Some(Optional), Some(Required)] {
        let tls = || auth.map_or_else(|| tls_of(&parties.server), |auth| parties.tls(auth));
        let (before, after) = (tls(), tls());
        let keys = before.tickets().expect("they are handed over").encode();
        assert!(after.tickets().expect("they are handed over").adopt_keys(&keys));
        let (before, after) = (serve(before).await, serve(after).await);
        let names = if auth.is_some() { NAMES } else { "none" };
        for config in [Parties::config, Parties::config_over_tls12] {
            let config = resuming(&config(&parties, "http/1.1", true));
            for (served, kind) in [(&before, HandshakeKind::Full), (&after, HandshakeKind::Resumed)] {
                assert_eq!(ask_with(&config, served).await, Some((kind, names.to_owned())), "{auth:?}");
            }
        }
    }
}

/// Whether a connection ends without an answer to a request, or with 403 and `Connection: close`.
async fn is_refused(connection: &mut Connection) -> bool {
    match timeout(PATIENCE, connection.ask(REQUEST)).await.expect("in time") {
        Ok(answer) => answer.status == 403 && answer.closes(),
        Err(_) => true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_connection_is_refused_if_the_listener_would_not_accept_its_client() {
    let parties = Parties::new();
    let other = Authority::new("other").expect("openssl runs");
    let by_other = || tls_for(&parties.server, Some((Optional, &other)));
    // The policy before, whether the client has a certificate, and the configuration after.
    let cases: [(Option<ClientAuth>, bool, Tls); 5] = [
        (Some(Optional), false, parties.tls(Required)),
        (None, false, parties.tls(Required)),
        (Some(Required), true, by_other()),
        (Some(Optional), true, by_other()),
        (Some(Required), true, tls_of(&parties.server)),
    ];
    for (at, (before, has_certificate, after)) in cases.into_iter().enumerate() {
        let before = before.map_or_else(|| tls_of(&parties.server), |auth| parties.tls(auth));
        let served = serve(before).await;
        let http1 = Connection::open(&parties.target(&served, "http/1.1", has_certificate)).await;
        let http2 = Http2::open(&parties.target(&served, "h2", has_certificate)).await;
        let (mut http1, mut http2) = (http1.expect("it is accepted"), http2.expect("it is accepted"));
        assert_eq!(asks(&mut http1).await.0, 200);
        assert_eq!(http2.get("/").await.expect("the server answers").expect("no GOAWAY").0, 200);
        let next = serve(after).await;
        move_to(&next, served).await;
        assert!(is_refused(&mut http1).await, "case {at}");
        let answer = timeout(PATIENCE, http2.get("/")).await.expect("in time");
        assert!(!matches!(answer, Ok(Some((200, _)))), "case {at}: {answer:?}");
        timeout(PATIENCE, http2.ended()).await.unwrap_or_else(|_| panic!("case {at}: no GOAWAY"));
        drop((http1, http2));
        next.until_connections(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_moves_with_its_certificate_and_is_closed_with_1012_if_that_is_not_accepted() {
    let parties = Parties::new();
    let served = serve(parties.tls(Optional)).await;
    let client = Connection::open(&parties.target(&served, "http/1.1", true)).await;
    let mut client = client.expect("it is accepted");
    assert_eq!(client.ask(WEBSOCKET).await.expect("the server answers").status, 101);
    let greeting = b"\x81\x04shop";
    let mut expect = async |frame: &[u8]| {
        let read = timeout(PATIENCE, client.take(frame.len())).await.expect("a frame arrives in time");
        assert_eq!(read.expect("the WebSocket is open"), frame);
    };
    expect(greeting).await;
    let next = serve(parties.tls(Required)).await;
    move_to(&next, served).await;
    expect(greeting).await;
    let other = Authority::new("other").expect("openssl runs");
    let last = serve(tls_for(&parties.server, Some((Optional, &other)))).await;
    move_to(&last, next).await;
    expect(b"\x88\x02\x03\xf4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_connection_stays_open_if_the_listener_accepts_its_client() {
    let parties = Parties::new();
    let served = serve(parties.tls(Optional)).await;
    let anonymous = Connection::open(&parties.target(&served, "http/1.1", false)).await;
    let known = Connection::open(&parties.target(&served, "http/1.1", true)).await;
    let (mut anonymous, mut known) = (anonymous.expect("it is accepted"), known.expect("it is accepted"));
    assert_eq!(asks(&mut anonymous).await, (200, "none".to_owned()));
    assert_eq!(asks(&mut known).await, (200, NAMES.to_owned()));
    let next = serve(parties.tls(Optional)).await;
    move_to(&next, served).await;
    assert_eq!(asks(&mut anonymous).await, (200, "none".to_owned()));
    assert_eq!(asks(&mut known).await, (200, NAMES.to_owned()));
    drop(anonymous);
    next.until_connections(1).await;
    let last = serve(parties.tls(Required)).await;
    move_to(&last, next).await;
    assert_eq!(asks(&mut known).await, (200, NAMES.to_owned()));
}

/// As a restart or reload to an earlier release.
#[tokio::test(flavor = "multi_thread")]
async fn connection_with_a_certificate_is_closed_gracefully_if_the_next_process_would_not_know_it() {
    let parties = Parties::new();
    let served = serve(parties.tls(Optional)).await;
    let http1 = Connection::open(&parties.target(&served, "http/1.1", true)).await;
    let http2 = Http2::open(&parties.target(&served, "h2", true)).await;
    let anonymous = Connection::open(&parties.target(&served, "http/1.1", false)).await;
    let (mut http1, mut http2) = (http1.expect("it is accepted"), http2.expect("it is accepted"));
    let mut anonymous = anonymous.expect("it is accepted");
    assert_eq!(asks(&mut http1).await.0, 200);
    assert_eq!(http2.get("/").await.expect("the server answers").expect("no GOAWAY").0, 200);
    assert_eq!(asks(&mut anonymous).await.0, 200);
    served.registry().limit_handover(Protocols::Upgrades);
    served.server.enter(Phase::Draining);
    let answer = http1.ask(REQUEST).await.expect("the server answers");
    assert!(answer.status == 200 && answer.closes(), "{answer:?}");
    timeout(PATIENCE, http2.ended()).await.expect("GOAWAY arrives in time");
    drop((http1, http2));
    let next = serve(parties.tls(Optional)).await;
    move_to(&next, served).await;
    assert_eq!(asks(&mut anonymous).await, (200, "none".to_owned()));
    next.until_connections(1).await;
}

/// As a restart or reload to an earlier release.
#[tokio::test(flavor = "multi_thread")]
async fn tls_1_2_connection_is_closed_gracefully_if_the_next_process_would_not_adopt_it() {
    let parties = Parties::new();
    for is_parked in [false, true] {
        let served = serve(tls_of(&parties.server)).await;
        let target = |protocol| Target::Tls(served.address, parties.config_over_tls12(protocol, false));
        let http1 = Connection::open(&target("http/1.1")).await;
        let http2 = Http2::open(&target("h2")).await;
        let other = Connection::open(&parties.target(&served, "http/1.1", false)).await;
        let (mut http1, mut http2) = (http1.expect("it is accepted"), http2.expect("it is accepted"));
        let mut other = other.expect("it is accepted");
        assert_eq!(asks(&mut http1).await.0, 200);
        assert_eq!(http2.get("/").await.expect("the server answers").expect("no GOAWAY").0, 200);
        assert_eq!(asks(&mut other).await.0, 200);
        if is_parked {
            park_all(&served, 3).await;
        }
        served.registry().limit_handover(Protocols::CertificatesAndTables);
        served.server.enter(Phase::Draining);
        let answer = http1.ask(REQUEST).await.expect("the server answers");
        assert!(answer.status == 200 && answer.closes(), "{answer:?}");
        if is_parked {
            // A connection that was parked waits for bytes of its client, until this phase ends the wait.
            served.server.enter(Phase::Quiescing);
        }
        timeout(PATIENCE, http2.ended()).await.expect("GOAWAY arrives in time");
        drop((http1, http2));
        let next = serve(tls_of(&parties.server)).await;
        move_to(&next, served).await;
        assert_eq!(asks(&mut other).await, (200, "none".to_owned()));
        next.until_connections(1).await;
    }
}
