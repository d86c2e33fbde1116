//! The body of a response without end over HTTP/2, which can continue in another process.

use std::pin::Pin;
use std::task::Context;

use bytes::Bytes;
use http_body::Frame;

use super::endless::{BodyTurn, Continuation, EndlessStreams};
use super::grpc::{KeptBody, Messages, unavailable};
use super::header_block::with_last_event_id;
use crate::connection::upgraded::{Events, LastId};
use crate::registry::UpgradeHandle;

/// Follows a response, and stops or ends it when the connection demands it.
pub struct StreamBody {
    streams: EndlessStreams,
    stream: u32,
    /// The header block of the request.
    block: Bytes,
    agreement: Bytes,
    content: Content,
    handle: UpgradeHandle,
    /// Resolves when the response has to end, because the process hands no such stream over.
    must_end: Pin<Box<dyn Future<Output = ()> + Send>>,
    has_to_end: bool,
    /// Whether the handler's stream has ended before.
    has_ended: bool,
    /// Whether the library has ended the response.
    is_over: bool,
}

/// What the response consists of.
pub enum Content {
    Events(Events),
    /// The messages of a gRPC server. The next process needs the body of the request.
    Grpc(Messages, KeptBody),
}

impl StreamBody {
    pub fn new(
        streams: EndlessStreams,
        stream: u32,
        block: Bytes,
        agreement: Bytes,
        content: Content,
        handle: UpgradeHandle,
    ) -> Self {
        let ends = handle.clone();
        let must_end = Box::pin(async move { ends.streams_must_end().await });
        Self {
            streams,
            stream,
            block,
            agreement,
            content,
            handle,
            must_end,
            has_to_end: false,
            has_ended: false,
            is_over: false,
        }
    }

    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> BodyTurn {
        self.has_to_end = self.has_to_end || self.must_end.as_mut().poll(cx).is_ready();
        let is_whole = self.has_ended || self.content.is_whole();
        if self.is_over || self.has_to_end && is_whole {
            return BodyTurn::Ends;
        }
        let continuation = || self.content.continuation(&self.block, &self.agreement);
        match self.streams.poll_body(self.stream, cx, is_whole, continuation) {
            BodyTurn::Polls(_) if self.has_ended => BodyTurn::Rests,
            turn => turn,
        }
    }

    /// hyper receives `chunk` next.
    pub fn follow(&mut self, chunk: &[u8]) {
        self.streams.gave(self.stream, chunk.len());
        match &mut self.content {
            Content::Events(events) => events.follow(chunk),
            Content::Grpc(messages, _) => messages.follow(chunk),
        }
    }

    /// The handler's stream has ended. Returns whether that is the end of the response: the handler of an event stream may
    /// end it at the shutdown, which precedes the handover. In gRPC the trailers have been sent.
    pub fn end(&mut self) -> bool {
        self.has_ended = true;
        let continues = matches!(self.content, Content::Events(_))
            && !self.has_to_end
            && self.handle.is_draining()
            && self.content.continuation(&self.block, &self.agreement).is_some();
        !continues
    }

    /// The last frame of a response that has to end. None if it ends without one.
    pub fn last_frame(&mut self) -> Option<Frame<Bytes>> {
        if std::mem::replace(&mut self.is_over, true) || matches!(self.content, Content::Events(_)) {
            return None;
        }
        Some(unavailable())
    }
}

impl Content {
    /// Whether no event or message was sent only in part.
    fn is_whole(&self) -> bool {
        match self {
            Self::Events(events) => events.is_between_events(),
            Self::Grpc(messages, _) => messages.is_between_messages(),
        }
    }

    /// How the next process continues. None if it could not.
    fn continuation(&self, block: &Bytes, agreement: &Bytes) -> Option<Continuation> {
        if !self.is_whole() {
            return None;
        }
        let (block, body, messages) = match self {
            Self::Events(events) => match events.last_id() {
                LastId::None => (block.clone(), Bytes::new(), 0),
                LastId::Id(id) => (with_last_event_id(block, id)?, Bytes::new(), 0),
                LastId::Unknown => return None,
            },
            Self::Grpc(messages, body) => (block.clone(), body.get()?, messages.count()),
        };
        Some(Continuation { block, agreement: agreement.clone(), body, messages })
    }
}
