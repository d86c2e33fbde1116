//! [`ServerCertificates`], the certificates of the https listeners. Each handshake uses the one whose names have the server
//! name that the client asks for (SNI, RFC 6066 section 3).

use std::fmt;
use std::sync::Arc;

use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

use super::certificate::{Fields, NameKind};

/// At least one certificate with its key. The first one is the default.
#[derive(Debug)]
pub struct ServerCertificates(Vec<Arc<CertifiedKey>>);

/// How well a certificate is suited for a name. The last one is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    /// It is for other names, or the client asks for none.
    None,
    /// A wildcard of it has the name.
    Wildcard,
    Exact,
}

impl ServerCertificates {
    /// `all` must not be empty.
    pub fn new(all: Vec<CertifiedKey>) -> Self {
        Self(all.into_iter().map(Arc::new).collect())
    }

    /// The first of the certificates that match `name` best. Among those that match equally well, one is preferred whose key
    /// the client supports, so that a name can have an RSA and an ECDSA certificate.
    fn choose(
        &self,
        name: Option<&str>,
        is_supported: impl Fn(&CertifiedKey) -> bool,
    ) -> Option<&Arc<CertifiedKey>> {
        let [only] = &self.0[..] else {
            let rank = |key: &&Arc<CertifiedKey>| (match_of(key, name), is_supported(key));
            // Of equal elements, `max_by_key` returns the last one.
            return self.0.iter().rev().max_by_key(rank);
        };
        Some(only)
    }
}

impl ResolvesServerCert for ServerCertificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let is_supported = |key: &CertifiedKey| key.key.choose_scheme(hello.signature_schemes()).is_some();
        self.choose(hello.server_name(), is_supported).cloned()
    }
}

/// The names of each certificate, and when it expires.
impl fmt::Display for ServerCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, key) in self.0.iter().enumerate() {
            let fields = key.end_entity_cert().map(|certificate| Fields::of(certificate)).unwrap_or_default();
            let names: Vec<_> = fields.alternative_names(NameKind::Dns).collect();
            let names =
                if names.is_empty() { fields.common_name().unwrap_or("-").into() } else { names.join(", ") };
            write!(f, "{}{names}", if at > 0 { "; " } else { "" })?;
            if let Some(end) = fields.expires_at {
                write!(f, " until {}", humantime::format_rfc3339_seconds(end))?;
            }
        }
        Ok(())
    }
}

fn match_of(key: &CertifiedKey, name: Option<&str>) -> Match {
    let of_name = |name: &str| {
        let end_entity = key.end_entity_cert().ok()?;
        let asked_for = ServerName::try_from(name).ok()?;
        verify_server_name(&ParsedCertificate::try_from(end_entity).ok()?, &asked_for).ok()?;
        let mut names = Fields::of(end_entity).alternative_names(NameKind::Dns);
        let is_exact = names.any(|known| known.eq_ignore_ascii_case(name));
        Some(if is_exact { Match::Exact } else { Match::Wildcard })
    };
    name.and_then(of_name).unwrap_or(Match::None)
}

#[cfg(test)]
mod tests {
    use testkit::certificate::Certificate;
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

    use super::*;

    fn certificates(names: &[&str]) -> ServerCertificates {
        let key = |names: &&str| {
            let certificate = Certificate::named(names).expect("openssl runs");
            let chain = vec![CertificateDer::from_pem_file(certificate.chain()).expect("the file is PEM")];
            let key = PrivateKeyDer::from_pem_file(certificate.key()).expect("the file is PEM");
            CertifiedKey::from_der(chain, key, &default_provider()).expect("they belong together")
        };
        ServerCertificates::new(names.iter().map(key).collect())
    }

    /// The position of the certificate for `name`.
    fn chosen(all: &ServerCertificates, name: Option<&str>) -> Option<usize> {
        let chosen = all.choose(name, |_| true)?;
        all.0.iter().position(|key| Arc::ptr_eq(key, chosen))
    }

    #[test]
    fn best_match_is_chosen_and_otherwise_the_first() {
        let names =
            ["DNS:example.org,DNS:*.example.org", "DNS:a.example.org", "DNS:*.example.net,DNS:example.net"];
        let all = certificates(&names);
        for (name, expected) in [
            (None, 0),
            (Some("example.org"), 0),
            (Some("b.example.org"), 0),
            (Some("a.example.org"), 1),
            (Some("A.Example.ORG"), 1),
            (Some("a.b.example.org"), 0),
            (Some("x.example.net"), 2),
            (Some("example.net"), 2),
            (Some("example.com"), 0),
            (Some("*.example.net"), 0),
            (Some(""), 0),
        ] {
            assert_eq!(chosen(&all, name), Some(expected), "{name:?}");
        }
    }

    #[test]
    fn key_that_the_client_supports_is_preferred_among_certificates_of_the_same_name() {
        let all = certificates(&["DNS:a.example.org", "DNS:b.example.org", "DNS:b.example.org"]);
        for (supported, name, expected) in
            [(1, "b.example.org", 1), (2, "b.example.org", 2), (2, "a.example.org", 0)]
        {
            let is_supported = |key: &CertifiedKey| std::ptr::eq(key, Arc::as_ptr(&all.0[supported]));
            let chosen = all.choose(Some(name), is_supported).expect("there is one");
            assert!(Arc::ptr_eq(chosen, &all.0[expected]), "{name}");
        }
    }
}
