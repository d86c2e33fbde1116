//! What is served on a listener. `lifecycle/start.rs` creates one [`Endpoint`] for each listener, and each connection
//! refers to that of the listener that accepted it. A connection that another process handed over has the endpoint of
//! the listener with the same name; without such a listener it is refused (`handover::unpack`).

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use hyper::StatusCode;

use crate::app::sockets::SocketHandler;
use crate::requests::Routes;
use crate::transport::listener_name::Name;
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::tls_config::Tls;

/// A listener's name, and what is served on its connections.
pub struct Endpoint {
    pub name: Name,
    pub kind: EndpointKind,
    pub routes: Routes,
    /// The client of a new connection: awaited if its peers have to send a PROXY header.
    pub client: Option<ProxiedClient>,
    refusal: Refusal,
}

/// Whether an endpoint refuses its requests.
enum Refusal {
    /// It answers them. The other endpoint of the same listener does not; most processes need none.
    No(OnceLock<Arc<Endpoint>>),
    Yes,
}

/// The time limit for an answer that needs no time.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);

/// As the role of the listener's name, with the TLS configuration of an https listener.
#[derive(Clone)]
pub enum EndpointKind {
    Http,
    Https(Tls),
    /// Its connections have a limit of their own.
    Admin,
    /// The application implements the protocol; the routes are not used.
    Socket(SocketHandler),
}

impl Endpoint {
    pub fn new(name: Name, kind: EndpointKind, routes: Routes, client: Option<ProxiedClient>) -> Self {
        Self { name, kind, routes, client, refusal: Refusal::No(OnceLock::new()) }
    }

    /// An endpoint of the same listener for connections whose clients have no certificate that is accepted. It answers
    /// each request with 403.
    pub fn refusing(self: &Arc<Self>) -> Arc<Self> {
        let Refusal::No(refusing) = &self.refusal else { return self.clone() };
        let refuse = || {
            let answer = async || (StatusCode::FORBIDDEN, "the client certificate is not accepted\n");
            let routes = Routes::new(Router::new().fallback(answer), 0, REFUSAL_LIMIT);
            let Self { name, kind, client, .. } = &**self;
            let (name, kind) = (name.clone(), kind.clone());
            Arc::new(Self { name, kind, routes, client: *client, refusal: Refusal::Yes })
        };
        refusing.get_or_init(refuse).clone()
    }

    /// Whether it answers each request with 403, so that its connections have to close.
    pub fn is_refusing(&self) -> bool {
        matches!(self.refusal, Refusal::Yes)
    }

    /// The TLS configuration, if its connections use TLS.
    pub fn tls(&self) -> Option<&Tls> {
        match &self.kind {
            EndpointKind::Https(tls) => Some(tls),
            EndpointKind::Http | EndpointKind::Admin | EndpointKind::Socket(_) => None,
        }
    }
}
