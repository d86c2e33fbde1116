//! [`Service`]: the real binary without systemd. The test passes it sockets and is its service manager.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{RecvFlags, recv};
use rustix::process::Signal;

use crate::client::{Connection, Target};
use crate::process::{Notifications, Process};

/// A running process of the binary. Dropping it kills the process.
pub struct Service {
    process: Process,
    pub notifications: Notifications,
    /// The socket of HTTP.
    pub target: Target,
    listener: OwnedFd,
    /// The name of the socket of HTTP.
    name: &'static str,
    others: Vec<NamedSocket>,
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

    /// As `start_with_store`, with a takeover socket in `folder`, and with these sockets besides that of HTTP.
    ///
    /// ```no_run
    /// # use testkit::service::{Service, Socket};
    /// # fn main() -> anyhow::Result<()> {
    /// let folder = tempfile::tempdir()?;
    /// let sockets = [Socket::Tcp("lines"), Socket::Udp("readings")];
    /// let service = Service::start_with_sockets("target/debug/app", &[], &sockets, folder.path())?;
    /// let connection = std::net::TcpStream::connect(service.socket("lines"))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn start_with_sockets(
        binary: &str,
        flags: &[&str],
        sockets: &[Socket<'_>],
        folder: &Path,
    ) -> Result<Self> {
        let (listener, target) = tcp()?;
        let variables = vec![("RUNTIME_DIRECTORY".into(), folder.to_string_lossy().into_owned())];
        let others = sockets.iter().map(Socket::bind).collect::<Result<_>>()?;
        let start = Start { others, variables, ..Start::new(binary, flags) };
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
        start.others = self.others;
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

    /// Waits for READY=1. Fails at once if the process exits before, with what it has logged.
    fn wait_until_ready(&mut self) -> Result<()> {
        let process = &mut self.process;
        let is_running = || Ok(!process.ends_within(Duration::ZERO)?);
        if self.notifications.wait_for_ready(is_running)? {
            return Ok(());
        }
        let status = self.process.wait()?;
        bail!("the service exited before READY=1: {status}: {}", read_all(self.process.child().stderr.take()))
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

    /// The address of a socket besides that of HTTP.
    pub fn socket(&self, name: &str) -> SocketAddr {
        let socket = self.others.iter().find(|socket| socket.name == name);
        socket.unwrap_or_else(|| panic!("the service has no socket named {name}")).address
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

/// A socket of an application, by its name (`FileDescriptorName=`).
#[derive(Clone, Copy, Debug)]
pub enum Socket<'a> {
    /// A listener.
    Tcp(&'a str),
    Udp(&'a str),
}

struct NamedSocket {
    name: String,
    address: SocketAddr,
    fd: OwnedFd,
}

impl Socket<'_> {
    /// Binds it to a free port of the loopback address.
    fn bind(&self) -> Result<NamedSocket> {
        const ANY_PORT: &str = "127.0.0.1:0";
        let (name, address, fd) = match *self {
            Self::Tcp(name) => {
                let listener = TcpListener::bind(ANY_PORT)?;
                (name, listener.local_addr()?, listener.into())
            }
            Self::Udp(name) => {
                let socket = UdpSocket::bind(ANY_PORT)?;
                (name, socket.local_addr()?, socket.into())
            }
        };
        Ok(NamedSocket { name: name.to_owned(), address, fd })
    }
}

struct Start {
    command: Command,
    name: &'static str,
    others: Vec<NamedSocket>,
    flags: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Start {
    fn new(binary: &str, flags: &[&str]) -> Self {
        let flags_of_next = flags.iter().map(ToString::to_string).collect();
        let (others, variables) = (Vec::new(), Vec::new());
        Self { command: command(binary, flags), name: "http", others, flags: flags_of_next, variables }
    }

    /// Passes the sockets and the channels in the order of `LISTEN_FDNAMES` (sd_listen_fds(3)), without `LISTEN_PID`, because
    /// the pid is not known before the process starts.
    fn begin(
        mut self,
        listener: OwnedFd,
        target: Target,
        stored: Vec<OwnedFd>,
        notifications: Notifications,
    ) -> Result<Service> {
        const FIRST: i32 = 3;
        let others = self.others.iter().map(|socket| (socket.name.as_str(), &socket.fd));
        let channels = stored.iter().map(|channel| ("connections", channel));
        let passed: Vec<_> = std::iter::once((self.name, &listener)).chain(others).chain(channels).collect();
        let names = passed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(":");
        let fds = passed
            .iter()
            .zip(FIRST..)
            .map(|((_, fd), child_fd)| Ok(FdMapping { parent_fd: fd.try_clone()?, child_fd }));
        let fds = fds.collect::<Result<Vec<_>>>()?;
        self.command
            .envs(self.variables.iter().cloned())
            .env("LISTEN_FDS", passed.len().to_string())
            .env("LISTEN_FDNAMES", names)
            .fd_mappings(fds)?;
        notifications.announce(&mut self.command);
        drop(stored);
        let process = Process::spawn(&mut self.command)?;
        let Self { name, others, flags, variables, command: _ } = self;
        let mut service =
            Service { process, notifications, target, listener, name, others, flags, variables };
        service.wait_until_ready()?;
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
