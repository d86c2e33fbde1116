//! The address of the client behind a proxy, in the example `who`, which answers with it: PROXY headers, and the fields in
//! which a proxy reports the client of a request.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use testkit::client::{Connection, Http2, Target, get};
use testkit::service::{Service, command, run_to_end};
use testkit::tls_service::TlsService;
use testkit::{TEST_TIMEOUT, block_on};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::app_binary;

/// PROXY headers of the client 192.0.2.7, port 4711. That of version 2 has an additional field.
const V1: &[u8] = b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 80\r\n";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10\xc0\0\x02\x07\x7f\0\0\x01\x12\x67\0\x50\x04\0\x01x";
const CLIENT: &str = "192.0.2.7:4711\n";

/// The options of a service behind a proxy on this machine.
const BEHIND: [&str; 4] = ["--proxy-protocol", "http", "--trusted-proxies", "127.0.0.0/8"];

fn who() -> String {
    let path = Path::new(app_binary()).with_file_name("examples").join("who");
    path.to_str().expect("the path is valid UTF-8").to_owned()
}

async fn client_of(connection: &mut Connection) -> String {
    connection.ask(&get("/")).await.expect("the server answers").text()
}

/// A connection that a proxy has opened, with its header.
async fn behind(header: &[u8], service: &Service) -> Connection {
    let target = Target::Behind(header.to_vec(), Target::Tcp(service.address()).into());
    Connection::open(&target).await.expect("the service listens")
}

#[test]
fn restart_keeps_the_client_of_a_proxied_connection_and_reads_the_rest_of_a_header() {
    let mut service = Service::start_with_store(&who(), &BEHIND).expect("the service starts");
    block_on(async {
        let mut connections = [behind(V1, &service).await, behind(V2, &service).await];
        for connection in &mut connections {
            assert_eq!(client_of(connection).await, CLIENT);
        }
        let mut halves = Vec::new();
        for (header, cut) in [(V1, 0), (V1, 20), (V2, 14), (V2, 30)] {
            halves.push((behind(&header[..cut], &service).await, &header[cut..]));
        }
        // Connections are accepted in order, so the others are accepted too.
        assert_eq!(client_of(&mut behind(V1, &service).await).await, CLIENT);
        for _ in 0..2 {
            service.signal(Signal::TERM);
            service = service.restart(&who()).expect("the next process starts");
            for connection in &mut connections {
                assert_eq!(client_of(connection).await, CLIENT);
            }
        }
        for (connection, rest) in &mut halves {
            connection.send(rest).await.expect("the rest is sent");
            assert_eq!(client_of(connection).await, CLIENT);
        }
        drop(service);
    });
}

#[test]
fn reload_keeps_the_clients_of_proxied_connections_of_all_protocols() {
    let flags = ["--proxy-protocol", "http,https", "--trusted-proxies", "127.0.0.1"];
    let mut service = TlsService::start(&who(), &flags).expect("the service starts");
    block_on(async {
        let tls = |protocol| service.https(&[protocol]).expect("the client configuration is valid");
        let plain = Target::Tcp(service.http);
        let (mut http1, mut http2) = (Vec::new(), Vec::new());
        for header in [V1, V2] {
            let behind = |target| Target::Behind(header.to_vec(), Box::new(target));
            for target in [plain.clone(), tls("http/1.1")] {
                http1.push(Connection::open(&behind(target)).await.expect("the service listens"));
            }
            for target in [plain.clone(), tls("h2")] {
                http2.push(Http2::open(&behind(target)).await.expect("the service listens"));
            }
        }
        for is_reloaded in [false, true] {
            if is_reloaded {
                service.process.signal(Signal::HUP);
                service.notifications.wait_for("MAINPID=").expect("a successor takes over");
                service.process.wait().expect("the old process exits");
            }
            for connection in &mut http1 {
                assert_eq!(client_of(connection).await, CLIENT, "reloaded: {is_reloaded}");
            }
            for connection in &mut http2 {
                let answer = connection.get("/").await.expect("the server answers");
                let (status, body) = answer.expect("the server sends no GOAWAY");
                assert_eq!((status, &body[..]), (200, CLIENT), "reloaded: {is_reloaded}");
            }
        }
        let main = service.notifications.lines().iter().rev().find_map(|line| line.strip_prefix("MAINPID="));
        testkit::process::terminate(main.expect("it was sent")).expect("the successor runs");
    });
}

/// The address and the process of the example that also answers on a socket of its own.
#[test]
fn handler_of_a_named_socket_has_the_client_of_the_header() {
    let address = testkit::free_address();
    let listen = format!("who={address}");
    let flags = ["--listen", &listen, "--socket", "who", "--trusted-proxies", "127.0.0.1"];
    let flags = [&flags[..], &["--proxy-protocol", "who"]].concat();
    // The other listeners of this service have no PROXY protocol.
    let service = TlsService::start(&who(), &flags).expect("the service starts");
    block_on(async {
        let mut stream = TcpStream::connect(address).await.expect("the service listens");
        stream.write_all(&[V2, b"x"].concat()).await.expect("the bytes are sent");
        let mut line = [0; CLIENT.len()];
        let read = timeout(TEST_TIMEOUT, stream.read_exact(&mut line)).await.expect("in time");
        read.expect("the connection is open");
        assert_eq!(line, CLIENT.as_bytes());
        let mut http = Connection::open(&Target::Tcp(service.http)).await.expect("the service listens");
        assert!(client_of(&mut http).await.starts_with("127.0.0.1:"));
    });
}

/// The value of the counter of refused connections, for one reason.
async fn refused(service: &TlsService, reason: &str) -> u64 {
    let mut admin = Connection::open(&service.admin()).await.expect("the admin listener accepts");
    let metrics = admin.ask(&get("/metrics")).await.expect("the server answers").text();
    let name = format!("outlive_proxy_headers_refused_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
}

/// Sends `bytes`, and waits until the service closes the connection without an answer.
async fn is_refused(service: &TlsService, bytes: &[u8]) {
    let mut stream = TcpStream::connect(service.http).await.expect("the service listens");
    // The service may have closed the connection before.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let end = timeout(TEST_TIMEOUT, stream.read_to_end(&mut answer)).await.expect("the connection ends");
    // A reset is an end too: the service has not read all bytes.
    assert!(end.is_err() || answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn connection_without_a_header_in_time_is_closed_and_counted() {
    let flags = [&BEHIND[..], &["--head-timeout", "200ms"]].concat();
    let service = TlsService::start(&who(), &flags).expect("the service starts");
    block_on(async {
        for (bytes, reason) in
            [(&get("/")[..], "missing"), (&V2[..20], "late"), (b"", "late"), (b"PROXY TCP9 \r\n", "invalid")]
        {
            let before = refused(&service, reason).await;
            let begun = Instant::now();
            is_refused(&service, bytes).await;
            assert!(
                reason != "late" || begun.elapsed() >= Duration::from_millis(150),
                "{:?}",
                begun.elapsed()
            );
            assert_eq!(refused(&service, reason).await - before, 1, "{reason}");
        }
    });
}

#[test]
fn header_of_a_peer_that_is_no_trusted_proxy_is_refused() {
    let flags = ["--proxy-protocol", "http", "--trusted-proxies", "192.0.2.0/24,unix"];
    let service = TlsService::start(&who(), &flags).expect("the service starts");
    block_on(async {
        is_refused(&service, &[V2, &get("/")].concat()).await;
        assert_eq!(refused(&service, "untrusted").await, 1);
    });
}

/// A request with these fields.
fn with(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nhost: test\r\n{fields}\r\n\r\n").into_bytes()
}

#[test]
fn client_of_each_request_is_the_one_that_trusted_proxies_report() {
    let trusted = ["--trusted-proxies", "127.0.0.0/8,10.0.0.0/8"];
    let service = Service::start(&who(), &trusted).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        for (fields, expected) in [
            ("x-forwarded-for: 203.0.113.9, 192.0.2.7, 10.1.2.3", "192.0.2.7:0\n"),
            ("x-forwarded-for: [2001:db8::7]:80", "[2001:db8::7]:80\n"),
            // A client can send this field, because a proxy that sets the other one does not remove it.
            ("forwarded: for=203.0.113.9\r\nx-forwarded-for: 192.0.2.7", "192.0.2.7:0\n"),
        ] {
            let answer = connection.ask(&with(fields)).await.expect("the server answers");
            assert_eq!(answer.text(), expected, "{fields}");
        }
        for fields in ["accept: */*", "x-forwarded-for: unknown", "forwarded: for=203.0.113.9"] {
            let answer = connection.ask(&with(fields)).await.expect("the server answers");
            assert!(answer.text().starts_with("127.0.0.1:"), "{fields}: {}", answer.text());
        }
    });
}

#[test]
fn field_of_an_untrusted_peer_is_ignored() {
    for flags in [&[][..], &["--trusted-proxies", "10.0.0.0/8"], &["--trusted-proxies", "unix"]] {
        let service = Service::start(&who(), flags).expect("the service starts");
        block_on(async {
            let mut connection = service.connect().await;
            let answer = connection.ask(&with("x-forwarded-for: 192.0.2.7")).await.expect("it answers");
            assert!(answer.text().starts_with("127.0.0.1:"), "{flags:?}: {}", answer.text());
        });
    }
}

/// The header reports a proxy, and this proxy reports the client in the field.
#[test]
fn proxy_behind_a_proxy_reports_the_client() {
    let header = b"PROXY TCP4 10.0.0.9 127.0.0.1 4711 80\r\n";
    let flags = [&BEHIND[..2], &["--trusted-proxies", "127.0.0.1,10.0.0.0/8"]].concat();
    let flags = [&flags[..], &["--forwarded-header", "forwarded"]].concat();
    let service = Service::start(&who(), &flags).expect("the service starts");
    block_on(async {
        let mut connection = behind(header, &service).await;
        let request = with("forwarded: for=\"192.0.2.7:4711\";proto=https");
        assert_eq!(connection.ask(&request).await.expect("the server answers").text(), CLIENT);
        assert_eq!(client_of(&mut connection).await, "10.0.0.9:4711\n");
    });
}

#[test]
fn invalid_options_for_proxies_are_errors_that_say_what_is_expected() {
    for (flags, reason) in [
        (
            &["--proxy-protocol", "https", "--trusted-proxies", "::1"][..],
            "invalid --proxy-protocol https: no listener has this name; the listeners are admin, http",
        ),
        (&["--proxy-protocol", "http"], "--trusted-proxies"),
        (&["--trusted-proxies", "10.0.0.1/8"], "expected 10.0.0.0/8"),
        (&["--trusted-proxies", "proxy.example"], "expected an address such as 192.0.2.1"),
        (&["--forwarded-header", "x-real-ip"], "x-forwarded-for, forwarded, none"),
    ] {
        for subcommand in [&["check"][..], &[]] {
            let listen = ["--listen", "127.0.0.1:0", "--listen", "admin=127.0.0.1:0"];
            let flags = [subcommand, &listen, flags].concat();
            let (code, _, log) = run_to_end(&mut command(&who(), &flags)).expect("the process ends");
            assert_eq!(code, Some(78), "{log}");
            assert!(log.contains(reason) && log.lines().count() == 1, "{flags:?}: {log}");
        }
    }
}
