//! All that is said to the service manager: `sd_notify(3)`. Without `NOTIFY_SOCKET` each of these does
//! nothing.
//!
//! None of these waits for a service manager that is stopped or slow, whose socket is full then: messages go into a
//! queue, from which a thread sends them in order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::warn;

use crate::os::outbox::{self, Bounds, Full, Outbox};

/// What may wait for a service manager that does not read: a process has a handful of messages to send in its life, and
/// two for each reload that fails. Those that repeat replace each other.
const BOUNDS: Bounds = Bounds { messages: 64, bytes: 64 << 10 };

static OUTBOX: Outbox<Message> = Outbox::new(BOUNDS);

/// How often STATUS= may change.
pub const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// For the service manager to say that it has read what was sent.
pub const BARRIER_LIMIT: Duration = Duration::from_secs(5);

/// Whether anybody listens to what is said.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty())
}

/// Whether systemd started this very process, so that listening sockets have to come from it.
///
/// `NOTIFY_SOCKET` and `INVOCATION_ID` say that systemd started it or a parent of it. `SYSTEMD_EXEC_PID` (from systemd
/// 248 on) tells these apart: in a terminal or a CI runner that is itself a unit, it names another process.
pub fn started_this_process() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_parent_only =
        std::env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid.parse() != Ok(std::process::id()));
    is_there() || (is_set("INVOCATION_ID") && !is_parent_only)
}

/// The service can serve.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The line in `systemctl status`.
pub fn status(status: &str) {
    repeat(Kind::Status, &[NotifyState::Status(status)]);
}

/// A successor is being started.
pub fn reloading(status: &str) {
    let mut messages = vec![NotifyState::Reloading, NotifyState::Status(status)];
    messages.extend(NotifyState::monotonic_usec_now().ok());
    send(&messages);
}

/// `pid`, which must be a child of the service manager, is the main process from now on. Returns when the
/// service manager knows.
pub async fn hand_main_to(pid: u32) {
    if !is_there() {
        return;
    }
    send(&[NotifyState::MainPid(pid), NotifyState::Ready]);
    let known = tokio::time::timeout(BARRIER_LIMIT, barrier()).await.map_err(io::Error::from);
    if let Err(error) = known.flatten() {
        warn!(%error, "the service manager did not confirm MAINPID= in time (BARRIER=1)");
    }
}

/// Still starting: asks for `more` time from now, in case `TimeoutStartSec=` is shorter than `--start-timeout`.
pub fn still_starting(more: Duration) {
    repeat(Kind::MoreTime, &[NotifyState::ExtendTimeoutUsec(micros(more))]);
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// The service goes down.
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Still going down: asks for `more` time from now, in case `TimeoutStopSec=` is shorter than the drain.
pub fn still_stopping(status: &str, more: Duration) {
    repeat(Kind::MoreTime, &[NotifyState::ExtendTimeoutUsec(micros(more)), NotifyState::Status(status)]);
}

/// Whether fds are kept for this unit; None where the service manager is too old to say.
///
/// From systemd 254 on it does: `$FDSTORE` is there where `FileDescriptorStoreMax=` is above 0. A manager
/// that says nothing of it, but sets another variable of that age, keeps none.
pub fn has_store() -> Option<bool> {
    if !is_there() {
        return Some(false);
    }
    match std::env::var("FDSTORE") {
        Ok(count) => Some(count != "0"),
        Err(_) => std::env::var_os("MEMORY_PRESSURE_WATCH").map(|_| false),
    }
}

/// Asks for `fd` to be kept for the next process (`FileDescriptorStoreMax=`), whatever it polls.
pub fn store(name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    let keep = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    push(Kind::Once, &keep, vec![fd.try_clone_to_owned()?]).map_err(io::Error::other)
}

/// Takes what was stored under `name` out of the store.
pub fn unstore(name: &str) {
    send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Waits until the service manager has dealt with all that was said before: it then closes its end of
/// a pipe.
pub async fn barrier() -> io::Result<()> {
    let (sent, mut closed) = pipe::pipe()?;
    let barrier = [NotifyState::Custom("BARRIER=1")];
    push(Kind::Once, &barrier, vec![sent.into_blocking_fd()?]).map_err(io::Error::other)?;
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

/// Says each second what the service is doing, where that has changed, until there is no more `line`.
pub async fn report(line: impl Fn() -> Option<String>) {
    let mut said = String::new();
    let mut clock = tokio::time::interval(STATUS_INTERVAL);
    while let Some(now) = line() {
        if now != said {
            status(&now);
            said = now;
        }
        clock.tick().await;
    }
}

/// How long the service manager waits for a sign of process (`WATCHDOG_USEC`).
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Feeds the watchdog at half its time, from a task: if the runtime no longer turns, nothing is sent, and
/// systemd restarts the service. Ends when this process `is_watched` no more.
///
/// Handlers that block all worker threads for the watchdog's time have the process killed too. This is on purpose: a
/// process that answers no request for so long cannot be told from one that hangs. A thread of its own would feed the
/// watchdog of a process that serves nothing.
pub async fn feed_watchdog(watchdog: Duration, is_watched: impl Fn() -> bool) {
    let mut clock = tokio::time::interval((watchdog / 2).max(Duration::from_millis(1)));
    while is_watched() {
        repeat(Kind::Watchdog, &[NotifyState::Watchdog]);
        clock.tick().await;
    }
}

/// What waits to be sent.
struct Message {
    kind: Kind,
    text: String,
    fds: Vec<OwnedFd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Must be sent.
    Once,
    /// These repeat: a newer one replaces an older one that still waits.
    Status,
    MoreTime,
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
    // A message that does not fit is counted, and reported by the thread.
    let _ = push(Kind::Once, messages, Vec::new());
}

/// Sends `messages` in place of those of this `kind` that still wait.
fn repeat(kind: Kind, messages: &[NotifyState]) {
    let _ = push(kind, messages, Vec::new());
}

fn push(kind: Kind, messages: &[NotifyState], fds: Vec<OwnedFd>) -> Result<(), Full> {
    if !is_there() {
        return Ok(());
    }
    if let Err(error) = start_sender() {
        warn!(%error, "could not start the thread that sends messages to the service manager");
        return Err(Full);
    }
    let lines: Vec<_> = messages.iter().map(ToString::to_string).collect();
    let message = Message { kind, text: lines.join("\n"), fds };
    OUTBOX.push_instead(message, |waiting| kind != Kind::Once && waiting.kind == kind)
}

fn start_sender() -> io::Result<()> {
    let send = |Message { text, fds, .. }: Message| {
        let text = [NotifyState::Custom(&text)];
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent =
            if fds.is_empty() { sd_notify::notify(&text) } else { sd_notify::notify_with_fds(&text, &fds) };
        sent.inspect_err(
            |error| warn!(%error, "could not send a message to the service manager (NOTIFY_SOCKET)"),
        )
    };
    OUTBOX.start("notify", send, |dropped| {
        warn!(
            dropped,
            "{dropped} messages to the service manager were dropped, because it did not read them in time"
        );
    })
}

/// Waits until all that was said is sent, but no longer than `limit`.
pub fn flush(limit: Duration) {
    OUTBOX.flush(limit);
}
