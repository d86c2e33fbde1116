//! Parked connections: the service drops the task and the buffers of a connection that is idle for two seconds. These
//! tests check that clients cannot notice it, and how little memory a parked connection takes.

use std::time::Duration;

use rustix::process::{Resource, Signal, getrlimit, setrlimit};
use testkit::client::{Connection, Target, get};
use testkit::http2_frames::{ACK, Frame, GOAWAY, PING, PREFACE, SETTINGS, frame, next, next_that};
use testkit::service::Service;
use testkit::tls_service::{Client, TlsService};
use testkit::{TEST_TIMEOUT, block_on, wait_until};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::app_binary;
use crate::goaway::begin;

/// After this time without a request a connection is parked.
const PARKED: Duration = Duration::from_secs(3);

/// The clients pause for different times around the two seconds, so that their requests arrive before, while and after
/// the connection is parked. Some connections have had no request before.
#[test]
fn requests_on_parked_and_parking_connections_are_answered() {
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let mut clients = JoinSet::new();
        for number in 0..400_u64 {
            let mut client = Client::open(&service, usize::try_from(number).expect("a small number")).await;
            clients.spawn(async move {
                for round in 0..4 {
                    // 0.7 s to 3.1 s, different for each client and round.
                    sleep(Duration::from_millis(700 + (number * 6 + round * 613) % 2400)).await;
                    client.is_answered().await;
                }
            });
        }
        clients.join_all().await;
    });
}

/// Whether the server closes the connection, with GOAWAY over HTTP/2.
async fn ends(client: Client) -> bool {
    match client {
        Client::Http1(mut connection) => connection.read_more().await.expect("the connection ends") == 0,
        Client::Http2(mut connection) => {
            // h2 does not report the GOAWAY of an idle connection.
            while !connection.is_over().await {
                sleep(Duration::from_millis(1)).await;
            }
            true
        }
    }
}

/// The first connections are HTTP/1.1 and HTTP/2, each without and with TLS.
#[test]
fn longest_idle_connections_are_closed_when_there_is_no_slot_for_a_new_one() {
    const CONNECTIONS: usize = 20;
    /// How many are closed at once.
    const EVICTED: usize = 4;
    let limit = CONNECTIONS.to_string();
    let service =
        TlsService::start(app_binary(), &["--max-connections", &limit]).expect("the service starts");
    block_on(async {
        let mut oldest = Vec::new();
        for kind in 0..EVICTED {
            let mut client = Client::open(&service, kind).await;
            client.is_answered().await;
            oldest.push(client);
        }
        // Longer than the shortest time after which a connection is closed for another one; the others are younger.
        sleep(2 * PARKED).await;
        let mut others = Vec::new();
        for kind in EVICTED..CONNECTIONS {
            let mut client = Client::open(&service, kind).await;
            client.is_answered().await;
            others.push(client);
        }
        let mut new = Client::open(&service, 0).await;
        timeout(TEST_TIMEOUT, new.is_answered()).await.expect("there is room for it in time");
        for client in oldest {
            assert!(timeout(TEST_TIMEOUT, ends(client)).await.expect("the connection ends in time"));
        }
        // The younger connections stay open, because closing the oldest ones freed enough slots.
        for client in &mut others {
            client.is_answered().await;
        }
    });
}

/// Connections that cannot be handed over are not parked.
#[test]
fn idle_connections_that_are_not_parked_are_closed_when_there_is_no_slot_for_a_new_one() {
    /// How many are closed at once.
    const EVICTED: usize = 4;
    let flags = ["--max-connections", "4", "--tls-handover", "no"];
    let service = TlsService::start(app_binary(), &flags).expect("the service starts");
    block_on(async {
        let mut oldest = Vec::new();
        for kind in Client::KINDS - EVICTED..Client::KINDS {
            let mut client = Client::open(&service, kind).await;
            client.is_answered().await;
            oldest.push(client);
        }
        sleep(2 * PARKED).await;
        let mut new = Client::open(&service, 0).await;
        timeout(TEST_TIMEOUT, new.is_answered()).await.expect("there is room for it in time");
        for client in oldest {
            assert!(timeout(TEST_TIMEOUT, ends(client)).await.expect("the connection ends in time"));
        }
    });
}

/// The client has not acknowledged the settings of the service, so the connection is not parked.
#[test]
fn silent_http2_connections_are_closed_when_there_is_no_slot_for_a_new_one() {
    let service = TlsService::start(app_binary(), &["--max-connections", "4"]).expect("the service starts");
    block_on(async {
        let target = Target::Tcp(service.http);
        let mut silent = Vec::new();
        for _ in 0..4 {
            let mut client = Connection::open(&target).await.expect("the service listens");
            let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
            client.send(&hello).await.expect("the bytes are sent");
            next_that(&mut client, |frame| frame.kind == SETTINGS).await;
            silent.push(client);
        }
        let mut new = Client::open(&service, 0).await;
        timeout(TEST_TIMEOUT, new.is_answered()).await.expect("there is room for it in time");
        drop(silent);
    });
}

/// Their clients do not answer the PING behind the first GOAWAY, so each of them keeps its slot for a second.
#[test]
fn few_connections_are_closing_for_a_new_one_at_the_same_time() {
    const CONNECTIONS: usize = 100;
    const MOST: usize = 32;
    let flags = ["--max-connections", &CONNECTIONS.to_string()];
    let service = TlsService::start(app_binary(), &flags).expect("the service starts");
    block_on(async {
        let target = Target::Tcp(service.http);
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(begin(Connection::open(&target).await.expect("the service listens")).await);
        }
        sleep(2 * PARKED).await;
        let mut new = Client::open(&service, 0).await;
        timeout(TEST_TIMEOUT, new.is_answered()).await.expect("there is room for it in time");
        let mut closed = 0;
        for client in &mut clients {
            client.send(&frame(PING, 0, 0, &[7; 8])).await.expect("the bytes are sent");
            let is_over = |frame: &Frame| frame.kind == GOAWAY || (frame.kind, frame.flags) == (PING, ACK);
            closed += usize::from(next_that(client, is_over).await.kind == GOAWAY);
        }
        assert!((1..=MOST).contains(&closed), "{closed} connections are closing");
    });
}

/// The first connections are HTTP/1.1 and HTTP/2, each without TLS, with TLS 1.3 and with TLS 1.2.
#[test]
fn memory_pressure_closes_the_eighth_of_the_idle_connections_that_is_longest_idle() {
    const CONNECTIONS: usize = 8 * Client::KINDS;
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let mut clients = Vec::new();
        for kind in 0..CONNECTIONS {
            let mut client = Client::open(&service, kind).await;
            client.is_answered().await;
            clients.push(client);
            // The server measures idle times in milliseconds.
            sleep(Duration::from_millis(5)).await;
        }
        // Longer than the shortest time after which a connection is closed for lack of memory.
        sleep(2 * PARKED).await;
        wait_until_parked(&service, CONNECTIONS).await;
        service.report_memory_pressure().expect("the service reads the FIFO");
        let others = clients.split_off(CONNECTIONS / 8);
        for client in clients {
            assert!(timeout(TEST_TIMEOUT, ends(client)).await.expect("the connection ends in time"));
        }
        for mut client in others {
            client.is_answered().await;
        }
    });
}

#[test]
fn a_parked_connection_is_closed_at_the_idle_timeout_unless_it_was_used() {
    const LIMIT: Duration = Duration::from_secs(8);
    let limit = humantime::format_duration(LIMIT).to_string();
    let service = TlsService::start(app_binary(), &["--idle-timeout", &limit]).expect("the service starts");
    block_on(async {
        let mut clients = Vec::new();
        for kind in 0..Client::KINDS {
            clients.push((Client::open(&service, kind).await, Client::open(&service, kind).await));
        }
        for (unused, used) in &mut clients {
            unused.is_answered().await;
            used.is_answered().await;
        }
        let begun = Instant::now();
        // Each pause is long enough to be parked, and far below the idle timeout.
        while begun.elapsed() < LIMIT {
            sleep(PARKED).await;
            for (_, used) in &mut clients {
                used.is_answered().await;
            }
        }
        for (unused, _) in clients {
            assert!(timeout(TEST_TIMEOUT, ends(unused)).await.expect("the connection ends in time"));
        }
    });
}

/// PINGs unpark the connection, but they are no requests.
#[test]
fn a_parked_http2_connection_whose_client_sends_only_pings_is_closed_at_the_idle_timeout() {
    let service = TlsService::start(app_binary(), &["--idle-timeout", "8s"]).expect("the service starts");
    block_on(async {
        for target in [Target::Tcp(service.http), service.https(&["h2"]).expect("a client configuration")] {
            let mut client = Connection::open(&target).await.expect("the service listens");
            let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(SETTINGS, ACK, 0, &[])].concat();
            client.send(&hello).await.expect("the bytes are sent");
            next_that(&mut client, |frame| frame.kind == SETTINGS).await;
            let mut pings = 0;
            let mut is_over = false;
            while !is_over {
                sleep(PARKED).await;
                pings += 1;
                assert!(pings < 10, "the connection is still open after {pings} pings");
                // The service may have closed the connection.
                let _ = client.send(&frame(PING, 0, 0, &[0; 8])).await;
                is_over = loop {
                    match next(&mut client).await {
                        None | Some(Frame { kind: GOAWAY, .. }) => break true,
                        Some(Frame { kind: PING, flags: ACK, .. }) => break false,
                        Some(_) => {}
                    }
                };
            }
            assert!(pings > 1);
        }
    });
}

#[test]
fn parked_connections_survive_two_restarts() {
    let mut service = Service::start_with_store(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let mut connections = Vec::new();
        for number in 0..10 {
            let mut connection = service.connect().await;
            // The others have never sent a request.
            if number % 2 == 0 {
                assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
            }
            connections.push(connection);
        }
        for generation in 2..4 {
            sleep(PARKED).await;
            service.signal(Signal::TERM);
            service = service.restart(app_binary()).expect("the next process starts");
            let expected = format!("generation {generation},");
            for connection in &mut connections {
                let answer = connection.ask(&get("/")).await.expect("the server answers").text();
                assert!(answer.contains(&expected), "{answer}");
            }
        }
    });
}

#[test]
fn without_a_store_a_parked_connection_gets_connection_close() {
    let mut service = Service::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let mut connection = service.connect().await;
        connection.ask(&get("/")).await.expect("the server answers");
        sleep(PARKED).await;
        service.signal(Signal::TERM);
        service.notifications.wait_for("EXTEND_TIMEOUT_USEC=").expect("the drain begins");
        assert!(!service.process().ends_within(Duration::from_millis(500)).expect("the wait succeeds"));
        assert!(connection.ask(&get("/")).await.expect("the server answers").closes());
        let (status, _) = service.end().expect("the process ends");
        assert!(status.success(), "{status}");
    });
}

/// How many connections are in a stage, by the metrics.
async fn count_in_stage(service: &TlsService, stage: &str) -> usize {
    let mut admin = Connection::open(&service.admin()).await.expect("the connection opens");
    let metrics = admin.ask(&get("/metrics")).await.expect("the server answers").text();
    let name = format!("outlive_connections{{stage=\"{stage}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name)).expect("the count is present");
    line.parse().expect("a valid number")
}

/// Waits until exactly `count` connections are parked.
pub async fn wait_until_parked(service: &TlsService, count: usize) {
    let parked = async {
        while count_in_stage(service, "parked").await != count {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(TEST_TIMEOUT, parked).await.expect("the connections are parked in time");
}

#[test]
fn parked_connections_are_counted_as_parked() {
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let mut clients = Vec::new();
        for kind in 0..Client::KINDS {
            let mut client = Client::open(&service, kind).await;
            client.is_answered().await;
            clients.push(client);
        }
        let count = async |stage| count_in_stage(&service, stage).await;
        let all_parked = async {
            while (count("parked").await, count("waiting").await) != (Client::KINDS, 0) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(TEST_TIMEOUT, all_parked).await.expect("all connections are parked");
        // Repeated, because a client receives its response before the service counts its connection as waiting, and on
        // a slow machine the first connection is parked again before the last one is answered.
        let none_parked = async {
            loop {
                for client in &mut clients {
                    client.is_answered().await;
                }
                if (count("parked").await, count("waiting").await) == (0, Client::KINDS) {
                    return;
                }
            }
        };
        timeout(TEST_TIMEOUT, none_parked).await.expect("no connection is parked");
    });
}

/// Resident memory of the process in bytes.
fn resident(service: &TlsService) -> u64 {
    let path = format!("/proc/{}/status", service.process.pid().as_raw_nonzero());
    let status = std::fs::read_to_string(path).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS is present");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a valid number") * 1024
}

/// The bound is loose, so that the test does not depend on the machine; bench/README.md has the measured figures.
#[test]
fn idle_connections_take_little_memory_again_after_a_burst() {
    const COUNT: u64 = 4_000;
    /// Bytes for each connection: a parked one takes about 1 kB, an idle one that is not parked 14 kB.
    const LIMIT: u64 = 4_000;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("the limit of open files is raised");
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    block_on(async {
        let target = Target::Tcp(service.http);
        Connection::open(&target)
            .await
            .expect("the connection opens")
            .ask(&get("/"))
            .await
            .expect("the server answers");
        let alone = resident(&service);
        let each = || resident(&service).saturating_sub(alone) / COUNT;
        let mut connections = Vec::new();
        for _ in 0..COUNT {
            connections.push(Connection::open(&target).await.expect("the connection opens"));
        }
        for _ in 0..2 {
            for connection in &mut connections {
                connection.send(&get("/")).await.expect("the bytes are sent");
            }
            // Sampled during the round, because the first connections may be parked again before the last one is
            // answered.
            let mut active = each();
            for (number, connection) in connections.iter_mut().enumerate() {
                assert_eq!(connection.answer().await.expect("the server answers").status, 200);
                if number % 100 == 0 {
                    active = active.max(each());
                }
            }
            assert!(active > LIMIT, "the connections were never active: {active} bytes each");
            wait_until("the memory is returned to the system", || each() < LIMIT);
        }
    });
}
