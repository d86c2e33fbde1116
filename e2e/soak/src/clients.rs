//! Clients that never retry, each of its own kind, for as long as the soak takes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use testkit::client::{Connection, Http2, Target, get, post};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::record::{Complaint, Record};

/// No answer within this is a lost request.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Between two messages of a WebSocket.
const MESSAGE_PAUSE: Duration = Duration::from_millis(20);

/// How a client uses connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// One for all requests; before each it is seen whether the server has closed it.
    Kept,
    /// One for all requests, sent blindly.
    Blind,
    /// One a request.
    OneEach,
    Http2,
}

/// Some clients that do the same.
struct Kind {
    name: &'static str,
    count: usize,
    target: Target,
    connection: Use,
    /// The path, and how long a body is sent to it.
    path: &'static str,
    body: usize,
    think: Duration,
}

/// All of them.
pub struct Clients(Vec<Kind>);

impl Clients {
    pub fn new(plain: SocketAddr, https: &Target, https_h2: &Target) -> Self {
        let plain = Target::Tcp(plain);
        let kind = |name, count, target: &Target, connection, think| {
            let think = Duration::from_millis(think);
            Kind { name, count, target: target.clone(), connection, path: "/", body: 0, think }
        };
        Self(vec![
            kind("flat out", 4, &plain, Use::Kept, 0),
            kind("thinking", 20, &plain, Use::Kept, 5),
            kind("blind", 20, &plain, Use::Blind, 5),
            kind("one each", 5, &plain, Use::OneEach, 2),
            Kind { path: "/echo", body: 20_000, ..kind("POST of 20 kB", 5, &plain, Use::Kept, 5) },
            kind("HTTP/2", 4, &plain, Use::Http2, 2),
            kind("TLS", 5, https, Use::Kept, 5),
            kind("HTTP/2 over TLS", 4, https_h2, Use::Http2, 5),
        ])
    }

    /// Those that are asked for an answer after each event.
    pub fn count(&self) -> usize {
        self.0.iter().map(|kind| kind.count).sum()
    }

    /// Runs all of them until they are told to stop.
    pub async fn run(self, record: Arc<Record>) {
        let mut clients = JoinSet::new();
        let mut number = 0;
        if let Some(Target::Tcp(address)) = self.0.first().map(|kind| kind.target.clone()) {
            for _ in 0..2 {
                clients.spawn(websocket(address, record.clone()));
                clients.spawn(events(address, record.clone()));
            }
        }
        for kind in self.0 {
            let kind = Arc::new(kind);
            for _ in 0..kind.count {
                clients.spawn(Client::new(kind.clone(), number, record.clone()).run());
                number += 1;
            }
        }
        clients.join_all().await;
    }
}

struct Client {
    kind: Arc<Kind>,
    number: usize,
    record: Arc<Record>,
    request: Vec<u8>,
    http1: Option<Connection>,
    http2: Option<Http2>,
}

impl Client {
    fn new(kind: Arc<Kind>, number: usize, record: Arc<Record>) -> Self {
        let request = if kind.body > 0 { post(kind.path, kind.body) } else { get(kind.path) };
        let request = if kind.connection == Use::OneEach {
            b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".to_vec()
        } else {
            request
        };
        Self { kind, number, record, request, http1: None, http2: None }
    }

    async fn run(mut self) {
        while !self.record.is_stopped() {
            if self.kind.connection == Use::Kept
                && self.http1.as_mut().is_some_and(Connection::is_closed_by_server)
            {
                self.complain(Complaint::Closed, "between two requests");
                self.http1 = None;
            }
            let (event, begun) = (self.record.event(), Instant::now());
            match timeout(ANSWER_LIMIT, self.ask()).await {
                Ok(Ok(())) => self.record.answered(begun.elapsed()),
                Ok(Err(error)) => self.fail(self.record.event(), format!("{error:#}")),
                // It is of the event that it began in.
                Err(_) => self.fail(event, format!("no answer within {ANSWER_LIMIT:?}")),
            }
            self.record.done(self.number);
            if !self.kind.think.is_zero() {
                sleep(self.kind.think).await;
            }
        }
    }

    fn complain(&self, complaint: Complaint, what: &str) {
        self.record.complain(self.record.event(), complaint, self.kind.name, what.to_owned());
    }

    fn fail(&mut self, event: usize, what: String) {
        (self.http1, self.http2) = (None, None);
        self.record.complain(event, Complaint::Lost, self.kind.name, what);
    }

    async fn ask(&mut self) -> Result<()> {
        if self.kind.connection == Use::Http2 {
            return self.ask_http2().await;
        }
        let connection = match &mut self.http1 {
            Some(connection) => connection,
            none => none.insert(Connection::open(&self.kind.target).await.context("could not connect")?),
        };
        let answer = connection.ask(&self.request).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        let is_right = if self.kind.body > 0 {
            answer.body.len() == self.kind.body && self.request.ends_with(&answer.body)
        } else {
            answer.body.starts_with(b"pid ")
        };
        ensure!(is_right, "a wrong answer");
        if answer.closes() {
            self.http1 = None;
            if self.kind.connection != Use::OneEach {
                self.complain(Complaint::Closed, "an answer said so");
            }
        }
        Ok(())
    }

    async fn ask_http2(&mut self) -> Result<()> {
        loop {
            let connection = match &mut self.http2 {
                Some(connection) => connection,
                none => none.insert(Http2::open(&self.kind.target).await.context("could not connect")?),
            };
            match connection.get(self.kind.path).await? {
                Some((200, text)) if text.starts_with("pid ") => return Ok(()),
                Some((status, _)) => bail!("a wrong answer, status {status}"),
                None => {
                    self.http2 = None;
                    self.complain(Complaint::Closed, "GOAWAY, or closed");
                }
            }
        }
    }
}

/// Each message comes back, until the server says 1012: then the client comes back.
async fn websocket(address: SocketAddr, record: Arc<Record>) {
    while !record.is_stopped() {
        if let Err(error) = timeout(ANSWER_LIMIT, converse(address, &record)).await.unwrap_or(Ok(())) {
            record.complain(record.event(), Complaint::Lost, "WebSocket", format!("{error:#}"));
        }
    }
}

async fn converse(address: SocketAddr, record: &Record) -> Result<()> {
    let (mut socket, _) = tokio_tungstenite::connect_async(format!("ws://{address}/socket")).await?;
    for number in 0_u64.. {
        if record.is_stopped() {
            break;
        }
        let text = number.to_string();
        // One that is closing refuses it; why, is still to be read.
        let _ = socket.send(Message::text(text.as_str())).await;
        match socket.next().await {
            Some(Ok(Message::Text(back))) if back.as_str() == text => {}
            Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Restart => {
                while let Some(Ok(_)) = socket.next().await {}
                return Ok(());
            }
            other => bail!("not 1012, but {other:?}"),
        }
        sleep(MESSAGE_PAUSE).await;
    }
    Ok(())
}

/// Event after event, over as many connections as it takes, each of which ends with its last chunk.
async fn events(address: SocketAddr, record: Arc<Record>) {
    let mut last = None;
    while !record.is_stopped() {
        if let Err(error) = listen(address, &mut last, &record).await {
            record.complain(record.event(), Complaint::Lost, "event stream", format!("{error:#}"));
            last = None;
        }
    }
}

async fn listen(address: SocketAddr, last: &mut Option<u64>, record: &Record) -> Result<()> {
    let mut connection = Connection::open(&Target::Tcp(address)).await.context("could not connect")?;
    let seen = last.map_or(String::new(), |last| format!("last-event-id: {last}\r\n"));
    connection.send(format!("GET /events HTTP/1.1\r\nhost: test\r\n{seen}\r\n").as_bytes()).await?;
    let head = timeout(ANSWER_LIMIT, connection.head()).await.context("no answer")??;
    ensure!(head.status == 200, "status {}", head.status);
    let mut read = 0;
    loop {
        let text = String::from_utf8_lossy(connection.unread()).into_owned();
        // Whole ones.
        let end = text.rfind("\n\n").map_or(read, |end| end + 2);
        for id in text.get(read..end).unwrap_or_default().lines().filter_map(|line| line.strip_prefix("id: "))
        {
            let id: u64 = id.trim().parse()?;
            let wanted = last.map_or(0, |last| last + 1);
            ensure!(id == wanted, "event {id}, where {wanted} was to come");
            *last = Some(id);
        }
        read = end.max(read);
        if text.ends_with("0\r\n\r\n") {
            return Ok(());
        }
        if record.is_stopped() {
            return Ok(());
        }
        let more = timeout(ANSWER_LIMIT, connection.read_more()).await.context("no event")??;
        ensure!(more > 0, "it ended without its last chunk");
    }
}
