//! [`TrafficSecret`], from which the keys of one direction of a TLS 1.3 connection are derived. A KeyUpdate replaces
//! the secret of a direction by the one that follows from it (RFC 8446 section 7.2).

use std::fmt;
use std::sync::OnceLock;

use ring::hkdf;
use tokio_rustls::rustls::KeyLog;
use zeroize::Zeroizing;

use crate::transport::tls_traffic::{IV_LENGTH, Suite};

/// The traffic secret of one direction. It is wiped on drop, and `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct TrafficSecret(Zeroizing<Vec<u8>>);

/// The key and the IV of one direction.
pub type Keys = (Zeroizing<Vec<u8>>, Zeroizing<[u8; IV_LENGTH]>);

impl fmt::Debug for TrafficSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TrafficSecret")
    }
}

impl TrafficSecret {
    /// The length of `bytes` must be [`Suite::secret_length`] of the connection's suite.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(bytes.to_vec()))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The secret after the next KeyUpdate.
    pub fn next(&self, suite: Suite) -> Self {
        let mut next = Zeroizing::new(vec![0; suite.secret_length()]);
        self.expand(suite, b"traffic upd", &mut next);
        Self(next)
    }

    pub fn keys(&self, suite: Suite) -> Keys {
        let mut iv = Zeroizing::new([0; IV_LENGTH]);
        self.expand(suite, b"iv", &mut iv[..]);
        (self.key(suite), iv)
    }

    fn key(&self, suite: Suite) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; suite.key_length()]);
        self.expand(suite, b"key", &mut key);
        key
    }

    /// The secret from which `key` is derived: this one, or one that follows from it by KeyUpdates. `None` if it is not
    /// among the first `generations`.
    pub fn that_gives(&self, key: &[u8], suite: Suite, generations: usize) -> Option<Self> {
        let all = std::iter::successors(Some(self.clone()), |secret| Some(secret.next(suite)));
        all.take(generations).find(|secret| secret.key(suite)[..] == *key)
    }

    /// HKDF-Expand-Label without a context (RFC 8446 section 7.1).
    fn expand(&self, suite: Suite, label: &[u8], into: &mut [u8]) {
        const PREFIX: &[u8] = b"tls13 ";
        let length = u16::try_from(into.len()).expect("keys, IVs and secrets are short");
        let label_length = u8::try_from(PREFIX.len() + label.len()).expect("the labels are short");
        let description: [&[u8]; 5] = [&length.to_be_bytes(), &[label_length], PREFIX, label, &[0]];
        hkdf::Prk::new_less_safe(suite.hkdf(), &self.0)
            .expand(&description, Length(into.len()))
            .and_then(|bytes| bytes.fill(into))
            .expect("HKDF outputs up to 255 times the length of its hash");
    }
}

/// The number of bytes that HKDF outputs.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// The first secrets of one connection, which rustls reports during the handshake. Each connection has its own
/// `ServerConfig` with one of these. A map for all connections would have to use the client random as its key, which
/// the client chooses and which is visible on the network, so that one client could replace the secrets of another.
#[derive(Default)]
pub struct FirstSecrets {
    pub from_peer: OnceLock<TrafficSecret>,
    pub to_peer: OnceLock<TrafficSecret>,
}

impl FirstSecrets {
    fn of(&self, label: &str) -> Option<&OnceLock<TrafficSecret>> {
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => Some(&self.from_peer),
            "SERVER_TRAFFIC_SECRET_0" => Some(&self.to_peer),
            _ => None,
        }
    }
}

/// Does not show the secrets, because the `Debug` output of `ServerConfig` contains this.
impl fmt::Debug for FirstSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FirstSecrets")
    }
}

/// rustls calls this trait a log. This implementation writes nothing to a file or a log.
impl KeyLog for FirstSecrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        if let Some(place) = self.of(label) {
            // A connection has one handshake, so a second secret would be an error of rustls. The first one is kept,
            // and `that_gives` detects if it is the wrong one.
            let _ = place.set(TrafficSecret::new(secret));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        self.of(label).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::tls_traffic::{Cipher, Version};

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).expect("the digits are ASCII"));
        pairs.map(|pair| u8::from_str_radix(pair, 16).expect("the digits are hexadecimal")).collect()
    }

    /// RFC 8448 section 3: the server's application traffic secret, and what is derived from it.
    #[test]
    fn keys_match_the_example_of_rfc_8448() {
        let secret = bytes("a11af9f05531f856ad47116b45a95032 8204b4f44bfb6b3a4b4f1f3fcb631643");
        let (key, iv) =
            TrafficSecret::new(&secret).keys(Suite { version: Version::Tls13, cipher: Cipher::Aes128Gcm });
        assert_eq!(key[..], bytes("9f02283b6c9c07efc26bb9f2ac92e356"));
        assert_eq!(iv[..], bytes("cf782b88dd83549aadf1e984"));
    }

    #[test]
    fn secret_after_key_updates_is_found_by_its_key_within_the_limit() {
        for suite in Suite::of(Version::Tls13) {
            let first = TrafficSecret::new(&vec![7; suite.secret_length()]);
            let third = first.next(suite).next(suite);
            let (key, _) = third.keys(suite);
            assert!(first.that_gives(&key, suite, 3) == Some(third));
            assert!(first.that_gives(&key, suite, 2).is_none());
            assert!(first.next(suite).next(suite).next(suite).that_gives(&key, suite, 9).is_none());
        }
    }

    #[test]
    fn debug_output_does_not_contain_secrets() {
        let secrets = FirstSecrets::default();
        secrets.log("CLIENT_TRAFFIC_SECRET_0", &[], &[77; 32]);
        secrets.log("EXPORTER_SECRET", &[], &[77; 32]);
        let shown = format!("{secrets:?} {:?}", secrets.from_peer);
        assert!(secrets.from_peer.get().is_some() && secrets.to_peer.get().is_none());
        assert!(!shown.contains("77") && !shown.contains("4d"), "{shown}");
    }
}
