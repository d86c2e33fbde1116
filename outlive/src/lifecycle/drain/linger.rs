//! What a process still does when the drain limit of a reload has passed: it sends the responses that take longer, such
//! as downloads, within `--linger-timeout`.
//!
//! The successor waits for the end of this drain: only then do its exclusive background tasks begin, and only then can
//! its own drain end. So this process ends its exclusive tasks, closes the handover channel, and uses a linger channel
//! from then on (`takeover/old_processes.rs`). Through it each connection whose response has ended moves to the process
//! that serves at that time. If no process reads the channel, as after a reload to an earlier release, this process
//! closes each connection gracefully after its next response.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use tokio::time::{Instant, interval, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::limit::EndReason;
use super::{Drain, SUCCESSOR_LINGER, moving_responses};
use crate::connection::Connection;
use crate::handover::{Channel, MessageType, Origin, SocketRecord, pack, pair};
use crate::lifecycle::config::TimeLimit;
use crate::observe::{counted, metrics};
use crate::os::systemd;
use crate::registry::{Phase, Registry};
use crate::requests::logged;
use crate::takeover::{LingerChannel, OldProcesses};

/// The time between two log lines about what is still sent.
const LOG_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// Where connections go.
pub(super) enum Route {
    /// To the successor, which takes the end of this channel for the end of this process's exclusive tasks.
    Handover(Channel),
    /// To the process that serves, through the linger channel.
    Linger(Channel),
    /// No process adopts them.
    Closed,
}

/// When a process that lingers has to end.
#[derive(Clone, Copy)]
enum Deadline {
    None,
    /// At the end of `--linger-timeout`.
    Linger(Instant),
    /// At the end of one drain limit after a stop signal, or after the process that serves has asked for the end.
    Stop(Instant),
}

impl Deadline {
    fn new(begun: Instant, limit: TimeLimit) -> Self {
        match limit {
            TimeLimit::Limited(time) => begun.checked_add(time).map_or(Self::None, Self::Linger),
            TimeLimit::Unlimited => Self::None,
        }
    }

    fn at(self) -> Option<Instant> {
        match self {
            Self::None => None,
            Self::Linger(at) | Self::Stop(at) => Some(at),
        }
    }

    /// The deadline after a stop, which has `limit` from now. A second stop does not extend it.
    fn stopped(self, limit: Duration) -> Self {
        let at = Instant::now() + limit;
        match self {
            Self::Stop(before) => Self::Stop(before),
            _ if self.at().is_some_and(|before| before < at) => self,
            _ => Self::Stop(at),
        }
    }

    fn reason(self) -> EndReason {
        match self {
            Self::Stop(_) => EndReason::DrainLimit,
            Self::None | Self::Linger(_) => EndReason::LingerLimit,
        }
    }

    async fn passes(self) {
        match self.at() {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

enum Event {
    Quiescent(Connection),
    /// A channel of another old process, which has to go to the same process as the connections.
    Old(LingerChannel),
    TasksEnded,
    Message(io::Result<Option<MessageType>>),
    Signal,
    /// The next report is due.
    Tick,
    Sent,
    Passed,
}

impl Drain<'_> {
    /// Whether to linger: the drain limit has passed, no stop signal has arrived, and there are responses to send, here or
    /// in a predecessor whose connections move through this process.
    pub(super) fn is_to_linger(&self, limit: TimeLimit) -> bool {
        let has_time = Deadline::new(self.begun, limit).at().is_none_or(|at| at > Instant::now());
        let is_stopping = self.limit.signals_left < 2;
        let is_at_limit = self.limit.passed == Some(EndReason::DrainLimit);
        let registry = self.server.registry();
        is_at_limit && has_time && !is_stopping && (registry.responses() > 0 || registry.is_arriving())
    }

    /// Sends the remaining responses. `exclusive_ended` resolves when the exclusive background tasks have ended, which the
    /// successor waits for. Adds the connections that it hands over to `handed_over`, and returns what is left of the
    /// route.
    pub(super) async fn linger_after_reload(
        &mut self,
        mut route: Route,
        limit: TimeLimit,
        old: &OldProcesses,
        exclusive_ended: impl Future<Output = ()>,
        handed_over: &mut usize,
    ) -> Route {
        let origin = Origin::now(self.generation);
        let Self { server, limit: drain, begun, moved, .. } = self;
        let registry = server.registry();
        drain.passed = None;
        if registry.phase() == Phase::Quiescing {
            server.enter(Phase::Holding);
        }
        // Watches every connection; otherwise only the end of the last one would wake `wait_until`.
        registry.subscribe_all();
        log_beginning(registry, begun.elapsed(), limit);
        let mut deadline = Deadline::new(*begun, limit);
        let mut reported = registry.responses();
        let mut clock = interval(systemd::STATUS_INTERVAL);
        let mut logged_at = Instant::now();
        tokio::pin!(exclusive_ended);
        loop {
            let is_sent = || registry.has_only_upgraded();
            let event = tokio::select! {
                biased;
                () = drain.signals.terminated() => Event::Signal,
                connection = server.handover_queue().next() => Event::Quiescent(connection),
                channel = old.next_to_pass() => Event::Old(channel),
                () = registry.wait_until(is_sent) => Event::Sent,
                () = &mut exclusive_ended, if matches!(route, Route::Handover(_)) => Event::TasksEnded,
                message = route.message() => Event::Message(message),
                () = deadline.passes() => Event::Passed,
                _ = clock.tick() => Event::Tick,
            };
            // The last connection enters the queue just before it leaves the registry.
            let event = match event {
                Event::Sent => server.handover_queue().take().map_or(Event::Sent, Event::Quiescent),
                event => event,
            };
            match event {
                Event::Quiescent(connection) => {
                    let moving = moving_responses(std::slice::from_ref(&connection));
                    match route.hand_over(connection, origin).await {
                        Ok(()) => {
                            *handed_over += 1;
                            *moved += moving;
                        }
                        // It is closed after its next response, or when it is idle.
                        Err(connection) => server.finish(connection),
                    }
                }
                Event::Old(channel) => route.pass(channel, origin).await,
                Event::TasksEnded => route = route.release(origin, registry.responses()).await,
                Event::Message(Ok(Some(MessageType::Stop))) => {
                    info!(
                        "the process that serves asked this process to end: the remaining responses have {} (--drain-timeout)",
                        humantime::format_duration(drain.length)
                    );
                    deadline = deadline.stopped(drain.length);
                }
                Event::Message(Ok(Some(other))) => {
                    debug!(?other, "ignored an unexpected message from the process that serves");
                }
                Event::Message(Ok(None) | Err(_)) => {
                    route = Route::Closed;
                    if drain.signals_left < 2 {
                        drain.passed = Some(EndReason::SuccessorExited);
                        break;
                    }
                }
                Event::Signal => {
                    drain.signals_left -= 1;
                    if drain.signals_left == 0 {
                        drain.passed = Some(EndReason::SecondSignal);
                        break;
                    }
                    // After a crash of the process that serves, systemd starts the service again only when this process
                    // has exited too, so it must not wait for a slow client.
                    if matches!(route, Route::Closed) {
                        drain.passed = Some(EndReason::SuccessorExited);
                        break;
                    }
                    deadline = deadline.stopped(drain.length);
                }
                Event::Tick => {
                    let responses = registry.responses();
                    if responses != std::mem::replace(&mut reported, responses) {
                        route.report(responses, origin).await;
                    }
                    if logged_at.elapsed() >= LOG_INTERVAL {
                        logged_at = Instant::now();
                        info!(responses, "still sending {}", counted(responses, "response"));
                    }
                }
                Event::Sent => break,
                Event::Passed => {
                    drain.passed = Some(deadline.reason());
                    break;
                }
            }
        }
        // A channel may have come with the last connection.
        while let Some(channel) = old.take_to_pass() {
            route.pass(channel, origin).await;
        }
        route
    }
}

impl Route {
    fn channel(&self) -> Option<&Channel> {
        match self {
            Self::Handover(channel) | Self::Linger(channel) => Some(channel),
            Self::Closed => None,
        }
    }

    /// The next message of the other end; None if it is closed. The successor sends none through the handover channel.
    async fn message(&self) -> io::Result<Option<MessageType>> {
        match self.channel() {
            Some(channel) => Ok(channel.receive().await?.map(|frame| frame.message_type)),
            None => std::future::pending().await,
        }
    }

    /// Waits until the other end is closed.
    pub(super) async fn closed(&self) {
        while let Ok(Some(_)) = self.message().await {}
    }

    /// Sends connections, and removes them from `unsent`. An error if no process can adopt the others.
    pub(super) async fn send(
        &self,
        unsent: &mut &[(BorrowedFd<'_>, SocketRecord)],
        origin: Origin,
    ) -> io::Result<()> {
        match self.channel() {
            Some(channel) => channel.send_from(MessageType::Connections, origin, unsent, "").await,
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Returns the connection if no process can adopt it.
    async fn hand_over(&self, connection: Connection, origin: Origin) -> Result<(), Connection> {
        let packed = pack(std::slice::from_ref(&connection));
        let sent = timeout(SUCCESSOR_LINGER, self.send(&mut &packed[..], origin)).await;
        match sent.map_err(io::Error::from).flatten() {
            Ok(()) => {
                metrics::HANDED_OVER.inc();
                Ok(())
            }
            Err(error) => {
                debug!(%error, "could not hand over a connection");
                Err(connection)
            }
        }
    }

    /// Passes on the channel of another old process. If that fails, its end closes, and that process closes its
    /// connections itself.
    pub(super) async fn pass(&self, old: LingerChannel, origin: Origin) {
        let Some(channel) = self.channel() else { return };
        if let Err(error) =
            timeout(SUCCESSOR_LINGER, old.send(channel, origin)).await.map_err(io::Error::from).flatten()
        {
            warn!(%error, "could not pass the channel of an old process to the successor; that process closes its connections after their responses");
        }
    }

    /// Closes the handover channel, and uses a linger channel from then on.
    async fn release(self, origin: Origin, responses: usize) -> Self {
        let Self::Handover(_) = self else { return self };
        let linger = pair().and_then(|(ours, theirs)| Ok((Channel::new(ours)?, theirs)));
        let next = match linger {
            Ok((ours, theirs)) => {
                self.pass(LingerChannel::new(theirs, responses), origin).await;
                Self::Linger(ours)
            }
            Err(error) => {
                warn!(%error, "could not create a linger channel to the successor; this process closes each connection after its response");
                Self::Closed
            }
        };
        self.send_totals(origin).await;
        next
    }

    /// Reports how many responses are left.
    async fn report(&self, responses: usize, origin: Origin) {
        if let Self::Linger(channel) = self {
            // Lost if the other end reads nothing: the next report follows.
            let text = responses.to_string();
            let _ = timeout(SUCCESSOR_LINGER, channel.send_text(MessageType::Lingering, origin, &text)).await;
        }
    }

    /// Sends the counters, as the last message.
    pub(super) async fn send_totals(&self, origin: Origin) {
        if let Some(channel) = self.channel() {
            // An error is ignored: a process that hangs or has exited does not need the totals.
            let totals = metrics::take_totals();
            let _ = timeout(SUCCESSOR_LINGER, channel.send_text(MessageType::Totals, origin, &totals)).await;
        }
    }
}

fn log_beginning(registry: &Registry, elapsed: Duration, limit: TimeLimit) {
    let responses = registry.responses();
    if responses == 0 {
        info!(
            "the drain limit has passed: this process has no responses left, but still passes connections of its predecessor to its successor"
        );
        return;
    }
    let oldest = registry.oldest_request().map_or_else(String::new, |request| {
        let age = humantime::format_duration(Duration::from_secs(request.since.elapsed().as_secs()));
        format!(", the oldest for {age}: {}", logged(request.path.path()))
    });
    info!(
        responses,
        drain_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        "the drain limit has passed: still sending {}{oldest}, limit {limit} (--linger-timeout)",
        counted(responses, "response"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn stop_shortens_the_time_once_and_never_extends_it() {
        let (begun, limit) = (Instant::now(), Duration::from_secs(30));
        let minutes = |count: u64| TimeLimit::Limited(Duration::from_secs(60 * count));
        for timeout in [minutes(60), TimeLimit::Unlimited] {
            let stopped = Deadline::new(begun, timeout).stopped(limit);
            let at = Instant::now() + limit;
            assert_eq!((stopped.at(), stopped.reason()), (Some(at), EndReason::DrainLimit));
            tokio::time::advance(Duration::from_secs(10)).await;
            assert_eq!(stopped.stopped(limit).at(), Some(at));
        }
        let nearly_over = Deadline::new(begun, TimeLimit::Limited(Duration::from_secs(25)));
        let stopped = nearly_over.stopped(limit);
        assert_eq!((stopped.at(), stopped.reason()), (nearly_over.at(), EndReason::LingerLimit));
    }
}
