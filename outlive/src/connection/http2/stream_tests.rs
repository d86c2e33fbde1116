//! Event streams over HTTP/2 that move between servers in this process, with the client of the crate `h2`.

use std::convert::Infallible;
use std::future::poll_fn;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use h2::RecvStream;
use h2::client::{Builder, SendRequest};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::Request;
use testkit::certificate::Certificate;
use testkit::client::Target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::MAX_STREAMS;
use super::frame::{
    ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEAD_LENGTH, HEADERS, Head, RST_STREAM, SETTINGS,
    put_settings, put_settings_ack, put_window_update,
};
use crate::app::event_stream::EventStream;
use crate::app::resumable::{Resumable, Resumed};
use crate::connection::PREFACE;
use crate::connection::tests::{Served, move_to, serve, serve_with};
use crate::connection::unread_tests::wait_until;
use crate::observe::metrics;
use crate::registry::{Counts, Phase, Protocols};
use crate::transport::tls_tests::tls_of;

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(120);
/// The initial window of streams (RFC 9113 section 6.9.2).
const FIRST_WINDOW: u32 = 65_535;
const LARGE_WINDOW: u32 = 1 << 30;

/// Events with their numbers as ids, from the one after `Last-Event-ID` on; one in each millisecond.
fn numbers(headers: &HeaderMap) -> impl Stream<Item = Result<Event, Infallible>> + Send + use<> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let event = async |number: u64| {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Some((Ok(Event::default().id(number.to_string()).data(data(number))), number + 1))
    };
    stream::unfold(last.map_or(0, |last| last + 1), event)
}

/// Every third event is large, because the crate `h2` closes a connection with too many small frames.
fn data(number: u64) -> String {
    let length = if number.is_multiple_of(3) { 5_000 } else { number % 700 + 1 };
    "x".repeat(usize::try_from(length).expect("it is small"))
}

async fn events(headers: HeaderMap) -> Response {
    let mut response = EventStream(Sse::new(numbers(&headers))).into_response();
    // A field that h2 enters into its header table.
    response.headers_mut().insert("x-events", HeaderValue::from_static("one"));
    response
}

/// Answers with fields that h2 enters into its header table.
async fn plain(headers: HeaderMap) -> ([(&'static str, String); 2], &'static str) {
    let number =
        headers.get("x-number").and_then(|number| number.to_str().ok()).unwrap_or_default().to_owned();
    ([("x-number", number), ("x-constant", "a value that is in the table".into())], "plain")
}

fn router() -> Router {
    Router::new().route("/", get(events)).route("/plain", get(plain))
}

async fn moved(served: Served, router: Router) -> Served {
    let next = serve(router).await;
    move_to(&next, served).await;
    next
}

/// Waits until `count` requests are in flight.
async fn until_in_flight(served: &Served, count: usize) {
    let reached = async {
        while served.registry().counts().in_flight != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, reached).await.expect("the number of requests is reached");
}

struct Client(SendRequest<Bytes>);

impl Client {
    async fn open(target: &Target, window: u32) -> Self {
        Self::begin(target, Builder::new().initial_window_size(window)).await
    }

    async fn begin(target: &Target, builder: &Builder) -> Self {
        let stream = target.connect().await.expect("the server accepts");
        let (sender, connection) = builder.handshake(stream).await.expect("the handshake succeeds");
        tokio::spawn(async move { drop(connection.await) });
        Self(sender)
    }

    /// A client whose windows are never used up, also while the test does not read.
    async fn of(served: &Served) -> Self {
        let mut builder = Builder::new();
        builder.initial_window_size(LARGE_WINDOW).initial_connection_window_size(LARGE_WINDOW);
        Self::begin(&Target::Tcp(served.address), &builder).await
    }

    async fn send(&mut self, request: Request<()>) -> hyper::Response<RecvStream> {
        poll_fn(|cx| self.0.poll_ready(cx)).await.expect("the connection is open");
        let response = self.0.send_request(request, true).expect("the request is sent").0;
        timeout(PATIENCE, response).await.expect("the server answers in time").expect("the server answers")
    }

    async fn events(&mut self) -> Reader {
        let request = Request::get("http://test/").header("accept", "text/event-stream").body(());
        let response = self.send(request.expect("the request is valid")).await;
        assert_eq!(response.status(), 200);
        Reader { body: response.into_body(), text: String::new() }
    }

    async fn plain(&mut self, number: usize) {
        let request = Request::get("http://test/plain").header("x-number", number.to_string()).body(());
        let response = self.send(request.expect("the request is valid")).await;
        let field = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        assert_eq!(field("x-number"), Some(number.to_string().as_str()));
        assert_eq!(field("x-constant"), Some("a value that is in the table"));
    }
}

struct Reader {
    body: RecvStream,
    text: String,
}

impl Reader {
    /// The next event; None at the end of the response.
    async fn event(&mut self) -> Option<String> {
        while !self.text.contains("\n\n") {
            let chunk = timeout(PATIENCE, self.body.data()).await.expect("an event arrives in time");
            let Some(chunk) = chunk else {
                assert_eq!(self.text, "", "the response ends within an event");
                return None;
            };
            let chunk = chunk.expect("the stream is open");
            self.body.flow_control().release_capacity(chunk.len()).expect("the window is released");
            self.text.push_str(std::str::from_utf8(&chunk).expect("the chunk is text"));
        }
        let (event, rest) = self.text.split_once("\n\n").expect("it was found");
        let event = event.to_owned();
        self.text = rest.to_owned();
        Some(event)
    }

    async fn expect(&mut self, number: u64) {
        let event = self.event().await.expect("the response has not ended");
        let expected = format!("id: {number}\ndata: {}", data(number));
        assert!(event == expected, "expected event {number}, got {event:.60}");
    }

    async fn reaches_the_end(&mut self) {
        while self.event().await.is_some() {}
    }
}

/// Reads `events` events of each of three streams, with other requests in between, while the connection moves again and
/// again.
async fn follow(
    mut served: Served,
    target: &Target,
    window: u32,
    events: u64,
    next: impl AsyncFn() -> Served,
) {
    let mut client = Client::open(target, window).await;
    let (progress, mut has_read) = watch::channel(0);
    let mut reading = Vec::new();
    for _ in 0..3 {
        let mut reader = client.events().await;
        client.plain(0).await;
        let progress = progress.clone();
        reading.push(tokio::spawn(async move {
            for number in 0..events {
                reader.expect(number).await;
                progress.send_modify(|all| *all += 1);
            }
        }));
    }
    for part in 1..30 {
        let enough = 3 * events * part / 30;
        timeout(PATIENCE, has_read.wait_for(|all| *all >= enough))
            .await
            .expect("events arrive")
            .expect("open");
        let next = next().await;
        let ((), ()) =
            tokio::join!(move_to(&next, served), client.plain(usize::try_from(part).expect("small")));
        served = next;
        client.plain(0).await;
    }
    for reader in reading {
        reader.await.expect("all events arrive");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_over_http2_are_neither_lost_nor_repeated_nor_reordered_over_moves() {
    // A window that is smaller than most events, the initial one, and one that is never used up.
    for window in [100, FIRST_WINDOW, LARGE_WINDOW] {
        let served = serve(router()).await;
        let target = Target::Tcp(served.address);
        follow(served, &target, window, 1_000, async || serve(router()).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_over_http2_and_tls_are_neither_lost_nor_repeated_nor_reordered_over_moves() {
    let certificate = Certificate::new().expect("the certificate is made");
    let tls = || Some(tls_of(&certificate));
    let served = serve_with(router(), tls()).await;
    let target = Target::Tls(served.address, certificate.client(&["h2"]).expect("the client is made"));
    follow(served, &target, FIRST_WINDOW, 1_000, async || serve_with(router(), tls()).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn response_over_http2_that_moves_is_counted_by_the_process_in_which_it_began_only() {
    let router = || Router::new().route("/moves", get(events)).route("/plain", get(plain));
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let request = Request::get("http://test/moves").header("accept", "text/event-stream").body(());
    let response = client.send(request.expect("the request is valid")).await;
    let mut reader = Reader { body: response.into_body(), text: String::new() };
    reader.expect(0).await;
    client.plain(1).await;
    let before = served.server.clone();
    let next = moved(served, router()).await;
    reader.event().await.expect("the response has not ended");
    client.plain(2).await;
    assert_eq!(before.registry().counts(), Counts { connections: 0, in_flight: 0, answered: 2 });
    drop((reader, client));
    next.until_connections(0).await;
    assert_eq!(next.registry().counts().answered, 1);
    assert_eq!(metrics::count("/moves", "GET", "200"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_ends_if_the_next_process_does_not_answer_as_the_one_before() {
    let text = get(async || "text");
    let without_wrapper = get(async |headers: HeaderMap| Sse::new(numbers(&headers)));
    let forbidden = get(async || (StatusCode::FORBIDDEN, "no"));
    for route in [None, Some(text), Some(without_wrapper), Some(forbidden)] {
        let served = serve(router()).await;
        let mut client = Client::of(&served).await;
        let mut reader = client.events().await;
        reader.expect(0).await;
        let others = Router::new().route("/plain", get(plain));
        let next = match route {
            Some(route) => others.route("/", route),
            None => others,
        };
        let _next = moved(served, next).await;
        reader.reaches_the_end().await;
        client.plain(7).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_ends_if_the_next_process_does_not_answer_in_time() {
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    reader.expect(0).await;
    let hanging = Router::new()
        .route("/", get(async || std::future::pending::<()>().await))
        .route("/plain", get(plain));
    let next = moved(served, hanging).await;
    // Other requests do not wait for the handler.
    client.plain(1).await;
    reader.reaches_the_end().await;
    client.plain(2).await;
    let next = moved(next, router()).await;
    client.plain(3).await;
    client.events().await.expect(0).await;
    drop(next);
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_without_ids_ends_and_the_others_of_the_connection_continue() {
    let router = || {
        let handler = async || {
            let event = async |()| {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Some((Ok::<_, Infallible>(Event::default().data("x")), ()))
            };
            EventStream(Sse::new(stream::unfold((), event)))
        };
        router().route("/without", get(handler))
    };
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    let request = Request::get("http://test/without").header("accept", "text/event-stream").body(());
    let response = client.send(request.expect("the request is valid")).await;
    let mut without = Reader { body: response.into_body(), text: String::new() };
    assert_eq!(without.event().await.as_deref(), Some("data: x"));
    reader.expect(0).await;
    let _next = moved(served, router()).await;
    without.reaches_the_end().await;
    for number in 1..100 {
        reader.expect(number).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_ends_if_there_is_no_next_process() {
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    reader.expect(0).await;
    served.server.enter(Phase::Lingering);
    reader.reaches_the_end().await;
    served.server.enter(Phase::Closing);
    let drained = served.registry().wait_until(|| served.registry().is_drained());
    timeout(PATIENCE, drained).await.expect("the drain ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_ends_at_the_drain_if_the_next_process_does_not_adopt_it() {
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    reader.expect(0).await;
    served.registry().limit_handover(Protocols::Upgrades);
    served.registry().set_phase(Phase::Draining);
    reader.reaches_the_end().await;
    wait_until("the connection has closed", || served.registry().counts().connections == 0).await;
}

/// A slow request is in flight while the connection has to move, so its event stream must not stop yet.
#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_continues_while_its_connection_waits_for_another_request() {
    static GATE: Semaphore = Semaphore::const_new(0);
    let router = || {
        let slow = get(async || drop(GATE.acquire().await));
        router().route("/slow", slow)
    };
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    poll_fn(|cx| client.0.poll_ready(cx)).await.expect("the connection is open");
    let slow = Request::get("http://test/slow").body(()).expect("the request is valid");
    let slow = client.0.send_request(slow, true).expect("the request is sent").0;
    while served.registry().counts().in_flight < 2 {
        reader.event().await.expect("the response has not ended");
    }
    let begun = reader.event().await.expect("the response has not ended");
    let begun: u64 = begun[4..].split('\n').next().and_then(|id| id.parse().ok()).expect("an id");
    served.server.enter(Phase::Quiescing);
    for number in begun + 1..begun + 200 {
        reader.expect(number).await;
    }
    GATE.add_permits(1);
    let _next = moved(served, router()).await;
    assert_eq!(slow.await.expect("the server answers").status(), 200);
    for number in begun + 200..begun + 300 {
        reader.expect(number).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_that_its_client_resets_does_not_move() {
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    let mut kept = client.events().await;
    reader.expect(0).await;
    drop(reader);
    kept.expect(0).await;
    until_in_flight(&served, 1).await;
    let next = moved(served, router()).await;
    // This event may be from the process before.
    kept.expect(1).await;
    until_in_flight(&next, 1).await;
    drop(kept);
    until_in_flight(&next, 0).await;
    client.plain(1).await;
}

/// hyper asks for events without a pause, so they fill the client's window, which it opens only now and then.
#[tokio::test(flavor = "multi_thread")]
async fn events_over_http2_without_a_pause_stay_within_the_window_over_moves() {
    async fn quick(headers: HeaderMap) -> Response {
        let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
        let event = async |number: u64| {
            Some((
                Ok::<_, Infallible>(Event::default().id(number.to_string()).data(data(number))),
                number + 1,
            ))
        };
        EventStream(Sse::new(stream::unfold(last.map_or(0, |last| last + 1), event))).into_response()
    }
    let router = || Router::new().route("/", get(quick)).route("/plain", get(plain));
    for window in [5_000, FIRST_WINDOW] {
        let served = serve(router()).await;
        let target = Target::Tcp(served.address);
        follow(served, &target, window, 10_000, async || serve(router()).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn event_stream_over_http2_of_the_overflow_ends() {
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut reader = client.events().await;
    reader.expect(0).await;
    served.server.enter(Phase::Quiescing);
    let connection = timeout(PATIENCE, served.server.handover_queue().next()).await;
    let next = serve(router()).await;
    next.server.finish_copy(connection.expect("the connection becomes quiescent"));
    reader.reaches_the_end().await;
    next.until_connections(0).await;
}

// ---- the header table ----

/// A client that sends requests before it has received the settings of the server.
struct EarlyClient {
    stream: TcpStream,
    /// The events of stream 3.
    events: String,
    /// How many heads of a response have arrived on stream 3.
    heads: usize,
}

impl EarlyClient {
    /// Sends a request that enters its fields into the header table, and then that of an event stream which refers to them.
    async fn open(served: &Served) -> Self {
        const ENDS: u8 = END_STREAM | END_HEADERS;
        const FIRST: &[u8] =
            b"\x82\x86\x04\x06/plain\x41\x04test\x53\x11text/event-stream\x40\x08x-number\x0242";
        let mut stream = TcpStream::connect(served.address).await.expect("the server accepts");
        let mut bytes = BytesMut::from(PREFACE);
        // SETTINGS_INITIAL_WINDOW_SIZE
        put_settings(&[0, 4, 0x40, 0, 0, 0], &mut bytes);
        put_window_update(0, LARGE_WINDOW, &mut bytes);
        // The authority, the accepted type and the number have the indices 64, 63 and 62.
        for (stream, block) in [(1, FIRST), (3, b"\x82\x86\x84\xc0\xbf\xbe")] {
            Head { stream, ..Head::new(HEADERS, ENDS, block.len()) }.put(&mut bytes);
            bytes.extend_from_slice(block);
        }
        stream.write_all(&bytes).await.expect("the server reads");
        Self { stream, events: String::new(), heads: 0 }
    }

    async fn send(&mut self, stream: u32, block: &[u8]) {
        let mut bytes = BytesMut::new();
        Head { stream, ..Head::new(HEADERS, END_STREAM | END_HEADERS, block.len()) }.put(&mut bytes);
        bytes.extend_from_slice(block);
        self.stream.write_all(&bytes).await.expect("the server reads");
    }

    /// Receives a frame, and acknowledges SETTINGS.
    async fn receive(&mut self) -> Head {
        let mut head = [0; HEAD_LENGTH];
        let reading = timeout(PATIENCE, self.stream.read_exact(&mut head)).await;
        reading.expect("a frame arrives in time").expect("the connection is open");
        let head = Head::decode(head);
        let mut payload = vec![0; head.length];
        self.stream.read_exact(&mut payload).await.expect("the connection is open");
        match head.frame_type {
            SETTINGS if !head.has(ACK) => {
                let mut bytes = BytesMut::new();
                put_settings_ack(&mut bytes);
                self.stream.write_all(&bytes).await.expect("the server reads");
            }
            HEADERS if head.stream == 3 => self.heads += 1,
            DATA if head.stream == 3 => {
                assert!(!head.has(END_STREAM), "the response ends");
                self.events.push_str(std::str::from_utf8(&payload).expect("the events are text"));
            }
            RST_STREAM | GOAWAY => panic!("{head:?}"),
            _ => {}
        }
        head
    }

    /// Receives frames until `count` events are complete, and compares them.
    async fn expect(&mut self, count: usize) {
        while self.events.matches("\n\n").count() < count {
            self.receive().await;
        }
        for (number, event) in (0..).zip(self.events.split_terminator("\n\n").take(count)) {
            assert!(event == format!("id: {number}\ndata: {}", data(number)), "event {number}: {event:.60}");
        }
        assert_eq!(self.heads, 1);
    }
}

/// Chromium sends several first requests at once, so the later ones refer to fields of the earlier ones.
#[tokio::test(flavor = "multi_thread")]
async fn stream_whose_request_refers_to_the_header_table_continues_in_the_next_process() {
    // The next process receives the fields of the request too.
    let router = || {
        let seen = async |headers: HeaderMap| {
            assert_eq!(headers.get("x-number").map(HeaderValue::as_bytes), Some(&b"42"[..]));
            events(headers).await
        };
        Router::new().route("/", get(seen)).route("/plain", get(plain))
    };
    let mut served = serve(router()).await;
    let mut client = EarlyClient::open(&served).await;
    client.expect(10).await;
    for (stream, count) in [(5, 500), (7, 1_000), (9, 1_500)] {
        let next = moved(served, router()).await;
        until_in_flight(&next, 1).await;
        served = next;
        client.expect(count).await;
        // The table is empty now.
        client.send(stream, b"\x20\x82\x86\x04\x06/plain\x01\x04test").await;
        while client.receive().await != (Head { stream, ..Head::new(DATA, END_STREAM, 5) }) {}
    }
    client.expect(2_000).await;
}

// ---- gRPC ----

/// A message in the encoding of gRPC.
fn message(text: &str) -> Bytes {
    let length = u32::try_from(text.len()).expect("it is small");
    [&[0][..], &length.to_be_bytes(), text.as_bytes()].concat().into()
}

/// Answers with the request, then with one message in each millisecond. In another process it begins with "resumed after" and
/// the number of messages.
async fn watch(request: axum::extract::Request) -> Response {
    let resumed = request.extensions().get::<Resumed>().copied();
    let asked = axum::body::to_bytes(request.into_body(), usize::MAX).await.expect("the body arrives");
    let first = match resumed {
        Some(Resumed { messages, .. }) => {
            [&message(&format!("resumed after {messages}")), &asked[..]].concat().into()
        }
        None => asked.clone(),
    };
    let others = async |()| {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Some((Ok::<_, Infallible>(message("tick")), ()))
    };
    let messages = stream::once(async { Ok(first) }).chain(stream::unfold((), others));
    let mut response = Response::new(axum::body::Body::from_stream(messages));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response.extensions_mut().insert(Resumable);
    response
}

fn grpc() -> Router {
    Router::new().route("/watch", post(watch)).route("/plain", get(plain))
}

struct Call {
    body: RecvStream,
    bytes: Vec<u8>,
}

impl Call {
    async fn begin(client: &mut Client, request: &str) -> Self {
        Self::begin_with(client, request, "").await
    }

    /// `field`: the value of another field.
    async fn begin_with(client: &mut Client, request: &str, field: &str) -> Self {
        poll_fn(|cx| client.0.poll_ready(cx)).await.expect("the connection is open");
        let head = Request::post("http://test/watch").header("content-type", "application/grpc");
        let head = head.header("x-field", field).body(());
        let (response, mut sending) =
            client.0.send_request(head.expect("the request is valid"), false).expect("the request is sent");
        sending.send_data(message(request), true).expect("the body is sent");
        let response = timeout(PATIENCE, response).await.expect("the server answers in time");
        Self { body: response.expect("the server answers").into_body(), bytes: Vec::new() }
    }

    /// The next message; None at the end of the response.
    async fn message(&mut self) -> Option<String> {
        loop {
            if let Some((prefix, rest)) = self.bytes.split_first_chunk::<5>() {
                let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
                if let Some(text) = rest.get(..length) {
                    let text = String::from_utf8(text.to_vec()).expect("the message is text");
                    self.bytes.drain(..5 + length);
                    return Some(text);
                }
            }
            let chunk = timeout(PATIENCE, self.body.data()).await.expect("a message arrives in time");
            let Some(chunk) = chunk else {
                assert!(self.bytes.is_empty(), "the response ends within a message");
                return None;
            };
            self.bytes.extend_from_slice(&chunk.expect("the stream is open"));
        }
    }

    /// Reads up to the end, and returns the status.
    async fn status(&mut self) -> String {
        let end = async { while self.message().await.is_some() {} };
        timeout(PATIENCE, end).await.expect("the response ends in time");
        let trailers = self.body.trailers().await.expect("the stream is open").expect("trailers arrive");
        trailers["grpc-status"].to_str().expect("it is text").to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn resumable_grpc_stream_is_answered_again_with_its_request_after_each_move() {
    let mut served = serve(grpc()).await;
    let mut client = Client::of(&served).await;
    let mut call = Call::begin(&mut client, "what I ask").await;
    assert_eq!(call.message().await.as_deref(), Some("what I ask"));
    let mut received = 1;
    for number in 0..20 {
        assert_eq!(call.message().await.as_deref(), Some("tick"));
        received += 1;
        served = moved(served, grpc()).await;
        let resumed = loop {
            match call.message().await.expect("the response has not ended") {
                tick if tick == "tick" => received += 1,
                other => break other,
            }
        };
        assert_eq!(resumed, format!("resumed after {received}"));
        assert_eq!(call.message().await.as_deref(), Some("what I ask"));
        received += 2;
        client.plain(number).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_stream_that_cannot_continue_ends_with_unavailable() {
    let too_large = "x".repeat(5_000);
    let without = Router::new().route("/plain", get(plain));
    for (request, next) in [("small", without), (&too_large[..], grpc())] {
        let served = serve(grpc()).await;
        let mut client = Client::of(&served).await;
        let mut call = Call::begin(&mut client, request).await;
        assert_eq!(call.message().await.as_deref(), Some(request));
        let _next = moved(served, next).await;
        assert_eq!(call.status().await, "14");
        client.plain(1).await;
    }
}

/// The fields are too large to be kept.
#[tokio::test(flavor = "multi_thread")]
async fn grpc_stream_whose_request_cannot_be_kept_ends_with_unavailable_at_the_drain() {
    let served = serve(grpc()).await;
    let mut client = Client::of(&served).await;
    let mut call = Call::begin_with(&mut client, "x", &"y".repeat(12_000)).await;
    assert_eq!(call.message().await.as_deref(), Some("x"));
    served.registry().set_phase(Phase::Draining);
    assert_eq!(call.status().await, "14");
    let _next = moved(served, grpc()).await;
    client.plain(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resumable_grpc_stream_ends_with_unavailable_if_there_is_no_next_process() {
    let served = serve(grpc()).await;
    let mut client = Client::of(&served).await;
    let mut call = Call::begin(&mut client, "x").await;
    assert_eq!(call.message().await.as_deref(), Some("x"));
    served.server.enter(Phase::Lingering);
    assert_eq!(call.status().await, "14");
}

#[tokio::test(flavor = "multi_thread")]
async fn field_of_the_library_is_hidden_from_handlers_and_ignored_from_clients() {
    let seen = async |headers: HeaderMap| format!("{}", headers.contains_key(super::STREAM_FIELD));
    let router = Router::new().route("/", get(seen));
    let served = serve(router).await;
    let mut client = Client::of(&served).await;
    for number in ["1", "3", "99", "x", ""] {
        for accept in ["text/event-stream", "text/plain"] {
            let request =
                Request::get("http://test/").header(super::STREAM_FIELD, number).header("accept", accept);
            let response = client.send(request.body(()).expect("the request is valid")).await;
            let mut body = response.into_body();
            let chunk = body.data().await.expect("the body has a chunk").expect("the stream is open");
            assert_eq!(chunk, "false");
        }
    }
}

/// The request that gives the fresh h2 the header table counts as one more stream.
#[tokio::test(flavor = "multi_thread")]
async fn as_many_event_streams_as_are_permitted_continue_after_a_move() {
    let served = serve(router()).await;
    let mut client = Client::of(&served).await;
    client.plain(1).await;
    let mut readers = Vec::new();
    for _ in 0..MAX_STREAMS {
        readers.push(client.events().await);
    }
    let next = moved(served, router()).await;
    until_in_flight(&next, readers.len()).await;
    for reader in &mut readers {
        reader.expect(0).await;
    }
}

/// Reads the request to its end, and keeps the body until the response ends.
async fn watch_with_body(request: axum::extract::Request) -> Response {
    let mut body = request.into_body();
    while !body.is_end_stream() {
        body.frame().await.expect("a frame arrives").expect("no error occurs");
    }
    let ticks = async |body| {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Some((Ok::<_, Infallible>(message("tick")), body))
    };
    let mut response = Response::new(axum::body::Body::from_stream(stream::unfold(body, ticks)));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response.extensions_mut().insert(Resumable);
    response
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_stream_whose_handler_keeps_the_request_body_continues_over_three_moves() {
    let router = || Router::new().route("/watch", post(watch_with_body));
    let mut served = serve(router()).await;
    let mut client = Client::of(&served).await;
    let mut call = Call::begin(&mut client, "the request").await;
    for _ in 0..3 {
        assert_eq!(call.message().await.as_deref(), Some("tick"));
        served = moved(served, router()).await;
    }
    assert_eq!(call.message().await.as_deref(), Some("tick"));
}
