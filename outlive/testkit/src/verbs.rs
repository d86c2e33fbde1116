//! Restarts or reloads in a row, under a load.

use std::time::{Duration, Instant};

use crate::container::Container;
use crate::exclusive_cpu;
use crate::load::{Connections, Load, Report};

/// How many times in a row a test restarts or reloads: the environment variable `TIMES`, or 10. That is few because
/// the soak does thousands.
pub fn iterations() -> u32 {
    std::env::var("TIMES").map_or(10, |times| times.parse().expect("TIMES is a number"))
}

/// Runs `systemctl VERB` [`iterations`] times under `load`, and asserts that no request was lost and no connection
/// closed. Returns what the clients saw.
pub fn repeat_under_load(verb: &str, container: &Container, load: Load) -> Report {
    let one_each = load.connections == Connections::OneEach;
    container.ask("/");
    let _alone = exclusive_cpu();
    let mut slowest = Duration::ZERO;
    let running = load.start(container.enter());
    let iterations = iterations();
    for _ in 0..iterations {
        let (begun, ended) = (Instant::now(), running.ended());
        container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
        slowest = slowest.max(begun.elapsed());
        // At least one request between two verbs, so that each process serves the load even on a slow machine.
        running.wait_for(ended + 1);
    }
    let report = running.stop();
    eprintln!("{iterations} times {verb}, the slowest {} ms: {report}", slowest.as_millis());
    assert!(report.answered > u64::from(iterations), "the load was too small: {report}");
    assert_eq!(report.lost(), 0, "{report}");
    let wanted = if one_each { report.answered } else { report.clients };
    assert_eq!(report.connections, wanted, "{report}");
    report
}
