//! A restart: the channel waits in systemd's file descriptor store for the next process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, warn};

use super::{MessageType, Origin, STORE_NAME, Secret, channel, pack, pack_tickets};
use crate::observe::metrics;
use crate::os::systemd;
use crate::transport::stream::Connection;

/// The writing end of a channel whose reading end systemd keeps.
pub struct FdStore {
    channel: OwnedFd,
}

impl FdStore {
    /// Opens a channel into the store. None where there is no store: no systemd, or
    /// `FileDescriptorStoreMax=0`.
    pub async fn open() -> Option<Self> {
        if systemd::has_store() == Some(false) {
            return None;
        }
        match Self::try_open().await {
            Ok(store) => store,
            Err(error) => {
                warn!(%error, "could not open a handover channel to systemd; connections will be closed");
                None
            }
        }
    }

    /// A channel, and the end of it that systemd would keep.
    #[cfg(test)]
    pub fn in_memory() -> (Self, OwnedFd) {
        let (channel, store) = channel::pair().expect("a pair");
        (Self { channel }, store)
    }

    async fn try_open() -> io::Result<Option<Self>> {
        let (channel, to_store) = channel::pair()?;
        systemd::store(STORE_NAME, to_store.as_fd())?;
        tokio::time::timeout(systemd::BARRIER_LIMIT, systemd::barrier()).await??;
        // Our copy goes: if systemd has kept none, the channel has no reader.
        drop(to_store);
        let store = Self { channel };
        let is_kept = store.is_kept()?;
        if !is_kept {
            debug!(
                "systemd stores no file descriptors for this unit; a restart closes its connections (FileDescriptorStoreMax=)"
            );
        }
        Ok(is_kept.then_some(store))
    }

    /// Whether the reading end is still open, which shows in how the writing end polls.
    fn is_kept(&self) -> io::Result<bool> {
        let mut polled = [PollFd::new(&self.channel, PollFlags::OUT)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(!polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// Leaves `connections` for the next process; gives back those that did not fit.
    pub fn put(&self, origin: Origin, mut connections: Vec<Connection>) -> Vec<Connection> {
        let (sent, error) =
            channel::send(&self.channel, MessageType::Connections, origin, &pack(&connections), "");
        // systemd may close what it does not keep a while after it has said that it has read the message.
        if !self.is_kept().unwrap_or(false) {
            warn!(
                connections = connections.len(),
                "systemd closed the handover channel; connections will be closed"
            );
            return connections;
        }
        let left = connections.split_off(sent);
        if let Some(error) = error {
            warn!(%error, connections = left.len(), "could not hand over all connections; the others will be closed");
        }
        // Closing ten thousand one by one takes a while; the kernel does it all at the process's end.
        std::mem::forget(connections);
        left
    }

    /// Leaves the keys of session tickets.
    pub fn put_tickets(&self, origin: Origin, keys: Secret) {
        let packed = pack_tickets(keys);
        let sent =
            packed.map(|packed| channel::send(&self.channel, MessageType::Tickets, origin, &packed, "").1);
        if let Err(error) | Ok(Some(error)) = sent {
            debug!(%error, "could not hand over the TLS ticket keys; clients will do full handshakes");
        }
    }

    /// Leaves what this process has counted.
    pub fn say_totals(&self, origin: Origin) {
        // Where the channel is full or gone, the journal has it.
        channel::send::<OwnedFd>(&self.channel, MessageType::Totals, origin, &[], &metrics::totals());
    }
}
