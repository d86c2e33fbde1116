//! [`Within`], a request body with a limit on its size and on the time between two of its chunks.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Limited;
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tower::BoxError;

pin_project! {
    pub(super) struct Within<B> {
        #[pin]
        body: Limited<B>,
        pause: Duration,
        // Created at the first pending poll, because most chunks are ready at once and need no timer.
        late: Option<Pin<Box<Sleep>>>,
    }
}

impl<B> Within<B> {
    /// Limits `body`: it fails with `LengthLimitError` after `length` bytes, and with `TimedOut` if the next chunk
    /// takes longer than `pause`.
    pub(super) fn new(body: B, length: usize, pause: Duration) -> Self {
        Self { body: Limited::new(body, length), pause, late: None }
    }
}

impl<B: Body<Data = Bytes, Error: Into<BoxError>>> Body for Within<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        if let Poll::Ready(frame) = this.body.poll_frame(cx) {
            *this.late = None;
            return Poll::Ready(frame);
        }
        let late = this.late.get_or_insert_with(|| Box::pin(sleep(*this.pause)));
        std::task::ready!(late.as_mut().poll(cx));
        Poll::Ready(Some(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client sent no more of the request body in time (--request-timeout)",
        )
        .into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body as AxumBody;
    use futures_util::stream::{self, StreamExt};
    use http_body_util::BodyExt;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn chunk_that_takes_longer_than_the_pause_is_a_timeout() {
        let first = stream::once(async { Ok::<_, io::Error>("first") });
        let body = AxumBody::from_stream(first.chain(stream::pending()));
        let mut body = Within::new(body, 1024, Duration::from_millis(50));
        let chunk = body
            .frame()
            .await
            .expect("the body has a chunk")
            .expect("the first chunk is ready")
            .into_data()
            .expect("the frame has data");
        assert_eq!(chunk, "first");
        let end = timeout(Duration::from_secs(120), body.frame()).await.expect("the limit ends the wait");
        let error = end.expect("the body has not ended").expect_err("the chunk is late");
        assert_eq!(
            error.downcast::<io::Error>().expect("the error is a timeout").kind(),
            io::ErrorKind::TimedOut
        );
    }
}
