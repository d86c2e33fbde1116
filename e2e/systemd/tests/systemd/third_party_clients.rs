//! Clients from other projects, each with its usual settings, over restarts and reloads on real systemds. They lose no
//! request and keep their first connections.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use testkit::certificate::Certificate;
use testkit::client::Target;
use testkit::container::{Container, Package, Systemd};
use testkit::process::Process;
use testkit::{TEST_TIMEOUT, on_each_systemd, wait_until};

use crate::{FOLDER, app_package, boot_with_tls};

const PLAIN: &str = "http://127.0.0.1:8080";
const TLS: &str = "https://127.0.0.1:8443";
const PLAIN_PORT: u16 = 8080;
const TLS_PORT: u16 = 8443;
/// How often the service is reloaded and restarted while clients send requests.
pub const ROUNDS: usize = 5;
/// Seconds after which a client exits by itself, so that a test that hangs does not leave it behind.
pub const LIMIT: &str = "300";

on_each_systemd! {
    h2load_and_curl_keep_their_connections
    nghttp_receives_all_responses
    go_keeps_its_connections
    httpx_keeps_its_connection
    grpcio_keeps_its_channel_and_its_stream
}

fn boot(systemd: Systemd, binary: &str) -> Container {
    Container::boot(systemd, Package { binary, ..app_package() }).expect("the container boots")
}

/// A running client.
pub struct Client {
    name: String,
    process: Process,
    /// The client exits when this is closed.
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    printed: Vec<String>,
    errors: JoinHandle<String>,
}

impl Client {
    /// Starts a client of this machine in the network of the container.
    pub fn start(container: &Container, command: &[&str]) -> Self {
        Self::spawn(command.join(" "), container.outside(command))
    }

    /// Starts a client that is installed in the container. The environment of the test can name files that the container
    /// does not have, so the client does not get it.
    pub fn start_inside(container: &Container, command: &[&str]) -> Self {
        let mut inside = container.command(command);
        inside.env_clear().env("PATH", "/usr/bin");
        Self::spawn(command.join(" "), inside)
    }

    fn spawn(name: String, mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command).expect("the client starts");
        let child = process.child();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("the stream is piped"));
        let mut stderr = child.stderr.take().expect("the stream is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                // The receiver is gone if the test has failed.
                let _ = sender.send(line.expect("the text is UTF-8"));
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).expect("the output is readable");
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { name, process, stdin, lines, printed: Vec::new(), errors }
    }

    fn runs(&mut self) -> bool {
        !self.process.ends_within(Duration::ZERO).expect("the process can be polled")
    }

    /// Waits until the client has printed the line `wanted` `count` times.
    pub fn wait_for(&mut self, wanted: &str, count: usize) {
        while self.printed.iter().filter(|line| *line == wanted).count() < count {
            let line = self.lines.recv_timeout(TEST_TIMEOUT);
            let line = line.unwrap_or_else(|_| panic!("{}: {count} times {wanted:?}", self.name));
            self.printed.push(line);
        }
    }

    /// The lines that were read so far.
    pub fn printed(&self) -> &[String] {
        &self.printed
    }

    /// Waits until a request that begins after this call is answered. The client has to print "answered" for each line
    /// of standard input.
    fn is_answered(&mut self) {
        let before = self.printed.iter().filter(|line| *line == "answered").count();
        self.stdin.as_mut().expect("the socket is active").write_all(b"\n").expect("the client runs");
        self.wait_for("answered", before + 1);
    }

    /// Closes standard input and waits until the client exits; returns its standard output.
    fn output(mut self) -> String {
        drop(self.stdin.take());
        let status = self.process.wait().unwrap_or_else(|error| panic!("{}: {error:#}", self.name));
        self.printed.extend(self.lines.iter());
        let (output, errors) =
            (self.printed.join("\n"), self.errors.join().expect("the thread does not panic"));
        assert!(errors.is_empty() && !output.is_empty(), "{}: {status}: {output}{errors}", self.name);
        output
    }

    /// As `output`; returns the numbers of its last line.
    pub fn last_numbers(self) -> Vec<u64> {
        let name = self.name.clone();
        let output = self.output();
        let last = output.lines().next_back().expect("a line is printed");
        eprintln!("{name}: {last}");
        last.split_whitespace().map(|number| number.parse().expect("the value is a number")).collect()
    }
}

/// Reloads and restarts the service while all of these clients send requests, and calls `check` after each round.
pub fn reload_and_restart(
    container: &Container,
    clients: &mut [Client],
    mut check: impl FnMut(&mut [Client], usize),
) {
    clients.iter_mut().for_each(Client::is_answered);
    for round in 1..=ROUNDS {
        // In a row, so that the restart ends a process that is still adopting connections of the reload.
        for verb in ["reload", "restart"] {
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
        }
        // And a request while no process is being replaced.
        clients.iter_mut().for_each(Client::is_answered);
        check(clients, round);
    }
}

/// As `reload_and_restart`, for clients that run for a fixed time: `start` starts them for about the given number of
/// seconds. They are started again, each time for longer, until `wanted` reloads and restarts have begun while all of
/// them were running, which they are when there are `connected` connections to both ports. `check` checks each run.
fn reload_and_restart_during_runs(
    container: &Container,
    wanted: usize,
    connected: usize,
    start: impl Fn(u64) -> Vec<Client>,
    mut check: impl FnMut(u64, Vec<Client>),
) {
    let mut begun = 0;
    for seconds in [3, 6, 12, 24, 48, 96] {
        let mut clients = start(seconds);
        wait_until("all clients are connected", || {
            let both = [PLAIN_PORT, TLS_PORT].map(|port| connections(container, port).len());
            both.iter().sum::<usize>() >= connected || !clients.iter_mut().all(Client::runs)
        });
        while clients.iter_mut().any(Client::runs) {
            // In a row, as in `reload_and_restart`.
            for verb in ["reload", "restart"] {
                begun += usize::from(clients.iter_mut().all(Client::runs));
                container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            }
        }
        check(seconds, clients);
        if begun >= wanted {
            return;
        }
    }
    panic!("only {begun} reloads and restarts began while all clients were running");
}

/// h2load never connects again, so if a connection were closed, its remaining requests would fail. The runs have one
/// and many streams, windows of 64 KiB and of 16 MiB, GET and POST, with and without TLS.
fn h2load_and_curl_keep_their_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let body = container.path("run/body");
    std::fs::write(&body, vec![b'x'; 1 << 20]).expect("the file is written");
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
    let chain = certificate.chain();
    let versions: [&[&str]; 4] =
        [&["--http1.1"], &["--http2"], &["--http1.1", "--tls-max", "1.2"], &["--http2", "--tls-max", "1.2"]];
    let requests = |seconds: u64| seconds * 60;
    let start = |seconds: u64| {
        let duration = format!("--duration={seconds}");
        let many = format!("{TLS}/sleep?duration=5ms&n=[1-{}]", requests(seconds));
        let curl = ["curl", "--silent", "--max-time", "120", "--output", "/dev/null", "--write-out"];
        let what = [
            "%{response_code} %{num_connects}\n",
            &many,
            "--cacert",
            chain.to_str().expect("the path is UTF-8"),
        ];
        let loads = loads.map(|load| [&["h2load", &duration], load].concat());
        let curls = versions.map(|version| [&curl, &what[..], version].concat());
        loads.iter().chain(&curls).map(|command| Client::start(&container, command)).collect()
    };
    reload_and_restart_during_runs(&container, 2 * ROUNDS, 22, start, |seconds, mut clients| {
        let curls = clients.split_off(loads.len());
        for load in clients {
            let output = load.output();
            let line = output.lines().find(|line| line.starts_with("requests: ")).unwrap_or(&output);
            eprintln!("{line}");
            assert!(line.contains(" 0 failed, 0 errored, 0 timeout"), "{output}");
            assert!(!line.contains(" 0 succeeded"), "{output}");
        }
        for (curl, version) in curls.into_iter().zip(versions) {
            let answers = curl.output();
            let count = |is_it: fn(&&str) -> bool| answers.lines().filter(is_it).count();
            assert_eq!(count(|line| line.starts_with("200 ")) as u64, requests(seconds), "{version:?}");
            assert_eq!(count(|line| line.ends_with(" 1")), 1, "{version:?}");
        }
    });
}

/// A hundred streams at once on each connection, so that some are in flight when the reload and the restart begin.
fn nghttp_receives_all_responses(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let start = |seconds: u64| {
        let client = |origin: &str| {
            let url = |n: u64| format!("{origin}/sleep?duration={}ms", seconds * n * 10);
            let streams: Vec<String> = (1..=100).map(url).collect();
            let mut command = vec!["nghttp", "--null-out", "--stat", "--no-verify-peer"];
            command.extend(streams.iter().map(String::as_str));
            Client::start(&container, &command)
        };
        [PLAIN, TLS].map(client).into()
    };
    reload_and_restart_during_runs(&container, 2, 2, start, |_, clients| {
        for client in clients {
            let output = client.output();
            let is_answer = |line: &&str| line.contains(" 200 ") && line.contains("/sleep?");
            assert_eq!(output.lines().filter(is_answer).count(), 100, "{output}");
        }
    });
}

/// net/http over TLS. Go 1.19 ignores the header table size that the server announces.
fn go_keeps_its_connections(systemd: Systemd) {
    const VERSIONS: [&str; 2] = ["1.19", "1.24"];
    const PROTOCOLS: [(&str, u64); 2] = [("HTTP/1.1", 10), ("HTTP/2.0", 1)];
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let chain = certificate.chain();
    let (url, chain) = (format!("{TLS}/echo"), chain.to_str().expect("the path is UTF-8"));
    let all = VERSIONS.iter().flat_map(|version| PROTOCOLS.map(|protocol| (version, protocol)));
    let (begun, mut clients): (Vec<_>, Vec<_>) = all
        .map(|(version, (protocol, connections))| {
            let client = format!("{FOLDER}/target/tools/bin/go-{version}-client");
            assert!(Path::new(&client).is_file(), "{client} is missing: make e2e-deps");
            let command = [&client, &url, LIMIT, protocol, chain];
            ((version, protocol, connections), Client::start(&container, &command))
        })
        .unzip();
    reload_and_restart(&container, &mut clients, |_, _| {});
    for (client, (version, protocol, connections)) in clients.into_iter().zip(begun) {
        let [answered, lost, made, closed] = client.last_numbers()[..] else {
            panic!("the last line has four numbers")
        };
        // net/http closes an HTTP/2 connection by itself only after GOAWAY.
        let closes_by_itself = protocol == "HTTP/1.1";
        // Ten goroutines, each answered in each of five rounds.
        assert!(
            answered > 50 && (lost, made) == (0, connections + closed) && (closes_by_itself || closed == 0),
            "{version}, {protocol}: {answered} {lost} {made} {closed}"
        );
    }
}

fn httpx_keeps_its_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let (script, chain) = (format!("{FOLDER}/e2e/systemd/clients/httpx-client.py"), certificate.chain());
    let (url, chain) = (format!("{TLS}/echo"), chain.to_str().expect("the path is UTF-8"));
    let mut clients = ["HTTP/1.1", "HTTP/2"].map(|protocol| {
        Client::start(&container, &["/usr/bin/python3", &script, &url, LIMIT, protocol, chain])
    });
    reload_and_restart(&container, &mut clients, |_, _| {});
    for client in clients {
        let [answered, lost, made] = client.last_numbers()[..] else {
            panic!("the last line has three numbers")
        };
        // At least one request before the first round and one in each.
        assert!(answered > ROUNDS as u64 && (lost, made) == (0, 1), "{answered} {lost} {made}");
    }
}

/// With the gRPC example as the service of the same units.
fn grpcio_keeps_its_channel_and_its_stream(systemd: Systemd) {
    // A test is built too, because cargo then chooses the same features as for this one.
    let arguments = ["--workspace", "--bin", "grpc", "--test", "grpc"];
    let grpc = testkit::binaries::build(&Path::new(FOLDER).join("e2e"), &arguments, "grpc");
    let container = boot(systemd, &grpc);
    let Target::Tcp(address) = Container::target() else { panic!("the target is a TCP port") };
    let script = format!("{FOLDER}/e2e/systemd/clients/grpcio-client.py");
    let mut clients =
        [Client::start(&container, &["/usr/bin/python3", &script, &address.to_string(), LIMIT])];
    let [client] = &mut clients;
    client.wait_for("watching", 1);
    let first = connections(&container, address.port());
    assert_eq!(first.len(), 1, "{first:?}");
    reload_and_restart(&container, &mut clients, |clients, round| {
        assert_eq!(connections(&container, address.port()), first, "round {round}");
        assert!(clients[0].runs());
    });
    let [client] = clients;
    let [answered, lost, messages, ended] = client.last_numbers()[..] else {
        panic!("the last line has four numbers")
    };
    let rounds = ROUNDS as u64;
    // The stream continues in each process, and repeats no message.
    assert!(
        answered > rounds && (lost, messages, ended) == (0, 1, 0),
        "{answered} {lost} {messages} {ended}"
    );
}

/// The addresses of the clients' ends of the established connections to a port (proc(5)).
pub fn connections(container: &Container, port: u16) -> Vec<String> {
    const ESTABLISHED: &str = "01";
    let tables = container.run(&["cat", "/proc/net/tcp", "/proc/net/tcp6"]).expect("the tables are readable");
    let rows = tables.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    let port = format!(":{port:04X}");
    rows.filter(|row| row[2].ends_with(&port) && row[3] == ESTABLISHED).map(|row| row[1].to_owned()).collect()
}
