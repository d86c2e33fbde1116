//! The readiness checks that an application registers. `/readyz` runs them when it is requested.

use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::app::tasks;

/// How long a check may take before it counts as failed.
const CHECK_LIMIT: Duration = Duration::from_secs(2);
/// The minimum time between two runs of a check, so that many load balancers do not overload what it checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A check of a resource without which the service cannot answer requests.
pub struct Check {
    name: String,
    run: Box<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>,
    last: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Check {
    pub fn new(
        name: String,
        run: impl Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync + 'static,
    ) -> Self {
        Self { name, run: Box::new(run), last: Mutex::default() }
    }

    /// The result of the check. The lock is held while the check runs, so that concurrent callers get the same result.
    async fn answer(&self) -> Result<(), String> {
        let mut last = self.last.lock().await;
        if let Some((when, answer)) = &*last
            && when.elapsed() < CHECK_INTERVAL
        {
            return answer.clone();
        }
        let answer = match timeout(CHECK_LIMIT, tasks::outcome(|| (self.run)())).await {
            Ok(answer) => answer.map_err(|error| format!("{error:#}").replace('\n', " ")),
            Err(_) => Err(format!("timed out after {}", humantime::format_duration(CHECK_LIMIT))),
        };
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// Runs all `checks`. Returns whether all passed, and a line of text for each.
pub async fn ask(checks: &[Check]) -> (bool, String) {
    let answers = join_all(checks.iter().map(Check::answer)).await;
    let line = |(check, answer): (&Check, &Result<(), String>)| {
        let answer = answer.as_ref().map_or_else(String::as_str, |()| "ok");
        format!("{}: {answer}\n", check.name)
    };
    (answers.iter().all(Result::is_ok), checks.iter().zip(&answers).map(line).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn check_that_fails_hangs_or_panics_is_reported_with_its_name() {
        let checks = [
            Check::new("cache".into(), || Box::pin(async { Ok(()) })),
            Check::new("database".into(), || Box::pin(async { anyhow::bail!("it is\ngone") })),
            Check::new("queue".into(), || Box::pin(std::future::pending())),
            Check::new("index".into(), || panic!("on purpose")),
        ];
        let expected =
            "cache: ok\ndatabase: it is gone\nqueue: timed out after 2s\nindex: panicked: on purpose\n";
        assert_eq!(ask(&checks).await, (false, expected.to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn check_runs_at_most_once_a_second() {
        let count = Arc::new(AtomicU32::new(0));
        let runs = count.clone();
        let check = Check::new("counted".into(), move || {
            runs.fetch_add(1, Ordering::SeqCst);
            Box::pin(async { Ok(()) })
        });
        let checks = [check];
        for _ in 0..100 {
            assert!(ask(&checks).await.0);
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        assert_eq!(count.load(Ordering::SeqCst), 3);
    }
}
