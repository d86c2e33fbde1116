//! The service under the real `start_server` of Server::Starter, which holds the port, starts the next process on
//! SIGHUP, and only then ends the old one.

use std::process::Stdio;

use rustix::process::Signal;
use testkit::client::{Connection, Target, get};
use testkit::load::{Connections, Load};
use testkit::process::Process;
use testkit::service::command;
use testkit::{block_on, free_address, wait_until};

use crate::app_binary;

/// The number of SIGHUPs.
const TIMES: u64 = 5;

/// The number of child processes of `start_server`.
fn children(start_server: &Process) -> usize {
    let pid = start_server.pid().as_raw_nonzero();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children.expect("start_server runs").split_whitespace().count()
}

/// The generation of the process that answers on a new connection, if one does.
fn generation(target: &Target) -> Option<u64> {
    block_on(async {
        let mut connection = Connection::open(target).await.ok()?;
        let text = connection.ask(&get("/")).await.ok()?.text();
        text.split("generation ").nth(1)?.split(',').next()?.parse().ok()
    })
}

/// Starts `start_server`, and waits until its first process answers at `target`.
fn start(flag: &str, target: &Target, log: Stdio) -> Process {
    let mut start_server = command("start_server", &[flag, "--interval=1", "--", app_binary()]);
    start_server.stdout(Stdio::null()).stderr(log);
    let start_server = Process::spawn(&mut start_server).expect("start_server starts");
    wait_until("the first process answers", || generation(target).is_some());
    start_server
}

fn hang_up_repeatedly_under(flag: &str, target: &Target, load: Load) {
    let mut start_server = start(flag, target, Stdio::null());
    assert_eq!(generation(target), Some(1));
    let one_each = load.connections == Connections::OneEach;
    let running = load.start(|| {});
    for next in 2..2 + TIMES {
        start_server.signal(Signal::HUP);
        // Both processes accept for a while, so one response of the next process does not show that the old one is
        // gone.
        wait_until("only the next process answers", || (0..10).all(|_| generation(target) == Some(next)));
    }
    let report = running.stop();
    eprintln!("{TIMES} times HUP: {report}");
    assert_eq!(report.lost(), 0, "{report}");
    assert_eq!(report.closed_idle, 0, "a connection was closed without notice: {report}");
    assert!(one_each || report.told_to_close >= TIMES, "{report}");
    start_server.signal(Signal::TERM);
    assert!(start_server.wait().expect("the process ends").success());
}

fn on_a_port(load: impl FnOnce(&Target) -> Load) {
    let address = free_address();
    let target = Target::Tcp(address);
    hang_up_repeatedly_under(&format!("--port={address}"), &target, load(&target));
}

#[test]
fn hangups_under_saturating_load_lose_no_request() {
    on_a_port(Load::saturating);
}

#[test]
fn hangups_under_paced_load_lose_no_request() {
    on_a_port(Load::paced);
}

#[test]
fn hangups_under_paced_blind_load_lose_no_request() {
    on_a_port(Load::paced_blind);
}

#[test]
fn hangups_under_one_connection_per_request_lose_no_request() {
    on_a_port(Load::connection_per_request);
}

#[test]
fn hangups_of_a_unix_socket_service_lose_no_request() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let path = folder.path().join("http.sock");
    let target = Target::Unix(path.clone());
    hang_up_repeatedly_under(&format!("--path={}", path.display()), &target, Load::paced(&target));
}

#[test]
fn idle_connection_gets_one_more_response_from_the_old_process() {
    let address = free_address();
    let target = Target::Tcp(address);
    let log = tempfile::NamedTempFile::new().expect("the file is created");
    let stderr = log.reopen().expect("the file is created").into();
    let mut start_server = start(&format!("--port={address}"), &target, stderr);
    block_on(async {
        let mut idle = Connection::open(&target).await.expect("the connection is established");
        assert!(!idle.ask(&get("/")).await.expect("the request is answered").closes());
        start_server.signal(Signal::HUP);
        // From here on the next process serves, and the old one has received its signal.
        wait_until("the old process drains", || {
            std::fs::read_to_string(log.path()).expect("the file is readable").contains("draining: ")
        });
        // The old process logs the drain just before it begins to close connections.
        loop {
            let answer = idle.ask(&get("/")).await.expect("the request is answered");
            assert!(answer.text().contains("generation 1,"), "{}", answer.text());
            if answer.closes() {
                break;
            }
        }
    });
    // The response closed the last connection, so nothing keeps the old process.
    wait_until("the old process exits", || children(&start_server) == 1);
    start_server.signal(Signal::TERM);
    assert!(start_server.wait().expect("the process ends").success());
}
