//! [`TlsTrafficState`], the state of a TLS connection with which another process can continue to seal and open its
//! records, and its encoding. `connection/tls/record_layer.rs` uses it in place of rustls.

use std::fmt;

use bytes::{Buf, BufMut, Bytes};
use ring::hkdf;
use tokio_rustls::rustls::{ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion};
use zeroize::Zeroizing;

use crate::transport::client_certificate::ClientCertificate;
use crate::transport::traffic_secret::{FirstSecrets, TrafficSecret};

/// The length of an IV in bytes. It is the same for all suites.
pub const IV_LENGTH: usize = 12;
/// The length of the header of a handshake message in bytes: its type and its length (RFC 8446 section 4).
pub const MESSAGE_HEADER_LENGTH: usize = 4;
/// How many KeyUpdates rustls may have followed before the connection leaves it; after more, no later KeyUpdate can be
/// followed. Finding the secrets takes a few milliseconds at this limit, once in a connection's life.
const GENERATIONS_LIMIT: usize = 1024;

/// The version of TLS. It decides the format of the records, and which messages may follow the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Tls12,
    Tls13,
}

impl Version {
    /// The version after the handshake. `None` for any other version; rustls supports no others today.
    pub fn negotiated(version: Option<ProtocolVersion>) -> Option<Self> {
        match version? {
            ProtocolVersion::TLSv1_2 => Some(Self::Tls12),
            ProtocolVersion::TLSv1_3 => Some(Self::Tls13),
            _ => None,
        }
    }
}

/// The ciphers that rustls supports. Both versions have the same ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
}

/// A cipher suite, as far as the records depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suite {
    pub version: Version,
    pub cipher: Cipher,
}

impl Suite {
    pub const ALL: [Self; 6] = {
        let [first, second, third] = Self::of(Version::Tls13);
        let [fourth, fifth, sixth] = Self::of(Version::Tls12);
        [first, second, third, fourth, fifth, sixth]
    };

    /// The suites of a version.
    pub const fn of(version: Version) -> [Self; 3] {
        [
            Self { version, cipher: Cipher::Aes128Gcm },
            Self { version, cipher: Cipher::Aes256Gcm },
            Self { version, cipher: Cipher::ChaCha20Poly1305 },
        ]
    }

    /// Its number in the encoding, from RFC 8446 appendix B.4, RFC 5289 or RFC 7905. TLS 1.2 has two suites for each
    /// cipher; this is the one for ECDSA keys. The records do not depend on the key of the certificate.
    pub fn number(self) -> u16 {
        match (self.version, self.cipher) {
            (Version::Tls13, Cipher::Aes128Gcm) => 0x1301,
            (Version::Tls13, Cipher::Aes256Gcm) => 0x1302,
            (Version::Tls13, Cipher::ChaCha20Poly1305) => 0x1303,
            (Version::Tls12, Cipher::Aes128Gcm) => 0xc02b,
            (Version::Tls12, Cipher::Aes256Gcm) => 0xc02c,
            (Version::Tls12, Cipher::ChaCha20Poly1305) => 0xcca9,
        }
    }

    pub fn key_length(self) -> usize {
        match self.cipher {
            Cipher::Aes128Gcm => 16,
            Cipher::Aes256Gcm | Cipher::ChaCha20Poly1305 => 32,
        }
    }

    pub fn hkdf(self) -> hkdf::Algorithm {
        match self.cipher {
            Cipher::Aes128Gcm | Cipher::ChaCha20Poly1305 => hkdf::HKDF_SHA256,
            Cipher::Aes256Gcm => hkdf::HKDF_SHA384,
        }
    }

    /// The length of a traffic secret of TLS 1.3 in bytes, which is that of the suite's hash (RFC 8446 section 7.1).
    pub fn secret_length(self) -> usize {
        match self.cipher {
            Cipher::Aes128Gcm | Cipher::ChaCha20Poly1305 => 32,
            Cipher::Aes256Gcm => 48,
        }
    }
}

/// The state of one direction. The key, the IV and the secret are wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct Direction {
    pub key: Zeroizing<Vec<u8>>,
    /// With AES-GCM in TLS 1.2, the first four bytes are the salt (RFC 5288 section 3). The other eight come from the
    /// key block; their XOR with the sequence number is sent in the record. Each process uses the same IV, so no nonce
    /// repeats.
    pub iv: Zeroizing<[u8; IV_LENGTH]>,
    /// The sequence number of the next record.
    pub sequence: u64,
    /// The traffic secret from which the key and the IV were derived; the next KeyUpdate needs it. `None` if a release
    /// without this field handed the connection over, if rustls had followed too many KeyUpdates, or if it is TLS 1.2,
    /// which has no KeyUpdate.
    pub secret: Option<TrafficSecret>,
}

/// The counters by which the record layer limits the peer, and the state between two records. It begins anew when a
/// connection leaves rustls, because rustls does not expose its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerState {
    /// The number of consecutive records without content.
    pub empty_records: u8,
    /// The number of alerts that have no effect.
    pub warnings: u8,
    /// The number of KeyUpdates since the last application data.
    pub key_updates: u8,
    /// Whether the peer has requested a KeyUpdate. It must be sent before the next record (RFC 8446 section 4.6.3).
    pub wants_key_update: bool,
    /// The beginning of a handshake message that continues in the next record. At most its header is kept.
    pub message: Vec<u8>,
    /// TLS 1.2: the number of ClientHello messages, which begin a renegotiation.
    pub renegotiations: u8,
    /// TLS 1.2: how many bytes of a ClientHello have not arrived. Its content has no effect, so it is not kept.
    pub awaited: u16,
}

/// The state of a TLS connection after its handshake, without rustls.
#[derive(Clone, PartialEq, Eq)]
pub struct TlsTrafficState {
    pub suite: Suite,
    pub from_peer: Direction,
    pub to_peer: Direction,
    /// The bytes that were read from the socket and not decrypted.
    pub unread: Bytes,
    pub peer: PeerState,
    /// The certificate of the client, if it has presented one. It is not part of the encoding, because earlier releases
    /// would ignore it there: it has a field of its own in the record (`handover/frame.rs`).
    pub client: Option<ClientCertificate>,
}

/// Does not show the keys.
impl fmt::Debug for TlsTrafficState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsTrafficState").field("suite", &self.suite).finish_non_exhaustive()
    }
}

impl fmt::Debug for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direction").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// The encoding, with the length of each field in bytes, in little-endian order. Releases that do not follow KeyUpdates
/// write and read the first three lines only, and ignore the remaining bytes.
///
/// ```text
/// 2  suite
/// .  for each direction, from the peer first: 8, sequence number; 12, IV; the key, whose length follows from the suite
/// 4  length; the bytes that were read and not decrypted
///
/// .  for each direction: 1, whether its secret follows; the secret, whose length follows from the suite
/// 4  one byte each: empty records, warnings, KeyUpdates, whether the peer has requested a KeyUpdate
/// 1  length; the beginning of a handshake message
/// 3  TLS 1.2 only: 1, renegotiations; 2, bytes of a ClientHello that have not arrived
/// ```
///
/// Releases that do not adopt TLS 1.2 connections refuse the suite, which closes only this connection.
impl TlsTrafficState {
    /// The state of a connection that leaves rustls. `None` if its cipher is not one of [`Cipher`].
    pub fn new(
        version: Version,
        secrets: ExtractedSecrets,
        first: &FirstSecrets,
        unread: Bytes,
        client: Option<ClientCertificate>,
    ) -> Option<Self> {
        let (suite, mut from_peer) = direction(version, secrets.rx)?;
        let (_, mut to_peer) = direction(version, secrets.tx)?;
        for (direction, first) in [(&mut from_peer, &first.from_peer), (&mut to_peer, &first.to_peer)] {
            let first = first.get().filter(|first| first.bytes().len() == suite.secret_length());
            direction.secret =
                first.and_then(|first| first.that_gives(&direction.key, suite, 1 + GENERATIONS_LIMIT));
        }
        Some(Self { suite, from_peer, to_peer, unread, peer: PeerState::default(), client })
    }

    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        // The whole capacity at once: a vector that grows would leave copies of keys in freed memory, which are not
        // wiped.
        let mut bytes = Zeroizing::new(Vec::with_capacity(self.longest_encoding()));
        bytes.put_u16_le(self.suite.number());
        for direction in [&self.from_peer, &self.to_peer] {
            bytes.put_u64_le(direction.sequence);
            bytes.put_slice(&direction.iv[..]);
            bytes.put_slice(&direction.key);
        }
        bytes.put_u32_le(u32::try_from(self.unread.len()).expect("one read returns less than 4 GiB"));
        bytes.put_slice(&self.unread);
        for direction in [&self.from_peer, &self.to_peer] {
            bytes.put_u8(direction.secret.is_some().into());
            bytes.put_slice(direction.secret.as_ref().map_or(&[], TrafficSecret::bytes));
        }
        let PeerState {
            empty_records,
            warnings,
            key_updates,
            wants_key_update,
            message,
            renegotiations,
            awaited,
        } = &self.peer;
        bytes.put_slice(&[*empty_records, *warnings, *key_updates, (*wants_key_update).into()]);
        bytes.put_u8(u8::try_from(message.len()).expect("at most a header is kept"));
        bytes.put_slice(message);
        if self.suite.version == Version::Tls12 {
            bytes.put_u8(*renegotiations);
            bytes.put_u16_le(*awaited);
        }
        bytes
    }

    /// The length of the encoding if it has all fields.
    fn longest_encoding(&self) -> usize {
        let secrets = 2 * (1 + self.suite.secret_length());
        self.length_without_secrets() + secrets + 5 + self.peer.message.len() + 3
    }

    /// The length of the encoding of a release that does not follow KeyUpdates.
    fn length_without_secrets(&self) -> usize {
        6 + 2 * (8 + IV_LENGTH + self.suite.key_length()) + self.unread.len()
    }

    /// `None` if `bytes` are invalid. Bytes that follow are ignored, so that a later release can append fields.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let number = bytes.try_get_u16_le().ok()?;
        let suite = Suite::ALL.into_iter().find(|known| known.number() == number)?;
        let mut direction = || {
            let sequence = bytes.try_get_u64_le().ok()?;
            let (iv, rest) = bytes.split_first_chunk::<IV_LENGTH>()?;
            let (key, rest) = rest.split_at_checked(suite.key_length())?;
            bytes = rest;
            Some(Direction {
                key: Zeroizing::new(key.to_vec()),
                iv: Zeroizing::new(*iv),
                sequence,
                secret: None,
            })
        };
        let (mut from_peer, mut to_peer) = (direction()?, direction()?);
        let length = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
        let (unread, mut bytes) = bytes.split_at_checked(length)?;
        let unread = Bytes::copy_from_slice(unread);
        if bytes.is_empty() && suite.version == Version::Tls13 {
            return Some(Self {
                suite,
                from_peer,
                to_peer,
                unread,
                peer: PeerState::default(),
                client: None,
            });
        }
        for direction in [&mut from_peer, &mut to_peer] {
            if decode_bool(&mut bytes)? {
                if suite.version == Version::Tls12 {
                    return None;
                }
                let (secret, rest) = bytes.split_at_checked(suite.secret_length())?;
                bytes = rest;
                direction.secret = Some(TrafficSecret::new(secret));
            }
        }
        let ([empty_records, warnings, key_updates], rest) = bytes.split_first_chunk()?;
        bytes = rest;
        let wants_key_update = decode_bool(&mut bytes)?;
        let length = usize::from(bytes.try_get_u8().ok()?);
        let (message, mut bytes) = bytes.split_at_checked(length)?;
        if message.len() > MESSAGE_HEADER_LENGTH {
            return None;
        }
        let (renegotiations, awaited) = match suite.version {
            Version::Tls12 => (bytes.try_get_u8().ok()?, bytes.try_get_u16_le().ok()?),
            Version::Tls13 => (0, 0),
        };
        let peer = PeerState {
            empty_records: *empty_records,
            warnings: *warnings,
            key_updates: *key_updates,
            wants_key_update,
            message: message.to_vec(),
            renegotiations,
            awaited,
        };
        Some(Self { suite, from_peer, to_peer, unread, peer, client: None })
    }
}

fn decode_bool(bytes: &mut &[u8]) -> Option<bool> {
    match bytes.try_get_u8().ok()? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn direction(
    version: Version,
    (sequence, secrets): (u64, ConnectionTrafficSecrets),
) -> Option<(Suite, Direction)> {
    let (cipher, key, iv) = match &secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Cipher::Aes128Gcm, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Cipher::Aes256Gcm, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Cipher::ChaCha20Poly1305, key, iv),
        _ => return None,
    };
    let suite = Suite { version, cipher };
    // rustls keeps all keys in 32 bytes.
    let key = Zeroizing::new(key.as_ref().get(..suite.key_length())?.to_vec());
    let iv = Zeroizing::new(iv.as_ref().try_into().ok()?);
    Some((suite, Direction { key, iv, sequence, secret: None }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn session() -> impl Strategy<Value = TlsTrafficState> {
        let direction = |suite: Suite| {
            let bytes = |length| prop::collection::vec(any::<u8>(), length);
            let secret = prop::option::of(bytes(suite.secret_length()))
                .prop_map(move |secret| secret.filter(|_| suite.version == Version::Tls13));
            (bytes(suite.key_length()), any::<[u8; IV_LENGTH]>(), any::<u64>(), secret).prop_map(
                |(key, iv, sequence, secret)| Direction {
                    key: key.into(),
                    iv: iv.into(),
                    sequence,
                    secret: secret.map(|bytes| TrafficSecret::new(&bytes)),
                },
            )
        };
        let message = prop::collection::vec(any::<u8>(), 0..=MESSAGE_HEADER_LENGTH);
        let peer = (any::<[u8; 3]>(), any::<bool>(), message).prop_map(
            |([empty_records, warnings, key_updates], wants_key_update, message)| PeerState {
                empty_records,
                warnings,
                key_updates,
                wants_key_update,
                message,
                ..PeerState::default()
            },
        );
        let bytes = prop::collection::vec(any::<u8>(), 0..100);
        (0..Suite::ALL.len(), bytes, peer, any::<(u8, u16)>()).prop_flat_map(
            move |(suite, unread, peer, renegotiation)| {
                let suite = Suite::ALL[suite];
                let (renegotiations, awaited) =
                    if suite.version == Version::Tls12 { renegotiation } else { (0, 0) };
                let peer = PeerState { renegotiations, awaited, ..peer };
                (direction(suite), direction(suite)).prop_map(move |(from_peer, to_peer)| TlsTrafficState {
                    suite,
                    from_peer,
                    to_peer,
                    unread: unread.clone().into(),
                    peer: peer.clone(),
                    client: None,
                })
            },
        )
    }

    /// The code of the releases that did not follow KeyUpdates. Only the type of the suite is changed.
    mod before {
        use super::*;

        const SUITES: [Suite; 3] = Suite::of(Version::Tls13);

        pub fn encode(session: &TlsTrafficState) -> Vec<u8> {
            let mut bytes = Vec::new();
            bytes.put_u16_le(session.suite.number());
            for direction in [&session.from_peer, &session.to_peer] {
                bytes.put_u64_le(direction.sequence);
                bytes.put_slice(&direction.iv[..]);
                bytes.put_slice(&direction.key);
            }
            bytes.put_u32_le(u32::try_from(session.unread.len()).expect("one read returns less than 4 GiB"));
            bytes.put_slice(&session.unread);
            bytes
        }

        pub fn decode(mut bytes: &[u8]) -> Option<TlsTrafficState> {
            let suite = bytes.try_get_u16_le().ok()?;
            let suite = SUITES.into_iter().find(|known| known.number() == suite)?;
            let mut direction = || {
                let sequence = bytes.try_get_u64_le().ok()?;
                let (iv, rest) = bytes.split_first_chunk::<IV_LENGTH>()?;
                let (key, rest) = rest.split_at_checked(suite.key_length())?;
                bytes = rest;
                let (key, iv) = (Zeroizing::new(key.to_vec()), Zeroizing::new(*iv));
                Some(Direction { key, iv, sequence, secret: None })
            };
            let (from_peer, to_peer) = (direction()?, direction()?);
            let length = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
            let unread = Bytes::copy_from_slice(bytes.get(..length)?);
            Some(TlsTrafficState {
                suite,
                from_peer,
                to_peer,
                unread,
                peer: PeerState::default(),
                client: None,
            })
        }
    }

    /// The state that a release that does not follow KeyUpdates preserves.
    fn without_secrets(mut session: TlsTrafficState) -> TlsTrafficState {
        (session.from_peer.secret, session.to_peer.secret) = (None, None);
        session.peer = PeerState::default();
        session
    }

    proptest! {
        #[test]
        fn decode_returns_what_encode_was_given_and_refuses_truncated_bytes(session in session(), more: Vec<u8>) {
            let bytes = session.encode();
            let is_tls13 = session.suite.version == Version::Tls13;
            let whole_in_older_releases = is_tls13.then(|| session.length_without_secrets());
            // The capacity is that of the longest encoding, so the vector has not grown, which would leave copies of keys.
            prop_assert!(bytes.capacity() == session.longest_encoding());
            prop_assert!(TlsTrafficState::decode(&[&bytes[..], &more].concat()) == Some(session));
            for cut in (0..bytes.len()).filter(|cut| Some(*cut) != whole_in_older_releases) {
                prop_assert!(TlsTrafficState::decode(&bytes[..cut]).is_none());
            }
        }

        #[test]
        fn releases_with_and_without_secrets_decode_the_encoding_of_each_other(session in session()) {
            // Those releases do not adopt TLS 1.2 connections.
            let is_tls13 = session.suite.version == Version::Tls13;
            let wanted = is_tls13.then(|| without_secrets(session.clone()));
            prop_assert!(before::decode(&session.encode()) == wanted);
            prop_assert!(TlsTrafficState::decode(&before::encode(&session)) == wanted);
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_decoder() {
        crate::fuzz::target!("tls_traffic_state").for_each(|bytes| {
            let _ = TlsTrafficState::decode(bytes);
        });
    }
}
