//! A TLS 1.3 connection, between two processes: what it takes to go on sealing and opening its records
//! (RFC 8446 section 5).

use std::fmt;

use bytes::{Buf, BufMut, Bytes};
use tokio_rustls::rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use zeroize::Zeroizing;

/// Of a nonce, in bytes.
pub const IV_LENGTH: usize = 12;

/// The cipher suites of TLS 1.3 that we speak, as they are numbered in RFC 8446 appendix B.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Suite {
    Aes128Gcm = 0x1301,
    Aes256Gcm = 0x1302,
    ChaCha20Poly1305 = 0x1303,
}

impl Suite {
    const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305];

    pub fn key_length(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::ChaCha20Poly1305 => 32,
        }
    }
}

/// One direction. The key and the IV are wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Direction {
    pub key: Zeroizing<Vec<u8>>,
    pub iv: Zeroizing<[u8; IV_LENGTH]>,
    /// Of the next record.
    pub sequence: u64,
}

#[derive(Clone, PartialEq, Eq)]
pub struct TlsSession {
    pub suite: Suite,
    pub from_peer: Direction,
    pub to_peer: Direction,
    /// What was read, and is still sealed.
    pub unread: Bytes,
}

/// Without its keys.
impl fmt::Debug for TlsSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSession").field("suite", &self.suite).finish_non_exhaustive()
    }
}

impl fmt::Debug for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direction").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl TlsSession {
    /// None where the suite is not one of TLS 1.3.
    pub fn new(secrets: ExtractedSecrets, unread: Bytes) -> Option<Self> {
        let (suite, from_peer) = direction(secrets.rx)?;
        let (_, to_peer) = direction(secrets.tx)?;
        Some(Self { suite, from_peer, to_peer, unread })
    }

    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        // Of its whole length at once: what grows leaves copies behind.
        let length = 6 + 2 * (8 + IV_LENGTH + self.suite.key_length()) + self.unread.len();
        let mut bytes = Zeroizing::new(Vec::with_capacity(length));
        bytes.put_u16_le(self.suite as u16);
        for direction in [&self.from_peer, &self.to_peer] {
            bytes.put_u64_le(direction.sequence);
            bytes.put_slice(&direction.iv[..]);
            bytes.put_slice(&direction.key);
        }
        bytes.put_u32_le(u32::try_from(self.unread.len()).expect("no more than was read at once"));
        bytes.put_slice(&self.unread);
        bytes
    }

    /// None where `bytes` make no sense. What a later release has to say behind it is left alone.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let suite = bytes.try_get_u16_le().ok()?;
        let suite = Suite::ALL.into_iter().find(|known| *known as u16 == suite)?;
        let mut direction = || {
            let sequence = bytes.try_get_u64_le().ok()?;
            let (iv, rest) = bytes.split_first_chunk::<IV_LENGTH>()?;
            let (key, rest) = rest.split_at_checked(suite.key_length())?;
            bytes = rest;
            Some(Direction { key: Zeroizing::new(key.to_vec()), iv: Zeroizing::new(*iv), sequence })
        };
        let (from_peer, to_peer) = (direction()?, direction()?);
        let length = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
        let unread = Bytes::copy_from_slice(bytes.get(..length)?);
        Some(Self { suite, from_peer, to_peer, unread })
    }
}

fn direction((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Option<(Suite, Direction)> {
    let (suite, key, iv) = match &secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Suite::Aes128Gcm, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Suite::Aes256Gcm, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Suite::ChaCha20Poly1305, key, iv),
        _ => return None,
    };
    // rustls keeps all keys in 32 bytes.
    let key = Zeroizing::new(key.as_ref().get(..suite.key_length())?.to_vec());
    let iv = Zeroizing::new(iv.as_ref().try_into().ok()?);
    Some((suite, Direction { key, iv, sequence }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn session() -> impl Strategy<Value = TlsSession> {
        let direction = |suite: Suite| {
            (prop::collection::vec(any::<u8>(), suite.key_length()), any::<[u8; IV_LENGTH]>(), any::<u64>())
                .prop_map(|(key, iv, sequence)| Direction { key: key.into(), iv: iv.into(), sequence })
        };
        let bytes = prop::collection::vec(any::<u8>(), 0..100);
        (0..Suite::ALL.len(), bytes).prop_flat_map(move |(suite, unread)| {
            let suite = Suite::ALL[suite];
            (direction(suite), direction(suite)).prop_map(move |(from_peer, to_peer)| TlsSession {
                suite,
                from_peer,
                to_peer,
                unread: unread.clone().into(),
            })
        })
    }

    proptest! {
        #[test]
        fn it_comes_back_as_it_went(session in session(), more: Vec<u8>) {
            let bytes = session.encode();
            prop_assert!(TlsSession::decode(&[&bytes[..], &more].concat()) == Some(session));
            for cut in 0..bytes.len() {
                prop_assert!(TlsSession::decode(&bytes[..cut]).is_none());
            }
        }
    }

    #[test]
    fn no_bytes_are_too_much_for_it() {
        bolero::check!().for_each(|bytes| {
            let _ = TlsSession::decode(bytes);
        });
    }
}
