//! The side of the successor in a reload.
//!
//! [`PredecessorLink::inherit`] receives the listeners, with which `lifecycle/start.rs` starts the service.
//! [`PredecessorLink::commit`] then agrees with the predecessor that this process serves, and [`Committed::take_over`]
//! adopts the connections with an [`Adopter`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::sync::oneshot;
use tokio::time::{timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::launch::{ResultPipe, is_readable, take_standard_input};
use super::{
    ADOPTS_HTTP2_AND_TLS, ADOPTS_STREAMS, ADOPTS_TABLES_AND_CERTIFICATES, ADOPTS_TLS12, ADOPTS_UPGRADES,
    COMMIT_LIMIT, CREDENTIALS, OUTCOME_LIMIT, STDOUT,
};
use crate::handover::{Channel, MessageType, Next, Origin, receive_frame, send_frames};
use crate::listeners::{Inherited, SocketFiles};
use crate::observe::status::Status;
use crate::os::credentials::Credentials;
use crate::os::task;
use crate::server::Server;
use crate::takeover::adopter::Adopter;
use crate::takeover::old_processes::OldProcesses;

/// The connection to the predecessor, before the commit. Dropped, it cancels the reload.
pub struct PredecessorLink {
    channel: OwnedFd,
    outcome: ResultPipe,
    me: Origin,
    deadline: Instant,
}

impl PredecessorLink {
    /// Takes the channel from standard input and the result pipe from standard output, where `launch.rs` has put them.
    pub fn find() -> Result<Self> {
        let outcome = ResultPipe::claim_stdout().context("could not duplicate standard output")?;
        let channel = take_standard_input().context("could not duplicate standard input")?;
        Ok(Self { channel, outcome, me: Origin::now(0), deadline: Instant::now() })
    }

    /// Asks for the listeners. `limit` is the time until `Commit`, from now. Fails, with the reason, if the predecessor
    /// refuses, does not answer in time, or sends an invalid message.
    pub fn inherit(&mut self, limit: Duration) -> Result<Inherited> {
        self.deadline = Instant::now() + limit;
        let pid = std::process::id().to_string();
        // An error is ignored, because a predecessor that has closed the channel may have sent the reason before, which
        // is received below.
        send_frames::<OwnedFd>(&self.channel, MessageType::Hello, self.me, &[], &pid);
        let frame = loop {
            ensure!(
                is_readable(&self.channel, self.deadline)?,
                "no listeners from the predecessor within --takeover-timeout"
            );
            match receive_frame(&self.channel)? {
                Next::Frame(frame) => break frame,
                Next::Refused(_, reason) => bail!("invalid message from the predecessor: {reason}"),
                Next::Pending | Next::NoRoom => {}
                Next::End => bail!("the predecessor closed the channel"),
            }
        };
        match frame.message_type {
            MessageType::Listeners => {}
            MessageType::Refused => bail!("{}", frame.text),
            other => bail!("protocol error: expected Listeners from the predecessor, got {other:?}"),
        }
        let generation = frame.origin.generation.saturating_add(1);
        self.me = Origin::now(generation);
        let mut inherited = Inherited {
            listeners: Vec::new(),
            named: Vec::new(),
            channels: Vec::new(),
            credentials: Credentials::default(),
            generation: Some(generation),
            // systemd sets WATCHDOG_USEC only for the process that ExecStart= starts, so the predecessor passes it on.
            watchdog: frame.text.parse().ok().map(Duration::from_micros),
            socket_files: SocketFiles::of_predecessor(),
        };
        for (fd, record) in frame.sockets {
            if record.listener == CREDENTIALS {
                inherited.credentials = Credentials::of_predecessor(fd);
            } else {
                inherited.add(fd, &record)?;
            }
        }
        Ok(inherited)
    }

    /// Sends `Ready`, and waits for `Commit`. Fails if the predecessor refuses, exits or does not answer in time.
    pub async fn commit(self) -> Result<Committed> {
        let Self { channel, outcome, me, deadline } = self;
        match ask_to_commit(channel, me, deadline).await {
            Ok((channel, adopts)) => Ok(Committed { channel, outcome, me, adopts }),
            Err(error) => {
                outcome.failed(&format!("{error:#}"));
                Err(error)
            }
        }
    }

    /// Reports why this process does not take over, so that the predecessor keeps serving and the reload fails.
    pub fn give_up(self, reason: &str) {
        let (_, _) = send_frames::<OwnedFd>(&self.channel, MessageType::Refused, self.me, &[], reason);
        self.outcome.failed(reason);
    }
}

/// Returns also the text of `Accepting` that the predecessor expects.
async fn ask_to_commit(channel: OwnedFd, me: Origin, deadline: Instant) -> Result<(Channel, &'static str)> {
    let channel = Channel::new(channel)?;
    let ready = timeout_at(deadline.into(), channel.send_text(MessageType::Ready, me, ADOPTS_HTTP2_AND_TLS));
    ready.await.map_err(io::Error::from).flatten().context("could not send Ready to the predecessor")?;
    let answer = timeout_at(deadline.into(), channel.receive()).await;
    match answer.context("no Commit from the predecessor within --takeover-timeout")?? {
        Some(frame) if frame.message_type == MessageType::Commit => {
            if let Some((stdout, _)) = frame.sockets.iter().find(|(_, record)| record.listener == STDOUT)
                && let Err(error) = rustix::stdio::dup2_stdout(stdout)
            {
                debug!(%error, "could not take over the standard output of the predecessor");
            }
            let hands_streams_over = frame.text == ADOPTS_STREAMS;
            let hands_over = |text| frame.sockets.iter().any(|(_, record)| record.listener == text);
            let (certificates, tls12) =
                (hands_over(ADOPTS_TABLES_AND_CERTIFICATES), hands_over(ADOPTS_TLS12));
            let adopts = match (hands_streams_over, certificates, tls12) {
                (true, true, true) => ADOPTS_TLS12,
                (true, true, false) => ADOPTS_TABLES_AND_CERTIFICATES,
                (true, false, _) => ADOPTS_STREAMS,
                (false, ..) => ADOPTS_UPGRADES,
            };
            Ok((channel, adopts))
        }
        Some(frame) if frame.message_type == MessageType::Refused => bail!("{}", frame.text),
        Some(frame) => {
            bail!("protocol error: expected Commit from the predecessor, got {:?}", frame.message_type)
        }
        None => bail!("the predecessor closed the channel"),
    }
}

/// The connection to the predecessor after the commit: from now on this process serves.
pub struct Committed {
    channel: Channel,
    outcome: ResultPipe,
    me: Origin,
    /// The text of `Accepting`.
    adopts: &'static str,
}

impl Committed {
    /// Sends `Accepting`, and starts a task that adopts the predecessor's connections. Returns when this process is the
    /// main process of the service; the caller then reports the success through the returned pipe. `gone` is cancelled
    /// when the predecessor has exited, or only sends responses.
    pub async fn take_over(
        self,
        server: Server,
        status: Arc<Status>,
        old: OldProcesses,
        gone: CancellationToken,
    ) -> ResultPipe {
        let Self { channel, outcome, me, adopts } = self;
        let accepting = timeout(COMMIT_LIMIT, channel.send_text(MessageType::Accepting, me, adopts)).await;
        if let Err(error) = accepting.map_err(io::Error::from).flatten() {
            warn!(%error, "could not send Accepting to the predecessor");
        }
        let (to_main, is_main) = oneshot::channel();
        task::spawn(async move {
            receive(channel, server, status, old, to_main).await;
            gone.cancel();
        });
        // A timeout is ignored: if the predecessor has died or hangs, this process is the only one that serves.
        let _ = timeout(OUTCOME_LIMIT, is_main).await;
        outcome
    }
}

async fn receive(
    channel: Channel,
    server: Server,
    status: Arc<Status>,
    old: OldProcesses,
    to_main: oneshot::Sender<()>,
) {
    let _arriving = server.registry().arriving();
    let mut to_main = Some(to_main);
    let adopter = Adopter::new(server.clone());
    let note = adopter
        .adopt_from(channel, move |frame| match frame.message_type {
            MessageType::Main => drop(to_main.take()),
            MessageType::Lingering => old.add(frame),
            other => debug!(?other, "unexpected frame from the predecessor"),
        })
        .await;
    status.note(note);
}
