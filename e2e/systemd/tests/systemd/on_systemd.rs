//! start, stop, restart and reload of `systemctl` on real systemds: this machine's, 257 and the newest. Each test has a
//! container of its own.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use testkit::certificate::{Certificate, ClientConfig, client_of};
use testkit::client::{Connection, Target, get, post};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::release::Release;
use testkit::verbs::{iterations, repeat_under_load};
use testkit::{on_each_systemd_and_unstable, on_one, wait_until};

use crate::{NAME, app_binary, app_package, tls12_target};

on_each_systemd_and_unstable! {
    the_first_request_after_boot_starts_the_service
    service_with_many_listeners_becomes_ready
    restarts_under_saturating_load_lose_no_request
    restarts_under_paced_load_lose_no_request
    restarts_under_paced_blind_load_lose_no_request
    restarts_under_one_connection_per_request_lose_no_request
    restarts_under_post_requests_lose_no_request
    restarts_of_a_unix_socket_service_lose_no_request
    stop_finishes_the_request_in_flight
    crash_loses_only_the_requests_of_its_process
    hung_service_is_restarted_by_the_watchdog
    port_stays_open_while_the_service_fails_to_start
    missing_binary_is_logged_and_the_port_stays_open
    port_stays_open_over_forty_failed_socket_activations
    journal_entries_have_fields_and_levels
    lines_of_json_reach_the_journal_whole_and_with_their_priority
    installed_units_pass_systemd_analyze
    ten_thousand_idle_connections_survive_a_restart
    restart_with_room_for_one_descriptor_in_the_store_keeps_connections
    stored_connections_survive_five_failed_starts
    fifty_restarts_leak_no_descriptors_or_memory
    stop_closes_idle_connections
    restart_without_a_store_closes_connections_and_loses_no_request
    handover_is_logged_by_both_processes
    reload_applies_the_new_binary_environment_and_options
    failed_reload_keeps_the_old_process_and_loses_no_request
    reload_whose_successor_could_send_no_messages_is_refused
    stop_after_reloads_finishes_the_request_in_flight
    restart_during_the_drain_of_a_reload_finishes_the_request_in_flight
    stop_during_a_reload_finishes_the_request_in_flight
    systemd_ignores_no_line_of_the_units
    sighup_reloads_the_service
    random_reloads_and_restarts_lose_no_request
    watchdog_supervises_the_successor
    restarts_under_http2_close_no_connection
    reloads_under_http2_close_no_connection
    restarts_under_https_close_no_connection
    restarts_under_http2_over_tls_close_no_connection
    reloads_under_https_and_http2_close_no_connection
    release_that_adopts_only_http1_receives_only_http1_connections
    release_without_header_tables_receives_no_http2_connections
    release_that_does_not_adopt_tls_1_2_receives_no_tls_1_2_connections
    session_ticket_of_the_previous_process_is_accepted
    renewed_certificate_is_used_after_a_restart_with_credentials
    renewed_certificate_is_used_after_a_reload_with_files
    readyz_answers_503_during_a_drain_and_200_after_it
    counters_of_the_drain_are_exported_by_the_next_process
}

// Tests that need systemd 254, which this machine need not have.
on_one! { from_254_on_systemd_257 V257
    failing_release_is_restarted_with_increasing_delays
    memory_pressure_is_watched_inside_the_sandbox_before_and_after_a_reload
    preserved_store_keeps_connections_over_stop_and_start
}
on_one! { from_254_on_systemd_unstable Unstable
    failing_release_is_restarted_with_increasing_delays
    memory_pressure_is_watched_inside_the_sandbox_before_and_after_a_reload
    preserved_store_keeps_connections_over_stop_and_start
}

/// Only the kernel can report pressure for this file, so `memory_pressure_closes_the_eighth_of_the_idle_connections_that_is_longest_idle`
/// (e2e/process) uses a FIFO.
fn memory_pressure_is_watched_inside_the_sandbox_before_and_after_a_reload(systemd: Systemd) {
    let container = boot(systemd);
    for verb in ["start", "reload"] {
        container.systemctl(verb).expect("the verb succeeds");
        let main = container.show("MainPID").expect("systemctl show succeeds");
        let group = container.show("ControlGroup").expect("systemctl show succeeds");
        wait_until("the process watches its control group", || {
            let open = container.run(&["ls", "-l", &format!("/proc/{main}/fd")]).expect("the process runs");
            open.contains(&format!("{group}/memory.pressure"))
        });
    }
}

fn failing_release_is_restarted_with_increasing_delays(systemd: Systemd) {
    let container = boot(systemd);
    // A binary that fails, and a missing one.
    for bad in [Some(Release::script("exit 1").expect("the release is created")), None] {
        match bad {
            Some(bad) => container.replace_binary(bad.path()).expect("the binary is replaced"),
            None => std::fs::remove_file(container.binary()).expect("the file is removed"),
        }
        container.systemctl("start").expect_err("a bad release does not start");
        let mut last = Duration::ZERO;
        for wanted in 1..=8 {
            container.wait_for_property("NRestarts", |count| {
                count.parse::<u32>().expect("the value is a number") >= wanted
            });
            let next = container.show("RestartUSecNext").expect("systemctl show succeeds").replace(' ', "");
            let next = next.parse::<humantime::Duration>().expect("the value is a duration").into();
            assert!(next >= last, "{next:?} after {last:?}");
            last = next;
        }
        assert!(last > Duration::from_secs(1), "{last:?}");
        assert_eq!(
            container
                .run(&["systemctl", "is-active", &container.unit("socket")])
                .expect("the socket is active"),
            "active\n"
        );
        // After stop and reset-failed the next start does not wait for the delay.
        container.systemctl("stop").expect("the stop succeeds");
        container
            .run(&["systemctl", "reset-failed", &container.unit("service")])
            .expect("the state is reset");
    }
}

fn preserved_store_keeps_connections_over_stop_and_start(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "preserve", "[Service]\nFileDescriptorStorePreserve=yes\n")
        .expect("the drop-in is written");
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(generation(&mut connection).await, 1);
        container.systemctl("stop").expect("the stop succeeds");
        assert_eq!(container.show("ActiveState").expect("systemctl show succeeds"), "inactive");
        assert!(!connection.is_closed_by_server());
        container.systemctl("start").expect("the start succeeds");
        assert_eq!(generation(&mut connection).await, 2);
    });
}

/// Whether the systemd increases the delay between restarts (`RestartSteps=`), and can keep the store over a stop
/// (`FileDescriptorStorePreserve=`).
fn has_254(systemd: Systemd) -> bool {
    systemd.version(app_package()).expect("the version is known") >= 254
}

pub fn boot(systemd: Systemd) -> Container {
    Container::boot(systemd, app_package()).expect("the container boots")
}

fn the_first_request_after_boot_starts_the_service(systemd: Systemd) {
    let container = boot(systemd);
    assert_eq!(container.show("ActiveState").expect("systemctl show succeeds"), "inactive");
    let text = container.ask("/");
    assert_eq!(container.show("ActiveState").expect("systemctl show succeeds"), "active");
    assert!(
        text.starts_with(&format!("pid {},", container.show("MainPID").expect("systemctl show succeeds"))),
        "{text}"
    );
    // The first response can arrive before systemd has read the first status.
    container.wait_for_property("StatusText", |status| status.starts_with("serving on http([::]:8080): "));
}

/// systemd ignores a message of more than 4096 bytes, so that READY=1 would be lost with a longer status.
fn service_with_many_listeners_becomes_ready(systemd: Systemd) {
    let container = boot(systemd);
    let path = format!("/run/{}", "x".repeat(60));
    let lines = (0..80).map(|number| format!("ListenStream={path}{number}\n")).collect::<Vec<_>>().concat();
    container.add_to_unit("socket", "many", &format!("[Socket]\n{lines}")).expect("the drop-in is written");
    container.run(&["systemctl", "restart", &container.unit("socket")]).expect("the restart succeeds");
    container.systemctl("start").expect("the start succeeds");
    container.wait_for_property("StatusText", |status| status.contains(" ...: 0 connections, 0 in flight"));
}

/// The generation of the process that answers on this connection.
async fn generation(connection: &mut Connection) -> u64 {
    let text = connection.ask(&get("/")).await.expect("the request is answered").text();
    let number = text.split("generation ").nth(1).and_then(|rest| rest.split(',').next());
    number.expect("the body names the generation").parse().expect("the value is a number")
}

fn restarts_under_saturating_load_lose_no_request(systemd: Systemd) {
    repeat_under_load("restart", &boot(systemd), Load::saturating(&Container::target()));
}

fn restarts_under_paced_load_lose_no_request(systemd: Systemd) {
    repeat_under_load("restart", &boot(systemd), Load::paced(&Container::target()));
}

fn restarts_under_paced_blind_load_lose_no_request(systemd: Systemd) {
    repeat_under_load("restart", &boot(systemd), Load::paced_blind(&Container::target()));
}

fn restarts_under_one_connection_per_request_lose_no_request(systemd: Systemd) {
    repeat_under_load("restart", &boot(systemd), Load::connection_per_request(&Container::target()));
}

fn restarts_under_post_requests_lose_no_request(systemd: Systemd) {
    repeat_under_load("restart", &boot(systemd), Load::post(&Container::target()));
}

fn restarts_of_a_unix_socket_service_lose_no_request(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("socket", "unix", "[Socket]\nListenStream=/run/http.sock\n")
        .expect("the drop-in is written");
    container.run(&["systemctl", "restart", &container.unit("socket")]).expect("the restart succeeds");
    let target = Target::Unix(container.path("run/http.sock"));
    repeat_under_load("restart", &container, Load::paced(&target));
}

fn stop_finishes_the_request_in_flight(systemd: Systemd) {
    let container = boot(systemd);
    let text = container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        connection.ask(&get("/")).await.expect("the request is answered");
        connection.send(&get("/sleep?duration=5s")).await.expect("the bytes are sent");
        container.wait_for_property("StatusText", |status| status.contains("1 in flight"));
        let stop = std::thread::scope(|scope| {
            let stop = scope.spawn(|| container.systemctl("stop"));
            stop.join().expect("the thread does not panic")
        });
        stop.expect("the stop succeeds");
        connection.answer().await.expect("the request is answered").text()
    });
    assert_eq!(text, "slept 5s\n");
    assert_eq!(container.show("Result").expect("systemctl show succeeds"), "success");
}

fn crash_loses_only_the_requests_of_its_process(systemd: Systemd) {
    let container = boot(systemd);
    container.ask("/");
    let running = Load::saturating(&Container::target()).start(container.enter());
    let crashes = 5;
    for crash in 1..=crashes {
        container
            .run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", &container.unit("service")])
            .expect("the signal is sent");
        let restarts = crash.to_string();
        container.wait_for_property("NRestarts", |count| count == restarts);
        container.ask("/");
        // Enough responses that the load has recovered from the crash.
        running.wait_for(running.ended() + 30);
    }
    let report = running.stop();
    eprintln!("{report}");
    assert!(
        report.lost() <= report.clients * crashes,
        "more requests were lost than were in flight: {report}"
    );
    assert!(report.lost.keys().all(|kind| !kind.contains("refused")), "the port was closed: {report}");
    assert!(report.answered > report.lost(), "{report}");
}

fn hung_service_is_restarted_by_the_watchdog(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "watchdog", "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=1s\n")
        .expect("the drop-in is written");
    let before = container.ask("/");
    let pid = container.show("MainPID").expect("systemctl show succeeds");
    container
        .run(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", &container.unit("service")])
        .expect("the signal is sent");
    let state =
        || std::fs::read_to_string(container.path(&format!("proc/{pid}/stat"))).expect("the process exists");
    wait_until("the process is stopped", || state().contains(") T "));
    let after = container.ask("/");
    assert_ne!(before, after, "the same process still answers");
    let entries = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
    let is_timeout = |entry: &Value| text(entry, "MESSAGE").contains("Watchdog timeout");
    assert!(entries.iter().any(is_timeout), "systemd logged no watchdog timeout");
}

fn port_stays_open_while_the_service_fails_to_start(systemd: Systemd) {
    let container = boot(systemd);
    let (good, bad) = (
        Release::copy_of(&container).expect("the release is created"),
        Release::script("exit 1").expect("the release is created"),
    );
    container.replace_binary(bad.path()).expect("the binary is replaced");
    let text = container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        connection.send(&get("/")).await.expect("the bytes are sent");
        // Fewer from 254 on, because there the delay between restarts increases.
        let restarts = if has_254(systemd) { 9 } else { 50 };
        container.wait_for_property("NRestarts", |count| {
            count.parse::<u32>().expect("the value is a number") >= restarts
        });
        let mut late = Connection::open(&Container::target()).await.expect("the port is still open");
        late.send(&get("/")).await.expect("the bytes are sent");
        container.replace_binary(good.path()).expect("the binary is replaced");
        late.answer().await.expect("the request is answered");
        connection.answer().await.expect("the request that waited is answered").text()
    });
    assert!(text.contains("pid "), "{text}");
    assert_eq!(
        container.run(&["systemctl", "is-active", &container.unit("socket")]).expect("the socket is active"),
        "active\n"
    );
}

fn missing_binary_is_logged_and_the_port_stays_open(systemd: Systemd) {
    let container = boot(systemd);
    let good = Release::copy_of(&container).expect("the release is created");
    std::fs::remove_file(container.binary()).expect("the file is removed");
    container.inside(|| async {
        let mut early = Connection::open(&Container::target()).await.expect("the port is open");
        early.send(&get("/")).await.expect("the bytes are sent");
        container.wait_for_property("NRestarts", |count| {
            count.parse::<u32>().expect("the value is a number") >= 5
        });
        let error = format!("ExecStart={NAME} (code=exited, status=203/EXEC)");
        wait_until("the status names the error", || {
            let status = container.command(&["systemctl", "status", &container.unit("service")]).output();
            String::from_utf8_lossy(&status.expect("systemctl runs").stdout).contains(&error)
        });
        // Not with `-u`, because the process that logs it may have exited before journald looks up its unit.
        let named = |entry: &Value| text(entry, "MESSAGE").contains("locate executable");
        assert!(container.journal(&["-b"]).expect("journalctl succeeds").iter().any(named));
        if has_254(systemd) {
            // The delay increases; on 252 it stays at 100 ms.
            let next = container.show("RestartUSecNext").expect("systemctl show succeeds");
            assert_ne!(next, container.show("RestartUSec").expect("systemctl show succeeds"), "{next}");
        }
        let mut late = Connection::open(&Container::target()).await.expect("the port is still open");
        late.send(&get("/")).await.expect("the bytes are sent");
        container.replace_binary(good.path()).expect("the binary is replaced");
        for waiting in [&mut early, &mut late] {
            assert_eq!(waiting.answer().await.expect("the waiting request is answered").status, 200);
        }
    });
}

fn port_stays_open_over_forty_failed_socket_activations(systemd: Systemd) {
    let container = boot(systemd);
    // With Restart=no only the socket unit starts the service.
    container.add_to_unit("service", "restart", "[Service]\nRestart=no\n").expect("the drop-in is written");
    let (good, bad) = (
        Release::copy_of(&container).expect("the release is created"),
        Release::script("exit 1").expect("the release is created"),
    );
    container.replace_binary(bad.path()).expect("the binary is replaced");
    let service = container.unit("service");
    let starts = || {
        let entries = container.journal(&["-u", &service]).expect("journalctl succeeds");
        entries.iter().filter(|entry| text(entry, "MESSAGE").contains("Failed with result")).count()
    };
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        connection.send(&get("/")).await.expect("the bytes are sent");
        wait_until("the service was started forty times", || starts() >= 40);
        container.replace_binary(good.path()).expect("the binary is replaced");
        let answer = connection.answer().await.expect("the request that waited is answered");
        assert!(answer.text().contains("pid "), "{}", answer.text());
    });
}

pub fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry[field].as_str().unwrap_or_default()
}

fn journal_entries_have_fields_and_levels(systemd: Systemd) {
    let container = boot(systemd);
    variables(&container, &[("LOG", "info,request=debug"), ("REQUEST_TIMEOUT", "3s")]);
    container.ask("/?query");
    container.ask("/sleep?duration=1h");
    let pid = format!("_PID={}", container.show("MainPID").expect("systemctl show succeeds"));
    let mut entries = Vec::new();
    // The log has a queue, so an entry may arrive after its response.
    wait_until("both requests are in the journal", || {
        entries = container.journal(&[&pid]).expect("journalctl succeeds");
        ["/", "/sleep"].iter().all(|path| entries.iter().any(|entry| text(entry, "PATH") == *path))
    });
    let answered =
        entries.iter().find(|entry| text(entry, "PATH") == "/").expect("the first request is logged");
    assert_eq!(text(answered, "MESSAGE"), "answered");
    assert_eq!(text(answered, "PRIORITY"), "7");
    assert_eq!(text(answered, "METHOD"), "GET");
    assert_eq!(text(answered, "STATUS"), "200");
    assert_eq!(text(answered, "GENERATION"), "1");
    assert!(text(answered, "PEER").contains("127.0.0.1:"), "{answered}");
    assert!(!text(answered, "REQUEST_ID").is_empty() && !text(answered, "LATENCY").is_empty(), "{answered}");
    let failed =
        entries.iter().find(|entry| text(entry, "PATH") == "/sleep").expect("the second request is logged");
    assert_eq!((text(failed, "PRIORITY"), text(failed, "STATUS")), ("3", "503"));
    container.systemctl("stop").expect("the stop succeeds");
    for (id, message) in [
        ("c4c3d2f8a4e54b6d9d7b7a3c1f0e5a11", "serving on http([::]:8080)"),
        ("5f0f8c1e6b7a4a52b3a0d9c2e4f61b22", "draining: 0 requests in flight"),
        ("a81d6e0b9c3f47d5886e2b4f7c0d9e33", "handed over 0 connections"),
    ] {
        let found = container.journal(&[&format!("MESSAGE_ID={id}")]).expect("journalctl succeeds");
        assert!(found.len() == 1 && text(&found[0], "MESSAGE").starts_with(message), "{found:?}");
    }
}

fn lines_of_json_reach_the_journal_whole_and_with_their_priority(systemd: Systemd) {
    let container = boot(systemd);
    // The warning of this variable would be longer than the lines that journald reads whole.
    let unknown = "X".repeat(60_000);
    variables(&container, &[("LOG_FORMAT", "json"), ("ACCESS_LOG", "yes"), (&unknown, "unknown")]);
    container.ask("/?query");
    let pid = format!("_PID={}", container.show("MainPID").expect("systemctl show succeeds"));
    let mut lines: Vec<(String, Value)> = Vec::new();
    // The log has a queue, so a line may arrive after the response.
    wait_until("the request is in the journal", || {
        // `--all`, because journalctl leaves out long values otherwise.
        let entries = container.journal(&[&pid, "--all"]).expect("journalctl succeeds");
        let line = |entry: &Value| {
            let message = text(entry, "MESSAGE");
            let object = serde_json::from_str(message).unwrap_or_else(|error| panic!("{error}: {message}"));
            (text(entry, "PRIORITY").to_owned(), object)
        };
        lines = entries.iter().map(line).collect();
        lines.iter().any(|(_, object)| object["target"] == "access")
    });
    let find = |is_it: &dyn Fn(&Value) -> bool| {
        let found = lines.iter().find(|(_, object)| is_it(object));
        found.unwrap_or_else(|| panic!("missing: {lines:?}"))
    };
    let (priority, access) = find(&|object| object["target"] == "access");
    assert_eq!(priority, "6");
    assert_eq!((&access["message"], &access["status"]), (&"GET / 200".into(), &200.into()));
    let (priority, warning) = find(&|object| object["level"] == "WARN");
    assert_eq!((priority.as_str(), &warning["truncated"]), ("4", &true.into()));
    let message = text(warning, "message");
    let (beginning, end) = ("ignored environment variables", &unknown[..1_000]);
    assert!(message.starts_with(beginning) && message.ends_with(end), "{message}");
}

fn installed_units_pass_systemd_analyze(systemd: Systemd) {
    let container = boot(systemd);
    let service = container.unit("service");
    let verified = container
        .command(&["systemd-analyze", "verify", &service, &container.unit("socket")])
        .output()
        .expect("systemd-analyze runs");
    let output = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success() && !output.contains(NAME), "{output}");
    // The command fails and prints the reasons if the exposure is above 0.5 (of 10; the threshold is in tenths).
    container
        .run(&["systemd-analyze", "security", "--offline=true", "--threshold=5", "--no-pager", &service])
        .expect("the exposure is at most 0.5");
    // The relations of the limits that the comments of the unit state.
    let number = |property: &str| {
        container
            .show(property)
            .expect("systemctl show succeeds")
            .parse::<u64>()
            .expect("the value is a number")
    };
    assert!(number("LimitNOFILE") > 20_000, "it has to be above --max-connections");
    assert_ne!(container.show("WatchdogUSec").expect("systemctl show succeeds"), "0");
    assert_eq!(
        container.show("TimeoutStopUSec").expect("systemctl show succeeds"),
        "1min 15s",
        "it has to be above twice --drain-timeout"
    );
    assert_eq!(
        container.show("OOMPolicy").expect("systemctl show succeeds"),
        "continue",
        "an OOM kill of one process must not end the others"
    );
    assert_eq!(
        container.show("TimeoutStartUSec").expect("systemctl show succeeds"),
        "45s",
        "it has to be above --takeover-timeout"
    );
}

fn ten_thousand_idle_connections_survive_a_restart(systemd: Systemd) {
    // This process has the clients' ends of all connections.
    let mut fds = getrlimit(Resource::Nofile);
    fds.current = fds.maximum;
    setrlimit(Resource::Nofile, fds).expect("the limit is below the hard limit");
    let container = boot(systemd);
    container.ask("/");
    // The fastest of three, because other tests run at the same time and slow some of them down.
    let restart = |connections: usize| {
        let has_them = format!(": {connections} connections, 0 in flight");
        let took = (0..3).map(|_| {
            let begun = Instant::now();
            container.systemctl("restart").expect("the restart succeeds");
            let took = begun.elapsed();
            container.wait_for_property("StatusText", |status| status.contains(&has_them));
            took
        });
        took.min().expect("there are three restarts")
    };
    let without = restart(0);
    let with = container.inside(|| async {
        let mut connections = Vec::new();
        for number in 0..10_000 {
            let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
            // Half of them have never sent a request.
            if number % 2 == 0 {
                generation(&mut connection).await;
            }
            connections.push(connection);
        }
        let with = std::thread::scope(|scope| scope.spawn(|| restart(10_000)).join())
            .expect("the thread does not panic");
        for connection in &mut connections {
            assert_eq!(generation(connection).await, 7);
        }
        with
    });
    eprintln!("a restart: {without:?} with no connection, {with:?} with 10,000 idle ones");
    until_only_the_backup_is_stored(&container);
    assert!(with < without * 4, "{with:?} is more than four times {without:?}");
}

/// The backup takes the only place until the restart.
fn restart_with_room_for_one_descriptor_in_the_store_keeps_connections(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "store", "[Service]\nFileDescriptorStoreMax=1\n")
        .expect("the drop-in is written");
    container.inside(|| async {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        for number in 1..=3 {
            assert_eq!(generation(&mut idle).await, number);
            until_only_the_backup_is_stored(&container);
            container.systemctl("restart").expect("the restart succeeds");
        }
        assert_eq!(generation(&mut idle).await, 4);
    });
}

/// Waits until systemd's store has the channel of the backup (`outlive/src/handover/backup.rs`) and no other.
fn until_only_the_backup_is_stored(container: &Container) {
    container.wait_for_property("NFileDescriptorStore", |count| count == "1");
}

fn stored_connections_survive_five_failed_starts(systemd: Systemd) {
    let container = boot(systemd);
    let (good, bad) = (
        Release::copy_of(&container).expect("the release is created"),
        Release::script("exit 1").expect("the release is created"),
    );
    container.inside(|| async {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        let mut waiting = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(generation(&mut idle).await, 1);
        assert_eq!(generation(&mut waiting).await, 1);
        container.replace_binary(bad.path()).expect("the binary is replaced");
        assert!(container.systemctl("restart").is_err(), "the bad release started");
        waiting.send(&get("/")).await.expect("the bytes are sent");
        container.wait_for_property("NRestarts", |count| {
            count.parse::<u32>().expect("the value is a number") >= 5
        });
        // The handover channel, and the channel of the backup, which is empty.
        assert_eq!(container.show("NFileDescriptorStore").expect("systemctl show succeeds"), "2");
        container.replace_binary(good.path()).expect("the binary is replaced");
        assert!(waiting.answer().await.expect("the request is answered").text().contains("generation 2"));
        assert_eq!(generation(&mut idle).await, 2);
    });
}

fn fifty_restarts_leak_no_descriptors_or_memory(systemd: Systemd) {
    let container = boot(systemd);
    let count =
        |folder: &str| std::fs::read_dir(container.path(folder)).expect("the folder is readable").count();
    let measure = || {
        until_only_the_backup_is_stored(&container);
        let pid = container.show("MainPID").expect("systemctl show succeeds");
        let status =
            std::fs::read_to_string(container.path(&format!("proc/{pid}/status"))).expect("the process runs");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS is listed");
        let resident: u64 = resident.trim().trim_end_matches(" kB").parse().expect("the value is a number");
        (count(&format!("proc/{pid}/fd")), count("proc/1/fd"), resident)
    };
    container.inside(|| async {
        let mut connections = Vec::new();
        for _ in 0..5 {
            let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
            generation(&mut connection).await;
            connections.push(connection);
        }
        container.systemctl("restart").expect("the restart succeeds");
        for connection in &mut connections {
            assert_eq!(generation(connection).await, 2);
        }
        let before = measure();
        for _ in 0..50 {
            container.systemctl("restart").expect("the restart succeeds");
        }
        for connection in &mut connections {
            assert_eq!(generation(connection).await, 52);
        }
        let after = measure();
        eprintln!("fds of the service, of PID 1, resident kB: {before:?}, 50 restarts later {after:?}");
        // Both have additional ones for a moment: PID 1 the connection of the last systemctl, and the service those of
        // its start.
        wait_until("PID 1 holds no more fds than before", || count("proc/1/fd") <= before.1);
        wait_until("the service holds no more fds than before", || measure().0 <= before.0);
        assert!(after.2 < before.2 * 3 / 2, "{} kB, before {} kB", after.2, before.2);
    });
}

fn stop_closes_idle_connections(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        generation(&mut connection).await;
        container.systemctl("stop").expect("the stop succeeds");
        assert_eq!(connection.read_more().await.expect("the connection is not reset"), 0);
    });
}

fn restart_without_a_store_closes_connections_and_loses_no_request(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "store", "[Service]\nFileDescriptorStoreMax=0\n")
        .expect("the drop-in is written");
    container.ask("/");
    let running = Load::paced(&Container::target()).start(container.enter());
    let restarts = 10;
    for _ in 0..restarts {
        container.systemctl("restart").expect("the restart succeeds");
    }
    let report = running.stop();
    eprintln!("{restarts} restarts without a store: {report}");
    assert_eq!(report.lost(), 0, "{report}");
    assert!(report.told_to_close >= report.clients, "{report}");
    assert_eq!(report.closed_idle, 0, "a connection was closed without notice: {report}");
}

fn handover_is_logged_by_both_processes(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        generation(&mut connection).await;
        container.systemctl("restart").expect("the restart succeeds");
        generation(&mut connection).await;
    });
    let left =
        container.journal(&["MESSAGE_ID=a81d6e0b9c3f47d5886e2b4f7c0d9e33"]).expect("journalctl succeeds");
    assert_eq!((text(&left[0], "HANDED_OVER"), text(&left[0], "GENERATION")), ("1", "1"), "{left:?}");
    assert_eq!((text(&left[0], "CUT_OFF"), text(&left[0], "FINISHED")), ("0", "0"), "{left:?}");
    let mut taken = Vec::new();
    wait_until("the successor's entry is in the journal", || {
        taken =
            container.journal(&["MESSAGE_ID=1d9e4c7a2b6f4f30a5c8e0b7d3f16a55"]).expect("journalctl succeeds");
        !taken.is_empty()
    });
    assert_eq!((text(&taken[0], "TAKEN_OVER"), text(&taken[0], "GENERATION")), ("1", "2"), "{taken:?}");
    assert!(text(&taken[0], "REST_MS").parse::<u64>().expect("the value is a number") > 0, "{taken:?}");
}

// ---- reload ----

pub fn variables(container: &Container, lines: &[(&str, &str)]) {
    let prefix = NAME.to_uppercase().replace('-', "_");
    let lines: Vec<_> = lines.iter().map(|(name, value)| format!("{prefix}_{name}={value}\n")).collect();
    let text = lines.concat();
    container.write(&format!("etc/default/{NAME}"), &text).expect("the file is written");
}

fn reload_applies_the_new_binary_environment_and_options(systemd: Systemd) {
    let container = boot(systemd);
    let before = container.ask("/");
    assert!(before.contains("generation 1"), "{before}");
    container
        .replace_binary(Release::copy_of(&container).expect("the release is created").path())
        .expect("the binary is replaced");
    variables(&container, &[("BODY_LIMIT", "1KiB")]);
    let name = NAME;
    let flags = "--request-timeout 3s";
    let lines = format!(
        "[Service]\nExecStart=\nExecStart={name} {flags}\nExecReload=\nExecReload={name} takeover {flags}\n"
    );
    container.add_to_unit("service", "flags", &lines).expect("the drop-in is written");
    container.systemctl("reload").expect("the reload succeeds");
    // Everything new applies as soon as systemctl returns.
    let pid = container.show("MainPID").expect("systemctl show succeeds");
    let text = container.ask("/");
    assert!(text.starts_with(&format!("pid {pid}, generation 2,")), "{text}");
    let runs = std::fs::metadata(container.path(&format!("proc/{pid}/exe"))).expect("the process runs");
    let installed = std::fs::metadata(container.binary()).expect("the process exists");
    assert_eq!(runs.ino(), installed.ino(), "the new binary does not run");
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(
            connection.ask(&get("/sleep?duration=1h")).await.expect("the request is answered").status,
            503
        );
        assert_eq!(connection.ask(&post("/echo", 1025)).await.expect("the request is answered").status, 413);
    });
    container.wait_for_property("StatusText", |status| status.contains("3 answered"));
}

fn failed_reload_keeps_the_old_process_and_loses_no_request(systemd: Systemd) {
    let container = boot(systemd);
    // Short, because one release hangs until it, and long enough for a good release.
    variables(&container, &[("TAKEOVER_TIMEOUT", "10s")]);
    container.ask("/");
    let pid = container.show("MainPID").expect("systemctl show succeeds");
    let good = Release::copy_of(&container).expect("the release is created");
    // Only 10 clients, because the hanging release makes the load run for long.
    let running = Load { clients: 10, ..Load::paced(&Container::target()) }.start(container.enter());
    for (release, reason) in [
        // The takeover command itself fails, and systemd logs how.
        (Release::script("exit 1").expect("the release is created"), "status=1/FAILURE"),
        (Release::script("kill -KILL $$").expect("the release is created"), "status=9/KILL"),
        // The takeover command works, but the successor exits or hangs.
        (
            Release::bad_successor(&container, "exit 3").expect("the release is created"),
            "the successor exited unexpectedly",
        ),
        (
            Release::bad_successor(&container, "exec sleep 1000").expect("the release is created"),
            "no message within --takeover-timeout",
        ),
    ] {
        container.replace_binary(release.path()).expect("the binary is replaced");
        container.systemctl("reload").expect_err("a bad release does not take over");
        assert_eq!(container.show("MainPID").expect("systemctl show succeeds"), pid, "{reason}");
        assert_eq!(container.show("ActiveState").expect("systemctl show succeeds"), "active", "{reason}");
        wait_until(&format!("{reason:?} is in the journal"), || {
            let journal =
                container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
            journal.iter().any(|entry| text(entry, "MESSAGE").contains(reason))
        });
    }
    // The successor's own error is in the status.
    container.replace_binary(good.path()).expect("the binary is replaced");
    variables(&container, &[("IDLE_TIMEOUT", "soon")]);
    container.systemctl("reload").expect_err("a bad configuration does not take over");
    container
        .wait_for_property("StatusText", |status| status.contains("_IDLE_TIMEOUT: invalid value 'soon'"));
    assert_eq!(container.show("MainPID").expect("systemctl show succeeds"), pid);
    variables(&container, &[]);
    container.systemctl("reload").expect("a good release takes over");
    assert_ne!(container.show("MainPID").expect("systemctl show succeeds"), pid);
    let report = running.stop();
    eprintln!("5 failed reloads and a good one: {report}");
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
}

/// systemd would kill such a successor, because it sends no WATCHDOG=1, or together with the old process.
fn reload_whose_successor_could_send_no_messages_is_refused(systemd: Systemd) {
    let container = boot(systemd);
    for (lines, signal_reloads) in [
        ("NotifyAccess=main", true),
        ("Type=simple\nNotifyAccess=none\nWatchdogSec=0\nFileDescriptorStoreMax=0", false),
    ] {
        container
            .add_to_unit("service", "access", &format!("[Service]\n{lines}\n"))
            .expect("the drop-in is written");
        container.systemctl("restart").expect("the restart succeeds");
        container.ask("/");
        let pid = container.show("MainPID").expect("systemctl show succeeds");
        container.systemctl("reload").expect_err("the reload is refused");
        let service = container.unit("service");
        let logged = |line: &str| {
            let entries = container.journal(&["-u", &service]).expect("journalctl succeeds");
            entries.iter().any(|entry| text(entry, "MESSAGE").starts_with(line))
        };
        wait_until("the reason is logged", || {
            logged("reload failed: systemd accepts no messages from this process: set Type=notify")
        });
        assert!(container.ask("/").starts_with(&format!("pid {pid}, ")), "another process answers: {lines}");
        container
            .run(&["systemctl", "kill", "--kill-whom=main", "--signal=HUP", &service])
            .expect("the signal is sent");
        if signal_reloads {
            // The successor inherits NOTIFY_SOCKET from the main process.
            container.wait_for_property("MainPID", |main| main != pid);
        } else {
            wait_until("the signal is ignored", || logged("SIGHUP ignored: systemd accepts no messages"));
            assert_eq!(container.show("MainPID").expect("systemctl show succeeds"), pid);
        }
    }
}

/// A connection with a request that is in flight until it is released.
async fn held_request() -> Connection {
    let mut held = Connection::open(&Container::target()).await.expect("the port is open");
    held.hold().await.expect("the request is in flight");
    held
}

/// Runs `systemctl VERB`, releases a request in flight once systemd has begun to stop the service, and waits until the
/// service is in the given state.
async fn release_during(container: &Container, verb: &str, held: &mut Connection, state: &str) {
    container.run(&["systemctl", verb, "--no-block", &container.unit("service")]).expect("the job is queued");
    container.wait_for_property("ActiveState", |state| state == "deactivating");
    held.release().await.unwrap_or_else(|error| panic!("the request was cut off by a {verb}: {error:#}"));
    container.wait_for_property("ActiveState", |now| now == state);
}

fn stop_after_reloads_finishes_the_request_in_flight(systemd: Systemd) {
    let container = boot(systemd);
    container.ask("/");
    for _ in 0..3 {
        container.systemctl("reload").expect("the reload succeeds");
    }
    container.inside(|| async {
        let mut held = held_request().await;
        release_during(&container, "stop", &mut held, "inactive").await;
    });
    assert_eq!(container.show("Result").expect("systemctl show succeeds"), "success");
}

fn restart_during_the_drain_of_a_reload_finishes_the_request_in_flight(systemd: Systemd) {
    let container = boot(systemd);
    container.ask("/");
    container.inside(|| async {
        let mut held = held_request().await;
        // The reload returns although the request is in flight; the old process drains beside the new one.
        container.systemctl("reload").expect("the reload succeeds");
        release_during(&container, "restart", &mut held, "active").await;
        assert_eq!(generation(&mut held).await, 3, "the connection was not handed over twice");
    });
}

fn stop_during_a_reload_finishes_the_request_in_flight(systemd: Systemd) {
    let container = boot(systemd);
    container.ask("/");
    container.inside(|| async {
        let mut held = held_request().await;
        let hangs = Release::bad_successor(&container, "exec sleep 1000").expect("the release is created");
        container.replace_binary(hangs.path()).expect("the binary is replaced");
        let name = container.unit("service");
        container.run(&["systemctl", "reload", "--no-block", &name]).expect("the job is queued");
        // Before that, systemd may still set up the sandbox of ExecReload=, and the reload has not reached the service.
        wait_until("the successor runs", || {
            let mut all =
                std::fs::read_dir(container.path("proc")).expect("the folder is readable").flatten();
            all.any(|one| {
                std::fs::read(one.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x001000\0")
            })
        });
        // "failed", because the reload failed.
        release_during(&container, "stop", &mut held, "failed").await;
    });
    let entries = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
    let count = |words: &str| entries.iter().filter(|entry| text(entry, "MESSAGE").contains(words)).count();
    assert_eq!(count(&format!("{NAME}: reload failed: the service is being stopped")), 1);
    assert_eq!(count("code=killed"), 0);
}

fn systemd_ignores_no_line_of_the_units(systemd: Systemd) {
    let container = boot(systemd);
    // daemon-reload reads the units once more, because at boot systemd reads them before journald runs.
    container.run(&["systemctl", "daemon-reload"]).expect("the units are loaded");
    container.ask("/");
    let entries = container.journal(&["_PID=1"]).expect("journalctl succeeds");
    // Only messages that name a file of the units are about their lines. systemd 262 also logs that it ignores a
    // missing pids controller, as in a container on a host with the legacy cgroup layout.
    let unit = container.unit("service");
    let files = [format!("/{unit}:"), format!("/{unit}.d/")];
    let warnings: Vec<_> = entries
        .iter()
        .map(|entry| text(entry, "MESSAGE"))
        .filter(|message| files.iter().any(|file| message.contains(file)) && message.contains("ignoring"))
        .collect();
    assert!(warnings.is_empty(), "{warnings:?}");
}

fn sighup_reloads_the_service(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(generation(&mut connection).await, 1);
        let pid = container.show("MainPID").expect("systemctl show succeeds");
        container
            .run(&["systemctl", "kill", "--kill-whom=main", "--signal=HUP", &container.unit("service")])
            .expect("the signal is sent");
        container.wait_for_property("MainPID", |main| main != pid);
        let mut answered_by = 1;
        while answered_by == 1 {
            // The old process still had the connection: it answers until it has handed it over.
            answered_by = generation(&mut connection).await;
        }
        assert_eq!(answered_by, 2);
        container.systemctl("restart").expect("the restart succeeds");
        assert_eq!(generation(&mut connection).await, 3);
    });
}

fn random_reloads_and_restarts_lose_no_request(systemd: Systemd) {
    let container = boot(systemd);
    let preserves = has_254(systemd);
    if preserves {
        let lines = "[Service]\nFileDescriptorStorePreserve=yes\n";
        container.add_to_unit("service", "preserve", lines).expect("the drop-in is written");
    }
    container.ask("/");
    let seed = std::process::id();
    let mut random = seed;
    let running = Load::paced(&Container::target()).start(container.enter());
    for _ in 0..30 {
        // A linear congruential generator, with the seed in each failure message.
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match (random >> 16) % if preserves { 4 } else { 3 } {
            0 | 1 => container.systemctl("reload").map(drop),
            2 => container.systemctl("restart").map(drop),
            _ => container.systemctl("stop").and_then(|_| container.systemctl("start")).map(drop),
        }
        .unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    }
    let report = running.stop();
    eprintln!("30 rounds at random, seed {seed}: {report}");
    assert_eq!((report.lost(), report.connections), (0, report.clients), "seed {seed}: {report}");
}

fn watchdog_supervises_the_successor(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "watchdog", "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=1s\n")
        .expect("the drop-in is written");
    container.ask("/");
    container.systemctl("reload").expect("the reload succeeds");
    let pid = container.show("MainPID").expect("systemctl show succeeds");
    // For longer than WatchdogSec=, so the successor is the process that sends WATCHDOG=1.
    let last_ping = || {
        let time = container.show("WatchdogTimestampMonotonic").expect("systemctl show succeeds");
        Duration::from_micros(time.parse().expect("the value is a number"))
    };
    let first = last_ping();
    wait_until("the successor sends WATCHDOG=1", || last_ping() > first + Duration::from_secs(5));
    assert_eq!(
        container.show("MainPID").expect("systemctl show succeeds"),
        pid,
        "the successor was killed by the watchdog"
    );
    container
        .run(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", &container.unit("service")])
        .expect("the signal is sent");
    container.wait_for_property("MainPID", |main| main != pid);
    assert!(!container.ask("/").is_empty());
}

// ---- TLS and admin ----

fn https(clients: Arc<ClientConfig>) -> Target {
    Target::Tls(([127, 0, 0, 1], 8443).into(), clients)
}

/// A container whose service serves TLS too.
fn boot_with_tls(systemd: Systemd, certificate: &Certificate) -> Container {
    let container = boot(systemd);
    container.enable_tls(certificate).expect("TLS is enabled");
    container.ask("/");
    container
}

fn restarts_under_http2_close_no_connection(systemd: Systemd) {
    repeat_under_load("restart", &boot(systemd), Load::http2(&Container::target()));
}

fn reloads_under_http2_close_no_connection(systemd: Systemd) {
    repeat_under_load("reload", &boot(systemd), Load::http2(&Container::target()));
}

fn restarts_under_https_close_no_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    repeat_under_load(
        "restart",
        &container,
        Load::paced(&https(certificate.client(&["http/1.1"]).expect("the client configuration is valid"))),
    );
}

fn restarts_under_http2_over_tls_close_no_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    repeat_under_load(
        "restart",
        &container,
        Load::http2(&https(certificate.client(&["h2"]).expect("the client configuration is valid"))),
    );
}

fn reloads_under_https_and_http2_close_no_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let https1 = https(certificate.client(&["http/1.1"]).expect("the client configuration is valid"));
    let https2 = https(certificate.client(&["h2"]).expect("the client configuration is valid"));
    let beside = Load { clients: 5, ..Load::http2(&https2) }.start(container.enter());
    repeat_under_load("reload", &container, Load { clients: 10, ..Load::paced(&https1) });
    let report = beside.stop();
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
}

/// A release as it was before it announced with these texts what it adopts.
pub fn release_without(container: &Container, texts: &[&str]) -> tempfile::NamedTempFile {
    let mut binary = std::fs::read(container.binary()).expect("the binary is readable");
    for text in texts {
        let is_text = |place: &(usize, &[u8])| place.1 == text.as_bytes();
        let places: Vec<usize> =
            binary.windows(text.len()).enumerate().filter(is_text).map(|(place, _)| place).collect();
        assert!(!places.is_empty(), "{text}");
        for at in places {
            binary[at..at + text.len()].fill(b'-');
        }
    }
    let mut release = tempfile::NamedTempFile::new().expect("the file is created");
    release.write_all(&binary).expect("the file is written");
    release.as_file().set_permissions(std::fs::Permissions::from_mode(0o755)).expect("the mode is set");
    release
}

/// The library looks for certain texts in the binary of the next release to see which connections it adopts. An older
/// release does not contain the one for HTTP/2 and TLS connections, so it must receive only HTTP/1.1 without TLS.
fn release_that_adopts_only_http1_receives_only_http1_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let [plain, https1, https2] = targets(&certificate);
    let closed = [Load::http2(&https2), Load::paced(&https1), Load::http2(&plain)];
    replace_by_an_older_release(&container, "takes-http2-and-tls", &[Load::saturating(&plain)], &closed);
}

/// Such a release permits HTTP/2 clients no header table, and could not read the requests of a client that has one.
fn release_without_header_tables_receives_no_http2_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let [plain, https1, https2] = targets(&certificate);
    let moving = [Load::saturating(&plain), Load::paced(&https1)];
    let closed = [Load::http2(&https2), Load::http2(&plain)];
    replace_by_an_older_release(&container, "takes-header-tables-and-client-certificates", &moving, &closed);
}

fn release_that_does_not_adopt_tls_1_2_receives_no_tls_1_2_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let [plain, https1, https2] = targets(&certificate);
    let moving = [Load::saturating(&plain), Load::paced(&https1), Load::http2(&https2)];
    let over_tls12 = |protocol| tls12_target(&certificate, protocol);
    let closed = [Load::http2(&over_tls12("h2")), Load::paced(&over_tls12("http/1.1"))];
    replace_by_an_older_release(&container, "takes-tls-1.2-connections", &moving, &closed);
}

/// The service without TLS, and with TLS for HTTP/1.1 and HTTP/2.
fn targets(certificate: &Certificate) -> [Target; 3] {
    let client = |protocol| certificate.client(&[protocol]).expect("the client configuration is valid");
    [Container::target(), https(client("http/1.1")), https(client("h2"))]
}

/// Replaces the service by a release whose binary does not contain `text`, and by the present one, in turns. The
/// connections of `moving` have to stay, and those of `closed` to be closed gracefully.
fn replace_by_an_older_release(container: &Container, text: &str, moving: &[Load], closed: &[Load]) {
    let older = release_without(container, &[text]);
    let newer = std::path::Path::new(app_binary());
    for verb in ["reload", "restart"] {
        let start = |load: &Load| Load { clients: 5, ..load.clone() }.start(container.enter());
        let [moving, closed] = [moving, closed].map(|loads| loads.iter().map(start).collect::<Vec<_>>());
        for number in 0..iterations() / 2 {
            container
                .replace_binary(if number % 2 == 0 { older.path() } else { newer })
                .expect("the binary is replaced");
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
        }
        for load in moving {
            let report = load.stop();
            assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
        }
        for load in closed {
            let report = load.stop();
            eprintln!("{verb}: {report}");
            assert!(report.lost() == 0 && report.told_to_close > 0, "{report}");
        }
    }
}

fn session_ticket_of_the_previous_process_is_accepted(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    let folder = tempfile::tempdir().expect("the folder is created");
    let session = folder.path().join("session");
    let connect = |version: &str, flag: &str| {
        let script = format!(
            "printf 'GET / HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n' | \
             openssl s_client -connect 127.0.0.1:8443 {version} -ign_eof {flag} {} 2>&1",
            session.display()
        );
        let output = container.outside(&["sh", "-c", &script]).output().expect("openssl runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for (version, name) in [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")] {
        for verb in ["restart", "reload", "restart"] {
            let output = connect(version, "-sess_out");
            assert!(output.contains(&format!("New, {name}")) && output.contains("200 OK"), "{output}");
            container.systemctl(verb).expect(verb);
            let output = connect(version, "-sess_in");
            let is_resumed = output.contains(&format!("Reused, {name}"));
            assert!(is_resumed && output.contains("200 OK"), "after a {verb}: {output}");
        }
    }
}

fn renewed_certificate_is_used_after_a_restart_with_credentials(systemd: Systemd) {
    let (old, new) = (
        Certificate::new().expect("openssl creates a certificate"),
        Certificate::new().expect("openssl creates a certificate"),
    );
    let container = boot_with_tls(systemd, &old);
    renew(&container, "restart", &old, &new);
}

fn renewed_certificate_is_used_after_a_reload_with_files(systemd: Systemd) {
    let (old, new) = (
        Certificate::new().expect("openssl creates a certificate"),
        Certificate::new().expect("openssl creates a certificate"),
    );
    let container = boot(systemd);
    container.install_certificate(&old).expect("the file is written");
    let folder = format!("/etc/{NAME}");
    variables(
        &container,
        &[("TLS_CERT", &format!("{folder}/tls.crt")), ("TLS_KEY", &format!("{folder}/tls.key"))],
    );
    container.start_socket("tls").expect("the socket unit starts");
    container.ask("/");
    renew(&container, "reload", &old, &new);
}

/// Replaces the certificate and runs `systemctl VERB` under load, and asserts that no request is lost.
fn renew(container: &Container, verb: &str, old: &Certificate, new: &Certificate) {
    let of = |certificates: &[&Certificate]| {
        https(client_of(certificates, &["http/1.1"]).expect("the client configuration is valid"))
    };
    let handshake = |certificate: &Certificate| {
        let target = of(&[certificate]);
        container.inside(|| async move { Connection::open(&target).await.is_ok() })
    };
    assert!(handshake(old) && !handshake(new));
    let running = Load { clients: 10, ..Load::paced(&of(&[old, new])) }.start(container.enter());
    container.install_certificate(new).expect("the file is written");
    assert!(handshake(old) && !handshake(new), "the certificate changed before the verb");
    container.systemctl(verb).expect("systemctl succeeds");
    assert!(handshake(new) && !handshake(old));
    let report = running.stop();
    eprintln!("renewed by a {verb}: {report}");
    assert_eq!(report.lost(), 0, "{report}");
}

fn readyz_answers_503_during_a_drain_and_200_after_it(systemd: Systemd) {
    let container = boot(systemd);
    container.start_socket("admin").expect("the socket unit starts");
    let readyz = || ask_admin(&container, "/readyz");
    assert_eq!(readyz(), "ready\n200");
    container.inside(|| async {
        let mut held = held_request().await;
        let name = container.unit("service");
        container.run(&["systemctl", "restart", "--no-block", &name]).expect("the restart succeeds");
        wait_until("the service drains", || readyz() == "draining\n503");
        held.release().await.expect("the request is answered");
        wait_until("the next process is ready", || readyz() == "ready\n200");
        assert_eq!(generation(&mut held).await, 2);
    });
}

fn counters_of_the_drain_are_exported_by_the_next_process(systemd: Systemd) {
    let container = boot(systemd);
    variables(&container, &[("DRAIN_TIMEOUT", "1s")]);
    container.start_socket("admin").expect("the socket unit starts");
    container.inside(|| async {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        for last in 2..=3 {
            let mut endless = Connection::open(&Container::target()).await.expect("the port is open");
            endless.send(&get("/sleep?duration=1h")).await.expect("the bytes are sent");
            wait_until("the request is in flight", || {
                ask_admin(&container, "/metrics").contains("\nhttp_requests_in_flight 2\n")
            });
            container.systemctl("restart").expect("the restart succeeds");
            assert_eq!(generation(&mut idle).await, last);
        }
    });
    let metrics = ask_admin(&container, "/metrics");
    assert!(metrics.contains("\noutlive_requests_cut_off_total 2\n"), "{metrics}");
    assert!(metrics.contains("\noutlive_connections_handed_over_total 2\n"), "{metrics}");
    assert!(metrics.contains("\noutlive_connections_taken_over_total 1\n"), "{metrics}");
}

/// The body of a response of the admin socket, followed by its status.
pub fn ask_admin(container: &Container, path: &str) -> String {
    let socket = container.path(&format!("run/{NAME}-admin.sock"));
    let mut curl = container.outside(&["curl", "--silent", "--max-time", "60", "--unix-socket"]);
    curl.arg(socket).args(["--write-out", "%{response_code}"]).arg(format!("http://localhost{path}"));
    String::from_utf8_lossy(&curl.output().expect("curl runs").stdout).into_owned()
}
