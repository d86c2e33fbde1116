//! Calls the routes for each request of a connection, and reports the progress of the request to the registry.
//!
//! [`Service`] is what hyper calls. For each request it holds a [`RequestGuard`], which keeps the request in flight until
//! the response body is dropped; a [`BodyGuard`] does the same for the request body. A connection becomes quiescent only
//! when both have ended, because the next process cannot continue a request.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::IntoResponse;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, HeaderName, HeaderValue, SEC_WEBSOCKET_EXTENSIONS,
    UPGRADE,
};
use hyper::http::Extensions;
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};
use memchr::memmem;
use pin_project_lite::pin_project;

use super::Endpoint;
use super::body_chunks::{CHUNK, ChunkedBody};
use super::http2::{
    Begun, BodyTurn, Content, EndingCall, EndlessStreams, KeptBody, Messages, STREAM_FIELD, StreamBody,
};
use super::upgraded::{EventBody, EventTurn, Events, Granted, ReturnPath, Upgrade};
use crate::app::carry::Continuation;
use crate::app::context::RequestContext;
use crate::app::event_stream::IsEventStream;
use crate::app::resumable::{Resumable, Resumed};
use crate::registry::{BodyEnd, BodyGuard, RequestGuard, RequestHandle, UpgradeHandle};
use crate::requests::{self, CountedBefore, Proxies, Routes};
use crate::transport::replay::{self, Replay};
use crate::transport::stream::Peer;

/// The hyper service of one connection: it calls the routes and registers each request.
pub(super) struct Service {
    routes: RefCell<Routes>,
    context: Arc<RequestContext>,
    /// The context in a map of extensions. Each request adds a clone of it to its own map, at half the cost of an
    /// insertion.
    extensions: Extensions,
    requests: RequestHandle,
    endpoint: Arc<Endpoint>,
    upgrade: Upgrade,
    return_path: ReturnPath,
    /// The request that began the connection in another process, until it is answered anew.
    replay: Cell<Option<Box<Replay>>>,
    /// Present for HTTP/2.
    streams: Option<EndlessStreams>,
    /// Present if the peer of the connection is a proxy that reports the client of each request.
    proxies: Option<Arc<Proxies>>,
}

impl Service {
    pub(super) fn new(
        endpoint: Arc<Endpoint>,
        context: RequestContext,
        requests: RequestHandle,
        return_path: ReturnPath,
        replay: Option<Box<Replay>>,
        proxies: Option<Arc<Proxies>>,
    ) -> Self {
        let context = Arc::new(context);
        let mut extensions = Extensions::new();
        extensions.insert(context.clone());
        Self {
            routes: endpoint.routes.clone().into(),
            context,
            extensions,
            requests,
            endpoint,
            upgrade: Upgrade::default(),
            return_path,
            replay: replay.into(),
            streams: None,
            proxies,
        }
    }

    /// The client that a proxy reports for a request. None if it is the peer of the connection.
    fn reported_client(&self, headers: &HeaderMap) -> Option<Peer> {
        let peer = self.context.peer;
        let client = self.proxies.as_ref()?.client_of(peer, headers);
        (client != peer).then_some(client)
    }

    /// The service of an HTTP/2 connection.
    pub(super) fn with_streams(self, streams: EndlessStreams) -> Self {
        Self { streams: Some(streams), ..self }
    }

    /// What this service, the driver and the IO of the connection know about upgrades.
    pub(super) fn upgrade(&self) -> Upgrade {
        self.upgrade.clone()
    }

    /// The head of the request that has to be answered anew, and what its response is.
    pub(super) fn replayed(&self) -> Option<(Bytes, replay::Kind)> {
        let replay = self.replay.take();
        let replayed = replay.as_ref().map(|replay| (replay.head.clone(), replay.kind()));
        self.replay.set(replay);
        replayed
    }

    /// What a request offers besides a response that ends. `body`: whether the request has one.
    fn offered(&self, head: &mut Parts, body: bool) -> Option<Box<Offered>> {
        if let Some(streams) = &self.streams {
            return self.offered_stream(streams, head);
        }
        let replay = self.replay.take();
        let prepared = head.extensions.get::<OnUpgrade>().cloned();
        let accepts_events = !body && accepts_events(head);
        if prepared.is_none() && replay.is_none() && !accepts_events {
            return None;
        }
        let handle = self.requests.upgrade_handle();
        let continuation = Arc::new(match replay {
            Some(replay) => Continuation::resumed(handle, *replay),
            // The next process would wait for the body, which the client has sent long ago.
            None => Continuation::new(handle, replay::head_of(head).filter(|_| !body)),
        });
        let upgrade = self.upgrade.clone();
        Some(Box::new(match prepared {
            Some(prepared) => Offered::Upgrade(OfferedUpgrade {
                prepared,
                upgrade,
                is_websocket: head.headers.get(UPGRADE).is_some_and(is_websocket),
                accepts_events,
                continuation,
                endpoint: self.endpoint.clone(),
                return_path: self.return_path.clone(),
            }),
            None => Offered::Events { continuation, upgrade },
        }))
    }

    /// As [`Service::offered`], for HTTP/2. Removes the field that the interposer has appended to the request.
    fn offered_stream(&self, streams: &EndlessStreams, head: &mut Parts) -> Option<Box<Offered>> {
        // The client may have sent such a field too; the interposer's is the last one.
        let number = head.headers.get_all(STREAM_NUMBER).iter().next_back()?.clone();
        head.headers.remove(STREAM_NUMBER);
        let stream = number.to_str().ok()?.parse().ok()?;
        let begun = streams.request(stream)?;
        if begun != Begun::Here {
            // An older id may precede the one with which this process continues (`header_block.rs`).
            let last = head.headers.get_all(LAST_EVENT_ID).iter().next_back().cloned();
            last.and_then(|last| head.headers.insert(LAST_EVENT_ID, last));
        }
        let body = match &begun {
            // A call in gRPC; the others are event streams, whose requests have no body.
            Begun::Here if head.method == Method::POST => Some(KeptBody::default()),
            Begun::Elsewhere { body, messages, .. } if head.method == Method::POST => {
                head.extensions.insert(Resumed { messages: *messages });
                Some(KeptBody::whole(body))
            }
            Begun::Here | Begun::Elsewhere { .. } => None,
        };
        let handle = self.requests.upgrade_handle();
        let streams = streams.clone();
        Some(Box::new(Offered::Stream(OfferedStream { streams, stream, begun, body, handle })))
    }
}

/// [`STREAM_FIELD`] as a name that need not be parsed for each request.
const STREAM_NUMBER: HeaderName = HeaderName::from_static(STREAM_FIELD);
/// The field with the id of the last event that a client has received (HTML standard section 9.2.4).
const LAST_EVENT_ID: &str = "last-event-id";
/// The media type of an event stream (HTML standard section 9.2.5).
const EVENT_STREAM: &[u8] = b"text/event-stream";

/// Whether the response to a request may be an event stream that can be continued. With HTTP/1.0 the end of the
/// connection would be the end of the response.
fn accepts_events(head: &Parts) -> bool {
    // Most values are shorter, and a search takes more time than the other checks together.
    let accepts = |value: &HeaderValue| {
        value.len() >= EVENT_STREAM.len() && memmem::find(value.as_bytes(), EVENT_STREAM).is_some()
    };
    head.method == Method::GET
        && head.version == Version::HTTP_11
        // A scan, as in `requests::request_id`.
        && head.headers.iter().any(|(name, value)| *name == ACCEPT && accepts(value))
}

/// What a request offers besides a response that ends.
enum Offered {
    Upgrade(OfferedUpgrade),
    Events { continuation: Arc<Continuation>, upgrade: Upgrade },
    Stream(OfferedStream),
}

impl Offered {
    /// The stream, if the request is a call in gRPC: the next process may need its body again.
    fn call(&self) -> Option<&OfferedStream> {
        match self {
            Self::Stream(offered) if offered.body.is_some() => Some(offered),
            Self::Stream(_) | Self::Upgrade(_) | Self::Events { .. } => None,
        }
    }

    /// Whether the request began in another process.
    fn is_replay(&self) -> bool {
        match self {
            Self::Stream(offered) => offered.begun != Begun::Here,
            Self::Upgrade(_) | Self::Events { .. } => {
                self.continuation().is_some_and(|continuation| continuation.received().is_some())
            }
        }
    }

    /// What the handler's [`Carry`](crate::Carry) uses. None for HTTP/2, which has no upgrades.
    fn continuation(&self) -> Option<&Arc<Continuation>> {
        match self {
            Self::Upgrade(offered) => Some(&offered.continuation),
            Self::Events { continuation, .. } => Some(continuation),
            Self::Stream(_) => None,
        }
    }

    /// Returns what hyper has to send in the place of `response`, and what follows the events in its body.
    fn decide(self, response: Response<Body>, connects: bool) -> (Response<Body>, Option<Following>) {
        match self {
            Self::Upgrade(offered) if offered.accepts_events && !grants_upgrade(&response, connects) => {
                offered.upgrade.keep_declined(offered.prepared);
                decide_on_events(offered.continuation, offered.upgrade, response)
            }
            Self::Upgrade(offered) => (offered.decide(response, connects), None),
            Self::Events { continuation, upgrade } => decide_on_events(continuation, upgrade, response),
            Self::Stream(offered) => offered.decide(response),
        }
    }
}

/// Whether a response is an event stream that another process could continue.
fn is_event_stream(response: &Response<Body>) -> bool {
    response.extensions().get::<IsEventStream>().is_some()
        && response.status() == StatusCode::OK
        && !response.headers().contains_key(CONTENT_LENGTH)
        // An encoder such as gzip has state that cannot be handed over.
        && !response.headers().contains_key(CONTENT_ENCODING)
}

fn decide_on_events(
    continuation: Arc<Continuation>,
    upgrade: Upgrade,
    response: Response<Body>,
) -> (Response<Body>, Option<Following>) {
    let received = continuation.received();
    let may_continue =
        if received.is_some() { continuation.may_continue() } else { continuation.is_movable() };
    let is_event_stream = is_event_stream(&response) && may_continue;
    let agreement = replay::agreement_of_events(response.headers());
    if let Some(replay) = received {
        if !is_event_stream || replay.agreement != agreement {
            upgrade.refuse();
            return (StatusCode::SERVICE_UNAVAILABLE.into_response(), None);
        }
        upgrade.accept();
    }
    let moving = || Following::Connection(Box::new(EventBody::moving(continuation, agreement, upgrade)));
    let events = is_event_stream.then(moving);
    (response, events)
}

/// An HTTP/2 stream whose response may have no end.
struct OfferedStream {
    streams: EndlessStreams,
    stream: u32,
    begun: Begun,
    /// The body of a call in gRPC.
    body: Option<KeptBody>,
    handle: UpgradeHandle,
}

impl OfferedStream {
    fn decide(self, response: Response<Body>) -> (Response<Body>, Option<Following>) {
        let Self { streams, stream, begun, body, handle } = self;
        let (is_endless, agreement, content) = match body {
            None => {
                let agreement = replay::agreement_of_events(response.headers());
                (is_event_stream(&response), agreement, Content::Events(Events::default()))
            }
            Some(body) => {
                let is_endless =
                    response.extensions().get::<Resumable>().is_some() && response.status() == StatusCode::OK;
                let agreement = replay::agreement_of_grpc(response.headers());
                let messages = match &begun {
                    Begun::Here => 0,
                    Begun::Elsewhere { messages, .. } => *messages,
                };
                (is_endless, agreement, Content::Grpc(Messages::after(messages), body))
            }
        };
        let is_replay = begun != Begun::Here;
        let is_continued = match &begun {
            Begun::Here => true,
            Begun::Elsewhere { agreement: expected, .. } => *expected == agreement,
        };
        if !is_endless || !is_continued {
            streams.end(stream);
            // The interposer discards the head of this response, and ends the stream.
            let response = if is_replay { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { response };
            return (response, None);
        }
        let Some(block) = streams.open(stream) else { return (response, None) };
        let body = StreamBody::new(streams, stream, block, agreement, content, handle);
        (response, Some(Following::Stream(Box::new(body))))
    }
}

/// What follows the events of a response.
enum Following {
    /// The response moves with its HTTP/1.1 connection, or ends.
    Connection(Box<EventBody>),
    /// The response moves with its HTTP/2 connection.
    Stream(Box<StreamBody>),
    /// The response of a gRPC server cannot move, and ends when the process drains.
    Call(Box<EndingCall>),
}

fn is_websocket(protocol: &HeaderValue) -> bool {
    protocol.as_bytes().eq_ignore_ascii_case(b"websocket")
}

/// An upgrade that a request offers.
struct OfferedUpgrade {
    /// What hyper has prepared for it.
    prepared: OnUpgrade,
    upgrade: Upgrade,
    is_websocket: bool,
    /// Whether the response may be an event stream, if it declines the upgrade. Some clients offer one with each request.
    accepts_events: bool,
    continuation: Arc<Continuation>,
    endpoint: Arc<Endpoint>,
    return_path: ReturnPath,
}

impl OfferedUpgrade {
    /// Tells the driver and the IO of the connection whether `response` grants the upgrade. Returns what hyper has to
    /// send: another response if this one does not continue a connection that began in another process.
    fn decide(self, response: Response<Body>, connects: bool) -> Response<Body> {
        let Self { prepared, upgrade, is_websocket, continuation, endpoint, return_path, .. } = self;
        let agreement = replay::agreement(response.headers());
        let is_granted = grants_upgrade(&response, connects);
        // An extension such as permessage-deflate has state that cannot be handed over.
        let is_extended = response.headers().contains_key(SEC_WEBSOCKET_EXTENSIONS);
        let is_carried = is_granted && continuation.is_claimed();
        // A connection that has to close after its next response cannot become a WebSocket again.
        let is_continued = continuation
            .received()
            .is_none_or(|replay| is_carried && replay.agreement == agreement && continuation.may_continue());
        if !is_continued {
            upgrade.refuse();
        }
        if !is_granted {
            upgrade.keep_declined(prepared);
        } else if is_continued && is_carried {
            upgrade.accept();
            continuation.begin(!is_extended);
            upgrade.grant(Granted { continuation, agreement, is_websocket, endpoint, return_path });
        }
        if is_continued { response } else { StatusCode::SERVICE_UNAVAILABLE.into_response() }
    }
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn call(&self, request: Request<Incoming>) -> ResponseFuture {
        let (mut head, body) = request.into_parts();
        let mut guard = self.requests.begin(&head.uri);
        let connects = head.method == Method::CONNECT;
        let version = head.version;
        // Called once, because it locks a mutex for HTTP/2.
        let is_empty = body.is_end_stream();
        let offered = self.offered(&mut head, !is_empty);
        if let Some(continuation) = offered.as_deref().and_then(Offered::continuation) {
            head.extensions.insert(continuation.clone());
        }
        if offered.as_deref().is_some_and(Offered::is_replay) {
            guard.was_counted_before();
            head.extensions.insert(CountedBefore);
        }
        match self.reported_client(&head.headers) {
            Some(peer) => {
                guard.identify(peer);
                let context = RequestContext { peer, ..RequestContext::clone(&self.context) };
                head.extensions.insert(Arc::new(context));
            }
            None => head.extensions.extend(self.extensions.clone()),
        }
        let body = request_body(&guard, body, is_empty, offered.as_deref().and_then(Offered::call));
        let future = self.routes.borrow_mut().answer(head, body);
        ResponseFuture { future, guard: Some(guard), connects, version, offered }
    }
}

pin_project! {
    /// Resolves to the response of one request.
    pub(super) struct ResponseFuture {
        #[pin]
        future: requests::ResponseFuture,
        guard: Option<RequestGuard>,
        connects: bool,
        version: Version,
        // Boxed, because few requests have one; see `requests::ResponseFuture`.
        offered: Option<Box<Offered>>,
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let guard = this.guard.as_mut().expect("the future is not polled after it has resolved");
        let Poll::Ready(mut response) = this.future.poll(cx, guard.in_flight()) else {
            guard.track();
            return Poll::Pending;
        };
        let guard = this.guard.take().expect("it was present above");
        let mut events = None;
        if let Some(offered) = this.offered.take() {
            (response, events) = offered.decide(response, *this.connects);
        }
        if events.is_none() && response.extensions().get::<IsEventStream>().is_some() {
            let is_encoded = response.headers().contains_key(CONTENT_ENCODING);
            let ending = EventBody::ending(guard.upgrade_handle(), is_encoded);
            events = Some(Following::Connection(Box::new(ending)));
        } else if events.is_none() && response.extensions().get::<Resumable>().is_some() {
            events = Some(Following::Call(Box::new(EndingCall::new(guard.upgrade_handle()))));
        }
        Poll::Ready(Ok(answer(guard, response, events, *this.connects, *this.version)))
    }
}

/// Whether the connection leaves HTTP after `response` (RFC 9110 sections 9.3.6 and 15.2.2).
fn grants_upgrade(response: &Response<Body>, connects: bool) -> bool {
    response.status() == StatusCode::SWITCHING_PROTOCOLS || (connects && response.status().is_success())
}

/// The body of a request for its handler. None if the request has no body. `is_empty`: the client sends no
/// body here. `call`: present for a call in gRPC, whose body may have arrived in another process.
fn request_body(
    guard: &RequestGuard,
    body: Incoming,
    is_empty: bool,
    call: Option<&OfferedStream>,
) -> Option<RequestBody> {
    let former = match call.map(|call| &call.begun) {
        Some(Begun::Elsewhere { body, .. }) => Some(body.clone()),
        Some(Begun::Here) | None => None,
    };
    let kept = call.filter(|_| former.is_none()).and_then(|call| call.body.clone());
    let is_empty = is_empty && former.is_none();
    (!is_empty).then(|| RequestBody { body, former, kept, reading: Some(guard.begin_body()) })
}

/// Prepares the handler's response for hyper. `connects`: the method of the request was CONNECT.
fn answer(
    mut guard: RequestGuard,
    mut response: Response<Body>,
    events: Option<Following>,
    connects: bool,
    version: Version,
) -> Response<ResponseBody> {
    let upgrades = grants_upgrade(&response, connects);
    if version == Version::HTTP_2 {
        // HTTP/2 has GOAWAY instead of `Connection: close`. The request is tracked now, because hyper may not poll the
        // body for a long time if the client's windows are full.
        guard.track();
        if matches!(events, Some(Following::Stream(_))) {
            guard.await_handover();
        }
    } else if upgrades {
        guard.upgrade();
    } else if guard.must_close() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let window = (version == Version::HTTP_2).then(|| Box::new(ChunkedBody::new(&guard)));
    response.map(|body| ResponseBody { body, guard, window, events })
}

pin_project! {
    struct RequestBody {
        #[pin]
        body: Incoming,
        // The body of a request that began in another process, until it is read.
        former: Option<Bytes>,
        // Present if the next process may need the body again.
        kept: Option<KeptBody>,
        // None once the end was read: a handler may keep the body for longer, which must not keep the connection busy.
        reading: Option<BodyGuard>,
    }
}

pin_project! {
    /// The body of a response. Its request is in flight until this is dropped.
    pub(super) struct ResponseBody {
        #[pin]
        body: Body,
        guard: RequestGuard,
        // Present for HTTP/2 only; boxed, so that HTTP/1.1 responses stay small.
        window: Option<Box<ChunkedBody>>,
        // Present for an event stream.
        events: Option<Following>,
    }
}

/// The response continues in another process.
#[derive(Debug)]
struct MovedOn;

impl std::fmt::Display for MovedOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the response continues in another process")
    }
}

impl std::error::Error for MovedOn {}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut this = self.project();
        // The body is whole or has failed. hyper would report an error here if the connection was parked or handed over since.
        if this.reading.is_none() {
            return Poll::Ready(None);
        }
        let frame = match this.former.take() {
            Some(former) => Some(Ok(Frame::data(former))),
            None => std::task::ready!(this.body.as_mut().poll_frame(cx)),
        };
        let is_whole = frame.is_none() || this.body.is_end_stream();
        if let Some(kept) = this.kept {
            if let Some(Ok(frame)) = &frame
                && let Some(data) = frame.data_ref()
            {
                kept.add(data);
            }
            if is_whole {
                kept.end();
            }
        }
        if is_whole || matches!(frame, Some(Err(_))) {
            if let Some(reading) = this.reading {
                reading.end = if is_whole { BodyEnd::Whole } else { BodyEnd::Unread };
            }
            *this.reading = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.former.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.former {
            Some(former) => SizeHint::with_exact(former.len() as u64),
            None => self.body.size_hint(),
        }
    }
}

impl Following {
    /// hyper receives `chunk` next.
    fn follow(&mut self, chunk: &[u8]) {
        match self {
            Self::Connection(events) => events.follow(chunk),
            Self::Stream(events) => events.follow(chunk),
            Self::Call(call) => call.follow(chunk),
        }
    }

    /// The handler's stream has ended. Returns whether that is the end of the response.
    fn end(&mut self) -> bool {
        match self {
            Self::Connection(events) => events.end(),
            Self::Stream(events) => events.end(),
            Self::Call(_) => true,
        }
    }
}

impl ResponseBody {
    /// See [`ChunkedBody::buffered`].
    fn buffered(&self) -> u64 {
        self.window.as_ref().map_or(0, |window| window.buffered())
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut this = self.project();
        let mut limit = CHUNK;
        match this.events {
            None => {}
            Some(Following::Connection(events)) => match events.poll_turn(cx) {
                EventTurn::Polls => {}
                EventTurn::Waits => return Poll::Pending,
                // An error makes hyper stop without a byte, where the end of the body would end the response.
                EventTurn::Moves => return Poll::Ready(Some(Err(axum::Error::new(MovedOn)))),
                EventTurn::Ends => return Poll::Ready(None),
            },
            Some(Following::Stream(events)) => match events.poll_turn(cx) {
                BodyTurn::Polls(room) => limit = room,
                BodyTurn::Rests => {
                    if let Some(window) = this.window {
                        window.rest();
                    }
                    return Poll::Pending;
                }
                BodyTurn::WaitsForWindow => return Poll::Pending,
                BodyTurn::Ends => return Poll::Ready(events.last_frame().map(Ok)),
            },
            Some(Following::Call(call)) => match call.poll_turn(cx) {
                BodyTurn::Ends => return Poll::Ready(call.last_frame().map(Ok)),
                BodyTurn::Polls(_) | BodyTurn::Rests | BodyTurn::WaitsForWindow => {}
            },
        }
        let frame = match this.window {
            Some(window) => window.poll_chunk(this.body.as_mut(), cx, this.guard, limit),
            None => this.body.as_mut().poll_frame(cx),
        };
        if !matches!(frame, Poll::Ready(None)) && !this.body.is_end_stream() {
            this.guard.track();
        }
        if let Some(events) = this.events {
            match &frame {
                Poll::Ready(Some(Ok(frame))) => events.follow(frame.data_ref().map_or(&[][..], |data| data)),
                // `poll_turn` has stored the waker above, for the request to move.
                Poll::Ready(None) if !events.end() => return Poll::Pending,
                Poll::Ready(_) | Poll::Pending => {}
            }
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream() && self.buffered() == 0
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.body.size_hint();
        let mut all = SizeHint::new();
        if let Some(upper) = rest.upper() {
            all.set_upper(upper + self.buffered());
        }
        all.set_lower(rest.lower() + self.buffered());
        all
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt;
    use hyper::Uri;
    use tokio_util::sync::CancellationToken;

    use super::super::body_chunks::CHUNK;
    use super::*;
    use crate::registry::{DriverHandle, Limits, Registry};
    use crate::transport::stream::Peer;

    fn answer(version: Version, body: Vec<u8>) -> (DriverHandle, ResponseBody) {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registration = Registry::new(limits, CancellationToken::new()).register(Peer::Unix, None);
        let guard = registration.requests().begin(&Uri::from_static("/"));
        let response = super::answer(guard, Response::new(Body::from(body)), None, false, version);
        (registration.driver(), response.into_body())
    }

    #[tokio::test]
    async fn http2_response_is_in_flight_until_all_but_its_last_chunk_is_taken() {
        let whole: Vec<u8> = (0..=CHUNK * 2).map(|number| number.to_le_bytes()[0]).collect();
        let (driver, mut body) = answer(Version::HTTP_2, whole.clone());
        let mut taken = Vec::new();
        while !body.is_end_stream() {
            assert!(driver.state().is_in_flight());
            assert_eq!(body.size_hint().exact(), Some((whole.len() - taken.len()) as u64));
            let chunk = body.frame().await.expect("a chunk").expect("no error").into_data().expect("data");
            assert!(chunk.len() <= CHUNK, "{}", chunk.len());
            taken.extend(chunk);
        }
        assert_eq!(taken, whole);
        drop(body);
        assert!(!driver.state().is_in_flight());
    }

    #[tokio::test]
    async fn http1_response_body_is_not_split() {
        let (_, mut body) = answer(Version::HTTP_11, vec![0; CHUNK * 2]);
        let chunk = body.frame().await.expect("a chunk").expect("no error").into_data().expect("data");
        assert_eq!(chunk.len(), CHUNK * 2);
    }
}
