//! [`LateLayers`], the `tracing_subscriber` layers of the application, such as OpenTelemetry's.
//!
//! The subscriber is set up before the application starts, and cannot be replaced. The application makes its layers when
//! it starts, because they need its options and the runtime. The subscriber therefore contains a list, to which they are
//! added later.
//!
//! A layer may disable spans and events in two ways: by a filter of its own (`Filtered`), or in its own methods, which
//! disables them for all layers of the subscriber. [`Guard`] limits the second way to the layer itself, so that no layer
//! changes what the log shows.

use std::sync::{Arc, Mutex};

use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, callsite, dispatcher};
use tracing_subscriber::filter::{Filtered, LevelFilter};
use tracing_subscriber::layer::{Context, Filter, Layer};
use tracing_subscriber::registry::{LookupSpan, Registry};

use crate::os::lock::lock;
use crate::os::sys::{LayerList, Wrapper};

/// A layer of the application.
pub type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

type Shared = Arc<BoxedLayer>;

/// A layer of the application, with a [`Guard`] as its filter.
type Guarded = Filtered<Forward, Guard, Registry>;

/// All layers of the application, as one layer of the subscriber.
pub type AddedLayers = &'static LayerList<Guarded>;

/// How many filters the subscriber has besides those of the late layers: that of the log.
const OTHER_FILTERS: usize = 1;

pub struct LateLayers {
    layers: LayerList<Guarded>,
    /// Gives each filter its number. A filter takes its number from a registry, but the registry of the subscriber can no
    /// longer be changed. Both count from 0, so this one continues after the filters that the subscriber has.
    numbers: Mutex<Registry>,
}

impl LateLayers {
    pub fn new() -> Self {
        let mut numbers = Registry::default();
        for _ in 0..OTHER_FILTERS {
            numbers.register_filter();
        }
        Self { layers: LayerList::new(guarded(Box::new(LevelFilter::OFF))), numbers: Mutex::new(numbers) }
    }

    /// The layer for the subscriber. It must be the first one, and the subscriber may have [`OTHER_FILTERS`].
    pub fn layer(&'static self) -> AddedLayers {
        &self.layers
    }

    /// Adds a layer, which receives everything that happens from now on.
    ///
    /// # Panics
    /// If there are more than 64 filters; each layer needs one besides its own.
    pub fn add(&self, mut layer: BoxedLayer) {
        let mut numbers = lock(&self.numbers);
        layer.on_layer(&mut numbers);
        dispatcher::get_default(|dispatch| layer.on_register_dispatch(dispatch));
        let mut guarded = guarded(layer);
        guarded.on_layer(&mut numbers);
        drop(numbers);
        self.layers.push(guarded);
        // Otherwise spans and events that no other layer wants would still be skipped where they are made.
        callsite::rebuild_interest_cache();
    }
}

fn guarded(layer: BoxedLayer) -> Guarded {
    let layer = Shared::new(layer);
    Guarded::new(Forward(layer.clone()), Guard(layer))
}

/// Disables what the layer disables, for the layer only.
pub struct Guard(Shared);

impl Filter<Registry> for Guard {
    fn enabled(&self, metadata: &Metadata<'_>, context: &Context<'_, Registry>) -> bool {
        self.0.enabled(metadata, context.clone())
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        // A layer that has a filter always returns `always`, and its interest is counted apart. Without this, the many
        // spans and events of low levels would be skipped only after each filter has been asked.
        if self.0.max_level_hint().is_some_and(|most| metadata.level() > &most) {
            return Interest::never();
        }
        self.0.register_callsite(metadata)
    }

    fn event_enabled(&self, event: &Event<'_>, context: &Context<'_, Registry>) -> bool {
        self.0.event_enabled(event, context.clone())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        self.0.max_level_hint()
    }
}

/// The layer without the methods that [`Guard`] calls.
pub struct Forward(Shared);

impl Wrapper for Guarded {
    fn wrapped(&self) -> &(dyn Layer<Registry> + Send + Sync) {
        &**self.inner().0
    }
}

impl Layer<Registry> for Forward {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, Registry>) {
        self.0.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, Registry>) {
        self.0.on_record(id, values, context);
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, context: Context<'_, Registry>) {
        self.0.on_follows_from(id, follows, context);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, Registry>) {
        self.0.on_event(event, context);
    }

    fn on_enter(&self, id: &Id, context: Context<'_, Registry>) {
        self.0.on_enter(id, context);
    }

    fn on_exit(&self, id: &Id, context: Context<'_, Registry>) {
        self.0.on_exit(id, context);
    }

    fn on_close(&self, id: Id, context: Context<'_, Registry>) {
        self.0.on_close(id, context);
    }

    fn on_id_change(&self, old: &Id, new: &Id, context: Context<'_, Registry>) {
        self.0.on_id_change(old, new, context);
    }
}

#[cfg(test)]
mod tests {
    use tracing::subscriber::{DefaultGuard, set_default};
    use tracing::{Dispatch, Subscriber, debug, info, info_span, trace};
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::prelude::*;

    use super::super::entry::entries_of;
    use super::super::parse_filter;
    use super::*;

    /// A layer that records the names of spans and the messages of events that it receives.
    #[derive(Clone, Default)]
    struct Record(Arc<Mutex<Vec<String>>>);

    impl Record {
        fn take(&self) -> Vec<String> {
            std::mem::take(&mut *lock(&self.0))
        }
    }

    struct Message(String);

    impl tracing::field::Visit for Message {
        fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
            if field.name() == "message" {
                self.0 = format!("{value:?}");
            }
        }
    }

    impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Record {
        fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
            lock(&self.0).push(attributes.metadata().name().to_owned());
        }

        fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
            let mut message = Message(String::new());
            event.record(&mut message);
            let spans: Vec<_> =
                context.event_scope(event).into_iter().flatten().map(|span| span.name()).collect();
            lock(&self.0).push(format!("{} {}", message.0, spans.join(" ")).trim().to_owned());
        }
    }

    /// A log with `filter` whose layers can be added to, for this thread.
    fn set_up(filter: &str) -> (&'static LateLayers, Record, DefaultGuard) {
        let late: &LateLayers = Box::leak(Box::new(LateLayers::new()));
        let log = Record::default();
        let logged = log.clone().with_filter(parse_filter(filter).expect("the filter is valid"));
        let guard = set_default(tracing_subscriber::registry().with(late.layer()).with(logged));
        (late, log, guard)
    }

    fn log_all() {
        let _span = info_span!("outer").entered();
        info!("an info");
        debug!("a debug");
        trace!("a trace");
    }

    #[test]
    fn layer_receives_what_its_own_filter_enables_and_the_log_what_the_filter_of_the_log_enables() {
        for (of_log, logged) in [
            ("off", &[][..]),
            ("warn", &[]),
            ("info", &["outer", "an info outer"]),
            ("trace", &["outer", "an info outer", "a debug outer", "a trace outer"]),
        ] {
            let (late, log, _guard) = set_up(of_log);
            log_all();
            assert_eq!(log.take(), logged, "before a layer is added");
            let [all, some, none] = [(); 3].map(|()| Record::default());
            late.add(Box::new(all.clone()));
            late.add(Box::new(some.clone().with_filter(LevelFilter::DEBUG)));
            late.add(Box::new(none.clone().with_filter(LevelFilter::OFF)));
            for _ in 0..3 {
                log_all();
                assert_eq!(log.take(), logged, "{of_log}");
                assert_eq!(
                    all.take(),
                    ["outer", "an info outer", "a debug outer", "a trace outer"],
                    "{of_log}"
                );
                assert_eq!(some.take(), ["outer", "an info outer", "a debug outer"], "{of_log}");
                assert_eq!(none.take(), [""; 0], "{of_log}");
            }
        }
    }

    #[test]
    fn span_that_is_disabled_for_a_layer_is_not_in_the_scope_of_its_events() {
        let (late, log, _guard) = set_up("trace");
        let without = Record::default();
        late.add(Box::new(without.clone().with_filter(filter_fn(|metadata| !metadata.is_span()))));
        log_all();
        assert_eq!(without.take(), ["an info", "a debug", "a trace"]);
        assert_eq!(log.take()[1], "an info outer");
    }

    #[test]
    fn layer_that_disables_everything_without_a_filter_affects_no_other_layer() {
        /// Disables everything: by call site, or for each event.
        struct Veto(bool);

        impl<S: Subscriber> Layer<S> for Veto {
            fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
                if self.0 { Interest::never() } else { Interest::sometimes() }
            }

            fn enabled(&self, _: &Metadata<'_>, _: Context<'_, S>) -> bool {
                false
            }

            fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
                panic!("it was disabled");
            }
        }

        for by_callsite in [true, false] {
            let (late, log, _guard) = set_up("info");
            let other = Record::default();
            late.add(Box::new(Veto(by_callsite)));
            late.add(Box::new(other.clone().with_filter(LevelFilter::INFO)));
            for _ in 0..3 {
                log_all();
                assert_eq!(log.take(), ["outer", "an info outer"]);
                assert_eq!(other.take(), ["outer", "an info outer"]);
            }
        }
    }

    /// Otherwise each of the many disabled spans and events of the crates below would cost time.
    #[test]
    fn spans_and_events_that_no_layer_wants_are_skipped_where_they_are_made() {
        let (late, _log, _guard) = set_up("info");
        let entries = entries_of(|| debug!("unwanted"));
        let interest = || dispatcher::get_default(|log| log.register_callsite(entries[0].metadata()));
        assert!(interest().is_never());
        late.add(Box::new(Record::default().with_filter(LevelFilter::INFO)));
        assert!(interest().is_never());
        late.add(Box::new(Record::default().with_filter(LevelFilter::DEBUG)));
        assert!(!interest().is_never());
    }

    /// tracing-opentelemetry finds its layer, and the registry, in this way.
    #[test]
    fn parts_of_a_layer_are_found_by_their_type() {
        let (late, _log, _guard) = set_up("off");
        let layer = Record::default();
        late.add(Box::new(Record::default().with_filter(LevelFilter::INFO).boxed()));
        late.add(Box::new(LevelFilter::INFO.and_then(layer.clone()).boxed()));
        dispatcher::get_default(|dispatch: &Dispatch| {
            assert!(dispatch.downcast_ref::<Record>().is_some());
            assert!(dispatch.downcast_ref::<Registry>().is_some());
            assert!(dispatch.downcast_ref::<String>().is_none());
        });
    }
}
