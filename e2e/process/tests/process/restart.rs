//! Restarts without systemd: how connections become quiescent, are handed over, and continue in the next process. The
//! tests play systemd's file descriptor store: `Service::restart` passes the stored handover channel to the next
//! process.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Rlimit, Signal};
use testkit::client::{Connection, Http2, Target, WEBSOCKET, get};
use testkit::frames::{self, CONNECTIONS, frame, frame_of};
use testkit::process::{Process, terminate};
use testkit::service::{Service, command};
use testkit::tls_service::TlsService;
use testkit::{TEST_TIMEOUT, block_on};

use crate::app_binary;
use crate::reload::{forbid_threads, limit_files};

fn start() -> Service {
    Service::start_with_store(app_binary(), &[]).expect("the service starts")
}

/// Sends SIGTERM, waits until the process exits, and starts the next one.
fn restart(service: Service) -> Service {
    service.signal(Signal::TERM);
    service.restart(app_binary()).expect("the next process starts")
}

/// Sends a request, checks that the connection stays open, and returns "generation N" of the process that answers.
async fn generation(connection: &mut Connection) -> String {
    let answer = connection.ask(&get("/")).await.expect("the server answers");
    assert!(!answer.closes(), "the response has Connection: close");
    let text = answer.text();
    text.split(", ").nth(1).expect("the response names a generation").to_owned()
}

#[test]
fn an_idle_connection_survives_restarts() {
    let mut service = start();
    block_on(async {
        let mut connection = service.connect().await;
        for number in 1..=3 {
            assert_eq!(generation(&mut connection).await, format!("generation {number}"));
            service = restart(service);
        }
    });
}

#[test]
fn a_connection_survives_a_restart_of_a_process_that_may_start_no_thread() {
    let mut service = start();
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(generation(&mut connection).await, "generation 1");
        forbid_threads(service.process());
        let _next = restart(service);
        assert_eq!(generation(&mut connection).await, "generation 2");
    });
}

#[test]
fn an_idle_connection_survives_a_restart_during_which_the_service_manager_is_busy() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("the socket is made");
    manager.set_read_timeout(Some(TEST_TIMEOUT)).expect("the limit is set");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port is bound");
    let target = Target::Tcp(listener.local_addr().expect("the socket has an address"));
    let mut command = command(app_binary(), &[]);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0").stdin(OwnedFd::from(listener));
    command.env("NOTIFY_SOCKET", &path).env("FDSTORE", "8");
    let mut process = Process::spawn(&mut command).expect("the service starts");
    let next =
        || frames::receive(&manager).map(|(text, fds)| (String::from_utf8_lossy(&text).into_owned(), fds));
    while !next().expect("the service sends READY=1").0.contains("READY=1") {}
    block_on(async {
        let mut connection = Connection::open(&target).await.expect("the service listens");
        assert_eq!(generation(&mut connection).await, "generation 1");
        // The service manager keeps the descriptors of BARRIER=1 open until the process has exited, as if it had not read
        // them. It reads the messages, because the queue of the socket holds only ten.
        let messages = std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let messages = std::iter::from_fn(|| next().ok());
                messages.take_while(|(text, _)| text != "END").collect::<Vec<_>>()
            });
            process.signal(Signal::TERM);
            assert!(process.wait().expect("the process ends").success());
            let end = UnixDatagram::unbound().expect("the socket is made");
            end.send_to(b"END", &path).expect("the message is sent");
            reading.join().expect("no panic")
        });
        // The channel of the drain follows that of the backup.
        let stored = messages.into_iter().rfind(|(text, _)| text.contains("FDSTORE=1"));
        let (_, stored) = stored.expect("the channel is stored");
        let channel = stored.into_iter().next().expect("a descriptor is stored");
        let service = Service::start_with_channel(app_binary(), channel).expect("the next process starts");
        assert_eq!(generation(&mut connection).await, "generation 2");
        drop(service);
    });
}

#[test]
fn connections_survive_a_restart_of_a_process_at_its_limit_of_open_files() {
    const LIMIT: u64 = 100;
    let mut service = start();
    limit_files(service.process(), Rlimit { current: Some(LIMIT), maximum: Some(LIMIT) });
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(generation(&mut connection).await, "generation 1");
        let mut waiting = Vec::new();
        for _ in 0..LIMIT {
            waiting.push(service.connect().await);
        }
        let log = BufReader::new(service.process().child().stderr.take().expect("the log is a pipe"));
        let mut lines = log.lines().map(|line| line.expect("the log is readable"));
        assert!(lines.any(|line| line.contains("could not accept connections")), "the process has exited");
        let service = restart(service);
        assert_eq!(generation(&mut connection).await, "generation 2");
        for connection in &mut waiting {
            assert_eq!(generation(connection).await, "generation 2");
        }
        drop(service);
    });
}

#[test]
fn a_fresh_connection_is_answered_by_the_next_process() {
    let service = start();
    block_on(async {
        let mut fresh = service.connect().await;
        // A response on a later connection shows that the service has accepted the first one.
        generation(&mut service.connect().await).await;
        let service = restart(service);
        assert_eq!(generation(&mut fresh).await, "generation 2");
        drop(service);
    });
}

#[test]
fn a_half_read_request_is_answered_by_the_next_process() {
    for first_request in [true, false] {
        let service = start();
        block_on(async {
            let mut connection = service.connect().await;
            if !first_request {
                generation(&mut connection).await;
            }
            for part in ["GE", "T / HTTP/1.1\r\nho", "st: x\r"] {
                connection.send(part.as_bytes()).await.expect("the bytes are sent");
                generation(&mut service.connect().await).await;
            }
            let _service = restart(service);
            connection.send(b"\n\r\n").await.expect("the bytes are sent");
            let answer = connection.answer().await.expect("the server answers");
            assert!(answer.text().contains("generation 2"), "{}", answer.text());
            assert_eq!(generation(&mut connection).await, "generation 2");
        });
    }
}

#[test]
fn a_half_sent_http2_preface_is_completed_in_the_next_process() {
    let service = start();
    block_on(async {
        let mut connection = service.connect().await;
        connection.send(b"PRI * HTTP/2.0\r\n").await.expect("the bytes are sent");
        generation(&mut service.connect().await).await;
        let _service = restart(service);
        connection.send(b"\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("the bytes are sent");
        assert_eq!(connection.take(9).await.expect("a frame arrives")[3], 4, "expected SETTINGS");
    });
}

#[test]
fn a_request_in_flight_is_answered_by_the_old_process_and_its_connection_is_handed_over() {
    let mut service = start();
    block_on(async {
        let mut connection = service.connect().await;
        connection.send(&get("/sleep?duration=5s")).await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        let _service = restart(service);
        let answer = connection.answer().await.expect("the server answers");
        assert_eq!((answer.status, answer.closes()), (200, false));
        assert_eq!(generation(&mut connection).await, "generation 2");
    });
}

#[test]
fn bodies_in_flight_finish_in_the_old_process_and_their_connection_is_handed_over() {
    for head in [
        "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n01234",
        "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n01234\r\n",
    ] {
        let mut service = start();
        block_on(async {
            let mut connection = service.connect().await;
            connection.send(head.as_bytes()).await.expect("the bytes are sent");
            service.wait_for_in_flight(1).expect("the request is in flight");
            service.signal(Signal::TERM);
            service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
            let chunked = head.contains("chunked");
            let remaining = if chunked { "5\r\n56789\r\n0\r\n\r\n" } else { "56789" };
            connection.send(remaining.as_bytes()).await.expect("the bytes are sent");
            let answer = connection.answer().await.expect("the server answers");
            assert_eq!((answer.text().as_str(), answer.closes()), ("0123456789", false));
            let _service = service.restart(app_binary()).expect("the next process starts");
            assert_eq!(generation(&mut connection).await, "generation 2");
        });
    }
}

#[test]
fn a_request_with_100_continue_finishes_in_the_old_process() {
    let mut service = start();
    block_on(async {
        let mut connection = service.connect().await;
        let head = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n";
        connection.send(head).await.expect("the bytes are sent");
        assert_eq!(connection.head().await.expect("a response head arrives").status, 100);
        service.signal(Signal::TERM);
        service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
        connection.send(b"hello").await.expect("the bytes are sent");
        assert_eq!(connection.answer().await.expect("the server answers").text(), "hello");
        let _service = service.restart(app_binary()).expect("the next process starts");
        assert_eq!(generation(&mut connection).await, "generation 2");
    });
}

#[test]
fn pipelined_requests_are_answered_in_order_across_a_restart() {
    let mut service = start();
    block_on(async {
        let mut connection = service.connect().await;
        let first: Vec<u8> = [get("/sleep?duration=5s"), get("/sleep?duration=1ms")].concat();
        connection.send(&first).await.expect("the bytes are sent");
        // The third request is incomplete: its head ends after the restart.
        connection.send(b"GET /sleep?duration=2ms HTTP/1.1\r\nho").await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        let _service = restart(service);
        connection
            .send(&[b"st: x\r\n\r\n".to_vec(), get("/sleep?duration=3ms")].concat())
            .await
            .expect("the bytes are sent");
        for duration in ["5s", "1ms", "2ms", "3ms"] {
            let answer = connection.answer().await.expect("the server answers");
            assert_eq!(answer.text(), format!("slept {duration}\n"));
        }
        assert_eq!(generation(&mut connection).await, "generation 2");
    });
}

#[test]
fn a_unix_socket_connection_survives_a_restart() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let service =
        Service::start_on_path(app_binary(), &folder.path().join("http.sock")).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        generation(&mut connection).await;
        let _service = restart(service);
        assert_eq!(generation(&mut connection).await, "generation 2");
    });
}

#[test]
fn connections_without_keep_alive_are_not_handed_over() {
    let mut service = start();
    block_on(async {
        let mut last = service.connect().await;
        last.send(b"GET /sleep?duration=5s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await
            .expect("the bytes are sent");
        let mut old = service.connect().await;
        old.send(b"GET /sleep?duration=5s HTTP/1.0\r\n\r\n").await.expect("the bytes are sent");
        service.wait_for_in_flight(2).expect("the request is in flight");
        service.signal(Signal::TERM);
        for connection in [&mut last, &mut old] {
            assert_eq!(connection.answer().await.expect("the server answers").text(), "slept 5s\n");
            assert_eq!(connection.read_more().await.expect("the connection ends"), 0);
        }
        let (status, log) = service.end().expect("the process ends");
        assert!(
            status.success()
                && log.contains("handed over 0 connections; 2 requests in flight finished, 0 cut off"),
            "{log}"
        );
    });
}

/// Closing a socket with unread bytes sends a reset, so the client could lose the response (RFC 9112 section 9.6).
#[test]
fn a_client_that_still_sends_gets_its_last_response_without_a_reset() {
    for start in [Service::start, Service::start_with_store] {
        let mut service = start(app_binary(), &["--body-limit", "1KiB"]).expect("the service starts");
        block_on(async {
            let mut connection = service.connect().await;
            connection
                .send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
                .await
                .expect("the bytes are sent");
            assert_eq!(connection.answer().await.expect("the server answers").status, 413);
            service.signal(Signal::TERM);
            service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
            for _ in 0..10 {
                connection
                    .send(&[b'x'; 10_000])
                    .await
                    .expect("the bytes are read and the connection is not reset");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(connection.read_more().await.expect("the connection ends without a reset"), 0);
        });
        let (status, log) = service.end().expect("the process ends");
        assert!(status.success() && log.contains(" 0 cut off"), "{log}");
    }
}

#[test]
fn an_http2_connection_survives_restarts() {
    let mut service = start();
    block_on(async {
        let mut connection = Http2::open(&service.target).await.expect("the connection opens");
        for generation in 1..10 {
            let (status, text) =
                connection.get("/").await.expect("the server answers").expect("no GOAWAY arrives");
            assert!(status == 200 && text.contains(&format!("generation {generation},")), "{text}");
            service.signal(Signal::TERM);
            service = service.restart(app_binary()).expect("the next process starts");
        }
        assert!(!connection.is_over().await);
    });
}

#[test]
fn a_partial_http2_frame_is_completed_in_the_next_process() {
    // HEADERS for GET /. The block begins with a table size update to 0 (RFC 7541 section 6.3), as the server's
    // SETTINGS ask.
    let request = [&[0, 0, 7, 1, 5, 0, 0, 0, 1], &[0x20, 0x82, 0x86, 0x84, 0x41, 1, b'x'][..]].concat();
    for cut in [1, 8, 9, 12, request.len() - 1] {
        let service = start();
        block_on(async {
            let mut connection = service.connect().await;
            connection
                .send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                .await
                .expect("the bytes are sent");
            // The server sends SETTINGS, the acknowledgement of the client's SETTINGS, and a WINDOW_UPDATE.
            for _ in 0..3 {
                http2_frame(&mut connection).await;
            }
            connection.send(b"\0\0\0\x04\x01\0\0\0\0").await.expect("the acknowledgement is sent");
            connection.send(&request[..cut]).await.expect("the bytes are sent");
            service.signal(Signal::TERM);
            let _next = service.restart(app_binary()).expect("the next process starts");
            connection.send(&request[cut..]).await.expect("the bytes are sent");
            let (frame_type, payload) = http2_frame(&mut connection).await;
            // HEADERS, whose first field is `:status 200`.
            assert_eq!((frame_type, payload[0]), (1, 0x88), "cut at {cut}");
        });
    }
}

/// Reads the next frame, and returns its type and payload.
async fn http2_frame(connection: &mut Connection) -> (u8, Vec<u8>) {
    let head = connection.take(9).await.expect("a frame arrives");
    let length = usize::from(head[1]) << 8 | usize::from(head[2]);
    (head[3], connection.take(length).await.expect("the payload arrives"))
}

async fn websocket(service: &Service) -> Connection {
    let mut connection = service.connect().await;
    assert_eq!(connection.ask(WEBSOCKET).await.expect("the server answers").status, 101);
    connection
}

/// A text frame of a client with "hi", masked with zeros, and the frame that the service sends back.
const HI: (&[u8], &[u8]) = (b"\x81\x82\0\0\0\0hi", b"\x81\x02hi");

#[test]
fn a_websocket_survives_restarts_and_its_messages_are_answered_by_the_next_process() {
    let mut service = start();
    block_on(async {
        let mut idle = service.connect().await;
        let mut connection = websocket(&service).await;
        for number in 2..6 {
            // The first half of the message is read by one process, and the second half by the next.
            let (first, second) = HI.0.split_at(number);
            connection.send(first).await.expect("the bytes are sent");
            service.signal(Signal::TERM);
            service = service.restart(app_binary()).expect("the next process starts");
            connection.send(second).await.expect("the bytes are sent");
            assert_eq!(connection.take(4).await.expect("the echo arrives"), HI.1);
            assert_eq!(generation(&mut idle).await, format!("generation {number}"));
        }
        drop(service);
    });
}

/// Opens a WebSocket of a service without a store, which closes it with 1012 at the stop signal.
async fn closed_with_1012() -> (Service, Connection) {
    // If the drain waited for the WebSocket until its limit, the process would exit after an hour.
    let service = Service::start(app_binary(), &["--drain-timeout", "1h"]).expect("the service starts");
    let mut connection = websocket(&service).await;
    connection.send(HI.0).await.expect("the bytes are sent");
    assert_eq!(connection.take(4).await.expect("the echo arrives"), HI.1);
    service.signal(Signal::TERM);
    let close = connection.take(4).await.expect("a close frame arrives");
    assert_eq!((close[0], u16::from_be_bytes([close[2], close[3]])), (0x88, 1012));
    (service, connection)
}

/// Otherwise browsers report that the WebSocket was not closed cleanly.
#[test]
fn a_websocket_is_closed_with_1012_and_ends_after_the_answer_if_there_is_no_store() {
    block_on(async {
        let (mut service, mut connection) = closed_with_1012().await;
        connection.send(HI.0).await.expect("the bytes are sent");
        let ended = tokio::time::timeout(Duration::from_millis(300), connection.read_more()).await;
        assert!(ended.is_err(), "the connection does not wait for the answer: {ended:?}");
        let has_ended = service.process().ends_within(Duration::ZERO).expect("the wait succeeds");
        assert!(!has_ended, "the process does not wait for the answer");
        connection.send(b"\x88\x82\0\0\0\0\x03\xf4").await.expect("the bytes are sent");
        assert_eq!(connection.read_more().await.expect("the connection ends cleanly"), 0);
        let (status, log) = service.end().expect("the process ends");
        assert!(status.success() && log.contains("0 cut off"), "{log}");
    });
}

#[test]
fn exit_does_not_wait_without_limit_for_the_answer_to_a_close() {
    block_on(async {
        let (mut service, connection) = closed_with_1012().await;
        let has_ended = service.process().ends_within(TEST_TIMEOUT).expect("the wait succeeds");
        assert!(has_ended, "the process waits for a client");
        drop(connection);
    });
}

#[test]
fn second_signal_ends_the_wait_for_the_answer_to_a_close() {
    block_on(async {
        let (mut service, connection) = closed_with_1012().await;
        service.signal(Signal::TERM);
        // Less than the process would wait otherwise.
        let has_ended = service.process().ends_within(Duration::from_secs(2)).expect("the wait succeeds");
        assert!(has_ended, "the process waits for a client");
        drop(connection);
    });
}

#[test]
fn a_websocket_whose_client_does_not_read_does_not_delay_the_exit() {
    // With these limits a WebSocket that delayed the exit would delay it for an hour.
    let mut service =
        Service::start_with_store(app_binary(), &["--drain-timeout", "1h", "--request-timeout", "1h"])
            .expect("the service starts");
    block_on(async {
        let mut full = websocket(&service).await;
        // The client reads no echo, so the buffers fill until the service can neither send nor read.
        let message = [&b"\x82\xfe\x10\0\0\0\0\0"[..], &[0; 4096]].concat();
        while tokio::time::timeout(Duration::from_secs(1), full.send(&message)).await.is_ok() {}
        service.signal(Signal::TERM);
        assert!(
            service.process().ends_within(TEST_TIMEOUT).expect("the wait succeeds"),
            "the process waits for a client"
        );
    });
}

#[test]
fn an_event_stream_continues_over_restarts_in_the_same_response() {
    let mut service = start();
    block_on(async {
        let mut connection = service.connect().await;
        let request = b"GET /events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n";
        connection.send(request).await.expect("the bytes are sent");
        assert_eq!(connection.head().await.expect("a response head arrives").status, 200);
        for number in 0..4 {
            let event = format!("retry: 100\nid: {number}\ndata: tick\n\n");
            let chunk = format!("{:X}\r\n{event}\r\n", event.len());
            let bytes = connection.take(chunk.len()).await.expect("an event arrives");
            assert_eq!(String::from_utf8_lossy(&bytes), chunk);
            service.signal(Signal::TERM);
            service = service.restart(app_binary()).expect("the next process starts");
        }
        drop(service);
    });
}

#[test]
fn an_event_stream_of_a_client_that_does_not_accept_one_ends_and_its_connection_is_handed_over() {
    let service = start();
    block_on(async {
        let mut connection = service.connect().await;
        connection.send(&get("/events")).await.expect("the bytes are sent");
        assert_eq!(connection.head().await.expect("a response head arrives").status, 200);
        connection.read_more().await.expect("an event arrives");
        service.signal(Signal::TERM);
        while !connection.unread().ends_with(b"0\r\n\r\n") {
            assert!(
                connection.read_more().await.expect("the end of the stream arrives") > 0,
                "the connection was closed"
            );
        }
        let length = connection.unread().len();
        connection.take(length).await.expect("the bytes are read");
        let _service = service.restart(app_binary()).expect("the next process starts");
        assert_eq!(generation(&mut connection).await, "generation 2");
    });
}

#[test]
fn new_requests_are_served_while_a_slow_request_finishes() {
    let mut service = start();
    block_on(async {
        let mut slow = service.connect().await;
        slow.hold().await.expect("the request is in flight");
        let mut kept = service.connect().await;
        service.signal(Signal::TERM);
        service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
        // The slow request cannot end before `release` below.
        for _ in 0..20 {
            assert_eq!(generation(&mut kept).await, "generation 1");
            assert_eq!(generation(&mut service.connect().await).await, "generation 1");
        }
        slow.release().await.expect("the request finishes");
        let _service = service.restart(app_binary()).expect("the next process starts");
        assert_eq!(generation(&mut slow).await, "generation 2");
        assert_eq!(generation(&mut kept).await, "generation 2");
    });
}

/// When the first slow request has ended, the drain tries to hold new requests, finds the second slow request in
/// flight, and serves new requests again.
#[test]
fn a_slow_request_that_arrives_during_the_drain_delays_no_other_request() {
    let mut service = start();
    block_on(async {
        let mut first = service.connect().await;
        first.hold().await.expect("the request is in flight");
        service.signal(Signal::TERM);
        service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
        let mut second = service.connect().await;
        second.hold().await.expect("the request is in flight");
        first.release().await.expect("the request finishes");
        // The second request cannot end before `release` below, and the drain timeout is 30 s.
        for _ in 0..30 {
            assert_eq!(generation(&mut first).await, "generation 1");
        }
        second.release().await.expect("the request finishes");
        let _service = service.restart(app_binary()).expect("the next process starts");
        assert_eq!(generation(&mut first).await, "generation 2");
        assert_eq!(generation(&mut second).await, "generation 2");
    });
}

#[test]
fn at_the_drain_timeout_quiescent_connections_are_handed_over_and_others_are_cut_off() {
    let mut service =
        Service::start_with_store(app_binary(), &["--drain-timeout", "1s"]).expect("the service starts");
    block_on(async {
        let mut slow = service.connect().await;
        let mut idle = service.connect().await;
        generation(&mut idle).await;
        slow.send(&get("/sleep?duration=20s")).await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        let _service = restart(service);
        assert!(slow.answer().await.is_err());
        assert_eq!(generation(&mut idle).await, "generation 2");
    });
}

#[test]
fn a_client_that_disconnects_between_two_processes_is_noticed() {
    let service = start();
    block_on(async {
        let mut stays = service.connect().await;
        let mut leaves = service.connect().await;
        generation(&mut leaves).await;
        generation(&mut stays).await;
        service.signal(Signal::TERM);
        // The connection is in the store, because the process has exited.
        let mut service = service;
        service.process().wait().expect("the process ends");
        drop(leaves);
        let mut service = service.restart(app_binary()).expect("the next process starts");
        assert_eq!(generation(&mut stays).await, "generation 2");
        let line = ": 1 connections, 0 in flight";
        service.notifications.wait_for_status(line).expect("the status counts one connection");
    });
}

#[test]
fn a_restart_logs_what_was_handed_over_and_taken_over() {
    let service = start();
    block_on(async {
        let mut connections = Vec::new();
        for _ in 0..300 {
            let mut connection = service.connect().await;
            generation(&mut connection).await;
            connections.push(connection);
        }
        service.signal(Signal::TERM);
        let mut service = service;
        service.process().wait().expect("the process ends");
        let log = service.process().child().stderr.take();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut log.expect("the output is piped"), &mut text)
            .expect("valid UTF-8");
        assert!(
            text.contains("handed over 300 connections; 0 requests in flight finished, 0 cut off, in "),
            "{text}"
        );
        let mut service = service.restart(app_binary()).expect("the next process starts");
        service.notifications.wait_for("FDSTOREREMOVE=1").expect("FDSTOREREMOVE=1 is sent");
        for connection in &mut connections {
            assert_eq!(generation(connection).await, "generation 2");
        }
        service.signal(Signal::TERM);
        service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
        let (_, text) = service.end().expect("the process ends");
        assert!(text.contains("took over 300 connections, "), "{text}");
        assert!(text.contains(" ms after the predecessor's last response"), "{text}");
    });
}

#[test]
fn a_handover_channel_that_the_store_lost_is_logged() {
    let mut service = start();
    block_on(async {
        let mut idle = service.connect().await;
        generation(&mut idle).await;
        let mut slow = service.connect().await;
        slow.send(&get("/sleep?duration=5s")).await.expect("the bytes are sent");
        service.wait_for_in_flight(1).expect("the request is in flight");
        service.signal(Signal::TERM);
        service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
        // The store closes the channel, so nothing that the service sends afterwards can arrive.
        drop(service.notifications.take_stored());
        assert!(!slow.answer().await.expect("the server answers").closes());
        let answer = idle.ask(&get("/")).await.expect("the server answers");
        assert!(answer.text().contains("generation 1"), "{}", answer.text());
        let (status, log) = service.end().expect("the process ends");
        assert!(status.success(), "{log}");
        assert!(
            log.contains("systemd closed the handover channel") && log.contains("handed over 0 connections"),
            "{log}"
        );
    });
}

// ---- invalid content of the store ----

/// The reading end of a handover channel that holds one message with `fds`.
fn channel_with(message: &[u8], fds: &[BorrowedFd<'_>]) -> OwnedFd {
    let (write, read) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("the socket pair is made");
    frames::send(&write, message, fds).expect("the bytes are sent");
    read
}

#[test]
fn an_invalid_handover_frame_closes_only_its_own_connections() {
    let null = std::fs::File::open("/dev/null").expect("the file opens");
    let good = frame(CONNECTIONS, 1, "");
    for (message, expected) in [
        (frame_of(3, CONNECTIONS, 1, ""), "unsupported frame version 3: this binary supports 1 to 2"),
        (good[..20].to_vec(), "invalid frame length"),
        ([good.clone(), vec![0; 513]].concat(), "invalid frame length"),
        ([good.clone(), vec![0xff]].concat(), "invalid utf-8"),
        (frame(99, 1, ""), "unknown message type 99"),
        (frame(CONNECTIONS, 253, ""), "invalid frame: 253 sockets"),
        (frame(CONNECTIONS, 2, ""), "could not read the records"),
        (frame(CONNECTIONS, 0, ""), "received 2 file descriptors in a message, expected 0"),
        (good, "could not read the records"),
        (b"x".to_vec(), "not a handover frame"),
        (vec![0xff; 60_000], "not a handover frame"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port is bound");
        let target = Target::Tcp(listener.local_addr().expect("the socket has an address"));
        block_on(async {
            let mut client = Connection::open(&target).await.expect("the connection opens");
            let (connection, _) = listener.accept().expect("the connection is accepted");
            let channel = channel_with(&message, &[null.as_fd(), connection.as_fd()]);
            drop(connection);
            let mut service = Service::start_with_channel(app_binary(), channel).expect("the service starts");
            assert_eq!(client.read_more().await.expect("the connection is closed, not reset"), 0);
            generation(&mut service.connect().await).await;
            service.signal(Signal::TERM);
            service.process().wait().expect("the process ends");
            let (_, log) = service.end().expect("the process ends");
            assert!(log.contains(expected), "{expected:?} is not in {log}");
            assert_eq!(log.matches("of an old process, and closed them").count(), 1, "{log}");
        });
    }
}

/// After a downgrade the store can hold frames and connection types of a later release.
#[test]
fn connections_stored_by_a_later_release_are_adopted_except_unknown_types() {
    let name_and_unread = |unread: &str| {
        let lengths =
            [&4_u16.to_le_bytes()[..], &u32::try_from(unread.len()).expect("a short length").to_le_bytes()];
        [&lengths.concat()[..], b"http", unread.as_bytes()].concat()
    };
    let record = |connection_type: u16, more: &[u8]| {
        let body = [&connection_type.to_le_bytes()[..], &name_and_unread("GET / HT"), more].concat();
        [&u32::try_from(body.len()).expect("a short length").to_le_bytes()[..], &body].concat()
    };
    // The number of the field, its length and its value.
    let later_field = [&900_u16.to_le_bytes()[..], &5_u32.to_le_bytes(), b"value"].concat();
    let records = [record(0, b""), record(99, b"unknown content"), record(0, &later_field)].concat();
    let mut file = tempfile::tempfile().expect("a temporary file is made");
    std::io::Write::write_all(&mut file, &records).expect("the file is written");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port is bound");
    let target = Target::Tcp(listener.local_addr().expect("the socket has an address"));
    block_on(async {
        let (mut clients, mut accepted) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            clients.push(Connection::open(&target).await.expect("the connection opens"));
            accepted.push(listener.accept().expect("the connection is accepted").0);
        }
        let fds: Vec<_> = std::iter::once(file.as_fd()).chain(accepted.iter().map(AsFd::as_fd)).collect();
        let channel = channel_with(&frame_of(2, CONNECTIONS, 3, ""), &fds);
        drop(accepted);
        let service = Service::start_with_channel(app_binary(), channel).expect("the service starts");
        let [first, unknown, last] = &mut clients[..] else { panic!("expected three clients") };
        for known in [first, last] {
            known.send(b"TP/1.1\r\nhost: x\r\n\r\n").await.expect("the bytes are sent");
            assert!(known.answer().await.expect("the server answers").text().contains("generation 8"));
        }
        assert_eq!(unknown.read_more().await.expect("the connection is closed, not reset"), 0);
        service.signal(Signal::TERM);
        let (_, log) = service.end().expect("the process ends");
        assert!(
            log.contains("could not adopt 1 connection of an old process, and closed them: unsupported connection type 99"),
            "{log}"
        );
    });
}

#[test]
fn a_stored_fd_that_is_not_a_channel_does_not_prevent_a_start() {
    let (read, _write) = std::os::unix::net::UnixStream::pair().expect("the socket pair is made");
    let service = Service::start_with_channel(app_binary(), read.into()).expect("the service starts");
    block_on(async { generation(&mut service.connect().await).await });
}

/// An HTTP/2 frame whose payload is at most 255 bytes.
fn http2(frame_type: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("the payload is short");
    [&[0, 0, length, frame_type, flags, 0, 0, 0, stream], payload].concat()
}

/// Reads frames up to the first one whose header is `wanted`.
async fn http2_until(connection: &mut Connection, wanted: impl Fn(&[u8]) -> bool) {
    loop {
        let head = connection.take(9).await.expect("the frame arrives");
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        connection.take(length).await.expect("the payload arrives");
        if wanted(&head) {
            return;
        }
    }
}

/// Opens an HTTP/2 connection and waits for the whole response on stream 1.
async fn answered_on_stream_1(target: &Target) -> Connection {
    let mut connection = Connection::open(target).await.expect("the server accepts");
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &http2(4, 0, 0, b"")].concat();
    connection.send(&preface).await.expect("the preface is sent");
    http2_until(&mut connection, |head| head[3..5] == [4, 0]).await;
    let request = http2(1, 5, 1, b"\x20\x82\x86\x84\x41\x01x");
    connection.send(&[http2(4, 1, 0, b""), request].concat()).await.expect("a request is sent");
    http2_until(&mut connection, |head| head[8] == 1 && head[4] & 1 == 1).await;
    connection
}

/// Sends `probe`, and returns GOAWAY and RST_STREAM with their payloads, and the streams that are answered, until the
/// server closes the connection.
async fn http2_reaction(mut connection: Connection, probe: &[u8]) -> Vec<(u8, u8, Vec<u8>)> {
    // After GOAWAY of the client the server closes the connection once all streams are answered.
    let goaway = http2(7, 0, 0, &[0; 8]);
    let _ = connection.send(&[probe, &goaway].concat()).await;
    let mut reaction = Vec::new();
    while let Ok(head) = connection.take(9).await {
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        let Ok(payload) = connection.take(length).await else { break };
        match head[3] {
            3 | 7 => reaction.push((head[3], head[8], payload)),
            // The payload of DATA is left out, because it names the process.
            0 | 1 if head[4] & 1 == 1 => reaction.push((0, head[8], Vec::new())),
            _ => {}
        }
    }
    reaction
}

#[test]
fn reload_leaves_http2_connections_as_strict_as_fresh_ones() {
    let get = b"\x82\x86\x84\x41\x01x";
    let inside_a_block =
        |frame: Vec<u8>| [http2(1, 1, 5, &get[..3]), frame, http2(9, 4, 5, &get[3..])].concat();
    let probes = [
        ("a request", http2(1, 5, 5, get)),
        ("PING on 1", http2(6, 0, 1, &[0; 8])),
        ("GOAWAY on 1", http2(7, 0, 1, &[0; 8])),
        ("HEADERS on 2", http2(1, 5, 2, get)),
        ("HEADERS again on 1", http2(1, 5, 1, get)),
        ("DATA on 1", http2(0, 0, 1, b"x")),
        ("RST_STREAM on 1", http2(3, 0, 1, &[0; 4])),
        ("WINDOW_UPDATE on 1", http2(8, 0, 1, &[0, 0, 0, 1])),
        ("DATA on 1 inside a header block", inside_a_block(http2(0, 0, 1, b"x"))),
        ("RST_STREAM on 1 inside a header block", inside_a_block(http2(3, 0, 1, &[0; 4]))),
        ("WINDOW_UPDATE on 1 inside a header block", inside_a_block(http2(8, 0, 1, &[0, 0, 0, 1]))),
        (
            "a content-length that is too large",
            [http2(1, 4, 5, b"\x83\x86\x84\x41\x01x\x0f\x0d\x015"), http2(0, 1, 5, b"body")].concat(),
        ),
    ];
    let mut service = TlsService::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let targets =
            [Target::Tcp(service.http), service.https(&["h2"]).expect("the TLS client is configured")];
        let mut handed_over = Vec::new();
        for target in &targets {
            for _ in &probes {
                handed_over.push(answered_on_stream_1(target).await);
            }
        }
        service.process.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        service.process.wait().expect("the old process exits");
        let mut handed_over = handed_over.into_iter();
        for target in &targets {
            for (name, probe) in &probes {
                let fresh = http2_reaction(answered_on_stream_1(target).await, probe).await;
                let reaction = http2_reaction(
                    handed_over.next().expect("there is one connection for each probe"),
                    probe,
                )
                .await;
                assert!(!fresh.is_empty(), "{name}");
                assert_eq!(reaction, fresh, "{name}");
            }
        }
        terminate(main.trim_start_matches("MAINPID=")).expect("the successor exits");
    });
}
