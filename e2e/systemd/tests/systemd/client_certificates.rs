//! Certificates of clients on real systemds, in the example `who`, which answers with the names in them.

use std::path::Path;

use testkit::certificate::{Authority, Certificate};
use testkit::client::{Connection, Http2, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::{on_each_systemd, wait_until};

use crate::on_systemd::{ask_admin, release_without};
use crate::{app_binary, app_package};

on_each_systemd! {
    certificates_of_clients_are_known_after_a_restart_a_reload_and_a_crash
    connection_with_a_certificate_closes_gracefully_before_a_release_that_would_not_know_it
}

const NAMES: &str = "shop spiffe://example.org/shop\n";

/// A container whose service requires certificates of an authority, all from credentials.
struct Partners {
    container: Container,
    server: Certificate,
    client: Certificate,
}

impl Partners {
    /// Boots a container with the installed service, or with an example in its place.
    fn boot(systemd: Systemd, example: Option<&str>) -> Self {
        let authority = Authority::new("CA").expect("openssl runs");
        let client = authority.issue("/CN=shop", "URI:spiffe://example.org/shop").expect("openssl runs");
        let server = Certificate::new().expect("openssl runs");
        let container = Container::boot(systemd, app_package()).expect("the container boots");
        if let Some(example) = example {
            let examples = Path::new(app_binary()).with_file_name("examples");
            container.replace_binary(&examples.join(example)).expect("the binary is installed");
        }
        let authority = std::fs::read_to_string(authority.certificate()).expect("the file is readable");
        container.write("etc/app/tls-client-ca.crt", &authority).expect("the file is written");
        let lines = "[Service]\nLoadCredential=tls-client-ca.crt:/etc/app/tls-client-ca.crt\n\
                     Environment=WHO_TLS_CLIENT_AUTH=https=required APP_TLS_CLIENT_AUTH=https=required\n";
        container.add_to_unit("service", "partners", lines).expect("the file is written");
        container.enable_tls(&server).expect("TLS is enabled");
        container.start_socket("admin").expect("the socket unit starts");
        container.systemctl("start").expect("the start succeeds");
        Self { container, server, client }
    }

    fn target(&self, protocol: &str) -> Target {
        let client = self.server.client_as(&self.client, &[protocol]);
        Target::Tls(([127, 0, 0, 1], 8443).into(), client.expect("the client configuration is valid"))
    }

    fn target_over_tls12(&self, protocol: &str) -> Target {
        let client = self.server.client_over_tls12(Some(&self.client), &[protocol]);
        Target::Tls(([127, 0, 0, 1], 8443).into(), client.expect("the client configuration is valid"))
    }
}

async fn open(target: impl Fn(&str) -> Target) -> (Connection, Http2) {
    let http1 = Connection::open(&target("http/1.1")).await.expect("the port is open");
    (http1, Http2::open(&target("h2")).await.expect("the port is open"))
}

/// The names of the client as the service knows it on both connections.
async fn names((http1, http2): &mut (Connection, Http2)) -> [String; 2] {
    let answer = http2.get("/certificate").await.expect("the request is answered");
    let answer = answer.expect("the connection is open").1;
    [http1.ask(&get("/certificate")).await.expect("the request is answered").text(), answer]
}

fn certificates_of_clients_are_known_after_a_restart_a_reload_and_a_crash(systemd: Systemd) {
    let partners = Partners::boot(systemd, Some("who"));
    let container = &partners.container;
    container.inside(async || {
        let mut clients = open(|protocol| partners.target(protocol)).await;
        let mut over_tls12 = open(|protocol| partners.target_over_tls12(protocol)).await;
        for verb in ["start", "restart", "reload", "restart"] {
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            assert_eq!(names(&mut clients).await, [NAMES; 2], "{verb}");
            assert_eq!(names(&mut over_tls12).await, [NAMES; 2], "{verb}, TLS 1.2");
        }
        let line = "\noutlive_connections_backed_up 4\n";
        wait_until("the connections have duplicates", || ask_admin(container, "/metrics").contains(line));
        let unit = container.unit("service");
        container
            .run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", &unit])
            .expect("the signal is sent");
        assert_eq!(names(&mut clients).await, [NAMES; 2], "after a crash");
        assert_eq!(names(&mut over_tls12).await, [NAMES; 2], "after a crash, TLS 1.2");
    });
    let curl = |certificate: &[&str]| {
        let arguments = ["curl", "--silent", "--show-error", "--max-time", "60", "--cacert"];
        let server = partners.server.chain();
        let server = [server.to_str().expect("the path is UTF-8"), "https://localhost:8443/certificate"];
        let output = container.outside(&[&arguments[..], &server, certificate].concat()).output();
        output.expect("curl runs")
    };
    let (chain, key) = (partners.client.chain(), partners.client.key());
    let [chain, key] = [chain, key].map(|path| path.to_str().expect("the path is UTF-8").to_owned());
    let known = curl(&["--cert", &chain, "--key", &key]);
    assert_eq!(String::from_utf8_lossy(&known.stdout), NAMES, "{}", String::from_utf8_lossy(&known.stderr));
    let anonymous = curl(&[]);
    assert!(
        !anonymous.status.success() && anonymous.stdout.is_empty(),
        "a client without a certificate is served"
    );
}

fn connection_with_a_certificate_closes_gracefully_before_a_release_that_would_not_know_it(systemd: Systemd) {
    let partners = Partners::boot(systemd, None);
    let container = &partners.container;
    let newer = tempfile::NamedTempFile::new().expect("the file is created");
    std::fs::copy(container.binary(), newer.path()).expect("the binary is copied");
    let older = release_without(container, &["takes-header-tables-and-client-certificates"]);
    for verb in ["restart", "reload"] {
        container.replace_binary(newer.path()).expect("the binary is replaced");
        container.systemctl("restart").expect("the restart succeeds");
        let loads = [Load::paced(&partners.target("http/1.1")), Load::http2(&partners.target("h2"))];
        let loads = loads.map(|load| Load { clients: 5, ..load }.start(container.enter()));
        container.replace_binary(older.path()).expect("the binary is replaced");
        let old = container.show("MainPID").expect("systemctl show succeeds");
        container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
        // `systemctl reload` returns before the old process has closed its connections.
        wait_until("the old process has exited", || !container.path(&format!("proc/{old}")).exists());
        for load in loads {
            let report = load.stop();
            assert!(report.lost() == 0 && report.told_to_close > 0, "{verb}: {report}");
        }
    }
}
