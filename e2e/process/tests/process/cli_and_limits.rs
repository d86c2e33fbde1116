//! The command line, environment, notifications, limits and exit codes of the binary, without systemd.

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use rustix::process::Signal;
use testkit::client::{Connection, Target, WEBSOCKET, get, post};
use testkit::process::{Notifications, Process};
use testkit::service::{Service, command, run_to_end};
use testkit::{TEST_TIMEOUT, block_on, free_address};

use crate::{NAME, app_binary};

fn start(flags: &[&str]) -> Service {
    Service::start(app_binary(), flags).expect("the service starts")
}

fn assert_success(service: Service) -> String {
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success(), "{status}: {log}");
    log
}

/// Runs `command` and expects an error: exit code `code`, and a single line on standard error that contains all of
/// `words`.
fn assert_refused(command: &mut Command, code: i32, words: &[&str]) {
    let (exit, _, log) = run_to_end(command).expect("the process ends");
    assert_eq!(exit, Some(code), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is not in {log:?}");
    }
}

/// The binary with `socket` as an inherited fd. It is fd 0 and not 3, because `Command` can pass stdin without unsafe
/// code; listenfd reads the number from `LISTEN_FDS_FIRST_FD`.
fn inheriting(socket: impl Into<Stdio>, variables: &[(&str, &str)]) -> Command {
    let mut command = command(app_binary(), &[]);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0").stdin(socket);
    command.envs(variables.iter().copied());
    command
}

fn fd(socket: impl Into<std::os::fd::OwnedFd>) -> std::os::fd::OwnedFd {
    socket.into()
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("a free port is bound")
}

// ---- start and stop ----

#[test]
fn the_service_sends_ready_answers_sends_stopping_and_exits_with_0() {
    let mut service = start(&[]);
    block_on(async {
        let answer = service.connect().await.ask(&get("/")).await.expect("the server answers");
        assert_eq!(answer.status, 200);
        assert!(answer.text().contains("generation 1"), "{}", answer.text());
        assert!(answer.header("x-request-id").is_some());
    });
    service.signal(Signal::TERM);
    service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
    let sent = service.notifications.lines();
    let ready = sent.iter().position(|line| line == "READY=1");
    assert!(ready < sent.iter().position(|line| line == "STOPPING=1"), "{sent:?}");
    assert_success(service);
}

#[test]
fn sigint_drains_like_sigterm() {
    let mut service = start(&[]);
    service.signal(Signal::INT);
    service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
    assert_success(service);
}

#[test]
fn sigterm_right_after_the_socket_listens_exits_cleanly() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("http.sock");
    let mut process = command(app_binary(), &["--listen", path.to_str().expect("the path is valid UTF-8")]);
    let mut process = Process::spawn(process.stderr(Stdio::null())).expect("the wait succeeds");
    let deadline = Instant::now() + TEST_TIMEOUT;
    // Connects without pauses, because the signal must arrive right after the socket listens, before the start is
    // complete.
    while UnixStream::connect(&path).is_err() {
        assert!(Instant::now() < deadline, "the socket does not listen in time");
    }
    process.signal(Signal::TERM);
    let status = process.wait().expect("the process ends");
    assert!(status.success(), "{status}");
    assert!(!path.exists(), "the socket file was not removed");
}

#[test]
fn the_service_answers_under_systemd_socket_activate() {
    let port = free_address().port();
    let mut command = Command::new("systemd-socket-activate");
    command.arg(format!("--listen=127.0.0.1:{port}")).arg(app_binary()).stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command).expect("systemd-socket-activate starts");
    // systemd-socket-activate prints this line once it listens. A connection before that would be refused.
    let mut line = String::new();
    let mut stderr = std::io::BufReader::new(process.child().stderr.take().expect("the output is piped"));
    std::io::BufRead::read_line(&mut stderr, &mut line).expect("the line is present");
    assert!(line.contains("Listening"), "{line}");
    block_on(async {
        let target = Target::Tcp(([127, 0, 0, 1], port).into());
        let mut connection = Connection::open(&target).await.expect("the connection opens");
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
    });
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
}

#[test]
fn status_names_listeners_connections_and_requests() {
    let mut service = start(&["--request-timeout", "1h"]);
    let address = service.address();
    block_on(async {
        let mut connection = service.connect().await;
        connection.ask(&get("/")).await.expect("the server answers");
        connection.send(&get("/sleep?duration=1h")).await.expect("the bytes are sent");
        let wanted = format!("STATUS=serving on http({address}): 1 connections, 1 in flight, 1 answered");
        service.notifications.wait_for(&wanted).expect("the status is sent");
    });
}

#[test]
fn watchdog_notifications_are_sent_at_half_of_the_watchdog_time() {
    let listener = listener();
    let notifications = Notifications::new().expect("the socket is made");
    let mut command = inheriting(fd(listener), &[("WATCHDOG_USEC", "200000")]);
    command.env("NOTIFY_SOCKET", notifications.path());
    let begun = Instant::now();
    let _process = Process::spawn(&mut command).expect("the service starts");
    let mut notifications = notifications;
    for _ in 0..5 {
        notifications.wait_for("WATCHDOG=1").expect("WATCHDOG=1 is sent");
    }
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}

// ---- the drain ----

#[test]
fn a_request_in_flight_finishes_after_sigterm() {
    let mut service = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        connection.send(&get("/sleep?duration=5s")).await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        service.signal(Signal::TERM);
        let answer = connection.answer().await.expect("the server answers");
        assert_eq!(answer.text(), "slept 5s\n");
        assert!(answer.closes(), "no process continues this connection, so it must be closed");
    });
    assert_success(service);
}

#[test]
fn a_request_body_in_flight_is_read_after_sigterm() {
    let mut service = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        connection
            .send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n01234")
            .await
            .expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        service.signal(Signal::TERM);
        service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
        connection.send(b"56789").await.expect("the bytes are sent");
        assert_eq!(connection.answer().await.expect("the server answers").text(), "0123456789");
    });
    assert_success(service);
}

#[test]
fn idle_and_fresh_connections_get_one_more_response_after_sigterm() {
    let mut service = start(&[]);
    block_on(async {
        let mut idle = service.connect().await;
        idle.ask(&get("/")).await.expect("the server answers");
        let mut fresh = service.connect().await;
        let mut half = service.connect().await;
        half.send(b"GET / HTTP/1.1\r\nho").await.expect("the bytes are sent");
        service.signal(Signal::TERM);
        service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
        for (connection, request) in
            [(&mut idle, get("/")), (&mut fresh, get("/")), (&mut half, b"st: x\r\n\r\n".to_vec())]
        {
            let answer = connection.ask(&request).await.expect("the server answers");
            assert_eq!(answer.status, 200);
            assert!(answer.closes());
        }
    });
    assert_success(service);
}

#[test]
fn a_drain_answers_connections_queued_on_a_port_that_the_service_bound() {
    let address = free_address().to_string();
    let mut notifications = Notifications::new().expect("the socket is made");
    // With a limit of one connection, the others stay in the accept queue.
    let mut command = command(app_binary(), &["--listen", &address, "--max-connections", "1"]);
    command.env("NOTIFY_SOCKET", notifications.path());
    let mut process = Process::spawn(&mut command).expect("the service starts");
    notifications.wait_for("READY=1").expect("READY=1 is sent");
    let target = Target::Tcp(address.parse().expect("a valid address"));
    block_on(async {
        let mut first = Connection::open(&target).await.expect("the connection opens");
        first.ask(&get("/")).await.expect("the server answers");
        let mut queued = Connection::open(&target).await.expect("the connection is queued");
        queued.send(&get("/")).await.expect("the bytes are sent");
        process.signal(Signal::TERM);
        notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
        assert_eq!(queued.answer().await.expect("the server answers").status, 200);
        first.ask(&get("/")).await.expect("the server answers once more");
    });
    assert!(process.wait().expect("the process ends").success());
}

#[test]
fn a_half_sent_request_is_cut_off_at_the_drain_timeout() {
    let mut service = start(&["--drain-timeout", "1s"]);
    let log = block_on(async {
        let mut connection = service.connect().await;
        connection
            .send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n01234")
            .await
            .expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        let begun = Instant::now();
        service.signal(Signal::TERM);
        let log = assert_success(service);
        assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
        log
    });
    assert!(log.contains("cut off at the drain limit: request /echo from 127.0.0.1:"), "{log}");
}

#[test]
fn a_drain_reports_the_time_left_and_extends_the_stop_timeout() {
    let mut service = start(&["--drain-timeout", "1h", "--request-timeout", "1h"]);
    block_on(async {
        let mut connection = service.connect().await;
        connection.send(&get("/sleep?duration=1h")).await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        service.signal(Signal::TERM);
        let left = [(); 5].map(|()| {
            let line = service.notifications.wait_for("STATUS=draining: ").expect("the countdown is sent");
            let left = line.strip_prefix("STATUS=draining: 1 in flight on 1 connections, ");
            let left = left.and_then(|left| left.strip_suffix(" s left")).expect(&line);
            left.parse::<u32>().expect("a number of seconds")
        });
        // The steps may be larger than one second, because a busy machine delays the status messages.
        assert!(left.is_sorted_by(|one, next| one >= next) && left[4] < left[0], "{left:?}");
        let sent = service.notifications.lines();
        let extended = sent.iter().filter(|line| line.starts_with("EXTEND_TIMEOUT_USEC=")).count();
        assert!(extended >= 4, "{sent:?}");
        service.signal(Signal::TERM);
    });
    assert_success(service);
}

#[test]
fn a_second_stop_signal_ends_the_drain_at_once() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut service = start(&["--drain-timeout", "1h"]);
        let log = block_on(async {
            let mut connection = service.connect().await;
            connection.send(&get("/sleep?duration=20s")).await.expect("the bytes are sent");
            service.wait_for_in_flight(1).expect("the request is in flight");
            service.signal(Signal::TERM);
            service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
            service.signal(signal);
            assert_success(service)
        });
        assert!(log.contains("cut off at a second stop signal: request /sleep"), "{log}");
    }
}

// ---- limits ----

#[test]
fn an_incomplete_head_is_answered_with_408() {
    let service = start(&["--head-timeout", "300ms"]);
    block_on(async {
        for part in ["G", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost: x\r\n"] {
            let mut connection = service.connect().await;
            connection.send(part.as_bytes()).await.expect("the bytes are sent");
            let answer = connection.answer().await.expect("the server answers");
            assert_eq!(answer.status, 408, "{part:?}");
            assert_eq!(connection.read_more().await.expect("the connection ends"), 0, "{part:?}");
        }
    });
}

#[test]
fn a_connection_without_requests_is_closed_at_the_idle_timeout() {
    let service = start(&["--idle-timeout", "2s"]);
    block_on(async {
        let mut fresh = service.connect().await;
        assert_eq!(fresh.read_more().await.expect("the connection ends"), 0);
        let mut idle = service.connect().await;
        idle.ask(&get("/sleep?duration=3s")).await.expect("a request in flight has no idle limit");
        assert_eq!(idle.read_more().await.expect("the connection ends"), 0);
    });
}

#[test]
fn a_client_that_does_not_read_its_response_is_cut_off() {
    let service = start(&["--request-timeout", "2s", "--body-limit", "1GiB"]);
    let log = block_on(async {
        let mut connection = service.connect().await;
        // The service echoes the body and the client never reads it, so the socket buffers fill and the service cannot
        // write.
        let sent = tokio::time::timeout(TEST_TIMEOUT, connection.send(&post("/echo", 64 << 20))).await;
        assert!(
            sent.expect("the connection ends within the time limit of the test").is_err(),
            "the connection must be cut off while the client sends"
        );
        service.signal(Signal::TERM);
        assert_success(service)
    });
    assert!(log.contains("stopped reading the response"), "{log}");
}

#[test]
fn a_websocket_whose_client_does_not_read_is_cut_off() {
    let service = start(&["--request-timeout", "2s"]);
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(WEBSOCKET).await.expect("the server answers").status, 101);
        // The client reads no echo, so the buffers fill until the service stops reading.
        let message = [&b"\x82\xfe\x10\0\0\0\0\0"[..], &[0; 4096]].concat();
        let send_until_closed = async { while connection.send(&message).await.is_ok() {} };
        tokio::time::timeout(TEST_TIMEOUT, send_until_closed).await.expect("the connection is cut off");
    });
}

#[test]
fn a_client_that_stalls_in_its_request_body_is_cut_off() {
    let service = start(&["--request-timeout", "2s"]);
    block_on(async {
        let mut connection = service.connect().await;
        connection
            .send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf ")
            .await
            .expect("the bytes are sent");
        // The echo of the first half arrives, but the response cannot end.
        let answer = tokio::time::timeout(TEST_TIMEOUT, connection.answer()).await;
        assert!(
            answer.expect("the connection ends within the time limit of the test").is_err(),
            "the connection must be cut off inside the response"
        );
        assert_eq!(connection.read_more().await.expect("the connection ends"), 0);
    });
}

#[test]
fn connections_above_the_limit_wait_and_are_not_dropped() {
    let service = start(&["--max-connections", "2"]);
    block_on(async {
        let mut first = service.connect().await;
        let mut second = service.connect().await;
        first.ask(&get("/")).await.expect("the server answers");
        second.ask(&get("/")).await.expect("the server answers");
        let mut third = service.connect().await;
        third.send(&get("/")).await.expect("the bytes are sent");
        let early = tokio::time::timeout(Duration::from_millis(300), third.answer()).await;
        assert!(early.is_err(), "served above the limit: {early:?}");
        drop(first);
        assert_eq!(third.answer().await.expect("the server answers").status, 200);
    });
}

#[test]
fn a_body_above_the_limit_is_refused_with_413() {
    let service = start(&["--body-limit", "1KiB"]);
    block_on(async {
        let answer = service.connect().await.ask(&post("/echo", 1025)).await.expect("the server answers");
        assert_eq!(answer.status, 413);
        let answer = service.connect().await.ask(&post("/echo", 1024)).await.expect("the server answers");
        assert_eq!((answer.status, answer.body.len()), (200, 1024));
    });
}

#[test]
fn a_response_that_does_not_begin_in_time_is_replaced_by_503() {
    let service = start(&["--request-timeout", "300ms"]);
    block_on(async {
        let answer =
            service.connect().await.ask(&get("/sleep?duration=10s")).await.expect("the server answers");
        assert_eq!(answer.status, 503);
    });
}

#[test]
fn a_head_above_64_kib_is_refused_with_431() {
    let service = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let request = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(70_000));
        assert_eq!(connection.ask(request.as_bytes()).await.expect("the server answers").status, 431);
    });
}

#[test]
fn running_out_of_file_descriptors_loses_no_connection() {
    let listener = listener();
    let target = Target::Tcp(listener.local_addr().expect("the socket has an address"));
    let mut notifications = Notifications::new().expect("the socket is made");
    let mut command = Command::new("prlimit");
    command.args(["--nofile=24:24", app_binary()]);
    command.envs([("LISTEN_FDS", "1"), ("LISTEN_FDS_FIRST_FD", "0")]);
    command.env("NOTIFY_SOCKET", notifications.path()).stdin(fd(listener)).stderr(Stdio::piped());
    let begun = Instant::now();
    let mut process = Process::spawn(&mut command).expect("the service starts");
    notifications.wait_for("READY=1").expect("READY=1 is sent");
    block_on(async {
        let mut connections = Vec::new();
        for _ in 0..40 {
            let mut connection = Connection::open(&target).await.expect("the connection is queued");
            connection.send(&get("/")).await.expect("the bytes are sent");
            connections.push(connection);
        }
        // The first connections use all file descriptors. Each one that closes frees one for a connection in the queue.
        for mut connection in connections {
            assert_eq!(connection.answer().await.expect("the server answers").status, 200);
        }
    });
    process.signal(Signal::TERM);
    let status = process.wait().expect("the process ends");
    let mut log = String::new();
    let mut stderr = process.child().stderr.take().expect("the output is piped");
    std::io::Read::read_to_string(&mut stderr, &mut log).expect("valid UTF-8");
    assert!(status.success(), "{log}");
    assert!(log.contains("could not accept"), "{log}");
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("a small number");
    assert!(
        log.matches("could not accept").count() < seconds + 2,
        "expected at most one message per second: {log}"
    );
}

// ---- protocols ----

#[test]
fn an_http2_preface_in_several_segments_is_recognized() {
    let service = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        for segment in ["P", "RI * HTTP/2.0\r\n", "\r\nSM\r\n\r", "\n", "\0\0\0\x04\0\0\0\0\0"] {
            connection.send(segment.as_bytes()).await.expect("the bytes are sent");
            // The service handles the segment before it answers this other client.
            service.connect().await.ask(&get("/")).await.expect("the server answers");
        }
        let settings = connection.take(9).await.expect("a frame arrives");
        assert_eq!(settings[3], 4, "a SETTINGS frame: {settings:?}");
    });
}

#[test]
fn end_of_input_inside_an_http2_preface_closes_the_connection() {
    let service = start(&["--head-timeout", "1h"]);
    block_on(async {
        let mut connection = service.connect().await;
        connection.send(b"PRI * HT").await.expect("the bytes are sent");
        connection.finish_sending().await.expect("the sending side is closed");
        while connection.read_more().await.expect("the connection ends without a reset") > 0 {}
    });
    service.signal(Signal::TERM);
    assert_success(service);
}

#[test]
fn a_handler_is_dropped_when_its_client_disconnects() {
    let mut service = start(&["--request-timeout", "1h"]);
    block_on(async {
        let mut client = service.connect().await;
        client.send(&get("/sleep?duration=1h")).await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        drop(client);
        service.wait_for_in_flight(0).expect("no request is in flight");
    });
    service.signal(Signal::TERM);
    assert_success(service);
}

#[test]
fn a_client_that_closes_its_sending_side_is_answered() {
    let service = start(&[]);
    let mut client = std::net::TcpStream::connect(service.address()).expect("the connection opens");
    // MSG_MORE delays the request, so that it arrives together with the FIN.
    rustix::net::send(&client, &get("/"), SendFlags::MORE).expect("the bytes are sent");
    client.shutdown(std::net::Shutdown::Write).expect("the sending side is closed");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut client, &mut answer).expect("the server answers");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer:?}");
}

#[test]
fn a_failed_request_is_logged_by_default() {
    let service = start(&["--request-timeout", "100ms"]);
    let id = block_on(async {
        let answer =
            service.connect().await.ask(&get("/sleep?duration=10s")).await.expect("the server answers");
        assert_eq!(answer.status, 503);
        answer.header("x-request-id").expect("the response has a request id").to_owned()
    });
    service.signal(Signal::TERM);
    let log = assert_success(service);
    let line = log.lines().find(|line| line.contains("failed")).expect(&log);
    for word in [&id, "GET", "/sleep", "503", "no response began within 100ms (--request-timeout)"] {
        assert!(line.contains(word), "{word} is not in {line}");
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let service = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let requests: Vec<u8> = (1..=3).flat_map(|n| get(&format!("/sleep?duration={n}ms"))).collect();
        connection.send(&requests).await.expect("the bytes are sent");
        for n in 1..=3 {
            assert_eq!(
                connection.answer().await.expect("the server answers").text(),
                format!("slept {n}ms\n")
            );
        }
    });
}

#[test]
fn expect_100_continue_is_answered_before_the_body() {
    let service = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let head = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n";
        connection.send(head).await.expect("the bytes are sent");
        assert_eq!(connection.head().await.expect("a response head arrives").status, 100);
        connection.send(b"hello").await.expect("the bytes are sent");
        assert_eq!(connection.answer().await.expect("the server answers").text(), "hello");
    });
}

// ---- sockets ----

#[test]
fn ipv4_ipv6_and_unix_listeners_are_served_at_once() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("http.sock");
    let ports = [free_address().port(), free_address().port()];
    let listen = format!("127.0.0.1:{},[::1]:{},{}", ports[0], ports[1], path.display());
    let mut notifications = Notifications::new().expect("the socket is made");
    let mut command = command(app_binary(), &["--listen", &listen]);
    command.env("NOTIFY_SOCKET", notifications.path());
    let mut process = Process::spawn(&mut command).expect("the service starts");
    notifications.wait_for("READY=1").expect("READY=1 is sent");
    let targets = [
        Target::Tcp(([127, 0, 0, 1], ports[0]).into()),
        Target::Tcp((std::net::Ipv6Addr::LOCALHOST, ports[1]).into()),
        Target::Unix(path.clone()),
    ];
    block_on(async {
        for target in &targets {
            let mut connection = Connection::open(target).await.expect("the connection opens");
            assert_eq!(
                connection.ask(&get("/")).await.expect("the server answers").status,
                200,
                "{target:?}"
            );
        }
    });
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
    assert!(!path.exists(), "the service must remove the socket file that it made");
}

#[test]
fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("http.sock");
    drop(UnixListener::bind(&path).expect("the socket is made"));
    let listen = path.display().to_string();
    let (code, output, log) =
        run_to_end(&mut command(app_binary(), &["check", "--listen", &listen])).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(output.contains(&listen), "{output}");
    let _live = UnixListener::bind(&path).expect("the socket is made");
    assert_refused(&mut command(app_binary(), &["--listen", &listen]), 69, &[&listen, "in use"]);
}

#[test]
fn sockets_from_server_starter_are_served() {
    let listener = listener();
    let target = Target::Tcp(listener.local_addr().expect("the socket has an address"));
    let mut command = Command::new("sh");
    command.args(["-c", "exec 5<&0; exec \"$0\"", app_binary()]).stdin(fd(listener));
    command.env("SERVER_STARTER_PORT", "127.0.0.1:80=5").env("SERVER_STARTER_GENERATION", "41");
    let mut process = Process::spawn(&mut command).expect("the service starts");
    block_on(async {
        let mut connection = Connection::open(&target).await.expect("the connection opens");
        let answer = connection.ask(&get("/")).await.expect("the server answers");
        assert!(answer.text().contains("generation 41"), "{}", answer.text());
    });
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
}

// ---- bad input ----

#[test]
fn an_inherited_fd_that_does_not_listen_is_refused_by_its_number() {
    let words = ["LISTEN_FDS: fd 0", "not a listening stream socket"];
    let udp = UdpSocket::bind("127.0.0.1:0").expect("the socket is made");
    assert_refused(&mut inheriting(fd(udp), &[]), 78, &words);
    let (stream, _other) = UnixStream::pair().expect("the socket pair is made");
    assert_refused(&mut inheriting(fd(stream), &[]), 78, &words);
    let listener = listener();
    let connected = std::net::TcpStream::connect(listener.local_addr().expect("the socket has an address"))
        .expect("the connection opens");
    assert_refused(&mut inheriting(fd(connected), &[]), 78, &words);
    assert_refused(&mut inheriting(File::open("/dev/null").expect("the file opens"), &[]), 78, &words);
}

#[test]
fn a_closed_fd_is_refused_by_its_number() {
    let mut command = inheriting(fd(listener()), &[("LISTEN_FDS", "2"), ("LISTEN_FDS_FIRST_FD", "200")]);
    assert_refused(&mut command, 78, &["LISTEN_FDS: fd 200", "not open", "LISTEN_PID is not set"]);
}

#[test]
fn listen_beside_inherited_sockets_is_reported_as_ignored() {
    let service = start(&["--listen", "https=127.0.0.1:1", "--listen", "unix:@unused"]);
    let address = service.address();
    service.signal(Signal::TERM);
    let log = assert_success(service);
    let expected = format!(
        "WARN --listen https=127.0.0.1:1 unix:@unused is ignored, because this process inherited its sockets: \
         http({address})"
    );
    assert!(log.contains(&expected), "{log}");
}

#[test]
fn listen_with_the_address_of_an_inherited_socket_is_not_reported() {
    let listener = listener();
    let address = listener.local_addr().expect("the socket has an address").to_string();
    let mut command = inheriting(fd(listener), &[]);
    let mut notifications = Notifications::new().expect("the socket is made");
    command.args(["--listen", &address]).env("NOTIFY_SOCKET", notifications.path());
    let mut process = Process::spawn(&mut command).expect("the service starts");
    notifications.wait_for("READY=1").expect("READY=1 is sent");
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
    let mut log = String::new();
    let mut stderr = process.child().stderr.take().expect("the output is piped");
    std::io::Read::read_to_string(&mut stderr, &mut log).expect("the log is readable");
    assert!(log.contains("serving on") && !log.contains("WARN"), "{log}");
}

#[test]
fn invalid_value_is_reported_with_what_is_expected_and_no_text_of_a_library() {
    for (flag, value, expected) in [
        ("--drain-timeout", "soon", "expected a time such as 30s or 1m; see --help"),
        ("--body-limit", "xx", "expected a size such as 512KiB or 2MiB; see --help"),
        ("--listen", "127.0.0.1:99999", "expected a port from 0 to 65535; see --help"),
    ] {
        assert_refused(&mut command(app_binary(), &[flag, value]), 78, &[&format!("': {expected}\n")]);
    }
    let (_, _, log) =
        run_to_end(&mut command(app_binary(), &["--log", "foo=bar=baz"])).expect("the process ends");
    assert!(log.ends_with("with the levels off, error, warn, info, debug and trace\n"), "{log}");
    assert_eq!(log.matches("expected").count(), 1, "{log}");
}

#[test]
fn unreachable_service_manager_is_reported_once_with_its_path() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("nobody").display().to_string();
    let mut command = command(app_binary(), &["--listen", "127.0.0.1:0"]);
    let mut process = Process::spawn(command.env("NOTIFY_SOCKET", &path)).expect("the service starts");
    let mut stderr = std::io::BufReader::new(process.child().stderr.take().expect("the output is piped"));
    let mut log = String::new();
    while !log.contains("serving on") {
        assert!(
            std::io::BufRead::read_line(&mut stderr, &mut log).expect("the log is readable") > 0,
            "{log}"
        );
    }
    process.signal(Signal::TERM);
    std::io::Read::read_to_string(&mut stderr, &mut log).expect("the log is readable");
    assert!(process.wait().expect("the process ends").success(), "{log}");
    assert_eq!(log.matches("could not send a message to the service manager").count(), 1, "{log}");
    assert!(log.contains(&format!("NOTIFY_SOCKET={path}")), "{log}");
}

#[test]
fn variable_that_no_option_has_is_reported_at_start_and_by_check() {
    let misspelled = format!("{}_DRIAN_TIMEOUT", NAME.to_uppercase());
    let mut check = command(app_binary(), &["check", "--listen", "127.0.0.1:0"]);
    let (code, _, log) = run_to_end(check.env(&misspelled, "1s")).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("WARN ignored environment variables") && log.contains(&misspelled), "{log}");
    let mut start = command(app_binary(), &["--listen", "https=127.0.0.1:0"]);
    let (_, _, log) = run_to_end(start.env(&misspelled, "1s")).expect("the process ends");
    assert_eq!(log.matches(&misspelled).count(), 1, "{log}");
}

#[test]
fn invalid_variables_are_refused_by_their_names() {
    for (name, value) in [
        ("LISTEN_FDS", "two"),
        ("LISTEN_FDS", "-1"),
        ("LISTEN_FDS", "2000000000"),
        ("LISTEN_PID", "me"),
        ("LISTEN_FDS_FIRST_FD", "x"),
        ("LISTEN_FDS_FIRST_FD", "2147483647"),
        ("LISTEN_FDS_FIRST_FD", "-1"),
        ("LISTEN_FDNAMES", "http:admin"),
        ("SERVER_STARTER_GENERATION", "x"),
    ] {
        assert_refused(&mut inheriting(fd(listener()), &[(name, value)]), 78, &[name]);
    }
    for value in ["8080", "127.0.0.1:80=", "127.0.0.1:80=x", "80=1", "80=200", ";", "80=5;80=5"] {
        let mut command = command(app_binary(), &[]);
        command.env("SERVER_STARTER_PORT", value);
        assert_refused(&mut command, 78, &["SERVER_STARTER_PORT"]);
    }
    let mut not_text = command(app_binary(), &[]);
    let value = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff");
    not_text.env("SERVER_STARTER_PORT", value);
    assert_refused(&mut not_text, 78, &["SERVER_STARTER_PORT"]);
}

#[test]
fn an_invalid_number_of_worker_threads_is_refused() {
    for value in ["0", "x", ""] {
        let mut command = inheriting(fd(listener()), &[("TOKIO_WORKER_THREADS", value)]);
        let reason = format!("invalid TOKIO_WORKER_THREADS \"{value}\": expected a number from 1 to 1024");
        assert_refused(&mut command, 78, &[&reason]);
    }
}

#[test]
fn an_invalid_number_is_quoted_in_the_error() {
    let mut command = inheriting(fd(listener()), &[("LISTEN_FDS", "two")]);
    assert_refused(&mut command, 78, &["invalid LISTEN_FDS \"two\": expected a number"]);
}

#[test]
fn descriptors_outside_their_range_are_refused_with_both_numbers() {
    let first = i32::MAX.to_string();
    let mut command = inheriting(fd(listener()), &[("LISTEN_FDS", "2"), ("LISTEN_FDS_FIRST_FD", &first)]);
    let reason =
        format!("invalid LISTEN_FDS_FIRST_FD {first} with LISTEN_FDS 2: expected descriptors from 0 to");
    assert_refused(&mut command, 78, &[&reason]);
}

#[test]
fn sockets_of_another_process_are_refused_and_the_error_names_the_wrapper() {
    let mut command = inheriting(fd(listener()), &[("LISTEN_PID", "1")]);
    assert_refused(&mut command, 78, &["LISTEN_PID=1", "not the pid of this process", "`exec`", "--listen"]);
}

#[test]
fn a_start_by_systemd_without_sockets_is_refused_and_names_the_socket_unit() {
    let notifications = Notifications::new().expect("the socket is made");
    let path = notifications.path().to_str().expect("the path is valid UTF-8").to_owned();
    let remedy = format!("systemctl restart {NAME}.socket");
    for (name, value) in
        [("NOTIFY_SOCKET", path.as_str()), ("INVOCATION_ID", "0123456789abcdef0123456789abcdef")]
    {
        for count in [None, Some("0")] {
            let mut command = command(app_binary(), &[]);
            command.env(name, value);
            command.envs(count.map(|count| ("LISTEN_FDS", count)));
            assert_refused(&mut command, 78, &["no listening socket", "LISTEN_FDS", &remedy]);
        }
    }
}

/// After a change of `ListenStream=` in the socket unit of the service, systemd passes only the socket of the admin unit.
#[test]
fn a_start_by_systemd_with_only_an_admin_socket_is_refused_and_names_the_socket_unit() {
    let variables = [("LISTEN_FDNAMES", "admin"), ("INVOCATION_ID", "0123456789abcdef0123456789abcdef")];
    let remedy = format!("systemctl restart {NAME}.socket");
    // --listen would be ignored.
    for options in [&[][..], &["--listen", "127.0.0.1:0"]] {
        let mut command = inheriting(fd(listener()), &variables);
        command.args(options);
        assert_refused(&mut command, 78, &["no listening socket besides admin", "LISTEN_FDS", &remedy]);
    }
}

#[test]
fn check_with_listen_ignores_sockets_of_another_process() {
    let port = free_address().port();
    let mut command = inheriting(fd(listener()), &[("LISTEN_PID", "1")]);
    command.args(["check", "--listen", &format!("127.0.0.1:{port}")]);
    let (code, output, log) = run_to_end(&mut command).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(output.ends_with(&format!("\nready to serve on http(127.0.0.1:{port})\n")), "{output}");
}

#[test]
fn invalid_options_and_their_variables_are_refused_by_their_names() {
    for (flag, value) in [
        ("--listen", "localhost"),
        ("--drain-timeout", "soon"),
        ("--idle-timeout", "0s"),
        ("--body-limit", "much"),
        ("--max-connections", "0"),
        ("--max-requests", "0"),
        ("--max-requests-per-client", "many"),
        ("--log", "x=loud"),
    ] {
        assert_refused(&mut command(app_binary(), &[flag, value]), 78, &[flag, value]);
        let variable = format!("{NAME}{flag}").replace("--", "_").replace('-', "_").to_uppercase();
        let mut by_variable = command(app_binary(), &[]);
        by_variable.env(&variable, value);
        assert_refused(&mut by_variable, 78, &[flag, value]);
    }
    assert_refused(&mut command(app_binary(), &["--bogus"]), 78, &["--bogus", "--help"]);
}

#[test]
fn a_value_that_is_not_utf8_is_refused_by_its_option_and_variable() {
    let value = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff");
    let reason = "invalid value for '--drain-timeout <TIME>': expected UTF-8";
    assert_refused(command(app_binary(), &["--drain-timeout"]).arg(value), 78, &[reason]);
    let variable = format!("{}_DRAIN_TIMEOUT", NAME.to_uppercase());
    let mut by_variable = command(app_binary(), &["check"]);
    assert_refused(by_variable.env(&variable, value), 78, &[&format!("{variable}: {reason}")]);
}

#[test]
fn more_listeners_than_a_reload_can_pass_are_refused() {
    let mut command = command(app_binary(), &["--listen", "127.0.0.1:0"].repeat(252));
    assert_refused(&mut command, 78, &["too many sockets", "252", "ListenStream="]);
}

#[test]
fn an_address_in_use_is_refused_with_exit_code_69() {
    let listener = listener();
    let address = listener.local_addr().expect("the socket has an address").to_string();
    assert_refused(&mut command(app_binary(), &["--listen", &address]), 69, &[&address, "in use"]);
    assert_refused(&mut command(app_binary(), &["check", "--listen", &address]), 69, &[&address, "in use"]);
}

/// Standard output is a full device, or a closed pipe as in `app check | true`.
#[test]
fn check_that_cannot_write_its_result_exits_with_69() {
    let full = File::options().write(true).open("/dev/full").expect("the device exists");
    let (reader, closed) = std::io::pipe().expect("the pipe is made");
    drop(reader);
    for (output, reason) in [(Stdio::from(full), "No space left on device"), (closed.into(), "Broken pipe")] {
        let mut command = inheriting(fd(listener()), &[]);
        let child = command.arg("check").stdout(output).stderr(Stdio::piped()).spawn().expect("it starts");
        let result = child.wait_with_output().expect("it ends");
        let log = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(69), "{log}");
        assert!(log.contains("could not write to standard output") && log.contains(reason), "{log}");
    }
}

#[test]
fn empty_variable_for_the_credentials_counts_as_not_set() {
    let mut command = inheriting(fd(listener()), &[("CREDENTIALS_DIRECTORY", "")]);
    let (code, _, log) = run_to_end(command.arg("check")).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn check_prints_the_listeners_and_exits_with_0() {
    let (code, output, log) =
        run_to_end(inheriting(fd(listener()), &[]).arg("check")).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(output.contains("\nready to serve on http("), "{output}");
}
