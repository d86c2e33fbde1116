//! The registry, in every order that its tasks can meet in and with every value that the memory model lets them read:
//! `make models`. A wake-up that is missed is a deadlock here, which loom reports.
//!
//! Each says what was broken on purpose to see it fail.

use std::future::poll_fn;
use std::sync::atomic::AtomicBool;
use std::task::Poll;

use hyper::Uri;
use loom::future::block_on;
use loom::thread;

use super::*;

/// How often a task is interrupted at the most, where `LOOM_MAX_PREEMPTIONS` says nothing: each fault below shows with
/// as few. With 3 it takes two minutes.
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
        task.join().expect("no panic");
    }
}

/// A connection's task from one request to its rest or its end, whichever the phase asks for: as `connection.rs` does.
fn drive(registration: Registration) {
    let entry = registration.entry.clone();
    block_on(poll_fn(|cx| {
        let _: Poll<()> = entry.poll_driver(cx, |_| Poll::Pending);
        let is_quiescent = entry.state().is_quiescent();
        if is_quiescent && (entry.must_quiesce() || entry.must_close()) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }));
    drop(registration);
}

fn begin(registration: &Registration) {
    registration.entry.begin(&Uri::from_static("/"));
}

fn drain(registry: &Registry) {
    registry.set_phase(Phase::Draining);
    let mut pending_work = registry.pending_work();
    block_on(registry.wait_until(|| {
        pending_work.retain(PendingWork::is_pending);
        pending_work.is_empty() && !registry.is_arriving()
    }));
}

fn rest(registry: &Registry) {
    registry.set_phase(Phase::Quiescing);
    block_on(registry.wait_until(|| registry.is_drained()));
    assert_eq!(registry.entries().len(), 0, "a done registry has no connection");
}

/// Red: without the wakes of `set_phase`; without the bell in `take`.
#[test]
fn a_connection_hears_that_it_is_to_rest_and_whoever_waits_hears_that_it_does() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let connection = task(move || drive(registration));
        rest(&registry);
        end([connection]);
    });
}

/// Red: with a count taken by a load and a store, here and in most of the others.
#[test]
fn the_last_of_two_that_come_to_rest_is_heard() {
    check(|registry| {
        let connections = [(); 2].map(|()| {
            let registration = registry.register(Peer::Unix, None);
            task(move || drop(registration))
        });
        rest(&registry);
        end(connections);
    });
}

/// Red: without the mark of `watch`.
#[test]
fn a_request_that_ends_as_a_drain_begins_is_waited_for_and_heard() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        begin(&registration);
        let connection = task(move || {
            registration.entry.end();
            drive(registration);
        });
        drain(&registry);
        rest(&registry);
        end([connection]);
    });
}

/// Red: without the wake of the driver in `apply`; with the waker left at the end of a turn.
#[test]
fn a_request_that_ends_in_a_task_of_its_own_lets_its_connection_rest() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        begin(&registration);
        let entry = registration.entry.clone();
        let handler = task(move || entry.end());
        let connection = task(move || drive(registration));
        rest(&registry);
        end([handler, connection]);
    });
}

/// Red: with `accepting` counted behind the look at the phase; with a registry that is done where somebody accepts.
#[test]
fn a_connection_that_is_accepted_as_the_phase_changes_is_waited_for_or_not_taken() {
    check(|registry| {
        let is_over = Arc::new(AtomicBool::new(false));
        let (acceptor, ended) = (registry.clone(), is_over.clone());
        let accept = task(move || {
            let accepted = {
                let _accepting = acceptor.accepting();
                acceptor.phase().accepts().then(|| acceptor.register(Peer::Unix, None))
            };
            if let Some(registration) = accepted {
                assert!(!ended.load(Relaxed), "nobody waits for it any more");
                drive(registration);
            }
        });
        rest(&registry);
        is_over.store(true, Relaxed);
        end([accept]);
    });
}

/// Red: without the bell in `take` for the last that arrives.
#[test]
fn what_a_predecessor_passes_on_during_a_drain_is_waited_for() {
    check(|registry| {
        let (begin, begun) = loom::sync::mpsc::channel();
        let successor = registry.clone();
        let receive = task(move || {
            let arriving = successor.arriving();
            begin.send(()).expect("it waits");
            let registration = successor.register(Peer::Unix, None);
            drop(arriving);
            drive(registration);
        });
        begun.recv().expect("it begins");
        drain(&registry);
        rest(&registry);
        end([receive]);
    });
}

/// A drain's loop: at the first try somebody is busy, and all are served on. Red: with the mark set only where a load
/// does not find it; with `Relaxed` in `apply`.
#[test]
fn a_request_that_comes_as_all_are_to_rest_is_answered_and_then_all_rest() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let connection = task(move || {
            begin(&registration);
            registration.entry.end();
            drive(registration);
        });
        drain(&registry);
        registry.set_phase(Phase::Quiescing);
        if !registry.is_drained() {
            drain(&registry);
        }
        rest(&registry);
        end([connection]);
    });
}

/// Several at once (HTTP/2): one that was there before ends beside one that goes on. Red: without `RequestEnds` among
/// what whoever waits hears of.
#[test]
fn an_old_request_that_ends_beside_a_newer_one_is_heard() {
    check(|registry| {
        let registration = registry.register(Peer::Unix, None);
        let entry = registration.entry.clone();
        let old = entry.begin(&Uri::from_static("/"));
        entry.track(old.clone());
        registry.set_phase(Phase::Draining);
        let mut pending_work = registry.pending_work();
        begin(&registration);
        let handler = task(move || {
            entry.untrack(&old);
            entry.end();
        });
        block_on(registry.wait_until(|| {
            pending_work.retain(PendingWork::is_pending);
            pending_work.is_empty()
        }));
        end([handler]);
        drop(registration);
    });
}

/// Though others come meanwhile, from who else holds the port. Red: without the marks.
#[test]
fn whoever_is_told_to_end_is_waited_for() {
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

/// Red: with the bell rung before the phase is set.
#[test]
fn whoever_waits_for_a_phase_hears_of_it() {
    check(|registry| {
        let other = registry.clone();
        let waiting = task(move || block_on(other.wait_for_phase(|phase| phase == Phase::Quiescing)));
        registry.set_phase(Phase::Draining);
        registry.set_phase(Phase::Quiescing);
        end([waiting]);
    });
}
