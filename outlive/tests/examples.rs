//! Tests of the binaries in `examples`: WebSockets, background tasks, readiness checks, exit hooks, tracing layers and errors
//! of `start` over restarts and reloads, secrets, and commands of a service. `slow` exists for these tests; the others are
//! for readers.

use std::net::UdpSocket;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use testkit::client::{Connection, Target, get};
use testkit::process::{Notifications, Process, terminate};
use testkit::service::{Service, Socket, command, run_to_end};
use testkit::tls_service::TlsService;
use testkit::{block_on, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// The path of an example. cargo builds the examples only when it runs all tests of the package, as `make test` does.
/// Before a run of this test alone (`--test examples`), run `cargo build --workspace --examples`.
fn example(name: &str) -> String {
    let test = std::env::current_exe().expect("the path of the test binary is known");
    let path: PathBuf =
        test.ancestors().nth(2).expect("the test binary is in target/debug/deps").join("examples").join(name);
    path.to_str().expect("the path is valid UTF-8").to_owned()
}

/// Sends one request, which the example `state` counts.
async fn visit(connection: &mut Connection) {
    assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
}

#[test]
fn the_minimal_example_keeps_its_connection_over_a_restart() {
    let binary = example("minimal");
    let service = Service::start_with_store(&binary, &[]).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        visit(&mut connection).await;
        service.signal(Signal::TERM);
        let _next = service.restart(&binary).expect("the next process starts");
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").text(), "hello\n");
    });
}

/// A member of the room of the example `chat`.
struct Member(WebSocketStream<TcpStream>);

impl Member {
    async fn join(service: &Service, name: &str) -> Self {
        let stream = TcpStream::connect(service.address()).await.expect("the service listens");
        let opened = tokio_tungstenite::client_async("ws://test/chat", stream).await;
        let mut member = Self(opened.expect("the upgrade is granted").0);
        member.say(name).await;
        member
    }

    async fn say(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.expect("the WebSocket is open");
    }

    /// Waits for `line`. Other lines may come before it, but no Close.
    async fn hear(&mut self, line: &str) {
        loop {
            match self.0.next().await.expect("the WebSocket is open").expect("no error occurs") {
                Message::Text(text) if text.as_str() == line => return,
                Message::Text(_) => {}
                other => panic!("expected {line:?}, got {other:?}"),
            }
        }
    }
}

#[test]
fn the_chat_example_keeps_its_websockets_and_their_state_over_restarts() {
    let binary = example("chat");
    let mut service = Service::start_with_store(&binary, &[]).expect("the service starts");
    block_on(async {
        let (mut ann, mut bob) = (Member::join(&service, "ann").await, Member::join(&service, "bob").await);
        for number in 1..6 {
            // A member that has heard its own line is served by this process, so it hears the next lines of others.
            ann.say("hello").await;
            ann.hear(&format!("ann {number}: hello")).await;
            bob.say("hi").await;
            let line = format!("bob {number}: hi");
            bob.hear(&line).await;
            ann.hear(&line).await;
            service.signal(Signal::TERM);
            service = service.restart(&binary).expect("the next process starts");
        }
        drop(service);
    });
}

#[test]
fn a_background_task_loses_nothing_over_restarts() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let (binary, file) = (example("state"), folder.path().join("visits"));
    let flags = ["--file", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start_with_store(&binary, &flags).expect("the service starts");
    let service = block_on(async {
        let mut connection = service.connect().await;
        for _ in 0..5 {
            for _ in 0..100 {
                visit(&mut connection).await;
            }
            service.signal(Signal::TERM);
            service = service.restart(&binary).expect("the next process starts");
        }
        service
    });
    service.signal(Signal::TERM);
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success() && log.contains("all visits are counted"), "{log}");
    assert_eq!(std::fs::read_to_string(&file).expect("the count is present"), "500");
}

/// During a reload both processes run. The task of the new one must start only after the task of the old one has
/// written the last count, otherwise one of them overwrites visits of the other.
#[test]
fn an_exclusive_task_loses_nothing_over_reloads() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let (binary, file) = (example("state"), folder.path().join("visits"));
    let flags = ["--file", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start_in(&binary, &flags, folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        for _ in 0..100 {
            visit(&mut connection).await;
        }
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        for _ in 0..100 {
            visit(&mut connection).await;
        }
        service.process().wait().expect("the old process exits");
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
        while !connection.ask(&get("/")).await.expect("the server answers").closes() {}
    });
    wait_until("the count", || {
        std::fs::read_to_string(&file).is_ok_and(|count| count.parse::<u32>().is_ok_and(|count| count >= 201))
    });
}

/// A client of the example `ingest`, whose service numbers the lines that it confirms.
struct Device {
    stream: TcpStream,
    lines: u32,
}

impl Device {
    /// Sends bytes that contain the ends of so many lines. Reads that these are confirmed.
    async fn sends(&mut self, bytes: &[u8], lines: u32) {
        self.stream.write_all(bytes).await.expect("the connection is open");
        let expected = numbers(self.lines + 1, self.lines + lines);
        self.lines += lines;
        let mut answer = vec![0; expected.len()];
        self.stream.read_exact(&mut answer).await.expect("the lines are confirmed");
        assert_eq!(String::from_utf8_lossy(&answer), expected);
    }
}

/// The numbers from `first` to `last`, one in each line.
fn numbers(first: u32, last: u32) -> String {
    (first..=last).map(|number| number.to_string()).collect::<Vec<_>>().join("\n") + "\n"
}

#[test]
fn connection_of_a_named_socket_outlives_a_restart() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = format!("--file={}", folder.path().join("readings").display());
    let sockets = [Socket::Tcp("lines"), Socket::Udp("readings")];
    let service = Service::start_with_sockets(&example("ingest"), &[&file], &sockets, folder.path())
        .expect("the service starts");
    block_on(async {
        let stream = TcpStream::connect(service.socket("lines")).await.expect("the service listens");
        let mut device = Device { stream, lines: 0 };
        device.sends(b"a\nb", 1).await;
        service.signal(Signal::TERM);
        let _next = service.restart(&example("ingest")).expect("the next process starts");
        device.sends(b"\nc\n", 2).await;
    });
}

#[test]
fn start_without_a_socket_that_the_service_claims_fails_at_once_with_its_log() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = format!("--file={}", folder.path().join("readings").display());
    let error = Service::start(&example("ingest"), &[&file]).err().expect("the service does not start");
    let error = format!("{error:#}");
    assert!(error.contains("exited before READY=1") && error.contains("\"lines\""), "{error}");
}

/// A client that reads no responses holds up the end of the old process. Until then only this process may read the port,
/// because two processes would write the readings in another order.
#[test]
fn readings_are_in_order_while_a_client_holds_up_the_old_process_of_a_reload() {
    // Two readers would exchange readings in one of about 50 bursts.
    const BURSTS: u32 = 400;
    const BURST: u32 = 100;
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("readings");
    let (http, readings) = (testkit::free_address(), testkit::free_address());
    let mut notifications = Notifications::new().expect("the socket is made");
    let flags = ["--listen", "lines=127.0.0.1:0", "--drain-timeout", "1h", "--request-timeout", "1h"];
    let mut command = command(&example("ingest"), &flags);
    command
        .arg(format!("--listen={http}"))
        .arg(format!("--listen=readings={readings}"))
        .arg(format!("--file={}", file.display()))
        .env("NOTIFY_SOCKET", notifications.path());
    let mut first = Process::spawn(&mut command).expect("the service starts");
    notifications.wait_for("READY=1").expect("the service is ready");
    let sender = UdpSocket::bind("127.0.0.1:0").expect("the port is bound");
    let mut sent = 0;
    let mut burst = || {
        for _ in 0..BURST {
            sent += 1;
            sender.send_to(sent.to_string().as_bytes(), readings).expect("the datagram is sent");
        }
        let expected = numbers(1, sent);
        // The buffer of the port has room for one burst.
        wait_until("the burst is in the file", || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.len() >= expected.len())
        });
        assert_eq!(std::fs::read_to_string(&file).expect("valid UTF-8"), expected);
    };
    block_on(async {
        let socket = TcpSocket::new_v4().expect("a socket is made");
        socket.set_recv_buffer_size(4096).expect("the size is valid");
        let mut client = socket.connect(http).await.expect("the service listens");
        // The process reads no further requests when the buffers have no room for its responses.
        let requests = get("/").repeat(100);
        while let Ok(written) = timeout(Duration::from_secs(5), client.write(&requests)).await {
            written.expect("the connection is open");
        }
        burst();
        first.signal(Signal::HUP);
        let main = notifications.wait_for("MAINPID=").expect("a successor takes over");
        for _ in 0..BURSTS {
            burst();
        }
        assert!(
            first.child().try_wait().expect("the process is known").is_none(),
            "the old process has ended"
        );
        drop(client);
        assert!(first.wait().expect("the old process exits").success());
        burst();
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    });
}

/// The datagrams are sent before, while and after each process takes over.
#[test]
fn named_sockets_lose_no_line_and_no_datagram_over_reloads() {
    const RELOADS: u32 = 5;
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("readings");
    let (lines, readings) = (testkit::free_address(), testkit::free_address());
    let mut notifications = Notifications::new().expect("the socket is made");
    let mut command = command(&example("ingest"), &["--listen", "127.0.0.1:0"]);
    command
        .arg(format!("--listen=lines={lines}"))
        .arg(format!("--listen=readings={readings}"))
        .arg(format!("--file={}", file.display()))
        .env("NOTIFY_SOCKET", notifications.path());
    let mut first = Some(Process::spawn(&mut command).expect("the service starts"));
    notifications.wait_for("READY=1").expect("the service is ready");
    let sender = UdpSocket::bind("127.0.0.1:0").expect("the port is bound");
    let mut count = 0;
    let mut send = || {
        count += 1;
        sender.send_to(count.to_string().as_bytes(), readings).expect("the datagram is sent");
        count
    };
    block_on(async {
        let stream = TcpStream::connect(lines).await.expect("the service listens");
        let mut device = Device { stream, lines: 0 };
        let mut main = first.as_ref().expect("it runs").pid();
        for _ in 0..RELOADS {
            send();
            device.sends(b"whole\nhalf", 1).await;
            kill_process(main, Signal::HUP).expect("the process runs");
            let successor = notifications.wait_for("MAINPID=").expect("a successor takes over");
            send();
            device.sends(b" of a line\n", 1).await;
            if let Some(mut first) = first.take() {
                first.wait().expect("the old process exits");
            }
            let pid = successor.trim_start_matches("MAINPID=").parse().expect("a pid");
            main = Pid::from_raw(pid).expect("a pid is not 0");
        }
        let last = send();
        let expected = numbers(1, last);
        wait_until("all datagrams are in the file", || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.len() >= expected.len())
        });
        assert_eq!(std::fs::read_to_string(&file).expect("valid UTF-8"), expected);
        terminate(&main.as_raw_nonzero().to_string()).expect("the process runs");
        assert_eq!(device.stream.read(&mut [0]).await.expect("the connection ends without an error"), 0);
    });
}

#[test]
fn an_error_in_start_is_reported_in_one_line_by_check_too() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("visits");
    std::fs::write(&file, "many").expect("the file is written");
    let file = file.to_str().expect("the path is valid UTF-8");
    let address = testkit::free_address().to_string();
    for arguments in
        [&["--listen", &address, "--file", file][..], &["check", "--listen", &address, "--file", file]]
    {
        let (code, output, log) =
            run_to_end(&mut command(&example("state"), arguments)).expect("the process ends");
        assert_eq!((code, output.as_str()), (Some(69), ""), "{log}");
        let expected =
            format!("state: invalid content of {file}: expected a number: invalid digit found in string\n");
        assert_eq!(log, expected);
    }
}

#[test]
fn an_error_in_start_at_a_reload_is_reported_and_the_old_process_keeps_serving() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("visits");
    let flags = ["--file", file.to_str().expect("the path is valid UTF-8")];
    let mut service =
        Service::start_in(&example("state"), &flags, folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        visit(&mut connection).await;
        wait_until("the count", || file.exists());
        std::fs::write(&file, "many").expect("the file is written");
        service.signal(Signal::HUP);
        let reason = "expected a number: invalid digit found in string";
        service.notifications.wait_for_status(reason).expect("the status is sent");
        visit(&mut connection).await;
    });
}

#[test]
fn a_failed_background_task_drains_the_service_and_is_named_in_the_log() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("visits");
    let flags = ["--file", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start(&example("state"), &flags).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        std::fs::write(&file, "many").expect("the file is written");
        visit(&mut connection).await;
        service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
        while !connection.ask(&get("/")).await.expect("the server answers").closes() {}
    });
    let (status, log) = service.end().expect("the process ends");
    assert_eq!(status.code(), Some(70), "{log}");
    assert!(log.contains("the service stops because the background task \"count visits\" ended"), "{log}");
}

#[test]
fn a_failed_readiness_check_is_named_by_readyz_and_affects_no_request() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("visits");
    let flags = ["--file", file.to_str().expect("the path is valid UTF-8")];
    let service = TlsService::start(&example("state"), &flags).expect("the service starts");
    block_on(async {
        let ready = async || {
            let mut admin = Connection::open(&service.admin()).await.expect("the connection opens");
            admin.ask(&get("/readyz")).await.expect("the server answers")
        };
        let answer = ready().await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "ready\nfile: ok\n"));
        std::fs::write(&file, "many").expect("the file is written");
        let refused = loop {
            let answer = ready().await;
            if answer.status != 200 {
                break answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert!(
            refused.status == 503 && refused.text().starts_with("not ready\nfile: "),
            "{}",
            refused.text()
        );
        visit(&mut Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens")).await;
        std::fs::remove_file(&file).expect("the file is removed");
        while ready().await.status != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

/// What the log has written as lines of JSON.
fn objects(log: &str) -> Vec<Value> {
    log.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn a_log_in_json_has_an_object_on_each_line_and_the_access_log_one_for_each_request() {
    let flags = ["--log-format", "json", "--access-log"];
    let service = Service::start(&example("minimal"), &flags).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        for path in ["/", "/no%0Asuch?query"] {
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nx-request-id: mine\r\n\r\n");
            connection.ask(request.as_bytes()).await.expect("the server answers");
        }
    });
    let pid = service.pid();
    service.signal(Signal::TERM);
    let (_, log) = service.end().expect("the process ends");
    let objects = objects(&log);
    for object in &objects {
        assert_eq!(
            (&object["service"], &object["pid"], &object["generation"]),
            (&json!("minimal"), &json!(pid), &json!(1))
        );
        assert!(object["timestamp"].as_str().is_some_and(|time| time.ends_with('Z')), "{object}");
    }
    let access = objects.iter().filter(|object| object["target"] == "access");
    let access = access.map(|object| {
        let names = ["message", "level", "request_id", "method", "path", "route", "status", "version"];
        names.map(|name| object[name].clone())
    });
    let wanted = [
        json!(["GET / 200", "INFO", "mine", "GET", "/", "/", 200, "HTTP/1.1"]),
        json!(["GET /no%0Asuch 404", "INFO", "mine", "GET", "/no%0Asuch", null, 404, "HTTP/1.1"]),
    ];
    assert_eq!(access.map(|values| Value::from(values.to_vec())).collect::<Vec<_>>(), wanted);
}

#[test]
fn a_failed_start_is_reported_in_json_too() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("visits");
    std::fs::write(&file, "\"many\"\n").expect("the file is written");
    let file = file.to_str().expect("the path is valid UTF-8");
    let address = testkit::free_address().to_string();
    let flags = ["--log-format=json", "--listen", &address, "--file", file];
    let (code, _, log) = run_to_end(&mut command(&example("state"), &flags)).expect("the process ends");
    assert_eq!(code, Some(69), "{log}");
    let objects = objects(&log);
    let last = objects.last().expect("the reason is logged");
    assert_eq!((&last["level"], &last["service"]), (&json!("ERROR"), &json!("state")));
    assert!(last["message"].as_str().is_some_and(|text| text.contains("expected a number")), "{last}");
}

/// Standard error that the process takes for the journal, which is a file here.
#[test]
fn lines_for_journald_have_a_priority_and_no_colour() {
    for (format, after_priority) in [("text", "20"), ("json", "{")] {
        let log = tempfile::NamedTempFile::new().expect("a temporary file is made");
        let address = testkit::free_address().to_string();
        let flags = ["check", "--log-format", format, "--listen", &address];
        let mut command = command(&example("minimal"), &flags);
        let stat = log.as_file().metadata().expect("the file exists");
        command
            .env("JOURNAL_STREAM", format!("{}:{}", stat.dev(), stat.ino()))
            .env("MINIMAL_UNKNOWN", "warned of")
            .stderr(log.reopen().expect("the file opens"));
        let (code, ..) = run_to_end(&mut command).expect("the process ends");
        assert_eq!(code, Some(0));
        let lines = std::fs::read_to_string(log.path()).expect("valid UTF-8");
        let warning = lines.strip_prefix("<4>").expect(&lines);
        assert!(warning.starts_with(after_priority) && warning.contains("MINIMAL_UNKNOWN"), "{lines}");
        assert_eq!((lines.lines().count(), lines.contains('\x1b')), (1, false), "{lines}");
    }
}

/// Asks for `users` on one connection.
async fn ask_for(service: &Service, users: Range<usize>) {
    let mut connection = service.connect().await;
    for user in users {
        let request = format!("GET /users/{user} HTTP/1.1\r\nhost: test\r\nx-request-id: id-{user}\r\n\r\n");
        assert_eq!(connection.ask(request.as_bytes()).await.expect("the server answers").status, 201);
    }
}

/// Waits until `file` has the spans of these users, each once.
fn wait_for_spans(file: &Path, users: Range<usize>) {
    let span = |user| {
        format!(
            "request request_id=id-{user} method=GET path=/users/{user} peer=127.0.0.1 route=/users/{{id}} status=201"
        )
    };
    let lines = || {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        // Without the port of the client.
        let of_line = |line: &str| {
            let (before, peer) = line.split_once(" peer=")?;
            let (peer, after) = peer.split_once(' ')?;
            Some(format!("{before} peer={} {after}", peer.split(':').next()?))
        };
        text.lines().filter_map(of_line).collect::<Vec<_>>()
    };
    wait_until("the spans of the last process", || lines().len() >= users.len());
    let mut found = lines();
    found.sort();
    let mut wanted: Vec<_> = users.map(span).collect();
    wanted.sort();
    assert_eq!(found, wanted);
}

#[test]
fn a_tracing_layer_receives_each_request_over_restarts_although_the_log_is_off() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let (binary, file) = (example("traced"), folder.path().join("spans"));
    let flags = ["--log", "off", "--spans", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start_with_store(&binary, &flags).expect("the service starts");
    for round in 0..3 {
        block_on(ask_for(&service, 10 * round..10 * (round + 1)));
        service.signal(Signal::TERM);
        // The next process starts after the exit of this one, which flushes the spans before it.
        service = service.restart(&binary).expect("the next process starts");
        assert_eq!(
            std::fs::read_to_string(&file).expect("the spans are flushed").lines().count(),
            10 * (round + 1)
        );
    }
    service.signal(Signal::TERM);
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success());
    assert_eq!(log, "", "the log is off");
    wait_for_spans(&file, 0..30);
}

#[test]
fn a_tracing_layer_receives_each_request_over_reloads() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let (binary, file) = (example("traced"), folder.path().join("spans"));
    let flags = ["--log", "off", "--spans", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start_in(&binary, &flags, folder.path()).expect("the service starts");
    block_on(ask_for(&service, 0..10));
    service.signal(Signal::HUP);
    let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
    block_on(ask_for(&service, 10..20));
    assert!(service.process().wait().expect("the old process exits").success());
    terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    wait_for_spans(&file, 0..20);
}

#[test]
fn sigterm_during_start_exits_cleanly() {
    let mut command =
        command(&example("slow"), &["--when", "start", "--listen", &testkit::free_address().to_string()]);
    let mut process = Process::spawn(&mut command).expect("the service starts");
    let mut stderr = process.child().stderr.take().expect("the output is piped");
    let mut line = [0; 8];
    std::io::Read::read_exact(&mut stderr, &mut line).expect("the start begins");
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
}

#[test]
fn sighup_during_start_reloads_after_the_start() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("file");
    let address = testkit::free_address().to_string();
    let flags =
        ["--when", "start", "--until", file.to_str().expect("the path is valid UTF-8"), "--listen", &address];
    let log = tempfile::NamedTempFile::new().expect("a temporary file is made");
    let mut command = command(&example("slow"), &flags);
    let mut process =
        Process::spawn(command.stderr(log.reopen().expect("the file opens"))).expect("the service starts");
    let logged = || std::fs::read_to_string(log.path()).expect("valid UTF-8");
    wait_until("the start begins", || logged().contains("waiting for the file"));
    process.signal(Signal::HUP);
    std::fs::write(&file, "").expect("the file is written");
    wait_until("a successor takes over", || logged().contains("is serving now"));
    let log = logged();
    let pid = log.split("reload: pid ").nth(1).and_then(|rest| rest.split_whitespace().next());
    assert!(process.wait().expect("the process ends").success());
    terminate(pid.expect("a valid pid")).expect("the process runs");
}

/// At a `systemctl restart` soon after a reload, systemd sends SIGTERM to all processes of the unit. For the old
/// process, which is already shutting down, it must not count as a second stop signal.
#[test]
fn sigterm_after_a_reload_cuts_off_no_background_task_of_the_old_process() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("file");
    let flags = ["--when", "end", "--until", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start_in(&example("slow"), &flags, folder.path()).expect("the service starts");
    let stderr = service.process().child().stderr.take().expect("the output is piped");
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(stderr)).map(|line| line.expect("valid UTF-8"));
    let mut begun = 0;
    let mut wait_for = |wanted: &str| {
        for line in lines.by_ref() {
            assert!(!line.contains("cutting off background tasks"), "{line}");
            begun += u32::from(line.contains("the task has begun"));
            if line.contains(wanted) {
                return begun;
            }
        }
        panic!("the log ended without: {wanted}");
    };
    service.signal(Signal::HUP);
    let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
    wait_for("waiting for the file");
    service.signal(Signal::TERM);
    let begun = wait_for("stop signal ignored: already shutting down");
    assert_eq!(begun, 1, "the task of the successor must wait for the old process");
    std::fs::write(&file, "").expect("the file is written");
    // This line may arrive before the last one of the old process, because each process writes its log through a queue.
    assert_eq!(wait_for("the task has begun"), 2);
    assert!(service.process().wait().expect("the process ends").success());
    terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
}

#[test]
fn a_second_stop_signal_cuts_off_background_tasks() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("file");
    let flags = ["--when", "end", "--until", file.to_str().expect("the path is valid UTF-8")];
    let mut service = Service::start(&example("slow"), &flags).expect("the service starts");
    let stderr = service.process().child().stderr.take().expect("the output is piped");
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(stderr)).map(|line| line.expect("valid UTF-8"));
    service.signal(Signal::TERM);
    lines.find(|line| line.contains("waiting for the file")).expect("the task waits at the end");
    service.signal(Signal::TERM);
    lines
        .find(|line| line.contains("another stop signal: cutting off background tasks"))
        .expect("the task is cut off");
    assert!(service.process().wait().expect("the process ends").success());
}

#[test]
fn a_start_that_never_returns_fails_at_the_start_timeout() {
    let address = testkit::free_address().to_string();
    let mut command =
        command(&example("slow"), &["--when", "start", "--listen", &address, "--start-timeout", "200ms"]);
    let (code, _, log) = run_to_end(&mut command).expect("the process ends");
    assert_eq!(code, Some(69), "{log}");
    assert!(log.contains("slow: startup took longer than 200ms (--start-timeout)"), "{log}");
}

#[test]
fn a_slow_start_extends_the_start_timeout() {
    let mut notifications = Notifications::new().expect("the socket is made");
    let mut command =
        command(&example("slow"), &["--when", "start", "--listen", &testkit::free_address().to_string()]);
    let process =
        Process::spawn(command.env("NOTIFY_SOCKET", notifications.path())).expect("the service starts");
    for _ in 0..2 {
        notifications.wait_for("EXTEND_TIMEOUT_USEC=5000000").expect("EXTEND_TIMEOUT_USEC= is sent");
    }
    process.signal(Signal::TERM);
    assert!(!notifications.lines().iter().any(|line| line == "READY=1"));
}

/// Without notifications systemd kills the process after WatchdogSec= (`a_hung_service_is_restarted_by_the_watchdog` in
/// e2e/systemd).
#[test]
fn no_watchdog_notification_is_sent_while_handlers_block_all_worker_threads() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let file = folder.path().join("file");
    let address = testkit::free_address();
    let flags = [
        "--when",
        "request",
        "--until",
        file.to_str().expect("the path is valid UTF-8"),
        "--listen",
        &address.to_string(),
    ];
    let mut notifications = Notifications::new().expect("the socket is made");
    let mut command = command(&example("slow"), &flags);
    let watchdog = Duration::from_millis(200);
    command
        .env("NOTIFY_SOCKET", notifications.path())
        // One worker thread, so that one blocked handler blocks all of them.
        .env("TOKIO_WORKER_THREADS", "1")
        .env("WATCHDOG_USEC", watchdog.as_micros().to_string());
    let mut process = Process::spawn(&mut command).expect("the service starts");
    notifications.wait_for("WATCHDOG=1").expect("WATCHDOG=1 is sent");
    let stderr = process.child().stderr.take().expect("the output is piped");
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(stderr)).map(|line| line.expect("valid UTF-8"));
    block_on(async {
        let target = Target::Tcp(address);
        let mut client = Connection::open(&target).await.expect("the service listens");
        client.send(&get("/")).await.expect("the bytes are sent");
        lines
            .find(|line| line.contains("waiting for the file"))
            .expect("the handler blocks its worker thread");
        // Discards notifications that were sent before the handler blocked the thread.
        for _ in 0..3 {
            let _ = notifications.wait_for_at_most("WATCHDOG=1", watchdog);
        }
        assert!(notifications.wait_for_at_most("WATCHDOG=1", watchdog * 10).is_err(), "WATCHDOG=1 was sent");
        std::fs::write(&file, "").expect("the file is written");
        notifications.wait_for("WATCHDOG=1").expect("WATCHDOG=1 is sent again");
        assert_eq!(client.answer().await.expect("the server answers").text(), "hello\n");
    });
}

#[test]
fn blocking_tasks_on_all_threads_of_tokio_delay_neither_a_reload_nor_a_restart() {
    let binary = example("slow");
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let mut service =
        Service::start_in(&binary, &["--when", "blocking"], folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        visit(&mut connection).await;
        service.signal(Signal::HUP);
        let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        visit(&mut connection).await;
        terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
        let service =
            Service::start_with_store(&binary, &["--when", "blocking"]).expect("the service starts");
        let mut connection = service.connect().await;
        visit(&mut connection).await;
        service.signal(Signal::TERM);
        let _next = service.restart(&binary).expect("the next process starts");
        visit(&mut connection).await;
    });
}

#[test]
fn a_panic_in_start_fails_the_start() {
    let address = testkit::free_address().to_string();
    let mut command = command(&example("slow"), &["--when", "panic", "--listen", &address]);
    let (code, _, log) = run_to_end(&mut command).expect("the process ends");
    assert_eq!(code, Some(70), "{log}");
    assert!(log.contains("slow: startup failed: panicked: on purpose"), "{log}");
}

#[test]
fn a_start_that_adds_an_admin_route_of_the_library_fails_and_the_error_names_it() {
    let address = testkit::free_address().to_string();
    for command in [&[][..], &["check"]] {
        let flags = [command, &["--when", "admin-route", "--listen", &address]].concat();
        let (code, _, log) =
            run_to_end(&mut testkit::service::command(&example("slow"), &flags)).expect("the process ends");
        assert_eq!(code, Some(70), "{log}");
        assert!(log.contains("slow: startup failed: panicked: ") && log.contains("/metrics"), "{log}");
    }
}

#[test]
fn a_start_that_registers_a_metric_of_the_library_fails_and_the_error_names_it() {
    let address = testkit::free_address().to_string();
    for command in [&[][..], &["check"]] {
        let flags = [command, &["--when", "metric", "--listen", &address]].concat();
        let (code, _, log) =
            run_to_end(&mut testkit::service::command(&example("slow"), &flags)).expect("the process ends");
        assert_eq!(code, Some(69), "{log}");
        assert!(log.contains("slow: could not register the metric http_request_duration_seconds: "), "{log}");
    }
}

/// The example `shop` with the credential `database-password`. The folder has it.
fn shop(arguments: &[&str], password: &str) -> (Command, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    std::fs::write(folder.path().join("database-password"), password).expect("the file is written");
    let mut command = command(&example("shop"), arguments);
    command.env("CREDENTIALS_DIRECTORY", folder.path());
    (command, folder)
}

#[test]
fn command_of_the_service_takes_no_sockets_and_sends_no_messages() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port is bound");
    let mut notifications = Notifications::new().expect("the socket is made");
    let (mut command, _folder) = shop(&["migrate", "--dry-run"], "open-sesame\n");
    notifications.announce(&mut command);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0");
    let inherited = listener.try_clone().expect("the socket is duplicated");
    let (code, output, log) =
        run_to_end(command.stdin(std::os::fd::OwnedFd::from(inherited))).expect("the process ends");
    assert_eq!((code, output.as_str()), (Some(0), ""), "{log}");
    assert!(log.contains("the table orders is up to date") && log.contains("dry_run=true"), "{log}");
    // A process that takes a listener makes it non-blocking, also for the others that have it.
    let flags = rustix::fs::fcntl_getfl(&listener).expect("the flags are known");
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "{flags:?}");
    // Messages arrive in order, so any other would be before this one.
    let sender = std::os::unix::net::UnixDatagram::unbound().expect("the socket is made");
    sender.send_to(b"LAST=1", notifications.path()).expect("the message is sent");
    notifications.wait_for("LAST=1").expect("the message arrives");
    assert_eq!(notifications.lines(), ["LAST=1"]);
}

#[test]
fn failed_command_of_the_service_exits_with_1_and_one_line() {
    let (mut command, _folder) = shop(&["migrate"], "wrong");
    let (code, output, log) = run_to_end(&mut command).expect("the process ends");
    assert_eq!((code, output.as_str()), (Some(1), ""), "{log}");
    assert_eq!(log, "shop: the database refuses the password\n");
}

#[test]
fn invalid_options_of_a_command_exit_with_78_and_one_line() {
    for (arguments, expected) in [
        (&["migrate", "--log", "x=loud"][..], "shop: invalid --log \"x=loud\": expected a log filter"),
        (&["migrate", "--drain-timeout", "soon"], "shop: invalid value 'soon' for '--drain-timeout <TIME>'"),
        (&["migrate", "--wet-run"], "shop: unexpected argument '--wet-run'"),
        (&["migrato"], "shop: unrecognized subcommand 'migrato'"),
    ] {
        let (mut command, _folder) = shop(arguments, "open-sesame");
        let (code, _, log) = run_to_end(&mut command).expect("the process ends");
        assert_eq!(code, Some(78), "{log}");
        assert!(log.starts_with(expected) && log.lines().count() == 1, "{log}");
    }
}

/// The body of `/config`, in the type that is accepted, or as text.
async fn configuration(admin: &Target, accept: Option<&str>) -> String {
    let accept = accept.map(|accept| format!("accept: {accept}\r\n")).unwrap_or_default();
    let request = format!("GET /config HTTP/1.1\r\nhost: test\r\n{accept}\r\n");
    let mut connection = Connection::open(admin).await.expect("the admin listener accepts");
    let answer = connection.ask(request.as_bytes()).await.expect("the server answers");
    assert_eq!(answer.status, 200);
    answer.text()
}

#[test]
fn config_of_the_admin_listener_shows_the_origins_of_each_process_and_no_secret() {
    for (origin, flag, variable, credential) in [
        ("credential", None, None, "open-sesame"),
        ("flag", Some("--database-password=open-sesame"), None, "other-secret"),
        ("variable SHOP_DATABASE_PASSWORD", None, Some("open-sesame"), "other-secret"),
    ] {
        let (mut command, folder) = shop(&["--listen", "127.0.0.1:0", "--drain-delay", "0s"], credential);
        let path = |name: &str| folder.path().join(name).display().to_string();
        let write = |text: &str| std::fs::write(path("shop.toml"), text).expect("the file is written");
        write("database = 'one'\n");
        let listen = format!("admin={}", path("admin.sock"));
        command.args(["--listen", &listen, "--config", &path("shop.toml")]).args(flag);
        command
            .env("RUNTIME_DIRECTORY", folder.path())
            .envs(variable.map(|value| ("SHOP_DATABASE_PASSWORD", value)));
        let mut notifications = Notifications::new().expect("the socket is made");
        notifications.announce(&mut command);
        let mut process = Process::spawn(&mut command).expect("the process starts");
        notifications.wait_for("READY=1").expect("the service is ready");
        let admin = Target::Unix(path("admin.sock").into());
        let shows = async |database: &str, line: u32| {
            let (text, json) =
                (configuration(&admin, None).await, configuration(&admin, Some("application/json")).await);
            for shown in [&text, &json] {
                assert!(!shown.contains("open-sesame") && !shown.contains("other-secret"), "{shown}");
            }
            let words: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
            let json: Value = serde_json::from_str(&json).expect("valid JSON");
            let file = format!("file {}:{line}", path("shop.toml"));
            for (name, value, origin) in [
                ("database", Some(database), &*file),
                ("database-password", Some("[secret]"), origin),
                ("drain-delay", Some("0s"), "flag"),
                ("body-limit", Some("2MiB"), "default"),
                ("tls-key", None, "default"),
            ] {
                let expected: Vec<_> =
                    [name, value.unwrap_or("-")].into_iter().chain(origin.split(' ')).collect();
                assert!(words.contains(&expected), "{expected:?} is not in {text}");
                let options = json["options"].as_array().expect("an array");
                let expected = json!({"name": name, "value": value, "origin": origin});
                assert!(options.contains(&expected), "{expected} is not in {json}");
            }
            assert_eq!(json["options"].as_array().map(Vec::len), Some(words.len()));
        };
        block_on(async {
            shows("one", 1).await;
            write("# changed\ndatabase = 'two'\n");
            // Until it reloads, the process has the values with which it started.
            shows("one", 1).await;
            process.signal(Signal::HUP);
            let main = notifications.wait_for("MAINPID=").expect("a successor takes over");
            // Until then it may accept a connection.
            assert!(process.wait().expect("the old process exits").success());
            shows("two", 2).await;
            terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
        });
    }
}

#[test]
fn check_shows_a_secret_and_its_origin_but_not_its_value() {
    let (mut check, _folder) = shop(&["check", "--listen", "127.0.0.1:0"], "open-sesame");
    let (code, output, log) = run_to_end(&mut check).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    let line = output.lines().find(|line| line.starts_with("database-password "));
    let words: Vec<_> = line.expect("the option is shown").split_whitespace().collect();
    assert_eq!(words, ["database-password", "[secret]", "credential"]);
    for arguments in [&["check", "--listen", "127.0.0.1:0"][..], &["--help"], &["-h"], &["check", "--bogus"]]
    {
        let mut command = command(&example("shop"), arguments);
        let (_, output, log) =
            run_to_end(command.env("SHOP_DATABASE_PASSWORD", "open-sesame")).expect("the process ends");
        assert!(!format!("{output}{log}").contains("open-sesame"), "{output}{log}");
    }
}

#[test]
fn missing_secret_is_refused_with_the_name_of_its_credential() {
    let (code, _, log) = run_to_end(&mut command(&example("shop"), &["migrate"])).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("LoadCredential=database-password:FILE") && log.lines().count() == 1, "{log}");
}

/// systemd does not give the credentials to the process of `ExecReload=`, so the successor has those of the old process.
#[test]
fn secret_from_a_credential_lasts_over_reloads() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let address = testkit::free_address();
    let listen = address.to_string();
    let (mut service, _credentials) = shop(&["--listen", &listen], "open-sesame");
    let mut notifications = Notifications::new().expect("the socket is made");
    notifications.announce(&mut service);
    let mut service =
        Process::spawn(service.env("RUNTIME_DIRECTORY", folder.path())).expect("the service starts");
    notifications.wait_for("READY=1").expect("READY=1 is sent");
    let mut main = String::new();
    for _ in 0..2 {
        let mut takeover = command(&example("shop"), &["takeover", "--listen", &listen]);
        takeover.env("RUNTIME_DIRECTORY", folder.path()).env("NOTIFY_SOCKET", notifications.path());
        takeover.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let status =
            Process::spawn(&mut takeover).and_then(|mut process| process.wait()).expect("the process ends");
        assert!(status.success(), "{status}");
        main = notifications.wait_for("MAINPID=").expect("a successor takes over");
    }
    assert!(service.wait().expect("the process ends").success());
    block_on(async {
        let mut connection = Connection::open(&Target::Tcp(address)).await.expect("the service listens");
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").text(), "shop");
    });
    terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
}

/// The example `slow` with its command `wait`, and its log from the line on with which it begins to wait.
fn waiting(block: &[&str]) -> (Process, impl Iterator<Item = String>) {
    let mut command = command(&example("slow"), &[&["--when", "end", "wait"], block].concat());
    let mut process = Process::spawn(&mut command).expect("the command starts");
    let stderr = process.child().stderr.take().expect("the output is piped");
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(stderr)).map(|line| line.expect("valid UTF-8"));
    lines.find(|line| line.contains("waiting for the file")).expect("the command waits");
    (process, lines)
}

#[test]
fn stop_signal_cancels_a_command_of_the_service() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (mut process, lines) = waiting(&[]);
        process.signal(signal);
        let status = process.wait().expect("the process ends");
        let log: Vec<_> = lines.collect();
        assert_eq!(status.code(), Some(1), "{log:?}");
        assert_eq!(
            log.last().map(String::as_str),
            Some("slow: stopped before the file was there"),
            "{log:?}"
        );
        assert!(log.iter().any(|line| line.contains("the exit hook runs")), "{log:?}");
    }
}

#[test]
fn second_stop_signal_ends_a_command_that_blocks_at_once() {
    let (mut process, mut lines) = waiting(&["--block"]);
    process.signal(Signal::TERM);
    lines.find(|line| line.contains("received a stop signal")).expect("the signal is logged");
    process.signal(Signal::TERM);
    let status = process.wait().expect("the process ends");
    let log: Vec<_> = lines.collect();
    assert_eq!(status.code(), Some(1), "{log:?}");
    assert!(log.last().is_some_and(|line| line.contains("cut off the command")), "{log:?}");
}

#[test]
fn panic_of_a_command_of_the_service_exits_with_70() {
    let mut command = command(&example("slow"), &["--when", "end", "panic"]);
    let (code, _, log) = run_to_end(&mut command).expect("the process ends");
    assert_eq!(code, Some(70), "{log}");
    assert!(log.contains("slow: the command failed: panicked: on purpose"), "{log}");
    assert!(log.contains("WARN task \"never\" did not run"), "{log}");
}
