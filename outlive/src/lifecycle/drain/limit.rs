//! The time limit of a drain: [`Limit`].

use std::fmt;
use std::time::Duration;

use tokio::time::{Instant, Interval, interval, sleep, sleep_until};

use crate::os::signals::Signals;
use crate::os::systemd;
use crate::registry::{Counts, Registry};

/// By how much each report extends systemd's stop timeout. It is longer than the interval of the reports, because one
/// late report would otherwise let systemd kill the process.
const MORE_TIME: Duration = Duration::from_secs(5);

/// Why a drain ended before all requests did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndReason {
    DrainLimit,
    LingerLimit,
    SecondSignal,
    SuccessorExited,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DrainLimit => "the drain limit",
            Self::LingerLimit => "the linger limit",
            Self::SecondSignal => "a second stop signal",
            Self::SuccessorExited => "the successor's exit",
        })
    }
}

/// The time that a drain leaves to the background tasks and exit hooks, which run after it.
pub struct TaskBudget {
    pub deadline: Instant,
    /// The number of further stop signals at which they are cut off.
    pub signals: u32,
}

/// Ends a drain that does not end by itself, and reports the progress of the drain to systemd.
///
/// Each request has the whole limit: from the beginning of the drain if it was in flight then, otherwise from its own
/// beginning. Once the limit has passed for the first time, the drain admits no new request, so it ends within twice
/// the limit. A further stop signal ends it at once.
pub(super) struct Limit<'a> {
    registry: &'a Registry,
    pub(super) signals: &'a mut Signals,
    pub(super) length: Duration,
    pub(super) begun: Instant,
    report: Interval,
    /// Whether this is the main process of the unit, from which systemd expects the reports.
    pub(super) is_main: bool,
    /// The number of further stop signals that end the drain.
    pub(super) signals_left: u32,
    /// False once the successor has exited.
    has_successor: bool,
    /// The reason for which the drain was ended, if it was.
    pub(super) passed: Option<EndReason>,
}

impl<'a> Limit<'a> {
    pub(super) fn new(registry: &'a Registry, signals: &'a mut Signals, length: Duration) -> Self {
        let begun = Instant::now();
        let report = interval(systemd::STATUS_INTERVAL);
        Self {
            registry,
            signals,
            length,
            begun,
            report,
            is_main: true,
            signals_left: 1,
            has_successor: true,
            passed: None,
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The deadline of requests that were in flight at the beginning.
    pub(super) fn first_deadline(&self) -> Instant {
        self.begun + self.length
    }

    /// The next deadline: the first, until it has passed, then the last of the requests that are in flight now.
    fn deadline(&self) -> Instant {
        let first = self.first_deadline();
        if Instant::now() < first { first } else { deadline(self.registry, self.begun, self.length) }
    }

    /// Sets the number of further stop signals that end the drain.
    pub(super) fn expect_signals(&mut self, count: u32) {
        self.signals_left = count;
        if count == 0 {
            self.passed = Some(EndReason::SecondSignal);
        }
    }

    /// As [`Limit::passes`], for a drain with a successor. `exit` resolves when it has exited.
    ///
    /// If the successor has crashed, systemd sends a stop signal to this process, and starts the service again only when this
    /// process has exited too. So the first stop signal ends the drain, also if it has arrived before.
    pub(super) async fn passes_beside(&mut self, exit: impl Future<Output = ()>) {
        tokio::pin!(exit);
        while self.passed.is_none() {
            tokio::select! {
                () = self.passes() => {}
                () = &mut exit, if self.has_successor => {
                    self.has_successor = false;
                    let is_stopping = self.signals_left < 2;
                    self.passed = is_stopping.then_some(EndReason::SuccessorExited);
                }
            }
        }
    }

    /// The reason to record when a stop signal ends the drain.
    fn reason_of_signal(&self) -> EndReason {
        if self.has_successor { EndReason::SecondSignal } else { EndReason::SuccessorExited }
    }

    /// Waits until the limit has passed for all requests in flight, or stop signals have ended the drain.
    pub(super) async fn passes(&mut self) {
        while self.passed.is_none() {
            tokio::select! {
                () = run_out(self.registry, self.begun, self.length) => self.passed = Some(EndReason::DrainLimit),
                () = self.signals.terminated() => {
                    self.signals_left -= 1;
                    if self.signals_left == 0 || !self.has_successor {
                        self.passed = Some(self.reason_of_signal());
                    }
                }
                _ = self.report.tick(), if self.is_main => {
                    systemd::still_stopping(&self.status(), MORE_TIME);
                }
            }
        }
    }

    /// The budget of the background tasks. It takes one more signal to cut them off, also if a signal has ended the
    /// drain.
    pub(super) fn remaining(&self) -> TaskBudget {
        TaskBudget { deadline: self.first_deadline(), signals: self.signals_left.max(1) }
    }

    pub(super) fn status(&self) -> String {
        let Counts { connections, in_flight, .. } = self.registry.counts();
        let left = self.deadline().saturating_duration_since(Instant::now()).as_secs_f64().round();
        format!("draining: {in_flight} in flight on {connections} connections, {left} s left")
    }
}

/// The time at which no request that is now in flight has any of its `length` left.
fn deadline(registry: &Registry, begun: Instant, length: Duration) -> Instant {
    let last = registry.last_request().map_or(begun, |last| last.max(begun));
    (last + length).min(begun + length + length)
}

/// Waits until no request that is in flight has time left.
async fn run_out(registry: &Registry, begun: Instant, length: Duration) {
    sleep_until(begun + length).await;
    let time_left = || deadline(registry, begun, length).saturating_duration_since(Instant::now());
    if time_left().is_zero() {
        return;
    }
    // Otherwise the end of a request would not wake `wait_until` before all of them have ended.
    registry.subscribe_all();
    while !time_left().is_zero() {
        tokio::select! {
            () = registry.wait_until(|| time_left().is_zero()) => {}
            () = sleep(time_left()) => {}
        }
    }
}
