//! [`TlsRenewal`], which takes changed certificate files over while the process serves (`--tls-check-interval`).
//!
//! The files are read and compared at each interval, because they may be replaced in any way: in place, by a rename, or
//! through a symbolic link to a folder. Files that cannot be used change nothing.

use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::tls_config::TlsMaterial;
use crate::os::lock::lock;
use crate::os::task;

/// How long changed files must stay the same before they are used. A program usually writes a certificate file in less time.
const WRITE_TIME: Duration = Duration::from_millis(200);
/// How many reasons of failures are remembered until the files can be used again.
const REASONS: usize = 8;

/// The result of one look at the files.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Check {
    /// The files are those in use, or a failure that is not new.
    NothingNew,
    /// They have changed, and are in use now. The text names what is in use.
    Renewed(String),
    /// They cannot be used. The text is the reason, which is new.
    Failed(String),
}

/// Why files that were read could not be used.
struct Failure {
    reason: String,
    is_reported: bool,
}

pub struct TlsRenewal {
    material: TlsMaterial,
    /// The failures since the files could be used, at most [`REASONS`], so that each of several reasons that alternate is
    /// reported once. If there are more reasons, the list is cleared and begins anew.
    failures: Vec<Failure>,
}

impl TlsRenewal {
    pub fn new(material: TlsMaterial) -> Self {
        Self { material, failures: Vec::new() }
    }

    /// Looks at the files once in each `period`, until the process ends.
    pub async fn run(self, period: Duration) {
        let renewal = Arc::new(Mutex::new(self));
        let mut clock = interval(period);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            // A file system can be slow.
            let looked = task::on_thread({
                let renewal = renewal.clone();
                move || lock(&renewal).check()
            });
            let looked = match looked {
                Ok(looked) => looked.await.unwrap_or(Check::NothingNew),
                Err(error) => {
                    warn!(%error, "could not start a thread to look at the certificate files; retrying");
                    continue;
                }
            };
            match looked {
                Check::NothingNew => {}
                Check::Renewed(certificates) => {
                    info!("certificate files have changed; new TLS handshakes use {certificates}");
                }
                Check::Failed(reason) => {
                    error!(
                        "could not use changed certificate files, so the former ones stay in use: {reason}"
                    );
                }
            }
        }
    }

    /// A failure is reported at its second occurrence, because the program that replaces a certificate and its key may have
    /// replaced only one of them yet. If the list of reasons is full, a
    /// new reason is reported at once.
    fn check(&mut self) -> Check {
        let reason = match self.material.renew(|| sleep(WRITE_TIME)) {
            Ok(renewed) => {
                self.failures.clear();
                return renewed.map_or(Check::NothingNew, Check::Renewed);
            }
            Err(error) => format!("{error:#}"),
        };
        if let Some(failure) = self.failures.iter_mut().find(|failure| failure.reason == reason) {
            let is_new = !std::mem::replace(&mut failure.is_reported, true);
            return if is_new { Check::Failed(reason) } else { Check::NothingNew };
        }
        if self.failures.len() == REASONS {
            // The reasons may be different each time, and would never be reported.
            self.failures.clear();
            return Check::Failed(reason);
        }
        self.failures.push(Failure { reason, is_reported: false });
        Check::NothingNew
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use testkit::certificate::{Authority, Certificate};
    use tokio_rustls::rustls::{ClientConnection, ServerConnection};

    use super::*;
    use crate::transport::client_auth::ClientAuth;
    use crate::transport::client_authority::Refusal;
    use crate::transport::client_certificate::ClientCertificate;
    use crate::transport::tls_config::Tls;
    use crate::transport::tls_tests::{chain_of, material_for};

    /// The material of a process, with the files that it reads.
    struct Files {
        server: Certificate,
        authority: Authority,
        tls: Tls,
        /// Of a listener that requires certificates.
        strict: Tls,
        renewal: TlsRenewal,
    }

    fn files() -> Files {
        let server = Certificate::new().expect("openssl runs");
        let authority = Authority::new("CA").expect("openssl runs");
        let mut material = material_for(&server, Some(&authority));
        let tls = material.tls(None).expect("a configuration");
        let strict = material.tls(Some(ClientAuth::Required)).expect("a configuration");
        Files { server, authority, tls, strict, renewal: TlsRenewal::new(material) }
    }

    /// Whether a client that trusts only this certificate accepts that of a new handshake.
    fn presents(tls: &Tls, certificate: &Certificate, name: &'static str) -> bool {
        let config = certificate.client(&[]).expect("the client configuration is valid");
        let name = name.try_into().expect("the name is valid");
        let mut client = ClientConnection::new(config, name).expect("the client configuration is valid");
        let handshake = tls.begin(&Arc::default());
        let mut server = ServerConnection::new(handshake.acceptor.config().clone()).expect("a configuration");
        while client.is_handshaking() {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).expect("bytes are written");
            }
            server.read_tls(&mut &bytes[..]).expect("the bytes are read");
            server.process_new_packets().expect("the client is valid");
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).expect("bytes are written");
            }
            let mut bytes = &bytes[..];
            while !bytes.is_empty() {
                client.read_tls(&mut bytes).expect("the bytes are read");
                if client.process_new_packets().is_err() {
                    return false;
                }
            }
        }
        true
    }

    fn replace(by: &Certificate, at: &Certificate, what: fn(&Certificate) -> std::path::PathBuf) {
        fs::copy(what(by), what(at)).expect("the file is replaced");
    }

    #[test]
    fn changed_files_are_used_once_they_belong_together() {
        let Files { server, authority: _authority, tls, mut renewal, .. } = files();
        let copy = Certificate::named("DNS:next").expect("openssl runs");
        let next = Certificate::named("DNS:next").expect("openssl runs");
        replace(&server, &copy, Certificate::chain);
        assert_eq!(renewal.check(), Check::NothingNew);
        replace(&next, &server, Certificate::chain);
        assert_eq!(renewal.check(), Check::NothingNew);
        assert!(presents(&tls, &copy, "localhost"));
        replace(&next, &server, Certificate::key);
        let Check::Renewed(text) = renewal.check() else { panic!("the files are valid") };
        assert!(text.starts_with("next until 20"), "{text}");
        assert!(presents(&tls, &next, "next") && !presents(&tls, &copy, "localhost"));
        assert_eq!(renewal.check(), Check::NothingNew);
    }

    #[test]
    fn bad_files_are_reported_once_with_the_reason_and_change_nothing() {
        let Files { server, authority: _authority, tls, mut renewal, .. } = files();
        let valid = fs::read(server.chain()).expect("the file is readable");
        let other = Certificate::new().expect("openssl runs");
        for (text, reason) in [
            (b"no PEM".to_vec(), "contains no PEM certificate"),
            (fs::read(other.chain()).expect("the file is readable"), "does not match the certificate"),
        ] {
            fs::write(server.chain(), text).expect("the file is written");
            assert_eq!(renewal.check(), Check::NothingNew);
            let Check::Failed(text) = renewal.check() else { panic!("the files are invalid") };
            assert!(text.contains(reason) && text.contains("tls.crt"), "{text}");
            assert_eq!((renewal.check(), renewal.check()), (Check::NothingNew, Check::NothingNew));
        }
        fs::remove_file(server.chain()).expect("the file is removed");
        assert_eq!(renewal.check(), Check::NothingNew);
        assert!(matches!(renewal.check(), Check::Failed(text) if text.contains("could not read")));
        fs::write(server.chain(), valid).expect("the file is written");
        assert!(presents(&tls, &server, "localhost"));
        assert_eq!(renewal.check(), Check::NothingNew);
    }

    #[test]
    fn failures_that_alternate_are_reported_once_each() {
        let Files { server, authority: _authority, tls: _tls, mut renewal, .. } = files();
        let other =
            fs::read(Certificate::new().expect("openssl runs").chain()).expect("the file is readable");
        let mut reported = Vec::new();
        for round in 0..10 {
            let text = if round % 2 == 0 { b"no PEM" } else { &other[..] };
            fs::write(server.chain(), text).expect("the file is written");
            if let Check::Failed(reason) = renewal.check() {
                reported.push((round, reason.contains("contains no PEM certificate")));
            }
        }
        assert_eq!(reported, [(2, true), (3, false)]);
    }

    #[test]
    fn one_of_several_failures_that_are_always_new_is_reported() {
        let Files { server, authority: _authority, tls: _tls, mut renewal, .. } = files();
        let mut failed = |round| {
            let path = server.folder().join(format!("missing-{round}"));
            renewal.material.read_certificates_from(path);
            matches!(renewal.check(), Check::Failed(_))
        };
        let reported: Vec<_> = (0..2 * REASONS).filter(|round| failed(*round)).collect();
        assert_eq!(reported, [REASONS]);
    }

    /// A file that is written in part can be valid, but lacks some of the certificates.
    #[test]
    fn file_that_is_being_written_is_used_when_it_is_complete() {
        let Files { server: _server, authority, strict, mut renewal, .. } = files();
        let other = Authority::new("other").expect("openssl runs");
        let client = authority.issue("/CN=a", "DNS:a").expect("openssl runs");
        // Verified by other authorities, so that it is verified again.
        let client = ClientCertificate::verified(chain_of(&client).remove(0), Vec::new(), [0; 32]);
        let path = authority.certificate();
        let texts = [&other, &authority].map(|part| fs::read(part.certificate()).expect("it is readable"));
        fs::write(&path, &texts[0]).expect("the file is written");
        let complete = || fs::write(&path, texts.concat()).expect("the file is written");
        let renewed = renewal.material.renew(complete).expect("the files are valid");
        assert_eq!(renewed, None);
        assert_eq!(strict.may_continue(Some(&client)), Ok(()));
        assert!(matches!(renewal.check(), Check::Renewed(_)));
        assert_eq!(strict.may_continue(Some(&client)), Ok(()));
    }

    #[test]
    fn changed_authorities_apply_to_new_handshakes() {
        let Files { server: _server, authority, strict, mut renewal, .. } = files();
        let other = Authority::new("other").expect("openssl runs");
        let client = |authority: &Authority| {
            let certificate = authority.issue("/CN=a", "DNS:a").expect("openssl runs");
            // Verified by other authorities, so that it is verified again.
            ClientCertificate::verified(chain_of(&certificate).remove(0), Vec::new(), [0; 32])
        };
        let (known, unknown) = (client(&authority), client(&other));
        let judge = |client| strict.may_continue(Some(client));
        assert!(judge(&known).is_ok() && matches!(judge(&unknown), Err(Refusal::Untrusted(_))));
        fs::copy(other.certificate(), authority.certificate()).expect("the file is replaced");
        let Check::Renewed(text) = renewal.check() else { panic!("the files are valid") };
        assert!(text.ends_with("; certificates in --tls-client-ca: 1 (before: 1)"), "{text}");
        assert!(judge(&unknown).is_ok() && matches!(judge(&known), Err(Refusal::Untrusted(_))));
    }
}
