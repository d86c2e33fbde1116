//! Logging: events go to the journal with their fields if standard error is the journal, otherwise as readable lines to
//! standard error. `--log-format` chooses another way, such as lines of JSON (`json.rs`).
//!
//! The application can add layers of its own (`late_layers.rs`), which receive the same events and spans, but not through
//! the filter of the log.
//!
//! The thread that logs never waits: an event goes into a queue, from which one thread writes. A journald that is
//! stopped or slow, a pipe that is not read, and a terminal that is stopped (Ctrl-S) therefore block that thread only,
//! and no request. Events that do not fit into the queue are dropped and counted.

mod entry;
mod filter;
mod journal;
mod json;
mod late_layers;

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Span, Subscriber, error, warn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer;
use tracing_subscriber::layer::Layered;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry, reload};

use self::entry::{Entries, Entry};
pub use self::filter::{LogFilter, parse as parse_filter};
use self::journal::Journal;
pub use self::late_layers::BoxedLayer;
use self::late_layers::{AddedLayers, LateLayers};
use crate::observe::metrics;
use crate::os::exit::{FLUSH_LIMIT, Failure, Result};
use crate::os::outbox::{self, Bounds, Outbox};
use crate::os::systemd;

/// The maximum that is queued while journald or a terminal does not read: ten seconds at 1,000 messages a second. The
/// bound on bytes limits the memory of the service that a stall takes; an entry for a request has about 400 bytes.
const BOUNDS: Bounds = Bounds { messages: 10_000, bytes: 8 << 20 };

static OUTBOX: Outbox<Message> = Outbox::new(BOUNDS);

/// The layers of the application.
static LAYERS: LazyLock<LateLayers> = LazyLock::new(LateLayers::new);

/// How the last line of the process is written; empty before [`init`].
static LAST_LINE: OnceLock<LastLine> = OnceLock::new();

/// The log target of the access log, which has a line for each request (`--access-log`).
pub const ACCESS: &str = "access";

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

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Entries with fields, sent to the socket of journald. They keep their fields if standard error is not the journal
    /// too.
    Journal,
    /// Lines to read, on standard error.
    Text,
    /// Lines of JSON, on standard error: one object for each message.
    Json,
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
    pub filter: reload::Handle<LogFilter, Layered<AddedLayers, Registry>>,
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
        if let Some(span) = context.span(id) {
            span.extensions_mut().replace(Shown);
        }
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

/// In the extensions of a span that the log shows. A span may exist without this, because a layer of the application
/// wants it.
struct Shown;

/// Whether the log shows the fields of `span` with its events.
pub fn shows(span: &Span) -> bool {
    let is_shown = span.with_subscriber(|(id, subscriber)| {
        let span = subscriber.downcast_ref::<Registry>()?.span(id)?;
        span.extensions().get::<Shown>().map(|_| ())
    });
    is_shown.flatten().is_some()
}

/// Adds a layer of the application.
pub fn add_layer(layer: BoxedLayer) {
    LAYERS.add(layer);
}

/// The journal, if `format` or the default needs it. `open` connects to journald.
fn journal<J>(
    format: Option<LogFormat>,
    stderr_is_the_journal: bool,
    open: impl FnOnce() -> io::Result<J>,
) -> Result<Option<J>> {
    match format {
        Some(LogFormat::Journal) => open().map(Some).map_err(|error| {
            let socket = journal::SOCKET;
            Failure::unavailable(anyhow!(
                "could not connect to journald at {socket} (--log-format journal): {error}; use --log-format text or \
                 json if no journald runs here"
            ))
        }),
        // If journald cannot be reached, the service logs to standard error instead of failing.
        None if stderr_is_the_journal => Ok(open().ok()),
        None | Some(LogFormat::Text | LogFormat::Json) => Ok(None),
    }
}

/// Sets up logging and the panic hook. The filter is `filter`, else `RUST_LOG`, else `info`. Each journal entry and each
/// line of JSON has `generation` as a field.
pub fn init(
    service: String,
    filter: Option<&str>,
    format: Option<LogFormat>,
    generation: u64,
) -> Result<Control> {
    let (name, text) = match (filter, std::env::var("RUST_LOG")) {
        (Some(text), _) => ("--log", text.to_owned()),
        (None, Ok(text)) => ("RUST_LOG", text),
        (None, Err(_)) => ("", "info".to_owned()),
    };
    let filter = parse_filter(&text)
        .ok_or_else(|| {
            let spans = if text.contains('[') && cfg!(not(feature = "span-filter")) {
                "; spans in brackets require the cargo feature span-filter"
            } else {
                ""
            };
            anyhow!(
                "invalid {name} {text:?}: expected a log filter such as info or info,request=debug, with the levels \
                 off, error, warn, info, debug and trace{spans}"
            )
        })
        .map_err(Failure::config)?;
    let (filter, handle) = reload::Layer::new(filter);
    let is_for_journald = systemd::stderr_is_the_journal();
    let journal = journal(format, is_for_journald, || Journal::open(generation))?;
    let first = if journal.is_some() { Target::Journal } else { Target::Console };
    let target = Arc::new(AtomicU8::new(first as u8));
    let json = (format == Some(LogFormat::Json)).then(|| json::Format {
        service: service.clone(),
        generation,
        is_for_journald,
    });
    let last_line = match (&json, &journal) {
        (Some(json), _) => LastLine::Json(json.clone()),
        (None, Some(_)) if !is_for_journald => LastLine::TextAndJournal,
        (None, _) => LastLine::Text,
    };
    let _ = LAST_LINE.set(last_line);
    let lines = json.is_none().then(|| {
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(Lines { is_for_journald })
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .log_internal_errors(false); // they would go to standard error too, and panic if that is closed
        While { is: Target::Console, target: target.clone(), layer }
    });
    let objects = json.map(|json| {
        let layer = Entries::new(move |entry| {
            let line = json.line(&entry, SystemTime::now());
            let level = *entry.metadata().level();
            push(Text::line(line.as_bytes(), level, is_for_journald), is_detail(entry.metadata()));
        });
        While { is: Target::Console, target: target.clone(), layer }
    });
    let entries = journal.is_some().then(|| {
        let layer = Entries::new(|entry| {
            let is_detail = is_detail(entry.metadata());
            push(Text::Entry(entry), is_detail);
        });
        While { is: Target::Journal, target: target.clone(), layer }
    });
    start_writer(journal)
        .context("could not start the thread that writes the log")
        .map_err(Failure::unavailable)?;
    let log = Layer::and_then(entries, objects).and_then(lines).with_filter(filter);
    tracing_subscriber::registry().with(LAYERS.layer()).with(log).init();
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
    is_detail: bool,
    text: Text,
}

enum Text {
    /// An entry for the journal.
    Entry(Entry),
    /// A line for standard error, or several ones if the message has line breaks.
    Line(Vec<u8>),
}

impl Text {
    /// For journald each line begins with its priority (sd-daemon(3)), which journald removes again, also from lines of
    /// JSON. Each line has it, because journald makes an entry of each line, and because the text of a message must not
    /// choose a priority.
    fn line(text: &[u8], level: Level, is_for_journald: bool) -> Self {
        if !is_for_journald {
            return Self::Line(text.to_vec());
        }
        let priority = match level {
            Level::ERROR => b"<3>",
            Level::WARN => b"<4>",
            Level::INFO => b"<6>",
            Level::DEBUG | Level::TRACE => b"<7>",
        };
        let lines = text.split_inclusive(|byte| *byte == b'\n').flat_map(|line| [priority.as_slice(), line]);
        Self::Line(lines.collect::<Vec<_>>().concat())
    }
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
        self.is_detail
    }
}

/// Whether messages of this kind leave a quarter of the queue to others. The access log does, because its many lines would
/// otherwise leave no room for errors.
fn is_detail(metadata: &Metadata<'_>) -> bool {
    *metadata.level() > Level::INFO || metadata.target() == ACCESS
}

fn push(text: Text, is_detail: bool) {
    if OUTBOX.push(Message { at: Instant::now(), is_detail, text }).is_err() {
        metrics::LOG_DROPPED.inc();
    }
}

/// Makes writers that queue lines for standard error.
struct Lines {
    is_for_journald: bool,
}

impl MakeWriter<'_> for Lines {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line { level: Level::INFO, is_detail: false, is_for_journald: self.is_for_journald }
    }

    fn make_writer_for(&self, event: &Metadata<'_>) -> Line {
        let (level, is_detail) = (*event.level(), is_detail(event));
        Line { level, is_detail, is_for_journald: self.is_for_journald }
    }
}

/// The writer of one event. `tracing_subscriber` writes the whole line in one call.
struct Line {
    level: Level,
    is_detail: bool,
    is_for_journald: bool,
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        push(Text::line(line, self.level, self.is_for_journald), self.is_detail);
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

/// How the reason of a failure is written.
enum LastLine {
    Text,
    /// Standard error gets a line too, because a person who starts the service in a shell sees no journal.
    TextAndJournal,
    Json(json::Format),
}

/// Queues the last line of a process of `service` that fails, for standard error, also if logging was not set up. Call
/// [`flush`] afterwards to write it.
pub fn last_line(service: &str, reason: &impl fmt::Display) {
    let line = match LAST_LINE.get() {
        Some(LastLine::Json(json)) => json.last_line(&reason.to_string(), SystemTime::now()),
        Some(LastLine::TextAndJournal) => {
            error!("{reason}");
            format!("{service}: {reason}\n")
        }
        Some(LastLine::Text) | None => format!("{service}: {reason}\n"),
    };
    let text = Text::line(line.as_bytes(), Level::ERROR, systemd::stderr_is_the_journal());
    if start_writer(None).is_ok() {
        OUTBOX.push_last(Message { at: Instant::now(), is_detail: false, text });
    } else if let Text::Line(line) = text {
        // Without the thread, the caller writes and waits itself.
        let _ = write_to_stderr(&line);
    }
}

/// Waits until all logged messages are written, but no longer than `limit`.
pub fn flush(limit: Duration) {
    OUTBOX.flush(limit);
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::filter::LevelFilter;

    use super::*;

    fn lines(text: &str, level: Level) -> String {
        match Text::line(text.as_bytes(), level, true) {
            Text::Line(line) => String::from_utf8(line).expect("the text is valid"),
            Text::Entry(_) => panic!("not a line"),
        }
    }

    #[test]
    fn each_line_for_journald_begins_with_the_priority_of_the_level() {
        assert_eq!(lines("hello\n", Level::WARN), "<4>hello\n");
        assert_eq!(lines("two\n<0>lines\n", Level::INFO), "<6>two\n<6><0>lines\n");
        let priorities = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
        assert_eq!(priorities.map(|level| lines("x", level)), ["<3>x", "<4>x", "<6>x", "<7>x", "<7>x"]);
    }

    #[test]
    fn span_is_shown_by_the_log_if_its_own_filter_enables_the_span() {
        for (of_log, is_shown) in [("info", false), ("info,request=debug", true)] {
            let target = Arc::new(AtomicU8::new(Target::Journal as u8));
            let log = While { is: Target::Console, target, layer: tracing_subscriber::fmt::layer() };
            let other =
                tracing_subscriber::fmt::layer().with_writer(io::sink).with_filter(LevelFilter::TRACE);
            let log = log.with_filter(parse_filter(of_log).expect("the filter is valid"));
            let _guard =
                tracing::subscriber::set_default(tracing_subscriber::registry().with(other).with(log));
            let span = tracing::debug_span!(target: "request", "request");
            assert!(!span.is_disabled());
            assert_eq!(shows(&span), is_shown, "{of_log}");
        }
        assert!(!shows(&Span::none()));
    }

    #[test]
    fn journal_is_used_by_default_if_standard_error_is_the_journal_and_can_be_required() {
        let chosen = |format, is_journal, is_reachable: bool| {
            let open = || is_reachable.then_some("journal").ok_or(io::Error::from(Errno::NOENT));
            journal(format, is_journal, open).map_err(|failure| failure.to_string())
        };
        for (is_journal, is_reachable) in [(false, false), (false, true), (true, false), (true, true)] {
            let by_default = (is_journal && is_reachable).then_some("journal");
            assert_eq!(chosen(None, is_journal, is_reachable), Ok(by_default));
            for format in [LogFormat::Text, LogFormat::Json] {
                assert_eq!(chosen(Some(format), is_journal, is_reachable), Ok(None));
            }
            let required = chosen(Some(LogFormat::Journal), is_journal, is_reachable);
            if is_reachable {
                assert_eq!(required, Ok(Some("journal")));
            } else {
                let error = required.expect_err("journald cannot be reached");
                assert_eq!(
                    error,
                    "could not connect to journald at /run/systemd/journal/socket (--log-format journal): No such file \
                     or directory (os error 2); use --log-format text or json if no journald runs here"
                );
            }
        }
    }
}
