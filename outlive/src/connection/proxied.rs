//! The PROXY header with which a connection begins on the listeners of `--proxy-protocol`. It is peeked at until it is
//! complete, and only then consumed, so that a connection can be handed over within its header: the next process reads it.

use tracing::debug;

use super::{Connection, FirstBytes, first_bytes};
use crate::observe::metrics;
use crate::registry::{DriverHandle, Registration, Stage};
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::proxy_header::{LENGTH_LIMIT, Parsed, Refusal, parse};
use crate::transport::stream::Stream;
use crate::transport::trusted_proxies::TrustedProxies;

/// How the wait for a PROXY header ended.
pub(super) enum HeaderOutcome {
    /// The header was consumed, and the connection has the address of its client.
    Read,
    /// The connection must become quiescent, and is, because no byte was consumed.
    Quiescent,
    /// The connection has to be closed.
    Closed,
}

/// Reads the PROXY header of a connection on which it is awaited.
pub(super) async fn read_header(
    connection: &mut Connection<Stream>,
    registration: &Registration,
    trusted: &TrustedProxies,
) -> HeaderOutcome {
    let driver = &registration.driver();
    if !trusted.contain(driver.peer()) {
        return refuse(driver, Refusal::Untrusted);
    }
    // The time limit applies at once, because a proxy sends the header before its client sends anything.
    driver.received();
    let mut bytes = [0; LENGTH_LIMIT];
    let is_decided = |bytes: &[u8]| parse(bytes) != Parsed::Incomplete;
    let length = match first_bytes(&connection.socket, driver, &mut bytes, is_decided).await {
        FirstBytes::Bytes(length) => length,
        FirstBytes::Late | FirstBytes::Idle => return refuse(driver, Refusal::Late),
        FirstBytes::Quiescent => return HeaderOutcome::Quiescent,
        FirstBytes::Gone => return HeaderOutcome::Closed,
    };
    let (length, client) = match parse(&bytes[..length]) {
        Parsed::Complete { length, client } => (length, client),
        Parsed::Refused(refusal) => return refuse(driver, refusal),
        Parsed::Incomplete => return refuse(driver, Refusal::Truncated),
    };
    if let Err(error) = connection.socket.consume(length) {
        debug!(peer = %driver.peer(), %error, "connection failed");
        return HeaderOutcome::Closed;
    }
    if let Some(client) = client {
        registration.identify(client);
    }
    connection.client = reported(registration);
    // The time limits of the first request begin after the header.
    driver.enter(Stage::Waiting);
    HeaderOutcome::Read
}

fn refuse(driver: &DriverHandle, refusal: Refusal) -> HeaderOutcome {
    debug!(peer = %driver.peer(), "closed a connection: {refusal}");
    metrics::PROXY_HEADERS_REFUSED.with_label_values(&[refusal.label()]).inc();
    HeaderOutcome::Closed
}

/// The client of a connection whose header was read, for the next process.
pub(super) fn reported(registration: &Registration) -> Option<Box<ProxiedClient>> {
    registration.reported().map(|client| Box::new(ProxiedClient::Reported(client)))
}
