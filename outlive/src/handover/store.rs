//! The handover at a restart: the channel waits in systemd's file descriptor store for the next process.
//!
//! [`FdStore`] is the writing end. `takeover/adopter.rs` reads the other end in the next process, which receives it
//! among its `LISTEN_FDS` (`listeners/listen_fds.rs`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::time::timeout;
use tracing::{debug, warn};

use super::{MessageType, Origin, STORE_NAME, Secret, channel, pack, pack_tickets};
use crate::connection::Connection;
use crate::observe::metrics;
use crate::os::systemd;

/// The writing end of a channel whose reading end systemd keeps.
pub struct FdStore {
    channel: OwnedFd,
}

impl FdStore {
    /// Opens a channel whose reading end is in systemd's store. None if there is no store, because systemd did not
    /// start this process or the unit has `FileDescriptorStoreMax=0`.
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

    /// A channel without systemd, and its reading end.
    #[cfg(test)]
    pub fn in_memory() -> (Self, OwnedFd) {
        let (channel, store) = channel::pair().expect("could not create a socket pair");
        (Self { channel }, store)
    }

    async fn try_open() -> io::Result<Option<Self>> {
        let (channel, to_store) = channel::pair()?;
        systemd::store(STORE_NAME, to_store.as_fd())?;
        match timeout(systemd::BARRIER_LIMIT, systemd::barrier()).await {
            Ok(read) => read?,
            // If systemd is only busy, it reads the message with the descriptor later, so the connections need not be closed.
            // A message that is not in its socket yet would be lost when this process exits.
            Err(_) if systemd::has_store() == Some(true) && systemd::are_messages_sent() => warn!(
                "the service manager did not answer BARRIER=1 within {}; storing the connections without its answer, because FDSTORE announces a file descriptor store; if connections are lost, check the load of PID 1",
                humantime::format_duration(systemd::BARRIER_LIMIT)
            ),
            Err(elapsed) => return Err(elapsed.into()),
        }
        // Closed, so that `is_kept` sees whether systemd has kept the other copy.
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

    /// Whether systemd has the reading end open: otherwise poll(2) reports a hang-up on the writing end.
    fn is_kept(&self) -> io::Result<bool> {
        Ok(!channel::is_hung_up(&self.channel)?)
    }

    /// Sends `connections` to the store, for the next process. Returns those that did not fit.
    pub fn put(&self, origin: Origin, mut connections: Vec<Connection>) -> Vec<Connection> {
        let (sent, error) =
            channel::send(&self.channel, MessageType::Connections, origin, &pack(&connections), "");
        // Checked again, because systemd can close a descriptor that it does not keep some time after the barrier.
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
        // Not closed here, because closing thousands of sockets one by one would prolong the restart. The kernel closes
        // them when the process exits, and the connections stay open through the copies in the store.
        std::mem::forget(connections);
        left
    }

    pub fn put_tickets(&self, origin: Origin, keys: Secret) {
        let packed = pack_tickets(keys);
        let sent =
            packed.map(|packed| channel::send(&self.channel, MessageType::Tickets, origin, &packed, "").1);
        if let Err(error) | Ok(Some(error)) = sent {
            debug!(%error, "could not hand over the TLS ticket keys; clients will do full handshakes");
        }
    }

    /// Puts the counters that the next process continues into the store.
    pub fn put_totals(&self, origin: Origin) {
        // An error is ignored, because the log line at the end of the drain has the same numbers.
        channel::send::<OwnedFd>(&self.channel, MessageType::Totals, origin, &[], &metrics::totals());
    }
}
