//! `/debug/pprof/profile` and `/debug/pprof/heap`: profiles of the process in the format of pprof, with the features
//! `cpu-profile` and `heap-profile`. The paths are those of Go's `net/http/pprof`, because tools such as `go tool pprof` and
//! agents of continuous profiling ask for them.

use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tracing::error;

use crate::os::task;

/// The routes of the features that are on.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let router = Router::new();
    #[cfg(feature = "cpu-profile")]
    let router = router.route("/debug/pprof/profile", get(cpu::profile));
    #[cfg(feature = "heap-profile")]
    let router = router.route("/debug/pprof/heap", get(heap::profile));
    router
}

/// Runs `work` on a thread for blocking work.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let result = match task::on_thread(work) {
        Ok(result) => result.await.map_err(Into::into).flatten(),
        Err(error) => Err(error.into()),
    };
    result.inspect_err(|error| error!("could not take a profile: {error:#}"))
}

fn as_file(name: &str, profile: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
    ];
    (headers, profile).into_response()
}

fn failed(error: &anyhow::Error) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("could not take a profile: {error:#}\n")).into_response()
}

#[cfg(feature = "cpu-profile")]
mod cpu {
    use std::ops::RangeInclusive;
    use std::time::Duration;

    use axum::body::Bytes;
    use axum::extract::RawQuery;
    use futures_util::stream;
    use tokio::time::sleep;
    use tracing::info;

    use super::{Body, IntoResponse, Response, StatusCode, as_file, failed, in_background};
    use crate::app::context::Shutdown;
    use crate::observe::cpu_profile::Sampling;

    /// The time without `seconds` in the query, as in Go.
    const DEFAULT: u64 = 30;
    const LIMITS: RangeInclusive<u64> = 1..=60;

    /// Answers with the samples of the time that the query asks for, or of the time until the process drains. The head of the
    /// response is sent at the beginning, because `--request-timeout` limits the time until then.
    pub async fn profile(Shutdown(shutdown): Shutdown, RawQuery(query): RawQuery) -> Response {
        let seconds = match seconds(query.as_deref().unwrap_or_default()) {
            Ok(seconds) => seconds,
            Err(reason) => return (StatusCode::BAD_REQUEST, reason).into_response(),
        };
        let sampling = match in_background(Sampling::begin).await {
            Ok(Some(sampling)) => sampling,
            Ok(None) => {
                let reason =
                    "another profile of the processor time is being taken; try again when it has ended\n";
                return (StatusCode::CONFLICT, reason).into_response();
            }
            Err(error) => return failed(&error),
        };
        info!("taking a profile of the processor time for {seconds}s");
        let samples = async move {
            // A drain waits for this response.
            shutdown.run_until_cancelled(sleep(Duration::from_secs(seconds))).await;
            in_background(|| sampling.finish()).await.map(Bytes::from)
        };
        as_file("profile.pb.gz", Body::from_stream(stream::once(samples)))
    }

    /// The number in the query, or the reason why it is refused.
    fn seconds(query: &str) -> Result<u64, String> {
        let Some(value) = query.split('&').find_map(|field| field.strip_prefix("seconds=")) else {
            return Ok(DEFAULT);
        };
        let seconds = value.parse().ok().filter(|seconds| LIMITS.contains(seconds));
        seconds.ok_or_else(|| {
            format!(
                "invalid seconds {value:?}: expected a number from {} to {}\n",
                LIMITS.start(),
                LIMITS.end()
            )
        })
    }

    #[cfg(test)]
    mod tests {
        use std::sync::Arc;

        use axum::Extension;
        use axum::http::Request;
        use http_body_util::BodyExt;
        use proptest::prelude::*;
        use tokio_util::sync::CancellationToken;
        use tower::ServiceExt;

        use super::super::router;
        use super::*;
        use crate::app::context::RequestContext;
        use crate::app::process::Process;
        use crate::transport::stream::Peer;

        async fn ask(query: &str, shutdown: &CancellationToken) -> Response {
            let context = RequestContext {
                process: Process::begin(1),
                shutdown: shutdown.clone(),
                peer: Peer::Unix,
                client_certificate: None,
            };
            let request = Request::get(format!("/debug/pprof/profile{query}")).body(Body::empty());
            let routes = router::<()>().layer(Extension(Arc::new(context)));
            routes.oneshot(request.expect("a valid request")).await.expect("routes do not fail")
        }

        /// One test, because a process has one profiler.
        #[tokio::test]
        async fn one_profile_at_a_time_is_taken_until_the_client_leaves_or_the_process_drains() {
            let shutdown = CancellationToken::new();
            let first = ask("?seconds=60", &shutdown).await;
            assert_eq!(first.status(), StatusCode::OK);
            assert_eq!(ask("", &shutdown).await.status(), StatusCode::CONFLICT);
            assert_eq!(ask("?seconds=x", &shutdown).await.status(), StatusCode::BAD_REQUEST);
            drop(first);
            let second = ask("?seconds=60", &shutdown).await;
            assert_eq!(second.status(), StatusCode::OK);
            shutdown.cancel();
            let ended = tokio::time::timeout(Duration::from_secs(30), second.into_body().collect()).await;
            let profile = ended.expect("the drain ends it").expect("it is whole").to_bytes();
            assert!(profile.starts_with(b"\x1f\x8b"), "it is not compressed with gzip");
        }

        #[test]
        fn seconds_are_a_number_within_the_limits() {
            for (query, expected) in [
                ("", Some(30)),
                ("debug=1", Some(30)),
                ("seconds=1", Some(1)),
                ("debug=1&seconds=60", Some(60)),
                ("seconds=5&seconds=6", Some(5)),
                ("seconds=0", None),
                ("seconds=61", None),
                ("seconds=", None),
                ("seconds=1.5", None),
                ("seconds=-1", None),
                ("seconds=99999999999999999999", None),
            ] {
                assert_eq!(seconds(query).ok(), expected, "{query}");
            }
            assert_eq!(
                seconds("seconds=61").expect_err("it is too long"),
                "invalid seconds \"61\": expected a number from 1 to 60\n"
            );
        }

        proptest! {
            #[test]
            fn any_query_is_accepted_within_the_limits_or_refused_in_one_line(query in "(seconds=)?.{0,20}(&seconds=[0-9]{0,3})?") {
                match seconds(&query) {
                    Ok(seconds) => prop_assert!(LIMITS.contains(&seconds)),
                    Err(reason) => prop_assert_eq!(reason.lines().count(), 1),
                }
            }
        }
    }
}

#[cfg(feature = "heap-profile")]
mod heap {
    use super::{Response, as_file, failed, in_background};
    use crate::observe::heap_profile;

    /// Answers with what is in use now. jemalloc has sampled it since the process started.
    pub async fn profile() -> Response {
        match in_background(heap_profile::take).await {
            Ok(profile) => as_file("heap.pb.gz", profile.into()),
            Err(error) => failed(&error),
        }
    }
}
