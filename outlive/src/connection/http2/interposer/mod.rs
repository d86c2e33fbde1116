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

mod client_frames;
mod h2_frames;
mod quiesce;

use bytes::BytesMut;

use super::HEADER_LIST_LIMIT;
use super::frame::{Disposition, FrameParser, put_oversized_request, put_settings, put_window_update};
use crate::connection::PREFACE;
use crate::transport::http2_state::{FIRST_WINDOW, HEADER_TABLE_SIZE, Http2State, Settings};

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
}

fn size(length: usize) -> i64 {
    i64::try_from(length).expect("a frame's length has 24 bits")
}
