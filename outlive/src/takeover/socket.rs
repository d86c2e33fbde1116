//! The takeover socket in `$RUNTIME_DIRECTORY`, and the command `takeover` that connects to it.
//!
//! The serving process listens on a [`TakeoverSocket`]. [`command`] runs in the process that `ExecReload=` starts: it
//! connects, starts a successor through `launch.rs`, and exits with the result.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as connect_to, listen, socket_with,
};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tracing::warn;

use super::launch::Program;
use super::{PID_1, STOPPED_DURING_RELOAD};
use crate::handover::{Channel, MessageType, Origin, send_frames};
use crate::os::exit::{Failure, Result};
use crate::os::{systemd, task};

const NAME: &str = "takeover";
/// How long after the successor has failed the takeover command waits for a stop signal. `systemctl stop` sends SIGTERM
/// to all processes of the service, but not at the same moment, so the successor can die of it first.
const STOP_LAG: Duration = Duration::from_millis(100);
/// How many connections may wait in the accept queue, to be refused while another reload is in progress.
const BACKLOG: i32 = 4;

fn path() -> Option<PathBuf> {
    let folders: OsString = std::env::var_os("RUNTIME_DIRECTORY")?;
    // `RuntimeDirectory=` may name several directories, which systemd separates with colons (systemd.exec(5)).
    let first = std::env::split_paths(&folders).next()?;
    (!first.as_os_str().is_empty()).then(|| first.join(NAME))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// The socket to which takeover commands connect. Its path is `takeover` in the first `RuntimeDirectory=`.
pub struct TakeoverSocket(UnixListener);

impl TakeoverSocket {
    /// Creates the socket, and replaces that of a predecessor. None without `RuntimeDirectory=`. None too, with a
    /// warning, if it cannot be created, because only reloads need it and the service can serve without.
    pub fn open() -> Option<Self> {
        let path = path()?;
        Self::bind(&path)
            .inspect_err(|error| warn!(%error, path = %path.display(), "could not create the takeover socket; reloads will fail"))
            .ok()
    }

    fn bind(path: &Path) -> io::Result<Self> {
        let aside = path.with_extension(std::process::id().to_string());
        let socket = new_socket()?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        // The file may exist, if an earlier process with this pid died between bind and rename.
        let _ = fs::remove_file(&aside);
        bind(&socket, &SocketAddrUnix::new(&aside)?)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600))?;
        listen(&socket, BACKLOG)?;
        fs::rename(&aside, path)?;
        Ok(Self(UnixListener::from_std(socket.into())?))
    }

    /// Waits for the next takeover command. Connections from other users are closed.
    pub async fn accept(&self) -> Channel {
        loop {
            match self.try_accept().await {
                Ok(Some(channel)) => return channel,
                Ok(None) => {}
                Err(error) => {
                    warn!(%error, "could not accept on the takeover socket");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn try_accept(&self) -> io::Result<Option<Channel>> {
        let (channel, _) = self.0.accept().await?;
        let peer = channel.peer_cred()?;
        if peer.uid() != rustix::process::geteuid().as_raw() {
            let (pid, uid) = (peer.pid(), peer.uid());
            warn!(pid, uid, "rejected a takeover connection from another user (uid {uid})");
            return Ok(None);
        }
        Channel::new(channel.into_std()?.into()).map(Some)
    }
}

/// The command `takeover`, which `ExecReload=` runs: starts a successor of the running service, and waits until it has
/// taken over. `limit` is `--takeover-timeout`. Fails, with the reason, if the running process keeps serving.
pub fn command(program: Program, limit: Duration) -> Result<()> {
    if systemd::ignores_this_process() {
        give_up(systemd::SET_NOTIFY_ACCESS);
        return Err(Failure::config(anyhow!("reload failed: {}", systemd::SET_NOTIFY_ACCESS)));
    }
    // systemd starts each command of a unit with PrivatePIDs=yes as PID 1 of its own namespace.
    if std::process::id() == 1 {
        give_up(PID_1);
        return Err(Failure::config(anyhow!("reload failed: {PID_1}")));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("could not start the runtime")?;
    let result = runtime.block_on(async {
        let mut stop = signal(SignalKind::terminate()).context("could not watch for signals")?;
        let reload = task::on_thread(move || reload(&program, limit))
            .context("could not start a thread; raise TasksMax= or LimitNPROC=")
            .map_err(Failure::unavailable)?;
        let failed = tokio::select! {
            biased;
            _ = stop.recv() => None,
            result = reload => match result.context("the takeover command panicked")? {
                Ok(()) => return Ok(()),
                // If a stop signal follows, the successor died of the same stop, which is then the reason to report.
                Err(failure) => timeout(STOP_LAG, stop.recv()).await.is_err().then_some(failure),
            },
        };
        let stopped = || Failure::unavailable(anyhow!("reload failed: {STOPPED_DURING_RELOAD}"));
        Err(failed.unwrap_or_else(stopped))
    });
    runtime.shutdown_background();
    result
}

fn reload(program: &Program, limit: Duration) -> Result<()> {
    let channel = connect()?;
    let send =
        |message_type, text: &str| send_frames::<OwnedFd>(&channel, message_type, Origin::now(0), &[], text);
    let copy = channel.try_clone().context("could not duplicate the takeover connection");
    let launched = copy.and_then(|channel| program.launch(channel, limit));
    let launched = launched.map_err(|error| {
        send(MessageType::Refused, &format!("{error:#}"));
        Failure::unavailable(error)
    })?;
    // An error is ignored: if the service has exited, the successor reports that.
    send(MessageType::Go, "");
    // Closed, because the service detects a dead successor by the closed channel, which this copy would keep open.
    drop(channel);
    launched.outcome(limit).context("reload failed").map_err(Failure::unavailable)
}

/// Reports to the running service why a reload fails before a successor is started, for its log and status line.
pub fn give_up(reason: &str) {
    if let Ok(channel) = connect() {
        send_frames::<OwnedFd>(&channel, MessageType::Refused, Origin::now(0), &[], reason);
    }
}

fn connect() -> Result<OwnedFd> {
    let path = path()
        .context(
            "RUNTIME_DIRECTORY is not set: run `takeover` from ExecReload= of a unit that has RuntimeDirectory=",
        )
        .map_err(Failure::config)?;
    let channel = new_socket().context("could not create a socket")?;
    // Otherwise `connect` would wait without end if the queue is full, because the running process is stopped or hangs.
    rustix::io::ioctl_fionbio(&channel, true).context("could not set the socket non-blocking")?;
    let connected = SocketAddrUnix::new(&path).and_then(|address| connect_to(&channel, &address));
    let reason = match connected {
        Err(Errno::AGAIN) => "the running service hangs, so restart it: it accepts no connection at",
        Err(Errno::NOENT | Errno::CONNREFUSED) => "no running service listens on",
        _ => "could not connect to the running service at",
    };
    connected.with_context(|| format!("{reason} {}", path.display())).map_err(Failure::unavailable)?;
    rustix::io::ioctl_fionbio(&channel, false).context("could not set the socket blocking")?;
    Ok(channel)
}
