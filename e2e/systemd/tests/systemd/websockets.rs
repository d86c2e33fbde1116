//! WebSockets over restarts and reloads on real systemds. Each stays open, and each of its messages is answered once
//! and in order by whichever process serves it.

use std::path::Path;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::JoinHandle;

use futures_util::future::join_all;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use rustix::process::{Resource, getrlimit, setrlimit};
use testkit::certificate::{Certificate, ClientConfig};
use testkit::client::{Connection, Target, WEBSOCKET, get};
use testkit::container::{Container, Systemd};
use testkit::process::Process;
use testkit::{TEST_TIMEOUT, exclusive_cpu, on_each_systemd, wait_until};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};

use crate::on_systemd::release_without;
use crate::third_party_clients::{Client, LIMIT, ROUNDS, connections, reload_and_restart};
use crate::{FOLDER, app_binary, app_package, boot_with_tls, tls_target};

const PLAIN_PORT: u16 = 8080;
const TLS_PORT: u16 = 8443;
/// Two thirds of the clients use TLS.
const CLIENTS: usize = 40;
/// The number of echoes that each client receives between two verbs.
const ECHOES: u64 = 5;
/// The number of messages that a client sends before it waits for an echo.
const WINDOW: usize = 4;
/// Lengths of messages: the three forms of the length in the head of a frame.
const LENGTHS: [usize; 3] = [5, 130, 70_000];
/// A text frame of a client with "hi", masked with zeros, and the frame that the service sends back.
const HI: (&[u8], &[u8]) = (b"\x81\x82\0\0\0\0hi", b"\x81\x02hi");

on_each_systemd! {
    websockets_lose_no_message_over_restarts_and_reloads
    websocket_over_a_unix_socket_stays_open
    python_websockets_client_keeps_its_connection
    websocket_is_closed_with_1012_by_systemctl_stop
    websocket_is_closed_with_1012_before_a_release_that_cannot_adopt_it
    thousand_idle_websockets_are_handed_over
}

/// A byte stream, with or without TLS.
trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}
type Socket = WebSocketStream<Pin<Box<dyn Duplex>>>;

/// Opens a WebSocket to /socket; with `tls` over TLS.
async fn open(tls: Option<&Arc<ClientConfig>>) -> Socket {
    let port = if tls.is_some() { TLS_PORT } else { PLAIN_PORT };
    let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the port is open");
    stream.set_nodelay(true).expect("the option is known");
    let address = stream.peer_addr().expect("the stream is connected");
    upgrade(match tls {
        Some(client) => {
            let connector = TlsConnector::from(client.clone());
            Box::pin(connector.connect(address.ip().into(), stream).await.expect("the handshake succeeds"))
        }
        None => Box::pin(stream),
    })
    .await
}

async fn upgrade(stream: Pin<Box<dyn Duplex>>) -> Socket {
    let opened = tokio_tungstenite::client_async("ws://localhost/socket", stream).await;
    opened.expect("the WebSocket opens").0
}

/// The content of a message: digits that repeat its number, so that no part of it can be taken for another one.
fn content(number: u64) -> Vec<u8> {
    let length = LENGTHS[usize::try_from(number).expect("the number is small") % LENGTHS.len()];
    format!("{:05}", number % 100_000).into_bytes().into_iter().cycle().take(length).collect()
}

fn is_text(number: u64) -> bool {
    number.is_multiple_of(2)
}

/// Every fifth message follows a Ping. Every fourth is sent in three frames, with a Ping before the last one.
fn pings_before(number: u64) -> u64 {
    let all_fifth = number.div_ceil(5);
    let all_fragmented = number.saturating_sub(1).div_ceil(4);
    all_fifth + all_fragmented
}

/// What a client sends for a message.
fn frames(number: u64) -> Vec<Message> {
    let content = content(number);
    let ping = |ping: u64| Message::Ping(ping.to_string().into());
    let mut sent = Vec::new();
    let mut next_ping = pings_before(number);
    if number.is_multiple_of(5) {
        sent.push(ping(next_ping));
        next_ping += 1;
    }
    if number % 4 != 1 {
        sent.push(whole(number, content));
        return sent;
    }
    let kind = if is_text(number) { Data::Text } else { Data::Binary };
    let third = content.len() / 3;
    let part = |range: std::ops::Range<usize>, kind, is_last| {
        Message::Frame(Frame::message(content[range].to_vec(), OpCode::Data(kind), is_last))
    };
    sent.push(part(0..third, kind, false));
    sent.push(part(third..2 * third, Data::Continue, false));
    sent.push(ping(next_ping));
    sent.push(part(2 * third..content.len(), Data::Continue, true));
    sent
}

fn whole(number: u64, content: Vec<u8>) -> Message {
    if is_text(number) {
        Message::text(String::from_utf8(content).expect("the content is ASCII"))
    } else {
        Message::binary(content)
    }
}

/// What all clients share with the test.
struct Traffic {
    /// For each client, the number of echoes so far.
    echoed: Vec<AtomicU64>,
    stop: AtomicBool,
    /// Whether a client has ended before it was told to stop.
    has_failed: AtomicBool,
}

/// What one client has seen.
#[derive(Debug, Default)]
struct Seen {
    sent: u64,
    echoed: u64,
    pings: u64,
    pongs: u64,
    /// The first message that was not the next echo or Pong, or the end of the connection.
    error: Option<String>,
}

impl Traffic {
    /// Starts clients in the network of the container.
    fn start(
        container: &Container,
        tls: [Arc<ClientConfig>; 2],
        clients: usize,
    ) -> (Arc<Self>, JoinHandle<Vec<Seen>>) {
        let traffic = Arc::new(Self {
            echoed: (0..clients).map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
        });
        let (enter, shared) = (container.enter(), traffic.clone());
        let thread = std::thread::spawn(move || {
            enter();
            // Two of three clients use TLS, each with one of the configurations.
            let clients =
                (0..clients).map(|client| shared.run(client, (client % 3).checked_sub(1).map(|at| &tls[at])));
            testkit::block_on(join_all(clients))
        });
        (traffic, thread)
    }

    /// Waits until each client has received `more` echoes. Returns early if one has failed.
    fn wait_for_echoes(&self, more: u64) {
        let wanted: Vec<u64> = self.echoed.iter().map(|echoed| echoed.load(Acquire) + more).collect();
        wait_until("each client receives echoes", || {
            self.has_failed.load(Acquire)
                || self.echoed.iter().zip(&wanted).all(|(echoed, wanted)| echoed.load(Acquire) >= *wanted)
        });
    }

    /// Sends messages and reads their echoes until the test ends, and then closes the WebSocket.
    async fn run(&self, client: usize, tls: Option<&Arc<ClientConfig>>) -> Seen {
        let (sink, stream) = open(tls).await.split();
        let window = Semaphore::new(WINDOW);
        let (sent, mut seen) = tokio::join!(self.send(sink, &window), self.receive(client, stream, &window));
        (seen.sent, seen.pings) = (sent, pings_before(sent));
        seen
    }

    /// Returns the number of messages that were sent.
    async fn send(&self, mut sink: SplitSink<Socket, Message>, window: &Semaphore) -> u64 {
        let mut number = 0;
        while !self.stop.load(Acquire) {
            // The semaphore is closed when the connection has ended.
            let Ok(permit) = window.acquire().await else { return number };
            permit.forget();
            for message in frames(number) {
                // A failed send is reported by the receiving side.
                let _ = sink.send(message).await;
            }
            number += 1;
        }
        // The service answers it after all echoes.
        let _ =
            sink.send(Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))).await;
        number
    }

    async fn receive(&self, client: usize, mut stream: SplitStream<Socket>, window: &Semaphore) -> Seen {
        let mut seen = Seen::default();
        loop {
            let received = timeout(TEST_TIMEOUT, stream.next()).await;
            match received {
                Ok(Some(Ok(message))) if message == whole(seen.echoed, content(seen.echoed)) => {
                    seen.echoed += 1;
                    self.echoed[client].store(seen.echoed, Release);
                    window.add_permits(1);
                }
                Ok(Some(Ok(Message::Pong(pong)))) if pong == seen.pongs.to_string() => seen.pongs += 1,
                Ok(Some(Ok(Message::Close(Some(frame)))))
                    if self.stop.load(Acquire) && frame.code == CloseCode::Normal =>
                {
                    return seen;
                }
                other => {
                    let mut text =
                        format!("instead of echo {} or Pong {}: {other:?}", seen.echoed, seen.pongs);
                    text.truncate(300);
                    seen.error = Some(text);
                    self.has_failed.store(true, Release);
                    window.close();
                    return seen;
                }
            }
        }
    }
}

/// Runs `systemctl VERB`, and asserts that another process is the main process afterwards.
pub fn replace_process(container: &Container, verb: &str) {
    let before = container.show("MainPID").expect("systemctl show succeeds");
    container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
    let after = container.show("MainPID").expect("systemctl show succeeds");
    assert!(after != before && after != "0", "{verb}: main process {before}, then {after}");
}

/// The clients send messages of three lengths without a pause, some in fragments and some between Pings, and never
/// connect again.
fn websockets_lose_no_message_over_restarts_and_reloads(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let tls = [certificate.client(&["http/1.1"]), certificate.client_over_tls12(None, &["http/1.1"])]
        .map(|client| client.expect("the client configuration is valid"));
    let _alone = exclusive_cpu();
    let (traffic, clients) = Traffic::start(&container, tls, CLIENTS);
    traffic.wait_for_echoes(ECHOES);
    let open = || [PLAIN_PORT, TLS_PORT].map(|port| connections(&container, port));
    let before = open();
    for _ in 0..ROUNDS {
        for verb in ["restart", "reload"] {
            replace_process(&container, verb);
            traffic.wait_for_echoes(ECHOES);
        }
    }
    let after = open();
    traffic.stop.store(true, Release);
    let seen = clients.join().expect("no client panics");
    let echoed: u64 = seen.iter().map(|seen| seen.echoed).sum();
    eprintln!("{ROUNDS} restarts and reloads: {echoed} echoes to {CLIENTS} WebSockets");
    for (client, seen) in seen.iter().enumerate() {
        assert_eq!(seen.error, None, "client {client}: {seen:?}");
        assert_eq!((seen.echoed, seen.pongs), (seen.sent, seen.pings), "client {client}: {seen:?}");
    }
    assert_eq!(before.iter().map(Vec::len).sum::<usize>(), CLIENTS);
    assert_eq!(after, before, "connections were closed or opened");
}

/// As behind a proxy on the same machine.
fn websocket_over_a_unix_socket_stays_open(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    let listens = "[Socket]\nListenStream=/run/http.sock\n";
    container.add_to_unit("socket", "unix", listens).expect("the drop-in is written");
    // systemd binds the path only when the unit starts.
    container.run(&["systemctl", "restart", &container.unit("socket")]).expect("the unit restarts");
    container.inside(async || {
        let stream = UnixStream::connect(container.path("run/http.sock")).await.expect("the path is bound");
        let mut socket = upgrade(Box::pin(stream)).await;
        for number in 0..=2 * ROUNDS {
            if number > 0 {
                replace_process(&container, if number % 2 == 0 { "restart" } else { "reload" });
            }
            for length in LENGTHS {
                let message = Message::text(number.to_string().repeat(length));
                socket.send(message.clone()).await.expect("the message is sent");
                assert_eq!(next(&mut socket).await, Some(message));
            }
        }
    });
}

/// The client of the package `python3-websockets` with its default settings, with and without TLS.
fn python_websockets_client_keeps_its_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let (script, chain) = (format!("{FOLDER}/e2e/systemd/clients/websockets-client.py"), certificate.chain());
    let chain = chain.to_str().expect("the path is UTF-8");
    keep_open(&container, |url| Client::start(&container, &["/usr/bin/python3", &script, url, LIMIT, chain]));
}

/// Runs two clients, one of them with TLS, over reloads and restarts. `start` starts one that opens a WebSocket to this
/// URL. The last line of each is: echoes, Pongs, messages that were lost, WebSockets that were closed.
pub fn keep_open(container: &Container, start: impl FnMut(&str) -> Client) {
    let urls = [format!("ws://127.0.0.1:{PLAIN_PORT}/socket"), format!("wss://127.0.0.1:{TLS_PORT}/socket")];
    let mut clients = urls.each_ref().map(String::as_str).map(start);
    reload_and_restart(container, &mut clients, |_, _| {});
    for client in clients {
        let [answered, pongs, lost, closed] = client.last_numbers()[..] else {
            panic!("the last line has four numbers")
        };
        // At least one message before the first round and one in each.
        assert!(
            answered > ROUNDS as u64 && pongs > 0 && (lost, closed) == (0, 0),
            "{answered} {pongs} {lost} {closed}"
        );
    }
}

/// Without a store no process can continue the WebSockets. With one, the process cannot tell a stop from a restart.
fn websocket_is_closed_with_1012_by_systemctl_stop(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    container
        .add_to_unit("service", "store", "[Service]\nFileDescriptorStoreMax=0\n")
        .expect("the drop-in is written");
    container.systemctl("restart").expect("the restart succeeds");
    let tls = certificate.client(&["http/1.1"]).expect("the client configuration is valid");
    container.inside(async || {
        let mut sockets = [open(None).await, open(Some(&tls)).await];
        for socket in &mut sockets {
            socket.send(Message::text("hi")).await.expect("the message is sent");
            assert_eq!(next(socket).await, Some(Message::text("hi")));
        }
        let mut stop = container.command(&["systemctl", "stop", &container.unit("service")]);
        let mut stop = Process::spawn(stop.stderr(Stdio::null())).expect("systemctl starts");
        for socket in &mut sockets {
            let Some(Message::Close(Some(close))) = next(socket).await else { panic!("expected a Close") };
            assert_eq!(close.code, CloseCode::Restart);
            assert_eq!(next(socket).await, None);
        }
        assert!(stop.wait().expect("systemctl ends").success());
    });
}

/// An older release announces nothing: neither its binary, which a restart looks at, nor the process itself at a reload.
fn websocket_is_closed_with_1012_before_a_release_that_cannot_adopt_it(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    // Event streams over HTTP/2 came later.
    let older = release_without(
        &container,
        &[
            "takes-upgraded-connections",
            "takes-http2-event-streams",
            "takes-header-tables-and-client-certificates",
        ],
    );
    for verb in ["restart", "reload"] {
        container.replace_binary(Path::new(app_binary())).expect("the binary is replaced");
        container.systemctl("restart").expect("the restart succeeds");
        container.inside(async || {
            let mut socket = open(None).await;
            socket.send(Message::text("hi")).await.expect("the message is sent");
            assert_eq!(next(&mut socket).await, Some(Message::text("hi")));
            container.replace_binary(older.path()).expect("the binary is replaced");
            let mut verb = container.command(&["systemctl", verb, &container.unit("service")]);
            let mut verb = Process::spawn(verb.stderr(Stdio::null())).expect("systemctl starts");
            let Some(Message::Close(Some(close))) = next(&mut socket).await else {
                panic!("expected a Close")
            };
            assert_eq!(close.code, CloseCode::Restart);
            assert_eq!(next(&mut socket).await, None);
            assert!(verb.wait().expect("systemctl ends").success());
        });
    }
}

/// The next message; `None` when the connection was closed after a Close.
async fn next(socket: &mut Socket) -> Option<Message> {
    let received = timeout(TEST_TIMEOUT, socket.next()).await.expect("a message or the end arrives in time");
    received.transpose().expect("the connection ends with a Close")
}

/// Every fourth WebSocket uses TLS. Half of the idle connections have never sent a request.
fn thousand_idle_websockets_are_handed_over(systemd: Systemd) {
    const COUNT: usize = 1000;
    // This process has the clients' ends of all connections.
    let mut fds = getrlimit(Resource::Nofile);
    fds.current = fds.maximum;
    setrlimit(Resource::Nofile, fds).expect("the limit is below the hard limit");
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let (plain, tls) = (Container::target(), tls_target(&certificate, "http/1.1"));
    let _alone = exclusive_cpu();
    container.inside(async || {
        let (mut idle, mut websockets) = (Vec::new(), Vec::new());
        for number in 0..COUNT {
            let mut connection = Connection::open(&plain).await.expect("the port is open");
            if number % 2 == 0 {
                assert_eq!(connection.ask(&get("/")).await.expect("the request is answered").status, 200);
            }
            idle.push(connection);
            let target = if number % 4 == 0 { &tls } else { &plain };
            websockets.push(open_idle(target).await);
        }
        for verb in ["restart", "reload"] {
            replace_process(&container, verb);
        }
        for websocket in &mut websockets {
            websocket.send(HI.0).await.expect("the bytes are sent");
        }
        for websocket in &mut websockets {
            let echo =
                timeout(TEST_TIMEOUT, websocket.take(HI.1.len())).await.expect("the echo arrives in time");
            assert_eq!(echo.expect("the WebSocket is open"), HI.1);
            assert!(websocket.unread().is_empty() && !websocket.is_closed_by_server());
        }
        for connection in &mut idle {
            let answer = connection.ask(&get("/")).await.expect("the request is answered").text();
            assert!(answer.contains(", generation 3, "), "{answer}");
        }
    });
}

/// A WebSocket whose frames the test reads itself, because a thousand clients with buffers would take much memory.
async fn open_idle(target: &Target) -> Connection {
    let mut connection = Connection::open(target).await.expect("the port is open");
    assert_eq!(connection.ask(WEBSOCKET).await.expect("the request is answered").status, 101);
    connection
}
