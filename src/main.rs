//! The life of the service, in order:
//! inherit -> listen -> take over -> ready -> serve -> drain -> hand over.

mod admin;
mod app;
mod config;
mod connection;
mod context;
mod credentials;
mod door;
mod drain;
mod failure;
mod fds;
mod handover;
mod life;
mod listeners;
mod lock;
mod log;
mod metrics;
mod raw;
mod registry;
mod requests;
mod server;
mod signals;
mod status;
mod stream;
mod systemd;
mod takeover;
mod tls;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use tokio_rustls::TlsAcceptor;
use tracing::info;

use crate::admin::Admin;
use crate::config::{Command, Config};
use crate::connection::Doors;
use crate::door::Door;
use crate::drain::Drain;
use crate::failure::{Failure, Result};
use crate::life::{Life, Shutdown};
use crate::listeners::{Inheritance, Listener};
use crate::registry::Registry;
use crate::requests::Routes;
use crate::server::{Queues, Server};
use crate::signals::Signals;
use crate::status::{Status, Voice};
use crate::takeover::{Ending, Estate, Predecessor, Program, Role, TakeoverSocket};

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
    let program = Program::current().context("the path of this binary")?;
    match takeover::role() {
        Role::First => first(program),
        Role::Middle => Ok(takeover::be_the_middle(&program)?),
        Role::Successor => {
            let mut predecessor = Some(Predecessor::find()?);
            let result = inherit_and_live(program, &mut predecessor);
            if let (Err(failure), Some(predecessor)) = (&result, predecessor) {
                predecessor.give_up(&failure.to_string());
            }
            result
        }
    }
}

/// A process that a person or a service manager started.
fn first(program: Program) -> Result<()> {
    let config = Config::from_environment().inspect_err(|failure| {
        if program.is_takeover() {
            takeover::give_up(&failure.to_string());
        }
    })?;
    // No thread exists yet: the environment may be read, and what it names may be taken.
    match config.command {
        Some(Command::Takeover) => takeover::command(program, config.takeover_timeout),
        Some(Command::Check) => {
            let mut inheritance = listeners::take()?;
            inheritance.listen(&config)?;
            log::init(config.log.as_deref(), 1)?;
            tls_of(&config, &inheritance)?;
            check(&inheritance.listeners);
            Ok(())
        }
        None => {
            let inheritance = listeners::take()?;
            live(&config, inheritance, program, &mut None)
        }
    }
}

/// A process that its predecessor or a takeover command started.
fn inherit_and_live(program: Program, predecessor: &mut Option<Predecessor>) -> Result<()> {
    let config = Config::from_environment()?;
    let inherited = predecessor.as_mut().context("no predecessor")?.inherit(config.takeover_timeout);
    live(&config, inherited.map_err(Failure::unavailable)?, program, predecessor)
}

fn live(
    config: &Config,
    inheritance: Inheritance,
    program: Program,
    predecessor: &mut Option<Predecessor>,
) -> Result<()> {
    let handed_down = handover::next_generation(&inheritance.channels);
    let life = Life::begin(handed_down.or(inheritance.generation).unwrap_or(1));
    log::init(config.log.as_deref(), life.generation)?;
    fds::make_room(config.max_connections);
    let runtime = tokio::runtime::Runtime::new().context("could not start the runtime")?;
    let served = runtime.block_on(serve(config, life, inheritance, program, predecessor));
    // What still runs has had its time.
    runtime.shutdown_background();
    served
}

async fn serve(
    config: &Config,
    life: Life,
    mut inheritance: Inheritance,
    program: Program,
    predecessor: &mut Option<Predecessor>,
) -> Result<()> {
    let mut signals = Signals::new().context("could not watch for signals")?;
    inheritance.listen(config)?;
    let tls = tls_of(config, &inheritance)?;
    let Inheritance { listeners, channels, credentials, watchdog, .. } = inheritance;
    let shutdown = Shutdown::default();
    let registry = Registry::new(config.limits(), shutdown.clone());
    let status = Arc::new(Status::new(registry.clone(), listeners::labels(&listeners)));
    let queues = Queues::default();
    let admin = Admin { life, registry: registry.clone(), queues: queues.clone() };
    let doors = Doors {
        routes: Routes::new(app::router(), config),
        admin: Routes::new(admin::router(admin), config),
        tls,
        life,
        shutdown,
    };
    let (server, mut rested) = Server::new(doors, registry.clone(), config.max_connections, queues);
    let estate =
        Estate::new(&listeners, &credentials, life.generation, watchdog, program, config.takeover_timeout)
            .context("could not keep the listeners for a successor")?;
    tokio::spawn(registry.watch());

    // Last, when nothing can fail any more: until then the connections are safe where they are.
    let committed = match predecessor.take() {
        Some(predecessor) => Some(predecessor.commit().await.map_err(Failure::unavailable)?),
        None => None,
    };
    let names: Vec<_> = listeners.iter().map(|listener| listener.name.clone()).collect();
    let example = listeners.iter().find_map(Listener::try_it);
    for listener in listeners {
        server.listen(listener)?;
    }
    let socket = if let Some(committed) = committed {
        let outcome = committed.take_over(server.clone(), names, status.clone()).await;
        let socket = TakeoverSocket::open();
        outcome.ok();
        socket
    } else {
        let socket = TakeoverSocket::open();
        handover::pick_up(&server, channels, &names, &status);
        socket
    };
    let generation = life.generation;
    info!(message_id = log::message_id::STARTED, generation, "serving on {}", status.listeners());
    if let Some(example) = example {
        info!("try it: {example}");
    }
    tokio::spawn(systemd::report(status.clone()));
    if let Some(watchdog) = watchdog {
        tokio::spawn(systemd::feed_watchdog(watchdog, status.clone()));
    }

    let ending = takeover::serve_until_end(&estate, socket, &mut signals, &status).await;
    let drain = Drain::new(&server, &mut rested, &mut signals, config.drain_timeout, generation);
    match ending {
        Ending::Terminated => {
            status.set_voice(Voice::Ending);
            // Our copies would keep our own ports open.
            drop(estate);
            drain.leave(config.drain_delay).await;
        }
        Ending::Succeeded { successor, terminations } => {
            listeners::pass_on_socket_files();
            drain.pass_on(successor, terminations).await;
        }
    }
    Ok(())
}

/// What the https listeners shake hands with, where there are any.
fn tls_of(config: &Config, inheritance: &Inheritance) -> Result<Option<TlsAcceptor>> {
    let is_wanted = inheritance.listeners.iter().any(|listener| listener.door() == Door::Https);
    is_wanted.then(|| tls::acceptor(config, &inheritance.credentials).map_err(Failure::config)).transpose()
}

/// All that a start does short of serving is done.
#[expect(clippy::print_stdout, reason = "the answer that was asked for")]
fn check(listeners: &[Listener]) {
    println!("ready to serve on {}", listeners::labels(listeners));
}
