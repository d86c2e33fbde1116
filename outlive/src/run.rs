//! The life of a service, in order:
//! inherit -> listen -> start -> ready -> take over -> serve -> drain -> hand over -> background tasks end.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use axum::Router;
use clap::Parser;
use futures_util::FutureExt;
use tokio::time::{Instant, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::admin::{self, Admin};
use crate::adopter::Adopter;
use crate::allocator;
use crate::cli::{self, CommandLine};
use crate::config::{Command, Config};
use crate::connection::Services;
use crate::drain::{Drain, Remaining};
use crate::exit::{FLUSH_LIMIT, Failure, Result};
use crate::handover;
use crate::kind::ListenerKind;
use crate::listeners::{self, Inherited, Listener};
use crate::log::{self, message_id};
use crate::process::Process;
use crate::registry::Registry;
use crate::requests::Routes;
use crate::rlimit;
use crate::server::{Acceptor, Queues, Server};
use crate::service::{Hooks, Service};
use crate::signals::Signals;
use crate::status::{ManagerRole, Status};
use crate::systemd;
use crate::takeover::{self, Committed, Ending, Offer, Predecessor, Program, Role, TakeoverSocket};
use crate::tasks;
use crate::tls::{self, Tls};

/// What background tasks have at the least to end in.
const TASKS_MINIMUM: Duration = Duration::from_secs(5);
/// What is asked of systemd beyond each report, so that one late report does not end a start.
const MORE_TIME: Duration = Duration::from_secs(5);

/// Runs the service whose command line is `C` and that begins with `start`: the whole of a `main`.
///
/// `start` gets its configuration, says what there is to say of the service, and gives its routes. An error or a
/// panic in it, or more time than `--start-timeout`, is a start that failed: one line that tells the whole story, and
/// an exit code of `sysexits.h` (78 where a flag or file is to be mended, 69 where something is taken or gone, 70
/// else); at a reload the old process serves on.
///
/// ```no_run
/// use axum::{Router, routing::get};
///
/// /// Says hello.
/// #[derive(clap::Parser)]
/// #[command(version, about)]
/// struct Config {
///     /// Whom to greet; also the variable APP_GREET, where the package is called app.
///     #[arg(long, default_value = "world")]
///     greet: String,
/// }
///
/// async fn start(config: Config, _service: &mut outlive::Service) -> anyhow::Result<Router> {
///     Ok(Router::new().route("/", get(async move || format!("hello {}\n", config.greet))))
/// }
///
/// fn main() -> std::process::ExitCode {
///     outlive::run(start)
/// }
/// ```
///
/// # Panics
/// Where a flag of `C` has the name of one of the library's.
pub fn run<C, S>(start: S) -> ExitCode
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let _flush = FlushAtEnd;
    match try_run(start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // <3> is the level of an error, see sd-daemon(3).
            let level = if systemd::stderr_is_the_journal() { "<3>" } else { "" };
            log::last_line(&format!("{level}{}: {failure}", cli::name::<C>()));
            failure.exit_code()
        }
    }
}

/// Waits at the end of a process until what it has logged and told the service manager is written; also where it ends
/// with a panic.
struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        // Before the log, because what cannot be sent is logged.
        systemd::flush(FLUSH_LIMIT);
        log::flush(FLUSH_LIMIT);
    }
}

fn try_run<C, S>(start: S) -> Result<()>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let program = Program::current(cli::position_of_takeover::<C>)
        .context("could not find out the path of this binary")?;
    match takeover::role() {
        Role::First => first(start, program),
        Role::Intermediate => Ok(takeover::be_the_intermediate(&program)?),
        Role::Successor => {
            let mut predecessor = Some(Predecessor::find()?);
            let result = inherit_and_live(start, program, &mut predecessor);
            if let (Err(failure), Some(predecessor)) = (&result, predecessor) {
                predecessor.give_up(&failure.to_string());
            }
            result
        }
    }
}

/// A process that a person or a service manager started.
fn first<C, S>(start: S, program: Program) -> Result<()>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let line = CommandLine::read().inspect_err(|failure| {
        if program.is_takeover() {
            takeover::give_up(&failure.to_string());
        }
    })?;
    // No thread exists yet: the environment may be read, and what it names may be taken.
    match line.command {
        Some(Command::Takeover) => takeover::command(program, line.config.takeover_timeout),
        Some(Command::Check) => check(line, start),
        None => {
            let inherited = listeners::take(&line.config.listen)?;
            live(line, start, inherited, program, &mut None)
        }
    }
}

/// A process that its predecessor or a takeover command started.
fn inherit_and_live<C, S>(start: S, program: Program, predecessor: &mut Option<Predecessor>) -> Result<()>
where
    C: Parser,
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let line: CommandLine<C> = CommandLine::read()?;
    let inherited = predecessor.as_mut().context("no predecessor")?.inherit(line.config.takeover_timeout);
    live(line, start, inherited.map_err(Failure::unavailable)?, program, predecessor)
}

/// All that a start does short of serving.
#[expect(clippy::print_stdout, reason = "the answer that was asked for")]
fn check<C, S>(line: CommandLine<C>, start: S) -> Result<()>
where
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let CommandLine { name, config, service: own, .. } = line;
    let mut inherited = listeners::take(&config.listen)?;
    inherited.listen_for_check(&config.listen)?;
    log::init(name, config.log.as_deref(), 1)?;
    tls_of(&config, &inherited)?;
    let Inherited { listeners, credentials, .. } = inherited;
    let runtime = tokio::runtime::Runtime::new().context("could not start the runtime")?;
    runtime.block_on(async {
        let mut service = Service::new(Process::begin(1), CancellationToken::new(), credentials);
        drop(begin(start, own, &mut service, config.start_timeout).await?);
        service.hooks.run().await;
        Ok::<_, Failure>(())
    })?;
    runtime.shutdown_background();
    println!("ready to serve on {}", listeners::labels(&listeners));
    Ok(())
}

fn live<C, S>(
    line: CommandLine<C>,
    start: S,
    inherited: Inherited,
    program: Program,
    predecessor: &mut Option<Predecessor>,
) -> Result<()>
where
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let handed_down = handover::next_generation(&inherited.channels);
    let process = Process::begin(handed_down.or(inherited.generation).unwrap_or(1));
    // Before the log, which starts a thread.
    rlimit::make_room(line.config.max_connections);
    let logging = log::init(line.name.clone(), line.config.log.as_deref(), process.generation)?;
    let runtime = tokio::runtime::Runtime::new().context("could not start the runtime")?;
    let served = runtime.block_on(serve(line, start, process, inherited, program, predecessor, logging));
    // What still runs has had its time.
    runtime.shutdown_background();
    served
}

async fn serve<C, S>(
    line: CommandLine<C>,
    start: S,
    process: Process,
    mut inherited: Inherited,
    program: Program,
    predecessor: &mut Option<Predecessor>,
    logging: log::Control,
) -> Result<()>
where
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let CommandLine { name, config, service: own, .. } = line;
    let mut signals = Signals::new().context("could not watch for signals")?;
    inherited.listen(&config.listen, &name)?;
    let tls = tls_of(&config, &inherited)?;
    let Inherited { listeners, channels, credentials, watchdog, .. } = inherited;
    let offer =
        Offer::new(&listeners, &credentials, process.generation, watchdog, program, config.takeover_timeout)
            .context("could not duplicate the listeners")?;

    let shutdown = CancellationToken::new();
    let mut service = Service::new(process, shutdown.clone(), credentials);
    let is_main = predecessor.is_none();
    let routes = tokio::select! {
        routes = begin(start, own, &mut service, config.start_timeout) => routes?,
        never = ask_for_time_to_start(), if is_main => match never {},
        () = signals.terminated() => {
            info!("received a stop signal during startup");
            return Ok(());
        }
    };
    let Service { tasks, checks, hooks, admin: more_admin, .. } = service;
    let registry = Registry::new(config.limits(), shutdown.clone());
    let status = Arc::new(Status::new(registry.clone(), listeners::labels(&listeners)));
    let queues = Queues::default();
    let admin = Admin { process, registry: registry.clone(), queues: queues.clone(), checks };
    let limited = |routes| Routes::new(routes, config.body_limit.0, config.request_timeout);
    let services = Services {
        routes: limited(routes),
        admin: limited(admin::router(admin).merge(more_admin)),
        tls,
        process,
        shutdown,
        rest_limit: config.drain_timeout / 2,
    };
    let (server, mut rested) = Server::new(services, registry.clone(), config.max_connections, queues)?;
    tokio::spawn(registry.clone().watch());
    allocator::give_memory_back(registry.clone());

    let names: Vec<_> = listeners.iter().map(|listener| listener.name.clone()).collect();
    let example = listeners.iter().find_map(Listener::try_it);
    let acceptors = listeners.into_iter().map(Acceptor::new).collect::<anyhow::Result<Vec<_>>>()?;
    // Last, because nothing may fail after it: until then the predecessor still has the connections.
    let committed = commit(predecessor.take(), &logging).await?;
    for acceptor in acceptors {
        server.accept_from(acceptor);
    }
    let predecessor_gone = CancellationToken::new();
    let socket = if let Some(committed) = committed {
        let gone = predecessor_gone.clone();
        let outcome = committed.take_over(server.clone(), names, status.clone(), gone).await;
        let socket = TakeoverSocket::open();
        outcome.ok();
        socket
    } else {
        let socket = TakeoverSocket::open();
        systemd::ready(&status.line());
        if !channels.is_empty() {
            status.note(Adopter::new(server.clone(), names).adopt_stored(channels));
        }
        predecessor_gone.cancel();
        socket
    };
    let running = tasks::begin(tasks, &predecessor_gone);
    let generation = process.generation;
    info!(message_id = message_id::STARTED, generation, "serving on {}", status.listeners());
    if let Some(example) = example {
        info!("try it: {example}");
    }
    // Not before: a successor that does not come to serve leaves the name where it is.
    logging.offer();
    let told = status.clone();
    tokio::spawn(systemd::report(move || (told.role() == ManagerRole::Main).then(|| told.line())));
    if let Some(watchdog) = watchdog {
        let fed = status.clone();
        tokio::spawn(systemd::feed_watchdog(watchdog, move || fed.role() < ManagerRole::Former));
    }

    let failed = running.failed();
    let ending = takeover::serve_until_end(&offer, socket, &mut signals, &status, failed).await;
    let drain = Drain::new(&server, &mut rested, &mut signals, config.drain_timeout, generation);
    let (failure, successor, remaining) = match ending {
        Ending::Terminated | Ending::Failed(_) => {
            status.set_role(ManagerRole::Stopping);
            let takes_all_kinds = offer.program.takes_all_kinds().await;
            // Our copies would keep our own ports open.
            drop(offer);
            let remaining = drain.leave(config.drain_delay, takes_all_kinds).await;
            let failure = if let Ending::Failed(reason) = ending { Some(reason) } else { None };
            (failure, None, remaining)
        }
        Ending::Succeeded { successor, takes_all_kinds, terminations } => {
            listeners::leave_socket_files();
            let (channel, remaining) = drain.pass_on(successor, takes_all_kinds, terminations).await;
            (None, Some(channel), remaining)
        }
    };
    end(running, hooks, remaining, &mut signals).await;
    // It waits for our end with what is to run alone.
    drop(successor);
    failure.map_or(Ok(()), |reason| Err(Failure::software(anyhow!(reason))))
}

/// From here on the predecessor ends.
async fn commit(predecessor: Option<Predecessor>, logging: &log::Control) -> Result<Option<Committed>> {
    let Some(predecessor) = predecessor else { return Ok(None) };
    logging.succeed().await;
    let committed = predecessor.commit().await.map_err(Failure::unavailable)?;
    listeners::own_socket_files();
    Ok(Some(committed))
}

/// Runs the service's `start`.
async fn begin<C, S>(start: S, own: C, service: &mut Service, limit: Duration) -> Result<Router>
where
    S: AsyncFnOnce(C, &mut Service) -> anyhow::Result<Router>,
{
    let started = AssertUnwindSafe(start(own, service)).catch_unwind();
    match timeout(limit, started).await {
        Ok(Ok(routes)) => routes.map_err(Failure::unavailable),
        Ok(Err(panic)) => Err(Failure::software(tasks::panic_message(&*panic).context("startup failed"))),
        Err(_) => Err(Failure::unavailable(anyhow!(
            "startup took longer than {} (--start-timeout)",
            humantime::format_duration(limit)
        ))),
    }
}

/// Asks the service manager for more time, again and again.
async fn ask_for_time_to_start() -> Infallible {
    let mut clock = interval(systemd::STATUS_INTERVAL);
    // The first tick is now, when there is time enough.
    clock.tick().await;
    loop {
        clock.tick().await;
        systemd::still_starting(MORE_TIME);
    }
}

/// After the last answer: background tasks end, and then comes what is to come last. Further signals cut both off.
async fn end(running: tasks::Running, hooks: Hooks, remaining: Remaining, signals: &mut Signals) {
    let deadline = remaining.deadline.max(Instant::now() + TASKS_MINIMUM);
    let cut_off = async {
        for _ in 1..remaining.signals {
            signals.terminated().await;
            info!("stop signal ignored: already shutting down");
        }
        signals.terminated().await;
    };
    tokio::select! {
        () = async { running.finish(deadline).await; hooks.run().await } => {}
        () = cut_off => info!("another stop signal: cutting off background tasks and exit hooks"),
    }
}

/// What the https listeners shake hands with, where there are any.
fn tls_of(config: &Config, inherited: &Inherited) -> Result<Option<Tls>> {
    let is_wanted = inherited.listeners.iter().any(|listener| listener.kind() == ListenerKind::Https);
    let (cert, key) = (config.tls_cert.as_deref(), config.tls_key.as_deref());
    is_wanted
        .then(|| {
            tls::acceptor(cert, key, &inherited.credentials, config.tls_handover).map_err(Failure::config)
        })
        .transpose()
}
