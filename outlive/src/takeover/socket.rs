//! The takeover socket in `$RUNTIME_DIRECTORY`, and the command that connects to it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tracing::warn;

use super::STOPPED_DURING_RELOAD;
use super::launch::Program;
use crate::handover::{Channel, MessageType, Origin, send_frames};
use crate::os::exit::{Failure, Result};

const NAME: &str = "takeover";
/// A stop reaches all processes of a service within this time.
const STOP_LAG: Duration = Duration::from_millis(100);
/// Takeovers that may wait to be refused.
const BACKLOG: i32 = 4;

fn path() -> Option<PathBuf> {
    let folders: OsString = std::env::var_os("RUNTIME_DIRECTORY")?;
    // `RuntimeDirectory=` may name several; systemd puts colons between them.
    let first = std::env::split_paths(&folders).next()?;
    (!first.as_os_str().is_empty()).then(|| first.join(NAME))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Where a takeover command connects.
pub struct TakeoverSocket(UnixListener);

impl TakeoverSocket {
    /// Makes the socket, in the place of a predecessor's. None without `RuntimeDirectory=`; a socket that
    /// cannot be made costs the reload, and not the service.
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
        // Of a process with this pid that died here.
        let _ = fs::remove_file(&aside);
        bind(&socket, &SocketAddrUnix::new(&aside)?)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600))?;
        listen(&socket, BACKLOG)?;
        fs::rename(&aside, path)?;
        Ok(Self(UnixListener::from_std(socket.into())?))
    }

    /// The next takeover that is asked for, by our own user.
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

/// `takeover`, as `ExecReload=` runs it: starts a successor to the service that runs here, and waits
/// until that has taken over. Fails, with its reason, where the old process stays.
pub fn command(program: Program, limit: Duration) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("could not start the runtime")?;
    let result = runtime.block_on(async {
        let mut stop = signal(SignalKind::terminate()).context("could not watch for signals")?;
        let reload = tokio::task::spawn_blocking(move || reload(&program, limit));
        let failed = tokio::select! {
            biased;
            _ = stop.recv() => None,
            result = reload => match result.context("the takeover command panicked")? {
                Ok(()) => return Ok(()),
                // The successor may have died of the same stop, and be heard of first: no reason of its own.
                Err(failure) => timeout(STOP_LAG, stop.recv()).await.is_err().then_some(failure),
            },
        };
        let overtaken = || Failure::unavailable(anyhow!("reload failed: {STOPPED_DURING_RELOAD}"));
        Err(failed.unwrap_or_else(overtaken))
    });
    runtime.shutdown_background();
    result
}

fn reload(program: &Program, limit: Duration) -> Result<()> {
    let channel = connect()?;
    let say = |kind, text: &str| send_frames::<OwnedFd>(&channel, kind, Origin::now(0), &[], text);
    let copy = channel.try_clone().context("could not duplicate the takeover connection");
    let launched = copy.and_then(|channel| program.launch(channel, limit));
    let launched = launched.map_err(|error| {
        say(MessageType::Refused, &format!("{error:#}"));
        Failure::unavailable(error)
    })?;
    // If nobody reads it, the successor says so.
    say(MessageType::Go, "");
    // Ours would keep the channel open when the successor has died.
    drop(channel);
    launched.outcome(limit).context("reload failed").map_err(Failure::unavailable)
}

/// Tells the service that runs here why it is not reloaded.
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
    SocketAddrUnix::new(&path)
        .and_then(|address| rustix::net::connect(&channel, &address))
        .with_context(|| format!("no running service listens on {}", path.display()))
        .map_err(Failure::unavailable)?;
    Ok(channel)
}
