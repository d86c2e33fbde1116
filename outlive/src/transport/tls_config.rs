//! The TLS configuration of the https listeners: TLS 1.2 and 1.3 by rustls. The cryptography provider is ring, because
//! it needs only a C compiler to build, also for a static binary.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, anyhow, ensure};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::os::credentials::Credentials;
use crate::transport::client_auth::ClientAuth;
use crate::transport::client_authority::{ClientAuthority, ClientPolicy, Refusal};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::client_tickets::ClientSession;
use crate::transport::tickets::Tickets;
use crate::transport::traffic_secret::FirstSecrets;

/// The names of the files as credentials of the unit (`LoadCredential=`).
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const CLIENT_AUTHORITY: &str = "tls-client-ca.crt";
/// The maximum size of a certificate or key file in bytes. It prevents reading a wrong, endless file such as a device.
const FILE_LIMIT: u64 = 1024 * 1024;

/// The ALPN protocols (RFC 7301); HTTP/2 is preferred.
pub const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// The files of the options. Those that are not given are credentials of the unit.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// A certificate chain and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    pub client_authority: Option<PathBuf>,
}

/// What all https listeners share.
pub struct TlsMaterial {
    certificate: Arc<dyn ResolvesServerCert>,
    /// Present if a listener asks for certificates of clients.
    client_authority: Option<ClientAuthority>,
    /// All listeners have the same keys, because a handover passes on one set of keys.
    tickets: Arc<Tickets>,
    handover: bool,
}

impl TlsMaterial {
    /// Loads the certificate chain and its key, and with `asks_clients` the authorities of clients. `handover` enables the
    /// extraction of secrets, with which another process can continue TLS 1.3 connections.
    pub fn load(
        files: &Files,
        credentials: &Credentials,
        asks_clients: bool,
        handover: bool,
    ) -> anyhow::Result<Self> {
        let (certificate, key) = files.certificate.as_ref().map(|(cert, key)| (&**cert, &**key)).unzip();
        let certificate = certified_key(certificate, key, credentials)?;
        let client_authority = if asks_clients {
            let (name, text) = read(files.client_authority.as_deref(), CLIENT_AUTHORITY, credentials)?;
            Some(ClientAuthority::from_pem(&name, &text)?)
        } else {
            None
        };
        Ok(Self {
            certificate: Arc::new(SingleCertAndKey::from(certificate)),
            client_authority,
            tickets: Arc::new(Tickets::new()?),
            handover,
        })
    }

    /// The configuration of a listener that asks its clients for certificates as `auth` says.
    pub fn tls(&self, auth: Option<ClientAuth>) -> anyhow::Result<Tls> {
        let clients = match (auth, &self.client_authority) {
            (None, _) => None,
            (Some(auth), Some(authority)) => Some(authority.policy(auth)?),
            (Some(_), None) => anyhow::bail!("the authorities of clients are not loaded"),
        };
        let provider = Arc::new(ring::default_provider());
        let mut config =
            server_config(provider, WebPkiClientVerifier::no_client_auth(), self.certificate.clone())?;
        config.enable_secret_extraction = self.handover;
        config.ticketer = self.tickets.clone();
        Ok(Tls { config: Arc::new(config), tickets: self.tickets.clone(), clients })
    }
}

/// The TLS configuration of an https listener.
#[derive(Clone)]
pub struct Tls {
    /// For clients that are not asked for certificates.
    config: Arc<ServerConfig>,
    tickets: Arc<Tickets>,
    /// Present if the listener asks its clients for certificates.
    clients: Option<ClientPolicy>,
}

impl Tls {
    /// The acceptor for one connection. If the connection may be handed over, rustls reports its traffic secrets to
    /// `secrets`.
    pub fn acceptor(&self, secrets: &Arc<FirstSecrets>) -> TlsAcceptor {
        let mut config = match &self.clients {
            None if !self.config.enable_secret_extraction => return self.config.clone().into(),
            None => ServerConfig::clone(&self.config),
            Some(policy) => self.config_for_clients(policy),
        };
        if config.enable_secret_extraction {
            config.key_log = secrets.clone();
        }
        // rustls drops this copy at the end of the handshake, so it costs no memory while the connection is open.
        Arc::new(config).into()
    }

    /// A configuration of one connection, whose session tickets know when its client's certificate expires. It is built
    /// anew, because rustls does not let the verifier of a configuration be replaced.
    fn config_for_clients(&self, policy: &ClientPolicy) -> ServerConfig {
        let session = Arc::new(ClientSession::new(policy.clone(), self.tickets.clone()));
        let (provider, certificate) =
            (self.config.crypto_provider().clone(), self.config.cert_resolver.clone());
        let mut config =
            server_config(provider, session.clone(), certificate).expect("`TlsMaterial::tls` has built one");
        config.enable_secret_extraction = self.config.enable_secret_extraction;
        config.ticketer = session;
        // Sessions in it would outlive the certificates of their clients.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.cert_compression_cache = self.config.cert_compression_cache.clone();
        config
    }

    /// Whether the connections of the listener can be handed over.
    pub fn hands_over(&self) -> bool {
        self.config.enable_secret_extraction
    }

    /// The keys of session tickets to hand over. None if TLS connections are not handed over.
    pub fn tickets(&self) -> Option<&Tickets> {
        self.hands_over().then_some(&*self.tickets)
    }

    /// The certificate of a client whose handshake is complete, which it has presented with `chain`.
    pub fn client_certificate(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
    ) -> Result<Option<ClientCertificate>, Refusal> {
        match &self.clients {
            Some(policy) => policy.judge_handshake(chain, SystemTime::now()),
            None => Ok(None),
        }
    }

    /// Whether the listener may continue a connection of another process whose client has presented `certificate`.
    pub fn may_continue(&self, certificate: Option<&ClientCertificate>) -> Result<(), Refusal> {
        match (&self.clients, certificate) {
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

/// Loads a certificate chain and its key from the given files, or else from the unit's credentials.
fn certified_key(
    cert: Option<&Path>,
    key: Option<&Path>,
    credentials: &Credentials,
) -> anyhow::Result<CertifiedKey> {
    let (certificate, text) = read(cert, CERTIFICATE, credentials)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| not_pem(&certificate, &error))?;
    ensure!(!chain.is_empty(), "{certificate}: contains no PEM certificate");
    let (key, text) = read(key, KEY, credentials)?;
    let key_der = PrivateKeyDer::from_pem_slice(&text).map_err(|error| not_pem(&key, &error))?;
    CertifiedKey::from_der(chain, key_der, &ring::default_provider())
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => anyhow!("the private key does not match the certificate"),
            error => error.into(),
        })
        .with_context(|| format!("{certificate} and {key}"))
}

/// The name of the file at `flag` or of the credential, for errors, and its content.
fn read(
    flag: Option<&Path>,
    credential: &str,
    credentials: &Credentials,
) -> anyhow::Result<(String, Vec<u8>)> {
    let name = flag.map_or_else(|| credential.to_owned(), |path| path.display().to_string());
    let file = match flag {
        Some(path) => File::open(path).with_context(|| format!("could not read {name}"))?,
        None => credentials.open(credential).with_context(|| {
            let (needs, options) = match credential {
                CLIENT_AUTHORITY => ("--tls-client-auth needs", "--tls-client-ca"),
                _ => ("an https listener needs", "--tls-cert and --tls-key"),
            };
            format!(
                "{needs} {credential}: add LoadCredential={credential}:/path/to/{credential} to the unit, or set {options}"
            )
        })??,
    };
    let mut text = Vec::new();
    file.take(FILE_LIMIT + 1).read_to_end(&mut text).with_context(|| format!("could not read {name}"))?;
    ensure!(
        text.len() as u64 <= FILE_LIMIT,
        "{name}: larger than {FILE_LIMIT} bytes, so not a certificate or a key"
    );
    Ok((name, text))
}

fn not_pem(name: &str, error: &pem::Error) -> anyhow::Error {
    let error = match error {
        pem::Error::NoItemsFound => "contains no PEM private key".to_owned(),
        error => format!("invalid PEM: {error}"),
    };
    anyhow!("{name}: {error}")
}
