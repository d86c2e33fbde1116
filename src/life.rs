//! This process's life, as it may be told to anybody who asks.

use std::time::SystemTime;

/// Who serves. Handlers get it with `Extension<Life>`.
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
