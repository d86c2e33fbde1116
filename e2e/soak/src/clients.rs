//! The clients of the soak. They never retry, and report each lost request and each closed connection to `Record`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use testkit::client::{Connection, Http2, Target, get, post};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::record::{Complaint, Record};

/// A request without a response in this time is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// The number of WebSockets, and of event streams.
const STREAMS: usize = 2;
/// Pause between two messages on a WebSocket.
const MESSAGE_PAUSE: Duration = Duration::from_millis(20);

/// How a client uses connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// One for all requests. Before each request the client checks whether the server has closed it.
    Kept,
    /// One for all requests, without that check: a request on a connection that was just closed is lost.
    Blind,
    /// One for each request.
    OneEach,
    Http2,
}

/// A number of clients with the same behaviour.
struct Group {
    name: &'static str,
    count: usize,
    target: Target,
    connection: Use,
    path: &'static str,
    /// Length of the request body in bytes.
    body: usize,
    /// Pause after each request.
    pause: Duration,
}

/// All clients except the WebSockets and event streams, which `run` adds.
pub struct Clients(Vec<Group>);

impl Clients {
    pub fn new(plain: SocketAddr, https: &Target, https_h2: &Target) -> Self {
        let plain = Target::Tcp(plain);
        let group = |name, count, target: &Target, connection, pause| {
            let pause = Duration::from_millis(pause);
            Group { name, count, target: target.clone(), connection, path: "/", body: 0, pause }
        };
        Self(vec![
            group("flat out", 4, &plain, Use::Kept, 0),
            group("thinking", 20, &plain, Use::Kept, 5),
            group("blind", 20, &plain, Use::Blind, 5),
            group("one each", 5, &plain, Use::OneEach, 2),
            Group { path: "/echo", body: 20_000, ..group("POST of 20 kB", 5, &plain, Use::Kept, 5) },
            group("HTTP/2", 4, &plain, Use::Http2, 2),
            group("TLS", 5, https, Use::Kept, 5),
            group("HTTP/2 over TLS", 4, https_h2, Use::Http2, 5),
        ])
    }

    /// The number of clients that must receive responses after each event.
    pub fn count(&self) -> usize {
        self.0.iter().map(|group| group.count).sum::<usize>() + STREAMS
    }

    /// Runs all clients until `Record::stop`.
    pub async fn run(self, record: Arc<Record>) {
        let mut clients = JoinSet::new();
        let mut number = 0;
        if let Some(Target::Tcp(address)) = self.0.first().map(|group| group.target.clone()) {
            for _ in 0..STREAMS {
                clients.spawn(websocket(address, number, record.clone()));
                clients.spawn(events(address, record.clone()));
                number += 1;
            }
        }
        for group in self.0 {
            let group = Arc::new(group);
            for _ in 0..group.count {
                clients.spawn(Client::new(group.clone(), number, record.clone()).run());
                number += 1;
            }
        }
        clients.join_all().await;
    }
}

struct Client {
    group: Arc<Group>,
    number: usize,
    record: Arc<Record>,
    request: Vec<u8>,
    http1: Option<Connection>,
    http2: Option<Http2>,
}

impl Client {
    fn new(group: Arc<Group>, number: usize, record: Arc<Record>) -> Self {
        let request = if group.body > 0 { post(group.path, group.body) } else { get(group.path) };
        let request = if group.connection == Use::OneEach {
            b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".to_vec()
        } else {
            request
        };
        Self { group, number, record, request, http1: None, http2: None }
    }

    async fn run(mut self) {
        while !self.record.is_stopped() {
            if self.group.connection == Use::Kept
                && self.http1.as_mut().is_some_and(Connection::is_closed_by_server)
            {
                self.complain(Complaint::Closed, "between two requests");
                self.http1 = None;
            }
            let (event, begun) = (self.record.event(), Instant::now());
            match timeout(ANSWER_LIMIT, self.ask()).await {
                Ok(Ok(())) => self.record.answered(begun.elapsed()),
                Ok(Err(error)) => self.fail(self.record.event(), format!("{error:#}")),
                // A lost request counts for the event that was under way when it was sent.
                Err(_) => self.fail(event, format!("no answer within {ANSWER_LIMIT:?}")),
            }
            self.record.done(self.number);
            if !self.group.pause.is_zero() {
                sleep(self.group.pause).await;
            }
        }
    }

    fn complain(&self, complaint: Complaint, what: &str) {
        self.record.complain(self.record.event(), complaint, self.group.name, what.to_owned());
    }

    fn fail(&mut self, event: usize, what: String) {
        (self.http1, self.http2) = (None, None);
        self.record.complain(event, Complaint::Lost, self.group.name, what);
    }

    async fn ask(&mut self) -> Result<()> {
        if self.group.connection == Use::Http2 {
            return self.ask_http2().await;
        }
        let connection = match &mut self.http1 {
            Some(connection) => connection,
            none => none.insert(Connection::open(&self.group.target).await.context("could not connect")?),
        };
        let answer = connection.ask(&self.request).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        let is_right = if self.group.body > 0 {
            answer.body.len() == self.group.body && self.request.ends_with(&answer.body)
        } else {
            answer.body.starts_with(b"pid ")
        };
        ensure!(is_right, "unexpected response body");
        if answer.closes() {
            self.http1 = None;
            if self.group.connection != Use::OneEach {
                self.complain(Complaint::Closed, "Connection: close");
            }
        }
        Ok(())
    }

    async fn ask_http2(&mut self) -> Result<()> {
        loop {
            let connection = match &mut self.http2 {
                Some(connection) => connection,
                none => none.insert(Http2::open(&self.group.target).await.context("could not connect")?),
            };
            match connection.get(self.group.path).await? {
                Some((200, text)) if text.starts_with("pid ") => return Ok(()),
                Some((status, _)) => bail!("unexpected response, status {status}"),
                None => {
                    self.http2 = None;
                    self.complain(Complaint::Closed, "GOAWAY, or closed");
                }
            }
        }
    }
}

/// Sends messages on one WebSocket and expects each echo. Its end is a loss, after which the client connects again.
async fn websocket(address: SocketAddr, number: usize, record: Arc<Record>) {
    while !record.is_stopped() {
        if let Err(error) = converse(address, number, &record).await {
            record.complain(record.event(), Complaint::Lost, "WebSocket", format!("{error:#}"));
            record.done(number);
        }
    }
}

async fn converse(address: SocketAddr, client: usize, record: &Record) -> Result<()> {
    let too_late = || format!("no answer within {ANSWER_LIMIT:?}");
    let opened = tokio_tungstenite::connect_async(format!("ws://{address}/socket"));
    let (mut socket, _) = timeout(ANSWER_LIMIT, opened).await.with_context(too_late)??;
    for number in 0_u64.. {
        if record.is_stopped() {
            break;
        }
        let text = number.to_string();
        // A failed send is not an error: the reason is in what is read next.
        let _ = socket.send(Message::text(text.as_str())).await;
        match timeout(ANSWER_LIMIT, socket.next()).await.with_context(too_late)? {
            Some(Ok(Message::Text(back))) if back.as_str() == text => record.done(client),
            other => bail!("expected an echo, got {other:?}"),
        }
        sleep(MESSAGE_PAUSE).await;
    }
    Ok(())
}

/// Reads an event stream and expects no gap and no duplicate. The response must not end, because the next process
/// continues it.
async fn events(address: SocketAddr, record: Arc<Record>) {
    while !record.is_stopped() {
        if let Err(error) = listen(address, &record).await {
            record.complain(record.event(), Complaint::Lost, "event stream", format!("{error:#}"));
        }
    }
}

async fn listen(address: SocketAddr, record: &Record) -> Result<()> {
    let mut connection = Connection::open(&Target::Tcp(address)).await.context("could not connect")?;
    let request = b"GET /events HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n";
    connection.send(request).await?;
    let head = timeout(ANSWER_LIMIT, connection.head()).await.context("no response in time")??;
    ensure!(head.status == 200, "status {}", head.status);
    let (mut read, mut wanted) = (0, 0);
    loop {
        let text = String::from_utf8_lossy(connection.unread()).into_owned();
        // Only complete events, because the last one may have arrived in part.
        let end = text.rfind("\n\n").map_or(read, |end| end + 2);
        for id in text.get(read..end).unwrap_or_default().lines().filter_map(|line| line.strip_prefix("id: "))
        {
            let id: u64 = id.trim().parse()?;
            ensure!(id == wanted, "expected event {wanted}, got {id}");
            wanted += 1;
        }
        read = end.max(read);
        if record.is_stopped() {
            return Ok(());
        }
        ensure!(!text.ends_with("\n0\r\n\r\n"), "the response ended");
        let more = timeout(ANSWER_LIMIT, connection.read_more()).await.context("no event in time")??;
        ensure!(more > 0, "the connection ended");
    }
}
