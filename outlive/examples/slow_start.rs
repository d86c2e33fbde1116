//! A service whose start waits for something that never comes: what happens at the limit, at a signal, or at a panic.

use std::process::ExitCode;

use axum::Router;

/// Waits.
#[derive(clap::Parser)]
#[command(name = "slow_start", version, about)]
struct Config {
    /// Panics instead.
    #[arg(long)]
    panic: bool,
}

async fn start(config: Config, _: &mut outlive::Service) -> anyhow::Result<Router> {
    assert!(!config.panic, "on purpose");
    tracing::info!("waiting for something that never comes");
    std::future::pending().await
}

fn main() -> ExitCode {
    outlive::run(start)
}
