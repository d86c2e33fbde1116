//! The way of an HTTP/2 answer's body into its connection, which asks for a chunk once its peer has room for
//! one. In chunks, so that the request is in flight until the peer has taken all but the last.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame};

use crate::registry::{Entry, PendingFrame};

/// The largest chunk, in bytes: what peers take in a frame (RFC 9113 section 4.2).
pub(super) const CHUNK: usize = 16 * 1024;

pub(super) struct ChunkedBody {
    /// What the handler has given, and the connection has not asked for.
    buffer: Bytes,
    pending: Option<PendingFrame>,
}

impl ChunkedBody {
    pub(super) fn new(entry: &Arc<Entry>) -> Self {
        Self { buffer: Bytes::new(), pending: Some(PendingFrame::new(entry)) }
    }

    /// How much the handler has given that the connection has not asked for, in bytes.
    pub(super) fn buffered(&self) -> u64 {
        self.buffer.len() as u64
    }

    /// The next chunk of `body`: there is room for it.
    pub(super) fn poll_chunk(
        &mut self,
        body: Pin<&mut Body>,
        cx: &mut Context<'_>,
        entry: &Arc<Entry>,
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
        self.pending = Some(PendingFrame::new(entry));
        let chunk = self.buffer.split_to(self.buffer.len().min(CHUNK));
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }
}
