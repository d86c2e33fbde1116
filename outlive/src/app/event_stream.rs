//! [`EventStream`], a response whose events continue in the next process.

use axum::BoxError;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response, Sse};
use futures_util::Stream;

/// Keeps an event stream open when the process is restarted or reloaded. A handler that honours `Last-Event-ID` returns
/// it in the place of [`Sse`].
///
/// When the connection has to move, the stream is dropped after a whole event. The next process calls the handler of the
/// same route with the same request, whose `Last-Event-ID` is now the id of the last event that was sent, and its events
/// follow in the same response. The client receives no second head, and no event is lost or repeated if the handler begins
/// after `Last-Event-ID`.
/// The stream does not have to end at the [`Shutdown`](crate::Shutdown).
///
/// The handler has to begin after the event that `Last-Event-ID` names, in another process too. So it takes the events
/// from a place that both processes can read, such as a database: a channel is not handed over. Middleware must neither
/// compress nor change the body, because the library finds the ends and the ids of the events in it. A response with a
/// `Content-Encoding` ends when the drain begins, perhaps within an event. If middleware removes the empty lines that end
/// events, the drain waits for the response, and cuts it off at `--drain-timeout`, after a reload at
/// `--linger-timeout`.
///
/// ```
/// use std::convert::Infallible;
///
/// use axum::http::HeaderMap;
/// use axum::response::IntoResponse;
/// use axum::response::sse::{Event, Sse};
/// use futures_util::stream;
/// use outlive::EventStream;
///
/// async fn count(headers: HeaderMap) -> impl IntoResponse {
///     let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
///     let event = async |number: u64| {
///         tokio::time::sleep(std::time::Duration::from_secs(1)).await;
///         let event = Event::default().id(number.to_string()).data("tick");
///         Some((Ok::<_, Infallible>(event), number + 1))
///     };
///     EventStream(Sse::new(stream::unfold(last.map_or(0, |last| last + 1), event)))
/// }
/// # let _: axum::Router = axum::Router::new().route("/events", axum::routing::get(count));
/// ```
///
/// # When the response ends instead
///
/// The response ends after a whole event, and the client has to reconnect, if it cannot continue:
///
/// - The request has no `Accept: text/event-stream`, which browsers send (with HTTP/2 this type has to be the first one), is
///   not a GET request, has a body, or uses HTTP/1.0. Or the status of the response is not 200.
/// - The connection cannot be handed over, for example because it uses TLS and `--tls-handover` is `no`.
/// - The last event that was sent has data and no id, or an id above 4 KB.
/// - There is no next process that can adopt the connection: an older release, or no file descriptor store.
/// - The next process answers the request with another status or content type, with a content encoding, not with an
///   `EventStream`, or not within ten seconds.
///
/// `systemctl stop` closes the connection after a whole event, but without the end of the response, because the process
/// stores it as for a restart, and systemd then empties the store. A crash cuts the response off.
///
/// Set `retry` ([`Event::retry`]) in the first event, so that clients that have to reconnect do so at once; browsers wait
/// for several seconds otherwise.
#[derive(Clone, Debug)]
pub struct EventStream<S>(pub Sse<S>);

/// Marks a response as an event stream that can be continued.
#[derive(Clone, Copy)]
pub struct IsEventStream;

impl<S, E> IntoResponse for EventStream<S>
where
    S: Stream<Item = Result<Event, E>> + Send + 'static,
    E: Into<BoxError>,
{
    fn into_response(self) -> Response {
        let mut response = self.0.into_response();
        response.extensions_mut().insert(IsEventStream);
        response
    }
}
