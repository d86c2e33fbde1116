//! Restarts or reloads each server once per second, under each load.

use std::time::Duration;

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use testkit::client::Target;
use testkit::load::{Connections, Load, Report};

use crate::Extent;
use crate::servers::{Contender, Peers, Server};

/// Time between two restarts.
const INTERVAL: Duration = Duration::from_secs(1);
/// The errors that a client can see when a server closes a connection or a port. Any other loss would be a fault of the
/// client or a wrong response, and would make the figures doubtful.
const EXPLAINED: [&str; 7] = [
    "closed before the answer (0 bytes of it came)",
    "closed inside an answer",
    "reset before the answer",
    "could not send",
    "Connection refused",
    "Connection reset by peer",
    // GOAWAY arrived while a request was on its way.
    "connection error received: not a result of an error",
];

type MakeLoad = fn(&Target) -> Load;
/// The load that only servers with the route `/socket` answer.
pub const WEBSOCKETS: &str = "10 WebSockets";
const LOADS: [(&str, MakeLoad); 5] = [
    ("10 keep-alive connections", Load::saturating),
    ("one connection per request", Load::connection_per_request),
    ("POST of 1 KiB", Load::post),
    ("HTTP/2 over TLS", Load::http2),
    (WEBSOCKETS, Load::websockets),
];

/// The result of one server under one load.
pub struct Strip {
    pub server: &'static str,
    pub load: &'static str,
    keeps_connections: bool,
    pub report: Report,
    /// Times of the restarts since the beginning of the load.
    pub restarts: Vec<Duration>,
    took: Vec<Duration>,
}

/// `measures` tells which loads are measured, by their names.
pub fn run(
    peers: &Peers,
    extent: &Extent,
    progress: &ProgressBar,
    measures: impl Fn(&str) -> bool,
) -> Result<Vec<Strip>> {
    let mut strips = Vec::new();
    for contender in peers.contenders() {
        progress.set_message(format!("{}: starting", contender.label));
        let server = contender.start()?;
        for (label, load) in LOADS.into_iter().filter(|(label, _)| measures(label)) {
            let target = match load(&server.target).connections {
                Connections::Http2 if !contender.has_tls() => continue,
                Connections::WebSocket if !contender.has_websockets() => continue,
                Connections::Http2 => server.tls()?,
                _ => server.target.clone(),
            };
            progress.set_message(format!("{}: {label}", contender.label));
            strips.push(under(&contender, &server, label, load(&target), extent)?);
        }
    }
    Ok(strips)
}

fn under(
    contender: &Contender,
    server: &Server,
    label: &'static str,
    load: Load,
    extent: &Extent,
) -> Result<Strip> {
    let keeps_connections = load.connections != Connections::OneEach;
    let running = load.start(server.enter());
    let begun = running.begun;
    let (mut restarts, mut took) = (Vec::new(), Vec::new());
    while begun.elapsed() + INTERVAL / 2 < extent.load {
        std::thread::sleep(INTERVAL / 2);
        restarts.push(begun.elapsed());
        took.extend(server.restart()?);
        let next = INTERVAL * u32::try_from(restarts.len())?;
        std::thread::sleep(next.saturating_sub(begun.elapsed()));
    }
    let report = running.stop();
    let server = contender.label;
    Ok(Strip { server, load: label, keeps_connections, report, restarts, took })
}

impl Strip {
    pub fn figures(&self) -> Value {
        let millis = |time: Duration| (time.as_secs_f64() * 100_000.0).round() / 100.0;
        let report = &self.report;
        let closed = report.connections.saturating_sub(report.clients);
        let mut took = self.took.clone();
        took.sort();
        json!({
            "server": self.server,
            "load": self.load,
            "starts": self.restarts.len(),
            "answered": report.answered,
            "lost": report.lost(),
            "lost by kind": report.lost,
            "connections closed": self.keeps_connections.then_some(closed),
            "p50 ms": millis(report.percentile(0.5)),
            "p99 ms": millis(report.percentile(0.99)),
            "p99.9 ms": millis(report.percentile(0.999)),
            "longest ms": millis(report.longest),
            "verb ms": took.get(took.len() / 2).map(|median| millis(*median)),
        })
    }

    /// Returns an error if a loss is not in `EXPLAINED`.
    pub fn assert_explained(&self) -> Result<()> {
        for kind in self.report.lost.keys() {
            if !EXPLAINED.iter().any(|known| kind.contains(known)) {
                bail!("{}, {}: {kind}", self.server, self.load);
            }
        }
        Ok(())
    }
}
