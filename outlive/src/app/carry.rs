//! [`Carry`]: how the handler of an upgraded connection, such as a WebSocket, leaves its state for the handler of the
//! next process, which continues the same connection.
//!
//! `connection` attaches a [`Continuation`] to each request that offers an upgrade. The handler's [`Carry`] and the IO
//! of the connection (`connection/upgraded`) share it. A request that accepts an event stream has one too, which the body
//! of an [`EventStream`](crate::EventStream) uses.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use axum::extract::FromRequestParts;
use bytes::Bytes;
use bytesize::ByteSize;
use hyper::http::request::Parts;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::app::context::Shutdown;
use crate::os::lock::lock;
use crate::registry::{Demand, UpgradeHandle};
use crate::transport::replay::{Kind, Replay, STATE_LIMIT as LARGEST_STATE};

/// The default limit for an encoded state, in bytes.
const STATE_LIMIT: usize = 64 * 1024;

/// Keeps a WebSocket open when the process is restarted or reloaded. A handler takes it as an argument; `S` is the state
/// that the handler of this process leaves for the handler of the next one.
///
/// When the connection has to move, [`requested`](Self::requested) resolves. The handler then calls
/// [`hand_on`](Self::hand_on) and returns. The next process calls the handler of the same route with the same request,
/// where [`received`](Self::received) returns the state. The client notices nothing: it receives neither a response to
/// that request nor a Close, and no message is lost, repeated or reordered.
///
/// ```
/// use axum::extract::ws::{Message, WebSocketUpgrade};
/// use axum::response::Response;
/// use outlive::Carry;
///
/// #[derive(Default, serde::Serialize, serde::Deserialize)]
/// struct Seat {
///     messages: u64,
/// }
///
/// async fn count(upgrade: WebSocketUpgrade, carry: Carry<Seat>) -> Response {
///     // A state that this release cannot decode is dropped here; the handler could close the WebSocket instead.
///     let mut seat = carry.received().ok().flatten().unwrap_or_default();
///     upgrade.on_upgrade(async move |mut socket| loop {
///         tokio::select! {
///             message = socket.recv() => match message {
///                 Some(Ok(Message::Text(_))) => {
///                     seat.messages += 1;
///                     let answer = Message::Text(seat.messages.to_string().into());
///                     if socket.send(answer).await.is_err() {
///                         return;
///                     }
///                 }
///                 Some(Ok(_)) => {}
///                 Some(Err(_)) | None => return,
///             },
///             () = carry.requested() => return carry.hand_on(&seat),
///         }
///     })
/// }
/// # let _: axum::Router = axum::Router::new().route("/", axum::routing::any(count));
/// ```
///
/// # When the connection is closed instead
///
/// The library closes the WebSocket with the code 1012, service restart (RFC 6455 section 7.4), if it cannot continue,
/// for example because of `--tls-handover no`, an older release as the next process, no file descriptor store, a state
/// above the [limit](Self::limit), or a next process that does not answer the request with the same status and
/// subprotocol within ten seconds. With a store, `systemctl stop` ends the WebSocket without a Close frame, because the
/// process stores it as for a restart, and systemd then empties the store. A handler that has not returned at
/// `--drain-timeout` is cut off. If the process still sends responses after a reload at that time, the handler is cut
/// off at their end.
///
/// # The state
///
/// It is encoded as `MessagePack` with the names of the fields, so a release may add fields that have a
/// `#[serde(default)]`, and leave fields out. Rename a field only together with `#[serde(alias = "old_name")]`. The next
/// process may be an older release, after a rollback.
///
/// # Upgrades to other protocols
///
/// For an upgrade to `websocket` the library knows where a message ends: [`requested`](Self::requested) resolves when the
/// handler's buffer holds no further message, and the library keeps what the handler has read of an incomplete one. So the
/// handler may then return between any two calls of `recv`. For other protocols the library cannot know where a message
/// ends. There a handler may call `hand_on` only when it has consumed all bytes that it has
/// read, and has flushed all that it has written; buffers such as `BufReader` must be empty.
pub struct Carry<S> {
    /// None if the request offers no upgrade and accepts no event stream, or if a unit test has made it.
    continuation: Option<Arc<Continuation>>,
    shutdown: CancellationToken,
    limit: usize,
    state: PhantomData<fn(&S) -> S>,
}

/// The state that the previous process left cannot be decoded as the type of this release.
#[derive(Debug)]
pub struct UnreadableState(rmp_serde::decode::Error);

impl fmt::Display for UnreadableState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not decode the state of a connection from the previous process: {}", self.0)
    }
}

impl std::error::Error for UnreadableState {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

impl<S> fmt::Debug for Carry<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Carry").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl<S> Carry<S> {
    /// For the handler of a connection of [`Setup::serve`](crate::Setup::serve), which begins without a request.
    pub(crate) fn of_socket(continuation: Arc<Continuation>, shutdown: CancellationToken) -> Self {
        Self { continuation: Some(continuation), shutdown, limit: STATE_LIMIT, state: PhantomData }
    }

    /// Sets the largest encoded state, in bytes; the default is 64 KiB, and more than 16 MiB has no effect. A process
    /// holds the states of all connections in memory while it hands them over.
    #[must_use]
    pub fn limit(mut self, bytes: usize) -> Self {
        // The next process refuses a connection with a larger state.
        self.limit = bytes.min(LARGEST_STATE);
        self
    }

    /// Resolves when the handler has to return, because another process continues the connection or the process stops.
    /// It can be called again and again, as in a loop with `tokio::select!`.
    ///
    /// While messages of the client may wait in the buffer of a WebSocket, it does not resolve. So a handler that only sends
    /// has to call `recv` too; otherwise it may be cut off at `--drain-timeout`.
    pub async fn requested(&self) {
        match &self.continuation {
            Some(continuation) => continuation.requested(&self.shutdown).await,
            None => self.shutdown.cancelled().await,
        }
    }
}

impl<S: DeserializeOwned> Carry<S> {
    /// The state that the handler of the previous process left. `None` if the connection is new.
    ///
    /// # Errors
    ///
    /// If the state cannot be decoded as `S`, for example because another release has left it. The handler decides
    /// whether to begin anew or to close the WebSocket.
    pub fn received(&self) -> Result<Option<S>, UnreadableState> {
        let received = self.continuation.as_ref().and_then(|continuation| continuation.received.as_ref());
        // An event stream has no state.
        let received = received.filter(|replay| replay.kind() != Kind::EventStream);
        received.map(|replay| rmp_serde::from_slice(&replay.state)).transpose().map_err(UnreadableState)
    }
}

impl<S: Serialize> Carry<S> {
    /// Leaves `state` for the handler of the next process. The connection moves when the handler drops the WebSocket,
    /// so the handler should return now. Call it only after [`requested`](Self::requested) has resolved, because a
    /// connection that is handed on while no process takes over is closed.
    pub fn hand_on(&self, state: &S) {
        let Some(continuation) = &self.continuation else { return };
        match rmp_serde::to_vec_named(state) {
            Ok(encoded) if encoded.len() <= self.limit => {
                continuation.leave(Left::State(encoded.into()));
                return;
            }
            Ok(encoded) => warn!(
                peer = %continuation.handle.peer(),
                "closing an upgraded connection: its state of {} is above the limit of {}",
                ByteSize(encoded.len() as u64),
                ByteSize(self.limit as u64)
            ),
            Err(error) => warn!(
                peer = %continuation.handle.peer(),
                %error,
                "closing an upgraded connection: could not encode its state as MessagePack"
            ),
        }
        continuation.leave(Left::Invalid);
    }
}

impl<R: Sync, S> FromRequestParts<R> for Carry<S> {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &R) -> Result<Self, Infallible> {
        let continuation = parts.extensions.get::<Arc<Continuation>>().cloned();
        if let Some(continuation) = &continuation {
            continuation.is_claimed.store(true, Release);
        }
        let shutdown = match Shutdown::from_request_parts(parts, state).await {
            Ok(Shutdown(shutdown)) => shutdown,
            // A request of a unit test has no context. No process ends there.
            Err(_) => CancellationToken::new(),
        };
        Ok(Self { continuation, shutdown, limit: STATE_LIMIT, state: PhantomData })
    }
}

/// A request that may have a response without end, and what is needed to continue its connection in the next process.
pub struct Continuation {
    handle: UpgradeHandle,
    /// The head of the request. None if it cannot be answered anew, because it is too large or has a body.
    head: Option<Bytes>,
    /// What the previous process left, if the connection began in another process.
    received: Option<Replay>,
    /// Whether the handler has a [`Carry`].
    is_claimed: AtomicBool,
    /// Whether the connection could be handed over when it was upgraded.
    can_move: AtomicBool,
    /// Whether [`Carry::requested`] has resolved.
    is_requested: AtomicBool,
    /// The wait of the last call of [`Carry::requested`] that was dropped before it resolved. The next call continues it,
    /// because a handler calls it for each message, and to begin a wait costs more than to poll it.
    wait: Mutex<Option<Wait>>,
    /// Whether the handler's buffer may hold messages that it has not consumed. [`Carry::requested`] does not resolve then,
    /// because these messages would be lost.
    has_unconsumed: AtomicBool,
    /// Wakes the tasks that wait in [`Carry::requested`] until the handler has consumed them. There are several if the handler
    /// has split its connection.
    consumed: Notify,
    left: Mutex<Left>,
}

type Wait = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the handler has left for the next one.
#[derive(Default)]
enum Left {
    #[default]
    Nothing,
    State(Bytes),
    /// The state could not be encoded, or was above the limit.
    Invalid,
}

impl Continuation {
    /// For a request that a client has sent to this process.
    pub fn new(handle: UpgradeHandle, head: Option<Bytes>) -> Self {
        Self {
            handle,
            head,
            received: None,
            is_claimed: AtomicBool::new(false),
            can_move: AtomicBool::new(false),
            is_requested: AtomicBool::new(false),
            wait: Mutex::default(),
            has_unconsumed: AtomicBool::new(false),
            consumed: Notify::new(),
            left: Mutex::default(),
        }
    }

    /// For a request that began in another process.
    pub fn resumed(handle: UpgradeHandle, replay: Replay) -> Self {
        Self { received: Some(replay.clone()), ..Self::new(handle, Some(replay.head)) }
    }

    pub fn head(&self) -> Option<&Bytes> {
        self.head.as_ref()
    }

    pub fn received(&self) -> Option<&Replay> {
        self.received.as_ref()
    }

    pub fn is_claimed(&self) -> bool {
        self.is_claimed.load(Acquire)
    }

    /// See [`UpgradeHandle::is_movable`].
    pub fn is_movable(&self) -> bool {
        self.handle.is_movable()
    }

    /// Whether this process can continue the connection of another one. It may be unable to hand it over again.
    pub fn may_continue(&self) -> bool {
        !self.handle.closes_after_response()
    }

    pub fn is_requested(&self) -> bool {
        self.is_requested.load(Acquire)
    }

    /// Waits until an event stream has to end or move.
    pub async fn must_return(&self) {
        let _awaits = self.handle.awaits_handover();
        self.handle.clone().handover_requested().await;
    }

    /// See [`UpgradeHandle::writing`].
    pub fn writing(&self) {
        self.handle.writing();
    }

    /// See [`UpgradeHandle::is_flushed`].
    pub fn is_flushed(&self) -> bool {
        self.handle.is_flushed()
    }

    /// Whether the response has to end or to move. It is `End` instead of `HandOver` if the connection cannot move.
    pub fn demand(&self) -> Demand {
        match self.handle.demand() {
            Demand::HandOver if !self.handle.is_movable() => Demand::End,
            demand => demand,
        }
    }

    /// See [`UpgradeHandle::is_draining`].
    pub fn is_draining(&self) -> bool {
        self.handle.is_draining()
    }

    async fn requested(&self, shutdown: &CancellationToken) {
        if self.can_move() {
            self.handover_requested().await;
            self.consumed().await;
        } else {
            shutdown.cancelled().await;
        }
        self.is_requested.store(true, Release);
    }

    async fn handover_requested(&self) {
        let wait = lock(&self.wait).take();
        let wait = wait.unwrap_or_else(|| Box::pin(self.handle.clone().handover_requested()));
        let mut wait = KeptWait { wait: Some(wait), slot: &self.wait };
        let mut awaits = None;
        poll_fn(|cx| {
            let polled = wait.poll(cx);
            // Only a drain reads this state, and it wakes this task when it begins.
            if polled.is_pending() && !self.handle.is_serving() {
                awaits.get_or_insert_with(|| self.handle.awaits_handover());
            }
            polled
        })
        .await;
    }

    /// Whether the handler may read several messages at once, because no drain has begun.
    pub fn may_read_ahead(&self) -> bool {
        self.handle.is_serving() && !self.is_requested()
    }

    /// The handler has received several messages at once.
    pub fn read_ahead(&self) {
        self.has_unconsumed.store(true, Release);
    }

    /// The handler reads again, so it has consumed all messages.
    pub fn reads_again(&self) {
        if self.has_unconsumed() {
            self.has_unconsumed.store(false, Release);
            self.consumed.notify_waiters();
        }
    }

    pub fn has_unconsumed(&self) -> bool {
        self.has_unconsumed.load(Acquire)
    }

    /// Waits until the handler has consumed all messages.
    async fn consumed(&self) {
        loop {
            // Registers for the notification before the check. Otherwise a read between the check and the wait would be missed.
            let mut notified = pin!(self.consumed.notified());
            notified.as_mut().enable();
            if !self.has_unconsumed() {
                return;
            }
            notified.await;
        }
    }

    /// The upgrade is about to be granted. If the connection cannot move, for example because of `--tls-handover no` or
    /// because the protocol does not permit it, the handler has to return as soon as the process begins to drain.
    pub fn begin(&self, protocol_permits: bool) {
        let can_move = protocol_permits && self.head.is_some() && self.handle.is_movable();
        self.can_move.store(can_move, Release);
    }

    pub fn can_move(&self) -> bool {
        self.can_move.load(Acquire)
    }

    fn leave(&self, left: Left) {
        *lock(&self.left) = left;
    }

    /// Whether the handler had to hand the connection on, or has tried to.
    pub fn has_ended(&self) -> bool {
        self.is_requested() || !matches!(*lock(&self.left), Left::Nothing)
    }

    /// The state that the handler has left. Later calls return None.
    pub fn take_left(&self) -> Option<Bytes> {
        match std::mem::take(&mut *lock(&self.left)) {
            Left::State(state) => Some(state),
            Left::Nothing | Left::Invalid => None,
        }
    }
}

/// A wait that is kept for the next call if it is dropped before it resolves.
struct KeptWait<'a> {
    /// `None` once it has resolved.
    wait: Option<Wait>,
    slot: &'a Mutex<Option<Wait>>,
}

impl KeptWait<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let polled = self.wait.as_mut().map_or(Poll::Ready(()), |wait| wait.as_mut().poll(cx));
        if polled.is_ready() {
            self.wait = None;
        }
        polled
    }
}

impl Drop for KeptWait<'_> {
    fn drop(&mut self) {
        if let Some(wait) = self.wait.take() {
            *lock(self.slot) = Some(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Deserialize;
    use tokio::task::{JoinSet, yield_now};
    use tokio::time::timeout;

    use super::*;
    use crate::registry::{Limits, Phase, Registry};
    use crate::transport::stream::Peer;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Old {
        name: String,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct New {
        name: String,
        #[serde(default)]
        count: u32,
    }

    fn registry() -> Arc<Registry> {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        Registry::new(limits, CancellationToken::new())
    }

    fn handle() -> UpgradeHandle {
        registry().register(Peer::Unix, None).requests().upgrade_handle()
    }

    fn carry<S>(continuation: &Arc<Continuation>) -> Carry<S> {
        Carry {
            continuation: Some(continuation.clone()),
            shutdown: CancellationToken::new(),
            limit: STATE_LIMIT,
            state: PhantomData,
        }
    }

    /// What the next process receives of a state.
    fn handed_on<S: Serialize>(state: &S) -> Option<Arc<Continuation>> {
        let continuation = Arc::new(Continuation::new(handle(), Some(Bytes::new())));
        carry(&continuation).hand_on(state);
        let state = continuation.take_left()?;
        let replay = Replay { head: Bytes::new(), agreement: Bytes::new(), state };
        Some(Arc::new(Continuation::resumed(handle(), replay)))
    }

    #[test]
    fn state_with_more_or_fewer_fields_is_decoded_by_other_releases() {
        let old = Old { name: "x".into() };
        let next = handed_on(&old).expect("the state is small");
        assert_eq!(carry(&next).received().expect("it is valid"), Some(New { name: "x".into(), count: 0 }));
        let next = handed_on(&New { name: "y".into(), count: 7 }).expect("the state is small");
        assert_eq!(carry(&next).received().expect("it is valid"), Some(Old { name: "y".into() }));
    }

    #[test]
    fn state_of_another_type_is_an_error_for_the_handler() {
        let next = handed_on(&vec![1, 2, 3]).expect("the state is small");
        let error = carry::<Old>(&next).received().expect_err("it has another type");
        assert!(error.to_string().starts_with("could not decode the state"), "{error}");
    }

    #[test]
    fn state_above_the_limit_is_not_left() {
        assert!(handed_on(&vec![0_u8; STATE_LIMIT - 3]).is_some());
        assert!(handed_on(&vec![0_u8; STATE_LIMIT]).is_none());
    }

    #[test]
    fn state_that_the_next_process_would_refuse_is_not_left() {
        let continuation = Arc::new(Continuation::new(handle(), Some(Bytes::new())));
        carry(&continuation).limit(usize::MAX).hand_on(&"x".repeat(LARGEST_STATE));
        assert!(continuation.has_ended() && continuation.take_left().is_none());
    }

    #[test]
    fn new_connection_has_received_no_state() {
        let continuation = Arc::new(Continuation::new(handle(), Some(Bytes::new())));
        assert_eq!(carry::<Old>(&continuation).received().expect("there is none"), None);
    }

    /// The two tasks stand for the reader and the writer of a WebSocket that its handler has split.
    #[tokio::test]
    async fn each_task_that_waits_for_the_request_to_move_is_woken() {
        let registry = registry();
        let registration = registry.register(Peer::Unix, None);
        let handle = registration.requests().upgrade_handle();
        let continuation = Arc::new(Continuation::new(handle, Some(Bytes::new())));
        continuation.begin(true);
        continuation.read_ahead();
        registry.set_phase(Phase::Quiescing);
        let mut tasks = JoinSet::new();
        for _ in 0..2 {
            let carry = carry::<Old>(&continuation);
            tasks.spawn(async move { carry.requested().await });
        }
        // Polls both tasks.
        yield_now().await;
        assert!(tasks.try_join_next().is_none(), "messages may be in the buffer");
        continuation.reads_again();
        let woken = timeout(Duration::from_secs(60), tasks.join_all()).await;
        assert_eq!(woken.map(|woken| woken.len()), Ok(2));
    }
}
