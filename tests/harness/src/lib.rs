//! What the tests and the benchmark share.

pub mod certificate;
pub mod client;
pub mod container;
pub mod frames;
pub mod house;
pub mod load;
pub mod process;
pub mod service;

use std::time::{Duration, Instant};

/// Nothing that is waited for takes longer than this, on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `work` to its end on a runtime of this thread.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(async { tokio::time::timeout(PATIENCE * 5, work).await.expect("done in time") })
}

/// Waits until `done`, which nothing announces.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
