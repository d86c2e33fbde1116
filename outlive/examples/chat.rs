//! A chat room whose WebSockets stay open when the service is restarted or reloaded. Each member keeps the name, which is
//! its first message, and the number of its lines. The recipe `docs/recipes/long-lived.md` explains it.
//!
//! `cargo run --example chat`, and then for each member `websocat ws://127.0.0.1:8080/chat`

use std::process::ExitCode;

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use outlive::Carry;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

/// How many lines a member may fall behind. One that falls further behind is disconnected.
const BACKLOG: usize = 1024;

/// A chat room.
#[derive(clap::Parser)]
#[command(name = "chat", version, about)]
struct Config {}

/// Sends a line to each member that this process serves.
type Room = broadcast::Sender<String>;

/// What the next process has to know of a member. A field that a later release adds needs a default.
#[derive(Default, Serialize, Deserialize)]
struct Member {
    name: String,
    #[serde(default)]
    lines: u64,
}

async fn join(upgrade: WebSocketUpgrade, carry: Carry<Member>, State(room): State<Room>) -> Response {
    let member = match carry.received() {
        Ok(member) => member.unwrap_or_default(),
        // After an error status the library closes the WebSocket with 1012. The client then has to join again.
        Err(error) => return (StatusCode::CONFLICT, error.to_string()).into_response(),
    };
    upgrade.on_upgrade(move |socket| converse(socket, carry, member, room))
}

async fn converse(mut socket: WebSocket, carry: Carry<Member>, mut member: Member, room: Room) {
    let mut lines = room.subscribe();
    loop {
        tokio::select! {
            // Poll `lines` first: lines still in this channel are lost when the handler returns.
            biased;
            line = lines.recv() => {
                let Ok(line) = line else { return };
                if socket.send(line.into()).await.is_err() {
                    return;
                }
            }
            () = carry.requested() => return carry.hand_on(&member),
            message = socket.recv() => match message {
                Some(Ok(Message::Text(name))) if member.name.is_empty() => member.name = name.to_string(),
                Some(Ok(Message::Text(text))) => {
                    member.lines += 1;
                    let _ = room.send(format!("{} {}: {text}", member.name, member.lines));
                }
                // axum answers Ping and Close itself.
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
        }
    }
}

async fn start(_: Config, _: &mut outlive::Setup) -> anyhow::Result<Router> {
    Ok(Router::new().route("/chat", any(join)).with_state(Room::new(BACKLOG)))
}

fn main() -> ExitCode {
    outlive::run(start)
}
