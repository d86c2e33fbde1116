//! The histogram of request durations. Each thread counts in a histogram of its own, and a scrape adds them up, because
//! threads that increment the same counters slow each other down.

use std::cell::RefCell;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use hyper::StatusCode;
use prometheus::core::{Collector, Desc};
use prometheus::local::LocalHistogram;
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec};

use super::registered;
use crate::os::lock::lock;

/// Upper bounds of the histogram, in seconds.
const BOUNDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

static DURATIONS: LazyLock<Durations> = LazyLock::new(|| registered(Durations::new()));

pub fn register() {
    LazyLock::force(&DURATIONS);
}

#[derive(Clone)]
struct Durations {
    sums: HistogramVec,
    parts: Arc<Mutex<Vec<Part>>>,
}

/// The counts of one thread for one series since the last scrape. Only a scrape contends for its lock.
type Part = Arc<Mutex<LocalHistogram>>;

/// A part and the labels of its series.
struct Series {
    route: Option<&'static str>,
    method: &'static str,
    status: StatusCode,
    part: Part,
}

thread_local! {
    /// The series that this thread has counted in. A linear search is faster than hashing three labels, and their
    /// number is bounded by that of the routes, methods and statuses.
    static SEEN: RefCell<Vec<Series>> = const { RefCell::new(Vec::new()) };
}

/// Counts a response; `route` is `None` if no route matched.
pub fn answered(route: Option<&'static str>, method: &'static str, status: StatusCode, took: Duration) {
    SEEN.with_borrow_mut(|met| {
        let is_same =
            |series: &Series| series.status == status && series.method == method && series.route == route;
        let index = met.iter().position(is_same).unwrap_or_else(|| {
            let part = DURATIONS.part([route.unwrap_or_default(), method, status.as_str()]);
            met.push(Series { route, method, status, part });
            met.len() - 1
        });
        lock(&met[index].part).observe(took.as_secs_f64());
    });
}

impl Durations {
    fn new() -> prometheus::Result<Self> {
        let options = HistogramOpts::new(
            "http_request_duration_seconds",
            "Time from the receipt of a request to the head of its response, by route template, method and status.",
        );
        let sums = HistogramVec::new(options.buckets(BOUNDS.to_vec()), &["route", "method", "status"])?;
        Ok(Self { sums, parts: Arc::default() })
    }

    fn part(&self, labels: [&str; 3]) -> Part {
        let part = Arc::new(Mutex::new(self.sums.with_label_values(&labels).local()));
        let mut parts = lock(&self.parts);
        add_up(&mut parts);
        parts.push(part.clone());
        part
    }
}

/// Adds the counts of `parts` to the sums, and removes the parts of threads that have ended. A handler that calls tokio's
/// `block_in_place` moves the work of its thread to another one, so there can be new threads all the time.
fn add_up(parts: &mut Vec<Part>) {
    parts.retain(|part| {
        // Read before `flush`, because otherwise the counts of a thread that ends in between would be lost.
        let has_thread = Arc::strong_count(part) > 1;
        lock(part).flush();
        has_thread
    });
}

impl Collector for Durations {
    fn desc(&self) -> Vec<&Desc> {
        self.sums.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        add_up(&mut lock(&self.parts));
        self.sums.collect()
    }
}

/// The number of requests that were counted with these labels.
#[cfg(test)]
pub fn count(route: &str, method: &str, status: &str) -> u64 {
    DURATIONS.collect();
    DURATIONS.sums.with_label_values(&[route, method, status]).get_sample_count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_threads_are_added_up_also_after_their_end() {
        let count_two = || {
            for _ in 0..2 {
                answered(Some("/added-up"), "GET", StatusCode::OK, Duration::from_millis(1));
            }
        };
        count_two();
        assert_eq!(count("/added-up", "GET", "200"), 2);
        std::thread::spawn(count_two).join().expect("the thread does not panic");
        assert_eq!(count("/added-up", "GET", "200"), 4);
        count_two();
        assert_eq!(count("/added-up", "GET", "200"), 6);
    }

    #[test]
    fn threads_that_have_ended_take_no_memory() {
        const THREADS: usize = 500;
        let count_one = || answered(Some("/ended"), "GET", StatusCode::OK, Duration::from_millis(1));
        for _ in 0..THREADS {
            std::thread::spawn(count_one).join().expect("the thread does not panic");
        }
        // Other tests count at the same time, each in a few series.
        assert!(lock(&DURATIONS.parts).len() < THREADS / 2, "{}", lock(&DURATIONS.parts).len());
        assert_eq!(count("/ended", "GET", "200"), THREADS as u64);
    }
}
