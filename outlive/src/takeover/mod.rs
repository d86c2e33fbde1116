//! A reload: the successor starts beside the predecessor and takes over its listeners and connections, and then the
//! predecessor exits. If the successor cannot start, the predecessor keeps serving.
//!
//! - `socket.rs`: the takeover socket, and the command `takeover` that connects to it
//! - `launch.rs`: starts the intermediate process and the successor, and reports the result
//! - `outgoing.rs`: the side of the predecessor, [`Reloads`] and [`PreparedSuccessor`](outgoing::PreparedSuccessor)
//! - `incoming.rs`: the side of the successor, [`PredecessorLink`] and [`Committed`](incoming::Committed)
//! - `adopter.rs`: adopts connections, at a restart too
//! - `old_processes.rs`: the old processes that still send responses
//!
//! The messages are frames of the handover channel (`handover/frame.rs`):
//!
//! ```text
//! takeover (ExecReload=)         predecessor                      successor
//!   connects to the socket  ---->  (socket.rs)
//!   starts an intermediate process, which starts the successor with the connection as its standard input,
//!   and exits, so that the successor is a child of systemd     (launch.rs)
//!   Go                      ---->
//!                                      <---- Hello
//!                                  RELOADING=1
//!                                  Listeners ---->                  starts with the listeners and the credentials
//!                                      <---- Ready                  can serve
//!                                  Commit ---->                     accepts connections
//!                                      <---- Accepting
//!                                  stops accepting
//!                                  MAINPID= READY=1
//!                                  Main ---->                       is the main process: STATUS=, WATCHDOG=1
//!   exits, with the result      <------------------------------ ok
//!                                  Tickets ---->                    resumes TLS sessions
//!                                  Connections ---->                adopts each connection that became quiescent
//!                                  Lingering ---->                  follows it, if it still sends responses
//!                                  Totals ---->                     continues the counters
//!                                  closes the channel, at the latest after twice --drain-timeout, and exits unless
//!                                  it still sends responses
//! ```
//!
//! On SIGHUP the predecessor starts the intermediate process itself. Until `Commit` each process may exit or cancel,
//! and the predecessor keeps serving. From `Commit` on nothing is cancelled, because the successor may serve already:
//! one that does not answer `Accepting` in time is killed before the predecessor continues alone.
//!
//! The successor must be a child of systemd before it becomes the main process; otherwise systemd would kill it at the
//! next stop without a drain. This is the reason for the intermediate process, and for `Go`.

mod adopter;
mod incoming;
mod launch;
mod old_processes;
mod outgoing;
mod process_handle;
mod socket;

use std::time::Duration;

use crate::os::systemd::BARRIER_LIMIT;

/// The error of a reload for which the kernel refuses a thread.
const NO_THREAD: &str = "could not start a thread for the reload; raise TasksMax= or LimitNPROC=";

/// How long the predecessor waits for `Accepting` after it has sent `Commit`.
const COMMIT_LIMIT: Duration = Duration::from_secs(5);

/// The budget for everything after `Ready`. The processes that wait for the result of a reload wait this much longer
/// than `--takeover-timeout`, so that the predecessor decides first; otherwise a reload could be reported as failed and
/// still succeed.
const OUTCOME_LIMIT: Duration =
    COMMIT_LIMIT.saturating_add(BARRIER_LIMIT).saturating_add(Duration::from_secs(1));

/// The reason why PID 1 of a PID namespace cannot reload: the kernel ends all other processes of the namespace with it, so
/// also the successor (pid_namespaces(7)).
pub const PID_1: &str = "PID 1 of a container or of a unit with PrivatePIDs=yes cannot reload; start a new container or restart the service";

/// The reason of a reload that failed because the service is being stopped at the same time.
pub const STOPPED_DURING_RELOAD: &str = "the service is being stopped";

/// The text of `Ready` from a successor that adopts HTTP/2 and TLS connections; earlier releases send no text. At a
/// restart the next process cannot be asked, so this text is searched for in its binary ([`Program::adopts`]). It must
/// not change, because releases would no longer recognize each other.
const ADOPTS_HTTP2_AND_TLS: &str = "takes-http2-and-tls";
/// The text of `Accepting` from a successor that adopts upgraded connections too; earlier releases send no text. As
/// [`ADOPTS_HTTP2_AND_TLS`], it is searched for in a binary, and must not change.
const ADOPTS_UPGRADES: &str = "takes-upgraded-connections";
/// The text of `Commit` from a predecessor that hands open HTTP/2 streams over, and of `Accepting` as the answer to it
/// from a successor that adopts them. A predecessor before these releases sends no text, and expects the exact text
/// above. Earlier releases search for it in a binary, so it must not change.
const ADOPTS_STREAMS: &str = "takes-http2-event-streams";
/// The name of a socket without a meaning in `Commit`, from a predecessor that hands over connections with client certificates
/// and HTTP/2 connections with header tables, and the text of `Accepting` as the answer to it from a successor that adopts
/// them. Releases before these expect the exact texts above, but ignore sockets in `Commit`. As the others, it is
/// searched for in a binary, and must not change.
const ADOPTS_TABLES_AND_CERTIFICATES: &str = "takes-header-tables-and-client-certificates";
/// The same for TLS 1.2 connections: the name of a second socket in `Commit`, and the text of `Accepting`.
const ADOPTS_TLS12: &str = "takes-tls-1.2-connections";

/// The name of the standard output of the predecessor among the sockets of `Commit`. Earlier releases ignore it.
const STDOUT: &str = "stdout";

/// The name of the credentials directory among the names of the listeners in the message `Listeners`.
const CREDENTIALS: &str = "credentials";

pub use adopter::Adopter;
pub use incoming::PredecessorLink;
pub use launch::{Program, Role, role, run_intermediate};
pub use old_processes::{LingerChannel, OldProcesses};
pub use outgoing::{Commitment, ReloadEvent, Reloads, Successor, SuccessorBundle, UNDER_WAY};
pub use socket::{TakeoverSocket, command, give_up};
