//! [`Threadless`]: the real binary as a process to which a test refuses new threads, as `TasksMax=` does.
//!
//! A memory limit would not need another user. But after a thread has ended, libc gives its stack to the next one, which
//! needs no new memory then, so the limit does not stop it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, geteuid, getrlimit};

use crate::TEST_TIMEOUT;
use crate::process::Process;

/// The user of the process if the test runs as root. The kernel refuses no thread to root, whatever `RLIMIT_NPROC` is.
const USER: u32 = 64_321;

pub struct Threadless {
    process: Process,
    /// The lines of its standard error.
    log: Receiver<String>,
}

impl Threadless {
    /// Starts a process, which may begin threads at first. If the test runs as root, the process has another user, so all files
    /// that it reads have to be readable for all.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let mut process = Process::spawn(with_user(command))?;
        let stderr = BufReader::new(process.child().stderr.take().context("standard error is not piped")?);
        let (lines, log) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        Ok(Self { process, log })
    }

    /// Makes the kernel refuse new threads to the process, or permit them again.
    pub fn permit_threads(&self, permitted: bool) -> Result<()> {
        // The process has inherited the limit of the test.
        let soft = match getrlimit(Resource::Nproc).current {
            _ if !permitted => "0".to_owned(),
            Some(limit) => limit.to_string(),
            None => "unlimited".to_owned(),
        };
        let pid = self.process.pid().as_raw_nonzero().to_string();
        // By a command with the same user, because prlimit(2) needs CAP_SYS_RESOURCE otherwise, which containers lack.
        let mut prlimit = Command::new("prlimit");
        with_user(&mut prlimit).args(["--pid", &pid, &format!("--nproc={soft}:")]);
        let set = prlimit.output().context("could not run prlimit")?;
        ensure!(set.status.success(), "prlimit: {}", String::from_utf8_lossy(&set.stderr));
        Ok(())
    }

    /// Waits until the process logs a line with this text.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + TEST_TIMEOUT;
        let mut before = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .log
                .recv_timeout(left)
                .with_context(|| format!("no {text:?} in the log, only {before:?}"))?;
            if line.contains(text) {
                return Ok(());
            }
            before.push(line);
        }
    }
}

fn with_user(command: &mut Command) -> &mut Command {
    if geteuid().is_root() {
        command.uid(USER).gid(USER);
    }
    command
}
