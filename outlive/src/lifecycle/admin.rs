//! The routes of the admin listeners: `/healthz` and `/readyz` for probes and load balancers, `/metrics` for Prometheus,
//! `/config` with the values of all options, and profiles for developers. They are served under a connection limit of their
//! own, so that they answer when the service is overloaded.

mod configuration;
#[cfg(any(feature = "cpu-profile", feature = "heap-profile"))]
mod profiles;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::TextEncoder;
use tokio::runtime::Handle;

use crate::app::process::Process;
use crate::app::readiness::{self, Check};
use crate::lifecycle::cli::OptionValue;
use crate::observe::metrics;
use crate::observe::status::{ManagerRole, Status};
use crate::registry::{Counts, Phase, Registry, Stage};
use crate::requests::Intended;
use crate::server::Queues;

/// The state that the routes report.
pub struct Admin {
    pub process: Process,
    pub registry: Arc<Registry>,
    pub status: Arc<Status>,
    pub queues: Queues,
    pub checks: Vec<Check>,
    pub values: Vec<OptionValue>,
}

/// The routes of the library and of the application. Panics if both have the same one.
pub fn router(admin: Admin, of_application: Router) -> Router {
    routes().with_state(Arc::new(admin)).merge(of_application)
}

/// Panics if the application has a route of the library.
pub fn check(of_application: &Router) {
    drop(routes().merge(of_application.clone().with_state(())));
}

fn routes() -> Router<Arc<Admin>> {
    let router = Router::new();
    #[cfg(any(feature = "cpu-profile", feature = "heap-profile"))]
    let router = router.merge(profiles::router());
    router
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(numbers))
        .route("/config", get(options))
}

async fn alive() -> &'static str {
    "alive\n"
}

/// Answers 200 while the process serves and all readiness checks of the application pass. From the beginning of the
/// drain on it answers 503, so that load balancers stop sending traffic, unless a successor serves: a reload can begin while
/// the checks run, and the traffic must continue then.
async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    let (all_pass, lines) = readiness::ask(&admin.checks).await;
    let is_serving = admin.registry.phase() == Phase::Serving || admin.status.role() == ManagerRole::Former;
    let (status, word) = match (is_serving, all_pass) {
        (true, true) => (StatusCode::OK, "ready"),
        (true, false) => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
    };
    let mut response = (status, format!("{word}\n{lines}")).into_response();
    if !is_serving {
        response.extensions_mut().insert(Intended);
    }
    response
}

async fn options(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    configuration::answer(&admin.values, &headers)
}

async fn numbers(State(admin): State<Arc<Admin>>) -> Response {
    admin.update_gauges();
    match TextEncoder::new().encode_to_string(&prometheus::gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

impl Admin {
    /// Sets the gauges that are computed at each scrape and not updated with each event.
    fn update_gauges(&self) {
        let Counts { in_flight, .. } = self.registry.counts();
        metrics::IN_FLIGHT.set(number(in_flight));
        let entries = self.registry.entries();
        for &stage in Stage::OPEN {
            let count = entries.iter().filter(|entry| entry.stage() == stage).count();
            metrics::CONNECTIONS.with_label_values(&[stage.name()]).set(number(count));
        }
        metrics::CONNECTIONS.with_label_values(&["parked"]).set(number(self.registry.parked()));
        for (listener, length) in self.queues.lengths() {
            metrics::ACCEPT_QUEUE.with_label_values(&[&listener]).set(length.into());
        }
        metrics::GENERATION.set(i64::try_from(self.process.generation).unwrap_or(i64::MAX));
        // The clock of the registry is monotonic; the time of day may be set.
        metrics::UPTIME.set(i64::try_from(self.registry.now() / 1000).unwrap_or(i64::MAX));
        metrics::process::update();
        metrics::runtime::update(&Handle::current().metrics());
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::registry::Limits;

    /// The status of `/readyz` in `phase`.
    async fn readyz(phase: Phase, role: ManagerRole) -> StatusCode {
        let limit = Duration::from_secs(60);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        let status = Arc::new(Status::new(registry.clone(), String::new()));
        registry.set_phase(phase);
        status.set_role(role);
        let (checks, values, queues) = (Vec::new(), Vec::new(), Queues::default());
        let admin = Admin { process: Process::begin(1), registry, status, queues, checks, values };
        ready(State(Arc::new(admin))).await.status()
    }

    #[tokio::test]
    async fn readyz_fails_during_a_drain_unless_a_successor_serves() {
        assert_eq!(readyz(Phase::Serving, ManagerRole::Main).await, StatusCode::OK);
        for phase in [Phase::Announcing, Phase::Draining, Phase::Quiescing, Phase::Lingering] {
            assert_eq!(readyz(phase, ManagerRole::Stopping).await, StatusCode::SERVICE_UNAVAILABLE);
        }
        for phase in [Phase::Serving, Phase::Quiescing, Phase::Holding] {
            assert_eq!(readyz(phase, ManagerRole::Former).await, StatusCode::OK);
        }
    }
}
