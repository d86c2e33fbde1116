//! [`RequestLimits`]: how many requests may be in flight, of all clients (`--max-requests`) and of one client
//! (`--max-requests-per-client`).
//!
//! A request has a [`Permit`] from its head until the body of its response is dropped: then the response is sent, the client has
//! disconnected, or the response has moved to the next process. A request above a limit is refused at once and does not wait,
//! because waiting requests would take memory, and their clients may have given up when it is their turn.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use prometheus::IntCounter;
use tokio::time::Instant;
use tracing::warn;

use crate::observe::metrics;
use crate::os::lock::lock;
use crate::transport::stream::Peer;

/// The minimum time between two log lines about refused requests.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The map of clients keeps room for so many, so that it is not allocated again for each request.
const SPARE_CLIENTS: usize = 64;

/// The requests in flight, and how many there may be.
pub struct RequestLimits {
    of_all: Option<Limit>,
    of_client: Option<Limit>,
    in_flight: AtomicU32,
    /// The number of requests in flight of each client that has any.
    clients: Mutex<HashMap<Client, u32>>,
}

/// One of the two limits.
struct Limit {
    option: &'static str,
    maximum: u32,
    refused: IntCounter,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    last: Option<Instant>,
    unlogged: u64,
}

/// Who shares a limit: an IPv4 address, or an IPv6 network of 64 bits, of which one host can use any address (RFC 4862).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Client {
    V4(Ipv4Addr),
    V6([u16; 4]),
}

impl Client {
    /// None for a Unix socket: its peer is usually a proxy with the requests of all clients.
    fn of(peer: Peer) -> Option<Self> {
        let Peer::Tcp(address) = peer else { return None };
        Some(match address.ip().to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self::V6([a, b, c, d])
            }
        })
    }
}

/// The request would exceed a limit.
#[derive(Debug)]
pub(super) struct Exceeded;

impl RequestLimits {
    /// `of_all` and `of_client` are the maximum numbers of requests in flight. Returns None if there is no limit.
    pub fn new(of_all: Option<NonZeroU32>, of_client: Option<NonZeroU32>) -> Option<Arc<Self>> {
        let limit = |option, maximum: NonZeroU32| Limit {
            option,
            maximum: maximum.get(),
            refused: metrics::REFUSED.with_label_values(&[option]),
            log: Mutex::default(),
        };
        (of_all.is_some() || of_client.is_some()).then(|| {
            Arc::new(Self {
                of_all: of_all.map(|maximum| limit("max-requests", maximum)),
                of_client: of_client.map(|maximum| limit("max-requests-per-client", maximum)),
                in_flight: AtomicU32::new(0),
                clients: Mutex::default(),
            })
        })
    }

    /// A request of `peer` begins.
    pub(super) fn admit(self: &Arc<Self>, peer: Peer) -> Result<Permit, Exceeded> {
        let maximum = self.of_all.as_ref().map_or(u32::MAX, |limit| limit.maximum);
        let add = |count| (count < maximum).then_some(count + 1);
        if self.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_err() {
            return Err(refuse(self.of_all.as_ref(), peer));
        }
        // From here on dropping the permit ends the count of the request.
        let mut permit = Permit { limits: self.clone(), client: None };
        if let (Some(limit), Some(client)) = (&self.of_client, Client::of(peer)) {
            if !self.count_client(client, limit.maximum) {
                return Err(refuse(Some(limit), peer));
            }
            permit.client = Some(client);
        }
        Ok(permit)
    }

    /// A request continues here whose response began in another process. It counts, but is never refused, because that would
    /// end the response.
    pub(super) fn admit_continued(self: &Arc<Self>, peer: Peer) -> Permit {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let client = self.of_client.as_ref().and_then(|_| Client::of(peer));
        if let Some(client) = client {
            self.count_client(client, u32::MAX);
        }
        Permit { limits: self.clone(), client }
    }

    /// Counts a request of `client`, if it has less than `maximum`.
    fn count_client(&self, client: Client, maximum: u32) -> bool {
        let mut clients = lock(&self.clients);
        let count = clients.entry(client).or_default();
        // A new entry is never left with 0, because the maximum is at least 1.
        let is_below = *count < maximum;
        if is_below {
            *count += 1;
        }
        is_below
    }

    /// A request of `client` has ended. The map has only clients with requests in flight, so these bound its size. Its memory
    /// shrinks with them.
    fn release_client(&self, client: Client) {
        let mut clients = lock(&self.clients);
        if let Entry::Occupied(mut entry) = clients.entry(client) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        let room = 2 * clients.len().max(SPARE_CLIENTS);
        if clients.capacity() > 4 * room {
            clients.shrink_to(room);
        }
    }
}

/// Counts a refusal, and logs it at most once in [`LOG_INTERVAL`].
fn refuse(limit: Option<&Limit>, peer: Peer) -> Exceeded {
    if let Some(Limit { option, maximum, refused, log }) = limit {
        refused.inc();
        let mut log = lock(log);
        log.unlogged += 1;
        if log.last.is_none_or(|last| last.elapsed() >= LOG_INTERVAL) {
            let times = log.unlogged;
            warn!(times, %peer, "refused requests with 503: the limit of {maximum} in flight is reached (--{option})");
            *log = Log { last: Some(Instant::now()), unlogged: 0 };
        }
    }
    Exceeded
}

/// The right of one request to be in flight, until this is dropped.
pub(super) struct Permit {
    limits: Arc<RequestLimits>,
    client: Option<Client>,
}

impl Permit {
    /// Keeps this permit until `body` is dropped.
    pub(super) fn until_end_of(self, body: Body) -> Body {
        Body::new(Permitted { body, _permit: self })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limits.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let Some(client) = self.client {
            self.limits.release_client(client);
        }
    }
}

pin_project! {
    /// The body of a response whose request counts until this is dropped.
    struct Permitted {
        #[pin]
        body: Body,
        _permit: Permit,
    }
}

impl HttpBody for Permitted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddr};

    use super::*;

    fn limits(of_all: u32, of_client: u32) -> Arc<RequestLimits> {
        RequestLimits::new(NonZeroU32::new(of_all), NonZeroU32::new(of_client)).expect("there is a limit")
    }

    fn peer(address: &str) -> Peer {
        Peer::Tcp(SocketAddr::new(address.parse().expect("the address is valid"), 1))
    }

    fn is_refused(limits: &Arc<RequestLimits>, address: &str) -> bool {
        limits.admit(peer(address)).is_err()
    }

    fn clients(limits: &RequestLimits) -> usize {
        lock(&limits.clients).len()
    }

    #[test]
    fn without_a_maximum_there_are_no_limits() {
        assert!(RequestLimits::new(None, None).is_none());
    }

    #[test]
    fn request_above_the_limit_is_refused_until_another_has_ended() {
        let limits = limits(2, 0);
        let refused = limits.of_all.as_ref().expect("there is a limit").refused.clone();
        let before = refused.get();
        let first = limits.admit(Peer::Unix).expect("below the limit");
        let _second = limits.admit(peer("192.0.2.1")).expect("below the limit");
        assert!(is_refused(&limits, "192.0.2.2"), "above the limit");
        assert_eq!(refused.get(), before + 1);
        drop(first);
        limits.admit(peer("192.0.2.2")).expect("below the limit again");
    }

    #[test]
    fn client_is_limited_by_its_address_and_others_are_not_affected() {
        let limits = limits(0, 1);
        let first = limits.admit(peer("192.0.2.1")).expect("below the limit");
        assert!(is_refused(&limits, "192.0.2.1"), "above the limit");
        assert!(is_refused(&limits, "::ffff:192.0.2.1"), "the same address in IPv6");
        let _other = limits.admit(peer("192.0.2.2")).expect("another client");
        drop(first);
        let _again = limits.admit(peer("192.0.2.1")).expect("below the limit again");
        assert_eq!(limits.in_flight.load(Ordering::Relaxed), 2, "refused requests do not count");
    }

    #[test]
    fn ipv6_addresses_of_one_network_of_64_bits_are_one_client() {
        let limits = limits(0, 1);
        let _first = limits.admit(peer("2001:db8:0:1::1")).expect("below the limit");
        assert!(is_refused(&limits, "2001:db8:0:1:ffff::2"), "the same network");
        let _other = limits.admit(peer("2001:db8:0:2::1")).expect("another network");
    }

    #[test]
    fn client_of_a_unix_socket_has_no_limit_of_its_own() {
        let limits = limits(0, 1);
        let _both = [(); 2].map(|()| limits.admit(Peer::Unix).expect("no limit"));
        assert_eq!(clients(&limits), 0);
    }

    #[test]
    fn response_that_continues_is_admitted_above_the_limits_and_counts() {
        let limits = limits(1, 1);
        let first = limits.admit(peer("192.0.2.1")).expect("below the limit");
        let continued = limits.admit_continued(peer("192.0.2.1"));
        drop(first);
        assert!(is_refused(&limits, "192.0.2.1"), "above the limit");
        drop(continued);
        assert_eq!((clients(&limits), limits.in_flight.load(Ordering::Relaxed)), (0, 0));
        limits.admit(peer("192.0.2.1")).expect("below the limit again");
    }

    #[test]
    fn map_of_clients_is_bounded_by_the_requests_in_flight_and_shrinks() {
        let limits = limits(0, 1);
        let client = |number: u32| Peer::Tcp(SocketAddr::new(Ipv4Addr::from_bits(number).into(), 1));
        let network = |number: u128| {
            Peer::Tcp(SocketAddr::new(Ipv6Addr::from_bits(0x2001 << 112 | number << 64).into(), 1))
        };
        let permits: Vec<_> = (1..=5000)
            .map(client)
            .chain((1..=5000).map(network))
            .map(|peer| limits.admit(peer).expect("each has one"))
            .collect();
        assert_eq!(clients(&limits), 10_000);
        assert!(lock(&limits.clients).capacity() >= 10_000);
        drop(permits);
        assert_eq!(clients(&limits), 0);
        // `shrink_to` may leave up to twice of what was asked for.
        let capacity = lock(&limits.clients).capacity();
        assert!(capacity <= 8 * SPARE_CLIENTS, "{capacity}");
        for number in 0..10_000 {
            drop(limits.admit(client(number)).expect("each has one"));
        }
        assert!(lock(&limits.clients).capacity() <= 8 * SPARE_CLIENTS);
    }

    #[test]
    fn requests_of_many_threads_never_exceed_the_limits_and_all_permits_return() {
        let limits = limits(4, 3);
        std::thread::scope(|scope| {
            for number in 0..4_u8 {
                let limits = &limits;
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        let permit = limits.admit(peer(["192.0.2.1", "192.0.2.2"][usize::from(number % 2)]));
                        assert!(limits.in_flight.load(Ordering::Relaxed) <= 4);
                        drop(permit);
                    }
                });
            }
        });
        assert_eq!((clients(&limits), limits.in_flight.load(Ordering::Relaxed)), (0, 0));
    }
}
