//! An upgraded connection that its handler has given back, on its way to the next process.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::AsyncWrite;
use tokio::sync::mpsc;

use super::frames::{Inbound, close};
use super::{Frames, Granted};
use crate::connection::io::{Io, Parts, join};
use crate::connection::{Connection, Endpoint, proxied};
use crate::registry::{Registration, UpgradeHandle};
use crate::transport::replay::{Kind, Replay};
use crate::transport::stream::Stream;

/// The codes of a Close frame (RFC 6455 section 7.4): the peer has closed; the service restarts.
const NORMAL: u16 = 1000;
const SERVICE_RESTART: u16 = 1012;

/// The last chunk of a chunked body (RFC 9112 section 7.1).
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Closes a connection that began in another process, and that this process cannot continue.
pub(in crate::connection) async fn close_unadopted(io: Io, kind: Kind) {
    match kind {
        // Boxed, so that the task of each connection does not reserve room for this future.
        Kind::WebSocket => Box::pin(close_websocket(io, Inbound::default())).await,
        Kind::EventStream => io.refuse(LAST_CHUNK).await,
        Kind::Other | Kind::Socket => io.close().await,
    }
}

/// Closes a WebSocket with the code 1012. The closure is clean only if the client's Close has arrived before the end of
/// the connection (RFC 6455 section 7.1.4). `inbound` has followed what was read before.
async fn close_websocket(io: Io, mut inbound: Inbound) {
    io.refuse_and_wait(&close(SERVICE_RESTART), |bytes| inbound.follow_to_end(bytes)).await;
}

/// Where handlers give connections back.
#[derive(Clone)]
pub struct ReturnPath(mpsc::UnboundedSender<ReturnedConnection>);

/// The connections that handlers have given back. The server reads them.
pub type ReturnedConnections = mpsc::UnboundedReceiver<ReturnedConnection>;

impl ReturnPath {
    pub fn new() -> (Self, ReturnedConnections) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Closes the connection at once if the process is exiting, so that no one reads the other end.
    pub(super) fn send(&self, returned: ReturnedConnection) {
        let _ = self.0.send(returned);
    }
}

/// An upgraded connection whose handler has returned. It counts as open until it is continued or closed.
pub struct ReturnedConnection {
    io: Io,
    endpoint: Arc<Endpoint>,
    /// None if the connection cannot be continued, because the handler left no state or its request was too large.
    replay: Option<Replay>,
    /// Whether the handler waited for the request to hand the connection on.
    was_requested: bool,
    /// Present for a WebSocket.
    frames: Option<Frames>,
}

/// What becomes of an upgraded connection.
pub enum Succession {
    Continues(Connection<Stream>, Registration),
    /// It cannot be continued, and has to be closed.
    Ends(Box<ReturnedConnection>),
    /// It is closed, because its TLS state could not be extracted.
    Lost,
}

impl ReturnedConnection {
    /// `is_followed`: the frames were followed from the first byte after the head on.
    pub(super) fn new(io: Io, granted: &Granted, frames: Option<Frames>, is_followed: bool) -> Self {
        let Granted { continuation, agreement, endpoint, .. } = granted;
        let replay =
            continuation.take_left().filter(|_| is_followed && continuation.can_move()).and_then(|state| {
                Some(Replay { head: continuation.head()?.clone(), agreement: agreement.clone(), state })
            });
        let was_requested = continuation.is_requested();
        Self { io, endpoint: endpoint.clone(), replay, was_requested, frames }
    }

    pub fn was_requested(&self) -> bool {
        self.was_requested
    }

    /// Sends what the handler has written and TLS has not sent yet. Fails if the client has disconnected, or reads
    /// nothing for as long as the stall limit permits.
    pub async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| Pin::new(&mut self.io).poll_flush(cx)).await
    }

    pub fn handle(&self) -> UpgradeHandle {
        self.io.registration().requests().upgrade_handle()
    }

    /// Takes the connection apart, so that this or another process can continue it.
    pub fn succession(mut self) -> Succession {
        let Some(replay) = self.replay.take_if(|_| self.frames.as_ref().is_none_or(Frames::are_movable))
        else {
            return Succession::Ends(Box::new(self));
        };
        let Some(Parts { stream, registration, tls, unread }) = self.io.into_parts() else {
            return Succession::Lost;
        };
        let unread = match self.frames {
            Some(Frames { inbound, excess, .. }) => join(join(inbound.unread(), excess), unread),
            None => unread,
        };
        let connection = Connection {
            has_duplicate: stream.has_duplicate(),
            client: proxied::reported(&registration),
            socket: stream,
            endpoint: self.endpoint,
            unread,
            http2: None,
            tls,
            replay: Some(Box::new(replay)),
        };
        Succession::Continues(connection, registration)
    }

    /// Closes the connection; a WebSocket with the code 1012, service restart.
    pub async fn close(self) {
        match self.frames {
            Some(Frames { mut inbound, outbound, excess, response: None }) if outbound.may_close() => {
                if inbound.is_closed() || inbound.follow_to_end(&excess) {
                    self.io.refuse(&close(NORMAL)).await;
                } else {
                    close_websocket(self.io, inbound).await;
                }
            }
            _ => self.io.close().await,
        }
    }
}

impl Frames {
    /// Whether no message is cut in two, so that another process can continue.
    fn are_movable(&self) -> bool {
        self.response.is_none() && self.inbound.is_movable() && self.outbound.is_movable()
    }
}
