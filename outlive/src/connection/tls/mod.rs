//! TLS on one connection: the handshake (`handshake.rs`), which rustls does, and the record layer of a connection that was
//! handed over (`record_layer.rs`), which continues with the traffic secrets that the former process exported.
//! `record_reader.rs` makes sure that a handover happens between two records.

pub mod handshake;
#[cfg(test)]
mod key_update_tests;
pub mod record_layer;
pub mod record_reader;
