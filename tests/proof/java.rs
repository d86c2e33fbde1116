//! The JDK's HttpClient, as its users run it, over restarts and reloads on real systemds.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};

use harness::certificate::Certificate;
use harness::container::{Container, Package, Systemd};
use harness::on_each_systemd;
use harness::process::Process;
use harness::verbs::times;

use crate::clients::connections;
use crate::{BINARY, FOLDER, PACKAGE};

const TLS_PORT: u16 = 8443;
/// Requests of each of its threads between two verbs.
const REQUESTS: u32 = 20;

on_each_systemd! {
    java_keeps_its_http2_connection_and_loses_nothing
}

/// A client that runs. Its standard input ends with it, so it ends with its owner.
struct Java {
    _process: Process,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Java {
    fn start(container: &Container, certificate: &Certificate) -> Self {
        let script = format!("{FOLDER}/tests/proof/clients/JavaClient.java");
        let url = format!("https://127.0.0.1:{TLS_PORT}/");
        let chain = certificate.chain();
        let chain = chain.to_str().expect("a path");
        let mut command = container.outside(&["java", &script, &url, "HTTP_2", chain]);
        let mut process =
            Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).expect("java starts");
        let input = process.child().stdin.take().expect("piped");
        let output = BufReader::new(process.child().stdout.take().expect("piped")).lines();
        Self { _process: process, input, output }
    }

    /// The requests answered and lost so far, once each thread has had `more`.
    fn after(&mut self, more: u32) -> (u64, u64) {
        writeln!(self.input, "{more}").expect("it runs");
        let line = self.output.next().expect("it runs").expect("a line");
        let (answered, lost) = line.split_once(' ').expect("two numbers");
        (answered.parse().expect("a number"), lost.parse().expect("a number"))
    }
}

/// JDK 17 drops every request in flight when GOAWAY comes, whatever stream it names (JDK-8335181): all that helps is not
/// to send it.
fn java_keeps_its_http2_connection_and_loses_nothing(systemd: Systemd) {
    let certificate = Certificate::new().expect("a certificate");
    let container = Container::boot(systemd, Package { binary: BINARY, ..PACKAGE }).expect("a container");
    container.speak_tls(&certificate).expect("a certificate");
    container.systemctl("start").expect("a start");
    let mut java = Java::start(&container, &certificate);
    java.after(REQUESTS);
    let first = connections(&container, TLS_PORT);
    for verb in ["restart", "reload"] {
        for _ in 0..times() {
            container.systemctl(verb).unwrap_or_else(|error| panic!("a {verb}: {error:#}"));
            java.after(REQUESTS);
            assert_eq!(connections(&container, TLS_PORT), first, "the same connection after a {verb}");
        }
        let (answered, lost) = java.after(REQUESTS);
        eprintln!("up to {} times {verb}: {answered} answered, {lost} lost", times());
        assert_eq!(lost, 0);
    }
}
