//! The state machine of one connection.
//!
//! [`State::after`] is a pure function from a [`State`] and an [`Event`] to the next state and its [`Effects`], which
//! are the tasks to wake. `entry.rs` applies it to the state of a connection. A state is packed into one `u64`, so each
//! event is one atomic change, and every task reads a consistent state. The events come from different tasks: the
//! driver, which polls hyper, and the handlers of requests. Therefore the event that ends the last work of a connection
//! wakes the driver, whichever task reports it.

/// What a connection is doing.
///
/// ```text
///           bytes (HTTP/1.1)           request begins                handler upgrades
///   Waiting -----------------> Head -------------------> InFlight --------------------> Upgraded
///    |   ^                                               ^   |
///    |   |     both bodies have ended, response flushed  |   |
///    |   `-----------------------------------------------|---'
///    |                    request begins                 |
///    `---------------------------------------------------'
///
///   any open stage --> Ending --> Discarding or Closing --> Closed
///   any stage -------------------------------------------> Closed    the registration is dropped
/// ```
///
/// An HTTP/2 connection has no stage `Head`, and is `InFlight` while at least one of its requests is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Idle or new: no byte of a request has arrived.
    Waiting,
    /// A part of a request's head has arrived.
    Head,
    /// A request is being answered, or its response is not flushed yet.
    InFlight,
    /// A handler owns the connection (WebSocket).
    Upgraded,
    /// The last bytes are being sent: a response of the library such as 408, or the `close_notify` of TLS.
    Ending,
    /// The last bytes are sent, and the peer still sends. Its bytes are read and discarded, because closing now would
    /// reset the connection, and the peer could lose the response (RFC 9112 section 9.6).
    Discarding,
    /// The last bytes are sent, and the peer has `Limits::close` to close the connection too.
    Closing,
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

    /// The stages of open connections, as `/metrics` lists them.
    pub const OPEN: &[Self] = Self::ALL.split_at(7).0;

    /// The value of the label `stage` in `/metrics`.
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

    /// Whether a drain waits for a connection in this stage. From `Closing` on the client has the whole response, so
    /// the process may exit.
    pub fn is_unanswered(self) -> bool {
        !matches!(self, Self::Closing | Self::Closed)
    }
}

/// How much of a request's body its handler had read when it was done with the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    Whole,
    /// The peer may still be sending the remainder.
    Unread,
}

/// An event on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The task of the connection begins to poll hyper.
    DriverPolled,
    /// The poll has returned, so the task can compare the counts of the state.
    DriverReturned,
    Received,
    RequestBegins,
    /// hyper has the last byte of the response, or the request was dropped.
    RequestEnds,
    /// A handler has the body of a request.
    BodyBegins,
    /// The handler has read the body to its end, or has dropped it.
    BodyEnds(BodyEnd),
    /// hyper has bytes to send.
    Writing,
    /// The socket has all bytes that hyper had to send.
    Flushed,
    /// The connection stays in this process, at least for the time being.
    HandoverForbidden,
    /// The connection can be handed over again, unless it closes after its response or is upgraded.
    HandoverAllowed,
    /// The handler of an upgraded connection, or of a response without end, waits for the request to hand it on.
    HandlerAwaitsHandover,
    /// That handler works again, so another process cannot continue for it.
    HandlerWorks,
    /// The connection closes after its next response, and cannot be handed over until then.
    ClosesAfterResponse,
    /// The driver sets the stage itself.
    Enters(Stage),
    /// The driver has stored its waker.
    WakerStored,
    /// Another task has taken the waker to wake the driver, which has to store it again.
    WakerTaken,
}

/// The tasks that an event has to wake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The driver: the last work of the connection ended while the driver was not polled, so nothing else would make
    /// it look at the connection again.
    pub driver: bool,
    /// The tasks in [`Registry::wait_until`](super::Registry::wait_until) that watch this connection.
    pub waiters: bool,
}

/// The state of a connection: its [`Stage`], and what decides about the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the flags are independent of each other")]
pub struct State {
    pub stage: Stage,
    /// Whether the driver is being polled. It looks at the counts afterwards, so no event has to wake it meanwhile.
    is_driven: bool,
    is_flushed: bool,
    is_movable: bool,
    closes_after_response: bool,
    /// Whether the handler dropped the last request's body before its end, so that the peer may still be sending it.
    has_left_body: bool,
    /// Whether a task in [`Registry::wait_until`](super::Registry::wait_until) watches this connection.
    is_watched: bool,
    /// Whether the handler of an upgraded connection, or of a response without end, waits for the request to hand it on.
    pub awaits_handover: bool,
    /// Whether the driver's waker is stored, so that other tasks can wake the driver.
    pub has_waker: bool,
    /// Requests that have begun and not ended.
    in_flight: u32,
    /// Bodies of requests that handlers have neither read to the end nor dropped.
    reading: u32,
}

/// The highest value of each count. So many requests at once on one connection would need more memory than a machine
/// has, so the counts cannot overflow into each other.
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
        awaits_handover: false,
        has_waker: false,
        in_flight: 0,
        reading: 0,
    };

    /// The bit of `is_watched` in a packed state.
    pub const WATCHED: u64 = 1 << (8 + 2 * COUNT_BITS);

    pub fn is_in_flight(self) -> bool {
        self.in_flight > 0
    }

    pub fn in_flight(self) -> u32 {
        self.in_flight
    }

    pub fn is_reading(self) -> bool {
        self.reading > 0
    }

    pub fn is_flushed(self) -> bool {
        self.is_flushed
    }

    /// See [`Entry::watch`](super::entry::Entry).
    pub fn is_watched(self) -> bool {
        self.is_watched
    }

    pub fn is_movable(self) -> bool {
        self.is_movable
    }

    /// Whether the connection closes after its next response in every phase.
    pub fn closes_after_response(self) -> bool {
        self.closes_after_response
    }

    pub fn has_left_body(self) -> bool {
        self.has_left_body
    }

    /// Whether nothing is in flight, nothing is unsent, and the connection can be handed over.
    pub fn is_quiescent(self) -> bool {
        matches!(self.stage, Stage::Waiting | Stage::Head) && self.is_flushed && self.is_movable
    }

    /// As [`State::is_quiescent`], while so many responses without end have stopped.
    pub fn is_quiescent_beside(self, endless: usize) -> bool {
        if endless == 0 {
            return self.is_quiescent();
        }
        let has_only_endless = usize::try_from(self.in_flight) == Ok(endless) && !self.is_reading();
        self.stage == Stage::InFlight && has_only_endless && self.is_flushed && self.is_movable
    }

    /// The state after `event`, and the tasks to wake.
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
            Event::HandlerAwaitsHandover => next.awaits_handover = true,
            Event::HandlerWorks => next.awaits_handover = false,
            Event::ClosesAfterResponse => (next.closes_after_response, next.is_movable) = (true, false),
            Event::WakerStored => next.has_waker = true,
            Event::WakerTaken => next.has_waker = false,
            Event::Enters(_) if self.stage == Stage::Closed => {}
            Event::Enters(stage) => {
                next.stage = stage;
                next.is_movable &= stage != Stage::Upgraded;
            }
        }
        let has_ended =
            self.is_in_flight() && !next.is_in_flight() || self.is_reading() && !next.is_reading();
        let is_other = next.stage != self.stage
            || next.is_movable != self.is_movable
            || next.awaits_handover != self.awaits_handover;
        let effects = Effects {
            driver: has_ended && !self.is_driven && self.stage.is_unanswered(),
            // Both events can end the wait for a request: HTTP/1.1 begins one only after the one before, and with
            // HTTP/2 one can end while others are in flight, which leaves the stage as it is.
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
            | u64::from(self.awaits_handover) << (Self::WATCHED.trailing_zeros() + 2)
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
            awaits_handover: is_set(Self::WATCHED.trailing_zeros() + 2),
            in_flight: count(8),
            reading: count(8 + COUNT_BITS),
        }
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Events in any order; `can_be` filters those that cannot occur in a state.
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
            // One task polls the driver, so two polls never overlap.
            Event::DriverPolled => !state.is_driven,
            Event::DriverReturned | Event::Writing | Event::Flushed | Event::Received => state.is_driven,
            _ => true,
        }
    }

    proptest! {
        #[test]
        fn unpack_reverses_pack(
            stage in 0..Stage::ALL.len(), flags: [bool; 8], in_flight in 0..=COUNT_LIMIT, reading in 0..=COUNT_LIMIT,
        ) {
            let [
                is_driven, is_flushed, is_movable, closes_after_response, has_left_body, is_watched, awaits_handover, has_waker,
            ] = flags;
            let stage = Stage::ALL[stage];
            let state = State {
                stage, is_driven, is_flushed, is_movable, closes_after_response, has_left_body, is_watched,
                awaits_handover, has_waker, in_flight, reading,
            };
            prop_assert_eq!(State::unpack(state.pack()), state);
        }

        /// A connection that stayed `InFlight` without a wake of its driver would never be handed over or parked.
        #[test]
        fn a_connection_without_work_is_waiting_or_its_driver_is_woken(events in events()) {
            let mut state = State::NEW;
            let mut is_woken = false;
            for event in events {
                if !can_be(state, event) {
                    continue;
                }
                let (next, effects) = state.after(event);
                state = next;
                is_woken |= effects.driver;
                if event == Event::DriverPolled {
                    is_woken = false;
                }
                let is_over = !state.is_in_flight() && !state.is_reading() && state.is_flushed();
                if is_over && state.stage == Stage::InFlight {
                    prop_assert!(state.is_driven || is_woken, "{:?} after {:?}", state, event);
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

        /// Also when one of several requests ends (HTTP/2), which changes neither the stage nor whether the connection
        /// can be handed over.
        #[test]
        fn waiters_of_a_watched_connection_are_notified_of_each_change_and_no_others(
            events in events(), stage in 0..Stage::ALL.len(), is_watched: bool,
        ) {
            let mut state = State { is_watched, ..State::NEW };
            let last = [Event::HandoverForbidden, Event::HandoverAllowed, Event::Enters(Stage::ALL[stage]), Event::Enters(Stage::Closed)];
            for event in events.into_iter().chain(last) {
                if !can_be(state, event) {
                    continue;
                }
                let (next, effects) = state.after(event);
                let has_changed = next.stage != state.stage
                    || next.is_movable() != state.is_movable()
                    || next.in_flight() != state.in_flight();
                prop_assert_eq!(effects.waiters, is_watched && has_changed, "{:?}: {:?}", event, next);
                state = next;
            }
            prop_assert_eq!(state.stage, Stage::Closed);
        }
    }

    #[test]
    fn a_closed_connection_stays_closed_and_later_events_wake_no_task() {
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
    fn an_upgraded_connection_cannot_be_handed_over() {
        assert!(!State::NEW.after(Event::Enters(Stage::Upgraded)).0.is_movable());
    }
}
