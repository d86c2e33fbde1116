//! Reload: the successor starts beside us, takes our listeners and connections over, and only then do we
//! go. If it cannot start, we stay.
//!
//! ```text
//! takeover (ExecReload=)         predecessor                      successor
//!   connects to the socket  ---->  (socket.rs)
//!   starts an intermediate process, which starts the successor with the connection as its standard input,
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
//!                                  Tickets ---->                    takes up TLS sessions of ours
//!                                  Connections ---->                goes on with each as it comes to rest
//!                                  Totals ---->                     goes on counting from there
//!                                  ends, at twice the drain limit at the latest
//! ```
//! On SIGHUP the predecessor starts the intermediate process itself. Until `Commit` each side may end, and
//! the predecessor goes on as if nothing had been. From `Commit` on nothing is cancelled: a successor that
//! does not say `Accepting` in time is killed before the predecessor goes on alone. Systemd takes a process
//! that is not its child for a stranger, to be killed without a drain: hence the intermediate process, and `Go`.

mod adopter;
mod incoming;
mod launch;
mod outgoing;
mod process_handle;
mod socket;

use std::time::Duration;

use crate::os::systemd::BARRIER_LIMIT;

/// For a successor to say Accepting once it has been told to commit.
const COMMIT_LIMIT: Duration = Duration::from_secs(5);

/// For all that comes after Ready: whoever waits for the outcome waits as much longer than `--takeover-timeout`,
/// so that it is the predecessor that decides.
const OUTCOME_LIMIT: Duration =
    COMMIT_LIMIT.saturating_add(BARRIER_LIMIT).saturating_add(Duration::from_secs(1));

/// Why a reload failed that was neither refused nor timed out.
pub const STOPPED_DURING_RELOAD: &str = "the service is being stopped";

/// Said with Ready by a successor that goes on with HTTP/2 and TLS connections; earlier releases say nothing. It also
/// shows in the binary of such a release.
const ADOPTS_HTTP2_AND_TLS: &str = "takes-http2-and-tls";

/// What the folder of the credentials is called where the listeners stand with their names.
const CREDENTIALS: &str = "credentials";

pub use adopter::Adopter;
pub use incoming::PredecessorLink;
pub use launch::{Program, Role, role, run_intermediate};
pub use outgoing::{Commitment, ReloadEvent, Reloads, Successor, SuccessorBundle, UNDER_WAY};
pub use socket::{TakeoverSocket, command, give_up};
