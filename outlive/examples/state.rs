//! A service with a state: counts visits, and keeps the count in a file, exactly, over restarts and reloads.
//! `cargo run --example state -- --file /tmp/visits`

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use outlive::Setup;
use outlive::prometheus::IntCounter;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Counts visits.
#[derive(clap::Parser)]
#[command(name = "state", version, about)]
struct Config {
    /// Where the count is kept.
    #[arg(long)]
    file: PathBuf,
}

async fn start(config: Config, setup: &mut Setup) -> anyhow::Result<Router> {
    let file = config.file;
    // Whoever cannot go on with this file finds out before the old process goes.
    read(&file)?;
    let counter = IntCounter::new("visits_total", "Visits to this process.")?;
    setup.register_metric(counter.clone())?;
    let checked = file.clone();
    setup.readiness_check("file", move || {
        let read = read(&checked).map(drop);
        async { read }
    });
    let (visits, mut visited) = unbounded_channel();
    // At a reload the old process still counts the visits that it has answered: one of them at a time.
    setup
        .background("count visits", async move |end| {
            loop {
                let is_last =
                    end.run_until_cancelled(tokio::time::sleep(Duration::from_secs(1))).await.is_none();
                let news = std::iter::from_fn(|| visited.try_recv().ok()).count();
                if news > 0 {
                    write(&file, read(&file)? + news)?;
                }
                if is_last {
                    return Ok(());
                }
            }
        })
        .exclusive();
    setup.on_exit("log the visits", async {
        tracing::info!("all visits are counted");
        Ok(())
    });
    Ok(Router::new().route("/", get(visit)).with_state((visits, counter)))
}

async fn visit(State((visits, counter)): State<(UnboundedSender<()>, IntCounter)>) -> &'static str {
    counter.inc();
    // Somebody listens until the last request is answered.
    let _ = visits.send(());
    "welcome\n"
}

fn read(file: &Path) -> anyhow::Result<usize> {
    match fs::read_to_string(file) {
        Ok(text) => text
            .trim()
            .parse()
            .with_context(|| format!("invalid content of {}: expected a number", file.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error).with_context(|| format!("could not read {}", file.display())),
    }
}

/// The file is whole at every moment.
fn write(file: &Path, count: usize) -> anyhow::Result<()> {
    let aside = file.with_extension("new");
    fs::write(&aside, count.to_string()).and_then(|()| fs::rename(&aside, file))?;
    Ok(())
}

fn main() -> ExitCode {
    outlive::run(start)
}
