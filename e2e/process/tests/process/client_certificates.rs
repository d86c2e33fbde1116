//! Certificates of clients (`--tls-client-auth`), in the example `who`, which answers with the names in them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustix::process::Signal;
use tempfile::TempDir;
use testkit::certificate::{Authority, Certificate, ClientConfig};
use testkit::client::{Connection, Http2, Target, get};
use testkit::service::{Service, command, run_to_end};
use testkit::tls_service::TlsService;
use testkit::{TEST_TIMEOUT, block_on, free_address};
use tokio::time::timeout;

use crate::app_binary;

const NAMES: &str = "shop spiffe://example.org/shop\n";

fn who() -> String {
    let path = Path::new(app_binary()).with_file_name("examples").join("who");
    path.to_str().expect("the path is valid UTF-8").to_owned()
}

/// The files of a service, and a client whose certificate an authority has issued.
struct Parties {
    folder: TempDir,
    server: Certificate,
    client: Certificate,
}

impl Parties {
    fn new() -> Self {
        let authority = Authority::new("CA").expect("openssl runs");
        let parties = Self {
            folder: tempfile::tempdir().expect("a temporary folder is made"),
            server: Certificate::new().expect("openssl runs"),
            client: client_of(&authority),
        };
        parties.trust(&authority);
        parties
    }

    /// The authorities that the next process trusts.
    fn trust(&self, authority: &Authority) {
        std::fs::copy(authority.certificate(), self.authorities()).expect("the file is copied");
    }

    fn authorities(&self) -> std::path::PathBuf {
        self.folder.path().join("ca.crt")
    }

    fn flags(&self) -> Vec<String> {
        let files = [
            ("--tls-cert", self.server.chain()),
            ("--tls-key", self.server.key()),
            ("--tls-client-ca", self.authorities()),
        ];
        files.into_iter().map(|(option, path)| format!("{option}={}", path.display())).collect()
    }

    fn start(&self, auth: &str) -> Service {
        let (flags, auth) = (self.flags(), format!("--tls-client-auth={auth}"));
        let flags: Vec<_> = flags.iter().map(String::as_str).chain([&auth[..]]).collect();
        Service::start_https(&who(), &flags).expect("the service starts")
    }

    fn config(&self, protocol: &str, client: &Certificate) -> Arc<ClientConfig> {
        self.server.client_as(client, &[protocol]).expect("the client configuration is valid")
    }

    async fn http1(&self, address: SocketAddr) -> Connection {
        let target = Target::Tls(address, self.config("http/1.1", &self.client));
        Connection::open(&target).await.expect("the service accepts the client")
    }

    async fn http2(&self, address: SocketAddr) -> Http2 {
        let target = Target::Tls(address, self.config("h2", &self.client));
        Http2::open(&target).await.expect("the service accepts the client")
    }
}

fn client_of(authority: &Authority) -> Certificate {
    authority.issue("/CN=shop", "URI:spiffe://example.org/shop").expect("openssl runs")
}

/// Asserts that both connections are answered with the names of the client.
async fn are_known(http1: &mut Connection, http2: &mut Http2) {
    assert_eq!(http1.ask(&get("/certificate")).await.expect("the server answers").text(), NAMES);
    let answer = http2.get("/certificate").await.expect("the server answers");
    assert_eq!(answer, Some((200, NAMES.to_owned())));
}

/// Whether a new connection is not served.
async fn is_refused(target: &Target) -> bool {
    // In TLS 1.3 the client completes the handshake before the server refuses its certificate.
    let Ok(mut connection) = Connection::open(target).await else { return true };
    timeout(TEST_TIMEOUT, connection.ask(&get("/"))).await.expect("in time").is_err()
}

#[test]
fn restart_keeps_the_certificates_of_clients_and_closes_connections_of_an_authority_that_is_removed() {
    let parties = Parties::new();
    let mut service = parties.start("https=required");
    let service = block_on(async {
        let address = service.address();
        let anonymous = parties.server.client(&["http/1.1"]).expect("the client configuration is valid");
        let anonymous = Target::Tls(address, anonymous);
        let (mut http1, mut http2) = (parties.http1(address).await, parties.http2(address).await);
        for _ in 0..3 {
            are_known(&mut http1, &mut http2).await;
            assert!(is_refused(&anonymous).await);
            service.signal(Signal::TERM);
            service = service.restart(&who()).expect("the next process starts");
        }
        are_known(&mut http1, &mut http2).await;

        let other = Authority::new("other").expect("openssl runs");
        parties.trust(&other);
        service.signal(Signal::TERM);
        service = service.restart(&who()).expect("the next process starts");
        let ends = timeout(TEST_TIMEOUT, http1.read_more()).await.expect("the connection ends in time");
        assert_eq!(ends.expect("it ends with close_notify"), 0);
        timeout(TEST_TIMEOUT, http2.ended()).await.expect("GOAWAY arrives in time");
        let known = Target::Tls(address, parties.config("http/1.1", &client_of(&other)));
        let mut known = Connection::open(&known).await.expect("the service accepts the client");
        assert_eq!(known.ask(&get("/certificate")).await.expect("the server answers").text(), NAMES);
        assert!(is_refused(&Target::Tls(address, parties.config("http/1.1", &parties.client))).await);
        service
    });
    service.signal(Signal::TERM);
    let (_, log) = service.end().expect("the process ends");
    let line = log.lines().find(|line| line.contains("do not accept the certificate"));
    assert!(line.is_some_and(|line| line.contains("closing 2 connections")), "{log}");
}

#[test]
fn reload_keeps_the_certificates_of_clients_of_one_listener_and_the_other_asks_for_none() {
    let parties = Parties::new();
    let partners = free_address();
    let listen = format!("--listen=https-partners={partners}");
    let ca = format!("--tls-client-ca={}", parties.authorities().display());
    let flags = [&listen[..], "--tls-client-auth=https-partners=required", &ca];
    let mut service = TlsService::start(&who(), &flags).expect("the service starts");
    let parties = Parties {
        server: std::mem::replace(&mut service.certificate, Certificate::new().expect("openssl runs")),
        ..parties
    };
    block_on(async {
        let anonymous = parties.server.client(&["http/1.1"]).expect("the client configuration is valid");
        let (mut http1, mut http2) = (parties.http1(partners).await, parties.http2(partners).await);
        // A listener that does not ask for certificates does not see that the client has one.
        let mut public = parties.http1(service.https).await;
        for is_reloaded in [false, true] {
            if is_reloaded {
                service.process.signal(Signal::HUP);
                service.notifications.wait_for("MAINPID=").expect("a successor takes over");
                service.process.wait().expect("the old process exits");
            }
            are_known(&mut http1, &mut http2).await;
            assert_eq!(public.ask(&get("/certificate")).await.expect("the server answers").status, 403);
            assert_eq!(public.ask(&get("/")).await.expect("the server answers").status, 200);
            assert!(is_refused(&Target::Tls(partners, anonymous.clone())).await);
            assert!(!is_refused(&Target::Tls(service.https, anonymous.clone())).await);
        }
        let main = service.notifications.lines().iter().rev().find_map(|line| line.strip_prefix("MAINPID="));
        testkit::process::terminate(main.expect("it was sent")).expect("the successor runs");
    });
}

#[test]
fn invalid_options_for_client_certificates_are_reported_in_one_line_by_check_too() {
    let parties = Parties::new();
    let empty = parties.folder.path().join("empty");
    std::fs::write(&empty, "no certificate\n").expect("the file is written");
    let empty = format!("--tls-client-ca={}", empty.display());
    let ca = format!("--tls-client-ca={}", parties.authorities().display());
    let cases: [(&[&str], &str); 8] = [
        (&["--tls-client-auth=required"], "--tls-client-auth needs tls-client-ca.crt: add LoadCredential="),
        (&[&ca], "--tls-client-auth"),
        (&["--tls-client-auth=required", &empty], "empty: contains no PEM certificate"),
        (&["--tls-client-auth=required", "--tls-client-ca=/missing"], "could not read /missing"),
        (
            &["--tls-client-auth=https-partner=required", &ca],
            "no https listener has this name; the https listeners are https",
        ),
        (&["--tls-client-auth=optional,required", &ca], "are for the same listeners"),
        (&["--tls-client-auth=http=required", &ca], "listener http does not use TLS"),
        (&["--tls-client-auth=always", &ca], "expected optional or required"),
    ];
    for (options, reason) in cases {
        for subcommand in [&["check"][..], &[]] {
            let mut command = command(&who(), subcommand);
            command.args(["--listen", "https=127.0.0.1:0"]).args(&parties.flags()[..2]).args(options);
            let (code, _, log) = run_to_end(&mut command).expect("the process ends");
            assert_eq!(code, Some(78), "{options:?}: {log}");
            assert!(log.contains(reason) && log.lines().count() == 1, "{options:?}: {log}");
        }
    }
    let mut without_tls =
        command(&who(), &["check", "--listen", "127.0.0.1:0", "--tls-client-auth=required"]);
    let (code, _, log) = run_to_end(&mut without_tls).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("invalid --tls-client-auth required: there is no https listener"), "{log}");

    let credentials = tempfile::tempdir().expect("a temporary folder is made");
    for (name, path) in [
        ("tls.crt", parties.server.chain()),
        ("tls.key", parties.server.key()),
        ("tls-client-ca.crt", parties.authorities()),
    ] {
        std::fs::copy(path, credentials.path().join(name)).expect("the file is copied");
    }
    let mut valid =
        command(&who(), &["check", "--listen", "https=127.0.0.1:0", "--tls-client-auth=required"]);
    valid.env("CREDENTIALS_DIRECTORY", credentials.path());
    let (code, output, log) = run_to_end(&mut valid).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(output.contains("tls-client-auth") && output.contains("required"), "{output}");
}
