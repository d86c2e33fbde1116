//! What a connection is doing, as one value that events change, and who has to hear of it.
//!
//! All of it fits into one word of memory, so that each event is one atomic change and nobody ever sees half of
//! one. Whoever brings the last thing to its end that a connection was waiting for learns so here, and wakes the
//! driver: it does not matter which task that is.

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing of a request has arrived.
    Waiting,
    /// Some of a request's head has arrived.
    Head,
    /// A request is being answered, or the answer is still on its way out.
    InFlight,
    /// The connection belongs to a handler (WebSocket).
    Upgraded,
    /// The last word is on its way out: a refusal, the end of TLS.
    Ending,
    /// The last word is out, and the peer still sends. Closing now would reset the connection under its answer
    /// (RFC 9112 section 9.6).
    Discarding,
    /// The last word is out; the peer is given time to close too.
    Closing,
    /// It is no more.
    Closed,
}

impl Stage {
    const ALL: [Self; 8] = [
        Self::Waiting,
        Self::Head,
        Self::InFlight,
        Self::Upgraded,
        Self::Ending,
        Self::Discarding,
        Self::Closing,
        Self::Closed,
    ];

    /// Those of open connections.
    pub const OPEN: &[Self] = Self::ALL.split_at(7).0;

    /// As `/metrics` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Head => "head",
            Self::InFlight => "in_flight",
            Self::Upgraded => "upgraded",
            Self::Ending => "ending",
            Self::Discarding => "discarding",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }

    /// Whether the process has something to do for the connection before it may end.
    pub fn is_unanswered(self) -> bool {
        !matches!(self, Self::Closing | Self::Closed)
    }
}

/// How much of a request's body was read when its reader ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    Whole,
    /// The peer still sends the remainder.
    Unread,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its driver is polled.
    DriverPolled,
    /// Its driver has done what there was to do.
    DriverReturned,
    /// Bytes have arrived.
    Received,
    RequestBegins,
    /// The last byte of the answer has been given to the connection, or the request was given up.
    RequestEnds,
    /// A request's body is to be read.
    BodyBegins,
    /// It was read to its end, or is left where it was.
    BodyEnds(BodyEnd),
    /// There is something to send.
    Writing,
    /// All of it is out.
    Flushed,
    /// It cannot move to another process from now on.
    HandoverForbidden,
    /// It can again.
    HandoverAllowed,
    /// It is to end, and cannot move until then.
    ClosesAfterResponse,
    /// Its driver knows what it is doing.
    Enters(Stage),
    /// The driver is there to be woken.
    WakerLeft,
    /// It is woken, and has to say anew where.
    WakerTaken,
}

/// Who has to hear of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The driver, which was not there when the last thing that it was waiting for ended.
    pub driver: bool,
    /// Whoever waits for this connection to end or come to rest.
    pub waiters: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct State {
    pub stage: Stage,
    /// Whether the driver is at work, and will look at the counts when it is done.
    is_driven: bool,
    is_flushed: bool,
    is_movable: bool,
    closes_after_response: bool,
    /// Whether a body was left before its end: the peer still sends it.
    has_left_body: bool,
    /// Whether somebody waits for it.
    is_watched: bool,
    /// Whether the driver will be woken by whoever has to.
    pub has_waker: bool,
    /// Requests that have begun and are not over.
    in_flight: u32,
    /// Bodies being read.
    reading: u32,
}

/// The highest that each count can be. As many requests or bodies at once on one connection would take more
/// memory than there is.
const COUNT_LIMIT: u32 = (1 << COUNT_BITS) - 1;
const COUNT_BITS: u32 = 24;

impl State {
    pub const NEW: Self = Self {
        stage: Stage::Waiting,
        is_driven: false,
        is_flushed: true,
        is_movable: true,
        closes_after_response: false,
        has_left_body: false,
        is_watched: false,
        has_waker: false,
        in_flight: 0,
        reading: 0,
    };

    /// The bit of a packed state that says that somebody waits for it.
    pub const WATCHED: u64 = 1 << (8 + 2 * COUNT_BITS);

    pub fn is_in_flight(self) -> bool {
        self.in_flight > 0
    }

    /// Requests that have begun and are not over.
    pub fn in_flight(self) -> u32 {
        self.in_flight
    }

    pub fn is_reading(self) -> bool {
        self.reading > 0
    }

    pub fn is_flushed(self) -> bool {
        self.is_flushed
    }

    pub fn is_movable(self) -> bool {
        self.is_movable
    }

    /// Whether it is to end, whatever the process wants.
    pub fn closes_after_response(self) -> bool {
        self.closes_after_response
    }

    /// Whether the peer still sends a body that nobody reads.
    pub fn has_left_body(self) -> bool {
        self.has_left_body
    }

    /// Whether nothing is in flight, nothing is unsent, and it can go on in another process.
    pub fn is_quiescent(self) -> bool {
        matches!(self.stage, Stage::Waiting | Stage::Head) && self.is_flushed && self.is_movable
    }

    /// The state after `event`, and who has to hear of it.
    #[must_use]
    pub fn after(self, event: Event) -> (Self, Effects) {
        let mut next = self;
        match event {
            Event::DriverPolled => next.is_driven = true,
            Event::DriverReturned => {
                next.is_driven = false;
                let is_busy = self.is_in_flight() || self.is_reading() || !self.is_flushed;
                if self.stage == Stage::InFlight && !is_busy {
                    next.stage = Stage::Waiting;
                }
            }
            Event::Received if self.stage == Stage::Waiting => next.stage = Stage::Head,
            Event::Received => {}
            Event::RequestBegins => {
                next.in_flight += 1;
                next.has_left_body = false;
                if matches!(self.stage, Stage::Waiting | Stage::Head) {
                    next.stage = Stage::InFlight;
                }
            }
            Event::RequestEnds => next.in_flight -= 1,
            Event::BodyBegins => next.reading += 1,
            Event::BodyEnds(end) => {
                next.reading -= 1;
                next.has_left_body |= end == BodyEnd::Unread;
            }
            Event::Writing => next.is_flushed = false,
            Event::Flushed => next.is_flushed = true,
            Event::HandoverForbidden => next.is_movable = false,
            Event::HandoverAllowed => {
                next.is_movable = !self.closes_after_response && self.stage != Stage::Upgraded;
            }
            Event::ClosesAfterResponse => (next.closes_after_response, next.is_movable) = (true, false),
            Event::WakerLeft => next.has_waker = true,
            Event::WakerTaken => next.has_waker = false,
            Event::Enters(_) if self.stage == Stage::Closed => {}
            Event::Enters(stage) => {
                next.stage = stage;
                next.is_movable &= stage != Stage::Upgraded;
            }
        }
        let has_ended =
            self.is_in_flight() && !next.is_in_flight() || self.is_reading() && !next.is_reading();
        let is_other = next.stage != self.stage || next.is_movable != self.is_movable;
        let effects = Effects {
            driver: has_ended && !self.is_driven && self.stage.is_unanswered(),
            // A request that begins while others are answered shows that one of HTTP/1 is over.
            waiters: self.is_watched
                && (is_other || matches!(event, Event::RequestBegins | Event::RequestEnds)),
        };
        (next, effects)
    }

    pub fn pack(self) -> u64 {
        debug_assert!(self.in_flight <= COUNT_LIMIT && self.reading <= COUNT_LIMIT);
        u64::from(self.stage as u8)
            | u64::from(self.is_driven) << 3
            | u64::from(self.is_flushed) << 4
            | u64::from(self.is_movable) << 5
            | u64::from(self.has_left_body) << 6
            | u64::from(self.closes_after_response) << 7
            | u64::from(self.in_flight) << 8
            | u64::from(self.reading) << (8 + COUNT_BITS)
            | u64::from(self.is_watched) << Self::WATCHED.trailing_zeros()
            | u64::from(self.has_waker) << (Self::WATCHED.trailing_zeros() + 1)
    }

    pub fn unpack(word: u64) -> Self {
        let is_set = |bit: u32| word >> bit & 1 == 1;
        let count = |bit: u32| u32::try_from(word >> bit & u64::from(COUNT_LIMIT)).unwrap_or(COUNT_LIMIT);
        Self {
            stage: Stage::ALL[(word & 7) as usize],
            is_driven: is_set(3),
            is_flushed: is_set(4),
            is_movable: is_set(5),
            has_left_body: is_set(6),
            closes_after_response: is_set(7),
            is_watched: is_set(Self::WATCHED.trailing_zeros()),
            has_waker: is_set(Self::WATCHED.trailing_zeros() + 1),
            in_flight: count(8),
            reading: count(8 + COUNT_BITS),
        }
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Events of HTTP in any order that can be: nothing ends that has not begun.
    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            Just(Event::Received),
            Just(Event::RequestBegins),
            Just(Event::RequestEnds),
            Just(Event::BodyBegins),
            prop_oneof![Just(BodyEnd::Whole), Just(BodyEnd::Unread)].prop_map(Event::BodyEnds),
            Just(Event::Writing),
            Just(Event::Flushed),
            Just(Event::DriverPolled),
            Just(Event::DriverReturned),
        ];
        prop::collection::vec(event, 0..60)
    }

    fn can_be(state: State, event: Event) -> bool {
        match event {
            Event::RequestEnds => state.is_in_flight(),
            Event::BodyEnds(_) => state.is_reading(),
            // A driver that has begun a turn ends it first.
            Event::DriverPolled => !state.is_driven,
            Event::DriverReturned | Event::Writing | Event::Flushed | Event::Received => state.is_driven,
            _ => true,
        }
    }

    proptest! {
        #[test]
        fn a_state_comes_back_as_it_was_packed(
            stage in 0..Stage::ALL.len(), flags: [bool; 7], in_flight in 0..=COUNT_LIMIT, reading in 0..=COUNT_LIMIT,
        ) {
            let [is_driven, is_flushed, is_movable, closes_after_response, has_left_body, is_watched, has_waker] = flags;
            let stage = Stage::ALL[stage];
            let state = State {
                stage, is_driven, is_flushed, is_movable, closes_after_response, has_left_body, is_watched, has_waker, in_flight, reading,
            };
            prop_assert_eq!(State::unpack(state.pack()), state);
        }

        /// The fault that this machine is for: nobody looks again after the last thing has ended.
        #[test]
        fn a_connection_with_nothing_left_to_do_is_waiting_or_its_driver_is_told(events in events()) {
            let mut state = State::NEW;
            let mut is_told = false;
            for event in events {
                if !can_be(state, event) {
                    continue;
                }
                let (next, effects) = state.after(event);
                state = next;
                is_told |= effects.driver;
                if event == Event::DriverPolled {
                    is_told = false;
                }
                let is_over = !state.is_in_flight() && !state.is_reading() && state.is_flushed();
                if is_over && state.stage == Stage::InFlight {
                    prop_assert!(state.is_driven || is_told, "{:?} after {:?}", state, event);
                }
            }
        }

        #[test]
        fn a_connection_is_in_flight_from_the_head_of_a_request_to_the_end_of_both_bodies(events in events()) {
            let mut state = State::NEW;
            for event in events {
                if !can_be(state, event) {
                    continue;
                }
                state = state.after(event).0;
                if state.is_in_flight() {
                    prop_assert_eq!(state.stage, Stage::InFlight);
                }
            }
        }

        /// With several requests at once, one that ends beside others too.
        #[test]
        fn whoever_waits_hears_of_each_rest_each_request_and_each_end_and_nobody_else_is_told(
            events in events(), stage in 0..Stage::ALL.len(), is_watched: bool,
        ) {
            let mut state = State { is_watched, ..State::NEW };
            let last = [Event::HandoverForbidden, Event::HandoverAllowed, Event::Enters(Stage::ALL[stage]), Event::Enters(Stage::Closed)];
            for event in events.into_iter().chain(last) {
                if !can_be(state, event) {
                    continue;
                }
                let (next, effects) = state.after(event);
                let is_news = next.stage != state.stage
                    || next.is_movable() != state.is_movable()
                    || next.in_flight() != state.in_flight();
                prop_assert_eq!(effects.waiters, is_watched && is_news, "{:?}: {:?}", event, next);
                state = next;
            }
            prop_assert_eq!(state.stage, Stage::Closed);
        }
    }

    #[test]
    fn a_closed_connection_stays_closed_and_lets_go_of_what_is_left() {
        let mut state = State::NEW;
        for event in [Event::RequestBegins, Event::BodyBegins, Event::Enters(Stage::Closed)] {
            state = state.after(event).0;
        }
        for event in [
            Event::RequestEnds,
            Event::BodyEnds(BodyEnd::Unread),
            Event::Enters(Stage::Waiting),
            Event::DriverReturned,
        ] {
            let (next, effects) = state.after(event);
            assert_eq!((next.stage, effects), (Stage::Closed, Effects::default()));
            state = next;
        }
        assert!(!state.is_in_flight() && !state.is_reading());
    }

    #[test]
    fn an_upgraded_connection_cannot_move() {
        assert!(!State::NEW.after(Event::Enters(Stage::Upgraded)).0.is_movable());
    }
}
