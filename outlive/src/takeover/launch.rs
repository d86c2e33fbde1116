//! Starts a successor, and reports the result.
//!
//! [`Program::launch`] starts an intermediate process ([`run_intermediate`]), which starts the successor and exits, so
//! that the successor becomes a child of systemd. The successor reports the result through a pipe, the [`ResultPipe`],
//! and [`Launched::outcome`] waits for it. The takeover command (`socket.rs`) and, on SIGHUP, the predecessor
//! (`outgoing.rs`) use this.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use memchr::memmem;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::process_handle::ProcessHandle;
use super::{
    ADOPTS_HTTP2_AND_TLS, ADOPTS_TABLES_AND_CERTIFICATES, ADOPTS_TLS12, ADOPTS_UPGRADES, NO_THREAD,
    OUTCOME_LIMIT,
};
use crate::os::task;
use crate::registry::Protocols;

/// The environment variable that gives a process its [`Role`].
const ROLE: &str = "TAKEOVER_ROLE";
/// The values of [`ROLE`]. They must not change, because on SIGHUP a process of an earlier release starts this binary
/// with them.
const INTERMEDIATE: &str = "middle";
const SUCCESSOR: &str = "successor";
/// The line that a successor writes to its result pipe when it is the main process.
const OK: &str = "ok";

/// [`Program::launch_on_thread`] waits this much longer than the time limit of [`Program::launch`].
const EXEC_LAG: Duration = Duration::from_secs(1);

/// How much of a binary is read and searched at once, in bytes.
const READ_LENGTH: usize = 1024 * 1024;

/// The role of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Started by a person or a service manager.
    First,
    /// Starts the successor, and exits.
    Intermediate,
    /// Takes over from a running process.
    Successor,
}

/// The role of this process: the one that its environment names if its standard input is a handover channel, otherwise
/// `First`.
///
/// The variable alone is not enough. A successor keeps it, so the commands that its handlers run inherit it. If a handler ran
/// the service's own binary, that command would wait for a predecessor on its standard input. The commands do not inherit the
/// channel, because [`take_standard_input`] replaces it with `/dev/null`.
pub fn role() -> Role {
    let has_channel = sockopt::socket_type(io::stdin()) == Ok(SocketType::SEQPACKET);
    match std::env::var(ROLE).as_deref() {
        Ok(INTERMEDIATE) if has_channel => Role::Intermediate,
        Ok(SUCCESSOR) if has_channel => Role::Successor,
        _ => Role::First,
    }
}

/// How this service is started: the path of its binary and its flags. A path and not the open binary, so that a
/// successor is the release that is installed there when it starts.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    flags: Vec<OsString>,
    is_takeover: bool,
}

impl Program {
    /// The program of this process, without the subcommand `takeover`, whose index among the arguments
    /// `position_of_takeover` returns. Must be called early, because `/proc/self/exe` no longer names the path of a
    /// binary that has been replaced. Fails if the path cannot be determined.
    pub fn current(position_of_takeover: impl Fn(&[OsString]) -> Option<usize>) -> io::Result<Self> {
        let mut flags: Vec<OsString> = std::env::args_os().collect();
        let command = position_of_takeover(&flags);
        if let Some(command) = command {
            flags.remove(command);
        }
        flags.drain(..flags.len().min(1));
        // Prefer the path in argv[0], because it may be a symbolic link that points to the newest release, which
        // `/proc/self/exe` would resolve to the present one.
        let called = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
        let is_path = called.components().count() > 1;
        let path = if is_path { std::path::absolute(called)? } else { std::env::current_exe()? };
        Ok(Self { path, flags, is_takeover: command.is_some() })
    }

    /// Whether this process is the takeover command.
    pub fn is_takeover(&self) -> bool {
        self.is_takeover
    }

    /// Which connections the next process can adopt. At a restart that process does not run yet and cannot be asked, so
    /// its binary is searched for [`ADOPTS_HTTP2_AND_TLS`], [`ADOPTS_UPGRADES`], [`ADOPTS_TABLES_AND_CERTIFICATES`] and
    /// [`ADOPTS_TLS12`]. A file that is not an ELF binary, or cannot be read, counts as a release that adopts all of them.
    pub async fn adopts(&self) -> Protocols {
        let path = self.path.clone();
        let found = match task::on_thread(move || adopts(&path)) {
            Ok(found) => found.await.unwrap_or(Ok(Protocols::ALL)),
            // No thread could be started, so this thread reads the file. The drain cannot begin until the file is read.
            Err(_) => adopts(&self.path),
        };
        found.unwrap_or(Protocols::ALL)
    }

    fn command(&self, role: &str) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.flags).env(ROLE, role);
        command
    }

    /// Runs [`Program::launch`] on a thread of its own. If exec(2) hangs, for example because the binary is on a network
    /// file system whose server is down, the call fails soon after `limit`. The thread waits until exec(2) returns, and
    /// then kills the intermediate process. While such a thread exists, further calls fail at once, so there is at most
    /// one.
    pub async fn launch_on_thread(self, channel: OwnedFd, limit: Duration) -> Result<Launched> {
        static LAUNCH: Semaphore = Semaphore::const_new(1);
        let path = self.path.display().to_string();
        let hangs = |_| {
            anyhow!(
                "could not start {path}, because the start for an earlier reload still hangs: check the file system of \
                 that path, or restart the service"
            )
        };
        let launch = LAUNCH.try_acquire().map_err(hangs)?;
        let launched = task::on_thread(move || {
            let _launch = launch;
            self.launch(channel, limit)
        });
        let launched = timeout(limit + EXEC_LAG, launched.context(NO_THREAD)?).await;
        let late = |_| {
            let limit = humantime::format_duration(limit);
            anyhow!(
                "could not start {path} within {limit} (--takeover-timeout): exec(2) or the new process hangs; check the \
                 file system of that path"
            )
        };
        launched.map_err(late)??
    }

    /// Starts a successor with `channel` as its standard input. When this returns, the intermediate process has exited,
    /// so the successor is a child of systemd. Fails if that takes longer than `limit`, or if the binary is not a
    /// release of this service.
    pub fn launch(&self, channel: OwnedFd, limit: Duration) -> Result<Launched> {
        let deadline = Instant::now() + limit;
        let (outcome, to_outcome) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut intermediate = self.command(INTERMEDIATE);
        intermediate.stdin(channel).stdout(to_outcome);
        let path = self.path.display();
        let mut child = intermediate.spawn().with_context(|| format!("could not start {path}"))?;
        // Drops the writing end of the pipe in this process; otherwise reading the pipe would never end.
        drop(intermediate);
        let exited = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let is_late = !is_readable(&exited, deadline)?;
        if is_late {
            child.kill()?;
        }
        let status = child.wait()?;
        ensure!(
            status.success() || !is_late,
            "could not start a successor: {path}: not ready within {} (--takeover-timeout), so it was killed",
            humantime::format_duration(limit)
        );
        ensure!(status.success(), "could not start a successor: {path}: {status}");
        let mut launched = Launched { outcome: outcome.into(), successor: None, early: None };
        let line = launched.read_line(deadline)?;
        let mut pid = pid_in(&line);
        // A successor that fails at once may report that before the intermediate process has written its pid. Both lines
        // are in the pipe now.
        if pid.is_none() && is_readable(&launched.outcome, Instant::now())? {
            pid = pid_in(&launched.read_line(deadline)?);
            launched.early = Some(line.clone());
        }
        let pid = pid.with_context(|| {
            format!("{path} is not a release of this service: expected \"pid NUMBER\" from it, got {line:?}")
        })?;
        // An error means that the successor has exited already. Its reason is still in the pipe, for `outcome`.
        launched.successor = ProcessHandle::open(pid).ok();
        Ok(launched)
    }
}

/// The pid in the line that the intermediate process writes.
fn pid_in(line: &str) -> Option<u32> {
    line.strip_prefix("pid ")?.parse().ok()
}

/// Which connections the release in a binary can adopt: all if it is the binary of this process. All too for a file that
/// is not an ELF binary, because a script that starts the service does not contain the texts.
fn adopts(path: &Path) -> io::Result<Protocols> {
    let mut file = File::open(path)?;
    let (theirs, ours) = (file.metadata()?, std::fs::metadata("/proc/self/exe")?);
    if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        return Ok(Protocols::ALL);
    }
    let texts = [ADOPTS_HTTP2_AND_TLS, ADOPTS_UPGRADES, ADOPTS_TABLES_AND_CERTIFICATES, ADOPTS_TLS12];
    let longest = texts.iter().map(|text| text.len()).max().unwrap_or_default();
    let mut wanted = texts.map(|text| (memmem::Finder::new(text), false));
    let mut buffer = Vec::with_capacity(READ_LENGTH + longest);
    let mut is_elf = None;
    while Read::by_ref(&mut file).take(READ_LENGTH as u64).read_to_end(&mut buffer)? > 0 {
        let is_elf = *is_elf.get_or_insert_with(|| buffer.starts_with(b"\x7fELF"));
        for (text, is_found) in &mut wanted {
            *is_found = *is_found || text.find(&buffer).is_some();
        }
        if !is_elf || wanted.iter().all(|(_, is_found)| *is_found) {
            return Ok(Protocols::ALL);
        }
        // The end is kept, because a text may begin in this part of the file and end in the next one.
        buffer.drain(..buffer.len().saturating_sub(longest));
    }
    Ok(match wanted.map(|(_, is_found)| is_found) {
        [false, ..] => Protocols::PlainHttp1,
        [true, false, ..] => Protocols::Http2AndTls,
        [true, true, false, _] => Protocols::Upgrades,
        [true, true, true, _] => Protocols::CertificatesAndTables,
    })
}

/// Waits until `fd` is readable. Returns false if it is not at the deadline.
pub(super) fn is_readable(fd: impl AsFd, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().try_into()?, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            polled => return Ok(polled? > 0),
        }
    }
}

/// Runs the intermediate process: starts the successor with the same standard input and output, and writes its pid to
/// the result pipe.
pub fn run_intermediate(program: &Program) -> Result<()> {
    let successor = program.command(SUCCESSOR).spawn().context("could not start the successor")?;
    writeln!(io::stdout(), "pid {}", successor.id())?;
    Ok(())
}

pub struct Launched {
    outcome: File,
    successor: Option<ProcessHandle>,
    /// The line that the successor wrote before its pid was known.
    early: Option<String>,
}

impl Launched {
    /// Waits until the successor is the main process. Fails with the reason that the successor reports, or if it
    /// reports nothing within `limit` and the time that the predecessor has to decide. The successor has then exited or
    /// been killed.
    pub fn outcome(mut self, limit: Duration) -> Result<()> {
        let line = match self.early.take() {
            Some(line) => Ok(line),
            None => self.read_line(Instant::now() + limit + OUTCOME_LIMIT),
        };
        let outcome = match line {
            Ok(line) if line == OK => return Ok(()),
            Ok(line) if line.is_empty() => Err(anyhow!("the successor exited unexpectedly")),
            Ok(line) => Err(anyhow!(line)),
            Err(error) => Err(error.context("the successor did not become ready")),
        };
        if let Some(successor) = self.successor {
            successor.kill()?;
        }
        outcome
    }

    /// Reads one line from the pipe. Empty if the successor has closed it.
    fn read_line(&mut self, deadline: Instant) -> Result<String> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            ensure!(is_readable(&self.outcome, deadline)?, "no message within --takeover-timeout");
            if self.outcome.read(&mut byte)? == 0 || byte[0] == b'\n' {
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            line.push(byte[0]);
        }
    }
}

/// The pipe through which a successor reports the result of its start: its standard output. Both methods write one line
/// and close it.
pub struct ResultPipe(File);

impl ResultPipe {
    /// Takes the pipe from standard output, and puts standard error in its place, so that nothing else in the process
    /// writes to the pipe. With `Commit` the process receives the standard output of its predecessor.
    pub(super) fn claim_stdout() -> io::Result<Self> {
        let outcome = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)?;
        rustix::stdio::dup2_stdout(io::stderr())?;
        Ok(Self(outcome.into()))
    }

    /// Reports that this process is the main process of the service.
    pub fn ok(mut self) {
        // An error means that the process that waited has exited. The takeover has succeeded all the same.
        let _ = self.write(OK);
    }

    /// Reports why this process does not take over.
    pub(super) fn failed(mut self, reason: &str) {
        let _ = self.write(&reason.replace('\n', " "));
    }

    /// In one write, because the intermediate process may write its own line at the same time (pipe(7), `PIPE_BUF`).
    fn write(&mut self, line: &str) -> io::Result<()> {
        self.0.write_all(format!("{line}\n").as_bytes())
    }
}

/// Takes the channel to the predecessor from standard input, and puts `/dev/null` in its place, so that nothing else in
/// the process reads from the channel.
pub(super) fn take_standard_input() -> io::Result<OwnedFd> {
    let channel = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let null = File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(channel)
}
