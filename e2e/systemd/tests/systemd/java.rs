//! The HttpClient of the JDK with its default settings, over restarts and reloads on real systemds.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};

use testkit::certificate::Certificate;
use testkit::container::{Container, Systemd};
use testkit::on_each_systemd;
use testkit::process::Process;
use testkit::verbs::iterations;

use crate::third_party_clients::connections;
use crate::{FOLDER, app_package, boot_with_tls};

const PORT: u16 = 8080;
const TLS_PORT: u16 = 8443;
/// Two for each thread of the client, and far fewer than one for each verb. If connections were closed and opened again
/// between two checks, there would be more.
const CONNECTIONS_LIMIT: usize = 8;
/// The number of requests of each thread of the client between two verbs.
const REQUESTS: u32 = 20;

on_each_systemd! {
    java_keeps_its_http2_connections_and_loses_no_request
    java_offering_h2c_keeps_its_connections_and_loses_no_request
}

/// A running client. It exits when its standard input is closed, so when this is dropped.
struct Java {
    _process: Process,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Java {
    fn start(container: &Container, arguments: &[&str]) -> Self {
        let script = format!("{FOLDER}/e2e/systemd/clients/JavaClient.java");
        let mut command = container.outside(&[&["java", &script], arguments].concat());
        let mut process =
            Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).expect("java starts");
        let input = process.child().stdin.take().expect("the stream is piped");
        let output = BufReader::new(process.child().stdout.take().expect("the stream is piped")).lines();
        Self { _process: process, input, output }
    }

    /// Waits until each thread has sent `more` requests; returns the numbers of answered and lost requests so far.
    fn after(&mut self, more: u32) -> (u64, u64) {
        writeln!(self.input, "{more}").expect("the process runs");
        let line = self.output.next().expect("the process runs").expect("a line is printed");
        let (answered, lost) = line.split_once(' ').expect("the line has two numbers");
        (answered.parse().expect("the value is a number"), lost.parse().expect("the value is a number"))
    }
}

/// JDK 17 drops all requests in flight when it receives GOAWAY, whichever stream id it contains (JDK-8335181), so the
/// service must not send it.
fn java_keeps_its_http2_connections_and_loses_no_request(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let chain = certificate.chain();
    let url = format!("https://127.0.0.1:{TLS_PORT}/");
    let java = Java::start(&container, &[&url, "HTTP_2", chain.to_str().expect("the path is UTF-8")]);
    assert_connections_are_kept(&container, java, TLS_PORT);
}

/// Over plain HTTP the client offers h2c with each request, and the service declines each of these upgrades.
fn java_offering_h2c_keeps_its_connections_and_loses_no_request(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.systemctl("start").expect("the start succeeds");
    let java = Java::start(&container, &[&format!("http://127.0.0.1:{PORT}/"), "HTTP_1_1"]);
    assert_connections_are_kept(&container, java, PORT);
}

/// Restarts and then reloads the service under a client, and asserts that no request is lost and no connection closed.
/// The client may open another connection, because a thread can send a request before the connection of its last one is
/// back in the pool.
fn assert_connections_are_kept(container: &Container, mut java: Java, port: u16) {
    java.after(REQUESTS);
    let mut before = connections(container, port);
    assert!(!before.is_empty());
    for verb in ["restart", "reload"] {
        for _ in 0..iterations() {
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            java.after(REQUESTS);
            let after = connections(container, port);
            let closed: Vec<_> = before.iter().filter(|connection| !after.contains(connection)).collect();
            assert!(closed.is_empty(), "closed by a {verb}: {closed:?} of {before:?}");
            before = after;
        }
        let (answered, lost) = java.after(REQUESTS);
        eprintln!("port {port}, {} times {verb}: {answered} answered so far, {lost} lost", iterations());
        assert_eq!(lost, 0);
    }
    assert!(before.len() <= CONNECTIONS_LIMIT, "{before:?}");
}
