//! The events of a response that continues in the next process (`text/event-stream`, HTML standard section 9.2).

use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Sleep, sleep};

use super::Upgrade;
use crate::app::carry::Continuation;
use crate::registry::{Demand, UpgradeHandle};
use crate::transport::replay::{Replay, with_last_event_id};

/// How soon to look again whether the last event is sent. hyper does not poll a body again when it has sent its last
/// chunk.
const FLUSH_INTERVAL: Duration = Duration::from_millis(2);
/// The longest line that is looked at, in bytes. An id that is longer cannot be sent as `Last-Event-ID`.
const LINE_LIMIT: usize = 4096;

type MustReturn = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Follows the events of a response, and ends or moves it when its handler has to return.
pub(in crate::connection) struct EventBody {
    /// None if the response cannot move.
    continuation: Option<Movable>,
    must_return: MustReturn,
    /// Whether `must_return` has resolved.
    is_requested: bool,
    flushed: Option<Pin<Box<Sleep>>>,
    /// Whether the handler's stream has ended before.
    has_ended: bool,
    /// None if the events cannot be followed, because they are encoded.
    events: Option<Events>,
}

struct Movable {
    continuation: Arc<Continuation>,
    agreement: Bytes,
    upgrade: Upgrade,
}

fn must_return(continuation: &Arc<Continuation>) -> MustReturn {
    let continuation = continuation.clone();
    Box::pin(async move { continuation.must_return().await })
}

/// What the body of an event stream does next.
pub(in crate::connection) enum Turn {
    /// The handler's stream can be polled.
    Polls,
    /// The last event is not sent yet, or the handler's stream has ended before the request to move.
    Waits,
    /// The connection moves now. The driver has to take it from hyper, which must not end the body.
    Moves,
    /// The response ends, because the connection cannot move.
    Ends,
}

impl EventBody {
    /// For a response that moves when the phase hands connections over.
    pub(in crate::connection) fn moving(
        continuation: Arc<Continuation>,
        agreement: Bytes,
        upgrade: Upgrade,
    ) -> Self {
        // hyper asks for the first event before it writes the head.
        continuation.writing();
        let must_return = must_return(&continuation);
        Self::new(Some(Movable { continuation, agreement, upgrade }), must_return, Some(Events::default()))
    }

    /// For a response that ends when the process drains, after a whole event unless the response is encoded.
    pub(in crate::connection) fn ending(handle: UpgradeHandle, is_encoded: bool) -> Self {
        let events = (!is_encoded).then(Events::default);
        Self::new(None, Box::pin(async move { handle.drains().await }), events)
    }

    fn new(continuation: Option<Movable>, must_return: MustReturn, events: Option<Events>) -> Self {
        Self { continuation, must_return, is_requested: false, flushed: None, has_ended: false, events }
    }

    pub(in crate::connection) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Turn {
        if !self.poll_request(cx) {
            return if self.has_ended { Turn::Waits } else { Turn::Polls };
        }
        if !self.has_ended && !self.events.as_ref().is_none_or(Events::is_between_events) {
            return Turn::Polls;
        }
        let Some(movable) = &self.continuation else { return Turn::Ends };
        if !movable.continuation.is_flushed() {
            loop {
                let flushed = self.flushed.get_or_insert_with(|| Box::pin(sleep(FLUSH_INTERVAL)));
                if flushed.as_mut().poll(cx).is_pending() {
                    return Turn::Waits;
                }
                self.flushed = None;
            }
        }
        match (movable.continuation.demand(), self.replay(movable)) {
            (Demand::HandOver, Some(replay)) => {
                movable.upgrade.hand_on(replay);
                Turn::Moves
            }
            (Demand::None, _) => {
                // The phase went back to `Draining` after `poll_request` had read it. The next poll resets the request.
                cx.waker().wake_by_ref();
                Turn::Waits
            }
            (Demand::HandOver | Demand::End, _) => Turn::Ends,
        }
    }

    /// Whether the response has to end or move now.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> bool {
        if self.is_requested
            && let Some(Movable { continuation, .. }) = &self.continuation
            && continuation.demand() == Demand::None
        {
            // The drain has not succeeded, and has gone back to `Draining`.
            (self.is_requested, self.must_return) = (false, must_return(continuation));
        }
        self.is_requested = self.is_requested || self.must_return.as_mut().poll(cx).is_ready();
        self.is_requested
    }

    /// The handler's stream has ended. Returns whether that is the end of the response: a handler may end its stream at
    /// the shutdown, which precedes the request to move. A response that cannot move ends at once.
    pub(in crate::connection) fn end(&mut self) -> bool {
        self.has_ended = true;
        let continues =
            |movable: &Movable| movable.continuation.is_draining() && self.replay(movable).is_some();
        !self.continuation.as_ref().is_some_and(continues)
    }

    /// hyper receives `chunk` next.
    pub(in crate::connection) fn follow(&mut self, chunk: &[u8]) {
        // hyper asks for more before it writes this chunk, so without this the chunk would count as sent.
        if let Some(movable) = &self.continuation {
            movable.continuation.writing();
        }
        if let Some(events) = &mut self.events {
            events.follow(chunk);
        }
    }

    /// What the next process needs. None if it could not begin after the last event.
    fn replay(&self, movable: &Movable) -> Option<Replay> {
        let events = self.events.as_ref().filter(|events| events.is_between_events())?;
        let head = movable.continuation.head()?;
        let head = match &events.last_id {
            LastId::None => head.clone(),
            LastId::Id(id) => with_last_event_id(head, id)?,
            LastId::Unknown => return None,
        };
        Some(Replay { head, agreement: movable.agreement.clone(), state: Bytes::new() })
    }
}

/// The id of the last event.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::connection) enum LastId {
    /// No event has data so far.
    #[default]
    None,
    Id(Vec<u8>),
    /// The last event has data and no id, so the next process could not begin after it.
    Unknown,
}

/// The lines of an event stream so far.
#[derive(Default)]
pub(in crate::connection) struct Events {
    /// The beginning of the current line, up to [`LINE_LIMIT`] bytes.
    line: Vec<u8>,
    /// Whether the last line ended with a carriage return, so that a line feed belongs to its end.
    ends_with_cr: bool,
    /// Whether lines of the current event have arrived.
    has_lines: bool,
    has_data: bool,
    id: Option<Vec<u8>>,
    last_id: LastId,
}

impl Events {
    pub(in crate::connection) fn follow(&mut self, chunk: &[u8]) {
        for byte in chunk {
            match byte {
                b'\n' if self.ends_with_cr => self.ends_with_cr = false,
                b'\n' | b'\r' => {
                    self.ends_with_cr = *byte == b'\r';
                    self.end_line();
                }
                _ => {
                    self.ends_with_cr = false;
                    if self.line.len() < LINE_LIMIT {
                        self.line.push(*byte);
                    }
                }
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            match self.id.take() {
                Some(id) => self.last_id = LastId::Id(id),
                None if self.has_data => self.last_id = LastId::Unknown,
                None => {}
            }
            (self.has_lines, self.has_data) = (false, false);
            return;
        }
        self.has_lines = true;
        let colon = line.iter().position(|byte| *byte == b':');
        let (name, value) = line.split_at(colon.unwrap_or(line.len()));
        let value = value.strip_prefix(b":").unwrap_or(value);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => self.has_data = true,
            b"id" => self.id = Some(value.to_vec()).filter(|_| line.len() < LINE_LIMIT),
            _ => {}
        }
    }

    pub(in crate::connection) fn last_id(&self) -> &LastId {
        &self.last_id
    }

    pub(in crate::connection) fn is_between_events(&self) -> bool {
        !self.has_lines && self.line.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::mpsc;
    use std::task::Poll;

    use futures_util::FutureExt;
    use proptest::prelude::*;
    use tokio::task::unconstrained;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::registry::{Limits, Phase, Registry};
    use crate::transport::stream::Peer;

    fn followed(chunks: &[&[u8]]) -> Events {
        let mut events = Events::default();
        for chunk in chunks {
            events.follow(chunk);
        }
        events
    }

    #[test]
    fn last_id_is_that_of_the_last_event() {
        let id = |text: &str| LastId::Id(text.into());
        for (chunks, last_id, is_between) in [
            (&[&b""[..]][..], LastId::None, true),
            (&[b": comment\n\n", b"retry: 100\n\n"], LastId::None, true),
            (&[b"id: 7\ndata: x\n\n"], id("7"), true),
            (&[b"data:x\r\nid:7\r\n\r\n", b": ping\n\n"], id("7"), true),
            (&[b"id: 7\ndata: x\n\nid: 8\ndata: y\n"], id("7"), false),
            (&[b"id: 7\ndata: x\n\n", b"data: y\n\n"], LastId::Unknown, true),
            (&[b"data: x\n\n", b"id: 9\n\n"], id("9"), true),
            (&[b"id: 7\ndata: x\n\nda"], id("7"), false),
        ] {
            let events = followed(chunks);
            assert_eq!((&events.last_id, events.is_between_events()), (&last_id, is_between), "{chunks:?}");
        }
    }

    fn registry() -> Arc<Registry> {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        Registry::new(limits, CancellationToken::new())
    }

    #[tokio::test]
    async fn response_continues_if_the_drain_goes_back_to_serving() {
        let registry = registry();
        let registration = registry.register(Peer::Unix, None);
        let continuation =
            Arc::new(Continuation::new(registration.requests().upgrade_handle(), Some(Bytes::new())));
        let mut body = EventBody::moving(continuation, Bytes::new(), Upgrade::default());
        let mut turn = || poll_fn(|cx| Poll::Ready(body.poll_turn(cx))).now_or_never();
        assert!(matches!(turn(), Some(Turn::Polls)));
        for _ in 0..2 {
            // The client reads slowly.
            registry.set_phase(Phase::Quiescing);
            assert!(matches!(turn(), Some(Turn::Waits)));
            registry.set_phase(Phase::Draining);
            assert!(matches!(turn(), Some(Turn::Polls)));
        }
        registration.io().flushed();
        assert!(matches!(turn(), Some(Turn::Polls)));
        registry.set_phase(Phase::Quiescing);
        assert!(matches!(turn(), Some(Turn::Moves)));
    }

    #[tokio::test]
    async fn response_does_not_end_if_the_phase_changes_back_during_a_poll() {
        const MOVES: usize = 50_000;
        let registry = registry();
        let registration = registry.register(Peer::Unix, None);
        let continuation =
            Arc::new(Continuation::new(registration.requests().upgrade_handle(), Some(Bytes::new())));
        let mut body = EventBody::moving(continuation, Bytes::new(), Upgrade::default());
        registration.io().flushed();
        let (over, is_over) = mpsc::channel::<()>();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let is_over = is_over;
                while is_over.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    registry.set_phase(Phase::Quiescing);
                    registry.set_phase(Phase::Draining);
                }
            });
            // Ends the thread also if a poll panics.
            let _over = over;
            let (mut moves, mut ends) = (0, 0);
            while moves < MOVES && ends == 0 {
                // `unconstrained` turns off tokio's budget for a task. Otherwise `must_return` would be pending once it is used up.
                let turn = unconstrained(poll_fn(|cx| Poll::Ready(body.poll_turn(cx)))).now_or_never();
                moves += usize::from(matches!(turn, Some(Turn::Moves)));
                ends += usize::from(matches!(turn, Some(Turn::Ends)));
            }
            assert_eq!(ends, 0, "after {moves} polls in which it would have moved");
        });
    }

    proptest! {
        #[test]
        fn chunks_may_end_anywhere(
            text in "(id: [0-9]{1,3}\n|data: [a-z]{0,9}\n|: x\n|\n|\r\n){0,20}",
            cuts in prop::collection::vec(1..9_usize, 1..20),
        ) {
            let whole = followed(&[text.as_bytes()]);
            let mut events = Events::default();
            let mut rest = text.as_bytes();
            for cut in cuts.into_iter().cycle() {
                let (chunk, next) = rest.split_at(cut.min(rest.len()));
                events.follow(chunk);
                rest = next;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(&events.last_id, &whole.last_id);
            prop_assert_eq!(events.is_between_events(), whole.is_between_events());
        }
    }
}
