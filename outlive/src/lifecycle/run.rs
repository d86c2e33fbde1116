//! The entry point, [`run`]: it finds out which role a process has (the first process, the intermediate process of a
//! reload, or a successor), and acts accordingly.
//!
//! A process that serves starts (`start.rs`), serves (`serve.rs`) and stops (`stop.rs`); each step consumes the value
//! that the step before it returned.

use std::convert::Infallible;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::app::process::Process;
use crate::app::setup::Setup;
use crate::lifecycle::cli::{self, Action, CommandLine};
use crate::lifecycle::own_command;
use crate::lifecycle::runtime::Runtime;
use crate::lifecycle::start::{Boot, Started, call_start, check_proxy_protocol, endpoint_kinds};
use crate::listeners::{self, Inherited, NamedSockets, Purpose};
use crate::observe::{log, traces};
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
    run_with(start, async |command: Infallible, _: C, _: &mut Setup| match command {})
}

/// As [`run`], for a service that has commands of its own, such as `shop migrate`.
///
/// `D` has the commands. `execute` receives the command of the command line, the application's options, and a [`Setup`].
/// The process has the options, variables, credentials and log of the service, but it listens on no socket, takes none
/// from systemd, sends no message to the service manager, and begins no background task. Options of the service may stand
/// before and after the command; the arguments of a command have no variables and are not in the file of `--config`.
///
/// SIGTERM, SIGINT and SIGHUP cancel [`Setup::shutdown`], at which `execute` should return soon. A second signal ends the
/// process at once. The exit code is 0 if `execute` returns `Ok`, and 1 after an error, which is logged in one line; the
/// codes of `run` have the same meaning here. The functions of [`Setup::on_exit`] run before the exit.
///
/// ```no_run
/// use axum::{Router, routing::get};
/// use outlive::Setup;
///
/// /// Sells things.
/// #[derive(clap::Parser)]
/// #[command(version, about)]
/// struct Config {
///     /// Password of the database: the unit's credential `database-password`.
///     #[arg(long)]
///     database_password: outlive::Secret,
/// }
///
/// #[derive(clap::Subcommand)]
/// enum Command {
///     /// Bring the tables of the database up to date.
///     Migrate {
///         /// Only print what would be done.
///         #[arg(long)]
///         dry_run: bool,
///     },
/// }
///
/// async fn start(_: Config, _: &mut Setup) -> anyhow::Result<Router> {
///     Ok(Router::new().route("/", get("hello\n")))
/// }
///
/// async fn execute(command: Command, _: Config, setup: &mut Setup) -> anyhow::Result<()> {
///     match command {
///         Command::Migrate { dry_run } => {
///             tracing::info!(dry_run, "the tables are up to date");
///             anyhow::ensure!(!setup.shutdown().is_cancelled(), "stopped before the last table");
///         }
///     }
///     Ok(())
/// }
///
/// fn main() -> std::process::ExitCode {
///     outlive::run_with(start, execute)
/// }
/// ```
///
/// # Panics
/// If an option of `C` has the name of an option of the library, if a command of `D` is called `check` or `takeover`, or
/// if an option of such a command has the name of an option of `C` or of the library.
pub fn run_with<C, D, S, R>(start: S, execute: R) -> ExitCode
where
    C: Parser,
    D: Subcommand,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
    R: AsyncFnOnce(D, C, &mut Setup) -> anyhow::Result<()>,
{
    let _flush = FlushAtEnd;
    match try_run(start, execute) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            log::last_line(&cli::name::<C>(), &failure);
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

fn try_run<C, D, S, R>(start: S, execute: R) -> Result<()>
where
    C: Parser,
    D: Subcommand,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
    R: AsyncFnOnce(D, C, &mut Setup) -> anyhow::Result<()>,
{
    let program = Program::current(cli::position_of_takeover::<C, D>)
        .context("could not find out the path of this binary")?;
    match takeover::role() {
        Role::First => run_initial(start, execute, program),
        Role::Intermediate => Ok(takeover::run_intermediate(&program)?),
        Role::Successor => run_successor::<C, D, S>(start, program),
    }
}

/// Runs a process that was started by a service manager or from a shell, and not by a reload.
fn run_initial<C, D, S, R>(start: S, execute: R, program: Program) -> Result<()>
where
    C: Parser,
    D: Subcommand,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
    R: AsyncFnOnce(D, C, &mut Setup) -> anyhow::Result<()>,
{
    let line: CommandLine<C, D> = CommandLine::read().inspect_err(|failure| {
        if program.is_takeover() {
            takeover::give_up(&failure.to_string());
        }
    })?;
    // These run before any thread exists, because they read and change the environment.
    match line.action {
        Action::Takeover => takeover::command(program, line.config.takeover_timeout),
        Action::Check => check(&line, start),
        Action::Own => own_command::run(&line, execute),
        Action::Serve => {
            let inherited = listeners::inherit(&line.config.listen)?;
            let boot = Boot::new(&line, inherited, program, Role::First)?;
            let runtime = Runtime::new()?;
            match runtime.block_on(Started::new(boot, start))? {
                Some(started) => runtime.block_on(serve(started, None)),
                None => Ok(()),
            }
        }
    }
}

/// Runs a process that a reload started.
fn run_successor<C, D, S>(start: S, program: Program) -> Result<()>
where
    C: Parser,
    D: Subcommand,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let mut predecessor = PredecessorLink::find()?;
    match start_successor::<C, D, S>(start, program, &mut predecessor) {
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
fn start_successor<C, D, S>(
    start: S,
    program: Program,
    predecessor: &mut PredecessorLink,
) -> Result<(Runtime, Option<Started>)>
where
    C: Parser,
    D: Subcommand,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let line: CommandLine<C, D> = CommandLine::read()?;
    let inherited = predecessor.inherit(line.config.takeover_timeout).map_err(Failure::unavailable)?;
    let boot = Boot::new(&line, inherited, program, Role::Successor)?;
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
fn check<C, D, S>(line: &CommandLine<C, D>, start: S) -> Result<()>
where
    C: Parser,
    D: Subcommand,
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    let config = &line.config;
    let mut inherited = listeners::inherit(&config.listen)?;
    let service = line.service(&inherited.credentials)?;
    inherited.listen_for_check(&config.listen)?;
    log::init(line.name.clone(), config.log.as_deref(), config.log_format, 1)?;
    line.warn_of_unknown_variables();
    traces::check()?;
    endpoint_kinds(config, &inherited)?;
    let Inherited { mut listeners, named, credentials, socket_files, .. } = inherited;
    let sockets = Arc::new(NamedSockets::new(named, &config.listen, socket_files, Purpose::Check));
    Runtime::new()?.block_on(async {
        let mut setup = Setup::new(Process::begin(1), CancellationToken::new(), credentials, sockets.clone());
        drop(call_start(start, service.options, &mut setup, config.start_timeout).await?);
        listeners.extend(sockets.finish().map_err(Failure::config)?.0);
        check_proxy_protocol(&config.proxy_protocol, &listeners)?;
        setup.hooks.run().await;
        Ok::<_, Failure>(())
    })?;
    let (values, labels) = (cli::table(&service.values), listeners::labels(&listeners));
    writeln!(stdout(), "{values}ready to serve on {labels}")
        .context("could not write to standard output")
        .map_err(Failure::unavailable)
}
