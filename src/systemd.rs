//! All that is said to the service manager: `sd_notify(3)`. Without `NOTIFY_SOCKET` each of these does
//! nothing.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

/// How often STATUS= may change.
pub const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The service can serve.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
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

/// Whether standard error is the journal: `$JOURNAL_STREAM` names its device and inode, as
/// `systemd.exec(5)` has it.
pub fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr()) else { return false };
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
