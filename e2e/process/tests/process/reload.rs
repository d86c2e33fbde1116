//! Reloads without systemd. The tests use a real successor, a real successor whose messages they delay (`Delayed`), or
//! they play the successor themselves on the takeover socket, with valid and invalid messages.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv,
    shutdown, socket_with, socketpair,
};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, kill_process, pidfd_open, prlimit,
};
use tempfile::TempDir;
use testkit::certificate::Certificate;
use testkit::client::{Connection, Target, get};
use testkit::events::EventStream;
use testkit::frames::{
    self, ACCEPTING, COMMIT, GO, HELLO, LISTENERS, MAIN, READY, REFUSED, connect_takeover_socket, frame,
    recv_message,
};
use testkit::load::Load;
use testkit::process::Process;
use testkit::service::{Service, command, run_to_end};
use testkit::{TEST_TIMEOUT, block_on, wait_until};

use crate::app_binary;

fn start(flags: &[&str]) -> (Service, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let service = Service::start_in(app_binary(), flags, folder.path()).expect("the service starts");
    (service, folder)
}

/// Runs the takeover command as ExecReload= does. Returns its exit code, and what it and the successor wrote to
/// standard error.
pub fn reload(folder: &Path, notifications: &Path, flags: &[&str]) -> (Option<i32>, String) {
    // A file and not a pipe, because the successor inherits standard error and would keep a pipe open.
    let mut log = tempfile::NamedTempFile::new().expect("a temporary file is made");
    let mut command = command(app_binary(), &[&["takeover"], flags].concat());
    command.env("RUNTIME_DIRECTORY", folder).env("NOTIFY_SOCKET", notifications);
    command.stderr(log.reopen().expect("the file opens"));
    let status =
        Process::spawn(&mut command).and_then(|mut process| process.wait()).expect("the process ends");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut log, &mut text).expect("valid UTF-8");
    (status.code(), text)
}

/// Sends a request, and returns the pid and the generation of the process that answers.
pub async fn process_on(connection: &mut Connection) -> (i32, u64) {
    let answer = connection.ask(&get("/")).await.expect("the server answers");
    assert!(!answer.closes(), "the response has Connection: close");
    let text = answer.text();
    let number = |after: &str| {
        let rest = text.split(after).nth(1).expect("a valid number");
        rest.split(|c: char| !c.is_ascii_digit()).next().expect("a valid number").to_owned()
    };
    (
        number("pid ").parse().expect("a valid pid"),
        number("generation ").parse().expect("the response names a generation"),
    )
}

/// Sends requests until a process of this generation answers, and returns its pid. After a reload the old process answers
/// the requests that arrive before it has handed the connection over.
pub async fn pid_of_generation(connection: &mut Connection, wanted: u64) -> i32 {
    loop {
        let (pid, generation) = process_on(connection).await;
        if generation == wanted {
            return pid;
        }
        assert!(generation < wanted, "pid {pid}, generation {generation}");
    }
}

/// Kills a successor. The test cannot wait for it, because it is not a child of the test.
pub fn end(pid: i32) {
    kill_process(Pid::from_raw(pid).expect("a valid pid"), Signal::KILL).expect("the process runs");
}

/// As [`end`], and waits until all its threads have ended, so that its files are closed.
fn end_whole(pid: i32) {
    let process = Pid::from_raw(pid).expect("a valid pid");
    let process = pidfd_open(process, PidfdFlags::empty()).expect("the process runs");
    end(pid);
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
    assert_eq!(ended, Ok(1), "the process has not ended");
}

#[test]
fn a_successor_takes_over_listeners_and_connections_and_the_old_process_exits() {
    let (mut service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut idle = service.connect().await;
        let mut slow = service.connect().await;
        assert_eq!(process_on(&mut idle).await, (service.pid(), 1));
        slow.hold().await.expect("the request is in flight");
        // The reload must not wait for the slow request, which ends only at `release` below.
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        let pid = pid_of_generation(&mut idle, 2).await;
        assert_ne!(pid, service.pid());
        assert_eq!(pid_of_generation(&mut service.connect().await, 2).await, pid);
        slow.release().await.expect("the request finishes");
        assert_eq!(pid_of_generation(&mut slow, 2).await, pid);
        let before = service.notifications.lines().len();
        service.notifications.wait_for(&format!("MAINPID={pid}")).expect("MAINPID= is sent");
        let sent = service.notifications.lines()[before..].to_vec();
        let at = |prefix: &str| sent.iter().position(|line| line.starts_with(prefix));
        assert!(
            at("RELOADING=1") < at("MONOTONIC_USEC=") && at("MONOTONIC_USEC=") < at("MAINPID="),
            "{sent:?}"
        );
        service.notifications.wait_for("BARRIER=1").expect("BARRIER=1 is sent");
        let (status, log) = service.end().expect("the process ends");
        assert!(
            status.success() && log.contains("handed over 2 connections; 1 request in flight finished"),
            "{log}"
        );
        end(pid);
    });
}

/// Without a service manager no signal follows, so nothing but the drain limit ends the old process.
#[test]
fn an_old_process_whose_successor_is_killed_finishes_its_requests_and_closes_their_connections_after_another_one()
 {
    let (service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut moved = service.connect().await;
        let mut held = [service.connect().await, service.connect().await];
        for connection in &mut held {
            connection.hold().await.expect("the request is in flight");
        }
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        let pid = pid_of_generation(&mut moved, 2).await;
        end_whole(pid);
        assert_eq!(moved.read_more().await.unwrap_or(0), 0, "the connection of the successor is closed");
        for connection in &mut held {
            connection.release().await.expect("the request finishes");
            let next = connection.ask(&get("/")).await.expect("the request is answered");
            assert!(next.closes() && next.text().contains("generation 1"));
        }
        let (status, log) = service.end().expect("the process ends");
        assert!(status.success() && log.contains("because the successor has exited"), "{log}");
        assert!(log.contains("2 requests in flight finished, 0 cut off"), "{log}");
    });
}

/// What handlers print would otherwise be lost after the first reload.
#[test]
fn a_successor_has_the_standard_output_of_its_predecessor() {
    let (service, folder) = start(&[]);
    let stdout = |pid: i32| std::fs::read_link(format!("/proc/{pid}/fd/1")).expect("the process runs");
    let expected = stdout(service.pid());
    block_on(async {
        let mut connection = service.connect().await;
        for generation in 2..=3 {
            let (code, log) = reload(folder.path(), &service.notifications.path(), &[]);
            assert_eq!(code, Some(0), "{log}");
            let pid = pid_of_generation(&mut connection, generation).await;
            assert_eq!(stdout(pid), expected);
            if generation == 3 {
                end(pid);
            }
        }
    });
}

#[test]
fn a_connection_survives_four_reloads() {
    let (service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        let mut pids = vec![process_on(&mut connection).await.0];
        for generation in 2..=5 {
            let (code, log) = reload(folder.path(), &path, &[]);
            assert_eq!(code, Some(0), "{log}");
            let pid = pid_of_generation(&mut connection, generation).await;
            assert!(!pids.contains(&pid), "pid {pid}, generation {generation}");
            pids.push(pid);
        }
        end(*pids.last().expect("at least one pid"));
    });
}

/// The event stream moves, so it counts in the new process. The request that is held stays in the old process, and counts
/// there only.
#[test]
fn requests_are_limited_in_both_processes_of_a_reload_and_a_stream_that_moves_is_not_refused() {
    let limit = ["--max-requests", "2"];
    let (mut service, folder) = start(&limit);
    let path = service.notifications.path();
    block_on(async {
        let mut other = service.connect().await;
        let mut status = async || other.ask(&get("/")).await.expect("the server answers").status;
        let mut events = EventStream::http1(&service.target).await.expect("the stream opens");
        events.next().await.expect("no error").expect("an event");
        let mut held = service.connect().await;
        held.hold().await.expect("the request is in flight");
        assert_eq!(status().await, 503);
        let (code, log) = reload(folder.path(), &path, &limit);
        assert_eq!(code, Some(0), "{log}");
        // The stream counts in the new process from when it has moved, and the held request never does.
        // The old process may still have accepted the first connection after the reload.
        let mut held_by_new = loop {
            let mut connection = service.connect().await;
            let answer = connection.ask(&get("/")).await.expect("a process answers");
            if answer.status == 200 && answer.text().contains("generation 2") {
                break connection;
            }
        };
        held_by_new.hold().await.expect("below the limit of the new process");
        while status().await != 503 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        events.next().await.expect("no error").expect("an event of the new process");
        held.release().await.expect("the old process finishes its request");
        held_by_new.release().await.expect("the new process finishes its request");
        while status().await == 503 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let main = service.notifications.wait_for("MAINPID=").expect("MAINPID= is sent");
        end(main.trim_start_matches("MAINPID=").parse().expect("a valid pid"));
    });
}

/// Starts a service that binds a Unix socket itself (--listen), and waits until it answers.
fn listen_at(path: &Path, flags: &[&str], log: Stdio) -> (Process, Target) {
    let listen = ["--listen", path.to_str().expect("the path is valid UTF-8")];
    let mut command = command(app_binary(), &[&listen, flags].concat());
    let process = Process::spawn(command.stderr(log)).expect("the service starts");
    wait_until("it listens", || UnixStream::connect(path).is_ok());
    let target = Target::Unix(path.to_owned());
    // Listening is not enough: the service binds the socket before its start is complete.
    block_on(async { process_on(&mut Connection::open(&target).await.expect("the service listens")).await });
    (process, target)
}

#[test]
fn a_failed_reload_keeps_the_socket_file_of_the_old_process() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("http.sock");
    let certificate = Certificate::new().expect("the certificate is made");
    let https = format!("https={}", testkit::free_address());
    let [chain, key] = [certificate.chain(), certificate.key()].map(|file| file.display().to_string());
    let flags = ["--listen", &https, "--tls-cert", &chain, "--tls-key", &key];
    let log = tempfile::NamedTempFile::new().expect("a temporary file is made");
    let (mut process, target) = listen_at(&path, &flags, log.reopen().expect("the file opens").into());
    std::fs::remove_file(&key).expect("the file is removed");
    let count = |what: &str| std::fs::read_to_string(log.path()).expect("valid UTF-8").matches(what).count();
    for failed in 1..=2 {
        process.signal(Signal::HUP);
        wait_until("the successor fails", || count("reload failed: ") == failed);
        block_on(async {
            let mut connection = Connection::open(&target).await.expect("the socket file accepts");
            assert_eq!(process_on(&mut connection).await, (process.pid().as_raw_nonzero().get(), 1));
        });
    }
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
    assert!(!path.exists());
}

#[test]
fn reloads_on_a_bound_path_refuse_no_connection_and_the_last_process_removes_the_file() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("http.sock");
    let (mut first, target) = listen_at(&path, &[], Stdio::null());
    let running = Load::connection_per_request(&target).start(|| {});
    let answers = || {
        block_on(async {
            process_on(&mut Connection::open(&target).await.expect("the service listens")).await
        })
    };
    let mut pid = answers().0;
    for generation in 2..=10 {
        kill_process(Pid::from_raw(pid).expect("a valid pid"), Signal::HUP).expect("the process runs");
        // Pid and generation come from one response, because for a moment both processes accept connections.
        wait_until("the next process", || {
            let (current_pid, current_generation) = answers();
            pid = current_pid;
            current_generation == generation
        });
    }
    let report = running.stop();
    kill_process(Pid::from_raw(pid).expect("a valid pid"), Signal::TERM).expect("the process runs");
    wait_until("the file is removed", || !path.exists());
    assert!(first.wait().expect("the process ends").success());
    assert!(report.lost() == 0 && report.answered > 9, "{report}");
}

#[test]
fn sighup_reloads_without_systemd_and_keeps_the_socket_file() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let path = folder.path().join("http.sock");
    let (mut process, target) = listen_at(&path, &[], Stdio::null());
    block_on(async {
        let mut connection = Connection::open(&target).await.expect("the connection opens");
        let (first, _) = process_on(&mut connection).await;
        process.signal(Signal::HUP);
        assert!(process.wait().expect("the process ends").success());
        let (second, generation) = process_on(&mut connection).await;
        assert!(second != first && generation == 2);
        assert!(path.exists(), "the socket file must stay for the successor");
        let mut fresh = Connection::open(&target).await.expect("the connection opens");
        assert_eq!(process_on(&mut fresh).await, (second, 2));
        // The successor inherited the duty to remove the socket file, and removes it when it exits.
        kill_process(Pid::from_raw(second).expect("a valid pid"), Signal::TERM).expect("the process runs");
        fresh.ask(&get("/")).await.expect("the server answers once more");
        connection.ask(&get("/")).await.expect("the server answers once more");
        wait_until("the file is removed", || !path.exists());
    });
}

#[test]
fn a_reload_of_the_highest_generation_succeeds() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let highest = u64::MAX.to_string();
    let variables = [("SERVER_STARTER_GENERATION", highest.as_str())];
    let mut service =
        Service::start_with_variables(app_binary(), &variables, folder.path()).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        let (code, log) = reload(folder.path(), &service.notifications.path(), &[]);
        assert_eq!(code, Some(0), "{log}");
        assert!(service.process().wait().expect("the process ends").success());
        let (pid, generation) = process_on(&mut connection).await;
        assert_eq!(generation, u64::MAX);
        end(pid);
    });
}

#[test]
fn reason_of_several_lines_is_one_line_of_the_status() {
    let (mut service, folder) = start(&[]);
    send_message(&connect_takeover_socket(folder.path()), REFUSED, "one\nSTOPPING=1\ntwo");
    let status = service.notifications.wait_for_status("last reload failed").expect("the reload has failed");
    assert!(status.ends_with(": one STOPPING=1 two"), "{status}");
}

/// Limits the memory of `process` to what it has, so that the kernel refuses to start a thread. Unlike a limit of threads
/// this also works for root.
pub fn forbid_threads(process: &Process) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid().as_raw_nonzero()));
    let status = status.expect("the process runs");
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB"));
    let kilobytes: u64 = size.and_then(|size| size.parse().ok()).expect("the size is a number");
    // The stack of a thread takes 2 MiB.
    let limit = Some((kilobytes + 1024) * 1024);
    let limit = Rlimit { current: limit, maximum: limit };
    prlimit(Some(process.pid()), Resource::As, limit).expect("the limit is set");
}

#[test]
fn process_that_may_start_no_thread_keeps_serving_after_a_sighup() {
    let (mut service, _folder) = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let before = process_on(&mut connection).await;
        forbid_threads(service.process());
        service.signal(Signal::HUP);
        let status = service.notifications.wait_for_status("last reload failed").expect("the reload fails");
        assert!(status.contains("could not start a thread"), "{status}");
        assert_eq!(process_on(&mut connection).await, before);
    });
}

#[test]
fn a_program_that_a_successor_starts_is_not_taken_for_a_successor() {
    for role in ["middle", "successor"] {
        let mut command = command(app_binary(), &["check", "--listen", "127.0.0.1:0"]);
        let (code, output, log) = run_to_end(command.env("TAKEOVER_ROLE", role)).expect("the process ends");
        assert_eq!(code, Some(0), "{log}");
        assert!(output.contains("ready to serve on "), "{output}");
    }
}

#[test]
fn an_option_value_takeover_is_not_removed_as_the_subcommand() {
    let (mut service, folder) = start(&["--log", "takeover"]);
    block_on(async {
        let mut connection = service.connect().await;
        let path = service.notifications.path();
        let (code, log) = reload(folder.path(), &path, &["--log", "takeover"]);
        assert_eq!(code, Some(0), "{log}");
        let (pid, _) = process_on(&mut connection).await;
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("the process runs");
        assert!(line.ends_with("--log\0takeover\0") && !line.contains("\0takeover\0--log"), "{line:?}");
        service.process().wait().expect("the process ends");
        end(pid);
    });
}

#[test]
fn a_successor_that_cannot_start_changes_nothing_and_its_error_is_reported() {
    let (mut service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        for (flags, reason) in [
            (["--log", "x=loud"], "invalid --log \"x=loud\": expected a log filter"),
            (["--log", "[request]=debug"], "spans in brackets require the cargo feature span-filter"),
            (["--idle-timeout", "0s"], "expected a time above zero"),
        ] {
            let (code, log) = reload(folder.path(), &path, &flags);
            assert!(code != Some(0) && log.contains(reason), "{code:?}: {log}");
            let status = service.notifications.wait_for_status(reason).expect("the status is sent");
            assert!(status.contains("last reload failed: "), "{status}");
            assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
        }
    });
}

/// A service whose binary is replaced, after its start, by a shell script with these lines.
fn start_and_replace(flags: &[&str], script: &str) -> (Service, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    // The service is started through a symbolic link, which the script replaces.
    let path = folder.path().join("service");
    std::os::unix::fs::symlink(app_binary(), &path).expect("the symbolic link is made");
    let service = Service::start_in(&path.display().to_string(), flags, folder.path());
    let service = service.expect("the service starts");
    let new = folder.path().join("new");
    std::fs::write(&new, format!("#!/bin/sh\n{script}\n")).expect("the file is written");
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))
        .expect("the file is made executable");
    std::fs::rename(&new, &path).expect("the file is renamed");
    (service, folder)
}

/// The intermediate process and the successor write to the same pipe, so their lines can come in either order.
#[test]
fn a_successor_that_fails_before_its_pid_is_known_is_reported_with_its_reason() {
    // No process has this pid, because it is the maximum of `kernel.pid_max`.
    let (mut service, _folder) = start_and_replace(&[], "echo 'the file is invalid'; echo pid 4194304");
    service.signal(Signal::HUP);
    let status = service.notifications.wait_for_status("last reload failed: ").expect("the status is sent");
    assert!(status.ends_with("last reload failed: the file is invalid"), "{status}");
}

#[test]
fn a_binary_that_is_no_release_of_the_service_is_reported_with_its_output() {
    let (mut service, _folder) = start_and_replace(&[], "echo hello");
    service.signal(Signal::HUP);
    let status = service.notifications.wait_for_status("last reload failed: ").expect("the status is sent");
    assert!(status.contains("is not a release of this service") && status.contains("\"hello\""), "{status}");
}

#[test]
fn a_release_that_hangs_fails_the_reload_at_the_takeover_timeout() {
    let (mut service, _folder) = start_and_replace(&["--takeover-timeout", "500ms"], "exec sleep 1000");
    block_on(async {
        let mut connection = service.connect().await;
        for _ in 0..2 {
            service.signal(Signal::HUP);
            service.notifications.wait_for("READY=1").expect("READY=1 follows the failed reload");
        }
        assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
    });
    service.signal(Signal::TERM);
    let (_, log) = service.end().expect("the process ends");
    assert_eq!(log.matches("reload failed: could not start a successor").count(), 2, "{log}");
    let reason = "not ready within 500ms (--takeover-timeout), so it was killed";
    assert_eq!(log.matches(reason).count(), 2, "{log}");
}

/// Makes exec(2) of this file hang until the returned process is dropped, or for at most `fs.lease-break-time` (45 s). This
/// simulates a network file system whose server is down. A lease (F_SETLEASE in fcntl(2)) delays every open of the file;
/// perl(1) takes it, because Rust would need unsafe code.
fn delay_exec(path: &Path) -> Process {
    let script = "$SIG{IO} = 'IGNORE'; open(my $file, '<', $ARGV[0]) or die $!; \
                  fcntl($file, 1024, 1) or die $!; print \"held\\n\"; close(STDOUT); sleep 1000";
    let mut perl = Command::new("perl");
    perl.args(["-e", script]).arg(path).stdout(Stdio::piped());
    let mut perl = Process::spawn(&mut perl).expect("perl starts");
    let stdout = perl.child().stdout.take().expect("it is piped");
    assert_eq!(std::io::read_to_string(stdout).expect("valid UTF-8"), "held\n");
    perl
}

#[test]
fn a_release_whose_exec_hangs_fails_the_reload_and_further_ones_start_no_thread() {
    let flags = ["--takeover-timeout", "500ms"];
    let (mut service, folder) = start_and_replace(&flags, "exec sleep 1000");
    let delayed = delay_exec(&folder.path().join("service"));
    let reasons = [
        "within 500ms (--takeover-timeout): exec(2) or the new process hangs",
        "an earlier reload still hangs",
    ];
    for reason in reasons {
        service.signal(Signal::HUP);
        service.notifications.wait_for_status(reason).expect("the reload fails with this reason");
    }
    block_on(async {
        assert_eq!(process_on(&mut service.connect().await).await, (service.pid(), 1));
    });
    drop(delayed);
}

#[test]
fn takeover_without_a_running_service_or_a_runtime_directory_fails() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let nowhere = folder.path().join("notify");
    let (code, log) = reload(folder.path(), &nowhere, &[]);
    assert!(code == Some(69) && log.contains("no running service listens on"), "{code:?}: {log}");
    let (code, _, log) = run_to_end(&mut command(app_binary(), &["takeover"])).expect("the process ends");
    assert!(code == Some(78) && log.contains("RuntimeDirectory="), "{code:?}: {log}");
}

/// A stopped process accepts no takeover commands, so its queue fills after some reloads.
#[test]
fn takeover_fails_at_once_if_the_queue_of_the_running_service_is_full() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let address = SocketAddrUnix::new(folder.path().join("takeover")).expect("the path is short");
    let new = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None);
    let listener = new().expect("a socket is made");
    bind(&listener, &address).expect("the path is bound");
    listen(&listener, 0).expect("the socket listens");
    let mut waiting = Vec::new();
    loop {
        let client = new().expect("a socket is made");
        if connect(&client, &address).is_err() {
            break;
        }
        waiting.push(client);
    }
    let (code, log) = reload(folder.path(), &folder.path().join("notify"), &[]);
    assert!(code == Some(69) && log.contains("the running service hangs, so restart it"), "{code:?}: {log}");
}

// ---- messages on the takeover socket ----

fn send_message(channel: &OwnedFd, message_type: u16, text: &str) {
    frames::send(channel, &frame(message_type, 0, text), &[]).expect("the bytes are sent");
}

/// The number of bytes in the receive queue of a channel.
fn unread(channel: &OwnedFd) -> u64 {
    rustix::io::ioctl_fionread(channel).expect("the channel is a socket")
}

/// A process whose pid the test sends as the successor's, because the service may kill that pid.
fn stand_in() -> Process {
    Process::spawn(Command::new("sleep").arg("1000")).expect("sleep starts")
}

fn pid_of(process: &Process) -> String {
    process.pid().as_raw_nonzero().to_string()
}

/// Plays a successor on the takeover socket until the service sends Commit.
fn play_until_commit(folder: &Path, successor: &Process) -> OwnedFd {
    let channel = connect_takeover_socket(folder);
    send_message(&channel, HELLO, &pid_of(successor));
    send_message(&channel, GO, "");
    assert_eq!(recv_message(&channel).expect("a message arrives").0, LISTENERS);
    send_message(&channel, READY, "");
    assert_eq!(recv_message(&channel).expect("a message arrives").0, COMMIT);
    channel
}

#[test]
fn the_takeover_socket_is_accessible_only_to_its_owner() {
    let (_service, folder) = start(&[]);
    let metadata = folder.path().join("takeover").metadata().expect("the takeover socket exists");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
}

#[test]
fn an_incomplete_takeover_dialogue_changes_nothing() {
    let (mut service, folder) = start(&[]);
    let successor = stand_in();
    let me = pid_of(&successor);
    // The messages that are sent before the connection is closed.
    let dialogues: [&[(u16, &str)]; 9] = [
        // Pid 0 and 1 are not successors. The service must not accept them, because it would kill the pid it was given.
        &[(HELLO, "0"), (GO, "")],
        &[(HELLO, "1"), (GO, "")],
        &[],
        &[(GO, "")],
        &[(HELLO, &me)],
        &[(HELLO, "not a pid"), (GO, "")],
        &[(READY, "")],
        &[(HELLO, &me), (GO, ""), (LISTENERS, "")],
        &[(HELLO, &me), (GO, ""), (READY, ""), (READY, "")],
    ];
    block_on(async {
        let mut connection = service.connect().await;
        for dialogue in dialogues {
            let channel = connect_takeover_socket(folder.path());
            for (message_type, text) in dialogue {
                // The service may have closed the connection at an earlier message.
                let _ = frames::send(&channel, &frame(*message_type, 0, text), &[]);
            }
            drop(channel);
            service.notifications.wait_for("STATUS=serving").expect("the status is sent");
            assert_eq!(process_on(&mut connection).await, (service.pid(), 1), "{dialogue:?}");
            assert_eq!(process_on(&mut service.connect().await).await, (service.pid(), 1), "{dialogue:?}");
        }
    });
    service.signal(Signal::TERM);
    service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
    let sent = service.notifications.lines();
    assert!(!sent.iter().any(|line| line.starts_with("MAINPID=")), "{sent:?}");
}

/// Go says that the intermediate process of the launch has exited, so that systemd is the parent of the successor.
/// systemd kills a main process that is not its child at the next stop, without a drain.
#[test]
fn listeners_are_sent_only_after_go() {
    let (_service, folder) = start(&[]);
    let channel = connect_takeover_socket(folder.path());
    send_message(&channel, HELLO, &std::process::id().to_string());
    set_socket_timeout(&channel, Timeout::Recv, Some(Duration::from_millis(300)))
        .expect("the time limit is set");
    let early = recv(&channel, &mut [0; 1024], RecvFlags::empty());
    assert_eq!(early.expect_err("no message arrives before Go"), rustix::io::Errno::AGAIN);
    send_message(&channel, GO, "");
    assert_eq!(recv_message(&channel).expect("a message arrives").0, LISTENERS);
}

#[test]
fn a_successor_that_closes_the_channel_at_commit_is_killed_and_the_old_process_serves() {
    let (mut service, folder) = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let mut successor = stand_in();
        let channel = play_until_commit(folder.path(), &successor);
        drop(channel);
        // The service kills it, because a successor that closed only the channel could still be serving.
        assert_eq!(successor.wait().expect("the process ends").signal(), Some(9));
        service.notifications.wait_for("RELOADING=1").expect("RELOADING=1 is sent");
        service.notifications.wait_for("READY=1").expect("READY=1 is sent again");
        let status = service.notifications.wait_for("STATUS=serving").expect("the status is sent");
        assert!(status.contains("last reload failed: the successor exited unexpectedly"), "{status}");
        assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
    });
}

#[test]
fn a_successor_that_reads_no_connections_does_not_delay_the_exit_beyond_the_drain_timeout() {
    let (mut service, folder) = start(&["--drain-timeout", "15s"]);
    block_on(async {
        let mut connections = Vec::new();
        for _ in 0..450 {
            let mut connection = service.connect().await;
            connection.hold().await.expect("the request is in flight");
            connections.push(connection);
        }
        let successor = stand_in();
        let channel = play_until_commit(folder.path(), &successor);
        send_message(&channel, ACCEPTING, "");
        // Each response makes one connection quiescent, and the service sends it in a message of its own. Nothing reads
        // the channel, so it is full before the last connection.
        let mut is_full = false;
        for connection in &mut connections {
            let (before, begun) = (unread(&channel), Instant::now());
            connection.release().await.expect("the request finishes");
            while !is_full && unread(&channel) == before {
                // A message arrives within about ten milliseconds, so after two seconds the channel is full.
                is_full = begun.elapsed() > Duration::from_secs(2);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(is_full, "the channel is not full with {} bytes", unread(&channel));
        assert!(
            service.process().ends_within(TEST_TIMEOUT).expect("the wait succeeds"),
            "the old process waits for the successor"
        );
        drop(channel);
    });
    let (_, log) = service.end().expect("the process ends");
    assert!(
        log.contains("could not hand over connections; each will be closed after its next response"),
        "{log}"
    );
}

/// Limits how many files `process` may open, and returns the former limit.
pub fn limit_files(process: &Process, limit: Rlimit) -> Rlimit {
    prlimit(Some(process.pid()), Resource::Nofile, limit).expect("the limit is set")
}

#[test]
fn a_process_that_may_open_no_file_for_a_moment_of_its_reload_loses_no_request() {
    let (mut service, folder) = start(&["--log", "debug"]);
    block_on(async {
        let (mut first, mut second) = (service.connect().await, service.connect().await);
        first.hold().await.expect("the request is in flight");
        second.hold().await.expect("the request is in flight");
        let (code, log) = reload(folder.path(), &service.notifications.path(), &[]);
        assert_eq!(code, Some(0), "{log}");
        let process = service.process();
        // The process inherits the hard limit of the test.
        let before = limit_files(process, Rlimit { current: Some(3), ..getrlimit(Resource::Nofile) });
        first.release().await.expect("the response is whole");
        // The old process now tries to send the first connection, for which it needs a file for its records.
        let log = BufReader::new(process.child().stderr.take().expect("the log is a pipe"));
        let mut lines = log.lines().map(|line| line.expect("the log is readable"));
        let wanted = "could not send through the handover channel; retrying";
        assert!(lines.any(|line| line.contains(wanted)), "the old process has exited");
        limit_files(process, before);
        second.release().await.expect("the response is whole");
        let pid = pid_of_generation(&mut first, 2).await;
        assert_eq!(pid_of_generation(&mut second, 2).await, pid);
        let line = lines.find(|line| line.contains("handed over ")).expect("the drain is logged");
        assert!(
            line.contains("handed over 2 connections; 2 requests in flight finished, 0 cut off"),
            "{line}"
        );
        end(pid);
    });
}

// ---- a real successor, delayed at each step ----

/// A real successor behind a proxy: the test relays its messages to and from the old process, and can delay each of
/// them.
struct Delayed {
    predecessor: OwnedFd,
    channel: OwnedFd,
    successor: Process,
}

impl Delayed {
    /// Starts a successor for the service whose runtime directory is `folder`.
    fn start(folder: &Path) -> Self {
        let predecessor = connect_takeover_socket(folder);
        let (channel, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .expect("the socket pair is made");
        let mut command = command(app_binary(), &[]);
        command.env("TAKEOVER_ROLE", "successor").env("RUNTIME_DIRECTORY", folder);
        command.stdin(theirs).stdout(Stdio::piped()).stderr(Stdio::null());
        let successor = Process::spawn(&mut command).expect("the successor starts");
        drop(command);
        for end in [&predecessor, &channel] {
            set_socket_timeout(end, Timeout::Recv, Some(TEST_TIMEOUT)).expect("the time limit is set");
        }
        send_message(&predecessor, GO, "");
        Self { predecessor, channel, successor }
    }

    /// Relays all messages before the first one of `message_type`, and returns that one without relaying it.
    fn hold(folder: &Path, message_type: u16) -> (Self, Held) {
        let delayed = Self::start(folder);
        for (expected, is_of_successor) in [
            (HELLO, true),
            (LISTENERS, false),
            (READY, true),
            (COMMIT, false),
            (ACCEPTING, true),
            (MAIN, false),
        ] {
            let (from, to) = if is_of_successor {
                (&delayed.channel, &delayed.predecessor)
            } else {
                (&delayed.predecessor, &delayed.channel)
            };
            let (message, fds) = frames::receive(from).expect("a message arrives");
            assert_eq!(frames::read(&message).expect("a valid frame").0, expected);
            let held = Held { message, fds, is_of_successor };
            if expected == message_type {
                return (delayed, held);
            }
            held.pass(to).expect("the bytes are sent");
        }
        unreachable!("{message_type} is not a message of a takeover");
    }

    /// Relays the delayed message and all later ones, until both sides have closed their connections.
    fn resume(&self, held: &Held) {
        // The receiver may have closed its connection.
        let _ = held.pass(if held.is_of_successor { &self.predecessor } else { &self.channel });
        std::thread::scope(|scope| {
            for (from, to) in [(&self.channel, &self.predecessor), (&self.predecessor, &self.channel)] {
                scope.spawn(move || {
                    loop {
                        match frames::receive(from) {
                            Ok((message, fds)) if !message.is_empty() => {
                                // The receiver may have closed its connection.
                                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                                let _ = frames::send(to, &message, &fds);
                            }
                            _ => break,
                        }
                    }
                    let _ = shutdown(to, Shutdown::Write);
                });
            }
        });
    }

    /// The outcome that the successor has written to standard output, which the takeover command reads in a real
    /// reload.
    fn outcome(mut self) -> String {
        let mut outcome = String::new();
        let mut stdout = self.successor.child().stdout.take().expect("the output is piped");
        std::io::Read::read_to_string(&mut stdout, &mut outcome).expect("valid UTF-8");
        outcome
    }
}

/// A message that was not relayed yet.
struct Held {
    message: Vec<u8>,
    fds: Vec<OwnedFd>,
    is_of_successor: bool,
}

impl Held {
    fn pass(&self, to: &OwnedFd) -> anyhow::Result<()> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        frames::send(to, &self.message, &fds)
    }
}

#[test]
fn a_successor_that_is_late_with_ready_fails_the_reload() {
    let (mut service, folder) = start(&["--takeover-timeout", "5s"]);
    block_on(async {
        let mut connection = service.connect().await;
        let (mut late, held) = Delayed::hold(folder.path(), READY);
        service.notifications.wait_for("READY=1").expect("READY=1 follows the failed reload");
        drop(held);
        shutdown(&late.channel, Shutdown::Both).expect("the channel is shut down");
        assert!(!late.successor.wait().expect("the process ends").success());
        assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
        assert_eq!(process_on(&mut service.connect().await).await, (service.pid(), 1));
        assert!(!late.outcome().contains("ok"));
    });
}

/// Either Commit does not reach the successor, or its answer does not reach the old process. The old process cannot
/// distinguish the two, so it must kill the successor in both cases; otherwise two processes could serve.
#[test]
fn a_successor_that_does_not_answer_commit_is_killed_before_the_old_process_continues() {
    for message_type in [COMMIT, ACCEPTING] {
        let (mut service, folder) = start(&[]);
        block_on(async {
            let mut connection = service.connect().await;
            let (mut late, _held) = Delayed::hold(folder.path(), message_type);
            let status = late.successor.wait().expect("the process ends");
            assert_eq!(status.signal(), Some(9), "{status}");
            let reason = "last reload failed: the successor did not answer Commit in time";
            service.notifications.wait_for_status(reason).expect("the status is sent");
            assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
            for _ in 0..20 {
                assert_eq!(process_on(&mut service.connect().await).await, (service.pid(), 1));
            }
            assert_eq!(late.outcome(), "", "the successor must not report success");
        });
        let sent = service.notifications.lines();
        assert!(!sent.iter().any(|line| line.starts_with("MAINPID=")), "{sent:?}");
        // The next reload succeeds.
        let (code, log) = reload(folder.path(), &service.notifications.path(), &[]);
        assert_eq!(code, Some(0), "{log}");
        service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        let pid = service.notifications.lines().iter().rev().find_map(|line| line.strip_prefix("MAINPID="));
        end(pid.expect("MAINPID= names a pid").parse().expect("a valid number"));
    }
}

#[test]
fn a_successor_that_answers_commit_after_the_takeover_timeout_gets_the_connections() {
    for message_type in [COMMIT, ACCEPTING, MAIN] {
        // The takeover timeout applies until Ready. For the answer to Commit the old process waits 5 s, which is
        // longer.
        let ready_by = Duration::from_secs(3);
        let flags = ["--takeover-timeout", &humantime::format_duration(ready_by).to_string()];
        let (service, folder) = start(&flags);
        block_on(async {
            let mut connection = service.connect().await;
            process_on(&mut connection).await;
            let timeout = tokio::time::Instant::now() + ready_by;
            let (late, held) = Delayed::hold(folder.path(), message_type);
            // The takeover timeout has passed, but it no longer applies, because the successor was ready before.
            tokio::time::sleep_until(timeout + Duration::from_millis(200)).await;
            late.resume(&held);
            let pid = late.successor.pid().as_raw_nonzero().get();
            assert_eq!(pid_of_generation(&mut connection, 2).await, pid);
            assert_eq!(late.outcome(), "ok\n");
            let (status, log) = service.end().expect("the process ends");
            assert!(status.success() && log.contains("handed over 1 connection;"), "{log}");
        });
    }
}

/// systemd sends SIGTERM to all processes of the unit, so to both.
#[test]
fn sigterm_to_both_processes_during_a_reload_stops_both() {
    for message_type in [READY, COMMIT, ACCEPTING, MAIN] {
        let (mut service, folder) = start(&[]);
        block_on(async {
            let mut connection = service.connect().await;
            connection.send(&get("/sleep?duration=2s")).await.expect("the bytes are sent");
            service.wait_for_in_flight(1).expect("the request is in flight");
            let (late, held) = Delayed::hold(folder.path(), message_type);
            service.signal(Signal::TERM);
            late.successor.signal(Signal::TERM);
            if message_type == READY {
                service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
            }
            let passing = std::thread::spawn(move || {
                late.resume(&held);
                late
            });
            let mut answer = connection.answer().await.expect("the server answers");
            assert_eq!(answer.text(), "slept 2s\n");
            if !answer.closes() {
                answer = connection.ask(&get("/")).await.expect("the server answers");
            }
            assert!(answer.closes(), "the last response must have Connection: close");
            let mut late = passing.join().expect("the thread passes on the messages");
            assert!(
                late.successor.ends_within(TEST_TIMEOUT).expect("the wait succeeds"),
                "the successor keeps running"
            );
            let (status, log) = service.end().expect("the process ends");
            assert!(status.success() && log.contains(" 0 cut off"), "{log}");
        });
    }
}

/// Without a service manager only the old process receives the signal, and it must stop the successor that it has
/// started.
#[test]
fn sigterm_to_the_old_process_during_a_reload_stops_the_successor_too() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let log = folder.path().join("log");
    let address = testkit::free_address();
    let mut command = command(app_binary(), &["--listen", &address.to_string()]);
    command.env("RUNTIME_DIRECTORY", folder.path());
    command.stderr(std::fs::File::create(&log).expect("the log file is made"));
    let mut process = Process::spawn(&mut command);
    let process = process.as_mut().expect("the service starts");
    wait_until("it listens", || folder.path().join("takeover").exists());
    let (mut late, held) = Delayed::hold(folder.path(), ACCEPTING);
    process.signal(Signal::TERM);
    // The old process must have seen the signal before the successor's answer arrives, otherwise the stop may come
    // after the reload.
    let logged = || std::fs::read_to_string(&log).expect("the log can be read");
    wait_until("the signal is received", || logged().contains("stop signal received during a reload"));
    late.resume(&held);
    assert!(process.wait().expect("the process ends").success());
    assert!(
        late.successor.ends_within(TEST_TIMEOUT).expect("the wait succeeds"),
        "the successor keeps running"
    );
}

#[test]
fn an_invalid_message_closes_the_takeover_connection() {
    let (service, folder) = start(&[]);
    let null = std::fs::File::open("/dev/null").expect("the file opens");
    let fd = null.as_fd();
    block_on(async {
        for message in [b"x".to_vec(), vec![0xff; 60_000], frame(99, 0, ""), frame(HELLO, 200, "")] {
            let channel = connect_takeover_socket(folder.path());
            frames::send(&channel, &message, &[fd, fd]).expect("the bytes are sent");
            assert_eq!(recv_message(&channel), None);
            assert_eq!(process_on(&mut service.connect().await).await, (service.pid(), 1));
        }
    });
}

#[test]
fn a_stalled_takeover_times_out_and_others_are_refused_meanwhile() {
    // Long enough for the two refused takeovers before the stalled one times out.
    let (service, folder) = start(&["--takeover-timeout", "10s"]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        let stalled = connect_takeover_socket(folder.path());
        let (code, log) = reload(folder.path(), &path, &[]);
        assert!(code != Some(0) && log.contains("another reload is in progress"), "{code:?}: {log}");
        let second = connect_takeover_socket(folder.path());
        assert_eq!(recv_message(&second), Some((REFUSED, "another reload is in progress".into())));
        assert_eq!(recv_message(&stalled), None, "the stalled connection must be closed at the timeout");
        assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        let pid = tokio::time::timeout(TEST_TIMEOUT, pid_of_generation(&mut connection, 2)).await;
        end(pid.expect("the connection moves"));
    });
}

#[test]
fn sigterm_during_a_takeover_ends_the_takeover() {
    let (service, folder) = start(&[]);
    let channel = connect_takeover_socket(folder.path());
    send_message(&channel, HELLO, &std::process::id().to_string());
    send_message(&channel, GO, "");
    assert_eq!(recv_message(&channel).expect("a message arrives").0, LISTENERS);
    service.signal(Signal::TERM);
    assert_eq!(recv_message(&channel), None);
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success(), "{log}");
}
