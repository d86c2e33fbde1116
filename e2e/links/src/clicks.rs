//! Counts clicks in memory, and adds them to the database each second and once more when the process ends. A restart or
//! reload loses no click and counts none twice, because the task gets its shutdown signal after the last response, and
//! because each batch has an id under which the database adds it only once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outlive::prometheus::IntCounter;
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// Time between two flushes. A crash loses the clicks that were counted since the last one.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// How often the last flush is tried again if the database is not available.
const LAST_TRIES: u32 = 2;

/// Number of clicks for each code. It cannot have more entries than there are links.
pub type Counts = HashMap<String, i64>;

/// Clicks that are not in the database yet.
#[derive(Clone)]
pub struct Clicks {
    store: Store,
    counts: Arc<Mutex<Counts>>,
    total: IntCounter,
}

impl Clicks {
    pub fn new(store: Store) -> anyhow::Result<Self> {
        let total = IntCounter::new("links_followed_total", "Redirects served by this process.")?;
        Ok(Self { store, counts: Arc::default(), total })
    }

    pub fn total(&self) -> IntCounter {
        self.total.clone()
    }

    pub fn count(&self, code: String) {
        self.total.inc();
        *self.counts().entry(code).or_default() += 1;
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the clicks to the database until `end` is cancelled, which happens after the last response of this
    /// process. While the database is not available, clicks stay in memory.
    pub async fn flush(self, end: CancellationToken) -> anyhow::Result<()> {
        let mut batch = None;
        while end.run_until_cancelled(tokio::time::sleep(FLUSH_INTERVAL)).await.is_some() {
            if let Err(error) = self.flush_once(&mut batch).await {
                tracing::warn!("could not write clicks to the database; retrying: {error:#}");
            }
        }
        let mut tries = LAST_TRIES;
        while batch.is_some() || !self.counts().is_empty() {
            let Err(error) = self.flush_once(&mut batch).await else { continue };
            if tries == 0 {
                let lost = batch.iter().flat_map(|batch| batch.counts.values()).sum::<i64>()
                    + self.counts().values().sum::<i64>();
                return Err(error.context(format!("lost {lost} clicks")));
            }
            tries -= 1;
            tokio::time::sleep(FLUSH_INTERVAL).await;
        }
        Ok(())
    }

    /// If an error leaves open whether the batch was added, `batch` keeps it with its id for the next call. A new batch
    /// would count these clicks twice.
    async fn flush_once(&self, batch: &mut Option<Batch>) -> anyhow::Result<()> {
        if batch.is_none() {
            let counts = std::mem::take(&mut *self.counts());
            *batch = (!counts.is_empty()).then(|| Batch { id: rand::random(), counts });
        }
        if let Some(Batch { id, counts }) = batch {
            self.store.add_clicks(*id, counts).await?;
        }
        *batch = None;
        Ok(())
    }
}

/// Clicks that are being added to the database.
struct Batch {
    id: i64,
    counts: Counts,
}
