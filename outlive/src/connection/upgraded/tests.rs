//! WebSockets, other upgraded connections and event streams that move between servers in this process, as they move
//! between processes.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::response::sse::{Event, Sse};
use axum::routing::{any, get};
use futures_util::{SinkExt, Stream, StreamExt, stream};
use hyper::header::{CONNECTION, UPGRADE};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use testkit::certificate::Certificate;
use testkit::client::{self, Target};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{self, SupportedProtocolVersion};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Message as Sent;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_util::sync::CancellationToken;

use crate::app::carry::Carry;
use crate::app::context::Shutdown;
use crate::app::event_stream::EventStream;
use crate::connection::tests::{Served, move_to, serve, serve_with};
use crate::observe::metrics;
use crate::registry::{Counts, Phase, Protocols, Stage};
use crate::transport::tls_tests::{tls_of, tls_without_handover};

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(120);
const SERVICE_RESTART: u16 = 1012;

#[derive(Default, Serialize, Deserialize)]
struct Seat {
    messages: u64,
    padding: Vec<u8>,
}

/// Answers each message with the number of messages so far, in all processes, and the message.
async fn count(upgrade: WebSocketUpgrade, carry: Carry<Seat>) -> Response {
    let mut seat = carry.received().expect("the state is valid").unwrap_or_default();
    upgrade.on_upgrade(async move |mut socket: WebSocket| {
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                () = carry.requested() => return carry.hand_on(&seat),
            };
            let Some(Ok(message)) = message else { return };
            if let Message::Text(text) = message {
                seat.messages += 1;
                let answer = format!("{} {text}", seat.messages);
                if socket.send(Message::Text(answer.into())).await.is_err() {
                    return;
                }
            }
        }
    })
}

fn counting() -> Router {
    Router::new().route("/", any(count))
}

async fn connect(served: &Served) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(served.address).await.expect("the server accepts");
    tokio_tungstenite::client_async("ws://test/", stream).await.expect("the upgrade is granted").0
}

async fn next_text<S: AsyncRead + AsyncWrite + Unpin>(client: &mut WebSocketStream<S>) -> String {
    loop {
        let message = timeout(PATIENCE, client.next()).await.expect("a message arrives in time");
        match message.expect("the WebSocket is open").expect("no error occurs") {
            Sent::Text(text) => return text.to_string(),
            Sent::Ping(_) | Sent::Pong(_) => {}
            other => panic!("expected text, got {other:?}"),
        }
    }
}

/// The code of the Close frame that arrives next.
async fn close_code<S: AsyncRead + AsyncWrite + Unpin>(client: &mut WebSocketStream<S>) -> u16 {
    loop {
        let message = timeout(PATIENCE, client.next()).await.expect("a message arrives in time");
        if let Sent::Close(close) = message.expect("the WebSocket is open").expect("no error occurs") {
            return close.expect("the Close frame has a code").code.into();
        }
    }
}

async fn moved(served: Served, router: Router) -> Served {
    let next = serve(router).await;
    move_to(&next, served).await;
    next
}

fn fragment(opcode: Data, is_final: bool, payload: &str) -> Sent {
    Sent::Frame(Frame::message(payload.to_owned(), OpCode::Data(opcode), is_final))
}

/// Sends messages of several sizes, some in two fragments and some with a Ping in between, without waiting for the
/// answers, while the connection moves.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_neither_lost_nor_repeated_nor_reordered_over_moves() {
    const MESSAGES: usize = 3_000;
    let mut served = serve(counting()).await;
    let (mut sender, mut receiver) = connect(&served).await.split();
    let text = |number: usize| format!("{number}:{}", "y".repeat([0, 5, 130, 70_000, 40][number % 5]));
    let sending = tokio::spawn(async move {
        for number in 0..MESSAGES {
            let text = text(number);
            let messages = match number % 7 {
                0 => {
                    vec![fragment(Data::Text, false, &text[..1]), fragment(Data::Continue, true, &text[1..])]
                }
                1 => vec![
                    fragment(Data::Text, false, &text[..2]),
                    Sent::Ping(vec![7].into()),
                    fragment(Data::Continue, true, &text[2..]),
                ],
                2 => vec![Sent::Ping(vec![1, 2].into()), Sent::Text(text.into())],
                _ => vec![Sent::Text(text.into())],
            };
            for message in messages {
                sender.send(message).await.expect("the WebSocket is open");
            }
        }
        sender
    });
    let (progress, mut answers) = mpsc::unbounded_channel();
    let receiving = tokio::spawn(async move {
        for number in 0..MESSAGES {
            let answer = loop {
                let message = timeout(PATIENCE, receiver.next()).await.expect("an answer arrives in time");
                match message.expect("the WebSocket is open").expect("no error occurs") {
                    Sent::Text(text) => break text,
                    Sent::Pong(_) => {}
                    other => panic!("{other:?}"),
                }
            };
            assert!(
                answer == format!("{} {}", number + 1, text(number)),
                "message {number}: {:.80}",
                answer.as_str()
            );
            let _ = progress.send(());
        }
    });
    let mut moves = 0;
    while answers.recv().await.is_some() {
        // Moves about every 40 messages.
        for _ in 0..40 {
            answers.recv().await;
        }
        served = moved(served, counting()).await;
        moves += 1;
    }
    receiving.await.expect("all answers are right");
    drop(sending.await.expect("all messages are sent"));
    assert!(moves > 20, "{moves} moves");
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_message_is_completed_after_a_move() {
    let mut served = serve(counting()).await;
    let mut client = connect(&served).await.into_inner();
    // A text frame of 5 bytes with a mask of zeros, and then one in two fragments, cut at each byte.
    let whole = [&[0x81, 0x85, 0, 0, 0, 0][..], b"hello"].concat();
    let fragments =
        [&[0x01, 0x83, 0, 0, 0, 0][..], b"hel", &[0x89, 0x80, 0, 0, 0, 0], &[0x80, 0x82, 0, 0, 0, 0], b"lo"]
            .concat();
    let mut messages = 0;
    for message in [&whole, &fragments] {
        for cut in 1..message.len() {
            client.write_all(&message[..cut]).await.expect("the connection is open");
            served = moved(served, counting()).await;
            client.write_all(&message[cut..]).await.expect("the connection is open");
            messages += 1;
            let expected = format!("{messages} hello");
            let mut answer = Vec::new();
            while !answer.ends_with(expected.as_bytes()) {
                let read = timeout(PATIENCE, client.read_buf(&mut answer)).await.expect("an answer arrives");
                assert!(read.expect("the connection is open") > 0, "{answer:?}");
            }
        }
    }
}

/// A handler that receives three messages at once, answers the first, and continues when `resume` is notified. Until
/// `ends` resolves, it answers the others.
fn reading_ahead(resume: Arc<Notify>, ends_at: EndsAt) -> Router {
    let handler = async move |upgrade: WebSocketUpgrade, carry: Carry<Seat>, Shutdown(shutdown): Shutdown| {
        upgrade.on_upgrade(async move |mut socket: WebSocket| {
            let mut is_first = carry.received().expect("the state is valid").is_none();
            loop {
                let ends = async {
                    match ends_at {
                        EndsAt::Requested => carry.requested().await,
                        EndsAt::Shutdown => shutdown.cancelled().await,
                    }
                };
                let message = tokio::select! {
                    biased;
                    () = ends => return carry.hand_on(&Seat::default()),
                    message = socket.recv() => message,
                };
                let Some(Ok(Message::Text(text))) = message else { return };
                socket.send(Message::Text(text)).await.expect("the client reads");
                if std::mem::take(&mut is_first) {
                    resume.notified().await;
                }
            }
        })
    };
    Router::new().route("/", any(handler))
}

#[derive(Clone, Copy)]
enum EndsAt {
    Requested,
    Shutdown,
}

/// Sends three messages in one write, and moves after the answer to the first.
async fn move_with_messages_in_the_buffer(ends_at: EndsAt) -> (Served, WebSocketStream<TcpStream>) {
    let resume = Arc::new(Notify::new());
    let served = serve(reading_ahead(resume.clone(), ends_at)).await;
    let mut client = connect(&served).await;
    for text in ["1", "2", "3"] {
        client.feed(Sent::Text(text.into())).await.expect("the WebSocket is open");
    }
    client.flush().await.expect("the WebSocket is open");
    assert_eq!(next_text(&mut client).await, "1");
    served.server.enter(Phase::Quiescing);
    resume.notify_one();
    (moved(served, reading_ahead(resume, EndsAt::Requested)).await, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_in_the_buffer_of_the_handler_are_answered_before_the_move() {
    let (_served, mut client) = move_with_messages_in_the_buffer(EndsAt::Requested).await;
    client.send(Sent::Text("4".into())).await.expect("the WebSocket is open");
    for text in ["2", "3", "4"] {
        assert_eq!(next_text(&mut client).await, text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_is_closed_with_1012_if_its_handler_returns_with_messages_in_its_buffer() {
    let (_served, mut client) = move_with_messages_in_the_buffer(EndsAt::Shutdown).await;
    assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
}

#[tokio::test(flavor = "multi_thread")]
async fn ping_during_a_move_is_answered() {
    let mut served = serve(counting()).await;
    let mut client = connect(&served).await;
    for number in 0..100_u8 {
        client.send(Sent::Ping(vec![number].into())).await.expect("the WebSocket is open");
        served = moved(served, counting()).await;
        let pong = timeout(PATIENCE, client.next()).await.expect("a Pong arrives in time");
        let pong = pong.expect("the WebSocket is open").expect("no error occurs");
        assert_eq!(pong, Sent::Pong(vec![number].into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn close_during_a_move_ends_with_a_close() {
    for _ in 0..50 {
        let served = serve(counting()).await;
        let mut client = connect(&served).await;
        client.close(None).await.expect("the WebSocket is open");
        let _next = moved(served, counting()).await;
        while let Some(message) = timeout(PATIENCE, client.next()).await.expect("the WebSocket ends in time")
        {
            assert!(matches!(message, Ok(Sent::Close(_))), "{message:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_is_closed_with_1012_if_the_next_process_answers_otherwise() {
    let refusing = Router::new().route("/", any(async || StatusCode::UNAUTHORIZED));
    let endless = Router::new().route("/", any(async || axum::body::Body::from_stream(endless())));
    let without_carry = async |upgrade: WebSocketUpgrade| upgrade.on_upgrade(async move |_| ());
    let without_carry = Router::new().route("/", any(without_carry));
    let redirecting = Router::new().route("/", any(async || axum::response::Redirect::to("/elsewhere")));
    for router in [Router::new(), refusing, endless, without_carry, redirecting] {
        let served = serve(counting()).await;
        let mut client = connect(&served).await;
        client.send(Sent::Text("x".into())).await.expect("the WebSocket is open");
        assert_eq!(next_text(&mut client).await, "1 x");
        let _next = moved(served, router).await;
        assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
    }
}

fn endless() -> impl Stream<Item = Result<&'static str, Infallible>> {
    stream::repeat(Ok("x"))
}

/// A route that selects this subprotocol of a WebSocket.
fn speaking(protocol: &'static str) -> Router {
    let handler = async move |upgrade: WebSocketUpgrade, carry: Carry<Seat>| {
        upgrade.protocols([protocol]).on_upgrade(async move |mut socket: WebSocket| {
            tokio::select! {
                _ = socket.recv() => {}
                () = carry.requested() => carry.hand_on(&Seat::default()),
            }
        })
    };
    Router::new().route("/", any(handler))
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_is_closed_with_1012_if_the_subprotocol_changes() {
    let served = serve(speaking("one")).await;
    let stream = TcpStream::connect(served.address).await.expect("the server accepts");
    let request = hyper::Request::builder()
        .uri("ws://test/")
        .header("host", "test")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("sec-websocket-protocol", "one, two")
        .body(())
        .expect("the request is valid");
    let mut client =
        tokio_tungstenite::client_async(request, stream).await.expect("the upgrade is granted").0;
    let served = moved(served, speaking("one")).await;
    let _served = moved(served, speaking("two")).await;
    assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_is_closed_with_1012_if_its_state_is_too_large() {
    let handler = async |upgrade: WebSocketUpgrade, carry: Carry<Seat>| {
        let carry = carry.limit(100);
        upgrade.on_upgrade(async move |_socket| {
            carry.requested().await;
            carry.hand_on(&Seat { padding: vec![0; 100], ..Seat::default() });
        })
    };
    let served = serve(Router::new().route("/", any(handler))).await;
    let mut client = connect(&served).await;
    let _next = moved(served, counting()).await;
    assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_is_closed_with_1012_if_there_is_no_next_process() {
    let served = serve(counting()).await;
    let mut client = connect(&served).await;
    served.server.enter(Phase::Lingering);
    assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
    drop(client);
    served.server.enter(Phase::Closing);
    let drained = served.registry().wait_until(|| served.registry().is_drained());
    timeout(PATIENCE, drained).await.expect("the drain ends");
}

/// What the client had sent before it received the Close is discarded.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_ends_only_after_the_client_has_answered_the_close() {
    let certificate = Certificate::new().expect("the certificate is made");
    let served = serve_with(counting(), Some(tls_without_handover(&certificate))).await;
    let client = connect_over(&served, &certificate, &TLS12).await;
    assert_ends_after_the_answer(&served, client.into_inner(), Phase::Draining).await;
    for phase in [Phase::Lingering, Phase::Draining] {
        let served = serve(counting()).await;
        served.registry().limit_handover(Protocols::Http2AndTls);
        let client = connect(&served).await;
        assert_ends_after_the_answer(&served, client.into_inner(), phase).await;
    }
}

async fn assert_ends_after_the_answer(
    served: &Served,
    mut client: impl AsyncRead + AsyncWrite + Unpin,
    phase: Phase,
) {
    client.write_all(b"\x81\x85\0\0\0\0he").await.expect("the connection is open");
    served.server.enter(phase);
    let mut close = [0; 4];
    client.read_exact(&mut close).await.expect("the Close arrives");
    assert_eq!(&close, b"\x88\x02\x03\xf4");
    // The remainder of the message, a further one, and a Ping.
    for bytes in [&b"llo"[..], b"\x81\x81\0\0\0\0x", b"\x89\x80\0\0\0\0", b"\x88\x82\0\0\0"] {
        client.write_all(bytes).await.expect("the connection is open");
        assert!(timeout(Duration::from_millis(50), client.read_exact(&mut [0])).await.is_err(), "{phase:?}");
        assert!(!served.registry().is_drained(), "{phase:?}: the process could exit");
    }
    client.write_all(b"\0\x03\xf4").await.expect("the connection is open");
    let read = timeout(Duration::from_secs(2), client.read(&mut [0])).await.expect("the connection ends");
    assert_eq!(read.expect("it ends cleanly"), 0, "{phase:?}");
    drop(client);
    served.until_connections(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handler_that_closes_with_its_own_code_is_not_replaced() {
    let handler = async |upgrade: WebSocketUpgrade, carry: Carry<Seat>| {
        upgrade.on_upgrade(async move |mut socket: WebSocket| {
            carry.requested().await;
            let close = CloseFrame { code: 4001, reason: "enough".into() };
            let _ = socket.send(Message::Close(Some(close))).await;
            while let Some(Ok(_)) = socket.recv().await {}
        })
    };
    let served = serve(Router::new().route("/", any(handler))).await;
    let mut client = connect(&served).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(close_code(&mut client).await, 4001);
    while timeout(PATIENCE, client.next()).await.expect("the WebSocket ends in time").is_some() {}
    let drained = served.registry().wait_until(|| served.registry().is_drained());
    timeout(PATIENCE, drained).await.expect("the drain ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_continues_in_its_process_if_the_drain_goes_back_to_serving() {
    let served = serve(counting()).await;
    let mut client = connect(&served).await;
    for number in 1..20 {
        served.server.enter(Phase::Quiescing);
        let drained = served.registry().wait_until(|| served.registry().is_drained());
        timeout(PATIENCE, drained).await.expect("the connection becomes quiescent");
        served.registry().set_phase(Phase::Draining);
        let connection = served.server.handover_queue().take().expect("the connection is quiescent");
        served.server.adopt(connection);
        client.send(Sent::Text("x".into())).await.expect("the WebSocket is open");
        assert_eq!(next_text(&mut client).await, format!("{number} x"));
    }
}

/// Opens a WebSocket over this version of TLS.
async fn connect_over(
    served: &Served,
    certificate: &Certificate,
    version: &'static SupportedProtocolVersion,
) -> WebSocketStream<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("the provider supports the version")
        .with_root_certificates(certificate.roots().expect("the certificate is readable"))
        .with_no_client_auth();
    let stream = TcpStream::connect(served.address).await.expect("the server accepts");
    let name = "localhost".try_into().expect("the name is valid");
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS is accepted");
    tokio_tungstenite::client_async("ws://test/", stream).await.expect("the upgrade is granted").0
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_over_tls_answers_each_message_over_moves() {
    let certificate = Certificate::new().expect("the certificate is made");
    for version in [&TLS12, &TLS13] {
        let mut served = serve_with(counting(), Some(tls_of(&certificate))).await;
        let mut client = connect_over(&served, &certificate, version).await;
        for number in 1..=30 {
            // Some of these are longer than a record.
            let text = "y".repeat(number * 1_000);
            client.send(Sent::Text(text.clone().into())).await.expect("the WebSocket is open");
            let next = serve_with(counting(), Some(tls_of(&certificate))).await;
            move_to(&next, served).await;
            served = next;
            let answer = next_text(&mut client).await;
            assert!(answer == format!("{number} {text}"), "{version:?}: {answer:.40}");
        }
    }
}

/// With `--tls-handover no`.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_over_tls_is_closed_with_1012_if_tls_connections_are_not_handed_over() {
    let certificate = Certificate::new().expect("the certificate is made");
    for version in [&TLS12, &TLS13] {
        let served = serve_with(counting(), Some(tls_without_handover(&certificate))).await;
        let mut client = connect_over(&served, &certificate, version).await;
        client.send(Sent::Text("x".into())).await.expect("the WebSocket is open");
        assert_eq!(next_text(&mut client).await, "1 x");
        served.registry().set_phase(Phase::Draining);
        assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
    }
}

/// The process before it handed TLS connections over.
#[tokio::test(flavor = "multi_thread")]
async fn moved_websocket_over_tls_continues_until_the_drain_with_tls_handover_no() {
    let certificate = Certificate::new().expect("the certificate is made");
    for version in [&TLS12, &TLS13] {
        let served = serve_with(counting(), Some(tls_of(&certificate))).await;
        let mut client = connect_over(&served, &certificate, version).await;
        let next = serve_with(counting(), Some(tls_without_handover(&certificate))).await;
        move_to(&next, served).await;
        for number in 1..3 {
            client.send(Sent::Text("x".into())).await.expect("the WebSocket is open");
            assert_eq!(next_text(&mut client).await, format!("{number} x"));
        }
        next.registry().set_phase(Phase::Quiescing);
        assert_eq!(close_code(&mut client).await, SERVICE_RESTART);
    }
}

/// As a restart or reload to an earlier release.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_over_tls_1_2_is_closed_with_1012_if_the_next_process_does_not_adopt_it() {
    let certificate = Certificate::new().expect("the certificate is made");
    let served = serve_with(counting(), Some(tls_of(&certificate))).await;
    let mut closed = connect_over(&served, &certificate, &TLS12).await;
    let mut moves = connect_over(&served, &certificate, &TLS13).await;
    for client in [&mut closed, &mut moves] {
        client.send(Sent::Text("x".into())).await.expect("the WebSocket is open");
        assert_eq!(next_text(client).await, "1 x");
    }
    served.registry().limit_handover(Protocols::CertificatesAndTables);
    served.registry().set_phase(Phase::Quiescing);
    assert_eq!(close_code(&mut closed).await, SERVICE_RESTART);
    drop(closed);
    let next = serve_with(counting(), Some(tls_of(&certificate))).await;
    move_to(&next, served).await;
    moves.send(Sent::Text("y".into())).await.expect("the WebSocket is open");
    assert_eq!(next_text(&mut moves).await, "2 y");
}

/// The state of an extension cannot be handed over.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_with_an_extension_is_closed_with_1012() {
    let handler = async |upgrade: WebSocketUpgrade, carry: Carry<Seat>| {
        let mut response = upgrade.on_upgrade(async move |_socket| {
            carry.requested().await;
            carry.hand_on(&Seat::default());
        });
        let extension = "permessage-deflate".parse().expect("the value is valid");
        response.headers_mut().insert("sec-websocket-extensions", extension);
        response
    };
    let served = serve(Router::new().route("/socket", any(handler))).await;
    let mut client =
        client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    assert_eq!(client.ask(client::WEBSOCKET).await.expect("the server answers").status, 101);
    served.registry().set_phase(Phase::Draining);
    assert_eq!(client.take(4).await.expect("a Close frame arrives"), b"\x88\x02\x03\xf4");
}

/// A protocol of one line for each line, where the handler decides at which points it can be replaced.
#[tokio::test(flavor = "multi_thread")]
async fn upgrade_to_another_protocol_moves_at_the_points_that_its_handler_chooses() {
    fn router() -> Router {
        let handler = async |carry: Carry<u64>, request: Request| {
            let mut lines = carry.received().expect("the state is valid").unwrap_or_default();
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(request).await.expect("the upgrade is granted");
                let mut io = TokioIo::new(upgraded);
                loop {
                    let mut byte = [0];
                    // Between two lines nothing is buffered.
                    tokio::select! {
                        read = io.read_exact(&mut byte) => if read.is_err() { return },
                        () = carry.requested() => return carry.hand_on(&lines),
                    }
                    while byte != *b"\n" {
                        if io.read_exact(&mut byte).await.is_err() {
                            return;
                        }
                    }
                    lines += 1;
                    if io.write_all(format!("{lines}\n").as_bytes()).await.is_err() {
                        return;
                    }
                    io.flush().await.expect("the connection is open");
                }
            });
            (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, "lines")])
        };
        Router::new().route("/", any(handler))
    }
    let mut served = serve(router()).await;
    let mut client =
        client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    let request = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: lines\r\n\r\n";
    assert_eq!(client.ask(request).await.expect("the server answers").status, 101);
    for number in 1..20 {
        client.send(b"hello\n").await.expect("the connection is open");
        let expected = format!("{number}\n");
        assert_eq!(client.take(expected.len()).await.expect("the connection is open"), expected.as_bytes());
        served = moved(served, router()).await;
    }
}

// ---- event streams ----

const EVENTS: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n";

/// Sends an event each millisecond, with its number as the id, from the one after `Last-Event-ID` on.
async fn numbers(headers: HeaderMap) -> EventStream<impl Stream<Item = Result<Event, Infallible>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let event = async |number: u64| {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let length = usize::try_from(number % 700 + 1).expect("it is small");
        let event = Event::default().id(number.to_string()).data("x".repeat(length));
        Some((Ok(event), number + 1))
    };
    EventStream(Sse::new(stream::unfold(last.map_or(0, |last| last + 1), event)))
}

fn numbering() -> Router {
    Router::new().route("/", get(numbers))
}

/// A client of an event stream.
struct Reader {
    client: client::Connection,
    text: String,
}

impl Reader {
    async fn open(served: &Served) -> Self {
        Self::begin(&Target::Tcp(served.address), EVENTS).await
    }

    async fn begin(target: &Target, request: &[u8]) -> Self {
        let mut client = client::Connection::open(target).await.expect("the server accepts");
        client.send(request).await.expect("the bytes are sent");
        assert_eq!(client.head().await.expect("the server answers").status, 200);
        Self { client, text: String::new() }
    }

    /// The next chunk of the body. Empty at the end of the body.
    async fn chunk(&mut self) -> String {
        let line = loop {
            let unread = self.client.unread();
            if let Some(end) = memchr::memmem::find(unread, b"\r\n") {
                break end + 2;
            }
            let read = timeout(PATIENCE, self.client.read_more()).await.expect("a chunk arrives in time");
            assert!(read.expect("the connection is open") > 0, "the connection ends");
        };
        let line = self.client.take(line).await.expect("the line has arrived");
        let length = std::str::from_utf8(&line[..line.len() - 2]).expect("the length is text");
        let length = usize::from_str_radix(length, 16).expect("the length is a number");
        let chunk = self.client.take(length + 2).await.expect("the chunk arrives");
        String::from_utf8(chunk[..length].to_vec()).expect("the chunk is text")
    }

    /// The next event; None at the end of the response.
    async fn event(&mut self) -> Option<String> {
        while !self.text.contains("\n\n") {
            let chunk = self.chunk().await;
            if chunk.is_empty() {
                return None;
            }
            self.text.push_str(&chunk);
        }
        let (event, rest) = self.text.split_once("\n\n").expect("it was found");
        let event = event.to_owned();
        self.text = rest.to_owned();
        Some(event)
    }

    /// Reads events up to the end of the response.
    async fn reaches_the_end(&mut self) {
        while self.event().await.is_some() {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_neither_lost_nor_repeated_nor_reordered_over_moves() {
    let mut served = serve(numbering()).await;
    let mut reader = Reader::open(&served).await;
    for number in 0..1_500_usize {
        let event = reader.event().await.expect("the response has not ended");
        let expected = format!("id: {number}\ndata: {}", "x".repeat(number % 700 + 1));
        assert!(event == expected, "{event:.60}");
        if number % 50 == 49 {
            served = moved(served, numbering()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn response_that_moves_is_counted_by_the_process_in_which_it_began_only() {
    let router = || Router::new().route("/moves/events", get(numbers)).route("/moves/socket", any(count));
    let served = serve(router()).await;
    let request = b"GET /moves/events HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n";
    let mut reader = Reader::begin(&Target::Tcp(served.address), request).await;
    reader.event().await.expect("the response has not ended");
    let stream = TcpStream::connect(served.address).await.expect("the server accepts");
    let socket = tokio_tungstenite::client_async("ws://test/moves/socket", stream).await;
    let mut socket = socket.expect("the upgrade is granted").0;
    let before = served.server.clone();
    let next = moved(served, router()).await;
    reader.event().await.expect("the response has not ended");
    socket.send(Sent::text("x")).await.expect("the WebSocket is open");
    assert_eq!(next_text(&mut socket).await, "1 x");
    assert_eq!(before.registry().counts(), Counts { connections: 0, in_flight: 0, answered: 2 });
    // The event may be one that the first process has sent, so the response may have yet to continue in the second.
    next.until_counts(Counts { connections: 2, in_flight: 1, answered: 0 }).await;
    drop((reader, socket));
    next.until_connections(0).await;
    assert_eq!(next.registry().counts().answered, 0);
    assert_eq!(
        (metrics::count("/moves/events", "GET", "200"), metrics::count("/moves/socket", "GET", "101")),
        (1, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_that_ends_at_the_shutdown_continues_in_the_next_process() {
    fn router(shutdown: &CancellationToken) -> Router {
        let shutdown = shutdown.clone();
        let handler = async move |headers: HeaderMap| {
            let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
            let event = async |number: u64| {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Some((Ok::<_, Infallible>(Event::default().id(number.to_string()).data("x")), number + 1))
            };
            let events = stream::unfold(last.map_or(0, |last| last + 1), event);
            EventStream(Sse::new(events.take_until(Box::pin(shutdown.cancelled_owned()))))
        };
        Router::new().route("/", get(handler))
    }
    let mut shutdown = CancellationToken::new();
    let mut served = serve(router(&shutdown)).await;
    let mut reader = Reader::open(&served).await;
    for number in 0..200 {
        let event = reader.event().await.expect("the response has not ended");
        assert_eq!(event, format!("id: {number}\ndata: x"));
        if number % 20 == 19 {
            // As in a restart: the shutdown comes first.
            served.registry().set_phase(Phase::Draining);
            shutdown.cancel();
            tokio::task::yield_now().await;
            shutdown = CancellationToken::new();
            served = moved(served, router(&shutdown)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_ends_after_a_whole_event_if_it_cannot_continue() {
    let plain = Router::new().route("/", get(async || "text"));
    let without_wrapper = async |headers: HeaderMap| numbers(headers).await.0;
    let without_wrapper = Router::new().route("/", get(without_wrapper));
    let redirecting = Router::new().route("/", get(async || axum::response::Redirect::to("/elsewhere")));
    for router in [Router::new(), plain, without_wrapper, redirecting] {
        let served = serve(numbering()).await;
        let mut reader = Reader::open(&served).await;
        reader.event().await.expect("the response has not ended");
        let _next = moved(served, router).await;
        reader.reaches_the_end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_ends_if_there_is_no_next_process() {
    let served = serve(numbering()).await;
    let mut reader = Reader::open(&served).await;
    reader.event().await.expect("the response has not ended");
    served.server.enter(Phase::Lingering);
    reader.reaches_the_end().await;
    drop(reader);
    served.server.enter(Phase::Closing);
    let drained = served.registry().wait_until(|| served.registry().is_drained());
    timeout(PATIENCE, drained).await.expect("the drain ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_without_ids_ends_at_a_move() {
    let handler = async || {
        let event = async |()| {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Some((Ok::<_, Infallible>(Event::default().data("x")), ()))
        };
        EventStream(Sse::new(stream::unfold((), event)))
    };
    let router = || Router::new().route("/", get(handler));
    let served = serve(router()).await;
    let mut reader = Reader::open(&served).await;
    reader.event().await.expect("the response has not ended");
    let next = moved(served, router()).await;
    reader.reaches_the_end().await;
    // The connection itself has moved, and serves the next request.
    let _next = next;
    reader.client.send(EVENTS).await.expect("the connection is open");
    assert_eq!(reader.client.head().await.expect("the server answers").status, 200);
}

/// Without `Accept: text/event-stream` the head of the request is not kept.
#[tokio::test(flavor = "multi_thread")]
async fn event_stream_of_a_client_that_does_not_ask_for_one_ends_at_the_drain() {
    let served = serve(numbering()).await;
    let mut reader = Reader::begin(&Target::Tcp(served.address), &client::get("/")).await;
    reader.event().await.expect("the response has not ended");
    served.registry().set_phase(Phase::Draining);
    reader.reaches_the_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_ends_at_the_drain() {
    let served = serve(numbering()).await;
    let mut client = client::Http2::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    let all = tokio::spawn(async move { client.get("/").await });
    let begun = async {
        while served.registry().counts().in_flight == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("the request begins");
    served.registry().set_phase(Phase::Draining);
    let all = timeout(PATIENCE, all).await.expect("the response ends in time").expect("no panic");
    assert_eq!(all.expect("the response is complete").expect("no GOAWAY arrives").0, 200);
}

/// Sends one event, and then none.
async fn silent(headers: HeaderMap) -> EventStream<impl Stream<Item = Result<Event, Infallible>>> {
    let is_first = !headers.contains_key("last-event-id");
    let first = is_first.then(|| Ok(Event::default().id("1").data("x")));
    EventStream(Sse::new(stream::iter(first).chain(stream::pending())))
}

/// Serves `router` over TCP or TLS to a client that has received the first event.
async fn serve_first(router: Router, certificate: Option<&Certificate>) -> (Served, Reader) {
    let served = serve_with(router, certificate.map(tls_of)).await;
    let target = match certificate {
        None => Target::Tcp(served.address),
        Some(certificate) => {
            Target::Tls(served.address, certificate.client(&[]).expect("the client is made"))
        }
    };
    let mut reader = Reader::begin(&target, EVENTS).await;
    reader.event().await.expect("an event arrives");
    (served, reader)
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_without_events_ends_when_its_client_disconnects() {
    let certificate = Certificate::new().expect("the certificate is made");
    for certificate in [None, Some(&certificate)] {
        let (served, reader) = serve_first(Router::new().route("/", get(silent)), certificate).await;
        drop(reader);
        served.until_connections(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_without_events_ends_when_its_client_disconnects_after_a_move() {
    let certificate = Certificate::new().expect("the certificate is made");
    for certificate in [None, Some(&certificate)] {
        let (served, reader) = serve_first(Router::new().route("/", get(silent)), certificate).await;
        let next = serve_with(Router::new().route("/", get(silent)), certificate.map(tls_of)).await;
        move_to(&next, served).await;
        next.until_stage(Stage::InFlight).await;
        drop(reader);
        next.until_connections(0).await;
    }
}

/// The response stays in the process that drains, because it is no `EventStream`.
#[tokio::test(flavor = "multi_thread")]
async fn response_without_data_ends_when_its_client_disconnects_while_connections_move() {
    let certificate = Certificate::new().expect("the certificate is made");
    let stream = async || {
        let first = stream::iter([Ok::<_, Infallible>(Event::default().data("x"))]);
        Sse::new(first.chain(stream::pending()))
    };
    for certificate in [None, Some(&certificate)] {
        for phase in [Phase::Quiescing, Phase::Holding] {
            let (served, reader) = serve_first(Router::new().route("/", get(stream)), certificate).await;
            served.server.enter(phase);
            drop(reader);
            served.until_connections(0).await;
        }
    }
}

/// A handler may answer only after the phase has begun to hand connections over. The head of its response is then in
/// hyper's buffer, and must reach the client.
#[tokio::test(flavor = "multi_thread")]
async fn event_stream_that_begins_while_connections_move_has_a_head() {
    let (gates, mut opened) = mpsc::unbounded_channel();
    let slow = async move |headers: HeaderMap| {
        let (open, gate) = tokio::sync::oneshot::channel::<()>();
        gates.send(open).expect("the test waits");
        let _ = gate.await;
        numbers(headers).await
    };
    let served = serve(Router::new().route("/", get(slow))).await;
    let mut client =
        client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    client.send(EVENTS).await.expect("the bytes are sent");
    let gate = opened.recv().await.expect("the handler runs");
    served.server.enter(Phase::Quiescing);
    gate.send(()).expect("the handler waits");
    let _next = moved(served, numbering()).await;
    assert_eq!(client.head().await.expect("the server answers").status, 200);
    let mut reader = Reader { client, text: String::new() };
    for number in 0..20 {
        let event = reader.event().await.expect("the response has not ended");
        assert!(event.starts_with(&format!("id: {number}\n")), "{event:.60}");
    }
}

/// Sends numbered events without a pause.
async fn quick_numbers(headers: HeaderMap) -> EventStream<impl Stream<Item = Result<Event, Infallible>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let numbers = stream::iter(last.map_or(0, |last| last + 1)..);
    EventStream(Sse::new(numbers.map(|number| Ok(Event::default().id(number.to_string()).data("x")))))
}

/// Of a stream that always has an event, hyper buffers many events before it writes them.
#[tokio::test(flavor = "multi_thread")]
async fn events_without_a_pause_are_neither_lost_nor_repeated_over_moves() {
    let router = || Router::new().route("/", get(quick_numbers));
    let mut served = serve(router()).await;
    let mut reader = Reader::open(&served).await;
    let (progress, mut events) = mpsc::channel(1);
    let reading = tokio::spawn(async move {
        for number in 0..150_000 {
            let event = reader.event().await.expect("the response has not ended");
            assert_eq!(event, format!("id: {number}\ndata: x"));
            if number % 1_500 == 0 {
                // Without a wait, because the connection that moves cannot flush while the client does not read.
                let _ = progress.try_send(());
            }
        }
    });
    while events.recv().await.is_some() {
        served = moved(served, router()).await;
    }
    reading.await.expect("all events are right");
}

fn upgrade_request(fields: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nhost: test\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{fields}\r\n"
    )
}

/// hyper ends a connection with `Connection: close` as soon as the refused response is written.
#[tokio::test(flavor = "multi_thread")]
async fn refused_websocket_that_does_not_keep_alive_is_closed_with_1012() {
    for _ in 0..20 {
        let served = serve(speaking("one")).await;
        let mut client =
            client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        let request = upgrade_request("connection: close, upgrade\r\nsec-websocket-protocol: one, two\r\n");
        assert_eq!(client.ask(request.as_bytes()).await.expect("the server answers").status, 101);
        let next = moved(served, speaking("two")).await;
        let close =
            timeout(Duration::from_secs(5), client.take(4)).await.expect("a Close frame arrives in time");
        assert_eq!(close.expect("the connection is open"), b"\x88\x02\x03\xf4");
        drop(client);
        next.until_connections(0).await;
    }
}

/// A connection for which there was no file descriptor.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_of_the_overflow_is_closed_with_1012() {
    for _ in 0..20 {
        let served = serve(counting()).await;
        let mut client = connect(&served).await;
        served.server.enter(Phase::Quiescing);
        let drained = served.registry().wait_until(|| served.registry().is_drained());
        timeout(PATIENCE, drained).await.expect("the connection becomes quiescent");
        let connection = served.server.handover_queue().take().expect("the connection is quiescent");
        let next = serve(counting()).await;
        next.server.finish_copy(connection);
        let code = timeout(Duration::from_secs(5), close_code(&mut client)).await;
        assert_eq!(code.expect("a Close frame arrives in time"), SERVICE_RESTART);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_of_the_overflow_ends() {
    let served = serve(numbering()).await;
    let mut reader = Reader::open(&served).await;
    reader.event().await.expect("the response has not ended");
    served.server.enter(Phase::Quiescing);
    let connection = timeout(PATIENCE, served.server.handover_queue().next()).await;
    let next = serve(numbering()).await;
    next.server.finish_copy(connection.expect("the connection becomes quiescent"));
    reader.reaches_the_end().await;
}

/// What a middleware has encoded cannot be followed.
#[tokio::test(flavor = "multi_thread")]
async fn encoded_event_stream_ends_at_the_drain() {
    fn router() -> Router {
        let handler = async |headers: HeaderMap| ([("content-encoding", "gzip")], numbers(headers).await);
        Router::new().route("/", get(handler))
    }
    let served = serve(router()).await;
    let mut reader = Reader::open(&served).await;
    reader.event().await.expect("the response has not ended");
    let _next = moved(served, router()).await;
    timeout(Duration::from_secs(10), reader.reaches_the_end()).await.expect("the response ends in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_whose_request_has_a_body_is_closed_with_1012() {
    let handler = async |upgrade: WebSocketUpgrade, carry: Carry<Seat>, body: axum::body::Bytes| {
        assert_eq!(body, "\r\n\r\n");
        upgrade.on_upgrade(async move |mut socket: WebSocket| {
            tokio::select! {
                _ = socket.recv() => {}
                () = carry.requested() => carry.hand_on(&Seat::default()),
            }
        })
    };
    let router = || Router::new().route("/", any(handler));
    let served = serve(router()).await;
    let mut client =
        client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    let request = upgrade_request("connection: upgrade\r\ncontent-length: 4\r\n") + "\r\n\r\n";
    assert_eq!(client.ask(request.as_bytes()).await.expect("the server answers").status, 101);
    let _next = moved(served, router()).await;
    let close = timeout(Duration::from_secs(5), client.take(4)).await.expect("a Close frame arrives in time");
    assert_eq!(close.expect("the connection is open"), b"\x88\x02\x03\xf4");
}

/// The drain waits for the handlers that are at work, and this one has returned.
#[tokio::test(flavor = "multi_thread")]
async fn websocket_that_is_handed_on_at_the_shutdown_does_not_delay_the_drain() {
    let handler = async |upgrade: WebSocketUpgrade, carry: Carry<Seat>, shutdown: Shutdown| {
        upgrade.on_upgrade(async move |mut socket: WebSocket| {
            tokio::select! {
                _ = socket.recv() => {}
                () = shutdown.0.cancelled() => carry.hand_on(&Seat::default()),
            }
        })
    };
    let served = serve(Router::new().route("/", any(handler))).await;
    let mut client = connect(&served).await;
    served.registry().set_phase(Phase::Draining);
    let mut pending = served.registry().pending_work();
    let ended = served.registry().wait_until(|| {
        pending.retain(crate::registry::PendingWork::is_pending);
        pending.is_empty()
    });
    timeout(Duration::from_secs(5), ended).await.expect("the work ends");
    let _next = moved(served, counting()).await;
    client.send(Sent::Text("x".into())).await.expect("the WebSocket is open");
    assert_eq!(next_text(&mut client).await, "1 x");
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_that_ends_without_an_id_ends_at_once_during_the_drain() {
    let (to_stream, events) = mpsc::unbounded_channel::<()>();
    let events = std::sync::Mutex::new(Some(events));
    let handler = async move || {
        let events = events.lock().expect("no panic").take().expect("one request");
        let events = stream::unfold(events, async |mut events: mpsc::UnboundedReceiver<()>| {
            events.recv().await.map(|()| (Ok::<_, Infallible>(Event::default().data("x")), events))
        });
        EventStream(Sse::new(events))
    };
    let handler = Arc::new(handler);
    let router = Router::new().route("/", get(async move || handler().await));
    let served = serve(router).await;
    to_stream.send(()).expect("the stream is open");
    let mut reader = Reader::open(&served).await;
    reader.event().await.expect("the response has not ended");
    served.registry().set_phase(Phase::Draining);
    drop(to_stream);
    timeout(Duration::from_secs(10), reader.reaches_the_end()).await.expect("the response ends in time");
}

/// Some clients, such as the JDK's, offer an upgrade to HTTP/2 with each request.
#[tokio::test(flavor = "multi_thread")]
async fn events_continue_on_a_connection_with_a_declined_upgrade() {
    let request = "GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\
        http2-settings: AAEAAEAAAAIAAAAA\r\naccept: text/event-stream\r\n\r\n";
    let mut served = serve(numbering()).await;
    let mut reader = Reader::begin(&Target::Tcp(served.address), request.as_bytes()).await;
    for number in 0..200_usize {
        let event = reader.event().await.expect("the response has not ended");
        assert!(event.starts_with(&format!("id: {number}\n")), "{event:.60}");
        if number % 50 == 49 {
            served = moved(served, numbering()).await;
        }
    }
}

/// Of what a handler writes to a client that reads slowly, TLS keeps the last part.
#[tokio::test(flavor = "multi_thread")]
async fn messages_in_the_buffer_of_tls_are_not_lost() {
    fn router() -> Router {
        let handler = async |upgrade: WebSocketUpgrade, carry: Carry<u64>| {
            let mut number = carry.received().expect("the state is valid").unwrap_or_default();
            upgrade.on_upgrade(async move |mut socket: WebSocket| {
                loop {
                    let message = Message::Text(format!("{number} {}", "x".repeat(4_000)).into());
                    number += 1;
                    tokio::select! {
                        biased;
                        sent = socket.send(message) => if sent.is_err() { return },
                        () = carry.requested() => return carry.hand_on(&number),
                    }
                }
            })
        };
        Router::new().route("/", any(handler))
    }
    let certificate = Certificate::new().expect("the certificate is made");
    let served = serve_with(router(), Some(tls_of(&certificate))).await;
    let mut client = connect_over(&served, &certificate, &TLS13).await;
    // The buffers of the sockets fill up.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    served.server.enter(Phase::Quiescing);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let next = serve_with(router(), Some(tls_of(&certificate))).await;
    let reading = async {
        for number in 0..5_000 {
            let text = next_text(&mut client).await;
            assert!(text.starts_with(&format!("{number} ")), "{number}: {text:.20}");
        }
    };
    tokio::join!(reading, move_to(&next, served));
}
