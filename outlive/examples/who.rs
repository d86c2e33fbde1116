//! A service to try behind a proxy: it answers with the address of its client, over HTTP and on a socket of its own.
//! `e2e/process/tests/process/proxies.rs` tests it.
//!
//! `cargo run --example who -- --listen 127.0.0.1:8080 --listen who=127.0.0.1:9000 --socket who
//! --proxy-protocol who --trusted-proxies 127.0.0.1`

use std::process::ExitCode;

use axum::Router;
use axum::routing::get;
use outlive::{Carry, Peer, SocketStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Answers with the address of the client.
#[derive(clap::Parser)]
#[command(name = "who", version, about)]
struct Config {
    /// Name of a socket on which the service answers each byte with the address of the client.
    #[arg(long, value_name = "NAME")]
    socket: Option<String>,
}

async fn start(config: Config, setup: &mut outlive::Setup) -> anyhow::Result<Router> {
    if let Some(name) = &config.socket {
        setup.serve(name, answer)?;
    }
    Ok(Router::new().route("/", get(async |peer: Peer| format!("{peer}\n"))))
}

async fn answer(mut stream: SocketStream, carry: Carry<()>) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            read = stream.read_u8() => {
                read?;
                let line = format!("{}\n", stream.peer());
                stream.write_all(line.as_bytes()).await?;
            }
            () = carry.requested() => {
                carry.hand_on(&());
                return Ok(());
            }
        }
    }
}

fn main() -> ExitCode {
    outlive::run(start)
}
