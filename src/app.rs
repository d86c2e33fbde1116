//! YOUR CODE: the routes of the service.
//!
//! Nothing here knows of sockets, processes or systemd. What the rest of the house offers a handler:
//! - `Extension<Life>`: which process answers;
//! - `ConnectInfo<Peer>`: who asks;
//! - the request's span, so that each `tracing` event carries its request id.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Query;
use axum::http::StatusCode;
use axum::routing::{any, get};
use axum::{Extension, Router};
use futures_util::StreamExt;

use crate::life::Life;

/// All routes.
pub fn router() -> Router {
    Router::new()
        .route("/", get(who))
        .route("/sleep", get(sleep))
        .route("/sleep/", get(sleep))
        .route("/echo", any(echo))
}

/// Says which process answers.
async fn who(Extension(life): Extension<Life>) -> String {
    let Life { pid, generation, since } = life;
    let since = humantime::format_rfc3339_seconds(since);
    format!("pid {pid}, generation {generation}, since {since}\n")
}

/// Answers after a while: `/sleep?duration=20s`.
async fn sleep(Query(query): Query<Vec<(String, String)>>) -> Result<String, (StatusCode, String)> {
    let duration = query.iter().find(|(key, _)| key == "duration").map_or("1s", |(_, value)| value);
    let duration: Duration = humantime::parse_duration(duration)
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("duration={duration}: {error}\n")))?;
    tokio::time::sleep(duration).await;
    Ok(format!("slept {}\n", humantime::format_duration(duration)))
}

/// Streams the request body back.
async fn echo(body: Body) -> Body {
    let mut pieces = Box::pin(body.into_data_stream().peekable());
    // A client that waits for 100 Continue gets it when its body is first asked for.
    pieces.as_mut().peek().await;
    Body::from_stream(pieces)
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn ask(path: &str, body: &'static str) -> (StatusCode, String) {
        let request = Request::builder().uri(path).body(Body::from(body)).expect("a request");
        let service = router().layer(Extension(Life::begin(7)));
        let response = service.oneshot(request).await.expect("infallible");
        let status = response.status();
        let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
        (status, String::from_utf8(bytes.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn the_root_says_who_answers() {
        let (status, body) = ask("/", "").await;
        assert_eq!(status, StatusCode::OK);
        assert!(body.starts_with(&format!("pid {}, generation 7, since 20", std::process::id())), "{body}");
    }

    #[tokio::test]
    async fn sleep_answers_with_and_without_a_slash() {
        for path in ["/sleep?duration=1ms", "/sleep/?duration=1ms"] {
            assert_eq!(ask(path, "").await, (StatusCode::OK, "slept 1ms\n".to_owned()));
        }
    }

    #[tokio::test]
    async fn a_duration_that_is_none_is_refused_with_a_reason() {
        let (status, body) = ask("/sleep?duration=soon", "").await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(body.contains("duration=soon"), "{body}");
    }

    #[tokio::test]
    async fn echo_gives_the_body_back() {
        assert_eq!(ask("/echo", "hello").await, (StatusCode::OK, "hello".to_owned()));
    }
}
