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
use super::header_model::{Decoder, Encoder, How, Pair, pair};
use super::header_table::SIZE_LIMIT;
use super::interposer::Interposer;
use super::{LONGEST_HOLD, Quiescer};
use crate::connection::PREFACE;
use crate::transport::http2_state::{FIRST_HEADER_TABLE_SIZE, FIRST_WINDOW, Http2State};
use crate::transport::stream_replay;

const PRIORITY: u8 = 2;
const GREASE: u8 = 0xb;
/// The connection window that the model of h2 grants, in bytes.
const TARGET: i64 = 200_000;
/// The settings of h2: `SETTINGS_HEADER_TABLE_SIZE=4096`.
const OURS: [u8; 6] = [0, 1, 0, 0, 16, 0];
const LIST_LIMIT: usize = super::HEADER_LIST_LIMIT as usize;
/// The field that makes a GET request one of an event stream.
const ACCEPT: (&str, &str) = ("accept", "text/event-stream");
/// A header block with it, which enters the field into the table.
const EVENTS: &[u8] = b"\x82\x53\x11text/event-stream";
/// What the response to it promises.
const AGREEMENT: &[u8] = b"events";
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
    encoder: Encoder,
    /// The fields of each header block that it has sent, by its stream.
    blocks: BTreeMap<u32, Vec<Vec<Pair>>>,
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
            encoder: Encoder::new(SIZE_LIMIT),
            blocks: BTreeMap::new(),
        }
    }

    fn receive(&mut self) {
        for (head, payload) in frames(&mut self.received) {
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

    /// Encodes a header block with the fields `first` and with others. `choice` decides which, and how they are encoded.
    fn encode(&mut self, stream: u32, first: &[(&str, &str)], choice: u16) -> Vec<u8> {
        let bit = |number: u32| choice >> (number % 16) & 1 == 1;
        let how = |number: u32| match (bit(number), bit(number + 1)) {
            (true, _) => How::Incremental,
            (false, true) => How::Without,
            (false, false) => How::Never,
        };
        let mut block = Vec::new();
        if choice.is_multiple_of(11) {
            self.encoder.resize(usize::from(choice % 4) * 200, &mut block);
        } else if choice.is_multiple_of(7) {
            self.encoder.resize(0, &mut block);
            self.encoder.resize(SIZE_LIMIT, &mut block);
        }
        let path = if bit(3) { "/a" } else { "/some/other" };
        let long = "x".repeat(usize::from(choice) % 1_500);
        let others = [(":path", path), ("x-a", "c"), ("cookie", &long)];
        let all = first.iter().chain(others.iter().filter(|_| !choice.is_multiple_of(5)));
        let fields = (0..).zip(all).map(|(number, field)| {
            let field = pair(*field);
            self.encoder.shortest(&field, how(number), bit(number + 4), &mut block);
            field
        });
        let fields = fields.collect();
        self.blocks.entry(stream).or_default().push(fields);
        block
    }

    fn send_block(&mut self, flags: u8, stream: u32, block: &[u8], is_split: bool) {
        if is_split {
            let (first, second) = block.split_at(block.len() / 2);
            self.sent.extend(frame(HEADERS, flags, stream, first));
            self.sent.extend(frame(CONTINUATION, END_HEADERS, stream, second));
        } else {
            self.sent.extend(frame(HEADERS, flags | END_HEADERS, stream, block));
        }
    }

    fn begin(&mut self, ends: bool, choice: u16) {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.bytes.insert(stream, 0);
        if !ends {
            self.open.push(stream);
        }
        let block = self.encode(stream, &[(":method", "POST")], choice);
        self.send_block(if ends { END_STREAM } else { 0 }, stream, &block, choice.is_multiple_of(3));
    }

    fn begin_events(&mut self, choice: u16) {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.bytes.insert(stream, 0);
        // The acknowledgements that are missing change this window too.
        let missing: i64 = self.window_changes.iter().sum();
        self.events.insert(stream, (self.initial_window - missing, false));
        let block = self.encode(stream, &[(":method", "GET"), ACCEPT], choice);
        self.send_block(END_STREAM, stream, &block, false);
    }

    /// Ends a stream with trailers.
    fn send_trailers(&mut self, which: usize, choice: u16) {
        if self.open.is_empty() {
            return;
        }
        let stream = self.open.remove(which % self.open.len());
        let block = self.encode(stream, &[("x-trailers", "yes")], choice);
        self.send_block(END_STREAM, stream, &block, choice.is_multiple_of(3));
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
    /// The header blocks of their requests, as the interposer has kept them.
    kept: BTreeMap<u32, Bytes>,
    decoder: Decoder,
    /// The header block so far, with its first frame.
    block: Option<(Head, Vec<u8>)>,
    /// The fields of each header block of the client, by its stream.
    blocks: BTreeMap<u32, Vec<Vec<Pair>>>,
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
            kept: BTreeMap::new(),
            decoder: Decoder::new(),
            block: None,
            blocks: BTreeMap::new(),
        }
    }

    fn receive(&mut self) {
        let preface = self.preface_left.min(self.received.len());
        self.received.drain(..preface);
        self.preface_left -= preface;
        for (head, payload) in frames(&mut self.received) {
            if matches!(head.frame_type, HEADERS | CONTINUATION) {
                if let Some((head, fields)) = self.receive_fragment(head, payload) {
                    self.receive_fields(head, fields);
                }
            } else {
                assert!(self.block.is_none(), "{head:?} inside a header block");
                self.receive_frame(head, &payload);
            }
        }
    }

    /// Returns the fields and the first frame of a header block when it is complete.
    fn receive_fragment(&mut self, head: Head, payload: Vec<u8>) -> Option<(Head, Vec<Pair>)> {
        let (first, block) = match (head.frame_type, self.block.take()) {
            (HEADERS, None) => (head, payload),
            (CONTINUATION, Some((first, block))) => (first, [block, payload].concat()),
            _ => panic!("{head:?} outside a header block, or inside another"),
        };
        if head.has(END_HEADERS) {
            return Some((first, self.decoder.decode(&block)));
        }
        self.block = Some((first, block));
        None
    }

    fn receive_fields(&mut self, head: Head, fields: Vec<Pair>) {
        let stream = head.stream;
        if fields.len() > LIST_LIMIT / 60 {
            return self.refuse(stream, &fields);
        }
        if fields.last().is_some_and(|(name, _)| name == STREAM_FIELD) {
            return self.receive_events(stream, fields);
        }
        self.assert_has_begun(head);
        let last = self.streams.keys().next_back().copied().unwrap_or(self.former);
        if last < stream {
            assert!(!fields.contains(&pair(ACCEPT)), "the request of stream {stream} is not kept");
            self.streams.insert(stream, (false, false));
        } else {
            assert_eq!(fields[0], pair(("x-trailers", "yes")), "a stream begins twice: {head:?}");
        }
        self.blocks.entry(stream).or_default().push(fields);
        self.end_of_client(head);
    }

    fn assert_has_begun(&self, head: Head) {
        let is_of_stream =
            head.stream > self.former && head.frame_type != PRIORITY && head.frame_type != GREASE;
        if self.generation > 0 && (is_of_stream || head.frame_type == PING) {
            assert!(self.is_acknowledged && self.has_begun, "{head:?} arrives before h2 has begun");
        }
    }

    fn end_of_client(&mut self, head: Head) {
        // Trailers may follow the client's RST_STREAM of a stream of a former instance.
        if head.has(END_STREAM)
            && let Some(ended) = self.streams.get_mut(&head.stream)
        {
            ended.0 = true;
        }
    }

    fn receive_frame(&mut self, head: Head, payload: &[u8]) {
        let Head { frame_type, stream, .. } = head;
        if let Some(window) = self.events.get_mut(&stream)
            && frame_type == WINDOW_UPDATE
        {
            *window += i64::from(increment(payload).expect("the payload has four bytes"));
            assert!(*window < 1 << 31, "FLOW_CONTROL_ERROR: {head:?}");
            return;
        }
        self.assert_has_begun(head);
        if stream > 0 && matches!(frame_type, DATA | RST_STREAM | WINDOW_UPDATE) {
            if stream <= self.former && !self.streams.contains_key(&stream) {
                // The stream is closed. Like h2, this discards the DATA and later grants its bytes again.
                if frame_type == DATA {
                    self.receive_window -= length(head);
                    assert!(self.receive_window >= 0, "FLOW_CONTROL_ERROR: {head:?}");
                    self.sent.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 5]));
                }
                return;
            }
            assert!(self.streams.contains_key(&stream), "a frame on an idle stream: {head:?}");
        }
        match frame_type {
            DATA => {
                self.receive_window -= length(head);
                assert!(self.receive_window >= 0, "FLOW_CONTROL_ERROR: {head:?}");
                *self.bytes.entry(stream).or_default() += length(head);
                self.end_of_client(head);
            }
            RST_STREAM => {
                self.streams.insert(stream, (true, true));
                self.events.remove(&stream);
                self.asked.retain(|(asked, _)| *asked != stream);
            }
            WINDOW_UPDATE if stream == 0 => {
                let granted = increment(payload).expect("the payload has four bytes");
                assert!(granted > 0, "PROTOCOL_ERROR: {head:?}");
                self.send_window += i64::from(granted);
            }
            SETTINGS if head.has(ACK) => {
                assert!(!self.is_acknowledged, "a SETTINGS ACK without SETTINGS");
                self.is_acknowledged = true;
            }
            SETTINGS => self.receive_settings(payload),
            PING if head.has(ACK) => {
                self.pings = self.pings.checked_sub(1).expect("a PING ACK without a PING");
            }
            PING => self.sent.extend(frame(PING, ACK, 0, payload)),
            _ => {}
        }
    }

    fn receive_settings(&mut self, payload: &[u8]) {
        self.sent.extend(frame(SETTINGS, ACK, 0, &[]));
        for setting in payload.chunks(6) {
            let value = u32::from_be_bytes(setting[2..].try_into().expect("six bytes"));
            match setting[..2] {
                [0, 1] => self.table = value,
                [0, 4] => {
                    let window = value.into();
                    self.events.values_mut().for_each(|one| *one += window - self.initial_window);
                    self.initial_window = window;
                }
                _ => {}
            }
        }
        if !self.has_begun {
            self.has_begun = true;
            self.replenish();
        }
    }

    /// A request of a resumed connection that is too large. The encoder must not use its table yet.
    fn refuse(&mut self, stream: u32, fields: &[Pair]) {
        assert_eq!(self.table, 0, "the refusal enters the header table");
        self.former = self.former.max(stream);
        let is_pseudo = |(name, _): &Pair| name.starts_with(':');
        let pseudo: Vec<_> =
            fields.iter().take_while(|field| is_pseudo(field)).map(|(name, _)| name).collect();
        let is_once = pseudo.iter().collect::<BTreeSet<_>>().len() == pseudo.len();
        if is_once && !fields[pseudo.len()..].iter().any(is_pseudo) {
            self.sent.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x20\x48431"));
        } else {
            self.sent.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 1]));
        }
    }

    /// The request of an event stream arrives. The last of its fields is that of the interposer.
    fn receive_events(&mut self, stream: u32, mut fields: Vec<Pair>) {
        assert_eq!(fields.pop(), Some((STREAM_FIELD.to_owned(), stream.to_string())));
        let blocks = self.blocks.entry(stream).or_default();
        blocks.push(fields);
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
            if let Some(kept) = self.endless.open(stream) {
                let fields = Decoder::new().decode(&kept);
                assert_eq!(
                    Some(&fields),
                    self.blocks[&stream].last(),
                    "another decoder decodes other fields"
                );
                self.kept.insert(stream, kept);
            }
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
            Some(Continuation {
                block: self.kept[&stream].clone(),
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
    /// The header blocks that have reached former instances of h2, by their streams, and the bytes of each stream.
    reached_h2: BTreeMap<u32, Vec<Vec<Pair>>>,
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
            reached_h2: BTreeMap::new(),
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
        for (stream, blocks) in std::mem::take(&mut self.h2.blocks) {
            let reached = self.reached_h2.entry(stream).or_default();
            // The request of an event stream reaches each instance of h2 again.
            let is_again = reached.first() == blocks.first() && !reached.is_empty();
            reached.extend(blocks.into_iter().skip(is_again.into()));
        }
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
        self.interposer = Interposer::resume(Http2State { streams, ..state }).expect("the table is valid");
        self.h2 = H2::new(self.moves, self.interposer.endless());
    }

    fn act(&mut self, frame_type: u8, which: u16, size: i64) {
        let index = usize::from(which);
        let stream = (u32::from(which) % self.client.next_stream) | 1;
        let is_begun = stream < self.client.next_stream;
        match frame_type % 23 {
            0 | 1 => self.client.begin(which.is_multiple_of(2), which),
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
            16 => self.client.begin_events(which),
            17 => self.h2.answer_events(!which.is_multiple_of(4)),
            18 | 19 => self.h2.poll_events(index, size, which.is_multiple_of(16)),
            20 => self.client.grant_events(index, size),
            22 => self.client.send_trailers(index, which),
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
                self.reached_h2.contains_key(stream) || self.reset.contains(stream),
                "stream {stream} has not reached h2"
            );
            if let Some(reached) = self.reached_h2.get(stream).filter(|_| !self.reset.contains(stream)) {
                assert_eq!(reached, &self.client.blocks[stream], "the fields of stream {stream}");
            }
            if !self.reset.contains(stream) {
                let reached = self.bytes.get(stream).copied().unwrap_or(0);
                assert_eq!(reached, *sent, "stream {stream}");
            }
        }
        assert_eq!(self.h2.receive_window, self.interposer.state().receive_window);
        assert_eq!(self.h2.receive_window, self.client.send_window, "both sides agree on the window");
        assert_eq!(self.h2.table, FIRST_HEADER_TABLE_SIZE, "h2 has the client's table size");
        assert_eq!(self.h2.decoder.table, self.client.encoder.table, "h2 has the client's header table");
        assert!(self.client.events.is_empty(), "every event stream ends");
        assert_eq!(self.client.unanswered, 0, "every PING and SETTINGS of the client is answered");
        self.moves
    }
}

/// One step of a random test: the action, a number that selects its stream, a size in bytes, and then the size and the
/// number of the pieces in which bytes are passed on.
type Act = (u8, u16, i64, usize, usize);

fn play(acts: impl IntoIterator<Item = Act>) {
    let mut world = World::new();
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
            let mut interposer = if *is_resumed { resumed(Http2State::default()) } else { Interposer::new() };
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

fn resumed(state: Http2State) -> Interposer {
    Interposer::resume(state).unwrap_or_else(|error| panic!("{error:?}"))
}

/// An interposer whose client and h2 have exchanged their settings.
fn begun() -> Interposer {
    let mut interposer = Interposer::new();
    interposer.receive(&Client::new().sent);
    interposer.sent(&[frame(SETTINGS, 0, 0, &OURS), frame(SETTINGS, ACK, 0, &[])].concat());
    interposer.receive(&frame(SETTINGS, ACK, 0, &[]));
    interposer.for_h2().clear();
    interposer
}

const REQUEST: u8 = END_STREAM | END_HEADERS;

/// h2 refuses such a block too, and ends the connection.
#[test]
fn connection_whose_header_table_is_not_known_is_immovable() {
    for (block, moves) in [
        (&b"\x82"[..], true),
        (b"\x20\x82", true),
        (b"\x82\x20", false),
        (b"\x3f\xe2\x1f\x82", false),
        (b"\xbe", false),
        (b"\x82\xff\xff\xff\xff\xff\xff", false),
    ] {
        for in_place in [false, true] {
            let mut interposer = begun();
            let request = frame(HEADERS, REQUEST, 1, block);
            if in_place {
                assert_eq!(interposer.receive_in_place(&request), request.len());
            } else {
                interposer.receive(&request);
            }
            interposer.sent(&frame(HEADERS, REQUEST, 1, b"head"));
            interposer.for_h2().clear();
            interposer.hold();
            let (is_quiescent, is_immovable) = (interposer.is_quiescent(), interposer.is_immovable());
            assert_eq!((is_quiescent, is_immovable), (moves, !moves), "{block:?}");
        }
    }
}

#[test]
fn state_with_an_invalid_header_table_is_refused() {
    let state = Http2State { header_table: Bytes::from_static(b"\xbe"), ..Http2State::default() };
    assert!(Interposer::resume(state).is_err());
}

/// The table of a connection of which every stream is an open event stream is not given to h2 in a request of its own, because
/// no stream is left for that.
#[test]
fn header_table_moves_with_the_event_streams_if_no_other_stream_is_left() {
    let mut world = World::new();
    for _ in 0..2 {
        world.client.begin_events(0b11_1011);
    }
    for moves in 1..4 {
        world.carry(10_000, usize::MAX);
        world.h2.answer_events(true);
        world.h2.answer_events(true);
        world.carry(10_000, usize::MAX);
        world.interposer.hold();
        world.is_holding = true;
        world.carry(10_000, usize::MAX);
        assert_eq!(world.moves, moves);
    }
    assert!(world.client.encoder.table.size() > 0);
    world.carry(10_000, usize::MAX);
    assert_eq!(world.h2.decoder.table, world.client.encoder.table);
    world.end();
}

/// The requests of the open streams would give another h2 a table without the fields of a block that is not one of them.
#[test]
fn connection_whose_open_streams_do_not_make_its_header_table_does_not_move() {
    let mut interposer = begun();
    interposer.receive(&frame(HEADERS, REQUEST, 1, EVENTS));
    let streams = interposer.endless();
    let block = streams.request(1).and_then(|_| streams.open(1)).expect("the request is kept");
    interposer.sent(&frame(HEADERS, END_HEADERS, 1, b"head"));
    interposer.for_h2().clear();
    interposer.hold();
    interposer.stop_endless(Waker::noop());
    let agreement = Bytes::from_static(AGREEMENT);
    let continuation = || Some(Continuation { block, agreement, body: Bytes::new(), messages: 0 });
    let turn = streams.poll_body(1, &Context::from_waker(Waker::noop()), true, continuation);
    assert!(matches!(turn, BodyTurn::Rests) && interposer.is_quiescent());
    interposer.receive(&frame(HEADERS, REQUEST, 1, b"\x40\x01a\x01b"));
    interposer.for_h2().clear();
    assert!(!interposer.is_quiescent());
}

/// Trailers that entered a field into the table would be decoded before the held request, which was encoded before them.
#[test]
fn trailers_after_a_held_request_are_held_and_demand_a_release() {
    let mut interposer = begun();
    interposer.receive(&frame(HEADERS, END_HEADERS, 1, b"\x83"));
    interposer.for_h2().clear();
    interposer.hold();
    let held =
        [frame(HEADERS, REQUEST, 3, b"\x83\x40\x01a\x01b"), frame(HEADERS, REQUEST, 1, b"\xbe")].concat();
    interposer.receive(&held);
    assert!(interposer.for_h2().is_empty() && interposer.is_full());
    interposer.release();
    assert_eq!(interposer.for_h2(), &held);
    assert!(!interposer.is_full());
    // The next ones are held only if a request is.
    interposer.for_h2().clear();
    interposer.receive(&frame(HEADERS, END_HEADERS, 5, b"\x83"));
    interposer.for_h2().clear();
    interposer.hold();
    let trailers = frame(HEADERS, REQUEST, 5, b"\xbe");
    interposer.receive(&trailers);
    assert!(interposer.for_h2() == &trailers && !interposer.is_full());
}

/// Each case: what the client sends before the request of an event stream that refers to its header table, and whether
/// that request is kept.
#[test]
fn request_that_refers_to_the_header_table_is_kept_if_the_table_is_known() {
    let accept = EVENTS.split_at(1).1;
    let first = |flags, block: &[u8]| frame(HEADERS, flags, 1, block);
    let request = [b"\x83", accept].concat();
    for (before, is_kept) in [
        (first(REQUEST, &request), true),
        // The first frame of a block has half of a field.
        (
            [first(END_STREAM, &request[..5]), frame(CONTINUATION, END_HEADERS, 1, &request[5..])].concat(),
            true,
        ),
        // Trailers, also those of a stream that the server has ended.
        ([first(END_HEADERS, b"\x83"), first(REQUEST, accept)].concat(), true),
        ([first(REQUEST, b"\x83"), first(REQUEST, accept)].concat(), true),
        ([first(REQUEST, &request), frame(HEADERS, REQUEST, 3, b"\x83\x20")].concat(), false),
        ([first(REQUEST, &request), frame(HEADERS, REQUEST, 3, b"\x20\x83")].concat(), false),
        (first(REQUEST, b"\x83"), false),
    ] {
        for in_place in [false, true] {
            let mut interposer = begun();
            let all = [&before[..], &frame(HEADERS, REQUEST, 5, b"\x82\xbe")].concat();
            if in_place {
                let passed = interposer.receive_in_place(&all);
                assert_eq!(passed + interposer.for_h2().len() > all.len(), is_kept, "{all:?}");
            } else {
                interposer.receive(&all);
            }
            let streams = interposer.endless();
            let kept = streams.request(5).and_then(|_| streams.open(5));
            let fields = kept.map(|kept| Decoder::new().decode(&kept));
            assert_eq!(fields, is_kept.then(|| vec![pair((":method", "GET")), pair(ACCEPT)]), "{before:?}");
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
        let has_read_all = interposer.for_h2().is_empty();
        assert!(has_read_all || !interposer.is_stuck(), "h2 has to read first");
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
    world.client.begin(true, 1);
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
        let mut interposer = resumed(Http2State::default());
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
