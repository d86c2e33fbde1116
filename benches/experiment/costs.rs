//! What each server costs: throughput without restarts, time to start, memory, and what systemd adds.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::client::{Connection, Target, get};
use harness::container::Container;
use harness::process::{Notifications, Process};
use harness::service::command;
use indicatif::ProgressBar;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::{Map, Value, json};

use crate::Extent;
use crate::servers::{OURS, Peers, boot, wait_for};

const NAME: &str = env!("CARGO_PKG_NAME");
const UNIT: &str = include_str!(concat!("../../systemd/", env!("CARGO_PKG_NAME"), ".service"));
/// Connections of the throughput's load.
const CONNECTIONS: usize = 64;

/// Ten thousand connections, on both ends.
pub fn raise_limits() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where that is refused, opening them says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

pub fn run(peers: &Peers, extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    let mut costs = Map::new();
    if peers.has_wrk {
        progress.set_message("throughput");
        costs.insert("throughput".into(), throughput(peers, extent)?);
    }
    progress.set_message("starts");
    let mut each = Vec::new();
    for (server, binary) in [("this service", Path::new(OURS)), ("bare axum::serve", peers.bare())] {
        progress.set_message(format!("memory of {server}"));
        let idle = extent.idle_connections.last().copied().unwrap_or_default();
        let (alone, with) = memory(binary, idle)?;
        let per_connection = with.saturating_sub(alone) * 1024 / idle as u64;
        each.push(json!({
            "server": server,
            "exec to READY ms": median((0..extent.starts).map(|_| exec_to_ready(binary)).collect::<Result<_>>()?),
            "resident MB": alone / 1024,
            "resident MB with idle connections": with / 1024,
            "idle connections": idle,
            "bytes a connection": per_connection,
            "binary kB": std::fs::metadata(binary)?.len() / 1000,
        }));
    }
    costs.insert("processes".into(), each.into());
    progress.set_message("restarts with idle connections");
    costs.insert("restart ms by idle connections".into(), restarts_by_idle_connections(extent)?);
    progress.set_message("what the sandbox costs");
    costs.insert("pause".into(), pauses(extent)?);
    Ok(costs.into())
}

// ---- throughput ----

/// Requests a second, GET on 64 connections by wrk, the servers in turn.
fn throughput(peers: &Peers, extent: &Extent) -> Result<Value> {
    let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let (port, other, third, fourth) = (free_port(), free_port(), free_port(), free_port());
    let mut servers = vec![("this service", port, command(OURS, &[&format!("--listen={}", address(port))]))];
    let bare = command(peers.bare().to_str().context("a path")?, &[]);
    servers.push(("bare axum::serve", other, with_listener(&bare, other)));
    if let Some(go) = peers.go() {
        servers.push((
            "Go net/http",
            third,
            command(go.to_str().context("a path")?, &[&address(third).to_string()]),
        ));
    }
    if peers.has_nginx {
        servers.push(("nginx, return 200", fourth, nginx(peers.folder(), fourth)?));
    }
    let mut rates = vec![Vec::new(); servers.len()];
    for _ in 0..extent.rounds {
        for ((_, port, command), rates) in servers.iter_mut().zip(&mut rates) {
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let _process = Process::spawn(command)?;
            wait_for(address(*port));
            rates.push(wrk(*port, extent.round)?);
        }
    }
    let figures = servers.iter().zip(&rates).map(|((server, ..), own)| {
        // Of the same round: what else the machine does then slows both.
        let mut ratios: Vec<f64> = own.iter().zip(&rates[1]).map(|(rate, bare)| rate / bare).collect();
        ratios.sort_by(f64::total_cmp);
        let (low, high) = (ratios[ratios.len() / 4], ratios[ratios.len() * 3 / 4]);
        json!({
            "server": server,
            "requests a second": median(own.clone()).round(),
            "of bare axum::serve": median(ratios),
            "half of the rounds": format!("{low:.2} to {high:.2}"),
        })
    });
    Ok(figures.collect())
}

fn free_port() -> u16 {
    harness::free_address().port()
}

/// The template binds nothing itself but its default port: systemd-socket-activate gives it its own.
fn with_listener(server: &Command, port: u16) -> Command {
    let mut activate = command("systemd-socket-activate", &[&format!("--listen=127.0.0.1:{port}")]);
    activate.arg(server.get_program());
    activate
}

/// With a process for each core, as the others have a thread.
fn nginx(folder: &Path, port: u16) -> Result<Command> {
    let path = folder.join("nginx.conf");
    let text = format!(
        "daemon off; worker_processes auto; pid {0}/nginx.pid; error_log /dev/null;\nevents {{}}\nhttp {{ access_log off; \
         keepalive_requests 1000000000; server {{ listen 127.0.0.1:{port}; location / {{ return 200 \"pid, generation 1, since \
         2000-01-01T00:00:00Z\\n\"; }} }} }}\n",
        folder.display()
    );
    std::fs::write(&path, text)?;
    let mut nginx = command("nginx", &["-p"]);
    nginx.arg(folder).arg("-c").arg(path);
    Ok(nginx)
}

fn wrk(port: u16, length: Duration) -> Result<f64> {
    let url = format!("http://127.0.0.1:{port}/");
    let output = Command::new("wrk")
        .args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{}s", length.as_secs()), &url])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let rate = said.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    anyhow::ensure!(!said.contains("Non-2xx"), "wrk: {said}");
    rate.with_context(|| said.clone())?.trim().parse().context("a rate")
}

// ---- processes ----

/// A server on a socket passed to it, ready; and how many milliseconds it took from exec.
fn start(binary: &Path) -> Result<(Process, SocketAddr, f64)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut notifications = Notifications::new()?;
    let mut command = command(binary.to_str().context("a path")?, &[]);
    command
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDS_FIRST_FD", "0")
        .env("NOTIFY_SOCKET", notifications.path())
        .stdin(std::os::fd::OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let begun = Instant::now();
    let process = Process::spawn(&mut command)?;
    notifications.wait_for("READY=1")?;
    Ok((process, address, begun.elapsed().as_secs_f64() * 1000.0))
}

fn exec_to_ready(binary: &Path) -> Result<f64> {
    start(binary).map(|(_, _, millis)| millis)
}

/// Resident kB alone, and with so many idle connections that have been answered once.
fn memory(binary: &Path, connections: usize) -> Result<(u64, u64)> {
    let (process, address, _) = start(binary)?;
    let resident = || -> Result<u64> {
        let path = format!("/proc/{}/status", process.pid().as_raw_nonzero());
        let status = std::fs::read_to_string(path)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        line.trim().trim_end_matches(" kB").parse().context("a number")
    };
    harness::block_on(async {
        let target = Target::Tcp(address);
        Connection::open(&target).await?.ask(&get("/")).await?;
        let alone = resident()?;
        let _idle = idle(&target, connections).await?;
        Ok((alone, resident()?))
    })
}

async fn idle(target: &Target, count: usize) -> Result<Vec<Connection>> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = Connection::open(target).await?;
        connection.ask(&get("/")).await?;
        connections.push(connection);
    }
    Ok(connections)
}

// ---- systemd ----

fn restarts_by_idle_connections(extent: &Extent) -> Result<Value> {
    let container = boot(Path::new(OURS))?;
    let mut figures = Map::new();
    for count in extent.idle_connections {
        let container = &container;
        let millis = container.inside(|| async move {
            let _idle = idle(&Container::target(), *count).await?;
            let mut millis = Vec::new();
            for _ in 0..extent.starts {
                let begun = Instant::now();
                container.systemctl("restart")?;
                millis.push(begun.elapsed().as_secs_f64() * 1000.0);
            }
            anyhow::Ok(millis)
        })?;
        figures.insert(count.to_string(), json!(median(millis)));
    }
    Ok(figures.into())
}

/// How long a restart leaves a unit not active: ours, `sleep` in the same sandbox, and `sleep` with each group
/// of the sandbox's lines alone. Milliseconds.
fn pauses(extent: &Extent) -> Result<Value> {
    let container = boot(Path::new(OURS))?;
    let groups = sandbox();
    let all: Vec<&str> = groups.iter().flat_map(|(_, lines)| lines.clone()).collect();
    let mut units = vec![(NAME.to_owned(), String::new()), ("sleep".to_owned(), "none".to_owned())];
    sleeper(&container, "sleep", &[])?;
    sleeper(&container, "sleep-all", &all)?;
    units.push(("sleep-all".to_owned(), "all".to_owned()));
    for (number, (heading, lines)) in groups.iter().enumerate() {
        let unit = format!("sleep-{number}");
        sleeper(&container, &unit, lines)?;
        units.push((unit, (*heading).to_owned()));
    }
    container.run(&["systemctl", "daemon-reload"])?;
    let mut pauses = vec![Vec::new(); units.len()];
    for round in 0..=extent.starts {
        for ((unit, _), pauses) in units.iter().zip(&mut pauses) {
            let unit = format!("{unit}.service");
            container.run(&["systemctl", "restart", &unit])?;
            // The first round only starts them.
            if round > 0 {
                pauses.push(pause(&container, &unit)?);
            }
        }
    }
    let of: Vec<f64> = pauses.into_iter().map(median).collect();
    let groups: Map<String, Value> = units[3..]
        .iter()
        .zip(&of[3..])
        .map(|((_, heading), pause)| (heading.clone(), json!(round(pause - of[1]))))
        .collect();
    Ok(json!({
        "this service ms": of[0],
        "sleep in the same sandbox ms": of[2],
        "beyond systemd's own ms": round(of[0] - of[2]),
        "sleep without a sandbox ms": of[1],
        "each group of the sandbox's lines ms": groups,
    }))
}

/// The groups of lines of the unit that harden, by the comment that heads each.
fn sandbox() -> Vec<(&'static str, Vec<&'static str>)> {
    let paragraphs = UNIT.split("\n\n").skip_while(|paragraph| !paragraph.contains("PrivateNetwork="));
    paragraphs
        .map(|paragraph| {
            let heading = paragraph.lines().next().unwrap_or_default().trim_start_matches("# ");
            let lines = paragraph.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
            (heading, lines.collect())
        })
        .collect()
}

fn sleeper(container: &Container, name: &str, lines: &[&str]) -> Result<()> {
    let unit = format!(
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=exec\nExecStart=sleep infinity\n{}\n",
        lines.join("\n")
    );
    container.write(&format!("etc/systemd/system/{name}.service"), &unit)
}

fn pause(container: &Container, unit: &str) -> Result<f64> {
    let show = |property: &str| -> Result<f64> {
        let value = container.run(&["systemctl", "show", "-P", property, unit])?;
        value.trim().parse().context("microseconds")
    };
    Ok(round((show("ActiveEnterTimestampMonotonic")? - show("ActiveExitTimestampMonotonic")?) / 1000.0))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().map_or(f64::NAN, round)
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
