//! Traces for a collector of OpenTelemetry, with the feature `otlp`: a server span for each request, with the attributes
//! of the semantic conventions for HTTP, and the spans of `tracing` that handlers create inside it.
//!
//! No request waits for the collector. A span that has ended goes into a queue, from which one task sends batches. Spans
//! that do not fit into the queue, and those of a batch that the collector does not accept, are dropped and counted.

mod client;
mod settings;
mod traceparent;

use std::panic::AssertUnwindSafe;
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::FutureExt;
use hyper::{HeaderMap, StatusCode, Version};
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, ContextGuard, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter as _, SpanProcessor,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;

use self::client::Client;
use self::settings::Settings;
use crate::observe::{log, metrics};
use crate::os::exit::{Failure, Result};
use crate::transport::stream::Peer;

pub use self::traceparent::headers;

static TRACES: OnceLock<Traces> = OnceLock::new();

struct Traces {
    tracer: SdkTracer,
    queue: Queue,
    /// Keeps the tracer alive.
    _provider: SdkTracerProvider,
}

/// Checks the variables of OpenTelemetry.
pub fn check() -> Result<()> {
    Settings::from_env().map(drop)
}

/// Begins to send traces of `service`, if the variables of OpenTelemetry name a collector. Must be called in the runtime.
pub fn start(service: &str) -> Result<()> {
    let Some(settings) = Settings::from_env()? else { return Ok(()) };
    let mut resource = Resource::builder();
    if !settings.has_service_name {
        resource = resource.with_service_name(service.to_owned());
    }
    let pid = i64::from(std::process::id());
    let resource = resource.with_attribute(KeyValue::new("process.pid", pid)).build();
    let client = Client::default();
    let exporter = SpanExporter::builder().with_http().with_http_client(client.clone()).build();
    let mut exporter = exporter.map_err(|error| Failure::config(anyhow::Error::new(error)))?;
    exporter.set_resource(&resource);
    let (send, spans) = mpsc::channel(settings.queue);
    let queue = Queue(send);
    let provider =
        SdkTracerProvider::builder().with_span_processor(queue.clone()).with_resource(resource).build();
    let tracer = provider.tracer("outlive");
    log::add_layer(Box::new(
        tracing_opentelemetry::layer().with_tracer(tracer.clone()).with_filter(LevelFilter::INFO),
    ));
    tokio::spawn(export(spans, exporter, client, settings));
    let _ = TRACES.set(Traces { tracer, queue, _provider: provider });
    Ok(())
}

/// Waits until the collector has the spans that have ended, but no longer than `limit`.
pub async fn flush(limit: Duration) {
    let Some(traces) = TRACES.get() else { return };
    let (done, flushed) = oneshot::channel();
    let flush = async {
        if traces.queue.0.send(Message::Flush(done)).await.is_ok() {
            let _ = flushed.await;
        }
    };
    if timeout(limit, flush).await.is_err() {
        warn!(
            "the collector of OpenTelemetry did not accept the last spans within {}: they are lost",
            humantime::format_duration(limit)
        );
    }
}

enum Message {
    Span(Box<SpanData>),
    Flush(oneshot::Sender<()>),
}

/// Queues spans that have ended.
#[derive(Clone, Debug)]
struct Queue(mpsc::Sender<Message>);

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() && self.0.try_send(Message::Span(Box::new(span))).is_err() {
            metrics::SPANS_DROPPED.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Sends the spans in batches.
async fn export(
    mut messages: mpsc::Receiver<Message>,
    exporter: SpanExporter,
    client: Client,
    settings: Settings,
) {
    let mut clock = interval(settings.delay);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut batch, mut is_failing) = (Vec::new(), false);
    loop {
        let flushed = tokio::select! {
            message = messages.recv() => match message {
                Some(Message::Span(span)) => {
                    batch.push(*span);
                    if batch.len() < settings.batch {
                        continue;
                    }
                    None
                }
                Some(Message::Flush(flushed)) => Some(flushed),
                None => return,
            },
            _ = clock.tick() => None,
        };
        if !batch.is_empty() {
            let spans = batch.len();
            let sent = AssertUnwindSafe(exporter.export(std::mem::take(&mut batch))).catch_unwind();
            let reason = match timeout(settings.timeout, sent).await {
                Ok(Ok(Ok(()))) => None,
                Ok(Ok(Err(error))) => Some(client.take_failure().unwrap_or_else(|| error.to_string())),
                // tokio panics if it can start no thread that looks up the name of the collector. The next batch may succeed.
                Ok(Err(_)) => Some(
                    "the exporter panicked; if the kernel has refused a thread, raise TasksMax=".to_owned(),
                ),
                Err(_) => {
                    Some(format!("no response within {}", humantime::format_duration(settings.timeout)))
                }
            };
            match reason {
                Some(reason) => {
                    metrics::SPANS_DROPPED.inc_by(spans as u64);
                    if !is_failing {
                        warn!(spans, "could not send {spans} spans to {}: {reason}", settings.endpoint);
                    }
                    is_failing = true;
                }
                None if is_failing => {
                    info!("the collector of OpenTelemetry at {} accepts spans again", settings.endpoint);
                    is_failing = false;
                }
                None => {}
            }
        }
        if let Some(flushed) = flushed {
            let _ = flushed.send(());
        }
    }
}

/// The server span of a request, if traces are sent.
pub struct RequestTrace(Option<Context>);

impl RequestTrace {
    /// A request that is not traced.
    pub fn none() -> Self {
        Self(None)
    }

    /// Begins the span of a request. It continues the trace of the client, if the request has a valid `traceparent`.
    /// `method` is a label of [`metrics::method`].
    pub fn begin(
        headers: &HeaderMap,
        method: &'static str,
        path: &str,
        version: Version,
        peer: Option<Peer>,
    ) -> Self {
        let Some(Traces { tracer, .. }) = TRACES.get() else { return Self(None) };
        let parent = match traceparent::read(headers) {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        let mut attributes = vec![
            KeyValue::new("http.request.method", if method == "other" { "_OTHER" } else { method }),
            KeyValue::new("url.path", path.to_owned()),
            KeyValue::new("network.protocol.version", if version == Version::HTTP_2 { "2" } else { "1.1" }),
        ];
        if let Some(Peer::Tcp(address)) = peer {
            attributes.push(KeyValue::new("client.address", address.ip().to_string()));
            attributes.push(KeyValue::new("client.port", i64::from(address.port())));
        }
        let span = tracer.span_builder(name(method)).with_kind(SpanKind::Server).with_attributes(attributes);
        let span = tracer.build_with_context(span, &parent);
        Self(Some(parent.with_span(span)))
    }

    /// Makes the span the current one of this thread, until the guard is dropped.
    pub fn enter(&self) -> Option<ContextGuard> {
        self.0.clone().map(Context::attach)
    }

    /// Ends the span, because the response has begun.
    pub fn answered(&mut self, method: &'static str, route: Option<&'static str>, status: StatusCode) {
        let Some(context) = self.0.take() else { return };
        let span = context.span();
        if let Some(route) = route {
            span.update_name(format!("{} {route}", name(method)));
            span.set_attribute(KeyValue::new("http.route", route));
        }
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
        if status.is_server_error() {
            span.set_attribute(KeyValue::new("error.type", status.as_str().to_owned()));
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

/// The method in the name of a span. The semantic conventions replace an unknown one by `HTTP`.
fn name(method: &'static str) -> &'static str {
    if method == "other" { "HTTP" } else { method }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::{SpanId, TraceId};
    use tracing::{debug_span, info_span};
    use tracing_subscriber::prelude::*;

    use super::*;
    use crate::os::lock::lock;

    #[tokio::test]
    async fn spans_that_do_not_fit_into_the_queue_are_dropped_and_counted() {
        let (send, mut spans) = mpsc::channel(2);
        let provider = SdkTracerProvider::builder().with_span_processor(Queue(send)).build();
        let tracer = provider.tracer("test");
        let before = metrics::SPANS_DROPPED.get();
        for _ in 0..5 {
            drop(tracer.start("span"));
        }
        assert_eq!(metrics::SPANS_DROPPED.get() - before, 3);
        let mut queued = 0;
        while let Ok(Message::Span(_)) = spans.try_recv() {
            queued += 1;
        }
        assert_eq!(queued, 2);
    }

    /// A processor that keeps the spans.
    #[derive(Clone, Debug, Default)]
    struct Keep(Arc<Mutex<Vec<SpanData>>>);

    impl SpanProcessor for Keep {
        fn on_start(&self, _: &mut Span, _: &Context) {}

        fn on_end(&self, span: SpanData) {
            lock(&self.0).push(span);
        }

        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }

    #[test]
    fn span_of_a_handler_is_a_child_of_the_span_of_its_request_and_outgoing_requests_continue_it() {
        let kept = Keep::default();
        let provider = SdkTracerProvider::builder().with_span_processor(kept.clone()).build();
        let tracer = provider.tracer("test");
        let layer = tracing_opentelemetry::layer().with_tracer(tracer.clone());
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::sink);
        let subscriber = tracing_subscriber::registry().with(log).with(layer.with_filter(LevelFilter::INFO));
        let _log = tracing::subscriber::set_default(subscriber);
        let mut trace = RequestTrace(Some(Context::new().with_span(tracer.start("request"))));
        {
            let _traced = trace.enter();
            // The library enters this span too, and the filter of the layer excludes it.
            let _request = debug_span!(target: "request", "request").entered();
            let _step = info_span!("step").entered();
            assert!(headers().contains_key("traceparent"));
        }
        trace.answered("other", Some("/users/{id}"), StatusCode::BAD_GATEWAY);
        let spans = lock(&kept.0);
        let [step, request] = &spans[..] else { panic!("{spans:?}") };
        assert_eq!((&*step.name, &*request.name), ("step", "HTTP /users/{id}"));
        assert_eq!(request.parent_span_id, SpanId::INVALID);
        assert_ne!(request.span_context.trace_id(), TraceId::INVALID);
        assert_eq!(step.parent_span_id, request.span_context.span_id());
        assert_eq!(request.status, Status::error(""));
        assert!(request.attributes.contains(&KeyValue::new("error.type", "502")));
        drop(spans);
        trace.answered("GET", None, StatusCode::OK);
        assert_eq!(lock(&kept.0).len(), 2, "a span ends once");
    }
}
