//! [`StreamReplay`], what the next process needs to continue an HTTP/2 stream whose response has no end, such as an event
//! stream.
//!
//! As `replay.rs` does for HTTP/1.1: the next process answers the same request anew, and the client does not receive the
//! head of that response.

use bytes::{Buf, BufMut, Bytes};

use super::replay;

/// How many streams of one connection can be handed over. h2 permits a client fewer.
const STREAMS_LIMIT: usize = 1000;
/// The largest header block, agreement and body, in bytes.
const PART_LIMIT: usize = 16 * 1024;
/// The maximum size of a flow-control window, in bytes (RFC 9113 section 6.9.1).
const WINDOW_LIMIT: i64 = (1 << 31) - 1;
const VERSION: u8 = 1;

/// An open stream and its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamReplay {
    pub stream: u32,
    /// How many bytes of the response the client still accepts on this stream.
    pub send_window: i64,
    /// The header block of the request (RFC 7541), which refers to no dynamic table.
    pub block: Bytes,
    /// What the answer promised to the client, see [`agreement_of_events`](super::replay::agreement_of_events) and
    /// [`agreement_of_grpc`](super::replay::agreement_of_grpc).
    pub agreement: Bytes,
    /// The body of the request. The next process gives it to the handler without HTTP/2 in between, because its bytes would
    /// count in the windows.
    pub body: Bytes,
    /// How many messages of the response the client has received, in all processes; 0 for an event stream.
    pub messages: u64,
}

/// What a response without end consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    Events,
    Grpc,
}

impl StreamReplay {
    pub fn kind(&self) -> StreamKind {
        if replay::is_of_grpc(&self.agreement) { StreamKind::Grpc } else { StreamKind::Events }
    }
}

/// Encoded as a version (1 byte), and for each stream the length of all that follows (4 bytes), its number (4 bytes), its
/// window (8 bytes), the number of messages (8 bytes), and three times a length (4 bytes) and as many bytes. Fields of later
/// releases may follow in each stream.
/// Numbers are little-endian.
pub fn encode(streams: &[StreamReplay]) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    for StreamReplay { stream, send_window, block, agreement, body, messages } in streams {
        let mut one = Vec::with_capacity(32 + block.len() + agreement.len() + body.len());
        one.put_u32_le(*stream);
        one.put_i64_le(*send_window);
        one.put_u64_le(*messages);
        for part in [block, agreement, body] {
            put_part(part, &mut one);
        }
        put_part(&one, &mut bytes);
    }
    bytes
}

fn put_part(part: &[u8], into: &mut Vec<u8>) {
    // Each part is limited to far less than 4 GiB where it is made.
    into.put_u32_le(u32::try_from(part.len()).unwrap_or(u32::MAX));
    into.put_slice(part);
}

/// None if the bytes are not a valid encoding, or the streams are not in ascending order.
pub fn decode(bytes: &Bytes) -> Option<Vec<StreamReplay>> {
    let mut rest = bytes.clone();
    if rest.try_get_u8().ok()? != VERSION {
        return None;
    }
    let mut streams: Vec<StreamReplay> = Vec::new();
    while rest.has_remaining() {
        let mut one = take_part(&mut rest, 32 + 4 * PART_LIMIT)?;
        let stream = one.try_get_u32_le().ok()?;
        let send_window = one.try_get_i64_le().ok()?;
        let messages = one.try_get_u64_le().ok()?;
        let mut part = || take_part(&mut one, PART_LIMIT);
        let (block, agreement, body) = (part()?, part()?, part()?);
        let is_next = stream % 2 == 1
            && stream < 1 << 31
            && streams.last().is_none_or(|last| last.stream < stream)
            && streams.len() < STREAMS_LIMIT;
        if !is_next || !(-WINDOW_LIMIT..=WINDOW_LIMIT).contains(&send_window) {
            return None;
        }
        streams.push(StreamReplay { stream, send_window, block, agreement, body, messages });
    }
    Some(streams)
}

fn take_part(bytes: &mut Bytes, limit: usize) -> Option<Bytes> {
    let length = bytes.try_get_u32_le().ok()? as usize;
    (length <= limit && length <= bytes.len()).then(|| bytes.split_to(length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn streams() -> impl Strategy<Value = Vec<StreamReplay>> {
        let part = || prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        let one = (-WINDOW_LIMIT..=WINDOW_LIMIT, any::<u64>(), part(), part(), part());
        prop::collection::btree_map(0..1_u32 << 30, one, 0..5).prop_map(|streams| {
            let streams =
                streams.into_iter().map(|(number, (send_window, messages, block, agreement, body))| {
                    StreamReplay { stream: number * 2 + 1, send_window, block, agreement, body, messages }
                });
            streams.collect()
        })
    }

    proptest! {
        #[test]
        fn decode_reverses_encode_and_refuses_truncated_bytes(streams in streams()) {
            let bytes = Bytes::from(encode(&streams));
            prop_assert_eq!(decode(&bytes), Some(streams.clone()));
            for cut in 0..bytes.len() {
                prop_assert_ne!(decode(&bytes.slice(..cut)), Some(streams.clone()));
            }
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes.into());
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_decoder() {
        crate::fuzz::target!("stream_replays").for_each(|bytes| {
            if let Some(streams) = decode(&Bytes::copy_from_slice(bytes)) {
                assert_eq!(decode(&encode(&streams).into()), Some(streams));
            }
        });
    }

    #[test]
    fn streams_that_are_not_in_order_are_refused() {
        let stream = |stream| StreamReplay {
            stream,
            send_window: 0,
            block: Bytes::new(),
            agreement: Bytes::new(),
            body: Bytes::new(),
            messages: 0,
        };
        for (numbers, is_valid) in [(&[1, 3][..], true), (&[3, 1], false), (&[3, 3], false), (&[2], false)] {
            let streams: Vec<_> = numbers.iter().map(|number| stream(*number)).collect();
            assert_eq!(decode(&encode(&streams).into()).is_some(), is_valid, "{numbers:?}");
        }
    }

    #[test]
    fn window_above_the_limit_is_refused() {
        let stream = StreamReplay {
            stream: 1,
            send_window: 1 << 31,
            block: Bytes::new(),
            agreement: Bytes::new(),
            body: Bytes::new(),
            messages: 0,
        };
        assert_eq!(decode(&encode(&[stream]).into()), None);
    }
}
