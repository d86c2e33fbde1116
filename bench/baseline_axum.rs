//! The baseline of the comparison: `axum::serve` with graceful shutdown under a socket unit, as in common tutorials,
//! with the routes that the load needs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::{any, get, post};
use axum::serve::Listener;
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (pid, generation, since) = (std::process::id(), 1, std::time::SystemTime::now());
    // The text has the fields of `src/app.rs`, because the instructions of both servers are compared.
    let identity = async move || {
        let since = humantime::format_rfc3339_seconds(since);
        format!("pid {pid}, generation {generation}, since {since}\n")
    };
    let router = Router::new()
        .route("/", get(identity))
        .route("/echo", post(async |body: String| body))
        .route("/socket", any(async |upgrade: WebSocketUpgrade| socket(upgrade.read_buffer_size(4096))))
        .route("/socket/default", any(async |upgrade: WebSocketUpgrade| socket(upgrade)));
    let mut passed = ListenFd::from_env();
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let secure = names.split(':').position(|name| name == "https");
    let plain = (0..passed.len()).find(|index| Some(*index) != secure).unwrap_or(0);
    let listener = if let Some(listener) = passed.take_tcp_listener(plain)? {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)?
    } else {
        TcpListener::bind("127.0.0.1:8081").await?
    };
    let mut terminate = signal(SignalKind::terminate())?;
    // Both servers need the signal, so a channel passes it on.
    let (stop, stopped) = tokio::sync::watch::channel(());
    let terminated = move || {
        let mut stopped = stopped.clone();
        async move {
            let _ = stopped.changed().await;
        }
    };
    let secure = match secure.map(|index| passed.take_tcp_listener(index)).transpose()?.flatten() {
        Some(listener) => Some(axum::serve(Secure::on(listener)?, router.clone())),
        None => None,
    };
    sd_notify::notify(&[NotifyState::Ready])?;
    let plain = axum::serve(listener, router).with_graceful_shutdown(terminated());
    let secure = secure.map(|secure| secure.with_graceful_shutdown(terminated()));
    let terminate = async move {
        terminate.recv().await;
        let _ = stop.send(());
        Ok(())
    };
    let secure = async {
        match secure {
            Some(secure) => secure.await,
            None => Ok(()),
        }
    };
    tokio::try_join!(plain, secure, terminate)?;
    Ok(())
}

/// Sends each message back.
fn socket(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async |mut socket| {
        while let Some(Ok(message)) = socket.recv().await {
            let has_content = matches!(message, Message::Text(_) | Message::Binary(_));
            if has_content && socket.send(message).await.is_err() {
                return;
            }
        }
    })
}

/// A listener with TLS and HTTP/2. It performs one handshake at a time, so the comparison must not measure new TLS
/// connections under load.
struct Secure {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Secure {
    fn on(listener: std::net::TcpListener) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        let folder = PathBuf::from(std::env::var("CREDENTIALS_DIRECTORY")?);
        let chain = CertificateDer::pem_file_iter(folder.join("tls.crt"))?.collect::<Result<_, _>>()?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, PrivateKeyDer::from_pem_file(folder.join("tls.key"))?)?;
        config.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
        Ok(Self { listener: TcpListener::from_std(listener)?, acceptor: Arc::new(config).into() })
    }
}

impl Listener for Secure {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, peer) = Listener::accept(&mut self.listener).await;
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}
