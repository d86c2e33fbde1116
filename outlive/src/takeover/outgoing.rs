//! The side of the predecessor in a reload.
//!
//! The main loop (`lifecycle/serve.rs`) polls [`Reloads`]. A reload has two steps: the preparation ends with a
//! [`PreparedSuccessor`] and can be cancelled; [`PreparedSuccessor::commit`] cannot, and decides which process keeps
//! serving. `Drain::pass_on` (`lifecycle/drain.rs`) then hands the connections over to the [`Successor`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use tokio::time::timeout;
use tracing::{error, info};

use super::launch::Program;
use super::process_handle::ProcessHandle;
use super::socket::TakeoverSocket;
use super::{
    ADOPTS_HTTP2_AND_TLS, ADOPTS_STREAMS, ADOPTS_TABLES_AND_CERTIFICATES, ADOPTS_TLS12, ADOPTS_UPGRADES,
    COMMIT_LIMIT, CREDENTIALS, NO_THREAD, PID_1, STDOUT,
};
use crate::handover::{Channel, Frame, MessageType, Origin, SocketRecord, pair};
use crate::listeners::{Listener, Others, SocketFile};
use crate::observe::log::message_id;
use crate::observe::status::{ManagerRole, Status};
use crate::os::credentials::Credentials;
use crate::os::signals::{SignalRequest, Signals};
use crate::os::{systemd, task};
use crate::registry::Protocols;

/// Why a reload is refused while another one is in progress.
pub const UNDER_WAY: &str = "another reload is in progress";

/// What a successor inherits.
pub struct SuccessorBundle {
    /// Its listeners, the sockets that the application uses, and the directory of its credentials.
    fds: Vec<(OwnedFd, SocketRecord)>,
    /// The files of sockets that the application uses.
    _files: Vec<SocketFile>,
    /// The generation of this process.
    pub generation: u64,
    /// The watchdog time of the unit (`WatchdogSec=`).
    pub watchdog: Option<Duration>,
    pub program: Program,
    /// How long a successor may take until it sends `Ready` (`--takeover-timeout`).
    pub limit: Duration,
}

impl SuccessorBundle {
    pub fn new(
        listeners: &[Listener],
        others: Others,
        credentials: &Credentials,
        generation: u64,
        watchdog: Option<Duration>,
        program: Program,
        limit: Duration,
    ) -> io::Result<Self> {
        let mut fds = listeners.iter().map(Listener::pack).collect::<io::Result<Vec<_>>>()?;
        fds.extend(others.duplicates);
        if let Some(folder) = credentials.folder() {
            let record = SocketRecord::new(CREDENTIALS.to_owned(), Bytes::new());
            fds.push((folder.as_fd().try_clone_to_owned()?, record));
        }
        Ok(Self { fds, _files: others.files, generation, watchdog, program, limit })
    }
}

/// A reload up to the commit. To cancel it, drop it: this closes the channel, so the successor exits.
type Preparation<'a> = Pin<Box<dyn Future<Output = Result<PreparedSuccessor>> + Send + 'a>>;

/// The reloads of a process that serves: one at a time.
pub struct Reloads<'a> {
    bundle: &'a SuccessorBundle,
    socket: Option<TakeoverSocket>,
    preparation: Option<Preparation<'a>>,
}

/// See [`Reloads::next`].
pub enum ReloadEvent {
    /// A takeover command has connected to the takeover socket.
    Connected(Channel),
    /// The reload in progress can be committed, or has failed.
    Prepared(Result<PreparedSuccessor>),
}

impl<'a> Reloads<'a> {
    pub fn new(bundle: &'a SuccessorBundle, socket: Option<TakeoverSocket>) -> Self {
        Self { bundle, socket, preparation: None }
    }

    pub fn is_under_way(&self) -> bool {
        self.preparation.is_some()
    }

    /// Waits for the next event. Cancel safe: to drop the future loses no event.
    pub async fn next(&mut self) -> ReloadEvent {
        let Self { socket, preparation, .. } = self;
        let connected = async {
            match socket {
                Some(socket) => socket.accept().await,
                None => std::future::pending().await,
            }
        };
        let prepared = async {
            match preparation {
                Some(preparation) => preparation.await,
                None => std::future::pending().await,
            }
        };
        let prepared = tokio::select! {
            channel = connected => return ReloadEvent::Connected(channel),
            prepared = prepared => prepared,
        };
        self.preparation = None;
        ReloadEvent::Prepared(prepared)
    }

    /// Starts a reload with a successor that this process spawns (SIGHUP).
    pub fn spawn_successor(&mut self) {
        self.preparation = Some(Box::pin(prepare_spawned(self.bundle)));
    }

    /// Starts a reload with a successor that a takeover command spawns, or refuses it because another is in progress.
    pub async fn accept_successor(&mut self, channel: Channel) {
        if self.is_under_way() {
            refuse(&channel, self.bundle.generation, UNDER_WAY).await;
        } else if std::process::id() == 1 {
            refuse(&channel, self.bundle.generation, PID_1).await;
        } else {
            self.preparation = Some(Box::pin(prepare_external(self.bundle, channel)));
        }
    }
}

async fn refuse(channel: &Channel, generation: u64, reason: &str) {
    info!("refused a takeover: {reason}");
    // An error means that the takeover command has exited, so it needs no reason. The time limit is needed because a
    // command that does not read would otherwise block the main loop.
    let refused = channel.send_text(MessageType::Refused, Origin::now(generation), reason);
    let _ = timeout(COMMIT_LIMIT, refused).await;
}

/// Prepares a successor that a takeover command starts. The command sends `Go` after the intermediate process has
/// exited.
async fn prepare_external(bundle: &SuccessorBundle, channel: Channel) -> Result<PreparedSuccessor> {
    match timeout(bundle.limit, prepare(bundle, &channel, Parent::Unknown)).await {
        Ok(prepared) => {
            let (process, adopts) = prepared?;
            Ok(PreparedSuccessor { channel, process, adopts })
        }
        Err(_) => bail!("the successor was not ready within --takeover-timeout"),
    }
}

/// Prepares a successor that this process starts itself.
async fn prepare_spawned(bundle: &SuccessorBundle) -> Result<PreparedSuccessor> {
    let (ours, theirs) = pair().context("could not create a channel for the successor")?;
    let channel = Channel::new(ours)?;
    let program = bundle.program.clone();
    let limit = bundle.limit;
    let launched = program.launch_on_thread(theirs, limit).await?;
    let outcome = task::on_thread(move || launched.outcome(limit)).context(NO_THREAD)?;
    let reason = match timeout(limit, prepare(bundle, &channel, Parent::ServiceManager)).await {
        Ok(Ok((process, adopts))) => return Ok(PreparedSuccessor { channel, process, adopts }),
        Ok(Err(reason)) => reason,
        Err(_) => anyhow!("the successor was not ready within --takeover-timeout"),
    };
    // Closed, so that the successor exits and the result pipe ends, possibly with a better reason than ours.
    drop(channel);
    outcome.await?.err().map_or(Err(reason), Err)
}

/// The parent of the successor. If the successor became the main process as a child of another process than systemd,
/// systemd would kill it at the next stop without a drain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parent {
    /// Possibly the intermediate process, until `Go` is received.
    Unknown,
    /// The intermediate process has exited, so the kernel has made the successor a child of the service manager.
    ServiceManager,
}

/// Exchanges the messages up to `Ready`.
async fn prepare(
    bundle: &SuccessorBundle,
    channel: &Channel,
    mut parent: Parent,
) -> Result<(ProcessHandle, Protocols)> {
    let origin = Origin::now(bundle.generation);
    let mut successor = None;
    while successor.is_none() || parent == Parent::Unknown {
        let frame = next(channel).await?;
        match frame.message_type {
            MessageType::Hello => {
                let pid =
                    frame.text.parse::<u32>().map_err(anyhow::Error::from).and_then(ProcessHandle::open);
                successor = Some(pid.context("could not identify the successor")?);
            }
            MessageType::Go => parent = Parent::ServiceManager,
            other => bail!("protocol error: expected Hello from the successor, got {other:?}"),
        }
    }
    let successor = successor.context("protocol error: no Hello from the successor")?;
    systemd::reloading(&format!(
        "reloading: generation {} starts as pid {}",
        bundle.generation.saturating_add(1),
        successor.pid()
    ));
    let watchdog = bundle.watchdog.map_or_else(String::new, |time| time.as_micros().to_string());
    channel.send(MessageType::Listeners, origin, &bundle.fds, &watchdog).await?;
    let ready = expect(channel, MessageType::Ready).await?;
    // `Accepting` says whether it also adopts upgraded connections and open HTTP/2 streams.
    let adopts = match ready.text.as_str() {
        ADOPTS_HTTP2_AND_TLS => Protocols::Http2AndTls,
        _ => Protocols::PlainHttp1,
    };
    Ok((successor, adopts))
}

/// A successor that has sent `Ready`, and can serve as soon as it receives `Commit`.
pub struct PreparedSuccessor {
    channel: Channel,
    process: ProcessHandle,
    adopts: Protocols,
}

/// A successor that serves, and adopts the connections of this process.
pub struct Successor {
    pub channel: Channel,
    /// Which connections it can adopt.
    pub adopts: Protocols,
}

/// The result of a commit.
pub struct Commitment {
    pub successor: Result<Successor>,
    /// How many stop signals this process received before the result was known.
    pub stop_signals: u32,
}

impl PreparedSuccessor {
    /// Commits. Signals that arrive meanwhile do not cancel it; stop signals are counted, and the caller acts on them.
    pub async fn commit(
        self,
        bundle: &SuccessorBundle,
        status: &Status,
        signals: &mut Signals,
    ) -> Commitment {
        let mut stop_signals = 0;
        let mut committed = pin!(self.hand_main_over(bundle, status));
        let committed = loop {
            tokio::select! {
                biased;
                // Polled first, so that a stop signal that arrives together with the successor's answer is counted.
                request = signals.next() => match request {
                    SignalRequest::Stop => {
                        info!("stop signal received during a reload: stopping after the reload");
                        stop_signals += 1;
                    }
                    SignalRequest::Reload => error!("SIGHUP ignored: {UNDER_WAY}"),
                },
                committed = &mut committed => break committed,
            }
        };
        let successor = committed.map(|Self { channel, process, adopts }| {
            // Without a service manager, only this process received the stop signal, so it passes the signal on.
            if stop_signals > 0 && !systemd::is_reachable() {
                process.terminate();
            }
            Successor { channel, adopts }
        });
        Commitment { successor, stop_signals }
    }

    /// Makes the successor the main process of the service. Must not be cancelled: from `Commit` on the successor may
    /// serve, so this decides which of the two processes keeps serving. If it fails, the successor has been killed.
    async fn hand_main_over(mut self, bundle: &SuccessorBundle, status: &Status) -> Result<Self> {
        let origin = Origin::now(bundle.generation);
        let exchange = async {
            let mut offered = Vec::new();
            for adopted in [ADOPTS_TABLES_AND_CERTIFICATES, ADOPTS_TLS12] {
                offered.push((File::open("/dev/null")?, SocketRecord::new(adopted.to_owned(), Bytes::new())));
            }
            // The application may have closed it.
            if let Ok(stdout) = io::stdout().as_fd().try_clone_to_owned() {
                offered.push((stdout.into(), SocketRecord::new(STDOUT.to_owned(), Bytes::new())));
            }
            self.channel.send(MessageType::Commit, origin, &offered, ADOPTS_STREAMS).await?;
            expect(&self.channel, MessageType::Accepting).await
        };
        let answer = timeout(COMMIT_LIMIT, exchange).await;
        let answer = answer.context("the successor did not answer Commit in time").flatten();
        if self.adopts == Protocols::Http2AndTls
            && let Ok(accepting) = &answer
        {
            self.adopts = match accepting.text.as_str() {
                ADOPTS_TLS12 => Protocols::Tls12,
                ADOPTS_TABLES_AND_CERTIFICATES => Protocols::CertificatesAndTables,
                ADOPTS_STREAMS | ADOPTS_UPGRADES => Protocols::Upgrades,
                _ => Protocols::Http2AndTls,
            };
        }
        if let Err(reason) = answer {
            // Killed before its channel is closed, because the successor would take a closed channel for the exit of
            // this process, and would serve beside it.
            let process = Arc::new(self.process);
            let killed = task::on_thread({
                let process = process.clone();
                move || process.kill()
            });
            let killed = match killed {
                Ok(killed) => killed.await.map_err(anyhow::Error::from).flatten(),
                // No thread could be started, so this thread waits. Nothing else may happen until the successor is dead.
                Err(_) => process.kill(),
            };
            drop(self.channel);
            if let Err(error) = killed {
                error!("could not end the failed successor, so two processes may be serving: {error:#}");
            }
            return Err(reason);
        }
        let pid = self.process.pid();
        status.set_role(ManagerRole::Former);
        systemd::hand_main_to(pid).await;
        // An error is ignored, because a successor that has died meanwhile was the main process, so systemd restarts
        // the service.
        let _ = timeout(COMMIT_LIMIT, self.channel.send_text(MessageType::Main, origin, "")).await;
        let next = bundle.generation.saturating_add(1);
        info!(
            message_id = message_id::SUCCEEDED,
            successor = pid,
            "reload: pid {pid} (generation {next}) is serving now"
        );
        Ok(self)
    }
}

async fn expect(channel: &Channel, kind: MessageType) -> Result<Frame> {
    let frame = next(channel).await?;
    ensure!(
        frame.message_type == kind,
        "protocol error: expected {kind:?} from the successor, got {:?}",
        frame.message_type
    );
    Ok(frame)
}

async fn next(channel: &Channel) -> Result<Frame> {
    match channel.receive().await.context("could not receive from the successor")? {
        Some(frame) if frame.message_type == MessageType::Refused => bail!("{}", frame.text),
        Some(frame) => Ok(frame),
        None => bail!("the successor exited unexpectedly"),
    }
}
