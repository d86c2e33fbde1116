//! The phase, and how much there is to wait for, in one word of memory: whoever ends the last of it learns in the same
//! step what the process wants, and whoever says what the process wants learns how much is left. Neither can miss the
//! other, in whatever order they come.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use super::Phase;
use crate::registry::sync::AtomicU64;

/// What a process may have to wait for. Its value is one of it in the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum PendingCount {
    /// A predecessor whose connections still come.
    Arriving = 1 << 4,
    /// A task that may be holding a connection which is not registered yet.
    Accepting = 1 << 16,
    /// A connection that has its last answer still to give.
    Unanswered = 1 << 32,
}

/// Bits of the phase; the one above says whether all connections but those of HTTP/1 are kept.
const PHASE: u64 = 0b111;
const KEEPS_HTTP2_AND_TLS: u64 = 0b1000;
/// Where the counts are.
const COUNTS: u64 = !0b1111;
const ARRIVING: u64 = (PendingCount::Accepting as u64 - 1) & COUNTS;

/// The word, as it was at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot(u64);

impl Snapshot {
    pub fn phase(self) -> Phase {
        Phase::ALL[usize::try_from(self.0 & PHASE).unwrap_or_default()]
    }

    /// See [`super::Registry::keep_http2_and_tls`].
    pub fn keeps_http2_and_tls(self) -> bool {
        self.0 & KEEPS_HTTP2_AND_TLS != 0
    }

    pub fn is_arriving(self) -> bool {
        self.0 & ARRIVING != 0
    }

    /// Whether there is nothing to wait for.
    pub fn is_drained(self) -> bool {
        self.0 & COUNTS == 0
    }
}

pub struct PhaseWord(AtomicU64);

impl PhaseWord {
    pub fn new() -> Self {
        Self(AtomicU64::new(Phase::Serving as u64))
    }

    pub fn now(&self) -> Snapshot {
        Snapshot(self.0.load(Acquire))
    }

    /// One more.
    pub fn acquire(&self, one: PendingCount) {
        self.0.fetch_add(one as u64, AcqRel);
    }

    /// One less, which was added; gives how things stand without it.
    pub fn release(&self, one: PendingCount) -> Snapshot {
        Snapshot(self.0.fetch_sub(one as u64, AcqRel) - one as u64)
    }

    /// Gives how things stood before.
    pub fn enter(&self, phase: Phase) -> Snapshot {
        let next = |word| Some(word & !PHASE | phase as u64);
        // It always gives one.
        Snapshot(self.0.fetch_update(AcqRel, Acquire, next).unwrap_or_else(|word| word))
    }

    pub fn keep_http2_and_tls(&self) {
        self.0.fetch_or(KEEPS_HTTP2_AND_TLS, AcqRel);
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_count_and_the_phase_are_their_own(
            counts in (0..20_u32, 0..20_u32, 0..20_u32), phase in 0..Phase::ALL.len(), keeps: bool,
        ) {
            let phase_word = PhaseWord::new();
            let all = [PendingCount::Arriving, PendingCount::Accepting, PendingCount::Unanswered];
            for (one, count) in all.into_iter().zip([counts.0, counts.1, counts.2]) {
                for _ in 0..count {
                    phase_word.acquire(one);
                }
            }
            if keeps {
                phase_word.keep_http2_and_tls();
            }
            phase_word.enter(Phase::ALL[phase]);
            let snapshot = phase_word.now();
            prop_assert_eq!(snapshot.phase(), Phase::ALL[phase]);
            prop_assert_eq!(snapshot.keeps_http2_and_tls(), keeps);
            prop_assert_eq!(snapshot.is_arriving(), counts.0 > 0);
            prop_assert_eq!(snapshot.is_drained(), counts == (0, 0, 0));
            for (one, count) in all.into_iter().zip([counts.0, counts.1, counts.2]) {
                for _ in 0..count {
                    phase_word.release(one);
                }
            }
            prop_assert!(phase_word.now().is_drained());
        }
    }
}
