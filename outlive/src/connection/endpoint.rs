//! What is served on a listener. `lifecycle/start.rs` creates one [`Endpoint`] for each listener, and each connection
//! refers to that of the listener that accepted it. A connection that another process handed over has the endpoint of
//! the listener with the same name; without such a listener it is refused (`handover::unpack`).

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
}

/// As the role of the listener's name, with the TLS configuration of an https listener.
pub enum EndpointKind {
    Http,
    Https(Tls),
    /// Its connections have a limit of their own.
    Admin,
    /// The application implements the protocol; the routes are not used.
    Socket(SocketHandler),
}

impl Endpoint {
    /// The TLS configuration, if its connections use TLS.
    pub fn tls(&self) -> Option<&Tls> {
        match &self.kind {
            EndpointKind::Https(tls) => Some(tls),
            EndpointKind::Http | EndpointKind::Admin | EndpointKind::Socket(_) => None,
        }
    }
}
