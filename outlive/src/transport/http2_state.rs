//! [`Http2State`], the state of an HTTP/2 connection that the next process needs to continue it, and its encoding.
//!
//! A connection is handed over when its streams have ended, except those whose response has no end. So the state consists
//! of what is shared by all streams: the settings of both sides, the windows of the connection, the last stream, and the
//! header compression (HPACK, RFC 7541); and of the requests of those streams (`stream_replay.rs`).

use bytes::{Buf, BufMut, Bytes};

use super::stream_replay::StreamReplay;

/// The maximum number of different settings that a client may send. It is larger than the number of settings that are
/// defined (RFC 9113 section 6.5.2 and extensions); without it a client could make this process keep any number of
/// them.
const SETTINGS_LIMIT: usize = 32;
/// The initial flow-control window of a connection, in bytes (RFC 9113 section 6.9.2).
pub const FIRST_WINDOW: i64 = 65_535;
/// The maximum size of a flow-control window, in bytes (RFC 9113 section 6.9.1).
const WINDOW_LIMIT: i64 = (1 << 31) - 1;
/// `SETTINGS_HEADER_TABLE_SIZE` (RFC 9113 section 6.5.2), and its initial value, in bytes.
pub const HEADER_TABLE_SIZE: u16 = 1;
pub const FIRST_HEADER_TABLE_SIZE: u32 = 4096;
/// `SETTINGS_INITIAL_WINDOW_SIZE` (RFC 9113 section 6.5.2).
pub const INITIAL_WINDOW_SIZE: u16 = 4;
/// The largest encoding of a header table, in bytes. A table has at most 4,096 bytes, and the longest Huffman code has 30
/// bits for one byte.
const HEADER_TABLE_LIMIT: usize = 16 * 1024;
/// The highest stream identifier.
const STREAM_LIMIT: u32 = (1 << 31) - 1;

/// The settings of one side, in the order in which they were first sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(Vec<(u16, u32)>);

impl Settings {
    /// Applies the payload of a SETTINGS frame. Returns false if the payload is malformed or has too many settings.
    pub fn set(&mut self, mut payload: &[u8]) -> bool {
        while payload.len() >= 6 {
            let (key, value) = (payload.get_u16(), payload.get_u32());
            match self.0.iter().position(|(known, _)| *known == key) {
                Some(at) => self.0[at].1 = value,
                None if self.0.len() == SETTINGS_LIMIT => return false,
                None => self.0.push((key, value)),
            }
        }
        payload.is_empty()
    }

    pub fn get(&self, key: u16) -> Option<u32> {
        self.0.iter().find(|(known, _)| *known == key).map(|(_, value)| *value)
    }

    /// Whether the header table has been made smaller than at the beginning of the connection.
    pub fn has_small_table(&self) -> bool {
        self.get(HEADER_TABLE_SIZE).is_some_and(|size| size < FIRST_HEADER_TABLE_SIZE)
    }

    /// The same settings, with `value` for `key`.
    pub fn with(mut self, key: u16, value: u32) -> Self {
        self.0.retain(|(known, _)| *known != key);
        self.0.push((key, value));
        self
    }

    /// The same settings, with `value` for `key` if they have no value for it.
    pub fn or(mut self, key: u16, value: u32) -> Self {
        if !self.0.iter().any(|(known, _)| *known == key) {
            self.0.push((key, value));
        }
        self
    }

    /// The payload of a SETTINGS frame with all of them.
    pub fn payload(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(self.0.len() * 6);
        for (key, value) in &self.0 {
            payload.put_u16(*key);
            payload.put_u32(*value);
        }
        payload
    }

    fn encode(&self, into: &mut Vec<u8>) {
        let payload = self.payload();
        into.put_u16_le(u16::try_from(payload.len()).expect("SETTINGS_LIMIT bounds the length"));
        into.put_slice(&payload);
    }

    fn decode(bytes: &mut &[u8]) -> Option<Self> {
        let length = usize::from(bytes.try_get_u16_le().ok()?);
        let (payload, rest) = bytes.split_at_checked(length)?;
        *bytes = rest;
        let mut settings = Self::default();
        settings.set(payload).then_some(settings)
    }
}

/// The state of an HTTP/2 connection without open streams, except those whose response has no end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http2State {
    /// The settings of the client.
    pub theirs: Settings,
    /// The settings of this server that were sent to the client.
    pub ours: Settings,
    /// The last stream that the client has opened. It has been answered.
    pub last_stream: u32,
    /// How many bytes the client may still send on the connection.
    pub receive_window: i64,
    /// How many bytes the server may still send on the connection.
    pub send_window: i64,
    /// The client's header table, as a header block that gives it to a decoder. Empty if the table is as at the beginning.
    pub header_table: Bytes,
    /// The open streams, in ascending order. They are not part of the encoding, because earlier releases do not adopt them.
    pub streams: Vec<StreamReplay>,
}

impl Default for Http2State {
    fn default() -> Self {
        Self {
            theirs: Settings::default(),
            ours: Settings::default(),
            last_stream: 0,
            receive_window: FIRST_WINDOW,
            send_window: FIRST_WINDOW,
            header_table: Bytes::new(),
            streams: Vec::new(),
        }
    }
}

impl Http2State {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.theirs.encode(&mut bytes);
        self.ours.encode(&mut bytes);
        bytes.put_u32_le(self.last_stream);
        bytes.put_i64_le(self.receive_window);
        bytes.put_i64_le(self.send_window);
        // Earlier releases announced an empty header table, and said here whether the client had confirmed it.
        bytes.put_u8(0);
        bytes.put_u16_le(
            u16::try_from(self.header_table.len()).expect("HEADER_TABLE_LIMIT bounds the length"),
        );
        bytes.put_slice(&self.header_table);
        bytes
    }

    /// `None` if `bytes` are invalid. Bytes that follow are ignored, so that a later release can append fields. Earlier
    /// releases send no header table.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let theirs = Settings::decode(&mut bytes)?;
        let ours = Settings::decode(&mut bytes)?;
        // The streams of a client have odd numbers.
        let is_stream = |stream: &u32| *stream == 0 || *stream <= STREAM_LIMIT && !stream.is_multiple_of(2);
        let last_stream = bytes.try_get_u32_le().ok().filter(is_stream)?;
        let sizes = -WINDOW_LIMIT..=WINDOW_LIMIT;
        let mut window = || bytes.try_get_i64_le().ok().filter(|window| sizes.contains(window));
        let (receive_window, send_window) = (window()?, window()?);
        bytes.try_get_u8().ok().filter(|table| *table <= 1)?;
        let header_table = if bytes.is_empty() {
            Bytes::new()
        } else {
            let length = bytes.try_get_u16_le().ok().map(usize::from)?;
            let table = bytes.split_at_checked(length)?.0;
            (length <= HEADER_TABLE_LIMIT).then(|| Bytes::copy_from_slice(table))?
        };
        Some(Self {
            theirs,
            ours,
            last_stream,
            receive_window,
            send_window,
            header_table,
            streams: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings() -> impl Strategy<Value = Settings> {
        prop::collection::btree_map(any::<u16>(), any::<u32>(), 0..SETTINGS_LIMIT)
            .prop_map(|settings| Settings(settings.into_iter().collect()))
    }

    proptest! {
        #[test]
        fn decode_returns_what_encode_was_given_and_refuses_truncated_bytes(
            theirs in settings(), ours in settings(), last_stream in (0..=STREAM_LIMIT / 2).prop_map(|half| if half == 0 { 0 } else { half * 2 - 1 }),
            receive_window in -WINDOW_LIMIT..=WINDOW_LIMIT, send_window in -WINDOW_LIMIT..=WINDOW_LIMIT,
            header_table in prop::collection::vec(any::<u8>(), 0..600), more: Vec<u8>,
        ) {
            let header_table = Bytes::from(header_table);
            let streams = Vec::new();
            let state = Http2State { theirs, ours, last_stream, receive_window, send_window, header_table, streams };
            let bytes = state.encode();
            prop_assert_eq!(Http2State::decode(&[&bytes[..], &more].concat()), Some(state.clone()));
            // Without the header table it is the state of an earlier release.
            let earlier = bytes.len() - 2 - state.header_table.len();
            for cut in (0..bytes.len()).filter(|cut| *cut != earlier) {
                prop_assert_eq!(Http2State::decode(&bytes[..cut]), None);
            }
            let state = Http2State { header_table: Bytes::new(), ..state };
            prop_assert_eq!(Http2State::decode(&bytes[..earlier]), Some(state));
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_decoder() {
        crate::fuzz::target!("http2_state").for_each(|bytes| {
            let _ = Http2State::decode(bytes);
        });
    }

    #[test]
    fn decode_refuses_a_window_above_the_limit() {
        for window in [i64::MIN, -WINDOW_LIMIT - 1, WINDOW_LIMIT + 1, i64::MAX] {
            let state = Http2State { send_window: window, ..Http2State::default() };
            assert_eq!(Http2State::decode(&state.encode()), None, "{window}");
        }
    }

    #[test]
    fn set_refuses_too_many_settings_and_incomplete_ones() {
        let many: Vec<u8> = (0..40_u16).flat_map(|key| [&key.to_be_bytes()[..], &[0; 4]].concat()).collect();
        assert!(!Settings::default().set(&many));
        assert!(!Settings::default().set(&[0; 5]));
    }
}
