//! Where events go: to the journal with their fields when standard error is the journal, else as
//! readable lines to standard error.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::Context;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber, error};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::layer;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::exit::{Failure, Result};
use crate::systemd;

/// `journalctl MESSAGE_ID=…` finds the events of a service's life by these.
pub mod message_id {
    pub const STARTED: &str = "c4c3d2f8a4e54b6d9d7b7a3c1f0e5a11";
    pub const TOOK_OVER: &str = "1d9e4c7a2b6f4f30a5c8e0b7d3f16a55";
    pub const SUCCEEDED: &str = "7c2f8e5d3a9b4160b4d7e1f0c6a58b66";
    pub const NOT_RELOADED: &str = "f3b1a6c94d2e4857a0e9c8d5b7f41c77";
    pub const DRAINING: &str = "5f0f8c1e6b7a4a52b3a0d9c2e4f61b22";
    pub const STOPPED: &str = "a81d6e0b9c3f47d5886e2b4f7c0d9e33";
    pub const CUT_OFF: &str = "e27b5d4a0f1c4c8e9a6d3b8f5e2c7044";
}

/// Where events go.
#[cfg_attr(not(feature = "log-control"), expect(dead_code, reason = "nobody asks for null"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Target {
    Journal,
    Console,
    Null,
}

/// What is logged, and where: for whoever changes it while the process runs.
#[cfg_attr(not(feature = "log-control"), expect(dead_code, reason = "nobody does"))]
pub struct Control {
    /// The service's.
    pub name: String,
    pub filter: reload::Handle<EnvFilter, Registry>,
    pub target: Arc<AtomicU8>,
    /// Where they went at first; the journal is open where it is that.
    pub first: Target,
    /// The level and the target that were set since; empty where none was.
    pub set: Mutex<(String, String)>,
}

impl Control {
    /// Goes on as the predecessor logs, with the feature `log-control`: before that goes.
    #[cfg_attr(not(feature = "log-control"), expect(clippy::unused_async, reason = "nothing is to be done"))]
    pub async fn succeed(&self) {
        #[cfg(feature = "log-control")]
        crate::log_control::succeed(self).await;
    }

    /// To `systemctl service-log-level`, with the feature `log-control`.
    pub fn offer(self) {
        #[cfg(feature = "log-control")]
        tokio::spawn(crate::log_control::serve(self));
        #[cfg(not(feature = "log-control"))]
        drop(self);
    }
}

/// A layer that has its events while it is the target.
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

/// Sets up logging with `filter`, else `RUST_LOG`, else `info`.
///
/// `generation` goes with each journal entry.
pub fn init(service: String, filter: Option<&str>, generation: u64) -> Result<Control> {
    let (name, text) = match (filter, std::env::var("RUST_LOG")) {
        (Some(text), _) => ("--log", text.to_owned()),
        (None, Ok(text)) => ("RUST_LOG", text),
        (None, Err(_)) => ("", "info".to_owned()),
    };
    let filter = EnvFilter::builder()
        .parse(&text)
        .with_context(|| format!("{name}={text} is not a log filter"))
        .map_err(Failure::config)?;
    let (filter, handle) = reload::Layer::new(filter);
    let journal = if systemd::stderr_is_the_journal() { journal(generation) } else { None };
    let first = if journal.is_some() { Target::Journal } else { Target::Console };
    let target = Arc::new(AtomicU8::new(first as u8));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .log_internal_errors(false); // they would go to standard error too, and panic if that is closed
    let lines = While { is: Target::Console, target: target.clone(), layer: lines };
    let journal = journal.map(|layer| While { is: Target::Journal, target: target.clone(), layer });
    tracing_subscriber::registry().with(filter).with(journal).with(lines).init();
    std::panic::set_hook(Box::new(|panic| error!(%panic, "panicked")));
    Ok(Control { name: service, filter: handle, target, first, set: Mutex::default() })
}

/// No journal to be reached is no reason to be silent: standard error goes there too.
fn journal(generation: u64) -> Option<tracing_journald::Layer> {
    let layer = tracing_journald::layer().ok()?;
    Some(
        layer
            .with_field_prefix(None)
            .with_custom_fields([("GENERATION", generation.to_string())])
            .with_priority_mappings(PriorityMappings {
                info: Priority::Informational,
                debug: Priority::Debug,
                ..PriorityMappings::new()
            }),
    )
}
