//! The clients of the soak. They never retry, and report each lost request and each closed connection to `Record`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use testkit::client::{Connection, Http2, Target, get, post};
use testkit::events::EventStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::record::{Complaint, Record};

/// A request without a response in this time is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// The number of WebSockets, and of event streams over HTTP/1.1 and over HTTP/2.
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

/// The TLS port of the service, for clients of each kind. Those without a version negotiate TLS 1.3.
pub struct Https {
    pub http1: Target,
    pub http1_over_tls12: Target,
    pub http2: Target,
    pub http2_over_tls12: Target,
}

pub struct Clients {
    /// All clients except the WebSockets and event streams, which `run` adds.
    groups: Vec<Group>,
    plain: SocketAddr,
    https_h2: Target,
}

impl Clients {
    pub fn new(address: SocketAddr, https: &Https) -> Self {
        let plain = Target::Tcp(address);
        let group = |name, count, target: &Target, connection, pause| {
            let pause = Duration::from_millis(pause);
            Group { name, count, target: target.clone(), connection, path: "/", body: 0, pause }
        };
        let groups = vec![
            group("flat out", 4, &plain, Use::Kept, 0),
            group("thinking", 20, &plain, Use::Kept, 5),
            group("blind", 20, &plain, Use::Blind, 5),
            group("one each", 5, &plain, Use::OneEach, 2),
            Group { path: "/echo", body: 20_000, ..group("POST of 20 kB", 5, &plain, Use::Kept, 5) },
            group("HTTP/2", 4, &plain, Use::Http2, 2),
            group("TLS 1.3", 5, &https.http1, Use::Kept, 5),
            group("TLS 1.2", 5, &https.http1_over_tls12, Use::Kept, 5),
            group("HTTP/2 over TLS 1.3", 4, &https.http2, Use::Http2, 5),
            group("HTTP/2 over TLS 1.2", 4, &https.http2_over_tls12, Use::Http2, 5),
        ];
        Self { groups, plain: address, https_h2: https.http2.clone() }
    }

    /// The number of clients that must receive responses after each event.
    pub fn count(&self) -> usize {
        self.groups.iter().map(|group| group.count).sum::<usize>() + STREAMS
    }

    /// Runs all clients until `Record::stop`.
    pub async fn run(self, record: Arc<Record>) {
        let mut clients = JoinSet::new();
        let mut number = 0;
        for _ in 0..STREAMS {
            clients.spawn(websocket(self.plain, number, record.clone()));
            clients.spawn(events(Target::Tcp(self.plain), record.clone()));
            clients.spawn(events_beside_requests(self.https_h2.clone(), record.clone()));
            number += 1;
        }
        for group in self.groups {
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

/// Reads an event stream over HTTP/1.1, and connects again when it has ended, which is a loss.
async fn events(target: Target, record: Arc<Record>) {
    while !record.is_stopped() {
        let listened = async {
            let opened = timeout(ANSWER_LIMIT, EventStream::http1(&target)).await;
            listen(opened.context("no response in time")??, &record).await
        };
        if let Err(error) = listened.await {
            record.complain(record.event(), Complaint::Lost, "event stream", format!("{error:#}"));
        }
    }
}

/// As `events`, over HTTP/2, with other requests on the same connection, as a browser sends them.
async fn events_beside_requests(target: Target, record: Arc<Record>) {
    while !record.is_stopped() {
        let browsed = async {
            let mut connection = Http2::open(&target).await.context("could not connect")?;
            let opened = timeout(ANSWER_LIMIT, EventStream::http2(&mut connection)).await;
            let stream = opened.context("no response in time")??;
            tokio::try_join!(listen(stream, &record), ask_repeatedly(connection, &record))
        };
        if let Err(error) = browsed.await {
            let what = format!("{error:#}");
            record.complain(record.event(), Complaint::Lost, "event stream over HTTP/2", what);
        }
    }
}

/// Reads events and expects no gap and no duplicate. The response must not end, because the next process continues it.
async fn listen(mut stream: EventStream, record: &Record) -> Result<()> {
    for wanted in 0_u64.. {
        let event = timeout(ANSWER_LIMIT, stream.next()).await.context("no event in time")??;
        if record.is_stopped() {
            break;
        }
        let event = event.context("the response ended")?;
        let id =
            event.lines().find_map(|line| line.strip_prefix("id: ")).context("an event without an id")?;
        ensure!(id.parse() == Ok(wanted), "expected event {wanted}, got {id}");
    }
    Ok(())
}

async fn ask_repeatedly(mut connection: Http2, record: &Record) -> Result<()> {
    while !record.is_stopped() {
        let answer = timeout(ANSWER_LIMIT, connection.get("/")).await;
        let answer = answer.with_context(|| format!("no answer within {ANSWER_LIMIT:?}"))??;
        let (status, _) = answer.context("GOAWAY, or closed")?;
        ensure!(status == 200, "status {status}");
        sleep(MESSAGE_PAUSE).await;
    }
    Ok(())
}
