//! Clients that nobody here wrote, each as its users run it, over restarts and reloads on real systemds: none loses
//! a request, and what they connected at first they keep.

use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use harness::certificate::Certificate;
use harness::client::Target;
use harness::container::{Container, Package, Systemd};
use harness::on_each_systemd;
use harness::process::without_cargo;

use crate::{BINARY, FOLDER, PACKAGE};

const PLAIN: &str = "http://127.0.0.1:8080";
const TLS: &str = "https://127.0.0.1:8443";
/// How long each asks.
const SECONDS: &str = "3";
/// ... where it counts instead.
const REQUESTS: usize = 200;

on_each_systemd! {
    h2load_and_curl_keep_their_connections
    nghttp_gets_all_that_it_asked_for
    go_keeps_its_connections
    httpx_keeps_its_connection
    grpcio_keeps_its_channel
}

fn boot(systemd: Systemd, binary: &str) -> Container {
    Container::boot(systemd, Package { binary, ..PACKAGE }).expect("a container")
}

fn boot_with_tls(systemd: Systemd, certificate: &Certificate) -> Container {
    let container = boot(systemd, BINARY);
    container.speak_tls(certificate).expect("a certificate");
    container.systemctl("start").expect("a start");
    container
}

/// A client that runs.
struct Client {
    name: String,
    output: JoinHandle<(String, String)>,
}

impl Client {
    fn start(container: &Container, command: &[&str]) -> Self {
        let name = command.join(" ");
        let mut command = container.outside(command);
        let output = std::thread::spawn(move || {
            let output = command.output().expect("a client");
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (text(&output.stdout), text(&output.stderr))
        });
        Self { name, output }
    }

    /// What it wrote.
    fn said(self) -> String {
        let (said, complaints) = self.output.join().expect("a client");
        assert!(complaints.is_empty() && !said.is_empty(), "{}: {said}{complaints}", self.name);
        said
    }

    /// The numbers that it wrote.
    fn counted(self) -> Vec<u64> {
        let name = self.name.clone();
        let said = self.said();
        eprintln!("{name}: {}", said.trim());
        said.split_whitespace().map(|number| number.parse().expect("a number")).collect()
    }
}

/// Restarts and reloads for as long as one of them runs, and `look`s after each.
fn under(container: &Container, clients: &[Client], mut look: impl FnMut()) {
    let mut verbs = 0;
    while !clients.iter().all(|client| client.output.is_finished()) {
        // One after the other: what the restart ends has not had the time for all that it took over.
        for verb in ["reload", "restart"] {
            container.systemctl(verb).unwrap_or_else(|error| panic!("a {verb}: {error:#}"));
            verbs += 1;
            if clients.iter().all(|client| !client.output.is_finished()) {
                look();
            }
        }
        // Some of what clients ask for is to be answered with nothing under way.
        std::thread::sleep(Duration::from_millis(200));
    }
    eprintln!("{verbs} restarts and reloads");
    assert!(verbs >= 2, "{verbs}");
}

/// They never connect again: with a connection that ended all its requests would fail. Many streams on each, with
/// windows of 64 KiB and of 16 MiB; answers, and bodies that are sent back; in the clear and over TLS.
fn h2load_and_curl_keep_their_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let body = container.path("run/body");
    std::fs::write(&body, vec![b'x'; 1 << 20]).expect("written");
    let data = format!("--data={}", body.display());
    let (echo, tls_echo) = (format!("{PLAIN}/echo"), format!("{TLS}/echo"));
    let loads: [&[&str]; 6] = [
        &["--clients=4", "--max-concurrent-streams=100", PLAIN],
        &["--clients=4", "--max-concurrent-streams=10", "-w16", "-W16", PLAIN],
        &["--clients=2", "--max-concurrent-streams=1", "-w16", "-W16", &data, &echo],
        &["--clients=2", "--max-concurrent-streams=3", "-w24", "-W24", &data, &echo],
        &["--clients=4", "--max-concurrent-streams=10", TLS],
        &["--clients=2", "--max-concurrent-streams=1", &data, &tls_echo],
    ];
    let duration = format!("--duration={SECONDS}");
    let mut clients: Vec<Client> = loads
        .iter()
        .map(|load| Client::start(&container, &[&["h2load", &duration], *load].concat()))
        .collect();
    let (chain, many) = (certificate.chain(), format!("{TLS}/sleep?duration=5ms&n=[1-{REQUESTS}]"));
    // TLS 1.2 cannot move: it is told to close.
    let versions: [&[&str]; 3] = [&["--http1.1"], &["--http2"], &["--http1.1", "--tls-max", "1.2"]];
    let curl = ["curl", "--silent", "--max-time", "120", "--output", "/dev/null", "--write-out"];
    let what = ["%{response_code} %{num_connects}\n", &many, "--cacert", chain.to_str().expect("a path")];
    clients.extend(versions.map(|version| Client::start(&container, &[&curl, &what[..], version].concat())));
    under(&container, &clients, || {});
    let curls = clients.split_off(loads.len());
    for load in clients {
        let said = load.said();
        let line = said.lines().find(|line| line.starts_with("requests: ")).unwrap_or(&said);
        eprintln!("{line}");
        assert!(line.contains(" 0 failed, 0 errored, 0 timeout"), "{said}");
        assert!(!line.contains(" 0 succeeded"), "{said}");
    }
    for (curl, version) in curls.into_iter().zip(versions) {
        let answers = curl.said();
        let answered = answers.lines().filter(|line| line.starts_with("200 ")).count();
        let connections = answers.lines().filter(|line| line.ends_with(" 1")).count();
        assert_eq!(answered, REQUESTS, "{version:?}");
        assert_eq!(connections > 1, version.contains(&"1.2"), "{version:?}: {connections}");
    }
}

/// A hundred streams at once on each connection, of which the last ends when many processes have gone by.
fn nghttp_gets_all_that_it_asked_for(systemd: Systemd) {
    let certificate = Certificate::new().expect("a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let clients = [PLAIN, TLS].map(|origin| {
        let streams: Vec<String> =
            (1..=100).map(|n| format!("{origin}/sleep?duration={}ms", n * 50)).collect();
        let mut command = vec!["nghttp", "--null-out", "--stat", "--no-verify-peer"];
        command.extend(streams.iter().map(String::as_str));
        Client::start(&container, &command)
    });
    under(&container, &clients, || {});
    for client in clients {
        let said = client.said();
        let answered = said.lines().filter(|line| line.contains(" 200 ") && line.contains("/sleep?")).count();
        assert_eq!(answered, 100, "{said}");
    }
}

/// net/http, of a Go that keeps to what it has acknowledged (RFC 7541 section 4.2, 1.20 on); over TLS.
fn go_keeps_its_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let (client, chain) = (Path::new(FOLDER).join("target/tools/bin/go-client"), certificate.chain());
    assert!(client.is_file(), "{}: make target/tools/bin/go-client", client.display());
    let (client, chain) = (client.to_str().expect("a path"), chain.to_str().expect("a path"));
    let url = format!("{TLS}/echo");
    let clients = ["HTTP/1.1", "HTTP/2.0"]
        .map(|protocol| Client::start(&container, &[client, &url, SECONDS, protocol, chain]));
    under(&container, &clients, || {});
    for (client, connections) in clients.into_iter().zip([10, 1]) {
        let [answered, lost, made, closed] = client.counted()[..] else { panic!("four numbers") };
        assert!(
            answered > 20 && (lost, made) == (0, connections + closed),
            "{answered} {lost} {made} {closed}"
        );
    }
}

fn httpx_keeps_its_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let (script, chain) = (format!("{FOLDER}/tests/proof/clients/httpx-client.py"), certificate.chain());
    let (url, chain) = (format!("{TLS}/echo"), chain.to_str().expect("a path"));
    let clients = ["HTTP/1.1", "HTTP/2"].map(|protocol| {
        Client::start(&container, &["/usr/bin/python3", &script, &url, SECONDS, protocol, chain])
    });
    under(&container, &clients, || {});
    for client in clients {
        let [answered, lost, made] = client.counted()[..] else { panic!("three numbers") };
        assert!(answered > 20 && (lost, made) == (0, 1), "{answered} {lost} {made}");
    }
}

/// On the library's example of gRPC, as the service of the same units.
fn grpcio_keeps_its_channel(systemd: Systemd) {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--workspace", "--example", "grpc"]).current_dir(FOLDER);
    without_cargo(&mut build);
    assert!(build.status().expect("cargo").success());
    let examples = Path::new(BINARY).with_file_name("examples");
    let container = boot(systemd, examples.join("grpc").to_str().expect("a path"));
    let Target::Tcp(address) = Container::target() else { panic!("TCP") };
    let script = format!("{FOLDER}/tests/proof/clients/grpcio-client.py");
    let clients = [Client::start(&container, &["/usr/bin/python3", &script, &address.to_string(), SECONDS])];
    let connections = || connections(&container, address.port());
    harness::eventually("a connection", || !connections().is_empty());
    let first = connections();
    let mut seen = 0;
    under(&container, &clients, || {
        let now = connections();
        // None: it has just ended.
        assert!(now == first || now.is_empty(), "{now:?} {first:?}");
        seen += now.len();
    });
    assert!(seen > 2, "{seen}");
    let [client] = clients;
    let [answered, lost, ended, broken] = client.counted()[..] else { panic!("four numbers") };
    assert!(answered > 20 && ended > 2 && (lost, broken) == (0, 0), "{answered} {lost} {ended} {broken}");
}

/// The clients' ends of the established connections to a port (proc(5)).
pub fn connections(container: &Container, port: u16) -> Vec<String> {
    const ESTABLISHED: &str = "01";
    let tables = container.run(&["cat", "/proc/net/tcp", "/proc/net/tcp6"]).expect("the kernel's tables");
    let rows = tables.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    let port = format!(":{port:04X}");
    rows.filter(|row| row[2].ends_with(&port) && row[3] == ESTABLISHED).map(|row| row[1].to_owned()).collect()
}
