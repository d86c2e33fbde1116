//! A gRPC service beside routes of its own, on one listener: the standard health service (`grpc.health.v1`), whose
//! `Watch` goes on for as long as the process does.
//! `cargo run -p grpc` in `e2e`, `grpcurl -plaintext localhost:8080 grpc.health.v1.Health/Check`

use std::process::ExitCode;

use axum::Router;
use axum::routing::get;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// Speaks gRPC.
#[derive(clap::Parser)]
#[command(name = "grpc", version, about)]
struct Config {}

const SERVING: HealthCheckResponse = HealthCheckResponse { status: ServingStatus::Serving as i32 };

/// What `tonic` makes a server of; yours is made from your `.proto` file.
struct Service {
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl Health for Service {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(SERVING))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    /// A stream that goes on for ever is to end when the process does: its client comes back, to the next one.
    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let shutdown = self.shutdown.clone();
        let first = stream::once(async { Ok(SERVING) });
        let last = stream::once(async move {
            shutdown.cancelled().await;
            Err(Status::unavailable("this process is shutting down: call again"))
        });
        Ok(Response::new(first.chain(last).boxed()))
    }
}

async fn start(_: Config, setup: &mut outlive::Setup) -> anyhow::Result<Router> {
    let health = HealthServer::new(Service { shutdown: setup.shutdown() });
    Ok(Routes::new(health).into_axum_router().route("/", get("hello\n")))
}

fn main() -> ExitCode {
    outlive::run(start)
}
