//! Restarts and reloads while slow requests overlap, so that at any moment at least one is in flight.

use std::time::Duration;

use testkit::container::{Container, Systemd};
use testkit::load::{Connections, Load};
use testkit::{on_each_systemd, wait_until};

use crate::app_package;

on_each_systemd! {
    restart_cuts_off_no_overlapping_slow_request_of_kept_connections
    restart_cuts_off_no_overlapping_slow_request_of_single_use_connections
    reload_cuts_off_no_overlapping_slow_request
}

/// Three times as long as a request takes, so that a request on a slow machine still takes less.
const DRAIN_TIMEOUT: &str = "[Service]\nEnvironment=APP_DRAIN_TIMEOUT=6s\n";

/// Clients that each have a slow request in flight nearly all the time.
fn overlapping(connections: Connections) -> Load {
    let close = if connections == Connections::OneEach { "connection: close\r\n" } else { "" };
    let request = format!("GET /sleep?duration=2s HTTP/1.1\r\nhost: test\r\n{close}\r\n");
    Load {
        clients: 5,
        request: request.into_bytes(),
        connections,
        think: Duration::from_millis(400),
        ..Load::saturating(&Container::target())
    }
}

/// The message with which a process reports its drain.
const STOPPED: &str = "MESSAGE_ID=a81d6e0b9c3f47d5886e2b4f7c0d9e33";

fn assert_no_request_is_cut_off(systemd: Systemd, verb: &str, connections: Connections) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.add_to_unit("service", "drain", DRAIN_TIMEOUT).expect("the drop-in is written");
    // Starts the first process.
    container.ask("/");
    let loads: Vec<_> = (0..4)
        // Each load starts when the one before it has been answered once, so their requests overlap.
        .map(|_| overlapping(connections).start(container.enter()))
        .collect();
    container.systemctl(verb).expect("systemctl succeeds");
    for load in loads {
        let report = load.stop();
        assert_eq!(report.lost(), 0, "{report}");
        if connections == Connections::Kept {
            assert_eq!(report.connections, report.clients, "{report}");
        }
    }
    let mut ends = Vec::new();
    wait_until("the old process logs how its drain ended", || {
        // Not by unit: if journald reads the last message of a process only after its exit, it cannot tell the unit.
        let entries = container.journal(&[STOPPED]).expect("journalctl succeeds");
        let messages = entries.iter().filter_map(|entry| entry["MESSAGE"].as_str());
        ends = messages.filter(|message| message.contains(" cut off, in ")).map(str::to_owned).collect();
        !ends.is_empty()
    });
    assert!(ends.iter().all(|line| line.contains(" 0 cut off")), "{ends:?}");
}

fn restart_cuts_off_no_overlapping_slow_request_of_kept_connections(systemd: Systemd) {
    assert_no_request_is_cut_off(systemd, "restart", Connections::Kept);
}

fn restart_cuts_off_no_overlapping_slow_request_of_single_use_connections(systemd: Systemd) {
    assert_no_request_is_cut_off(systemd, "restart", Connections::OneEach);
}

fn reload_cuts_off_no_overlapping_slow_request(systemd: Systemd) {
    assert_no_request_is_cut_off(systemd, "reload", Connections::Kept);
}
