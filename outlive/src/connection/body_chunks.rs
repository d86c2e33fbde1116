//! Splits the body of an HTTP/2 response into chunks.
//!
//! hyper polls for the next chunk only when the client's windows have room for one. The request therefore stays in
//! flight until the client has taken all but the last chunk. A body given to h2 at once would end its request while h2
//! still held nearly all of it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame};

use crate::registry::{PendingFrame, RequestGuard};

/// The largest chunk, in bytes: every peer accepts a frame of this size (RFC 9113 section 4.2).
pub(super) const CHUNK: usize = 16 * 1024;

pub(super) struct ChunkedBody {
    /// Data of the handler that hyper has not polled for.
    buffer: Bytes,
    /// Starts the stall limit while the response waits for room in the client's windows.
    pending: Option<PendingFrame>,
}

impl ChunkedBody {
    pub(super) fn new(request: &RequestGuard) -> Self {
        Self { buffer: Bytes::new(), pending: Some(request.pending_frame()) }
    }

    /// The amount of data of the handler that hyper has not polled for, in bytes.
    pub(super) fn buffered(&self) -> u64 {
        self.buffer.len() as u64
    }

    /// The response does not wait for room in the client's windows.
    pub(super) fn rest(&mut self) {
        self.pending = None;
    }

    /// The next chunk of `body`, of at most `limit` bytes. hyper calls this once the client's windows have room for it.
    pub(super) fn poll_chunk(
        &mut self,
        body: Pin<&mut Body>,
        cx: &mut Context<'_>,
        request: &RequestGuard,
        limit: usize,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.pending = None;
        if self.buffer.is_empty() {
            match ready!(body.poll_frame(cx)).map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.buffer = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        self.pending = Some(request.pending_frame());
        let chunk = self.buffer.split_to(self.buffer.len().min(limit));
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }
}
