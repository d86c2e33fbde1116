//! The time after a pause of the connection, in which h2 reads little in each turn of its task (`TURN_LIMIT` in `relay.rs`).
//!
//! The frames that a client sends during a pause arrive at once. If h2 read all of them before it accepts a request, it could
//! find too many cancelled requests among them and end the connection.

use std::time::Duration;

use tokio::time::Instant;

/// The longest time for which h2 catches up. The frames that the client sent during the pause arrive within this time.
const TIME_LIMIT: Duration = Duration::from_secs(1);
/// The number of bytes that h2 reads while it catches up. A client rarely sends more during a pause.
const LENGTH_LIMIT: usize = 256 * 1024;

/// Whether h2 catches up with its client.
pub enum CatchUp {
    /// h2 reads as much as has arrived.
    Over,
    /// h2 reads small pieces until it has read `left` more bytes or the time `until` has passed.
    Reading { left: usize, until: Instant },
}

impl CatchUp {
    /// Begins now. The limit of bytes is [`LENGTH_LIMIT`] or `held`, the number of held bytes, whichever is larger.
    pub fn begin(&mut self, held: usize) {
        *self = Self::Reading { left: LENGTH_LIMIT.max(held), until: Instant::now() + TIME_LIMIT };
    }

    pub fn is_over(&mut self) -> bool {
        if let Self::Reading { left, until } = self
            && (*left == 0 || Instant::now() > *until)
        {
            *self = Self::Over;
        }
        matches!(self, Self::Over)
    }

    /// h2 has read `length` bytes.
    pub fn has_read(&mut self, length: usize) {
        if let Self::Reading { left, .. } = self {
            *left = left.saturating_sub(length);
        }
    }

    pub fn end(&mut self) {
        *self = Self::Over;
    }
}
