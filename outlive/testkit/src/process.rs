//! [`Process`], a child process that is killed together with its descendants when it is dropped, and [`Notifications`],
//! a service manager's end of `sd_notify(3)`.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, pidfd_open, waitid,
};
use tempfile::TempDir;

use crate::TEST_TIMEOUT;

/// Copies a program that is to be started soon, by cp(1). If this process wrote the file, a child that another test starts
/// meanwhile could have its descriptor for a moment, and the start would fail, because the file is open for writing
/// (ETXTBSY in execve(2)).
pub fn copy_program(from: &Path, to: &Path) -> Result<()> {
    let copied =
        Command::new("cp").arg("--preserve=mode").args([from, to]).output().context("could not run cp")?;
    ensure!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    Ok(())
}

/// A child process in a process group of its own. Dropping it kills the group, so that a failed test leaves no process.
pub struct Process {
    child: Child,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child =
            command.process_group(0).spawn().with_context(|| format!("could not start {command:?}"))?;
        Ok(Self { child })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the process has not been waited for");
    }

    /// Waits until the process exits by itself; fails after [`TEST_TIMEOUT`].
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if !self.ends_within(TEST_TIMEOUT)? {
            bail!("process {} did not end within {TEST_TIMEOUT:?}", self.child.id());
        }
        Ok(self.child.wait()?)
    }

    /// Whether the process exits within `time`.
    pub fn ends_within(&mut self, time: Duration) -> Result<bool> {
        if self.child.try_wait()?.is_some() {
            return Ok(true);
        }
        let fd = pidfd_open(self.pid(), PidfdFlags::empty())?;
        let time = Timespec { tv_sec: time.as_secs().try_into()?, tv_nsec: time.subsec_nanos().into() };
        Ok(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time))? > 0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Until the child is waited for, its pid cannot belong to another process. `waitid` fails if `wait` has already
        // reaped it; the signal could then reach an unrelated process group.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if waitid(WaitId::Pid(self.pid()), look).is_ok() {
            let _ = kill_process_group(self.pid(), Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Sends SIGTERM to a process that is not a child of the test, such as a successor; `pid` is decimal.
pub fn terminate(pid: &str) -> Result<()> {
    signal(pid, Signal::TERM)
}

/// Sends a signal to a process that is not a child of the test; `pid` is decimal.
pub fn signal(pid: &str, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.parse()?).context("not a pid")?;
    Ok(kill_process(pid, signal)?)
}

/// A socket for `NOTIFY_SOCKET`, the messages received on it, and the file descriptors stored with FDSTORE=1.
///
/// A thread reads each message at once, as a service manager does. Otherwise a service that sends BARRIER=1
/// (`sd_notify_barrier(3)`) would wait until the test reads it.
pub struct Notifications {
    folder: TempDir,
    /// Whether it has a file descriptor store.
    stores: bool,
    messages: Receiver<Message>,
    lines: Vec<String>,
    stored: Vec<OwnedFd>,
}

struct Message {
    text: String,
    fds: Vec<OwnedFd>,
}

/// A message with which the owner ends the reading thread.
const LAST: &[u8] = b"that is all";

impl Notifications {
    /// A service manager without a file descriptor store.
    pub fn new() -> Result<Self> {
        Self::listen(false)
    }

    /// A service manager with a file descriptor store.
    pub fn with_store() -> Result<Self> {
        Self::listen(true)
    }

    fn listen(stores: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = UnixDatagram::bind(folder.path().join("notify"))?;
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            while let Some(mut message) = receive(&socket) {
                if !stores || !message.text.contains("FDSTORE=1") {
                    message.fds.clear();
                }
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        Ok(Self { folder, stores, messages, lines: Vec::new(), stored: Vec::new() })
    }

    /// Sets the environment of a process that this service manager starts.
    pub fn announce(&self, command: &mut Command) {
        command.env("NOTIFY_SOCKET", self.path());
        if self.stores {
            command.env("FDSTORE", "8");
        }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("notify")
    }

    /// The lines received so far, in order, up to the last one that was waited for.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Takes the file descriptors stored so far.
    pub fn take_stored(&mut self) -> Vec<OwnedFd> {
        while let Ok(message) = self.messages.try_recv() {
            self.note(message);
        }
        std::mem::take(&mut self.stored)
    }

    /// Waits for a line that begins with `wanted`, and returns it; fails after [`TEST_TIMEOUT`].
    pub fn wait_for(&mut self, wanted: &str) -> Result<String> {
        self.wait_for_at_most(wanted, TEST_TIMEOUT)
    }

    /// As `wait_for`; fails after `limit`.
    pub fn wait_for_at_most(&mut self, wanted: &str, limit: Duration) -> Result<String> {
        self.wait_for_line(wanted, limit, |line| line.starts_with(wanted))
    }

    /// Waits for READY=1. Returns false if `is_running` returns false before; fails after [`TEST_TIMEOUT`].
    pub fn wait_for_ready(&mut self, mut is_running: impl FnMut() -> Result<bool>) -> Result<bool> {
        const INTERVAL: Duration = Duration::from_millis(50);
        let deadline = Instant::now() + TEST_TIMEOUT;
        loop {
            let was_running = is_running()?;
            match self.messages.recv_timeout(INTERVAL) {
                Ok(message) => self.note(message),
                // A process that has exited sends no further message.
                Err(_) if !was_running => return Ok(false),
                Err(_) if Instant::now() >= deadline => {
                    bail!("no READY=1 arrived within {TEST_TIMEOUT:?}, only {:?}", self.lines)
                }
                Err(_) => {}
            }
            if self.lines.iter().any(|line| line == "READY=1") {
                return Ok(true);
            }
        }
    }

    /// Waits for a STATUS= line that contains `wanted`, and returns it. The limit covers the whole wait, because a
    /// service that sends a status each second would otherwise extend it without end.
    pub fn wait_for_status(&mut self, wanted: &str) -> Result<String> {
        self.wait_for_line(wanted, TEST_TIMEOUT, |line| line.starts_with("STATUS=") && line.contains(wanted))
    }

    fn wait_for_line(
        &mut self,
        wanted: &str,
        limit: Duration,
        is_it: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self
                .messages
                .recv_timeout(left)
                .with_context(|| format!("no {wanted} arrived, only {:?}", self.lines))?;
            let known = self.lines.len();
            self.note(message);
            if let Some(line) = self.lines[known..].iter().find(|line| is_it(line)) {
                return Ok(line.clone());
            }
        }
    }

    fn note(&mut self, message: Message) {
        self.lines.extend(message.text.lines().map(str::to_owned));
        self.stored.extend(message.fds);
    }
}

impl Drop for Notifications {
    fn drop(&mut self) {
        if let Ok(socket) = UnixDatagram::unbound() {
            let _ = socket.send_to(LAST, self.path());
        }
    }
}

fn receive(socket: &UnixDatagram) -> Option<Message> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags).ok()?;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    let bytes = &bytes[..received.bytes];
    (bytes != LAST).then(|| Message { text: String::from_utf8_lossy(bytes).into_owned(), fds })
}

/// `make` as a person would run it: without the variables that cargo sets for this test. With those, cargo would see
/// another environment and build everything again.
pub fn make(folder: impl AsRef<Path>, goals: &[&str]) -> Command {
    let mut make = Command::new("make");
    make.arg("--silent").args(goals).current_dir(folder);
    without_cargo(&mut make);
    make
}

/// Removes the variables of cargo and make from the environment of a command.
pub fn without_cargo(command: &mut Command) {
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_") && name != "CARGO_HOME") {
        command.env_remove(name);
    }
    command.env_remove("MAKEFLAGS");
}
