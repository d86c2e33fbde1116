//! An example of layers of other crates around the routes: a rate limit, CORS, compression, static files, and requests that
//! wait. The recipe `docs/recipes/middleware.md` quotes `start`.
//!
//! In the folder `e2e`: `cargo run -p middleware -- --files .`, then `curl localhost:8080/static/Cargo.toml`.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderMap, Method};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::response::sse::{Event, Sse};
use axum::routing::get;
use futures_util::stream::{self, Stream, StreamExt};
use outlive::{EventStream, Peer, Process, Setup};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower_governor::GovernorLayer;
use tower_governor::governor::GovernorConfigBuilder;
use tower_http::compression::CompressionLayer;
use tower_http::cors::CorsLayer;
use tower_http::services::ServeDir;

/// Serves files.
#[derive(clap::Parser)]
#[command(name = "middleware", version, about)]
struct Config {
    /// Folder with the files of /static.
    #[arg(long, value_name = "FOLDER", default_value = "static")]
    files: PathBuf,

    /// Time after which a client may send one more request; it may send 20 at once.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = humantime::parse_duration)]
    refill: Duration,
}

async fn start(config: Config, setup: &mut Setup) -> anyhow::Result<Router> {
    let rate = GovernorConfigBuilder::default().period(config.refill).burst_size(20).finish();
    let rate = Arc::new(rate.context("--refill must be above zero")?);
    let clients = rate.limiter().clone();
    setup.background("forget clients that are below their rate", async move |end| {
        while end.run_until_cancelled(tokio::time::sleep(Duration::from_secs(60))).await.is_some() {
            clients.retain_recent();
        }
        Ok(())
    });
    let cors = CorsLayer::new().allow_origin(["https://shop.example".parse()?]).allow_methods([Method::PUT]);
    Ok(Router::new()
        .route("/report", get(report).layer(GlobalConcurrencyLimitLayer::new(1))) // one at a time; others wait
        .route("/", get(who))
        .nest_service("/static", ServeDir::new(config.files))
        .layer(GovernorLayer::new(rate))
        .route("/events", get(events)) // not limited, because a stream that moves counts again in the next process
        .layer(CompressionLayer::new())
        .layer(cors) // around the rate limit, so that a browser can read its responses too
        .layer(from_fn(connect_info)))
}

/// Tells the rate limit the address of the client, which it expects where `axum::serve` puts it. Clients of a Unix socket have
/// no address, and share one limit.
async fn connect_info(peer: Peer, mut request: Request, next: Next) -> Response {
    let address = match peer {
        Peer::Tcp(address) => address,
        Peer::Unix => (Ipv4Addr::UNSPECIFIED, 0).into(),
    };
    request.extensions_mut().insert(ConnectInfo(address));
    next.run(request).await
}

/// Describes the process that serves the request, in a text that is worth compressing.
async fn who(process: Process) -> String {
    format!("generation {}\n", process.generation).repeat(100)
}

async fn report() -> &'static str {
    tokio::time::sleep(Duration::from_millis(100)).await;
    "report\n"
}

/// Sends one event in each process.
async fn events(headers: HeaderMap) -> EventStream<impl Stream<Item = Result<Event, Infallible>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let event = Event::default().id(last.map_or(0, |last| last + 1).to_string()).data("tick");
    EventStream(Sse::new(stream::iter([Ok(event)]).chain(stream::pending())))
}

fn main() -> ExitCode {
    outlive::run(start)
}
