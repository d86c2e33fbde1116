//! An example of a gRPC service beside other routes on the same listener: the standard health service
//! (`grpc.health.v1`), with a stream that continues over restarts and reloads.
//!
//! In the folder `e2e`: `cargo run -p grpc`, then `grpcurl -plaintext localhost:8080 grpc.health.v1.Health/Check`.

use std::process::ExitCode;

use axum::Router;
use axum::routing::get;
use futures_util::stream::{self, BoxStream, StreamExt};
use outlive::{Resumable, Resumed};
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
struct Service;

#[tonic::async_trait]
impl Health for Service {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(SERVING))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    /// The stream continues in the next process. There it leaves out the current status, if the client has it.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let has_status = request.extensions().get::<Resumed>().is_some_and(|resumed| resumed.messages > 0);
        let current = stream::iter((!has_status).then_some(Ok(SERVING)));
        let mut response = Response::new(current.chain(stream::pending()).boxed());
        response.extensions_mut().insert(Resumable);
        Ok(response)
    }
}

async fn start(_: Config, _: &mut outlive::Setup) -> anyhow::Result<Router> {
    let health = HealthServer::new(Service);
    Ok(Routes::new(health).into_axum_router().route("/", get("hello\n")))
}

fn main() -> ExitCode {
    outlive::run(start)
}
