//! A service with a layer of its own for `tracing_subscriber`. The layer writes each request to a file; a layer such as that of
//! OpenTelemetry would send it to a collector. `tests/examples.rs` restarts and reloads the service.

use std::fmt::{Debug, Write as _};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use outlive::tracing_subscriber::filter::Targets;
use outlive::tracing_subscriber::layer::{Context, Layer};
use outlive::tracing_subscriber::registry::LookupSpan;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Subscriber, info};

/// Records its requests.
#[derive(clap::Parser)]
#[command(name = "traced", version, about)]
struct Config {
    /// File to which a line is added for each request.
    #[arg(long, value_name = "FILE")]
    spans: PathBuf,
}

/// Collects a line for each request. As the exporters of OpenTelemetry do, it keeps the lines until they are flushed.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<String>>);

impl Spans {
    /// Adds the lines to the file.
    fn flush(&self, path: &PathBuf) -> anyhow::Result<()> {
        let lines = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let file = std::fs::File::options().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(lines.as_bytes()))
            .with_context(|| format!("could not write {}", path.display()))
    }
}

/// The fields of a span, as `name=value`.
struct Fields(String);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = write!(self.0, " {field}={value}");
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, " {field}={value:?}");
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields(attributes.metadata().name().to_owned());
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        if let Some(span) = context.span(&id)
            && let Some(Fields(fields)) = span.extensions().get()
        {
            let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = writeln!(lines, "{fields}");
        }
    }
}

async fn start(config: Config, setup: &mut outlive::Setup) -> anyhow::Result<Router> {
    let spans = Spans::default();
    setup.tracing_layer(spans.clone().with_filter(Targets::new().with_target("request", Level::DEBUG)));
    setup.on_exit("flush the spans", async move {
        tokio::task::spawn_blocking(move || spans.flush(&config.spans)).await?
    });
    info!("started");
    Ok(Router::new().route("/users/{id}", get(async || StatusCode::CREATED)))
}

fn main() -> ExitCode {
    outlive::run(start)
}
