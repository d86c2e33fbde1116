//! TLS on one connection: rustls performs the handshake (`handshake.rs`). After the connection was parked or handed
//! over, the record layer (`record_layer.rs`) continues it with the traffic secrets that were exported from rustls.
//! `record_reader.rs` makes sure that the secrets are exported between two records.

#[cfg(test)]
mod client_certificate_tests;
pub mod handshake;
#[cfg(test)]
mod kept_keys_tests;
#[cfg(test)]
mod key_limit_tests;
#[cfg(test)]
mod key_update_tests;
pub mod record_layer;
pub mod record_reader;
