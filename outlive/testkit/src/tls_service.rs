//! [`TlsService`]: the real binary without systemd, with an http, an https and an admin listener that it binds itself.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::certificate::Certificate;
use crate::client::{Connection, Http2, Target, get};
use crate::process::{Notifications, Process};
use crate::service::command;

/// A running process of the binary with three listeners.
pub struct TlsService {
    pub process: Process,
    pub notifications: Notifications,
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub certificate: Certificate,
    folder: TempDir,
}

impl TlsService {
    /// Starts `binary` with a new certificate, and waits until its status names the addresses.
    pub fn start(binary: &str, flags: &[&str]) -> Result<Self> {
        let certificate = Certificate::new()?;
        let folder = tempfile::tempdir()?;
        let mut notifications = Notifications::new()?;
        let mut command = command(binary, flags);
        command
            .args(["--listen", "127.0.0.1:0", "--listen", "https=127.0.0.1:0"])
            .arg(format!("--listen=admin={}", folder.path().join("admin.sock").display()))
            .args(["--tls-cert".into(), certificate.chain(), "--tls-key".into(), certificate.key()])
            .env("NOTIFY_SOCKET", notifications.path())
            .env("MEMORY_PRESSURE_WATCH", pressure(&folder));
        mknodat(CWD, pressure(&folder), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let process = Process::spawn(&mut command)?;
        let status = notifications.wait_for("STATUS=serving on")?;
        let address = |name: &str| -> Result<SocketAddr> {
            let address = status.split(&format!(" {name}(")).nth(1).and_then(|rest| rest.split(')').next());
            Ok(address.with_context(|| status.clone())?.parse()?)
        };
        let (http, https) = (address("http")?, address("https")?);
        Ok(Self { process, notifications, http, https, certificate, folder })
    }

    pub fn admin(&self) -> Target {
        Target::Unix(self.folder.path().join("admin.sock"))
    }

    /// Reports to the process that memory is short.
    pub fn report_memory_pressure(&self) -> Result<()> {
        Ok(std::fs::write(pressure(&self.folder), "\n")?)
    }

    /// The https listener, for a client that offers these protocols (ALPN).
    pub fn https(&self, protocols: &[&str]) -> Result<Target> {
        Ok(Target::Tls(self.https, self.certificate.client(protocols)?))
    }

    /// Sends SIGTERM, and waits until the process has begun to stop.
    pub fn terminate(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        self.notifications.wait_for("STOPPING=1")?;
        Ok(())
    }
}

/// A FIFO in the place of the kernel's file.
fn pressure(folder: &TempDir) -> PathBuf {
    folder.path().join("memory.pressure")
}

/// A client with one connection: HTTP/1.1 or HTTP/2, plain or over TLS.
pub enum Client {
    Http1(Connection),
    Http2(Http2),
}

impl Client {
    /// How many kinds of connections there are.
    pub const KINDS: usize = 6;

    /// Connects; `kind` modulo [`Self::KINDS`] selects plain HTTP/1.1, plain HTTP/2, these over TLS 1.3, or over TLS 1.2.
    pub async fn open(service: &TlsService, kind: usize) -> Self {
        let plain = Target::Tcp(service.http);
        let tls = |protocol| service.https(&[protocol]).expect("the client configuration is valid");
        let tls12 = |protocol| {
            let client = service.certificate.client_over_tls12(None, &[protocol]);
            Target::Tls(service.https, client.expect("the client configuration is valid"))
        };
        let http1 = async |target| Self::Http1(Connection::open(&target).await.expect("the service listens"));
        let http2 = async |target| Self::Http2(Http2::open(&target).await.expect("the service listens"));
        match kind % Self::KINDS {
            0 => http1(plain).await,
            1 => http2(plain).await,
            2 => http1(tls("http/1.1")).await,
            3 => http2(tls("h2")).await,
            4 => http1(tls12("http/1.1")).await,
            _ => http2(tls12("h2")).await,
        }
    }

    /// Asserts that a GET is answered with 200 on the same connection.
    pub async fn is_answered(&mut self) {
        let status = match self {
            Self::Http1(connection) => {
                connection.ask(&get("/")).await.expect("the request is answered").status
            }
            Self::Http2(connection) => {
                connection
                    .get("/")
                    .await
                    .expect("the request is answered")
                    .expect("the server sends no GOAWAY")
                    .0
            }
        };
        assert_eq!(status, 200);
    }
}
