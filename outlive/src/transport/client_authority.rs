//! [`ClientAuthority`], the authorities of `--tls-client-ca`, and [`ClientPolicy`], by which the listeners of one value of
//! `--tls-client-auth` judge their clients: in a handshake, and when they adopt a connection.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, ensure};
use ring::digest::{Context as Digest, SHA256};
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::{self, RootCertStore};

use super::client_auth::ClientAuth;
use super::client_certificate::{AuthorityDigest, ClientCertificate, expiry};

/// How many beginnings of the chain of a client are tried to find out which certificates are needed. Chains are shorter; the
/// limit is for a client that sends many certificates, each of which takes time to verify.
const TRIED_CHAINS: usize = 5;

/// The authorities that may issue certificates of clients.
pub struct ClientAuthority {
    roots: Arc<RootCertStore>,
    digest: AuthorityDigest,
}

impl ClientAuthority {
    /// The certificates in a PEM file with this name and text.
    pub fn from_pem(name: &str, text: &[u8]) -> anyhow::Result<Self> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(text)
            .collect::<Result<_, _>>()
            .map_err(|error| anyhow!("{name}: invalid PEM: {error}"))?;
        ensure!(!certificates.is_empty(), "{name}: contains no PEM certificate");
        let mut roots = RootCertStore::empty();
        for (at, certificate) in certificates.iter().enumerate() {
            let number = at + 1;
            roots
                .add(certificate.clone())
                .with_context(|| format!("{name}: certificate {number} is invalid"))?;
        }
        Ok(Self { roots: roots.into(), digest: digest(certificates) })
    }

    /// The number of certificates.
    pub fn count(&self) -> usize {
        self.roots.len()
    }

    pub fn differs_from(&self, other: &Self) -> bool {
        self.digest != other.digest
    }

    pub fn policy(&self, auth: ClientAuth) -> anyhow::Result<ClientPolicy> {
        let builder =
            WebPkiClientVerifier::builder_with_provider(self.roots.clone(), Arc::new(default_provider()));
        let verifier = match auth {
            ClientAuth::Optional => builder.allow_unauthenticated().build()?,
            ClientAuth::Required => builder.build()?,
        };
        Ok(ClientPolicy { auth, verifier, authority: self.digest })
    }
}

/// The digest of a set of certificates: their order and repetitions do not change it.
fn digest(mut certificates: Vec<CertificateDer<'_>>) -> AuthorityDigest {
    certificates.sort_unstable_by(|a, b| a.as_ref().cmp(b));
    certificates.dedup();
    let mut digest = Digest::new(&SHA256);
    for certificate in certificates {
        digest.update(&(certificate.len() as u64).to_le_bytes());
        digest.update(&certificate);
    }
    digest.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Why a client is not served.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// It has no certificate, and the listener requires one.
    Missing,
    Expired,
    /// The trusted authorities have not issued its certificate.
    Untrusted(rustls::Error),
    /// It has a certificate, and the listener does not ask for one.
    NotAskedFor,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("the client has no certificate"),
            Self::Expired => f.write_str("the client's certificate has expired"),
            Self::Untrusted(error) => write!(f, "the client's certificate is not trusted: {error}"),
            Self::NotAskedFor => {
                f.write_str("the client has a certificate, and the listener does not verify any")
            }
        }
    }
}

/// How the clients of an https listener are judged.
#[derive(Clone, Debug)]
pub struct ClientPolicy {
    auth: ClientAuth,
    verifier: Arc<dyn ClientCertVerifier>,
    authority: AuthorityDigest,
}

impl ClientPolicy {
    /// What rustls uses in a handshake.
    pub fn verifier(&self) -> &Arc<dyn ClientCertVerifier> {
        &self.verifier
    }

    /// What a session ticket is sealed with besides its key. rustls verifies no certificate when a session is resumed. A
    /// ticket from a listener with another policy or other authorities must therefore not be opened: its session may have
    /// no certificate, or one that is not trusted here.
    pub fn ticket_context(&self) -> Vec<u8> {
        let auth = match self.auth {
            ClientAuth::Optional => b"optional",
            ClientAuth::Required => b"required",
        };
        [&auth[..], &self.authority].concat()
    }

    /// The certificate of a client whose handshake is complete. `chain`: what it has presented in this handshake, or in the
    /// one whose session it has resumed.
    pub fn judge_handshake(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        now: SystemTime,
    ) -> Result<Option<ClientCertificate>, Refusal> {
        let Some((end_entity, intermediates)) = chain.and_then(<[_]>::split_first) else {
            return self.judge(None, now).map(|()| None);
        };
        let needed = self.needed(end_entity, intermediates, now);
        let certificate = ClientCertificate::verified(end_entity.clone(), needed, self.authority);
        self.judge(Some(&certificate), now).map(|()| Some(certificate))
    }

    /// Those of `intermediates` that verify `end_entity`. Most clients also send certificates that are not needed. An idle
    /// connection should not keep them, and it does not matter if one of them has expired.
    fn needed(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Vec<CertificateDer<'static>> {
        let is_valid = |certificate: &&CertificateDer<'static>| {
            expiry(std::iter::once(*certificate)).is_some_and(|end| end >= now)
        };
        let valid: Vec<_> = intermediates.iter().filter(is_valid).cloned().collect();
        // Each certificate usually follows the one that it certifies (RFC 8446 section 4.4.2).
        let is_enough = |count: &usize| self.verify(end_entity, &valid[..*count], now).is_ok();
        let count = (0..valid.len().min(TRIED_CHAINS)).find(is_enough).unwrap_or(valid.len());
        valid[..count].to_vec()
    }

    /// Whether a client with this certificate may be served. If the same authorities have verified it, its signatures are
    /// not verified again, because that would take a second for 10,000 connections.
    pub fn judge(&self, certificate: Option<&ClientCertificate>, now: SystemTime) -> Result<(), Refusal> {
        let Some(certificate) = certificate else {
            return match self.auth {
                ClientAuth::Optional => Ok(()),
                ClientAuth::Required => Err(Refusal::Missing),
            };
        };
        let (end_entity, intermediates) = (certificate.end_entity(), certificate.intermediates());
        if expiry(std::iter::once(end_entity).chain(intermediates)).is_none_or(|end| end < now) {
            return Err(Refusal::Expired);
        }
        if *certificate.verified_by() != self.authority {
            self.verify(end_entity, intermediates, now).map_err(Refusal::Untrusted)?;
        }
        Ok(())
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), rustls::Error> {
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        self.verifier.verify_client_cert(end_entity, intermediates, now).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use testkit::certificate::{Authority, Certificate};

    use super::*;
    use crate::transport::tls_tests::chain_of;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    /// Certificates that a test makes are valid from now on, for 30 days.
    fn tomorrow() -> SystemTime {
        SystemTime::now() + DAY
    }

    fn trusting(authorities: &[&Authority]) -> ClientAuthority {
        let texts = authorities.iter().map(|authority| std::fs::read(authority.certificate()));
        let text = texts.collect::<Result<Vec<_>, _>>().expect("the files are readable").concat();
        ClientAuthority::from_pem("ca.pem", &text).expect("the file has certificates")
    }

    fn policy(auth: ClientAuth, authorities: &[&Authority]) -> ClientPolicy {
        trusting(authorities).policy(auth).expect("there is an authority")
    }

    #[test]
    fn file_without_a_certificate_of_an_authority_is_refused_by_its_name() {
        let read = |text: &[u8]| match ClientAuthority::from_pem("ca.pem", text) {
            Ok(_) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        assert_eq!(read(b""), "ca.pem: contains no PEM certificate");
        assert_eq!(read(b"no PEM"), "ca.pem: contains no PEM certificate");
        let not_der = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(read(not_der).starts_with("ca.pem: certificate 1 is invalid: "), "{}", read(not_der));
        let not_base64 = b"-----BEGIN CERTIFICATE-----\n-\n-----END CERTIFICATE-----\n";
        assert!(read(not_base64).starts_with("ca.pem: invalid PEM: "), "{}", read(not_base64));
    }

    #[test]
    fn only_needed_intermediates_are_kept() {
        let root = Authority::new("root").expect("openssl runs");
        let (middle, now) = (root.intermediate("middle").expect("openssl runs"), tomorrow());
        let chain = chain_of(&middle.issue("/CN=a", "DNS:a").expect("openssl runs"));
        assert_eq!(chain.len(), 2);
        for (authorities, kept) in [(&[&root][..], 1), (&[&middle], 0), (&[&root, &middle], 0)] {
            let certificate = policy(ClientAuth::Required, authorities).judge_handshake(Some(&chain), now);
            let certificate = certificate.expect("it is trusted").expect("there is one");
            assert_eq!(certificate.intermediates().len(), kept);
            assert_eq!(certificate.end_entity(), &chain[0]);
        }
    }

    /// As after a cross-signed root has expired. rustls does not use such a certificate, and accepts the client.
    #[test]
    fn client_with_an_expired_certificate_that_is_not_needed_is_served() {
        let root = Authority::new("root").expect("openssl runs");
        let (middle, now) = (root.intermediate("middle").expect("openssl runs"), SystemTime::now() + 2 * DAY);
        let chain = chain_of(&middle.issue("/CN=a", "DNS:a").expect("openssl runs"));
        let expired = chain_of(&Certificate::valid_for(1).expect("openssl runs")).remove(0);
        let [leaf, middle] = &chain[..] else { panic!("{} certificates", chain.len()) };
        let policy = policy(ClientAuth::Required, &[&root]);
        for chain in [[leaf, middle, &expired], [leaf, &expired, middle]] {
            let chain: Vec<_> = chain.into_iter().cloned().collect();
            let certificate = policy.judge_handshake(Some(&chain), now).expect("it is trusted");
            let certificate = certificate.expect("there is one");
            assert_eq!(certificate.intermediates(), std::slice::from_ref(middle));
            assert_eq!(policy.judge(Some(&certificate), now + 26 * DAY), Ok(()));
        }
    }

    #[test]
    fn client_without_a_certificate_is_served_only_where_it_is_optional() {
        let (authority, now) = (Authority::new("CA").expect("openssl runs"), tomorrow());
        let judge = |auth| policy(auth, &[&authority]).judge_handshake(None, now);
        assert_eq!(judge(ClientAuth::Optional), Ok(None));
        assert_eq!(judge(ClientAuth::Required), Err(Refusal::Missing));
    }

    #[test]
    fn certificate_is_verified_again_if_the_authorities_have_changed_and_never_after_its_expiry() {
        let (root, other) =
            (Authority::new("a").expect("openssl runs"), Authority::new("b").expect("openssl runs"));
        let middle = root.intermediate("middle").expect("openssl runs");
        let now = tomorrow();
        for issuer in [&root, &middle] {
            let chain = chain_of(&issuer.issue("/CN=a", "DNS:a").expect("openssl runs"));
            for auth in [ClientAuth::Optional, ClientAuth::Required] {
                let same = policy(auth, &[&root]);
                let certificate = same.judge_handshake(Some(&chain), now).expect("it is trusted");
                let judge = |policy: &ClientPolicy, now| policy.judge(certificate.as_ref(), now);
                assert_eq!(judge(&same, now), Ok(()));
                assert_eq!(judge(&policy(auth, &[&other, &root]), now), Ok(()));
                let untrusted = judge(&policy(auth, &[&other]), now);
                assert!(matches!(untrusted, Err(Refusal::Untrusted(_))), "{untrusted:?}");
                for (after, result) in [(28 * DAY, Ok(())), (30 * DAY, Err(Refusal::Expired))] {
                    assert_eq!(judge(&same, now + after), result);
                    assert_eq!(judge(&policy(auth, &[&other, &root]), now + after), result);
                }
            }
        }
    }

    #[test]
    fn ticket_context_depends_on_the_policy_and_on_the_set_of_authorities() {
        let (a, b) = (Authority::new("a").expect("openssl runs"), Authority::new("b").expect("openssl runs"));
        let context = |auth, authorities: &[&Authority]| policy(auth, authorities).ticket_context();
        assert_eq!(context(ClientAuth::Required, &[&a, &b]), context(ClientAuth::Required, &[&b, &a, &b]));
        let all = [
            context(ClientAuth::Required, &[&a, &b]),
            context(ClientAuth::Optional, &[&a, &b]),
            context(ClientAuth::Required, &[&a]),
            context(ClientAuth::Required, &[&b]),
        ];
        assert!((0..4).all(|at| !all[..at].contains(&all[at]) && !all[at].is_empty()));
    }
}
