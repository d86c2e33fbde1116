//! One request and its answer: in flight from its head until both bodies have ended.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::ConnectInfo;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::service::{HttpService, service_fn};
use hyper::{Method, Request, Response, StatusCode, Version};
use pin_project_lite::pin_project;
use tower::ServiceExt;

use super::Handler;
use crate::registry::{Entry, Stage};

/// `handler` as hyper calls it, with each request entered in the registry.
pub(super) fn service(
    handler: impl Handler,
    entry: Arc<Entry>,
) -> impl HttpService<Incoming, ResBody = AnswerBody, Error = Infallible, Future: Send> + Send {
    service_fn(move |request: Request<Incoming>| {
        let exchange = Exchange::begin(&entry, &request);
        let handler = handler.clone();
        async move {
            let method = request.method().clone();
            let version = request.version();
            let mut request = request.map(|body| exchange.request_body(body));
            request.extensions_mut().insert(ConnectInfo(exchange.entry.peer));
            let Ok(response) = handler.oneshot(request).await;
            Ok(exchange.answer(response, &method, version))
        }
    })
}

/// In the registry from its beginning until it is dropped.
struct Exchange {
    entry: Arc<Entry>,
    number: u64,
}

impl Exchange {
    fn begin(entry: &Arc<Entry>, request: &Request<Incoming>) -> Self {
        Self { entry: entry.clone(), number: entry.begin(request.uri()) }
    }

    fn request_body(&self, body: Incoming) -> Body {
        if body.is_end_stream() {
            return Body::empty();
        }
        self.entry.begin_reading();
        Body::new(RequestBody { body, _reading: Reading { entry: self.entry.clone() } })
    }

    fn answer(self, mut response: Response<Body>, method: &Method, version: Version) -> Response<AnswerBody> {
        let upgrades = response.status() == StatusCode::SWITCHING_PROTOCOLS
            || (method == Method::CONNECT && response.status().is_success());
        if version == Version::HTTP_2 {
            // Its connection is told by GOAWAY.
        } else if upgrades {
            self.entry.set_immovable();
            self.entry.set_stage(Stage::Upgraded);
        } else if self.entry.is_to_end() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response.map(|body| AnswerBody { body, _exchange: self })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.entry.answered(self.number);
    }
}

/// While it lives, a request's body is being read.
struct Reading {
    entry: Arc<Entry>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.entry.end_reading();
    }
}

pin_project! {
    struct RequestBody {
        #[pin]
        body: Incoming,
        _reading: Reading,
    }
}

pin_project! {
    /// The body of an answer; its request is in flight until this is dropped.
    pub(super) struct AnswerBody {
        #[pin]
        body: Body,
        _exchange: Exchange,
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
