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
//! - HPACK (RFC 7541): the decoder needs the client's table. `header_table.rs` follows it, and h2 receives it as the fields
//!   of a request that it refuses. The encoder starts with an empty table, which is compatible with the client's older
//!   one: indices count from the newest entry, and the oldest entry is evicted first.
//! - Streams: for a fresh h2 the streams of the former process would be idle, and most frames on idle streams are
//!   connection errors. Therefore h2 first receives a request on the last of these streams, and refuses it. From then
//!   on h2 knows that all of them are closed, and judges late frames on them as if it had served them. The interposer
//!   judges no frames.
//! - Responses without end: before that, h2 receives the requests of the streams that have stopped (`endless.rs`). The
//!   client does not receive the heads of their responses, so the encoder must not enter them into its table: for h2 the
//!   client's table has size 0 until all of them are there. If every stream of the connection is such a stream, none is
//!   left for the request with the client's table. Their fields then enter the table of the decoder as they entered that
//!   of the former one.
//!
//! `client_frames.rs` and `h2_frames.rs` handle the two directions, `quiesce.rs` decides when the connection can be
//! handed over, and `resume.rs` writes what a fresh h2 receives.

mod catch_up;
mod client_frames;
mod h2_frames;
mod quiesce;
mod resume;

use bytes::BytesMut;
use catch_up::CatchUp;

use super::endless::EndlessStreams;
use super::frame::{Disposition, FrameParser};
use super::header_table::ClientTable;
use crate::connection::PREFACE;
use crate::transport::http2_state::{FIRST_WINDOW, Http2State, INITIAL_WINDOW_SIZE};
use crate::transport::stream_replay::StreamKind;

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
    /// The open streams of this process, in ascending order, and which of their sides have ended.
    open: Vec<(u32, Ended)>,
    /// The open streams whose responses may have no end.
    endless: EndlessStreams,
    /// Their numbers, so that frames of other streams need no lock.
    maybe_endless: Vec<u32>,
    replays: Replays,
    /// The client's header table. None if it is not known, because h2 has refused a header block.
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
    /// Whether the held frames have to be released, because an older stream cannot end before them.
    must_release: bool,
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
    /// Whether the next header block for the client has to begin with a dynamic table size update to 0 (RFC 7541 section 6.3).
    /// RFC 9113 section 4.3.1 requires it if the client has lowered the size in the former process. A fresh h2 has put the update
    /// into a header block that the client does not receive.
    owes_size_update: bool,
    catch_up: CatchUp,
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
    /// The requests that h2 has not refused yet.
    refused: Vec<u32>,
    /// Frames that h2 receives only after it has refused the request that carries the client's header table, because otherwise
    /// h2 would have too many open streams.
    later: BytesMut,
    /// Whether h2 has received requests of the former process. Then it has received the client's settings before.
    replays: bool,
}

/// What a fresh h2 has received in the client's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ToldToH2 {
    /// Settings that disable the encoder's table, and requests on streams of the former process that have ended. The client
    /// does not receive the refusals of these requests. If h2 entered their headers into the table, the client's table
    /// would differ from then on.
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
            must_release: false,
            to_h2: BytesMut::new(),
            between_frames: BytesMut::new(),
            from_h2: FrameParser::START,
            partial: BytesMut::new(),
            to_client: BytesMut::new(),
            waiting: BytesMut::new(),
            preamble: None,
            debt: 0,
            owes_size_update: false,
            catch_up: CatchUp::Over,
            unanswered: Unanswered::default(),
            is_ending: false,
        }
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
