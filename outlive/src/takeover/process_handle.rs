//! Another process, by a handle that stays its own when its number is given to another: `pidfd_open(2)`.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::launch::is_readable;

/// For a process to be gone that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct ProcessHandle {
    pid: Pid,
    handle: OwnedFd,
}

impl ProcessHandle {
    /// Fails where `pid` is no process, or none that may be ended: PID 1, or this one.
    pub(super) fn open(pid: u32) -> Result<Self> {
        let is_another = pid > 1 && pid != std::process::id();
        let other = i32::try_from(pid).ok().filter(|_| is_another).and_then(Pid::from_raw);
        let pid = other.with_context(|| format!("invalid pid {pid}: expected the pid of another process"))?;
        let handle =
            pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("could not open process {pid}"))?;
        Ok(Self { pid, handle })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Asks it to end.
    pub(super) fn terminate(&self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.handle, Signal::TERM);
    }

    /// Ends it; it is no more when this returns.
    pub(super) fn kill(&self) -> Result<()> {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
        let is_gone = is_readable(&self.handle, Instant::now() + KILL_LIMIT)?;
        ensure!(is_gone, "process {} did not exit after SIGKILL", self.pid);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn neither_pid_1_nor_this_process_nor_none_is_another() {
        for pid in [0, 1, std::process::id(), u32::MAX] {
            assert!(ProcessHandle::open(pid).is_err(), "{pid}");
        }
    }

    #[test]
    fn a_process_that_was_killed_is_gone_and_may_have_been_before() {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let process = ProcessHandle::open(child.id()).expect("it runs");
        assert_eq!(process.pid(), child.id());
        process.kill().expect("it ends");
        process.kill().expect("it has ended");
        child.wait().expect("an end");
    }
}
