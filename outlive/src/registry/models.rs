//! Loom models of the registry: `make models` runs each with every interleaving of its tasks and every value that the
//! memory model permits them to read. A missed notification is a deadlock, which loom reports.
//!
//! The comment on each model names the defects ("Red") that were introduced on purpose to check that it fails.

use std::future::poll_fn;
use std::sync::atomic::AtomicBool;
use std::task::Poll;

use hyper::Uri;
use loom::future::block_on;
use loom::thread;

use super::*;

/// How many times loom preempts a task at most, unless `LOOM_MAX_PREEMPTIONS` is set. Two are enough to find each
/// defect below; three take two minutes.
const PREEMPTIONS: usize = 2;

fn check(model: impl Fn(Arc<Registry>) + Send + Sync + 'static) {
    let limit = Duration::from_secs(1);
    let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(PREEMPTIONS));
    builder.check(move || model(Registry::new(limits, CancellationToken::new())));
}

fn task(run: impl FnOnce() + 'static) -> thread::JoinHandle<()> {
    thread::spawn(run)
}

fn end(tasks: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    for task in tasks {
        task.join().expect("a task of the model panicked");
    }
}

/// The task of a connection: it ends when the connection is quiescent and the phase requires it to be handed over or
/// closed, as the drivers in `connection/` do.
fn drive(registration: Registration) {
    let driver = registration.driver();
    block_on(poll_fn(|cx| {
        let _: Poll<()> = driver.poll_driver(cx, |_| Poll::Pending);
        let is_quiescent = driver.state().is_quiescent();
        if is_quiescent && (driver.must_quiesce() || driver.must_close()) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }));
    drop(registration);
}

fn begin(registration: &Registration) -> RequestGuard {
    registration.requests().begin(&Uri::from_static("/"))
}

fn drain(registry: &Registry) {
    registry.set_phase(Phase::Draining);
    let mut pending_work = registry.pending_work();
    block_on(registry.wait_until(|| {
        pending_work.retain(PendingWork::is_pending);
        pending_work.is_empty() && !registry.is_arriving()
    }));
}

fn quiesce(registry: &Registry) {
    registry.set_phase(Phase::Quiescing);
    block_on(registry.wait_until(|| registry.is_drained()));
    assert_eq!(registry.entries().len(), 0, "a drained registry has no connection");
}

/// Red: without the wakes in `set_phase`; without the notification in `release`.
#[test]
fn phase_quiescing_wakes_an_idle_connection_and_its_end_wakes_the_drain() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let connection = task(move || drive(registration));
        quiesce(&registry);
        end([connection]);
    });
}

/// Red, also in most of the other models: with a load and a store instead of `fetch_sub` in `PhaseWord::release`.
#[test]
fn the_later_of_two_connections_that_end_wakes_the_drain() {
    check(|registry| {
        let connections = [(); 2].map(|()| {
            let registration = registry.register(Peer::Unix, None);
            task(move || drop(registration))
        });
        quiesce(&registry);
        end(connections);
    });
}

/// Red: without the mark that `Entry::watch` sets.
#[test]
fn a_request_that_ends_while_a_drain_begins_wakes_the_drain() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let request = begin(&registration);
        let connection = task(move || {
            drop(request);
            drive(registration);
        });
        drain(&registry);
        quiesce(&registry);
        end([connection]);
    });
}

/// Red: without the wake of the driver in `apply`; with the waker stored at the end of `poll_driver`.
#[test]
fn a_request_that_ends_in_another_task_wakes_its_driver() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let request = begin(&registration);
        let handler = task(move || drop(request));
        let connection = task(move || drive(registration));
        quiesce(&registry);
        end([handler, connection]);
    });
}

/// Red: with `accepting` counted after the check of the phase; with an `is_drained` that ignores `accepting`.
#[test]
fn a_connection_at_a_change_of_the_phase_is_waited_for_or_not_accepted() {
    check(|registry| {
        let is_over = Arc::new(AtomicBool::new(false));
        let (acceptor, ended) = (registry.clone(), is_over.clone());
        let accept = task(move || {
            let accepted = {
                let _accepting = acceptor.accepting();
                acceptor.phase().accepts().then(|| acceptor.register(Peer::Unix, None))
            };
            if let Some(registration) = accepted {
                assert!(!ended.load(Relaxed), "the drain ended before this connection");
                drive(registration);
            }
        });
        quiesce(&registry);
        is_over.store(true, Relaxed);
        end([accept]);
    });
}

/// Red: without the notification in `release` for the last `Arriving`.
#[test]
fn a_drain_waits_for_connections_that_a_predecessor_sends() {
    check(|registry| {
        let (started_sender, started) = loom::sync::mpsc::channel();
        let successor = registry.clone();
        let receive = task(move || {
            let arriving = successor.arriving();
            started_sender.send(()).expect("the model waits for it");
            let registration = successor.register(Peer::Unix, None);
            drop(arriving);
            drive(registration);
        });
        started.recv().expect("the task has started");
        drain(&registry);
        quiesce(&registry);
        end([receive]);
    });
}

/// The loop of a drain: if the first attempt to quiesce finds a request in flight, the drain serves until it has ended,
/// and tries again. Red: with an `Entry::watch` that sets the mark only if a load does not find it set; with `Relaxed`
/// in `apply`.
#[test]
fn a_request_during_an_attempt_to_quiesce_is_answered_and_the_next_attempt_succeeds() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let connection = task(move || {
            drop(begin(&registration));
            drive(registration);
        });
        drain(&registry);
        registry.set_phase(Phase::Quiescing);
        if !registry.is_drained() {
            drain(&registry);
        }
        quiesce(&registry);
        end([connection]);
    });
}

/// HTTP/2: an older request ends while a newer one is in flight. Red: without `RequestEnds` among the events that
/// notify the waiters.
#[test]
fn an_older_request_that_ends_beside_a_newer_one_wakes_the_drain() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let mut old = begin(&registration);
        old.track();
        registry.set_phase(Phase::Draining);
        let mut pending_work = registry.pending_work();
        let newer = begin(&registration);
        let handler = task(move || drop(old));
        block_on(registry.wait_until(|| {
            pending_work.retain(PendingWork::is_pending);
            pending_work.is_empty()
        }));
        end([handler]);
        drop((newer, registration));
    });
}

/// In `Lingering`, connections are still accepted from inherited listeners, and must not delay the wait for those from
/// before. Red: without the marks that `Entry::watch` sets.
#[test]
fn lingering_waits_for_the_connections_from_before_while_another_is_accepted() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let connection = task(move || drive(registration));
        registry.set_phase(Phase::Lingering);
        let mut before = registry.subscribe_all();
        let other = registry.register(Peer::Unix, None);
        block_on(registry.wait_until(|| {
            before.retain(|entry| entry.is_unanswered());
            before.is_empty()
        }));
        registry.set_phase(Phase::Closing);
        drop(other);
        block_on(registry.wait_until(|| registry.is_drained()));
        end([connection]);
    });
}

/// Red: with a `set_phase` that notifies before it sets the phase.
#[test]
fn a_change_to_the_phase_that_a_task_waits_for_wakes_it() {
    check(|registry| {
        let other = registry.clone();
        let waiting = task(move || block_on(other.wait_for_phase(|phase| phase == Phase::Quiescing)));
        registry.set_phase(Phase::Draining);
        registry.set_phase(Phase::Quiescing);
        end([waiting]);
    });
}
