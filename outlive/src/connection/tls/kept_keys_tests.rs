//! Connections that an earlier process has handed over, in a process with `--tls-handover no`: they continue, but neither
//! the next process nor systemd's store receives their keys.

use std::time::Duration;

use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2, Target};
use tokio::time::{sleep, timeout};

use crate::connection::tests::{Served, move_to, serve_with};
use crate::connection::unread_tests::{FIRST, IDLE, PATIENCE, router, wait_until};
use crate::registry::{Phase, Stage};
use crate::transport::tls_tests::{tls_of, tls_without_handover};

async fn is_answered(http1: &mut Connection, http2: &mut Http2) -> bool {
    let answer = timeout(PATIENCE, http1.ask(FIRST)).await.expect("the answer arrives in time");
    let answer = answer.expect("the server answers");
    assert_eq!(answer.text(), "first");
    let other = timeout(PATIENCE, http2.get("/first")).await.expect("the answer arrives in time");
    let other = other.expect("the server answers");
    !answer.closes() && other == Some((200, "first".to_owned()))
}

/// Lets all connections be idle for so long that they would be parked.
async fn idle(served: &Served) {
    let registry = served.registry();
    let entries = || registry.entries();
    wait_until("all are idle", || entries().iter().all(|entry| entry.stage() == Stage::Waiting)).await;
    registry.advance(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_have_moved_are_not_parked_and_close_gracefully_in_a_drain() {
    let certificate = Certificate::new().expect("openssl runs");
    for phase in [Phase::Draining, Phase::Quiescing] {
        let served = serve_with(router(), Some(tls_of(&certificate))).await;
        let target = |protocol| {
            let client = certificate.client(&[protocol]).expect("the client configuration is valid");
            Target::Tls(served.address, client)
        };
        let mut http1 = Connection::open(&target("http/1.1")).await.expect("the server accepts");
        let mut http2 = Http2::open(&target("h2")).await.expect("the server accepts");
        assert!(is_answered(&mut http1, &mut http2).await);
        let next = serve_with(router(), Some(tls_without_handover(&certificate))).await;
        move_to(&next, served).await;
        assert_eq!(next.registry().parked(), 0);
        for _ in 0..2 {
            assert!(is_answered(&mut http1, &mut http2).await);
            idle(&next).await;
            sleep(Duration::from_millis(50)).await;
            assert_eq!(next.registry().parked(), 0);
        }
        next.server.enter(phase);
        timeout(PATIENCE, http2.ended()).await.expect("GOAWAY arrives in time");
        let answer = timeout(PATIENCE, http1.ask(FIRST)).await.expect("the answer arrives in time");
        assert!(answer.expect("the server answers").closes());
        drop((http1, http2));
        next.until_connections(0).await;
        assert!(next.server.handover_queue().take_all().is_empty());
    }
}
