//! [`Service`]: the real binary without systemd. The test passes it a socket and is its service manager.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Result, ensure};
use rustix::net::{RecvFlags, recv};
use rustix::process::Signal;

use crate::client::{Connection, Target};
use crate::process::{Notifications, Process};

/// A running process of the binary on one socket. Dropping it kills the process.
pub struct Service {
    process: Process,
    pub notifications: Notifications,
    pub target: Target,
    listener: OwnedFd,
    /// The name of the socket.
    name: &'static str,
    flags: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Service {
    /// Starts `binary` on a new TCP socket, and waits for READY=1. The service manager has no file descriptor store.
    pub fn start(binary: &str, flags: &[&str]) -> Result<Self> {
        let (listener, target) = tcp()?;
        Self::begin(binary, flags, listener, target, Vec::new(), Notifications::new()?)
    }

    /// As `start`, with a service manager that has a file descriptor store.
    pub fn start_with_store(binary: &str, flags: &[&str]) -> Result<Self> {
        let (listener, target) = tcp()?;
        Self::begin(binary, flags, listener, target, Vec::new(), Notifications::with_store()?)
    }

    /// As `start_with_store`, on a socket named https.
    pub fn start_https(binary: &str, flags: &[&str]) -> Result<Self> {
        let (listener, target) = tcp()?;
        let start = Start { name: "https", ..Start::new(binary, flags) };
        start.begin(listener, target, Vec::new(), Notifications::with_store()?)
    }

    /// As `start`, with a takeover socket in `folder`.
    pub fn start_in(binary: &str, flags: &[&str], folder: &Path) -> Result<Self> {
        let (listener, target) = tcp()?;
        let mut start = Start::new(binary, flags);
        start.command.env("RUNTIME_DIRECTORY", folder);
        start.begin(listener, target, Vec::new(), Notifications::new()?)
    }

    /// As `start_with_store`, with environment variables and a takeover socket in `folder`.
    pub fn start_with_variables(binary: &str, variables: &[(&str, &str)], folder: &Path) -> Result<Self> {
        let (listener, target) = tcp()?;
        let mut variables: Vec<_> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        variables.push(("RUNTIME_DIRECTORY".into(), folder.to_string_lossy().into_owned()));
        let mut start = Start::new(binary, &[]);
        start.variables = variables;
        start.begin(listener, target, Vec::new(), Notifications::with_store()?)
    }

    /// As `start_with_store`, on a Unix socket.
    pub fn start_on_path(binary: &str, path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path)?.into();
        let target = Target::Unix(path.to_owned());
        Self::begin(binary, &[], listener, target, Vec::new(), Notifications::with_store()?)
    }

    /// As `start`, with a handover channel as a process before it would have stored it.
    pub fn start_with_channel(binary: &str, channel: OwnedFd) -> Result<Self> {
        let (listener, target) = tcp()?;
        Self::begin(binary, &[], listener, target, vec![channel], Notifications::with_store()?)
    }

    /// Waits until this process exits, and starts the next one on the same socket, with the same options, the same variables
    /// and the stored file descriptors.
    pub fn restart(mut self, binary: &str) -> Result<Self> {
        let status = self.process.wait()?;
        ensure!(status.success(), "{status}: {}", read_all(self.process.child().stderr.take()));
        let mut stored = self.notifications.take_stored();
        // The others are the channels of backups, which a drain has emptied.
        stored.retain(has_frames);
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let mut start = Start::new(binary, &flags);
        start.variables = self.variables;
        start.name = self.name;
        start.begin(self.listener, self.target, stored, Notifications::with_store()?)
    }

    fn begin(
        binary: &str,
        flags: &[&str],
        listener: OwnedFd,
        target: Target,
        stored: Vec<OwnedFd>,
        notifications: Notifications,
    ) -> Result<Self> {
        Start::new(binary, flags).begin(listener, target, stored, notifications)
    }

    pub fn pid(&self) -> i32 {
        self.process.pid().as_raw_nonzero().get()
    }

    pub async fn connect(&self) -> Connection {
        Connection::open(&self.target).await.expect("the service listens")
    }

    pub fn address(&self) -> SocketAddr {
        match self.target {
            Target::Tcp(address) => address,
            _ => panic!("this service does not listen on TCP"),
        }
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits until the status of the service reports `count` requests in flight.
    pub fn wait_for_in_flight(&mut self, count: usize) -> Result<()> {
        self.notifications.wait_for_status(&format!(" {count} in flight")).map(drop)
    }

    /// Waits until the process exits; returns its status and its standard error.
    pub fn end(mut self) -> Result<(ExitStatus, String)> {
        let status = self.process.wait()?;
        Ok((status, read_all(self.process.child().stderr.take())))
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

struct Start {
    command: Command,
    name: &'static str,
    flags: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Start {
    fn new(binary: &str, flags: &[&str]) -> Self {
        let flags_of_next = flags.iter().map(ToString::to_string).collect();
        Self { command: command(binary, flags), name: "http", flags: flags_of_next, variables: Vec::new() }
    }

    /// Passes the socket as standard input and a channel as standard output, because a `Command` of
    /// std passes no other file descriptors. `LISTEN_FDS_FIRST_FD=0` tells listenfd where they begin.
    fn begin(
        mut self,
        listener: OwnedFd,
        target: Target,
        stored: Vec<OwnedFd>,
        notifications: Notifications,
    ) -> Result<Service> {
        ensure!(stored.len() <= 1, "at most one channel can be passed: {stored:?}");
        self.command
            .envs(self.variables.iter().cloned())
            .env("LISTEN_FDS", (1 + stored.len()).to_string())
            .env("LISTEN_FDNAMES", format!("{}{}", self.name, ["", ":connections"][stored.len()]))
            .env("LISTEN_FDS_FIRST_FD", "0")
            .stdin(listener.try_clone()?);
        notifications.announce(&mut self.command);
        for channel in stored {
            self.command.stdout(channel);
        }
        let process = Process::spawn(&mut self.command)?;
        let Self { name, flags, variables, .. } = self;
        let mut service = Service { process, notifications, target, listener, name, flags, variables };
        service.notifications.wait_for("READY=1")?;
        Ok(service)
    }
}

/// Whether a handover channel has messages. recv(2) without a buffer for descriptors copies none.
fn has_frames(channel: &OwnedFd) -> bool {
    let peeked = recv(channel, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    peeked.is_ok_and(|(_, length)| length > 0)
}

fn tcp() -> Result<(OwnedFd, Target)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let target = Target::Tcp(listener.local_addr()?);
    Ok((listener.into(), target))
}

/// A command for `binary` without the variables of this environment that it would interpret. Otherwise the result of a
/// test would depend on where it runs, such as below a unit.
pub fn command(binary: &str, flags: &[&str]) -> Command {
    let prefix = Path::new(binary).file_name().unwrap_or_default().to_string_lossy().to_uppercase();
    let prefix = format!("{}_", prefix.replace('-', "_"));
    let mut command = Command::new(binary);
    command.args(flags).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ours = [
        "CREDENTIALS_",
        "FDSTORE",
        "INVOCATION_ID",
        "JOURNAL_",
        "LISTEN_",
        "MEMORY_PRESSURE_",
        "NOTIFY_",
        "OTEL_",
        "RUNTIME_DIRECTORY",
        "RUST_LOG",
        "SERVER_STARTER_",
        "SYSTEMD_EXEC_PID",
        "TAKEOVER_",
        "WATCHDOG_",
        &prefix,
    ];
    for (name, _) in std::env::vars_os() {
        if ours.iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command that exits by itself; returns its exit code, standard output and standard error.
pub fn run_to_end(command: &mut Command) -> Result<(Option<i32>, String, String)> {
    let mut process = Process::spawn(command)?;
    let status = process.wait()?;
    let child = process.child();
    Ok((status.code(), read_all(child.stdout.take()), read_all(child.stderr.take())))
}

fn read_all(from: Option<impl Read>) -> String {
    let mut text = String::new();
    if let Some(mut from) = from {
        from.read_to_string(&mut text).expect("the file is readable");
    }
    text
}
