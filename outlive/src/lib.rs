#![doc = include_str!("front.md")]

mod app;
mod connection;
#[cfg(all(test, feature = "fuzz-tests"))]
mod fuzz;
mod handover;
mod lifecycle;
mod listeners;
mod observe;
mod os;
mod registry;
mod requests;
mod server;
mod takeover;
mod transport;

pub use app::carry::{Carry, UnreadableState};
pub use app::context::Shutdown;
pub use app::event_stream::EventStream;
pub use app::process::Process;
pub use app::resumable::{Resumable, Resumed};
pub use app::secret::Secret;
pub use app::setup::{Setup, TaskOptions};
pub use app::sockets::SocketStream;
pub use app::testing;
pub use lifecycle::{command, command_with, run, run_with};
#[cfg(feature = "otlp")]
pub use observe::traces::headers as trace_headers;
pub use prometheus;
pub use tracing_subscriber;
pub use transport::client_certificate::ClientCertificate;
pub use transport::stream::Peer;
