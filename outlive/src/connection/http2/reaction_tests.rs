//! Valid and invalid frames of every type, on connections that have served two requests. A connection that was handed
//! over must react like one that began in this process, because a handover must not make the server more or less
//! strict.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use bytes::BytesMut;
use hyper::StatusCode;
use proptest::prelude::*;
use testkit::certificate::Certificate;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::frame::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEAD_LENGTH, HEADERS, Head, PING, PRIORITY,
    PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE,
};
use super::header_block::SIZE_UPDATE;
use crate::connection::Connection;
use crate::connection::PREFACE;
use crate::connection::tests::{Served, move_to, serve_with};
use crate::registry::Phase;
use crate::transport::tls_config::Tls;
use crate::transport::tls_tests;

const PATIENCE: Duration = Duration::from_secs(60);
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;
const UNKNOWN: u8 = 0xb;
const ENDS: u8 = END_STREAM | END_HEADERS;

/// Error codes (RFC 9113 section 7).
const NO_ERROR: u32 = 0;
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;

/// Header blocks; the indices are those of the static table (RFC 7541 appendix A).
const GET: &[u8] = b"\x82\x86\x84\x41\x01x";
const POST: &[u8] = b"\x83\x86\x84\x41\x01x";
/// The same as GET, with a reference to the field that GET has entered into the header table.
const GET_AGAIN: &[u8] = b"\x82\x86\x84\xbe";
/// A POST to a handler that neither reads nor answers.
const POST_STALLED: &[u8] = b"\x83\x86\x04\x06/stall\x41\x01x";

fn frame(frame_type: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    Head { stream, ..Head::new(frame_type, flags, payload.len()) }.put(&mut bytes);
    [&bytes, payload].concat()
}

fn with_content_length(block: &[u8], length: &str) -> Vec<u8> {
    let size = u8::try_from(length.len()).expect("a short number");
    [block, &[0x0f, 0x0d, size], length.as_bytes()].concat()
}

fn with_field(block: &[u8], name: &str, value: &str) -> Vec<u8> {
    let size = |text: &str| u8::try_from(text.len()).expect("a short text");
    [block, &[0, size(name)], name.as_bytes(), &[size(value)], value.as_bytes()].concat()
}

fn grant(stream: u32, increment: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

fn priority(stream: u32, dependency: u32) -> Vec<u8> {
    frame(PRIORITY, 0, stream, &[&dependency.to_be_bytes()[..], &[9]].concat())
}

/// What the server sends in answer to a probe, until it closes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Reaction {
    /// The last stream and the code of each GOAWAY.
    goaways: Vec<(u32, u32)>,
    resets: BTreeMap<u32, Vec<u32>>,
    /// The bodies of complete responses.
    answers: BTreeMap<u32, Vec<u8>>,
    pongs: usize,
    settings_acks: usize,
}

impl Reaction {
    /// The server sends GOAWAY with this code, and nothing else.
    fn goaway(code: u32) -> Self {
        Self { goaways: vec![(3, code)], ..Self::default() }
    }

    /// The server resets these streams, and then ends without an error.
    fn resets<const N: usize>(resets: [(u32, u32); N]) -> Self {
        let resets = resets.map(|(stream, code)| (stream, vec![code])).into();
        Self { resets, ..Self::goaway(NO_ERROR) }
    }
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

struct Client {
    wire: Box<dyn Wire>,
}

impl Client {
    /// A connection on which streams 1 and 3 have been answered. `second` is the request on stream 3.
    async fn open(served: &Served, certificate: Option<&Certificate>, second: &[u8]) -> Self {
        let stream = TcpStream::connect(served.address).await.expect("the server accepts");
        // As real clients do. Otherwise the kernel would hold back what the client sends while the server does not run.
        stream.set_nodelay(true).expect("the option is set");
        let wire: Box<dyn Wire> = match certificate {
            None => Box::new(stream),
            Some(certificate) => {
                let connector = TlsConnector::from(
                    certificate.client(&["h2"]).expect("the client configuration is valid"),
                );
                let name = "localhost".try_into().expect("the server name is valid");
                Box::new(connector.connect(name, stream).await.expect("the handshake succeeds"))
            }
        };
        Self::begin(wire, second).await
    }

    /// The same, on a connection that is open already.
    async fn begin(wire: Box<dyn Wire>, second: &[u8]) -> Self {
        let mut client = Self { wire };
        client.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await;
        client.wait_until(|head| head.frame_type == SETTINGS && !head.has(ACK)).await;
        let first = frame(HEADERS, ENDS, 1, GET);
        client.send(&[frame(SETTINGS, ACK, 0, &[]), first].concat()).await;
        client.wait_until(|head| head.stream == 1 && head.has(END_STREAM)).await;
        client.send(&frame(HEADERS, ENDS, 3, second)).await;
        client.wait_until(|head| head.stream == 3 && head.has(END_STREAM)).await;
        // When the server answers this, it has dropped its state of the streams.
        client.ping(b"finished").await;
        client
    }

    /// Waits until the server has processed everything so far.
    async fn ping(&mut self, payload: &[u8; 8]) {
        self.send(&frame(PING, 0, 0, payload)).await;
        self.wait_until(|head| head.frame_type == PING && head.has(ACK)).await;
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.wire.write_all(bytes).await.expect("the server reads");
    }

    async fn receive(&mut self) -> Option<(Head, Vec<u8>)> {
        let mut head = [0; HEAD_LENGTH];
        self.wire.read_exact(&mut head).await.ok()?;
        let head = Head::decode(head);
        let mut payload = vec![0; head.length];
        self.wire.read_exact(&mut payload).await.ok()?;
        Some((head, payload))
    }

    async fn wait_until(&mut self, wanted: impl Fn(Head) -> bool) {
        let reached = async {
            while let Some((head, payload)) = self.receive().await {
                assert!(![RST_STREAM, GOAWAY].contains(&head.frame_type), "{head:?} {payload:?}");
                if wanted(head) {
                    return true;
                }
            }
            false
        };
        assert!(
            timeout(PATIENCE, reached).await.expect("the frame arrives in time"),
            "the server closed the connection before the frame"
        );
    }

    /// Sends `bytes` and GOAWAY, and collects what the server sends until it closes.
    async fn react(mut self, bytes: &[u8]) -> Reaction {
        let all = [bytes, &frame(GOAWAY, 0, 0, &[0; 8])].concat();
        // The server may close before it has read everything.
        let _ = self.wire.write_all(&all).await;
        let _ = self.wire.flush().await;
        let mut reaction = Reaction::default();
        let mut bodies: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("the number has four bytes"));
        let collected = async {
            while let Some((head, payload)) = self.receive().await {
                match head.frame_type {
                    DATA => bodies.entry(head.stream).or_default().extend(payload),
                    RST_STREAM => reaction.resets.entry(head.stream).or_default().push(number(&payload)),
                    GOAWAY => reaction.goaways.push((number(&payload[..4]), number(&payload[4..8]))),
                    PING if head.has(ACK) => reaction.pongs += 1,
                    SETTINGS if head.has(ACK) => reaction.settings_acks += 1,
                    _ => {}
                }
                if matches!(head.frame_type, DATA | HEADERS) && head.has(END_STREAM) {
                    reaction.answers.insert(head.stream, bodies.remove(&head.stream).unwrap_or_default());
                }
            }
        };
        timeout(PATIENCE, collected).await.expect("the server closes in time");
        reaction
    }
}

fn router() -> Router {
    let stall = async |_body: Body| std::future::pending::<()>().await;
    let headers_only = async || (StatusCode::NO_CONTENT, [("x-large", "x".repeat(3_500))]);
    Router::new()
        .route("/", get("hello\n").post(async |body: axum::body::Bytes| body))
        .route("/large", get(vec![0; 60_000]))
        .route("/headers", get(headers_only))
        .route("/stall", post(stall))
}

fn tls_of(certificate: Option<&Certificate>) -> Option<Tls> {
    certificate.map(tls_tests::tls_of)
}

/// How many connections are open at once; the server of the tests accepts 100.
const BATCH: usize = 50;

/// The reactions to `probes`, each on a connection of its own that has been handed over `moves` times.
async fn reactions(probes: &[Vec<u8>], certificate: Option<&Certificate>, moves: usize) -> Vec<Reaction> {
    reactions_after(GET_AGAIN, probes, certificate, moves).await
}

/// As [`reactions`], with this request on stream 3.
async fn reactions_after(
    second: &[u8],
    probes: &[Vec<u8>],
    certificate: Option<&Certificate>,
    moves: usize,
) -> Vec<Reaction> {
    let mut all = Vec::new();
    for batch in probes.chunks(BATCH) {
        all.extend(batch_reactions(second, batch, certificate, moves).await);
    }
    all
}

async fn batch_reactions(
    second: &[u8],
    probes: &[Vec<u8>],
    certificate: Option<&Certificate>,
    moves: usize,
) -> Vec<Reaction> {
    let mut served = serve_with(router(), tls_of(certificate)).await;
    let mut clients = Vec::new();
    for _ in probes {
        clients.push(Client::open(&served, certificate, second).await);
    }
    for _ in 0..moves {
        let next = serve_with(router(), tls_of(certificate)).await;
        move_to(&next, served).await;
        served = next;
        assert_eq!(served.registry().counts().connections, probes.len(), "all connections are handed over");
    }
    let mut tasks = JoinSet::new();
    for (number, (client, probe)) in clients.into_iter().zip(probes).enumerate() {
        let probe = probe.clone();
        tasks.spawn(async move { (number, client.react(&probe).await) });
    }
    let mut reactions = tasks.join_all().await;
    reactions.sort_by_key(|(number, _)| *number);
    reactions.into_iter().map(|(_, reaction)| reaction).collect()
}

/// A name, what the client sends after streams 1 and 3, and the reaction. That is None if only equality is checked.
type Probe = (&'static str, Vec<u8>, Option<Reaction>);

fn on_connection_frames() -> Vec<Probe> {
    let error = || Some(Reaction::goaway(PROTOCOL_ERROR));
    vec![
        ("nothing", Vec::new(), Some(Reaction::goaway(NO_ERROR))),
        ("PING", frame(PING, 0, 0, &[7; 8]), Some(Reaction { pongs: 1, ..Reaction::goaway(NO_ERROR) })),
        ("PING ACK without a PING", frame(PING, ACK, 0, &[7; 8]), Some(Reaction::goaway(NO_ERROR))),
        ("PING on 1", frame(PING, 0, 1, &[7; 8]), error()),
        ("PING on 3", frame(PING, 0, 3, &[7; 8]), error()),
        ("PING on 2", frame(PING, 0, 2, &[7; 8]), error()),
        ("PING on 5", frame(PING, 0, 5, &[7; 8]), error()),
        ("PING ACK on 1", frame(PING, ACK, 1, &[7; 8]), error()),
        ("PING of 7 bytes", frame(PING, 0, 0, &[7; 7]), error()),
        ("PING ACK of 7 bytes", frame(PING, ACK, 0, &[7; 7]), error()),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]), None),
        ("SETTINGS on 1", frame(SETTINGS, 0, 1, &[]), error()),
        ("SETTINGS ACK on 1", frame(SETTINGS, ACK, 1, &[]), error()),
        ("SETTINGS ACK without SETTINGS", frame(SETTINGS, ACK, 0, &[]), error()),
        ("SETTINGS ACK with a payload", frame(SETTINGS, ACK, 0, &[0, 4, 0, 1, 0, 0]), None),
        ("SETTINGS of 5 bytes", frame(SETTINGS, 0, 0, &[0; 5]), None),
        ("SETTINGS with ENABLE_PUSH=2", frame(SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2]), error()),
        ("SETTINGS with too large a window", frame(SETTINGS, 0, 0, &[0, 4, 255, 0, 0, 0]), None),
        ("SETTINGS with too small a frame size", frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1]), error()),
        ("GOAWAY on 1", frame(GOAWAY, 0, 1, &[0; 8]), error()),
        ("GOAWAY of 7 bytes", frame(GOAWAY, 0, 0, &[0; 7]), None),
        ("WINDOW_UPDATE of 5 bytes", frame(WINDOW_UPDATE, 0, 0, &[1; 5]), error()),
        ("WINDOW_UPDATE of nothing", grant(0, 0), error()),
        (
            "WINDOW_UPDATE beyond the largest window",
            grant(0, i32::MAX.cast_unsigned()),
            Some(Reaction::goaway(FLOW_CONTROL_ERROR)),
        ),
        ("unknown type", frame(UNKNOWN, 9, 0, &[1; 20]), Some(Reaction::goaway(NO_ERROR))),
        (
            "a frame that is too long",
            frame(UNKNOWN, 0, 0, &[0; 16_385]),
            Some(Reaction::goaway(FRAME_SIZE_ERROR)),
        ),
    ]
}

fn on_old_streams() -> Vec<Probe> {
    let error = || Some(Reaction::goaway(PROTOCOL_ERROR));
    let ignored = || Some(Reaction::goaway(NO_ERROR));
    let closed = || Some(Reaction::resets([(1, STREAM_CLOSED)]));
    let headers = |flags: u8, stream: u32, block: &[u8]| frame(HEADERS, flags, stream, block);
    vec![
        ("DATA on 1", frame(DATA, 0, 1, b"x"), closed()),
        ("DATA on 3", frame(DATA, 0, 3, b"x"), Some(Reaction::resets([(3, STREAM_CLOSED)]))),
        ("DATA of nothing on 1", frame(DATA, 0, 1, b""), closed()),
        ("DATA with END_STREAM on 1", frame(DATA, END_STREAM, 1, b"x"), closed()),
        ("DATA twice on 1", frame(DATA, 0, 1, b"x").repeat(2), closed()),
        (
            "DATA on 1 and 3",
            [frame(DATA, 0, 1, b"x"), frame(DATA, 0, 3, b"x")].concat(),
            Some(Reaction::resets([(1, STREAM_CLOSED), (3, STREAM_CLOSED)])),
        ),
        ("padded DATA on 1", frame(DATA, PADDED, 1, b"\x02x\0\0"), closed()),
        ("DATA with too much padding on 1", frame(DATA, PADDED, 1, b"\x09x"), error()),
        (
            "DATA on 1 that is too long",
            frame(DATA, 0, 1, &[0; 16_385]),
            Some(Reaction::goaway(FRAME_SIZE_ERROR)),
        ),
        (
            "DATA on 1 beyond the connection's window",
            [
                headers(END_HEADERS, 5, POST_STALLED),
                frame(DATA, 0, 5, &[0; 16_384]).repeat(64),
                frame(DATA, 0, 1, b"x"),
            ]
            .concat(),
            Some(Reaction { goaways: vec![(5, FLOW_CONTROL_ERROR)], ..Reaction::default() }),
        ),
        ("HEADERS again on 1", headers(ENDS, 1, GET), error()),
        ("HEADERS again on 3", headers(ENDS, 3, GET), error()),
        ("trailers on 1", headers(ENDS, 1, b"\x00\x01a\x01b"), error()),
        (
            "HEADERS and CONTINUATION on 1",
            [headers(END_STREAM, 1, GET), frame(CONTINUATION, END_HEADERS, 1, b"")].concat(),
            error(),
        ),
        (
            "HEADERS on 1 with a field of HTTP/1.1",
            headers(ENDS, 1, &with_field(GET, "connection", "close")),
            Some(Reaction::resets([(1, PROTOCOL_ERROR)])),
        ),
        (
            "HEADERS on 1 that depends on itself",
            headers(ENDS | WITH_PRIORITY, 1, &[&[0, 0, 0, 1, 9], GET].concat()),
            Some(Reaction::resets([(1, PROTOCOL_ERROR)])),
        ),
        ("HEADERS on 1 with too much padding", headers(ENDS | PADDED, 1, b"\xffx"), error()),
        ("HEADERS on 1 with an index of no entry", headers(ENDS, 1, b"\xfe"), None),
        (
            "HEADERS of a lower number than the last",
            [headers(ENDS, 7, GET), headers(ENDS, 5, GET)].concat(),
            None,
        ),
        ("RST_STREAM on 1", frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), ignored()),
        ("RST_STREAM twice on 3", frame(RST_STREAM, 0, 3, &[0, 0, 0, 8]).repeat(2), ignored()),
        ("RST_STREAM of 3 bytes on 1", frame(RST_STREAM, 0, 1, &[0; 3]), error()),
        ("WINDOW_UPDATE on 1", grant(1, 100), ignored()),
        ("WINDOW_UPDATE of nothing on 1", grant(1, 0), error()),
        ("WINDOW_UPDATE of 3 bytes on 1", frame(WINDOW_UPDATE, 0, 1, &[1; 3]), error()),
        ("largest WINDOW_UPDATE on 1, twice", grant(1, i32::MAX.cast_unsigned()).repeat(2), ignored()),
        ("PRIORITY on 1", priority(1, 3), ignored()),
        (
            "PRIORITY on 1 that depends on itself",
            priority(1, 1),
            Some(Reaction::resets([(1, PROTOCOL_ERROR)])),
        ),
        (
            "PRIORITY on 3 that depends on itself",
            priority(3, 3),
            Some(Reaction::resets([(3, PROTOCOL_ERROR)])),
        ),
        ("PRIORITY of 4 bytes on 1", frame(PRIORITY, 0, 1, &[0; 4]), error()),
        ("CONTINUATION on 1", frame(CONTINUATION, END_HEADERS, 1, GET), error()),
        ("PUSH_PROMISE on 1", frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], GET].concat()), error()),
        ("unknown type on 1", frame(UNKNOWN, 9, 1, &[1; 20]), ignored()),
    ]
}

fn requests() -> Vec<Probe> {
    let answered = |stream, body: &[u8]| {
        let answers = [(stream, body.to_vec())].into();
        Some(Reaction { goaways: vec![(stream, NO_ERROR)], answers, ..Reaction::default() })
    };
    let reset = |stream| {
        let resets = [(stream, vec![PROTOCOL_ERROR])].into();
        Some(Reaction { goaways: vec![(stream, NO_ERROR)], resets, ..Reaction::default() })
    };
    let headers = |flags: u8, stream: u32, block: &[u8]| frame(HEADERS, flags, stream, block);
    let then_data = |block: &[u8], data: &[u8]| {
        [headers(END_HEADERS, 5, block), frame(DATA, END_STREAM, 5, data)].concat()
    };
    vec![
        ("a request", headers(ENDS, 5, GET), answered(5, b"hello\n")),
        ("a request with a body", then_data(POST, b"body"), answered(5, b"body")),
        ("a request that skips numbers", headers(ENDS, 101, GET), answered(101, b"hello\n")),
        ("a request with the reserved bit", headers(ENDS, 5 | 1 << 31, GET), answered(5, b"hello\n")),
        (
            "a request in two frames",
            [headers(END_STREAM, 5, &GET[..3]), frame(CONTINUATION, END_HEADERS, 5, &GET[3..])].concat(),
            answered(5, b"hello\n"),
        ),
        (
            "a request with trailers",
            [
                then_data(POST, b"")[..HEAD_LENGTH + POST.len()].to_vec(),
                frame(DATA, 0, 5, b"body"),
                headers(ENDS, 5, b"\x00\x01a\x01b"),
            ]
            .concat(),
            answered(5, b"body"),
        ),
        (
            "trailers that do not end the stream",
            [headers(END_HEADERS, 5, POST), headers(END_HEADERS, 5, b"\x00\x01a\x01b")].concat(),
            reset(5),
        ),
        (
            "a content-length that is right",
            then_data(&with_content_length(POST, "4"), b"body"),
            answered(5, b"body"),
        ),
        ("a content-length that is too large", then_data(&with_content_length(POST, "5"), b"body"), reset(5)),
        ("a content-length that is too small", then_data(&with_content_length(POST, "3"), b"body"), reset(5)),
        ("a content-length without a body", headers(ENDS, 5, &with_content_length(POST, "4")), reset(5)),
        ("a content-length that is no number", then_data(&with_content_length(POST, "x"), b"body"), reset(5)),
        (
            "two content-lengths",
            then_data(&with_content_length(&with_content_length(POST, "4"), "5"), b"body"),
            reset(5),
        ),
        ("a request without a path", headers(ENDS, 5, b"\x82\x86\x41\x01x"), None),
        ("a field in capitals", headers(ENDS, 5, &with_field(GET, "Name", "x")), None),
        ("a pseudo-field behind a field", headers(ENDS, 5, b"\x82\x86\x41\x01x\x00\x01a\x01b\x84"), None),
        ("te other than trailers", headers(ENDS, 5, &with_field(GET, "te", "gzip")), None),
        ("headers that are too large", headers(ENDS, 5, &[GET, &[0x90; 300]].concat()), None),
        ("DATA behind the end of a stream", [headers(ENDS, 5, GET), frame(DATA, 0, 5, b"x")].concat(), None),
        (
            "a request that is reset at once",
            [headers(END_HEADERS, 5, POST), frame(RST_STREAM, 0, 5, &[0, 0, 0, 8])].concat(),
            None,
        ),
        (
            "an error of a request, and an old stream",
            [then_data(&with_content_length(POST, "5"), b"body"), frame(DATA, 0, 1, b"x")].concat(),
            None,
        ),
    ]
}

fn on_other_streams() -> Vec<Probe> {
    let error = || Some(Reaction::goaway(PROTOCOL_ERROR));
    let headers = |flags: u8, stream: u32, block: &[u8]| frame(HEADERS, flags, stream, block);
    vec![
        ("HEADERS on 0", headers(ENDS, 0, GET), error()),
        ("HEADERS on 2", headers(ENDS, 2, GET), error()),
        ("HEADERS on 4", headers(ENDS, 4, GET), error()),
        ("HEADERS on 6", headers(ENDS, 6, GET), error()),
        (
            "HEADERS on 5 that depends on itself",
            headers(ENDS | WITH_PRIORITY, 5, &[&[0, 0, 0, 5, 9], GET].concat()),
            None,
        ),
        ("DATA on 0", frame(DATA, 0, 0, b"x"), error()),
        ("DATA on 2", frame(DATA, 0, 2, b"x"), error()),
        ("DATA on 5, which is idle", frame(DATA, 0, 5, b"x"), error()),
        ("RST_STREAM on 0", frame(RST_STREAM, 0, 0, &[0; 4]), error()),
        ("RST_STREAM on 2", frame(RST_STREAM, 0, 2, &[0; 4]), error()),
        ("RST_STREAM on 5, which is idle", frame(RST_STREAM, 0, 5, &[0; 4]), error()),
        ("WINDOW_UPDATE on 2", grant(2, 1), error()),
        ("WINDOW_UPDATE on 5, which is idle", grant(5, 1), error()),
        ("PRIORITY on 0", priority(0, 1), error()),
        ("PRIORITY on 5, which is idle", priority(5, 1), Some(Reaction::goaway(NO_ERROR))),
        (
            "PRIORITY on 9 that depends on itself, and HEADERS on 5",
            [priority(9, 9), headers(ENDS, 5, GET)].concat(),
            None,
        ),
        ("CONTINUATION on 0", frame(CONTINUATION, END_HEADERS, 0, GET), error()),
        ("CONTINUATION on 5", frame(CONTINUATION, END_HEADERS, 5, GET), error()),
        ("PUSH_PROMISE on 5", frame(PUSH_PROMISE, END_HEADERS, 5, &[&[0, 0, 0, 2], GET].concat()), error()),
        (
            "PUSH_PROMISE on 2, with a frame before its CONTINUATION",
            [frame(PUSH_PROMISE, 0, 2, &[&[0, 0, 0, 4], GET].concat()), grant(0, 1)].concat(),
            error(),
        ),
        ("unknown type on 2", frame(UNKNOWN, 9, 2, &[1; 20]), Some(Reaction::goaway(NO_ERROR))),
    ]
}

/// Between HEADERS and CONTINUATION no other frame is allowed (RFC 9113 section 6.10).
fn inside_a_header_block() -> Vec<Probe> {
    let between = |bytes: Vec<u8>| {
        let all =
            [frame(HEADERS, END_STREAM, 5, &GET[..3]), bytes, frame(CONTINUATION, END_HEADERS, 5, &GET[3..])];
        (all.concat(), Some(Reaction::goaway(PROTOCOL_ERROR)))
    };
    [
        ("inside a header block: DATA on 1", frame(DATA, 0, 1, b"x")),
        ("inside a header block: DATA on 5", frame(DATA, 0, 5, b"x")),
        ("inside a header block: WINDOW_UPDATE on 1", grant(1, 1)),
        ("inside a header block: WINDOW_UPDATE on 0", grant(0, 1)),
        ("inside a header block: RST_STREAM on 1", frame(RST_STREAM, 0, 1, &[0; 4])),
        ("inside a header block: PRIORITY on 1", priority(1, 3)),
        ("inside a header block: PING", frame(PING, 0, 0, &[7; 8])),
        ("inside a header block: PING ACK", frame(PING, ACK, 0, &[7; 8])),
        ("inside a header block: SETTINGS", frame(SETTINGS, 0, 0, &[])),
        ("inside a header block: SETTINGS ACK", frame(SETTINGS, ACK, 0, &[])),
        ("inside a header block: GOAWAY", frame(GOAWAY, 0, 0, &[0; 8])),
        ("inside a header block: HEADERS on 1", frame(HEADERS, ENDS, 1, GET)),
        ("inside a header block: HEADERS on 7", frame(HEADERS, ENDS, 7, GET)),
        ("inside a header block: CONTINUATION on 1", frame(CONTINUATION, 0, 1, b"")),
        ("inside a header block: unknown type on 1", frame(UNKNOWN, 0, 1, b"x")),
    ]
    .map(|(name, bytes)| {
        let (bytes, reaction) = between(bytes);
        (name, bytes, reaction)
    })
    .into()
}

async fn assert_same_reactions(certificate: Option<&Certificate>) {
    let probes =
        [on_connection_frames(), on_old_streams(), requests(), on_other_streams(), inside_a_header_block()]
            .concat();
    let bytes: Vec<Vec<u8>> = probes.iter().map(|(_, bytes, _)| bytes.clone()).collect();
    let fresh = reactions(&bytes, certificate, 0).await;
    for moves in [1, 2] {
        let moved = reactions(&bytes, certificate, moves).await;
        let differ: Vec<String> = (0..probes.len())
            .filter(|at| moved[*at] != fresh[*at])
            .map(|at| format!("{}: fresh {:?}\n  moved {:?}", probes[at].0, fresh[at], moved[at]))
            .collect();
        assert!(
            differ.is_empty(),
            "after {moves} handovers {} of {} differ:\n{}",
            differ.len(),
            probes.len(),
            differ.join("\n")
        );
    }
    for ((name, _, expected), reaction) in probes.into_iter().zip(fresh) {
        if let Some(expected) = expected {
            assert_eq!(reaction, expected, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn handed_over_http2_connection_reacts_to_each_frame_like_a_fresh_one() {
    assert_same_reactions(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handed_over_http2_connection_reacts_to_each_frame_like_a_fresh_one_over_tls() {
    let certificate = Certificate::new().expect("openssl makes a certificate");
    assert_same_reactions(Some(&certificate)).await;
}

/// The second request enters a second `:authority`, so h2 receives the header table in a request that it resets. That is on
/// stream 1. h2 ignores frames on a stream that it has reset, and reacts to all others as before.
#[tokio::test(flavor = "multi_thread")]
async fn handed_over_http2_connection_ignores_frames_on_one_old_stream_if_its_table_is_no_request() {
    let is_answered = |reaction: &Reaction| reaction.answers.contains_key(&1);
    let probes = [on_connection_frames(), on_old_streams(), requests(), on_other_streams()].concat();
    let (about_1, others): (Vec<_>, Vec<_>) = probes
        .into_iter()
        .map(|(_, bytes, _)| bytes)
        .partition(|bytes| heads(bytes).any(|head| head.stream == 1));
    assert!(about_1.len() > 10 && others.len() > 30);
    for moves in [1, 2] {
        let fresh = reactions_after(GET, &others, None, 0).await;
        assert_eq!(reactions_after(GET, &others, None, moves).await, fresh, "after {moves} handovers");
        let moved = reactions_after(GET, &about_1, None, moves).await;
        assert!(!moved.iter().any(is_answered), "{moved:?}");
    }
}

/// The heads of whole frames.
fn heads(mut bytes: &[u8]) -> impl Iterator<Item = Head> {
    std::iter::from_fn(move || {
        let head = Head::decode(*bytes.first_chunk()?);
        bytes = bytes.get(HEAD_LENGTH + head.length..).unwrap_or_default();
        Some(head)
    })
}

/// The most that the buffers of the kernel and of h2 accept from a client that never reads, in bytes.
const FLOOD_LIMIT: usize = 32 << 20;

/// How many bytes of `parts` the server accepts from a client that never reads, up to the limit.
async fn flood(mut client: Client, mut parts: impl FnMut() -> Vec<u8>) -> usize {
    let mut taken = 0;
    let flooded = async {
        while taken < FLOOD_LIMIT {
            let part = parts();
            if client.wire.write_all(&part).await.is_err() {
                return;
            }
            taken += part.len();
        }
    };
    timeout(PATIENCE, flooded).await.expect("the server reads on or closes");
    taken
}

/// The bytes of each discarded frame are granted again. If each WINDOW_UPDATE were queued, a client could fill the
/// memory.
#[tokio::test(flavor = "multi_thread")]
async fn client_that_floods_an_old_stream_and_never_reads_is_cut_off() {
    let certificate = Certificate::new().expect("openssl makes a certificate");
    let tls = Some(&certificate);
    for (moves, second, certificate) in [
        (0, GET_AGAIN, None),
        (1, GET_AGAIN, None),
        (1, GET, None),
        (0, GET_AGAIN, tls),
        (1, GET_AGAIN, tls),
        (1, GET, tls),
    ] {
        let mut served = serve_with(router(), tls_of(certificate)).await;
        let client = Client::open(&served, certificate, second).await;
        for _ in 0..moves {
            let next = serve_with(router(), tls_of(certificate)).await;
            move_to(&next, served).await;
            served = next;
        }
        let taken = flood(client, || frame(DATA, 0, 1, b"x").repeat(10_000)).await;
        assert!(taken < FLOOD_LIMIT, "after {moves} handovers the server accepted {taken} bytes");
    }
}

/// GOAWAY cannot reach such a client, so the limit for its reaction has to end the connection.
#[tokio::test]
async fn idle_client_that_never_reads_is_cut_off_when_it_is_evicted() {
    let served = serve_with(router(), None).await;
    // A Unix socket, because its buffer stays full once it is. The client gets what the copy of the server's end sends.
    let (wire, socket) = StdUnixStream::pair().expect("a socket pair is made");
    let mut copy = socket.try_clone().expect("the socket is duplicated");
    wire.set_nonblocking(true).expect("the socket is made non-blocking");
    served.server.adopt(Connection::begun(socket.into(), served.server.endpoints()[0].clone()));
    let wire = UnixStream::from_std(wire).expect("the socket is converted");
    let client = Client::begin(Box::new(wire), GET_AGAIN).await;
    let registry = served.registry();
    let idle = async {
        loop {
            match &registry.idle_for(Duration::ZERO)[..] {
                [entry] => break entry.clone(),
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    };
    let idle = timeout(PATIENCE, idle).await.expect("the connection is idle");
    copy.set_nonblocking(true).expect("the socket is made non-blocking");
    while copy.write(&[0; 1024]).is_ok() {}
    idle.evict();
    served.until_connections(0).await;
    drop(client);
}

/// h2 starts with a larger window than the client has, so responses wait in the interposer. No window limits the
/// responses that have no body.
#[tokio::test(flavor = "multi_thread")]
async fn client_that_sends_requests_with_a_closed_window_is_cut_off() {
    const GET_LARGE: &[u8] = b"\x82\x86\x04\x06/large\x41\x01x";
    const GET_HEADERS: &[u8] = b"\x82\x86\x04\x08/headers\x41\x01x";
    let served = serve_with(router(), None).await;
    let mut client = Client::open(&served, None, GET_AGAIN).await;
    client.send(&frame(HEADERS, ENDS, 5, GET_LARGE)).await;
    client.wait_until(|head| head.stream == 5 && head.has(END_STREAM)).await;
    let next = serve_with(router(), None).await;
    move_to(&next, served).await;
    // Less than 60,000 bytes of the client's window are left, but h2 starts with 65,535 bytes.
    client.send(&frame(HEADERS, ENDS, 7, GET_LARGE)).await;
    let mut stream = 7;
    let mut asked = 0;
    let requests = async {
        // Without a wait h2 would close the connection for another reason: too many streams would have to be reset.
        while asked < 2_000 {
            for _ in 0..20 {
                stream += 2;
                asked += 1;
                if client.wire.write_all(&frame(HEADERS, ENDS, stream, GET_HEADERS)).await.is_err() {
                    return;
                }
            }
            let _ = client.wire.write_all(&frame(PING, 0, 0, b"my turn?")).await;
            while let Some((head, _)) = client.receive().await {
                assert_ne!(head.frame_type, GOAWAY, "h2 ends the connection for another reason");
                if head.frame_type == PING && head.has(ACK) {
                    break;
                }
            }
        }
    };
    timeout(PATIENCE, requests).await.expect("the server answers or closes");
    assert!(
        (300..2_000).contains(&asked),
        "the server accepted {asked} requests, each with 3,500 bytes of response headers"
    );
}

/// A frame of any type, flags, stream and payload. Nearly valid frames are more frequent.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let frame_type = prop_oneof![8 => 0..=9_u8, 1 => any::<u8>()];
    let flags = prop_oneof![
        Just(0),
        Just(END_STREAM),
        Just(END_HEADERS),
        Just(ENDS),
        Just(ENDS | PADDED),
        Just(ENDS | WITH_PRIORITY),
        any::<u8>()
    ];
    let stream = prop_oneof![2 => Just(0), 6 => 1..=9_u32, 1 => any::<u32>()];
    let payload = prop_oneof![
        Just(Vec::new()),
        Just(GET.to_vec()),
        Just(POST.to_vec()),
        Just(with_content_length(POST, "4")),
        prop::collection::vec(any::<u8>(), 4),
        prop::collection::vec(0..4_u8, 4..=9),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    (frame_type, flags, stream, payload)
        .prop_map(|(frame_type, flags, stream, payload)| frame(frame_type, flags, stream, &payload))
}

/// h2 considers a stream that it resets as begun, so the next process must do so too.
#[tokio::test(flavor = "multi_thread")]
async fn stream_that_was_reset_before_it_began_stays_used_after_a_handover() {
    for moves in [0, 1] {
        let mut served = serve_with(router(), None).await;
        let mut client = Client::open(&served, None, GET_AGAIN).await;
        client.send(&[priority(9, 9), frame(PING, 0, 0, b"finished")].concat()).await;
        while let Some((head, _)) = client.receive().await
            && head.frame_type != PING
        {}
        for _ in 0..moves {
            let next = serve_with(router(), None).await;
            move_to(&next, served).await;
            served = next;
        }
        let reaction = client.react(&frame(HEADERS, ENDS, 7, GET)).await;
        let codes: Vec<u32> = reaction.goaways.iter().map(|(_, code)| *code).collect();
        assert_eq!(codes, [PROTOCOL_ERROR], "after {moves} handovers");
    }
}

/// The server reads two TLS records at once. The first one resets the last open stream, so the connection is handed over, and
/// the second one is not opened. Parked, the connection would wait for further bytes, because epoll does not report those that
/// were read.
#[tokio::test]
async fn request_in_a_tls_record_that_was_read_before_a_handover_is_answered_after_it() {
    let certificate = Certificate::new().expect("openssl makes a certificate");
    for moves in [0, 1] {
        let mut served = serve_with(router(), tls_of(Some(&certificate))).await;
        let mut client = Client::open(&served, Some(&certificate), GET_AGAIN).await;
        for _ in 0..moves {
            let next = serve_with(router(), tls_of(Some(&certificate))).await;
            move_to(&next, served).await;
            served = next;
        }
        client.send(&frame(HEADERS, END_HEADERS, 5, POST_STALLED)).await;
        client.ping(b"begun???").await;
        served.server.enter(Phase::Quiescing);
        client.ping(b"holding?").await;
        client.send(&frame(RST_STREAM, 0, 5, &[0; 4])).await;
        client.send(&frame(HEADERS, ENDS, 7, GET_AGAIN)).await;
        let next = serve_with(router(), tls_of(Some(&certificate))).await;
        move_to(&next, served).await;
        client.wait_until(|head| head.stream == 7 && head.has(END_STREAM)).await;
    }
}

/// `frames`, followed by a reset of each stream that they may have begun. A request that the client does not end would
/// keep the connection open for 30 seconds, which is both the limit of a request and the time after which an unanswered
/// PING closes the connection: the reaction would depend on which of them comes first.
fn with_resets(frames: &[Vec<u8>]) -> Vec<u8> {
    let heads = frames.iter().filter_map(|frame| frame.first_chunk().copied().map(Head::decode));
    let begun = heads.map(|head| head.stream).filter(|stream| stream % 2 == 1 && *stream > 9);
    let resets = [5, 7, 9].into_iter().chain(begun).flat_map(|stream| frame(RST_STREAM, 0, stream, &[0; 4]));
    frames.concat().into_iter().chain(resets).collect()
}

/// Sends random sequences of frames.
#[test]
fn handed_over_http2_connection_reacts_to_random_frames_like_a_fresh_one() {
    let runtime = tokio::runtime::Runtime::new().expect("the runtime starts");
    let certificate: Option<Arc<Certificate>> = None;
    let sequence = prop::collection::vec(any_frame(), 1..6).prop_map(|frames| with_resets(&frames));
    // Many connections at once, because a handover takes longer than a reaction.
    let sequences = prop::collection::vec(sequence, BATCH);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 10,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&sequences, |probes| {
            runtime.block_on(async {
                let fresh = reactions(&probes, certificate.as_deref(), 0).await;
                let moved = reactions(&probes, certificate.as_deref(), 1).await;
                for ((probe, fresh), moved) in probes.iter().zip(fresh).zip(moved) {
                    prop_assert_eq!(fresh, moved, "{:?}", probe);
                }
                Ok(())
            })
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// A client may let the server use almost all of the connection's window before it grants more. The fresh h2 assumes that
/// the whole window is left.
#[tokio::test(flavor = "multi_thread")]
async fn response_after_a_move_uses_what_is_left_of_a_window_before_the_client_grants_more() {
    /// A GET request for /large, with the authority from the header table.
    const GET_LARGE: &[u8] = b"\x82\x86\x04\x06/large\xbe";
    const LENGTH: usize = 60_000;
    let served = serve_with(router(), None).await;
    let mut client = Client::open(&served, None, GET_AGAIN).await;
    let mut left = 65_535 - 2 * "hello\n".len();
    client.send(&frame(HEADERS, ENDS, 5, GET_LARGE)).await;
    client.wait_until(|head| head.stream == 5 && head.has(END_STREAM)).await;
    left -= LENGTH;
    let next = serve_with(router(), None).await;
    move_to(&next, served).await;
    client.send(&frame(HEADERS, ENDS, 7, GET_LARGE)).await;
    let mut length = 0;
    while length < LENGTH {
        let received = timeout(PATIENCE, client.receive()).await.expect("the server uses the window");
        let (head, _) = received.expect("the connection is open");
        if head.frame_type == DATA {
            length += head.length;
            left = left.checked_sub(head.length).expect("the server respects the window");
        }
        if left == 0 {
            left = LENGTH;
            client.send(&grant(0, u32::try_from(left).expect("it is small"))).await;
        }
    }
    assert_eq!(length, LENGTH);
}

/// RFC 9113 section 4.3.1 and RFC 7541 section 4.2.
#[tokio::test(flavor = "multi_thread")]
async fn client_that_lowers_the_size_of_its_table_receives_a_size_update_after_a_move() {
    for size in [0, 100] {
        for moves in 0..3 {
            let mut served = serve_with(router(), None).await;
            let mut client = Client::open(&served, None, GET_AGAIN).await;
            client.send(&frame(SETTINGS, 0, 0, &[&[0, 1][..], &u32::to_be_bytes(size)].concat())).await;
            client.ping(b"settings").await;
            for _ in 0..moves {
                let next = serve_with(router(), None).await;
                move_to(&next, served).await;
                served = next;
            }
            client.send(&frame(HEADERS, ENDS, 5, GET_AGAIN)).await;
            let block = loop {
                let received = timeout(PATIENCE, client.receive()).await.expect("a frame arrives in time");
                let (head, payload) = received.expect("the connection is open");
                if head.frame_type == HEADERS && head.stream == 5 {
                    break payload;
                }
            };
            let update = block[0].checked_sub(SIZE_UPDATE).filter(|size| *size < SIZE_UPDATE);
            // A prefix of 31 means that the rest of the size is in the next byte (RFC 7541 section 5.1).
            let sent =
                update.map(|update| u32::from(update) + if update == 31 { u32::from(block[1]) } else { 0 });
            assert_eq!(sent, Some(size), "{moves} {block:x?}");
        }
    }
}

/// Sends `count` requests that the client cancels, and one that it waits for. Returns the stream of the latter.
async fn send_cancelled(client: &mut Client, first: u32, count: u32) -> u32 {
    let last = first + 2 * count;
    for stream in (first..last).step_by(2) {
        client.send(&frame(HEADERS, ENDS, stream, GET_AGAIN)).await;
        client.send(&frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())).await;
    }
    client.send(&frame(HEADERS, ENDS, last, GET_AGAIN)).await;
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_cancelled_during_a_move_do_not_end_the_connection() {
    // h2 ends the connection if more than 20 requests are cancelled before it accepts them.
    for count in [21, 2_000] {
        let served = serve_with(router(), None).await;
        let mut client = Client::open(&served, None, GET_AGAIN).await;
        served.server.enter(Phase::Quiescing);
        let connections = served.take_quiescent().await;
        let stream = send_cancelled(&mut client, 5, count).await;
        let next = serve_with(router(), None).await;
        let [endpoint] = next.server.endpoints() else { panic!("the server has one endpoint") };
        for connection in connections {
            next.server.adopt(Connection { endpoint: endpoint.clone(), ..connection });
        }
        client.wait_until(|head| head.stream == stream && head.has(END_STREAM)).await;
    }
}

/// A client whose requests are held because that on stream 5 is in flight. It has cancelled all but the last one.
async fn with_held_requests(served: &Served) -> (Client, u32) {
    let mut client = Client::open(served, None, GET_AGAIN).await;
    client.send(&frame(HEADERS, END_HEADERS, 5, POST_STALLED)).await;
    client.ping(b"is begun").await;
    served.server.enter(Phase::Holding);
    client.ping(b"are held").await;
    let stream = send_cancelled(&mut client, 7, 100).await;
    client.ping(b"arrived!").await;
    (client, stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn held_requests_that_are_cancelled_before_a_move_do_not_end_the_connection() {
    let served = serve_with(router(), None).await;
    let (mut client, stream) = with_held_requests(&served).await;
    client.send(&frame(RST_STREAM, 0, 5, &8_u32.to_be_bytes())).await;
    let next = serve_with(router(), None).await;
    move_to(&next, served).await;
    client.wait_until(|head| head.stream == stream && head.has(END_STREAM)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_requests_that_are_cancelled_before_their_release_do_not_end_the_connection() {
    let served = serve_with(router(), None).await;
    let (mut client, stream) = with_held_requests(&served).await;
    served.server.enter(Phase::Draining);
    client.wait_until(|head| head.stream == stream && head.has(END_STREAM)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_moves_before_and_after_its_last_possible_stream() {
    const LAST: u32 = (1 << 31) - 1;
    let mut served = serve_with(router(), None).await;
    let mut client = Client::open(&served, None, GET_AGAIN).await;
    for stream in [LAST - 2, LAST] {
        client.send(&frame(HEADERS, ENDS, stream, GET_AGAIN)).await;
        client.wait_until(|head| head.stream == stream && head.has(END_STREAM)).await;
        let next = serve_with(router(), None).await;
        move_to(&next, served).await;
        served = next;
        client.ping(b"is moved").await;
    }
}
