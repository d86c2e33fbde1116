//! The interposer between the client of an HTTP/2 connection and h2. It records the state of the connection, so that
//! another process can continue it with a fresh h2 instance, and replays to that instance the beginning that it missed.
//!
//! A connection becomes quiescent when no stream is open. The frames of streams that begin in the meantime are held,
//! and are handed over as bytes that were not consumed. To continue without the client noticing, a fresh h2 instance
//! needs:
//! - Settings: h2 receives the client's settings, and the interposer acknowledges those of h2 in the client's name. h2
//!   applies its stream window at that acknowledgement, and its connection window when it sends WINDOW_UPDATE, so bytes
//!   of the client reach h2 only after both. Otherwise h2 could take them for flow control errors.
//! - Windows: h2 starts with the initial windows, but the windows of the connection continue. Of the first
//!   WINDOW_UPDATE of h2 the client receives only the part that it is missing. If the client accepts less than the
//!   65,535 bytes with which h2 starts, DATA beyond that waits in the interposer, and later grants of the client are
//!   used for this debt first.
//! - HPACK (RFC 7541): the decoder has no dynamic table, because of `SETTINGS_HEADER_TABLE_SIZE=0`. The connection of a
//!   client that ignores this setting (Go before 1.20) is not handed over. Requests that the client sends before it has
//!   received this setting may use a table; `header_table.rs` encodes those that are kept without references to it. The
//!   encoder starts with an empty table, which is compatible with the client's older one: indices count from the newest
//!   entry, and the oldest entry is evicted first.
//! - Streams: for a fresh h2 the streams of the former process would be idle, and most frames on idle streams are
//!   connection errors. Therefore h2 first receives a request on the last of these streams, and refuses it. From then
//!   on h2 knows that all of them are closed, and judges late frames on them as if it had served them. The interposer
//!   judges no frames.
//! - Responses without end: before that, h2 receives the requests of the streams that have stopped (`endless.rs`). The
//!   client does not receive the heads of their responses, so the encoder must not enter them into its table: for h2 the
//!   client's table has size 0 until all of them are there.
//!
//! `client_frames.rs` and `h2_frames.rs` handle the two directions, `quiesce.rs` decides when the connection can be
//! handed over.

mod client_frames;
mod h2_frames;
mod quiesce;

use bytes::BytesMut;

use super::HEADER_LIST_LIMIT;
use super::endless::EndlessStreams;
use super::frame::{
    Disposition, END_HEADERS, END_STREAM, FrameParser, HEADERS, Head, put_oversized_request, put_settings,
    put_window_update,
};
use super::header_block::put_stream_field;
use super::header_table::ClientTable;
use crate::connection::PREFACE;
use crate::transport::http2_state::{
    FIRST_WINDOW, HEADER_TABLE_SIZE, Http2State, INITIAL_WINDOW_SIZE, Settings,
};
use crate::transport::stream_replay::{StreamKind, StreamReplay};

/// If a client sends more than this while new streams are held, in bytes, they are released.
const HELD_LIMIT: usize = 1280 * 1024;
/// Half of the connection's window, in bytes. Held frames beyond that would leave too little of it for uploads in
/// flight.
const HELD_BESIDE_UPLOADS: usize = super::WINDOW as usize / 2;
/// How many bytes of h2's frames may wait for a WINDOW_UPDATE of the client. h2 starts with a window of 65,535 bytes
/// even if the client accepts less, so that much DATA may wait. All further responses wait behind it, because HPACK
/// fixes the order of header blocks. Responses without a body need no window, so without this limit they could fill the
/// memory.
const WAITING_LIMIT: usize = 1024 * 1024;
/// How many open streams are recorded. h2 permits a client fewer.
const STREAMS_LIMIT: usize = 1000;
/// The longest payload of a frame, in bytes (RFC 9113 section 4.2). h2 refuses longer ones.
const FRAME_LIMIT: usize = 16 * 1024;
/// The payload of a PING, in bytes. h2 refuses any other length.
const PING_LENGTH: usize = 8;

/// One HTTP/2 connection between its client and h2. It performs no IO; `relay.rs` does that.
pub struct Interposer {
    state: Http2State,
    /// Streams up to this one were served by a former process.
    former: u32,
    /// The open streams of this process, in ascending order, and which of their sides have ended.
    open: Vec<(u32, Ended)>,
    /// The open streams whose responses may have no end.
    endless: EndlessStreams,
    /// Their numbers, so that frames of other streams need no lock.
    maybe_endless: Vec<u32>,
    replays: Replays,
    /// The client's header table. None when the client has acknowledged that it has none, or if it is not known. Requests
    /// that refer to it are not kept then.
    client_table: Option<ClientTable>,
    /// How many bytes of the preface the client has not sent.
    preface_left: usize,
    /// The position in the client's byte stream.
    from_client: FrameParser,
    /// What to do with the frames of an incomplete header block.
    block: Option<Disposition>,
    hold_state: HoldState,
    /// Frames of the client on new streams, while these are held.
    held: BytesMut,
    to_h2: BytesMut,
    /// Frames for h2 that must not interrupt a frame of the client.
    between_frames: BytesMut,
    /// The position in h2's byte stream, while it is passed on unchanged.
    from_h2: FrameParser,
    /// The beginning of a frame of h2, while its frames are rewritten.
    partial: BytesMut,
    to_client: BytesMut,
    /// Frames of h2 for which the client's window has no room, and the frames on streams after them.
    waiting: BytesMut,
    /// What a fresh h2 has not yet sent of its preamble.
    preamble: Option<Preamble>,
    /// By how much h2 overestimates the client's window, in bytes.
    debt: i64,
    unanswered: Unanswered,
    /// Whether the connection must end in this process.
    is_ending: bool,
}

/// The requests of another process that h2 has to answer anew.
#[derive(Default)]
struct Replays {
    /// The streams whose heads have not been discarded yet.
    awaited: Vec<(u32, StreamKind)>,
    /// Whether the rest of a header block has to be discarded.
    discards_block: bool,
    /// Set when h2 has received the client's table size at last: the number of the client's SETTINGS that h2 acknowledges
    /// before.
    acknowledgement: Option<u32>,
}

impl Replays {
    fn awaits(&self, stream: u32) -> bool {
        self.kind(stream).is_some()
    }

    fn kind(&self, stream: u32) -> Option<StreamKind> {
        self.awaited.iter().find(|(awaited, _)| *awaited == stream).map(|(_, kind)| *kind)
    }
}

/// Which sides of a stream have ended.
#[derive(Clone, Copy, Default)]
struct Ended {
    client: bool,
    h2: bool,
}

/// Whether new streams may begin.
///
/// ```text
///        hold()           release()             the current frame is complete
/// Open --------> Holding -----------> Releasing -----------------------------> Open
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
enum HoldState {
    Open,
    /// Frames of new streams are held.
    Holding,
    /// The held frames are released when the frame that is being passed on is complete; they must not interrupt it.
    Releasing,
}

/// The first frames of a fresh h2. They are absorbed, each once, because the client has already received them.
struct Preamble {
    has_sent_settings: bool,
    has_sent_window: bool,
    told: ToldToH2,
    /// Whether h2 has received requests of the former process. Then it has received the client's settings before.
    replays: bool,
}

/// What a fresh h2 has received in the client's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ToldToH2 {
    /// Settings that disable the encoder's table, and a request on the last stream of the former process. The client
    /// does not receive the refusal of that request. If h2 entered its headers into the table, the client's table would
    /// differ from then on.
    FormerStreams,
    /// The client's settings.
    Settings,
    /// Everything: h2 has acknowledged the client's settings.
    All,
}

/// How many frames have not been answered by the other side.
#[derive(Default)]
struct Unanswered {
    /// SETTINGS of h2 that the client has not acknowledged.
    ours: u32,
    /// Those of them that the interposer has acknowledged in the client's name. h2 must not receive a second ACK.
    ours_in_its_name: u32,
    /// SETTINGS of the client that h2 has not acknowledged.
    theirs: u32,
    /// PINGs of the client that h2 has not answered.
    pings: u32,
    /// PINGs of h2 that the client has not answered.
    own_pings: u32,
}

impl Interposer {
    /// For a connection that begins in this process.
    pub fn new() -> Self {
        Self {
            state: Http2State::default(),
            former: 0,
            open: Vec::new(),
            endless: EndlessStreams::default(),
            maybe_endless: Vec::new(),
            replays: Replays::default(),
            client_table: Some(ClientTable::new()),
            preface_left: PREFACE.len(),
            from_client: FrameParser::START,
            block: None,
            hold_state: HoldState::Open,
            held: BytesMut::new(),
            to_h2: BytesMut::new(),
            between_frames: BytesMut::new(),
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

    /// For a connection that continues with a fresh h2, after it was parked or handed over.
    pub fn resume(mut state: Http2State) -> Self {
        let former = state.last_stream;
        let replays = std::mem::take(&mut state.streams);
        let mut to_h2 = BytesMut::from(PREFACE);
        let told = if former == 0 {
            put_settings(&state.theirs.payload(), &mut to_h2);
            ToldToH2::Settings
        } else if let Some(last) = replays.last() {
            put_settings(&state.theirs.clone().with(HEADER_TABLE_SIZE, 0).payload(), &mut to_h2);
            if last.stream == former { ToldToH2::Settings } else { ToldToH2::FormerStreams }
        } else {
            put_settings(&Settings::default().or(HEADER_TABLE_SIZE, 0).payload(), &mut to_h2);
            ToldToH2::FormerStreams
        };
        let granted = state.send_window - FIRST_WINDOW;
        let mut resumed = Self {
            former,
            state,
            // A connection moves only after the client has acknowledged our settings.
            client_table: None,
            preface_left: 0,
            to_h2,
            preamble: Some(Preamble {
                has_sent_settings: false,
                has_sent_window: false,
                told,
                replays: !replays.is_empty(),
            }),
            debt: (-granted).max(0),
            ..Self::new()
        };
        for replay in replays {
            resumed.replay(replay);
        }
        if told == ToldToH2::FormerStreams {
            put_oversized_request(former, HEADER_LIST_LIMIT, &mut resumed.to_h2);
        }
        if let Ok(granted @ 1..) = u32::try_from(granted) {
            put_window_update(0, granted, &mut resumed.to_h2);
        }
        resumed
    }

    /// Gives h2 a request of the former process, whose response has no end.
    fn replay(&mut self, replay: StreamReplay) {
        let (stream, kind) = (replay.stream, replay.kind());
        let mut block = BytesMut::from(&replay.block[..]);
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

    /// The initial window of the client's streams, in bytes.
    fn initial_window(&self) -> i64 {
        self.state.theirs.get(INITIAL_WINDOW_SIZE).map_or(FIRST_WINDOW, i64::from)
    }

    /// The streams whose responses may have no end.
    pub fn endless(&self) -> EndlessStreams {
        self.endless.clone()
    }

    /// Whether h2 has not answered all requests of the former process.
    pub fn is_replaying(&self) -> bool {
        !self.replays.awaited.is_empty()
    }
}

fn size(length: usize) -> i64 {
    i64::try_from(length).expect("a frame's length has 24 bits")
}
