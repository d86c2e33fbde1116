//! All that is said to the service manager: `sd_notify(3)`. Without `NOTIFY_SOCKET` each of these does
//! nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::warn;

/// How often STATUS= may change.
pub const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Whether anybody listens to what is said.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty())
}

/// The service can serve, and has what was stored under `taken`.
pub fn ready(status: &str, taken: Option<&str>) {
    let mut messages = vec![NotifyState::Ready, NotifyState::Status(status)];
    if let Some(name) = taken {
        messages.extend([NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }
    send(&messages);
}

/// The line in `systemctl status`.
pub fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// The service goes down.
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Still going down: asks for `more` time from now, in case `TimeoutStopSec=` is shorter than the drain.
pub fn still_stopping(status: &str, more: Duration) {
    let more = u32::try_from(more.as_micros()).unwrap_or(u32::MAX);
    send(&[NotifyState::ExtendTimeoutUsec(more), NotifyState::Status(status)]);
}

/// Asks for `fd` to be kept for the next process (`FileDescriptorStoreMax=`), whatever it polls.
pub fn store(name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    let keep = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    sd_notify::notify_with_fds(&keep, &[fd])
}

/// Waits until the service manager has dealt with all that was said before: it then closes its end of
/// a pipe.
pub async fn barrier() -> io::Result<()> {
    let (sent, mut closed) = pipe::pipe()?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sent.as_fd()])?;
    drop(sent);
    closed.read_u8().await.map(drop).or_else(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Ok(()),
        _ => Err(error),
    })
}

/// Whether standard error is the journal: `$JOURNAL_STREAM` names its device and inode, as
/// `systemd.exec(5)` has it.
pub fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// Says each second what the service is doing, where that has changed.
pub async fn report(status: impl Fn() -> String) {
    let mut said = String::new();
    let mut clock = tokio::time::interval(STATUS_INTERVAL);
    loop {
        clock.tick().await;
        let now = status();
        if now != said {
            self::status(&now);
            said = now;
        }
    }
}

/// Feeds the watchdog at half its time (`WATCHDOG_USEC`), from a task: if the runtime no longer turns,
/// nothing is sent, and systemd restarts the service.
pub async fn feed_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut clock = tokio::time::interval((limit / 2).max(Duration::from_millis(1)));
    loop {
        clock.tick().await;
        send(&[NotifyState::Watchdog]);
    }
}

fn send(messages: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(messages) {
        warn!(%error, "could not tell the service manager (NOTIFY_SOCKET)");
    }
}
