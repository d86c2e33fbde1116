//! Old processes that still send responses after the drain limit of a reload (`--linger-timeout`).

use std::cell::Cell;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::Signal;
use tempfile::TempDir;
use testkit::client::{Connection, get};
use testkit::frames::{
    self, ACCEPTING, COMMIT, GO, HELLO, LISTENERS, MAIN, READY, connect_takeover_socket, frame,
};
use testkit::load::Load;
use testkit::process::{Process, signal};
use testkit::service::Service;
use testkit::{TEST_TIMEOUT, block_on, wait_until};
use tokio::time::timeout;

use crate::app_binary;
use crate::reload::{end, pid_of_generation, process_on, reload};

/// The type of a message of a process that lingers.
const LINGERING: u16 = 12;
const TOTALS: u16 = 9;

/// A service that reloads with the options of its start.
struct Lingering {
    service: Service,
    folder: TempDir,
    flags: Vec<&'static str>,
    /// The generation of the process that serves, unless a test reloads it by other means.
    generation: Cell<u64>,
}

impl Lingering {
    fn start(flags: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder is made");
        let service = Service::start_in(app_binary(), flags, folder.path()).expect("the service starts");
        Self { service, folder, flags: flags.to_vec(), generation: Cell::new(1) }
    }

    fn reload(&self) {
        let (code, log) = reload(self.folder.path(), &self.service.notifications.path(), &self.flags);
        assert_eq!(code, Some(0), "{log}");
        self.generation.set(self.generation.get() + 1);
    }

    fn wait_for_status(&mut self, text: &str) {
        self.service.notifications.wait_for_status(text).expect("the status is sent");
    }

    /// A connection whose request is in flight, and the pid of the process that answers it.
    async fn hold(&self) -> (Connection, i32) {
        let (mut connection, pid) = self.connect().await;
        connection.hold().await.expect("the request is in flight");
        (connection, pid)
    }

    /// The pid of the process that serves.
    async fn current(&self) -> i32 {
        self.connect().await.1
    }

    /// A connection to the process that serves, and its pid. The process before may have accepted a connection just before
    /// the end of the reload.
    async fn connect(&self) -> (Connection, i32) {
        let connected = async {
            loop {
                let mut connection = self.service.connect().await;
                let (pid, generation) = process_on(&mut connection).await;
                if generation >= self.generation.get() {
                    return (connection, pid);
                }
            }
        };
        timeout(TEST_TIMEOUT, connected).await.expect("the new process answers in time")
    }
}

fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_response_that_takes_longer_than_the_drain_limit_is_finished_and_its_connection_moves() {
    let mut lingering = Lingering::start(&["--drain-timeout", "500ms"]);
    block_on(async {
        let (mut slow, first) = lingering.hold().await;
        lingering.reload();
        lingering.wait_for_status("; 1 old process still sends 1 response");
        assert!(runs(first));
        slow.release().await.expect("the response is whole");
        let pid = pid_of_generation(&mut slow, 2).await;
        assert_ne!(pid, first);
        let (status, log) = lingering.service.end().expect("the process ends");
        assert!(status.success(), "{log}");
        let line = "the drain limit has passed: still sending 1 response, the oldest for 0s: /echo, limit 1h (--linger-timeout)";
        assert!(log.contains(line), "{log}");
        assert!(log.contains("handed over 1 connection; 1 request in flight finished, 0 cut off"), "{log}");
        end(pid);
    });
}

#[test]
fn a_response_is_cut_off_at_the_linger_limit_and_with_zero_at_the_drain_limit() {
    for (limit, reason) in [("1s", "cut off at the linger limit"), ("0s", "cut off at the drain limit")] {
        let lingering = Lingering::start(&["--drain-timeout", "500ms", "--linger-timeout", limit]);
        block_on(async {
            let (mut slow, _) = lingering.hold().await;
            lingering.reload();
            let pid = lingering.current().await;
            let (_, log) = lingering.service.end().expect("the process ends");
            assert!(log.contains(reason) && log.contains(" 1 cut off, in "), "{log}");
            slow.release().await.expect_err("the response is cut off");
            end(pid);
        });
    }
}

#[test]
fn a_stop_signal_leaves_a_lingering_process_the_drain_limit_and_a_second_one_ends_it_at_once() {
    for (signals, reason) in [(1, "cut off at the drain limit"), (2, "cut off at a second stop signal")] {
        let flags = ["--drain-timeout", "2s", "--linger-timeout", "infinity"];
        let mut lingering = Lingering::start(&flags);
        block_on(async {
            let (_slow, first) = lingering.hold().await;
            lingering.reload();
            lingering.wait_for_status("; 1 old process still sends 1 response");
            let pid = lingering.current().await;
            let begun = std::time::Instant::now();
            for _ in 0..signals {
                signal(&first.to_string(), Signal::TERM).expect("the process runs");
                // Two signals at the same time would be one.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let (_, log) = lingering.service.end().expect("the process ends");
            let took = begun.elapsed();
            assert_eq!(took >= Duration::from_secs(2), signals == 1, "{took:?}: {log}");
            assert!(log.contains(reason), "{log}");
            end(pid);
        });
    }
}

#[test]
fn three_old_processes_linger_beside_each_other_and_their_connections_move_to_the_fourth() {
    let mut lingering = Lingering::start(&["--drain-timeout", "500ms"]);
    block_on(async {
        let load = Load::paced(&lingering.service.target).start(|| {});
        let mut held = Vec::new();
        for number in 1..=3 {
            held.push(lingering.hold().await);
            // The second and the third reload come while the process before still drains.
            lingering.reload();
            assert!(held.iter().all(|(_, pid)| runs(*pid)), "process {number} does not run");
        }
        lingering.wait_for_status("; 3 old processes still send 3 responses");
        let current = lingering.current().await;
        for (left, (connection, pid)) in held.iter_mut().enumerate().rev() {
            connection.release().await.expect("the response is whole");
            assert_eq!(pid_of_generation(connection, 4).await, current);
            wait_until("the old process exits", || !runs(*pid));
            if left == 2 {
                lingering.wait_for_status("; 2 old processes still send 2 responses");
            }
        }
        let report = load.stop();
        assert_eq!(report.lost(), 0, "{report}");
        end(current);
    });
}

#[test]
fn a_stop_of_the_process_that_serves_ends_the_old_ones_too() {
    let mut lingering = Lingering::start(&["--drain-timeout", "1s"]);
    block_on(async {
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(lingering.hold().await);
            lingering.reload();
        }
        lingering.wait_for_status("; 2 old processes still send 2 responses");
        let current = lingering.current().await;
        // Without a service manager only this process receives the signal.
        signal(&current.to_string(), Signal::TERM).expect("the process runs");
        lingering.service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
        let (mut finishes, _) = held.pop().expect("there are two");
        finishes.release().await.expect("the response is whole");
        wait_until("all processes exit", || !runs(held[0].1) && !runs(current));
        let (_, log) = lingering.service.end().expect("the process ends");
        assert!(log.contains("the remaining responses have 1s (--drain-timeout)"), "{log}");
        assert!(log.contains("cut off at the drain limit: request /echo"), "{log}");
    });
}

#[test]
fn at_a_further_reload_the_oldest_of_eight_lingering_processes_ends() {
    let mut lingering = Lingering::start(&["--drain-timeout", "300ms"]);
    block_on(async {
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(lingering.hold().await);
            lingering.reload();
        }
        lingering.wait_for_status("; 8 old processes still send 8 responses");
        assert!(runs(held[0].1));
        held.push(lingering.hold().await);
        lingering.reload();
        wait_until("the oldest exits", || !runs(held[0].1));
        lingering.wait_for_status("; 8 old processes still send 8 responses");
        let current = lingering.current().await;
        for (connection, _) in &mut held[1..] {
            connection.release().await.expect("the response is whole");
        }
        let (_, log) = lingering.service.end().expect("the process ends");
        assert!(log.contains("the remaining responses have 300ms (--drain-timeout)"), "{log}");
        end(current);
    });
}

/// Exclusive background tasks of the successor begin at the end of the handover channel. A successor of an earlier release
/// knows no linger channel.
#[test]
fn the_connection_closes_after_its_response_if_the_successor_drops_the_linger_channel() {
    let lingering = Lingering::start(&["--drain-timeout", "500ms"]);
    block_on(async {
        let (mut slow, first) = lingering.hold().await;
        let successor =
            Process::spawn(std::process::Command::new("sleep").arg("1000")).expect("sleep starts");
        let channel = connect_takeover_socket(lingering.folder.path());
        set_socket_timeout(&channel, Timeout::Recv, Some(TEST_TIMEOUT)).expect("the time limit is set");
        let send = |message_type, text: &str| {
            frames::send(&channel, &frame(message_type, 0, text), &[]).expect("the bytes are sent");
        };
        let receive = || {
            let (message, fds) = frames::receive(&channel).ok()?;
            Some((frames::read(&message).ok()?.0, fds))
        };
        send(HELLO, &successor.pid().as_raw_nonzero().to_string());
        send(GO, "");
        assert_eq!(receive().expect("a message arrives").0, LISTENERS);
        send(READY, "");
        assert_eq!(receive().expect("a message arrives").0, COMMIT);
        send(ACCEPTING, "");
        assert_eq!(receive().expect("a message arrives").0, MAIN);
        let (message_type, fds) = receive().expect("a message arrives");
        assert_eq!((message_type, fds.len()), (LINGERING, 2));
        assert_eq!(receive().expect("a message arrives").0, TOTALS);
        let end = frames::receive(&channel).expect("the channel ends within the limit").0;
        assert!(end.is_empty(), "the channel is open: {end:?}");
        assert!(runs(first));
        // The other end of the linger channel closes, as in a successor that does not know the message.
        drop(fds);
        slow.release().await.expect("the response is whole");
        // A request that comes at once is not lost.
        let last = slow.ask(&get("/")).await.expect("the old process answers");
        assert!(last.closes() && last.text().starts_with(&format!("pid {first}, ")), "{}", last.text());
        let (status, log) = lingering.service.end().expect("the process ends");
        assert!(
            status.success() && log.contains("handed over 0 connections; 1 request in flight finished"),
            "{log}"
        );
    });
}

/// systemd starts a service again after a crash only when all of its processes have exited.
#[test]
fn a_stop_signal_ends_a_lingering_process_at_once_if_no_process_serves() {
    let mut lingering = Lingering::start(&["--drain-timeout", "1s"]);
    block_on(async {
        let (_slow, first) = lingering.hold().await;
        lingering.reload();
        lingering.wait_for_status("; 1 old process still sends 1 response");
        end(lingering.current().await);
        signal(&first.to_string(), Signal::TERM).expect("the process runs");
        let (_, log) = lingering.service.end().expect("the process ends");
        assert!(log.contains("cut off at the successor's exit: request /echo"), "{log}");
    });
}

#[test]
fn a_process_without_responses_passes_the_linger_channel_to_its_successor_and_exits() {
    let mut lingering = Lingering::start(&["--drain-timeout", "1s"]);
    block_on(async {
        let (mut slow, first) = lingering.hold().await;
        lingering.reload();
        let between = lingering.current().await;
        lingering.reload();
        lingering.wait_for_status("; 1 old process still sends 1 response");
        wait_until("the process between exits", || !runs(between));
        lingering.reload();
        lingering.wait_for_status("; 1 old process still sends 1 response");
        assert!(runs(first));
        slow.release().await.expect("the response is whole");
        let pid = pid_of_generation(&mut slow, 4).await;
        end(pid);
    });
}
