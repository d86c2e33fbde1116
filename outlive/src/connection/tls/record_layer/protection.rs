//! [`RecordProtection`] encrypts and decrypts the records of one direction, in the format of TLS 1.2 or 1.3.
//!
//! | | TLS 1.3 (RFC 8446 section 5) | TLS 1.2 with AES-GCM (RFC 5288) | TLS 1.2 with ChaCha20-Poly1305 (RFC 7905) |
//! | --- | --- | --- | --- |
//! | content type | encrypted, behind the content; 23 in the header | in the header | in the header |
//! | padding | zeros behind the content type | none | none |
//! | nonce | IV XOR sequence number | salt, and eight bytes between the header and the content | IV XOR sequence number |
//! | authenticated | the header | sequence number, type, version, length of the content | as with AES-GCM |

use std::io;

use bytes::{BufMut, BytesMut};
use ring::aead::{self, AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::{
    APPLICATION_DATA, Alert, CHANGE_CIPHER_SPEC, FRAGMENT_LIMIT, HEADER_LENGTH, Refusal, TAG_LENGTH,
};
use crate::transport::tls_traffic::{Cipher, Direction, IV_LENGTH, Suite, Version};

/// The version in the header of each record, also with TLS 1.3.
const VERSION: [u8; 2] = [3, 3];
/// The salt of AES-GCM in TLS 1.2, in bytes. The remainder of the nonce is sent with each record.
const SALT_LENGTH: usize = 4;
/// The bytes that a record of TLS 1.2 authenticates besides its content.
const TLS12_DATA_LENGTH: usize = 13;

/// The traffic state of one direction, with its key prepared for `ring`.
pub(super) struct RecordProtection {
    suite: Suite,
    pub(super) direction: Direction,
    key: LessSafeKey,
}

impl RecordProtection {
    pub(super) fn new(suite: Suite, direction: Direction) -> Self {
        let algorithm: &aead::Algorithm = match suite.cipher {
            Cipher::Aes128Gcm => &AES_128_GCM,
            Cipher::Aes256Gcm => &AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, &direction.key).expect("a key of the suite's length");
        Self { suite, direction, key: LessSafeKey::new(key) }
    }

    /// How many records the key encrypts. With TLS 1.3 the last of them is a KeyUpdate. With TLS 1.2, AES-GCM has the limit
    /// of rustls, and ChaCha20-Poly1305 has none (RFC 8446 section 5.5) before the sequence number would wrap.
    pub(super) fn record_limit(&self) -> u64 {
        match (self.suite.version, self.suite.cipher) {
            (Version::Tls12, Cipher::ChaCha20Poly1305) => u64::MAX,
            // Few records, so that a test can reach the limit with requests.
            (Version::Tls12, Cipher::Aes128Gcm) if cfg!(test) => 4096,
            _ => 1 << 24,
        }
    }

    /// Whether half of the limit is used and the key cannot be updated, so that the connection has to end soon. The
    /// other half is for the response in flight.
    pub(super) fn is_near_limit(&self) -> bool {
        let Direction { sequence, secret, .. } = &self.direction;
        secret.is_none() && *sequence >= self.record_limit() / 2
    }

    /// Replaces the key and the IV by those after a KeyUpdate. False if the secret is not known.
    pub(super) fn update_keys(&mut self) -> bool {
        let Some(secret) = &self.direction.secret else { return false };
        let next = secret.next(self.suite);
        let (key, iv) = next.keys(self.suite);
        *self = Self::new(self.suite, Direction { key, iv, sequence: 0, secret: Some(next) });
        true
    }

    fn nonce(&self) -> [u8; IV_LENGTH] {
        let mut nonce = *self.direction.iv;
        let sequence = self.direction.sequence.to_be_bytes();
        for (byte, with) in nonce[IV_LENGTH - sequence.len()..].iter_mut().zip(sequence) {
            *byte ^= with;
        }
        nonce
    }

    /// The length of the part of the nonce that is sent with each record, in bytes.
    fn explicit_nonce_length(&self) -> usize {
        match (self.suite.version, self.suite.cipher) {
            (Version::Tls12, Cipher::Aes128Gcm | Cipher::Aes256Gcm) => IV_LENGTH - SALT_LENGTH,
            _ => 0,
        }
    }

    /// What a record of TLS 1.2 authenticates besides its content (RFC 5246 section 6.2.3.3).
    fn tls12_data(&self, kind: u8, version: [u8; 2], length: usize) -> [u8; TLS12_DATA_LENGTH] {
        let mut data = [0; TLS12_DATA_LENGTH];
        data[..8].copy_from_slice(&self.direction.sequence.to_be_bytes());
        data[8] = kind;
        data[9..11].copy_from_slice(&version);
        data[11..].copy_from_slice(&length_bytes(length));
        data
    }

    /// Decrypts a record in place, to its content. Returns its content type.
    pub(super) fn open(&mut self, header: [u8; HEADER_LENGTH], sealed: &mut BytesMut) -> Result<u8, Refusal> {
        let wrong =
            Refusal::Alert(Alert::BadRecordMac, "could not decrypt a record with the connection's key");
        let mut nonce = self.nonce();
        let explicit = self.explicit_nonce_length();
        let content_length = sealed.len().checked_sub(explicit + TAG_LENGTH).ok_or(wrong)?;
        nonce[IV_LENGTH - explicit..].copy_from_slice(&sealed[..explicit]);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = match self.suite.version {
            Version::Tls13 => {
                // The received type and version are not authenticated, as in rustls.
                let aad = Aad::from(record_header(APPLICATION_DATA, sealed.len()));
                self.key.open_in_place(nonce, aad, sealed)
            }
            Version::Tls12 => {
                let [kind, major, minor, ..] = header;
                let aad = Aad::from(self.tls12_data(kind, [major, minor], content_length));
                self.key.open_within(nonce, aad, sealed, explicit..)
            }
        };
        let length = opened.map_err(|_| wrong)?.len();
        // A wrapped sequence number would repeat a nonce (section 5.3). No peer sends that many records.
        self.direction.sequence = self.direction.sequence.checked_add(1).ok_or(wrong)?;
        sealed.truncate(length);
        match self.suite.version {
            Version::Tls13 => remove_padding(sealed),
            Version::Tls12 if length > FRAGMENT_LIMIT => {
                Err(Refusal::Alert(Alert::RecordOverflow, "a record is too long"))
            }
            Version::Tls12 => Ok(header[0]),
        }
    }

    /// Encrypts `content` as one record, and appends it to `into`.
    pub(super) fn seal(&mut self, kind: u8, content: &[u8], into: &mut BytesMut) -> io::Result<()> {
        if self.direction.sequence >= self.record_limit() {
            return Err(io::Error::other("the connection's key has encrypted the maximum number of records"));
        }
        let nonce = self.nonce();
        let explicit = self.explicit_nonce_length();
        let sealed = match self.suite.version {
            Version::Tls13 => {
                let header = record_header(APPLICATION_DATA, content.len() + 1 + TAG_LENGTH);
                into.put_slice(&header);
                let at = into.len();
                into.put_slice(content);
                into.put_u8(kind);
                let nonce = Nonce::assume_unique_for_key(nonce);
                self.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut into[at..])
            }
            Version::Tls12 => {
                into.put_slice(&record_header(kind, explicit + content.len() + TAG_LENGTH));
                into.put_slice(&nonce[IV_LENGTH - explicit..]);
                let at = into.len();
                into.put_slice(content);
                let aad = Aad::from(self.tls12_data(kind, VERSION, content.len()));
                let nonce = Nonce::assume_unique_for_key(nonce);
                self.key.seal_in_place_separate_tag(nonce, aad, &mut into[at..])
            }
        };
        let tag = sealed.map_err(|_| io::Error::other("could not encrypt a record"))?;
        into.put_slice(tag.as_ref());
        self.direction.sequence += 1;
        Ok(())
    }
}

/// Removes the padding and the content type of a decrypted record of TLS 1.3, and returns the type.
fn remove_padding(record: &mut BytesMut) -> Result<u8, Refusal> {
    if record.len() > FRAGMENT_LIMIT + 1 {
        return Err(Refusal::Alert(Alert::RecordOverflow, "a record with its padding is too long"));
    }
    let end = record.iter().rposition(|byte| *byte != 0);
    let end = end.ok_or(Refusal::NoAlert("a record contains only padding"))?;
    let kind = record[end];
    record.truncate(end);
    if kind == CHANGE_CIPHER_SPEC {
        return Err(Refusal::Alert(Alert::UnexpectedMessage, "received an encrypted change_cipher_spec"));
    }
    Ok(kind)
}

fn record_header(kind: u8, length: usize) -> [u8; HEADER_LENGTH] {
    let [high, low] = length_bytes(length);
    [kind, VERSION[0], VERSION[1], high, low]
}

fn length_bytes(length: usize) -> [u8; 2] {
    u16::try_from(length).expect("a record has a length of 16 bits").to_be_bytes()
}
