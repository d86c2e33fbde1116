//! The old processes that still send responses after their drain: [`OldProcesses`].
//!
//! The drain of a reload takes at most twice `--drain-timeout`. The old process closes the handover channel at its end,
//! and the successor waits for this. A process that still sends responses then *lingers* (`lifecycle/drain/linger.rs`).
//! Before it closes the handover channel, it sends one end of a new channel, the linger channel, through it:
//!
//! ```text
//! old process                      process that serves
//!   Lingering (on change)  ---->     shows in the status line how many responses are left
//!   Connections            ---->     adopts each connection whose response has ended
//!   Totals                 ---->     adds the counters, at the end
//!                          <----   Stop: there are too many old processes, or the service stops
//! ```
//!
//! A process that is itself replaced passes its ends to its successor, so the process that serves has the ends of all
//! old processes, even if processes between them have exited. This needs no file and no name. If a process crashes, its
//! ends close. If the old process finds the other end closed, no process adopts its connections or asks it to end. If
//! the process that serves finds the other end closed, the old process has exited.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::fs::fstat;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tracing::{debug, info, warn};

use super::adopter::Adopter;
use crate::handover::{Channel, Frame, MessageType, Origin, SocketRecord, send_frames};
use crate::observe::status::Status;
use crate::os::lock::lock;
use crate::os::task;
use crate::server::Server;

/// How many processes may linger. Each needs its own memory for as long as the slowest of its clients reads, so without
/// this bound the memory would grow with each reload.
pub const MAX_OLD_PROCESSES: usize = 8;

/// The name of a linger channel in its record.
const RECORD: &str = "linger";

/// The old processes, as the process that serves sees them. Clones share them.
#[derive(Clone)]
pub struct OldProcesses(Arc<Shared>);

struct Shared {
    server: Server,
    status: Arc<Status>,
    generation: u64,
    state: Mutex<State>,
    /// Notified when an old process has exited, and when the drain has one more channel to pass on.
    changed: Notify,
}

enum State {
    /// This process serves, and reads the channels.
    Followed { processes: Vec<OldProcess>, next_id: u64 },
    /// The successor reads them. Those that have arrived since wait here for the drain.
    PassedOn(Vec<LingerChannel>),
}

/// An old process. They are in the order of their reloads, the oldest first.
struct OldProcess {
    id: u64,
    channel: LingerChannel,
    reader: AbortHandle,
}

/// The end of a linger channel that goes to the process that serves.
pub struct LingerChannel {
    socket: OwnedFd,
    /// How many responses the old process still sends.
    responses: usize,
}

impl LingerChannel {
    pub fn new(socket: OwnedFd, responses: usize) -> Self {
        Self { socket, responses }
    }

    /// Sends it through `to`, a handover channel or a linger channel.
    pub async fn send(self, to: &Channel, origin: Origin) -> io::Result<()> {
        let record = SocketRecord::new(RECORD.to_owned(), bytes::Bytes::new());
        to.send(MessageType::Lingering, origin, &[(self.socket, record)], &self.responses.to_string()).await
    }
}

impl OldProcesses {
    pub fn new(server: Server, status: Arc<Status>, generation: u64) -> Self {
        let state = Mutex::new(State::Followed { processes: Vec::new(), next_id: 0 });
        Self(Arc::new(Shared { server, status, generation, state, changed: Notify::new() }))
    }

    /// Follows the process whose channel is in `frame`, or passes it on. If there are too many, the oldest have to end.
    pub fn add(&self, frame: Frame) {
        let responses = responses_in(&frame);
        for (socket, _) in frame.sockets {
            let channel = LingerChannel { socket, responses };
            if let Err(error) = self.add_one(channel) {
                // Its end closes, so the old process closes its connections itself.
                warn!(%error, "could not read the channel of an old process; it closes its connections after their responses");
            }
        }
    }

    fn add_one(&self, channel: LingerChannel) -> io::Result<()> {
        match &mut *lock(&self.0.state) {
            State::Followed { processes, next_id } => {
                // If the frame of a linger channel was copied and not received, the same channel arrives again when that
                // frame is received.
                if processes.iter().any(|process| is_same(&process.channel.socket, &channel.socket)) {
                    return Ok(());
                }
                let reading = Channel::new(channel.socket.try_clone()?)?;
                let id = *next_id;
                *next_id += 1;
                let reader = task::spawn(self.clone().follow(id, reading)).abort_handle();
                processes.push(OldProcess { id, channel, reader });
                // Older processes than this one were asked to end when earlier ones were added.
                if let Some(oldest) = processes.len().checked_sub(MAX_OLD_PROCESSES + 1) {
                    info!(
                        "more than {MAX_OLD_PROCESSES} old processes still send responses: asked the oldest to end within its --drain-timeout"
                    );
                    self.stop_one(&processes[oldest]);
                }
                self.report(processes);
            }
            State::PassedOn(waiting) => waiting.push(channel),
        }
        self.0.changed.notify_waiters();
        Ok(())
    }

    /// Adopts the connections of an old process until it has exited.
    async fn follow(self, id: u64, channel: Channel) {
        let adopter = Adopter::new(self.0.server.clone());
        let on_other = |frame: Frame| match frame.message_type {
            MessageType::Lingering if frame.sockets.is_empty() => self.note(id, responses_in(&frame)),
            MessageType::Lingering => self.add(frame),
            other => debug!(?other, "unexpected frame from an old process"),
        };
        let is_followed = || matches!(&*lock(&self.0.state), State::Followed { .. });
        adopter.adopt_late(&channel, is_followed, on_other).await;
        if let State::Followed { processes, .. } = &mut *lock(&self.0.state) {
            processes.retain(|process| process.id != id);
            self.report(processes);
        }
        self.0.changed.notify_waiters();
    }

    fn note(&self, id: u64, responses: usize) {
        if let State::Followed { processes, .. } = &mut *lock(&self.0.state) {
            for process in processes.iter_mut().filter(|process| process.id == id) {
                process.channel.responses = responses;
            }
            self.report(processes);
        }
    }

    fn report(&self, processes: &[OldProcess]) {
        let responses = processes.iter().map(|process| process.channel.responses).sum();
        self.0.status.set_old(processes.len(), responses);
    }

    fn stop_one(&self, process: &OldProcess) {
        // An error means that it has exited. The channel cannot be full, because the old process reads it.
        let origin = Origin::now(self.0.generation);
        let (_, _) = send_frames::<OwnedFd>(&process.channel.socket, MessageType::Stop, origin, &[], "");
    }

    /// Tells all old processes to end within their drain limit.
    pub fn stop(&self) {
        if let State::Followed { processes, .. } = &*lock(&self.0.state) {
            for process in processes {
                self.stop_one(process);
            }
        }
    }

    /// Waits until no old process is left.
    pub async fn gone(&self) {
        let is_gone = |state: &State| match state {
            State::Followed { processes, .. } => processes.is_empty(),
            State::PassedOn(_) => true,
        };
        self.wait_until(|state| is_gone(state).then_some(())).await;
    }

    /// Stops following the old processes. From now on [`OldProcesses::next_to_pass`] returns them.
    pub fn pass_on(&self) {
        let mut state = lock(&self.0.state);
        if let State::Followed { processes, .. } = &mut *state {
            let passed = processes.drain(..).map(|OldProcess { channel, reader, .. }| {
                // A frame that it is reading at this moment is not lost: the drain waits for what is in it. A frame that it
                // has not begun to read stays in the channel.
                reader.abort();
                channel
            });
            *state = State::PassedOn(passed.collect());
        }
    }

    /// The next channel to pass on, if there is one.
    pub fn take_to_pass(&self) -> Option<LingerChannel> {
        next_to_pass(&mut lock(&self.0.state))
    }

    /// Waits for a channel to pass on to the successor.
    pub async fn next_to_pass(&self) -> LingerChannel {
        self.wait_until(next_to_pass).await
    }

    async fn wait_until<T>(&self, mut done: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            // Registered before `done` is called; otherwise a change between the call and the await would be missed.
            changed.as_mut().enable();
            if let Some(done) = done(&mut lock(&self.0.state)) {
                return done;
            }
            changed.await;
        }
    }
}

fn next_to_pass(state: &mut State) -> Option<LingerChannel> {
    match state {
        State::PassedOn(waiting) if !waiting.is_empty() => Some(waiting.remove(0)),
        _ => None,
    }
}

/// Whether two descriptors belong to the same socket.
fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    let inode = |socket| fstat(socket).map(|stat| (stat.st_dev, stat.st_ino));
    inode(one).is_ok_and(|one| inode(other) == Ok(one))
}

fn responses_in(frame: &Frame) -> usize {
    frame.text.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::Router;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::connection::tests::serve;
    use crate::handover::pair;
    use crate::registry::{Limits, Registry};

    #[tokio::test]
    async fn channel_that_arrives_twice_is_followed_once() {
        let server = serve(Router::new()).await.server;
        let limit = Duration::from_secs(60);
        let limits = Limits { head: limit, idle: limit, stall: limit, close: limit };
        let registry = Registry::new(limits, CancellationToken::new());
        let status = Arc::new(Status::new(registry, String::new()));
        let old = OldProcesses::new(server, status, 2);
        let (_writer, channel) = pair().expect("could not create a socket pair");
        let copy = channel.try_clone().expect("could not duplicate a socket");
        old.add_one(LingerChannel::new(channel, 1)).expect("could not follow a process");
        old.add_one(LingerChannel::new(copy, 1)).expect("could not follow a process");
        let State::Followed { processes, .. } = &*lock(&old.0.state) else {
            panic!("passed the channels on")
        };
        assert_eq!(processes.len(), 1);
    }
}
