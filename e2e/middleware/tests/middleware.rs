//! Each layer of the example works before and after a reload, on a connection that is open meanwhile and on a new one.

use rustix::process::Signal;
use testkit::block_on;
use testkit::client::{Answer, Connection};
use testkit::events::EventStream;
use testkit::process::terminate;
use testkit::service::Service;

const FILE: &str = "0123456789";

/// Runs `work` on a connection to the first process, and after a reload on the same connection and on a new one.
fn before_and_after_a_reload(work: &impl AsyncFn(&mut Connection)) {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    std::fs::write(folder.path().join("file.txt"), FILE).expect("the file is written");
    let files = folder.path().to_str().expect("the path is valid UTF-8");
    // A client that has used up its requests gets no more of them during the test.
    let flags = ["--files", files, "--refill", "1h"];
    let mut service = Service::start_in(env!("CARGO_BIN_EXE_middleware"), &flags, folder.path())
        .expect("the service starts");
    block_on(async {
        let mut kept = service.connect().await;
        work(&mut kept).await;
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        assert!(service.process().wait().expect("the old process exits").success());
        work(&mut kept).await;
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}

async fn ask(connection: &mut Connection, line: &str, fields: &[&str]) -> Answer {
    let head = format!("{line} HTTP/1.1");
    let request = [&[&*head, "host: test"], fields, &["\r\n"]].concat().join("\r\n");
    connection.ask(request.as_bytes()).await.expect("the server answers")
}

#[test]
fn static_file_is_served_in_parts_and_only_if_it_has_changed() {
    before_and_after_a_reload(&async |connection| {
        let path = "GET /static/file.txt";
        let whole = ask(connection, path, &[]).await;
        assert_eq!((whole.status, whole.text().as_str()), (200, FILE));
        let part = ask(connection, path, &["range: bytes=2-4"]).await;
        assert_eq!((part.status, part.text().as_str()), (206, "234"));
        assert_eq!(part.header("content-range"), Some("bytes 2-4/10"));
        let modified = whole.header("last-modified").expect("the date is present");
        let unchanged = ask(connection, path, &[&format!("if-modified-since: {modified}")]).await;
        assert_eq!(unchanged.status, 304);
        let tag = whole.header("etag").expect("the tag is present");
        assert_eq!(ask(connection, path, &[&format!("if-none-match: {tag}")]).await.status, 304);
        assert_eq!(ask(connection, "GET /static/../secret", &[]).await.status, 404);
    });
}

#[test]
fn response_is_compressed_for_clients_that_accept_it() {
    before_and_after_a_reload(&async |connection| {
        let plain = ask(connection, "GET /", &[]).await;
        assert_eq!(plain.header("content-encoding"), None);
        let compressed = ask(connection, "GET /", &["accept-encoding: gzip"]).await;
        assert_eq!(compressed.header("content-encoding"), Some("gzip"));
        assert!(compressed.body.len() < plain.body.len() / 5, "{} bytes", compressed.body.len());
    });
}

#[test]
fn preflight_is_answered_for_the_permitted_origin_only() {
    before_and_after_a_reload(&async |connection| {
        let mut preflight = async |origin: &str| {
            let fields = [&*format!("origin: {origin}"), "access-control-request-method: PUT"];
            let answer = ask(connection, "OPTIONS /", &fields).await;
            assert_eq!(answer.status, 200);
            answer.header("access-control-allow-origin").map(str::to_owned)
        };
        assert_eq!(preflight("https://shop.example").await.as_deref(), Some("https://shop.example"));
        assert_eq!(preflight("https://other.example").await, None);
    });
}

/// Each process counts by itself, so a client may send as many requests again after a reload.
#[test]
fn rate_limit_refuses_further_requests_and_begins_again_at_a_reload() {
    before_and_after_a_reload(&async |connection| {
        for number in 0..20 {
            assert_eq!(ask(connection, "GET /", &[]).await.status, 200, "request {number}");
        }
        let refused = ask(connection, "GET /", &["origin: https://shop.example"]).await;
        assert_eq!(refused.status, 429);
        assert!(refused.header("retry-after").is_some(), "{refused:?}");
        assert!(
            refused.header("access-control-allow-origin").is_some(),
            "a browser cannot read it: {refused:?}"
        );
    });
}

#[test]
fn requests_above_the_concurrency_limit_wait() {
    let service = Service::start(env!("CARGO_BIN_EXE_middleware"), &[]).expect("the service starts");
    block_on(async {
        let begun = std::time::Instant::now();
        let mut connections = Vec::new();
        for _ in 0..3 {
            let mut connection = service.connect().await;
            connection.send(&testkit::client::get("/report")).await.expect("the bytes are sent");
            connections.push(connection);
        }
        for connection in &mut connections {
            assert_eq!(connection.answer().await.expect("the server answers").text(), "report\n");
        }
        // Each of the three takes 100 ms.
        assert!(begun.elapsed().as_millis() >= 300, "{:?}", begun.elapsed());
    });
}

#[test]
fn event_stream_continues_through_the_layers_over_a_reload() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let mut service =
        Service::start_in(env!("CARGO_BIN_EXE_middleware"), &[], folder.path()).expect("the service starts");
    block_on(async {
        let mut events = EventStream::http1(&service.target).await.expect("the stream opens");
        let mut next = async || events.next().await.expect("no error").expect("an event");
        assert!(next().await.contains("id: 0\n"));
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        assert!(next().await.contains("id: 1\n"));
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}

/// More than `burst_size`. Within the rate limit, the next process would refuse those above it, and end them.
#[test]
fn more_event_streams_than_the_rate_limit_permits_continue_over_a_reload() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let flags = ["--refill", "1h"];
    let mut service = Service::start_in(env!("CARGO_BIN_EXE_middleware"), &flags, folder.path())
        .expect("the service starts");
    block_on(async {
        let mut streams = Vec::new();
        for _ in 0..30 {
            let mut stream = EventStream::http1(&service.target).await.expect("the stream opens");
            assert!(stream.next().await.expect("no error").expect("an event").contains("id: 0\n"));
            streams.push(stream);
        }
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        for stream in &mut streams {
            let event = stream.next().await.expect("no error").expect("the stream continues");
            assert!(event.contains("id: 1\n"), "{event}");
        }
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}
