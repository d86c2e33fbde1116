//! A child process that is ended with its owner, and notifications as `sd_notify(3)` sends them.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use crate::PATIENCE;

pub struct Process {
    child: Child,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("could not start {command:?}"))?;
        Ok(Self { child })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the process is there");
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if !self.ends_within(PATIENCE)? {
            bail!("process {} did not end within {PATIENCE:?}", self.child.id());
        }
        Ok(self.child.wait()?)
    }

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
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A socket for `NOTIFY_SOCKET`, and what was said on it.
pub struct Notifications {
    socket: UnixDatagram,
    folder: TempDir,
    said: Vec<String>,
}

impl Notifications {
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = UnixDatagram::bind(folder.path().join("notify"))?;
        Ok(Self { socket, folder, said: Vec::new() })
    }

    pub fn path(&self) -> PathBuf {
        Path::join(self.folder.path(), "notify")
    }

    /// All that has been waited past, in order, a line each.
    pub fn said(&self) -> &[String] {
        &self.said
    }

    /// Waits for a line that begins with `wanted`, and gives it.
    pub fn wait_for(&mut self, wanted: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut message = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let length = self
                .socket
                .recv(&mut message)
                .with_context(|| format!("waited for {wanted}, and heard only {:?}", self.said))?;
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            self.said.extend(lines.iter().cloned());
            if let Some(line) = lines.into_iter().find(|line| line.starts_with(wanted)) {
                return Ok(line);
            }
        }
    }
}
