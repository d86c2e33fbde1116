//! A collector of OpenTelemetry, which keeps the spans that it receives. The tests of e2e/links use it too.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

/// A span, with the attributes of its service before it.
pub type Received = (Vec<KeyValue>, Span);

/// A collector that answers each request, or none.
pub struct Collector {
    pub endpoint: String,
    spans: Arc<Mutex<Vec<Received>>>,
}

impl Collector {
    /// Listens in the network of this thread.
    pub fn start(answers: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the collector listens");
        let endpoint = format!("http://{}", listener.local_addr().expect("the listener has an address"));
        let spans = Arc::new(Mutex::new(Vec::new()));
        let received = spans.clone();
        std::thread::spawn(move || {
            let mut unanswered = Vec::new();
            for stream in listener.incoming() {
                let stream = stream.expect("a connection");
                if answers {
                    let spans = receive(stream);
                    received.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
                } else {
                    unanswered.push(stream);
                }
            }
        });
        Self { endpoint, spans }
    }

    pub fn spans(&self) -> Vec<Received> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Reads a request of the exporter and accepts it.
fn receive(mut stream: TcpStream) -> Vec<Received> {
    let mut reader = BufReader::new(stream.try_clone().expect("the stream can be duplicated"));
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut head).expect("the head can be read"), 0, "{head}");
    }
    let head = head.to_lowercase();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(head.contains("content-type: application/x-protobuf"), "{head}");
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
    let length: usize = length.and_then(|length| length.parse().ok()).expect("the body has a length");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body can be read");
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").expect("the service reads");
    let request = ExportTraceServiceRequest::decode(&*body).expect("the body is valid");
    let of_resource = request.resource_spans.into_iter().flat_map(|resource| {
        let attributes = resource.resource.unwrap_or_default().attributes;
        let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
        spans.map(move |span| (attributes.clone(), span)).collect::<Vec<_>>()
    });
    of_resource.collect()
}

pub fn hexadecimal(id: &[u8]) -> String {
    id.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}
