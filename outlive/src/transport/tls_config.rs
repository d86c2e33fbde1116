//! The TLS configuration of the https listeners: TLS 1.2 and 1.3 by rustls. The cryptography provider is ring, because
//! it needs only a C compiler to build, also for a static binary.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use anyhow::{Context, anyhow, ensure};
use ring::digest::SHA256_OUTPUT_LEN;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig};

use crate::os::lock::lock;
use crate::transport::client_auth::ClientAuth;
use crate::transport::client_authority::{ClientAuthority, ClientPolicy, Refusal};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::client_tickets::ClientSession;
use crate::transport::server_certificates::ServerCertificates;
use crate::transport::tickets::Tickets;
use crate::transport::tls_files::{NamedText, TlsFiles, TlsTexts};
use crate::transport::traffic_secret::FirstSecrets;

/// The ALPN protocols (RFC 7301); HTTP/2 is preferred.
pub const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// What all https listeners share.
pub struct TlsMaterial {
    files: TlsFiles,
    contents: Contents,
    /// All listeners have the same keys, because a handover passes on one set of keys.
    tickets: Arc<Tickets>,
    handover: bool,
    /// The configurations of the listeners, one for each kind.
    listeners: Vec<(Option<ClientAuth>, Tls)>,
}

/// What was in the files when they were read.
struct Contents {
    /// See [`TlsTexts::digest`].
    digest: [u8; SHA256_OUTPUT_LEN],
    certificates: Arc<ServerCertificates>,
    /// Present if a listener asks for certificates of clients.
    client_authority: Option<ClientAuthority>,
}

impl Contents {
    fn parse(texts: &TlsTexts) -> anyhow::Result<Self> {
        let certificates = texts.certificates.iter().map(certified_key).collect::<anyhow::Result<_>>()?;
        let client_authority = match &texts.client_authority {
            Some(NamedText { name, text }) => Some(ClientAuthority::from_pem(name, text)?),
            None => None,
        };
        let certificates = Arc::new(ServerCertificates::new(certificates));
        Ok(Self { digest: texts.digest(), certificates, client_authority })
    }

    fn policy(&self, auth: Option<ClientAuth>) -> anyhow::Result<Option<ClientPolicy>> {
        let Some(auth) = auth else { return Ok(None) };
        let authority =
            self.client_authority.as_ref().context("the authorities of clients are not loaded")?;
        authority.policy(auth).map(Some)
    }

    /// What a listener uses for new handshakes.
    fn current(
        &self,
        auth: Option<ClientAuth>,
        tickets: &Arc<Tickets>,
        handover: bool,
    ) -> anyhow::Result<Arc<Current>> {
        let provider = Arc::new(default_provider());
        let verifier = WebPkiClientVerifier::no_client_auth();
        let mut config = server_config(provider, verifier, self.certificates.clone())?;
        config.enable_secret_extraction = handover;
        config.ticketer = tickets.clone();
        Ok(Arc::new(Current { config: Arc::new(config), clients: self.policy(auth)? }))
    }
}

impl TlsMaterial {
    /// Loads the files. `handover` enables the extraction of secrets, with which another process can continue
    /// connections.
    pub fn load(files: TlsFiles, handover: bool) -> anyhow::Result<Self> {
        let contents = Contents::parse(&files.read()?)?;
        let tickets = Arc::new(Tickets::new()?);
        Ok(Self { files, contents, tickets, handover, listeners: Vec::new() })
    }

    /// The configuration of a listener that asks its clients for certificates as `auth` says.
    pub fn tls(&mut self, auth: Option<ClientAuth>) -> anyhow::Result<Tls> {
        if let Some((_, tls)) = self.listeners.iter().find(|(known, _)| *known == auth) {
            return Ok(tls.clone());
        }
        let Self { contents, tickets, handover, .. } = self;
        let current = Arc::new(Mutex::new(contents.current(auth, tickets, *handover)?));
        let tls = Tls { current, tickets: tickets.clone(), handover: *handover };
        self.listeners.push((auth, tls.clone()));
        Ok(tls)
    }

    /// Reads the files again. If they have changed, new handshakes use them, and the names and the expiry of the
    /// certificates are returned, with the number of authorities if these have changed. Changes nothing if one of them
    /// cannot be used, or if they change again during `wait`: a program that writes a file in place may have written a
    /// part of it that is valid by itself, such as the first certificates of a chain.
    pub fn renew(&mut self, wait: impl FnOnce()) -> anyhow::Result<Option<String>> {
        let first = self.files.read()?.digest();
        if first == self.contents.digest {
            return Ok(None);
        }
        wait();
        let texts = self.files.read()?;
        if texts.digest() != first {
            return Ok(None);
        }
        let contents = Contents::parse(&texts)?;
        let of = |(auth, _): &(_, Tls)| contents.current(*auth, &self.tickets, self.handover);
        let all = self.listeners.iter().map(of).collect::<anyhow::Result<Vec<_>>>()?;
        for ((_, tls), current) in self.listeners.iter().zip(all) {
            *lock(&tls.current) = current;
        }
        let former = std::mem::replace(&mut self.contents, contents);
        let certificates = self.contents.certificates.to_string();
        // A file that has lost an intermediate certificate is valid, but its clients may not be accepted any more.
        Ok(Some(match (&self.contents.client_authority, former.client_authority) {
            (Some(now), Some(before)) if now.differs_from(&before) => format!(
                "{certificates}; certificates in --tls-client-ca: {} (before: {})",
                now.count(),
                before.count()
            ),
            _ => certificates,
        }))
    }

    /// Reads the certificate and its key from this file from now on.
    #[cfg(test)]
    pub fn read_certificates_from(&mut self, path: std::path::PathBuf) {
        self.files.certificates = vec![(path.clone(), path)];
    }
}

/// The TLS configuration of an https listener. Clones share it, also when its files are renewed.
#[derive(Clone)]
pub struct Tls {
    current: Arc<Mutex<Arc<Current>>>,
    tickets: Arc<Tickets>,
    handover: bool,
}

/// What a listener uses for new handshakes, until a file changes.
struct Current {
    /// For clients that are not asked for certificates.
    config: Arc<ServerConfig>,
    /// Present if the listener asks its clients for certificates.
    clients: Option<ClientPolicy>,
}

/// One handshake of a listener.
pub struct Handshake {
    current: Arc<Current>,
    pub acceptor: TlsAcceptor,
}

impl Handshake {
    /// The certificate of the client after the handshake, in which it has presented `chain`.
    pub fn client_certificate(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
    ) -> Result<Option<ClientCertificate>, Refusal> {
        match &self.current.clients {
            Some(policy) => policy.judge_handshake(chain, SystemTime::now()),
            None => Ok(None),
        }
    }
}

impl Tls {
    fn current(&self) -> Arc<Current> {
        lock(&self.current).clone()
    }

    /// Begins the handshake of one connection. If the connection may be handed over, rustls reports its traffic secrets to
    /// `secrets`.
    pub fn begin(&self, secrets: &Arc<FirstSecrets>) -> Handshake {
        let current = self.current();
        let mut config = match &current.clients {
            None if !self.handover => {
                let acceptor = current.config.clone().into();
                return Handshake { current, acceptor };
            }
            None => ServerConfig::clone(&current.config),
            Some(policy) => self.config_for_clients(policy, &current.config),
        };
        if self.handover {
            config.key_log = secrets.clone();
        }
        // rustls drops this copy at the end of the handshake, so it costs no memory while the connection is open.
        Handshake { current, acceptor: Arc::new(config).into() }
    }

    /// A configuration of one connection, whose session tickets know when its client's certificate expires. It is built
    /// anew, because rustls does not let the verifier of a configuration be replaced.
    fn config_for_clients(&self, policy: &ClientPolicy, shared: &ServerConfig) -> ServerConfig {
        let session = Arc::new(ClientSession::new(policy.clone(), self.tickets.clone()));
        let (provider, certificates) = (shared.crypto_provider().clone(), shared.cert_resolver.clone());
        let mut config = server_config(provider, session.clone(), certificates)
            .expect("`Contents::current` has built one");
        config.enable_secret_extraction = self.handover;
        config.ticketer = session;
        // Sessions in it would outlive the certificates of their clients.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.cert_compression_cache = shared.cert_compression_cache.clone();
        config
    }

    /// Lets new handshakes use only `suite`, without certificates of clients.
    #[cfg(test)]
    pub fn use_suite(&self, suite: rustls::SupportedCipherSuite) {
        let mut current = lock(&self.current);
        let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..default_provider() });
        let verifier = WebPkiClientVerifier::no_client_auth();
        let mut config = server_config(provider, verifier, current.config.cert_resolver.clone())
            .expect("ring has the suite");
        config.enable_secret_extraction = self.handover;
        *current = Arc::new(Current { config: Arc::new(config), clients: None });
    }

    /// Whether the connections of the listener can be handed over.
    pub fn hands_over(&self) -> bool {
        self.handover
    }

    /// The keys of session tickets to hand over. None if TLS connections are not handed over.
    pub fn tickets(&self) -> Option<&Tickets> {
        self.handover.then_some(&*self.tickets)
    }

    /// Whether the listener may continue a connection of another process whose client has presented `certificate`.
    pub fn may_continue(&self, certificate: Option<&ClientCertificate>) -> Result<(), Refusal> {
        match (&self.current().clients, certificate) {
            (Some(policy), certificate) => policy.judge(certificate, SystemTime::now()),
            (None, None) => Ok(()),
            // Its handlers would take the client for one without a certificate.
            (None, Some(_)) => Err(Refusal::NotAskedFor),
        }
    }
}

fn server_config(
    provider: Arc<CryptoProvider>,
    verifier: Arc<dyn ClientCertVerifier>,
    certificate: Arc<dyn ResolvesServerCert>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(config)
}

/// A certificate chain and its key in PEM format.
fn certified_key((certificate, key): &(NamedText, NamedText)) -> anyhow::Result<CertifiedKey> {
    let NamedText { name: certificate, text } = certificate;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|error| not_pem(certificate, &error))?;
    ensure!(!chain.is_empty(), "{certificate}: contains no PEM certificate");
    let NamedText { name: key, text } = key;
    let key_der = PrivateKeyDer::from_pem_slice(text).map_err(|error| not_pem(key, &error))?;
    CertifiedKey::from_der(chain, key_der, &default_provider())
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => anyhow!("the private key does not match the certificate"),
            error => error.into(),
        })
        .with_context(|| format!("{certificate} and {key}"))
}

fn not_pem(name: &str, error: &pem::Error) -> anyhow::Error {
    let error = match error {
        pem::Error::NoItemsFound => "contains no PEM private key".to_owned(),
        error => format!("invalid PEM: {error}"),
    };
    anyhow!("{name}: {error}")
}
