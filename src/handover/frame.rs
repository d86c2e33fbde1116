//! The frames on the channel: one message of a `SOCK_SEQPACKET` socket each.
//!
//! ```text
//! message   4  "hand"                            the same in every version
//!           2  version                           the same in every version
//!           2  N, connections in this frame      version 1 from here on
//!           8  generation of the sender
//!           8  when its last answer was out, nanoseconds of CLOCK_MONOTONIC
//! fds       1  a memfd with N records, if N > 0
//!           N  connections
//! record    2  length of the listener's name
//!           4  length of the unread bytes
//!           .  the listener's name, UTF-8
//!           .  the bytes read from the connection and not consumed
//! ```
//! Numbers are little-endian. The records are in a memfd because a message may not be larger than the
//! socket's buffer, and all messages together may not either.

use bytes::{Buf, BufMut, Bytes};

use super::Sender;

pub(super) const VERSION: u16 = 1;
pub(super) const HEADER_LENGTH: usize = 24;
/// `SCM_MAX_FD` of Linux is 253; one is the memfd.
pub(super) const MAX_CONNECTIONS: usize = 252;

const MAGIC: &[u8; 4] = b"hand";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) connections: u16,
    pub(super) sender: Sender,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) listener: String,
    pub(super) unread: Bytes,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        let mut into = &mut bytes[..];
        into.put_slice(MAGIC);
        into.put_u16_le(VERSION);
        into.put_u16_le(self.connections);
        into.put_u64_le(self.sender.generation);
        into.put_u64_le(self.sender.rested_at);
        bytes
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < 6 || bytes[..4] != *MAGIC {
            return Err("not a frame of the handover channel".into());
        }
        bytes.advance(4);
        let version = bytes.get_u16_le();
        if version != VERSION {
            return Err(format!("frame version {version}, where this binary knows {VERSION}"));
        }
        if bytes.len() != HEADER_LENGTH - 6 {
            return Err("a frame of a wrong length".into());
        }
        let connections = bytes.get_u16_le();
        if usize::from(connections) > MAX_CONNECTIONS {
            return Err(format!("a frame of {connections} connections"));
        }
        let sender = Sender { generation: bytes.get_u64_le(), rested_at: bytes.get_u64_le() };
        Ok(Self { connections, sender })
    }
}

impl Record {
    pub(super) fn encode(&self, into: &mut Vec<u8>) -> Result<(), std::num::TryFromIntError> {
        into.put_u16_le(self.listener.len().try_into()?);
        into.put_u32_le(self.unread.len().try_into()?);
        into.put_slice(self.listener.as_bytes());
        into.put_slice(&self.unread);
        Ok(())
    }

    /// Takes one record off the front of `bytes`.
    pub(super) fn decode(bytes: &mut Bytes) -> Result<Self, String> {
        const SHORT: &str = "a record that is cut short";
        if bytes.len() < 6 {
            return Err(SHORT.into());
        }
        let (name, unread) = (usize::from(bytes.get_u16_le()), bytes.get_u32_le() as usize);
        if bytes.len() < name.saturating_add(unread) {
            return Err(SHORT.into());
        }
        let listener = std::str::from_utf8(&bytes.split_to(name)).map_err(|error| error.to_string())?.into();
        Ok(Self { listener, unread: bytes.split_to(unread) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_come_back_as_they_went(
            connections in 0..=252_u16, generation: u64, rested_at: u64,
        ) {
            let header = Header { connections, sender: Sender { generation, rested_at } };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn records_come_back_as_they_went(
            records in prop::collection::vec((".{0,40}", prop::collection::vec(any::<u8>(), 0..300)), 0..20),
        ) {
            let mut bytes = Vec::new();
            let records: Vec<Record> = records
                .into_iter()
                .map(|(listener, unread)| Record { listener, unread: unread.into() })
                .collect();
            for record in &records {
                record.encode(&mut bytes).expect("short enough");
            }
            let mut bytes = Bytes::from(bytes);
            for record in records {
                prop_assert_eq!(Record::decode(&mut bytes), Ok(record));
            }
            prop_assert!(bytes.is_empty());
        }

        #[test]
        fn no_bytes_make_the_readers_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Header::decode(&bytes);
            let mut bytes = Bytes::from(bytes);
            while Record::decode(&mut bytes).is_ok() {}
        }

        #[test]
        fn a_header_that_is_cut_or_of_another_version_is_refused(
            length in 0..HEADER_LENGTH, version in (VERSION + 1)..,
        ) {
            let header = Header { connections: 1, sender: Sender { generation: 1, rested_at: 1 } }.encode();
            prop_assert!(Header::decode(&header[..length]).is_err());
            let mut other = header;
            other[4..6].copy_from_slice(&version.to_le_bytes());
            let refusal = Header::decode(&other).expect_err("another version");
            prop_assert!(refusal.contains("version"), "{}", refusal);
        }
    }

    #[test]
    fn more_connections_than_a_message_can_carry_are_refused() {
        let header = Header { connections: 253, sender: Sender { generation: 1, rested_at: 1 } };
        assert!(Header::decode(&header.encode()).is_err());
    }
}
