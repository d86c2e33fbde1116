//! Session tickets of listeners that ask for certificates of clients. rustls resumes a session with the certificate of its
//! first handshake, and verifies that certificate no more. So a ticket can be used only where the same certificates are
//! accepted ([`ClientPolicy::ticket_context`]), and only until the first of them expires: after that the client has to
//! present a certificate anew.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::server::ProducesTickets;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::client_authority::ClientPolicy;
use super::client_certificate::expiry;
use super::tickets::{Tickets, now};

/// The value of a session without a certificate.
const NEVER: u64 = u64::MAX;

/// What rustls uses for one connection: the verifier notes when the certificates of the client expire, and the ticketer adds
/// that to each ticket.
#[derive(Debug)]
pub struct ClientSession {
    policy: ClientPolicy,
    tickets: Arc<Tickets>,
    /// When the first of the client's certificates expires, in seconds since 1970.
    expires_at: AtomicU64,
}

impl ClientSession {
    pub fn new(policy: ClientPolicy, tickets: Arc<Tickets>) -> Self {
        Self { policy, tickets, expires_at: AtomicU64::new(NEVER) }
    }

    fn encrypt_at(&self, now: u64, plain: &[u8]) -> Option<Vec<u8>> {
        let expires_at = self.expires_at.load(Relaxed).to_le_bytes();
        self.tickets.encrypt_at(now, &[&expires_at, plain].concat(), &self.policy.ticket_context())
    }

    fn decrypt_at(&self, now: u64, ticket: &[u8]) -> Option<Vec<u8>> {
        let opened = self.tickets.decrypt_at(now, ticket, &self.policy.ticket_context())?;
        let (expires_at, plain) = opened.split_first_chunk()?;
        let expires_at = u64::from_le_bytes(*expires_at);
        if expires_at < now {
            return None;
        }
        // The tickets of the resumed session have the same certificate.
        self.expires_at.store(expires_at, Relaxed);
        Some(plain.to_vec())
    }
}

impl ProducesTickets for ClientSession {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.tickets.lifetime()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.encrypt_at(now(), plain)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.decrypt_at(now(), ticket)
    }
}

impl ClientCertVerifier for ClientSession {
    fn offer_client_auth(&self) -> bool {
        self.policy.verifier().offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.policy.verifier().client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.policy.verifier().root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.policy.verifier().verify_client_cert(end_entity, intermediates, now)?;
        // The client may send further certificates. Those that have expired were not needed.
        let begun = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let is_valid = |certificate: &&CertificateDer<'_>| {
            expiry(std::iter::once(*certificate)).is_some_and(|end| end >= begun)
        };
        let end = expiry(std::iter::once(end_entity).chain(intermediates.iter().filter(is_valid)));
        let end = end.and_then(|end: SystemTime| end.duration_since(UNIX_EPOCH).ok());
        self.expires_at.store(end.map_or(0, |end| end.as_secs()), Relaxed);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.policy.verifier().verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.policy.verifier().verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.policy.verifier().supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use testkit::certificate::Authority;
    use tokio_rustls::rustls::pki_types::pem::PemObject;

    use super::*;
    use crate::transport::client_auth::ClientAuth;
    use crate::transport::client_authority::ClientAuthority;

    #[test]
    fn ticket_ends_with_the_certificate_of_its_session_and_so_do_those_of_resumed_sessions() {
        let authority = Authority::new("CA").expect("openssl runs");
        let client = authority.issue("/CN=a", "DNS:a").expect("openssl runs");
        let client = CertificateDer::from_pem_file(client.chain()).expect("the file is PEM");
        let text = std::fs::read(authority.certificate()).expect("the file is readable");
        let policy = ClientAuthority::from_pem("ca", &text).and_then(|all| all.policy(ClientAuth::Required));
        let policy = policy.expect("there is an authority");
        let tickets = Arc::new(Tickets::new().expect("random numbers are available"));
        let session = || ClientSession::new(policy.clone(), tickets.clone());
        let (begun, end) = (now() + 1, expiry([&client].into_iter()).expect("it has an end"));
        let end = end.duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs();
        let minute = 60;
        let sealed_at = end - minute;

        let first = session();
        let since = UnixTime::since_unix_epoch(Duration::from_secs(begun));
        first.verify_client_cert(&client, &[], since).expect("it is trusted");
        let ticket = first.encrypt_at(sealed_at, b"first").expect("the ticket can be sealed");
        let resumed = session();
        assert_eq!(resumed.decrypt_at(end, &ticket).as_deref(), Some(&b"first"[..]));
        assert_eq!(session().decrypt_at(end + 1, &ticket), None);
        let next = resumed.encrypt_at(sealed_at, b"next").expect("the ticket can be sealed");
        assert_eq!(session().decrypt_at(end, &next).as_deref(), Some(&b"next"[..]));
        assert_eq!(session().decrypt_at(end + 1, &next), None);

        let anonymous = session().encrypt_at(sealed_at, b"none").expect("the ticket can be sealed");
        assert_eq!(session().decrypt_at(end + 1, &anonymous).as_deref(), Some(&b"none"[..]));
        assert_eq!(tickets.decrypt(&ticket), None, "a listener without certificates opens the ticket");
    }
}
