//! What the clients saw during each event. All clients write to one `Record`; the main thread ends events with
//! `Record::end_event`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// A loss that a client saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Complaint {
    /// A request without a complete and correct response.
    Lost,
    /// A keep-alive connection that the server closed.
    Closed,
}

/// What happened during one event, and until all clients had received responses after it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub answered: u64,
    /// The longest wait for a response.
    pub longest: Duration,
    pub complaints: BTreeMap<(Complaint, &'static str, String), u64>,
}

impl Seen {
    pub fn count(&self, complaint: Complaint) -> u64 {
        self.complaints.iter().filter(|((seen, ..), _)| *seen == complaint).map(|(_, count)| count).sum()
    }
}

/// Counters that the clients write to. The atomics count for the current event, and `seen` has one entry for each
/// event.
pub struct Record {
    stop: AtomicBool,
    event: AtomicUsize,
    answered: AtomicU64,
    /// In microseconds.
    longest: AtomicU64,
    seen: Mutex<Vec<Seen>>,
    /// For each client, the number of requests that have ended, with or without a response.
    rounds: Vec<AtomicU64>,
}

impl Record {
    pub fn new(clients: usize) -> Self {
        Self {
            stop: AtomicBool::new(false),
            event: AtomicUsize::new(0),
            answered: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            seen: Mutex::new(vec![Seen::default()]),
            rounds: (0..clients).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// The number of the current event.
    pub fn event(&self) -> usize {
        self.event.load(Relaxed)
    }

    pub fn answered(&self, took: Duration) {
        self.answered.fetch_add(1, Relaxed);
        self.longest.fetch_max(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    pub fn complain(&self, event: usize, complaint: Complaint, client: &'static str, what: String) {
        let mut seen = self.seen.lock().expect("no client panics while it holds the lock");
        *seen[event].complaints.entry((complaint, client, what)).or_default() += 1;
    }

    pub fn done(&self, client: usize) {
        self.rounds[client].fetch_add(1, Relaxed);
    }

    /// Waits until each client has finished a request that it sent after this call, so that a late effect of the event
    /// is not counted for the next one. Then ends the event, and returns what the clients saw.
    pub fn end_event(&self, limit: Duration) -> Result<Seen> {
        let begun = Instant::now();
        // The first request that ends may have been sent before this call, the second one was sent after it.
        let wanted: Vec<u64> = self.rounds.iter().map(|rounds| rounds.load(Relaxed) + 2).collect();
        loop {
            let late =
                self.rounds.iter().zip(&wanted).filter(|(rounds, wanted)| rounds.load(Relaxed) < **wanted);
            let late = late.count();
            if late == 0 {
                break;
            }
            ensure!(begun.elapsed() < limit, "{late} clients were not answered within {limit:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut seen = self.seen.lock().expect("no client panics while it holds the lock");
        let event = self.event();
        seen.push(Seen::default());
        self.event.store(event + 1, Relaxed);
        seen[event].answered = self.answered.swap(0, Relaxed);
        seen[event].longest = Duration::from_micros(self.longest.swap(0, Relaxed));
        Ok(seen[event].clone())
    }
}
