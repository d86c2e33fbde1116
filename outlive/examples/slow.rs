//! A service for tests: its start, its end, its requests or its command wait for a file, or its start fails.
//! `tests/examples.rs` tests time limits, signals, failed starts and the watchdog with it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use outlive::prometheus::{Histogram, HistogramOpts};
use tracing::info;

/// How many threads tokio has for blocking tasks by default.
const BLOCKING_THREADS: usize = 512;

/// Waits for a file at the chosen moment.
#[derive(clap::Parser)]
#[command(name = "slow", version, about)]
struct Config {
    /// When to wait for the file of --until: during the start, in a background task at the end, or in each request.
    #[arg(long)]
    when: When,
    #[arg(long, value_name = "FILE", default_value = "/file")]
    until: PathBuf,
}

#[derive(Clone, clap::ValueEnum)]
enum When {
    Start,
    End,
    /// The handler blocks its worker thread, which a handler must never do.
    Request,
    /// Blocking tasks use all of tokio's threads for them, and do not end.
    Blocking,
    /// The start panics and does not wait.
    Panic,
    /// The start registers a metric that the library has.
    Metric,
    /// The start adds an admin route that the library has.
    AdminRoute,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Wait for the file of --until, or for a stop signal.
    Wait {
        /// Block the thread, and wait for the file only.
        #[arg(long)]
        block: bool,
    },
    /// Panic.
    Panic,
}

async fn start(config: Config, setup: &mut outlive::Setup) -> anyhow::Result<Router> {
    match config.when {
        When::Panic => panic!("on purpose"),
        When::Metric => {
            let name = "http_request_duration_seconds";
            setup
                .register_metric(Histogram::with_opts(HistogramOpts::new(name, "The time of a request."))?)?;
            Ok(Router::new())
        }
        When::Blocking => {
            for _ in 0..BLOCKING_THREADS {
                tokio::task::spawn_blocking(std::thread::park);
            }
            Ok(Router::new().route("/", get("hello\n")))
        }
        When::AdminRoute => {
            setup.admin_routes(Router::new().route("/metrics", get("none\n")));
            Ok(Router::new())
        }
        When::Start => {
            info!("waiting for the file");
            file(&config.until).await;
            Ok(Router::new())
        }
        When::Request => {
            let blocked = get(async move || {
                info!("waiting for the file");
                while !config.until.exists() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                "hello\n"
            });
            Ok(Router::new().route("/", blocked))
        }
        When::End => {
            let wait = setup.background("wait", async move |end| {
                info!("the task has begun");
                end.cancelled().await;
                info!("waiting for the file");
                file(&config.until).await;
                info!("the file is there");
                Ok(())
            });
            wait.exclusive();
            Ok(Router::new().route("/", get("hello\n")))
        }
    }
}

async fn execute(command: Command, config: Config, setup: &mut outlive::Setup) -> anyhow::Result<()> {
    setup.on_exit("say goodbye", async {
        info!("the exit hook runs");
        Ok(())
    });
    setup.background("never", async |_| Ok(()));
    let stop = setup.shutdown();
    info!("waiting for the file");
    match command {
        Command::Panic => panic!("on purpose"),
        Command::Wait { block: true } => {
            while !config.until.exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Command::Wait { block: false } => {
            let found = stop.run_until_cancelled(file(&config.until)).await;
            anyhow::ensure!(found.is_some(), "stopped before the file was there");
        }
    }
    Ok(())
}

async fn file(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn main() -> ExitCode {
    outlive::run_with(start, execute)
}
