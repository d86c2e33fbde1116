//! Event streams over restarts and reloads on real systemds. Each continues in the same response, so that no client has
//! to connect again and no event is lost or repeated.

use futures_util::future::join_all;
use testkit::certificate::Certificate;
use testkit::client::{Connection, Target};
use testkit::container::{Container, Systemd};
use testkit::{exclusive_cpu, on_each_systemd};

use crate::third_party_clients::{Client, ROUNDS};
use crate::websockets::replace_process;
use crate::{boot_with_tls, tls_target};

/// Half of them use TLS.
const STREAMS: usize = 200;
const REQUEST: &[u8] = b"GET /events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n";

on_each_systemd! {
    event_streams_lose_no_event_over_restarts_and_reloads
    curl_receives_all_events_in_one_response
}

/// Opens an event stream, and reads the head of the response.
async fn open(target: &Target) -> Connection {
    let mut connection = Connection::open(target).await.expect("the port is open");
    connection.send(REQUEST).await.expect("the bytes are sent");
    assert_eq!(connection.head().await.expect("a head arrives").status, 200);
    connection
}

/// Reads the next chunk of the response, which has to be the event with this number.
async fn expect_event(connection: &mut Connection, number: usize) {
    let event = format!("retry: 100\nid: {number}\ndata: tick\n\n");
    let chunk = format!("{:X}\r\n{event}\r\n", event.len());
    let bytes = connection.take(chunk.len()).await.expect("an event arrives");
    assert_eq!(String::from_utf8_lossy(&bytes), chunk);
}

fn event_streams_lose_no_event_over_restarts_and_reloads(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot_with_tls(systemd, &certificate);
    let _alone = exclusive_cpu();
    let targets = [Container::target(), tls_target(&certificate, "http/1.1")];
    container.inside(async || {
        let mut streams = join_all(targets.iter().cycle().take(STREAMS).map(open)).await;
        let mut number = 0;
        for verb in ["restart", "reload"].into_iter().cycle().take(2 * ROUNDS) {
            // Read after the verb, too: some of these events were sent by the process before.
            join_all(streams.iter_mut().map(|stream| expect_event(stream, number))).await;
            replace_process(&container, verb);
            number += 1;
        }
        join_all(streams.iter_mut().map(|stream| expect_event(stream, number))).await;
    });
}

/// curl ends if the response ends, and would print a second head as a part of the body.
fn curl_receives_all_events_in_one_response(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot_with_tls(systemd, &certificate);
    let chain = certificate.chain();
    let chain = chain.to_str().expect("the path is UTF-8");
    let accept = "accept: text/event-stream";
    // Over HTTP/2 an event stream ends at a restart.
    let curl = [
        "curl",
        "--no-buffer",
        "--silent",
        "--show-error",
        "--http1.1",
        "--header",
        accept,
        "--cacert",
        chain,
    ];
    let urls = ["http://127.0.0.1:8080/events", "https://127.0.0.1:8443/events"];
    let mut clients = urls.map(|url| Client::start(&container, &[&curl[..], &[url]].concat()));
    let mut expected = Vec::new();
    for number in 0..=2 * ROUNDS {
        let id = format!("id: {number}");
        for client in &mut clients {
            client.wait_for(&id, 1);
        }
        expected.extend(["retry: 100", &id, "data: tick", ""].map(str::to_owned));
        if number < 2 * ROUNDS {
            replace_process(&container, if number % 2 == 0 { "restart" } else { "reload" });
        }
    }
    for client in clients {
        let printed = client.printed();
        assert_eq!(printed, &expected[..printed.len()]);
    }
}
