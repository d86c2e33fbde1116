//! Crashes on real systemds: a connection that was parked when its process was killed stays open, and the next process
//! answers its next request.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2, Target, get};
use testkit::container::{Container, Systemd};
use testkit::{on_each_systemd, wait_until};

use crate::on_systemd::{ask_admin, variables};
use crate::{app_package, tls_target, tls12_target};

/// A fifth each over HTTP/1.1, and over HTTP/1.1 and HTTP/2 with TLS 1.3 and with TLS 1.2.
const CONNECTIONS: usize = 300;
const CRASHES: usize = 3;

on_each_systemd! {
    crash_closes_no_parked_connection
    connection_that_is_served_during_a_crash_is_closed
    crash_soon_after_a_reload_does_not_wait_for_the_requests_of_the_old_process
    crash_during_the_drain_of_a_reload_closes_no_parked_connection
}

enum Client {
    Http1(Connection),
    Http2(Http2),
}

impl Client {
    async fn open(target: &Target, is_http2: bool) -> Self {
        if is_http2 {
            Self::Http2(Http2::open(target).await.expect("the port is open"))
        } else {
            Self::Http1(Connection::open(target).await.expect("the port is open"))
        }
    }

    /// The pid of the process that answers on this connection.
    async fn pid(&mut self) -> String {
        let text = match self {
            Self::Http1(connection) => {
                connection.ask(&get("/")).await.expect("the connection is open").text()
            }
            Self::Http2(connection) => {
                connection.get("/").await.expect("the request is answered").expect("the connection is open").1
            }
        };
        let pid = text.strip_prefix("pid ").and_then(|text| text.split(',').next());
        pid.unwrap_or_else(|| panic!("no pid in {text:?}")).to_owned()
    }
}

fn boot(systemd: Systemd, certificate: &Certificate) -> Container {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.enable_tls(certificate).expect("TLS is enabled");
    container.start_socket("admin").expect("the socket unit starts");
    container.systemctl("start").expect("the start succeeds");
    container
}

/// Kills the main process, and waits until another one serves. Returns its pid.
pub fn crash(container: &Container, restarts: usize) -> String {
    container
        .run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", &container.unit("service")])
        .expect("the signal is sent");
    container.wait_for_property("NRestarts", |count| count == restarts.to_string());
    container.wait_for_property("SubState", |state| state == "running");
    container.show("MainPID").expect("systemctl show succeeds")
}

/// Waits until this number of connections has duplicates. The container needs the admin socket.
pub fn until_backed_up(container: &Container, count: usize) {
    let line = format!("\noutlive_connections_backed_up {count}\n");
    wait_until("the connections have duplicates", || ask_admin(container, "/metrics").contains(&line));
}

fn crash_closes_no_parked_connection(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot(systemd, &certificate);
    let targets = [
        (Container::target(), false),
        (tls_target(&certificate, "http/1.1"), false),
        (tls_target(&certificate, "h2"), true),
        (tls12_target(&certificate, "http/1.1"), false),
        (tls12_target(&certificate, "h2"), true),
    ];
    let opened =
        targets.iter().cycle().take(CONNECTIONS).map(|(target, is_http2)| Client::open(target, *is_http2));
    container.inside(async || {
        let mut clients = join_all(opened).await;
        for restarts in 1..=CRASHES {
            // Uses each connection again, so that its state changes and an old duplicate could not continue it.
            join_all(clients.iter_mut().map(Client::pid)).await;
            until_backed_up(&container, CONNECTIONS);
            let main = crash(&container, restarts);
            for pid in join_all(clients.iter_mut().map(Client::pid)).await {
                assert_eq!(pid, main);
            }
        }
    });
    // The restart hands the connections over, and the duplicates of the old process are stale afterwards.
    container.systemctl("restart").expect("the restart succeeds");
    let journal = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
    let took_over = |entry: &serde_json::Value| {
        entry["MESSAGE"].as_str().is_some_and(|line| line.contains("took over 300 connections"))
    };
    assert!(journal.iter().any(took_over), "the restart took over other connections");
}

/// Its duplicate from before is stale, so the client receives no second response and no response to an old request.
fn connection_that_is_served_during_a_crash_is_closed(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot(systemd, &certificate);
    container.inside(async || {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        connection.ask(&get("/")).await.expect("the request is answered");
        until_backed_up(&container, 1);
        connection.send(&get("/sleep?duration=60s")).await.expect("the bytes are sent");
        container.wait_for_property("StatusText", |status| status.contains("1 in flight"));
        crash(&container, 1);
        assert_eq!(connection.read_more().await.unwrap_or(0), 0, "the connection is closed");
    });
}

/// systemd starts the service again only when the old process of the reload has exited too.
fn crash_soon_after_a_reload_does_not_wait_for_the_requests_of_the_old_process(systemd: Systemd) {
    // Half of the drain limit, within which the old process serves its requests.
    const SOON: Duration = Duration::from_secs(15);
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.inside(async || {
        let mut held = Connection::open(&Container::target()).await.expect("the port is open");
        held.hold().await.expect("the request is in flight");
        container.systemctl("reload").expect("the reload succeeds");
        let begun = Instant::now();
        crash(&container, 1);
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        let mut next = Connection::open(&Container::target()).await.expect("the port is open");
        assert_eq!(next.ask(&get("/")).await.expect("the request is answered").status, 200);
        held.release().await.expect_err("the request of the old process is cut off");
    });
}

/// A new release may crash while the old process still serves its last requests.
fn crash_during_the_drain_of_a_reload_closes_no_parked_connection(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    // Longer than the test waits for the backup, which has to begin before the drain has ended.
    variables(&container, &[("DRAIN_TIMEOUT", "10min"), ("REQUEST_TIMEOUT", "10min")]);
    container.start_socket("admin").expect("the socket unit starts");
    container.inside(async || {
        let mut idle = Client::open(&Container::target(), false).await;
        idle.pid().await;
        let mut held = Connection::open(&Container::target()).await.expect("the port is open");
        held.hold().await.expect("the request is in flight");
        container.systemctl("reload").expect("the reload succeeds");
        until_backed_up(&container, 1);
        let main = crash(&container, 1);
        assert_eq!(idle.pid().await, main);
        held.release().await.expect_err("the request of the old process is cut off");
    });
}
