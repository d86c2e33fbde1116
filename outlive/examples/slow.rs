//! A service for tests: its start, its end or its requests wait for a file, or its start panics. `tests/examples.rs`
//! tests time limits, signals, panics and the watchdog with it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use tracing::info;

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
    /// The start panics and does not wait.
    Panic,
}

async fn start(config: Config, setup: &mut outlive::Setup) -> anyhow::Result<Router> {
    match config.when {
        When::Panic => panic!("on purpose"),
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

async fn file(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn main() -> ExitCode {
    outlive::run(start)
}
