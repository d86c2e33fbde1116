//! The public interface for applications: an application registers its tasks, checks and hooks on `Setup`, and claims its
//! sockets there; its handlers take `Process` and `Shutdown` as arguments; its unit tests use `testing`. Options of the
//! type `Secret` are never shown. `tasks.rs` and `readiness.rs` run what was registered. The other public items are `run`
//! and `command` (`lifecycle`) and `Peer` (`transport/stream.rs`).

pub mod carry;
pub mod context;
pub mod event_stream;
pub mod process;
pub mod readiness;
pub mod resumable;
pub mod secret;
pub mod setup;
pub mod sockets;
pub mod tasks;
pub mod testing;
