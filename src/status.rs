//! The line about this process in `systemctl status`.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::lock::lock;
use crate::registry::{Counts, Registry};

pub struct Status {
    registry: Arc<Registry>,
    listeners: String,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    remark: Option<String>,
    voice: Voice,
}

/// Who speaks to the service manager, in the order of a process's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Voice {
    /// This process, of its serving.
    #[default]
    Serving,
    /// This process, of its end.
    Ending,
    /// Its successor.
    Silent,
}

impl Status {
    /// Of a process that listens on `listeners`.
    pub fn new(registry: Arc<Registry>, listeners: String) -> Self {
        Self { registry, listeners, said: Mutex::default() }
    }

    pub fn listeners(&self) -> &str {
        &self.listeners
    }

    pub fn line(&self) -> String {
        let Counts { connections, in_flight, answered } = self.registry.counts();
        let listeners = &self.listeners;
        let counts = format!("{connections} connections, {in_flight} in flight, {answered} answered");
        let remark = self.said().remark.as_ref().map_or_else(String::new, |remark| format!("; {remark}"));
        format!("serving on {listeners}: {counts}{remark}")
    }

    /// Adds to the line from now on.
    pub fn remark(&self, remark: String) {
        self.said().remark = Some(remark);
    }

    pub fn voice(&self) -> Voice {
        self.said().voice
    }

    pub fn set_voice(&self, voice: Voice) {
        self.said().voice = voice;
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        lock(&self.said)
    }
}
