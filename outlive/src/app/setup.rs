//! What a service says of itself when it starts.

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

/// A credential is no larger, in bytes; systemd's own limit for all of a unit's together.
const CREDENTIAL_LIMIT: u64 = 1024 * 1024;

/// For all hooks at the end together.
const HOOKS_LIMIT: Duration = Duration::from_secs(5);

/// What a service's `start` may ask and say, before anything is served.
///
/// All of it is recorded, and takes effect only once nothing can fail any more: `check`, and a reload that is
/// rolled back, begin no task.
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

    /// This process: its pid, its generation, and since when it lives.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// tracing::info!("the first process: {}", setup.process().generation == 1);
    /// # }
    /// ```
    pub fn process(&self) -> Process {
        self.process
    }

    /// Cancelled when this process begins to end: nothing that would go on for ever should hold that up. Handlers
    /// take it as [`Shutdown`](crate::Shutdown), background tasks are given one of their own.
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

    /// The content of a `LoadCredential=` file of the unit, after a reload too (`systemd.exec(5)`). None where the
    /// unit has no credentials; an error where it has others, or this one cannot be read.
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

    /// Shows a metric at `/metrics` of the admin listeners. An error where there is one of that name.
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

    /// Adds routes to the admin listeners, beside `/healthz`, `/readyz` and `/metrics`.
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

    /// Runs `task` while this process serves. It begins when the process does, is told of the end once the last
    /// request is answered (so that nothing is lost that a request gave it), and is waited for within
    /// `--drain-timeout`, but five seconds at the least. Where it ends before it was told to, or panics, the process
    /// drains and ends too, with an error that names it; systemd then starts the next.
    ///
    /// At a reload two processes live side by side for as long as the old one finishes its requests, and so do their
    /// tasks. What must not run twice at once is [`alone`](TaskOptions::alone). A restart waits for the tasks while
    /// nobody serves: let them end soon.
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

    /// As [`background`](Self::background), for a task that is begun again, a second later, each time that it ends
    /// or panics.
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

    /// `/readyz` says yes only while `check` does, and names it. It is asked when somebody asks, no more often than
    /// each second, and has two seconds to answer; no request waits for it.
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

    /// Does `work` last of all: after the last answer and the last background task, in reverse order of registration,
    /// within five seconds for all together. An error or a panic is logged, and the others are done all the same.
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

/// More about a background task.
pub struct TaskOptions<'a> {
    tasks: &'a mut Vec<Task>,
}

impl TaskOptions<'_> {
    /// Begins the task only when those of the process before this one have ended: for schedulers and queue consumers,
    /// of which there must be one. A predecessor of which nothing is known (Server::Starter) is not waited for.
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

/// What is done last of all.
#[derive(Default)]
pub struct Hooks(Vec<(String, BoxFuture<'static, anyhow::Result<()>>)>);

impl Hooks {
    /// Does all of it, the last one first.
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
    async fn what_is_done_at_the_end_is_done_in_reverse_order_and_whatever_fails() {
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
    async fn what_hangs_at_the_end_is_cut_off() {
        let mut setup = Setup::new(Process::begin(1), CancellationToken::new(), Credentials::default());
        setup.on_exit("hangs", std::future::pending());
        let begun = Instant::now();
        setup.hooks.run().await;
        assert_eq!(begun.elapsed(), HOOKS_LIMIT);
    }
}
