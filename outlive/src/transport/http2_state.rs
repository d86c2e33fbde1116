//! What both ends of an HTTP/2 connection have agreed upon: what the next process has to know of it.

use bytes::{Buf, BufMut};

/// A client may have changed so many settings; more than there are (RFC 9113 section 6.5.2, and its extensions).
const SETTINGS_LIMIT: usize = 32;
/// Of a connection that has just begun, in bytes (RFC 9113 section 6.9.2).
pub const FIRST_WINDOW: i64 = 65_535;
/// The largest that a window can be, in bytes.
const WINDOW_LIMIT: i64 = (1 << 31) - 1;
/// The parameter of SETTINGS that limits the table of headers (RFC 9113 section 6.5.2), and its first value, in bytes.
pub const HEADER_TABLE_SIZE: u16 = 1;
pub const FIRST_HEADER_TABLE_SIZE: u32 = 4096;
/// The highest number of a stream.
const STREAM_LIMIT: u32 = (1 << 31) - 1;

/// Parameters of SETTINGS, in the order in which they came first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(Vec<(u16, u32)>);

impl Settings {
    /// Takes the payload of a frame over; false where it makes no sense, or there are too many.
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

    /// As they are, with `value` for `key` where they do not say another.
    pub fn or(mut self, key: u16, value: u32) -> Self {
        if !self.0.iter().any(|(known, _)| *known == key) {
            self.0.push((key, value));
        }
        self
    }

    /// The payload of a frame that says all of them.
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
        into.put_u16_le(u16::try_from(payload.len()).expect("no more than SETTINGS_LIMIT"));
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

/// What the client's encoder of headers does, which was told to remember nothing (`SETTINGS_HEADER_TABLE_SIZE=0`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Table {
    /// It has sent no headers since it acknowledged that.
    Unknown,
    /// It has said that it remembers nothing, as it must in the first headers after that (RFC 7541 section 4.2).
    Empty,
    /// It has not: its next headers may mean some that a fresh decoder does not know.
    InUse,
}

/// An HTTP/2 connection, between two processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http2State {
    /// What the client has set.
    pub theirs: Settings,
    /// What the client knows of ours.
    pub ours: Settings,
    /// The last stream that the client has begun, and that a process has answered.
    pub last_stream: u32,
    /// How much the client may still send on the connection, in bytes; below zero where a setting was lowered.
    pub receive_window: i64,
    /// How much it takes, in bytes.
    pub send_window: i64,
    pub table: Table,
}

impl Default for Http2State {
    fn default() -> Self {
        Self {
            theirs: Settings::default(),
            ours: Settings::default(),
            last_stream: 0,
            receive_window: FIRST_WINDOW,
            send_window: FIRST_WINDOW,
            table: Table::Unknown,
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
        bytes.put_u8(self.table as u8);
        bytes
    }

    /// None where `bytes` make no sense. What a later release has to say behind it is left alone.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let theirs = Settings::decode(&mut bytes)?;
        let ours = Settings::decode(&mut bytes)?;
        let last_stream = bytes.try_get_u32_le().ok().filter(|stream| *stream <= STREAM_LIMIT)?;
        let sizes = -WINDOW_LIMIT..=WINDOW_LIMIT;
        let mut window = || bytes.try_get_i64_le().ok().filter(|window| sizes.contains(window));
        let (receive_window, send_window) = (window()?, window()?);
        let table = bytes.try_get_u8().ok()?;
        let table = [Table::Unknown, Table::Empty].into_iter().find(|known| *known as u8 == table)?;
        Some(Self { theirs, ours, last_stream, receive_window, send_window, table })
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
        fn it_comes_back_as_it_went(
            theirs in settings(), ours in settings(), last_stream in 0..=STREAM_LIMIT,
            receive_window in -WINDOW_LIMIT..=WINDOW_LIMIT, send_window in -WINDOW_LIMIT..=WINDOW_LIMIT,
            is_empty: bool, more: Vec<u8>,
        ) {
            let table = if is_empty { Table::Empty } else { Table::Unknown };
            let state = Http2State { theirs, ours, last_stream, receive_window, send_window, table };
            let bytes = state.encode();
            prop_assert_eq!(Http2State::decode(&[&bytes[..], &more].concat()), Some(state));
            for cut in 0..bytes.len() {
                prop_assert_eq!(Http2State::decode(&bytes[..cut]), None);
            }
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
    fn a_window_larger_than_there_can_be_is_no_agreement() {
        for window in [i64::MIN, -WINDOW_LIMIT - 1, WINDOW_LIMIT + 1, i64::MAX] {
            let state = Http2State { send_window: window, ..Http2State::default() };
            assert_eq!(Http2State::decode(&state.encode()), None, "{window}");
        }
    }

    #[test]
    fn more_settings_than_there_are_is_no_agreement() {
        let many: Vec<u8> = (0..40_u16).flat_map(|key| [&key.to_be_bytes()[..], &[0; 4]].concat()).collect();
        assert!(!Settings::default().set(&many));
        assert!(!Settings::default().set(&[0; 5]));
    }
}
