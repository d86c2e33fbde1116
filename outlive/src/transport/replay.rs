//! What the next process needs to continue a response that has no end: a WebSocket or another upgraded connection, or an
//! event stream.
//!
//! The next process begins the request anew: its own route answers the very same head, with the state that the handler
//! of this process left, and the head of that answer is discarded because the client has received it long ago.

use bytes::{Buf, BufMut, Bytes};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Uri};

/// The largest encoded head of a request, in bytes. hyper refuses a request whose head is larger.
const HEAD_LIMIT: usize = 64 * 1024;
/// The largest state that a record may contain, in bytes. A handler is limited to less by default (`app/carry.rs`).
pub const STATE_LIMIT: usize = 16 * 1024 * 1024;
/// The largest agreement, in bytes.
const AGREEMENT_LIMIT: usize = 4096;
const VERSION: u8 = 1;

/// A request that was answered with a response without end, and the state that its handler left for the handler of the
/// next process.
///
/// Encoded as a version (1 byte), and three times a length (4 bytes, little-endian) and as many bytes. Fields of later
/// releases may follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The head of the request in HTTP/1.1, with the empty line at its end.
    pub head: Bytes,
    /// What the answer promised to the client, see [`agreement`]. Another answer cannot continue the connection.
    pub agreement: Bytes,
    /// The state that the handler left, encoded by `app/carry.rs`.
    pub state: Bytes,
}

impl Replay {
    pub fn encode(&self) -> Vec<u8> {
        let parts = [&self.head, &self.agreement, &self.state];
        let mut bytes = Vec::with_capacity(1 + parts.iter().map(|part| 4 + part.len()).sum::<usize>());
        bytes.put_u8(VERSION);
        for part in parts {
            // Each part is limited to far less than 4 GiB where it is made.
            bytes.put_u32_le(u32::try_from(part.len()).unwrap_or(u32::MAX));
            bytes.put_slice(part);
        }
        bytes
    }

    /// None if the bytes are not a valid encoding, or a part is above its limit.
    pub fn decode(bytes: &Bytes) -> Option<Self> {
        let mut rest = bytes.clone();
        if rest.try_get_u8().ok()? != VERSION {
            return None;
        }
        let mut part = |limit: usize| {
            let length = rest.try_get_u32_le().ok()? as usize;
            (length <= limit && length <= rest.len()).then(|| rest.split_to(length))
        };
        let (head, agreement, state) = (part(HEAD_LIMIT)?, part(AGREEMENT_LIMIT)?, part(STATE_LIMIT)?);
        head.ends_with(b"\r\n\r\n").then_some(Self { head, agreement, state })
    }
}

/// The head of a request, in HTTP/1.1. None if it is larger than every head that hyper accepts.
pub fn head(method: &Method, uri: &Uri, headers: &HeaderMap) -> Option<Bytes> {
    // The target of CONNECT is only an authority.
    let target = match (uri.path_and_query(), uri.authority()) {
        (Some(target), _) => target.as_str(),
        (None, authority) => authority.map_or("/", |authority| authority.as_str()),
    };
    let mut head = Vec::with_capacity(512);
    for part in [method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        head.put_slice(part.as_bytes());
    }
    for (name, value) in headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.put_slice(part);
        }
    }
    head.put_slice(b"\r\n");
    (head.len() <= HEAD_LIMIT).then(|| head.into())
}

/// As [`head`], of a request that hyper has parsed.
pub fn head_of(parts: &Parts) -> Option<Bytes> {
    head(&parts.method, &parts.uri, &parts.headers)
}

/// What the peer of a connection that cannot be continued has to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Close frame.
    WebSocket,
    /// The last chunk of the response's body.
    EventStream,
    /// Nothing: the library does not know the protocol.
    Other,
    /// Nothing: as `Other`, and there was no request.
    Socket,
}

impl Replay {
    pub fn kind(&self) -> Kind {
        if self.agreement.starts_with(EVENT_STREAM) {
            Kind::EventStream
        } else if self.agreement.to_ascii_lowercase().starts_with(b"upgrade: websocket\n") {
            Kind::WebSocket
        } else if self.agreement == SOCKET {
            Kind::Socket
        } else {
            Kind::Other
        }
    }
}

/// The first line in the agreement of an event stream.
const EVENT_STREAM: &[u8] = b"event stream\n";

/// What the head of an event stream promises.
pub fn agreement_of_events(headers: &HeaderMap) -> Bytes {
    let mut agreement = EVENT_STREAM.to_vec();
    put_fields(&mut agreement, headers, &["content-type", "content-encoding"]);
    agreement.into()
}

/// The agreement of a connection that spoke the application's protocol from its first byte on.
pub const SOCKET: &[u8] = b"socket\n";
/// The head of such a connection, which has no request.
pub const NO_HEAD: &[u8] = b"\r\n\r\n";

/// The first line in the agreement of a gRPC stream.
const GRPC_STREAM: &[u8] = b"grpc stream\n";

/// What the head of a gRPC stream promises.
pub fn agreement_of_grpc(headers: &HeaderMap) -> Bytes {
    let mut agreement = GRPC_STREAM.to_vec();
    put_fields(&mut agreement, headers, &["content-type", "grpc-encoding"]);
    agreement.into()
}

pub fn is_of_grpc(agreement: &[u8]) -> bool {
    agreement.starts_with(GRPC_STREAM)
}

/// What an answer that grants an upgrade promises: the protocol, and the subprotocol and extensions of a WebSocket. The
/// fields of `Sec-WebSocket-Accept` and `Date` differ from answer to answer without a meaning for the connection.
pub fn agreement(headers: &HeaderMap) -> Bytes {
    let mut agreement = Vec::new();
    put_fields(&mut agreement, headers, &["upgrade", "sec-websocket-protocol", "sec-websocket-extensions"]);
    agreement.into()
}

fn put_fields(agreement: &mut Vec<u8>, headers: &HeaderMap, names: &[&str]) {
    for name in names {
        for value in headers.get_all(*name) {
            for part in [name.as_bytes(), b": ", value.as_bytes(), b"\n"] {
                agreement.put_slice(part);
            }
        }
    }
    agreement.truncate(AGREEMENT_LIMIT);
}

/// The head of a request with `Last-Event-ID: id` in the place of the one that it had. None if it would be too large, or
/// the id is not a valid value of a field.
pub fn with_last_event_id(head: &[u8], id: &[u8]) -> Option<Bytes> {
    const NAME: &[u8] = b"last-event-id: ";
    let is_valid = |byte: &u8| *byte == b'\t' || *byte >= b' ' && *byte != 0x7f;
    if !id.iter().all(is_valid) {
        return None;
    }
    let lines = head.split_inclusive(|byte| *byte == b'\n');
    let mut next: Vec<u8> =
        lines.filter(|line| !line.starts_with(NAME) && *line != b"\r\n").flatten().copied().collect();
    for part in [NAME, id, b"\r\n\r\n"] {
        next.put_slice(part);
    }
    (next.len() <= HEAD_LIMIT).then(|| next.into())
}

#[cfg(test)]
mod tests {
    use hyper::Request;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_reverses_encode_and_ignores_later_fields(
            head in prop::collection::vec(any::<u8>(), 0..300),
            agreement in prop::collection::vec(any::<u8>(), 0..100),
            state in prop::collection::vec(any::<u8>(), 0..300),
            later in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let head = [&head[..], b"\r\n\r\n"].concat().into();
            let replay = Replay { head, agreement: agreement.into(), state: state.into() };
            let encoded = [replay.encode(), later].concat().into();
            prop_assert_eq!(Replay::decode(&encoded), Some(replay));
        }

        #[test]
        fn truncated_replays_are_refused(length in 0..30_usize) {
            let replay = Replay {
                head: Bytes::from_static(b"GET / HTTP/1.1\r\n\r\n"),
                agreement: Bytes::new(),
                state: Bytes::new(),
            };
            let encoded = Bytes::from(replay.encode());
            prop_assert_eq!(Replay::decode(&encoded.slice(..length)), None);
        }
    }

    #[test]
    fn lengths_above_the_limits_are_refused() {
        let mut bytes = vec![VERSION];
        bytes.put_u32_le(u32::MAX);
        bytes.put_slice(&[0; 100]);
        assert_eq!(Replay::decode(&bytes.into()), None);
    }

    #[test]
    fn head_has_the_target_and_all_values_of_a_field_in_their_order() {
        let request = Request::builder()
            .uri("http://example.org/socket?room=1")
            .header("host", "example.org")
            .header("cookie", "a=1")
            .header("cookie", "b=\u{fc}")
            .body(());
        let (parts, ()) = request.expect("the request is valid").into_parts();
        let head = head_of(&parts).expect("the head is small");
        let expected =
            "GET /socket?room=1 HTTP/1.1\r\nhost: example.org\r\ncookie: a=1\r\ncookie: b=\u{fc}\r\n\r\n";
        assert_eq!(head, expected);
    }

    #[test]
    fn head_of_a_connect_request_has_its_authority() {
        let request = Request::builder().method("CONNECT").uri("example.org:443").body(());
        let (parts, ()) = request.expect("the request is valid").into_parts();
        assert_eq!(head_of(&parts).expect("the head is small"), "CONNECT example.org:443 HTTP/1.1\r\n\r\n");
    }

    #[test]
    fn last_event_id_is_replaced_and_other_fields_are_kept() {
        let head = b"GET /events HTTP/1.1\r\nlast-event-id: 3\r\nhost: x\r\n\r\n";
        let next = with_last_event_id(head, b"17").expect("the id is valid");
        assert_eq!(next, "GET /events HTTP/1.1\r\nhost: x\r\nlast-event-id: 17\r\n\r\n");
        assert_eq!(with_last_event_id(head, b"1\r\nx: y"), None);
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_replay_decoder() {
        crate::fuzz::target!("replays").for_each(|bytes| {
            if let Some(replay) = Replay::decode(&Bytes::copy_from_slice(bytes)) {
                assert_eq!(Replay::decode(&replay.encode().into()), Some(replay));
            }
        });
    }
}
