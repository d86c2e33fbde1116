//! What a service reports to may stop reading: journald, PID 1, the reader of a pipe, a terminal. Clients are served
//! all the while, and what could not be logged is counted.

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
    restarts_and_reloads_while_journald_is_stopped_lose_nothing
    a_journald_that_is_back_during_a_drain_has_the_end_of_the_drain
    a_stopped_pid_1_holds_up_no_request
}

const EACH_REQUEST: &str = "info,request=debug";
/// More than a restart of the kernel's or journald's buffers could explain.
const MANY: u64 = 1000;
/// Of the unit as shipped.
const WATCHDOG: Duration = Duration::from_secs(10);

/// A container whose service logs each request and says how many log messages it has dropped.
fn boot_logging_each_request(systemd: Systemd) -> Container {
    let container = boot(systemd);
    variables(&container, &[("LOG", EACH_REQUEST)]);
    container.start_socket("admin").expect("a socket");
    container.ask("/");
    container
}

fn signal_journald(container: &Container, signal: &str) {
    let signal = format!("--signal={signal}");
    let kill = ["systemctl", "kill", "--kill-whom=main", &signal, "systemd-journald.service"];
    container.run(&kill).expect("sent");
}

/// How many log messages the service has dropped.
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
    wait_until("dropped messages", || dropped(container) > 0);
    assert_nothing_lost(&running.stop());
}

fn assert_nothing_lost(report: &Report) {
    eprintln!("{report}");
    assert_eq!((report.lost(), report.connections), (0, report.asked_for), "{report}");
}

/// The entries in which the service says how many messages it has dropped.
fn reports_of_dropped(container: &Container) -> Vec<Value> {
    let mut entries = container.journal(&["-t", NAME]).expect("a journal");
    entries.retain(|entry| text(entry, "MESSAGE").contains("log messages were dropped"));
    entries
}

fn a_stopped_journald_holds_up_no_request(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let pid = container.show("MainPID").expect("a pid");
    {
        let _alone = exclusive_cpu();
        let running = Load::saturating(&Container::target()).start(container.enter());
        signal_journald(&container, "STOP");
        let begun = Instant::now();
        wait_until("many dropped messages, and more than the watchdog's time", || {
            dropped(&container) > MANY && begun.elapsed() > WATCHDOG * 8 / 5
        });
        assert_nothing_lost(&running.stop());
    }
    assert!(reported_while_stopped(&container, &pid));
    signal_journald(&container, "CONT");
    wait_until("a report", || !reports_of_dropped(&container).is_empty());
    let reports = reports_of_dropped(&container);
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(text(&reports[0], "DROPPED"), dropped(&container).to_string(), "{reports:?}");
    assert_eq!(text(&reports[0], "PRIORITY"), "4", "{reports:?}");
    // What waited says when it was logged.
    let waited = container.journal(&[&format!("_PID={pid}"), "MESSAGE=answered"]).expect("a journal");
    assert!(waited.iter().any(|entry| text(entry, "LOGGED_AT").starts_with("20")), "{:?}", waited.last());
    // What comes after it is logged as before.
    container.ask("/?after");
    wait_until("the journal has the request", || {
        let last = container.journal(&[&format!("_PID={pid}"), "MESSAGE=answered", "-n", "1"]);
        last.expect("a journal").iter().all(|entry| entry.get("LOGGED_AT").is_none())
    });
    assert_eq!(container.show("MainPID").expect("a pid"), pid);
    assert_eq!(container.show("NRestarts").expect("a count"), "0");
}

/// Whether the service manager is told of the service while journald is stopped.
fn reported_while_stopped(container: &Container, pid: &str) -> bool {
    let status = container.show("StatusText").expect("a status");
    container.show("MainPID").expect("a pid") == *pid && status.starts_with("serving on ")
}

fn restarts_and_reloads_while_journald_is_stopped_lose_nothing(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let _alone = exclusive_cpu();
    stall_journald(&container);
    let running = Load::paced(&Container::target()).start(container.enter());
    for verb in ["restart", "reload", "restart", "reload"] {
        let begun = Instant::now();
        container.systemctl(verb).unwrap_or_else(|error| panic!("a {verb}: {error:#}"));
        eprintln!("{verb}: {} ms", begun.elapsed().as_millis());
    }
    assert_nothing_lost(&running.stop());
    assert!(container.ask("/").contains("generation 5"));
    signal_journald(&container, "CONT");
    wait_until("the last process's first entry", || {
        let started = container.journal(&["MESSAGE_ID=c4c3d2f8a4e54b6d9d7b7a3c1f0e5a11", "GENERATION=5"]);
        !started.expect("a journal").is_empty()
    });
}

fn a_journald_that_is_back_during_a_drain_has_the_end_of_the_drain(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let main = container.show("MainPID").expect("a pid");
    let pid = format!("_PID={main}");
    {
        let _alone = exclusive_cpu();
        stall_journald(&container);
    }
    let entries = |id: &str| {
        let id = format!("MESSAGE_ID={id}");
        container.journal(&[&pid, &id]).expect("a journal")
    };
    container.inside(|| async {
        let mut slow = Connection::open(&Container::target()).await.expect("the port is open");
        slow.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na").await.expect("sent");
        container.until("StatusText", |status| status.contains("1 in flight"));
        container
            .run(&["systemctl", "restart", "--no-block", &container.unit("service")])
            .expect("a restart");
        container.until("StatusText", |status| status.starts_with("draining: "));
        signal_journald(&container, "CONT");
        wait_until("the beginning of the drain", || !entries("5f0f8c1e6b7a4a52b3a0d9c2e4f61b22").is_empty());
        slow.send(b"b").await.expect("sent");
        assert_eq!(slow.answer().await.expect("an answer").text(), "ab");
        // Until it ends, the old process may still answer.
        container.until("MainPID", |now| now != main && now != "0");
        let next = slow.ask(&get("/")).await.expect("the same connection goes on").text();
        assert!(next.contains("generation 2"), "{next}");
    });
    wait_until("the end of the drain", || {
        entries("a81d6e0b9c3f47d5886e2b4f7c0d9e33").iter().any(|entry| {
            let message = text(entry, "MESSAGE");
            message.starts_with("handed over 1 connections; 1 requests in flight finished, 0 cut off")
        })
    });
    assert_eq!(reports_of_dropped(&container).len(), 1);
}

fn a_stopped_pid_1_holds_up_no_request(systemd: Systemd) {
    let container = boot_logging_each_request(systemd);
    let pid = container.show("MainPID").expect("a pid");
    let _alone = exclusive_cpu();
    let running = Load::paced(&Container::target()).start(container.enter());
    container.signal_pid_1(Signal::STOP);
    ask_for(&container, WATCHDOG);
    // By now a message for the watchdog waits for PID 1, which reads it before it looks at the watchdog's time. From now
    // on it takes no message.
    fill_notify_socket(&container.path("run/systemd/notify"));
    ask_for(&container, WATCHDOG);
    container.signal_pid_1(Signal::CONT);
    let report = running.stop();
    assert_nothing_lost(&report);
    // It is told how the service is doing, as before.
    let answered =
        |status: &str| status.split(", ").last().and_then(|count| count.split(' ').next()?.parse().ok());
    container
        .until("StatusText", |status| answered(status).is_some_and(|count: u64| count >= report.answered));
    assert_eq!(container.show("MainPID").expect("a pid"), pid);
    assert_eq!(container.show("NRestarts").expect("a count"), "0");
}

/// On cgroups of version 2, which this machine need not have.
#[test]
fn a_service_that_is_frozen_for_longer_than_the_watchdog_allows_goes_on_with_its_connections() {
    let container = boot(Systemd::V257);
    let service = container.unit("service");
    container.inside(|| async {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        let before = idle.ask(&get("/")).await.expect("an answer").text();
        let mut busy = Connection::open(&Container::target()).await.expect("the port is open");
        busy.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na").await.expect("sent");
        container.until("StatusText", |status| status.contains("1 in flight"));
        container.run(&["systemctl", "freeze", &service]).expect("frozen");
        std::thread::sleep(WATCHDOG * 2);
        assert_eq!(container.show("FreezerState").expect("a state"), "frozen");
        container.run(&["systemctl", "thaw", &service]).expect("thawed");
        busy.send(b"b").await.expect("sent");
        assert_eq!(busy.answer().await.expect("an answer").text(), "ab");
        assert_eq!(idle.ask(&get("/")).await.expect("an answer").text(), before);
    });
    assert_eq!(container.show("NRestarts").expect("a count"), "0");
}

/// Asks again and again for a while; each request is answered.
fn ask_for(container: &Container, time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        assert!(container.ask("/").starts_with("pid "));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Fills the socket that a service manager reads messages from.
fn fill_notify_socket(path: &Path) {
    // No more than the kernel lets wait there (net.unix.max_dgram_qlen).
    for _ in 0..100_000 {
        // A socket for each, because a sender has a limit of its own.
        let socket = UnixDatagram::unbound().expect("a socket");
        socket.set_nonblocking(true).expect("set");
        if socket.send_to(b"STATUS=not of this service", path).is_err() {
            return;
        }
    }
    panic!("{} does not fill", path.display());
}

#[test]
fn a_service_manager_that_never_reads_holds_up_neither_requests_nor_the_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("notify");
    let _unread = UnixDatagram::bind(&path).expect("a socket");
    fill_notify_socket(&path);
    let address = testkit::free_address();
    let mut command = command(app_binary(), &["--listen", &address.to_string()]);
    let mut process = Process::spawn(command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "100000"));
    let process = process.as_mut().expect("a service");
    wait_until("it listens", || TcpStream::connect(address).is_ok());
    block_on(async {
        let mut connection = Connection::open(&Target::Tcp(address)).await.expect("it listens");
        // Longer than a status line and the watchdog have to be sent again and again.
        for _ in 0..40 {
            connection.ask(&get("/sleep?duration=100ms")).await.expect("an answer");
        }
        let request = b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n";
        connection.send(request).await.expect("sent");
        assert_eq!(connection.head().await.expect("it is in flight").status, 100);
        process.signal(Signal::TERM);
        connection.send(b"a").await.expect("sent");
        assert_eq!(connection.answer().await.expect("an answer").text(), "a");
    });
    assert!(process.wait().expect("an end").success());
}

/// Serves requests, each of which is logged to a standard error that is not read, until messages are dropped; gives
/// their number.
fn drop_messages(http: &Target, admin: &Target) -> u64 {
    let _alone = exclusive_cpu();
    let running = Load::saturating(http).start(|| ());
    wait_until("dropped messages", || metrics_of(admin) > MANY);
    assert_nothing_lost(&running.stop());
    metrics_of(admin)
}

fn metrics_of(admin: &Target) -> u64 {
    block_on(async {
        let mut connection = Connection::open(admin).await.expect("it listens");
        count_of_dropped(&connection.ask(&get("/metrics")).await.expect("an answer").text())
    })
}

#[test]
fn a_pipe_that_is_never_read_holds_up_neither_requests_nor_the_end() {
    let mut service = TlsService::start(app_binary(), &["--log", EACH_REQUEST]).expect("a service");
    drop_messages(&Target::Tcp(service.http), &service.admin());
    service.terminate().expect("it ends");
    assert!(service.process.wait().expect("an end").success());
}

#[test]
fn a_pipe_that_is_read_late_has_whole_lines_and_the_number_of_those_dropped() {
    let mut service = TlsService::start(app_binary(), &["--log", EACH_REQUEST]).expect("a service");
    drop_messages(&Target::Tcp(service.http), &service.admin());
    let stderr = service.process.child().stderr.take().expect("piped");
    let mut lines = BufReader::new(stderr).lines().map(|line| line.expect("text"));
    let mut read = Vec::new();
    let report = loop {
        let line = lines.next().expect("it runs");
        if line.contains("log messages were dropped") {
            break line;
        }
        read.push(line);
    };
    let dropped = metrics_of(&service.admin());
    assert!(report.contains(&format!(" {dropped} log messages were dropped")), "{dropped}: {report}");
    service.terminate().expect("it ends");
    let rest: Vec<_> = lines.collect();
    assert!(service.process.wait().expect("an end").success());
    let last = rest.last().expect("lines");
    assert!(last.contains("handed over 0 connections"), "{last}");
    assert!(!rest.iter().any(|line| line.contains("were dropped")), "one report: {rest:?}");
    // Not always the first: requests are served from READY=1 on, just before it.
    assert!(read.iter().any(|line| line.contains("serving on ")), "{:?}", read.first());
    // A line that was cut would have another's beginning inside it, or no level.
    for line in read.iter().chain(&rest) {
        assert_eq!(line.matches("Z  INFO ").count() + line.matches("Z DEBUG ").count(), 1, "{line:?}");
    }
}

#[test]
fn a_start_that_fails_ends_where_its_standard_error_is_not_read() {
    let (_unread, full) = full_pipe();
    let mut command = command(app_binary(), &["--idle-timeout", "soon"]);
    let mut process = Process::spawn(command.stderr(full)).expect("a process");
    assert_eq!(process.wait().expect("an end").code(), Some(78));
}

/// A pipe into which nothing fits.
fn full_pipe() -> (std::io::PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("set");
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("set");
    (reader, writer)
}

#[test]
fn the_last_line_of_a_start_that_fails_is_written_to_a_non_blocking_pipe() {
    // Each pipe end inherits it: a parent that reads and writes without waiting.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("set");
    let mut command = command(app_binary(), &["--idle-timeout", "soon"]);
    let mut process = Process::spawn(command.stderr(writer)).expect("a process");
    drop(command);
    assert_eq!(process.wait().expect("an end").code(), Some(78));
    let said = std::io::read_to_string(reader).expect("text");
    assert!(said.starts_with(&format!("{NAME}: invalid value 'soon' for '--idle-timeout")), "{said}");
}

const CTRL_S: &[u8] = b"\x13";
const CTRL_Q: &[u8] = b"\x11";

#[test]
fn a_stopped_terminal_holds_up_no_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let address = testkit::free_address();
    let admin = folder.path().join("admin.sock");
    // script(1) gives it a terminal; where that ends early, the service ends too.
    let run = format!(
        "exec setpriv --pdeathsig KILL {} --log {EACH_REQUEST} --listen {address} --listen admin={}",
        app_binary(),
        admin.display()
    );
    let mut script = command("script", &["--quiet", "--return", "--command", &run, "/dev/null"]);
    let mut process = Process::spawn(script.stdin(Stdio::piped())).expect("script(1)");
    let mut keys: ChildStdin = process.child().stdin.take().expect("piped");
    let shown = BufReader::new(process.child().stdout.take().expect("piped"));
    let mut shown = shown.lines().map(|line| line.expect("text"));
    assert!(shown.any(|line| line.contains("serving on ")));
    let (http, admin) = (Target::Tcp(address), Target::Unix(admin));
    keys.write_all(CTRL_S).expect("typed");
    drop_messages(&http, &admin);
    keys.write_all(CTRL_Q).expect("typed");
    let report = shown.find(|line| line.contains("log messages were dropped")).expect("a report");
    assert!(report.contains(&format!(" {} log messages", metrics_of(&admin))), "{report}");
    let pid = block_on(async {
        let mut connection = Connection::open(&http).await.expect("it listens");
        connection.ask(&get("/")).await.expect("an answer").text()
    });
    let pid = pid.trim_start_matches("pid ").split(',').next().expect("a pid");
    terminate(pid).expect("it runs");
    assert!(shown.any(|line| line.contains("handed over 0 connections")));
    assert!(process.wait().expect("an end").success());
}
