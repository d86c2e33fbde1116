//! Traces that the service sends to a collector of OpenTelemetry, which is in the test.

use std::collections::BTreeSet;
use std::ops::Range;

use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use rustix::process::Signal;
use testkit::client::{Connection, Target, get};
use testkit::process::terminate;
use testkit::service::{Service, command, run_to_end};
use testkit::threads::Threadless;
use testkit::{block_on, free_address, wait_until};
use tokio::net::TcpSocket;

use crate::app_binary;
use crate::collector::{Collector, hexadecimal};

/// The trace of all clients.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// The value of an attribute as text.
fn attribute(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == name);
    match found.and_then(|attribute| attribute.value.clone()?.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

/// The span of a client, by its number.
fn client_span(number: usize) -> String {
    format!("{:016x}", number + 1)
}

/// Sends requests, each as part of the span of its number.
async fn ask(service: &Service, path: &str, numbers: Range<usize>) {
    let mut connection = service.connect().await;
    for number in numbers {
        let parent = format!("00-{TRACE}-{}-01", client_span(number));
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\ntraceparent: {parent}\r\n\r\n");
        assert_eq!(connection.ask(request.as_bytes()).await.expect("the service answers").status, 200);
    }
}

fn start(collector: &Collector, more: &[(&str, &str)], folder: &std::path::Path) -> Service {
    let endpoint = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.as_str())];
    Service::start_with_variables(app_binary(), &[&endpoint, more].concat(), folder)
        .expect("the service starts")
}

#[test]
fn each_request_is_a_span_at_the_collector_over_restarts_and_reloads() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let collector = Collector::start(true);
    // Longer than the test, so that each span arrives because it is flushed at the end of its process.
    let mut service = start(&collector, &[("OTEL_BSP_SCHEDULE_DELAY", "3600000")], folder.path());
    let mut asked = 0;
    for _ in 0..3 {
        block_on(ask(&service, "/", asked..asked + 20));
        asked += 20;
        service.signal(Signal::TERM);
        // It waits for the exit of the process.
        service = service.restart(app_binary()).expect("the next process starts");
        assert_eq!(collector.spans().len(), asked, "the spans are sent before the exit");
    }
    block_on(ask(&service, "/", asked..asked + 20));
    service.signal(Signal::HUP);
    let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
    block_on(ask(&service, "/", asked + 20..asked + 40));
    asked += 40;
    assert!(service.process().wait().expect("the old process exits").success());
    terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
    wait_until("the spans of the successor", || collector.spans().len() >= asked);
    let spans = collector.spans();
    let parents: BTreeSet<_> = spans.iter().map(|(_, span)| hexadecimal(&span.parent_span_id)).collect();
    assert_eq!((spans.len(), parents), (asked, (0..asked).map(client_span).collect()));
    for (resource, span) in &spans {
        assert_eq!(attribute(resource, "service.name"), crate::NAME);
        assert_eq!((span.name.as_str(), span.kind()), ("GET /", SpanKind::Server));
        assert_eq!(hexadecimal(&span.trace_id), TRACE);
        for (name, value) in [
            ("http.request.method", "GET"),
            ("url.path", "/"),
            ("http.route", "/"),
            ("http.response.status_code", "200"),
            ("network.protocol.version", "1.1"),
            ("client.address", "127.0.0.1"),
        ] {
            assert_eq!(attribute(&span.attributes, name), value, "{name}");
        }
    }
}

#[test]
fn an_invalid_traceparent_begins_a_new_trace() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let collector = Collector::start(true);
    let service = start(&collector, &[], folder.path());
    block_on(async {
        let request = "GET /missing HTTP/1.1\r\nhost: test\r\ntraceparent: 00-nonsense\r\n\r\n";
        let mut connection = service.connect().await;
        assert_eq!(connection.ask(request.as_bytes()).await.expect("the service answers").status, 404);
    });
    service.signal(Signal::TERM);
    service.end().expect("the process ends");
    let spans = collector.spans();
    assert_eq!(spans.len(), 1);
    let span = &spans[0].1;
    assert_eq!((span.name.as_str(), span.parent_span_id.len()), ("GET", 0), "{span:?}");
    assert_eq!(attribute(&span.attributes, "http.response.status_code"), "404");
}

/// The collector accepts connections but never answers.
#[test]
fn a_collector_that_hangs_delays_no_request_and_an_exit_no_longer_than_the_limit() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let collector = Collector::start(false);
    let small = [("OTEL_BSP_MAX_QUEUE_SIZE", "10"), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "5")];
    // Longer than any wait of the test, so that only the limit of the service ends the wait.
    let service = start(
        &collector,
        &[&small[..], &[("OTEL_EXPORTER_OTLP_TIMEOUT", "3600000")]].concat(),
        folder.path(),
    );
    block_on(ask(&service, "/", 0..500));
    service.signal(Signal::TERM);
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success(), "{log}");
    assert!(log.contains("did not accept the last spans within 1s: they are lost"), "{log}");
}

#[test]
fn a_collector_that_refuses_connections_is_logged_with_the_cause() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    // The socket does not listen, so the kernel refuses connections to its port.
    let port = TcpSocket::new_v4().expect("a socket is made");
    port.bind("127.0.0.1:0".parse().expect("the address is valid")).expect("a port is bound");
    let endpoint = format!("http://{}", port.local_addr().expect("the socket has an address"));
    let variables =
        [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "3600000")];
    let service = Service::start_with_variables(app_binary(), &variables, folder.path());
    let service = service.expect("the service starts");
    block_on(ask(&service, "/", 0..3));
    service.signal(Signal::TERM);
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success(), "{log}");
    let warning = format!("could not send 3 spans to {endpoint}: Connection refused (os error 111)");
    assert!(log.contains(&warning), "{log}");
}

/// tokio looks up the name of the collector on another thread, and panics if the kernel refuses it.
#[test]
fn spans_are_sent_again_once_the_kernel_permits_threads() {
    let collector = Collector::start(true);
    let endpoint = collector.endpoint.replace("127.0.0.1", "localhost");
    let address = free_address();
    let mut command = command(app_binary(), &["--listen", &address.to_string()]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).env("OTEL_BSP_SCHEDULE_DELAY", "50");
    let service = Threadless::spawn(&mut command).expect("the service starts");
    // This sends no request, because the export of its span would leave an idle thread, which tokio would use for the next
    // lookup.
    wait_until("the service listens", || std::net::TcpStream::connect(address).is_ok());
    let ask = || {
        block_on(async {
            let mut connection = Connection::open(&Target::Tcp(address)).await.expect("the service listens");
            assert_eq!(connection.ask(&get("/")).await.expect("the service answers").status, 200);
        });
    };
    service.permit_threads(false).expect("the limit is set");
    ask();
    let lost = format!("could not send 1 spans to {endpoint}: the exporter panicked");
    service.wait_for_log(&lost).expect("the kernel refuses the thread");
    service.permit_threads(true).expect("the limit is set");
    ask();
    service.wait_for_log("accepts spans again").expect("the next span is sent");
    // The collector answers before it keeps the span.
    wait_until("the collector has the span", || collector.spans().len() == 1);
}

#[test]
fn an_invalid_variable_of_opentelemetry_is_refused_by_check_with_its_name() {
    let address = free_address().to_string();
    let mut check = command(app_binary(), &["check", "--listen", &address]);
    check.env("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector");
    let (code, _, log) = run_to_end(&mut check).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("invalid OTEL_EXPORTER_OTLP_ENDPOINT \"https://collector\": expected"), "{log}");
}
