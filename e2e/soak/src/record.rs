//! What the clients saw, by the event that was under way: a verb or a fault.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// What a client had to complain of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Complaint {
    /// No whole, right answer to a request.
    Lost,
    /// A connection closed that was kept.
    Closed,
}

/// What happened while one event was under way, and until all clients had been answered after it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub answered: u64,
    pub longest: Duration,
    pub complaints: BTreeMap<(Complaint, &'static str, String), u64>,
}

impl Seen {
    pub fn count(&self, complaint: Complaint) -> u64 {
        self.complaints.iter().filter(|((kind, ..), _)| *kind == complaint).map(|(_, count)| count).sum()
    }
}

/// Where the clients write.
pub struct Record {
    stop: AtomicBool,
    event: AtomicUsize,
    answered: AtomicU64,
    longest: AtomicU64,
    seen: Mutex<Vec<Seen>>,
    /// Requests that each client has done with, well or badly.
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

    /// The event that is under way.
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

    /// Ends the event that is under way, once each client has had an answer to a request that it sent after this was
    /// called: what it complains of then is of the next. Gives what was seen.
    pub fn end_event(&self, limit: Duration) -> Result<Seen> {
        let begun = Instant::now();
        // The second to end from here on was sent after here.
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
