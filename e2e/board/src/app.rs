//! The configuration of the service, its start, its command and its routes: a board of notes that all visitors see as they
//! are written. A restart or reload closes neither the WebSockets through which they write nor the event streams through
//! which they read.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{any, get};
use futures_util::{Stream, StreamExt};
use outlive::{Carry, EventStream, Setup};
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::store::Store;

/// Maximum length of a name and of a note in characters.
const NAME_LIMIT: usize = 40;
const NOTE_LIMIT: usize = 500;
/// Maximum length of a message in bytes: a character has up to four.
const MESSAGE_LIMIT: usize = 4 * NOTE_LIMIT;
/// Scripts only from this service, so that a note cannot become a script even if the page had an error.
const SCRIPTS: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A board of notes, which visitors see as they are written.
#[derive(Debug, clap::Parser)]
#[command(version, about)]
pub struct Config {
    /// File of the SQLite database. By default notes.sqlite, in the StateDirectory= of the unit or without one in target/state.
    #[arg(long, value_name = "FILE")]
    database: Option<PathBuf>,
}

impl Config {
    fn store(self) -> anyhow::Result<Store> {
        let folder = || std::env::var_os("STATE_DIRECTORY").unwrap_or("target/state".into());
        Store::open(&self.database.unwrap_or_else(|| PathBuf::from(folder()).join("notes.sqlite")))
    }
}

pub async fn start(config: Config, setup: &mut Setup) -> anyhow::Result<Router> {
    let store = config.store()?;
    let (checked, watched) = (store.clone(), store.clone());
    setup.readiness_check("database", move || checked.clone().ping());
    setup.supervise("notes of another process", move |end| watched.clone().watch(end));
    Ok(routes(store))
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print all notes, each as a line of JSON.
    Export,
}

pub async fn execute(command: Command, config: Config, setup: &mut Setup) -> anyhow::Result<()> {
    let Command::Export = command;
    let (store, stop, mut last) = (config.store()?, setup.shutdown(), 0);
    loop {
        let notes = store.after(last).await?;
        let Some(newest) = notes.last() else { return Ok(()) };
        last = newest.id;
        for note in &notes {
            ensure!(!stop.is_cancelled(), "stopped before the note {}", note.id);
            writeln!(std::io::stdout(), "{}", serde_json::to_string(note)?)?;
        }
    }
}

fn routes(store: Store) -> Router {
    let script = [(header::CONTENT_TYPE, "text/javascript")];
    Router::new()
        .route(
            "/",
            get(async || ([(header::CONTENT_SECURITY_POLICY, SCRIPTS)], Html(include_str!("page.html")))),
        )
        .route("/page.js", get(async move || (script, include_str!("page.js"))))
        .route("/events", get(events))
        .route("/socket", any(write))
        .with_state(store)
}

/// Sends all notes and then each new one, as events. At a restart or reload the next process continues the response: it
/// calls this handler with the id of the last note (`Last-Event-ID`), as a browser that has to reconnect does.
async fn events(
    State(store): State<Store>,
    headers: HeaderMap,
) -> EventStream<impl Stream<Item = anyhow::Result<Event>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    EventStream(Sse::new(store.follow(last.unwrap_or(0)).map(|note| {
        let note = note.inspect_err(|error| error!("could not read notes: {error:#}"))?;
        let event = Event::default().id(note.id.to_string()).json_data(&note)?;
        // A browser that has to reconnect would otherwise wait for several seconds.
        Ok(event.retry(Duration::from_millis(100)))
    })))
}

/// What the next process has to know of a WebSocket. A field that a later release adds needs `#[serde(default)]`.
#[derive(Default, Serialize, Deserialize)]
struct Author {
    /// Empty until the first message, which is the name.
    name: String,
}

/// The answer to a message.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// The message was accepted as the name of the author.
    Name(String),
    /// The message is the note with this id.
    Note(i64),
    /// The message was refused for this reason.
    Error(String),
}

/// Takes the name of the author and then notes, and answers each message with an [`Answer`] in JSON. At a restart or reload
/// the next process continues the WebSocket with the name.
async fn write(upgrade: WebSocketUpgrade, carry: Carry<Author>, State(store): State<Store>) -> Response {
    let author = match carry.received() {
        Ok(author) => author.unwrap_or_default(),
        // After an error status the library closes the WebSocket with 1012, and the page connects again.
        Err(error) => return (StatusCode::CONFLICT, error.to_string()).into_response(),
    };
    let upgrade = upgrade.read_buffer_size(4096).max_message_size(MESSAGE_LIMIT);
    upgrade.on_upgrade(move |socket| converse(socket, carry, author, store))
}

async fn converse(mut socket: WebSocket, carry: Carry<Author>, mut author: Author, store: Store) {
    loop {
        let message = tokio::select! {
            message = socket.recv() => message,
            () = carry.requested() => return carry.hand_on(&author),
        };
        let answer = match message {
            Some(Ok(Message::Text(text))) => author.answer(text.as_str(), &store).await,
            // axum answers Ping and Close itself.
            Some(Ok(_)) => continue,
            Some(Err(_)) | None => return,
        };
        let answer = serde_json::to_string(&answer).expect("it has no map with other keys than text");
        if socket.send(answer.into()).await.is_err() {
            return;
        }
    }
}

impl Author {
    async fn answer(&mut self, text: &str, store: &Store) -> Answer {
        let limit = if self.name.is_empty() { NAME_LIMIT } else { NOTE_LIMIT };
        if text.trim().is_empty() || text.chars().count() > limit {
            return Answer::Error(format!("expected 1 to {limit} characters"));
        }
        if self.name.is_empty() {
            text.clone_into(&mut self.name);
            return Answer::Name(self.name.clone());
        }
        match store.add(self.name.clone(), text.to_owned()).await {
            Ok(id) => Answer::Note(id),
            Err(error) => {
                error!("could not add a note: {error:#}");
                Answer::Error("the note could not be stored".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use outlive::testing::with_context;
    use tower::ServiceExt;

    use super::*;

    fn store() -> (Store, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("the folder is created");
        (Store::open(&folder.path().join("notes.sqlite")).expect("the database opens"), folder)
    }

    async fn ask(store: &Store, path: &str, last: &str) -> Response {
        let request = Request::builder().uri(path).header("last-event-id", last).body(Body::empty());
        let request = request.expect("the request is valid");
        with_context(routes(store.clone())).oneshot(request).await.expect("routers are infallible")
    }

    #[tokio::test]
    async fn page_permits_and_needs_only_scripts_of_this_service() {
        let (store, _folder) = store();
        let page = ask(&store, "/", "").await;
        assert!(
            page.headers()[header::CONTENT_SECURITY_POLICY].as_bytes().starts_with(b"default-src 'self';")
        );
        let text = page.into_body().collect().await.expect("the body is complete").to_bytes();
        let text = String::from_utf8_lossy(&text);
        // One element, with a source and without a content.
        assert_eq!(text.matches("<script").count(), 1);
        assert!(text.contains("<script defer src=\"page.js\"></script>"), "{text}");
        assert!(!text.contains("style") && !text.contains("://"), "{text}");
        assert_eq!(ask(&store, "/page.js", "").await.headers()[header::CONTENT_TYPE], "text/javascript");
    }

    #[tokio::test]
    async fn events_begin_after_the_last_event_id() {
        let (store, _folder) = store();
        for text in ["one", "two", "<b>\nthree"] {
            store.add("ada".to_owned(), text.to_owned()).await.expect("the note is added");
        }
        for (last, first) in [("2", 3), ("", 1), ("two", 1)] {
            let response = ask(&store, "/events", last).await;
            let event =
                response.into_body().frame().await.expect("the stream is endless").expect("it has no error");
            let event = String::from_utf8_lossy(event.data_ref().expect("it is data")).into_owned();
            assert!(
                event.starts_with(&format!("id: {first}\ndata: {{\"id\":{first},\"author\":\"ada\",")),
                "{event}"
            );
        }
    }

    #[tokio::test]
    async fn first_message_is_the_name_and_messages_beyond_the_limits_are_refused() {
        let (store, _folder) = store();
        let mut author = Author::default();
        let json = |answer| serde_json::to_string(&answer).expect("it can be encoded");
        let refusal = |limit| format!("{{\"error\":\"expected 1 to {limit} characters\"}}");
        for (text, expected) in [
            (" ", refusal(NAME_LIMIT)),
            (&"ä".repeat(NAME_LIMIT + 1), refusal(NAME_LIMIT)),
            ("ada", "{\"name\":\"ada\"}".to_owned()),
            ("", refusal(NOTE_LIMIT)),
            (&"ä".repeat(NOTE_LIMIT + 1), refusal(NOTE_LIMIT)),
            (&"ä".repeat(NOTE_LIMIT), "{\"note\":1}".to_owned()),
        ] {
            assert_eq!(json(author.answer(text, &store).await), expected, "{text}");
        }
        assert_eq!(store.after(0).await.expect("it can be read").len(), 1);
    }
}
