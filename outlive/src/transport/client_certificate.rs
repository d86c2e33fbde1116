//! [`ClientCertificate`], the verified certificate of a TLS client. It travels with the connection to the next process,
//! because the client presents it only in the handshake.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Buf, BufMut, Bytes};
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use tokio_rustls::rustls::pki_types::CertificateDer;

use super::certificate::{Fields, NameKind};

/// The longest encoding that is handed over, in bytes. A certificate has about 1 kB.
const LIMIT: usize = 16 * 1024;

/// The certificate of a client, which a handler takes as an argument.
///
/// A client presents it on the https listeners of `--tls-client-auth`. The library has verified that an authority in
/// `--tls-client-ca` has issued it, that it is valid for clients and has not expired, and that the client has its key. It
/// is that of the connection, so each of its requests has the same one, over restarts and reloads too.
///
/// A request without a certificate is answered with 403. Take an `Option<ClientCertificate>` if a certificate is optional.
///
/// ```
/// use outlive::ClientCertificate;
///
/// async fn partner(certificate: ClientCertificate) -> String {
///     let uris: Vec<_> = certificate.uris().collect();
///     format!("{} {uris:?}\n", certificate.common_name().unwrap_or("-"))
/// }
/// # let _: axum::Router = axum::Router::new().route("/", axum::routing::get(partner));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate(Arc<Chain>);

/// The digest of a set of authorities (`client_authority.rs`).
pub(crate) type AuthorityDigest = [u8; SHA256_OUTPUT_LEN];

#[derive(PartialEq, Eq)]
struct Chain {
    end_entity: CertificateDer<'static>,
    /// The certificates that are needed to verify it; none if a trusted authority has issued it itself.
    intermediates: Vec<CertificateDer<'static>>,
    /// The authorities that were trusted when it was verified.
    verified_by: AuthorityDigest,
}

impl ClientCertificate {
    /// A certificate that was verified with these others, by these authorities.
    pub(crate) fn verified(
        end_entity: CertificateDer<'static>,
        intermediates: Vec<CertificateDer<'static>>,
        verified_by: AuthorityDigest,
    ) -> Self {
        Self(Arc::new(Chain { end_entity, intermediates, verified_by }))
    }

    /// The certificate as DER (RFC 5280), for what the other methods do not return.
    pub fn der(&self) -> &[u8] {
        &self.0.end_entity
    }

    /// The SHA-256 digest of the certificate, its fingerprint: `openssl x509 -fingerprint -sha256` shows the same bytes.
    pub fn sha256(&self) -> [u8; 32] {
        let digest = digest(&SHA256, self.der());
        digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    /// The common name of its subject. The last one if there are several, and none if it is not encoded as UTF-8 or ASCII.
    pub fn common_name(&self) -> Option<&str> {
        self.fields().common_name()
    }

    /// Its subject alternative names of the type DNS, as they are in the certificate: they can have any case and be
    /// wildcards.
    pub fn dns_names(&self) -> impl Iterator<Item = &str> {
        self.fields().alternative_names(NameKind::Dns)
    }

    /// Its subject alternative names of the type email.
    pub fn email_addresses(&self) -> impl Iterator<Item = &str> {
        self.fields().alternative_names(NameKind::Email)
    }

    /// Its subject alternative names of the type URI, such as the SPIFFE id of a workload.
    pub fn uris(&self) -> impl Iterator<Item = &str> {
        self.fields().alternative_names(NameKind::Uri)
    }

    /// The end of its validity. None if it is not encoded as RFC 5280 requires. A connection stays open when its certificate
    /// expires, until the next restart or reload.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.fields().expires_at
    }

    fn fields(&self) -> Fields<'_> {
        Fields::of(self.der())
    }

    pub(crate) fn end_entity(&self) -> &CertificateDer<'static> {
        &self.0.end_entity
    }

    pub(crate) fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.0.intermediates
    }

    pub(crate) fn verified_by(&self) -> &AuthorityDigest {
        &self.0.verified_by
    }

    fn chain(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        std::iter::once(&self.0.end_entity).chain(&self.0.intermediates)
    }

    /// Whether it is short enough to be handed over.
    pub(crate) fn is_movable(&self) -> bool {
        self.length() <= LIMIT
    }

    fn length(&self) -> usize {
        SHA256_OUTPUT_LEN + self.chain().map(|certificate| 4 + certificate.len()).sum::<usize>()
    }

    /// Its encoding in the record of a handover: the digest of the authorities; then each certificate, the client's own
    /// first, after its length in 4 bytes, little-endian.
    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = Vec::with_capacity(self.length());
        bytes.put_slice(&self.0.verified_by);
        for certificate in self.chain() {
            bytes.put_u32_le(
                u32::try_from(certificate.len()).expect("TLS limits a certificate to 2^24 bytes"),
            );
            bytes.put_slice(certificate);
        }
        bytes.into()
    }

    /// None if the encoding is invalid or longer than the limit.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > LIMIT {
            return None;
        }
        let (verified_by, mut bytes) = bytes.split_first_chunk()?;
        let mut chain = Vec::new();
        while !bytes.is_empty() {
            let length = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
            let (certificate, rest) =
                bytes.split_at_checked(length).filter(|(taken, _)| !taken.is_empty())?;
            bytes = rest;
            chain.push(CertificateDer::from(certificate.to_vec()));
        }
        if chain.is_empty() {
            return None;
        }
        let end_entity = chain.remove(0);
        Some(Self::verified(end_entity, chain, *verified_by))
    }
}

/// When the first of the certificates expires. None if that of one of them cannot be understood.
pub(crate) fn expiry<'a>(mut chain: impl Iterator<Item = &'a CertificateDer<'a>>) -> Option<SystemTime> {
    chain.try_fold(None, |first: Option<SystemTime>, certificate| {
        let end = Fields::of(certificate).expires_at?;
        Some(Some(first.map_or(end, |first| first.min(end))))
    })?
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ClientCertificate");
        shown.field("common_name", &self.common_name());
        shown.field("dns_names", &self.dns_names().collect::<Vec<_>>());
        shown.field("email_addresses", &self.email_addresses().collect::<Vec<_>>());
        shown.field("uris", &self.uris().collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn certificates() -> impl Strategy<Value = ClientCertificate> {
        let der = || prop::collection::vec(any::<u8>(), 1..300).prop_map(CertificateDer::from);
        (der(), prop::collection::vec(der(), 0..3), any::<[u8; SHA256_OUTPUT_LEN]>())
            .prop_map(|(end_entity, others, digest)| ClientCertificate::verified(end_entity, others, digest))
    }

    proptest! {
        #[test]
        fn decode_reverses_encode(certificate in certificates()) {
            prop_assert!(certificate.is_movable());
            prop_assert_eq!(ClientCertificate::decode(&certificate.encode()), Some(certificate));
        }

        #[test]
        fn encoding_that_is_cut_off_is_refused_or_has_fewer_certificates(certificate in certificates(), cut in 1..200_usize) {
            let encoded = certificate.encode();
            let decoded = ClientCertificate::decode(&encoded[..encoded.len() - cut.min(encoded.len())]);
            if let Some(decoded) = decoded {
                prop_assert_eq!(decoded.end_entity(), certificate.end_entity());
                prop_assert!(decoded.intermediates().len() < certificate.intermediates().len());
            }
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes: Vec<u8>) {
            if let Some(certificate) = ClientCertificate::decode(&bytes) {
                prop_assert_eq!(&certificate.encode()[..], &bytes[..]);
                let _ = format!("{certificate:?}");
            }
        }
    }

    #[test]
    fn certificate_at_the_limit_moves_and_a_longer_one_does_not() {
        for (excess, moves) in [(0, true), (1, false)] {
            let der = vec![0; LIMIT - SHA256_OUTPUT_LEN - 4 + excess].into();
            let certificate = ClientCertificate::verified(der, Vec::new(), [0; SHA256_OUTPUT_LEN]);
            assert_eq!(certificate.is_movable(), moves);
            assert_eq!(ClientCertificate::decode(&certificate.encode()).is_some(), moves);
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_reader_of_client_certificates() {
        crate::fuzz::target!("certificates").for_each(|bytes| {
            let certificate =
                ClientCertificate::verified(bytes.to_vec().into(), Vec::new(), [0; SHA256_OUTPUT_LEN]);
            let _ = format!("{certificate:?}{:?}", certificate.expires_at());
            let _ = ClientCertificate::decode(bytes);
        });
    }
}
