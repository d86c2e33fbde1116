//! How a process ends without losing a request.

use std::pin::pin;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::connection::Handler;
use crate::log::message_id;
use crate::registry::{Phase, Registry};
use crate::server::Server;
use crate::signals::Signals;
use crate::systemd;

/// What is asked of systemd beyond each report, so that one late report does not end the drain.
const MORE_TIME: Duration = Duration::from_secs(5);

/// Ends all connections: each is told with its next answer; at `limit`, or at a second signal, what
/// remains is cut off.
pub async fn drain(server: &Server<impl Handler>, signals: &mut Signals, limit: Duration) {
    let registry = server.registry();
    let begun = Instant::now();
    let counts = registry.counts();
    info!(
        message_id = message_id::DRAINING,
        connections = counts.connections,
        in_flight = counts.in_flight,
        "draining: {} in flight on {} connections, up to {}",
        counts.in_flight,
        counts.connections,
        humantime::format_duration(limit),
    );
    systemd::stopping(&status(registry, limit));

    let mut report = tokio::time::interval(systemd::STATUS_INTERVAL);
    let mut linger = pin!(linger(server));
    let mut limit_passed = pin!(tokio::time::sleep(limit));
    let ended_by = loop {
        tokio::select! {
            () = &mut linger => break None,
            () = &mut limit_passed => break Some("the drain limit"),
            () = signals.terminated() => break Some("a second signal"),
            _ = report.tick() => {
                let left = limit.saturating_sub(begun.elapsed());
                systemd::still_stopping(&status(registry, left), MORE_TIME);
            }
        }
    };
    if let Some(reason) = ended_by {
        log_remaining(registry, reason);
    }
    let answered = registry.counts().answered;
    let took = begun.elapsed();
    info!(
        message_id = message_id::STOPPED,
        answered,
        drain_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "stopped after {answered} answers; the drain took {} ms",
        took.as_millis(),
    );
}

/// Connections that were there before are told first; only then are no more accepted.
async fn linger(server: &Server<impl Handler>) {
    let registry = server.registry();
    registry.set_phase(Phase::Lingering);
    server.own_ports_closed().await;
    let mut before = registry.entries();
    registry
        .until(|| {
            before.retain(|entry| entry.has_more_to_say());
            before.is_empty()
        })
        .await;
    registry.set_phase(Phase::Closing);
    registry.until(|| registry.is_done()).await;
}

fn status(registry: &Registry, left: Duration) -> String {
    let counts = registry.counts();
    format!(
        "draining: {} in flight on {} connections, {} s left",
        counts.in_flight,
        counts.connections,
        left.as_secs()
    )
}

fn log_remaining(registry: &Registry, reason: &str) {
    for remaining in registry.remaining() {
        let age = humantime::format_duration(Duration::from_millis(
            u64::try_from(remaining.age.as_millis()).unwrap_or(u64::MAX),
        ));
        if remaining.requests.is_empty() {
            info!(peer = %remaining.peer, %age, "closed at {reason}: a connection with no request");
        }
        for request in remaining.requests {
            warn!(
                message_id = message_id::CUT_OFF,
                peer = %remaining.peer,
                path = request.uri.path(),
                %age,
                request_ms = u64::try_from(request.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                "cut off at {reason}: {} for {}",
                request.uri.path(),
                remaining.peer,
            );
        }
    }
}
