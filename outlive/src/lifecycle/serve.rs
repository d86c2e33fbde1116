//! The main loop of a process that serves: [`Serving::wait_for_stop`]. While the process serves, this is the only place
//! that receives signals, the end of background tasks, and the events of a reload.

use std::pin::pin;
use std::sync::Arc;

use tracing::{error, info};

use crate::app::setup::Hooks;
use crate::app::tasks::Running;
use crate::lifecycle::config::Config;
use crate::listeners::SocketFiles;
use crate::observe::log::message_id;
use crate::observe::status::Status;
use crate::os::signals::{SignalRequest, Signals};
use crate::os::systemd;
use crate::server::Server;
use crate::takeover::{
    Commitment, OldProcesses, PID_1, ReloadEvent, Reloads, STOPPED_DURING_RELOAD, Successor, SuccessorBundle,
    TakeoverSocket, UNDER_WAY,
};

/// A process that serves. [`Serving::stop`](crate::lifecycle::stop) consumes it.
pub struct Serving {
    pub(super) config: Config,
    pub(super) generation: u64,
    pub(super) signals: Signals,
    pub(super) server: Server,
    pub(super) socket_files: SocketFiles,
    pub(super) bundle: SuccessorBundle,
    pub(super) socket: Option<TakeoverSocket>,
    pub(super) status: Arc<Status>,
    pub(super) old: OldProcesses,
    pub(super) tasks: Running,
    pub(super) hooks: Hooks,
}

/// Why a process stops serving.
pub enum StopReason {
    /// SIGTERM or SIGINT.
    Signal,
    /// A background task that must not end has ended; the text is the reason.
    TaskFailed(String),
    /// A successor accepts connections, and waits for the connections of this process.
    Succeeded {
        successor: Successor,
        /// How many stop signals arrived before the successor had taken over.
        stop_signals: u32,
    },
}

enum Event {
    Signal(SignalRequest),
    TaskFailed(String),
    Reload(ReloadEvent),
}

impl Serving {
    /// Serves until there is a reason to stop. A failed reload is logged and shown in the status line, and this process
    /// keeps serving.
    pub async fn wait_for_stop(&mut self) -> StopReason {
        let Self { signals, bundle, socket, status, tasks, .. } = self;
        let mut reloads = Reloads::new(bundle, socket.take());
        let mut failed = pin!(tasks.failed());
        loop {
            let event = tokio::select! {
                request = signals.next() => Event::Signal(request),
                reason = &mut failed => Event::TaskFailed(reason),
                event = reloads.next() => Event::Reload(event),
            };
            match event {
                Event::Signal(SignalRequest::Stop) => {
                    if reloads.is_under_way() {
                        info!(
                            message_id = message_id::NOT_RELOADED,
                            "reload failed: {STOPPED_DURING_RELOAD}"
                        );
                    }
                    return StopReason::Signal;
                }
                Event::Signal(SignalRequest::Reload) if reloads.is_under_way() => {
                    error!("SIGHUP ignored: {UNDER_WAY}");
                }
                Event::Signal(SignalRequest::Reload) if std::process::id() == 1 => {
                    error!("SIGHUP ignored: {PID_1}");
                }
                Event::Signal(SignalRequest::Reload) if systemd::ignores_this_process() => {
                    error!("SIGHUP ignored: {}", systemd::SET_NOTIFY_ACCESS);
                }
                Event::Signal(SignalRequest::Reload) => reloads.spawn_successor(),
                Event::TaskFailed(reason) => {
                    error!("{reason}");
                    return StopReason::TaskFailed(reason);
                }
                Event::Reload(ReloadEvent::Connected(channel)) => reloads.accept_successor(channel).await,
                Event::Reload(ReloadEvent::Prepared(prepared)) => {
                    let Commitment { successor, stop_signals } = match prepared {
                        Ok(prepared) => prepared.commit(bundle, status, signals).await,
                        Err(reason) => Commitment { successor: Err(reason), stop_signals: 0 },
                    };
                    match successor {
                        Ok(successor) => return StopReason::Succeeded { successor, stop_signals },
                        Err(reason) => {
                            let reason = format!("{reason:#}");
                            error!(message_id = message_id::NOT_RELOADED, "reload failed: {reason}");
                            if stop_signals > 0 {
                                return StopReason::Signal;
                            }
                            status.note(format!("last reload failed: {reason}"));
                            systemd::ready(&status.line());
                        }
                    }
                }
            }
        }
    }
}
