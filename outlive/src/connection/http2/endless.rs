//! The streams of one HTTP/2 connection whose responses may have no end: event streams, and streams of gRPC servers.
//!
//! Three parties share an [`EndlessStreams`]. The interposer adds a stream when its request arrives, and records what the
//! client receives of it. The hyper service says whether its response has no end, and the body of that response stops after
//! a whole event or message when the driver asks for that. When every open stream of the connection has stopped, another
//! process can continue them: it answers the same requests anew (`transport/stream_replay.rs`).

use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use bytes::Bytes;

use crate::connection::body_chunks::CHUNK;
use crate::os::lock::lock;
use crate::transport::stream_replay::StreamReplay;

#[derive(Clone, Default)]
pub struct EndlessStreams(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    streams: Vec<EndlessStream>,
    demand: Demand,
    /// The driver, which waits for all streams to stop.
    driver: Option<Waker>,
}

/// What the connection demands of the bodies of its endless responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Demand {
    #[default]
    None,
    /// Stop after a whole event, because the connection is about to be handed over.
    Stop,
    /// End after a whole event, because the connection cannot be handed over.
    End,
}

struct EndlessStream {
    stream: u32,
    /// The header block of the request.
    block: Bytes,
    /// How many more bytes the client accepts than hyper has received for it. The body keeps to it, because h2 may assume a
    /// larger window after a handover.
    window: i64,
    /// By how much h2 overestimates the window, in bytes. The next grants of the client pay it off, because the window
    /// that h2 assumes could otherwise exceed the limit of a window.
    debt: i64,
    /// How many bytes hyper has received that are not sent yet.
    unsent: u64,
    response: Response,
    /// The task that polls the body.
    body: Option<Waker>,
}

enum Response {
    /// The request has not reached the hyper service.
    Unrequested(Begun),
    /// The handler has not answered.
    Awaited,
    Open,
    /// The body has stopped after a whole event.
    Stopped(Continuation),
}

/// Where a stream began.
#[derive(Debug, PartialEq, Eq)]
pub enum Begun {
    Here,
    /// In another process.
    Elsewhere {
        /// What its response has to agree with.
        agreement: Bytes,
        /// The body of its request.
        body: Bytes,
        /// How many messages of its response the client has received.
        messages: u64,
    },
}

/// How the next process continues a stream.
pub struct Continuation {
    /// The header block of its request.
    pub block: Bytes,
    pub agreement: Bytes,
    /// The body of its request.
    pub body: Bytes,
    /// How many messages of its response were sent.
    pub messages: u64,
}

/// What the body of an endless response does next.
pub enum BodyTurn {
    /// The handler's stream can be polled, and may return so many bytes.
    Polls(usize),
    /// The body has stopped.
    Rests,
    /// The client's window is used up.
    WaitsForWindow,
    /// The response has to end.
    Ends,
}

impl EndlessStreams {
    // ---- for the interposer ----

    /// The request of a stream has arrived. `window`: the initial window of the client's streams.
    pub fn begin(&self, stream: u32, block: Bytes, window: i64) {
        self.add(stream, block, window, 0, Begun::Here);
    }

    /// A stream continues that began in another process. `assumed` is the window that h2 assumes.
    pub fn resume(&self, replay: StreamReplay, assumed: i64) {
        let StreamReplay { stream, send_window, block, agreement, body, messages } = replay;
        let begun = Begun::Elsewhere { agreement, body, messages };
        self.add(stream, block, send_window, assumed - send_window, begun);
    }

    fn add(&self, stream: u32, block: Bytes, window: i64, debt: i64, begun: Begun) {
        let response = Response::Unrequested(begun);
        let added = EndlessStream { stream, block, window, debt, unsent: 0, response, body: None };
        lock(&self.0).streams.push(added);
    }

    /// The client has received so many more bytes of a response.
    pub fn sent(&self, stream: u32, length: usize) {
        lock(&self.0).with(stream, |stream| stream.unsent = stream.unsent.saturating_sub(length as u64));
    }

    /// The client has granted so many more bytes of a response. Returns how many of them h2 may use.
    pub fn granted(&self, stream: u32, increment: u32) -> u32 {
        let used = lock(&self.0).with(stream, |stream| {
            stream.window += i64::from(increment);
            let paid = stream.debt.clamp(0, increment.into());
            stream.debt -= paid;
            stream.wake();
            increment - u32::try_from(paid).expect("at most the increment")
        });
        used.unwrap_or(increment)
    }

    /// The client has changed the initial window of its streams, which changes that of all open streams (RFC 9113 section
    /// 6.9.2).
    pub fn change_windows(&self, by: i64) {
        for stream in &mut lock(&self.0).streams {
            stream.window += by;
            stream.wake();
        }
    }

    /// The stream has ended.
    pub fn end(&self, stream: u32) {
        lock(&self.0).streams.retain(|other| other.stream != stream);
    }

    /// How many responses have no end.
    pub fn count_endless(&self) -> usize {
        let is_endless =
            |stream: &&EndlessStream| matches!(stream.response, Response::Open | Response::Stopped(_));
        lock(&self.0).streams.iter().filter(is_endless).count()
    }

    /// Whether all responses have stopped, and the client has received all of them up to there.
    pub fn have_stopped(&self) -> bool {
        let has_stopped =
            |stream: &EndlessStream| stream.unsent == 0 && matches!(stream.response, Response::Stopped(_));
        lock(&self.0).streams.iter().all(has_stopped)
    }

    /// The header blocks with which another process would continue the streams that have stopped, in the order of the
    /// streams.
    pub fn stopped_blocks(&self) -> Vec<Bytes> {
        let block = |stream: &EndlessStream| match &stream.response {
            Response::Stopped(continuation) => Some(continuation.block.clone()),
            Response::Unrequested(_) | Response::Awaited | Response::Open => None,
        };
        lock(&self.0).streams.iter().filter_map(block).collect()
    }

    /// The streams that have stopped, for another process.
    pub fn take_stopped(&self) -> Vec<StreamReplay> {
        let streams = std::mem::take(&mut lock(&self.0).streams);
        let stopped = streams.into_iter().filter_map(|stream| match stream.response {
            Response::Stopped(Continuation { block, agreement, body, messages }) => {
                let EndlessStream { stream, window: send_window, .. } = stream;
                Some(StreamReplay { stream, send_window, block, agreement, body, messages })
            }
            Response::Unrequested(_) | Response::Awaited | Response::Open => None,
        });
        stopped.collect()
    }

    #[cfg(test)]
    pub fn window(&self, stream: u32) -> Option<i64> {
        lock(&self.0).with(stream, |stream| stream.window)
    }

    // ---- for the driver ----

    /// Asks all bodies to stop after a whole event. `driver` is woken when one has stopped.
    pub fn stop(&self, driver: &Waker) {
        let mut table = lock(&self.0);
        table.driver = Some(driver.clone());
        table.demand(Demand::Stop);
    }

    /// Takes back a request to stop.
    pub fn allow_all(&self) {
        let mut table = lock(&self.0);
        if table.demand == Demand::Stop {
            for stream in &mut table.streams {
                if matches!(stream.response, Response::Stopped(_)) {
                    stream.response = Response::Open;
                }
            }
            table.demand(Demand::None);
        }
    }

    /// Asks all bodies to end after a whole event, because the connection stays in this process and must close.
    pub fn must_end(&self) {
        lock(&self.0).demand(Demand::End);
    }

    // ---- for the hyper service ----

    /// The request of `stream` has reached the hyper service. None if its response cannot be continued.
    pub fn request(&self, stream: u32) -> Option<Begun> {
        let requested = lock(&self.0).with(stream, |stream| {
            match std::mem::replace(&mut stream.response, Response::Awaited) {
                Response::Unrequested(begun) => Some(begun),
                response @ (Response::Awaited | Response::Open | Response::Stopped(_)) => {
                    stream.response = response;
                    None
                }
            }
        });
        requested.flatten()
    }

    /// The response to the request of `stream` has no end. Returns the header block of the request. None if the stream has
    /// ended meanwhile.
    pub fn open(&self, stream: u32) -> Option<Bytes> {
        lock(&self.0).with(stream, |stream| {
            stream.response = Response::Open;
            stream.block.clone()
        })
    }

    // ---- for the bodies ----

    /// `continuation`: how the next process continues the stream after what hyper has received; present between two
    /// events. None in it if the next process could not.
    pub fn poll_body(
        &self,
        stream: u32,
        cx: &Context<'_>,
        is_between_events: bool,
        continuation: impl FnOnce() -> Option<Continuation>,
    ) -> BodyTurn {
        let mut table = lock(&self.0);
        let demand = table.demand;
        let turn = table.with(stream, |stream| {
            if stream.body.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                stream.body = Some(cx.waker().clone());
            }
            match demand {
                Demand::End if is_between_events => BodyTurn::Ends,
                Demand::Stop if is_between_events => match continuation() {
                    Some(continuation) => {
                        stream.response = Response::Stopped(continuation);
                        BodyTurn::Rests
                    }
                    None => BodyTurn::Ends,
                },
                _ => match usize::try_from(stream.window) {
                    Ok(room @ 1..) => BodyTurn::Polls(room.min(CHUNK)),
                    _ => BodyTurn::WaitsForWindow,
                },
            }
        });
        if matches!(turn, Some(BodyTurn::Rests))
            && let Some(driver) = &table.driver
        {
            driver.wake_by_ref();
        }
        // The client has reset the stream, and hyper is about to drop the body.
        turn.unwrap_or(BodyTurn::Ends)
    }

    /// hyper has received so many bytes of a response.
    pub fn gave(&self, stream: u32, length: usize) {
        lock(&self.0).with(stream, |stream| {
            stream.unsent += length as u64;
            stream.window -= i64::try_from(length).expect("a chunk is small");
        });
    }
}

impl Table {
    fn with<T>(&mut self, stream: u32, work: impl FnOnce(&mut EndlessStream) -> T) -> Option<T> {
        self.streams.iter_mut().find(|other| other.stream == stream).map(work)
    }

    fn demand(&mut self, demand: Demand) {
        if self.demand != demand {
            self.demand = demand;
            self.streams.iter_mut().for_each(EndlessStream::wake);
        }
    }
}

impl EndlessStream {
    fn wake(&mut self) {
        if let Some(waker) = self.body.take() {
            waker.wake();
        }
    }
}
