//! Logging: events go to the journal with their fields if standard error is the journal, otherwise as readable lines to
//! standard error.
//!
//! The thread that logs never waits: an event goes into a queue, from which one thread writes. A journald that is
//! stopped or slow, a pipe that is not read, and a terminal that is stopped (Ctrl-S) therefore block that thread only,
//! and no request. Events that do not fit into the queue are dropped and counted.

mod journal;

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber, error, warn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use self::journal::{Entries, Entry, Journal};
use crate::observe::metrics;
use crate::os::exit::{FLUSH_LIMIT, Failure, Result};
use crate::os::outbox::{self, Bounds, Outbox};
use crate::os::systemd;

/// The maximum that is queued while journald or a terminal does not read: ten seconds at 1,000 messages a second. The
/// bound on bytes limits the memory of the service that a stall takes; an entry for a request has about 400 bytes.
const BOUNDS: Bounds = Bounds { messages: 10_000, bytes: 8 << 20 };

static OUTBOX: Outbox<Message> = Outbox::new(BOUNDS);

/// The message ids of the lifecycle events, by which `journalctl MESSAGE_ID=…` finds them (systemd.journal-fields(7)).
pub mod message_id {
    pub const STARTED: &str = "c4c3d2f8a4e54b6d9d7b7a3c1f0e5a11";
    pub const TOOK_OVER: &str = "1d9e4c7a2b6f4f30a5c8e0b7d3f16a55";
    pub const SUCCEEDED: &str = "7c2f8e5d3a9b4160b4d7e1f0c6a58b66";
    pub const NOT_RELOADED: &str = "f3b1a6c94d2e4857a0e9c8d5b7f41c77";
    pub const DRAINING: &str = "5f0f8c1e6b7a4a52b3a0d9c2e4f61b22";
    pub const STOPPED: &str = "a81d6e0b9c3f47d5886e2b4f7c0d9e33";
    pub const CUT_OFF: &str = "e27b5d4a0f1c4c8e9a6d3b8f5e2c7044";
}

/// A destination of events.
#[cfg_attr(not(feature = "log-control"), expect(dead_code, reason = "only log control selects it"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Target {
    Journal,
    Console,
    Null,
}

/// The log filter and target, for log control to change while the process runs.
#[cfg_attr(not(feature = "log-control"), expect(dead_code, reason = "only log control reads it"))]
pub struct Control {
    /// The name of the service.
    pub name: String,
    pub filter: reload::Handle<EnvFilter, Registry>,
    pub target: Arc<AtomicU8>,
    /// The target at the start. The journal can be selected later only if it was the target then, because it is opened
    /// at the start only.
    pub first: Target,
    /// The level and the target that log control has set; empty if it has not. The successor of a reload reads them.
    pub set: Mutex<(String, String)>,
}

impl Control {
    /// Adopts the log level and target that were set on the predecessor, with the feature `log-control`. Must be called
    /// before the predecessor exits, because they are read from it over D-Bus.
    #[cfg_attr(not(feature = "log-control"), expect(clippy::unused_async, reason = "nothing is to be done"))]
    pub async fn succeed(&self) {
        #[cfg(feature = "log-control")]
        crate::observe::log_control::succeed(self).await;
    }

    /// Offers the control on D-Bus (`systemctl service-log-level`), with the feature `log-control`.
    pub fn offer(self) {
        #[cfg(feature = "log-control")]
        tokio::spawn(crate::observe::log_control::serve(self));
        #[cfg(not(feature = "log-control"))]
        drop(self);
    }
}

/// A layer that receives events only while it is the target. It always receives spans, because it may become the target
/// during a span.
struct While<L> {
    is: Target,
    target: Arc<AtomicU8>,
    layer: L,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>, L: Layer<S>> Layer<S> for While<L> {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: layer::Context<'_, S>) {
        self.layer.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: layer::Context<'_, S>) {
        self.layer.on_record(id, values, context);
    }

    fn on_event(&self, event: &Event<'_>, context: layer::Context<'_, S>) {
        if self.target.load(Ordering::Relaxed) == self.is as u8 {
            self.layer.on_event(event, context);
        }
    }
}

/// Sets up logging and the panic hook. The filter is `filter`, else `RUST_LOG`, else `info`. Each journal entry has the
/// field `GENERATION`.
pub fn init(service: String, filter: Option<&str>, generation: u64) -> Result<Control> {
    let (name, text) = match (filter, std::env::var("RUST_LOG")) {
        (Some(text), _) => ("--log", text.to_owned()),
        (None, Ok(text)) => ("RUST_LOG", text),
        (None, Err(_)) => ("", "info".to_owned()),
    };
    let filter = EnvFilter::builder()
        .parse(&text)
        // Its error and the source of that say the same, and name no part of the text.
        .map_err(|_| {
            anyhow!(
                "invalid {name} {text:?}: expected a log filter such as info or info,request=debug, with the levels \
                 off, error, warn, info, debug and trace"
            )
        })
        .map_err(Failure::config)?;
    let (filter, handle) = reload::Layer::new(filter);
    // If journald cannot be reached, the service logs to standard error instead of failing.
    let is_journal = systemd::stderr_is_the_journal();
    let journal = is_journal.then(|| Journal::open(generation).ok()).flatten();
    let first = if journal.is_some() { Target::Journal } else { Target::Console };
    let target = Arc::new(AtomicU8::new(first as u8));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Lines)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .log_internal_errors(false); // they would go to standard error too, and panic if that is closed
    let lines = While { is: Target::Console, target: target.clone(), layer: lines };
    let entries = journal.is_some().then(|| {
        let layer = Entries::new(|entry| {
            let level = entry.level();
            push(Text::Entry(entry), level);
        });
        While { is: Target::Journal, target: target.clone(), layer }
    });
    start_writer(journal)
        .context("could not start the thread that writes the log")
        .map_err(Failure::unavailable)?;
    tracing_subscriber::registry().with(filter).with(entries).with(lines).init();
    std::panic::set_hook(Box::new(|panic| {
        error!(%panic, "panicked");
        // With `panic = "abort"` the process would end before the thread has written the message. Otherwise a panic
        // ends one request or task only, and its worker thread must not wait for the log.
        if cfg!(panic = "abort") {
            flush(FLUSH_LIMIT);
        }
    }));
    Ok(Control { name: service, filter: handle, target, first, set: Mutex::default() })
}

/// A message in the queue.
struct Message {
    at: Instant,
    level: Level,
    text: Text,
}

enum Text {
    /// An entry for the journal.
    Entry(Entry),
    /// A line for standard error.
    Line(Vec<u8>),
}

impl outbox::Message for Message {
    fn size(&self) -> usize {
        size_of::<Self>()
            + match &self.text {
                Text::Entry(entry) => entry.size(),
                Text::Line(line) => line.capacity(),
            }
    }

    fn is_detail(&self) -> bool {
        self.level > Level::INFO
    }
}

fn push(text: Text, level: Level) {
    if OUTBOX.push(Message { at: Instant::now(), level, text }).is_err() {
        metrics::LOG_DROPPED.inc();
    }
}

/// Makes writers that queue lines for standard error.
struct Lines;

impl MakeWriter<'_> for Lines {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line(Level::INFO)
    }

    fn make_writer_for(&self, event: &Metadata<'_>) -> Line {
        Line(*event.level())
    }
}

/// The writer of one event of this level. `tracing_subscriber` writes the whole line in one call.
struct Line(Level);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        push(Text::Line(line.to_vec()), self.0);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn start_writer(mut journal: Option<Journal>) -> io::Result<()> {
    let write = move |Message { at, text, .. }| {
        let written = match (&mut journal, text) {
            (Some(journal), Text::Entry(entry)) => journal.write(&entry, at),
            (None, Text::Entry(_)) => Err(io::ErrorKind::NotFound.into()),
            (_, Text::Line(line)) => write_to_stderr(&line),
        };
        written.inspect_err(|_| metrics::LOG_DROPPED.inc())
    };
    OUTBOX.start("log", write, |dropped| {
        warn!(
            dropped,
            "{dropped} log messages were dropped, because journald or the reader of standard error did not read them \
             in time; if this happens again, log less (--log)"
        );
    })
}

/// Writes a whole line, and waits as long as that takes, also if standard error is non-blocking. It does not use
/// `std::io::stderr`, whose lock would be held meanwhile and would block other threads that print there.
fn write_to_stderr(mut line: &[u8]) -> io::Result<()> {
    let stderr = rustix::stdio::stderr();
    while !line.is_empty() {
        match rustix::io::write(stderr, line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => line = &line[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Queues the last line of a process that fails, for standard error, also if logging was not set up. Call [`flush`]
/// afterwards to write it.
pub fn last_line(line: &str) {
    let line = format!("{line}\n").into_bytes();
    if start_writer(None).is_ok() {
        OUTBOX.push_last(Message { at: Instant::now(), level: Level::ERROR, text: Text::Line(line) });
    } else {
        // Without the thread, the caller writes and waits itself.
        let _ = write_to_stderr(&line);
    }
}

/// Waits until all logged messages are written, but no longer than `limit`.
pub fn flush(limit: Duration) {
    OUTBOX.flush(limit);
}
