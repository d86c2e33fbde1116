//! The real binary without systemd: a socket passed to it, and what it says to its service manager.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::Result;
use rustix::process::Signal;

use crate::client::{Connection, Target};
use crate::process::{Notifications, Process};

pub struct Service {
    process: Process,
    pub notifications: Notifications,
    pub target: Target,
}

impl Service {
    /// Starts `binary` on a fresh TCP socket, and waits for READY=1.
    pub fn start(binary: &str, flags: &[&str]) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let target = Target::Tcp(listener.local_addr()?);
        let mut service = Self::spawn(binary, flags, listener.into(), target)?;
        service.notifications.wait_for("READY=1")?;
        Ok(service)
    }

    /// Starts `binary` with `socket` as its standard input, as `LISTEN_FDS_FIRST_FD` lets listenfd take it.
    pub fn spawn(binary: &str, flags: &[&str], socket: OwnedFd, target: Target) -> Result<Self> {
        let notifications = Notifications::new()?;
        let mut command = command(binary, flags);
        command
            .envs([("LISTEN_FDS", "1"), ("LISTEN_FDS_FIRST_FD", "0")])
            .env("NOTIFY_SOCKET", notifications.path())
            .stdin(socket);
        Ok(Self { process: Process::spawn(&mut command)?, notifications, target })
    }

    pub async fn connect(&self) -> Connection {
        Connection::open(&self.target).await.expect("the service listens")
    }

    pub fn address(&self) -> SocketAddr {
        match self.target {
            Target::Tcp(address) => address,
            Target::Unix(_) => panic!("this service listens on a Unix socket"),
        }
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for the process to end; gives how it ended and what it wrote to standard error.
    pub fn end(mut self) -> Result<(ExitStatus, String)> {
        let status = self.process.wait()?;
        Ok((status, read_all(self.process.child().stderr.take())))
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The binary with nothing of this environment that it would listen to.
pub fn command(binary: &str, flags: &[&str]) -> Command {
    let prefix = Path::new(binary).file_name().unwrap_or_default().to_string_lossy().to_uppercase();
    let prefix = format!("{}_", prefix.replace('-', "_"));
    let mut command = Command::new(binary);
    command.args(flags).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ours = ["LISTEN_", "NOTIFY_", "SERVER_STARTER_", "WATCHDOG_", "RUST_LOG", "JOURNAL_", &prefix];
    for (name, _) in std::env::vars_os() {
        if ours.iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command that is expected to end by itself; gives its exit code, standard output and error.
pub fn run_to_end(command: &mut Command) -> Result<(Option<i32>, String, String)> {
    let mut process = Process::spawn(command)?;
    let status = process.wait()?;
    let child = process.child();
    Ok((status.code(), read_all(child.stdout.take()), read_all(child.stderr.take())))
}

fn read_all(from: Option<impl Read>) -> String {
    let mut text = String::new();
    if let Some(mut from) = from {
        from.read_to_string(&mut text).expect("text");
    }
    text
}
