//! The signals that the service answers to.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// One came when nobody could reload, as during a start: for whoever asks what is next.
    a_reload_waits: bool,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM (systemd, a container's stop) or SIGINT (Ctrl-C).
    End,
    /// SIGHUP.
    Reload,
}

impl Signals {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            a_reload_waits: false,
        })
    }

    pub async fn next(&mut self) -> Asked {
        if std::mem::take(&mut self.a_reload_waits) { Asked::Reload } else { self.received().await }
    }

    async fn received(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }

    /// Waits to be asked to end.
    pub async fn terminated(&mut self) {
        while self.received().await != Asked::End {
            self.a_reload_waits = true;
        }
    }
}
