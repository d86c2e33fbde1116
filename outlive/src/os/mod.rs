//! The interfaces of the kernel and of the service manager: messages to systemd (`systemd.rs`), signals, limits,
//! memory pressure, credentials, exit codes. All `unsafe` code of the library is in `sys.rs`. Nothing here depends on connections.

pub mod credentials;
pub mod exit;
pub mod lock;
pub mod outbox;
pub mod pressure;
pub mod rlimit;
pub mod signals;
pub mod sys;
pub mod systemd;
pub mod task;
