#![doc = include_str!("front.md")]

mod admin;
mod adopter;
mod agreement;
#[cfg(feature = "jemalloc")]
mod allocator;
mod cli;
mod config;
mod connection;
mod context;
mod credentials;
mod drain;
mod exit;
#[cfg(all(test, feature = "fuzz-tests"))]
mod fuzz;
mod handover;
mod kind;
mod listeners;
mod lock;
mod log;
#[cfg(feature = "log-control")]
mod log_control;
mod metrics;
mod outbox;
mod process;
mod readiness;
mod registry;
mod requests;
mod rlimit;
mod run;
mod server;
mod service;
mod signals;
mod sleepers;
mod status;
mod stream;
mod sync;
mod sys;
mod systemd;
mod takeover;
mod tasks;
pub mod testing;
mod tickets;
mod tls;
mod tls_session;
mod traffic_secret;

pub use cli::command;
pub use context::Shutdown;
pub use process::Process;
pub use prometheus;
pub use run::run;
pub use service::{Service, TaskOptions};
pub use stream::Peer;
