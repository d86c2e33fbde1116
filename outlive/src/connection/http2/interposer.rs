//! An HTTP/2 connection as it passes between its client and h2: what is agreed upon is noted, so that another
//! process can go on with a fresh h2, which is then played the beginning that it missed.
//!
//! A connection comes to rest when no stream is open: frames of streams that begin meanwhile are held, and travel
//! as bytes that were not consumed. What the fresh h2 has to believe, and the client must not notice:
//! - h2 is told the client's settings, and its own are acknowledged in the client's name. It applies its stream
//!   window at that acknowledgement and its connection window when its WINDOW_UPDATE goes out, so nothing of the
//!   client reaches it before both.
//! - The connection's windows are what they are: h2's first WINDOW_UPDATE says what is missing; and where the client
//!   takes less than the 65,535 bytes that h2 begins with, DATA beyond that waits here, and what the client grants
//!   pays this debt first.
//! - HPACK (RFC 7541): our decoder remembers nothing, because we have said `SETTINGS_HEADER_TABLE_SIZE=0`; a client that
//!   does not heed it (Go before 1.20) stays. Our encoder begins empty, and the client's table agrees: indices count
//!   from the newest entry, and the oldest goes first.
//! - A fresh h2 takes the streams of the former process for idle ones, on which most frames are connection errors. So
//!   it first receives a request on the last of them and refuses it. From then on it knows that all of them are closed,
//!   and judges what still comes for them as it would if it had served them: nothing of that is judged here.

use bytes::{Bytes, BytesMut};

use super::HEADER_LIST_LIMIT;
use super::frame::{
    ACK, CONTINUATION, DATA, Disposition, END_HEADERS, END_STREAM, FrameParser, GOAWAY, HEAD_LENGTH, HEADERS,
    Head, PING, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, increment, put_goaway,
    put_oversized_request, put_settings, put_settings_ack, put_window_update, take,
};
use crate::connection::PREFACE;
use crate::transport::http2_state::{
    FIRST_HEADER_TABLE_SIZE, FIRST_WINDOW, HEADER_TABLE_SIZE, Http2State, Settings, Table,
};

/// A client that begins more while it is held is held no longer, in bytes.
const HELD_LIMIT: usize = 1280 * 1024;
/// Half of the connection's window, in bytes: what is held beyond that leaves too little to an upload that is open.
const HELD_BESIDE_UPLOADS: usize = super::WINDOW as usize / 2;
/// How much of what h2 sends may wait for the client to grant more, in bytes. h2 begins with a window of 65,535 bytes
/// even where the client takes less, so that much DATA may wait. Behind it wait all further answers, because HPACK fixes
/// the order of header blocks. An answer without a body needs no window, so there is no other limit to them.
const WAITING_LIMIT: usize = 1024 * 1024;
/// Streams that are kept account of: more than h2 lets a client have.
const STREAMS_LIMIT: usize = 1000;
/// Frames are no longer, in bytes (RFC 9113 section 4.2); h2 objects to any that are.
const FRAME_LIMIT: usize = 16 * 1024;
/// Of the payload of a PING, in bytes; h2 objects to any other.
const PING_LENGTH: usize = 8;

pub struct Interposer {
    state: Http2State,
    /// Streams up to this one are a former process's.
    former: u32,
    /// The others that have not ended, in order, and which side of them has.
    open: Vec<(u32, Ended)>,
    /// Where the client's bytes are.
    preface_left: usize,
    from_client: FrameParser,
    /// What becomes of a header block that is not whole yet.
    block: Option<Disposition>,
    hold_state: HoldState,
    held: BytesMut,
    to_h2: BytesMut,
    /// Where h2's bytes are, while they pass as they come.
    from_h2: FrameParser,
    /// What has come of a frame of h2's, while they do not.
    partial: BytesMut,
    to_client: BytesMut,
    /// Frames of h2's that the client has no room for.
    waiting: BytesMut,
    /// What of its beginning a fresh h2 has still to say.
    preamble: Option<Preamble>,
    /// How much h2 believes that the client takes, and it does not, in bytes.
    debt: i64,
    unanswered: Unanswered,
    /// Whether this connection ends here.
    is_ending: bool,
}

#[derive(Clone, Copy, Default)]
struct Ended {
    client: bool,
    h2: bool,
}

/// Whether new streams may begin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HoldState {
    Open,
    /// They are held.
    Holding,
    /// What was held goes on once the frame that is passing is whole.
    Releasing,
}

/// What a fresh h2 says first, each once.
struct Preamble {
    has_sent_settings: bool,
    has_sent_window: bool,
    told: ToldToH2,
}

/// What a fresh h2 has been told in the client's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ToldToH2 {
    /// A request on the last stream of the former process, and settings that forbid a table of headers: h2 encodes the
    /// refusal of that request, and the client does not receive it. If it entered the table, the client's table would
    /// differ from then on.
    FormerStreams,
    /// The client's settings.
    Settings,
    /// h2 has acknowledged them.
    All,
}

/// What was said and not answered.
#[derive(Default)]
struct Unanswered {
    /// SETTINGS of ours, by the client.
    ours: u32,
    /// ... that were acknowledged in its name.
    ours_in_its_name: u32,
    /// SETTINGS of the client's, by h2.
    theirs: u32,
    /// PING of the client's, by h2.
    pings: u32,
    /// PING of h2's, by the client.
    own_pings: u32,
}

impl Interposer {
    /// Of a connection that begins here.
    pub fn new() -> Self {
        Self {
            state: Http2State::default(),
            former: 0,
            open: Vec::new(),
            preface_left: PREFACE.len(),
            from_client: FrameParser::START,
            block: None,
            hold_state: HoldState::Open,
            held: BytesMut::new(),
            to_h2: BytesMut::new(),
            from_h2: FrameParser::START,
            partial: BytesMut::new(),
            to_client: BytesMut::new(),
            waiting: BytesMut::new(),
            preamble: None,
            debt: 0,
            unanswered: Unanswered::default(),
            is_ending: false,
        }
    }

    /// Of a connection that began in another process.
    pub fn resume(state: Http2State) -> Self {
        let former = state.last_stream;
        let mut to_h2 = BytesMut::from(PREFACE);
        let told = if former > 0 {
            put_settings(&Settings::default().or(HEADER_TABLE_SIZE, 0).payload(), &mut to_h2);
            put_oversized_request(former, HEADER_LIST_LIMIT, &mut to_h2);
            ToldToH2::FormerStreams
        } else {
            put_settings(&state.theirs.payload(), &mut to_h2);
            ToldToH2::Settings
        };
        let granted = state.send_window - FIRST_WINDOW;
        if let Ok(granted @ 1..) = u32::try_from(granted) {
            put_window_update(granted, &mut to_h2);
        }
        Self {
            former,
            state,
            preface_left: 0,
            to_h2,
            preamble: Some(Preamble { has_sent_settings: false, has_sent_window: false, told }),
            debt: (-granted).max(0),
            ..Self::new()
        }
    }

    // ---- coming to rest ----

    /// Holds streams that begin from now on.
    pub fn hold(&mut self) {
        if self.hold_state == HoldState::Open {
            self.hold_state = HoldState::Holding;
        }
    }

    /// Lets go on what was held.
    pub fn release(&mut self) {
        if self.hold_state == HoldState::Holding {
            self.hold_state = HoldState::Releasing;
            self.release_held();
        }
    }

    /// Whether it cannot move any more, whatever it does.
    pub fn is_immovable(&self) -> bool {
        self.is_ending || self.state.table == Table::InUse
    }

    /// Whether the client sends too much to be held any longer.
    pub fn is_full(&self) -> bool {
        self.hold_state == HoldState::Holding && self.held.len() > HELD_LIMIT
    }

    /// Whether more waits for the client to grant a window than a client in good faith lets accumulate.
    pub fn has_too_much_waiting(&self) -> bool {
        self.waiting.len() > WAITING_LIMIT
    }

    /// Whether what is held takes so much of the connection's window that an upload which is open hardly gets any.
    pub fn starves_uploads(&self) -> bool {
        self.held.len() > HELD_BESIDE_UPLOADS
    }

    /// Whether it could go on with a fresh h2: nothing is open, under way or unanswered.
    pub fn is_quiescent(&self) -> bool {
        self.hold_state == HoldState::Holding && self.is_settled()
    }

    /// The same, but for streams that may still begin.
    fn is_settled(&self) -> bool {
        self.open.is_empty()
            && self.is_between_frames()
            && self.preface_left == 0
            && self.preamble.is_none()
            && self.from_h2.is_start()
            && [&self.to_h2, &self.partial, &self.to_client, &self.waiting]
                .into_iter()
                .all(BytesMut::is_empty)
            && matches!(self.unanswered, Unanswered { ours: 0, theirs: 0, pings: 0, .. })
            && !self.is_immovable()
    }

    /// Whether the client owes what it takes to come to rest, and is owed nothing itself: it has not sent the whole
    /// preface, has not acknowledged our settings, or has begun a header block and not ended it. As long as it stays
    /// silent, no other process can go on with this connection.
    pub fn is_stuck(&self) -> bool {
        self.owes_nothing() && !self.is_settled()
    }

    /// Whether no request that the client has sent whole is unanswered. A stream whose header block has not ended is not
    /// a request yet.
    pub fn owes_nothing(&self) -> bool {
        let is_begun = |stream| self.block == Some(Disposition::Forward) && stream == self.state.last_stream;
        self.waiting.is_empty() && self.open.iter().all(|(stream, _)| is_begun(*stream))
    }

    /// What is left to send where h2 is not waited for any longer: GOAWAY with the last stream that h2 knows of.
    pub fn final_goaway(mut self) -> BytesMut {
        let is_between_frames = self.from_h2.is_start() && self.partial.is_empty();
        let mut bytes = std::mem::take(self.for_client());
        // Inside another frame it would be taken for a part of that frame.
        if is_between_frames {
            put_goaway(self.state.last_stream, &mut bytes);
        }
        bytes
    }

    /// Comes to rest where nothing is in its way; else nothing changes.
    pub fn park_if_quiescent(&mut self) -> bool {
        if self.hold_state != HoldState::Open {
            return false;
        }
        self.hold();
        let is_quiescent = self.is_quiescent();
        if !is_quiescent {
            self.release();
        }
        is_quiescent
    }

    /// What another process has to know, and what was not consumed.
    pub fn into_state(self) -> (Http2State, Bytes) {
        let mut unread = self.held;
        unread.extend_from_slice(&self.from_client.buffered());
        (self.state, unread.freeze())
    }

    #[cfg(test)]
    pub fn state(&self) -> &Http2State {
        &self.state
    }

    /// Whether no frame of the client's has gone on in part.
    fn is_between_frames(&self) -> bool {
        let is_resumed =
            |disposition: &Disposition| matches!(disposition, Disposition::Forward | Disposition::Discard);
        !matches!(&self.from_client, FrameParser::Payload(disposition, _) if is_resumed(disposition))
            && !self.block.as_ref().is_some_and(is_resumed)
    }

    fn release_held(&mut self) {
        if self.hold_state != HoldState::Releasing || !self.is_between_frames() {
            return;
        }
        self.hold_state = HoldState::Open;
        self.block = None;
        let held = std::mem::take(&mut self.held);
        let buffered = std::mem::replace(&mut self.from_client, FrameParser::START).buffered();
        self.receive(&held);
        self.receive(&buffered);
    }

    // ---- from the client to h2 ----

    /// Whether the client's bytes may reach h2.
    pub fn is_begun(&self) -> bool {
        self.preamble.is_none()
    }

    /// What is for h2 to read.
    pub fn for_h2(&mut self) -> &mut BytesMut {
        &mut self.to_h2
    }

    /// Takes what the client has sent, of which the beginning may be for h2 as it is: gives its length. The others
    /// are for h2 by way of `for_h2`.
    pub fn receive_in_place(&mut self, all: &[u8]) -> usize {
        let mut bytes = all;
        if self.preface_left > 0 || !self.to_h2.is_empty() {
            self.receive(bytes);
            return 0;
        }
        loop {
            let passed = all.len() - bytes.len();
            match &mut self.from_client {
                FrameParser::Payload(Disposition::Forward, left) => {
                    *left -= take(&mut bytes, *left).len();
                    if *left > 0 {
                        return all.len();
                    }
                    self.end_frame();
                    if !self.to_h2.is_empty() {
                        // What was held goes on behind it.
                        let passed = all.len() - bytes.len();
                        self.receive(bytes);
                        return passed;
                    }
                }
                FrameParser::Head(_, 0) if bytes.is_empty() => return all.len(),
                FrameParser::Head(_, 0) => {
                    let head =
                        bytes.first_chunk::<HEAD_LENGTH>().copied().map(|head| (head, Head::decode(head)));
                    let is_plain = |(_, head): &([u8; HEAD_LENGTH], Head)| match head.frame_type {
                        DATA => true,
                        SETTINGS => false,
                        WINDOW_UPDATE if head.stream == 0 => false,
                        _ => bytes.len() >= HEAD_LENGTH + head.length,
                    };
                    let Some((raw, head)) = head.filter(is_plain) else {
                        self.receive(bytes);
                        return passed;
                    };
                    bytes = &bytes[HEAD_LENGTH..];
                    let payload = take(&mut { bytes }, head.length);
                    self.note_table_size(head, payload);
                    let disposition = self.on_client_frame(head, payload);
                    if disposition != Disposition::Forward {
                        self.begin_payload(raw, head, disposition);
                        self.receive(bytes);
                        return passed;
                    }
                    self.from_client = FrameParser::Payload(disposition, head.length);
                }
                FrameParser::Head(..) | FrameParser::Payload(..) | FrameParser::Whole(..) => {
                    self.receive(bytes);
                    return passed;
                }
            }
        }
    }

    /// Takes what the client has sent.
    pub fn receive(&mut self, mut bytes: &[u8]) {
        let preface = take(&mut bytes, self.preface_left);
        self.preface_left -= preface.len();
        self.to_h2.extend_from_slice(preface);
        while !bytes.is_empty() {
            match &mut self.from_client {
                FrameParser::Head(..) => {
                    if let Some(bytes) = self.from_client.take_head(&mut bytes) {
                        self.receive_head(bytes);
                    }
                }
                FrameParser::Payload(disposition, left) => {
                    let part = take(&mut bytes, *left);
                    *left -= part.len();
                    let (disposition, is_whole) = (*disposition, *left == 0);
                    self.go(disposition, part);
                    if is_whole {
                        self.end_frame();
                    }
                }
                FrameParser::Whole(head, _, payload) => {
                    payload.extend_from_slice(take(&mut bytes, head.length - payload.len()));
                    if payload.len() == head.length {
                        self.receive_whole();
                    }
                }
            }
        }
    }

    fn receive_head(&mut self, bytes: [u8; HEAD_LENGTH]) {
        let head = Head::decode(bytes);
        // Half a frame is no hindrance to a move.
        if head.frame_type != DATA && head.length <= FRAME_LIMIT {
            self.from_client = FrameParser::Whole(head, bytes, Vec::with_capacity(head.length));
            if head.length == 0 {
                self.receive_whole();
            }
            return;
        }
        let disposition = self.on_client_frame(head, &[]);
        self.begin_payload(bytes, head, disposition);
    }

    fn begin_payload(&mut self, bytes: [u8; HEAD_LENGTH], head: Head, disposition: Disposition) {
        self.go(disposition, &bytes);
        self.from_client = FrameParser::Payload(disposition, head.length);
        if head.length == 0 {
            self.end_frame();
        }
    }

    fn go(&mut self, disposition: Disposition, bytes: &[u8]) {
        match disposition {
            Disposition::Forward => self.to_h2.extend_from_slice(bytes),
            Disposition::Hold => self.held.extend_from_slice(bytes),
            Disposition::Discard => {}
        }
    }

    fn end_frame(&mut self) {
        self.from_client = FrameParser::START;
        self.release_held();
    }

    /// What becomes of a frame of the client's; `payload` is whole where there is no DATA in it.
    fn on_client_frame(&mut self, head: Head, payload: &[u8]) -> Disposition {
        let Head { length, frame_type, stream, .. } = head;
        if let Some(disposition) = self.block {
            if frame_type != CONTINUATION {
                // h2 ends the connection when it sees this frame inside a header block (RFC 9113 section 6.10), so the
                // frame must not leave its place.
                self.is_ending = true;
            } else if head.has(END_HEADERS) {
                self.block = None;
            }
            return disposition;
        }
        // Headers from before the client knew our settings are for a decoder that has a table: they do not wait.
        let is_new = self.hold_state == HoldState::Holding
            && stream > self.state.last_stream
            && self.has_been_acknowledged();
        let disposition = if is_new { Disposition::Hold } else { Disposition::Forward };
        match frame_type {
            DATA if !is_new => {
                self.state.receive_window -= size(length);
                if head.has(END_STREAM) {
                    self.end_half(stream, |ended| ended.client = true);
                }
            }
            HEADERS => {
                if !is_new && self.state.table == Table::Unknown && self.has_been_acknowledged() {
                    self.state.table =
                        if head.sets_table_size(payload) { Table::Empty } else { Table::InUse };
                }
                if !is_new {
                    self.begin_stream(stream);
                    if head.has(END_STREAM) {
                        self.end_half(stream, |ended| ended.client = true);
                    }
                }
                self.block = (!head.has(END_HEADERS)).then_some(disposition);
            }
            // h2 refuses it once its header block is whole.
            PUSH_PROMISE => self.block = (!head.has(END_HEADERS)).then_some(disposition),
            RST_STREAM if !is_new => self.end_stream(stream),
            PING if head.has(ACK) && stream == 0 && length == PING_LENGTH => {
                match self.unanswered.own_pings.checked_sub(1) {
                    Some(left) => self.unanswered.own_pings = left,
                    // The ping was sent by a former process. h2 would ignore this, but log a warning.
                    None => return Disposition::Discard,
                }
            }
            PING if !head.has(ACK) => self.unanswered.pings = self.unanswered.pings.saturating_add(1),
            GOAWAY => self.is_ending = true,
            _ => {}
        }
        disposition
    }

    /// Takes a client at its word that says before it acknowledges our settings that its encoder remembers nothing. The
    /// JDK's HttpClient does so in its first headers. It has nothing to say after the acknowledgement then, because the
    /// size does not change any more (RFC 7541 section 4.2).
    fn note_table_size(&mut self, head: Head, payload: &[u8]) {
        if head.frame_type == HEADERS
            && !self.has_been_acknowledged()
            && let Some(is_empty) = head.empties_table(payload)
        {
            self.state.table = if is_empty { Table::Empty } else { Table::Unknown };
        }
    }

    /// Whether the client knows our settings.
    fn has_been_acknowledged(&self) -> bool {
        self.former > 0 || (self.unanswered.ours == 0 && self.state.ours != Settings::default())
    }

    fn begin_stream(&mut self, stream: u32) {
        // Those of a client have odd numbers; h2 objects to any other.
        if stream <= self.state.last_stream || stream.is_multiple_of(2) {
            return;
        }
        self.state.last_stream = stream;
        if self.open.len() < STREAMS_LIMIT {
            self.open.push((stream, Ended::default()));
        } else {
            self.is_ending = true;
        }
    }

    fn end_half(&mut self, stream: u32, end: impl FnOnce(&mut Ended)) {
        if let Ok(at) = self.open.binary_search_by_key(&stream, |(open, _)| *open) {
            let ended = &mut self.open[at].1;
            end(ended);
            if ended.client && ended.h2 {
                self.open.remove(at);
            }
        }
    }

    fn end_stream(&mut self, stream: u32) {
        self.end_half(stream, |ended| *ended = Ended { client: true, h2: true });
    }

    /// A frame of the client's that is whole.
    fn receive_whole(&mut self) {
        let FrameParser::Whole(head, bytes, payload) =
            std::mem::replace(&mut self.from_client, FrameParser::START)
        else {
            unreachable!("asked where one was seen")
        };
        let disposition = match head {
            // Inside a header block all that is no CONTINUATION is an error, and reaches h2 as it is.
            _ if self.block.is_some() => self.on_client_frame(head, &payload),
            Head { frame_type: WINDOW_UPDATE, stream: 0, length: 4, .. } => {
                self.receive_grant(increment(&payload).expect("four bytes"));
                Disposition::Discard
            }
            Head { frame_type: SETTINGS, stream: 0, length: 0, .. } if head.has(ACK) => {
                self.receive_acknowledgement()
            }
            Head { frame_type: SETTINGS, stream: 0, .. } if !head.has(ACK) => {
                // What makes no sense is h2's to refuse.
                self.is_ending |= !self.state.theirs.set(&payload);
                self.unanswered.theirs = self.unanswered.theirs.saturating_add(1);
                Disposition::Forward
            }
            _ => {
                self.note_table_size(head, &payload);
                self.on_client_frame(head, &payload)
            }
        };
        self.go(disposition, &bytes);
        self.go(disposition, &payload);
        self.release_held();
    }

    fn receive_acknowledgement(&mut self) -> Disposition {
        self.unanswered.ours = self.unanswered.ours.saturating_sub(1);
        match self.unanswered.ours_in_its_name.checked_sub(1) {
            Some(left) => {
                self.unanswered.ours_in_its_name = left;
                Disposition::Discard
            }
            None => Disposition::Forward,
        }
    }

    /// The client takes so much more.
    fn receive_grant(&mut self, granted: u32) {
        self.state.send_window += i64::from(granted);
        let paid = self.debt.min(granted.into());
        self.debt -= paid;
        let left = granted - u32::try_from(paid).expect("no more than was granted");
        // None at all is an error, and h2's to say.
        if left > 0 || granted == 0 {
            put_window_update(left, &mut self.to_h2);
        }
        self.send_waiting();
    }

    // ---- from h2 to the client ----

    /// Whether h2's bytes have to be looked at before they go out; else they go as they are, and `sent` is told.
    pub fn must_rewrite(&self) -> bool {
        self.preamble.is_some()
            || self.debt > 0
            || !(self.partial.is_empty() && self.to_client.is_empty() && self.waiting.is_empty())
    }

    /// What is to be sent before anything else.
    pub fn for_client(&mut self) -> &mut BytesMut {
        &mut self.to_client
    }

    /// Notes what h2 has sent as it is.
    pub fn sent(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match &mut self.from_h2 {
                FrameParser::Head(..) => {
                    let Some(bytes) = self.from_h2.take_head(&mut bytes) else { continue };
                    let head = Head::decode(bytes);
                    let is_seen = head.frame_type == SETTINGS || head.frame_type == WINDOW_UPDATE;
                    self.from_h2 = match head.length {
                        0 => FrameParser::START,
                        length if is_seen => FrameParser::Whole(head, bytes, Vec::with_capacity(length)),
                        length => FrameParser::Payload(Disposition::Forward, length),
                    };
                    if head.length == 0 || !is_seen {
                        self.note_sent(head, &[]);
                    }
                }
                FrameParser::Payload(_, left) => {
                    *left -= take(&mut bytes, *left).len();
                    if *left == 0 {
                        self.from_h2 = FrameParser::START;
                    }
                }
                FrameParser::Whole(head, _, payload) => {
                    payload.extend_from_slice(take(&mut bytes, head.length - payload.len()));
                    if payload.len() == head.length {
                        let (head, payload) = (*head, std::mem::take(payload));
                        self.from_h2 = FrameParser::START;
                        self.note_sent(head, &payload);
                    }
                }
            }
        }
    }

    /// Takes what h2 sends; what goes out of it is for the client then.
    pub fn rewrite(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(head) = self.partial.first_chunk::<HEAD_LENGTH>() {
            let head = Head::decode(*head);
            if self.partial.len() < HEAD_LENGTH + head.length {
                break;
            }
            let frame = self.partial.split_to(HEAD_LENGTH + head.length);
            if self.absorb_preamble(head, &frame[HEAD_LENGTH..]) {
                continue;
            }
            // What belongs to the connection need not wait for what belongs to its streams.
            let is_of_streams = matches!(head.frame_type, DATA | HEADERS | CONTINUATION | RST_STREAM);
            if is_of_streams && (!self.waiting.is_empty() || !self.has_room(head)) {
                self.waiting.unsplit(frame);
            } else {
                self.note_sent(head, &frame[HEAD_LENGTH..]);
                self.to_client.unsplit(frame);
            }
        }
    }

    fn has_room(&self, head: Head) -> bool {
        head.frame_type != DATA || size(head.length) <= self.state.send_window.max(0)
    }

    fn send_waiting(&mut self) {
        while let Some(bytes) = self.waiting.first_chunk::<HEAD_LENGTH>() {
            let head = Head::decode(*bytes);
            if !self.has_room(head) {
                return;
            }
            let frame = self.waiting.split_to(HEAD_LENGTH + head.length);
            self.note_sent(head, &frame[HEAD_LENGTH..]);
            self.to_client.unsplit(frame);
        }
    }

    /// What a fresh h2 says at its beginning, and the client has heard already.
    fn absorb_preamble(&mut self, head: Head, payload: &[u8]) -> bool {
        let Some(preamble) = &mut self.preamble else { return false };
        match head.frame_type {
            SETTINGS if head.has(ACK) => match preamble.told {
                // Of those without a table.
                ToldToH2::FormerStreams => {}
                ToldToH2::Settings => preamble.told = ToldToH2::All,
                ToldToH2::All => return false,
            },
            // The refusal of the request on the last stream of the former process.
            HEADERS | RST_STREAM
                if preamble.told == ToldToH2::FormerStreams && head.stream == self.former =>
            {
                preamble.told = ToldToH2::Settings;
                let theirs = self.state.theirs.clone().or(HEADER_TABLE_SIZE, FIRST_HEADER_TABLE_SIZE);
                put_settings(&theirs.payload(), &mut self.to_h2);
            }
            SETTINGS if !preamble.has_sent_settings => {
                preamble.has_sent_settings = true;
                put_settings_ack(&mut self.to_h2);
                let mut ours = Settings::default();
                ours.set(payload);
                if ours != self.state.ours {
                    self.unanswered.ours_in_its_name += 1;
                    self.unanswered.ours += 1;
                    self.state.ours = ours;
                    put_settings(payload, &mut self.to_client);
                }
            }
            WINDOW_UPDATE if head.stream == 0 && !preamble.has_sent_window => {
                preamble.has_sent_window = true;
                let wanted = FIRST_WINDOW + increment(payload).map_or(0, i64::from);
                if let Ok(missing @ 1..) = u32::try_from(wanted - self.state.receive_window) {
                    self.state.receive_window = wanted;
                    put_window_update(missing, &mut self.to_client);
                }
            }
            _ => return false,
        }
        if preamble.has_sent_settings && preamble.has_sent_window && preamble.told == ToldToH2::All {
            self.preamble = None;
        }
        true
    }

    /// Keeps account of a frame that goes to the client.
    fn note_sent(&mut self, head: Head, payload: &[u8]) {
        match head.frame_type {
            DATA => {
                self.state.send_window -= size(head.length);
                if head.has(END_STREAM) {
                    self.end_half(head.stream, |ended| ended.h2 = true);
                }
            }
            HEADERS if head.has(END_STREAM) => self.end_half(head.stream, |ended| ended.h2 = true),
            RST_STREAM => {
                // To h2 a stream that it resets has begun, whatever frame was the reason.
                if !head.stream.is_multiple_of(2) {
                    self.state.last_stream = self.state.last_stream.max(head.stream);
                }
                self.end_stream(head.stream);
            }
            SETTINGS if head.has(ACK) => self.unanswered.theirs = self.unanswered.theirs.saturating_sub(1),
            SETTINGS => {
                self.is_ending |= !self.state.ours.set(payload);
                self.unanswered.ours += 1;
            }
            PING if head.has(ACK) => self.unanswered.pings = self.unanswered.pings.saturating_sub(1),
            PING => self.unanswered.own_pings += 1,
            WINDOW_UPDATE if head.stream == 0 => {
                self.state.receive_window += increment(payload).map_or(0, i64::from);
            }
            GOAWAY => self.is_ending = true,
            _ => {}
        }
    }
}

fn size(length: usize) -> i64 {
    i64::try_from(length).expect("a frame's length has 24 bits")
}
