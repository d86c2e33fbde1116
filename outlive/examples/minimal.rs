//! A complete service. Try it with `cargo run --example minimal`; under systemd it needs `minimal.socket` and
//! `minimal.service`.

use std::process::ExitCode;

use axum::Router;
use axum::routing::get;

/// Says hello.
#[derive(clap::Parser)]
#[command(name = "minimal", version, about)]
struct Config {}

async fn start(_: Config, _: &mut outlive::Setup) -> anyhow::Result<Router> {
    Ok(Router::new().route("/", get("hello\n")))
}

fn main() -> ExitCode {
    outlive::run(start)
}
