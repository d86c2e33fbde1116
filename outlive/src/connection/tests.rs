//! Real connections to a router of the test's own, in this process: when they come to rest, and what that
//! takes.

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
use hyper::{Request, StatusCode};
use testkit::client::{self, Http2, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::http2::frame::{
    ACK, END_HEADERS, END_STREAM, GOAWAY, HEAD_LENGTH, HEADERS, Head, PING, RST_STREAM, SETTINGS,
    WINDOW_UPDATE,
};
use super::{PREFACE, Services};
use crate::app::process::Process;
use crate::listeners::{Listener, ListeningSocket, Ownership};
use crate::registry::{Limits, Phase, Registry, Stage};
use crate::requests::Routes;
use crate::server::{Acceptor, Queues, Server};
use crate::transport::stream::Connection;
use crate::transport::tls_config::Tls;

/// How long a test waits for an event before it fails: only a test that hangs waits as long.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a connection may take to come to rest before it is told to end: never, in these tests.
const REST_LIMIT: Duration = Duration::from_secs(3600);

pub struct Served {
    pub address: SocketAddr,
    pub server: Server,
    pub quiescent: mpsc::UnboundedReceiver<Connection>,
}

/// Serves `router` on a port of its own, until the end of the test.
pub async fn serve(router: Router) -> Served {
    serve_with(router, None).await
}

/// As `serve`, over TLS if there is a configuration for it.
pub async fn serve_with(router: Router, tls: Option<Tls>) -> Served {
    let limit = Duration::from_secs(30);
    let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
    let shutdown = CancellationToken::new();
    let registry = Registry::new(limits, shutdown.clone());
    let name = if tls.is_some() { "https" } else { "http" };
    let services = Services {
        routes: Routes::new(router, 16 << 20, limit),
        admin: Routes::new(Router::new(), 1024, limit),
        tls,
        process: Process::begin(1),
        shutdown,
        quiesce_limit: REST_LIMIT,
    };
    let (server, quiescent) = Server::new(services, registry, 100, Queues::default()).expect("a server");
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port").into_std().expect("a listener");
    let address = socket.local_addr().expect("an address");
    let socket = ListeningSocket::Tcp(socket);
    let listener = Listener { name: name.parse().expect("a name"), socket, ownership: Ownership::Inherited };
    server.accept_from(Acceptor::new(listener).expect("it listens"));
    Served { address, server, quiescent }
}

impl Served {
    pub fn registry(&self) -> &Registry {
        self.server.registry()
    }

    /// Waits until all connections have come to rest or closed; gives those at rest.
    pub async fn rest(&mut self) -> usize {
        let done = self.registry().wait_until(|| self.registry().is_drained());
        timeout(PATIENCE, done).await.expect("all come to rest");
        std::iter::from_fn(|| self.quiescent.try_recv().ok()).chain(self.server.take_parked()).count()
    }

    /// Waits until so many connections are open.
    async fn until_connections(&self, count: usize) {
        let reached = async {
            while self.registry().counts().connections != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("as many connections");
    }

    /// Waits until the only connection is at `stage`.
    async fn until_stage(&self, stage: Stage) {
        let reached = async {
            while self.registry().entries().first().is_none_or(|entry| entry.stage() != stage) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("the stage is reached");
    }
}

/// What a task that outlives its handler does with a request's body.
#[derive(Clone, Copy)]
enum Reader {
    /// Reads all of it, and keeps it for a while after.
    ToTheEnd,
    /// Reads what it needs, and drops it after a while without having seen its end.
    ToTheLastByte,
    /// Drops it after a while, unread.
    Drops,
}

/// A router whose handler answers 202 and leaves the body to a task; the gates, each to be opened when that task
/// may let go of its body.
fn accepting(reader: Reader) -> (Router, mpsc::UnboundedReceiver<oneshot::Sender<()>>) {
    let (gates, opened) = mpsc::unbounded_channel();
    let handler = async move |body: Body| {
        let (open, gate) = oneshot::channel();
        tokio::spawn(async move {
            let mut chunks = Box::pin(body.into_data_stream());
            let mut left = BODY.len();
            while left > 0 && !matches!(reader, Reader::Drops) {
                left -= chunks.next().await.expect("a chunk").expect("no error").len();
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

/// The same in one chunk, and in chunks, whose end a reader has to look for.
const POSTS: [&[u8]; 2] = [
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n0123456789",
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
];

const READERS: [Reader; 3] = [Reader::ToTheEnd, Reader::ToTheLastByte, Reader::Drops];

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_a_task_lets_go_of_after_the_answer_leaves_its_connection_idle() {
    for (reader, request) in READERS.into_iter().flat_map(|reader| POSTS.map(|post| (reader, post))) {
        let (router, mut gates) = accepting(reader);
        let mut served = serve(router).await;
        let mut client = client::Connection::open(&Target::Tcp(served.address)).await.expect("a connection");
        for _ in 0..2 {
            assert_eq!(client.ask(request).await.expect("an answer").status, 202);
            gates.recv().await.expect("a task").send(()).expect("it waits");
            served.until_stage(Stage::Waiting).await;
        }
        client.send(request).await.expect("sent");
        let gate = gates.recv().await.expect("a task");
        assert_eq!(client.answer().await.expect("an answer").status, 202);
        served.server.enter(Phase::Quiescing);
        gate.send(()).expect("it waits");
        assert_eq!(served.rest().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_was_read_to_its_end_keeps_nobody_waiting() {
    for request in POSTS {
        let (router, mut gates) = accepting(Reader::ToTheEnd);
        let mut served = serve(router).await;
        let mut client = client::Connection::open(&Target::Tcp(served.address)).await.expect("a connection");
        assert_eq!(client.ask(request).await.expect("an answer").status, 202);
        let _closed = gates.recv().await.expect("a task");
        served.server.enter(Phase::Quiescing);
        assert_eq!(served.rest().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_whose_task_outlives_the_connection_is_no_longer_counted() {
    for request in POSTS {
        let (router, mut gates) = accepting(Reader::ToTheLastByte);
        let mut served = serve(router).await;
        let mut client = client::Connection::open(&Target::Tcp(served.address)).await.expect("a connection");
        assert_eq!(client.ask(request).await.expect("an answer").status, 202);
        let gate = gates.recv().await.expect("a task");
        drop(client);
        served.until_connections(0).await;
        gate.send(()).expect("it waits");
        served.server.enter(Phase::Quiescing);
        assert_eq!(served.rest().await, 0);
    }
}

/// What is missing of the body would be the beginning of a request for the next process.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_request_body_was_not_read_ends_and_is_not_handed_over() {
    for request in POSTS {
        let (sent, missing) = request.split_at(request.len() - 5);
        let (gates, mut opened) = mpsc::unbounded_channel();
        let handler = async move |body: Body| {
            let (open, gate) = oneshot::channel::<()>();
            gates.send(open).expect("the test waits");
            let _ = gate.await;
            drop(body);
            StatusCode::PAYLOAD_TOO_LARGE
        };
        let mut served = serve(Router::new().route("/", post(handler))).await;
        let mut client = client::Connection::open(&Target::Tcp(served.address)).await.expect("a connection");
        client.send(sent).await.expect("sent");
        let gate = opened.recv().await.expect("the handler runs");
        // Before the answer, so that the connection is to come to rest in the turn that gives it.
        served.server.enter(Phase::Quiescing);
        gate.send(()).expect("the handler waits");
        assert_eq!(client.answer().await.expect("an answer").status, 413);
        client.send(missing).await.expect("sent");
        assert_eq!(timeout(PATIENCE, client.read_more()).await.expect("an end").expect("no reset"), 0);
        drop(client);
        assert_eq!(served.rest().await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_body_that_a_task_lets_go_of_after_the_answer_leaves_its_connection_idle() {
    for reader in READERS {
        let (router, mut gates) = accepting(reader);
        let mut served = serve(router).await;
        let mut client = Http2::open(&Target::Tcp(served.address)).await.expect("a connection");
        for _ in 0..2 {
            assert_eq!(client.post("/", BODY).await.expect("an answer").expect("no GOAWAY").0, 202);
            gates.recv().await.expect("a task").send(()).expect("it waits");
            served.until_stage(Stage::Waiting).await;
        }
        assert_eq!(client.post("/", BODY).await.expect("an answer").expect("no GOAWAY").0, 202);
        let gate = gates.recv().await.expect("a task");
        served.server.enter(Phase::Quiescing);
        gate.send(()).expect("it waits");
        assert_eq!(served.rest().await, 1);
    }
}

// ---- HTTP/2 connections that move ----

/// Moves all connections of `served` to a server of their own, as they would go to another process.
async fn move_on(served: Served, router: Router) -> Served {
    let next = serve(router).await;
    move_to(&next, served).await;
    next
}

pub async fn move_to(next: &Served, mut served: Served) {
    served.server.enter(Phase::Quiescing);
    let done = served.registry().wait_until(|| served.registry().is_drained());
    timeout(PATIENCE, done).await.expect("all come to rest");
    let quiescent = std::iter::from_fn(|| served.quiescent.try_recv().ok());
    for connection in quiescent.chain(served.server.take_parked()) {
        next.server.adopt(connection);
    }
}

/// The same by way of a server that has no time for them: it is to end before they come.
async fn move_through(served: Served, router: Router) -> Served {
    let between = serve(echo()).await;
    between.server.enter(Phase::Quiescing);
    move_to(&between, served).await;
    move_on(between, router).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_and_not_consumed_goes_through_a_process_that_has_no_time_for_it() {
    let served = serve(echo()).await;
    let mut client = client::Connection::open(&Target::Tcp(served.address)).await.expect("a connection");
    let (begun, left) = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello".split_at(30);
    client.send(begun).await.expect("sent");
    served.until_stage(Stage::Head).await;
    let _served = move_through(served, echo()).await;
    assert_eq!(client.ask(left).await.expect("an answer").text(), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_frame_of_http2_goes_through_a_process_that_has_no_time_for_it() {
    let mut served = serve(echo()).await;
    let mut client = TcpStream::connect(served.address).await.expect("a connection");
    let mut hello = PREFACE.to_vec();
    hello.extend([frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, ACK, 0, &[])].concat());
    client.write_all(&hello).await.expect("sent");
    await_frame(&mut client, |head| head.frame_type == SETTINGS && !head.has(ACK)).await;
    let get = |stream, table: &[u8]| {
        let fields = [table, b"\x82\x86\x84\x41\x01x"].concat();
        frame(HEADERS, END_HEADERS | END_STREAM, stream, &fields)
    };
    let mut sent = get(1, b"\x20");
    for stream in [3, 5, 7] {
        let next = get(stream, b"");
        let (begun, left) = next.split_at(12);
        // In one piece, so that whoever has read the one has read the other.
        client.write_all(&[&sent, begun].concat()).await.expect("sent");
        await_frame(&mut client, |head| head.stream == stream - 2 && head.has(END_STREAM)).await;
        served = move_through(served, echo()).await;
        sent = left.to_vec();
    }
}

/// A client that cannot move, because it goes on using its table, and that has had the answer to stream 1.
async fn immovable_client(served: &Served) -> TcpStream {
    let mut client = TcpStream::connect(served.address).await.expect("a connection");
    let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    client.write_all(&hello).await.expect("sent");
    await_frame(&mut client, |head| head.frame_type == SETTINGS && !head.has(ACK)).await;
    let acknowledged = [frame(SETTINGS, ACK, 0, &[]), get_with_table(1)].concat();
    client.write_all(&acknowledged).await.expect("sent");
    await_frame(&mut client, |head| head.stream == 1 && head.has(END_STREAM)).await;
    client
}

fn get_with_table(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x82\x86\x84\x41\x01x")
}

/// The next frame that is no SETTINGS and no WINDOW_UPDATE: its head, and its payload. None at the end of the stream.
async fn next_frame(client: &mut TcpStream) -> Option<(Head, Vec<u8>)> {
    loop {
        let mut head = [0; HEAD_LENGTH];
        let read = timeout(PATIENCE, client.read(&mut head[..1])).await.expect("in time").expect("no reset");
        if read == 0 {
            return None;
        }
        client.read_exact(&mut head[1..]).await.expect("a frame");
        let head = Head::decode(head);
        let mut payload = vec![0; head.length];
        client.read_exact(&mut payload).await.expect("a payload");
        if ![SETTINGS, WINDOW_UPDATE].contains(&head.frame_type) {
            return Some((head, payload));
        }
    }
}

/// Reads GOAWAY, and gives the last stream that it names.
async fn goaway(client: &mut TcpStream) -> u32 {
    let (head, payload) = next_frame(client).await.expect("a frame");
    assert_eq!(head.frame_type, GOAWAY, "{head:?}");
    let (stream, error) = payload.split_first_chunk().expect("a stream");
    assert_eq!(error, [0; 4], "NO_ERROR");
    u32::from_be_bytes(*stream)
}

const ANY_STREAM: u32 = (1 << 31) - 1;

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_crosses_goaway_is_answered_before_the_second_goaway_and_the_end() {
    let served = serve(echo()).await;
    let mut client = immovable_client(&served).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(goaway(&mut client).await, ANY_STREAM);
    let (ping, payload) = next_frame(&mut client).await.expect("a frame");
    assert_eq!((ping.frame_type, ping.flags), (PING, 0));
    let crossing = [get_with_table(3), frame(PING, ACK, 0, &payload)].concat();
    client.write_all(&crossing).await.expect("sent");
    let mut is_answered = false;
    let last = loop {
        let (head, payload) = next_frame(&mut client).await.expect("a frame");
        is_answered |= head.stream == 3 && head.has(END_STREAM);
        if head.frame_type == GOAWAY {
            break payload;
        }
    };
    assert_eq!(last, [0, 0, 0, 3, 0, 0, 0, 0]);
    while !is_answered {
        let (head, _) = next_frame(&mut client).await.expect("the answer");
        is_answered = head.stream == 3 && head.has(END_STREAM);
    }
    assert!(next_frame(&mut client).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_react_to_goaway_gets_a_second_one_and_the_end() {
    let served = serve(echo()).await;
    let mut client = immovable_client(&served).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(goaway(&mut client).await, ANY_STREAM);
    let (ping, _) = next_frame(&mut client).await.expect("a frame");
    assert_eq!((ping.frame_type, ping.flags), (PING, 0));
    assert_eq!(goaway(&mut client).await, 1);
    assert!(next_frame(&mut client).await.is_none());
}

/// Its handler takes longer than the client may stay silent.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_waits_for_an_answer_is_not_ended_however_silent_it_is() {
    let gate = Arc::new(Notify::new());
    let waits = gate.clone();
    let slow = move || {
        let gate = waits.clone();
        async move { gate.notified().await }
    };
    let served = serve(Router::new().route("/", get("hello")).route("/slow", get(slow))).await;
    let mut client = immovable_client(&served).await;
    let slow = frame(HEADERS, END_HEADERS | END_STREAM, 3, b"\x82\x86\x04\x05/slow\x41\x01x");
    client.write_all(&slow).await.expect("sent");
    served.until_stage(Stage::InFlight).await;
    served.server.enter(Phase::Quiescing);
    assert_eq!(goaway(&mut client).await, ANY_STREAM);
    let (ping, _) = next_frame(&mut client).await.expect("a frame");
    assert_eq!(ping.frame_type, PING);
    // Longer than the limit for a client that waits for nothing.
    let silence = timeout(Duration::from_millis(1500), next_frame(&mut client)).await;
    assert!(silence.is_err(), "{silence:?}");
    gate.notify_one();
    let (answer, _) = next_frame(&mut client).await.expect("a frame");
    assert_eq!((answer.frame_type, answer.stream), (HEADERS, 3));
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    Head { stream, ..Head::new(kind, flags, payload.len()) }.put(&mut bytes);
    [&bytes, payload].concat()
}

/// Reads up to the first frame that is as `wanted`.
async fn await_frame(client: &mut TcpStream, wanted: impl Fn(Head) -> bool) {
    let mut head = [0; HEAD_LENGTH];
    loop {
        timeout(PATIENCE, client.read_exact(&mut head)).await.expect("in time").expect("a frame");
        let head = Head::decode(head);
        client.read_exact(&mut vec![0; head.length]).await.expect("a payload");
        assert!(![RST_STREAM, GOAWAY].contains(&head.frame_type), "{head:?}");
        if wanted(head) {
            return;
        }
    }
}

fn echo() -> Router {
    Router::new().route("/", get("hello\n").post(async |body: Body| body))
}

/// An HTTP/2 client whose windows are as small as they may be, or large.
async fn http2_client(address: SocketAddr, window: u32) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.expect("a connection");
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(window).initial_connection_window_size(window);
    let (sender, connection) = builder.handshake(stream).await.expect("HTTP/2");
    tokio::spawn(async move { connection.await.expect("no error") });
    sender
}

/// Sends `body`, and gives the answer's.
async fn exchange(sender: SendRequest<Bytes>, body: Bytes) -> Result<Vec<u8>, h2::Error> {
    let mut sender = sender.ready().await?;
    let method = if body.is_empty() { "GET" } else { "POST" };
    let request = Request::builder().method(method).uri("http://localhost/").body(()).expect("a request");
    let (answer, mut sending) = sender.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        // h2 sends it as the windows allow.
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
async fn an_idle_http2_connection_goes_on_in_the_next_process_and_the_one_after() {
    let mut served = serve(echo()).await;
    let client = http2_client(served.address, 65_535).await;
    for turn in 0..20_u8 {
        let body: Bytes = vec![turn; usize::from(turn) * 1000].into();
        let answer = exchange(client.clone(), body.clone()).await.expect("an answer");
        assert_eq!(answer, if body.is_empty() { b"hello\n".as_slice() } else { &body });
        served = move_on(served, echo()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_connections_that_are_busy_move_and_lose_nothing() {
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
                    let answer = exchange(client.clone(), body.clone()).await.expect("an answer");
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
        // As many answers as there are streams.
        let enough = answers.load(Ordering::Relaxed) + 86;
        let reached = async {
            while answers.load(Ordering::Relaxed) < enough {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("they are answered");
        served.until_connections(6).await;
        served = move_on(served, echo()).await;
        // And at once again.
        served = move_on(served, echo()).await;
    }
    // Each stream is answered once more after the last move.
    stop.cancel();
    timeout(PATIENCE, clients.join_all()).await.expect("all are answered");
}
