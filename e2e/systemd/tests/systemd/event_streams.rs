//! Event streams over restarts and reloads on real systemds. Each continues in the same response, so that no client has
//! to connect again and no event is lost or repeated.

use std::sync::Arc;

use futures_util::future::join_all;
use testkit::certificate::Certificate;
use testkit::client::Http2;
use testkit::container::{Container, Systemd};
use testkit::events::EventStream;
use testkit::on_each_systemd;

use crate::on_systemd::release_without;
use crate::third_party_clients::{Client, ROUNDS};
use crate::websockets::replace_process;
use crate::{app_binary, boot_with_tls, tls_target, tls12_target};

/// A sixth each over HTTP/1.1 and HTTP/2, without TLS, with TLS 1.3 and with TLS 1.2.
const STREAMS: usize = 240;
/// How many of them are on one HTTP/2 connection.
const STREAMS_OF_CONNECTION: usize = 5;
const RESTARTS: usize = 10;

on_each_systemd! {
    event_streams_lose_no_event_over_restarts_and_reloads
    http2_event_stream_ends_before_a_release_that_cannot_adopt_it
    curl_receives_all_events_in_one_response
}

/// Reads the next event, which has to have this number.
async fn expect_event(stream: &mut EventStream, number: usize) {
    let event = stream.next().await.expect("an event arrives");
    assert_eq!(event, Some(format!("retry: 100\nid: {number}\ndata: tick\n\n")));
}

/// Replaces the process while the clients of this thread continue.
async fn replace(container: &Arc<Container>, verb: &'static str) {
    let container = container.clone();
    let replaced = tokio::task::spawn_blocking(move || replace_process(&container, verb));
    replaced.await.expect("another process serves");
}

/// The clients of the HTTP/2 connections send other requests at the same time as systemctl runs.
fn event_streams_lose_no_event_over_restarts_and_reloads(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = Arc::new(boot_with_tls(systemd, &certificate));
    let tls = |protocol| tls_target(&certificate, protocol);
    container.inside(async || {
        let (mut streams, mut connections) = (Vec::new(), Vec::new());
        for target in [Container::target(), tls("http/1.1"), tls12_target(&certificate, "http/1.1")] {
            for _ in 0..STREAMS / 6 {
                streams.push(EventStream::http1(&target).await.expect("the response begins"));
            }
        }
        for target in [Container::target(), tls("h2"), tls12_target(&certificate, "h2")] {
            for _ in 0..STREAMS / 6 / STREAMS_OF_CONNECTION {
                let mut connection = Http2::open(&target).await.expect("the port is open");
                for _ in 0..STREAMS_OF_CONNECTION {
                    streams.push(EventStream::http2(&mut connection).await.expect("the response begins"));
                }
                connections.push(connection);
            }
        }
        assert_eq!(streams.len(), STREAMS);
        let mut number = 0;
        for verb in ["restart", "reload"].into_iter().cycle().take(2 * RESTARTS) {
            // Read after the verb, too: some of these events were sent by the process before.
            join_all(streams.iter_mut().map(|stream| expect_event(stream, number))).await;
            let requests = connections.iter_mut().map(|connection| connection.get("/sleep?duration=100ms"));
            let (answers, ()) = tokio::join!(join_all(requests), replace(&container, verb));
            for answer in answers {
                let answer = answer.expect("the request is answered");
                assert_eq!(answer, Some((200, "slept 100ms\n".to_owned())), "{verb}");
            }
            number += 1;
        }
        join_all(streams.iter_mut().map(|stream| expect_event(stream, number))).await;
    });
}

/// An older release has not announced in its binary that it continues such streams and connections.
fn http2_event_stream_ends_before_a_release_that_cannot_adopt_it(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = Arc::new(boot_with_tls(systemd, &certificate));
    let older = release_without(
        &container,
        &["takes-http2-event-streams", "takes-header-tables-and-client-certificates"],
    );
    let targets = [Container::target(), tls_target(&certificate, "h2")];
    for verb in ["restart", "reload"] {
        container.replace_binary(app_binary().as_ref()).expect("the binary is replaced");
        container.systemctl("restart").expect("the restart succeeds");
        container.inside(async || {
            let clients = targets.iter().map(async |target| {
                let mut connection = Http2::open(target).await.expect("the port is open");
                let mut stream = EventStream::http2(&mut connection).await.expect("the response begins");
                expect_event(&mut stream, 0).await;
                (connection, stream)
            });
            let mut clients = join_all(clients).await;
            container.replace_binary(older.path()).expect("the binary is replaced");
            let ends = clients.iter_mut().map(async |(_, stream)| {
                while stream.next().await.expect("the response ends after a whole event").is_some() {}
            });
            tokio::join!(join_all(ends), replace(&container, verb));
            for (connection, _) in &mut clients {
                // The process before answers until the client has received GOAWAY.
                while let Some((status, _)) = connection.get("/").await.expect("the request is answered") {
                    assert_eq!(status, 200);
                }
            }
        });
    }
}

/// curl ends if the response ends. It prints the head of the response, and would print another one.
fn curl_receives_all_events_in_one_response(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot_with_tls(systemd, &certificate);
    let chain = certificate.chain();
    let chain = chain.to_str().expect("the path is UTF-8");
    let curl = ["curl", "--no-buffer", "--silent", "--show-error", "--include", "--cacert", chain];
    let accept = ["--header", "accept: text/event-stream"];
    let (plain, tls) = ("http://127.0.0.1:8080/events", "https://127.0.0.1:8443/events");
    let versions = [
        ("HTTP/1.1 200 OK", "--http1.1", plain),
        ("HTTP/1.1 200 OK", "--http1.1", tls),
        ("HTTP/2 200", "--http2-prior-knowledge", plain),
        ("HTTP/2 200", "--http2", tls),
    ];
    let mut clients = versions
        .map(|(_, version, url)| Client::start(&container, &[&curl[..], &accept, &[version, url]].concat()));
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
    for (client, (status, ..)) in clients.iter().zip(versions) {
        let mut parts = client.printed().splitn(2, String::is_empty);
        let [head, events] = [parts.next(), parts.next()].map(Option::unwrap_or_default);
        assert_eq!(head.first().map(|line| line.trim_end()), Some(status));
        assert_eq!(events, &expected[..events.len()]);
    }
}
