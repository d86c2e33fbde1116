//! Clients send KeyUpdates before, within and after a request, and request a KeyUpdate of the server. The request is
//! answered and the connection stays open, in this process and in the next.

use testkit::certificate::Certificate;
use testkit::client::Connection;
use tokio::time::timeout;

use crate::connection::tests::{Served, move_to, serve_with};
use crate::connection::unread_tests::{FIRST, IDLE, PATIENCE, SECOND, router, target, wait_until};
use crate::registry::Stage;
use crate::transport::tls_tests::tls_of;

/// What happens to the connections between two requests.
#[derive(Clone, Copy, Debug)]
enum Pause {
    /// The connections are idle for so long that they are parked.
    Idle,
    /// The clients send a KeyUpdate and nothing else.
    KeyUpdate,
    /// The connections are handed over to the next process.
    Handover,
}

use Pause::{Handover, Idle, KeyUpdate};

/// How many bytes of the second request are sent before the KeyUpdate within it.
const CUTS: [usize; 4] = [0, 1, SECOND.len() / 2, SECOND.len() - 1];

async fn update_keys(client: &mut Connection) {
    client.update_keys().expect("the client updates its key");
    client.send(b"").await.expect("the KeyUpdate is sent");
}

/// Waits until all connections are parked. A connection that a KeyUpdate has just unparked becomes idle again later, so
/// the clock is advanced until all are.
async fn idle(served: &Served, clients: usize) {
    let registry = served.registry();
    let are_idle = || registry.entries().iter().all(|entry| entry.stage() == Stage::Waiting);
    wait_until("all are idle", are_idle).await;
    wait_until("all are parked", || {
        if registry.entries().iter().any(|entry| !entry.is_parkable()) {
            registry.advance(IDLE);
        }
        registry.parked() == clients
    })
    .await;
}

async fn pause(
    served: Served,
    pauses: &[Pause],
    clients: &mut [Connection],
    certificate: &Certificate,
) -> Served {
    let mut served = served;
    for pause in pauses {
        match pause {
            Idle => idle(&served, clients.len()).await,
            KeyUpdate => {
                for client in &mut *clients {
                    update_keys(client).await;
                }
                wait_until("all connections are unparked", || served.registry().parked() == 0).await;
            }
            Handover => {
                let next = serve_with(router(), Some(tls_of(certificate))).await;
                move_to(&next, served).await;
                served = next;
            }
        }
    }
    served
}

/// Sends a KeyUpdate before, within and after each request.
async fn answers_all(pauses: &[Pause], certificate: &Certificate) {
    let mut served = serve_with(router(), Some(tls_of(certificate))).await;
    let target = target(&served, Some(certificate));
    let mut clients = Vec::new();
    for _ in CUTS {
        let mut client = Connection::open(&target).await.expect("the server accepts");
        assert_eq!(client.ask(FIRST).await.expect("an answer").text(), "first");
        clients.push(client);
    }
    // The second round shows that a connection whose keys have changed is parked and handed over like any other.
    for round in 0..2 {
        served = pause(served, pauses, &mut clients, certificate).await;
        for (cut, client) in CUTS.into_iter().zip(&mut clients) {
            update_keys(client).await;
            client.send(&SECOND[..cut]).await.expect("the first part is sent");
            update_keys(client).await;
            client.send(&SECOND[cut..]).await.expect("the second part is sent");
            update_keys(client).await;
            let answer = timeout(PATIENCE, client.answer()).await.expect("the answer arrives in time");
            let answer =
                answer.unwrap_or_else(|error| panic!("{pauses:?}, round {round}, cut at {cut}: {error:#}"));
            assert_eq!(
                (answer.text().as_str(), answer.closes()),
                ("second", false),
                "{pauses:?}, cut at {cut}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_with_key_updates_is_answered_after_parking_and_handover() {
    let certificate = Certificate::new().expect("openssl makes a certificate");
    let pauses: [&[Pause]; 7] = [
        &[],
        &[Idle],
        &[Handover],
        &[Idle, KeyUpdate, Idle],
        &[Idle, Handover, KeyUpdate, Handover],
        &[KeyUpdate, Idle, Handover],
        &[KeyUpdate, Handover, Idle, KeyUpdate],
    ];
    for pauses in pauses {
        answers_all(pauses, &certificate).await;
    }
}
