//! The life of the service, in order:
//! inherit -> listen -> take over -> ready -> serve -> drain -> hand over.

mod app;
mod config;
mod connection;
mod drain;
mod failure;
mod fds;
mod handover;
mod life;
mod listeners;
mod log;
mod registry;
mod requests;
mod server;
mod signals;
mod stream;
mod systemd;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use tracing::{debug, info, warn};

use crate::config::{Command, Config};
use crate::connection::Handler;
use crate::failure::Result;
use crate::handover::Received;
use crate::life::Life;
use crate::listeners::{Inheritance, Listener};
use crate::registry::{Counts, Limits, Registry};
use crate::server::Server;
use crate::signals::Signals;

/// For a peer to take the last answer of a connection and close it.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Logging may not be set up yet; <3> is the level of an error, see sd-daemon(3).
            let level = if systemd::stderr_is_the_journal() { "<3>" } else { "" };
            let _ = writeln!(std::io::stderr(), "{level}{}: {failure}", env!("CARGO_PKG_NAME"));
            failure.exit_code()
        }
    }
}

fn run() -> Result<()> {
    let config = Config::from_environment()?;
    // No thread exists yet: the environment may be read, and what it names may be taken.
    let inheritance = listeners::take(&config)?;
    let handed_down = handover::next_generation(&inheritance.channels);
    let life = Life::begin(handed_down.or(inheritance.generation).unwrap_or(1));
    log::init(config.log.as_deref(), life.generation)?;
    if config.command == Some(Command::Check) {
        check(&inheritance.listeners);
        return Ok(());
    }
    fds::make_room(config.max_connections);
    let runtime = tokio::runtime::Runtime::new().context("could not start the runtime")?;
    let served = runtime.block_on(live(&config, life, inheritance));
    // What still runs has had its time.
    runtime.shutdown_background();
    served
}

async fn live(config: &Config, life: Life, inheritance: Inheritance) -> Result<()> {
    let Inheritance { listeners, channels, .. } = inheritance;
    let mut signals = Signals::new().context("could not watch for signals")?;
    let limits = Limits {
        head: config.head_timeout,
        idle: config.idle_timeout,
        stall: config.request_timeout,
        close: CLOSE_LIMIT,
    };
    let registry = Registry::new(limits);
    let service = requests::service(app::router(), life, config);
    let (server, mut rested) = Server::new(service, registry.clone(), config.max_connections);

    let labels = labels(&listeners);
    let address = listeners.iter().find_map(Listener::bound_address);
    let names: Vec<_> = listeners.iter().map(|listener| listener.name.clone()).collect();
    for listener in listeners {
        server.listen(listener)?;
    }
    tokio::spawn(registry.clone().watch());
    tokio::spawn(systemd::feed_watchdog());

    // Last, when nothing can fail any more: until then the connections are safe where they are.
    let stored = (!channels.is_empty()).then_some(handover::STORE_NAME);
    let received = handover::receive(channels, |name| names.iter().any(|known| **known == *name));
    systemd::ready(&status(&registry, &labels), stored);
    info!(message_id = log::message_id::STARTED, generation = life.generation, "serving on {labels}");
    take_over(&server, received);
    if let Some(address) = address {
        info!("try it: curl http://{address}/");
    }
    let report = {
        let registry = registry.clone();
        tokio::spawn(systemd::report(move || status(&registry, &labels)))
    };
    signals.terminated().await;

    report.abort();
    drain::drain(&server, &mut rested, &mut signals, config.drain_timeout, life.generation).await;
    Ok(())
}

/// Goes on with the connections that the predecessor left.
fn take_over(server: &Server<impl Handler>, received: Received) {
    let Received { connections, sender, refused, reason } = received;
    let taken_over = connections.len();
    for handed in connections {
        match handed.connect() {
            Ok(connection) => server.adopt(connection),
            Err(error) => debug!(%error, "a client left while its connection was parked"),
        }
    }
    if let Some(sender) = sender {
        let rest_ms = u64::try_from(sender.rest().as_millis()).unwrap_or(u64::MAX);
        info!(
            message_id = log::message_id::TOOK_OVER,
            taken_over,
            rest_ms,
            "took over {taken_over} connections, {rest_ms} ms after the predecessor's last answer",
        );
    }
    if let Some(reason) = reason {
        warn!(refused, "closed {refused} connections of the predecessor: {reason}");
    }
}

/// All that a start does short of serving is done.
#[expect(clippy::print_stdout, reason = "the answer that was asked for")]
fn check(listeners: &[Listener]) {
    println!("ready to serve on {}", labels(listeners));
}

fn labels(listeners: &[Listener]) -> String {
    listeners.iter().map(Listener::label).collect::<Vec<_>>().join(" ")
}

fn status(registry: &Registry, labels: &str) -> String {
    let Counts { connections, in_flight, answered } = registry.counts();
    format!("serving on {labels}: {connections} connections, {in_flight} in flight, {answered} answered")
}
