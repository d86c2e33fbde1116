//! [`HandoverQueue`], the way of quiescent connections from their tasks to the drain.

use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::sync::Notify;

use crate::connection::Connection;
use crate::os::lock::lock;

/// The connections that have become quiescent in a phase that hands them over, in this order. Their tasks add them, and
/// the drain takes them.
#[derive(Default)]
pub struct HandoverQueue {
    connections: Mutex<VecDeque<Connection>>,
    added: Notify,
}

impl HandoverQueue {
    pub(super) fn add(&self, connection: Connection) {
        lock(&self.connections).push_back(connection);
        self.added.notify_one();
    }

    /// The first connection, if there is one.
    pub fn take(&self) -> Option<Connection> {
        lock(&self.connections).pop_front()
    }

    pub fn take_all(&self) -> Vec<Connection> {
        std::mem::take(&mut *lock(&self.connections)).into()
    }

    /// Waits for a connection. Only one task may wait at a time, because each connection that is added wakes one.
    /// Cancelled, it leaves all connections in the queue.
    pub async fn next(&self) -> Connection {
        loop {
            if let Some(connection) = self.take() {
                return connection;
            }
            // A connection that is added before this waits is not missed: its notification is kept.
            self.added.notified().await;
        }
    }
}
