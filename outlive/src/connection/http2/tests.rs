//! The interposer between a model of a client and models of h2, with a fresh h2 after each handover. Each side must
//! receive what the other has sent, and both must agree on the windows of the connection.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::endless::{Begun, BodyTurn, Continuation, EndlessStreams};
use super::frame::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEAD_LENGTH, HEADERS, Head, PING, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, increment,
};
use super::header_block::STREAM_FIELD;
use super::interposer::Interposer;
use super::{LONGEST_HOLD, Quiescer};
use crate::connection::PREFACE;
use crate::transport::http2_state::{FIRST_HEADER_TABLE_SIZE, FIRST_WINDOW, Http2State};
use crate::transport::stream_replay;

const PRIORITY: u8 = 2;
const GREASE: u8 = 0xb;
/// The connection window that the model of h2 grants, in bytes.
const TARGET: i64 = 200_000;
/// The settings of h2: `SETTINGS_HEADER_TABLE_SIZE=0`.
const OURS: [u8; 6] = [0, 1, 0, 0, 0, 0];
const LIST_LIMIT: usize = super::HEADER_LIST_LIMIT as usize;
/// A request that accepts an event stream: a size update, GET, and the field `accept`.
const EVENTS: &[u8] = b"\x20\x82\x0f\x04\x11text/event-stream";
/// The same, for a client that has not acknowledged our settings: the field enters its header table.
const FIRST_EVENTS: &[u8] = b"\x82\x53\x11text/event-stream";
/// Another request of such a client, with a field that enters the table.
const FIRST_REQUEST: &[u8] = b"\x83\x40\x01x\x01y";
/// The header block that is kept for the request, with or without references to the table.
const KEPT_EVENTS: &[u8] = EVENTS.split_at(1).1;
/// What the response to it promises.
const AGREEMENT: &[u8] = b"events";
/// How many entries the header table of the client gets. All have room, and an index fits into one byte.
const TABLE_ENTRIES: u8 = 50;
/// The initial window of the client's streams after it has sent SETTINGS again, in bytes.
const LATER_WINDOW: i64 = 51_200;

fn frame(frame_type: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = bytes::BytesMut::new();
    Head { length: payload.len(), frame_type, flags, stream }.put(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes.to_vec()
}

fn grant(stream: u32, increment: i64) -> Vec<u8> {
    frame(
        WINDOW_UPDATE,
        0,
        stream,
        &u32::try_from(increment).expect("the increment fits a window").to_be_bytes(),
    )
}

/// Removes all complete frames from the front of `buffer`.
fn frames(buffer: &mut Vec<u8>) -> Vec<(Head, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some(head) = buffer.first_chunk::<HEAD_LENGTH>() {
        let head = Head::decode(*head);
        if buffer.len() < HEAD_LENGTH + head.length {
            break;
        }
        let frame: Vec<u8> = buffer.drain(..HEAD_LENGTH + head.length).collect();
        all.push((head, frame[HEAD_LENGTH..].to_vec()));
    }
    all
}

fn length(head: Head) -> i64 {
    i64::try_from(head.length).expect("a length has 24 bits")
}

/// A model of a client, and its view of the connection.
struct Client {
    sent: Vec<u8>,
    received: Vec<u8>,
    /// How many bytes it may send, and how many it accepts.
    send_window: i64,
    receive_window: i64,
    consumed: i64,
    /// SETTINGS and PINGs that h2 has not answered.
    unanswered: u32,
    next_stream: u32,
    /// Streams that it has not ended.
    open: Vec<u32>,
    /// How many bytes it has sent on each stream.
    bytes: BTreeMap<u32, i64>,
    /// The initial window of its streams, and by how much each SETTINGS that is not acknowledged changes it.
    initial_window: i64,
    window_changes: VecDeque<i64>,
    /// Its open event streams: how many bytes it accepts on each, and whether it has the head of the response.
    events: BTreeMap<u32, (i64, bool)>,
    table: ClientTable,
}

/// The header table of the model of a client.
#[derive(Clone, Copy)]
enum ClientTable {
    /// The client has not received our settings. It has entered `entries` fields, of which the one at this position
    /// accepts an event stream.
    InUse {
        entries: u8,
        events: Option<u8>,
    },
    Empty,
}

impl Client {
    fn new() -> Self {
        let mut sent = PREFACE.to_vec();
        sent.extend(frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255]));
        Self {
            sent,
            received: Vec::new(),
            send_window: FIRST_WINDOW,
            receive_window: FIRST_WINDOW,
            consumed: 0,
            unanswered: 1,
            next_stream: 1,
            open: Vec::new(),
            bytes: BTreeMap::new(),
            initial_window: FIRST_WINDOW,
            window_changes: VecDeque::from([0]),
            events: BTreeMap::new(),
            table: ClientTable::InUse { entries: 0, events: None },
        }
    }

    fn receive(&mut self) {
        for (head, payload) in frames(&mut self.received) {
            if head.frame_type == SETTINGS && !head.has(ACK) {
                self.table = ClientTable::Empty;
            }
            if head.frame_type == SETTINGS && head.has(ACK) {
                let change = self.window_changes.pop_front().expect("a SETTINGS ACK without SETTINGS");
                self.events.values_mut().for_each(|(window, _)| *window += change);
            }
            if let Some((window, has_head)) = self.events.get_mut(&head.stream) {
                match head.frame_type {
                    HEADERS => assert!(!std::mem::replace(has_head, true), "a second head: {head:?}"),
                    DATA => {
                        assert!(*has_head, "DATA before the head: {head:?}");
                        *window -= length(head);
                        assert!(length(head) == 0 || *window >= 0, "DATA exceeds the window of its stream");
                    }
                    _ => {}
                }
                if head.frame_type == RST_STREAM || head.has(END_STREAM) {
                    self.events.remove(&head.stream);
                }
            }
            match head.frame_type {
                DATA => {
                    self.receive_window -= length(head);
                    self.consumed += length(head);
                    assert!(self.receive_window >= 0, "DATA exceeds the window of the client");
                }
                WINDOW_UPDATE if head.stream == 0 => {
                    self.send_window += i64::from(increment(&payload).expect("the payload has four bytes"));
                }
                RST_STREAM => self.open.retain(|stream| *stream != head.stream),
                SETTINGS | PING if head.has(ACK) => self.unanswered -= 1,
                SETTINGS => self.sent.extend(frame(SETTINGS, ACK, 0, &[])),
                PING => self.sent.extend(frame(PING, ACK, 0, &payload)),
                _ => {}
            }
        }
    }

    fn begin(&mut self, ends: bool, is_split: bool) {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.bytes.insert(stream, 0);
        if !ends {
            self.open.push(stream);
        }
        let flags = if ends { END_STREAM } else { 0 };
        let block = match &mut self.table {
            ClientTable::InUse { entries, .. } if *entries < TABLE_ENTRIES => {
                *entries += 1;
                FIRST_REQUEST
            }
            ClientTable::InUse { .. } => b"\x83\x84",
            ClientTable::Empty => b"\x20\x83\x84",
        };
        if is_split {
            let (first, second) = block.split_at(block.len() / 2);
            self.sent.extend(frame(HEADERS, flags, stream, first));
            self.sent.extend(frame(CONTINUATION, END_HEADERS, stream, second));
        } else {
            self.sent.extend(frame(HEADERS, flags | END_HEADERS, stream, block));
        }
    }

    fn begin_events(&mut self) {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.bytes.insert(stream, 0);
        // The acknowledgements that are missing change this window too.
        let missing: i64 = self.window_changes.iter().sum();
        self.events.insert(stream, (self.initial_window - missing, false));
        let block = match &mut self.table {
            ClientTable::InUse { entries, events: Some(at) } => vec![0x82, 0x80 | (61 + *entries - *at)],
            ClientTable::InUse { entries, events } if *entries < TABLE_ENTRIES => {
                *events = Some(*entries);
                *entries += 1;
                FIRST_EVENTS.to_vec()
            }
            ClientTable::InUse { .. } => KEPT_EVENTS.to_vec(),
            ClientTable::Empty => EVENTS.to_vec(),
        };
        self.sent.extend(frame(HEADERS, END_STREAM | END_HEADERS, stream, &block));
    }

    fn change_initial_window(&mut self) {
        self.unanswered += 1;
        self.window_changes.push_back(LATER_WINDOW - self.initial_window);
        self.initial_window = LATER_WINDOW;
        let [.., a, b, c, d] = LATER_WINDOW.to_be_bytes();
        self.sent.extend(frame(SETTINGS, 0, 0, &[0, 4, a, b, c, d]));
    }

    fn grant_events(&mut self, which: usize, size: i64) {
        if let Some((stream, (window, _))) = self.events.iter_mut().nth(which % 3) {
            *window += size + 1;
            self.sent.extend(grant(*stream, size + 1));
        }
    }

    fn send(&mut self, which: usize, wanted: i64, ends: bool) {
        if self.open.is_empty() {
            return;
        }
        let at = which % self.open.len();
        let stream = self.open[at];
        let size = wanted.min(self.send_window).max(0);
        self.send_window -= size;
        *self.bytes.get_mut(&stream).expect("the stream has begun") += size;
        if ends {
            self.open.remove(at);
        }
        let payload = vec![0; usize::try_from(size).expect("not below zero")];
        self.sent.extend(frame(DATA, if ends { END_STREAM } else { 0 }, stream, &payload));
    }

    fn grant(&mut self, size: i64) {
        if size > 0 {
            self.receive_window += size;
            self.sent.extend(grant(0, size));
        }
    }
}

/// A model of h2, and its view of the connection from the preface on.
struct H2 {
    generation: u32,
    received: Vec<u8>,
    sent: Vec<u8>,
    preface_left: usize,
    is_acknowledged: bool,
    has_begun: bool,
    receive_window: i64,
    send_window: i64,
    pings: u32,
    /// The client's `SETTINGS_HEADER_TABLE_SIZE`.
    table: u32,
    /// The last stream of the former instances of h2, once it is known.
    former: u32,
    /// The streams of this instance, and which sides have ended: the client's, h2's.
    streams: BTreeMap<u32, (bool, bool)>,
    bytes: BTreeMap<u32, i64>,
    /// The streams that it has reset before the client ended them.
    left: BTreeSet<u32>,
    endless: EndlessStreams,
    /// The requests of event streams that are not answered.
    asked: Vec<(u32, Begun)>,
    /// The initial window of the client's streams.
    initial_window: i64,
    /// The windows of the event streams.
    events: BTreeMap<u32, i64>,
}

impl H2 {
    fn new(generation: u32, endless: EndlessStreams) -> Self {
        Self {
            generation,
            received: Vec::new(),
            sent: frame(SETTINGS, 0, 0, &OURS),
            preface_left: PREFACE.len(),
            is_acknowledged: false,
            has_begun: false,
            receive_window: FIRST_WINDOW,
            send_window: FIRST_WINDOW,
            pings: 0,
            table: 4096,
            former: 0,
            streams: BTreeMap::new(),
            bytes: BTreeMap::new(),
            left: BTreeSet::new(),
            endless,
            asked: Vec::new(),
            initial_window: FIRST_WINDOW,
            events: BTreeMap::new(),
        }
    }

    fn receive(&mut self) {
        let preface = self.preface_left.min(self.received.len());
        self.received.drain(..preface);
        self.preface_left -= preface;
        for (head, payload) in frames(&mut self.received) {
            let Head { frame_type, stream, .. } = head;
            if frame_type == HEADERS && head.length > LIST_LIMIT / 60 {
                // The oversized request of a resumed connection is refused. The encoder must not use its table yet.
                assert_eq!(self.table, 0, "the refusal enters the header table");
                self.former = stream;
                self.sent.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x20\x48431"));
                continue;
            }
            let is_of_stream =
                stream > 0 && matches!(frame_type, DATA | HEADERS | RST_STREAM | WINDOW_UPDATE);
            if frame_type == HEADERS && memchr::memmem::find(&payload, STREAM_FIELD.as_bytes()).is_some() {
                self.receive_events(stream);
                continue;
            }
            if let Some(window) = self.events.get_mut(&stream)
                && frame_type == WINDOW_UPDATE
            {
                *window += i64::from(increment(&payload).expect("the payload has four bytes"));
                assert!(*window < 1 << 31, "FLOW_CONTROL_ERROR: {head:?}");
                continue;
            }
            if self.generation > 0 && (is_of_stream && stream > self.former || frame_type == PING) {
                assert!(self.is_acknowledged && self.has_begun, "{head:?} arrives before h2 has begun");
            }
            if is_of_stream
                && frame_type != HEADERS
                && stream <= self.former
                && !self.streams.contains_key(&stream)
            {
                // The stream is closed. Like h2, this discards the DATA and later grants its bytes again.
                if frame_type == DATA {
                    self.receive_window -= length(head);
                    assert!(self.receive_window >= 0, "FLOW_CONTROL_ERROR: {head:?}");
                    self.sent.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 5]));
                }
                continue;
            }
            if is_of_stream && frame_type != HEADERS {
                assert!(self.streams.contains_key(&stream), "a frame on an idle stream: {head:?}");
            }
            match frame_type {
                HEADERS => {
                    let is_of_events = payload.starts_with(b"\x82") || payload.starts_with(b"\x20\x82");
                    assert!(!is_of_events, "the request of stream {stream} is not kept");
                    let last = self.streams.keys().next_back().copied().unwrap_or(self.former);
                    let is_new = last < stream;
                    assert!(is_new, "a stream begins twice: {head:?}");
                    self.streams.insert(stream, (false, false));
                }
                DATA => {
                    self.receive_window -= length(head);
                    assert!(self.receive_window >= 0, "FLOW_CONTROL_ERROR: {head:?}");
                    *self.bytes.entry(stream).or_default() += length(head);
                }
                RST_STREAM => {
                    self.streams.insert(stream, (true, true));
                    self.events.remove(&stream);
                    self.asked.retain(|(asked, _)| *asked != stream);
                }
                WINDOW_UPDATE if stream == 0 => {
                    let granted = increment(&payload).expect("the payload has four bytes");
                    assert!(granted > 0, "PROTOCOL_ERROR: {head:?}");
                    self.send_window += i64::from(granted);
                }
                SETTINGS if head.has(ACK) => {
                    assert!(!self.is_acknowledged, "a SETTINGS ACK without SETTINGS");
                    self.is_acknowledged = true;
                }
                SETTINGS => {
                    self.sent.extend(frame(SETTINGS, ACK, 0, &[]));
                    for setting in payload.chunks(6).filter(|setting| setting[..2] == [0, 1]) {
                        self.table = u32::from_be_bytes(setting[2..].try_into().expect("six bytes"));
                    }
                    for setting in payload.chunks(6).filter(|setting| setting[..2] == [0, 4]) {
                        let window = u32::from_be_bytes(setting[2..].try_into().expect("six bytes")).into();
                        self.events.values_mut().for_each(|one| *one += window - self.initial_window);
                        self.initial_window = window;
                    }
                    if !self.has_begun {
                        self.has_begun = true;
                        self.replenish();
                    }
                }
                PING if head.has(ACK) => {
                    self.pings = self.pings.checked_sub(1).expect("a PING ACK without a PING");
                }
                PING => self.sent.extend(frame(PING, ACK, 0, &payload)),
                _ => {}
            }
            if (frame_type == DATA || frame_type == HEADERS) && head.has(END_STREAM) {
                self.streams.get_mut(&stream).expect("the stream has begun").0 = true;
            }
        }
    }

    /// The request of an event stream arrives.
    fn receive_events(&mut self, stream: u32) {
        let last = self.streams.keys().next_back().copied().unwrap_or(self.former);
        assert!(last < stream, "stream {stream} begins twice");
        self.streams.insert(stream, (true, false));
        let is_replay = self.generation > 0 && !self.is_acknowledged;
        if is_replay {
            // Like h2, this takes streams before it for closed.
            self.former = stream;
        }
        // The interposer may have passed on the RST_STREAM of the client.
        let Some(begun) = self.endless.request(stream) else { return };
        assert_eq!(begun != Begun::Here, is_replay);
        self.events.insert(stream, self.initial_window);
        self.asked.push((stream, begun));
    }

    fn replenish(&mut self) {
        if self.receive_window < TARGET {
            self.sent.extend(grant(0, TARGET - self.receive_window));
            self.receive_window = TARGET;
        }
    }

    fn open(&self) -> Vec<u32> {
        let is_open =
            |(stream, (_, ended)): &(&u32, &(bool, bool))| !ended && !self.events.contains_key(stream);
        self.streams.iter().filter(is_open).map(|(stream, _)| *stream).collect()
    }

    /// Answers the first request of an event stream. The response agrees with that of the former process if `agrees`.
    fn answer_events(&mut self, agrees: bool) {
        if self.asked.is_empty() {
            return;
        }
        let (stream, begun) = self.asked.remove(0);
        let is_replay = begun != Begun::Here;
        if is_replay {
            assert_eq!(self.table, 0, "a head that the client does not receive enters the header table");
        }
        if is_replay && !agrees {
            self.endless.end(stream);
            self.sent.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x20ead"));
            self.end_events(stream);
        } else {
            // None if the interposer has passed on the RST_STREAM of the client.
            let kept = self.endless.open(stream);
            assert!(
                kept.is_none_or(|kept| kept == KEPT_EVENTS),
                "another decoder could not decode the request"
            );
            self.sent.extend(frame(HEADERS, END_HEADERS, stream, b"\x20ead"));
        }
    }

    fn end_events(&mut self, stream: u32) {
        self.streams.insert(stream, (true, true));
        self.events.remove(&stream);
    }

    /// Polls the body of an event stream, which has so many bytes.
    fn poll_events(&mut self, which: usize, wanted: i64, ends: bool) {
        let answered = |stream: &u32| self.asked.iter().all(|(asked, _)| asked != stream);
        let Some(stream) = self.events.keys().copied().filter(answered).nth(which % 3) else { return };
        let continuation = || {
            let block = Bytes::from_static(KEPT_EVENTS);
            Some(Continuation {
                block,
                agreement: Bytes::from_static(AGREEMENT),
                body: Bytes::new(),
                messages: 0,
            })
        };
        match self.endless.poll_body(stream, &Context::from_waker(Waker::noop()), true, continuation) {
            BodyTurn::Polls(room) => {
                let room = i64::try_from(room).expect("a chunk is small");
                let window = self.events.get_mut(&stream).expect("it is open");
                // The interposer knows a grant of the client before h2 does.
                let size = wanted.min(room).min(self.send_window).min(*window).max(0);
                let length = usize::try_from(size).expect("not below zero");
                self.endless.gave(stream, length);
                self.send_window -= size;
                *window -= size;
                self.sent.extend(frame(DATA, if ends { END_STREAM } else { 0 }, stream, &vec![0; length]));
                if ends {
                    self.end_events(stream);
                }
            }
            BodyTurn::Rests | BodyTurn::WaitsForWindow => {}
            BodyTurn::Ends => {
                self.sent.extend(frame(DATA, END_STREAM, stream, &[]));
                self.end_events(stream);
            }
        }
    }

    fn answer(&mut self, which: usize, wanted: i64, ends: bool) {
        let open = self.open();
        if open.is_empty() {
            return;
        }
        let stream = open[which % open.len()];
        let size = wanted.min(self.send_window).max(0);
        self.send_window -= size;
        self.sent.extend(frame(HEADERS, END_HEADERS, stream, b"\x20ead"));
        let payload = vec![0; usize::try_from(size).expect("not below zero")];
        self.sent.extend(frame(DATA, if ends { END_STREAM } else { 0 }, stream, &payload));
        if ends {
            let ended = self.streams.get_mut(&stream).expect("the stream has begun");
            ended.1 = true;
            if !ended.0 {
                // h2 does this if a handler does not read the whole body.
                ended.0 = true;
                self.left.insert(stream);
                self.sent.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 0]));
            }
        }
    }
}

/// The client, the interposer and h2, and what became of the streams of former instances of h2.
struct World {
    client: Client,
    interposer: Interposer,
    h2: H2,
    /// Bytes of the client that were handed over.
    unread: Vec<u8>,
    moves: u32,
    /// Streams that have reached h2, and how many bytes of each.
    reached_h2: BTreeSet<u32>,
    bytes: BTreeMap<u32, i64>,
    /// Streams that either side has reset.
    reset: BTreeSet<u32>,
    is_holding: bool,
}

impl World {
    fn new() -> Self {
        let interposer = Interposer::new();
        Self {
            client: Client::new(),
            h2: H2::new(0, interposer.endless()),
            interposer,
            unread: Vec::new(),
            moves: 0,
            reached_h2: BTreeSet::new(),
            bytes: BTreeMap::new(),
            reset: BTreeSet::new(),
            is_holding: false,
        }
    }

    /// Passes pieces of at most `piece` bytes in each direction, `times` times or until no bytes are left.
    fn carry(&mut self, piece: usize, times: usize) {
        let mut is_quiet = false;
        for _ in 0..times {
            let mut is_news = false;
            if self.interposer.is_begun() && !self.interposer.is_quiescent() {
                let from = if self.unread.is_empty() { &mut self.client.sent } else { &mut self.unread };
                let length = piece.min(from.len());
                let bytes: Vec<u8> = from.drain(..length).collect();
                // Like the relay, this reads in place only if h2 has read everything before.
                if self.interposer.for_h2().is_empty() && piece.is_multiple_of(2) {
                    let passed = self.interposer.receive_in_place(&bytes);
                    self.h2.received.extend_from_slice(&bytes[..passed]);
                } else {
                    self.interposer.receive(&bytes);
                }
                is_news |= length > 0;
            }
            let for_h2 = self.interposer.for_h2();
            let length = piece.min(for_h2.len());
            self.h2.received.extend_from_slice(&for_h2.split_to(length));
            is_news |= length > 0;
            self.h2.receive();
            let length = piece.min(self.h2.sent.len());
            if self.interposer.must_rewrite() {
                let bytes: Vec<u8> = self.h2.sent.drain(..length).collect();
                self.interposer.rewrite(&bytes);
            } else {
                let bytes: Vec<u8> = self.h2.sent.drain(..length).collect();
                self.interposer.sent(&bytes);
                self.client.received.extend(bytes);
            }
            is_news |= length > 0;
            let for_client = self.interposer.for_client();
            let length = piece.min(for_client.len());
            self.client.received.extend_from_slice(&for_client.split_to(length));
            is_news |= length > 0;
            self.client.receive();
            if self.is_holding && self.h2.sent.is_empty() {
                self.interposer.stop_endless(Waker::noop());
                for which in 0..self.h2.events.len() {
                    self.h2.poll_events(which, 0, false);
                }
            }
            // A handover drops the bytes that h2 has not written yet.
            if self.interposer.is_quiescent() {
                self.move_on();
            }
            is_quiet = !is_news;
            if is_quiet {
                break;
            }
        }
        if is_quiet && self.interposer.is_begun() && !self.is_holding && !self.interposer.must_rewrite() {
            let state = self.interposer.state();
            assert_eq!(self.h2.receive_window, state.receive_window);
            assert_eq!(self.h2.send_window, state.send_window);
            for (stream, window) in &self.h2.events {
                let body = self.h2.endless.window(*stream).expect("the stream is open");
                assert!(
                    *window >= body,
                    "h2 would keep bytes of stream {stream}, because its window is too small"
                );
            }
        }
    }

    fn forget_h2(&mut self) {
        self.reached_h2.extend(self.h2.streams.keys());
        self.reset.extend(&self.h2.left);
        for (stream, bytes) in &self.h2.bytes {
            *self.bytes.entry(*stream).or_default() += bytes;
        }
    }

    fn move_on(&mut self) {
        self.moves += 1;
        self.is_holding = false;
        self.forget_h2();
        assert!(self.h2.received.is_empty(), "h2 has received an incomplete frame");
        let is_open = |(stream, ended): (&u32, &(bool, bool))| {
            *ended != (true, true) && !self.reset.contains(stream) && !self.h2.events.contains_key(stream)
        };
        assert!(!self.h2.streams.iter().any(is_open), "a stream is open");
        let (state, unread) = std::mem::replace(&mut self.interposer, Interposer::new()).into_state();
        let read = std::mem::take(&mut self.unread);
        self.unread = [&unread[..], &read].concat();
        // What the client has sent, and the interposer has not recorded.
        let mut under_way = [&self.unread[..], &self.client.sent].concat();
        let (mut data, mut granted) = (0, 0);
        for (head, payload) in frames(&mut under_way) {
            match head.frame_type {
                DATA => data += length(head),
                WINDOW_UPDATE if head.stream == 0 => {
                    granted += i64::from(increment(&payload).expect("the payload has four bytes"));
                }
                _ => {}
            }
        }
        assert_eq!(self.client.send_window, state.receive_window - data);
        assert_eq!(self.client.receive_window, state.send_window + granted);
        let streams = stream_replay::decode(&stream_replay::encode(&state.streams).into());
        let streams = streams.expect("the encoded streams can be decoded");
        let numbers: Vec<_> = streams.iter().map(|stream| stream.stream).collect();
        assert_eq!(numbers, self.h2.events.keys().copied().collect::<Vec<_>>(), "every open stream moves");
        let bytes = state.encode();
        let state = Http2State::decode(&bytes).expect("the encoded state can be decoded");
        self.interposer = Interposer::resume(Http2State { streams, ..state });
        self.h2 = H2::new(self.moves, self.interposer.endless());
    }

    fn act(&mut self, frame_type: u8, which: u16, size: i64) {
        let index = usize::from(which);
        let stream = (u32::from(which) % self.client.next_stream) | 1;
        let is_begun = stream < self.client.next_stream;
        match frame_type % 22 {
            0 | 1 => self.client.begin(which.is_multiple_of(2), which.is_multiple_of(3)),
            2 | 3 => self.client.send(index, size, which.is_multiple_of(2)),
            4 => self.client.grant(size),
            5 if is_begun => {
                self.client.open.retain(|open| *open != stream);
                self.client.events.remove(&stream);
                self.reset.insert(stream);
                self.client.sent.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            }
            6 => {
                self.client.unanswered += 1;
                self.client.sent.extend(frame(PING, 0, 0, &[7; 8]));
            }
            7 if is_begun && !self.client.events.contains_key(&stream) => {
                self.client.sent.extend(grant(stream, size + 1));
            }
            8 => self.client.sent.extend(frame(PRIORITY, 0, stream, &[0; 5])),
            9 => self.client.sent.extend(frame(GREASE, 9, stream, &[1; 20])),
            10 => self.client.change_initial_window(),
            11 => self.h2.answer(index, size, true),
            12 => self.h2.answer(index, size, which.is_multiple_of(2)),
            13 if self.h2.has_begun => self.h2.replenish(),
            14 if self.h2.has_begun => {
                self.h2.pings += 1;
                self.h2.sent.extend(frame(PING, 0, 0, &[3; 8]));
            }
            15 if self.is_holding && which.is_multiple_of(4) => {
                self.interposer.release();
                self.is_holding = false;
            }
            15 => {
                self.interposer.hold();
                self.is_holding = true;
            }
            16 => self.client.begin_events(),
            17 => self.h2.answer_events(!which.is_multiple_of(4)),
            18 | 19 => self.h2.poll_events(index, size, which.is_multiple_of(16)),
            20 => self.client.grant_events(index, size),
            21 if which.is_multiple_of(8) && self.interposer.is_begun() => self.interposer.end_replays(),
            _ => {}
        }
    }

    /// Ends all streams, and checks that everything that the client has sent has reached an instance of h2.
    fn end(mut self) -> u32 {
        self.interposer.release();
        self.is_holding = false;
        for _ in 0..100 {
            let consumed = std::mem::take(&mut self.client.consumed);
            self.client.grant(consumed);
            self.carry(10_000, usize::MAX);
            self.h2.replenish();
            while !self.client.open.is_empty() {
                self.client.send(0, 0, true);
            }
            for _ in self.h2.open() {
                self.h2.answer(0, 0, true);
            }
            self.h2.answer_events(true);
            self.h2.poll_events(0, 0, true);
            self.client.grant_events(0, LATER_WINDOW);
            self.carry(10_000, usize::MAX);
        }
        self.forget_h2();
        for (stream, sent) in &self.client.bytes {
            assert!(
                self.reached_h2.contains(stream) || self.reset.contains(stream),
                "stream {stream} has not reached h2"
            );
            if !self.reset.contains(stream) {
                let reached = self.bytes.get(stream).copied().unwrap_or(0);
                assert_eq!(reached, *sent, "stream {stream}");
            }
        }
        assert_eq!(self.h2.receive_window, self.interposer.state().receive_window);
        assert_eq!(self.h2.receive_window, self.client.send_window, "both sides agree on the window");
        assert_eq!(self.h2.table, FIRST_HEADER_TABLE_SIZE, "h2 has the client's table size");
        assert!(self.client.events.is_empty(), "every event stream ends");
        assert_eq!(self.client.unanswered, 0, "every PING and SETTINGS of the client is answered");
        self.moves
    }
}

/// One step of a random test: the action, a number that selects its stream, a size in bytes, and then the size and the
/// number of the pieces in which bytes are passed on.
type Act = (u8, u16, i64, usize, usize);

fn play(acts: impl IntoIterator<Item = Act>) {
    play_after([], acts);
}

/// The client sends requests before it receives our settings. The bools say whether the request opens an event stream,
/// and, if not, whether its frames are split.
fn play_after(first: impl IntoIterator<Item = (bool, bool)>, acts: impl IntoIterator<Item = Act>) {
    let mut world = World::new();
    for (is_of_events, is_split) in first {
        if is_of_events { world.client.begin_events() } else { world.client.begin(true, is_split) }
    }
    for (frame_type, which, size, piece, times) in acts {
        world.act(frame_type, which, size);
        world.carry(piece, times);
    }
    world.end();
}

proptest! {
    #[test]
    fn both_ends_believe_the_same_after_every_move(
        acts in prop::collection::vec((any::<u8>(), any::<u16>(), 0..30_000_i64, 1..2_000_usize, 0..8_usize), 0..150),
    ) {
        play(acts);
    }

    #[test]
    fn both_ends_agree_on_the_streams_if_the_first_requests_refer_to_the_header_table(
        first in prop::collection::vec(any::<(bool, bool)>(), 0..8),
        acts in prop::collection::vec((any::<u8>(), any::<u16>(), 0..30_000_i64, 1..2_000_usize, 0..8_usize), 0..60),
    ) {
        play_after(first, acts);
    }
}

/// The same, with actions that `make fuzz` chooses.
#[cfg(feature = "fuzz-tests")]
#[test]
fn fuzzed_acts_leave_both_ends_in_the_same_state() {
    let acts = bolero::produce::<Vec<(u8, u16, u16, u16, u8)>>().with().len(0..150_usize);
    crate::fuzz::target!("http2_endpoints_agree").with_generator(acts).cloned().for_each(|acts| {
        play(acts.into_iter().map(|(frame_type, which, size, piece, times)| {
            let (piece, times) = (usize::from(piece % 2_000) + 1, usize::from(times % 8));
            (frame_type, which, i64::from(size % 30_000), piece, times)
        }));
    });
}

#[cfg(feature = "fuzz-tests")]
#[test]
fn fuzzed_frames_of_a_client_do_not_panic() {
    crate::fuzz::target!("http2_client_frames").with_type::<(Vec<(Vec<u8>, u8)>, bool)>().for_each(
        |(pieces, is_resumed)| {
            let mut interposer =
                if *is_resumed { Interposer::resume(Http2State::default()) } else { Interposer::new() };
            interposer.receive(PREFACE);
            for (bytes, act) in pieces {
                interposer.receive(bytes);
                match act % 6 {
                    0 => interposer.hold(),
                    1 => interposer.release(),
                    // A complete frame of any type.
                    2 => interposer.receive(&frame(act % 11, *act, u32::from(*act), bytes)),
                    3 => interposer.rewrite(&frame(act % 11, *act, u32::from(*act), bytes)),
                    _ => {}
                }
                let _ = interposer.is_quiescent();
                interposer.for_client().clear();
            }
            interposer.into_state();
        },
    );
}

/// Go's client before 1.20 acknowledges `SETTINGS_HEADER_TABLE_SIZE=0`, but still uses its table.
#[test]
fn connection_of_a_client_that_ignores_the_table_size_is_immovable() {
    const PADDED: u8 = 8;
    const WITH_PRIORITY: u8 = 0x20;
    let ends = END_STREAM | END_HEADERS;
    for (flags, headers, moves) in [
        (ends, &b"\x20\x82"[..], true),
        (ends, b"\x82\x20", false),
        (ends, b"", false),
        (ends | PADDED, b"\x01\x20\x82\x00", true),
        (ends | PADDED, b"\x20\x82\x00", false),
        (ends | WITH_PRIORITY, b"\0\0\0\0\0\x20\x82", true),
        (ends | PADDED | WITH_PRIORITY, b"\x01\0\0\0\0\0\x82\x00", false),
    ] {
        let mut interposer = Interposer::new();
        interposer.receive(&Client::new().sent);
        // The client has not received the settings yet, so its first request may use the table.
        interposer.receive(&frame(HEADERS, ends, 1, b"\x82"));
        interposer.sent(&[frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, &[])].concat());
        interposer.sent(&frame(HEADERS, ends, 1, b"head"));
        interposer.receive(&frame(SETTINGS, ACK, 0, &[]));
        interposer.for_h2().clear();
        interposer.hold();
        assert!(interposer.is_quiescent());
        interposer.release();
        interposer.receive(&frame(HEADERS, flags, 3, headers));
        interposer.sent(&frame(HEADERS, ends, 3, b"head"));
        interposer.for_h2().clear();
        interposer.hold();
        assert_eq!(
            (interposer.is_quiescent(), interposer.is_immovable()),
            (moves, !moves),
            "{flags} {headers:?}"
        );
    }
}

/// The JDK's HttpClient empties its table in its first headers, which it may send before it acknowledges our settings.
#[test]
fn connection_of_a_client_that_empties_its_table_before_the_acknowledgement_is_movable() {
    // Table size updates to 0 and to 4096, and a header field.
    const EMPTY: &[u8] = b"\x20";
    const LARGE: &[u8] = b"\x3f\xe1\x1f";
    const FIELD: &[u8] = b"\x82";
    let ends = END_STREAM | END_HEADERS;
    for (blocks, moves) in [
        (&[[EMPTY, FIELD].concat()][..], true),
        (&[[LARGE, EMPTY, FIELD].concat()], true),
        (&[[EMPTY, FIELD].concat(), FIELD.to_vec()], true),
        (&[FIELD.to_vec(), [EMPTY, FIELD].concat()], true),
        (&[FIELD.to_vec()], false),
        (&[[LARGE, FIELD].concat()], false),
        (&[[EMPTY, LARGE, FIELD].concat()], false),
        (&[[EMPTY, FIELD].concat(), [LARGE, FIELD].concat()], false),
        (&[[FIELD, EMPTY].concat()], false),
        // An incomplete table size update.
        (&[[EMPTY, b"\x3f\xff"].concat()], false),
    ] {
        let mut interposer = Interposer::new();
        interposer.receive(&Client::new().sent);
        interposer.sent(&[frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, &[])].concat());
        let mut stream = 1;
        let mut exchange = |interposer: &mut Interposer, block: &[u8]| {
            interposer.receive(&frame(HEADERS, ends, stream, block));
            interposer.sent(&frame(HEADERS, ends, stream, b"head"));
            stream += 2;
        };
        for block in blocks {
            exchange(&mut interposer, block);
        }
        interposer.receive(&frame(SETTINGS, ACK, 0, &[]));
        exchange(&mut interposer, FIELD);
        interposer.for_h2().clear();
        interposer.hold();
        assert_eq!((interposer.is_quiescent(), interposer.is_immovable()), (moves, !moves), "{blocks:?}");
    }
}

/// Each case: what the client sends before the request of an event stream that refers to its header table, and whether
/// that request is kept.
#[test]
fn request_that_refers_to_the_header_table_is_kept_until_the_settings_are_acknowledged() {
    const ACCEPT: &[u8] = FIRST_EVENTS.split_at(1).1;
    const OF_A_STREAM: u8 = END_STREAM | END_HEADERS;
    let first = |flags, block: &[u8]| frame(HEADERS, flags, 1, block);
    let request = [b"\x83", ACCEPT].concat();
    let acknowledged = frame(SETTINGS, ACK, 0, &[]);
    for (before, is_kept) in [
        (first(OF_A_STREAM, &request), true),
        // The first frame of a block has half of a field.
        (
            [first(END_STREAM, &request[..5]), frame(CONTINUATION, END_HEADERS, 1, &request[5..])].concat(),
            true,
        ),
        // Trailers, also those of a stream that the server has ended.
        ([first(END_HEADERS, b"\x83"), first(OF_A_STREAM, ACCEPT)].concat(), true),
        ([first(OF_A_STREAM, b"\x83"), first(OF_A_STREAM, ACCEPT)].concat(), true),
        ([first(OF_A_STREAM, &request), frame(HEADERS, OF_A_STREAM, 3, b"\x83\x20")].concat(), false),
        ([first(OF_A_STREAM, &request), frame(HEADERS, OF_A_STREAM, 3, b"\x20\x83")].concat(), false),
        ([first(OF_A_STREAM, &request), acknowledged].concat(), false),
        (first(OF_A_STREAM, b"\x83"), false),
    ] {
        for in_place in [false, true] {
            let mut interposer = Interposer::new();
            interposer.receive(&Client::new().sent);
            interposer.sent(&[frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, &[])].concat());
            interposer.for_h2().clear();
            let all = [&before[..], &frame(HEADERS, OF_A_STREAM, 5, b"\x82\xbe")].concat();
            if in_place {
                let passed = interposer.receive_in_place(&all);
                assert_eq!(passed + interposer.for_h2().len() > all.len(), is_kept, "{all:?}");
            } else {
                interposer.receive(&all);
            }
            let streams = interposer.endless();
            let kept = streams.request(5).and_then(|_| streams.open(5));
            assert_eq!(kept.as_deref(), is_kept.then_some(KEPT_EVENTS), "{before:?}");
        }
    }
}

/// Each case: what a client has sent when it falls silent, whether only the client can make the connection quiescent,
/// and whether all its requests are answered.
#[test]
fn connection_is_stuck_if_only_its_client_can_make_it_quiescent() {
    let ends = END_STREAM | END_HEADERS;
    let hello = Client::new().sent;
    let acknowledged = [hello.clone(), frame(SETTINGS, ACK, 0, &[])].concat();
    let then = |frame: Vec<u8>| [acknowledged.clone(), frame].concat();
    for (sent, is_stuck, owes_nothing) in [
        (Vec::new(), true, true),
        (PREFACE[..10].to_vec(), true, true),
        (hello.clone(), true, true),
        (acknowledged.clone(), false, true),
        (then(frame(HEADERS, END_STREAM, 1, b"\x20")), true, true),
        (then(frame(HEADERS, ends, 1, b"\x20")), false, false),
        (then(frame(HEADERS, END_HEADERS, 1, b"\x20")), false, false),
        (then([frame(HEADERS, ends, 1, b"\x20"), frame(HEADERS, 0, 3, b"")].concat()), false, false),
        // An incomplete frame of which h2 has seen nothing does not prevent a handover.
        (then(frame(HEADERS, ends, 1, b"\x20")[..9].to_vec()), false, true),
    ] {
        let mut interposer = Interposer::new();
        interposer.sent(&frame(SETTINGS, 0, 0, &OURS));
        interposer.receive(&sent);
        interposer.sent(&frame(SETTINGS, ACK, 0, &[]));
        interposer.for_h2().clear();
        assert_eq!((interposer.is_stuck(), interposer.owes_nothing()), (is_stuck, owes_nothing), "{sent:?}");
    }
}

#[test]
fn final_goaway_names_the_last_stream_and_is_left_out_inside_a_frame() {
    let final_goaway = |sent: &[u8]| {
        let mut interposer = Interposer::new();
        interposer.receive(&Client::new().sent);
        interposer.receive(&frame(HEADERS, END_STREAM | END_HEADERS, 5, b"\x20"));
        interposer.sent(sent);
        interposer.final_goaway()
    };
    assert_eq!(final_goaway(&frame(SETTINGS, 0, 0, &OURS)), frame(GOAWAY, 0, 0, &[0, 0, 0, 5, 0, 0, 0, 0]));
    assert!(final_goaway(&frame(HEADERS, END_HEADERS, 5, b"head")[..11]).is_empty());
}

/// If they were held, they would seem to follow the acknowledgement, and to ignore the settings.
#[test]
fn streams_that_begin_before_the_settings_are_acknowledged_are_not_held() {
    let ends = END_STREAM | END_HEADERS;
    let mut interposer = Interposer::new();
    interposer.hold();
    interposer.receive(&Client::new().sent);
    interposer.sent(&[frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, &[])].concat());
    interposer.for_h2().clear();
    let first = frame(HEADERS, ends, 1, b"\x82");
    interposer.receive(&first);
    assert_eq!(interposer.for_h2(), &first);
    interposer.for_h2().clear();
    interposer.receive(&frame(SETTINGS, ACK, 0, &[]));
    interposer.for_h2().clear();
    let second = frame(HEADERS, ends, 3, b"\x20\x82");
    interposer.receive(&second);
    assert!(interposer.for_h2().is_empty());
    interposer.sent(&frame(HEADERS, ends, 1, b"head"));
    assert!(interposer.is_quiescent());
    let (state, unread) = interposer.into_state();
    assert_eq!((state.last_stream, unread), (1, second.into()));
}

/// The relay does not read while `is_full`, so this must be false after a release even if frames are still held.
#[test]
fn interposer_is_full_above_the_limit_until_it_is_released() {
    let mut interposer = Interposer::new();
    interposer.receive(&Client::new().sent);
    interposer.sent(&[frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, &[])].concat());
    interposer.receive(&frame(SETTINGS, ACK, 0, &[]));
    interposer.receive(&frame(HEADERS, END_HEADERS, 1, b"\x20\x82"));
    let data = frame(DATA, 0, 1, &[0; 100]);
    interposer.receive(&data[..50]);
    interposer.for_h2().clear();
    interposer.hold();
    interposer.receive(&data[50..]);
    interposer.receive(&frame(HEADERS, END_HEADERS, 3, b"\x82"));
    while !interposer.is_full() {
        interposer.receive(&frame(DATA, 0, 3, &[0; 16_000]));
    }
    interposer.for_h2().clear();
    // A frame of another stream is incomplete, so the held frames cannot be passed on yet.
    interposer.receive(&data[..50]);
    interposer.release();
    assert!(!interposer.is_full());
    interposer.receive(&data[50..]);
    assert!(interposer.for_h2().len() > 1_000_000);
}

/// If the interposer granted the bytes of each such frame again, its WINDOW_UPDATEs would accumulate for a client that
/// never reads.
#[test]
fn data_on_streams_of_a_former_process_queues_no_frames() {
    let mut world = World::new();
    world.client.begin(true, false);
    world.carry(10_000, usize::MAX);
    world.h2.answer(0, 5, true);
    world.interposer.hold();
    world.carry(10_000, usize::MAX);
    assert_eq!((world.moves, world.interposer.is_begun()), (1, true));
    for _ in 0..10_000 {
        world.interposer.receive(&frame(DATA, 0, 1, b"x"));
        world.interposer.for_h2().clear();
        assert!(world.interposer.for_client().is_empty());
    }
}

/// Only a valid ACK is discarded, if the interposer has already acknowledged these settings in the client's name.
#[test]
fn invalid_settings_ack_reaches_h2() {
    for (stream, payload) in [(1, &b""[..]), (0, b"\0\x04\0\0\0\x01")] {
        let mut interposer = Interposer::resume(Http2State::default());
        // The preamble of h2, with settings that the client has not received.
        let settings = [frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, b"")].concat();
        interposer.rewrite(&[settings, grant(0, 100_000)].concat());
        assert!(interposer.is_begun());
        interposer.for_h2().clear();
        let wrong = frame(SETTINGS, ACK, stream, payload);
        interposer.receive(&wrong);
        assert_eq!(interposer.for_h2(), &wrong);
        interposer.for_h2().clear();
        interposer.receive(&frame(SETTINGS, ACK, 0, b""));
        assert!(interposer.for_h2().is_empty());
    }
}

#[tokio::test]
async fn attempts_to_quiesce_are_bounded_however_long_the_limit_is() {
    let mut quiescer = Quiescer::new(Duration::from_secs(3600));
    for _ in 0..100 {
        quiescer.pause();
    }
    assert_eq!(quiescer.hold, LONGEST_HOLD);
}
