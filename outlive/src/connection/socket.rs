//! Connections of a socket whose protocol the application implements ([`Setup::serve`](crate::Setup::serve)).
//!
//! To the registry such a connection is an upgraded one from its first byte on: its handler owns it. If the handler has
//! left its state and drops the [`SocketStream`], the connection returns to the server, and the handler of the next process
//! continues it. There is no request to answer anew, so the [`Replay`] has an empty head.

use std::error::Error;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::FutureExt;
use tracing::{debug, warn};

use super::io::{Io, Wire};
use super::upgraded::Granted;
use super::{Connection, ConnectionContext, Protocol};
use crate::app::carry::Continuation;
use crate::app::sockets::{Duplex, SocketHandler, SocketIo, SocketStream};
use crate::os::lock::lock;
use crate::registry::{Registration, Stage};
use crate::transport::replay::{NO_HEAD, SOCKET};
use crate::transport::stream::Stream;

/// Calls the handler, until it has ended and the connection is closed or returned.
pub(super) async fn serve(
    connection: Connection<Stream>,
    registration: Registration,
    context: &ConnectionContext,
    handler: &SocketHandler,
) {
    let Connection { socket, endpoint, unread, replay, .. } = connection;
    let driver = registration.driver();
    let (handle, peer) = (registration.requests().upgrade_handle(), driver.peer());
    let continuation = match replay {
        Some(replay) => Continuation::resumed(handle, *replay),
        None => Continuation::new(handle, Some(Bytes::from_static(NO_HEAD))),
    };
    let continuation = Arc::new(continuation);
    continuation.begin(true);
    driver.enter(Stage::Upgraded);
    let dropped = Arc::default();
    let granted = Granted {
        continuation: continuation.clone(),
        agreement: Bytes::from_static(SOCKET),
        is_websocket: false,
        endpoint: endpoint.clone(),
        return_path: context.return_path.clone(),
    };
    let io = Io::new(Wire::Left(socket), unread, registration, Protocol::Http1);
    let io = HandedIo { io: Some(io), granted, dropped: Arc::clone(&dropped) };
    let shutdown = context.shutdown.clone();
    let work = async { handler(SocketStream::new(io, peer), continuation, shutdown).await };
    // The panic hook logs a panic.
    if let Ok(Err(error)) = AssertUnwindSafe(work).catch_unwind().await {
        let socket = endpoint.name.as_str();
        if error.chain().any(is_of_client) {
            debug!(socket, %peer, "the handler of a connection failed: {error:#}");
        } else {
            warn!(socket, %peer, "the handler of a connection failed: {error:#}");
        }
    }
    let io = lock(&dropped).take();
    if let Some(io) = io {
        io.close().await;
    }
}

/// Whether a client can cause this error at any time, so that it must not fill the log.
fn is_of_client(error: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof,
    };
    let kind = error.downcast_ref().map(io::Error::kind);
    matches!(
        kind,
        Some(BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut | UnexpectedEof)
    )
}

/// The IO of a connection while a handler has it.
struct HandedIo {
    /// Present until it is dropped.
    io: Option<Io>,
    granted: Granted,
    /// Where it is put when the handler drops it and does not hand it on.
    dropped: Arc<Mutex<Option<Io>>>,
}

impl Drop for HandedIo {
    fn drop(&mut self) {
        let Some(io) = self.io.take() else { return };
        if self.granted.continuation.has_ended() {
            self.granted.give_back(io);
        } else {
            *lock(&self.dropped) = Some(io);
        }
    }
}

impl SocketIo for HandedIo {
    fn io(&mut self) -> Pin<&mut dyn Duplex> {
        let io: &mut Io = self.io.as_mut().expect("the IO is present until it is dropped");
        Pin::<&mut Io>::new(io)
    }
}
