//! The reader of logs and notifications may stop reading: journald, PID 1, the reader of a pipe, a terminal. The
//! service keeps answering, and counts the log messages that it drops.

use std::io::{BufRead, BufReader, PipeWriter, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::{Load, Report};
use testkit::process::{Process, terminate};
use testkit::service::command;
use testkit::tls_service::TlsService;
use testkit::{block_on, exclusive_cpu, on_each_systemd, wait_until};

use crate::on_systemd::{ask_admin, boot, text, variables};
use crate::{NAME, app_binary};

on_each_systemd! {
    a_stopped_journald_holds_up_no_request
    restarts_and_reloads_while_journald_is_stopped_lose_no_request
    drain_report_is_logged_if_journald_resumes_during_the_drain
    a_stopped_pid_1_delays_no_request
}

const EACH_REQUEST: &str = "info,request=debug";
/// More dropped messages than a restart of journald or a short congestion of its socket would explain.
const MANY: u64 = 1000;
/// `WatchdogSec=` of the unit as shipped.
const WATCHDOG: Duration = Duration::from_secs(10);

/// A container whose service logs each request, and exports on the admin socket how many log messages it has dropped.
fn boot_logging_each_request(systemd: Systemd) -> Container {
    let container = boot(systemd);
    variables(&container, &[("LOG", EACH_REQUEST)]);
    container.start_socket("admin").expect("the socket unit starts");
    container.ask("/");
    container
}

fn signal_journald(container: &Container, signal: &str) {
    let signal = format!("--signal={signal}");
    let kill = ["systemctl", "kill", "--kill-whom=main", &signal, "systemd-journald.service"];
    container.run(&kill).expect("the signal is sent");
}

/// The number of log messages that the service has dropped.
fn dropped(container: &Container) -> u64 {
    count_of_dropped(&ask_admin(container, "/metrics"))
}

fn count_of_dropped(metrics: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix("outlive_log_messages_dropped_total "));
    line.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no count in {metrics:?}"))
}

/// Stops journald, and waits until the service drops messages under a load.
fn stall_journald(container: &Container) {
    signal_journald(container, "STOP");
    let running = Load::saturating(&Container::target()).start(container.enter());
    wait_until("the service drops messages", || dropped(container) > 0);
    assert_nothing_lost(&running.stop());
}

fn assert_nothing_lost(report: &Report) {
    eprintln!("{report}");
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
}

/// The journal entries with which the service reports how many messages it has dropped.
fn reports_of_dropped(container: &Container) -> Vec<Value> {
    let mut entries = container.journal(&["-t", NAME]).expect("journalctl succeeds");
    entries.retain(|entry| text(entry, "MESSAGE").contains("log messages were dropped"));
    entries
}

fn a_stopped_journald_holds_up_no_request(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let pid = container.show("MainPID").expect("systemctl show succeeds");
    {
        let _alone = exclusive_cpu();
        let running = Load::saturating(&Container::target()).start(container.enter());
        signal_journald(&container, "STOP");
        let begun = Instant::now();
        wait_until("the service drops many messages, for longer than WatchdogSec=", || {
            dropped(&container) > MANY && begun.elapsed() > WATCHDOG * 8 / 5
        });
        assert_nothing_lost(&running.stop());
    }
    assert!(reported_while_stopped(&container, &pid));
    signal_journald(&container, "CONT");
    wait_until("the drops are reported", || !reports_of_dropped(&container).is_empty());
    let reports = reports_of_dropped(&container);
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(text(&reports[0], "DROPPED"), dropped(&container).to_string(), "{reports:?}");
    assert_eq!(text(&reports[0], "PRIORITY"), "4", "{reports:?}");
    // Entries that waited in the queue have the time at which they were logged.
    let waited =
        container.journal(&[&format!("_PID={pid}"), "MESSAGE=answered"]).expect("journalctl succeeds");
    assert!(waited.iter().any(|entry| text(entry, "LOGGED_AT").starts_with("20")), "{:?}", waited.last());
    // Later requests are logged without delay again, so without that field.
    container.ask("/?after");
    wait_until("the request is in the journal", || {
        let last = container.journal(&[&format!("_PID={pid}"), "MESSAGE=answered", "-n", "1"]);
        last.expect("journalctl succeeds").iter().all(|entry| entry.get("LOGGED_AT").is_none())
    });
    assert_eq!(container.show("MainPID").expect("systemctl show succeeds"), pid);
    assert_eq!(container.show("NRestarts").expect("systemctl show succeeds"), "0");
}

/// Whether systemd receives the status of the service while journald is stopped.
fn reported_while_stopped(container: &Container, pid: &str) -> bool {
    let status = container.show("StatusText").expect("systemctl show succeeds");
    container.show("MainPID").expect("systemctl show succeeds") == *pid && status.starts_with("serving on ")
}

fn restarts_and_reloads_while_journald_is_stopped_lose_no_request(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let _alone = exclusive_cpu();
    stall_journald(&container);
    let running = Load::paced(&Container::target()).start(container.enter());
    for verb in ["restart", "reload", "restart", "reload"] {
        let begun = Instant::now();
        container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
        eprintln!("{verb}: {} ms", begun.elapsed().as_millis());
    }
    assert_nothing_lost(&running.stop());
    assert!(container.ask("/").contains("generation 5"));
    signal_journald(&container, "CONT");
    wait_until("the last process logs that it serves", || {
        let started = container.journal(&["MESSAGE_ID=c4c3d2f8a4e54b6d9d7b7a3c1f0e5a11", "GENERATION=5"]);
        !started.expect("journalctl succeeds").is_empty()
    });
}

fn drain_report_is_logged_if_journald_resumes_during_the_drain(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let main = container.show("MainPID").expect("systemctl show succeeds");
    let pid = format!("_PID={main}");
    {
        let _alone = exclusive_cpu();
        stall_journald(&container);
    }
    let entries = |id: &str| {
        let id = format!("MESSAGE_ID={id}");
        container.journal(&[&pid, &id]).expect("journalctl succeeds")
    };
    container.inside(|| async {
        let mut slow = Connection::open(&Container::target()).await.expect("the port is open");
        slow.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na")
            .await
            .expect("the bytes are sent");
        container.wait_for_property("StatusText", |status| status.contains("1 in flight"));
        container
            .run(&["systemctl", "restart", "--no-block", &container.unit("service")])
            .expect("the restart succeeds");
        container.wait_for_property("StatusText", |status| status.starts_with("draining: "));
        signal_journald(&container, "CONT");
        wait_until("the drain is logged", || !entries("5f0f8c1e6b7a4a52b3a0d9c2e4f61b22").is_empty());
        slow.send(b"b").await.expect("the bytes are sent");
        assert_eq!(slow.answer().await.expect("the request is answered").text(), "ab");
        // The old process can still answer until it exits.
        container.wait_for_property("MainPID", |now| now != main && now != "0");
        let next = slow.ask(&get("/")).await.expect("the connection is still open").text();
        assert!(next.contains("generation 2"), "{next}");
    });
    wait_until("the end of the drain is logged", || {
        entries("a81d6e0b9c3f47d5886e2b4f7c0d9e33").iter().any(|entry| {
            let message = text(entry, "MESSAGE");
            message.starts_with("handed over 1 connection; 1 request in flight finished, 0 cut off")
        })
    });
    assert_eq!(reports_of_dropped(&container).len(), 1);
}

fn a_stopped_pid_1_delays_no_request(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let pid = container.show("MainPID").expect("systemctl show succeeds");
    let _alone = exclusive_cpu();
    let running = Load::paced(&Container::target()).start(container.enter());
    container.signal_pid_1(Signal::STOP);
    ask_for(&container, WATCHDOG);
    // By now a WATCHDOG=1 waits for PID 1, which reads it before it checks the watchdog when it continues. From here on
    // the socket is full, so further messages fail.
    fill_notify_socket(&container.path("run/systemd/notify"));
    ask_for(&container, WATCHDOG);
    container.signal_pid_1(Signal::CONT);
    let report = running.stop();
    assert_nothing_lost(&report);
    // The status is current again.
    let answered =
        |status: &str| status.split(", ").last().and_then(|count| count.split(' ').next()?.parse().ok());
    container.wait_for_property("StatusText", |status| {
        answered(status).is_some_and(|count: u64| count >= report.answered)
    });
    assert_eq!(container.show("MainPID").expect("systemctl show succeeds"), pid);
    assert_eq!(container.show("NRestarts").expect("systemctl show succeeds"), "0");
}

/// Only on systemd 257, because freezing needs cgroups of version 2, which this machine need not have.
#[test]
fn service_frozen_longer_than_the_watchdog_time_keeps_its_connections() {
    let container = boot(Systemd::V257);
    let service = container.unit("service");
    container.inside(|| async {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        let before = idle.ask(&get("/")).await.expect("the request is answered").text();
        let mut busy = Connection::open(&Container::target()).await.expect("the port is open");
        busy.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na")
            .await
            .expect("the bytes are sent");
        container.wait_for_property("StatusText", |status| status.contains("1 in flight"));
        container.run(&["systemctl", "freeze", &service]).expect("the service is frozen");
        std::thread::sleep(WATCHDOG * 2);
        assert_eq!(container.show("FreezerState").expect("systemctl show succeeds"), "frozen");
        container.run(&["systemctl", "thaw", &service]).expect("the service is thawed");
        busy.send(b"b").await.expect("the bytes are sent");
        assert_eq!(busy.answer().await.expect("the request is answered").text(), "ab");
        assert_eq!(idle.ask(&get("/")).await.expect("the request is answered").text(), before);
    });
    assert_eq!(container.show("NRestarts").expect("systemctl show succeeds"), "0");
}

/// Sends requests for `time`; each has to be answered.
fn ask_for(container: &Container, time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        assert!(container.ask("/").starts_with("pid "));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Fills the socket on which a service manager receives notifications.
fn fill_notify_socket(path: &Path) {
    // Far above the number of messages that the kernel queues there (net.unix.max_dgram_qlen).
    for _ in 0..100_000 {
        // A new socket for each message, because the send buffer of one socket is limited too.
        let socket = UnixDatagram::unbound().expect("the socket is created");
        socket.set_nonblocking(true).expect("the socket is made non-blocking");
        if socket.send_to(b"STATUS=not of this service", path).is_err() {
            return;
        }
    }
    panic!("{} accepts any number of messages", path.display());
}

#[test]
fn unread_notify_socket_delays_neither_requests_nor_the_exit() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let path = folder.path().join("notify");
    let _unread = UnixDatagram::bind(&path).expect("the socket is created");
    fill_notify_socket(&path);
    let address = testkit::free_address();
    let mut command = command(app_binary(), &["--listen", &address.to_string()]);
    let mut process = Process::spawn(command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "100000"));
    let process = process.as_mut().expect("the service starts");
    wait_until("the service listens", || TcpStream::connect(address).is_ok());
    block_on(async {
        let mut connection = Connection::open(&Target::Tcp(address)).await.expect("the service listens");
        // Long enough that the status and WATCHDOG=1 are due many times.
        for _ in 0..40 {
            connection.ask(&get("/sleep?duration=100ms")).await.expect("the request is answered");
        }
        let request = b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n";
        connection.send(request).await.expect("the bytes are sent");
        assert_eq!(connection.head().await.expect("the request is in flight").status, 100);
        process.signal(Signal::TERM);
        connection.send(b"a").await.expect("the bytes are sent");
        assert_eq!(connection.answer().await.expect("the request is answered").text(), "a");
    });
    assert!(process.wait().expect("the process ends").success());
}

/// Sends requests to a service whose log is not read until it drops messages; returns the number of dropped ones.
fn drop_messages(http: &Target, admin: &Target) -> u64 {
    let _alone = exclusive_cpu();
    let running = Load::saturating(http).start(|| ());
    wait_until("the service drops messages", || dropped_of(admin) > MANY);
    assert_nothing_lost(&running.stop());
    dropped_of(admin)
}

fn dropped_of(admin: &Target) -> u64 {
    block_on(async {
        let mut connection = Connection::open(admin).await.expect("the service listens");
        count_of_dropped(&connection.ask(&get("/metrics")).await.expect("the request is answered").text())
    })
}

#[test]
fn unread_stderr_pipe_delays_neither_requests_nor_the_exit() {
    let mut service = TlsService::start(app_binary(), &["--log", EACH_REQUEST]).expect("the service starts");
    drop_messages(&Target::Tcp(service.http), &service.admin());
    service.terminate().expect("the drain begins");
    assert!(service.process.wait().expect("the process ends").success());
}

#[test]
fn stderr_pipe_read_late_has_complete_lines_and_the_number_of_dropped_ones() {
    let mut service = TlsService::start(app_binary(), &["--log", EACH_REQUEST]).expect("the service starts");
    drop_messages(&Target::Tcp(service.http), &service.admin());
    let stderr = service.process.child().stderr.take().expect("the stream is piped");
    let mut lines = BufReader::new(stderr).lines().map(|line| line.expect("the text is UTF-8"));
    let mut read = Vec::new();
    let report = loop {
        let line = lines.next().expect("the process runs");
        if line.contains("log messages were dropped") {
            break line;
        }
        read.push(line);
    };
    let dropped = dropped_of(&service.admin());
    assert!(report.contains(&format!(" {dropped} log messages were dropped")), "{dropped}: {report}");
    service.terminate().expect("the drain begins");
    let rest: Vec<_> = lines.collect();
    assert!(service.process.wait().expect("the process ends").success());
    let last = rest.last().expect("the log has lines");
    assert!(last.contains("handed over 0 connections"), "{last}");
    assert!(
        !rest.iter().any(|line| line.contains("were dropped")),
        "the drops were reported twice: {rest:?}"
    );
    // It need not be the first line, because requests are served from just before READY=1.
    assert!(read.iter().any(|line| line.contains("serving on ")), "{:?}", read.first());
    // A truncated line would contain the beginning of another one, or no level.
    for line in read.iter().chain(&rest) {
        assert_eq!(line.matches("Z  INFO ").count() + line.matches("Z DEBUG ").count(), 1, "{line:?}");
    }
}

#[test]
fn failed_start_exits_while_its_stderr_pipe_is_full() {
    let (_unread, full) = full_pipe();
    let mut command = command(app_binary(), &["--idle-timeout", "soon"]);
    let mut process = Process::spawn(command.stderr(full)).expect("the process starts");
    assert_eq!(process.wait().expect("the process ends").code(), Some(78));
}

/// A pipe whose buffer is full.
fn full_pipe() -> (std::io::PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("the pipe is created");
    rustix::io::ioctl_fionbio(&writer, true).expect("the ioctl succeeds");
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("the ioctl succeeds");
    (reader, writer)
}

#[test]
fn failed_start_writes_its_error_to_a_non_blocking_pipe() {
    // O_NONBLOCK belongs to the open file, so the process inherits it from a parent that uses non-blocking IO.
    let (reader, writer) = std::io::pipe().expect("the pipe is created");
    rustix::io::ioctl_fionbio(&writer, true).expect("the ioctl succeeds");
    let mut command = command(app_binary(), &["--idle-timeout", "soon"]);
    let mut process = Process::spawn(command.stderr(writer)).expect("the process starts");
    drop(command);
    assert_eq!(process.wait().expect("the process ends").code(), Some(78));
    let error = std::io::read_to_string(reader).expect("the file is readable");
    assert!(error.starts_with(&format!("{NAME}: invalid value 'soon' for '--idle-timeout")), "{error}");
}

const CTRL_S: &[u8] = b"\x13";
const CTRL_Q: &[u8] = b"\x11";

#[test]
fn stopped_terminal_delays_no_request() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let address = testkit::free_address();
    let admin = folder.path().join("admin.sock");
    // script(1) gives the service a terminal. setpriv ends the service if script ends early.
    let run = format!(
        "exec setpriv --pdeathsig KILL {} --log {EACH_REQUEST} --listen {address} --listen admin={}",
        app_binary(),
        admin.display()
    );
    let mut script = command("script", &["--quiet", "--return", "--command", &run, "/dev/null"]);
    let mut process = Process::spawn(script.stdin(Stdio::piped())).expect("script(1) starts");
    let mut keys: ChildStdin = process.child().stdin.take().expect("the stream is piped");
    let shown = BufReader::new(process.child().stdout.take().expect("the stream is piped"));
    let mut shown = shown.lines().map(|line| line.expect("the text is UTF-8"));
    assert!(shown.any(|line| line.contains("serving on ")));
    let (http, admin) = (Target::Tcp(address), Target::Unix(admin));
    keys.write_all(CTRL_S).expect("the key is sent");
    drop_messages(&http, &admin);
    keys.write_all(CTRL_Q).expect("the key is sent");
    let report = shown.find(|line| line.contains("log messages were dropped")).expect("the report is logged");
    assert!(report.contains(&format!(" {} log messages", dropped_of(&admin))), "{report}");
    let pid = block_on(async {
        let mut connection = Connection::open(&http).await.expect("the service listens");
        connection.ask(&get("/")).await.expect("the request is answered").text()
    });
    let pid = pid.trim_start_matches("pid ").split(',').next().expect("the value is a pid");
    terminate(pid).expect("the process runs");
    assert!(shown.any(|line| line.contains("handed over 0 connections")));
    assert!(process.wait().expect("the process ends").success());
}
