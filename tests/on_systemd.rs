//! What `systemctl` promises, on real systemds: this machine's and 257, each test in a container of its
//! own.

use std::time::{Duration, Instant};

use harness::client::{Connection, Target, get};
use harness::container::{Container, Package, Systemd};
use harness::load::{Connections, Load};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::Value;

/// Restarts in a row, each as soon as the one before is done.
const RESTARTS: u32 = 60;

/// Each promise, once for each systemd.
macro_rules! promises {
    ($($promise:ident)*) => {
        mod this_systemd {
            $(#[test] fn $promise() { super::$promise(harness::container::Systemd::Host); })*
        }
        mod systemd_257 {
            $(#[test] fn $promise() { super::$promise(harness::container::Systemd::V257); })*
        }
    };
}

promises! {
    the_first_request_after_boot_starts_the_service
    restarts_under_ten_connections_flat_out_lose_nothing
    restarts_under_fifty_thinking_connections_lose_nothing
    restarts_under_fifty_blind_connections_lose_nothing
    restarts_under_one_connection_a_request_lose_nothing
    restarts_under_posts_lose_nothing
    restarts_under_a_unix_socket_lose_nothing
    a_stop_lets_the_request_in_flight_finish
    a_crash_costs_its_own_requests_and_no_others
    a_hung_service_is_restarted_by_the_watchdog
    a_service_that_dies_at_start_does_not_close_the_port
    the_journal_has_fields_and_levels
    the_installed_units_are_sound_and_safe
    restarts_with_a_slow_request_in_flight_make_others_wait_for_one_start
    ten_thousand_idle_connections_survive_a_restart
    a_release_that_dies_five_times_leaves_the_connections_parked
    two_hundred_restarts_leak_nothing
    a_stop_closes_idle_connections
    without_a_store_connections_are_told_to_close_and_nothing_is_lost
    both_ends_of_a_handover_are_in_the_journal
}

#[test]
fn a_preserved_store_keeps_connections_over_stop_and_start() {
    let container = boot(Systemd::V257);
    container
        .add_to_unit("service", "preserve", "[Service]\nFileDescriptorStorePreserve=yes\n")
        .expect("a drop-in");
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(generation(&mut connection).await, 1);
        container.systemctl("stop").expect("a stop");
        assert_eq!(container.show("ActiveState").expect("a state"), "inactive");
        assert!(!connection.is_closed_by_server());
        container.systemctl("start").expect("a start");
        assert_eq!(generation(&mut connection).await, 2);
    });
}

fn boot(systemd: Systemd) -> Container {
    let package = Package {
        name: env!("CARGO_PKG_NAME"),
        binary: env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME"))),
        folder: env!("CARGO_MANIFEST_DIR"),
    };
    Container::boot(systemd, package).expect("a container")
}

/// One request on a connection of its own; gives the text of the answer.
fn ask(container: &Container, path: &str) -> String {
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        let answer = connection.ask(&get(path)).await.expect("an answer");
        answer.text()
    })
}

fn the_first_request_after_boot_starts_the_service(systemd: Systemd) {
    let container = boot(systemd);
    assert_eq!(container.show("ActiveState").expect("a state"), "inactive");
    let text = ask(&container, "/");
    assert_eq!(container.show("ActiveState").expect("a state"), "active");
    assert!(text.starts_with(&format!("pid {},", container.show("MainPID").expect("a pid"))), "{text}");
    assert!(container.show("StatusText").expect("a status").starts_with("serving on http(8080): "));
}

/// Which generation answers on this connection.
async fn generation(connection: &mut Connection) -> u64 {
    let text = connection.ask(&get("/")).await.expect("an answer").text();
    let number = text.split("generation ").nth(1).and_then(|rest| rest.split(',').next());
    number.expect("a generation").parse().expect("a number")
}

/// Restarts the service again and again under `load`: no request is lost, no connection is closed.
fn restart_under(container: &Container, load: Load) {
    let one_each = load.connections == Connections::OneEach;
    ask(container, "/");
    let mut slowest = Duration::ZERO;
    let running = load.start(container.enter());
    for _ in 0..RESTARTS {
        let begun = Instant::now();
        container.systemctl("restart").expect("a restart");
        slowest = slowest.max(begun.elapsed());
    }
    let report = running.stop();
    eprintln!("{RESTARTS} restarts, the slowest {} ms: {report}", slowest.as_millis());
    assert!(report.answered > u64::from(RESTARTS), "hardly a load: {report}");
    assert_eq!(report.lost(), 0, "{report}");
    if one_each {
        assert_eq!(report.connections, report.answered, "{report}");
    } else {
        assert_eq!(report.connections, report.asked_for, "{report}");
    }
}

fn restarts_under_ten_connections_flat_out_lose_nothing(systemd: Systemd) {
    restart_under(&boot(systemd), Load::w1(&Container::target()));
}

fn restarts_under_fifty_thinking_connections_lose_nothing(systemd: Systemd) {
    restart_under(&boot(systemd), Load::w2(&Container::target()));
}

fn restarts_under_fifty_blind_connections_lose_nothing(systemd: Systemd) {
    restart_under(&boot(systemd), Load::w3(&Container::target()));
}

fn restarts_under_one_connection_a_request_lose_nothing(systemd: Systemd) {
    restart_under(&boot(systemd), Load::w4(&Container::target()));
}

fn restarts_under_posts_lose_nothing(systemd: Systemd) {
    restart_under(&boot(systemd), Load::post(&Container::target()));
}

fn restarts_under_a_unix_socket_lose_nothing(systemd: Systemd) {
    let container = boot(systemd);
    container.add_to_unit("socket", "unix", "[Socket]\nListenStream=/run/http.sock\n").expect("a drop-in");
    container.run(&["systemctl", "restart", &container.unit("socket")]).expect("a restart");
    let target = Target::Unix(container.path("run/http.sock"));
    restart_under(&container, Load::w2(&target));
}

fn a_stop_lets_the_request_in_flight_finish(systemd: Systemd) {
    let container = boot(systemd);
    let text = container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        connection.ask(&get("/")).await.expect("an answer");
        connection.send(&get("/sleep?duration=2s")).await.expect("sent");
        while !container.show("StatusText").expect("a status").contains("1 in flight") {}
        let stop = std::thread::scope(|scope| {
            let stop = scope.spawn(|| container.systemctl("stop"));
            stop.join().expect("a stop")
        });
        stop.expect("a stop");
        connection.answer().await.expect("the answer").text()
    });
    assert_eq!(text, "slept 2s\n");
    assert_eq!(container.show("Result").expect("a result"), "success");
}

fn a_crash_costs_its_own_requests_and_no_others(systemd: Systemd) {
    let container = boot(systemd);
    ask(&container, "/");
    let running = Load::w1(&Container::target()).start(container.enter());
    let crashes = 5;
    for crash in 1..=crashes {
        container
            .run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", &container.unit("service")])
            .expect("a kill");
        let restarts = crash.to_string();
        while container.show("NRestarts").expect("a count") != restarts {}
        ask(&container, "/");
    }
    let report = running.stop();
    eprintln!("{report}");
    assert!(report.lost() <= report.asked_for * crashes, "more than was in flight: {report}");
    assert!(report.lost.keys().all(|kind| !kind.contains("refused")), "the port was closed: {report}");
    assert!(report.answered > report.lost(), "{report}");
}

fn a_hung_service_is_restarted_by_the_watchdog(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "watchdog", "[Service]\nWatchdogSec=1s\nTimeoutAbortSec=1s\n")
        .expect("a drop-in");
    let before = ask(&container, "/");
    let pid = container.show("MainPID").expect("a pid");
    container
        .run(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", &container.unit("service")])
        .expect("sent");
    let state = || std::fs::read_to_string(container.path(&format!("proc/{pid}/stat"))).expect("it is there");
    while !state().contains(") T ") {}
    let after = ask(&container, "/");
    assert_ne!(before, after, "another process answers");
    let timeouts = container.journal(&["-u", &container.unit("service")]).expect("a journal");
    let said = |entry: &Value| text(entry, "MESSAGE").contains("Watchdog timeout");
    assert!(timeouts.iter().any(said), "systemd says why");
}

/// An executable to be put in the place of the installed one.
struct Release(tempfile::TempPath);

impl Release {
    fn copy_of(container: &Container) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file").into_temp_path();
        std::fs::copy(container.binary(), &file).expect("a copy");
        Self::executable(file)
    }

    fn script(lines: &str) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file").into_temp_path();
        std::fs::write(&file, format!("#!/bin/sh\n{lines}\n")).expect("written");
        Self::executable(file)
    }

    fn executable(file: tempfile::TempPath) -> Self {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&file, mode).expect("executable");
        Self(file)
    }

    fn path(&self) -> &std::path::Path {
        &self.0
    }
}

fn a_service_that_dies_at_start_does_not_close_the_port(systemd: Systemd) {
    let container = boot(systemd);
    let (good, bad) = (Release::copy_of(&container), Release::script("exit 1"));
    container.replace_binary(bad.path()).expect("replaced");
    let text = container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        connection.send(&get("/")).await.expect("sent");
        while container.show("NRestarts").expect("a count").parse::<u32>().expect("a number") < 50 {}
        let mut late = Connection::open(&Container::target()).await.expect("the port is still open");
        late.send(&get("/")).await.expect("sent");
        container.replace_binary(good.path()).expect("replaced");
        late.answer().await.expect("an answer");
        connection.answer().await.expect("the request that waited is answered").text()
    });
    assert!(text.contains("pid "), "{text}");
    assert_eq!(
        container.run(&["systemctl", "is-active", &container.unit("socket")]).expect("active"),
        "active\n"
    );
}

fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry[field].as_str().unwrap_or_default()
}

fn the_journal_has_fields_and_levels(systemd: Systemd) {
    let container = boot(systemd);
    let prefix = env!("CARGO_PKG_NAME").to_uppercase().replace('-', "_");
    let variables = format!("{prefix}_LOG=info,request=debug\n{prefix}_REQUEST_TIMEOUT=300ms\n");
    container.write(&format!("etc/default/{}", env!("CARGO_PKG_NAME")), &variables).expect("written");
    ask(&container, "/?query");
    ask(&container, "/sleep?duration=10s");
    let pid = format!("_PID={}", container.show("MainPID").expect("a pid"));
    let entries = container.journal(&[&pid]).expect("a journal");
    let answered = entries.iter().find(|entry| text(entry, "PATH") == "/").expect("the first request");
    assert_eq!(text(answered, "MESSAGE"), "answered");
    assert_eq!(text(answered, "PRIORITY"), "7");
    assert_eq!(text(answered, "METHOD"), "GET");
    assert_eq!(text(answered, "STATUS"), "200");
    assert_eq!(text(answered, "GENERATION"), "1");
    assert!(text(answered, "PEER").contains("127.0.0.1:"), "{answered}");
    assert!(!text(answered, "REQUEST_ID").is_empty() && !text(answered, "LATENCY").is_empty(), "{answered}");
    let failed = entries.iter().find(|entry| text(entry, "PATH") == "/sleep").expect("the second request");
    assert_eq!((text(failed, "PRIORITY"), text(failed, "STATUS")), ("3", "503"));
    container.systemctl("stop").expect("a stop");
    for (id, message) in [
        ("c4c3d2f8a4e54b6d9d7b7a3c1f0e5a11", "serving on http(8080)"),
        ("5f0f8c1e6b7a4a52b3a0d9c2e4f61b22", "draining: 0 in flight"),
        ("a81d6e0b9c3f47d5886e2b4f7c0d9e33", "handed over 0 connections"),
    ] {
        let found = container.journal(&[&format!("MESSAGE_ID={id}")]).expect("a journal");
        assert!(found.len() == 1 && text(&found[0], "MESSAGE").starts_with(message), "{found:?}");
    }
}

fn the_installed_units_are_sound_and_safe(systemd: Systemd) {
    let container = boot(systemd);
    let service = container.unit("service");
    let verified = container
        .command(&["systemd-analyze", "verify", &service, &container.unit("socket")])
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success() && !said.contains(env!("CARGO_PKG_NAME")), "{said}");
    // Fails, and says what, where the exposure is above 0.5.
    container
        .run(&["systemd-analyze", "security", "--offline=true", "--threshold=5", "--no-pager", &service])
        .expect("an exposure of 0.5 at the most");
}

fn restarts_with_a_slow_request_in_flight_make_others_wait_for_one_start(systemd: Systemd) {
    let container = boot(systemd);
    ask(&container, "/");
    let running = Load::w2(&Container::target()).start(container.enter());
    for _ in 0..3 {
        let text = container.inside(|| async {
            let mut slow = Connection::open(&Container::target()).await.expect("the port is open");
            slow.send(&get("/sleep?duration=3s")).await.expect("sent");
            while !container.show("StatusText").expect("a status").contains("in flight") {}
            std::thread::scope(|scope| scope.spawn(|| container.systemctl("restart")).join())
                .expect("joined")
                .expect("a restart");
            slow.answer().await.expect("the answer").text()
        });
        assert_eq!(text, "slept 3s\n");
    }
    let report = running.stop();
    eprintln!("a request of 3 s in flight at each of 3 restarts: {report}");
    assert_eq!((report.lost(), report.connections), (0, report.asked_for), "{report}");
    assert!(report.longest <= Duration::from_millis(250), "{report}");
}

fn ten_thousand_idle_connections_survive_a_restart(systemd: Systemd) {
    // This process holds the clients' ends.
    let mut fds = getrlimit(Resource::Nofile);
    fds.current = fds.maximum;
    setrlimit(Resource::Nofile, fds).expect("within the hard limit");
    let container = boot(systemd);
    ask(&container, "/");
    // The fastest of three: what other tests do meanwhile is not to be measured.
    let restart = |connections: usize| {
        let has_them = format!(": {connections} connections, 0 in flight");
        let took = (0..3).map(|_| {
            let begun = Instant::now();
            container.systemctl("restart").expect("a restart");
            let took = begun.elapsed();
            while !container.show("StatusText").expect("a status").contains(&has_them) {}
            took
        });
        took.min().expect("three")
    };
    let without = restart(0);
    let with = container.inside(|| async {
        let mut connections = Vec::new();
        for number in 0..10_000 {
            let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
            // Every other one has been used.
            if number % 2 == 0 {
                generation(&mut connection).await;
            }
            connections.push(connection);
        }
        let with = std::thread::scope(|scope| scope.spawn(|| restart(10_000)).join()).expect("restarts");
        for connection in &mut connections {
            assert_eq!(generation(connection).await, 7);
        }
        with
    });
    eprintln!("a restart: {without:?} with no connection, {with:?} with 10,000 idle ones");
    assert_eq!(container.show("NFileDescriptorStore").expect("a count"), "0");
    assert!(with < without * 4, "{with:?} is far from {without:?}");
}

fn a_release_that_dies_five_times_leaves_the_connections_parked(systemd: Systemd) {
    let container = boot(systemd);
    let (good, bad) = (Release::copy_of(&container), Release::script("exit 1"));
    container.inside(|| async {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        let mut waiting = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(generation(&mut idle).await, 1);
        assert_eq!(generation(&mut waiting).await, 1);
        container.replace_binary(bad.path()).expect("replaced");
        assert!(container.systemctl("restart").is_err(), "a bad release does not start");
        waiting.send(&get("/")).await.expect("sent");
        while container.show("NRestarts").expect("a count").parse::<u32>().expect("a number") < 5 {}
        assert_eq!(container.show("NFileDescriptorStore").expect("a count"), "1");
        container.replace_binary(good.path()).expect("replaced");
        assert!(waiting.answer().await.expect("an answer").text().contains("generation 2"));
        assert_eq!(generation(&mut idle).await, 2);
    });
}

fn two_hundred_restarts_leak_nothing(systemd: Systemd) {
    let container = boot(systemd);
    let count = |folder: &str| std::fs::read_dir(container.path(folder)).expect("a folder").count();
    let measure = || {
        let pid = container.show("MainPID").expect("a pid");
        let status = std::fs::read_to_string(container.path(&format!("proc/{pid}/status"))).expect("it runs");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        let resident: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
        let stored = container.show("NFileDescriptorStore").expect("a count");
        (count(&format!("proc/{pid}/fd")), count("proc/1/fd"), stored, resident)
    };
    container.inside(|| async {
        let mut connections = Vec::new();
        for _ in 0..5 {
            let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
            generation(&mut connection).await;
            connections.push(connection);
        }
        container.systemctl("restart").expect("a restart");
        for connection in &mut connections {
            assert_eq!(generation(connection).await, 2);
        }
        let before = measure();
        for _ in 0..200 {
            container.systemctl("restart").expect("a restart");
        }
        for connection in &mut connections {
            assert_eq!(generation(connection).await, 202);
        }
        let after = measure();
        eprintln!(
            "fds of the service, of PID 1, stored, resident kB: {before:?}, 200 restarts later {after:?}"
        );
        assert_eq!((before.0, before.1, &before.2), (after.0, after.1, &after.2));
        assert!(after.3 < before.3 * 3 / 2, "{} kB, before {} kB", after.3, before.3);
    });
}

fn a_stop_closes_idle_connections(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        generation(&mut connection).await;
        container.systemctl("stop").expect("a stop");
        assert_eq!(connection.read_more().await.expect("closed, not reset"), 0);
    });
}

fn without_a_store_connections_are_told_to_close_and_nothing_is_lost(systemd: Systemd) {
    let container = boot(systemd);
    container.add_to_unit("service", "store", "[Service]\nFileDescriptorStoreMax=0\n").expect("a drop-in");
    ask(&container, "/");
    let running = Load::w2(&Container::target()).start(container.enter());
    let restarts = 10;
    for _ in 0..restarts {
        container.systemctl("restart").expect("a restart");
    }
    let report = running.stop();
    eprintln!("{restarts} restarts without a store: {report}");
    assert_eq!(report.lost(), 0, "{report}");
    assert!(report.told_to_close >= report.asked_for, "{report}");
    assert_eq!(report.closed_idle, 0, "each is told: {report}");
}

fn both_ends_of_a_handover_are_in_the_journal(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        generation(&mut connection).await;
        container.systemctl("restart").expect("a restart");
        generation(&mut connection).await;
    });
    let left = container.journal(&["MESSAGE_ID=a81d6e0b9c3f47d5886e2b4f7c0d9e33"]).expect("a journal");
    assert_eq!((text(&left[0], "HANDED_OVER"), text(&left[0], "GENERATION")), ("1", "1"), "{left:?}");
    assert_eq!((text(&left[0], "CUT_OFF"), text(&left[0], "FINISHED")), ("0", "0"), "{left:?}");
    let taken = container.journal(&["MESSAGE_ID=1d9e4c7a2b6f4f30a5c8e0b7d3f16a55"]).expect("a journal");
    assert_eq!((text(&taken[0], "TAKEN_OVER"), text(&taken[0], "GENERATION")), ("1", "2"), "{taken:?}");
    assert!(text(&taken[0], "REST_MS").parse::<u64>().expect("a number") > 0, "{taken:?}");
}
