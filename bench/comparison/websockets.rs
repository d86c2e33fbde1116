//! Echoes on WebSockets: what `Carry` costs, beside bare `axum::serve`. The rate is that for a second of the server's
//! processor time, because other work on the machine would disturb it less than one for a second of the clock.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::Value;
use testkit::client::WEBSOCKET;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Extent;
use crate::servers::{Peers, SOCKETS};
use crate::throughput::{Contender, Cores, measure, ratios};

/// Connections of the load.
const CONNECTIONS: usize = 8;
/// The length of a message, and how many of them a client sends before it has read their echoes.
const MESSAGES: [(&str, usize, usize); 2] = [("16 bytes", 16, 512), ("64 KiB", 64 * 1024, 8)];

pub fn run(peers: &Peers, extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    let mut rows = Vec::new();
    for (label, length, batch) in MESSAGES {
        progress.set_message(format!("WebSocket messages of {label}"));
        let mut contenders = vec![
            Contender::ours("this service", Path::new(SOCKETS), "/socket", Cores::OneEach),
            Contender::ours("this service without Carry", Path::new(SOCKETS), "/plain", Cores::OneEach),
            Contender::bare(peers, "/socket", Cores::OneEach),
        ];
        measure(&mut contenders, extent.rounds, |pid, port, path| {
            echoes(pid, port, path, length, batch, extent.round)
        })?;
        let of = ratios(&contenders, 1, "messages per second of processor time", "relative to without Carry");
        for mut row in of.as_array().cloned().unwrap_or_default() {
            row["messages"] = label.into();
            rows.push(row);
        }
    }
    Ok(rows.into())
}

/// A handshake for `path`.
pub fn handshake(path: &str) -> Vec<u8> {
    String::from_utf8_lossy(WEBSOCKET).replacen("/socket", path, 1).into_bytes()
}

/// The echoes of messages of `length` bytes for each second of the server's processor time. The client has a core of its
/// own.
fn echoes(pid: Pid, port: u16, path: &str, length: usize, batch: usize, time: Duration) -> Result<f64> {
    let load = || {
        let mut client = CpuSet::new();
        client.set(1);
        sched_setaffinity(None, &client)?;
        testkit::block_on(async {
            let (begun, before) = (Instant::now(), processor_time(pid)?);
            let clients = (0..CONNECTIONS).map(|_| converse(port, path, length, batch, begun + time));
            let counts = futures_util::future::try_join_all(clients).await?;
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            anyhow::Ok(counts.iter().sum::<usize>() as f64 / (processor_time(pid)? - before))
        })
    };
    std::thread::scope(|scope| scope.spawn(load).join().expect("the thread does not panic"))
}

/// The processor time of all threads of a process, in seconds.
fn processor_time(pid: Pid) -> Result<f64> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()))?;
    let times = threads.map(|thread| {
        let statistics = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        let time = statistics.split_whitespace().next().context("schedstat is empty")?;
        Ok(time.parse::<f64>()? / 1e9)
    });
    times.sum()
}

/// Sends batches of messages on one WebSocket until `end`. Returns how many echoes have arrived.
async fn converse(port: u16, path: &str, length: usize, batch: usize, end: Instant) -> Result<usize> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&handshake(path)).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.context("no response")?);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));

    let sent = frame(Some([1, 2, 3, 4]), length).repeat(batch);
    let echo = frame(None, length);
    let (mut reading, mut writing) = stream.split();
    let mut buffer = vec![0; 256 * 1024];
    let mut count = 0;
    while Instant::now() < end {
        let read = async {
            let mut left = echo.len() * batch;
            while left > 0 {
                let read = reading.read(&mut buffer).await?;
                ensure!(read > 0 && read <= left, "{read} bytes of {left} arrived");
                left -= read;
            }
            Ok(())
        };
        let write = async { writing.write_all(&sent).await.context("could not send") };
        tokio::try_join!(read, write)?;
        count += batch;
    }
    Ok(count)
}

/// A binary message of zeros in one frame, with the mask of a client or without as from a server.
pub fn frame(mask: Option<[u8; 4]>, length: usize) -> Vec<u8> {
    let flag = if mask.is_some() { 0x80 } else { 0 };
    let mut frame = vec![0x82];
    if let Ok(length @ ..126) = u8::try_from(length) {
        frame.push(flag | length);
    } else {
        frame.push(flag | 127);
        frame.extend((length as u64).to_be_bytes());
    }
    frame.extend(mask.into_iter().flatten());
    // A mask is combined with the payload by XOR, so these are zeros too.
    frame.extend(mask.unwrap_or_default().iter().cycle().take(length));
    frame
}
