//! Journal entries. The crate tracing-journald formats and sends them.
//!
//! That crate sends an entry on the thread on which the event happens, and blocks while journald does not read.
//! Therefore `Entries` records an event and its spans on that thread, and [`Journal`] replays them to the crate on a
//! thread that may wait.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Value, ValueSet};
use tracing::span::EnteredSpan;
use tracing::{Dispatch, Event, Span, Subscriber, dispatcher, error_span};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

use super::entry::{Entry, Recorded};

/// The socket of journald.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// journald sets the time of an entry when it receives it. An entry that has waited for longer than this has the field
/// `LOGGED_AT`.
const DELAY: Duration = Duration::from_secs(1);
/// The target of the span that adds the field `LOGGED_AT`.
const DELAYED: &str = "delayed";
/// The maximum number of values for which the crate tracing can make a `ValueSet`.
const MAX_FIELDS: usize = 32;

impl Entry {
    /// Dispatches the event, which happened at `at`, and its spans to the default subscriber.
    fn replay(&self, at: Instant) {
        let delay = at.elapsed();
        let mut entered: Vec<EnteredSpan> = Vec::with_capacity(1 + self.spans.len());
        if delay >= DELAY {
            // On a machine without a clock, whose time begins in 1970 at each boot, the result could be before 1970.
            let logged_at = SystemTime::now().checked_sub(delay).unwrap_or(UNIX_EPOCH).max(UNIX_EPOCH);
            let logged_at = humantime::format_rfc3339_micros(logged_at);
            // Only a span can add a field to an event that has no such field itself.
            entered.push(error_span!(target: DELAYED, "delayed", %logged_at).entered());
        }
        for span in &self.spans {
            entered.push(span.with_values(|values| Span::new(span.metadata, values)).entered());
        }
        self.event.with_values(|values| Event::dispatch(self.event.metadata, values));
        while let Some(innermost) = entered.pop() {
            drop(innermost);
        }
    }
}

impl Recorded {
    /// Calls `f` with the values. Only the first [`MAX_FIELDS`] are included; the message is the first field, so it
    /// always is.
    fn with_values<T>(&self, f: impl FnOnce(&ValueSet<'_>) -> T) -> T {
        let set = self.metadata.fields();
        let fields: Vec<Field> = set.iter().collect();
        let Some(first) = fields.first() else { return f(&set.value_set(&[])) };
        let mut values = [(first, None); MAX_FIELDS];
        let recorded =
            fields.iter().zip(&self.values).filter_map(|(field, value)| Some((field, value.as_ref()?)));
        for (place, (field, value)) in values.iter_mut().zip(recorded) {
            *place = (field, Some(&value.text as &dyn Value));
        }
        f(&set.value_set(&values))
    }
}

/// Writes entries to journald.
pub struct Journal {
    generation: u64,
    /// `None` before the first entry.
    replay: Option<Dispatch>,
}

impl Journal {
    /// The journal, for entries with the field `GENERATION`. Returns an error if no journald listens. Never waits.
    pub fn open(generation: u64) -> io::Result<Self> {
        UnixDatagram::unbound()?.connect(SOCKET)?;
        Ok(Self { generation, replay: None })
    }

    /// Writes an entry that was logged at `at`, and waits while journald does not read. An entry that journald refuses
    /// is lost without an error, because tracing-journald does not return it.
    pub fn write(&mut self, entry: &Entry, at: Instant) -> io::Result<()> {
        let replay = match self.replay.take() {
            Some(replay) => replay,
            // Not in `open`, because the creation of the layer sends an empty message to journald, and so may wait.
            None => Dispatch::new(replaying_to(layer(self.generation)?)),
        };
        dispatcher::with_default(self.replay.insert(replay), || entry.replay(at));
        Ok(())
    }
}

/// The layer of tracing-journald. Without a prefix, the fields in the journal have the names of the source in upper
/// case.
fn layer(generation: u64) -> io::Result<tracing_journald::Layer> {
    let layer = tracing_journald::layer()?;
    Ok(layer
        .with_field_prefix(None)
        .with_custom_fields([("GENERATION", generation.to_string())])
        .with_priority_mappings(PriorityMappings {
            info: Priority::Informational,
            debug: Priority::Debug,
            ..PriorityMappings::new()
        }))
}

/// A subscriber for events that are replayed to `layer`.
fn replaying_to<L: Layer<tracing_subscriber::Registry> + Send + Sync>(
    layer: L,
) -> impl Subscriber + Send + Sync + for<'a> LookupSpan<'a> {
    // Replayed events were filtered when they were recorded, and bypass this filter. The filter declares that this
    // subscriber has no interest in other events. Without it, tracing would no longer skip disabled events at the call
    // site on any thread, because one subscriber in the process might want them.
    let filter = Targets::new().with_target(DELAYED, LevelFilter::ERROR);
    tracing_subscriber::registry().with(layer).with(filter)
}

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Write};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;
    use tracing::field::{Empty, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{debug, info, info_span, trace, warn};
    use tracing_subscriber::layer::Context;

    use super::super::entry::entries_of;
    use super::*;

    /// A layer that sends each event as text, with its metadata, its values and the values of its spans.
    struct Describe(Sender<String>);

    #[derive(Default)]
    struct Description(String);

    impl Description {
        fn add(&mut self, field: &Field, value: &dyn Debug) {
            writeln!(self.0, "{field}={value:?}").expect("writing to a string does not fail");
        }
    }

    impl Visit for Description {
        fn record_str(&mut self, field: &Field, value: &str) {
            self.add(field, &format_args!("{value}"));
        }

        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            self.add(field, value);
        }
    }

    impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Describe {
        fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
            let mut described = Description(format!("{:?}\n", attributes.metadata()));
            attributes.record(&mut described);
            context.span(id).expect("the span exists").extensions_mut().insert(described);
        }

        fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
            let span = context.span(id).expect("the span exists");
            values.record(span.extensions_mut().get_mut::<Description>().expect("the span was described"));
        }

        fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
            let mut described = Description::default();
            for span in context.lookup_current().into_iter().flat_map(|span| span.scope().from_root()) {
                described.0 += &span.extensions().get::<Description>().expect("the span was described").0;
            }
            writeln!(described.0, "{:?}", event.metadata()).expect("writing to a string does not fail");
            event.record(&mut described);
            self.0.send(described.0).expect("the channel is open");
        }
    }

    fn described(subscriber: impl FnOnce(Describe) -> Dispatch, log: impl FnOnce()) -> Vec<String> {
        let (send, texts): (_, Receiver<String>) = channel();
        dispatcher::with_default(&subscriber(Describe(send)), log);
        texts.try_iter().collect()
    }

    fn direct(log: impl FnOnce()) -> Vec<String> {
        described(|describe| Dispatch::new(tracing_subscriber::registry().with(describe)), log)
    }

    fn replayed(entries: &[Entry], at: Instant) -> Vec<String> {
        let replay = || entries.iter().for_each(|entry| entry.replay(at));
        described(|describe| Dispatch::new(replaying_to(describe)), replay)
    }

    fn log_in_spans() {
        info!("outside");
        let outer = info_span!("request", id = 5, late = Empty, never = Empty);
        let _outer = outer.enter();
        debug!("before");
        outer.record("late", "yes");
        {
            let _inner = info_span!("step", _private.name = "x").entered();
            let _without_fields = info_span!("plain").entered();
            warn!(message_id = "abc", number = -3, text = ?"a\nb", none = Empty, "two\nlines {}", 1);
        }
        trace!(flag = true);
    }

    #[test]
    fn replayed_event_has_its_metadata_its_values_and_those_of_its_spans() {
        let entries = entries_of(log_in_spans);
        let texts = replayed(&entries, Instant::now());
        assert_eq!(texts, direct(log_in_spans));
        assert_eq!(texts.len(), 4);
        for value in
            ["id=5", "late=yes", "_private.name=x", "number=-3", "text=\"a\\nb\"", "message=two\nlines 1"]
        {
            assert!(texts[2].contains(&format!("\n{value}\n")), "{value}: {}", texts[2]);
        }
        assert!(!texts[1].contains("late="), "recorded later: {}", texts[1]);
    }

    #[test]
    fn value_that_is_recorded_again_replaces_the_first() {
        let entries = entries_of(|| {
            let span = info_span!("request", status = 100);
            span.record("status", 200);
            span.in_scope(|| info!("answered"));
        });
        let texts = replayed(&entries, Instant::now());
        assert!(texts[0].contains("status=200") && !texts[0].contains("status=100"), "{texts:?}");
    }

    #[test]
    fn delayed_entry_has_the_time_at_which_it_was_logged() {
        let entries = entries_of(log_in_spans);
        let at =
            Instant::now().checked_sub(Duration::from_secs(30)).expect("the machine has been up for longer");
        let texts = replayed(&entries, at);
        assert_eq!(texts.len(), 4);
        for (text, direct) in texts.iter().zip(direct(log_in_spans)) {
            let (delayed, rest) = text.split_once("\nlogged_at=").expect("the entry has a time");
            assert!(!delayed.contains('\n'), "it is not the outermost span: {text}");
            let (logged_at, rest) = rest.split_once('\n').expect("the event follows");
            let logged_at = humantime::parse_rfc3339(logged_at).expect("the time is valid");
            let ago = SystemTime::now().duration_since(logged_at).expect("the time is in the past");
            assert!(ago >= Duration::from_secs(29) && ago < Duration::from_secs(1000), "{ago:?}");
            assert_eq!(rest, direct);
        }
    }

    #[test]
    fn subscriber_for_replays_enables_no_other_events() {
        let (send, _texts) = channel();
        let subscriber = replaying_to(Describe(send));
        assert_eq!(subscriber.max_level_hint(), Some(LevelFilter::ERROR));
        for entry in entries_of(log_in_spans) {
            assert!(subscriber.register_callsite(entry.event.metadata).is_never());
        }
    }

    proptest! {
        #[test]
        fn any_value_is_replayed_unchanged_and_counted(value in ".*", number in any::<i64>()) {
            let log = || info_span!("request", value).in_scope(|| info!(value, number, "{value}"));
            let entries = entries_of(log);
            prop_assert_eq!(entries.len(), 1);
            prop_assert!(entries[0].size() > 3 * value.len());
            prop_assert_eq!(replayed(&entries, Instant::now()), direct(log));
        }
    }
}
