//! Starts a successor that is nobody's child, and hears what becomes of it.

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
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::process_handle::ProcessHandle;
use super::{ADOPTS_HTTP2_AND_TLS, OUTCOME_LIMIT};
use crate::handover::Protocols;

/// Tells a process that we start what it is to be.
const ROLE: &str = "TAKEOVER_ROLE";
/// Its values: on SIGHUP, the release before this one says them to this one.
const INTERMEDIATE: &str = "middle";
const SUCCESSOR: &str = "successor";
/// What the successor says when it is the main process.
const OK: &str = "ok";

/// How much of a binary is looked at at once, in bytes.
const READ_LENGTH: usize = 1024 * 1024;

/// What this process is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Started by a person or a service manager.
    First,
    /// Starts the successor, and ends.
    Intermediate,
    Successor,
}

pub fn role() -> Role {
    match std::env::var(ROLE).as_deref() {
        Ok(INTERMEDIATE) => Role::Intermediate,
        Ok(SUCCESSOR) => Role::Successor,
        _ => Role::First,
    }
}

/// How this service is started: its path, so that a new binary there is used, and its flags.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    flags: Vec<OsString>,
    is_takeover: bool,
}

impl Program {
    /// This process's, without its subcommand. To be asked for early: the path of a binary that has been
    /// replaced is not to be had any more.
    ///
    /// `position_of_takeover`: where among all arguments that subcommand stands.
    pub fn current(position_of_takeover: impl Fn(&[OsString]) -> Option<usize>) -> io::Result<Self> {
        let mut flags: Vec<OsString> = std::env::args_os().collect();
        let command = position_of_takeover(&flags);
        if let Some(command) = command {
            flags.remove(command);
        }
        flags.drain(..flags.len().min(1));
        // The path that we were called by, where there is one: it may be a link to the release of the day.
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
    /// its binary is searched for [`ADOPTS_HTTP2_AND_TLS`]. A file that is no binary, or cannot be read, is taken for a
    /// release that adopts all.
    pub async fn adopts(&self) -> Protocols {
        let path = self.path.clone();
        let advertises = tokio::task::spawn_blocking(move || advertises(&path).unwrap_or(true)).await;
        if advertises.unwrap_or(true) { Protocols::All } else { Protocols::PlainHttp1 }
    }

    fn command(&self, role: &str) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.flags).env(ROLE, role);
        command
    }

    /// Starts a successor with `channel` as its standard input, within `limit`. When this returns, its
    /// parent has ended.
    pub fn launch(&self, channel: OwnedFd, limit: Duration) -> Result<Launched> {
        let deadline = Instant::now() + limit;
        let (outcome, to_outcome) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut intermediate = self.command(INTERMEDIATE);
        intermediate.stdin(channel).stdout(to_outcome);
        let path = self.path.display();
        let mut child = intermediate.spawn().with_context(|| format!("could not start {path}"))?;
        // Its copy of the pipe's writing end; else the pipe would never end.
        drop(intermediate);
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        if !is_readable(&ended, deadline)? {
            child.kill()?;
        }
        let status = child.wait()?;
        ensure!(status.success(), "could not start a successor: {path}: {status}");
        let mut launched = Launched { outcome: outcome.into(), successor: None };
        let said = launched.read_line(deadline)?;
        let pid = said.strip_prefix("pid ").and_then(|pid| pid.parse().ok());
        let pid = pid.with_context(|| {
            format!("{path} is not a release of this service: expected \"pid NUMBER\" from it, got {said:?}")
        })?;
        // None: it has ended, and what it said of that is still to be read.
        launched.successor = ProcessHandle::open(pid).ok();
        Ok(launched)
    }
}

/// Whether a binary is our own, or has the word; none of the two is known of a script.
fn advertises(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let (theirs, ours) = (file.metadata()?, std::fs::metadata("/proc/self/exe")?);
    if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        return Ok(true);
    }
    let word = memmem::Finder::new(ADOPTS_HTTP2_AND_TLS);
    let mut buffer = Vec::with_capacity(READ_LENGTH + ADOPTS_HTTP2_AND_TLS.len());
    let mut is_elf = None;
    while Read::by_ref(&mut file).take(READ_LENGTH as u64).read_to_end(&mut buffer)? > 0 {
        let is_elf = *is_elf.get_or_insert_with(|| buffer.starts_with(b"\x7fELF"));
        if !is_elf || word.find(&buffer).is_some() {
            return Ok(true);
        }
        // It may be cut in two.
        buffer.drain(..buffer.len().saturating_sub(ADOPTS_HTTP2_AND_TLS.len()));
    }
    Ok(false)
}

/// Waits for `fd`; false at the deadline.
pub(super) fn is_readable(fd: impl AsFd, deadline: Instant) -> Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs().try_into()?, tv_nsec: left.subsec_nanos().into() };
    Ok(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left))? > 0)
}

/// The intermediate process's whole life: starts the successor with the same standard input and output.
pub fn run_intermediate(program: &Program) -> Result<()> {
    let successor = program.command(SUCCESSOR).spawn().context("could not start the successor")?;
    writeln!(io::stdout(), "pid {}", successor.id())?;
    Ok(())
}

/// A successor under way.
pub struct Launched {
    outcome: File,
    successor: Option<ProcessHandle>,
}

impl Launched {
    /// Waits until the successor is the main process. One that is not, though it had `limit` to be ready and its
    /// predecessor the time to decide, or fails, is no more when this returns.
    pub fn outcome(mut self, limit: Duration) -> Result<()> {
        let outcome = match self.read_line(Instant::now() + limit + OUTCOME_LIMIT) {
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

    /// Empty at the end.
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

/// Where a successor says what becomes of it: its standard output.
pub struct ResultPipe(File);

impl ResultPipe {
    pub(super) fn claim_stdout() -> io::Result<Self> {
        let outcome = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)?;
        let null = File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&null)?;
        Ok(Self(outcome.into()))
    }

    pub fn ok(mut self) {
        // Whoever waited may be gone; that changes nothing any more.
        let _ = writeln!(self.0, "{OK}");
    }

    pub(super) fn failed(mut self, reason: &str) {
        let _ = writeln!(self.0, "{}", reason.replace('\n', " "));
    }
}

/// A successor's channel: its standard input.
pub(super) fn take_standard_input() -> io::Result<OwnedFd> {
    let channel = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let null = File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(channel)
}
