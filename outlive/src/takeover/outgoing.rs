//! The old process's side: it serves until it is told to end, or a successor has taken over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use tokio::time::timeout;
use tracing::{error, info};

use super::launch::Program;
use super::process_handle::ProcessHandle;
use super::socket::TakeoverSocket;
use super::{COMMIT_LIMIT, CREDENTIALS, OVERTAKEN, TAKES_ALL_KINDS};
use crate::handover::{Channel, Frame, Kind, Origin, Record, pair};
use crate::listeners::Listener;
use crate::observe::log::message_id;
use crate::observe::status::{ManagerRole, Status};
use crate::os::credentials::Credentials;
use crate::os::signals::{Asked, Signals};
use crate::os::systemd;

const UNDER_WAY: &str = "another reload is in progress";

/// The kernel ends all processes of a container with its PID 1, successors included.
const PID_1: &str = "PID 1 of a container cannot reload; start a new container instead";

/// What a successor inherits.
pub struct Offer {
    /// Its listeners, and the folder of its credentials.
    fds: Vec<(OwnedFd, Record)>,
    pub generation: u64,
    pub watchdog: Option<Duration>,
    pub program: Program,
    /// For a successor to be ready.
    pub limit: Duration,
}

/// Why a process no longer just serves.
pub enum Ending {
    /// SIGTERM or SIGINT.
    Terminated,
    /// A background task has ended, and the process is to end with it; why.
    Failed(String),
    /// A successor accepts connections, and waits for ours.
    Succeeded {
        successor: Channel,
        /// Whether it goes on with HTTP/2 and TLS connections.
        takes_all_kinds: bool,
        /// How often this process was told to end before that was certain.
        terminations: u32,
    },
}

impl Offer {
    pub fn new(
        listeners: &[Listener],
        credentials: &Credentials,
        generation: u64,
        watchdog: Option<Duration>,
        program: Program,
        limit: Duration,
    ) -> io::Result<Self> {
        let mut fds = listeners.iter().map(Listener::pack).collect::<io::Result<Vec<_>>>()?;
        if let Some(folder) = credentials.folder() {
            let record =
                Record { listener: CREDENTIALS.to_owned(), payload: Bytes::new(), http2: None, tls: None };
            fds.push((folder.as_fd().try_clone_to_owned()?, record));
        }
        Ok(Self { fds, generation, watchdog, program, limit })
    }
}

/// What can still be cancelled: dropped, its successor hears that nobody is there, and ends.
type Preparation<'a> = Pin<Box<dyn Future<Output = Result<Prepared>> + Send + 'a>>;

/// Serves until the end; a successor that fails changes nothing but the status line.
pub async fn serve_until_end(
    offer: &Offer,
    socket: Option<TakeoverSocket>,
    signals: &mut Signals,
    status: &Status,
    failed: impl Future<Output = String>,
) -> Ending {
    let mut failed = pin!(failed);
    let mut preparation: Option<Preparation<'_>> = None;
    loop {
        let connect = async {
            match &socket {
                Some(socket) => socket.accept().await,
                None => std::future::pending().await,
            }
        };
        let prepared = async {
            match &mut preparation {
                Some(preparation) => preparation.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::End => {
                    if preparation.is_some() {
                        info!(message_id = message_id::NOT_RELOADED, "reload failed: {OVERTAKEN}");
                    }
                    return Ending::Terminated;
                }
                Asked::Reload if preparation.is_some() => error!("SIGHUP ignored: {UNDER_WAY}"),
                Asked::Reload if std::process::id() == 1 => error!("SIGHUP ignored: {PID_1}"),
                Asked::Reload => preparation = Some(Box::pin(prepare_own(offer))),
            },
            reason = &mut failed => {
                error!("{reason}");
                return Ending::Failed(reason);
            }
            prepared = prepared => {
                preparation = None;
                let (outcome, terminations) = match prepared {
                    Ok(prepared) => commit(prepared, offer, status, signals).await,
                    Err(reason) => (Err(reason), 0),
                };
                match outcome {
                    Ok((successor, takes_all_kinds)) => {
                        return Ending::Succeeded { successor, takes_all_kinds, terminations };
                    }
                    Err(reason) => {
                        let reason = format!("{reason:#}");
                        error!(message_id = message_id::NOT_RELOADED, "reload failed: {reason}");
                        if terminations > 0 {
                            return Ending::Terminated;
                        }
                        status.note(format!("last reload failed: {reason}"));
                        systemd::ready(&status.line());
                    }
                }
            }
            channel = connect => {
                if preparation.is_some() {
                    refuse(&channel, offer.generation).await;
                } else {
                    preparation = Some(Box::pin(prepare_knocking(offer, channel)));
                }
            }
        }
    }
}

async fn refuse(channel: &Channel, generation: u64) {
    info!("refused a takeover: {UNDER_WAY}");
    // Whoever it was may be gone.
    let _ = channel.say(Kind::Refused, Origin::now(generation), UNDER_WAY).await;
}

/// Somebody else starts the successor, and says Go.
async fn prepare_knocking(offer: &Offer, channel: Channel) -> Result<Prepared> {
    match timeout(offer.limit, prepare(offer, &channel, false)).await {
        Ok(prepared) => {
            let (successor, takes_all_kinds) = prepared?;
            Ok(Prepared { channel, successor, takes_all_kinds })
        }
        Err(_) => bail!("the successor was not ready within --takeover-timeout"),
    }
}

/// We start the successor ourselves.
async fn prepare_own(offer: &Offer) -> Result<Prepared> {
    let (ours, theirs) = pair().context("could not create a channel for the successor")?;
    let channel = Channel::new(ours)?;
    let program = offer.program.clone();
    let limit = offer.limit;
    let launched = tokio::task::spawn_blocking(move || program.launch(theirs, limit)).await??;
    let outcome = tokio::task::spawn_blocking(move || launched.outcome(limit));
    let reason = match timeout(limit, prepare(offer, &channel, true)).await {
        Ok(Ok((successor, takes_all_kinds))) => return Ok(Prepared { channel, successor, takes_all_kinds }),
        Ok(Err(reason)) => reason,
        Err(_) => anyhow!("the successor was not ready within --takeover-timeout"),
    };
    // It hears that it is hung up on; this waits until it is gone.
    drop(channel);
    outcome.await?.err().map_or(Err(reason), Err)
}

/// The talk with the successor, up to where it could serve; whether it can go on with HTTP/2 and TLS connections.
async fn prepare(offer: &Offer, channel: &Channel, mut reparented: bool) -> Result<(ProcessHandle, bool)> {
    let me = Origin::now(offer.generation);
    let mut successor = None;
    while successor.is_none() || !reparented {
        let frame = next(channel).await?;
        match frame.kind {
            Kind::Hello => {
                let pid =
                    frame.text.parse::<u32>().map_err(anyhow::Error::from).and_then(ProcessHandle::open);
                successor = Some(pid.context("could not identify the successor")?);
            }
            Kind::Go => reparented = true,
            other => bail!("protocol error: expected Hello from the successor, got {other:?}"),
        }
    }
    let successor = successor.context("protocol error: no Hello from the successor")?;
    systemd::reloading(&format!(
        "reloading: generation {} starts as pid {}",
        offer.generation + 1,
        successor.pid()
    ));
    let watchdog = offer.watchdog.map_or_else(String::new, |time| time.as_micros().to_string());
    channel.send(Kind::Listeners, me, &offer.fds, &watchdog).await?;
    let ready = expect(channel, Kind::Ready).await?;
    Ok((successor, ready.text == TAKES_ALL_KINDS))
}

/// A successor that could serve.
struct Prepared {
    channel: Channel,
    successor: ProcessHandle,
    takes_all_kinds: bool,
}

/// Commits, whatever signals come meanwhile; gives the successor's channel, whether it goes on with HTTP/2 and TLS
/// connections, and how often this process was told to end.
async fn commit(
    prepared: Prepared,
    offer: &Offer,
    status: &Status,
    signals: &mut Signals,
) -> (Result<(Channel, bool)>, u32) {
    let mut terminations = 0;
    let mut committed = pin!(prepared.commit(offer, status));
    let outcome = loop {
        tokio::select! {
            biased;
            // First, because a stop signal that came before the successor's answer counts.
            asked = signals.next() => match asked {
                Asked::End => {
                    info!("stop signal received during a reload: stopping after the reload");
                    terminations += 1;
                }
                Asked::Reload => error!("SIGHUP ignored: {UNDER_WAY}"),
            },
            outcome = &mut committed => break outcome,
        }
    };
    let outcome = outcome.map(|Prepared { channel, successor, takes_all_kinds }| {
        // A service manager tells each of us.
        if terminations > 0 && !systemd::is_there() {
            successor.terminate();
        }
        (channel, takes_all_kinds)
    });
    (outcome, terminations)
}

impl Prepared {
    /// Makes the successor the main process, and not to be cancelled: from Commit on it may be serving, so
    /// it is decided here which of the two goes on. Where that is this one, the successor is no more.
    async fn commit(self, offer: &Offer, status: &Status) -> Result<Self> {
        let me = Origin::now(offer.generation);
        let agreement = async {
            self.channel.say(Kind::Commit, me, "").await?;
            expect(&self.channel, Kind::Accepting).await
        };
        let agreed = timeout(COMMIT_LIMIT, agreement).await;
        if let Err(reason) = agreed.context("the successor did not answer Commit in time").flatten() {
            // Before it is hung up on, which it would take for the end of this process.
            let ended = tokio::task::spawn_blocking(move || {
                let Self { channel, successor, .. } = self;
                successor.kill().map(|()| drop(channel))
            });
            if let Err(error) = ended.await.map_err(anyhow::Error::from).flatten() {
                error!("could not end the failed successor, so two processes may be serving: {error:#}");
            }
            return Err(reason);
        }
        let pid = self.successor.pid();
        status.set_role(ManagerRole::Former);
        systemd::hand_main_to(pid).await;
        // If it has died by now, it died as the main process.
        let _ = timeout(COMMIT_LIMIT, self.channel.say(Kind::Main, me, "")).await;
        let next = offer.generation + 1;
        info!(
            message_id = message_id::SUCCEEDED,
            successor = pid,
            "generation {next} has taken over as pid {pid}"
        );
        Ok(self)
    }
}

async fn expect(channel: &Channel, kind: Kind) -> Result<Frame> {
    let frame = next(channel).await?;
    ensure!(frame.kind == kind, "protocol error: expected {kind:?} from the successor, got {:?}", frame.kind);
    Ok(frame)
}

async fn next(channel: &Channel) -> Result<Frame> {
    match channel.receive().await.context("could not receive from the successor")? {
        Some(frame) if frame.kind == Kind::Refused => bail!("{}", frame.text),
        Some(frame) => Ok(frame),
        None => bail!("the successor exited unexpectedly"),
    }
}
