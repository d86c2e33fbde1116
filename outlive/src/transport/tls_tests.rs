//! TLS configurations for the tests of other files.

use testkit::certificate::{Authority, Certificate};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

use super::client_auth::ClientAuth;
use super::tls_config::{Tls, TlsMaterial};
use super::tls_files::TlsFiles;

/// The configuration of a listener with this certificate, which hands its connections over.
pub fn tls_of(certificate: &Certificate) -> Tls {
    tls_for(certificate, None)
}

/// The same, with `--tls-handover no`.
pub fn tls_without_handover(certificate: &Certificate) -> Tls {
    let files =
        TlsFiles { certificates: vec![(certificate.chain(), certificate.key())], ..TlsFiles::default() };
    let material = TlsMaterial::load(files, false);
    material.and_then(|mut material| material.tls(None)).expect("the TLS configuration is valid")
}

/// As [`tls_of`], with a listener that asks its clients for certificates of this authority.
pub fn tls_for(certificate: &Certificate, clients: Option<(ClientAuth, &Authority)>) -> Tls {
    let mut material = material_for(certificate, clients.map(|(_, authority)| authority));
    material.tls(clients.map(|(auth, _)| auth)).expect("the TLS configuration is valid")
}

/// What the listeners of a process with these certificates share.
pub fn material_for(certificate: &Certificate, authority: Option<&Authority>) -> TlsMaterial {
    let files = TlsFiles {
        certificates: vec![(certificate.chain(), certificate.key())],
        client_authority: authority.map(Authority::certificate),
        asks_clients: authority.is_some(),
        ..TlsFiles::default()
    };
    TlsMaterial::load(files, true).expect("the files are valid")
}

/// All certificates in a file.
pub fn chain_of(certificate: &Certificate) -> Vec<CertificateDer<'static>> {
    let chain = CertificateDer::pem_file_iter(certificate.chain()).expect("the file is readable");
    chain.collect::<Result<_, _>>().expect("the file is PEM")
}
