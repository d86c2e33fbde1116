//! An example of a gRPC service beside other routes on the same listener: the standard health service
//! (`grpc.health.v1`), with a stream that lasts as long as the process.
//!
//! In the folder `e2e`: `cargo run -p grpc`, then `grpcurl -plaintext localhost:8080 grpc.health.v1.Health/Check`.

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

/// The implementation of the health service. For a service of your own, tonic-build generates the trait from a `.proto`
/// file.
struct Service {
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl Health for Service {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(SERVING))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    /// The stream ends at the shutdown, because a response that never ends would be cut off at the drain limit. The
    /// status UNAVAILABLE makes the client call again, and the next process answers.
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
