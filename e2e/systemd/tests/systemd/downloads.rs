//! Downloads that take longer than the drain limit, over several reloads (`--linger-timeout`).

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use testkit::client::Connection;
use testkit::container::{Container, Systemd};
use testkit::{on_each_systemd_and_unstable, wait_until};

use crate::on_systemd::{boot, variables};

on_each_systemd_and_unstable! {
    downloads_over_three_reloads_are_finished
    stop_ends_old_processes_within_the_drain_limit
    restart_waits_for_old_processes_within_the_drain_limit
}

const DRAIN_LIMIT: Duration = Duration::from_secs(3);
/// At this rate a download takes 30 s, which is ten times the drain limit.
const BYTES_PER_SECOND: usize = 20_000;
const SIZE: usize = 600_000;

/// A container whose service has the drain limit.
fn boot_with_limit(systemd: Systemd) -> Container {
    let container = boot(systemd);
    variables(&container, &[("DRAIN_TIMEOUT", "3s")]);
    container.ask("/");
    container
}

/// curl, which sends a file to /echo, and receives it as slowly as it sends it.
fn download(container: &Container, from: &Path, to: &Path) -> Child {
    let rate = BYTES_PER_SECOND.to_string();
    let [data, to] = [format!("@{}", from.display()), to.display().to_string()];
    let url = "http://127.0.0.1:8080/echo";
    let mut curl = container.outside(&[
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--limit-rate",
        &rate,
        "--data-binary",
        &data,
        "--output",
        &to,
        url,
    ]);
    curl.stdin(Stdio::null()).stderr(Stdio::inherit()).spawn().expect("curl starts")
}

fn wait_for_status(container: &Container, text: &str) {
    container.wait_for_property("StatusText", |status| status.contains(text));
}

/// How many processes the service has.
fn processes(container: &Container) -> u32 {
    let tasks = container.run(&["systemctl", "status", "--no-pager", &container.unit("service")]);
    // The exit code of `status` is not 0 while the service is not active.
    let text = tasks.unwrap_or_else(|error| error.to_string());
    text.lines()
        .filter(|line| line.contains("─") && line.contains(crate::NAME))
        .count()
        .try_into()
        .expect("few")
}

fn downloads_over_three_reloads_are_finished(systemd: Systemd) {
    let container = boot_with_limit(systemd);
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let from = folder.path().join("from");
    let bytes: Vec<u8> = (0..=250).cycle().take(SIZE).collect();
    std::fs::write(&from, &bytes).expect("the file is written");
    let mut downloads = Vec::new();
    for number in 1..=3 {
        let to = folder.path().join(number.to_string());
        downloads.push((download(&container, &from, &to), to));
        wait_for_status(&container, " 1 in flight");
        container.systemctl("reload").expect("the reload succeeds");
        assert_eq!(container.show("ActiveState").expect("systemctl show succeeds"), "active");
    }
    wait_for_status(&container, "; 3 old processes still send 3 responses");
    assert_eq!(processes(&container), 4);
    assert!(container.ask("/").contains("generation 4"));
    for (mut curl, to) in downloads {
        assert!(curl.wait().expect("curl ends").success());
        assert_eq!(std::fs::read(to).expect("the file is there"), bytes, "the download is not whole");
    }
    wait_until("the old processes exit", || processes(&container) == 1);
    container.wait_for_property("StatusText", |status| !status.contains("old process"));
}

/// A request in flight in an old process, beyond its drain limit.
async fn held_beyond_the_drain_limit(container: &Container) -> Connection {
    let mut held = Connection::open(&Container::target()).await.expect("the port is open");
    held.hold().await.expect("the request is in flight");
    container.systemctl("reload").expect("the reload succeeds");
    wait_for_status(container, "; 1 old process still sends 1 response");
    held
}

fn stop_ends_old_processes_within_the_drain_limit(systemd: Systemd) {
    let container = boot_with_limit(systemd);
    container.inside(|| async {
        let mut held = held_beyond_the_drain_limit(&container).await;
        let begun = Instant::now();
        container.systemctl("stop").expect("the stop succeeds");
        let took = begun.elapsed();
        // The upper bound is far below the kill of systemd, which is at TimeoutStopSec=75s.
        assert!(took >= DRAIN_LIMIT && took < DRAIN_LIMIT * 5, "{took:?}");
        held.release().await.expect_err("the response is cut off");
    });
    assert_eq!(container.show("Result").expect("systemctl show succeeds"), "success");
    let entries = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
    let messages: Vec<_> = entries.iter().filter_map(|entry| entry["MESSAGE"].as_str()).collect();
    assert!(
        messages.iter().any(|line| line.starts_with("cut off at the drain limit: request /echo")),
        "{messages:?}"
    );
}

fn restart_waits_for_old_processes_within_the_drain_limit(systemd: Systemd) {
    let container = boot_with_limit(systemd);
    container.inside(|| async {
        let mut held = held_beyond_the_drain_limit(&container).await;
        let name = container.unit("service");
        container.run(&["systemctl", "restart", "--no-block", &name]).expect("the job is queued");
        container.wait_for_property("ActiveState", |state| state == "deactivating");
        held.release().await.expect("the response is whole");
        container.wait_for_property("ActiveState", |state| state == "active");
        // The connection went to the second process, and from there to the third.
        let answer = held.ask(&testkit::client::get("/")).await.expect("the request is answered").text();
        assert!(answer.contains("generation 3"), "{answer}");
    });
}
