//! The TLS configuration of the https listeners: TLS 1.2 and 1.3 by rustls. The cryptography provider is ring, because
//! it needs only a C compiler to build, also for a static binary.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::os::credentials::Credentials;
use crate::transport::tickets::Tickets;
use crate::transport::traffic_secret::FirstSecrets;

/// The names of the two files as credentials of the unit (`LoadCredential=`).
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// The maximum size of a certificate or key file in bytes. It prevents reading a wrong, endless file such as a device.
const FILE_LIMIT: u64 = 1024 * 1024;

/// The TLS configuration of the https listeners.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ServerConfig>,
    /// The ticket keys to hand over; `None` if TLS connections are not handed over.
    pub tickets: Option<Arc<Tickets>>,
}

impl Tls {
    /// The acceptor for one connection. If the connection may be handed over, rustls reports its traffic secrets to
    /// `secrets`.
    pub fn acceptor(&self, secrets: &Arc<FirstSecrets>) -> TlsAcceptor {
        if !self.config.enable_secret_extraction {
            return self.config.clone().into();
        }
        // rustls drops this copy at the end of the handshake, so it costs no memory while the connection is open.
        let mut config = ServerConfig::clone(&self.config);
        config.key_log = secrets.clone();
        Arc::new(config).into()
    }
}

/// The ALPN protocols (RFC 7301); HTTP/2 is preferred.
pub const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// Loads the certificate chain and its key, from the given files or else from the unit's credentials. `handover`
/// enables the extraction of secrets, with which another process can continue TLS 1.3 connections.
pub fn acceptor(
    cert: Option<&Path>,
    key: Option<&Path>,
    credentials: &Credentials,
    handover: bool,
) -> anyhow::Result<Tls> {
    let (certificate, text) = read(cert, CERTIFICATE, credentials)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| not_pem(&certificate, &error))?;
    ensure!(!chain.is_empty(), "{certificate}: contains no PEM certificate");
    let (key, text) = read(key, KEY, credentials)?;
    let key_der = PrivateKeyDer::from_pem_slice(&text).map_err(|error| not_pem(&key, &error))?;
    let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => anyhow!("the private key does not match the certificate"),
            error => error.into(),
        })
        .with_context(|| format!("{certificate} and {key}"))?;
    tls.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    tls.enable_secret_extraction = handover;
    let tickets = Arc::new(Tickets::new()?);
    tls.ticketer = tickets.clone();
    Ok(Tls { config: Arc::new(tls), tickets: handover.then_some(tickets) })
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
            format!(
                "an https listener needs {credential}: add LoadCredential={credential}:/path/to/{credential} to the \
                 unit, or set --tls-cert and --tls-key"
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
