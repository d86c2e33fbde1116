//! [`Setup`], on which an application registers everything besides its routes when it starts.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prometheus::core::Collector;
use tokio::net::{TcpListener, UdpSocket, UnixDatagram, UnixListener};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::error;
use tracing_subscriber::{Layer, Registry};

use crate::app::carry::Carry;
use crate::app::process::Process;
use crate::app::readiness::Check;
use crate::app::sockets::{SocketHandler, SocketKind, SocketSource, SocketStream};
use crate::app::tasks::{self, Begin, Task};
use crate::observe::log;
use crate::os::credentials::Credentials;

/// How long all exit hooks together may take.
const HOOKS_LIMIT: Duration = Duration::from_secs(5);

/// The argument of an application's `start`: it registers background tasks, readiness checks, metrics and exit hooks,
/// and gives access to credentials and sockets.
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
    sockets: Arc<dyn SocketSource>,
    pub(crate) tasks: Vec<Task>,
    pub(crate) checks: Vec<Check>,
    pub(crate) hooks: Hooks,
    pub(crate) admin: Router,
    /// The handlers of [`Setup::serve`], with the names of their sockets.
    pub(crate) socket_handlers: Vec<(String, SocketHandler)>,
}

impl Setup {
    pub(crate) fn new(
        process: Process,
        shutdown: CancellationToken,
        credentials: Credentials,
        sockets: Arc<dyn SocketSource>,
    ) -> Self {
        Self {
            process,
            shutdown,
            credentials,
            sockets,
            tasks: Vec::new(),
            checks: Vec::new(),
            hooks: Hooks::default(),
            admin: Router::new(),
            socket_handlers: Vec::new(),
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
    /// credentials. A reload does not change it, because systemd reads credentials only when it starts the unit. For a
    /// password that can also be an option, [`Secret`](crate::Secret) is simpler.
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
        let content = self.credentials.read(name).transpose()?;
        Ok(content.map(|mut content| std::mem::take(&mut *content)))
    }

    /// The names of the sockets that the application can claim, in alphabetical order: those of systemd
    /// (`FileDescriptorName=`, systemd.socket(5)) and of `--listen NAME=ADDR` that are neither `admin` nor begin with
    /// `http`. The start fails if the application does not claim each of them.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// if setup.socket_names().iter().any(|name| name == "statsd") {
    ///     let statsd = setup.udp_socket("statsd")?;
    ///     # drop(statsd);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn socket_names(&self) -> Vec<String> {
        self.sockets.names()
    }

    /// Serves a protocol of the application on all listening sockets called `name`: `handler` is called for each
    /// connection that is accepted, in a task of its own. This begins when the process begins to serve.
    ///
    /// The library treats these connections like those of HTTP. They count for `--max-connections`, and a drain waits for
    /// their handlers as for requests in flight. A handler that has not returned within `--drain-timeout` is cut off when
    /// the process exits. A socket unit keeps the port open meanwhile.
    ///
    /// A handler that waits for its peer also waits for [`Carry::requested`]. When that resolves, the handler leaves its
    /// state with [`Carry::hand_on`] and returns. The handler of the next process then continues the same connection, and
    /// the client notices nothing. Without a state the connection is closed when the handler returns.
    ///
    /// The state must contain the bytes that the handler has read and not consumed, because only the handler knows where a
    /// message ends. An error of the handler is logged.
    ///
    /// # Errors
    /// If no socket has this name, or one of them is not a listening stream socket.
    ///
    /// ```
    /// use outlive::{Carry, SocketStream};
    /// use tokio::io::{AsyncReadExt, AsyncWriteExt};
    ///
    /// /// Sends each line back.
    /// async fn echo(mut stream: SocketStream, carry: Carry<Vec<u8>>) -> anyhow::Result<()> {
    ///     let mut line = carry.received()?.unwrap_or_default();
    ///     loop {
    ///         tokio::select! {
    ///             read = stream.read_buf(&mut line) => if read? == 0 {
    ///                 return Ok(());
    ///             },
    ///             () = carry.requested() => {
    ///                 carry.hand_on(&line);
    ///                 return Ok(());
    ///             }
    ///         }
    ///         if line.ends_with(b"\n") {
    ///             stream.write_all(&line).await?;
    ///             line.clear();
    ///         }
    ///     }
    /// }
    ///
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// setup.serve("echo", echo)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn serve<S, H, W>(&mut self, name: &str, handler: H) -> anyhow::Result<()>
    where
        S: 'static,
        H: Fn(SocketStream, Carry<S>) -> W + Send + Sync + 'static,
        W: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.sockets.claim_listeners(name)?;
        let handler: SocketHandler = Arc::new(move |stream, continuation, shutdown| {
            handler(stream, Carry::of_socket(continuation, shutdown)).boxed()
        });
        self.socket_handlers.push((name.to_owned(), handler));
        Ok(())
    }

    /// The TCP listener called `name`, for a server that accepts by itself. [`serve`](Self::serve) also counts the
    /// connections and can hand them over.
    ///
    /// During a reload both processes have the listener until the old one exits. Accept connections in a
    /// [background task](Self::background), because it begins only when the start of this process can no longer fail.
    ///
    /// # Errors
    /// If there is not exactly one socket of this name, or if it is of another kind.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// let listener = setup.tcp_listener("ingest")?;
    /// setup.background("ingest", async move |end| {
    ///     while let Some(accepted) = end.run_until_cancelled(listener.accept()).await {
    ///         let (connection, peer) = accepted?;
    ///         # drop((connection, peer));
    ///     }
    ///     Ok(())
    /// });
    /// # Ok(())
    /// # }
    /// ```
    pub fn tcp_listener(&self, name: &str) -> anyhow::Result<TcpListener> {
        let socket = std::net::TcpListener::from(self.sockets.claim(name, SocketKind::TcpListener)?);
        TcpListener::from_std(socket).context("could not watch the listener")
    }

    /// The Unix listener called `name`, as [`tcp_listener`](Self::tcp_listener).
    ///
    /// # Errors
    /// If there is not exactly one socket of this name, or if it is of another kind.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// let control = setup.unix_listener("control")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn unix_listener(&self, name: &str) -> anyhow::Result<UnixListener> {
        let socket =
            std::os::unix::net::UnixListener::from(self.sockets.claim(name, SocketKind::UnixListener)?);
        UnixListener::from_std(socket).context("could not watch the listener")
    }

    /// The UDP socket called `name` (`ListenDatagram=`, systemd.socket(5)).
    ///
    /// Read it in an [`exclusive`](TaskOptions::exclusive) background task. Then only one process at a time reads it: during
    /// a reload the old one until its task ends, after its last response or at the drain limit, and then the new one.
    /// Datagrams that arrive in between, also at a restart, wait in the buffer of the socket (`ReceiveBuffer=` of the socket
    /// unit), so none is lost as long as they fit.
    ///
    /// # Errors
    /// If there is not exactly one socket of this name, or if it is of another kind.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// let socket = setup.udp_socket("statsd")?;
    /// setup
    ///     .background("statsd", async move |end| {
    ///         let mut datagram = vec![0; 65536];
    ///         while let Some(received) = end.run_until_cancelled(socket.recv(&mut datagram)).await {
    ///             let length = received?;
    ///             tracing::debug!("{}", String::from_utf8_lossy(&datagram[..length]));
    ///         }
    ///         Ok(())
    ///     })
    ///     .exclusive();
    /// # Ok(())
    /// # }
    /// ```
    pub fn udp_socket(&self, name: &str) -> anyhow::Result<UdpSocket> {
        let socket = std::net::UdpSocket::from(self.sockets.claim(name, SocketKind::UdpSocket)?);
        UdpSocket::from_std(socket).context("could not watch the socket")
    }

    /// The Unix datagram socket called `name`, as [`udp_socket`](Self::udp_socket).
    ///
    /// # Errors
    /// If there is not exactly one socket of this name, or if it is of another kind.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// let events = setup.unix_datagram("events")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn unix_datagram(&self, name: &str) -> anyhow::Result<UnixDatagram> {
        let socket =
            std::os::unix::net::UnixDatagram::from(self.sockets.claim(name, SocketKind::UnixDatagram)?);
        UnixDatagram::from_std(socket).context("could not watch the socket")
    }

    /// The file descriptor called `name`, of any kind that systemd can pass: a socket for sequential packets, a FIFO, a
    /// netlink socket, a device (systemd.socket(5)). Without systemd it is the TCP or Unix listener of `--listen`.
    ///
    /// # Errors
    /// If there is not exactly one file descriptor of this name.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) -> anyhow::Result<()> {
    /// let fifo = std::fs::File::from(setup.fd("commands")?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fd(&self, name: &str) -> anyhow::Result<OwnedFd> {
        self.sockets.claim(name, SocketKind::Any)
    }

    /// Shows a metric at `/metrics` of the admin listeners.
    ///
    /// # Errors
    /// If a metric of the same name is registered already. The library has metrics whose names begin with `outlive_` and
    /// `process_`, and `http_request_duration_seconds` and `http_requests_in_flight`.
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
        let names: Vec<_> = metric.desc().iter().map(|desc| desc.fq_name.clone()).collect();
        prometheus::register(Box::new(metric))
            .with_context(|| format!("could not register the metric {}", names.join(", ")))
    }

    /// Adds routes to the admin listeners, besides `/healthz`, `/readyz`, `/metrics` and `/config`, and those below
    /// `/debug/pprof` with the features `cpu-profile` and `heap-profile`. Like [`Router::merge`] it panics if a route exists
    /// already.
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
    /// task can still do the work that requests have given it. It is cut off if it has not ended five seconds later and
    /// `--drain-timeout` has passed since the beginning of the drain. At a restart no process serves until the tasks have
    /// ended, so they should end soon.
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

    /// Adds a check to `/readyz`. It answers 503 while a check fails, and lists all checks by name.
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

    /// Adds a layer of the crate `tracing_subscriber`, such as that of OpenTelemetry, Sentry or tokio-console. It receives
    /// the spans and events of the whole process from this call on, until the process ends.
    ///
    /// The layer is independent of the log: it also receives what `--log` leaves out, and its filter has no effect on the
    /// log. Without a filter it receives all spans and events of all crates, which is slow, so add one
    /// ([`with_filter`](tracing_subscriber::Layer::with_filter)). With several layers, each has its own filter.
    ///
    /// Each request is a span of the level debug with the target and name `request`, so a filter must contain
    /// `request=debug` for the layer to receive it. Its fields are `request_id`, `method`, `path` and `peer`, and, when the
    /// response has begun and the span ends, `route` and `status`. Spans that handlers create are inside it.
    ///
    /// A layer that sends in the background should be flushed by [`on_exit`](Self::on_exit), because the process exits soon
    /// after the last response, also at a restart or reload. If the flush blocks its thread, run it with
    /// `tokio::task::spawn_blocking`, because otherwise the time limit of exit hooks cannot cut it off.
    ///
    /// ```
    /// # fn start(setup: &mut outlive::Setup) {
    /// use outlive::tracing_subscriber::filter::Targets;
    /// use outlive::tracing_subscriber::{Layer, fmt};
    /// use tracing::Level;
    ///
    /// let debug = std::fs::File::create("/dev/null").map(std::sync::Arc::new);
    /// if let Ok(file) = debug {
    ///     let layer = fmt::layer().with_writer(file);
    ///     let filter = Targets::new().with_default(Level::INFO).with_target("request", Level::DEBUG);
    ///     setup.tracing_layer(layer.with_filter(filter));
    /// }
    /// # }
    /// ```
    pub fn tracing_layer(&mut self, layer: impl Layer<Registry> + Send + Sync + 'static) {
        log::add_layer(Box::new(layer));
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
    /// Begins the task after a reload only when the exclusive tasks of the old process have ended. Use it for schedulers
    /// and queue consumers, of which only one may run at a time. If the old process still sends responses when the drain
    /// limit has passed, it ends its task at that limit, so the handlers of these responses can give the task no more
    /// work. Its exit hooks run after the last response. At a restart under Server::Starter this process does not know
    /// the old process, so the task does not wait for it.
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
    use std::sync::Mutex;

    use super::*;
    use crate::os::lock::lock;

    /// A process that has no sockets.
    struct NoSockets;

    impl SocketSource for NoSockets {
        fn claim(&self, name: &str, _: SocketKind) -> anyhow::Result<OwnedFd> {
            anyhow::bail!("no socket has the name {name}")
        }

        fn claim_listeners(&self, name: &str) -> anyhow::Result<()> {
            anyhow::bail!("no socket has the name {name}")
        }

        fn names(&self) -> Vec<String> {
            Vec::new()
        }
    }

    fn setup() -> Setup {
        Setup::new(Process::begin(1), CancellationToken::new(), Credentials::default(), Arc::new(NoSockets))
    }

    #[tokio::test(start_paused = true)]
    async fn exit_hooks_run_in_reverse_order_although_some_fail_or_panic() {
        let mut setup = setup();
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
        let mut setup = setup();
        setup.on_exit("hangs", std::future::pending());
        let begun = Instant::now();
        setup.hooks.run().await;
        assert_eq!(begun.elapsed(), HOOKS_LIMIT);
    }
}
