//! [`Setup`], on which an application registers everything besides its routes when it starts.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, ensure};
use axum::Router;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prometheus::core::Collector;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::app::process::Process;
use crate::app::readiness::Check;
use crate::app::tasks::{self, Begin, Task};
use crate::os::credentials::Credentials;

/// The maximum size of a credential in bytes. It is systemd's limit for all credentials of a unit together
/// (systemd.exec(5)).
const CREDENTIAL_LIMIT: u64 = 1024 * 1024;

/// How long all exit hooks together may take.
const HOOKS_LIMIT: Duration = Duration::from_secs(5);

/// The argument of an application's `start`: it registers background tasks, readiness checks, metrics and exit hooks,
/// and gives access to credentials.
///
/// Tasks are only recorded here, and begin when the start can no longer fail. The command `check` and a reload that is
/// rolled back therefore begin no task.
///
/// ```
/// use std::time::Duration;
/// use axum::{Router, routing::get};
///
/// #[derive(clap::Parser)]
/// #[command(version, about)]
/// struct Config {}
///
/// async fn start(_: Config, setup: &mut outlive::Setup) -> anyhow::Result<Router> {
///     setup.background("tick", async |end| {
///         while !end.is_cancelled() {
///             tokio::time::sleep(Duration::from_secs(1)).await;
///         }
///         Ok(())
///     });
///     setup.readiness_check("disk", async || Ok(()));
///     setup.on_exit("say goodbye", async { Ok(()) });
///     Ok(Router::new().route("/", get("hello")))
/// }
/// ```
pub struct Setup {
    process: Process,
    shutdown: CancellationToken,
    credentials: Credentials,
    pub(crate) tasks: Vec<Task>,
    pub(crate) checks: Vec<Check>,
    pub(crate) hooks: Hooks,
    pub(crate) admin: Router,
}

impl Setup {
    pub(crate) fn new(process: Process, shutdown: CancellationToken, credentials: Credentials) -> Self {
        Self {
            process,
            shutdown,
            credentials,
            tasks: Vec::new(),
            checks: Vec::new(),
            hooks: Hooks::default(),
            admin: Router::new(),
        }
    }

    /// This process: its pid, its generation, and when it started.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// tracing::info!("the first process: {}", setup.process().generation == 1);
    /// # }
    /// ```
    pub fn process(&self) -> Process {
        self.process
    }

    /// A token that is cancelled when this process begins to drain. Use it for work that does not end by itself and is
    /// neither a handler, which takes [`Shutdown`](crate::Shutdown) as an argument, nor a [background
    /// task](Self::background), which receives a token that is cancelled later.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// let shutdown = setup.shutdown();
    /// tokio::spawn(async move { shutdown.cancelled().await });
    /// # }
    /// ```
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// The content of a credential of the unit (`LoadCredential=`, systemd.exec(5)); `None` if the unit has no
    /// credentials. After a reload it is the content with which the unit was started, because systemd reads credentials
    /// at a start only.
    ///
    /// # Errors
    /// If the unit has credentials but not this one, or if it cannot be read or is larger than 1 MiB.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// let password = setup.credential("database-password")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn credential(&self, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(file) = self.credentials.open(name) else { return Ok(None) };
        let mut content = Vec::new();
        let could_not = || format!("could not read the credential {name:?}");
        file?.take(CREDENTIAL_LIMIT + 1).read_to_end(&mut content).with_context(could_not)?;
        ensure!(content.len() as u64 <= CREDENTIAL_LIMIT, "the credential {name:?} is larger than 1 MiB");
        Ok(Some(content))
    }

    /// Shows a metric at `/metrics` of the admin listeners.
    ///
    /// # Errors
    /// If a metric of the same name is registered already.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// use outlive::prometheus::IntCounter;
    /// let clicks = IntCounter::new("clicks_total", "Links followed.")?;
    /// setup.register_metric(clicks.clone())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn register_metric(&mut self, metric: impl Collector + 'static) -> anyhow::Result<()> {
        prometheus::register(Box::new(metric)).context("could not register a metric")
    }

    /// Adds routes to the admin listeners, besides `/healthz`, `/readyz` and `/metrics`. Like [`Router::merge`] it
    /// panics if a route exists already.
    ///
    /// ```
    /// # use axum::{Router, routing::get};
    /// # fn start(setup: &mut outlive::Setup) {
    /// setup.admin_routes(Router::new().route("/queue", get("empty\n")));
    /// # }
    /// ```
    pub fn admin_routes(&mut self, routes: Router) {
        self.admin = std::mem::take(&mut self.admin).merge(routes);
    }

    /// Runs `task` while this process serves.
    ///
    /// The task begins when the process begins to serve. Its token is cancelled after the last response, so that the
    /// task can still do the work that requests have given it. It then has until `--drain-timeout` after the beginning
    /// of the drain, but at least five seconds, before it is cut off. A restart waits for the tasks while no process
    /// serves, so they should end soon.
    ///
    /// If the task ends before its token is cancelled, or panics, the process drains and exits with an error that names
    /// the task; systemd then starts the next process.
    ///
    /// During a reload the old and the new process run side by side until the old one has finished its requests, and so
    /// do their tasks. With long downloads this lasts up to `--linger-timeout`. Mark a task that must not run twice at
    /// once as [`exclusive`](TaskOptions::exclusive).
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// let (clicks, mut clicked) = tokio::sync::mpsc::channel::<u64>(1000);
    /// setup.background("count clicks", async move |end| {
    ///     let mut count = 0;
    ///     loop {
    ///         tokio::select! {
    ///             click = clicked.recv() => count += u64::from(click.is_some()),
    ///             () = end.cancelled() => break,
    ///         }
    ///     }
    ///     tracing::info!(count, "clicks");
    ///     Ok(())
    /// });
    /// # drop(clicks);
    /// # }
    /// ```
    pub fn background<F, W>(&mut self, name: &str, task: F) -> TaskOptions<'_>
    where
        F: FnOnce(CancellationToken) -> W + Send + 'static,
        W: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.task(name, Begin::Once(Box::new(|end| task(end).boxed())))
    }

    /// As [`background`](Self::background), but a task that ends or panics is logged and begins again after one second,
    /// and the process keeps serving.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// setup.supervise("poll", async |end| anyhow::bail!("the other side is away")).exclusive();
    /// # }
    /// ```
    pub fn supervise<F, W>(&mut self, name: &str, mut task: F) -> TaskOptions<'_>
    where
        F: FnMut(CancellationToken) -> W + Send + 'static,
        W: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.task(name, Begin::Again(Box::new(move |end| task(end).boxed())))
    }

    fn task(&mut self, name: &str, begin: Begin) -> TaskOptions<'_> {
        self.tasks.push(Task { name: name.to_owned(), begin, is_exclusive: false });
        TaskOptions { tasks: &mut self.tasks }
    }

    /// Adds a check to `/readyz`, which answers 503 while a check fails, and lists all checks by name.
    ///
    /// The check runs when `/readyz` is requested, but at most once a second, and fails if it takes longer than two
    /// seconds. It has no effect on other requests.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// setup.readiness_check("disk", async || {
    ///     tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    ///     Ok(())
    /// });
    /// # }
    /// ```
    pub fn readiness_check<F, W>(&mut self, name: &str, check: F)
    where
        F: Fn() -> W + Send + Sync + 'static,
        W: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.checks.push(Check::new(name.to_owned(), move || check().boxed()));
    }

    /// Runs `work` at the end of the process, after the last response and the last background task.
    ///
    /// Hooks run in reverse order of registration, because later ones may depend on earlier ones. Together they have
    /// five seconds. An error or a panic is logged, and the remaining hooks run all the same.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// setup.on_exit("close the pool", async { Ok(()) });
    /// # }
    /// ```
    pub fn on_exit(&mut self, name: &str, work: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.hooks.0.push((name.to_owned(), work.boxed()));
    }
}

/// Options of a background task, returned by [`Setup::background`] and [`Setup::supervise`].
pub struct TaskOptions<'a> {
    tasks: &'a mut Vec<Task>,
}

impl TaskOptions<'_> {
    /// Begins the task only when that of the predecessor of a reload has ended. Use it for schedulers and queue
    /// consumers, of which only one may run at a time. If the predecessor still sends responses when the drain limit
    /// has passed, it ends its task at that limit, so handlers of these responses can give the task no more work. Its
    /// exit hooks run after the last response. At a restart under Server::Starter this process does not know the old
    /// process, so the task does not wait for it.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// setup.background("schedule", async |end| Ok(end.cancelled().await)).exclusive();
    /// # }
    /// ```
    pub fn exclusive(self) {
        if let Some(task) = self.tasks.last_mut() {
            task.is_exclusive = true;
        }
    }
}

/// The exit hooks, in the order of their registration.
#[derive(Default)]
pub struct Hooks(Vec<(String, BoxFuture<'static, anyhow::Result<()>>)>);

impl Hooks {
    /// Runs all hooks, in reverse order.
    pub async fn run(self) {
        let deadline = Instant::now() + HOOKS_LIMIT;
        for (name, work) in self.0.into_iter().rev() {
            match timeout_at(deadline, tasks::outcome(|| work)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => error!(hook = name, "exit hook {name:?} failed: {error:#}"),
                Err(_) => error!(hook = name, "exit hook {name:?} did not finish in time: cut off"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::os::lock::lock;

    #[tokio::test(start_paused = true)]
    async fn exit_hooks_run_in_reverse_order_although_some_fail_or_panic() {
        let mut setup = Setup::new(Process::begin(1), CancellationToken::new(), Credentials::default());
        let done = Arc::new(Mutex::new(Vec::new()));
        for name in ["first", "second"] {
            let done = done.clone();
            setup.on_exit(name, async move {
                lock(&done).push(name);
                anyhow::bail!("it fails")
            });
        }
        setup.on_exit("panics", async { panic!("on purpose") });
        setup.hooks.run().await;
        assert_eq!(*lock(&done), ["second", "first"]);
    }

    #[tokio::test(start_paused = true)]
    async fn exit_hook_that_hangs_is_cut_off_at_the_limit() {
        let mut setup = Setup::new(Process::begin(1), CancellationToken::new(), Credentials::default());
        setup.on_exit("hangs", std::future::pending());
        let begun = Instant::now();
        setup.hooks.run().await;
        assert_eq!(begun.elapsed(), HOOKS_LIMIT);
    }
}
