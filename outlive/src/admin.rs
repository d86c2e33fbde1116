//! What the admin listeners serve: for probes, load balancers and Prometheus.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::TextEncoder;

use crate::metrics;
use crate::process::Process;
use crate::readiness::{self, Check};
use crate::registry::{Counts, Phase, Registry, Stage};
use crate::server::Queues;

/// What is looked at.
pub struct Admin {
    pub process: Process,
    pub registry: Arc<Registry>,
    pub queues: Queues,
    pub checks: Vec<Check>,
}

pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(numbers))
        .with_state(Arc::new(admin))
}

async fn alive() -> &'static str {
    "alive\n"
}

/// No from the moment that the end begins, or while one of the service's own checks says no.
async fn ready(State(admin): State<Arc<Admin>>) -> (StatusCode, String) {
    let (all_say_yes, lines) = readiness::ask(&admin.checks).await;
    let (status, word) = match admin.registry.phase() {
        Phase::Serving if all_say_yes => (StatusCode::OK, "ready"),
        Phase::Serving => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
    };
    (status, format!("{word}\n{lines}"))
}

async fn numbers(State(admin): State<Arc<Admin>>) -> Response {
    admin.look();
    match TextEncoder::new().encode_to_string(&prometheus::gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

impl Admin {
    /// Brings up to date what is not counted as it happens.
    fn look(&self) {
        let Counts { in_flight, .. } = self.registry.counts();
        metrics::IN_FLIGHT.set(number(in_flight));
        let entries = self.registry.entries();
        for &stage in Stage::OPEN {
            let count = entries.iter().filter(|entry| entry.stage() == stage).count();
            metrics::CONNECTIONS.with_label_values(&[stage.name()]).set(number(count));
        }
        metrics::CONNECTIONS.with_label_values(&["asleep"]).set(number(self.registry.asleep()));
        for (listener, length) in self.queues.lengths() {
            metrics::ACCEPT_QUEUE.with_label_values(&[&listener]).set(length.into());
        }
        metrics::GENERATION.set(i64::try_from(self.process.generation).unwrap_or(i64::MAX));
        // Not by the clock on the wall, which may be set.
        metrics::UPTIME.set(i64::try_from(self.registry.now() / 1000).unwrap_or(i64::MAX));
        metrics::process::look();
        for counter in [&metrics::HANDED_OVER, &metrics::TAKEN_OVER, &metrics::CUT_OFF, &metrics::LOG_DROPPED]
        {
            // One that has not counted yet is there all the same.
            std::sync::LazyLock::force(counter);
        }
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
