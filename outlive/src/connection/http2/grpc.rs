//! The body of a gRPC call: the messages of a response, and the request that the next process answers again.
//!
//! A message has a prefix of five bytes: whether it is compressed, and its length (gRPC over HTTP/2,
//! "Length-Prefixed-Message").

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Context;

use bytes::Bytes;
use http_body::Frame;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};

use super::endless::BodyTurn;
use crate::connection::body_chunks::CHUNK;
use crate::os::lock::lock;
use crate::registry::UpgradeHandle;

/// The largest body of a request that is kept, in bytes.
const REQUEST_LIMIT: usize = 4096;
const PREFIX: usize = 5;

/// Where the messages of a response end.
#[derive(Default)]
pub struct Messages {
    prefix: [u8; PREFIX],
    /// How many bytes of the prefix have arrived.
    have: usize,
    /// How many bytes of the message are missing.
    left: usize,
    /// How many messages are complete.
    count: u64,
}

impl Messages {
    /// The messages after the first `count`.
    pub fn after(count: u64) -> Self {
        Self { count, ..Self::default() }
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn follow(&mut self, mut chunk: &[u8]) {
        while !chunk.is_empty() {
            if self.left > 0 {
                let length = self.left.min(chunk.len());
                self.left -= length;
                self.count += u64::from(self.left == 0);
                chunk = &chunk[length..];
                continue;
            }
            let length = (PREFIX - self.have).min(chunk.len());
            self.prefix[self.have..self.have + length].copy_from_slice(&chunk[..length]);
            self.have += length;
            chunk = &chunk[length..];
            if self.have == PREFIX {
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length) as usize;
                self.have = 0;
                self.count += u64::from(self.left == 0);
            }
        }
    }

    pub fn is_between_messages(&self) -> bool {
        self.have == 0 && self.left == 0
    }
}

/// The trailers of a call that the library ends: UNAVAILABLE. The client may call again.
pub fn unavailable() -> Frame<Bytes> {
    let status = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("14"));
    Frame::trailers(HeaderMap::from_iter([status]))
}

/// A response without end that cannot continue in another process, because the fields of its request could not be kept. It
/// ends after a whole message when the process drains. Its handler does not end it, because it could be continued otherwise.
pub struct EndingCall {
    messages: Messages,
    drains: Pin<Box<dyn Future<Output = ()> + Send>>,
    has_to_end: bool,
    is_over: bool,
}

impl EndingCall {
    pub fn new(handle: UpgradeHandle) -> Self {
        let drains = Box::pin(async move { handle.drains().await });
        Self { messages: Messages::default(), drains, has_to_end: false, is_over: false }
    }

    pub fn follow(&mut self, chunk: &[u8]) {
        self.messages.follow(chunk);
    }

    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> BodyTurn {
        self.has_to_end = self.has_to_end || self.drains.as_mut().poll(cx).is_ready();
        let must_end = self.has_to_end && self.messages.is_between_messages();
        if must_end { BodyTurn::Ends } else { BodyTurn::Polls(CHUNK) }
    }

    /// The last frame of the response. None after it.
    pub fn last_frame(&mut self) -> Option<Frame<Bytes>> {
        (!std::mem::replace(&mut self.is_over, true)).then(unavailable)
    }
}

/// The body of a request, which is kept while its handler reads it.
#[derive(Clone, Default)]
pub struct KeptBody(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    is_whole: bool,
    is_too_large: bool,
}

impl KeptBody {
    pub fn whole(body: &Bytes) -> Self {
        Self(Arc::new(Mutex::new(Kept { bytes: body.to_vec(), is_whole: true, is_too_large: false })))
    }

    pub fn add(&self, chunk: &[u8]) {
        let mut kept = lock(&self.0);
        kept.is_too_large |= kept.bytes.len() + chunk.len() > REQUEST_LIMIT;
        if kept.is_too_large {
            kept.bytes = Vec::new();
        } else {
            kept.bytes.extend_from_slice(chunk);
        }
    }

    pub fn end(&self) {
        lock(&self.0).is_whole = true;
    }

    /// None if it is too large, or the handler has not read it to its end.
    pub fn get(&self) -> Option<Bytes> {
        let kept = lock(&self.0);
        (kept.is_whole && !kept.is_too_large).then(|| Bytes::copy_from_slice(&kept.bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_of_messages_may_end_anywhere(
            lengths in prop::collection::vec(0..20_usize, 0..8), cut in 0..200_usize,
        ) {
            let mut bytes = Vec::new();
            let mut ends = vec![0];
            for length in lengths {
                bytes.extend([0, 0, 0, 0, u8::try_from(length).expect("it is small")]);
                bytes.extend(vec![7; length]);
                ends.push(bytes.len());
            }
            let cut = cut.min(bytes.len());
            let mut messages = Messages::default();
            messages.follow(&bytes[..cut]);
            prop_assert_eq!(messages.is_between_messages(), ends.contains(&cut));
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            prop_assert_eq!(messages.count(), whole as u64);
            for byte in &bytes[cut..] {
                messages.follow(&[*byte]);
            }
            prop_assert!(messages.is_between_messages());
        }
    }

    #[test]
    fn body_is_kept_when_it_is_whole_and_small() {
        let body = KeptBody::default();
        body.add(b"ab");
        assert_eq!(body.get(), None);
        body.add(b"c");
        body.end();
        assert_eq!(body.get().as_deref(), Some(&b"abc"[..]));
        body.add(&[0; REQUEST_LIMIT]);
        assert_eq!(body.get(), None);
    }
}
