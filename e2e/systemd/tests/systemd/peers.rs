//! Reverse proxies, a browser and Node, as Debian packages them, over restarts and reloads. Each runs in the container
//! of the service and counts the requests that it loses. The test reads connections and resets from the kernel, because
//! a client that connects again, or sends a request again, could hide a loss.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::certificate::Certificate;
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::verbs::iterations;
use testkit::{TEST_TIMEOUT, wait_until};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::third_party_clients::{Client, LIMIT};
use crate::{app_package, boot_with_tls, third_party_clients, websockets};

/// Where a proxy listens.
const FRONT: ([u8; 4], u16) = ([127, 0, 0, 1], 8000);
/// Where the test serves the page of a browser, and receives the reports of a script.
const TEST: ([u8; 4], u16) = ([127, 0, 0, 1], 9000);
/// Connections from a proxy to the service: more than its clients use at once, so that some of them are idle.
const POOL: usize = 30;
/// Connections of a script: as many as a browser opens to one origin over HTTP/1.1.
const CONNECTIONS: usize = 6;

// ---- reverse proxies ----

#[test]
fn nginx_in_front_loses_nothing_and_keeps_its_connections() {
    run_behind_nginx(&boot(), "http", "", Pool { port: 8080, connections: POOL });
}

#[test]
fn nginx_in_front_over_tls_1_2_loses_nothing_and_keeps_its_connections() {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(Systemd::V257, &certificate);
    let pool = Pool { port: 8443, connections: POOL };
    run_behind_nginx(&container, "https", "proxy_ssl_protocols TLSv1.2;", pool);
}

/// `options`: how nginx connects to the service.
fn run_behind_nginx(container: &Container, scheme: &str, options: &str, pool: Pool) {
    let port = pool.port;
    run_behind_proxy_in(
        container,
        &["nginx", "-c", "/run/peer"],
        &format!(
            "daemon off;
         user root;
         error_log stderr;
         events {{}}
         http {{
             access_log off;
             keepalive_requests 1000000;
             upstream service {{
                 server 127.0.0.1:{port} max_fails=0;
                 keepalive 64;
                 keepalive_requests 1000000;
                 keepalive_timeout 1h;
             }}
             server {{
                 listen 127.0.0.1:8000;
                 location / {{
                     proxy_pass {scheme}://service;
                     {options}
                     proxy_http_version 1.1;
                     proxy_set_header Connection '';
                     proxy_next_upstream off;
                 }}
             }}
         }}"
        ),
        Load::post,
        pool,
    );
}

#[test]
fn haproxy_in_front_loses_nothing_and_keeps_its_connections() {
    run_behind_haproxy(&boot(), "", Pool { port: 8080, connections: POOL });
}

/// HAProxy keeps a header table whatever the service announces, and refers to it in each request.
#[test]
fn haproxy_in_front_over_http2_loses_nothing_and_keeps_its_connection() {
    run_behind_haproxy(&boot(), "proto h2", Pool { port: 8080, connections: 1 });
}

#[test]
fn haproxy_in_front_over_http2_and_tls_loses_nothing_and_keeps_its_connection() {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(Systemd::V257, &certificate);
    run_behind_haproxy(&container, "ssl verify none alpn h2", Pool { port: 8443, connections: 1 });
}

#[test]
fn haproxy_in_front_over_tls_1_2_loses_nothing_and_keeps_its_connections() {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(Systemd::V257, &certificate);
    let pool = Pool { port: 8443, connections: POOL };
    run_behind_haproxy(&container, "ssl verify none force-tlsv12 alpn http/1.1", pool);
}

#[test]
fn haproxy_in_front_over_http2_and_tls_1_2_loses_nothing_and_keeps_its_connection() {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(Systemd::V257, &certificate);
    let pool = Pool { port: 8443, connections: 1 };
    run_behind_haproxy(&container, "ssl verify none force-tlsv12 alpn h2", pool);
}

/// `options`: how HAProxy connects to the service. Each request has another value of a field, so a header table changes.
fn run_behind_haproxy(container: &Container, options: &str, pool: Pool) {
    // One thread, because each thread has its own pool. Without pool-purge-delay, haproxy would close idle connections.
    let port = pool.port;
    run_behind_proxy_in(
        container,
        &["haproxy", "-db", "-f", "/run/peer"],
        &format!(
            "global
             nbthread 1
         defaults
             mode http
             retries 0
             http-reuse always
             timeout connect 60s
             timeout client 60s
             timeout server 60s
         listen front
             bind 127.0.0.1:8000
             http-request set-header x-number %[rand]
             server service 127.0.0.1:{port} {options} pool-purge-delay 1h"
        ),
        Load::post,
        pool,
    );
}

#[test]
fn apache_in_front_loses_nothing_and_keeps_its_connections() {
    // One process, because each process has its own pool.
    run_behind_proxy(
        &["apache2", "-D", "FOREGROUND", "-f", "/run/peer"],
        "LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
         LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
         LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
         LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
         ServerRoot /run
         ServerName localhost
         ErrorLog syslog
         User www-data
         Listen 127.0.0.1:8000
         StartServers 1
         ServerLimit 1
         ThreadsPerChild 64
         MaxRequestWorkers 64
         MaxKeepAliveRequests 0
         KeepAliveTimeout 60
         ProxyPass / http://127.0.0.1:8080/ max=64 smax=64 ttl=3600 retry=0",
        Load::post,
    );
}

#[test]
fn varnish_in_front_loses_nothing_and_keeps_its_connections() {
    let timeouts = ["-p", "backend_idle_timeout=3600", "-p", "timeout_idle=60"];
    let command = ["varnishd", "-F", "-n", "/run/varnish", "-a", "127.0.0.1:8000", "-f", "/run/peer"];
    run_behind_proxy(
        &[&command[..], &["-s", "malloc,16m"], &timeouts].concat(),
        "vcl 4.1;
         backend service { .host = \"127.0.0.1\"; .port = \"8080\"; }
         sub vcl_recv { return (pass); }",
        Load::post,
    );
}

#[test]
fn caddy_in_front_loses_nothing_and_keeps_its_connections() {
    // No requests with bodies, because Caddy closes the connection to the service if a response begins before Caddy has
    // seen the end of the request body, as it can from /echo, also without any restart.
    run_behind_proxy(
        &["caddy", "run", "--adapter", "caddyfile", "--config", "/run/peer"],
        "{
             admin off
             auto_https off
         }
         :8000 {
             reverse_proxy 127.0.0.1:8080 {
                 transport http {
                     keepalive 1h
                     keepalive_idle_conns_per_host 64
                 }
             }
         }",
        Load::paced,
    );
}

/// Runs a proxy between the service and two loads, a paced blind one and `second`. Asserts that no request is lost, and
/// that no connection is closed, reset or opened besides those of the clients.
fn run_behind_proxy(command: &[&str], config: &str, second: fn(&Target) -> Load) {
    run_behind_proxy_in(&boot(), command, config, second, Pool { port: 8080, connections: POOL });
}

/// The connections of a proxy to a port of the service, which it opens for [`POOL`] requests at once.
#[derive(Clone, Copy)]
struct Pool {
    port: u16,
    connections: usize,
}

fn run_behind_proxy_in(
    container: &Container,
    command: &[&str],
    config: &str,
    second: fn(&Target) -> Load,
    pool: Pool,
) {
    container.write("run/peer", &format!("{config}\n")).expect("the file is written");
    start(container, command);
    let front = Target::Tcp(FRONT.into());
    wait_until(command[0], || {
        container.run(&["systemctl", "is-active", "peer"]).expect("the process runs");
        container.inside(|| async { Connection::open(&front).await.is_ok() })
    });
    container.inside(|| async { fill_pool(container, &front, pool).await });
    let before = Kernel::of(container, pool.port);
    let some = |load| Load { clients: POOL / 3, think: Duration::from_millis(20), ..load };
    let loads = [Load::paced_blind(&front), second(&front)].map(some);
    let clients = loads.iter().map(|load| load.clients as u64).sum::<u64>();
    let loads = loads.map(|load| load.start(container.enter()));
    restart_and_reload(container);
    for load in loads {
        let report = load.stop();
        eprintln!("{}: {report}", command[0]);
        assert!(report.answered > u64::from(iterations()), "the load was too small: {report}");
        assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
    }
    assert_eq!(Kernel::of(container, pool.port), Kernel { accepted: before.accepted + clients, ..before });
}

/// Sends [`POOL`] slow requests at the same time until the proxy has all connections of the pool.
async fn fill_pool(container: &Container, front: &Target, pool: Pool) {
    while Kernel::of(container, pool.port).connections.len() < pool.connections {
        let mut waiting = Vec::new();
        for _ in 0..POOL {
            let mut connection = Connection::open(front).await.expect("the proxy listens");
            connection.send(&get("/sleep?duration=300ms")).await.expect("the bytes are sent");
            waiting.push(connection);
        }
        for connection in &mut waiting {
            assert_eq!(connection.answer().await.expect("the request is answered").text(), "slept 300ms\n");
        }
    }
}

// ---- scripts ----

#[test]
fn fetch_in_node_loses_nothing_and_keeps_its_connections() {
    run_requests("requests(CONNECTIONS, byFetch)", Engine::Node);
}

#[test]
fn an_agent_in_node_loses_nothing_and_keeps_its_connections() {
    run_requests("requests(CONNECTIONS, byAgent())", Engine::Node);
}

#[test]
fn fetch_in_chromium_loses_nothing_and_keeps_its_connections() {
    run_requests("requests(CONNECTIONS, byFetch)", Engine::Chromium);
}

#[test]
fn an_event_source_in_node_stays_open() {
    run_event_source(Engine::Node);
}

#[test]
fn an_event_source_in_chromium_stays_open() {
    run_event_source(Engine::Chromium);
}

/// The script reports each event. At least one of them arrives before the first verb and between two verbs.
fn run_event_source(engine: Engine) {
    let container = boot();
    container.inside(|| async {
        let script = Script::start(&container, "events()", engine).await;
        let mut verbs = verbs();
        for events in 1.. {
            let (counts, waiting) = script.report().await;
            assert_eq!(counts, events_in_one_response(events));
            let Some(verb) = verbs.next() else { break };
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            answer(waiting, "").await;
        }
    });
}

fn events_in_one_response(events: u32) -> Value {
    json!({ "opened": 1, "ended": 0, "events": events, "missed_or_repeated": 0 })
}

/// Over HTTP/2, because a browser uses that over TLS. The one connection proves it: over HTTP/1.1 no request could be
/// answered on the connection of an open event stream.
#[test]
fn an_event_source_over_http2_in_chromium_stays_open_beside_requests() {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot_with_tls(Systemd::V257, &certificate);
    container.inside(|| async {
        let call = format!("eventsBesideRequests({CONNECTIONS})");
        let script = Script::start(&container, &call, Engine::Chromium).await;
        let mut verbs = verbs();
        let mut first = None;
        for events in 1.. {
            let (mut counts, waiting) = script.report().await;
            let requests = counts.as_object_mut().and_then(|counts| counts.remove("requests"));
            let requests = requests.expect("the page reports them");
            assert_eq!(counts, events_in_one_response(events), "{requests}");
            assert_eq!(requests["lost"], json!([]), "{requests}");
            let connections = third_party_clients::connections(&container, 8443);
            assert_eq!(connections.len(), 1);
            assert_eq!(&connections, first.get_or_insert_with(|| connections.clone()));
            let Some(verb) = verbs.next() else {
                eprintln!("{events} events, {requests}");
                let answered = requests["answered"].as_u64().expect("the value is a number");
                // Two before the event stream.
                assert!(answered > 2 + u64::from(events), "the load was too small: {requests}");
                break;
            };
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            answer(waiting, "").await;
        }
    });
}

#[test]
fn a_websocket_in_node_stays_open() {
    run_websocket(Engine::Node);
}

#[test]
fn a_websocket_in_chromium_stays_open() {
    run_websocket(Engine::Chromium);
}

/// The package `node-ws` with its default settings, with and without TLS.
#[test]
fn node_ws_client_keeps_its_connection() {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(Systemd::V257, &certificate);
    container
        .write("run/ws-client.js", include_str!("../../clients/ws-client.js"))
        .expect("the file is written");
    websockets::keep_open(&container, |url| {
        Client::start_inside(&container, &["node", "/run/ws-client.js", url, LIMIT, "/etc/app/tls.crt"])
    });
}

/// The script sends one message before the first verb and one after each.
fn run_websocket(engine: Engine) {
    let container = boot();
    container.inside(|| async {
        let script = Script::start(&container, "webSocket()", engine).await;
        let mut verbs = verbs();
        for echoed in 1.. {
            let (counts, waiting) = script.report().await;
            let wanted = json!({ "opened": 1, "echoed": echoed, "wrong": 0, "errors": 0, "closed": [] });
            assert_eq!(counts, wanted);
            let Some(verb) = verbs.next() else { break };
            container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            answer(waiting, "").await;
        }
    });
}

#[test]
fn a_websocket_in_node_is_closed_cleanly_by_a_stop_without_a_store() {
    run_stopped_websocket(Engine::Node);
}

#[test]
fn a_websocket_in_chromium_is_closed_cleanly_by_a_stop_without_a_store() {
    run_stopped_websocket(Engine::Chromium);
}

/// The script sends one message before the stop.
fn run_stopped_websocket(engine: Engine) {
    let container = boot();
    container
        .add_to_unit("service", "store", "[Service]\nFileDescriptorStoreMax=0\n")
        .expect("the drop-in is written");
    container.systemctl("restart").expect("the restart succeeds");
    container.inside(|| async {
        let script = Script::start(&container, "webSocket()", engine).await;
        let (counts, _waiting) = script.report().await;
        assert_eq!(counts["echoed"], 1, "{counts}");
        container.systemctl("stop").expect("the stop succeeds");
        let (counts, waiting) = script.report().await;
        let wanted = json!({ "opened": 1, "echoed": 1, "wrong": 0, "errors": 0, "closed": ["1012 "] });
        assert_eq!(counts, wanted);
        answer(waiting, "").await;
    });
}

/// The program that executes a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Node,
    Chromium,
}

/// Runs a script that sends requests until the test ends it. Asserts that no request is lost, and that no connection is
/// closed, reset or opened.
fn run_requests(call: &str, engine: Engine) {
    let container = boot();
    let call = call.replace("CONNECTIONS", &CONNECTIONS.to_string());
    let counts = container.inside(|| async {
        let script = Script::start(&container, &call, engine).await;
        loop {
            let (report, waiting) = script.report().await;
            assert_eq!(report, "connected");
            let has_all = Kernel::of(&container, 8080).connections.len() == CONNECTIONS;
            answer(waiting, if has_all { "" } else { "again" }).await;
            if has_all {
                break;
            }
        }
        let (report, waiting) = script.report().await;
        assert_eq!(report, "asking");
        let before = Kernel::of(&container, 8080);
        assert_eq!(before.connections.len(), CONNECTIONS);
        restart_and_reload(&container);
        assert_eq!(Kernel::of(&container, 8080), before);
        answer(waiting, "").await;
        let (counts, waiting) = script.report().await;
        answer(waiting, "").await;
        counts
    });
    eprintln!("{call} in {engine:?}: {counts}");
    assert_eq!(counts["lost"], json!([]), "{counts}");
    let answered = counts["answered"].as_u64().expect("the value is a number");
    assert!(answered > u64::from(iterations()), "the load was too small: {counts}");
}

/// A script that runs in the container, and the test's server, from which a browser loads the script and which receives
/// its reports.
struct Script {
    listener: TcpListener,
    page: String,
}

impl Script {
    async fn start(container: &Container, call: &str, engine: Engine) -> Self {
        let listener = TcpListener::bind(SocketAddr::from(TEST)).await.expect("the port is free");
        let script = format!("{}\n{call};\n", include_str!("../../clients/peers.js"));
        container.write("run/peer.js", &script).expect("the file is written");
        match engine {
            // In Node 20 both are behind flags, which later versions still accept.
            Engine::Node => start(
                container,
                &["node", "--experimental-websocket", "--experimental-eventsource", "/run/peer.js"],
            ),
            Engine::Chromium => start(
                container,
                &[
                    "chromium-headless-shell",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-quic",
                    "--no-first-run",
                    "--disable-background-networking",
                    "--disable-component-update",
                    "--disable-sync",
                    "--user-data-dir=/run/chromium",
                    // Otherwise the page, which has another origin, could not read the responses of the service.
                    "--disable-web-security",
                    "--ignore-certificate-errors",
                    "http://127.0.0.1:9000",
                ],
            ),
        }
        // The link keeps the browser from asking for an icon.
        let page = format!("<!doctype html><link rel=icon href='data:,'><script>\n{script}</script>\n");
        Self { listener, page }
    }

    /// The next report of the script, and the connection on which the script waits for the response.
    async fn report(&self) -> (Value, BufReader<TcpStream>) {
        loop {
            let accepted =
                timeout(TEST_TIMEOUT, self.listener.accept()).await.expect("a report arrives in time");
            let (stream, _) = accepted.expect("the connection is established");
            let mut stream = BufReader::new(stream);
            let mut length = 0;
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).await.expect("the head is readable");
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("the value is a number");
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.expect("the body is readable");
            if body.is_empty() {
                answer(stream, &self.page).await;
            } else {
                return (serde_json::from_slice(&body).expect("the report is JSON"), stream);
            }
        }
    }
}

async fn answer(mut stream: BufReader<TcpStream>, text: &str) {
    let length = text.len();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: {length}"
    );
    stream.write_all(format!("{head}\r\n\r\n{text}").as_bytes()).await.expect("the response is written");
}

// ---- helpers for both ----

fn boot() -> Container {
    let container = Container::boot(Systemd::V257, app_package()).expect("the container boots");
    container.ask("/");
    container
}

/// Starts a program in the container; its output goes to the journal.
fn start(container: &Container, command: &[&str]) {
    let run = ["systemd-run", "--quiet", "--unit=peer", "--setenv=HOME=/run/peer-home", "--"];
    container.run(&[&run[..], command].concat()).expect("systemd-run succeeds");
}

fn verbs() -> impl Iterator<Item = &'static str> {
    (0..iterations()).flat_map(|_| ["restart", "reload"])
}

fn restart_and_reload(container: &Container) {
    for verb in verbs() {
        container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
    }
}

/// The kernel's state and counters of TCP in a container.
#[derive(Debug, PartialEq, Eq)]
struct Kernel {
    /// The clients' ends of the connections to the service.
    connections: BTreeSet<String>,
    /// Connections accepted and reset since the boot (`PassiveOpens` and `EstabResets` of RFC 1213).
    accepted: u64,
    resets: u64,
}

impl Kernel {
    /// `port`: that of the service to which the connections lead.
    fn of(container: &Container, port: u16) -> Self {
        let connections = third_party_clients::connections(container, port).into_iter().collect();
        let all = container.run(&["cat", "/proc/net/snmp"]).expect("the counters are readable");
        let mut rows = all.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let [names, values] =
            [rows.next(), rows.next()].map(|row| row.expect("the table has the row").split(' '));
        let counter = |wanted: &str| {
            let found = names.clone().zip(values.clone()).find(|(name, _)| *name == wanted);
            found.and_then(|(_, value)| value.parse().ok()).expect(wanted)
        };
        Self { connections, accepted: counter("PassiveOpens"), resets: counter("EstabResets") }
    }
}
