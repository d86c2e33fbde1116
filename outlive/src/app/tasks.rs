//! Background tasks. They begin when the process begins to serve ([`begin`]). After the last response the process asks
//! them to end and waits for that ([`Running::finish`]).

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::anyhow;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use crate::os::lock::lock;
use crate::os::task;

/// The pause before a supervised task begins again, so that a task that fails at once does not use a whole CPU.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

type Work = BoxFuture<'static, anyhow::Result<()>>;

/// How often a task begins.
pub enum Begin {
    /// Once; if it ends early, the process ends too.
    Once(Box<dyn FnOnce(CancellationToken) -> Work + Send>),
    /// Again each time that it has ended.
    Again(Box<dyn FnMut(CancellationToken) -> Work + Send>),
}

/// A task that was registered.
pub struct Task {
    pub name: String,
    pub begin: Begin,
    /// Whether it begins only when the exclusive tasks of the predecessor have ended.
    pub is_exclusive: bool,
}

/// The tasks of a process that serves.
pub struct Running {
    exclusive: Group,
    others: Group,
    names: Arc<Mutex<Vec<String>>>,
    failed: watch::Receiver<Option<String>>,
}

/// Tasks that end together.
struct Group {
    tracker: TaskTracker,
    end: CancellationToken,
    /// The handles with which tasks that do not end are aborted.
    tasks: Vec<AbortHandle>,
}

impl Group {
    fn new() -> Self {
        Self { tracker: TaskTracker::new(), end: CancellationToken::new(), tasks: Vec::new() }
    }

    async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Begins `tasks`; exclusive ones begin when `predecessor_gone` is cancelled.
pub fn begin(tasks: Vec<Task>, predecessor_gone: &CancellationToken) -> Running {
    let (mut exclusive, mut others) = (Group::new(), Group::new());
    let names = Arc::new(Mutex::new(tasks.iter().map(|task| task.name.clone()).collect::<Vec<_>>()));
    let (fail, failed) = watch::channel(None);
    for task in tasks {
        let group = if task.is_exclusive { &mut exclusive } else { &mut others };
        let (end, names, fail) = (group.end.clone(), names.clone(), fail.clone());
        let predecessor_gone = predecessor_gone.clone();
        let running = task::spawn(group.tracker.track_future(async move {
            let name = task.name.clone();
            // An exclusive task that still waits at the end of the process never begins, because it has no work to
            // finish.
            let begins = async { predecessor_gone.cancelled().await };
            let is_to_begin = !task.is_exclusive || end.run_until_cancelled(begins).await.is_some();
            if is_to_begin && let Err(reason) = task.run(&end).await {
                fail.send_if_modified(|failed| failed.is_none() && failed.replace(reason).is_none());
            }
            lock(&names).retain(|other| *other != name);
        }));
        group.tasks.push(running.abort_handle());
    }
    Running { exclusive, others, names, failed }
}

impl Task {
    /// Runs the task until `end` is cancelled. Returns an error if the process has to end because the task ended early.
    async fn run(self, end: &CancellationToken) -> Result<(), String> {
        let Self { name, begin, .. } = self;
        let mut again = match begin {
            Begin::Once(begin) => {
                let outcome = outcome(|| begin(end.clone())).await;
                if end.is_cancelled() {
                    report(&name, outcome);
                    return Ok(());
                }
                let reason = outcome.map_or_else(|error| format!(": {error:#}"), |()| String::new());
                return Err(format!("the service stops because the background task {name:?} ended{reason}"));
            }
            Begin::Again(begin) => begin,
        };
        loop {
            let outcome = outcome(|| again(end.clone())).await;
            if end.is_cancelled() {
                report(&name, outcome);
                return Ok(());
            }
            let reason = outcome.map_or_else(|error| format!(": {error:#}"), |()| String::new());
            warn!(task = name, "the background task {name:?} ended and will be restarted{reason}");
            tokio::select! {
                () = sleep(RESTART_PAUSE) => {}
                () = end.cancelled() => return Ok(()),
            }
        }
    }
}

fn report(name: &str, outcome: anyhow::Result<()>) {
    if let Err(error) = outcome {
        error!(task = name, "the background task {name:?} failed during shutdown: {error:#}");
    }
}

/// Runs `work`. A panic, which the panic hook has logged already, becomes an error.
pub async fn outcome(work: impl FnOnce() -> Work) -> anyhow::Result<()> {
    let work = async move { work().await };
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| Err(panic_message(&*panic)))
}

/// The message of a panic.
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> anyhow::Error {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    anyhow!("panicked: {}", text.unwrap_or("no message"))
}

impl Running {
    /// Waits until a task has ended early because of which the process has to end, and returns the reason.
    pub async fn failed(&self) -> String {
        let mut failed = self.failed.clone();
        let reason = failed.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            // There are no tasks, or all of them have ended as asked.
            None => std::future::pending().await,
        }
    }

    /// Asks the exclusive tasks to end, and waits until they have. Aborts the tasks that have not ended at `deadline`,
    /// because this process continues, and the successor starts its exclusive tasks next. A task that blocks its thread
    /// cannot be aborted, so this waits until it ends.
    pub async fn finish_exclusive(&self, deadline: Instant) {
        self.exclusive.end.cancel();
        if timeout_at(deadline, self.exclusive.ended()).await.is_err() {
            error!("exclusive background tasks did not finish in time, so this process aborts them");
            self.exclusive.tasks.iter().for_each(AbortHandle::abort);
            self.exclusive.ended().await;
        }
    }

    /// Asks all tasks to end, and waits for them until `deadline`. Tasks that have not ended by then are logged.
    pub async fn finish(self, deadline: Instant) {
        self.exclusive.end.cancel();
        self.others.end.cancel();
        let ended = async {
            self.exclusive.ended().await;
            self.others.ended().await;
        };
        if timeout_at(deadline, ended).await.is_err() {
            for name in lock(&self.names).iter() {
                error!(task = name, "the background task {name:?} did not finish in time: cut off");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn task(name: &str, begin: Begin) -> Task {
        Task { name: name.to_owned(), begin, is_exclusive: false }
    }

    fn gone() -> CancellationToken {
        let gone = CancellationToken::new();
        gone.cancel();
        gone
    }

    #[tokio::test(start_paused = true)]
    async fn finish_cancels_the_token_of_a_task_and_waits_for_its_end() {
        let ended = Arc::new(AtomicU32::new(0));
        let count = ended.clone();
        let begin = Begin::Once(Box::new(move |end| {
            Box::pin(async move {
                end.cancelled().await;
                sleep(Duration::from_secs(3)).await;
                count.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        }));
        let running = begin_one(task("flush", begin));
        running.finish(Instant::now() + Duration::from_secs(4)).await;
        assert_eq!(ended.load(Ordering::SeqCst), 1);
    }

    fn begin_one(task: Task) -> Running {
        begin(vec![task], &gone())
    }

    #[tokio::test(start_paused = true)]
    async fn task_that_ignores_its_token_is_cut_off_at_the_deadline() {
        let running = begin_one(task("hangs", Begin::Once(Box::new(|_| Box::pin(std::future::pending())))));
        let begun = Instant::now();
        running.finish(begun + Duration::from_secs(4)).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(4));
    }

    #[tokio::test(start_paused = true)]
    async fn exclusive_tasks_that_do_not_end_are_aborted_at_the_deadline_and_other_tasks_run() {
        let hangs = |name, is_exclusive| {
            let alive = Arc::new(());
            let held = Arc::downgrade(&alive);
            let begin = Begin::Once(Box::new(move |_| {
                Box::pin(async move {
                    std::future::pending::<()>().await;
                    drop(alive);
                    Ok(())
                })
            }));
            (Task { is_exclusive, ..task(name, begin) }, held)
        };
        let (exclusive, of_exclusive) = hangs("consume", true);
        let (other, of_other) = hangs("refresh", false);
        let running = begin(vec![exclusive, other], &gone());
        sleep(Duration::from_secs(1)).await;
        let begun = Instant::now();
        running.finish_exclusive(begun + Duration::from_secs(4)).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(4));
        assert_eq!((of_exclusive.strong_count(), of_other.strong_count()), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn task_that_ends_early_or_panics_ends_the_process() {
        let early = Begin::Once(Box::new(|_| Box::pin(async { Ok(()) })));
        let reason = begin_one(task("early", early)).failed().await;
        assert_eq!(reason, "the service stops because the background task \"early\" ended");
        let panics = Begin::Once(Box::new(|_| Box::pin(async { panic!("on purpose") })));
        let reason = begin_one(task("bad", panics)).failed().await;
        assert!(reason.ends_with(": panicked: on purpose"), "{reason}");
    }

    #[tokio::test(start_paused = true)]
    async fn supervised_task_that_fails_begins_again_after_a_second() {
        let times = Arc::new(AtomicU32::new(0));
        let count = times.clone();
        let begin = Begin::Again(Box::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            Box::pin(async { anyhow::bail!("no luck") })
        }));
        let running = begin_one(task("poll", begin));
        sleep(Duration::from_millis(3500)).await;
        assert_eq!(times.load(Ordering::SeqCst), 4);
        running.finish(Instant::now()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn exclusive_task_begins_when_the_predecessor_is_gone() {
        let (times, predecessor_gone) = (Arc::new(AtomicU32::new(0)), CancellationToken::new());
        let count = times.clone();
        let begin = Begin::Once(Box::new(move |end| {
            count.fetch_add(1, Ordering::SeqCst);
            Box::pin(async move {
                end.cancelled().await;
                Ok(())
            })
        }));
        let running =
            super::begin(vec![Task { is_exclusive: true, ..task("schedule", begin) }], &predecessor_gone);
        sleep(Duration::from_secs(60)).await;
        assert_eq!(times.load(Ordering::SeqCst), 0);
        predecessor_gone.cancel();
        sleep(Duration::from_secs(1)).await;
        assert_eq!(times.load(Ordering::SeqCst), 1);
        running.finish(Instant::now() + Duration::from_secs(1)).await;
    }
}
