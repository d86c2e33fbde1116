//! Real connections to a server in this process, each test with its own router: when they become quiescent, and what of
//! them is handed over. Other test files use [`serve`] and [`move_to`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use h2::client::SendRequest;
use http_body_util::BodyExt;
use hyper::{Request, StatusCode};
use testkit::certificate::Certificate;
use testkit::client::{self, Http2, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::http2::frame::{
    ACK, END_HEADERS, END_STREAM, GOAWAY, HEAD_LENGTH, HEADERS, Head, PING, RST_STREAM, SETTINGS,
    WINDOW_UPDATE,
};
use super::unread_tests::wait_until;
use super::{Connection, ConnectionContext, Endpoint, EndpointKind, PREFACE};
use crate::app::process::Process;
use crate::listeners::{Listener, ListeningSocket, Ownership};
use crate::os::sys;
use crate::registry::{Counts, Limits, Phase, Registry, Stage};
use crate::requests::{Proxies, Routes};
use crate::server::{Acceptor, Queues, Server};
use crate::transport::tls_config::Tls;
use crate::transport::tls_tests::tls_of;

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a connection may take to become quiescent before it receives GOAWAY: longer than any test.
const QUIESCE_LIMIT: Duration = Duration::from_secs(3600);

/// The time limits of requests and connections.
const LIMIT: Duration = Duration::from_secs(30);

/// A running server.
pub struct Served {
    pub address: SocketAddr,
    pub server: Server,
}

/// The endpoint of a listener on which `application` is served, over TLS if `tls` is given.
pub fn endpoint(application: Router, tls: Option<Tls>) -> Arc<Endpoint> {
    let (name, kind) = match tls {
        Some(tls) => ("https", EndpointKind::Https(tls)),
        None => ("http", EndpointKind::Http),
    };
    let routes = Routes::new(application, 16 << 20, LIMIT);
    let name = name.parse().expect("the name is valid");
    Arc::new(Endpoint::new(name, kind, routes, None))
}

/// Serves `router` on a free port until the end of the test.
pub async fn serve(router: Router) -> Served {
    serve_with(router, None).await
}

/// The same, over TLS if `tls` is given.
pub async fn serve_with(router: Router, tls: Option<Tls>) -> Served {
    serve_on(endpoint(router, tls)).await
}

/// Serves what `endpoint` has on a free port until the end of the test.
pub async fn serve_on(endpoint: Arc<Endpoint>) -> Served {
    serve_behind(endpoint, Proxies::default()).await
}

/// The same, with these trusted proxies.
pub async fn serve_behind(endpoint: Arc<Endpoint>, proxies: Proxies) -> Served {
    let limits = Limits { head: LIMIT, idle: LIMIT, stall: LIMIT, close: LIMIT };
    let shutdown = CancellationToken::new();
    let registry = Registry::new(limits, shutdown.clone());
    let context = ConnectionContext::new(Process::begin(1), shutdown, QUIESCE_LIMIT, proxies);
    let server = Server::new(context, std::slice::from_ref(&endpoint), registry, 100, Queues::default())
        .expect("the server is made");
    let socket = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port is bound")
        .into_std()
        .expect("the listener is converted");
    let address = socket.local_addr().expect("the listener has an address");
    let socket = ListeningSocket::Tcp(socket);
    let listener = Listener { name: endpoint.name.clone(), socket, ownership: Ownership::Inherited };
    server.accept_from(Acceptor::new(listener, endpoint, LIMIT).expect("the socket listens"));
    Served { address, server }
}

impl Served {
    pub fn registry(&self) -> &Registry {
        self.server.registry()
    }

    /// Waits until all connections are quiescent or closed. Returns the number of those that are quiescent.
    pub async fn count_quiescent(&self) -> usize {
        self.take_quiescent().await.len()
    }

    /// Waits until all connections are quiescent or closed. Returns those that are quiescent.
    pub async fn take_quiescent(&self) -> Vec<Connection> {
        let done = self.registry().wait_until(|| self.registry().is_drained());
        timeout(PATIENCE, done).await.expect("all connections become quiescent or close");
        let mut connections = self.server.handover_queue().take_all();
        connections.extend(self.server.take_parked());
        connections
    }

    /// Waits until `count` connections are open.
    pub async fn until_connections(&self, count: usize) {
        let reached = async {
            while self.registry().counts().connections != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("the number of connections is reached");
    }

    /// Waits until the counts are `expected`.
    pub async fn until_counts(&self, expected: Counts) {
        let reached = async {
            while self.registry().counts() != expected {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let in_time = timeout(PATIENCE, reached).await.is_ok();
        assert!(in_time, "{:?} instead of {expected:?}", self.registry().counts());
    }

    /// Waits until the only connection is at `stage`.
    pub async fn until_stage(&self, stage: Stage) {
        let reached = async {
            while self.registry().entries().first().is_none_or(|entry| entry.stage() != stage) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("the stage is reached");
    }
}

/// What a task that outlives its handler does with a request body.
#[derive(Clone, Copy)]
enum Reader {
    /// Reads it to its end, and drops it later.
    ToTheEnd,
    /// Reads all bytes but not the end, and drops it later.
    ToTheLastByte,
    /// Reads nothing, and drops it later.
    Drops,
}

/// A router whose handler answers 202 and gives the body to a task. Each task sends a gate, and drops its body when the
/// test opens the gate.
fn accepting(reader: Reader) -> (Router, mpsc::UnboundedReceiver<oneshot::Sender<()>>) {
    let (gates, opened) = mpsc::unbounded_channel();
    let handler = async move |body: Body| {
        let (open, gate) = oneshot::channel();
        tokio::spawn(async move {
            let mut chunks = Box::pin(body.into_data_stream());
            let mut left = BODY.len();
            while left > 0 && !matches!(reader, Reader::Drops) {
                left -= chunks.next().await.expect("a chunk arrives").expect("no error occurs").len();
            }
            if matches!(reader, Reader::ToTheEnd) {
                assert!(chunks.next().await.is_none());
            }
            gates.send(open).expect("the test waits");
            let _ = gate.await;
            drop(chunks);
        });
        StatusCode::ACCEPTED
    };
    (Router::new().route("/", post(handler)), opened)
}

const BODY: &[u8] = b"0123456789";

/// `BODY` with a content length, and in chunks: their end is seen only by reading on.
const POSTS: [&[u8]; 2] = [
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n0123456789",
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
];

const READERS: [Reader; 3] = [Reader::ToTheEnd, Reader::ToTheLastByte, Reader::Drops];

#[tokio::test(flavor = "multi_thread")]
async fn connection_becomes_idle_when_a_task_drops_the_body_after_the_response() {
    for (reader, request) in READERS.into_iter().flat_map(|reader| POSTS.map(|post| (reader, post))) {
        let (router, mut gates) = accepting(reader);
        let served = serve(router).await;
        let mut client =
            client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        for _ in 0..2 {
            assert_eq!(client.ask(request).await.expect("the server answers").status, 202);
            gates.recv().await.expect("the task has the body").send(()).expect("the task waits");
            served.until_stage(Stage::Waiting).await;
        }
        client.send(request).await.expect("the bytes are sent");
        let gate = gates.recv().await.expect("the task has the body");
        assert_eq!(client.answer().await.expect("the server answers").status, 202);
        served.server.enter(Phase::Quiescing);
        gate.send(()).expect("the task waits");
        assert_eq!(served.count_quiescent().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn body_that_was_read_to_its_end_does_not_delay_quiescence() {
    for request in POSTS {
        let (router, mut gates) = accepting(Reader::ToTheEnd);
        let served = serve(router).await;
        let mut client =
            client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        assert_eq!(client.ask(request).await.expect("the server answers").status, 202);
        let _closed = gates.recv().await.expect("the task has the body");
        served.server.enter(Phase::Quiescing);
        assert_eq!(served.count_quiescent().await, 1);
    }
}

/// hyper would report an error instead of the end of the body when the connection is handed over or parked.
#[tokio::test(flavor = "multi_thread")]
async fn body_that_arrives_after_the_response_is_whole_for_its_reader() {
    for request in POSTS {
        let (lengths, mut read) = mpsc::unbounded_channel();
        let handler = async move |body: Body| {
            tokio::spawn(async move {
                let body = body.collect().await.map(|body| body.to_bytes().len());
                lengths.send(body.map_err(|error| error.to_string())).expect("the test waits");
            });
            StatusCode::ACCEPTED
        };
        let served = serve(Router::new().route("/", post(handler))).await;
        let mut client =
            client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        let (begun, left) = request.split_at(request.len() - 5);
        assert_eq!(client.ask(begun).await.expect("the server answers").status, 202);
        served.server.enter(Phase::Quiescing);
        client.send(left).await.expect("the bytes are sent");
        assert_eq!(served.count_quiescent().await, 1);
        let length = timeout(PATIENCE, read.recv()).await.expect("the body ends in time");
        assert_eq!(length, Some(Ok(10)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn body_that_outlives_its_connection_does_not_delay_the_drain() {
    for request in POSTS {
        let (router, mut gates) = accepting(Reader::ToTheLastByte);
        let served = serve(router).await;
        let mut client =
            client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        assert_eq!(client.ask(request).await.expect("the server answers").status, 202);
        let gate = gates.recv().await.expect("the task has the body");
        drop(client);
        served.until_connections(0).await;
        gate.send(()).expect("the task waits");
        served.server.enter(Phase::Quiescing);
        assert_eq!(served.count_quiescent().await, 0);
    }
}

/// A router whose handler sends a gate, and answers 413 without reading the body when the test opens the gate.
fn refusing() -> (Router, mpsc::UnboundedReceiver<oneshot::Sender<()>>) {
    let (gates, opened) = mpsc::unbounded_channel();
    let handler = async move |body: Body| {
        let (open, gate) = oneshot::channel();
        gates.send(open).expect("the test waits");
        let _ = gate.await;
        drop(body);
        StatusCode::PAYLOAD_TOO_LARGE
    };
    (Router::new().route("/", post(handler)), opened)
}

/// The next process would take the remainder of the body for the beginning of a request.
#[tokio::test(flavor = "multi_thread")]
async fn connection_with_an_unread_request_body_is_closed_and_not_handed_over() {
    for request in POSTS {
        let (sent, missing) = request.split_at(request.len() - 5);
        let (router, mut opened) = refusing();
        let served = serve(router).await;
        let mut client =
            client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        client.send(sent).await.expect("the bytes are sent");
        let gate = opened.recv().await.expect("the handler runs");
        // Set before the response, so that the connection must become quiescent in the poll that sends it.
        served.server.enter(Phase::Quiescing);
        gate.send(()).expect("the handler waits");
        assert_eq!(client.answer().await.expect("the server answers").status, 413);
        // If the remainder arrived before hyper looks for it, hyper would read it, and the connection would be handed over.
        for remainder in [&[][..], missing] {
            client.send(remainder).await.expect("the bytes are sent");
            let read = timeout(PATIENCE, client.read_more()).await.expect("the connection is closed in time");
            assert_eq!(read.expect("the connection is not reset"), 0);
        }
        drop(client);
        assert_eq!(served.count_quiescent().await, 0);
    }
}

/// The body is longer than what hyper reads with the head, and arrives before the response.
#[tokio::test(flavor = "multi_thread")]
async fn connection_is_handed_over_if_the_whole_unread_request_body_has_arrived() {
    let (router, mut opened) = refusing();
    let served = serve(router).await;
    let mut client = TcpStream::connect(served.address).await.expect("the server accepts");
    client.set_nodelay(true).expect("the option is set");
    let request = client::post("/", 9_000);
    let (head, body) = request.split_at(request.len() - 9_000);
    client.write_all(head).await.expect("the bytes are sent");
    let gate = opened.recv().await.expect("the handler runs");
    client.write_all(body).await.expect("the bytes are sent");
    // `sys::accept_queue` reads `tcpi_unacked`, which counts the segments without an acknowledgement if a socket is connected.
    wait_until("the body is in the buffer of the server", || sys::accept_queue(&client) == Some(0)).await;
    // The runtime receives readiness events in order, so it has that of the body when it answers another client.
    let target = Target::Tcp(served.address);
    let mut other = client::Connection::open(&target).await.expect("the server accepts");
    assert_eq!(other.ask(&client::get("/")).await.expect("the server answers").status, 405);
    drop(other);
    served.until_connections(1).await;
    served.server.enter(Phase::Quiescing);
    gate.send(()).expect("the handler waits");
    let mut status = [0; 12];
    client.read_exact(&mut status).await.expect("the server answers");
    assert_eq!(&status, b"HTTP/1.1 413");
    assert_eq!(served.count_quiescent().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_connection_becomes_idle_when_a_task_drops_the_body_after_the_response() {
    for reader in READERS {
        let (router, mut gates) = accepting(reader);
        let served = serve(router).await;
        let mut client = Http2::open(&Target::Tcp(served.address)).await.expect("the server accepts");
        for _ in 0..2 {
            assert_eq!(
                client.post("/", BODY).await.expect("the server answers").expect("no GOAWAY arrives").0,
                202
            );
            gates.recv().await.expect("the task has the body").send(()).expect("the task waits");
            served.until_stage(Stage::Waiting).await;
        }
        assert_eq!(
            client.post("/", BODY).await.expect("the server answers").expect("no GOAWAY arrives").0,
            202
        );
        let gate = gates.recv().await.expect("the task has the body");
        served.server.enter(Phase::Quiescing);
        gate.send(()).expect("the task waits");
        assert_eq!(served.count_quiescent().await, 1);
    }
}

// ---- connections that are handed over ----

/// Hands all connections of `served` over to a new server, which stands for another process.
async fn move_on(served: Served, router: Router) -> Served {
    let next = serve(router).await;
    move_to(&next, served).await;
    next
}

/// Hands all connections of `served` over to `next`.
pub async fn move_to(next: &Served, served: Served) {
    served.server.enter(Phase::Quiescing);
    for connection in served.take_quiescent().await {
        let [endpoint] = next.server.endpoints() else { panic!("the server has one endpoint") };
        next.server.adopt(Connection { endpoint: endpoint.clone(), ..connection });
    }
}

/// It could not be handed over, for example because the successor hangs. Its client has sent nothing before.
#[tokio::test(flavor = "multi_thread")]
async fn new_tls_connection_is_served_by_a_process_that_finishes_it_during_a_handover() {
    let certificate = Certificate::new().expect("openssl runs");
    let served = serve_with(Router::new().route("/", get("hello")), Some(tls_of(&certificate))).await;
    let stream = TcpStream::connect(served.address).await.expect("the server accepts");
    served.until_connections(1).await;
    served.server.enter(Phase::Quiescing);
    for connection in served.take_quiescent().await {
        served.server.finish(connection);
    }
    let config = certificate.client(&["http/1.1"]).expect("the client configuration is valid");
    let name = "localhost".try_into().expect("the name is valid");
    let connected = timeout(PATIENCE, TlsConnector::from(config).connect(name, stream)).await;
    let mut client = connected.expect("the server reacts in time").expect("the handshake succeeds");
    client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("the bytes are sent");
    let mut answer = String::new();
    let read = timeout(PATIENCE, client.read_to_string(&mut answer)).await.expect("the connection ends");
    read.expect("it ends with close_notify");
    assert!(answer.contains("connection: close") && answer.ends_with("hello"), "{answer}");
}

/// The same through a server in between, which is in `Quiescing` already when it receives the connections.
async fn move_through(served: Served, router: Router) -> Served {
    let between = serve(echo()).await;
    between.server.enter(Phase::Quiescing);
    move_to(&between, served).await;
    move_on(between, router).await
}

#[tokio::test(flavor = "multi_thread")]
async fn unread_bytes_pass_through_a_process_that_is_already_quiescing() {
    let served = serve(echo()).await;
    let mut client =
        client::Connection::open(&Target::Tcp(served.address)).await.expect("the server accepts");
    let (begun, left) = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello".split_at(30);
    client.send(begun).await.expect("the bytes are sent");
    served.until_stage(Stage::Head).await;
    let _served = move_through(served, echo()).await;
    assert_eq!(client.ask(left).await.expect("the server answers").text(), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_http2_frame_passes_through_a_process_that_is_already_quiescing() {
    let mut served = serve(echo()).await;
    let mut client = TcpStream::connect(served.address).await.expect("the server accepts");
    let mut hello = PREFACE.to_vec();
    hello.extend([frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, ACK, 0, &[])].concat());
    client.write_all(&hello).await.expect("the bytes are sent");
    await_frame(&mut client, |head| head.frame_type == SETTINGS && !head.has(ACK)).await;
    let mut sent = get_on(1);
    for stream in [3, 5, 7] {
        let next = get_on(stream);
        let (begun, left) = next.split_at(12);
        // In one write, so that the server reads the beginning of the next frame together with the request.
        client.write_all(&[&sent, begun].concat()).await.expect("the bytes are sent");
        await_frame(&mut client, |head| head.stream == stream - 2 && head.has(END_STREAM)).await;
        served = move_through(served, echo()).await;
        sent = left.to_vec();
    }
}

/// A client whose connection cannot be handed over, because it has more settings than are kept. It has received the
/// response on stream 1.
async fn immovable_client(served: &Served) -> TcpStream {
    let mut client = TcpStream::connect(served.address).await.expect("the server accepts");
    let settings: Vec<u8> =
        (0x100..0x130_u16).flat_map(|key| [&key.to_be_bytes()[..], &[0; 4]].concat()).collect();
    let hello = [PREFACE, &frame(SETTINGS, 0, 0, &settings)].concat();
    client.write_all(&hello).await.expect("the bytes are sent");
    await_frame(&mut client, |head| head.frame_type == SETTINGS && !head.has(ACK)).await;
    let acknowledged = [frame(SETTINGS, ACK, 0, &[]), get_on(1)].concat();
    client.write_all(&acknowledged).await.expect("the bytes are sent");
    await_frame(&mut client, |head| head.stream == 1 && head.has(END_STREAM)).await;
    client
}

fn get_on(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x82\x86\x84\x41\x01x")
}

/// The header and payload of the next frame that is neither SETTINGS nor WINDOW_UPDATE. None at the end of the stream.
async fn next_frame(client: &mut TcpStream) -> Option<(Head, Vec<u8>)> {
    loop {
        let mut head = [0; HEAD_LENGTH];
        let read = timeout(PATIENCE, client.read(&mut head[..1]))
            .await
            .expect("the frame arrives in time")
            .expect("the connection is not reset");
        if read == 0 {
            return None;
        }
        client.read_exact(&mut head[1..]).await.expect("a frame arrives");
        let head = Head::decode(head);
        let mut payload = vec![0; head.length];
        client.read_exact(&mut payload).await.expect("the payload arrives");
        if ![SETTINGS, WINDOW_UPDATE].contains(&head.frame_type) {
            return Some((head, payload));
        }
    }
}

/// Reads a GOAWAY, and returns its last stream.
async fn goaway(client: &mut TcpStream) -> u32 {
    let (head, payload) = next_frame(client).await.expect("a frame arrives");
    assert_eq!(head.frame_type, GOAWAY, "{head:?}");
    let (stream, error) = payload.split_first_chunk().expect("a GOAWAY names a stream");
    assert_eq!(error, [0; 4], "NO_ERROR");
    u32::from_be_bytes(*stream)
}

const ANY_STREAM: u32 = (1 << 31) - 1;

#[tokio::test(flavor = "multi_thread")]
async fn request_that_crosses_the_first_goaway_is_answered() {
    let served = serve(echo()).await;
    let mut client = immovable_client(&served).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(goaway(&mut client).await, ANY_STREAM);
    let (ping, payload) = next_frame(&mut client).await.expect("a frame arrives");
    assert_eq!((ping.frame_type, ping.flags), (PING, 0));
    let crossing = [get_on(3), frame(PING, ACK, 0, &payload)].concat();
    client.write_all(&crossing).await.expect("the bytes are sent");
    let mut is_answered = false;
    let last = loop {
        let (head, payload) = next_frame(&mut client).await.expect("a frame arrives");
        is_answered |= head.stream == 3 && head.has(END_STREAM);
        if head.frame_type == GOAWAY {
            break payload;
        }
    };
    assert_eq!(last, [0, 0, 0, 3, 0, 0, 0, 0]);
    while !is_answered {
        let (head, _) = next_frame(&mut client).await.expect("the response arrives");
        is_answered = head.stream == 3 && head.has(END_STREAM);
    }
    assert!(next_frame(&mut client).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_does_not_react_to_goaway_receives_a_second_one_and_is_closed() {
    let served = serve(echo()).await;
    let mut client = immovable_client(&served).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(goaway(&mut client).await, ANY_STREAM);
    let (ping, _) = next_frame(&mut client).await.expect("a frame arrives");
    assert_eq!((ping.frame_type, ping.flags), (PING, 0));
    assert_eq!(goaway(&mut client).await, 1);
    assert!(next_frame(&mut client).await.is_none());
}

/// The handler takes longer than a client that waits for nothing may stay silent.
#[tokio::test(flavor = "multi_thread")]
async fn silent_client_that_waits_for_a_response_is_not_closed() {
    let gate = Arc::new(Notify::new());
    let waits = gate.clone();
    let slow = move || {
        let gate = waits.clone();
        async move { gate.notified().await }
    };
    let served = serve(Router::new().route("/", get("hello")).route("/slow", get(slow))).await;
    let mut client = immovable_client(&served).await;
    let slow = frame(HEADERS, END_HEADERS | END_STREAM, 3, b"\x82\x86\x04\x05/slow\x41\x01x");
    client.write_all(&slow).await.expect("the bytes are sent");
    served.until_stage(Stage::InFlight).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(goaway(&mut client).await, ANY_STREAM);
    let (ping, _) = next_frame(&mut client).await.expect("a frame arrives");
    assert_eq!(ping.frame_type, PING);
    // Longer than `GOAWAY_LIMIT`.
    let silence = timeout(Duration::from_millis(1500), next_frame(&mut client)).await;
    assert!(silence.is_err(), "{silence:?}");
    gate.notify_one();
    let (answer, _) = next_frame(&mut client).await.expect("a frame arrives");
    assert_eq!((answer.frame_type, answer.stream), (HEADERS, 3));
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    Head { stream, ..Head::new(kind, flags, payload.len()) }.put(&mut bytes);
    [&bytes, payload].concat()
}

/// Reads up to the first frame that satisfies `wanted`.
async fn await_frame(client: &mut TcpStream, wanted: impl Fn(Head) -> bool) {
    let mut head = [0; HEAD_LENGTH];
    loop {
        timeout(PATIENCE, client.read_exact(&mut head))
            .await
            .expect("the frame arrives in time")
            .expect("a frame arrives");
        let head = Head::decode(head);
        client.read_exact(&mut vec![0; head.length]).await.expect("the payload arrives");
        assert!(![RST_STREAM, GOAWAY].contains(&head.frame_type), "{head:?}");
        if wanted(head) {
            return;
        }
    }
}

fn echo() -> Router {
    Router::new().route("/", get("hello\n").post(async |body: Body| body))
}

/// An HTTP/2 client whose windows have the size `window`.
async fn http2_client(address: SocketAddr, window: u32) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.expect("the server accepts");
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(window).initial_connection_window_size(window);
    let (sender, connection) = builder.handshake(stream).await.expect("the HTTP/2 handshake succeeds");
    tokio::spawn(async move { connection.await.expect("no error occurs") });
    sender
}

/// Sends `body`, and returns the body of the response.
async fn exchange(sender: SendRequest<Bytes>, body: Bytes) -> Result<Vec<u8>, h2::Error> {
    let mut sender = sender.ready().await?;
    let method = if body.is_empty() { "GET" } else { "POST" };
    let request =
        Request::builder().method(method).uri("http://localhost/").body(()).expect("the request is valid");
    let (answer, mut sending) = sender.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        // h2 sends the body as the windows allow.
        sending.send_data(body, true)?;
    }
    let mut answer = answer.await?.into_body();
    let mut all = Vec::new();
    while let Some(data) = answer.data().await {
        let data = data?;
        answer.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_http2_connection_continues_after_each_of_twenty_handovers() {
    let mut served = serve(echo()).await;
    let client = http2_client(served.address, 65_535).await;
    for turn in 0..20_u8 {
        let body: Bytes = vec![turn; usize::from(turn) * 1000].into();
        let answer = exchange(client.clone(), body.clone()).await.expect("the server answers");
        assert_eq!(answer, if body.is_empty() { b"hello\n".as_slice() } else { &body });
        served = move_on(served, echo()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_http2_connections_are_handed_over_without_loss() {
    let mut served = serve(echo()).await;
    let stop = CancellationToken::new();
    let answers = Arc::new(AtomicU64::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for (window, streams, length) in [
        (65_535, 1, 0),
        (65_535, 50, 0),
        (65_535, 3, 1 << 20),
        (1 << 20, 10, 100_000),
        (1 << 24, 2, 3 << 20),
        (65_535, 20, 20_000),
    ] {
        let client = http2_client(served.address, window).await;
        for number in 0..streams {
            let (client, stop, answers) = (client.clone(), stop.clone(), answers.clone());
            clients.spawn(async move {
                let body: Bytes = vec![number; length].into();
                loop {
                    let is_last = stop.is_cancelled();
                    let answer = exchange(client.clone(), body.clone()).await.expect("the server answers");
                    assert!(length == 0 || answer == body, "{} of {length} bytes", answer.len());
                    answers.fetch_add(1, Ordering::Relaxed);
                    if is_last {
                        return;
                    }
                }
            });
        }
    }
    for _ in 0..20 {
        // As many more responses as there are streams.
        let enough = answers.load(Ordering::Relaxed) + 86;
        let reached = async {
            while answers.load(Ordering::Relaxed) < enough {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("the requests are answered");
        served.until_connections(6).await;
        served = move_on(served, echo()).await;
        // A second handover follows immediately.
        served = move_on(served, echo()).await;
    }
    // Each stream is answered once more after the last handover.
    stop.cancel();
    timeout(PATIENCE, clients.join_all()).await.expect("the last requests are answered");
}
