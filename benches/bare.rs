//! The template that everybody writes: what the benchmark compares with.

use std::time::Duration;

use axum::Router;
use axum::routing::get;
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let router = Router::new()
        .route(
            "/",
            get(async || {
                let since = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
                format!("pid {}, generation {}, since {since}\n", std::process::id(), 1)
            }),
        )
        .route("/echo", axum::routing::post(async |body: String| body));
    let listener = match ListenFd::from_env().take_tcp_listener(0)? {
        Some(listener) => {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)?
        }
        None => TcpListener::bind("127.0.0.1:8081").await?,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    sd_notify::notify(&[NotifyState::Ready])?;
    let _ = Duration::ZERO;
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            terminate.recv().await;
        })
        .await?;
    Ok(())
}
