//! The servers that are compared, and how each of them is restarted or reloaded.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use testkit::certificate::Certificate;
use testkit::client::Target;
use testkit::container::{Container, Package, Systemd};
use testkit::process::Process;
use testkit::service::command;

/// The package of this service in the root workspace.
pub const NAME: &str = "app";
/// The root of the repository.
pub const FOLDER: &str = testkit::binaries::ROOT;
/// The release binary, which `make bench` builds first.
pub const OURS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/production/app");

/// The service that has WebSockets with and without Carry.
pub const SOCKETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release/outlive_websockets");

// The labels of the servers that the picture shows.
pub const OURS_RESTARTED: &str = "this service, systemctl restart";
pub const OURS_RELOADED: &str = "this service, systemctl reload";
pub const BARE_RESTARTED: &str = "bare axum::serve, systemctl restart";
pub const GO_HUNG_UP: &str = "Go net/http under start_server, HUP";

/// The other servers, as far as they are installed.
pub struct Peers {
    /// The baseline, copied to a file with the name of this service, so that the same units start it.
    bare: PathBuf,
    go: Option<PathBuf>,
    has_start_server: bool,
    pub has_wrk: bool,
    pub has_nginx: bool,
    folder: TempDir,
}

fn has(tool: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).chain([PathBuf::from("/usr/sbin")]).any(|path| path.join(tool).is_file())
}

impl Peers {
    pub fn find() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let built = Path::new(FOLDER).join("target/release/baseline_axum");
        let bare = folder.path().join(NAME);
        std::fs::copy(&built, &bare).with_context(|| format!("{}: make bench builds it", built.display()))?;
        let go = if has("go") { Some(build_go(folder.path())?) } else { None };
        let (has_start_server, has_wrk, has_nginx) = (has("start_server"), has("wrk"), has("nginx"));
        Ok(Self { bare, go, has_start_server, has_wrk, has_nginx, folder })
    }

    pub fn left_out(&self) -> Vec<&'static str> {
        [
            (self.go.is_some(), "Go net/http: go is not installed"),
            (self.has_start_server, "start_server is not installed (libserver-starter-perl)"),
            (self.has_wrk, "throughput: wrk is not installed"),
            (self.has_nginx, "nginx is not installed"),
        ]
        .into_iter()
        .filter_map(|(is_there, why)| (!is_there).then_some(why))
        .collect()
    }

    pub fn bare(&self) -> &Path {
        &self.bare
    }

    pub fn go(&self) -> Option<&Path> {
        self.go.as_deref()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn contenders(&self) -> Vec<Contender> {
        let ours = Path::new(OURS).to_owned();
        let on_systemd =
            |binary: &Path, label, verb| Some(Contender { label, binary: binary.to_owned(), verb });
        let under_start_server = |binary: Option<&Path>, label| {
            let binary = binary.filter(|_| self.has_start_server)?.to_owned();
            Some(Contender { label, binary, verb: Verb::Hangup })
        };
        [
            on_systemd(&ours, OURS_RESTARTED, Verb::Restart),
            on_systemd(&ours, OURS_RELOADED, Verb::Reload),
            on_systemd(&self.bare, BARE_RESTARTED, Verb::Restart),
            under_start_server(Some(&ours), "this service under start_server, HUP"),
            under_start_server(self.go(), GO_HUNG_UP),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

fn build_go(folder: &Path) -> Result<PathBuf> {
    let binary = folder.join("net_http");
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&binary)
        .arg(Path::new(FOLDER).join("bench/net_http.go"))
        .env("GOCACHE", folder.join("go-cache"))
        .env("GOFLAGS", "-mod=mod")
        .output()?;
    ensure!(built.status.success(), "go build: {}", String::from_utf8_lossy(&built.stderr));
    Ok(binary)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Restart,
    Reload,
    Hangup,
}

pub struct Contender {
    pub label: &'static str,
    binary: PathBuf,
    verb: Verb,
}

impl Contender {
    /// Whether TLS is measured. This service needs the name of a socket to serve TLS, and start_server passes no names.
    pub fn has_tls(&self) -> bool {
        self.binary != Path::new(OURS) || self.verb != Verb::Hangup
    }

    /// Whether WebSockets are measured: only on systemd, because without a store they end at a restart of any server.
    pub fn has_websockets(&self) -> bool {
        self.verb != Verb::Hangup
    }

    pub fn start(&self) -> Result<Server> {
        let certificate = Certificate::new()?;
        if self.verb == Verb::Hangup {
            let (address, tls) = (testkit::free_address(), testkit::free_address());
            let mut start_server = command("start_server", &["--interval=1", &format!("--port={address}")]);
            if self.has_tls() {
                start_server.arg(format!("--port={tls}"));
                start_server.env("CREDENTIALS_DIRECTORY", certificate.folder());
            }
            start_server.arg("--").arg(&self.binary);
            start_server.stdout(Stdio::null()).stderr(Stdio::null());
            let process = Process::spawn(&mut start_server)?;
            wait_for(address);
            return Ok(Server {
                kind: Kind::StartServer(process),
                target: Target::Tcp(address),
                tls,
                certificate,
                verb: "",
            });
        }
        let container = boot(&self.binary)?;
        container.enable_tls(&certificate)?;
        container.systemctl("start")?;
        Ok(Server {
            kind: Kind::Container(container),
            target: Container::target(),
            tls: SocketAddr::from(([127, 0, 0, 1], 8443)),
            certificate,
            verb: if self.verb == Verb::Reload { "reload" } else { "restart" },
        })
    }
}

/// Boots systemd in a container, with `binary` as the service.
pub fn boot(binary: &Path) -> Result<Container> {
    let binary = binary.to_str().context("the path is not valid UTF-8")?;
    Container::boot(Systemd::Host, Package { name: NAME, binary, folder: FOLDER })
}

/// Waits until a server listens on `address`.
pub fn wait_for(address: SocketAddr) {
    testkit::wait_until("a server", || std::net::TcpStream::connect(address).is_ok());
}

/// A running server.
pub struct Server {
    kind: Kind,
    pub target: Target,
    tls: SocketAddr,
    certificate: Certificate,
    verb: &'static str,
}

enum Kind {
    Container(Container),
    StartServer(Process),
}

impl Server {
    /// Restarts or reloads the server. Returns the duration under systemd; start_server does not report when it is
    /// done.
    pub fn restart(&self) -> Result<Option<Duration>> {
        let begun = Instant::now();
        match &self.kind {
            Kind::Container(container) => {
                container.systemctl(self.verb)?;
                Ok(Some(begun.elapsed()))
            }
            Kind::StartServer(process) => {
                process.signal(Signal::HUP);
                Ok(None)
            }
        }
    }

    pub fn tls(&self) -> Result<Target> {
        Ok(Target::Tls(self.tls, self.certificate.client(&["h2"])?))
    }

    /// A function that the thread of a load runs first: it enters the network namespace of the container.
    pub fn enter(&self) -> Box<dyn FnOnce() + Send> {
        match &self.kind {
            Kind::Container(container) => Box::new(container.enter()),
            Kind::StartServer(_) => Box::new(|| {}),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Kind::StartServer(process) = &mut self.kind {
            process.signal(Signal::TERM);
            let _ = process.wait();
        }
    }
}
