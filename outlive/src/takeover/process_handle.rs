//! [`ProcessHandle`], a handle of another process (pidfd_open(2)). Unlike a pid, it never refers to a later process
//! with the same number, so that no unrelated process is killed.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::launch::is_readable;

/// How long a process may take to exit after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct ProcessHandle {
    pid: Pid,
    handle: OwnedFd,
}

impl ProcessHandle {
    /// Fails if there is no process `pid`, or if it is PID 1 or this process. These must not be killed, and the number
    /// comes from another process, which may be broken.
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

    pub(super) fn terminate(&self) {
        // An error means that the process has exited already.
        let _ = pidfd_send_signal(&self.handle, Signal::TERM);
    }

    /// Sends SIGKILL and waits until the process has exited. Fails if it has not after [`KILL_LIMIT`].
    pub(super) fn kill(&self) -> Result<()> {
        // An error means that the process has exited already.
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
    fn pid_0_pid_1_this_process_and_unused_pids_are_refused() {
        for pid in [0, 1, std::process::id(), u32::MAX] {
            assert!(ProcessHandle::open(pid).is_err(), "{pid}");
        }
    }

    #[test]
    fn kill_waits_for_the_exit_and_succeeds_again_afterwards() {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("could not start sleep");
        let process = ProcessHandle::open(child.id()).expect("could not open the process");
        assert_eq!(process.pid(), child.id());
        process.kill().expect("could not kill the process");
        process.kill().expect("failed on a process that has exited");
        child.wait().expect("could not wait for the child");
    }
}
