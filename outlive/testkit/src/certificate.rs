//! [`Certificate`]: a certificate for one test, self-signed or issued by an [`Authority`], and client configurations that
//! trust it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
pub use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::client::{Resumption, WantsClientCert};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::version::TLS12;
use tokio_rustls::rustls::{ALL_VERSIONS, ConfigBuilder, RootCertStore, SupportedProtocolVersion};

/// The extension of a certificate that issues no others.
const END_ENTITY: &str = "basicConstraints=critical,CA:FALSE";

/// A certificate and its key, in a temporary folder.
pub struct Certificate {
    folder: TempDir,
}

impl Certificate {
    /// Creates a self-signed certificate for `localhost` and 127.0.0.1 with the command `openssl`.
    pub fn new() -> Result<Self> {
        Self::named("DNS:localhost,IP:127.0.0.1")
    }

    /// The same, for these subject alternative names, in the syntax of openssl.
    pub fn named(names: &str) -> Result<Self> {
        Self::make("/CN=localhost", &[END_ENTITY, &format!("subjectAltName={names}")], None)
    }

    /// Creates a self-signed certificate for `localhost` that expires after so many days.
    pub fn valid_for(days: u32) -> Result<Self> {
        Self::make_for(days, "/CN=localhost", &[END_ENTITY], None)
    }

    /// Creates a certificate with these extensions. Without an issuer it is self-signed.
    fn make(subject: &str, extensions: &[&str], issuer: Option<&Certificate>) -> Result<Self> {
        Self::make_for(30, subject, extensions, issuer)
    }

    fn make_for(days: u32, subject: &str, extensions: &[&str], issuer: Option<&Certificate>) -> Result<Self> {
        let certificate = Self { folder: tempfile::tempdir()? };
        let mut openssl = Command::new("openssl");
        openssl
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
            .args(["-days", &days.to_string(), "-utf8", "-subj", subject])
            .arg("-keyout")
            .arg(certificate.key())
            .arg("-out")
            .arg(certificate.chain());
        for extension in extensions {
            openssl.args(["-addext", extension]);
        }
        if let Some(issuer) = issuer {
            openssl.arg("-CA").arg(issuer.chain()).arg("-CAkey").arg(issuer.key());
        }
        let made = openssl.output().context("could not run openssl")?;
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

    /// The same, which also presents the certificate `identity` if the server asks for one.
    pub fn client_as(&self, identity: &Certificate, protocols: &[&str]) -> Result<Arc<ClientConfig>> {
        present(builder(&[self], ALL_VERSIONS)?, identity, protocols)
    }

    /// A client that speaks TLS 1.2 only, and presents `identity` if there is one.
    pub fn client_over_tls12(
        &self,
        identity: Option<&Certificate>,
        protocols: &[&str],
    ) -> Result<Arc<ClientConfig>> {
        let builder = builder(&[self], &[&TLS12])?;
        match identity {
            Some(identity) => present(builder, identity, protocols),
            None => Ok(finish(builder.with_no_client_auth(), protocols)),
        }
    }
}

/// An authority that issues certificates.
pub struct Authority {
    own: Certificate,
    /// The authorities between this one and a root, beginning with this one.
    intermediates: String,
}

impl Authority {
    /// A root with this common name.
    pub fn new(name: &str) -> Result<Self> {
        let own = Certificate::make(&format!("/CN={name}"), &["keyUsage=keyCertSign"], None)?;
        Ok(Self { own, intermediates: String::new() })
    }

    /// An authority that this one has certified.
    pub fn intermediate(&self, name: &str) -> Result<Self> {
        let extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=keyCertSign"];
        let own = Certificate::make(&format!("/CN={name}"), &extensions, Some(&self.own))?;
        let intermediates = fs::read_to_string(own.chain())? + &self.intermediates;
        Ok(Self { own, intermediates })
    }

    /// The file of its own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.own.chain()
    }

    /// Issues a certificate with these subject alternative names, in the syntax of openssl. The file of its chain also has
    /// the certificates up to the root.
    pub fn issue(&self, subject: &str, names: &str) -> Result<Certificate> {
        let extensions = [END_ENTITY, &format!("subjectAltName={names}")];
        let issued = Certificate::make(subject, &extensions, Some(&self.own))?;
        let chain = fs::read_to_string(issued.chain())? + &self.intermediates;
        fs::write(issued.chain(), chain)?;
        Ok(issued)
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
    Ok(finish(builder(certificates, ALL_VERSIONS)?.with_no_client_auth(), protocols))
}

fn present(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    identity: &Certificate,
    protocols: &[&str],
) -> Result<Arc<ClientConfig>> {
    let chain = CertificateDer::pem_file_iter(identity.chain())?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(identity.key())?;
    Ok(finish(builder.with_client_auth_cert(chain, key)?, protocols))
}

fn builder(
    certificates: &[&Certificate],
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
    Ok(ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)?
        .with_root_certificates(roots_of(certificates)?))
}

fn finish(mut client: ClientConfig, protocols: &[&str]) -> Arc<ClientConfig> {
    client.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    // With resumption a handshake would not verify the certificate, and a renewed one would not be noticed.
    client.resumption = Resumption::disabled();
    Arc::new(client)
}
