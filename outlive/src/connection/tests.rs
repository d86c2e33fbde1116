//! Real connections to a router of the test's own, in this process: when they come to rest, and what that
//! takes.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use bytes::Bytes;
use futures_util::StreamExt;
use h2::client::SendRequest;
use harness::client::{self, Http2, Target};
use hyper::{Request, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Services;
use crate::listeners::{Holder, Listener, ListeningSocket};
use crate::process::Process;
use crate::registry::{Limits, Phase, Registry, Stage};
use crate::requests::Routes;
use crate::server::{Queues, Server};
use crate::stream::Connection;

/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Served {
    address: SocketAddr,
    pub server: Server,
    pub rested: mpsc::UnboundedReceiver<Connection>,
}

/// Serves `router` on a port of its own, until the end of the test.
pub async fn serve(router: Router) -> Served {
    let limit = Duration::from_secs(30);
    let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
    let shutdown = CancellationToken::new();
    let registry = Registry::new(limits, shutdown.clone());
    let services = Services {
        routes: Routes::new(router, 16 << 20, limit),
        admin: Routes::new(Router::new(), 1024, limit),
        tls: None,
        process: Process::begin(1),
        shutdown,
        rest_limit: limit,
    };
    let (server, rested) = Server::new(services, registry, 100, Queues::default());
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port").into_std().expect("a listener");
    let address = socket.local_addr().expect("an address");
    let socket = ListeningSocket::Tcp(socket);
    server
        .listen(Listener { name: "http".parse().expect("a name"), socket, holder: Holder::Parent })
        .expect("it listens");
    Served { address, server, rested }
}

impl Served {
    fn registry(&self) -> &Registry {
        self.server.registry()
    }

    /// Waits until all connections have come to rest or closed; gives those at rest.
    async fn rest(&mut self) -> usize {
        let done = self.registry().until(|| self.registry().is_done());
        timeout(PATIENCE, done).await.expect("all come to rest");
        std::iter::from_fn(|| self.rested.try_recv().ok()).count()
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
        served.registry().set_phase(Phase::Resting);
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
        served.registry().set_phase(Phase::Resting);
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
        let gone = async {
            while !served.registry().entries().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, gone).await.expect("it is closed");
        gate.send(()).expect("it waits");
        served.registry().set_phase(Phase::Resting);
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
        served.registry().set_phase(Phase::Resting);
        gate.send(()).expect("it waits");
        assert_eq!(served.rest().await, 1);
    }
}

// ---- HTTP/2 connections that move ----

/// Moves all connections of `served` to a server of their own, as they would go to another process.
async fn move_on(mut served: Served, router: Router) -> Served {
    served.registry().set_phase(Phase::Resting);
    let done = served.registry().until(|| served.registry().is_done());
    timeout(PATIENCE, done).await.expect("all come to rest");
    let next = serve(router).await;
    while let Ok(connection) = served.rested.try_recv() {
        next.server.adopt(connection);
    }
    next
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
async fn exchange(sender: &SendRequest<Bytes>, body: Bytes) -> Result<Vec<u8>, h2::Error> {
    let mut sender = sender.clone().ready().await?;
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
        let answer = exchange(&client, body.clone()).await.expect("an answer");
        assert_eq!(answer, if body.is_empty() { b"hello\n".as_slice() } else { &body });
        served = move_on(served, echo()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_connections_that_are_busy_move_and_lose_nothing() {
    let mut served = serve(echo()).await;
    let stop = CancellationToken::new();
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
            let (client, stop) = (client.clone(), stop.clone());
            clients.spawn(async move {
                let body: Bytes = vec![number; length].into();
                let mut answered = 0;
                while !stop.is_cancelled() {
                    let answer = exchange(&client, body.clone()).await.expect("an answer");
                    assert!(length == 0 || answer == body, "{} of {length} bytes", answer.len());
                    answered += 1;
                }
                answered
            });
        }
    }
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(served.registry().entries().len(), 6);
        served = move_on(served, echo()).await;
    }
    stop.cancel();
    let answered: Vec<u32> = timeout(PATIENCE, clients.join_all()).await.expect("all are answered");
    assert!(answered.iter().all(|answered| *answered > 0), "{answered:?}");
}
