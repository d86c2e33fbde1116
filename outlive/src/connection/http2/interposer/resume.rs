//! The beginning that a fresh h2 receives in the name of a client whose connection began in another h2.

use bytes::BytesMut;

use super::{Ended, Interposer, Preamble, ToldToH2};
use crate::connection::PREFACE;
use crate::connection::http2::frame::{
    END_HEADERS, END_STREAM, HEADERS, Head, put_oversized_request, put_settings, put_window_update,
};
use crate::connection::http2::header_block::put_stream_field;
use crate::connection::http2::header_table::{ClientTable, Untraceable, without_indexing};
use crate::connection::http2::{HEADER_LIST_LIMIT, MAX_STREAMS};
use crate::transport::http2_state::{FIRST_WINDOW, HEADER_TABLE_SIZE, Http2State, Settings};
use crate::transport::stream_replay::StreamReplay;

/// A request that h2 receives.
enum Request<'a> {
    /// The request of a stream whose response has no end.
    Replay(&'a StreamReplay),
    /// A request that h2 refuses, on a stream that has ended. If `has_table` is set, its fields are the client's header table.
    Refused { stream: u32, has_table: bool },
}

impl Request<'_> {
    fn stream(&self) -> u32 {
        match self {
            Self::Replay(replay) => replay.stream,
            Self::Refused { stream, .. } => *stream,
        }
    }
}

/// The requests that h2 receives, in the order of their streams.
fn requests<'a>(former: u32, replays: &'a [StreamReplay], table: &ClientTable) -> Vec<Request<'a>> {
    let mut requests: Vec<_> = replays.iter().map(Request::Replay).collect();
    let is_former_open = replays.last().is_some_and(|last| last.stream == former);
    // If the fields of the table are no well-formed request, h2 resets the stream instead of refusing the request, and then
    // ignores frames on it. The last stream must not be reset, because the client may still send frames on it.
    let is_apart = is_former_open || !table.is_well_formed();
    let table_stream = ended_stream(former, replays).filter(|_| is_apart);
    if let Some(stream) = table_stream {
        insert(&mut requests, Request::Refused { stream, has_table: true });
    }
    if former > 0 && !is_former_open {
        insert(&mut requests, Request::Refused { stream: former, has_table: table_stream.is_none() });
    }
    requests
}

/// Inserts `request` into `requests`, which are in ascending order.
fn insert<'a>(requests: &mut Vec<Request<'a>>, request: Request<'a>) {
    let at = requests.partition_point(|other| other.stream() < request.stream());
    requests.insert(at, request);
}

/// The last stream before `former` that is not open. `open` is in ascending order.
fn ended_stream(former: u32, open: &[StreamReplay]) -> Option<u32> {
    let mut ended = former.checked_sub(2)?;
    for replay in open.iter().rev().filter(|replay| replay.stream < former) {
        if replay.stream < ended {
            break;
        }
        ended = ended.checked_sub(2)?;
    }
    Some(ended)
}

impl Interposer {
    /// Creates the interposer of a connection that was parked or handed over, and continues with a fresh h2. Fails if the
    /// header table in `state` is invalid.
    pub fn resume(mut state: Http2State) -> Result<Self, Untraceable> {
        let former = state.last_stream;
        let replays = std::mem::take(&mut state.streams);
        let packed = std::mem::take(&mut state.header_table);
        let client_table = ClientTable::unpack(&packed)?;
        let requests = requests(former, &replays, &client_table);
        let has_table =
            requests.iter().any(|request| matches!(request, Request::Refused { has_table: true, .. }));
        let refused: Vec<_> = requests
            .iter()
            .filter(|request| matches!(request, Request::Refused { .. }))
            .map(Request::stream)
            .collect();
        let mut to_h2 = BytesMut::from(PREFACE);
        let (settings, told) = match (replays.is_empty(), refused.is_empty()) {
            (true, true) => (state.theirs.clone(), ToldToH2::Settings),
            (true, false) => (Settings::default().or(HEADER_TABLE_SIZE, 0), ToldToH2::FormerStreams),
            (false, is_told) => (
                state.theirs.clone().with(HEADER_TABLE_SIZE, 0),
                if is_told { ToldToH2::Settings } else { ToldToH2::FormerStreams },
            ),
        };
        put_settings(&settings.payload(), &mut to_h2);
        let owes_size_update = match (replays.is_empty(), refused.is_empty()) {
            // No block is discarded, so h2 sends the update itself.
            (true, true) => false,
            (true, false) => state.theirs.get(HEADER_TABLE_SIZE) == Some(0),
            // h2 receives the size only after the replays, and may send other blocks before.
            (false, _) => state.theirs.has_small_table(),
        };
        let granted = state.send_window - FIRST_WINDOW;
        let has_replays = !replays.is_empty();
        let mut resumed = Self {
            state,
            client_table: Some(client_table),
            preface_left: 0,
            to_h2,
            preamble: Some(Preamble {
                has_sent_settings: false,
                has_sent_window: false,
                told,
                refused,
                later: BytesMut::new(),
                replays: has_replays,
            }),
            debt: (-granted).max(0),
            owes_size_update,
            ..Self::new()
        };
        // h2 counts the request that carries the header table as an open stream until it has refused that request. If each
        // stream that h2 permits is replayed, it would refuse the last replay too, so it receives the other requests later.
        let are_too_many = requests.len() > MAX_STREAMS as usize;
        let mut first_end = None;
        for request in requests {
            match request {
                Request::Replay(replay) => resumed.replay(replay.clone(), !has_table),
                Request::Refused { stream, has_table } => {
                    let block = if has_table { &packed[..] } else { &[] };
                    put_oversized_request(stream, block, HEADER_LIST_LIMIT, &mut resumed.to_h2);
                    if has_table && are_too_many {
                        first_end = Some(resumed.to_h2.len());
                    }
                }
            }
        }
        if let Ok(granted @ 1..) = u32::try_from(granted) {
            put_window_update(0, granted, &mut resumed.to_h2);
        }
        if let (Some(end), Some(preamble)) = (first_end, &mut resumed.preamble) {
            preamble.later = resumed.to_h2.split_off(end);
        }
        Ok(resumed)
    }

    /// Gives h2 a request of the former process, whose response has no end. `enters`: whether its fields enter the table
    /// of the decoder, because no other request gives it the client's table.
    fn replay(&mut self, replay: StreamReplay, enters: bool) {
        let (stream, kind) = (replay.stream, replay.kind());
        let mut block =
            if enters { BytesMut::from(&replay.block[..]) } else { without_indexing(&replay.block) };
        put_stream_field(stream, &mut block);
        Head { stream, ..Head::new(HEADERS, END_STREAM | END_HEADERS, block.len()) }.put(&mut self.to_h2);
        self.to_h2.extend_from_slice(&block);
        let assumed = self.initial_window();
        let missing = u32::try_from(replay.send_window - assumed).unwrap_or(0);
        if missing > 0 {
            put_window_update(stream, missing, &mut self.to_h2);
        }
        self.endless.resume(replay, assumed + i64::from(missing));
        self.open.push((stream, Ended { client: true, h2: false }));
        self.maybe_endless.push(stream);
        self.replays.awaited.push((stream, kind));
    }
}
