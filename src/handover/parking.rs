//! A restart: the channel waits in systemd's file descriptor store for the next process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, warn};

use super::{STORE_NAME, Sender, channel};
use crate::connection::Connection;
use crate::systemd;

/// For systemd to say that it has read what was sent.
const BARRIER_LIMIT: Duration = Duration::from_secs(5);

/// The writing end of a channel whose reading end systemd keeps.
pub struct Parking {
    channel: OwnedFd,
}

impl Parking {
    /// Opens a channel into the store. None where there is no store: no systemd, or
    /// `FileDescriptorStoreMax=0`.
    pub async fn open() -> Option<Self> {
        if !systemd::is_there() {
            return None;
        }
        match Self::try_open().await {
            Ok(parking) => parking,
            Err(error) => {
                warn!(%error, "could not open a handover channel");
                None
            }
        }
    }

    async fn try_open() -> io::Result<Option<Self>> {
        let (channel, to_store) = channel::pair()?;
        systemd::store(STORE_NAME, to_store.as_fd())?;
        tokio::time::timeout(BARRIER_LIMIT, systemd::barrier()).await??;
        // Our copy goes: if systemd has kept none, the channel has no reader, and polls so.
        drop(to_store);
        let mut polled = [PollFd::new(&channel, PollFlags::OUT)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let kept = !polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if !kept {
            debug!("systemd keeps no fds for this unit (FileDescriptorStoreMax=)");
        }
        Ok(kept.then_some(Self { channel }))
    }

    /// Leaves `connections` for the next process; gives back those that did not fit.
    pub fn leave(self, sender: Sender, mut connections: Vec<Connection>) -> Vec<Connection> {
        let (sent, error) = channel::send(&self.channel, sender, &connections);
        let left = connections.split_off(sent);
        if let Some(error) = error {
            warn!(%error, connections = left.len(), "the handover channel is full");
        }
        // Closing ten thousand one by one takes a while; the kernel does it all at the process's end.
        std::mem::forget(connections);
        left
    }
}
