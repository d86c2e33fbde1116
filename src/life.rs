//! This process's life, as it may be told to anybody who asks.

use std::time::SystemTime;

use tokio_util::sync::CancellationToken;

/// Who serves.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    pub pid: u32,
    /// Which process in the row of those that handed their connections on; the first is 1.
    pub generation: u64,
    pub since: SystemTime,
}

impl Life {
    pub fn begin(generation: u64) -> Self {
        Self { pid: std::process::id(), generation, since: SystemTime::now() }
    }
}

/// The end of this process's serving. Handlers that would go on for ever (WebSocket, event streams)
/// wait for it.
#[derive(Clone, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// Waits until the process begins to end. Whoever answers on has until the drain limit.
    pub async fn begun(&self) {
        self.0.cancelled().await;
    }

    pub fn begin(&self) {
        self.0.cancel();
    }
}
