//! The entry point, [`run`]: it finds out which role a process has (the first process, the intermediate process of a
//! reload, or a successor), and acts accordingly.
//!
//! A process that serves starts (`start.rs`), serves (`serve.rs`) and stops (`stop.rs`); each step consumes the value
//! that the step before it returned.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use clap::Parser;
use tokio_util::sync::CancellationToken;

use crate::app::process::Process;
use crate::app::setup::Setup;
use crate::lifecycle::cli::{self, CommandLine};
use crate::lifecycle::config::Command;
use crate::lifecycle::start::{Boot, Started, call_start, endpoint_kinds};
use crate::listeners::{self, Inherited, NamedSockets, Purpose};
use crate::observe::log;
use crate::os::exit::{FLUSH_LIMIT, Failure, Result};
use crate::os::systemd;
use crate::takeover::{self, PredecessorLink, Program, Role};

/// Runs a service until it stops, and returns the exit code. Call it as the only statement of `main`, because it sets
/// up the tokio runtime, logging, signals and the panic hook itself.
///
/// `C` is the application's part of the command line. `start` receives it with a [`Setup`], on which it registers
/// background tasks, checks and hooks, and returns the routes.
///
/// The start fails if `start` returns an error, panics, or takes longer than `--start-timeout`. The process then logs
/// one line with the reason, and exits with a code of `sysexits.h`: 78 if an option, an environment variable or a file
/// is invalid; 69 if `start` failed or took too long, or a resource is not available; 70 otherwise. If this happens
/// during a reload, the old process keeps serving.
///
/// ```no_run
/// use axum::{Router, routing::get};
///
/// /// Says hello.
/// #[derive(clap::Parser)]
/// #[command(version, about)]
/// struct Config {
///     /// Name to greet. In a package called app, the environment variable APP_GREET sets it too.
///     #[arg(long, default_value = "world")]
///     greet: String,
/// }
///
/// async fn start(config: Config, _setup: &mut outlive::Setup) -> anyhow::Result<Router> {
///     Ok(Router::new().route("/", get(async move || format!("hello {}\n", config.greet))))
/// }
///
/// fn main() -> std::process::ExitCode {
///     outlive::run(start)
/// }
/// ```
///
/// # Panics
/// If an option of `C` has the name of an option of the library.
pub fn run<C, S>(start: S) -> ExitCode
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let _flush = FlushAtEnd;
    match try_run(start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // The prefix gives the line the priority "error" in the journal (sd-daemon(3)).
            let level = if systemd::stderr_is_the_journal() { "<3>" } else { "" };
            log::last_line(&format!("{level}{}: {failure}", cli::name::<C>()));
            failure.exit_code()
        }
    }
}

/// Waits at the end of a process until what it has logged and sent to the service manager is written, also when the
/// process ends with a panic.
struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        // Before the log, because a message that cannot be sent to the service manager is logged.
        systemd::flush(FLUSH_LIMIT);
        log::flush(FLUSH_LIMIT);
    }
}

/// The tokio runtime. Its drop does not wait for tasks that still run, because [`Serving::stop`] has already given them
/// their time. The drop of tokio's own runtime would wait for a handler that blocks its thread, for any length of time.
///
/// [`Serving::stop`]: crate::lifecycle::serve::Serving::stop
struct Runtime(Option<tokio::runtime::Runtime>);

impl Runtime {
    fn new() -> Result<Self> {
        Ok(Self(Some(tokio::runtime::Runtime::new().context("could not start the runtime")?)))
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("only `drop` takes the runtime").block_on(future)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn try_run<C, S>(start: S) -> Result<()>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let program = Program::current(cli::position_of_takeover::<C>)
        .context("could not find out the path of this binary")?;
    match takeover::role() {
        Role::First => run_initial(start, program),
        Role::Intermediate => Ok(takeover::run_intermediate(&program)?),
        Role::Successor => run_successor(start, program),
    }
}

/// Runs a process that was started by a service manager or from a shell, and not by a reload.
fn run_initial<C, S>(start: S, program: Program) -> Result<()>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let line = CommandLine::read().inspect_err(|failure| {
        if program.is_takeover() {
            takeover::give_up(&failure.to_string());
        }
    })?;
    // These run before any thread exists, because they read and change the environment.
    match line.command {
        Some(Command::Takeover) => takeover::command(program, line.config.takeover_timeout),
        Some(Command::Check) => check(line, start),
        None => {
            let inherited = listeners::inherit(&line.config.listen)?;
            let boot = Boot::new(line, inherited, program, Role::First)?;
            let runtime = Runtime::new()?;
            match runtime.block_on(Started::new(boot, start))? {
                Some(started) => runtime.block_on(serve(started, None)),
                None => Ok(()),
            }
        }
    }
}

/// Runs a process that a reload started.
fn run_successor<C, S>(start: S, program: Program) -> Result<()>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let mut predecessor = PredecessorLink::find()?;
    match start_successor(start, program, &mut predecessor) {
        Ok((runtime, Some(started))) => runtime.block_on(serve(started, Some(predecessor))),
        Ok((_, None)) => Ok(()),
        Err(failure) => {
            predecessor.give_up(&failure.to_string());
            Err(failure)
        }
    }
}

/// Does everything that can fail in a successor. Until it returns, the predecessor has the connections and keeps
/// serving.
fn start_successor<C, S>(
    start: S,
    program: Program,
    predecessor: &mut PredecessorLink,
) -> Result<(Runtime, Option<Started>)>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let line: CommandLine<C> = CommandLine::read()?;
    let inherited = predecessor.inherit(line.config.takeover_timeout).map_err(Failure::unavailable)?;
    let boot = Boot::new(line, inherited, program, Role::Successor)?;
    let runtime = Runtime::new()?;
    let started = runtime.block_on(Started::new(boot, start))?;
    Ok((runtime, started))
}

async fn serve(started: Started, predecessor: Option<PredecessorLink>) -> Result<()> {
    let mut serving = started.commit(predecessor).await?;
    let reason = serving.wait_for_stop().await;
    serving.stop(reason).await
}

/// The command `check`: starts the service up to the point at which it would serve.
#[expect(clippy::print_stdout, reason = "the result of the command")]
fn check<C, S>(line: CommandLine<C>, start: S) -> Result<()>
where
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let mut inherited = listeners::inherit(&line.config.listen)?;
    inherited.listen_for_check(&line.config.listen)?;
    log::init(line.name.clone(), line.config.log.as_deref(), 1)?;
    line.warn_of_unknown_variables();
    let CommandLine { config, service: own, .. } = line;
    endpoint_kinds(&config, &inherited)?;
    let Inherited { mut listeners, named, credentials, socket_files, .. } = inherited;
    let sockets = Arc::new(NamedSockets::new(named, &config.listen, socket_files, Purpose::Check));
    Runtime::new()?.block_on(async {
        let mut setup = Setup::new(Process::begin(1), CancellationToken::new(), credentials, sockets.clone());
        drop(call_start(start, own, &mut setup, config.start_timeout).await?);
        listeners.extend(sockets.finish().map_err(Failure::config)?.0);
        setup.hooks.run().await;
        Ok::<_, Failure>(())
    })?;
    println!("ready to serve on {}", listeners::labels(&listeners));
    Ok(())
}
