//! The library with WebSockets that take a `Carry`, and with the same ones without it. Each has the buffers of the
//! template (4 KiB) or the defaults of axum.

use std::process::ExitCode;

use axum::Router;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::any;

use outlive::{Carry, Setup, Shutdown};

/// WebSockets with and without Carry.
#[derive(clap::Parser)]
#[command(version, about)]
struct Config {}

async fn start(_: Config, _: &mut Setup) -> anyhow::Result<Router> {
    Ok(Router::new()
        .route(
            "/socket",
            any(async |upgrade: WebSocketUpgrade, carry| carried(upgrade.read_buffer_size(4096), carry)),
        )
        .route("/socket/default", any(async |upgrade, carry| carried(upgrade, carry)))
        .route(
            "/plain",
            any(async |upgrade: WebSocketUpgrade, shutdown| plain(upgrade.read_buffer_size(4096), shutdown)),
        )
        .route("/plain/default", any(async |upgrade, shutdown| plain(upgrade, shutdown))))
}

fn main() -> ExitCode {
    outlive::run(start)
}

/// As `/socket` of the template.
fn carried(upgrade: WebSocketUpgrade, carry: Carry<()>) -> Response {
    upgrade.on_upgrade(async move |mut socket| {
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                () = carry.requested() => return carry.hand_on(&()),
            };
            let Some(Ok(message)) = message else { return };
            if !echo(&mut socket, message).await {
                return;
            }
        }
    })
}

/// A handler without a `Carry` has to return when the process drains.
fn plain(upgrade: WebSocketUpgrade, Shutdown(shutdown): Shutdown) -> Response {
    upgrade.on_upgrade(async move |mut socket| {
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                () = shutdown.cancelled() => return,
            };
            let Some(Ok(message)) = message else { return };
            if !echo(&mut socket, message).await {
                return;
            }
        }
    })
}

/// Returns whether the WebSocket is still open.
async fn echo(socket: &mut WebSocket, message: Message) -> bool {
    let has_content = matches!(message, Message::Text(_) | Message::Binary(_));
    !has_content || socket.send(message).await.is_ok()
}
