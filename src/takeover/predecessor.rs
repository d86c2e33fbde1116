//! The old process's side: it serves until it is told to end, or a successor has taken over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use tokio::time::timeout;
use tracing::{error, info};

use super::CREDENTIALS;
use super::launch::Program;
use super::socket::TakeoverSocket;
use crate::credentials::Credentials;
use crate::handover::{Channel, Frame, Kind, Record, Sender, pair};
use crate::listeners::Listener;
use crate::log::message_id;
use crate::signals::{Asked, Signals};
use crate::status::{Status, Voice};
use crate::systemd;

const UNDER_WAY: &str = "a takeover is under way already";

/// The end of a container's PID 1 is the end of all in it, successors too.
const PID_1: &str = "no reload as PID 1 of a container: start another container";

/// What a successor inherits.
pub struct Estate {
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
    /// A successor accepts connections, and waits for ours.
    Succeeded(Channel),
}

impl Estate {
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
            let record = Record { listener: CREDENTIALS.to_owned(), rest: Bytes::new() };
            fds.push((folder.as_fd().try_clone_to_owned()?, record));
        }
        Ok(Self { fds, generation, watchdog, program, limit })
    }
}

type Offer<'a> = Pin<Box<dyn Future<Output = Result<Channel>> + Send + 'a>>;

/// Serves until the end; a successor that fails changes nothing but the status line.
pub async fn serve_until_end(
    estate: &Estate,
    socket: Option<TakeoverSocket>,
    signals: &mut Signals,
    status: &Status,
) -> Ending {
    let mut offer: Option<Offer<'_>> = None;
    loop {
        let knock = async {
            match &socket {
                Some(socket) => socket.accept().await,
                None => std::future::pending().await,
            }
        };
        let outcome = async {
            match &mut offer {
                Some(offer) => offer.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            asked = signals.next() => match asked {
                // An offer under way is dropped: its successor hears that nobody is there, and ends.
                Asked::End => return Ending::Terminated,
                Asked::Reload if offer.is_some() => error!("SIGHUP: {UNDER_WAY}"),
                Asked::Reload if std::process::id() == 1 => error!("SIGHUP: {PID_1}"),
                Asked::Reload => offer = Some(Box::pin(offer_to_own(estate, status))),
            },
            outcome = outcome => {
                offer = None;
                match outcome {
                    Ok(channel) => return Ending::Succeeded(channel),
                    Err(reason) => {
                        let reason = format!("{reason:#}");
                        error!(message_id = message_id::NOT_RELOADED, "not reloaded: {reason}");
                        status.remark(format!("last reload failed: {reason}"));
                        systemd::ready(&status.line());
                    }
                }
            }
            channel = knock => {
                if offer.is_some() {
                    refuse(&channel, estate.generation).await;
                } else {
                    offer = Some(Box::pin(offer_to_knocking(estate, channel, status)));
                }
            }
        }
    }
}

async fn refuse(channel: &Channel, generation: u64) {
    info!("a takeover was refused: {UNDER_WAY}");
    // Whoever it was may be gone.
    let _ = channel.say(Kind::Refused, Sender::now(generation), UNDER_WAY).await;
}

/// Somebody else starts the successor, and says Go.
async fn offer_to_knocking(estate: &Estate, channel: Channel, status: &Status) -> Result<Channel> {
    match timeout(estate.limit, offer(estate, &channel, false, status)).await {
        Ok(Ok(())) => Ok(channel),
        Ok(Err(reason)) => Err(reason),
        Err(_) => bail!("the successor was not ready within --takeover-timeout"),
    }
}

/// We start the successor ourselves.
async fn offer_to_own(estate: &Estate, status: &Status) -> Result<Channel> {
    let (ours, theirs) = pair().context("a channel")?;
    let channel = Channel::new(ours)?;
    let program = estate.program.clone();
    let limit = estate.limit;
    let launched = tokio::task::spawn_blocking(move || program.launch(theirs, limit)).await??;
    let outcome = tokio::task::spawn_blocking(move || launched.outcome(limit));
    match timeout(limit, offer(estate, &channel, true, status)).await {
        Ok(Ok(())) => Ok(channel),
        Ok(Err(reason)) => {
            drop(channel);
            // It has hung up or was hung up on: this waits until it is gone.
            outcome.await?.err().map_or(Err(reason), Err)
        }
        Err(_) => {
            drop(channel);
            outcome.await?.err().map_or_else(|| bail!("the successor was not ready in time"), Err)
        }
    }
}

/// The talk with the successor, up to where it accepts connections and is the main process.
async fn offer(estate: &Estate, channel: &Channel, reparented: bool, status: &Status) -> Result<()> {
    let me = Sender::now(estate.generation);
    let mut pid = None;
    let mut reparented = reparented;
    while pid.is_none() || !reparented {
        let frame = next(channel).await?;
        match frame.kind {
            Kind::Hello => pid = Some(frame.text.parse::<u32>().context("the successor's pid")?),
            Kind::Go => reparented = true,
            other => bail!("a successor was to say Hello, and said {other:?}"),
        }
    }
    let pid = pid.unwrap_or_default();
    systemd::reloading(&format!("generation {} takes over: pid {pid}", estate.generation + 1));
    let watchdog = estate.watchdog.map_or_else(String::new, |time| time.as_micros().to_string());
    channel.send(Kind::Listeners, me, &estate.fds, &watchdog).await?;
    expect(channel, Kind::Ready).await?;
    channel.say(Kind::Commit, me, "").await?;
    expect(channel, Kind::Accepting).await?;
    status.set_voice(Voice::Silent);
    systemd::hand_main_to(pid).await;
    // If it has died by now, it died as the main process.
    let _ = channel.say(Kind::Main, me, "").await;
    info!(
        message_id = message_id::SUCCEEDED,
        successor = pid,
        "generation {} has taken over: pid {pid}",
        estate.generation + 1
    );
    Ok(())
}

async fn expect(channel: &Channel, kind: Kind) -> Result<()> {
    match next(channel).await?.kind {
        said if said == kind => Ok(()),
        said => bail!("a successor was to say {kind:?}, and said {said:?}"),
    }
}

async fn next(channel: &Channel) -> Result<Frame> {
    match channel.receive().await.context("from the successor")? {
        Some(frame) if frame.kind == Kind::Refused => bail!("{}", frame.text),
        Some(frame) => Ok(frame),
        None => bail!("the successor died"),
    }
}
