//! Runs a command of the application, such as `shop migrate`: with its configuration, credentials and log, but without
//! listeners, and without a message to the service manager.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use anyhow::Context;
use clap::{Parser, Subcommand};
use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::app::process::Process;
use crate::app::setup::Setup;
use crate::app::tasks;
use crate::lifecycle::cli::CommandLine;
use crate::lifecycle::runtime::Runtime;
use crate::listeners::{NamedSockets, Purpose, SocketFiles};
use crate::observe::log;
use crate::os::credentials::Credentials;
use crate::os::exit::{Exit, FLUSH_LIMIT, Failure, Result};
use crate::os::signals::Signals;
use crate::os::task;

/// Runs the command of `line` with `execute` until it ends.
pub fn run<C, D, R>(line: &CommandLine<C, D>, execute: R) -> Result<()>
where
    C: Parser,
    D: Subcommand,
    R: AsyncFnOnce(D, C, &mut Setup) -> anyhow::Result<()>,
{
    let credentials = Credentials::of_command().map_err(Failure::config)?;
    let service = line.service(&credentials)?;
    let command = service.command.context("the command line has no command")?;
    log::init(line.name.clone(), line.config.log.as_deref(), line.config.log_format, 1)?;
    line.warn_of_unknown_variables();
    Runtime::new()?.block_on(async {
        let signals = Signals::new().context("could not watch for signals")?;
        let stop = CancellationToken::new();
        task::spawn(stop_on_signal(signals, stop.clone()));
        let sockets = NamedSockets::new(Vec::new(), &[], SocketFiles::owned(), Purpose::Command);
        let mut setup = Setup::new(Process::begin(1), stop, credentials, Arc::new(sockets));
        let executed = AssertUnwindSafe(execute(command, service.options, &mut setup)).catch_unwind().await;
        for task in &setup.tasks {
            warn!(
                task = task.name,
                "task {:?} did not run, because only a process that serves runs tasks", task.name
            );
        }
        setup.hooks.run().await;
        match executed {
            Ok(result) => result.map_err(Failure::command),
            Err(panic) => Err(Failure::software(tasks::panic_message(&*panic).context("the command failed"))),
        }
    })
}

/// Cancels `stop` at the first signal, and ends the process at the second one. It is a task of its own, because the
/// command may block its thread.
async fn stop_on_signal(mut signals: Signals, stop: CancellationToken) {
    // SIGHUP too, because there is nothing to reload: it means that the terminal has been closed.
    signals.next().await;
    info!("received a stop signal: waiting for the command to end; a second signal ends the process at once");
    stop.cancel();
    signals.next().await;
    error!("cut off the command at a second stop signal");
    log::flush(FLUSH_LIMIT);
    std::process::exit(Exit::Command as i32);
}
