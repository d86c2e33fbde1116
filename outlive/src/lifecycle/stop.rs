//! The end of a process: it drains its connections, ends its background tasks, and runs the application's exit hooks,
//! in this order. The tasks come after the last response, because a request may have given them work.

use std::time::Duration;

use anyhow::anyhow;
use tokio::time::Instant;
use tracing::info;

use crate::app::setup::Hooks;
use crate::app::tasks::Running;
use crate::lifecycle::drain::{Drain, Linger, TaskBudget};
use crate::lifecycle::serve::{Serving, StopReason};
use crate::observe::status::ManagerRole;
use crate::observe::traces;
use crate::os::exit::{FLUSH_LIMIT, Failure, Result};
use crate::os::signals::Signals;

/// The minimum time that background tasks have to end, independent of the duration of the drain.
pub const TASKS_MINIMUM: Duration = Duration::from_secs(5);

impl Serving {
    /// Ends the process without losing a request. Returns an error if the process stops because a background task
    /// ended, so that the exit code shows it.
    pub async fn stop(self, reason: StopReason) -> Result<()> {
        let Self { config, generation, mut signals, server, bundle, status, old, tasks, hooks, .. } = self;
        let drain = Drain::new(&server, &mut signals, config.drain_timeout, generation);
        let mut failure = None;
        // The successor starts its exclusive tasks when this channel is closed, so it must stay open until the tasks of
        // this process have ended.
        let mut successor_channel = None;
        let budget = match reason {
            StopReason::Succeeded { successor, stop_signals } => {
                self.socket_files.release();
                // As below: a process that lingers must not keep the ports open.
                drop(bundle);
                let linger = Linger { limit: config.linger_timeout, old: &old, tasks: &tasks };
                let (channel, budget) = drain.pass_on(successor, stop_signals, linger).await;
                successor_channel = channel;
                budget
            }
            StopReason::Signal | StopReason::TaskFailed(_) => {
                if let StopReason::TaskFailed(reason) = reason {
                    failure = Some(Failure::software(anyhow!(reason)));
                }
                status.set_role(ManagerRole::Stopping);
                let next_adopts = bundle.program.adopts().await;
                // It contains duplicates of the listeners, which would keep the ports open that this process bound
                // itself.
                drop(bundle);
                drain.leave(config.drain_delay, next_adopts, &old).await
            }
        };
        finish_tasks(tasks, hooks, budget, &mut signals).await;
        traces::flush(FLUSH_LIMIT).await;
        drop(successor_channel);
        failure.map_or(Ok(()), Err)
    }
}

/// Ends the background tasks and runs the exit hooks. Further stop signals cut both off.
async fn finish_tasks(tasks: Running, hooks: Hooks, budget: TaskBudget, signals: &mut Signals) {
    let deadline = budget.deadline.max(Instant::now() + TASKS_MINIMUM);
    let cut_off = async {
        for _ in 1..budget.signals {
            signals.terminated().await;
            info!("stop signal ignored: already shutting down");
        }
        signals.terminated().await;
    };
    tokio::select! {
        () = async { tasks.finish(deadline).await; hooks.run().await } => {}
        () = cut_off => info!("another stop signal: cutting off background tasks and exit hooks"),
    }
}
