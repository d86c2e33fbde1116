//! A service with state: it counts visits in a file, and loses none over restarts and reloads. It shows a metric, a
//! readiness check, an exclusive background task and an exit hook.
//!
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
    /// File that stores the count.
    #[arg(long)]
    file: PathBuf,
}

async fn start(config: Config, setup: &mut Setup) -> anyhow::Result<Router> {
    let file = config.file;
    // An unusable file must fail the start, because then a reload fails and the old process keeps serving.
    read(&file)?;
    let counter = IntCounter::new("visits_total", "Visits to this process.")?;
    setup.register_metric(counter.clone())?;
    let checked = file.clone();
    setup.readiness_check("file", move || {
        let read = read(&checked).map(drop);
        async { read }
    });
    let (visits, mut visited) = unbounded_channel();
    // The old process of a reload still writes the visits that it has answered, so the task must not run in both
    // processes at once: one would overwrite the count of the other.
    setup
        .background("count visits", async move |end| {
            loop {
                let is_last =
                    end.run_until_cancelled(tokio::time::sleep(Duration::from_secs(1))).await.is_none();
                let added = std::iter::from_fn(|| visited.try_recv().ok()).count();
                if added > 0 {
                    write(&file, read(&file)? + added)?;
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
    // The receiver exists until the last request is answered, because background tasks end after that.
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

/// Writes a new file and renames it, so that a crash never leaves a partial count.
fn write(file: &Path, count: usize) -> anyhow::Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, count.to_string()).and_then(|()| fs::rename(&new, file))?;
    Ok(())
}

fn main() -> ExitCode {
    outlive::run(start)
}
