//! The body of an event stream over HTTP/2, which can continue in another process.

use std::pin::Pin;
use std::task::Context;

use bytes::Bytes;

use super::endless::{BodyTurn, Continuation, EndlessStreams};
use super::header_block::with_last_event_id;
use crate::connection::upgraded::{Events, LastId};
use crate::registry::UpgradeHandle;

/// Follows the events of a response, and stops or ends them when the connection demands it.
pub struct StreamBody {
    streams: EndlessStreams,
    stream: u32,
    /// The header block of the request.
    block: Bytes,
    agreement: Bytes,
    events: Events,
    handle: UpgradeHandle,
    /// Resolves when the response has to end, because the process hands no such stream over.
    must_end: Pin<Box<dyn Future<Output = ()> + Send>>,
    has_to_end: bool,
    /// Whether the handler's stream has ended before.
    has_ended: bool,
}

impl StreamBody {
    pub fn new(
        streams: EndlessStreams,
        stream: u32,
        block: Bytes,
        agreement: Bytes,
        handle: UpgradeHandle,
    ) -> Self {
        let ends = handle.clone();
        let must_end = Box::pin(async move { ends.streams_must_end().await });
        let events = Events::default();
        Self {
            streams,
            stream,
            block,
            agreement,
            events,
            handle,
            must_end,
            has_to_end: false,
            has_ended: false,
        }
    }

    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> BodyTurn {
        self.has_to_end = self.has_to_end || self.must_end.as_mut().poll(cx).is_ready();
        let is_between_events = self.has_ended || self.events.is_between_events();
        if self.has_to_end && is_between_events {
            return BodyTurn::Ends;
        }
        let continuation = || continuation(&self.block, &self.agreement, &self.events);
        match self.streams.poll_body(self.stream, cx, is_between_events, continuation) {
            BodyTurn::Polls(_) if self.has_ended => BodyTurn::Rests,
            turn => turn,
        }
    }

    /// hyper receives `chunk` next.
    pub fn follow(&mut self, chunk: &[u8]) {
        self.streams.gave(self.stream, chunk.len());
        self.events.follow(chunk);
    }

    /// The handler's stream has ended. Returns whether that is the end of the response: a handler may end its stream at
    /// the shutdown, which precedes the handover.
    pub fn end(&mut self) -> bool {
        self.has_ended = true;
        let continues = !self.has_to_end
            && self.handle.is_draining()
            && continuation(&self.block, &self.agreement, &self.events).is_some();
        !continues
    }
}

/// How the next process continues after the last event. None if it could not.
fn continuation(block: &Bytes, agreement: &Bytes, events: &Events) -> Option<Continuation> {
    if !events.is_between_events() {
        return None;
    }
    let block = match events.last_id() {
        LastId::None => block.clone(),
        LastId::Id(id) => with_last_event_id(block, id)?,
        LastId::Unknown => return None,
    };
    Some(Continuation { block, agreement: agreement.clone() })
}
