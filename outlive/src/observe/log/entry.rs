//! [`Entry`], an event and the spans in which it happened, with their values as text. The journal (`journal.rs`) and JSON
//! lines (`json.rs`) are written from it.

use std::fmt::Debug;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::{LookupSpan, Scope};

/// Records events and their spans as entries, each of which goes to `send`.
pub struct Entries<F> {
    send: F,
}

impl<F: Fn(Entry)> Entries<F> {
    pub fn new(send: F) -> Self {
        Self { send }
    }
}

impl<S, F> Layer<S> for Entries<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: Fn(Entry) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut recorded = Recorded::new(attributes.metadata());
        attributes.record(&mut recorded);
        span.extensions_mut().insert(Arc::new(recorded));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(recorded) = span.extensions_mut().get_mut::<Arc<Recorded>>() {
            // A copy, because entries in the queue must keep the values that the span had when they were logged.
            values.record(Arc::<Recorded>::make_mut(recorded));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut recorded = Recorded::new(event.metadata());
        event.record(&mut recorded);
        let scope = context.event_scope(event).into_iter().flat_map(Scope::from_root);
        let spans = scope.filter_map(|span| span.extensions().get::<Arc<Recorded>>().cloned()).collect();
        (self.send)(Entry { event: recorded, spans });
    }
}

/// An event and the spans in which it happened.
pub struct Entry {
    pub(super) event: Recorded,
    /// From outer to inner. Entries of the same span share its values.
    pub(super) spans: Vec<Arc<Recorded>>,
}

impl Entry {
    pub fn metadata(&self) -> &'static Metadata<'static> {
        self.event.metadata
    }

    /// The memory that it holds, in bytes. Values of spans that several entries share count for each of them.
    pub fn size(&self) -> usize {
        size_of::<Self>() + self.event.size() + self.spans.iter().map(|span| span.size()).sum::<usize>()
    }
}

/// A span or an event, with its values.
#[derive(Clone)]
pub(super) struct Recorded {
    pub(super) metadata: &'static Metadata<'static>,
    /// Indexed like the fields.
    pub(super) values: Vec<Option<Recording>>,
}

/// A value as the text that the journal shows.
#[derive(Clone)]
pub(super) struct Recording {
    pub(super) text: Box<str>,
    /// Whether the value was a bool or a finite number, whose text is a literal of JSON too.
    pub(super) is_literal: bool,
}

impl Recorded {
    fn new(metadata: &'static Metadata<'static>) -> Self {
        Self { metadata, values: vec![None; metadata.fields().len()] }
    }

    fn size(&self) -> usize {
        let texts = self.values.iter().flatten().map(|value| value.text.len()).sum::<usize>();
        size_of::<Self>() + self.values.capacity() * size_of::<Option<Recording>>() + texts
    }

    fn put(&mut self, field: &Field, text: impl Into<Box<str>>, is_literal: bool) {
        if let Some(value) = self.values.get_mut(field.index()) {
            *value = Some(Recording { text: text.into(), is_literal });
        }
    }
}

impl Visit for Recorded {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, format!("{value:?}"), value.is_finite());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.to_string(), true);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.to_string(), true);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.to_string(), true);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value, false);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}"), false);
    }
}

/// The entries of what `log` logs.
#[cfg(test)]
pub(super) fn entries_of(log: impl FnOnce()) -> Vec<Entry> {
    use tracing_subscriber::prelude::*;

    let (send, entries) = std::sync::mpsc::channel();
    let layer = Entries::new(move |entry| send.send(entry).expect("the channel is open"));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
    entries.try_iter().collect()
}
