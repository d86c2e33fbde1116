//! [`Tickets`], which seals and opens TLS session tickets (RFC 8446 section 4.6.1). Its keys are handed over to the
//! next process, so that clients can resume their sessions there without a full handshake.

use std::fmt;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use tokio_rustls::rustls::server::ProducesTickets;
use zeroize::Zeroizing;

use crate::os::lock::lock;

/// How long a key seals tickets, in seconds; it opens them for twice as long. The ticketer of rustls has the same
/// times.
const ROTATION: u64 = 6 * 60 * 60;
const KEY_LENGTH: usize = 32;
/// The context of tickets from listeners that ask for no certificates of clients. Earlier releases have no other.
const NO_CONTEXT: &[u8] = &[];

pub struct Tickets {
    random: SystemRandom,
    keys: Mutex<Keys>,
}

struct Keys {
    current: Key,
    former: Option<Key>,
}

#[derive(Clone)]
struct Key {
    bytes: Zeroizing<[u8; KEY_LENGTH]>,
    /// The time at which it was made, in seconds since 1970.
    since: u64,
}

impl Key {
    fn new(random: &SystemRandom, now: u64) -> Option<Self> {
        let mut bytes = Zeroizing::new([0; KEY_LENGTH]);
        random.fill(&mut bytes[..]).ok()?;
        Some(Self { bytes, since: now })
    }

    fn ready(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &self.bytes[..]).expect("the key has 32 bytes"))
    }

    /// Whether the key was made at least `age` ago. A key from the future counts too, because the clock may have been
    /// set back, and the key would otherwise be used for too long.
    fn is_older_than(&self, age: u64, now: u64) -> bool {
        now.abs_diff(self.since) >= age
    }
}

impl Tickets {
    pub fn new() -> anyhow::Result<Self> {
        let random = SystemRandom::new();
        let current = Key::new(&random, now())
            .ok_or_else(|| anyhow::anyhow!("could not get random numbers from the system"))?;
        Ok(Self { random, keys: Mutex::new(Keys { current, former: None }) })
    }

    /// Encodes the keys for the next process.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let keys = lock(&self.keys);
        let mut bytes = Zeroizing::new(Vec::with_capacity(1 + 2 * (8 + KEY_LENGTH)));
        bytes.put_u8(1 + u8::from(keys.former.is_some()));
        for key in std::iter::once(&keys.current).chain(&keys.former) {
            bytes.put_u64_le(key.since);
            bytes.put_slice(&key.bytes[..]);
        }
        bytes
    }

    /// Adopts the keys of an earlier process. Returns false and keeps the present keys if `bytes` are invalid. Bytes
    /// that follow are ignored, so that a later release can append fields.
    pub fn adopt_keys(&self, mut bytes: &[u8]) -> bool {
        let Ok(count @ 1..=2) = bytes.try_get_u8() else { return false };
        let mut key = || {
            let since = bytes.try_get_u64_le().ok()?;
            let (key, rest) = bytes.split_first_chunk::<KEY_LENGTH>()?;
            bytes = rest;
            Some(Key { bytes: Zeroizing::new(*key), since })
        };
        let Some(current) = key() else { return false };
        let former = if count == 2 { key() } else { None };
        if count == 2 && former.is_none() {
            return false;
        }
        *lock(&self.keys) = Keys { current, former };
        true
    }

    /// Seals a ticket that only the same `context` opens.
    pub fn encrypt_at(&self, now: u64, plain: &[u8], context: &[u8]) -> Option<Vec<u8>> {
        let key = {
            let mut keys = lock(&self.keys);
            if keys.current.is_older_than(ROTATION, now) {
                let next = Key::new(&self.random, now)?;
                keys.former = Some(std::mem::replace(&mut keys.current, next));
            }
            keys.current.ready()
        };
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut sealed = plain.to_vec();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut sealed)
            .ok()?;
        Some([&nonce[..], &sealed].concat())
    }

    pub fn decrypt_at(&self, now: u64, ticket: &[u8], context: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = ticket.split_first_chunk::<NONCE_LEN>()?;
        let keys: Vec<LessSafeKey> = {
            let keys = lock(&self.keys);
            let all = std::iter::once(&keys.current).chain(&keys.former);
            all.filter(|key| !key.is_older_than(2 * ROTATION, now)).map(Key::ready).collect()
        };
        keys.iter().find_map(|key| {
            let mut opened = sealed.to_vec();
            let nonce = Nonce::assume_unique_for_key(*nonce);
            let length = key.open_in_place(nonce, Aad::from(context), &mut opened).ok()?.len();
            opened.truncate(length);
            Some(opened)
        })
    }
}

/// The time in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Does not show the keys.
impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(2 * ROTATION).expect("half a day fits into 32 bits")
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.encrypt_at(now(), plain, NO_CONTEXT)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.decrypt_at(now(), ticket, NO_CONTEXT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticket_is_accepted_for_its_lifetime_and_no_longer() {
        let tickets = Tickets::new().expect("random numbers are available");
        let begun = now();
        let ticket = tickets.encrypt_at(begun, b"secret", NO_CONTEXT).expect("the ticket can be sealed");
        for hours in [1, 5, 7, 11] {
            let now = begun + hours * 3600;
            assert_eq!(
                tickets.decrypt_at(now, &ticket, NO_CONTEXT).as_deref(),
                Some(&b"secret"[..]),
                "{hours}"
            );
            // Sealing another ticket rotates the keys if that is due.
            tickets.encrypt_at(now, b"other", NO_CONTEXT).expect("the ticket can be sealed");
        }
        assert_eq!(tickets.decrypt_at(begun + 12 * 3600, &ticket, NO_CONTEXT), None);
        tickets.encrypt_at(begun + 14 * 3600, b"other", NO_CONTEXT).expect("the ticket can be sealed");
        assert_eq!(tickets.decrypt_at(begun, &ticket, NO_CONTEXT), None, "its key is gone");
    }

    #[test]
    fn next_process_accepts_tickets_of_both_keys() {
        let (first, next) = (
            Tickets::new().expect("random numbers are available"),
            Tickets::new().expect("random numbers are available"),
        );
        let old = first.encrypt_at(now() - ROTATION, b"old", NO_CONTEXT).expect("the ticket can be sealed");
        let new = first.encrypt(b"new").expect("the ticket can be sealed");
        assert_eq!((next.decrypt(&old), next.decrypt(&new)), (None, None));
        assert!(next.adopt_keys(&first.encode()));
        assert_eq!(next.decrypt(&new).as_deref(), Some(&b"new"[..]));
        assert_eq!(next.decrypt(&old).as_deref(), Some(&b"old"[..]));
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_are_neither_a_ticket_nor_keys() {
        crate::fuzz::target!("tickets").for_each(|bytes| {
            let tickets = Tickets::new().expect("random numbers are available");
            assert_eq!(tickets.decrypt(bytes), None);
            let ticket = tickets.encrypt(b"secret").expect("the ticket can be sealed");
            if !tickets.adopt_keys(bytes) {
                assert!(tickets.decrypt(&ticket).is_some(), "refused keys were adopted");
            }
        });
    }
}
