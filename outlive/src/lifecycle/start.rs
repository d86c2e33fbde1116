//! The start of a process that serves, in two parts.
//!
//! [`Started::new`] does everything that can fail: it binds the listeners, loads the certificate, and calls the
//! application's `start`. [`Started::commit`] then takes over the port and the connections. Nothing in it may fail once
//! the predecessor no longer accepts connections, because there would be no process left to serve them.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use axum::Router;
use clap::{Parser, Subcommand};
use futures_util::FutureExt;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::process::Process;
use crate::app::setup::{Hooks, Setup};
use crate::app::sockets::SocketHandler;
use crate::app::tasks::{self, Task};
use crate::connection::{ConnectionContext, Endpoint, EndpointKind};
use crate::handover;
use crate::lifecycle::admin::{self, Admin};
use crate::lifecycle::cli::{self, CommandLine, OptionValue};
use crate::lifecycle::config::Config;
use crate::lifecycle::serve::Serving;
use crate::listeners::{self, Inherited, Listener, NamedSockets, Purpose, SocketFiles};
use crate::observe::log::{self, message_id};
use crate::observe::metrics;
use crate::observe::status::{ManagerRole, Status};
use crate::observe::traces;
use crate::os::exit::{Failure, Result};
use crate::os::pressure::MemoryPressure;
use crate::os::rlimit;
use crate::os::signals::Signals;
use crate::os::{systemd, task};
use crate::registry::Registry;
use crate::requests::{AccessLog, Routes};
use crate::server::{Acceptor, Queues, Server, allocator};
use crate::takeover::{
    Adopter, OldProcesses, PredecessorLink, Program, Role, SuccessorBundle, TakeoverSocket,
};
use crate::transport::client_auth::{check_client_auth, client_auth_of};
use crate::transport::listener_name::{ListenerRole, Name};
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::tls_config::TlsMaterial;
use crate::transport::tls_renewal::TlsRenewal;

/// How much more time each report asks systemd for, beyond the next report, so that one late report does not end the
/// start.
const MORE_TIME: Duration = Duration::from_secs(5);

/// The input of a start: the configuration, and what the process inherited.
pub struct Boot<C> {
    name: String,
    config: Config,
    /// The application's options.
    service: C,
    /// The values of all options, for the admin routes.
    values: Vec<OptionValue>,
    inherited: Inherited,
    program: Program,
    role: Role,
    process: Process,
    logging: log::Control,
}

impl<C: Parser> Boot<C> {
    /// Must be called before the runtime starts its threads; see [`rlimit::make_room`].
    pub fn new<D: Subcommand>(
        line: &CommandLine<C, D>,
        inherited: Inherited,
        program: Program,
        role: Role,
    ) -> Result<Self> {
        let cli::Service { options: service, values, .. } = line.service(&inherited.credentials)?;
        let from_store = handover::next_generation(&inherited.channels);
        let process = Process::begin(from_store.or(inherited.generation).unwrap_or(1));
        // Before `log::init`, which starts a thread.
        rlimit::make_room(line.config.max_connections);
        let Config { log: filter, log_format, .. } = &line.config;
        let logging = log::init(line.name.clone(), filter.as_deref(), *log_format, process.generation)?;
        line.warn_of_unknown_variables();
        let (name, config) = (line.name.clone(), line.config.clone());
        Ok(Self { name, config, service, values, inherited, program, role, process, logging })
    }
}

/// A process that is ready to serve. Until [`Started::commit`], the predecessor, if there is one, has the connections
/// and the port.
pub struct Started {
    config: Config,
    process: Process,
    logging: log::Control,
    signals: Signals,
    server: Server,
    acceptors: Vec<Acceptor>,
    /// A command with which to try the service, for the log.
    example: Option<String>,
    /// The handover channels from systemd's store, with the connections of earlier processes.
    channels: Vec<anyhow::Result<std::os::fd::OwnedFd>>,
    socket_files: SocketFiles,
    bundle: SuccessorBundle,
    status: Arc<Status>,
    tasks: Vec<Task>,
    hooks: Hooks,
    /// Present if changed certificate files are taken over while the process serves, with the interval.
    renewal: Option<(TlsRenewal, Duration)>,
}

impl Started {
    /// Binds the listeners, loads the certificate, calls the application's `start`, and creates everything that serving
    /// needs. Returns `None` if a stop signal arrived during the application's `start`.
    pub async fn new<C, S>(boot: Boot<C>, start: S) -> Result<Option<Self>>
    where
        S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
    {
        let Boot { name, config, service, values, mut inherited, program, role, process, logging } = boot;
        let mut signals = Signals::new().context("could not watch for signals")?;
        inherited.listen(&config.listen, &name)?;
        let (mut kinds, tls) = endpoint_kinds(&config, &inherited)?;
        let Inherited { mut listeners, named, channels, credentials, watchdog, socket_files, .. } = inherited;
        let sockets = NamedSockets::new(named, &config.listen, socket_files.clone(), Purpose::Serve);
        let sockets = Arc::new(sockets);
        traces::start(&name)?;
        let shutdown = CancellationToken::new();
        let mut setup = Setup::new(process, shutdown.clone(), credentials.clone(), sockets.clone());
        let routes = tokio::select! {
            routes = call_start(start, service, &mut setup, config.start_timeout) => routes?,
            // A successor does not ask, because systemd ignores it as long as the predecessor is the main process.
            never = ask_for_time_to_start(), if role == Role::First => match never {},
            () = signals.terminated() => {
                info!("received a stop signal during startup");
                return Ok(None);
            }
        };
        let Setup { tasks, checks, hooks, admin: more_admin, socket_handlers, .. } = setup;
        let (claimed, others) = sockets.finish().map_err(Failure::config)?;
        kinds.extend(socket_kinds(&claimed, &socket_handlers));
        listeners.extend(claimed);
        check_proxy_protocol(&config.proxy_protocol, &listeners)?;
        let bundle = SuccessorBundle::new(
            &listeners,
            others,
            &credentials,
            process.generation,
            watchdog,
            program,
            config.takeover_timeout,
        )
        .context("could not duplicate the sockets")?;
        let registry = Registry::new(config.limits(), shutdown.clone());
        let status = Arc::new(Status::new(registry.clone(), listeners::labels(&listeners)));
        let queues = Queues::default();
        let (shared, line) = (registry.clone(), status.clone());
        let admin = Admin { process, registry: shared, status: line, queues: queues.clone(), checks, values };
        let limited = |routes| Routes::new(routes, config.body_limit.0, config.request_timeout);
        let access_log = if config.access_log { AccessLog::On } else { AccessLog::Off };
        let routes = limited(routes).with_access_log(access_log).limited_by(config.request_limits());
        let admin = limited(admin::router(admin, more_admin));
        let endpoint = |(listener, kind): (&Listener, EndpointKind)| {
            let routes = match kind {
                EndpointKind::Http | EndpointKind::Https(_) | EndpointKind::Socket(_) => &routes,
                EndpointKind::Admin => &admin,
            };
            let is_proxied = config.proxy_protocol.contains(&listener.name);
            let client = is_proxied.then_some(ProxiedClient::Awaited);
            Arc::new(Endpoint::new(listener.name.clone(), kind, routes.clone(), client))
        };
        let endpoints: Vec<_> = listeners.iter().zip(kinds).map(endpoint).collect();
        let context = ConnectionContext::new(process, shutdown, config.drain_timeout / 2, config.proxies());
        let server = Server::new(context, &endpoints, registry.clone(), config.max_connections, queues)?;
        task::spawn(registry.clone().watch());
        allocator::return_memory(registry);
        let renewal = tls.map(TlsRenewal::new).zip(config.tls_check_interval);
        let example = listeners.iter().find_map(Listener::example_command);
        let acceptors = listeners
            .into_iter()
            .zip(endpoints)
            .map(|(listener, endpoint)| Acceptor::new(listener, endpoint, config.request_timeout))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Some(Self {
            config,
            process,
            logging,
            signals,
            server,
            acceptors,
            example,
            channels,
            socket_files,
            bundle,
            status,
            tasks,
            hooks,
            renewal,
        }))
    }

    /// Begins to serve. Reports that to systemd with `READY=1`, or takes over from `predecessor`. An error is returned
    /// only while the predecessor still serves.
    pub async fn commit(self, predecessor: Option<PredecessorLink>) -> Result<Serving> {
        let Self { config, process, logging, signals, server, bundle, status, .. } = self;
        let watchdog = bundle.watchdog;
        let committed = match predecessor {
            Some(predecessor) => {
                logging.succeed().await;
                let committed = predecessor.commit().await.map_err(Failure::unavailable)?;
                self.socket_files.claim();
                Some(committed)
            }
            None => None,
        };
        // From here on nothing may fail, because the predecessor no longer accepts connections.
        for acceptor in self.acceptors {
            server.accept_from(acceptor);
        }
        let old = OldProcesses::new(server.clone(), status.clone(), process.generation);
        let predecessor_gone = CancellationToken::new();
        let socket = if let Some(committed) = committed {
            let gone = predecessor_gone.clone();
            let result = committed.take_over(server.clone(), status.clone(), old.clone(), gone).await;
            let socket = TakeoverSocket::open();
            result.ok();
            socket
        } else {
            let socket = TakeoverSocket::open();
            systemd::ready(&status.line());
            if !self.channels.is_empty() {
                status.note(Adopter::new(server.clone()).adopt_stored(self.channels));
            }
            predecessor_gone.cancel();
            socket
        };
        task::spawn(server.clone().back_up(process.generation, predecessor_gone.clone()));
        match MemoryPressure::of_environment() {
            Ok(None) => {}
            Ok(Some(pressure)) => drop(task::spawn(server.clone().relieve(pressure))),
            Err(error) => warn!("idle connections stay open when memory is short: {error:#}"),
        }
        if let Some((renewal, interval)) = self.renewal {
            task::spawn(renewal.run(interval));
        }
        let tasks = tasks::begin(self.tasks, &predecessor_gone);
        let generation = process.generation;
        info!(message_id = message_id::STARTED, generation, "serving on {}", status.listeners());
        if let Some(example) = self.example {
            info!("try it: {example}");
        }
        // Not earlier: a successor that then failed to start would have taken the bus name away from its predecessor.
        logging.offer();
        let reported = status.clone();
        task::spawn(systemd::report(move || (reported.role() == ManagerRole::Main).then(|| reported.line())));
        if let Some(watchdog) = watchdog {
            let watched = status.clone();
            task::spawn(systemd::feed_watchdog(watchdog, move || watched.role() < ManagerRole::Former));
        }
        Ok(Serving {
            config,
            generation,
            signals,
            server,
            socket_files: self.socket_files,
            bundle,
            socket,
            status,
            old,
            tasks,
            hooks: self.hooks,
        })
    }
}

/// Calls the application's `start`, with a time limit. A panic in it is an error, too.
pub async fn call_start<C, S>(start: S, own: C, setup: &mut Setup, limit: Duration) -> Result<Router>
where
    S: AsyncFnOnce(C, &mut Setup) -> anyhow::Result<Router>,
{
    metrics::register();
    let started = async {
        let routes = start(own, &mut *setup).await?;
        admin::check(&setup.admin);
        anyhow::Ok(routes)
    };
    match timeout(limit, AssertUnwindSafe(started).catch_unwind()).await {
        Ok(Ok(routes)) => routes.map_err(Failure::unavailable),
        Ok(Err(panic)) => Err(Failure::software(tasks::panic_message(&*panic).context("startup failed"))),
        Err(_) => Err(Failure::unavailable(anyhow!(
            "startup took longer than {} (--start-timeout)",
            humantime::format_duration(limit)
        ))),
    }
}

/// Extends systemd's start timeout at regular intervals, so that `--start-timeout` alone limits the start, and not
/// `TimeoutStartSec=` of the unit.
async fn ask_for_time_to_start() -> Infallible {
    let mut clock = interval(systemd::STATUS_INTERVAL);
    // The first tick is immediate. An extension is not needed yet.
    clock.tick().await;
    loop {
        clock.tick().await;
        systemd::still_starting(MORE_TIME);
    }
}

/// What is served on each of the listeners that the application has claimed.
fn socket_kinds(
    listeners: &[Listener],
    handlers: &[(String, SocketHandler)],
) -> impl Iterator<Item = EndpointKind> {
    let handler_of = |listener: &Listener| {
        let handler = handlers.iter().find(|(name, _)| *name == listener.name.as_str());
        handler.map(|(_, handler)| EndpointKind::Socket(handler.clone()))
    };
    // `Setup::serve` adds a handler for each name that it claims.
    listeners.iter().filter_map(handler_of)
}

/// Fails if `--proxy-protocol` names a listener that does not exist.
pub fn check_proxy_protocol(names: &[Name], listeners: &[Listener]) -> Result<()> {
    let is_unknown = |name: &&Name| listeners.iter().all(|listener| listener.name != **name);
    let Some(unknown) = names.iter().find(is_unknown) else { return Ok(()) };
    let mut known: Vec<_> = listeners.iter().map(|listener| listener.name.as_str()).collect();
    known.sort_unstable();
    known.dedup();
    Err(Failure::config(anyhow!(
        "invalid --proxy-protocol {unknown}: no listener has this name; the listeners are {}",
        known.join(", ")
    )))
}

/// What each of the inherited listeners serves. Loads the certificates if one of them is an https listener, and returns what
/// these share.
pub fn endpoint_kinds(
    config: &Config,
    inherited: &Inherited,
) -> Result<(Vec<EndpointKind>, Option<TlsMaterial>)> {
    let rules = &config.tls_client_auth;
    let https = inherited.listeners.iter().filter(|listener| listener.role() == ListenerRole::Https);
    let https: Vec<_> = https.map(|listener| &listener.name).collect();
    check_client_auth(rules, &https).map_err(Failure::config)?;
    let mut material = if https.is_empty() {
        None
    } else {
        let files = config.tls_files(&inherited.credentials);
        let material = files.and_then(|files| TlsMaterial::load(files, config.tls_handover));
        Some(material.map_err(Failure::config)?)
    };
    let mut kinds = Vec::new();
    for listener in &inherited.listeners {
        kinds.push(match (listener.role(), &mut material) {
            (ListenerRole::Http, _) => EndpointKind::Http,
            (ListenerRole::Admin, _) => EndpointKind::Admin,
            (ListenerRole::Https, Some(material)) => {
                let auth = client_auth_of(&listener.name, rules);
                EndpointKind::Https(material.tls(auth).map_err(Failure::config)?)
            }
            // `inherit` does not return these as listeners, because the application has not claimed them yet.
            (ListenerRole::Https, None) | (ListenerRole::Application, _) => continue,
        });
    }
    Ok((kinds, material))
}
