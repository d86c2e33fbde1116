//! The line about this process in `systemctl status`.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::os::lock::lock;
use crate::registry::{Counts, Registry};

pub struct Status {
    registry: Arc<Registry>,
    listeners: String,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    note: Option<String>,
    role: ManagerRole,
}

/// Who speaks to the service manager, in the order of a process's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ManagerRole {
    /// This process, of its serving.
    #[default]
    Main,
    /// This process, of its end.
    Stopping,
    /// Its successor.
    Former,
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
        let note = self.said().note.as_ref().map_or_else(String::new, |note| format!("; {note}"));
        format!("serving on {listeners}: {counts}{note}")
    }

    /// Adds to the line from now on.
    pub fn note(&self, note: String) {
        self.said().note = Some(note);
    }

    pub fn role(&self) -> ManagerRole {
        self.said().role
    }

    pub fn set_role(&self, role: ManagerRole) {
        self.said().role = role;
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        lock(&self.said)
    }
}
