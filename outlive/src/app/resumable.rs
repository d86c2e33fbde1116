//! [`Resumable`] and [`Resumed`], with which the handler of a gRPC stream lets it continue in the next process.

/// Lets the stream of a gRPC server continue when the process is restarted or reloaded. A handler adds it to the extensions
/// of its response; tonic passes these on.
///
/// When the connection has to move, the stream is dropped after a whole message. The next process calls the handler of the
/// same route with the same request, in whose extensions it finds [`Resumed`], and its messages follow in the same
/// response. The client receives neither trailers nor a second head. The handler decides which message comes first: one
/// that watches a value can leave out the value with which a new stream begins, if it has not changed.
///
/// ```
/// use futures_util::stream::{self, StreamExt};
/// use outlive::{Resumable, Resumed};
///
/// # use axum::http;
/// # struct Response<T>(T, http::Extensions);
/// # impl<T> Response<T> {
/// #     fn new(stream: T) -> Self { Self(stream, http::Extensions::new()) }
/// #     fn extensions_mut(&mut self) -> &mut http::Extensions { &mut self.1 }
/// # }
/// fn watch(request: &http::Extensions) -> Response<impl futures_util::Stream<Item = &'static str>> {
///     let is_new = request.get::<Resumed>().is_none();
///     let first = stream::iter(is_new.then_some("serving"));
///     let mut response = Response::new(first.chain(stream::pending()));
///     response.extensions_mut().insert(Resumable);
///     response
/// }
/// ```
///
/// # When the stream ends instead
///
/// The client receives the status UNAVAILABLE, after a whole message, if the stream cannot continue: with an encoded request
/// above 4 KiB, TLS 1.2, an older release as the next process or none, or a next process that does not answer the request
/// with a `Resumable` response of the same content type and encoding within ten seconds. A stream without this marker has to
/// end when the [`Shutdown`](crate::Shutdown) is cancelled; otherwise it is cut off at `--drain-timeout`.
#[derive(Clone, Copy, Debug)]
pub struct Resumable;

/// In the extensions of a request that began in another process, and is answered again because its response was
/// [`Resumable`] or an [`EventStream`](crate::EventStream).
#[derive(Clone, Copy, Debug)]
pub struct Resumed;
