//! The costs of idle connections: memory, restarts and reloads with many of them, and the latency of the request that
//! ends the idle time.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Value, json};
use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2, Target, get};
use testkit::container::Container;
use testkit::load::Load;
use testkit::process::{Notifications, Process};
use testkit::service::command;
use testkit::wait_until;

use crate::Extent;
use crate::costs::{median, round};
use crate::servers::{OURS, Peers, SOCKETS, boot};
use crate::throughput::{Cores, on};
use crate::websockets::{frame, handshake};

/// If the resident memory has not changed for this time, it is final.
const SETTLED: Duration = Duration::from_secs(3);
/// After this time without a request this service has parked a connection.
const PARKED: Duration = Duration::from_secs(4);
/// The largest number of idle WebSockets. With the buffers of axum they need more than a gigabyte.
const WEBSOCKETS: usize = 10_000;
/// The message that each process logs when it has taken over all connections (`outlive/src/observe/log.rs`).
const TOOK_OVER: &str = "MESSAGE_ID=1d9e4c7a2b6f4f30a5c8e0b7d3f16a55";

pub fn run(peers: &Peers, extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    progress.set_message("memory of idle connections");
    let memory = memory(peers, extent)?;
    progress.set_message("latency after an idle time");
    let woken = woken(peers, extent)?;
    progress.set_message("restarts with idle connections");
    Ok(json!({ "memory": memory, "woken": woken, "moves": moves(extent)? }))
}

// ---- memory ----

/// How a connection was used before it became idle.
#[derive(Clone, Copy)]
enum Use {
    Nothing,
    Http1,
    Unix,
    Http2,
    Tls,
    /// A WebSocket to this path.
    WebSocket(&'static str),
}

/// A client's connection that is left open.
enum Open {
    Http1(Connection),
    Http2(Http2),
    WebSocket(Connection),
}

impl Open {
    async fn new(target: &Target, used: Use) -> Result<Self> {
        let mut open = match used {
            Use::Http2 => Self::Http2(Http2::open(target).await?),
            Use::WebSocket(path) => {
                let mut connection = Connection::open(target).await?;
                let answer = connection.ask(&handshake(path)).await?;
                ensure!(answer.status == 101, "status {}", answer.status);
                Self::WebSocket(connection)
            }
            Use::Nothing | Use::Http1 | Use::Unix | Use::Tls => Self::Http1(Connection::open(target).await?),
        };
        if !matches!(used, Use::Nothing) {
            open.ask().await?;
        }
        Ok(open)
    }

    async fn ask(&mut self) -> Result<()> {
        match self {
            Self::Http1(connection) => drop(connection.ask(&get("/")).await?),
            Self::WebSocket(connection) => {
                let (message, echo) = (frame(Some([1, 2, 3, 4]), 16), frame(None, 16));
                connection.send(&message).await?;
                ensure!(connection.take(echo.len()).await? == echo, "another message than the echo");
            }
            Self::Http2(connection) => drop(connection.get("/").await?.context("the server sent GOAWAY")?),
        }
        Ok(())
    }
}

fn memory(peers: &Peers, extent: &Extent) -> Result<Value> {
    let count = extent.idle_connections.last().copied().unwrap_or_default();
    let uses = [
        ("this service", Path::new(OURS), "HTTP/1.1 over TLS, used once", Use::Tls),
        ("this service", Path::new(OURS), "HTTP/1.1, used once", Use::Http1),
        ("this service", Path::new(OURS), "never used", Use::Nothing),
        ("this service", Path::new(OURS), "HTTP/1.1 over a Unix socket, used once", Use::Unix),
        ("this service", Path::new(OURS), "HTTP/2, used once", Use::Http2),
        ("bare axum::serve", peers.bare(), "HTTP/1.1, used once", Use::Http1),
    ];
    let mut rows = memory_of(&uses, count)?;
    rows.extend(memory_of_websockets(peers, extent)?);
    Ok(rows.into())
}

pub fn memory_of_websockets(peers: &Peers, extent: &Extent) -> Result<Vec<Value>> {
    let count = extent.idle_connections.last().map_or(0, |count| *count.min(&WEBSOCKETS));
    let small = "WebSockets, used once, read_buffer_size(4096)";
    let default = "WebSockets, used once, buffers of axum";
    let uses = [
        ("this service", Path::new(OURS), small, Use::WebSocket("/socket")),
        ("this service", Path::new(SOCKETS), default, Use::WebSocket("/socket/default")),
        ("bare axum::serve", peers.bare(), small, Use::WebSocket("/socket")),
        ("bare axum::serve", peers.bare(), default, Use::WebSocket("/socket/default")),
    ];
    memory_of(&uses, count)
}

/// The memory of `count` connections in each use of a server.
fn memory_of(uses: &[(&str, &Path, &str, Use)], count: usize) -> Result<Vec<Value>> {
    let certificate = Certificate::new()?;
    let mut rows = Vec::new();
    for &(server, binary, label, used) in uses {
        let folder = tempfile::tempdir()?;
        let server_of = Resident::start(binary, used, Cores::Shared, &certificate, folder.path())?;
        let (before, idle, burst) = testkit::block_on(async {
            let target = &server_of.target;
            Open::new(target, used).await?;
            let before = server_of.kilobytes()?;
            let mut open = Vec::with_capacity(count);
            for _ in 0..count {
                open.push(Open::new(target, used).await?);
            }
            let idle = server_of.settled().await?;
            let all = std::mem::take(&mut open).into_iter().map(|mut open| async move {
                open.ask().await?;
                anyhow::Ok(open)
            });
            // All at once, so that the server needs buffers for all of them at the same time.
            let open = futures_util::future::try_join_all(all).await?;
            let burst = server_of.settled().await?;
            drop(open);
            anyhow::Ok((before, idle, burst))
        })
        .with_context(|| format!("{server}: {label}"))?;
        let each = |kilobytes: u64| kilobytes.saturating_sub(before) * 1024 / count as u64;
        rows.push(json!({
            "server": server,
            "connections": format!("{count}, {label}"),
            "resident bytes each": each(idle),
            "after one request on all at once": each(burst),
        }));
    }
    Ok(rows)
}

/// A running server whose memory is measured.
struct Resident {
    process: Process,
    target: Target,
}

impl Resident {
    /// Starts a server on an inherited socket, and waits until it is ready.
    fn start(
        binary: &Path,
        used: Use,
        cores: Cores,
        certificate: &Certificate,
        folder: &Path,
    ) -> Result<Self> {
        let name = if matches!(used, Use::Tls) { "https" } else { "http" };
        let (socket, target) = if matches!(used, Use::Unix) {
            let path = folder.join("socket");
            (OwnedFd::from(std::os::unix::net::UnixListener::bind(&path)?), Target::Unix(path))
        } else {
            let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
            let address = listener.local_addr()?;
            let target = match used {
                Use::Tls => Target::Tls(address, certificate.client(&["http/1.1"])?),
                _ => Target::Tcp(address),
            };
            (listener.into(), target)
        };
        let mut notifications = Notifications::new()?;
        let mut command =
            on(cores, "0", &command(binary.to_str().context("the path is not valid UTF-8")?, &[]));
        command
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDS_FIRST_FD", "0")
            .env("LISTEN_FDNAMES", name)
            .env("CREDENTIALS_DIRECTORY", certificate.folder())
            .env("NOTIFY_SOCKET", notifications.path())
            .stdin(socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = Process::spawn(&mut command)?;
        notifications.wait_for("READY=1")?;
        Ok(Self { process, target })
    }

    /// Resident memory in kB, of which pages that other processes have too count in part.
    fn kilobytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.process.pid().as_raw_nonzero());
        let rollup = std::fs::read_to_string(path)?;
        let line =
            rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss in smaps_rollup")?;
        line.trim().trim_end_matches(" kB").parse().context("Pss is not a number")
    }

    /// Resident memory in kB once it is stable, or after 10 s.
    async fn settled(&self) -> Result<u64> {
        let (begun, mut changed) = (Instant::now(), Instant::now());
        let mut last = self.kilobytes()?;
        while begun.elapsed() < Duration::from_secs(10) && changed.elapsed() < SETTLED {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = self.kilobytes()?;
            if now != last {
                (last, changed) = (now, Instant::now());
            }
        }
        Ok(last)
    }
}

// ---- latency after an idle time ----

/// Latency of requests on connections that were idle, and of a second request right after, one at a time. Server and
/// client have a core each. On a shared core the scheduler switches directly between them, which is faster than the
/// wakeup of an idle core and would hide the difference.
fn woken(peers: &Peers, extent: &Extent) -> Result<Value> {
    let on_a_core_of_its_own = || {
        let mut client = CpuSet::new();
        client.set(1);
        sched_setaffinity(None, &client)?;
        ask_the_idle(peers, extent)
    };
    std::thread::scope(|scope| scope.spawn(on_a_core_of_its_own).join().expect("the thread does not panic"))
}

fn ask_the_idle(peers: &Peers, extent: &Extent) -> Result<Value> {
    let servers = [("this service", Path::new(OURS)), ("bare axum::serve", peers.bare())];
    let folder = tempfile::tempdir()?;
    let certificate = Certificate::new()?;
    // For each server: p50 of the first and second request, then p99 of both, with one value for each round.
    let mut took = [const { [const { Vec::new() }; 4] }; 2];
    testkit::block_on(async {
        let mut running = Vec::new();
        for (_, binary) in servers {
            let server = Resident::start(binary, Use::Http1, Cores::OneEach, &certificate, folder.path())?;
            let mut open = Vec::with_capacity(extent.woken);
            for _ in 0..extent.woken {
                open.push(Open::new(&server.target, Use::Http1).await?);
            }
            running.push((server, open));
        }
        for round in 0..extent.wakes {
            tokio::time::sleep(PARKED).await;
            for place in [round % 2, (round + 1) % 2] {
                for again in 0..2 {
                    let mut times = Vec::with_capacity(extent.woken);
                    for connection in &mut running[place].1 {
                        let begun = Instant::now();
                        connection.ask().await?;
                        times.push(begun.elapsed().as_secs_f64() * 1e6);
                    }
                    took[place][again].push(percentile(&mut times, 50));
                    took[place][2 + again].push(percentile(&mut times, 99));
                }
            }
        }
        anyhow::Ok(())
    })?;
    let rows = servers.iter().zip(took).map(|((server, _), took)| {
        let [idle, again, idle_tail, again_tail] = took.map(median);
        json!({
            "server": server,
            "p50 idle": idle, "p50 second request": again,
            "p99 idle": idle_tail, "p99 second request": again_tail,
        })
    });
    Ok(rows.collect())
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    round(values[(values.len() - 1) * percent / 100])
}

// ---- restarts and reloads ----

/// Restarts and reloads with idle connections: their duration, and the longest wait of a load on 50 further
/// connections.
fn moves(extent: &Extent) -> Result<Value> {
    let container = &boot(Path::new(OURS))?;
    container.systemctl("start")?;
    let mut rows: Vec<Value> = Vec::new();
    for &count in extent.idle_connections {
        let mut row = container.inside(|| async move {
            let mut idle = Vec::with_capacity(count);
            for _ in 0..count {
                idle.push(Open::new(&Container::target(), Use::Http1).await?);
            }
            tokio::time::sleep(PARKED).await;
            let mut row = json!({ "idle connections": count });
            for verb in ["restart", "reload"] {
                let millis =
                    (0..extent.starts).map(|_| settled_move(container, verb)).collect::<Result<_>>()?;
                row[format!("{verb} ms")] = json!(median(millis));
                let waits =
                    (0..extent.starts).map(|_| longest_wait(container, verb)).collect::<Result<_>>()?;
                row[format!("{verb}: longest wait ms")] = json!(median(waits));
            }
            // Checks that no idle connection was closed.
            for connection in &mut idle {
                connection.ask().await?;
            }
            anyhow::Ok(row)
        })?;
        let first = rows.first().cloned().unwrap_or_else(|| row.clone());
        for verb in ["restart", "reload"] {
            let of = |row: &Value| row[format!("{verb} ms")].as_f64().context("the row has no milliseconds");
            let ratio = of(&row)? / of(&first)?;
            row[format!("{verb}, relative to none")] = json!(round(ratio));
        }
        rows.push(row);
    }
    Ok(rows.into())
}

/// The duration of a restart or reload in milliseconds. Waits until all connections are taken over, so that the next
/// one starts from the same state.
fn settled_move(container: &Container, verb: &str) -> Result<f64> {
    let taken = || container.journal(&[TOOK_OVER]).map(|entries| entries.len());
    let before = taken()?;
    let begun = Instant::now();
    container.systemctl(verb)?;
    let took = begun.elapsed();
    wait_until("all are taken over", || taken().is_ok_and(|taken| taken > before));
    Ok(took.as_secs_f64() * 1000.0)
}

/// The longest wait of a client during one restart or reload, in milliseconds.
fn longest_wait(container: &Container, verb: &str) -> Result<f64> {
    let running = Load::paced(&Container::target()).start(container.enter());
    std::thread::sleep(Duration::from_millis(200));
    settled_move(container, verb)?;
    let report = running.stop();
    ensure!(report.lost() == 0 && report.connections == report.clients, "{report}");
    Ok(report.longest.as_secs_f64() * 1000.0)
}
