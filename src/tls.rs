//! TLS 1.2 and 1.3 by rustls, with ring as its provider of cryptography: it builds with a C compiler
//! alone, for a static binary too.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::config::Config;

/// What the unit's `LoadCredential=` lines call the two files.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// A file with a certificate or a key is smaller, in bytes.
const FILE_LIMIT: u64 = 1024 * 1024;

/// What HTTP versions are spoken behind TLS, the preferred one first.
pub const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// The certificate and its key: from the flags, else from the unit's credentials (`systemd.exec(5)`).
pub fn acceptor(config: &Config) -> anyhow::Result<TlsAcceptor> {
    let chain_path = path(config.tls_cert.as_deref(), CERTIFICATE)?;
    let key_path = path(config.tls_key.as_deref(), KEY)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(&chain_path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| not_pem(&chain_path, &error))?;
    ensure!(!chain.is_empty(), "{}: no certificate (PEM) in it", chain_path.display());
    let key = PrivateKeyDer::from_pem_slice(&read(&key_path)?).map_err(|error| not_pem(&key_path, &error))?;
    let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => anyhow!("the key is not the certificate's"),
            error => error.into(),
        })
        .with_context(|| format!("{} and {}", chain_path.display(), key_path.display()))?;
    tls.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    tls.ticketer = ring::Ticketer::new()?;
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

fn path(flag: Option<&Path>, credential: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = flag {
        return Ok(path.to_owned());
    }
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").with_context(|| {
        format!("no {credential} for the https listener: LoadCredential={credential}:… in the unit, or --tls-cert and --tls-key")
    })?;
    Ok(Path::new(&folder).join(credential))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read = || {
        let length = std::fs::metadata(path)?.len();
        if length > FILE_LIMIT { Err(io::ErrorKind::FileTooLarge.into()) } else { std::fs::read(path) }
    };
    read().with_context(|| format!("could not read {}", path.display()))
}

fn not_pem(path: &Path, error: &pem::Error) -> anyhow::Error {
    let error = match error {
        pem::Error::NoItemsFound => "nothing of the kind in it".to_owned(),
        error => error.to_string(),
    };
    anyhow!("{}: {error} (PEM is expected)", path.display())
}
