//! Attacks on a listener: wrong protocols, slow or oversized heads, silent connections, HTTP/2 floods. Each attack must
//! be refused within its limit, while well-behaved clients of the same service are served as usual
//! (`beside_normal_clients`).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use testkit::block_on;
use testkit::client::{Connection, Target, get};
use testkit::load::{Load, Running};
use testkit::tls_service::TlsService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::app_binary;

/// The 99th percentile of the latency of well-behaved clients must be below this, in a debug build. A slow or busy
/// machine delays all clients, so `SLOWER` times the latency at a second service that is not attacked is allowed too.
const NORMAL_LIMIT: Duration = Duration::from_millis(250);
const SLOWER: u32 = 5;
/// Requests of well-behaved clients during an attack. Fewer would not give a 99th percentile.
const NORMAL_REQUESTS: u64 = 300;
/// `--head-timeout`, `--idle-timeout` and `--request-timeout` of the service under attack.
const LIMIT: Duration = Duration::from_secs(2);
/// A limit must have closed the connection by then. It is long after `LIMIT`, for slow machines, and before the default
/// limits (30 s for a request, 75 s idle), so that a test fails if the flags have no effect.
const DUE: Duration = Duration::from_secs(20);
/// The same for the head timeout, whose default is 10 s.
const HEAD_DUE: Duration = Duration::from_secs(8);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty SETTINGS frame.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Repeats `attack` until well-behaved clients have sent enough requests, and checks that none was lost or delayed.
fn beside_normal_clients(attack: impl AsyncFn(&TlsService) + Copy) {
    let limit = humantime::format_duration(LIMIT).to_string();
    let flags = ["--head-timeout", &limit, "--idle-timeout", &limit, "--request-timeout", &limit];
    let service = TlsService::start(app_binary(), &flags).expect("the service starts");
    let other = TlsService::start(app_binary(), &flags).expect("the service starts");
    let normal =
        |service: &TlsService| Load { clients: 2, ..Load::paced(&Target::Tcp(service.http)) }.start(|| {});
    let (attacked, elsewhere) = (normal(&service), normal(&other));
    loop {
        block_on(attack(&service));
        if attacked.ended() >= NORMAL_REQUESTS {
            break;
        }
    }
    let [report, elsewhere] = [attacked, elsewhere].map(Running::stop);
    let [p99, quiet] = [&report, &elsewhere].map(|report| report.percentile(0.99));
    eprintln!("attacked service: {report}, p99 {p99:.1?}; other service: p99 {quiet:.1?}");
    assert_eq!((report.lost(), elsewhere.lost()), (0, 0), "{report}; {elsewhere}");
    assert!(p99 < NORMAL_LIMIT.max(quiet * SLOWER), "p99 {p99:?}, elsewhere {quiet:?}: {report}");
}

/// Sends `bytes` and returns everything that the service sends until it closes the connection.
async fn send_and_read(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.expect("the connection opens");
    // The service may refuse the request and close the connection before it has read all of it.
    let _ = stream.write_all(bytes).await;
    read_to_end(&mut stream).await
}

async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(DUE, stream.read_to_end(&mut answer)).await;
    // A reset ends the connection too; only the time limit matters here.
    let _ = ended.expect("the connection ends within the limit");
    answer
}

fn assert_starts(answer: &[u8], wanted: &str) {
    assert!(answer.starts_with(wanted.as_bytes()), "{wanted}: {:?}", String::from_utf8_lossy(answer));
}

#[test]
fn tls_on_the_plain_port_is_answered_with_400() {
    beside_normal_clients(async |service| {
        // The beginning of a ClientHello (RFC 8446 section 4.1.2).
        let hello = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 512]].concat();
        assert_starts(&send_and_read(service.http, &hello).await, "HTTP/1.1 400 ");
    });
}

#[test]
fn plain_http_on_the_tls_port_is_answered_with_400() {
    beside_normal_clients(async |service| {
        let answer = send_and_read(service.https, &get("/")).await;
        assert_starts(&answer, "HTTP/1.1 400 ");
        assert!(String::from_utf8_lossy(&answer).contains("speaks TLS"));
    });
}

#[test]
fn invalid_tls_records_are_answered_with_an_alert() {
    beside_normal_clients(async |service| {
        let answer = send_and_read(service.https, &[22; 4096]).await;
        assert_eq!(answer.first(), Some(&21), "expected an alert record: {answer:?}");
    });
}

#[test]
fn an_http2_preface_in_two_segments_is_recognized() {
    beside_normal_clients(async |service| {
        for cut in [1, 3, 14, 23] {
            let mut stream = TcpStream::connect(service.http).await.expect("the connection opens");
            stream.set_nodelay(true).expect("TCP_NODELAY is set");
            stream.write_all(&PREFACE[..cut]).await.expect("the bytes are sent");
            // The service handles the first half before it answers this other client.
            let mut other = Connection::open(&Target::Tcp(service.http)).await.expect("the connection opens");
            other.ask(&get("/")).await.expect("the server answers");
            stream.write_all(&[&PREFACE[cut..], SETTINGS].concat()).await.expect("the bytes are sent");
            let mut frame = [0; 9];
            stream.read_exact(&mut frame).await.expect("a frame arrives");
            assert_eq!(frame[3], 4, "SETTINGS: {frame:?}");
        }
    });
}

#[test]
fn a_head_above_the_limit_is_refused_with_431_on_plain_and_tls_ports() {
    beside_normal_clients(async |service| {
        let large = "x".repeat(96 * 1024);
        let head = format!("GET / HTTP/1.1\r\nhost: x\r\nx-large: {large}\r\n\r\n");
        assert_starts(&send_and_read(service.http, head.as_bytes()).await, "HTTP/1.1 431 ");
        let mut tls = Connection::open(&service.https(&[]).expect("the TLS client is configured"))
            .await
            .expect("the connection opens");
        let _ = tls.send(head.as_bytes()).await;
        assert_eq!(tls.head().await.expect("the server answers").status, 431);
    });
}

#[test]
fn a_head_sent_byte_by_byte_is_cut_off_at_the_head_timeout() {
    beside_normal_clients(async |service| {
        let head = get("/");
        let hello = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 512]].concat();
        let mut attackers = JoinSet::new();
        for (address, bytes, answer) in [
            (service.http, head, "HTTP/1.1 408 "),
            (service.https, hello, ""),
            (service.http, PREFACE.to_vec(), ""),
        ] {
            for _ in 0..20 {
                let (bytes, begun) = (bytes.clone(), Instant::now());
                attackers.spawn(async move {
                    let stream = TcpStream::connect(address).await.expect("the connection opens");
                    let (mut from, mut to) = stream.into_split();
                    let trickle = tokio::spawn(async move {
                        for byte in bytes {
                            if to.write_all(&[byte]).await.is_err() {
                                return;
                            }
                            // At this rate the whole head takes far longer than the timeout.
                            tokio::time::sleep(LIMIT / 2).await;
                        }
                    });
                    let mut answered = Vec::new();
                    let _ = from.read_to_end(&mut answered).await;
                    trickle.abort();
                    assert_starts(&answered, answer);
                    let took = begun.elapsed();
                    assert!(took > LIMIT / 2 && took < HEAD_DUE, "{took:?}");
                });
            }
        }
        while let Some(attacker) = attackers.join_next().await {
            attacker.expect("the attacker task ends without a panic");
        }
    });
}

#[test]
fn ten_thousand_silent_connections_are_closed_at_the_idle_timeout() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("the limit of open files is raised");
    beside_normal_clients(async |service| {
        let mut silent = Vec::new();
        for number in 0..10_000 {
            let address = if number % 2 == 0 { service.http } else { service.https };
            silent.push(TcpStream::connect(address).await.expect("the connection opens"));
        }
        for mut stream in silent {
            assert_eq!(read_to_end(&mut stream).await, b"");
        }
    });
}

#[test]
fn http2_rapid_reset_is_ended_with_goaway() {
    beside_normal_clients(async |service| {
        // GET / followed by RST_STREAM, on a hundred thousand streams (CVE-2023-44487).
        let mut bytes = [PREFACE, SETTINGS].concat();
        for stream in (1..200_000_u32).step_by(2) {
            bytes.extend(http2_get(stream));
            bytes.extend([0, 0, 4, 3, 0]);
            bytes.extend(stream.to_be_bytes());
            bytes.extend([0, 0, 0, 8]);
        }
        let mut stream = TcpStream::connect(service.http).await.expect("the connection opens");
        let (mut from, mut to) = stream.split();
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(DUE, async {
            let _ = tokio::join!(to.write_all(&bytes), from.read_to_end(&mut answer));
        });
        ended.await.expect("the connection ends within the limit");
        assert_eq!(last_frame(&answer), Some(7), "the last frame is GOAWAY");
    });
}

/// Half of the clients give the server a stream window of 0, the others of one byte, so no response can finish. Their
/// PINGs keep the connection active, so neither the idle timeout nor keep-alive probes would close it.
#[test]
fn an_http2_client_that_pings_but_reads_no_response_is_cut_off() {
    beside_normal_clients(async |service| {
        let mut peers = JoinSet::new();
        for number in 0..100 {
            let address = service.http;
            peers.spawn(async move {
                let window = number % 2;
                let settings = [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, window];
                let mut stream = TcpStream::connect(address).await.expect("the connection opens");
                let requests = (1..100).step_by(2).flat_map(http2_get).collect::<Vec<u8>>();
                stream
                    .write_all(&[PREFACE, &settings, &requests].concat())
                    .await
                    .expect("the bytes are sent");
                let (mut from, mut to) = stream.split();
                let ping = async {
                    while to.write_all(&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]).await.is_ok() {
                        tokio::time::sleep(LIMIT / 20).await;
                    }
                };
                let mut answers = Vec::new();
                let read = async { drop(from.read_to_end(&mut answers).await) };
                let ended = tokio::time::timeout(DUE, async { tokio::join!(ping, read) }).await;
                ended.expect("the connection ends within the limit");
            });
        }
        peers.join_all().await;
    });
}

/// A HEADERS frame with a complete request: GET /, END_STREAM and END_HEADERS.
fn http2_get(stream: u32) -> Vec<u8> {
    let id = stream.to_be_bytes();
    [&[0, 0, 6, 1, 5], &id[..], &[0x82, 0x86, 0x84, 0x41, 1, b'x']].concat()
}

/// The type of the last complete HTTP/2 frame.
fn last_frame(mut bytes: &[u8]) -> Option<u8> {
    let mut last = None;
    while let [high, middle, low, frame_type, ..] = *bytes {
        let length = 9 + u32::from_be_bytes([0, high, middle, low]) as usize;
        if bytes.len() < length {
            break;
        }
        last = Some(frame_type);
        bytes = &bytes[length..];
    }
    last
}
