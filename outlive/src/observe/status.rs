//! The status line of this process in `systemctl status` (`STATUS=`, sd_notify(3)).

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::observe::counted;
use crate::os::lock::lock;
use crate::registry::{Counts, Registry};

/// The longest list of listeners in the line, in bytes. systemd limits the length of the line (`os/systemd.rs`), and the
/// numbers that follow the list must be in it.
const LISTENERS_LIMIT: usize = 1024;

pub struct Status {
    registry: Arc<Registry>,
    listeners: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    note: Option<String>,
    /// What old processes still do.
    old: Option<String>,
    role: ManagerRole,
}

/// The role of this process towards the service manager, in the order in which a process has them. It decides which
/// periodic messages the process sends; two processes that sent them would overwrite each other's status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ManagerRole {
    /// The main process of the unit, which serves. It sends the status line and feeds the watchdog.
    #[default]
    Main,
    /// The main process of the unit, which drains. The drain sends the status line.
    Stopping,
    /// No longer the main process: the successor is, and sends the messages.
    Former,
}

impl Status {
    /// The status of a process that serves on `listeners`.
    pub fn new(registry: Arc<Registry>, listeners: String) -> Self {
        Self { registry, listeners, state: Mutex::default() }
    }

    pub fn listeners(&self) -> &str {
        &self.listeners
    }

    pub fn line(&self) -> String {
        let Counts { connections, in_flight, answered } = self.registry.counts();
        let listeners = beginning(&self.listeners);
        let counts = format!("{connections} connections, {in_flight} in flight, {answered} answered");
        let state = self.state();
        let part = |part: &Option<String>| part.as_ref().map_or_else(String::new, |part| format!("; {part}"));
        let (old, note) = (part(&state.old), part(&state.note));
        format!("serving on {listeners}: {counts}{old}{note}")
    }

    /// Appends `note` to the line from now on, in place of an earlier note.
    pub fn note(&self, note: String) {
        self.state().note = Some(note);
    }

    /// Says how many old processes still send how many responses.
    pub fn set_old(&self, processes: usize, responses: usize) {
        let processes_send = if processes == 1 { "process still sends" } else { "processes still send" };
        let line = format!("{processes} old {processes_send} {}", counted(responses, "response"));
        self.state().old = (processes > 0).then_some(line);
    }

    pub fn role(&self) -> ManagerRole {
        self.state().role
    }

    pub fn set_role(&self, role: ManagerRole) {
        self.state().role = role;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// The listeners that fit into the line, with dots in place of the others.
fn beginning(listeners: &str) -> Cow<'_, str> {
    let fits = &listeners[..listeners.floor_char_boundary(LISTENERS_LIMIT)];
    if fits.len() == listeners.len() {
        return listeners.into();
    }
    let whole = fits.rfind(' ').map_or(fits, |end| &fits[..end]);
    format!("{whole} ...").into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::registry::Limits;

    #[test]
    fn list_of_listeners_that_is_too_long_ends_after_a_whole_one() {
        let listeners = |count| vec!["http(/run/a.sock)"; count].join(" ");
        assert_eq!(beginning(&listeners(3)), listeners(3));
        // Each but the first takes 18 bytes.
        assert_eq!(beginning(&listeners(100)), format!("{} ...", listeners(56)));
    }

    #[tokio::test]
    async fn old_processes_are_named_before_the_note_while_there_are_any() {
        let limit = Duration::from_secs(1);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let status = Status::new(Registry::new(limits, CancellationToken::new()), "http".to_owned());
        status.note("took over 1 connection".to_owned());
        let ends = [
            (1, 1, "; 1 old process still sends 1 response; took over 1 connection"),
            (2, 3, "; 2 old processes still send 3 responses; took over 1 connection"),
            (0, 0, ", 0 answered; took over 1 connection"),
        ];
        for (processes, responses, end) in ends {
            status.set_old(processes, responses);
            assert!(status.line().ends_with(end), "{}", status.line());
        }
    }
}
