//! The secrets from which the keys of a TLS 1.3 connection are derived. A KeyUpdate replaces a direction's secret by the
//! one that follows from it (RFC 8446 section 7.2).

use std::fmt;
use std::sync::OnceLock;

use ring::hkdf;
use tokio_rustls::rustls::KeyLog;
use zeroize::Zeroizing;

use crate::transport::tls_traffic::{IV_LENGTH, Suite};

/// Of one direction. Wiped when it is dropped, and not shown.
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
    /// The caller checks that `bytes` are as many as `suite` wants (`Suite::secret_length`).
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

    /// This secret or one that follows from it: the one from which `key` is derived. None where that is not among the
    /// first `generations`.
    pub fn that_gives(&self, key: &[u8], suite: Suite, generations: usize) -> Option<Self> {
        let all = std::iter::successors(Some(self.clone()), |secret| Some(secret.next(suite)));
        all.take(generations).find(|secret| secret.key(suite)[..] == *key)
    }

    /// HKDF-Expand-Label without a context (RFC 8446 section 7.1).
    fn expand(&self, suite: Suite, label: &[u8], into: &mut [u8]) {
        const PREFIX: &[u8] = b"tls13 ";
        let length = u16::try_from(into.len()).expect("a key, an IV or a secret");
        let label_length = u8::try_from(PREFIX.len() + label.len()).expect("one of the labels above");
        let description: [&[u8]; 5] = [&length.to_be_bytes(), &[label_length], PREFIX, label, &[0]];
        hkdf::Prk::new_less_safe(suite.hkdf(), &self.0)
            .expand(&description, Length(into.len()))
            .and_then(|bytes| bytes.fill(into))
            .expect("HKDF gives up to 255 times the length of its hash");
    }
}

/// How many bytes HKDF is to give.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// The first secrets of one connection, as rustls tells them during its handshake. Each connection has its own
/// `ServerConfig` with one of these, because the client random, by which rustls tells connections apart, is chosen by
/// the client and visible on the network: in a common map one client could put its secrets in another's place.
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

/// Without the secrets: `ServerConfig` shows this.
impl fmt::Debug for FirstSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FirstSecrets")
    }
}

/// rustls calls this a log; nothing is written anywhere.
impl KeyLog for FirstSecrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        if let Some(place) = self.of(label) {
            // A connection has one handshake, so a second secret would be a fault of rustls; the first one stays, and
            // `that_gives` finds out if it is wrong.
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

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).expect("ASCII"));
        pairs.map(|pair| u8::from_str_radix(pair, 16).expect("hexadecimal")).collect()
    }

    /// RFC 8448 section 3: the server's application traffic secret, and what is derived from it.
    #[test]
    fn keys_are_those_of_the_example_of_rfc_8448() {
        let secret = bytes("a11af9f05531f856ad47116b45a95032 8204b4f44bfb6b3a4b4f1f3fcb631643");
        let (key, iv) = TrafficSecret::new(&secret).keys(Suite::Aes128Gcm);
        assert_eq!(key[..], bytes("9f02283b6c9c07efc26bb9f2ac92e356"));
        assert_eq!(iv[..], bytes("cf782b88dd83549aadf1e984"));
    }

    #[test]
    fn the_secret_of_a_later_generation_is_found_by_its_key_within_the_limit() {
        for suite in Suite::ALL {
            let first = TrafficSecret::new(&vec![7; suite.secret_length()]);
            let third = first.next(suite).next(suite);
            let (key, _) = third.keys(suite);
            assert!(first.that_gives(&key, suite, 3) == Some(third));
            assert!(first.that_gives(&key, suite, 2).is_none());
            assert!(first.next(suite).next(suite).next(suite).that_gives(&key, suite, 9).is_none());
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let secrets = FirstSecrets::default();
        secrets.log("CLIENT_TRAFFIC_SECRET_0", &[], &[77; 32]);
        secrets.log("EXPORTER_SECRET", &[], &[77; 32]);
        let shown = format!("{secrets:?} {:?}", secrets.from_peer);
        assert!(secrets.from_peer.get().is_some() && secrets.to_peer.get().is_none());
        assert!(!shown.contains("77") && !shown.contains("4d"), "{shown}");
    }
}
