//! [`Certificate`]: a self-signed certificate for one test, and client configurations that trust it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
pub use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

/// A self-signed certificate for `localhost` and 127.0.0.1, in a temporary folder.
pub struct Certificate {
    folder: TempDir,
}

impl Certificate {
    /// Creates a certificate with the command `openssl`.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let certificate = Self { folder };
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
            .args(["-days", "30", "-subj", "/CN=localhost", "-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
            .arg("-keyout")
            .arg(certificate.key())
            .arg("-out")
            .arg(certificate.chain())
            .output()
            .context("could not run openssl")?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        Ok(certificate)
    }

    /// The folder of both files, which have the names of the service's credentials.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn chain(&self) -> PathBuf {
        self.folder.path().join("tls.crt")
    }

    pub fn key(&self) -> PathBuf {
        self.folder.path().join("tls.key")
    }

    /// Roots of a client that trusts only this certificate.
    pub fn roots(&self) -> Result<RootCertStore> {
        roots_of(&[self])
    }

    /// A client that trusts only this certificate, and offers these protocols (ALPN).
    pub fn client(&self, protocols: &[&str]) -> Result<Arc<ClientConfig>> {
        client_of(&[self], protocols)
    }
}

fn roots_of(certificates: &[&Certificate]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(CertificateDer::from_pem_file(certificate.chain())?)?;
    }
    Ok(roots)
}

/// A client that trusts these certificates, and offers these protocols (ALPN).
pub fn client_of(certificates: &[&Certificate], protocols: &[&str]) -> Result<Arc<ClientConfig>> {
    let mut client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots_of(certificates)?)
        .with_no_client_auth();
    client.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    // With resumption a handshake would not verify the certificate, and a renewed one would not be noticed.
    client.resumption = Resumption::disabled();
    Ok(Arc::new(client))
}
