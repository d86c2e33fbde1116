//! A service that knows its clients: it answers with the address of the client, over HTTP and on a socket of its own, and with
//! the names in its certificate. `e2e/process/tests/process/proxies.rs` and `client_certificates.rs` test it.
//!
//! `cargo run --example who -- --listen 127.0.0.1:8080 --listen who=127.0.0.1:9000 --socket who
//! --proxy-protocol who --trusted-proxies 127.0.0.1`

use std::process::ExitCode;

use axum::Router;
use axum::routing::get;
use outlive::{Carry, ClientCertificate, Peer, SocketStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Answers with the address of the client, and with the names in its certificate.
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
    let address = get(async |peer: Peer| format!("{peer}\n"));
    Ok(Router::new().route("/", address).route("/certificate", get(names)))
}

/// Answers with the names in the certificate of the client, and with 403 if it has presented none.
async fn names(certificate: ClientCertificate) -> String {
    let name = certificate.common_name().unwrap_or("-");
    let uris: Vec<_> = certificate.uris().collect();
    format!("{name} {}\n", uris.join(" "))
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
