//! The real binary with a listener of each kind, bound by itself.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::certificate::Certificate;
use crate::client::Target;
use crate::process::{Notifications, Process};
use crate::service::command;

pub struct FullService {
    pub process: Process,
    pub notifications: Notifications,
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub certificate: Certificate,
    folder: TempDir,
}

impl FullService {
    /// Starts `binary`, and waits until it serves.
    pub fn start(binary: &str, flags: &[&str]) -> Result<Self> {
        let certificate = Certificate::new()?;
        let folder = tempfile::tempdir()?;
        let mut notifications = Notifications::new()?;
        let mut command = command(binary, flags);
        command
            .args(["--listen", "127.0.0.1:0", "--listen", "https=127.0.0.1:0"])
            .arg(format!("--listen=admin={}", folder.path().join("admin.sock").display()))
            .args(["--tls-cert".into(), certificate.chain(), "--tls-key".into(), certificate.key()])
            .env("NOTIFY_SOCKET", notifications.path());
        let process = Process::spawn(&mut command)?;
        let status = notifications.wait_for("STATUS=serving on")?;
        let address = |name: &str| -> Result<SocketAddr> {
            let port = status.split(&format!(" {name}(")).nth(1).and_then(|rest| rest.split(')').next());
            Ok(SocketAddr::from(([127, 0, 0, 1], port.with_context(|| status.clone())?.parse()?)))
        };
        let (http, https) = (address("http")?, address("https")?);
        Ok(Self { process, notifications, http, https, certificate, folder })
    }

    pub fn admin(&self) -> Target {
        Target::Unix(self.folder.path().join("admin.sock"))
    }

    /// The https listener, for a client that speaks one of these protocols (ALPN).
    pub fn https(&self, protocols: &[&str]) -> Result<Target> {
        Ok(Target::Tls(self.https, self.certificate.client(protocols)?))
    }

    /// Tells it to end, and waits until it has begun to.
    pub fn terminate(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        self.notifications.wait_for("STOPPING=1")?;
        Ok(())
    }
}
