//! [`Load`]: many clients that never retry. A request without a complete response of the right status counts as lost.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::task::JoinSet;

use crate::client::{Connection, Http2, Target, WEBSOCKET, get, post};

/// A request without a response within this time is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The text frame "hi" of a WebSocket client, masked with zeros, and its echo.
const HI: (&[u8], &[u8]) = (b"\x81\x82\0\0\0\0hi", b"\x81\x02hi");

/// Clients that send requests until the load is stopped.
#[derive(Clone, Debug)]
pub struct Load {
    pub target: Target,
    /// The number of clients; each has one request in flight at a time.
    pub clients: usize,
    /// The bytes of the HTTP/1.1 request; HTTP/2 clients send a GET for `/`. A WebSocket client sends the frame of a
    /// message, of which `/socket` sends the echo back.
    pub request: Vec<u8>,
    /// The expected status; a response with another status is lost.
    pub status: u16,
    /// What the body of `/` begins with; a response with another body is lost.
    pub root: &'static str,
    pub connections: Connections,
    /// The pause of a client between two requests.
    pub think: Duration,
}

/// How a client uses connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// One connection for all requests. Before each request the client checks whether the server has closed it, as
    /// connection pools do.
    Kept,
    /// One connection for all requests, without that check: a request on a connection that was closed is lost.
    KeptBlindly,
    /// A connection for each request, which has `Connection: close`.
    OneEach,
    /// One HTTP/2 connection for all requests, until the server sends GOAWAY.
    Http2,
    /// One WebSocket to `/socket` for all messages. If it ends before the echo of a message arrives, this message is lost.
    WebSocket,
}

/// The connection of a client, if it has one.
#[derive(Default)]
struct Kept {
    http1: Option<Connection>,
    http2: Option<Http2>,
}

impl Load {
    fn kept(target: &Target, clients: usize, think: Duration) -> Self {
        Self {
            target: target.clone(),
            clients,
            request: get("/"),
            status: 200,
            root: "pid ",
            connections: Connections::Kept,
            think,
        }
    }

    /// 10 keep-alive connections without pauses.
    pub fn saturating(target: &Target) -> Self {
        Self::kept(target, 10, Duration::ZERO)
    }

    /// 50 keep-alive connections, each with a pause of 5 ms between two requests.
    pub fn paced(target: &Target) -> Self {
        Self::kept(target, 50, Duration::from_millis(5))
    }

    /// As [`paced`](Self::paced), but the clients do not check first whether the server has closed the connection.
    pub fn paced_blind(target: &Target) -> Self {
        Self { connections: Connections::KeptBlindly, ..Self::paced(target) }
    }

    /// One connection for each request, 10 at a time.
    pub fn connection_per_request(target: &Target) -> Self {
        let request = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".to_vec();
        let think = Duration::from_millis(1);
        Self { connections: Connections::OneEach, request, ..Self::kept(target, 10, think) }
    }

    /// As [`saturating`](Self::saturating), with bodies of 1 KiB.
    pub fn post(target: &Target) -> Self {
        Self { request: post("/echo", 1024), ..Self::saturating(target) }
    }

    /// 10 HTTP/2 connections without pauses, with one request at a time on each.
    pub fn http2(target: &Target) -> Self {
        Self { connections: Connections::Http2, ..Self::saturating(target) }
    }

    /// 10 WebSockets without pauses, with one message at a time on each.
    pub fn websockets(target: &Target) -> Self {
        let connections = Connections::WebSocket;
        Self { connections, request: HI.0.to_vec(), status: 101, ..Self::saturating(target) }
    }

    /// Starts the load in a thread of its own, which first calls `enter` (to move into a container). Returns when the
    /// first request of each client has ended, so that what the test does next affects all of them.
    pub fn start(self, enter: impl FnOnce() + Send + 'static) -> Running {
        let progress = Arc::new(Progress {
            stopped: AtomicBool::new(false),
            ended: AtomicU64::new(0),
            started: AtomicU64::new(0),
        });
        let (clients, begun, shared) = (self.clients as u64, Instant::now(), progress.clone());
        let thread = std::thread::spawn(move || {
            enter();
            crate::block_on(Arc::new(self).run(begun, shared))
        });
        let running = Running { begun, progress, thread };
        running.until("each client has asked once", |progress| {
            progress.started.load(Ordering::Relaxed) == clients
        });
        running
    }

    async fn run(self: Arc<Self>, start: Instant, progress: Arc<Progress>) -> Report {
        let mut clients = JoinSet::new();
        for _ in 0..self.clients {
            clients.spawn(self.clone().client(start, progress.clone()));
        }
        let mut report = Report { clients: self.clients as u64, ..Report::default() };
        for each in clients.join_all().await {
            report.add(each);
        }
        report
    }

    async fn client(self: Arc<Self>, start: Instant, progress: Arc<Progress>) -> Report {
        let mut report = Report::default();
        let mut kept = Kept::default();
        loop {
            let is_last = progress.stopped.load(Ordering::Relaxed);
            if self.connections == Connections::Kept
                && kept.http1.as_mut().is_some_and(Connection::is_closed_by_server)
            {
                report.closed_idle += 1;
                kept = Kept::default();
            }
            let (begun, opened) = (Instant::now(), report.connections);
            let asked = tokio::time::timeout(ANSWER_LIMIT, self.ask(&mut kept, &mut report)).await;
            let asked = asked.unwrap_or_else(|_| bail_timeout());
            if asked.is_err() {
                kept = Kept::default();
            }
            let opens = report.connections > opened;
            report.note(start, begun, asked, opens);
            if report.samples.len() == 1 {
                progress.started.fetch_add(1, Ordering::Relaxed);
            }
            progress.ended.fetch_add(1, Ordering::Relaxed);
            if is_last {
                return report;
            }
            if self.think > Duration::ZERO {
                tokio::time::sleep(self.think).await;
            }
        }
    }

    async fn ask(&self, kept: &mut Kept, report: &mut Report) -> Result<()> {
        match self.connections {
            Connections::Http2 => self.ask_http2(&mut kept.http2, report).await,
            Connections::WebSocket => self.ask_websocket(&mut kept.http1, report).await,
            _ => self.ask_http1(&mut kept.http1, report).await,
        }
    }

    async fn ask_http2(&self, kept: &mut Option<Http2>, report: &mut Report) -> Result<()> {
        loop {
            let connection = if let Some(connection) = kept {
                connection
            } else {
                report.connections += 1;
                kept.insert(Http2::open(&self.target).await?)
            };
            match connection.get("/").await? {
                Some((200, text)) => return self.check(&text),
                Some((status, _)) => bail!("status {status}"),
                None => {
                    report.told_to_close += 1;
                    *kept = None;
                }
            }
        }
    }

    /// Checks that the body belongs to the response of this request: that of `/` begins with `root`, that of `/sleep` with
    /// "slept", and that of `/echo` is the body of the request.
    fn check(&self, text: &str) -> Result<()> {
        let body = self
            .request
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .map_or(&[][..], |at| &self.request[at + 4..]);
        let is_right = match body {
            [] if self.request.starts_with(b"GET /sleep") => text.starts_with("slept "),
            [] => text.starts_with(self.root),
            _ => text.as_bytes() == body,
        };
        if is_right { Ok(()) } else { bail!("a wrong answer: {text:?}") }
    }

    async fn ask_websocket(&self, kept: &mut Option<Connection>, report: &mut Report) -> Result<()> {
        let connection = if let Some(connection) = kept {
            connection
        } else {
            report.connections += 1;
            let mut connection = Connection::open(&self.target).await?;
            let status = connection.ask(WEBSOCKET).await?.status;
            if status != self.status {
                bail!("status {status}");
            }
            kept.insert(connection)
        };
        connection.send(&self.request).await.context("could not send")?;
        let echo = connection.take(HI.1.len()).await?;
        if echo == HI.1 { Ok(()) } else { bail!("a wrong answer: {echo:?}") }
    }

    async fn ask_http1(&self, kept: &mut Option<Connection>, report: &mut Report) -> Result<()> {
        let connection = if let Some(connection) = kept {
            connection
        } else {
            report.connections += 1;
            kept.insert(Connection::open(&self.target).await?)
        };
        let answer = connection.ask(&self.request).await?;
        if answer.status != self.status {
            bail!("status {}", answer.status);
        }
        if self.status == 200 {
            self.check(&answer.text())?;
        }
        if answer.closes() {
            report.told_to_close += u64::from(self.connections != Connections::OneEach);
            *kept = None;
        }
        Ok(())
    }
}

fn bail_timeout() -> Result<()> {
    bail!("no answer within {ANSWER_LIMIT:?}")
}

/// The state that the clients of a load share with the test.
struct Progress {
    stopped: AtomicBool,
    /// The number of requests that were answered or lost.
    ended: AtomicU64,
    /// The number of clients whose first request has ended.
    started: AtomicU64,
}

/// A running load.
pub struct Running {
    /// The time from which [`Sample::at`] counts.
    pub begun: Instant,
    progress: Arc<Progress>,
    thread: JoinHandle<Report>,
}

impl Running {
    /// The number of requests that were answered or lost so far.
    pub fn ended(&self) -> u64 {
        self.progress.ended.load(Ordering::Relaxed)
    }

    /// Waits until `count` requests, counted from the beginning, were answered or lost.
    pub fn wait_for(&self, count: u64) {
        self.until(&format!("{count} requests of the load"), |_| self.ended() >= count);
    }

    /// Stops the load. Each client finishes its request and sends one more, which shows that it is still served after
    /// what the test did.
    pub fn stop(self) -> Report {
        self.progress.stopped.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread does not panic")
    }

    fn until(&self, what: &str, is_so: impl Fn(&Progress) -> bool) {
        // If the thread of the load has panicked, stop() reports the reason.
        crate::wait_until(what, || is_so(&self.progress) || self.thread.is_finished());
    }
}

/// What the clients of a load saw. No connection was closed early if `connections` equals `clients`.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The number of requests with a complete response of the right status.
    pub answered: u64,
    /// The number of other requests, by error.
    pub lost: BTreeMap<String, u64>,
    /// The number of connections opened.
    pub connections: u64,
    /// The number of clients, so the number of connections that would have been enough if none was closed.
    pub clients: u64,
    /// The number of connections closed after a response with `Connection: close`, or by GOAWAY.
    pub told_to_close: u64,
    /// The number of connections that a client found closed between two requests.
    pub closed_idle: u64,
    /// The longest time that a request took until its response, or its loss.
    pub longest: Duration,
    /// One sample for each request.
    pub samples: Vec<Sample>,
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When the request was sent, in microseconds from the beginning of the load.
    pub at: u32,
    /// The time until its response, or its loss, in microseconds.
    pub took: u32,
    pub is_lost: bool,
    /// Whether the client opened a connection for it.
    pub opens: bool,
}

impl Report {
    fn add(&mut self, other: Self) {
        self.samples.extend(other.samples);
        self.answered += other.answered;
        for (kind, count) in other.lost {
            *self.lost.entry(kind).or_default() += count;
        }
        self.connections += other.connections;
        self.clients += other.clients;
        self.told_to_close += other.told_to_close;
        self.closed_idle += other.closed_idle;
        self.longest = self.longest.max(other.longest);
    }

    /// The number of lost requests.
    pub fn lost(&self) -> u64 {
        self.lost.values().sum()
    }

    /// A percentile of the time that a request took: `share` is 0.99 for the 99th percentile.
    pub fn percentile(&self, share: f64) -> Duration {
        let mut took: Vec<u32> = self.samples.iter().map(|sample| sample.took).collect();
        if took.is_empty() {
            return Duration::ZERO;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let index = ((took.len() - 1) as f64 * share).round() as usize;
        let (_, took, _) = took.select_nth_unstable(index);
        Duration::from_micros(u64::from(*took))
    }

    /// Records a request that was sent at `begun`; the load began at `start`.
    fn note(&mut self, start: Instant, begun: Instant, asked: Result<()>, opens: bool) {
        let took = begun.elapsed();
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let at = micros(begun.duration_since(start));
        self.samples.push(Sample { at, took: micros(took), is_lost: asked.is_err(), opens });
        self.longest = self.longest.max(took);
        match asked {
            Ok(()) => self.answered += 1,
            Err(error) => *self.lost.entry(format!("{error:#}")).or_default() += 1,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} answered, {} lost, {} connections for {} clients ({} told to close, {} closed idle), longest {} ms",
            self.answered,
            self.lost(),
            self.connections,
            self.clients,
            self.told_to_close,
            self.closed_idle,
            self.longest.as_millis()
        )?;
        for (kind, count) in &self.lost {
            write!(f, "; {count} x {kind}")?;
        }
        Ok(())
    }
}
