//! Decides at which moment a process that restarts begins to hold new requests for the next process: [`Schedule`].
//!
//! Two demands pull in opposite directions. A request that is in flight must not be cut off if it takes less than the
//! drain limit. And new requests should wait as briefly as possible, although no process can serve them between the
//! moment at which they are held and the start of the next process.
//!
//! The limit therefore counts for each request from its own beginning, or from the beginning of the drain if the
//! request was in flight then. New requests are held within one limit, at a moment `h`; each request that was admitted
//! before `h` has time until `h + limit` at least. The guarantee is independent of what arrives and of how `h` is
//! chosen; the drain takes two limits at most. The choice of `h` decides only how long others wait: until the slowest
//! request that is in flight at `h` has ended.
//!
//! The duration of a request is not known in advance, so the choice uses what the drain has observed:
//!
//! 1. New requests are served until all requests that were in flight at the beginning have ended. One slow download
//!    among quick requests thus delays only the restart, and no other client.
//! 2. If only quick requests are in flight then, they end within a short hold: [`Step::Try`].
//! 3. If they do not, new requests are served once more until those in flight have ended, because a single slow request
//!    that came during the drain must not delay others either.
//! 4. After that, slow requests overlap, and a further round of serving or a try may cost a tenth of the time that the
//!    drain has taken. With steady slow requests there is no better moment: the wait of others is then the duration of
//!    those requests, whenever the hold begins.
//! 5. Otherwise, and at one limit at the latest, new requests are held until all others have ended: [`Step::Hold`].
//!
//! With steady requests of duration `d`, others wait for about `d`, which is the minimum, and the drain takes about
//! `3 d`. Holding from the beginning would take about `d`, but one slow request would then delay all others.

use std::time::Duration;

/// The duration of the first try. A shorter one would end before the tasks of a busy process have been scheduled.
const FIRST_TRY: Duration = Duration::from_millis(100);
/// After the second round of serving, a further one, or a try, costs at most this fraction of the time that the drain
/// has taken so far. A larger fraction makes restarts under steady slow requests longer; with a smaller one the drain
/// stops looking earlier for a moment at which others hardly have to wait.
const FRACTION: u32 = 10;

/// What a drain does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// New requests are served until the requests that were in flight at the beginning of this step have ended, but no
    /// longer than `at_most`.
    Serve { at_most: Duration },
    /// New requests are held. The drain is over if the others end within `at_most`; otherwise the held requests are
    /// served.
    Try { at_most: Duration },
    /// New requests are held for the next process until all others have ended.
    Hold,
}

/// The schedule of one drain; the module describes its rules. `elapsed` is the time since the beginning of the drain.
///
/// ```text
/// first -> Serve --have ended, cheap--> Try --failed--> Serve ...
///            |                           |
///            `-----otherwise---> Hold    `-------all ended, or Hold ended: the drain is over
/// ```
#[derive(Debug)]
pub struct Schedule {
    limit: Duration,
    next_try: Duration,
    rounds: Rounds,
}

/// How long the round of serving after the next failed try may take.
#[derive(Debug)]
enum Rounds {
    /// Until all requests in flight have ended.
    Whole,
    /// A [`FRACTION`] of the drain so far, because slow requests have overlapped twice.
    Short,
}

impl Schedule {
    pub fn new(limit: Duration) -> Self {
        Self { limit, next_try: FIRST_TRY, rounds: Rounds::Whole }
    }

    pub fn first(&self, elapsed: Duration) -> Step {
        Step::Serve { at_most: self.limit.saturating_sub(elapsed) }
    }

    /// `have_ended` tells whether all requests that were in flight at the beginning of that step have ended.
    pub fn after_serving(&mut self, elapsed: Duration, have_ended: bool) -> Step {
        let at_most = self.next_try;
        let is_cheap = at_most <= FIRST_TRY.max(elapsed / FRACTION) && elapsed + at_most < self.limit;
        if !have_ended || !is_cheap {
            return Step::Hold;
        }
        self.next_try *= 2;
        Step::Try { at_most }
    }

    pub fn after_failed_try(&mut self, elapsed: Duration) -> Step {
        let left = self.limit.saturating_sub(elapsed);
        match std::mem::replace(&mut self.rounds, Rounds::Short) {
            Rounds::Whole => Step::Serve { at_most: left },
            Rounds::Short => Step::Serve { at_most: left.min(elapsed / FRACTION) },
        }
    }
}
