//! The phase of the process and the counts of pending work, packed into one atomic `u64`, the [`PhaseWord`].
//!
//! With two atomics there would be a race: a connection releases the last count and reads the old phase, so it does
//! not notify the drain. At the same time the drain sets the new phase and reads the old count, so it waits for ever.
//! In one word, each atomic change returns both values, so one of the two always sees the other.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use super::Phase;
use crate::registry::sync::AtomicU64;

/// A kind of work that a drain waits for. The value of each variant is the amount that counts one of it in the word:
/// bit 4 on counts `Arriving`, bit 16 on `Accepting`, and bit 32 on `Unanswered`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum PendingCount {
    /// A predecessor that may still send connections.
    Arriving = 1 << 4,
    /// A task that may be holding a connection which is not registered yet.
    Accepting = 1 << 16,
    /// A connection that has not sent its last response.
    Unanswered = 1 << 32,
}

const PHASE: u64 = 0b111;
const COUNTS: u64 = !0b1111;
const ARRIVING: u64 = (PendingCount::Accepting as u64 - 1) & COUNTS;

/// The phase and the counts at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot(u64);

impl Snapshot {
    pub fn phase(self) -> Phase {
        Phase::ALL[usize::try_from(self.0 & PHASE).unwrap_or_default()]
    }

    pub fn is_arriving(self) -> bool {
        self.0 & ARRIVING != 0
    }

    pub fn is_drained(self) -> bool {
        self.0 & COUNTS == 0
    }

    /// Whether every open connection is registered, and no predecessor may send one.
    pub fn is_settled(self) -> bool {
        self.0 & COUNTS & (PendingCount::Unanswered as u64 - 1) == 0
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

    pub fn acquire(&self, one: PendingCount) {
        self.0.fetch_add(one as u64, AcqRel);
    }

    /// Subtracts one, which [`PhaseWord::acquire`] must have added; otherwise the other counts are corrupted. Returns
    /// the word after the subtraction.
    pub fn release(&self, one: PendingCount) -> Snapshot {
        Snapshot(self.0.fetch_sub(one as u64, AcqRel) - one as u64)
    }

    /// Sets the phase; returns the word before.
    pub fn enter(&self, phase: Phase) -> Snapshot {
        let next = |word| Some(word & !PHASE | phase as u64);
        // The closure never returns None, so this cannot fail.
        Snapshot(self.0.fetch_update(AcqRel, Acquire, next).unwrap_or_else(|word| word))
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_and_phase_do_not_affect_each_other(
            counts in (0..20_u32, 0..20_u32, 0..20_u32), phase in 0..Phase::ALL.len(),
        ) {
            let phase_word = PhaseWord::new();
            let all = [PendingCount::Arriving, PendingCount::Accepting, PendingCount::Unanswered];
            for (one, count) in all.into_iter().zip([counts.0, counts.1, counts.2]) {
                for _ in 0..count {
                    phase_word.acquire(one);
                }
            }
            phase_word.enter(Phase::ALL[phase]);
            let snapshot = phase_word.now();
            prop_assert_eq!(snapshot.phase(), Phase::ALL[phase]);
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
