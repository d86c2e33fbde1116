//! The metrics of the tokio runtime: how many tasks there are, how many of them wait, and how busy its worker threads are.
//!
//! These are the ones that tokio offers without `--cfg tokio_unstable`.

use std::sync::{LazyLock, Mutex};

use prometheus::{CounterVec, IntCounterVec, IntGauge};
use tokio::runtime::RuntimeMetrics;

use crate::os::lock::lock;

static WORKERS: LazyLock<IntGauge> =
    metric!(IntGauge, "outlive_runtime_workers", "Worker threads of the tokio runtime.");
static TASKS: LazyLock<IntGauge> =
    metric!(IntGauge, "outlive_runtime_tasks", "Tasks of the tokio runtime that have not ended.");
static QUEUE: LazyLock<IntGauge> = metric!(
    IntGauge,
    "outlive_runtime_global_queue_length",
    "Tasks waiting in the queue of the tokio runtime from which all its workers take tasks."
);
static BUSY: LazyLock<CounterVec> = metric!(
    CounterVec,
    "outlive_runtime_worker_busy_seconds_total",
    "Time that a worker thread of the tokio runtime has spent with tasks and events, by worker. The time since it last \
     waited is not included.",
    &["worker"]
);
static PARKS: LazyLock<IntCounterVec> = metric!(
    IntCounterVec,
    "outlive_runtime_worker_parks_total",
    "How often a worker thread of the tokio runtime has begun to wait for events, by worker.",
    &["worker"]
);

pub fn register() {
    for gauge in [&WORKERS, &TASKS, &QUEUE] {
        LazyLock::force(gauge);
    }
    LazyLock::force(&BUSY);
    LazyLock::force(&PARKS);
}

/// Reads all of them.
pub fn update(runtime: &RuntimeMetrics) {
    // Otherwise two scrapes at the same time would both add what a counter lacks.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = lock(&ALONE);
    WORKERS.set(number(runtime.num_workers()));
    TASKS.set(number(runtime.num_alive_tasks()));
    QUEUE.set(number(runtime.global_queue_depth()));
    for worker in 0..runtime.num_workers() {
        let label = worker.to_string();
        let busy = BUSY.with_label_values(&[&label]);
        busy.inc_by((runtime.worker_total_busy_duration(worker).as_secs_f64() - busy.get()).max(0.0));
        let parks = PARKS.with_label_values(&[&label]);
        parks.inc_by(runtime.worker_park_count(worker).saturating_sub(parks.get()));
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    /// One test, because the metrics are those of the process.
    #[test]
    fn metrics_follow_the_workers_tasks_and_queue_of_the_runtime() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("the runtime starts");
        let update = || update(&runtime.metrics());
        update();
        assert_eq!((WORKERS.get(), TASKS.get(), QUEUE.get()), (2, 0, 0));
        let waiting: Vec<_> = (0..3).map(|_| runtime.spawn(pending::<()>())).collect();
        update();
        assert_eq!(TASKS.get(), 3);
        // Both workers are blocked, so the tasks that follow wait.
        let (begun, begins) = mpsc::channel();
        let blocked: Vec<_> = (0..2)
            .map(|_| {
                let (free, end) = mpsc::channel::<()>();
                let begun = begun.clone();
                runtime.spawn(async move {
                    begun.send(()).expect("the test waits");
                    let _ = end.recv();
                });
                free
            })
            .collect();
        begins.recv().expect("a task begins");
        begins.recv().expect("a task begins");
        let queued: Vec<_> = (0..5).map(|_| runtime.spawn(async {})).collect();
        update();
        assert_eq!((TASKS.get(), QUEUE.get()), (10, 5));
        let busy =
            || -> f64 { ["0", "1"].map(|worker| BUSY.with_label_values(&[worker]).get()).iter().sum() };
        let parks =
            || -> u64 { ["0", "1"].map(|worker| PARKS.with_label_values(&[worker]).get()).iter().sum() };
        let (busy_before, parks_before) = (busy(), parks());
        // A second update must not add the same counts again. They do not change while the workers are blocked.
        update();
        let of_runtime = |count: fn(&RuntimeMetrics, usize) -> u64| -> u64 {
            (0..2).map(|worker| count(&runtime.metrics(), worker)).sum()
        };
        assert_eq!(parks(), of_runtime(RuntimeMetrics::worker_park_count));
        let nanoseconds = of_runtime(|metrics, worker| {
            u64::try_from(metrics.worker_total_busy_duration(worker).as_nanos()).expect("the test is short")
        });
        assert!((busy() - Duration::from_nanos(nanoseconds).as_secs_f64()).abs() < 1e-6, "{}", busy());
        std::thread::sleep(Duration::from_millis(50));
        drop(blocked);
        let deadline = Instant::now() + Duration::from_secs(60);
        // Each worker was busy for 50 ms at least, and has begun to wait since.
        while busy() < busy_before + 0.1 || parks() < parks_before + 2 || TASKS.get() > 3 || QUEUE.get() > 0 {
            assert!(Instant::now() < deadline, "{} {} {}", busy(), parks(), TASKS.get());
            update();
        }
        drop((waiting, queued));
        runtime.shutdown_background();
    }
}
