//! An HTTP/2 connection that cannot be handed over ends with two GOAWAY frames and a round trip between them (RFC 9113
//! section 6.8), so that a request that crosses the first one is not lost.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use testkit::block_on;
use testkit::client::{Connection, Http2, Target};
use testkit::http2_frames::{
    ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PREFACE, SETTINGS, frame, next, next_that,
};
use testkit::process::terminate;
use testkit::service::Service;
use testkit::tls_service::TlsService;

use crate::app_binary;
use crate::idle_connections::wait_until_parked;

/// The last stream of the first GOAWAY, which admits all streams.
const EVERY_STREAM: u32 = (1 << 31) - 1;
/// The header blocks of requests, without entries for the header table: `:method`, `:scheme`, `:path`, `:authority`.
const GET: &[u8] = b"\x82\x86\x84\x01\x01x";
const POST_ECHO: &[u8] = b"\x83\x86\x04\x05/echo\x01\x01x";

/// Opens an HTTP/2 connection, and acknowledges the SETTINGS of the server.
async fn open(service: &Service) -> Connection {
    begin(service.connect().await).await
}

pub async fn begin(mut connection: Connection) -> Connection {
    let hello = [PREFACE, &frame(SETTINGS, 0, 0, b"")].concat();
    connection.send(&hello).await.expect("the bytes are sent");
    loop {
        let frame_read = next(&mut connection).await.expect("the server sends SETTINGS");
        if (frame_read.kind, frame_read.flags) == (SETTINGS, 0) {
            connection.send(&frame(SETTINGS, ACK, 0, b"")).await.expect("the acknowledgement is sent");
            return connection;
        }
    }
}

/// The client sends a request between the two GOAWAY frames, while another one is still open. Both are answered, and the
/// second GOAWAY, which names the last stream, follows only when the client has answered the PING after the first one.
#[test]
fn busy_http2_connection_answers_a_request_that_crosses_the_first_goaway() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let flags = ["--drain-timeout", "10s"];
    let mut service = Service::start_in(app_binary(), &flags, folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = open(&service).await;
        let open_request = [frame(HEADERS, END_HEADERS, 1, POST_ECHO), frame(DATA, 0, 1, b"01234")].concat();
        connection.send(&open_request).await.expect("the request is sent");
        next_that(&mut connection, |frame| (frame.kind, frame.stream) == (DATA, 1)).await;
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");

        let first = next_that(&mut connection, |frame| frame.kind == GOAWAY).await;
        assert_eq!(first.last_stream(), EVERY_STREAM);
        let ping = next_that(&mut connection, |frame| (frame.kind, frame.flags) == (PING, 0)).await;
        let crossing = frame(HEADERS, END_STREAM | END_HEADERS, 3, GET);
        connection.send(&crossing).await.expect("the request is sent");
        let mut is_answered = false;
        while !is_answered {
            let frame = next(&mut connection).await.expect("the connection stays open");
            assert_ne!(frame.kind, GOAWAY, "the second GOAWAY came before the client's answer to the PING");
            is_answered = frame.stream == 3 && frame.flags & END_STREAM != 0;
        }
        connection.send(&frame(PING, ACK, 0, &ping.payload)).await.expect("the answer is sent");
        let second = next_that(&mut connection, |frame| frame.kind == GOAWAY).await;
        assert_eq!(second.last_stream(), 3);

        connection.send(&frame(DATA, END_STREAM, 1, b"56789")).await.expect("the rest is sent");
        let rest = next_that(&mut connection, |frame| (frame.kind, frame.stream) == (DATA, 1)).await;
        assert_eq!(rest.payload, b"56789");
        while next(&mut connection).await.is_some() {}
        service.process().wait().expect("the old process exits");
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}

/// Memory is short, so the service closes the connections that have been idle longest.
#[test]
fn idle_http2_connection_that_has_to_close_answers_a_request_that_crosses_the_first_goaway() {
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let target = Target::Tcp(service.http);
        for reacts in [true, false] {
            let connection = Connection::open(&target).await.expect("the service listens");
            let mut connection = begin(connection).await;
            // Longer than the shortest time after which a connection is closed for lack of memory.
            tokio::time::sleep(Duration::from_secs(6)).await;
            wait_until_parked(&service, 1).await;
            service.report_memory_pressure().expect("the service reads the FIFO");
            let first = next_that(&mut connection, |frame| frame.kind == GOAWAY).await;
            assert_eq!(first.last_stream(), EVERY_STREAM);
            let ping = next_that(&mut connection, |frame| (frame.kind, frame.flags) == (PING, 0)).await;
            if reacts {
                let crossing = frame(HEADERS, END_STREAM | END_HEADERS, 1, GET);
                connection.send(&crossing).await.expect("the request is sent");
                next_that(&mut connection, |frame| frame.stream == 1 && frame.flags & END_STREAM != 0).await;
                connection.send(&frame(PING, ACK, 0, &ping.payload)).await.expect("the answer is sent");
            }
            let second = next_that(&mut connection, |frame| frame.kind == GOAWAY).await;
            assert_eq!(second.last_stream(), u32::from(reacts));
            while next(&mut connection).await.is_some() {}
        }
    });
}

/// New streams are served while an older one is open. GOAWAY is sent at half of the timeout, so that the client still
/// has time to finish its streams.
#[test]
fn an_http2_connection_that_is_never_quiescent_gets_goaway_at_half_of_the_drain_timeout() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    // Half of it must be enough for the slow stream to finish, on a slow machine too.
    let limit = Duration::from_secs(10);
    let flags = ["--drain-timeout", &humantime::format_duration(limit).to_string()];
    let mut service = Service::start_in(app_binary(), &flags, folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = Http2::open(&service.target).await.expect("the connection opens");
        let slow = connection.hold().await.expect("the response begins");
        let begun = Instant::now();
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        let mut answered = 0;
        loop {
            match connection.get("/").await {
                Ok(Some((status, _))) => assert_eq!(status, 200),
                Ok(None) => break,
                // GOAWAY arrived while the client was about to send the request.
                Err(error) if error.to_string().contains("not a result of an error") => break,
                Err(error) => panic!("{error:#}"),
            }
            answered += 1;
        }
        let took = begun.elapsed();
        assert!(answered > 0 && took >= limit / 2, "{answered} in {took:?}");
        assert_eq!(slow.release().await.expect("the stream finishes"), b"0123456789");
        service.process().wait().expect("the old process exits");
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}

/// Without a store there is no next process, so the connection cannot be handed over.
#[test]
fn an_idle_http2_connection_without_a_store_gets_goaway_at_once() {
    let service = Service::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let mut connection = open(&service).await;
        service.signal(Signal::TERM);
        let first = next_that(&mut connection, |frame| frame.kind == GOAWAY).await;
        assert_eq!(first.last_stream(), EVERY_STREAM);
        let ping = next_that(&mut connection, |frame| (frame.kind, frame.flags) == (PING, 0)).await;
        connection.send(&frame(PING, ACK, 0, &ping.payload)).await.expect("the answer is sent");
        let second = next_that(&mut connection, |frame| frame.kind == GOAWAY).await;
        assert_eq!(second.last_stream(), 0);
        let (status, log) = service.end().expect("the process ends");
        assert!(status.success() && log.contains("0 cut off"), "{log}");
    });
}
