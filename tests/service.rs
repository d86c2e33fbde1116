//! The binary by itself: with no systemd, no root, and no network but loopback.

use rustix::process::Signal;
use testkit::block_on;
use testkit::client::get;
use testkit::service::Service;

const BINARY: &str = env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME")));

#[test]
fn the_service_answers_and_exits_cleanly() {
    let mut service = Service::start(BINARY, &[]).expect("a service");
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(&get("/")).await.expect("an answer").status, 200);
        service.signal(Signal::TERM);
        // Up to the answer that says that it is the last.
        while !connection.ask(&get("/")).await.expect("an answer").closes() {}
        service.notifications.wait_for("STOPPING=1").expect("it drains");
    });
    let (status, log) = service.end().expect("an end");
    assert!(status.success(), "{log}");
}

#[test]
fn a_connection_outlives_a_restart() {
    let service = Service::start_with_store(BINARY, &[]).expect("a service");
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(&get("/")).await.expect("an answer").status, 200);
        service.signal(Signal::TERM);
        let _next = service.restart(BINARY).expect("the next process");
        let answer = connection.ask(&get("/")).await.expect("an answer");
        assert!(answer.status == 200 && !answer.closes());
    });
}

#[test]
fn a_connection_outlives_a_reload() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut service = Service::start_in(BINARY, &[], folder.path()).expect("a service");
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(&get("/")).await.expect("an answer").status, 200);
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor");
        let answer = connection.ask(&get("/")).await.expect("an answer");
        assert!(answer.status == 200 && !answer.closes());
        service.process().wait().expect("the old process ends");
        testkit::process::terminate(main.trim_start_matches("MAINPID=")).expect("it runs");
    });
}
