//! [`Resumable`] and [`Resumed`], with which the handler of a gRPC stream lets it continue in the next process.

/// Lets the stream of a gRPC server continue when the process is restarted or reloaded. A handler adds it to the extensions
/// of its response, also to those of a response of tonic.
///
/// When the connection has to move, the stream is dropped after a whole message. The next process calls the handler of the
/// same route with the same request, in whose extensions it finds [`Resumed`], and its messages follow in the same
/// response. The client receives neither trailers nor a second head.
///
/// The handler has to begin after the messages that the client has received, whose number is in `Resumed`. One that watches
/// a value can leave out the value with which a new stream begins, if it has not changed.
///
/// ```
/// use futures_util::stream::{self, Stream, StreamExt};
/// use outlive::{Resumable, Resumed};
///
/// # struct Response<T>(T, axum::http::Extensions);
/// # impl<T> Response<T> {
/// #     fn new(stream: T) -> Self { Self(stream, axum::http::Extensions::new()) }
/// #     fn extensions_mut(&mut self) -> &mut axum::http::Extensions { &mut self.1 }
/// # }
/// fn count(request: &axum::http::Extensions) -> Response<impl Stream<Item = u64>> {
///     let begin = request.get::<Resumed>().map_or(0, |resumed| resumed.messages);
///     let mut response = Response::new(stream::iter(begin..));
///     response.extensions_mut().insert(Resumable);
///     response
/// }
/// ```
///
/// # When the stream ends instead
///
/// The client receives the status UNAVAILABLE after a whole message if the stream cannot continue:
///
/// - The body of the request is above 4 KiB, its encoded header fields are above 8 KiB, or it has a `Content-Length`, which gRPC
///   clients do not send.
/// - The connection cannot be handed over, for example because it uses TLS and `--tls-handover` is `no`.
/// - There is no next process, or it is an older release.
/// - The next process does not answer the request within ten seconds with a `Resumable` response of the same content type and
///   message encoding.
///
/// The handler of a stream that is not `Resumable` has to end it when the [`Shutdown`](crate::Shutdown) is cancelled; otherwise
/// the stream is cut off at `--drain-timeout`, after a reload at `--linger-timeout`.
#[derive(Clone, Copy, Debug)]
pub struct Resumable;

/// In the extensions of a request that began in another process, and is answered again because its response was
/// [`Resumable`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Resumed {
    /// How many messages the client has received, from all processes that have answered this request.
    pub messages: u64,
}
