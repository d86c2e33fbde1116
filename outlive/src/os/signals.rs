//! The signals to which the process reacts: SIGTERM and SIGINT stop it, SIGHUP reloads it.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// A SIGHUP arrived while the process waited for a stop signal only, as during its start. The next call of
    /// [`Signals::next`] returns it, so that it is not lost.
    reload_pending: bool,
}

/// The request that a signal makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalRequest {
    /// SIGTERM (systemd, a container's stop) or SIGINT (Ctrl-C).
    Stop,
    /// SIGHUP.
    Reload,
}

impl Signals {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            reload_pending: false,
        })
    }

    pub async fn next(&mut self) -> SignalRequest {
        if std::mem::take(&mut self.reload_pending) { SignalRequest::Reload } else { self.received().await }
    }

    async fn received(&mut self) -> SignalRequest {
        tokio::select! {
            _ = self.terminate.recv() => SignalRequest::Stop,
            _ = self.interrupt.recv() => SignalRequest::Stop,
            _ = self.hangup.recv() => SignalRequest::Reload,
        }
    }

    /// Waits for a stop signal.
    pub async fn terminated(&mut self) {
        while self.received().await != SignalRequest::Stop {
            self.reload_pending = true;
        }
    }
}
