//! [`Client`], which sends a batch of spans to the collector over HTTP/1.1. Each batch has a connection of its own, because
//! seconds lie between two batches.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use opentelemetry_http::{HttpClient, HttpError};
use tokio::net::TcpStream;

use crate::os::lock::lock;

/// The maximum size of the collector's response, which only says what it has rejected.
const RESPONSE_LIMIT: usize = 64 << 10;
/// The port of an address without one.
const DEFAULT_PORT: u16 = 80;

/// Clones share the failure.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// The error of the last exchange with the collector. The exporter reports only "network error".
    failure: Arc<Mutex<Option<String>>>,
}

impl Client {
    /// Removes and returns the error of the last exchange with the collector. None if a whole response has arrived.
    pub fn take_failure(&self) -> Option<String> {
        lock(&self.failure).take()
    }
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let sent = send(request).await;
            *lock(&self.failure) = sent.as_ref().err().map(ToString::to_string);
            sent
        })
    }
}

async fn send(mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let uri = request.uri().clone();
    let host = uri.host().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    request.headers_mut().insert(HOST, HeaderValue::from_str(authority)?);
    if let Some(path) = uri.path_and_query() {
        *request.uri_mut() = Uri::from(path.clone());
    }
    let address = (host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(DEFAULT_PORT));
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async move {
        let (head, body) = sender.send_request(request.map(Full::new)).await?.into_parts();
        let body = Limited::new(body, RESPONSE_LIMIT).collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    };
    // Both in this future, so that nothing is left of them if it is dropped at a time limit.
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        response = &mut exchange => response,
        ended = connection => {
            ended?;
            exchange.await
        }
    }
}
