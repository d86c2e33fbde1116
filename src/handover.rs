//! How connections at rest go to the next process, with the bytes that were read from them.
//!
//! They travel in frames (`frame.rs`) on a `SOCK_SEQPACKET` channel (`channel.rs`). At a restart nobody
//! is there yet to read: the channel waits, filled, in systemd's file descriptor store (`parking.rs`).

mod channel;
mod frame;
mod parking;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use frame::Record;
pub use parking::Parking;
use rustix::time::{ClockId, clock_gettime};

use crate::connection::Connection;
use crate::stream::Stream;

/// The channel's name in the store, `FDNAME=`.
pub const STORE_NAME: &str = "connections";

/// What the sender says of itself in each frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    pub generation: u64,
    /// When its last answer was out; nanoseconds of `CLOCK_MONOTONIC`.
    pub rested_at: u64,
}

impl Sender {
    pub fn now(generation: u64) -> Self {
        Self { generation, rested_at: monotonic_now() }
    }

    /// How long ago the sender's last answer was out.
    pub fn rest(&self) -> Duration {
        Duration::from_nanos(monotonic_now().saturating_sub(self.rested_at))
    }
}

fn monotonic_now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// The generation that follows those who wrote to `channels`; nothing is taken out of them.
pub fn next_generation(channels: &[anyhow::Result<OwnedFd>]) -> Option<u64> {
    let senders = channels.iter().flatten().filter_map(channel::peek);
    senders.map(|sender| sender.generation.saturating_add(1)).max()
}

/// What came out of the channels.
#[derive(Default)]
pub struct Received {
    pub connections: Vec<Handed>,
    pub sender: Option<Sender>,
    /// Connections closed because nobody here could go on with them.
    pub refused: usize,
    /// Why; the last reason.
    pub reason: Option<String>,
}

/// A connection as it comes out of a channel.
pub struct Handed {
    fd: OwnedFd,
    record: Record,
}

impl Handed {
    /// The connection, in this process's runtime. Fails where the peer is gone.
    pub fn connect(self) -> io::Result<Connection> {
        let (stream, peer) = Stream::from_fd(self.fd)?;
        let Record { listener, unread } = self.record;
        Ok(Connection { stream, peer, listener: Arc::from(listener), unread })
    }
}

/// Empties `channels` of all that their writers have sent. A frame that makes no sense costs the
/// connections in it, and no others.
pub fn receive(channels: Vec<anyhow::Result<OwnedFd>>, is_listener: impl Fn(&str) -> bool) -> Received {
    let mut received = Received::default();
    for channel in channels {
        if let Err(error) = channel.and_then(|channel| received.empty(&channel, &is_listener)) {
            received.refuse(0, format!("{error:#}"));
        }
    }
    received
}

impl Received {
    fn empty(&mut self, channel: &OwnedFd, is_listener: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        while let Some(frame) = channel::receive(channel)? {
            match frame {
                Ok(frame) => {
                    self.sender = Some(frame.sender);
                    for (fd, record) in frame.connections {
                        if is_listener(&record.listener) {
                            self.connections.push(Handed { fd, record });
                        } else {
                            self.refuse(1, format!("no listener is named {:?} any more", record.listener));
                        }
                    }
                }
                Err(refusal) => self.refuse(refusal.connections, refusal.reason),
            }
        }
        Ok(())
    }

    fn refuse(&mut self, connections: usize, reason: String) {
        self.refused += connections;
        self.reason = Some(reason);
    }
}
