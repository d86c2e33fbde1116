//! A service whose start, end or requests wait for something: what happens at the limit, at a signal, at a panic, or
//! where its worker threads are blocked.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use tracing::info;

/// Waits.
#[derive(clap::Parser)]
#[command(name = "slow", version, about)]
struct Config {
    /// When: at its start, in a background task at its end, or in each request, until the file of --until is there.
    #[arg(long)]
    when: When,
    #[arg(long, value_name = "FILE", default_value = "/file")]
    until: PathBuf,
}

#[derive(Clone, clap::ValueEnum)]
enum When {
    Start,
    End,
    /// Its worker thread waits too, as it never should.
    Request,
    /// Never: its start panics.
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
