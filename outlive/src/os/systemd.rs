//! Messages to the service manager, sd_notify(3). All of them are sent from this file. Without `NOTIFY_SOCKET` the
//! functions do nothing.
//!
//! No function waits if the service manager is stopped or slow and its socket is full: messages go into an [`Outbox`],
//! from which a thread sends them in order. Only [`barrier`] and [`hand_main_to`] wait, asynchronously.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::warn;

use crate::os::outbox::{self, Bounds, Full, Outbox};

/// The maximum that is queued while the service manager does not read. A process sends a few messages in its life, and
/// two for each reload that fails; periodic messages replace each other.
const BOUNDS: Bounds = Bounds { messages: 64, bytes: 64 << 10 };

static OUTBOX: Outbox<Message> = Outbox::new(BOUNDS);

/// The longest `STATUS=` in bytes. systemd ignores a message of more than 4096 bytes (`NOTIFY_BUFFER_MAX` in its sources),
/// also its other lines such as `READY=1`.
const STATUS_LIMIT: usize = 2048;

/// The minimum time between two updates of `STATUS=`.
pub const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait for the service manager to confirm that it has read the messages before a barrier.
pub const BARRIER_LIMIT: Duration = Duration::from_secs(5);

/// Whether there is a service manager that receives messages.
pub fn is_reachable() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty())
}

/// Whether systemd started this process itself, and not one of its ancestors. Listening sockets then come from systemd.
///
/// `NOTIFY_SOCKET` and `INVOCATION_ID` are set in both cases. `SYSTEMD_EXEC_PID` (since systemd 248) distinguishes
/// them: in a terminal or a CI runner that runs in a unit, it names another process.
pub fn started_this_process() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_parent_only =
        std::env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid.parse() != Ok(std::process::id()));
    is_reachable() || (is_set("INVOCATION_ID") && !is_parent_only)
}

/// Whether systemd started this process, but accepts no messages from it. A reload would then end the service: systemd does
/// not learn the new main process, or kills the successor because it cannot send `WATCHDOG=1`.
pub fn ignores_this_process() -> bool {
    started_this_process() && !is_reachable()
}

/// The error and its remedy if [`ignores_this_process`] is true.
pub const SET_NOTIFY_ACCESS: &str = "systemd accepts no messages from this process: set Type=notify and \
                                     NotifyAccess=exec in the unit, and restart the service";

/// Reports that the service is ready (`READY=1`), at a start or at the end of a reload.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
}

/// Sets the line in `systemctl status` (`STATUS=`).
pub fn status(status: &str) {
    repeat(MessageKind::Status, &[NotifyState::Status(&one_line(status))]);
}

/// Reports that a reload has begun (`RELOADING=1`).
pub fn reloading(status: &str) {
    let status = one_line(status);
    let mut messages = vec![NotifyState::Reloading, NotifyState::Status(&status)];
    messages.extend(NotifyState::monotonic_usec_now().ok());
    send(&messages);
}

/// Makes `pid` the main process of the unit (`MAINPID=`). It must be a child of the service manager: systemd kills a
/// main process that is not its child without a drain at the next stop. Returns when the service manager has read the
/// message, or after [`BARRIER_LIMIT`].
pub async fn hand_main_to(pid: u32) {
    if !is_reachable() {
        return;
    }
    send(&[NotifyState::MainPid(pid), NotifyState::Ready]);
    let known = tokio::time::timeout(BARRIER_LIMIT, barrier()).await.map_err(io::Error::from);
    if let Err(error) = known.flatten() {
        warn!(%error, "the service manager did not confirm MAINPID= in time (BARRIER=1)");
    }
}

/// Extends the start timeout to `more` time from now (`EXTEND_TIMEOUT_USEC=`), in case `TimeoutStartSec=` is shorter
/// than `--start-timeout`.
pub fn still_starting(more: Duration) {
    repeat(MessageKind::ExtendTimeout, &[NotifyState::ExtendTimeoutUsec(micros(more))]);
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// Reports that the service stops (`STOPPING=1`).
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
}

/// Extends the stop timeout to `more` time from now, in case `TimeoutStopSec=` is shorter than the drain.
pub fn still_stopping(status: &str, more: Duration) {
    repeat(
        MessageKind::ExtendTimeout,
        &[NotifyState::ExtendTimeoutUsec(micros(more)), NotifyState::Status(&one_line(status))],
    );
}

/// `status` as one line of at most [`STATUS_LIMIT`] bytes. A message has one assignment in each line, and the reason of a
/// reload that failed can have several lines, which systemd would take for further assignments.
fn one_line(status: &str) -> String {
    status[..status.floor_char_boundary(STATUS_LIMIT)].replace(char::is_control, " ")
}

/// Whether the unit has a file descriptor store; `None` if the service manager is too old to report it.
///
/// systemd sets `$FDSTORE` since version 254 if `FileDescriptorStoreMax=` is above 0. `MEMORY_PRESSURE_WATCH` is as
/// old: if it is set and `FDSTORE` is not, there is no store.
pub fn has_store() -> Option<bool> {
    if !is_reachable() {
        return Some(false);
    }
    match std::env::var("FDSTORE") {
        Ok(count) => Some(count != "0"),
        Err(_) => std::env::var_os("MEMORY_PRESSURE_WATCH").map(|_| false),
    }
}

/// How many descriptors the store of the unit can hold (`FileDescriptorStoreMax=`), if systemd has announced it.
pub fn store_size() -> Option<usize> {
    std::env::var("FDSTORE").ok()?.parse().ok()
}

/// Stores `fd` for the next process (`FDSTORE=1`). With `FDPOLL=0`, because systemd would otherwise remove a descriptor
/// that polls HUP, as one end of a socket pair does when the process with the other end has exited.
pub fn store(name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    let keep = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    push(MessageKind::Once, &keep, vec![fd.try_clone_to_owned()?]).map_err(io::Error::other)
}

/// Removes the descriptors that were stored under `name`.
pub fn unstore(name: &str) {
    send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Waits until the service manager has processed all earlier messages (`BARRIER=1`): it then closes its end of a pipe.
pub async fn barrier() -> io::Result<()> {
    let (sent, mut closed) = pipe::pipe()?;
    let barrier = [NotifyState::Custom("BARRIER=1")];
    push(MessageKind::Once, &barrier, vec![sent.into_blocking_fd()?]).map_err(io::Error::other)?;
    closed.read_u8().await.map(drop).or_else(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Ok(()),
        _ => Err(error),
    })
}

/// Whether this process has sent all its messages to the socket of the service manager. The service manager reads sent
/// messages even if this process has exited by then.
pub fn are_messages_sent() -> bool {
    OUTBOX.is_idle()
}

/// Whether standard error is connected to the journal, whose device and inode are in `$JOURNAL_STREAM`
/// (systemd.exec(5)).
pub fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// Sends the status line each second if it has changed, until `line` returns `None`.
pub async fn report(line: impl Fn() -> Option<String>) {
    let mut last = String::new();
    let mut clock = tokio::time::interval(STATUS_INTERVAL);
    while let Some(now) = line() {
        if now != last {
            status(&now);
            last = now;
        }
        clock.tick().await;
    }
}

/// The watchdog timeout of the unit (`WATCHDOG_USEC`), if it has one.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Sends `WATCHDOG=1` at half the watchdog timeout, from a task: if the runtime hangs, nothing is sent, and systemd
/// restarts the service. Ends when `is_watched` returns false.
///
/// Handlers that block all worker threads for the timeout cause a restart, too. This is intended, because such a
/// process cannot be distinguished from one that hangs. A separate thread would keep feeding the watchdog of a process
/// that answers no request.
pub async fn feed_watchdog(watchdog: Duration, is_watched: impl Fn() -> bool) {
    let mut clock = tokio::time::interval((watchdog / 2).max(Duration::from_millis(1)));
    while is_watched() {
        repeat(MessageKind::Watchdog, &[NotifyState::Watchdog]);
        clock.tick().await;
    }
}

/// A message in the queue.
struct Message {
    kind: MessageKind,
    text: String,
    fds: Vec<OwnedFd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MessageKind {
    /// A message that must be sent.
    Once,
    /// The following are periodic: a newer one replaces an older one in the queue.
    Status,
    ExtendTimeout,
    Watchdog,
}

impl outbox::Message for Message {
    fn size(&self) -> usize {
        size_of::<Self>() + self.text.capacity() + self.fds.capacity() * size_of::<OwnedFd>()
    }

    fn is_detail(&self) -> bool {
        false
    }
}

/// Sends `messages` after those that were sent before.
fn send(messages: &[NotifyState]) {
    // An error is ignored here, because the thread reports messages that did not fit.
    let _ = push(MessageKind::Once, messages, Vec::new());
}

/// Sends `messages` in place of those of this `kind` that are still in the queue.
fn repeat(kind: MessageKind, messages: &[NotifyState]) {
    let _ = push(kind, messages, Vec::new());
}

fn push(kind: MessageKind, messages: &[NotifyState], fds: Vec<OwnedFd>) -> Result<(), Full> {
    if !is_reachable() {
        return Ok(());
    }
    if let Err(error) = start_sender() {
        warn!(%error, "could not start the thread that sends messages to the service manager");
        return Err(Full);
    }
    let lines: Vec<_> = messages.iter().map(ToString::to_string).collect();
    let message = Message { kind, text: lines.join("\n"), fds };
    OUTBOX.push_instead(message, |waiting| kind != MessageKind::Once && waiting.kind == kind)
}

fn start_sender() -> io::Result<()> {
    let mut is_reported = false;
    let send = move |Message { text, fds, .. }: Message| {
        let text = [NotifyState::Custom(&text)];
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent =
            if fds.is_empty() { sd_notify::notify(&text) } else { sd_notify::notify_with_fds(&text, &fds) };
        sent.inspect_err(|error| {
            if !std::mem::replace(&mut is_reported, true) {
                let path = std::env::var_os("NOTIFY_SOCKET").unwrap_or_default();
                let path = path.display();
                warn!(
                    %error,
                    "could not send a message to the service manager (NOTIFY_SOCKET={path}); further failures are not logged"
                );
            }
        })
    };
    OUTBOX.start("notify", send, |dropped| {
        warn!(
            dropped,
            "{dropped} messages to the service manager were dropped, because it did not read them in time"
        );
    })
}

/// Waits until all messages are sent, but no longer than `limit`.
pub fn flush(limit: Duration) {
    OUTBOX.flush(limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_one_line_within_the_limit() {
        assert_eq!(one_line("serving on http([::]:8080)"), "serving on http([::]:8080)");
        assert_eq!(one_line("last reload failed: a\nSTOPPING=1\r\nb"), "last reload failed: a STOPPING=1  b");
        assert_eq!(one_line(&"x".repeat(2 * STATUS_LIMIT)).len(), STATUS_LIMIT);
        assert_eq!(one_line(&format!("x{}", "\u{e4}".repeat(STATUS_LIMIT))).len(), STATUS_LIMIT - 1);
    }
}
