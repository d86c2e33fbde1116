//! The parts of a connection that pass to another owner: its socket, its peer, the name of its listener, and the state
//! of HTTP/2 and TLS with which another process can continue it. `connection` puts them together and serves the
//! connection, and `handover` sends it to another process. Nothing here depends on requests.

pub mod certificate;
pub mod client_auth;
pub mod client_authority;
pub mod client_certificate;
pub mod client_tickets;
pub mod http2_state;
pub mod listener_name;
pub mod proxied_client;
pub mod proxy_header;
#[cfg(test)]
pub mod proxy_tests;
pub mod replay;
pub mod server_certificates;
pub mod stream;
pub mod stream_replay;
pub mod tickets;
pub mod tls_config;
pub mod tls_files;
pub mod tls_renewal;
#[cfg(test)]
pub mod tls_tests;
pub mod tls_traffic;
pub mod traffic_secret;
pub mod trusted_proxies;
