//! The comparison with other servers. `restarts.rs` restarts each server every second under load from clients that
//! never retry, and `upgrades.rs` does the same with Debian packages. `throughput.rs`, `idle.rs` and `costs.rs` measure
//! without restarts, and `websockets.rs` the cost of `Carry`. `make bench` prints the tables, and writes `result.json`, `restarts.svg` and `growth.svg` to
//! `target/bench`.

mod chart;
mod costs;
mod idle;
mod report;
mod restarts;
mod scaling;
mod servers;
mod throughput;
mod upgrades;
mod websockets;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;

/// The extent of each measurement.
pub struct Extent {
    /// Duration of each load.
    pub load: Duration,
    /// Rounds of the throughput measurement for each server, and the duration of one.
    pub rounds: usize,
    pub round: Duration,
    /// Numbers of connections for the throughput by connections.
    pub growth: &'static [usize],
    /// Repetitions of each start, restart, reload and upgrade that is timed.
    pub starts: usize,
    pub idle_connections: &'static [usize],
    /// Connections in the measurement of requests after an idle time, and its rounds.
    pub woken: usize,
    pub wakes: usize,
}

const FULL: Extent = Extent {
    load: Duration::from_secs(20),
    rounds: 25,
    round: Duration::from_secs(1),
    growth: &[1, 10, 100, 1_000, 10_000],
    starts: 15,
    idle_connections: &[0, 1_000, 10_000, 18_000],
    woken: 2_000,
    wakes: 10,
};
const QUICK: Extent = Extent {
    load: Duration::from_secs(1),
    rounds: 1,
    round: Duration::from_secs(1),
    growth: &[1, 100],
    starts: 3,
    idle_connections: &[0, 1_000],
    woken: 100,
    wakes: 1,
};

/// Raises the limit of open files, because server and client have up to 18,000 connections each.
fn raise_limits() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Not an error here: without the limit, opening the connections fails with the reason.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[expect(clippy::print_stdout, reason = "the result goes to standard output")]
fn main() -> Result<()> {
    let flag = |name: &str| std::env::args().any(|argument| argument == name);
    let extent = if flag("--quick") { QUICK } else { FULL };
    ensure!(
        rustix::process::geteuid().is_root(),
        "root is required, because this boots systemd in containers"
    );
    raise_limits();
    let progress = ProgressBar::new_spinner();
    progress.set_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
    progress.enable_steady_tick(Duration::from_millis(200));
    let peers = servers::Peers::find()?;

    if flag("--websockets") {
        return of_websockets(&peers, &extent, &progress, flag("--readme"));
    }
    let strips = restarts::run(&peers, &extent, &progress, |_| true)?;
    let throughput = throughput::run(&peers, &extent, &progress)?;
    let websockets = websockets::run(&peers, &extent, &progress)?;
    let costs = costs::run(&peers, &extent, &progress)?;
    let idle = idle::run(&peers, &extent, &progress)?;
    let upgrades = upgrades::measure(&extent, &progress)?;
    progress.finish_and_clear();

    let result = json!({
        "command": if flag("--quick") { "make bench BENCH=--quick" } else { "make bench" },
        "machine": report::machine()?,
        "seconds under each load": extent.load.as_secs_f64(),
        "restarts": strips.iter().map(restarts::Strip::figures).collect::<Vec<_>>(),
        "throughput": throughput,
        "websockets": websockets,
        "costs": costs,
        "idle": idle,
        "upgrades": upgrades,
        "left out": peers.left_out(),
    });
    let folder = Path::new(servers::FOLDER).join("target/bench");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("result.json"), serde_json::to_string_pretty(&result)?)?;
    let svg = folder.join("restarts.svg");
    chart::draw(&strips, extent.load, &svg).context("could not draw the picture")?;
    let grown = folder.join("growth.svg");
    if peers.has_wrk {
        scaling::draw(&result["throughput"]["growth"], &grown)?;
    }
    let table = report::table(&result);
    println!("{table}");
    if flag("--readme") {
        report::write_readme(&table, &[&svg, &grown])?;
    }
    for strip in &strips {
        strip.assert_explained()?;
    }
    Ok(())
}

/// Measures WebSockets only. With `is_for_readme` the figures replace those of WebSockets in bench/README.md and in its
/// picture.
#[expect(clippy::print_stdout, reason = "the result goes to standard output")]
fn of_websockets(
    peers: &servers::Peers,
    extent: &Extent,
    progress: &ProgressBar,
    is_for_readme: bool,
) -> Result<()> {
    let strips = restarts::run(peers, extent, progress, |load| load == restarts::WEBSOCKETS)?;
    let websockets = websockets::run(peers, extent, progress)?;
    progress.set_message("memory of idle WebSockets");
    let memory = idle::memory_of_websockets(peers, extent)?;
    progress.finish_and_clear();
    let result = json!({
        "restarts": strips.iter().map(restarts::Strip::figures).collect::<Vec<_>>(),
        "websockets": websockets,
        "idle": { "memory": memory },
    });
    let tables = report::tables(&result);
    println!("{tables}");
    if is_for_readme {
        report::replace_rows(&tables)?;
        chart::replace_websockets(
            &strips,
            extent.load,
            &Path::new(servers::FOLDER).join("bench/restarts.svg"),
        )?;
    }
    strips.iter().try_for_each(restarts::Strip::assert_explained)
}
