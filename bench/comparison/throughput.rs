//! Requests per second without restarts, compared with other servers, by the number of connections, and with a new
//! connection for each request; and the instructions for one request.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e_cost::{Protocol, instructions_of_request};
use indicatif::ProgressBar;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use testkit::process::Process;
use testkit::service::command;

use crate::Extent;
use crate::costs::median;
use crate::servers::{OURS, Peers, wait_for};

/// Connections of the load on shared cores.
const CONNECTIONS: usize = 64;

/// How long a server may take to end. After that it is killed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Connections that are open at once, where each serves one request.
const ACCEPTED: usize = 100;

/// A server with its port and the path that is asked for, and its rate in each round.
pub struct Contender {
    label: String,
    port: u16,
    path: &'static str,
    command: Command,
    rates: Vec<f64>,
}

/// On which cores server and client run.
#[derive(Clone, Copy)]
pub enum Cores {
    /// The scheduler decides.
    Shared,
    /// The server on the first core, the client on the second, so that the client takes no processor time from the
    /// server.
    OneEach,
}

pub fn run(peers: &Peers, extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    if !peers.has_wrk {
        return Ok(Value::Null);
    }
    progress.set_message("throughput");
    let mut beside = contenders(peers, Cores::Shared)?;
    measure(&mut beside, extent.rounds, |_, port, path| {
        wrk(port, path, extent.round, CONNECTIONS, Cores::Shared, &[])
    })?;
    let beside = ratios(&beside, 1, "requests per second", "relative to bare axum::serve");

    let mut growth = Vec::new();
    for &connections in extent.growth {
        progress.set_message(format!("throughput on {connections} connections"));
        let mut contenders = contenders(peers, Cores::OneEach)?;
        let rounds = extent.rounds.div_ceil(5);
        measure(&mut contenders, rounds, |_, port, path| {
            wrk(port, path, extent.round, connections, Cores::OneEach, &[])
        })?;
        let mut row = json!({ "connections": connections });
        for Contender { label, rates, .. } in contenders {
            row[label] = json!(median(rates).round());
        }
        growth.push(row);
    }

    progress.set_message("new connections");
    let mut accepting = contenders(peers, Cores::OneEach)?;
    measure(&mut accepting, extent.rounds, |_, port, path| {
        let close = ["--header", "Connection: close"];
        wrk(port, path, extent.round, ACCEPTED, Cores::OneEach, &close)
    })?;
    let accepting = ratios(&accepting, 1, "connections per second", "relative to bare axum::serve");

    progress.set_message("instructions for a request");
    let instructions = instructions(peers)?;
    Ok(json!({ "beside": beside, "growth": growth, "accepting": accepting, "instructions": instructions }))
}

/// The user instructions of each server for one request.
fn instructions(peers: &Peers) -> Result<Value> {
    let mut rows = Vec::new();
    for (server, binary) in [("this service", Path::new(OURS)), ("bare axum::serve", peers.bare())] {
        let of = |protocol| instructions_of_request(binary, protocol).map(f64::round);
        rows.push(
            json!({ "server": server, "HTTP/1.1": of(Protocol::Http1)?, "HTTP/2": of(Protocol::Http2)? }),
        );
    }
    Ok(rows.into())
}

impl Contender {
    fn new(label: &str, port: u16, command: &Command, cores: Cores) -> Self {
        Self { label: label.to_owned(), port, path: "/", command: on(cores, "0", command), rates: Vec::new() }
    }

    pub fn ours(label: &str, binary: &Path, path: &'static str, cores: Cores) -> Self {
        let port = testkit::free_address().port();
        let mut command = command(&binary.to_string_lossy(), &[]);
        command.arg(format!("--listen=127.0.0.1:{port}"));
        Self { path, ..Self::new(label, port, &command, cores) }
    }

    pub fn bare(peers: &Peers, path: &'static str, cores: Cores) -> Self {
        let port = testkit::free_address().port();
        // The baseline has no option for its port, so systemd-socket-activate passes it a socket.
        let mut bare = command("systemd-socket-activate", &[&format!("--listen={}", address(port))]);
        bare.arg(peers.bare());
        Self { path, ..Self::new("bare axum::serve", port, &bare, cores) }
    }
}

fn address(port: u16) -> String {
    SocketAddr::from(([127, 0, 0, 1], port)).to_string()
}

fn contenders(peers: &Peers, cores: Cores) -> Result<Vec<Contender>> {
    let free = || testkit::free_address().port();
    let mut all = vec![
        Contender::ours("this service", Path::new(OURS), "/", cores),
        Contender::bare(peers, "/", cores),
    ];
    if let Some(go) = peers.go() {
        let port = free();
        let go = command(go.to_str().context("the path is not valid UTF-8")?, &[&address(port)]);
        all.push(Contender::new("Go net/http", port, &go, cores));
    }
    if peers.has_nginx {
        let port = free();
        let nginx = nginx(peers.folder(), port, cores)?;
        all.push(Contender::new("nginx, return 200", port, &nginx, cores));
    }
    Ok(all)
}

/// `command` on core `core`, unless the cores are shared.
pub fn on(cores: Cores, core: &str, command: &Command) -> Command {
    let mut pinned = match cores {
        Cores::Shared => Command::new(command.get_program()),
        Cores::OneEach => {
            let mut taskset = Command::new("taskset");
            taskset.args(["--cpu-list", core]).arg(command.get_program());
            taskset
        }
    };
    pinned.args(command.get_args());
    pinned
}

/// nginx with one worker process for each core, as the other servers have one thread for each core.
fn nginx(folder: &Path, port: u16, cores: Cores) -> Result<Command> {
    let path = folder.join("nginx.conf");
    let workers = match cores {
        Cores::Shared => "auto",
        Cores::OneEach => "1",
    };
    let text = format!(
        "daemon off; worker_processes {workers}; pid {0}/nginx.pid; error_log /dev/null; worker_rlimit_nofile 20000;\n\
         events {{ worker_connections 15000; }}\nhttp {{ access_log off; keepalive_requests 1000000000; \
         server {{ listen 127.0.0.1:{port} backlog=16384; location / {{ return 200 \"pid, generation 1, since \
         2000-01-01T00:00:00Z\\n\"; }} }} }}\n",
        folder.display()
    );
    std::fs::write(&path, text)?;
    let mut nginx = command("nginx", &["-p"]);
    nginx.arg(folder).arg("-c").arg(path);
    Ok(nginx)
}

/// Runs the servers in turn for `rounds` rounds, so that a disturbance of the machine affects all of them; every other
/// round in reverse. `load` returns the rate of the server with a pid on a port, asked for a path.
pub fn measure(
    contenders: &mut [Contender],
    rounds: usize,
    load: impl Fn(Pid, u16, &str) -> Result<f64>,
) -> Result<()> {
    for round in 0..rounds {
        for place in 0..contenders.len() {
            let place = if round % 2 == 0 { place } else { contenders.len() - 1 - place };
            let Contender { port, path, command, rates, .. } = &mut contenders[place];
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut process = Process::spawn(command)?;
            wait_for(SocketAddr::from(([127, 0, 0, 1], *port)));
            rates.push(load(process.pid(), *port, path)?);
            // A server that is killed may leave processes behind. nginx does, and they keep the port of the next round open
            // until they exit.
            process.signal(Signal::TERM);
            process.ends_within(END_LIMIT)?;
        }
    }
    Ok(())
}

/// The ratio of each server to the one at index `base`. Ratios are taken within a round, because other work on the
/// machine slows both servers then.
pub fn ratios(contenders: &[Contender], base: usize, rate: &str, column: &str) -> Value {
    let figures = contenders.iter().map(|Contender { label, rates, .. }| {
        let base = &contenders[base].rates;
        let mut ratios: Vec<f64> = rates.iter().zip(base).map(|(rate, base)| rate / base).collect();
        ratios.sort_by(f64::total_cmp);
        let (low, high) = (ratios[ratios.len() / 4], ratios[ratios.len() * 3 / 4]);
        json!({
            "server": label,
            rate: median(rates.clone()).round(),
            column: median(ratios),
            "middle half of the rounds": format!("{low:.2} to {high:.2}"),
        })
    });
    figures.collect()
}

fn wrk(
    port: u16,
    path: &str,
    length: Duration,
    connections: usize,
    cores: Cores,
    arguments: &[&str],
) -> Result<f64> {
    let mut wrk = Command::new("wrk");
    wrk.args(arguments);
    wrk.args(["-t1", &format!("-c{connections}"), &format!("-d{}s", length.as_secs())]);
    wrk.arg(format!("http://127.0.0.1:{port}{path}"));
    let output = on(cores, "1", &wrk).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let rate = said.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    ensure!(!said.contains("Non-2xx"), "wrk: {said}");
    let rate = rate.with_context(|| format!("wrk: {said}{}", String::from_utf8_lossy(&output.stderr)))?;
    rate.trim().parse().context("the rate is not a number")
}
