//! The state machine of one connection.
//!
//! [`State::after`] is a pure function from a [`State`] and an [`Event`] to the next state and its [`Effects`], which
//! are the tasks to wake. `entry.rs` applies it to the state of a connection. A state is one `u64`, so each event is one
//! atomic change, and every task reads a consistent state. The events come from different tasks: the
//! driver, which polls hyper, and the handlers of requests. Therefore the event that ends the last work of a connection
//! wakes the driver, whichever task reports it.

use std::fmt;

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
    /// The last bytes are being sent: a response of the library such as 408, or the `close_notify` of TLS. A WebSocket
    /// that the library closes with 1012 stays in this stage until its client answers, for at most 3 s.
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
    /// The server closes this idle connection to free its slot: at once, or after the response if a request has just
    /// arrived.
    Evicted,
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

/// The state of a connection: its [`Stage`], and what decides about the next one. All of it is in one word, and not in
/// fields that are packed for the atomic, because each request changes it several times.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State(u64);

/// A flag of a state.
#[derive(Clone, Copy)]
enum Flag {
    /// The driver is being polled. It looks at the counts afterwards, so no event has to wake it meanwhile.
    Driven = 3,
    Flushed,
    Movable,
    /// The handler dropped the last request's body before its end, so the peer may still be sending it.
    HasLeftBody,
    ClosesAfterResponse,
    /// A task in [`Registry::wait_until`](super::Registry::wait_until) watches this connection.
    Watched = 56,
    /// The driver's waker is stored, so that other tasks can wake the driver.
    HasWaker,
    /// The handler of an upgraded connection, or of a response without end, waits for the request to hand it on.
    AwaitsHandover,
    /// The connection was idle and has to make room for another one.
    Evicted,
}

/// A count of a state. The value of each variant is its lowest bit.
#[derive(Clone, Copy)]
enum Count {
    /// Requests that have begun and not ended.
    InFlight = 8,
    /// Bodies of requests that handlers have neither read to the end nor dropped.
    Reading = 32,
}

const STAGE: u64 = 0b111;
/// So many requests at once on one connection would need more memory than a machine has, so the counts cannot overflow
/// into each other.
const COUNT_LIMIT: u64 = (1 << 24) - 1;

impl State {
    pub const NEW: Self = Self(Stage::Waiting as u64).with(Flag::Flushed).with(Flag::Movable);

    pub fn from_word(word: u64) -> Self {
        Self(word)
    }

    pub fn word(self) -> u64 {
        self.0
    }

    /// The bit of a watched connection in a word.
    pub const WATCHED: u64 = 1 << Flag::Watched as u64;

    pub fn stage(self) -> Stage {
        // A match and not an index into `Stage::ALL`, because the compiler can then compare the bits themselves.
        match self.0 & STAGE {
            0 => Stage::Waiting,
            1 => Stage::Head,
            2 => Stage::InFlight,
            3 => Stage::Upgraded,
            4 => Stage::Ending,
            5 => Stage::Discarding,
            6 => Stage::Closing,
            _ => Stage::Closed,
        }
    }

    const fn has(self, flag: Flag) -> bool {
        self.0 >> flag as u64 & 1 == 1
    }

    const fn with(self, flag: Flag) -> Self {
        Self(self.0 | 1 << flag as u64)
    }

    const fn without(self, flag: Flag) -> Self {
        Self(self.0 & !(1 << flag as u64))
    }

    fn set(self, flag: Flag, value: bool) -> Self {
        if value { self.with(flag) } else { self.without(flag) }
    }

    fn at(self, stage: Stage) -> Self {
        Self(self.0 & !STAGE | stage as u64)
    }

    fn count(self, count: Count) -> u64 {
        self.0 >> count as u64 & COUNT_LIMIT
    }

    fn plus(self, count: Count) -> Self {
        debug_assert!(self.count(count) < COUNT_LIMIT);
        Self(self.0 + (1 << count as u64))
    }

    fn minus(self, count: Count) -> Self {
        debug_assert!(self.count(count) > 0);
        Self(self.0 - (1 << count as u64))
    }

    pub fn has_waker(self) -> bool {
        self.has(Flag::HasWaker)
    }

    /// Whether the handler of an upgraded connection, or of a response without end, waits for the request to hand it on.
    pub fn awaits_handover(self) -> bool {
        self.has(Flag::AwaitsHandover)
    }

    /// Whether the connection has to make room for another one.
    pub fn is_evicted(self) -> bool {
        self.has(Flag::Evicted)
    }

    pub fn is_in_flight(self) -> bool {
        self.in_flight() > 0
    }

    pub fn in_flight(self) -> u64 {
        self.count(Count::InFlight)
    }

    pub fn is_reading(self) -> bool {
        self.count(Count::Reading) > 0
    }

    pub fn is_flushed(self) -> bool {
        self.has(Flag::Flushed)
    }

    /// See [`Entry::watch`](super::entry::Entry).
    pub fn is_watched(self) -> bool {
        self.has(Flag::Watched)
    }

    pub fn is_movable(self) -> bool {
        self.has(Flag::Movable)
    }

    /// Whether the connection closes after its next response in every phase.
    pub fn closes_after_response(self) -> bool {
        self.has(Flag::ClosesAfterResponse)
    }

    pub fn has_left_body(self) -> bool {
        self.has(Flag::HasLeftBody)
    }

    /// Whether nothing is in flight, nothing is unsent, and the connection can be handed over.
    pub fn is_quiescent(self) -> bool {
        matches!(self.stage(), Stage::Waiting | Stage::Head) && self.is_flushed() && self.is_movable()
    }

    /// As [`State::is_quiescent`], while so many responses without end have stopped.
    pub fn is_quiescent_beside(self, endless: usize) -> bool {
        if endless == 0 {
            return self.is_quiescent();
        }
        let has_only_endless = self.in_flight() == endless as u64 && !self.is_reading();
        self.stage() == Stage::InFlight && has_only_endless && self.is_flushed() && self.is_movable()
    }

    /// The state after `event`, and the tasks to wake.
    #[expect(clippy::inline_always, reason = "see `Entry::apply`")]
    #[inline(always)]
    #[must_use]
    pub fn after(self, event: Event) -> (Self, Effects) {
        let stage = self.stage();
        let next = match event {
            Event::DriverPolled => self.with(Flag::Driven),
            Event::DriverReturned => {
                let is_busy = self.is_in_flight() || self.is_reading() || !self.is_flushed();
                let next = self.without(Flag::Driven);
                if stage == Stage::InFlight && !is_busy { next.at(Stage::Waiting) } else { next }
            }
            Event::Received if stage == Stage::Waiting => self.at(Stage::Head),
            Event::Received => self,
            Event::RequestBegins => {
                let next = self.plus(Count::InFlight).without(Flag::HasLeftBody);
                if matches!(stage, Stage::Waiting | Stage::Head) { next.at(Stage::InFlight) } else { next }
            }
            Event::RequestEnds => self.minus(Count::InFlight),
            Event::BodyBegins => self.plus(Count::Reading),
            Event::BodyEnds(BodyEnd::Whole) => self.minus(Count::Reading),
            Event::BodyEnds(BodyEnd::Unread) => self.minus(Count::Reading).with(Flag::HasLeftBody),
            Event::Writing => self.without(Flag::Flushed),
            Event::Flushed => self.with(Flag::Flushed),
            Event::HandoverForbidden => self.without(Flag::Movable),
            Event::HandoverAllowed => {
                let is_movable = !self.closes_after_response() && stage != Stage::Upgraded;
                self.set(Flag::Movable, is_movable)
            }
            Event::HandlerAwaitsHandover => self.with(Flag::AwaitsHandover),
            Event::HandlerWorks => self.without(Flag::AwaitsHandover),
            Event::Evicted => self.with(Flag::Evicted).with(Flag::ClosesAfterResponse).without(Flag::Movable),
            Event::ClosesAfterResponse => self.with(Flag::ClosesAfterResponse).without(Flag::Movable),
            Event::WakerStored => self.with(Flag::HasWaker),
            Event::WakerTaken => self.without(Flag::HasWaker),
            Event::Enters(_) if stage == Stage::Closed => self,
            Event::Enters(Stage::Upgraded) => self.at(Stage::Upgraded).without(Flag::Movable),
            Event::Enters(stage) => self.at(stage),
        };
        (next, self.effects(next, event))
    }

    fn effects(self, next: Self, event: Event) -> Effects {
        /// What a watched connection notifies of: its stage, whether it can be handed over, and whether its handler
        /// waits for that.
        const NOTIFIED: u64 = STAGE | 1 << Flag::Movable as u64 | 1 << Flag::AwaitsHandover as u64;
        let has_ended =
            self.is_in_flight() && !next.is_in_flight() || self.is_reading() && !next.is_reading();
        Effects {
            driver: has_ended && !self.has(Flag::Driven) && self.stage().is_unanswered(),
            // Both events can end the wait for a request: HTTP/1.1 begins one only after the one before, and with
            // HTTP/2 one can end while others are in flight, which leaves the stage as it is.
            waiters: self.is_watched()
                && ((self.0 ^ next.0) & NOTIFIED != 0
                    || matches!(event, Event::RequestBegins | Event::RequestEnds)),
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Everything but the stage and the counts.
        const FLAGS: u64 = 0xf8 | 0xff << Flag::Watched as u64;
        f.debug_struct("State")
            .field("stage", &self.stage())
            .field("in_flight", &self.in_flight())
            .field("reading", &self.count(Count::Reading))
            .field("flags", &format_args!("{:#x}", self.0 & FLAGS))
            .finish()
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
            Event::DriverPolled => !state.has(Flag::Driven),
            Event::DriverReturned | Event::Writing | Event::Flushed | Event::Received => {
                state.has(Flag::Driven)
            }
            _ => true,
        }
    }

    proptest! {
        #[test]
        fn flags_counts_and_stage_do_not_affect_each_other(
            stage in 0..Stage::ALL.len(), flags: [bool; 9], in_flight in 0..40_u64, reading in 0..40_u64,
        ) {
            use Flag::{
                AwaitsHandover, ClosesAfterResponse, Driven, Evicted, Flushed, HasLeftBody, HasWaker, Movable, Watched,
            };
            let all = [
                Driven, Flushed, Movable, HasLeftBody, ClosesAfterResponse, Watched, HasWaker, AwaitsHandover, Evicted,
            ];
            let mut state = State::NEW;
            for _ in 0..in_flight {
                state = state.plus(Count::InFlight);
            }
            for (flag, value) in all.into_iter().zip(flags) {
                state = state.set(flag, value);
            }
            for _ in 0..reading {
                state = state.plus(Count::Reading);
            }
            state = State::from_word(state.at(Stage::ALL[stage]).word());
            prop_assert_eq!(state.stage(), Stage::ALL[stage]);
            prop_assert_eq!((state.in_flight(), state.count(Count::Reading)), (in_flight, reading));
            prop_assert_eq!(all.map(|flag| state.has(flag)), flags);
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
                if is_over && state.stage() == Stage::InFlight {
                    prop_assert!(state.has(Flag::Driven) || is_woken, "{:?} after {:?}", state, event);
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
                    prop_assert_eq!(state.stage(), Stage::InFlight);
                }
            }
        }

        /// Also when one of several requests ends (HTTP/2), which changes neither the stage nor whether the connection
        /// can be handed over.
        #[test]
        fn waiters_of_a_watched_connection_are_notified_of_each_change_and_no_others(
            events in events(), stage in 0..Stage::ALL.len(), is_watched: bool,
        ) {
            let mut state = State::NEW.set(Flag::Watched, is_watched);
            let last = [Event::HandoverForbidden, Event::HandoverAllowed, Event::Enters(Stage::ALL[stage]), Event::Enters(Stage::Closed)];
            for event in events.into_iter().chain(last) {
                if !can_be(state, event) {
                    continue;
                }
                let (next, effects) = state.after(event);
                let has_changed = next.stage() != state.stage()
                    || next.is_movable() != state.is_movable()
                    || next.in_flight() != state.in_flight();
                prop_assert_eq!(effects.waiters, is_watched && has_changed, "{:?}: {:?}", event, next);
                state = next;
            }
            prop_assert_eq!(state.stage(), Stage::Closed);
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
            assert_eq!((next.stage(), effects), (Stage::Closed, Effects::default()));
            state = next;
        }
        assert!(!state.is_in_flight() && !state.is_reading());
    }

    #[test]
    fn an_upgraded_connection_cannot_be_handed_over() {
        assert!(!State::NEW.after(Event::Enters(Stage::Upgraded)).0.is_movable());
    }
}
