//! Start time, memory and binary size of each server, and how much of a restart's pause systemd and the sandbox take.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use testkit::client::{Connection, Target, get};
use testkit::container::Container;
use testkit::process::{Notifications, Process};
use testkit::service::command;

use crate::Extent;
use crate::servers::{NAME, OURS, Peers, boot};

const UNIT: &str = include_str!("../../systemd/app.service");

pub fn run(peers: &Peers, extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    let mut costs = Map::new();
    progress.set_message("starts");
    let mut each = Vec::new();
    for (server, binary) in [("this service", Path::new(OURS)), ("bare axum::serve", peers.bare())] {
        let alone = resident(binary)?;
        each.push(json!({
            "server": server,
            "exec to READY ms": median((0..extent.starts).map(|_| exec_to_ready(binary)).collect::<Result<_>>()?),
            "resident MB": alone / 1024,
            "binary kB": std::fs::metadata(binary)?.len() / 1000,
        }));
    }
    costs.insert("processes".into(), each.into());
    progress.set_message("pause of a restart with and without the sandbox");
    costs.insert("pause".into(), pauses(extent)?);
    Ok(costs.into())
}

// ---- processes ----

/// Starts a server on an inherited socket. Returns it once it is ready, with the milliseconds from exec to READY=1.
fn start(binary: &Path) -> Result<(Process, SocketAddr, f64)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut notifications = Notifications::new()?;
    let mut command = command(binary.to_str().context("the path is not valid UTF-8")?, &[]);
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

/// Resident memory in kB after one request.
fn resident(binary: &Path) -> Result<u64> {
    let (process, address, _) = start(binary)?;
    testkit::block_on(async { Connection::open(&Target::Tcp(address)).await?.ask(&get("/")).await })?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid().as_raw_nonzero()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS in /proc/PID/status")?;
    line.trim().trim_end_matches(" kB").parse().context("VmRSS is not a number")
}

// ---- systemd ----

/// For how many milliseconds a unit is inactive during a restart: this service, `sleep` in the same sandbox, and
/// `sleep` with each group of the sandbox alone. `sleep` has no start of its own, so its pause is the part of systemd.
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
            // The first round starts the units, so it is not measured.
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

/// The groups of sandbox settings in the unit file, each with the first line of its comment as the name.
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
        value.trim().parse().context("the timestamp is not a number")
    };
    Ok(round((show("ActiveEnterTimestampMonotonic")? - show("ActiveExitTimestampMonotonic")?) / 1000.0))
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().map_or(f64::NAN, round)
}

pub fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
