//! The template that everybody writes, with the routes of ours: what the benchmark compares with.

use axum::Router;
use axum::routing::{get, post};
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (pid, since) = (std::process::id(), std::time::SystemTime::now());
    let who = async move || {
        let since = humantime::format_rfc3339_seconds(since);
        format!("pid {pid}, generation 1, since {since}\n")
    };
    let router = Router::new().route("/", get(who)).route("/echo", post(async |body: String| body));
    let listener = if let Some(listener) = ListenFd::from_env().take_tcp_listener(0)? {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)?
    } else {
        TcpListener::bind("127.0.0.1:8081").await?
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let terminated = async move {
        terminate.recv().await;
    };
    sd_notify::notify(&[NotifyState::Ready])?;
    axum::serve(listener, router).with_graceful_shutdown(terminated).await?;
    Ok(())
}
