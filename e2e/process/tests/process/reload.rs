//! Reload with no systemd around: what the old process does when a successor comes, well or badly.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketFlags, SocketType, recv, shutdown, socketpair};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use testkit::certificate::Certificate;
use testkit::client::{Connection, Target, get};
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

/// Runs the takeover command, as ExecReload= does; gives its exit code and what it and the successor
/// wrote to standard error.
fn reload(folder: &Path, notifications: &Path, flags: &[&str]) -> (Option<i32>, String) {
    // No pipe: the successor keeps it.
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

/// Who answers on this connection: its pid and generation.
async fn who(connection: &mut Connection) -> (i32, u64) {
    let answer = connection.ask(&get("/")).await.expect("the server answers");
    assert!(!answer.closes(), "told to close");
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

/// Ends a successor, which is nobody's child.
fn end(pid: i32) {
    kill_process(Pid::from_raw(pid).expect("a valid pid"), Signal::KILL).expect("the process runs");
}

#[test]
fn a_successor_takes_over_listeners_and_connections_and_the_old_process_exits() {
    let (mut service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut idle = service.connect().await;
        let mut slow = service.connect().await;
        assert_eq!(who(&mut idle).await, (service.pid(), 1));
        slow.hold().await.expect("the request is in flight");
        // It does not wait for the slow request, which cannot end meanwhile.
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        let (pid, generation) = who(&mut idle).await;
        assert!(pid != service.pid() && generation == 2, "pid {pid}, generation {generation}");
        assert_eq!(who(&mut service.connect().await).await, (pid, 2));
        slow.release().await.expect("the request finishes");
        assert_eq!(who(&mut slow).await, (pid, 2));
        let said = service.notifications.said().to_vec();
        service.notifications.wait_for(&format!("MAINPID={pid}")).expect("MAINPID= is sent");
        let main = service.notifications.said()[said.len()..].to_vec();
        let at = |line: &str| main.iter().position(|said| said.starts_with(line));
        assert!(
            at("RELOADING=1") < at("MONOTONIC_USEC=") && at("MONOTONIC_USEC=") < at("MAINPID="),
            "{main:?}"
        );
        service.notifications.wait_for("BARRIER=1").expect("BARRIER=1 is sent");
        let (status, log) = service.end().expect("the process ends");
        assert!(
            status.success() && log.contains("handed over 2 connections; 1 requests in flight finished"),
            "{log}"
        );
        end(pid);
    });
}

#[test]
fn a_connection_survives_four_reloads() {
    let (service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        let mut pids = vec![who(&mut connection).await.0];
        for generation in 2..=5 {
            let (code, log) = reload(folder.path(), &path, &[]);
            assert_eq!(code, Some(0), "{log}");
            // The old process answers a request that comes before it has handed the connection over.
            let pid = loop {
                let (pid, at) = who(&mut connection).await;
                if at == generation {
                    break pid;
                }
                assert_eq!((Some(&pid), at), (pids.last(), generation - 1));
            };
            assert!(!pids.contains(&pid), "pid {pid}, generation {generation}");
            pids.push(pid);
        }
        end(*pids.last().expect("at least one pid"));
    });
}

/// A service that binds a path itself, and listens there.
fn listen_at(path: &Path, flags: &[&str], log: Stdio) -> (Process, Target) {
    let listen = ["--listen", path.to_str().expect("the path is valid UTF-8")];
    let mut command = command(app_binary(), &[&listen, flags].concat());
    let process = Process::spawn(command.stderr(log)).expect("the service starts");
    wait_until("it listens", || UnixStream::connect(path).is_ok());
    let target = Target::Unix(path.to_owned());
    // And serves: it listens before it has read all its files.
    block_on(async { who(&mut Connection::open(&target).await.expect("the service listens")).await });
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
    let said = |what: &str| std::fs::read_to_string(log.path()).expect("valid UTF-8").matches(what).count();
    for failed in 1..=2 {
        process.signal(Signal::HUP);
        wait_until("the successor fails", || said("reload failed: ") == failed);
        block_on(async {
            let mut connection = Connection::open(&target).await.expect("the socket file accepts");
            assert_eq!(who(&mut connection).await, (process.pid().as_raw_nonzero().get(), 1));
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
    let answers =
        || block_on(async { who(&mut Connection::open(&target).await.expect("the service listens")).await });
    let mut pid = answers().0;
    for generation in 2..=10 {
        kill_process(Pid::from_raw(pid).expect("a valid pid"), Signal::HUP).expect("the process runs");
        // Of one answer: for a moment both accept, and the old one answers what it has accepted.
        wait_until("the next process", || {
            let (its_pid, its_generation) = answers();
            pid = its_pid;
            its_generation == generation
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
        let (first, _) = who(&mut connection).await;
        process.signal(Signal::HUP);
        assert!(process.wait().expect("the process ends").success());
        let (second, generation) = who(&mut connection).await;
        assert!(second != first && generation == 2);
        assert!(path.exists(), "the successor listens there");
        let mut fresh = Connection::open(&target).await.expect("the connection opens");
        assert_eq!(who(&mut fresh).await, (second, 2));
        // The successor removes it at its own end.
        kill_process(Pid::from_raw(second).expect("a valid pid"), Signal::TERM).expect("the process runs");
        fresh.ask(&get("/")).await.expect("the server answers once more");
        connection.ask(&get("/")).await.expect("the server answers once more");
        wait_until("the file is removed", || !path.exists());
    });
}

#[test]
fn an_option_value_takeover_is_not_removed_as_the_subcommand() {
    let (mut service, folder) = start(&["--log", "takeover"]);
    block_on(async {
        let mut connection = service.connect().await;
        let path = service.notifications.path();
        let (code, log) = reload(folder.path(), &path, &["--log", "takeover"]);
        assert_eq!(code, Some(0), "{log}");
        let (pid, _) = who(&mut connection).await;
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
            (["--idle-timeout", "0s"], "expected a time above zero"),
        ] {
            let (code, log) = reload(folder.path(), &path, &flags);
            assert!(code != Some(0) && log.contains(reason), "{code:?}: {log}");
            let status = service.notifications.wait_for_status(reason).expect("the status is sent");
            assert!(status.contains("last reload failed: "), "{status}");
            assert_eq!(who(&mut connection).await, (service.pid(), 1));
        }
    });
}

#[test]
fn a_release_that_hangs_fails_the_reload_at_the_takeover_timeout() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    // The service is called by a path where a release will be that hangs.
    let path = folder.path().join("service");
    std::os::unix::fs::symlink(app_binary(), &path).expect("the symbolic link is made");
    let binary = path.display().to_string();
    let service = Service::start_in(&binary, &["--takeover-timeout", "500ms"], folder.path());
    let mut service = service.expect("the service starts");
    let hangs = folder.path().join("hangs");
    std::fs::write(&hangs, "#!/bin/sh\nexec sleep 1000\n").expect("the file is written");
    std::fs::set_permissions(&hangs, std::fs::Permissions::from_mode(0o755))
        .expect("the file is made executable");
    std::fs::rename(&hangs, &path).expect("the file is renamed");
    block_on(async {
        let mut connection = service.connect().await;
        for _ in 0..2 {
            service.signal(Signal::HUP);
            service.notifications.wait_for("READY=1").expect("READY=1 follows the failed reload");
        }
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
    });
    service.signal(Signal::TERM);
    let (_, log) = service.end().expect("the process ends");
    assert_eq!(log.matches("reload failed: could not start a successor").count(), 2, "{log}");
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

// ---- whoever knocks may say anything ----

fn send_message(channel: &OwnedFd, kind: u16, text: &str) {
    frames::send(channel, &frame(kind, 0, text), &[]).expect("the bytes are sent");
}

/// How many bytes a channel holds that were not read.
fn unread(channel: &OwnedFd) -> u64 {
    rustix::io::ioctl_fionread(channel).expect("the channel is a socket")
}

/// A process that may be taken for a successor, and killed as one.
fn stand_in() -> Process {
    Process::spawn(Command::new("sleep").arg("1000")).expect("sleep starts")
}

fn pid_of(process: &Process) -> String {
    process.pid().as_raw_nonzero().to_string()
}

/// A successor that could serve, and has been told to.
fn be_told_to_commit(folder: &Path, successor: &Process) -> OwnedFd {
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
    // What is said before hanging up.
    let talks: [&[(u16, &str)]; 9] = [
        // Nobody's successor: whoever is named there could be killed.
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
        for talk in talks {
            let channel = connect_takeover_socket(folder.path());
            for (kind, text) in talk {
                // It may have been hung up on in the middle.
                let _ = frames::send(&channel, &frame(*kind, 0, text), &[]);
            }
            drop(channel);
            service.notifications.wait_for("STATUS=serving").expect("the status is sent");
            assert_eq!(who(&mut connection).await, (service.pid(), 1), "{talk:?}");
            assert_eq!(who(&mut service.connect().await).await, (service.pid(), 1), "{talk:?}");
        }
    });
    service.signal(Signal::TERM);
    service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
    let said = service.notifications.said();
    assert!(!said.iter().any(|line| line.starts_with("MAINPID=")), "{said:?}");
}

/// Systemd would kill a main process that is another's child without a drain.
#[test]
fn listeners_are_sent_only_after_the_launcher_has_exited() {
    let (_service, folder) = start(&[]);
    let channel = connect_takeover_socket(folder.path());
    send_message(&channel, HELLO, &std::process::id().to_string());
    set_socket_timeout(&channel, Timeout::Recv, Some(Duration::from_millis(300)))
        .expect("the time limit is set");
    let early = recv(&channel, &mut [0; 1024], RecvFlags::empty());
    assert_eq!(early.expect_err("a word too early"), rustix::io::Errno::AGAIN);
    send_message(&channel, GO, "");
    assert_eq!(recv_message(&channel).expect("a message arrives").0, LISTENERS);
}

#[test]
fn a_successor_that_closes_the_channel_at_commit_is_killed_and_the_old_process_serves() {
    let (mut service, folder) = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let mut successor = stand_in();
        let channel = be_told_to_commit(folder.path(), &successor);
        drop(channel);
        // It may only have closed the channel, and be serving.
        assert_eq!(successor.wait().expect("the process ends").signal(), Some(9));
        service.notifications.wait_for("RELOADING=1").expect("RELOADING=1 is sent");
        service.notifications.wait_for("READY=1").expect("READY=1 is sent again");
        let status = service.notifications.wait_for("STATUS=serving").expect("the status is sent");
        assert!(status.contains("last reload failed: the successor exited unexpectedly"), "{status}");
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
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
        let channel = be_told_to_commit(folder.path(), &successor);
        send_message(&channel, ACCEPTING, "");
        // One by one they come to rest, with a frame each: more than a channel takes that nobody reads.
        let mut is_full = false;
        for connection in &mut connections {
            let (before, begun) = (unread(&channel), Instant::now());
            connection.release().await.expect("the request finishes");
            while !is_full && unread(&channel) == before {
                // A frame takes a millisecond.
                is_full = begun.elapsed() > Duration::from_secs(2);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(is_full, "the channel takes {} bytes", unread(&channel));
        assert!(service.process().ends_within(TEST_TIMEOUT).expect("the wait succeeds"), "it waits for ever");
        drop(channel);
    });
    let (_, log) = service.end().expect("the process ends");
    assert!(log.contains("could not hand over connections; they will be closed"), "{log}");
}

// ---- a real successor, late at each step ----

/// A real successor, which hears of the old process, and is heard, only what is passed on.
struct Delayed {
    predecessor: OwnedFd,
    channel: OwnedFd,
    successor: Process,
}

impl Delayed {
    /// Starts one for the service of `folder`.
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

    /// Passes on all that is said up to a word of this kind, which is held back.
    fn hold(folder: &Path, kind: u16) -> (Self, Held) {
        let delayed = Self::start(folder);
        for (said, is_of_successor) in [
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
            assert_eq!(frames::read(&message).expect("a valid frame").0, said);
            let held = Held { message, fds, is_of_successor };
            if said == kind {
                return (delayed, held);
            }
            held.pass(to).expect("the bytes are sent");
        }
        unreachable!("{kind} is said in a takeover");
    }

    /// Passes on what was held back, and all that is said after it, until both have hung up.
    fn go_on(&self, held: &Held) {
        // Whoever it is for may have given up.
        let _ = held.pass(if held.is_of_successor { &self.predecessor } else { &self.channel });
        std::thread::scope(|scope| {
            for (from, to) in [(&self.channel, &self.predecessor), (&self.predecessor, &self.channel)] {
                scope.spawn(move || {
                    loop {
                        match frames::receive(from) {
                            Ok((message, fds)) if !message.is_empty() => {
                                // Whoever it is for may be gone.
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

    /// What the successor has reported to whoever waits for it.
    fn outcome(mut self) -> String {
        let mut said = String::new();
        let mut stdout = self.successor.child().stdout.take().expect("the output is piped");
        std::io::Read::read_to_string(&mut stdout, &mut said).expect("valid UTF-8");
        said
    }
}

/// One message that was not passed on yet.
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
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
        assert_eq!(who(&mut service.connect().await).await, (service.pid(), 1));
        assert!(!late.outcome().contains("ok"));
    });
}

/// The old process may not be heard, or the successor may not: it makes no difference to those who are left.
#[test]
fn a_successor_that_does_not_answer_commit_is_killed_before_the_old_process_continues() {
    for kind in [COMMIT, ACCEPTING] {
        let (mut service, folder) = start(&[]);
        block_on(async {
            let mut connection = service.connect().await;
            let (mut late, _held) = Delayed::hold(folder.path(), kind);
            let status = late.successor.wait().expect("the process ends");
            assert_eq!(status.signal(), Some(9), "{status}");
            let reason = "last reload failed: the successor did not answer Commit in time";
            service.notifications.wait_for_status(reason).expect("the status is sent");
            assert_eq!(who(&mut connection).await, (service.pid(), 1));
            for _ in 0..20 {
                assert_eq!(who(&mut service.connect().await).await, (service.pid(), 1));
            }
            assert_eq!(late.outcome(), "", "it did not take itself for the main process");
        });
        let said = service.notifications.said();
        assert!(!said.iter().any(|line| line.starts_with("MAINPID=")), "{said:?}");
        // It can be succeeded all the same.
        let (code, log) = reload(folder.path(), &service.notifications.path(), &[]);
        assert_eq!(code, Some(0), "{log}");
        service.notifications.wait_for("MAINPID=").expect("a successor takes over");
        let pid = service.notifications.said().iter().rev().find_map(|line| line.strip_prefix("MAINPID="));
        end(pid.expect("MAINPID= names a pid").parse().expect("a valid number"));
    }
}

#[test]
fn a_successor_that_answers_commit_after_the_takeover_timeout_gets_the_connections() {
    for kind in [COMMIT, ACCEPTING, MAIN] {
        // A successor is ready in this time, and the old process waits longer for an answer to Commit (5 s).
        let ready_by = Duration::from_secs(3);
        let flags = ["--takeover-timeout", &humantime::format_duration(ready_by).to_string()];
        let (service, folder) = start(&flags);
        block_on(async {
            let mut connection = service.connect().await;
            who(&mut connection).await;
            let over = tokio::time::Instant::now() + ready_by;
            let (late, held) = Delayed::hold(folder.path(), kind);
            // Longer than a successor has to be ready: that time is over, and means nothing any more.
            tokio::time::sleep_until(over + Duration::from_millis(200)).await;
            late.go_on(&held);
            let pid = late.successor.pid().as_raw_nonzero().get();
            assert_eq!(who(&mut connection).await, (pid, 2));
            assert_eq!(late.outcome(), "ok\n");
            let (status, log) = service.end().expect("the process ends");
            assert!(status.success() && log.contains("handed over 1 connections"), "{log}");
        });
    }
}

/// A service manager tells both processes of the end.
#[test]
fn sigterm_to_both_processes_during_a_reload_stops_both() {
    for kind in [READY, COMMIT, ACCEPTING, MAIN] {
        let (mut service, folder) = start(&[]);
        block_on(async {
            let mut connection = service.connect().await;
            connection.send(&get("/sleep?duration=2s")).await.expect("the bytes are sent");
            service.wait_for_in_flight(1).expect("the request is in flight");
            let (late, held) = Delayed::hold(folder.path(), kind);
            service.signal(Signal::TERM);
            late.successor.signal(Signal::TERM);
            if kind == READY {
                service.notifications.wait_for("STOPPING=1").expect("STOPPING=1 is sent");
            }
            let passing = std::thread::spawn(move || {
                late.go_on(&held);
                late
            });
            let mut answer = connection.answer().await.expect("the server answers");
            assert_eq!(answer.text(), "slept 2s\n");
            if !answer.closes() {
                answer = connection.ask(&get("/")).await.expect("the server answers");
            }
            assert!(answer.closes(), "told to close by whoever answers last");
            let mut late = passing.join().expect("the thread passes on the messages");
            assert!(
                late.successor.ends_within(TEST_TIMEOUT).expect("the wait succeeds"),
                "the successor serves on"
            );
            let (status, log) = service.end().expect("the process ends");
            assert!(status.success() && log.contains(" 0 cut off"), "{log}");
        });
    }
}

/// Without a service manager, only the old process gets the signal.
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
    // The old process must have seen the signal before the successor's answer arrives, otherwise the stop may come after the reload.
    let said = || std::fs::read_to_string(&log).expect("the log can be read");
    wait_until("the signal is taken", || said().contains("stop signal received during a reload"));
    late.go_on(&held);
    assert!(process.wait().expect("the process ends").success());
    assert!(late.successor.ends_within(TEST_TIMEOUT).expect("the wait succeeds"), "the successor serves on");
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
            assert_eq!(who(&mut service.connect().await).await, (service.pid(), 1));
        }
    });
}

#[test]
fn a_stalled_takeover_times_out_and_others_are_refused_meanwhile() {
    // Long enough for what happens meanwhile.
    let (service, folder) = start(&["--takeover-timeout", "10s"]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        let stalls = connect_takeover_socket(folder.path());
        let (code, log) = reload(folder.path(), &path, &[]);
        assert!(code != Some(0) && log.contains("another reload is in progress"), "{code:?}: {log}");
        let second = connect_takeover_socket(folder.path());
        assert_eq!(recv_message(&second), Some((REFUSED, "another reload is in progress".into())));
        assert_eq!(recv_message(&stalls), None, "hung up on at the limit");
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        let (pid, _) = who(&mut connection).await;
        assert_ne!(pid, service.pid());
        end(pid);
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
