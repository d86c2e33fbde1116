//! A service with sockets of its own beside HTTP: a TCP port on which devices send lines, and a UDP port for readings. Over
//! restarts and reloads it loses no line and no datagram, and keeps the connections open.
//!
//! `cargo run --example ingest -- --listen 127.0.0.1:8080 --listen lines=127.0.0.1:9000
//! --listen readings=127.0.0.1:9001 --file /tmp/readings`

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use axum::Router;
use axum::routing::get;
use outlive::{Carry, Setup, SocketStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The longest line, in bytes.
const LINE_LIMIT: usize = 4096;

/// Receives lines and readings.
#[derive(clap::Parser)]
#[command(name = "ingest", version, about)]
struct Config {
    /// File to which each reading is appended.
    #[arg(long)]
    file: PathBuf,
}

/// The state that the handler of a connection leaves for the handler in the next process.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Progress {
    lines: u64,
    /// The bytes that were read after the last whole line.
    rest: Vec<u8>,
}

async fn start(config: Config, setup: &mut Setup) -> anyhow::Result<Router> {
    setup.serve("lines", count)?;
    let readings = setup.udp_socket("readings")?;
    let mut file =
        File::options().create(true).append(true).open(&config.file).context("could not open --file")?;
    setup
        .background("readings", async move |end| {
            let mut datagram = vec![0; 65536];
            while let Some(received) = end.run_until_cancelled(readings.recv(&mut datagram)).await {
                let length = received?;
                file.write_all(&[&datagram[..length], b"\n"].concat())?;
            }
            Ok(())
        })
        // Otherwise both processes of a reload would read, and the readings would be out of order.
        .exclusive();
    Ok(Router::new().route("/", get("ingest\n")))
}

/// Confirms each line with its number on this connection.
async fn count(mut stream: SocketStream, carry: Carry<Progress>) -> anyhow::Result<()> {
    let mut progress = carry.received()?.unwrap_or_default();
    loop {
        tokio::select! {
            read = stream.read_buf(&mut progress.rest) => if read? == 0 {
                return Ok(());
            },
            () = carry.requested() => {
                carry.hand_on(&progress);
                return Ok(());
            }
        }
        while let Some(end) = progress.rest.iter().position(|byte| *byte == b'\n') {
            progress.rest.drain(..=end);
            progress.lines += 1;
            stream.write_all(format!("{}\n", progress.lines).as_bytes()).await?;
        }
        ensure!(progress.rest.len() <= LINE_LIMIT, "a line is longer than {LINE_LIMIT} bytes");
    }
}

fn main() -> ExitCode {
    outlive::run(start)
}
