//! Reload with no systemd around: what the old process does when a successor comes, well or badly.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::client::{Connection, get};
use harness::frames::{self, ACCEPTING, COMMIT, GO, HELLO, LISTENERS, READY, REFUSED, frame};
use harness::process::Process;
use harness::service::{Service, command, run_to_end};
use harness::{block_on, eventually};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const BINARY: &str = env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME")));

fn start(flags: &[&str]) -> (Service, TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let service = Service::start_in(BINARY, flags, folder.path()).expect("a service");
    (service, folder)
}

/// Runs the takeover command, as ExecReload= does; gives its exit code and what it and the successor
/// wrote to standard error.
fn reload(folder: &Path, notifications: &Path, flags: &[&str]) -> (Option<i32>, String) {
    // No pipe: the successor keeps it.
    let mut log = tempfile::NamedTempFile::new().expect("a file");
    let mut command = command(BINARY, &[&["takeover"], flags].concat());
    command.env("RUNTIME_DIRECTORY", folder).env("NOTIFY_SOCKET", notifications);
    command.stderr(log.reopen().expect("a file"));
    let status = Process::spawn(&mut command).and_then(|mut process| process.wait()).expect("an end");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut log, &mut text).expect("text");
    (status.code(), text)
}

/// Who answers on this connection: its pid and generation.
async fn who(connection: &mut Connection) -> (i32, u64) {
    let answer = connection.ask(&get("/")).await.expect("an answer");
    assert!(!answer.closes(), "told to close");
    let text = answer.text();
    let number = |after: &str| {
        let rest = text.split(after).nth(1).expect("a number");
        rest.split(|c: char| !c.is_ascii_digit()).next().expect("a number").to_owned()
    };
    (number("pid ").parse().expect("a pid"), number("generation ").parse().expect("a generation"))
}

/// Ends a successor, which is nobody's child.
fn end(pid: i32) {
    kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("it runs");
}

#[test]
fn a_successor_takes_the_listeners_and_connections_over_and_the_old_process_ends() {
    let (mut service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut idle = service.connect().await;
        let mut slow = service.connect().await;
        assert_eq!(who(&mut idle).await, (service.pid(), 1));
        slow.send(&get("/sleep?duration=2s")).await.expect("sent");
        while !service.notifications.wait_for("STATUS=").expect("a status").contains("1 in flight") {}
        let begun = Instant::now();
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        assert!(begun.elapsed() < Duration::from_secs(1), "it does not wait for the slow request");
        let (pid, generation) = who(&mut idle).await;
        assert!(pid != service.pid() && generation == 2, "pid {pid}, generation {generation}");
        assert_eq!(who(&mut service.connect().await).await, (pid, 2));
        assert_eq!(slow.answer().await.expect("the answer").text(), "slept 2s\n");
        assert_eq!(who(&mut slow).await, (pid, 2));
        let said = service.notifications.said().to_vec();
        service.notifications.wait_for(&format!("MAINPID={pid}")).expect("the main process");
        let main = service.notifications.said()[said.len()..].to_vec();
        let at = |line: &str| main.iter().position(|said| said.starts_with(line));
        assert!(
            at("RELOADING=1") < at("MONOTONIC_USEC=") && at("MONOTONIC_USEC=") < at("MAINPID="),
            "{main:?}"
        );
        service.notifications.wait_for("BARRIER=1").expect("a barrier");
        let (status, log) = service.end().expect("an end");
        assert!(status.success() && log.contains("handed over 2 connections, 1 in flight finished"), "{log}");
        end(pid);
    });
}

#[test]
fn a_successor_can_be_succeeded_in_turn() {
    let (service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        let mut pids = vec![who(&mut connection).await.0];
        for generation in 2..=5 {
            let (code, log) = reload(folder.path(), &path, &[]);
            assert_eq!(code, Some(0), "{log}");
            let (pid, at) = who(&mut connection).await;
            assert!(at == generation && !pids.contains(&pid), "pid {pid}, generation {at}");
            pids.push(pid);
        }
        end(*pids.last().expect("the last"));
    });
}

#[test]
fn hangup_is_a_reload_without_systemd_and_a_socket_file_stays() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("http.sock");
    let mut command = command(BINARY, &["--listen", &path.display().to_string()]);
    let mut process = Process::spawn(command.stderr(Stdio::null())).expect("a service");
    let target = harness::client::Target::Unix(path.clone());
    eventually("it listens", || path.exists());
    block_on(async {
        let mut connection = Connection::open(&target).await.expect("a connection");
        let (first, _) = who(&mut connection).await;
        process.signal(Signal::HUP);
        assert!(process.wait().expect("an end").success());
        let (second, generation) = who(&mut connection).await;
        assert!(second != first && generation == 2);
        assert!(path.exists(), "the successor listens there");
        let mut fresh = Connection::open(&target).await.expect("a connection");
        assert_eq!(who(&mut fresh).await, (second, 2));
        // The successor removes it at its own end.
        kill_process(Pid::from_raw(second).expect("a pid"), Signal::TERM).expect("it runs");
        fresh.ask(&get("/")).await.expect("one more answer");
        connection.ask(&get("/")).await.expect("one more answer");
        eventually("the file is removed", || !path.exists());
    });
}

#[test]
fn a_successor_that_cannot_start_changes_nothing_and_its_reason_is_told() {
    let (mut service, folder) = start(&[]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        for (flags, reason) in [
            (["--log", "x=loud"], "--log=x=loud is not a log filter"),
            (["--idle-timeout", "0s"], "must be above zero"),
        ] {
            let (code, log) = reload(folder.path(), &path, &flags);
            assert!(code != Some(0) && log.contains(reason), "{code:?}: {log}");
            let status = || service.notifications.wait_for("STATUS=serving").expect("a status");
            std::iter::repeat_with(status)
                .find(|status| status.contains("last reload failed: ") && status.contains(reason));
            assert_eq!(who(&mut connection).await, (service.pid(), 1));
        }
    });
}

#[test]
fn a_release_that_does_nothing_at_all_is_given_up() {
    let folder = tempfile::tempdir().expect("a folder");
    // The service is called by a path where a release will be that hangs.
    let path = folder.path().join("service");
    std::os::unix::fs::symlink(BINARY, &path).expect("a link");
    let binary = path.display().to_string();
    let service = Service::start_in(&binary, &["--takeover-timeout", "500ms"], folder.path());
    let mut service = service.expect("a service");
    let hangs = folder.path().join("hangs");
    std::fs::write(&hangs, "#!/bin/sh\nexec sleep 1000\n").expect("written");
    std::fs::set_permissions(&hangs, std::fs::Permissions::from_mode(0o755)).expect("executable");
    std::fs::rename(&hangs, &path).expect("in its place");
    block_on(async {
        let mut connection = service.connect().await;
        for _ in 0..2 {
            service.signal(Signal::HUP);
            service.notifications.wait_for("READY=1").expect("given up");
        }
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
    });
    service.signal(Signal::TERM);
    let (_, log) = service.end().expect("an end");
    assert_eq!(log.matches("not reloaded: could not start a successor").count(), 2, "{log}");
}

#[test]
fn a_takeover_with_nobody_there_or_no_folder_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = folder.path().join("notify");
    let (code, log) = reload(folder.path(), &nowhere, &[]);
    assert!(code == Some(69) && log.contains("nobody to take over from"), "{code:?}: {log}");
    let (code, _, log) = run_to_end(&mut command(BINARY, &["takeover"])).expect("an end");
    assert!(code == Some(78) && log.contains("RuntimeDirectory="), "{code:?}: {log}");
}

// ---- whoever knocks may say anything ----

/// A connection to the takeover socket.
fn knock(folder: &Path) -> OwnedFd {
    let path = folder.join("takeover");
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    connect(&socket, &SocketAddrUnix::new(&path).expect("a path")).expect("it listens");
    socket
}

fn say(channel: &OwnedFd, kind: u16, text: &str) {
    frames::send(channel, &frame(kind, 0, text), &[]).expect("sent");
}

/// The next word of the old process: its kind and text; none when it has hung up.
fn hear(channel: &OwnedFd) -> Option<(u16, String)> {
    let mut message = [0; 1024];
    let (length, _) = recv(channel, &mut message, RecvFlags::empty()).expect("a message or the end");
    (length > 0).then(|| frames::read(&message[..length]).expect("a frame"))
}

/// A successor that could serve, and has been told to.
fn be_told_to_commit(folder: &Path) -> OwnedFd {
    let channel = knock(folder);
    say(&channel, HELLO, &std::process::id().to_string());
    say(&channel, GO, "");
    assert_eq!(hear(&channel).expect("a word").0, LISTENERS);
    say(&channel, READY, "");
    assert_eq!(hear(&channel).expect("a word").0, COMMIT);
    channel
}

#[test]
fn the_takeover_socket_is_for_its_owner_alone() {
    let (_service, folder) = start(&[]);
    let metadata = folder.path().join("takeover").metadata().expect("it is there");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
}

#[test]
fn a_half_told_takeover_changes_nothing() {
    let (mut service, folder) = start(&[]);
    let me = std::process::id().to_string();
    // What is said before hanging up.
    let talks: [&[(u16, &str)]; 7] = [
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
            let channel = knock(folder.path());
            for (kind, text) in talk {
                // It may have been hung up on in the middle.
                let _ = frames::send(&channel, &frame(*kind, 0, text), &[]);
            }
            drop(channel);
            service.notifications.wait_for("STATUS=serving").expect("a status");
            assert_eq!(who(&mut connection).await, (service.pid(), 1), "{talk:?}");
            assert_eq!(who(&mut service.connect().await).await, (service.pid(), 1), "{talk:?}");
        }
    });
    service.signal(Signal::TERM);
    service.notifications.wait_for("STOPPING=1").expect("STOPPING=1");
    let said = service.notifications.said();
    assert!(!said.iter().any(|line| line.starts_with("MAINPID=")), "{said:?}");
}

/// Systemd would kill a main process that is another's child without a drain.
#[test]
fn nothing_is_passed_on_before_the_successor_is_nobodys_child() {
    let (_service, folder) = start(&[]);
    let channel = knock(folder.path());
    say(&channel, HELLO, &std::process::id().to_string());
    rustix::net::sockopt::set_socket_timeout(
        &channel,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_millis(300)),
    )
    .expect("a time limit");
    let early = recv(&channel, &mut [0; 1024], RecvFlags::empty());
    assert_eq!(early.expect_err("a word too early"), rustix::io::Errno::AGAIN);
    say(&channel, GO, "");
    assert_eq!(hear(&channel).expect("a word").0, LISTENERS);
}

#[test]
fn a_successor_that_dies_between_ready_and_commit_leaves_the_old_process_serving() {
    let (mut service, folder) = start(&[]);
    block_on(async {
        let mut connection = service.connect().await;
        let channel = be_told_to_commit(folder.path());
        drop(channel);
        service.notifications.wait_for("RELOADING=1").expect("reloading");
        service.notifications.wait_for("READY=1").expect("and ready again");
        let status = service.notifications.wait_for("STATUS=serving").expect("a status");
        assert!(status.contains("last reload failed: the successor died"), "{status}");
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
    });
}

#[test]
fn a_successor_that_hangs_does_not_keep_the_old_process_beyond_the_drain_limit() {
    let (mut service, folder) = start(&["--drain-timeout", "7s"]);
    block_on(async {
        let mut connections = Vec::new();
        for _ in 0..450 {
            let mut connection = service.connect().await;
            connection.ask(&get("/")).await.expect("an answer");
            connections.push(connection);
        }
        // One by one they come to rest, with a frame each: more than a channel takes that nobody reads.
        for (number, connection) in connections.iter_mut().enumerate() {
            let request = get(&format!("/sleep?duration={}ms", 3000 + 10 * number));
            connection.send(&request).await.expect("sent");
        }
        service.wait_for_in_flight(450).expect("in flight");
        let channel = be_told_to_commit(folder.path());
        say(&channel, ACCEPTING, "");
        for mut connection in connections {
            assert_eq!(connection.answer().await.expect("an answer").status, 200);
        }
        assert!(service.process().ends_within(Duration::from_secs(20)).expect("a look"), "it waits for ever");
        drop(channel);
    });
    let (_, log) = service.end().expect("an end");
    assert!(log.contains("the successor takes no more connections"), "{log}");
}

#[test]
fn garbage_is_hung_up_on() {
    let (service, folder) = start(&[]);
    let null = std::fs::File::open("/dev/null").expect("a file");
    let fd = std::os::fd::AsFd::as_fd(&null);
    block_on(async {
        for message in [b"x".to_vec(), vec![0xff; 60_000], frame(99, 0, ""), frame(HELLO, 200, "")] {
            let channel = knock(folder.path());
            frames::send(&channel, &message, &[fd, fd]).expect("sent");
            assert_eq!(hear(&channel), None);
            assert_eq!(who(&mut service.connect().await).await, (service.pid(), 1));
        }
    });
}

#[test]
fn one_that_stalls_is_timed_out_and_others_are_refused_meanwhile() {
    let (service, folder) = start(&["--takeover-timeout", "1s"]);
    let path = service.notifications.path();
    block_on(async {
        let mut connection = service.connect().await;
        let stalls = knock(folder.path());
        let (code, log) = reload(folder.path(), &path, &[]);
        assert!(code != Some(0) && log.contains("a takeover is under way already"), "{code:?}: {log}");
        let second = knock(folder.path());
        assert_eq!(hear(&second), Some((REFUSED, "a takeover is under way already".into())));
        assert_eq!(hear(&stalls), None, "hung up on after a second");
        assert_eq!(who(&mut connection).await, (service.pid(), 1));
        let (code, log) = reload(folder.path(), &path, &[]);
        assert_eq!(code, Some(0), "{log}");
        let (pid, _) = who(&mut connection).await;
        assert_ne!(pid, service.pid());
        end(pid);
    });
}

#[test]
fn the_end_of_the_old_process_during_a_takeover_ends_the_takeover() {
    let (service, folder) = start(&[]);
    let channel = knock(folder.path());
    say(&channel, HELLO, &std::process::id().to_string());
    say(&channel, GO, "");
    assert_eq!(hear(&channel).expect("a word").0, LISTENERS);
    service.signal(Signal::TERM);
    assert_eq!(hear(&channel), None);
    let (status, log) = service.end().expect("an end");
    assert!(status.success(), "{log}");
}

#[test]
fn a_stranger_is_sent_away() {
    let folder = tempfile::tempdir().expect("a folder");
    let nobody = 65_534;
    std::os::unix::fs::chown(folder.path(), Some(nobody), Some(nobody)).expect("root");
    let readable = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755));
    // A copy where that user can reach it.
    let binary = folder.path().join("copy");
    std::fs::copy(BINARY, &binary).expect("a copy");
    readable(folder.path()).and_then(|()| readable(&binary)).expect("permissions");
    let address = format!("unix:@stranger-{}", std::process::id());
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--clear-groups"]).arg(&binary).args(["--listen", &address]);
    command.env("RUNTIME_DIRECTORY", folder.path()).stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command).expect("a service");
    eventually("it listens", || folder.path().join("takeover").exists());
    let channel = knock(folder.path());
    assert_eq!(hear(&channel), None);
    process.signal(Signal::TERM);
    process.wait().expect("an end");
    let mut log = String::new();
    let mut stderr = process.child().stderr.take().expect("piped");
    std::io::Read::read_to_string(&mut stderr, &mut log).expect("text");
    assert!(log.contains("a stranger at the takeover socket"), "{log}");
}
