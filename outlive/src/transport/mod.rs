//! A connection as a value: its socket, its peer, the name of its listener, the bytes that were read but not consumed, and
//! the state of HTTP/2 and TLS without which another process could not continue it. Nothing here knows a request.

pub mod http2_state;
pub mod listener_name;
pub mod stream;
pub mod tickets;
pub mod tls_config;
pub mod tls_traffic;
pub mod traffic_secret;
