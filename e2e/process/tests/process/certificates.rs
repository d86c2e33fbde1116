//! Certificates of the service: several of them, and changed files.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use testkit::certificate::{Certificate, ClientConfig};
use testkit::client::{Connection, Http2, Target, get};
use testkit::service::{command, run_to_end};
use testkit::threads::Threadless;
use testkit::tls_service::TlsService;
use testkit::{TEST_TIMEOUT, block_on, free_address, wait_until};
use tokio::time::{sleep, timeout};

use crate::app_binary;

/// Whether the service presents this certificate to a client that asks for `name`.
async fn is_presented(service: &TlsService, name: &str, certificate: &Certificate) -> bool {
    is_presented_at(service.https, name, certificate).await
}

async fn is_presented_at(https: SocketAddr, name: &str, certificate: &Certificate) -> bool {
    let client = certificate.client(&["http/1.1"]).expect("the client configuration is valid");
    let target = Target::Named(name.to_owned(), https, client);
    match Connection::open(&target).await {
        Ok(mut connection) => {
            assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
            true
        }
        Err(_) => false,
    }
}

fn client(certificate: &Certificate, protocol: &str) -> Arc<ClientConfig> {
    certificate.client(&[protocol]).expect("the client configuration is valid")
}

/// Replaces the files of a certificate one at a time, as a program does that renews certificates.
fn replace(certificate: &Certificate, next: &Certificate) {
    for (from, to) in [(next.chain(), certificate.chain()), (next.key(), certificate.key())] {
        let aside = to.with_extension("new");
        fs::copy(from, &aside).expect("the file is copied");
        fs::rename(aside, to).expect("the file is replaced");
    }
}

#[test]
fn each_client_gets_the_certificate_for_the_name_that_it_asks_for() {
    let other = Certificate::named("DNS:example.org,DNS:*.example.org").expect("openssl runs");
    let [chain, key] = [other.chain(), other.key()].map(|path| path.display().to_string());
    let service = TlsService::start(app_binary(), &["--tls-cert", &chain, "--tls-key", &key]);
    let service = service.expect("the service starts");
    block_on(async {
        // The options of `TlsService` follow those above, so `other` is the first and the default.
        for (name, is_other) in [
            ("localhost", false),
            ("example.org", true),
            ("www.example.org", true),
            ("a.b.example.org", false),
        ] {
            assert_eq!(is_presented(&service, name, &other).await, is_other, "{name}");
        }
        assert!(is_presented(&service, "localhost", &service.certificate).await);
    });
}

#[test]
fn options_with_another_number_of_keys_than_certificates_are_refused() {
    let certificate = Certificate::new().expect("openssl runs");
    let [chain, key] = [certificate.chain(), certificate.key()].map(|path| path.display().to_string());
    let options = ["check", "--listen", "https=127.0.0.1:0", "--tls-cert", &format!("{chain},{chain}")];
    let mut command = command(app_binary(), &[&options[..], &["--tls-key", &key]].concat());
    let (code, _, log) = run_to_end(&mut command).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("--tls-cert has 2 files and --tls-key has 1 file: give the key of each"), "{log}");
}

#[test]
fn credentials_with_numbers_are_further_certificates() {
    let certificates = ["DNS:one", "DNS:two", "DNS:three"].map(Certificate::named);
    let certificates = certificates.map(|certificate| certificate.expect("openssl runs"));
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    for (name, certificate) in ["tls", "tls-2", "tls-3"].iter().zip(&certificates) {
        let copy = |from, extension| fs::copy(from, folder.path().join(format!("{name}.{extension}")));
        copy(certificate.chain(), "crt").expect("the file is copied");
        copy(certificate.key(), "key").expect("the file is copied");
    }
    let check = || {
        let mut command = command(app_binary(), &["check", "--listen", "https=127.0.0.1:0"]);
        run_to_end(command.env("CREDENTIALS_DIRECTORY", folder.path())).expect("the process ends")
    };
    assert_eq!(check().0, Some(0), "{}", check().2);
    fs::remove_file(folder.path().join("tls-3.key")).expect("the file is removed");
    let (code, _, log) = check();
    assert!(code == Some(78) && log.contains("could not read the credential \"tls-3.key\""), "{log}");
}

#[test]
fn changed_certificate_is_used_for_new_handshakes_and_open_connections_stay() {
    let mut service =
        TlsService::start(app_binary(), &["--tls-check-interval", "50ms"]).expect("the service starts");
    let next = Certificate::new().expect("openssl runs");
    block_on(async {
        let target = |protocol| Target::Tls(service.https, client(&service.certificate, protocol));
        let mut http1 = Connection::open(&target("http/1.1")).await.expect("the connection opens");
        let mut http2 = Http2::open(&target("h2")).await.expect("the connection opens");
        let renewed = async {
            while !is_presented(&service, "localhost", &next).await {
                sleep(Duration::from_millis(5)).await;
            }
        };
        replace(&service.certificate, &next);
        timeout(TEST_TIMEOUT, renewed).await.expect("the new certificate is used in time");
        assert!(!http1.ask(&get("/")).await.expect("the server answers").closes());
        assert_eq!(http2.get("/").await.expect("the server answers").expect("no GOAWAY").0, 200);
    });
    service.process.signal(Signal::TERM);
    assert!(service.process.wait().expect("the process ends").success());
    let mut log = String::new();
    let stderr = service.process.child().stderr.take().expect("it is piped");
    std::io::Read::read_to_string(&mut { stderr }, &mut log).expect("the log is readable");
    assert!(
        log.contains("certificate files have changed; new TLS handshakes use localhost until 20"),
        "{log}"
    );
}

#[test]
fn changed_certificate_is_used_once_the_kernel_permits_threads_again() {
    let [certificate, next] =
        [Certificate::new(), Certificate::new()].map(|made| made.expect("openssl runs"));
    // The process may have another user.
    let share = |path: &Path, mode| {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("the mode is changed");
    };
    share(certificate.folder(), 0o755);
    for path in [certificate.key(), next.key()] {
        share(&path, 0o644);
    }
    let https = free_address();
    let mut command = command(app_binary(), &["--tls-check-interval", "50ms", "--listen"]);
    command.arg(format!("https={https}")).args([
        "--tls-cert".into(),
        certificate.chain(),
        "--tls-key".into(),
        certificate.key(),
    ]);
    let service = Threadless::spawn(&mut command).expect("the service starts");
    let presents = |certificate| block_on(is_presented_at(https, "localhost", certificate));
    wait_until("the service serves", || presents(&certificate));
    service.permit_threads(false).expect("the limit is set");
    let copy = Certificate::new().expect("openssl runs");
    replace(&copy, &certificate);
    replace(&certificate, &next);
    let refused = "could not start a thread to look at the certificate files";
    // The second time shows that the service has continued after the first one.
    for _ in 0..2 {
        service.wait_for_log(refused).expect("the kernel refuses threads");
    }
    assert!(presents(&copy));
    service.permit_threads(true).expect("the limit is set");
    wait_until("the new certificate is used", || presents(&next));
}
