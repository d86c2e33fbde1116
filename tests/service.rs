//! Tests of the binary without systemd, root or network. The test kit plays the service manager.

use rustix::process::Signal;
use testkit::block_on;
use testkit::client::get;
use testkit::service::Service;

const BINARY: &str = env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME")));

#[test]
fn the_service_answers_and_exits_cleanly() {
    let mut service = Service::start(BINARY, &[]).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
        service.signal(Signal::TERM);
        // Until the service has closed the connection with its last response.
        while !connection.ask(&get("/")).await.expect("the server answers").closes() {}
        service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
    });
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success(), "{log}");
}

#[test]
fn a_connection_outlives_a_restart() {
    let service = Service::start_with_store(BINARY, &[]).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
        service.signal(Signal::TERM);
        let _next = service.restart(BINARY).expect("the next process starts");
        let answer = connection.ask(&get("/")).await.expect("the server answers");
        assert!(answer.status == 200 && !answer.closes());
    });
}

#[test]
fn a_connection_outlives_a_reload() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let mut service = Service::start_in(BINARY, &[], folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        let answer = connection.ask(&get("/")).await.expect("the server answers");
        assert!(answer.status == 200 && !answer.closes());
        service.process().wait().expect("the old process exits");
        testkit::process::terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}
