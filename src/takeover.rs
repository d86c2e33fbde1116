//! Reload: the successor starts beside us, takes our listeners and connections over, and only then do we
//! go. If it cannot start, we stay.
//!
//! ```text
//! takeover (ExecReload=)         predecessor                      successor
//!   connects to the socket  ---->  (socket.rs)
//!   starts a middle process, which starts the successor with the connection as its standard input,
//!   and ends: the successor is a child of systemd now          (launch.rs)
//!   Go                      ---->
//!                                      <---- Hello                  is there
//!                                  RELOADING=1
//!                                  Listeners ---->                  builds its service on them, and on the credentials
//!                                      <---- Ready                  could serve
//!                                  Commit ---->                     accepts
//!                                      <---- Accepting
//!                                  stops accepting
//!                                  MAINPID= READY=1
//!                                  Main ---->                       is the main process: STATUS=, WATCHDOG=1
//!   exits as the successor says <------------------------------ ok
//!                                  Connections ---->                goes on with each as it comes to rest
//!                                  Totals ---->                     goes on counting from there
//!                                  ends, at the drain limit at the latest
//! ```
//! On SIGHUP the predecessor starts the middle process itself. Until `Commit` each side may end, and
//! the predecessor goes on as if nothing had been. Systemd takes a process that is not its child for a
//! stranger, to be killed without a drain: hence the middle process, and `Go`.

mod launch;
mod predecessor;
mod socket;
mod successor;

/// What the folder of the credentials is called where the listeners stand with their names.
const CREDENTIALS: &str = "credentials";

pub use launch::{Program, Role, be_the_middle, role};
pub use predecessor::{Ending, Estate, serve_until_end};
pub use socket::{TakeoverSocket, command, give_up};
pub use successor::Predecessor;
