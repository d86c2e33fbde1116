//! YOUR CODE: the configuration of the service, its start, and its routes.
//!
//! A handler can take these arguments, besides the extractors of axum:
//! - `process: Process`: the process that serves the request;
//! - `carry: Carry<State>`: hands a WebSocket and its state on to the next process;
//! - `Shutdown(shutdown): Shutdown`: cancelled when the process begins to drain, so that other endless responses can end;
//! - `peer: Peer`: the address of the client.
//!
//! With `--log info,request=debug` each `tracing` event of a handler has the id of its request.

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{Html, Response};
use axum::routing::{any, get};
use futures_util::stream::{self, Stream, StreamExt};
use outlive::{Carry, EventStream, Process, Setup};

/// The time between two events.
const TICK: Duration = Duration::from_secs(1);

/// An HTTP service that reports its process and sends a stream of events.
#[derive(Debug, clap::Parser)]
#[command(version, about)]
pub struct Config {
    /// Time that /sleep takes if the request does not set `duration`.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    nap: Duration,
}

/// Runs before anything is served. Connect here to the resources that the service needs, and register background tasks,
/// readiness checks, metrics and exit hooks on `Setup`. If it returns an error, the start fails; during a reload the
/// old process keeps serving.
pub async fn start(config: Config, _setup: &mut Setup) -> anyhow::Result<Router> {
    Ok(routes(config.nap))
}

fn routes(nap: Duration) -> Router {
    Router::new()
        .route("/", get(who))
        .route("/sleep", get(sleep))
        .route("/sleep/", get(sleep))
        .route("/echo", any(echo))
        .route("/events", get(events))
        .route("/socket", any(socket))
        .route("/live", get(async || Html(include_str!("live.html")))) // shows the two above in a browser
        .with_state(nap)
}

/// Describes the process that serves the request.
async fn who(process: Process) -> String {
    let Process { pid, generation, started_at } = process;
    let since = humantime::format_rfc3339_seconds(started_at);
    format!("pid {pid}, generation {generation}, since {since}\n")
}

/// Answers after a while: `/sleep?duration=20s`.
async fn sleep(
    State(nap): State<Duration>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<String, (StatusCode, String)> {
    let duration = match query.iter().find(|(key, _)| key == "duration") {
        Some((_, text)) => humantime::parse_duration(text)
            .map_err(|error| (StatusCode::BAD_REQUEST, format!("duration={text}: {error}\n")))?,
        None => nap,
    };
    tokio::time::sleep(duration).await;
    Ok(format!("slept {}\n", humantime::format_duration(duration)))
}

/// Streams the request body back.
async fn echo(body: Body) -> Body {
    let mut chunks = Box::pin(body.into_data_stream().peekable());
    // The first poll of the body sends 100 Continue, for which a client may wait. It has to come before the response.
    chunks.as_mut().peek().await;
    Body::from_stream(chunks)
}

/// Sends an event each second. At a restart or reload the next process continues the response: it calls this handler with
/// the id of the last event (`Last-Event-ID`), as a client that has to reconnect does.
async fn events(headers: HeaderMap) -> EventStream<impl Stream<Item = Result<Event, Infallible>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let first = last.map_or((0, Duration::ZERO), |last| (last.wrapping_add(1), TICK));
    let event = async |(number, wait): (u64, Duration)| {
        tokio::time::sleep(wait).await;
        // A browser that has to reconnect would otherwise wait for several seconds.
        let event = Event::default().retry(Duration::from_millis(100)).id(number.to_string()).data("tick");
        Some((Ok(event), (number.wrapping_add(1), TICK)))
    };
    EventStream(Sse::new(stream::unfold(first, event)))
}

/// Sends each message back. At a restart or reload the next process continues the WebSocket, and its client notices
/// nothing. This handler has no state to hand on.
async fn socket(upgrade: WebSocketUpgrade, carry: Carry<()>) -> Response {
    // The default of 128 KiB is the memory of each idle WebSocket.
    upgrade.read_buffer_size(4096).on_upgrade(async move |mut socket| {
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                () = carry.requested() => return carry.hand_on(&()),
            };
            let Some(Ok(message)) = message else { return };
            // axum answers Ping and Close frames itself.
            let has_content = matches!(message, Message::Text(_) | Message::Binary(_));
            if has_content && socket.send(message).await.is_err() {
                return;
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use http_body_util::BodyExt;
    use outlive::testing::with_context;
    use tower::ServiceExt;

    use super::*;

    async fn ask(path: &str, body: &'static str) -> (StatusCode, String) {
        let request = Request::builder().uri(path).body(Body::from(body)).expect("the request is valid");
        let routes = with_context(routes(Duration::from_millis(1)));
        let response = routes.oneshot(request).await.expect("routers are infallible");
        let status = response.status();
        let bytes = response.into_body().collect().await.expect("the body is complete").to_bytes();
        (status, String::from_utf8(bytes.to_vec()).expect("the text is valid"))
    }

    #[tokio::test]
    async fn root_describes_the_process() {
        let (status, body) = ask("/", "").await;
        assert_eq!(status, StatusCode::OK);
        assert!(body.starts_with(&format!("pid {}, generation 1, since 20", std::process::id())), "{body}");
    }

    #[tokio::test]
    async fn sleep_accepts_an_optional_slash_and_an_optional_duration() {
        for path in ["/sleep?duration=1ms", "/sleep/?duration=1ms", "/sleep"] {
            assert_eq!(ask(path, "").await, (StatusCode::OK, "slept 1ms\n".to_owned()));
        }
    }

    #[tokio::test]
    async fn invalid_duration_is_refused_with_400_and_the_reason() {
        let (status, body) = ask("/sleep?duration=soon", "").await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(body.contains("duration=soon"), "{body}");
    }

    #[tokio::test]
    async fn echo_returns_the_body() {
        assert_eq!(ask("/echo", "hello").await, (StatusCode::OK, "hello".to_owned()));
    }
}
