//! Requests that offer an upgrade which the route does not grant (RFC 9110 section 7.8), on real systemds. Their
//! connections are parked and handed over like any other.

use std::process::Stdio;

use testkit::client::{Connection, get};
use testkit::container::{Container, Systemd};
use testkit::{on_each_systemd, wait_until};

use crate::{NAME, app_package};

on_each_systemd! {
    declined_upgrades_keep_their_connections_over_parking_restart_and_reload
    upgrade_declined_by_a_slow_route_during_a_drain_keeps_its_connection
    curl_offering_h2c_keeps_its_connection_over_restart_and_reload
}

fn with_upgrade(line: &str, headers: &str) -> Vec<u8> {
    format!("{line} HTTP/1.1\r\nhost: test\r\n{headers}\r\n").into_bytes()
}

/// The requests; the service grants none of these upgrades. Each is sent on a connection of its own.
fn declined() -> Vec<Vec<u8>> {
    let websocket =
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    let long = format!("connection: upgrade\r\nupgrade: {}\r\n", "x/1, ".repeat(1600));
    let h2c = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n";
    vec![
        get("/"),
        with_upgrade("GET /", h2c),
        with_upgrade("GET /", &format!("{websocket}sec-websocket-version: 13\r\n")),
        with_upgrade("GET /socket", &format!("{websocket}sec-websocket-version: 7\r\n")),
        with_upgrade("GET /nothing-here", &format!("{websocket}sec-websocket-version: 13\r\n")),
        with_upgrade("GET /", &long),
        with_upgrade("GET /", "upgrade: h2c\r\n"),
        b"CONNECT test:80 HTTP/1.1\r\nhost: test:80\r\n\r\n".to_vec(),
        // Two pipelined requests.
        [with_upgrade("GET /", h2c), with_upgrade("GET /", h2c)].concat(),
    ]
}

fn declined_upgrades_keep_their_connections_over_parking_restart_and_reload(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.start_socket("admin").expect("the socket unit starts");
    container.inside(|| async {
        let mut connections = Vec::new();
        for request in declined() {
            let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
            connection.send(&request).await.expect("the bytes are sent");
            for _ in 0..request.windows(4).filter(|four| four == b"\r\n\r\n").count() {
                let answer = connection.answer().await.expect("the request is answered");
                assert!(answer.status != 101 && !answer.closes(), "{}", answer.status);
            }
            connections.push((request, connection));
        }
        let count = connections.len();
        for verb in ["restart", "reload", "reload", "restart"] {
            wait_until_parked(&container, count);
            container.systemctl(verb).expect("systemctl succeeds");
            for (request, connection) in &mut connections {
                let what = String::from_utf8_lossy(request).into_owned();
                let answer =
                    connection.ask(&get("/")).await.unwrap_or_else(|error| panic!("{what}: {error:#}"));
                assert!(answer.status == 200 && !answer.closes(), "{what}: {}", answer.status);
            }
        }
    });
}

fn wait_until_parked(container: &Container, count: usize) {
    let socket = container.path(&format!("run/{NAME}-admin.sock"));
    wait_until("the connections are parked", || {
        let mut curl = container.outside(&["curl", "--silent", "--max-time", "10", "--unix-socket"]);
        let metrics = curl.arg(&socket).arg("http://localhost/metrics").output().expect("curl runs").stdout;
        String::from_utf8_lossy(&metrics)
            .contains(&format!("\noutlive_connections{{stage=\"parked\"}} {count}\n"))
    });
}

fn upgrade_declined_by_a_slow_route_during_a_drain_keeps_its_connection(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.ask("/");
    for verb in ["restart", "reload"] {
        container.inside(|| async {
            let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
            let headers = "connection: upgrade\r\nupgrade: websocket\r\n";
            connection
                .send(&with_upgrade("GET /sleep?duration=1s", headers))
                .await
                .expect("the bytes are sent");
            container.systemctl(verb).expect("systemctl succeeds");
            let answer = connection.answer().await.expect("the request is answered");
            assert!(answer.status == 200 && !answer.closes(), "{}", answer.status);
            let answer = connection.ask(&get("/")).await.expect("the next process answers");
            assert!(answer.status == 200 && !answer.closes(), "{}", answer.status);
        });
    }
}

fn curl_offering_h2c_keeps_its_connection_over_restart_and_reload(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.ask("/");
    let sleep = "http://127.0.0.1:8080/sleep?duration=1s";
    let mut curl =
        container.outside(&["curl", "--http2", "--silent", "--show-error", "--fail", "--max-time", "120"]);
    let curl = curl.args(["--write-out", "\nconnects %{num_connects}\n", sleep, sleep, sleep]);
    let curl = curl.stdout(Stdio::piped()).spawn().expect("curl runs");
    for verb in ["restart", "reload"] {
        container.systemctl(verb).expect("systemctl succeeds");
    }
    let output = curl.wait_with_output().expect("curl ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    let connects: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("connects ")).collect();
    assert_eq!(connects, ["1", "0", "0"], "{text}");
}
