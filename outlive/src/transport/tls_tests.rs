//! TLS configurations for the tests of other files.

use testkit::certificate::{Authority, Certificate};

use super::client_auth::ClientAuth;
use super::tls_config::{Files, Tls, TlsMaterial};
use crate::os::credentials::Credentials;

/// The configuration of a listener with this certificate, which hands its connections over.
pub fn tls_of(certificate: &Certificate) -> Tls {
    tls_for(certificate, None)
}

/// The same, which asks its clients for certificates of this authority.
pub fn tls_for(certificate: &Certificate, clients: Option<(ClientAuth, &Authority)>) -> Tls {
    let material = material_for(certificate, clients.map(|(_, authority)| authority));
    material.tls(clients.map(|(auth, _)| auth)).expect("the TLS configuration is valid")
}

/// What the listeners of a process with these certificates share.
pub fn material_for(certificate: &Certificate, authority: Option<&Authority>) -> TlsMaterial {
    let files = Files {
        certificate: Some((certificate.chain(), certificate.key())),
        client_authority: authority.map(Authority::certificate),
    };
    TlsMaterial::load(&files, &Credentials::default(), authority.is_some(), true)
        .expect("the files are valid")
}
