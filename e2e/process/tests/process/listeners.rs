//! Names of listeners, and what is specific to each: TLS, the admin routes, WebSockets and event streams.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2, Target, get};
use testkit::service::{command, run_to_end};
use testkit::tls_service::TlsService;
use testkit::{TEST_TIMEOUT, block_on, wait_until};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

use crate::app_binary;

fn start(flags: &[&str]) -> TlsService {
    TlsService::start(app_binary(), flags).expect("the service starts")
}

fn https(service: &TlsService, protocol: &str) -> Target {
    service.https(&[protocol]).expect("the TLS client is configured")
}

fn terminate(service: &mut TlsService) {
    service.terminate().expect("the service begins to stop");
}

/// Waits until the service exits, and expects exit code 0.
fn end(mut service: TlsService) {
    assert!(service.process.wait().expect("the process ends").success());
}

async fn metrics(service: &TlsService) -> String {
    let mut admin = Connection::open(&service.admin()).await.expect("the admin listener accepts");
    admin.ask(&get("/metrics")).await.expect("the server answers").text()
}

/// Polls the metrics until they contain all of `lines`, and returns them.
async fn metrics_with(service: &TlsService, lines: &[&str]) -> String {
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        let text = metrics(service).await;
        if lines.iter().all(|line| text.lines().any(|found| found == *line)) {
            return text;
        }
        assert!(Instant::now() < deadline, "no {lines:?} in time: {text}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until one request is in flight besides the request for the metrics.
async fn wait_for_in_flight(service: &TlsService) {
    metrics_with(service, &["http_requests_in_flight 2"]).await;
}

// ---- names ----

#[test]
fn a_socket_that_the_service_does_not_use_is_refused() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port is bound");
    let mut command_with_fd = command(app_binary(), &[]);
    command_with_fd.env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0").env("LISTEN_FDNAMES", "web");
    command_with_fd.stdin(std::os::fd::OwnedFd::from(listener));
    let (code, _, log) = run_to_end(&mut command_with_fd).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    let unused = "this service does not use a socket with the name web: expected one of admin http… https…";
    assert!(log.contains(unused), "{log}");
    let (code, _, log) =
        run_to_end(&mut command(app_binary(), &["--listen", "web=127.0.0.1:0"])).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains(unused), "{log}");
    let (code, _, log) = run_to_end(&mut command(app_binary(), &["--listen", "connections=127.0.0.1:0"]))
        .expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("--listen") && log.contains("invalid socket name \"connections\""), "{log}");
}

/// systemd passes connections to the instances of a template with `Accept=yes`, and calls them `connection`.
#[test]
fn a_connection_in_the_place_of_a_listener_is_refused_and_the_error_names_accept_no() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port is bound");
    let address = listener.local_addr().expect("the listener has an address");
    let _client = std::net::TcpStream::connect(address).expect("the listener accepts");
    let (connection, _) = listener.accept().expect("a client has connected");
    for name in ["connection", "http"] {
        let mut command = command(app_binary(), &[]);
        command.env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0").env("LISTEN_FDNAMES", name);
        let copy = connection.try_clone().expect("the socket is duplicated");
        command.stdin(std::os::fd::OwnedFd::from(copy));
        let (code, _, log) = run_to_end(&mut command).expect("the process ends");
        assert_eq!(code, Some(78), "{log}");
        assert!(log.contains("Accept=no in the socket unit") && log.lines().count() == 1, "{log}");
        let names_cause = log.contains("Accept=yes in the socket unit: systemd passed a TCP connection");
        assert!(names_cause || name == "http", "{log}");
    }
}

#[test]
fn an_unusable_certificate_is_reported_in_one_line_by_check_too() {
    let (one, other) = (
        Certificate::new().expect("the certificate is made"),
        Certificate::new().expect("the certificate is made"),
    );
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let huge = folder.path().join("huge");
    std::fs::File::create(&huge).and_then(|file| file.set_len(1 << 30)).expect("the file is made");
    let missing = folder.path().join("missing");
    let cases: [(PathBuf, PathBuf, &str); 6] = [
        (one.chain(), other.key(), "the private key does not match the certificate"),
        (missing.clone(), one.key(), "could not read"),
        (one.chain(), missing, "could not read"),
        (one.key(), one.key(), "contains no PEM certificate"),
        (one.chain(), one.chain(), "contains no PEM private key"),
        (huge, one.key(), "so not a certificate or a key"),
    ];
    for (chain, key, reason) in cases {
        for subcommand in [&["check"][..], &[]] {
            let mut command = command(app_binary(), subcommand);
            command
                .args(["--listen", "https=127.0.0.1:0"])
                .arg("--tls-cert")
                .arg(&chain)
                .arg("--tls-key")
                .arg(&key);
            let (code, _, log) = run_to_end(&mut command).expect("the process ends");
            assert_eq!(code, Some(78), "{log}");
            assert!(log.contains(reason) && log.lines().count() == 1, "{log}");
        }
    }
    let (code, _, log) = run_to_end(&mut command(app_binary(), &["check", "--listen", "https=127.0.0.1:0"]))
        .expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("LoadCredential=tls.crt") && log.contains("--tls-cert"), "{log}");
    let mut credentials = command(app_binary(), &["check", "--listen", "https=127.0.0.1:0"]);
    credentials.env("CREDENTIALS_DIRECTORY", one.chain().parent().expect("the path has a parent"));
    let (code, output, log) = run_to_end(&mut credentials).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(output.contains("\nready to serve on https("), "{output}");
}

// ---- admin ----

#[test]
fn metrics_are_labelled_by_route_template_and_not_by_path() {
    let service = start(&[]);
    block_on(async {
        let mut connection =
            Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens");
        for path in ["/", "/", "/sleep?duration=1ms", "/made-up/1", "/made-up/2"] {
            connection.ask(&get(path)).await.expect("the server answers");
        }
        connection.ask(b"BREW / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("the server answers");
        // The client receives a response before the service counts it, so the test waits for the final counts.
        let lines = [
            "outlive_connections{stage=\"waiting\"} 1",
            "outlive_connections{stage=\"in_flight\"} 1",
            "http_requests_in_flight 1",
        ];
        let text = metrics_with(&service, &lines).await;
        let count = |labels: &str| {
            let name = format!("http_request_duration_seconds_count{{{labels}}} ");
            text.lines().find_map(|line| line.strip_prefix(&name)).map(str::to_owned)
        };
        assert_eq!(count(r#"method="GET",route="/",status="200""#).as_deref(), Some("2"), "{text}");
        assert_eq!(count(r#"method="GET",route="/sleep",status="200""#).as_deref(), Some("1"), "{text}");
        assert_eq!(count(r#"method="GET",route="",status="404""#).as_deref(), Some("2"), "{text}");
        assert_eq!(count(r#"method="other",route="/",status="405""#).as_deref(), Some("1"), "{text}");
        for line in [
            "outlive_generation 1",
            "outlive_connections_handed_over_total 0",
            "outlive_connections_taken_over_total 0",
            "outlive_requests_cut_off_total 0",
            "outlive_log_messages_dropped_total 0",
            &format!("outlive_accept_queue_length{{listener=\"http({})\"}} 0", service.http.port()),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
        for start in [
            "process_resident_memory_bytes ",
            "process_open_fds ",
            "outlive_uptime_seconds ",
            "outlive_runtime_worker_parks_total{worker=\"0\"} ",
        ] {
            assert!(text.lines().any(|line| line.starts_with(start)), "{start} is not in {text}");
        }
        assert!(!text.contains("made-up") && !text.contains("BREW"), "{text}");
    });
}

#[test]
fn an_idle_listener_reserves_no_connection_slot() {
    let service = start(&["--max-connections", "1"]);
    block_on(async {
        let (http, https) = (Target::Tcp(service.http), https(&service, "http/1.1"));
        for target in [&http, &http, &https, &https, &http] {
            let ask = async {
                let mut only = Connection::open(target).await.expect("the connection opens");
                only.ask(&get("/")).await.expect("the server answers").status
            };
            let status = tokio::time::timeout(TEST_TIMEOUT, ask).await;
            assert_eq!(status.expect("the request is served"), 200);
        }
    });
}

#[test]
fn the_admin_listener_reports_the_accept_queue_at_max_connections() {
    let service = start(&["--max-connections", "1"]);
    block_on(async {
        let target = Target::Tcp(service.http);
        let mut only = Connection::open(&target).await.expect("the connection opens");
        only.ask(&get("/")).await.expect("the server answers");
        let _waiting = [
            Connection::open(&target).await.expect("the connection is queued"),
            Connection::open(&target).await.expect("the connection is queued"),
        ];
        let line = format!("outlive_accept_queue_length{{listener=\"http({})\"}} 2", service.http.port());
        metrics_with(&service, &[&line]).await;
    });
}

/// The admin listener answers meanwhile. A client that disconnects frees its place.
#[test]
fn requests_above_the_limits_are_refused_with_503_and_counted() {
    for flag in ["--max-requests", "--max-requests-per-client"] {
        let service = start(&[flag, "1"]);
        block_on(async {
            let open =
                async || Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens");
            let (mut slow, mut other) = (open().await, open().await);
            slow.send(&get("/sleep?duration=1h")).await.expect("the bytes are sent");
            wait_for_in_flight(&service).await;
            let refused = other.ask(&get("/")).await.expect("the server answers");
            assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{refused:?}");
            assert!(!refused.closes(), "{refused:?}");
            let counter = format!("outlive_requests_refused_total{{limit=\"{}\"}} 1", &flag[2..]);
            metrics_with(&service, &[&counter]).await;
            drop(slow);
            while other.ask(&get("/")).await.expect("the server answers").status == 503 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }
}

#[test]
fn readyz_fails_from_the_beginning_of_a_drain_and_healthz_does_not() {
    let mut service = start(&["--drain-delay", "1min"]);
    block_on(async {
        let mut admin = Connection::open(&service.admin()).await.expect("the admin listener accepts");
        assert_eq!(admin.ask(&get("/readyz")).await.expect("the server answers").status, 200);
        terminate(&mut service);
        let mut refused = false;
        while !refused {
            refused = admin.ask(&get("/readyz")).await.expect("the server answers").status == 503;
        }
        assert_eq!(admin.ask(&get("/healthz")).await.expect("the server answers").status, 200);
    });
    // A second signal ends the drain.
    service.process.signal(Signal::TERM);
    let mut log = String::new();
    let mut stderr = service.process.child().stderr.take().expect("the output is piped");
    std::io::Read::read_to_string(&mut stderr, &mut log).expect("the log is readable");
    assert!(log.contains("--drain-delay") && !log.contains("ERROR"), "{log}");
}

#[test]
fn the_port_accepts_during_the_drain_delay_and_is_closed_after_it() {
    let mut service = start(&["--drain-delay", "5s"]);
    block_on(async {
        let target = Target::Tcp(service.http);
        let mut before = Connection::open(&target).await.expect("the connection opens");
        before.ask(&get("/")).await.expect("the server answers");
        let begun = Instant::now();
        terminate(&mut service);
        // During the delay both old and new connections are served without Connection: close.
        let mut fresh = Connection::open(&target).await.expect("the port accepts");
        assert!(!fresh.ask(&get("/")).await.expect("the server answers").closes());
        assert!(!before.ask(&get("/")).await.expect("the server answers").closes());
        // After the delay the next response has Connection: close, and the port is closed.
        let mut closes = false;
        while !closes {
            closes = before.ask(&get("/sleep?duration=10ms")).await.expect("the server answers").closes();
        }
        assert!(begun.elapsed() >= Duration::from_secs(5), "{:?}", begun.elapsed());
        wait_until("a closed port", || std::net::TcpStream::connect(service.http).is_err());
        assert!(fresh.ask(&get("/")).await.expect("the server answers").closes());
    });
    end(service);
}

#[test]
fn a_second_stop_signal_ends_the_drain_delay() {
    let mut service = start(&["--drain-delay", "10min"]);
    terminate(&mut service);
    service.process.signal(Signal::TERM);
    end(service);
}

// ---- drain over TLS ----

#[test]
fn an_https_connection_gets_connection_close_during_a_drain() {
    let mut service = start(&[]);
    block_on(async {
        let mut idle = Connection::open(&https(&service, "http/1.1")).await.expect("the connection opens");
        assert!(!idle.ask(&get("/")).await.expect("the server answers").closes());
        let mut busy = Connection::open(&https(&service, "http/1.1")).await.expect("the connection opens");
        busy.send(&get("/sleep?duration=5s")).await.expect("the bytes are sent");
        wait_for_in_flight(&service).await;
        terminate(&mut service);
        assert!(busy.answer().await.expect("the server answers").closes());
        assert!(idle.ask(&get("/")).await.expect("the server answers").closes());
        // The service sends close_notify, so that the client can distinguish this from truncation (RFC 8446 section
        // 6.1).
        assert_eq!(idle.read_more().await.expect("close_notify arrives"), 0);
    });
    end(service);
}

#[test]
fn an_idle_https_connection_is_closed_with_close_notify() {
    let mut service = start(&["--idle-timeout", "3s"]);
    block_on(async {
        let mut idle = Connection::open(&https(&service, "http/1.1")).await.expect("the connection opens");
        idle.ask(&get("/")).await.expect("the server answers");
        assert_eq!(idle.read_more().await.expect("close_notify arrives"), 0);
    });
    terminate(&mut service);
    end(service);
}

#[test]
fn an_http2_connection_gets_goaway_during_a_drain_and_its_stream_finishes() {
    let mut service = start(&[]);
    block_on(async {
        let mut idle = Http2::open(&https(&service, "h2")).await.expect("the connection opens");
        assert_eq!(idle.get("/").await.expect("the server answers").expect("no GOAWAY arrives").0, 200);
        let mut busy = Http2::open(&https(&service, "h2")).await.expect("the connection opens");
        let answer = tokio::spawn(async move { busy.get("/sleep?duration=5s").await });
        wait_for_in_flight(&service).await;
        terminate(&mut service);
        let answer = answer.await.expect("the task does not panic").expect("the server answers");
        assert_eq!(answer, Some((200, "slept 5s\n".to_owned())));
        while !idle.is_over().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    end(service);
}

/// Whether a TLS connection is handed over at a reload. If not, its next response has Connection: close.
fn survives_a_reload(flags: &[&str]) -> bool {
    let mut service = start(flags);
    let (next, outcome) = block_on(async {
        let mut connection =
            Connection::open(&https(&service, "http/1.1")).await.expect("the connection opens");
        assert!(!connection.ask(&get("/")).await.expect("the server answers").closes());
        service.process.signal(Signal::HUP);
        let next = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        // The old process may answer the first requests, before it hands the connection over.
        loop {
            let answer = connection.ask(&get("/")).await.expect("the server answers");
            if answer.closes() || answer.text().contains("generation 2") {
                break (next, !answer.closes());
            }
        }
    });
    testkit::process::terminate(next.trim_start_matches("MAINPID=")).expect("the process runs");
    end(service);
    outcome
}

#[test]
fn tls_connections_are_handed_over_unless_tls_handover_is_no() {
    assert!(survives_a_reload(&[]));
    assert!(!survives_a_reload(&["--tls-handover", "no"]));
}

#[test]
fn a_tls_connection_without_a_handshake_does_not_delay_the_exit() {
    let mut service = start(&["--drain-timeout", "2s"]);
    block_on(async {
        let silent = TcpStream::connect(service.https).await.expect("the connection opens");
        terminate(&mut service);
        end(service);
        drop(silent);
    });
}

#[test]
fn counters_continue_in_the_successors() {
    // The request is cut off after the end of the handover channel, so the counters arrive twice.
    let service = start(&["--drain-timeout", "1s", "--linger-timeout", "2s"]);
    block_on(async {
        let mut idle = Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens");
        let mut handed_over = 0;
        for round in 1..=2 {
            let pid = pid_of(&mut idle).await;
            let mut endless =
                Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens");
            endless.send(&get("/sleep?duration=1h")).await.expect("the bytes are sent");
            wait_for_in_flight(&service).await;
            kill_process(pid, Signal::HUP).expect("the process runs");
            endless.answer().await.expect_err("cut off");
            // Not an exact number, because connections that requested metrics may be handed over too.
            let text = metrics_with(&service, &[&format!("outlive_requests_cut_off_total {round}")]).await;
            let line =
                text.lines().find_map(|line| line.strip_prefix("outlive_connections_handed_over_total "));
            let total: u64 = line.expect("the line is present").parse().expect("a valid number");
            assert!(total > handed_over, "{text}");
            handed_over = total;
        }
        kill_process(pid_of(&mut idle).await, Signal::KILL).expect("the process runs");
    });
    end(service);
}

/// The pid of the process that answers on `connection`.
async fn pid_of(connection: &mut Connection) -> Pid {
    let text = connection.ask(&get("/")).await.expect("the server answers").text();
    let pid = text.strip_prefix("pid ").and_then(|rest| rest.split(',').next()?.parse().ok());
    pid.and_then(Pid::from_raw).expect(&text)
}

// ---- WebSocket and event streams ----

#[test]
fn a_websocket_client_that_reconnects_loses_no_acknowledged_message() {
    let messages = 300;
    let mut services = vec![start(&[])];
    block_on(async {
        let mut acknowledged: Vec<u32> = Vec::new();
        for round in 0..3 {
            let service = services.last_mut().expect("the service starts");
            let (mut socket, _) = tokio_tungstenite::connect_async(format!("ws://{}/socket", service.http))
                .await
                .expect("the WebSocket opens");
            let mut sent = acknowledged.len();
            let until = messages.min((round + 1) * messages / 3 + 50);
            let is_done = loop {
                if sent < until && sent < acknowledged.len() + 10 {
                    // A failed send is not an error: the reason is in the next message that is read.
                    let _ = socket.send(Message::text(sent.to_string())).await;
                    sent += 1;
                    continue;
                }
                if acknowledged.len() == (round + 1) * messages / 3 {
                    if round == 2 {
                        break true;
                    }
                    service.process.signal(Signal::TERM);
                }
                match socket
                    .next()
                    .await
                    .expect("a message arrives before the end")
                    .expect("the stream ends cleanly")
                {
                    Message::Text(text) => acknowledged.push(text.parse().expect("a valid number")),
                    Message::Close(frame) => {
                        let code = frame.expect("the close frame has a reason").code;
                        assert_eq!(code, CloseCode::Restart);
                        break false;
                    }
                    other => panic!("{other:?}"),
                }
            };
            if !is_done {
                // The client reads to the end, because the server waits for the client's side of the close.
                while socket.next().await.is_some_and(|message| message.is_ok()) {}
                services.push(start(&[]));
            }
        }
        // Messages without an acknowledgement were sent again, so the sequence has no gap and no duplicate.
        let all: Vec<u32> = (0..u32::try_from(messages).expect("a small number")).collect();
        assert_eq!(acknowledged, all);
    });
}

#[test]
fn an_event_stream_resumes_after_its_last_event_in_the_next_process() {
    block_on(async {
        let mut seen: Vec<u64> = Vec::new();
        for _ in 0..2 {
            let mut service = start(&[]);
            let mut connection =
                Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens");
            let last = seen.last().map_or_else(String::new, |id| format!("last-event-id: {id}\r\n"));
            let request = format!("GET /events HTTP/1.1\r\nhost: x\r\n{last}\r\n");
            connection.send(request.as_bytes()).await.expect("the bytes are sent");
            assert_eq!(connection.head().await.expect("a response head arrives").status, 200);
            let count = |bytes: &[u8]| String::from_utf8_lossy(bytes).matches("id: ").count();
            while count(connection.unread()) < 2 {
                assert!(connection.read_more().await.expect("events arrive") > 0);
            }
            terminate(&mut service);
            while !connection.unread().ends_with(b"0\r\n\r\n") {
                assert!(connection.read_more().await.expect("the stream ends cleanly") > 0);
            }
            let text = String::from_utf8_lossy(connection.unread()).into_owned();
            seen.extend(
                text.lines().filter_map(|line| line.strip_prefix("id: ")?.trim().parse::<u64>().ok()),
            );
            drop(connection);
            end(service);
        }
        let all: Vec<u64> = (0..seen.len() as u64).collect();
        assert!(seen.len() >= 4 && seen == all, "{seen:?}");
    });
}
