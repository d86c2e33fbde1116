//! The comparison: servers restarted each second under load from clients that never retry, side by side; then
//! what each costs. `make bench` prints a table, and writes `target/bench/result.json` and
//! `target/bench/restarts.svg` and `growth.svg`.

mod chart;
mod costs;
mod idle;
mod report;
mod restarts;
mod scaling;
mod servers;
mod throughput;
mod upgrades;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;

/// How much is done of each.
pub struct Extent {
    /// Under each load.
    pub load: Duration,
    /// Runs of each server whose throughput is measured, and how long each takes.
    pub rounds: usize,
    pub round: Duration,
    /// Connections of a load that grows.
    pub growth: &'static [usize],
    /// Starts of each kind that is timed.
    pub starts: usize,
    pub idle_connections: &'static [usize],
    /// Connections that are woken, and how often.
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

/// For ten thousand connections, on both ends.
fn raise_limits() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where that is refused, opening them says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[expect(clippy::print_stdout, reason = "the result")]
fn main() -> Result<()> {
    let flag = |name: &str| std::env::args().any(|argument| argument == name);
    let extent = if flag("--quick") { QUICK } else { FULL };
    ensure!(rustix::process::geteuid().is_root(), "systemd is booted in containers, as root");
    raise_limits();
    let progress = ProgressBar::new_spinner();
    progress.set_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
    progress.enable_steady_tick(Duration::from_millis(200));
    let peers = servers::Peers::find()?;

    let strips = restarts::run(&peers, &extent, &progress)?;
    let throughput = throughput::run(&peers, &extent, &progress)?;
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
        "costs": costs,
        "idle": idle,
        "upgrades": upgrades,
        "left out": peers.left_out(),
    });
    let folder = Path::new(servers::FOLDER).join("target/bench");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("result.json"), serde_json::to_string_pretty(&result)?)?;
    let svg = folder.join("restarts.svg");
    chart::draw(&strips, extent.load, &svg).context("could not draw")?;
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
