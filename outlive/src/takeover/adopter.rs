//! Adopts the connections that a predecessor handed over.
//!
//! An [`Adopter`] reads handover channels (`handover/`): at a restart from systemd's store, at a reload from the
//! predecessor itself. It passes each connection to `Server::adopt`. Connections for which this process has no file
//! descriptors wait in their channels (`handover/overflow.rs`).

use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::Context;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use crate::connection::Connection;
use crate::handover::{
    self, Channel, ChannelLocation, Copies, Frame, MessageType, Next, Origin, STORE_NAME, WINDOW, is_claimed,
    take_backed_up, unpack, unpack_tickets,
};
use crate::observe::log::message_id;
use crate::observe::{counted, metrics};
use crate::os::rlimit::{self, FdRoom};
use crate::os::task;
use crate::server::Server;

/// How often the connections that wait for descriptors are checked while their peers are idle.
const ROTATION_INTERVAL: Duration = Duration::from_millis(50);
/// How soon they are checked again after one of them has been served. A client that sends one request at a time, each
/// on another connection, waits this long for each response. A check of 2,000 connections takes about 4 ms.
const BUSY_ROTATION_INTERVAL: Duration = Duration::from_millis(10);

/// What a channel still holds after it was read.
#[derive(PartialEq, Eq)]
enum Remainder {
    None,
    /// Connections for which this process has no descriptors.
    Waits,
}

/// Adopts connections into a [`Server`], and counts them for the log.
pub struct Adopter {
    server: Server,
    room: FdRoom,
    /// Connections that this process serves.
    adopted: usize,
    /// Connections that were served while they waited for descriptors, and closed after that response.
    finished: usize,
    /// How many of those adopted were parked when their process crashed.
    recovered: usize,
    /// How many of those adopted are closing, because the certificate of their client is not accepted.
    uncertified: usize,
    /// Connections closed because this process cannot serve them.
    refused: usize,
    /// Why the last one was refused.
    reason: Option<String>,
    origin: Option<Origin>,
    /// Channels that the predecessor passed on, because their connections waited for descriptors there.
    nested: Vec<OwnedFd>,
    /// When the connections that wait for descriptors are due to be checked.
    rotation_due: Instant,
}

impl Adopter {
    pub fn new(server: Server) -> Self {
        Self {
            server,
            room: FdRoom::default(),
            adopted: 0,
            finished: 0,
            recovered: 0,
            uncertified: 0,
            refused: 0,
            reason: None,
            origin: None,
            nested: Vec::new(),
            rotation_due: Instant::now(),
        }
    }

    /// Adopts the connections in the `channels` of systemd's store. Returns a note for the status line.
    pub fn adopt_stored(mut self, channels: Vec<anyhow::Result<OwnedFd>>) -> String {
        for channel in channels {
            let emptied = channel.and_then(|channel| {
                let emptied = self.empty(channel, ChannelLocation::Store, &mut close);
                emptied.context("could not read a handover channel")
            });
            if let Err(error) = emptied {
                self.refuse(0, format!("{error:#}"));
            }
        }
        self.empty_nested(&mut close);
        let taken_over = self.adopted;
        if let Some(origin) = self.origin {
            let rest_ms = u64::try_from(origin.pause().as_millis()).unwrap_or(u64::MAX);
            let note = self.note("");
            info!(
                message_id = message_id::TOOK_OVER,
                taken_over, rest_ms, "{note}, {rest_ms} ms after the predecessor's last response",
            );
        }
        if self.recovered > 0 {
            let recovered = self.recovered;
            info!(
                message_id = message_id::TOOK_OVER,
                recovered,
                "took over {} that were idle when the predecessor crashed",
                counted(recovered, "connection")
            );
        }
        self.server.overflow().clear_store();
        self.finish(close)
    }

    /// Adopts connections from a predecessor that runs beside this process, until its drain has ended. Returns a note for
    /// the status line. `on_other` receives the frames that are steps of the takeover.
    pub async fn adopt_from(
        mut self,
        channel: Channel,
        mut on_other: impl FnMut(Frame) + Send + 'static,
    ) -> String {
        let begun = Instant::now();
        let remainder = loop {
            tokio::select! {
                readable = channel.readable() => {
                    if let ControlFlow::Break(remainder) = self.adopt_next(&channel, readable, &mut on_other) {
                        break remainder;
                    }
                }
                // The predecessor has passed on channels in which connections wait. It does not serve them anymore, and
                // its own channel may stay open for its whole drain.
                () = sleep_until(self.rotation_due), if self.server.overflow().has_channels() => {
                    self.rotate_once(&mut on_other);
                }
            }
        };
        if remainder == Remainder::Waits {
            match channel.into_socket() {
                Ok(channel) => self.server.overflow().keep(channel, ChannelLocation::Process),
                Err(error) => self.refuse(0, error.to_string()),
            }
        }
        while !self.server.overflow().is_complete() {
            sleep_until(self.rotation_due).await;
            self.rotate_once(&mut on_other);
        }
        let (taken_over, took_ms) =
            (self.adopted, u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        // A predecessor that is killed may have sent no frame, so its generation is not known.
        let from = self.origin.map_or_else(
            || " from the predecessor".to_owned(),
            |origin| format!(" from generation {}", origin.generation),
        );
        let note = self.note(&from);
        info!(
            message_id = message_id::TOOK_OVER,
            taken_over, took_ms, "{note}; the handover ended {took_ms} ms after the takeover began",
        );
        self.server.overflow().store();
        self.finish(on_other)
    }

    /// Adopts connections from an old process that lingers, until it has exited, or until `is_followed` returns false
    /// because the channel was passed on. `on_other` receives its other frames.
    pub async fn adopt_late(
        mut self,
        channel: &Channel,
        is_followed: impl Fn() -> bool,
        mut on_other: impl FnMut(Frame),
    ) {
        let server = self.server.clone();
        let mut copies = Copies::default();
        loop {
            let readable = channel.readable().await;
            let next = {
                // The frame counts as an accepted connection, so that the drain waits for it, as in `rotate_once`. The drain
                // passes the channel on before it checks this count, so no frame is received after the check.
                let _accepting = server.registry().accepting();
                if !is_followed() {
                    break;
                }
                let next = self.adopt_next(channel, readable, |frame| {
                    if !copies.had(&frame) {
                        on_other(frame);
                    }
                });
                if next == ControlFlow::Break(Remainder::Waits) {
                    self.serve_copies(channel, &mut copies, &mut on_other);
                }
                next
            };
            match next {
                ControlFlow::Continue(()) => {}
                // Connections for which this process has no descriptors wait in the channel, as in `Overflow`.
                ControlFlow::Break(Remainder::Waits) => sleep(ROTATION_INTERVAL).await,
                ControlFlow::Break(Remainder::None) => break,
            }
        }
        self.log_refused();
    }

    /// Adopts the connections of the next frame. `readable` is the result of [`Channel::readable`]. Returns `Break` if
    /// `channel` has ended or failed, or if there are no descriptors for its next frame; the [`Remainder`] says which.
    fn adopt_next(
        &mut self,
        channel: &Channel,
        readable: io::Result<()>,
        mut on_other: impl FnMut(Frame),
    ) -> ControlFlow<Remainder> {
        match readable.and_then(|()| channel.receive_if_room(&mut self.room, WINDOW)) {
            Ok(Next::NoRoom) => return ControlFlow::Break(Remainder::Waits),
            Ok(Next::Pending) => {}
            Ok(Next::End) => return ControlFlow::Break(Remainder::None),
            Ok(next) => {
                self.on_next(next, &mut on_other);
                self.empty_nested(&mut on_other);
            }
            Err(error) => {
                self.refuse(0, error.to_string());
                return ControlFlow::Break(Remainder::None);
            }
        }
        ControlFlow::Continue(())
    }

    /// Adopts the connections in a channel. Keeps the channel if descriptors run short, or if its writer still runs. The writer
    /// is an old process that hands over to the predecessor. If this process closed the channel, the writer would cut off the
    /// requests that it still serves. If a frame cannot be decoded, only the connections in it are closed.
    fn empty(
        &mut self,
        channel: OwnedFd,
        location: ChannelLocation,
        on_other: &mut impl FnMut(Frame),
    ) -> io::Result<()> {
        loop {
            match handover::receive_if_room(&channel, &mut self.room, WINDOW)? {
                Next::NoRoom | Next::Pending => {
                    self.server.overflow().keep(channel, location);
                    return Ok(());
                }
                Next::End => return Ok(()),
                next => self.on_next(next, on_other),
            }
        }
    }

    /// Adopts the connections in the channels that the predecessor passed on.
    fn empty_nested(&mut self, on_other: &mut impl FnMut(Frame)) {
        while let Some(channel) = self.nested.pop() {
            if let Err(error) = self.empty(channel, ChannelLocation::Process, on_other) {
                self.refuse(0, error.to_string());
            }
        }
    }

    fn on_next(&mut self, next: Next, on_other: &mut impl FnMut(Frame)) {
        match next {
            Next::Frame(frame) if is_of_connections(frame.message_type) => self.on_frame(frame),
            Next::Frame(frame) => on_other(frame),
            Next::Refused(connections, reason) => self.refuse(connections, reason),
            Next::NoRoom | Next::Pending | Next::End => {}
        }
    }

    fn on_frame(&mut self, frame: Frame) {
        match frame.message_type {
            MessageType::Totals => {
                if let Err(error) = metrics::restore_totals(&frame.text) {
                    debug!(%error, "invalid counters from the predecessor: {:?}", frame.text);
                }
            }
            MessageType::Tickets => self.server.adopt_ticket_keys(unpack_tickets(frame)),
            MessageType::Backup => {
                let before = self.adopted;
                self.adopt(take_backed_up(frame));
                self.recovered += self.adopted - before;
            }
            _ => {
                self.origin = Some(frame.origin);
                self.adopt(frame);
            }
        }
    }

    fn adopt(&mut self, frame: Frame) {
        for reason in frame.refused {
            self.refuse(1, reason);
        }
        for (fd, record) in frame.sockets {
            if record.listener == STORE_NAME {
                self.nested.push(fd);
                continue;
            }
            match unpack(fd, record, self.server.endpoints()) {
                Ok(connection) if is_claimed(&connection) => {}
                Ok(connection) => {
                    self.adopted += 1;
                    self.uncertified += usize::from(connection.endpoint.is_refusing());
                    metrics::TAKEN_OVER.inc();
                    self.server.adopt(connection);
                }
                Err(reason) => self.refuse(1, reason),
            }
        }
    }

    fn refuse(&mut self, connections: usize, reason: String) {
        self.refused += connections;
        self.reason = Some(reason);
    }

    /// How many connections were taken over, and how many wait.
    fn note(&self, from: &str) -> String {
        let (adopted, waiting) = (self.adopted, self.server.overflow().len());
        let connections = counted(adopted, "connection");
        match waiting {
            0 => format!("took over {connections}{from}"),
            _ => format!("took over {connections}{from}, and {waiting} wait for file descriptors"),
        }
    }

    /// Logs how many connections could not be adopted, and starts a task that reads the channels that are kept. Returns
    /// the note for the status line.
    fn finish(mut self, on_other: impl FnMut(Frame) + Send + 'static) -> String {
        let note = self.note("");
        self.log_refused();
        let waiting = self.server.overflow().len();
        if waiting > 0 {
            warn!(
                waiting,
                "{waiting} connections wait for file descriptors; each is adopted when there is one, or closed after its next \
                 response: raise LimitNOFILE= (now {})",
                rlimit::limit()
            );
        }
        // Not only if connections wait: a writer may have sent some after the last rotation, and these are not counted.
        if self.server.overflow().has_channels() {
            task::spawn(self.rotate(on_other));
        }
        note
    }

    fn log_refused(&mut self) {
        let uncertified = std::mem::take(&mut self.uncertified);
        if uncertified > 0 {
            let connections = counted(uncertified, "connection");
            warn!(
                uncertified,
                "closing {connections} of an old process, because --tls-client-auth and --tls-client-ca do not accept the \
                 certificate of the client; --log info,outlive=debug logs the reason for each"
            );
        }
        let refused = std::mem::take(&mut self.refused);
        match self.reason.take() {
            Some(reason) if refused > 0 => {
                let connections = counted(refused, "connection");
                warn!(refused, "could not adopt {connections} of an old process, and closed them: {reason}");
            }
            Some(reason) => {
                warn!(
                    refused,
                    "could not read all connections of an old process, so some may be closed: {reason}"
                );
            }
            None => {}
        }
    }

    /// Serves the connections that wait, until their channels are empty or the next process has them.
    async fn rotate(mut self, mut on_other: impl FnMut(Frame)) {
        let adopted_before = self.adopted;
        loop {
            sleep_until(self.rotation_due).await;
            match self.rotate_once(&mut on_other) {
                Some(0) => {
                    self.server.overflow().clear_store();
                    // Removing these channels from the store also removed the backup, because it has the same name, so
                    // store it again.
                    self.server.store_backup();
                    break;
                }
                Some(_) => {}
                None => return,
            }
        }
        let (adopted, finished) = (self.adopted - adopted_before, self.finished);
        if adopted + finished > 0 {
            info!(
                adopted,
                finished,
                "no connection waits for file descriptors anymore: {adopted} adopted, {finished} closed after a response"
            );
        }
        self.log_refused();
    }

    /// Adopts the connections for which there is room by now, and serves those of the others that are readable or
    /// closed by their peers. Returns how many channels are not empty yet; None once the next process has them.
    fn rotate_once(&mut self, on_other: &mut impl FnMut(Frame)) -> Option<usize> {
        let server = self.server.clone();
        // A connection that has left its channel and is not registered yet is in neither count, so without this a drain
        // could end and close it.
        let _accepting = server.registry().accepting();
        let mut room = std::mem::take(&mut self.room);
        let mut finished = 0;
        let channels = server.overflow().rotate(
            &mut room,
            |next| self.on_next(next, on_other),
            |frame| unpack_copies(&server, frame),
            |connection| {
                finished += 1;
                finish_copy(&server, connection);
            },
        );
        self.room = room;
        self.finished += finished;
        let is_busy = finished > 0;
        self.rotation_due = Instant::now() + if is_busy { BUSY_ROTATION_INTERVAL } else { ROTATION_INTERVAL };
        // `empty_nested` may keep each of them as one more channel that is not empty.
        let nested = self.nested.len();
        self.empty_nested(on_other);
        channels.map(|channels| channels + nested)
    }

    /// Serves the connections in a linger channel for which this process has no descriptors, as `rotate_once` does.
    fn serve_copies(&mut self, channel: &Channel, copies: &mut Copies, on_other: &mut impl FnMut(Frame)) {
        let server = self.server.clone();
        let mut room = std::mem::take(&mut self.room);
        copies.serve(
            channel,
            &mut room,
            |next| self.on_next(next, on_other),
            |frame| unpack_copies(&server, frame),
            |connection| finish_copy(&server, connection),
        );
        self.room = room;
    }
}

/// The connections in the copy of a frame. Those that cannot be decoded are refused when the frame is received.
fn unpack_copies(server: &Server, frame: Frame) -> Vec<Connection> {
    let unpacked = frame.sockets.into_iter().map(|(fd, record)| unpack(fd, record, server.endpoints()));
    unpacked.filter_map(Result::ok).collect()
}

fn finish_copy(server: &Server, connection: Connection) {
    metrics::TAKEN_OVER.inc();
    server.finish_copy(connection);
}

/// Whether a frame also occurs at a restart, so that an [`Adopter`] handles it. The others are steps of a takeover.
fn is_of_connections(message_type: MessageType) -> bool {
    use MessageType::{Backup, Connections, Tickets, Totals};
    matches!(message_type, Connections | Tickets | Totals | Backup)
}

/// Closes the sockets in a stored frame that belongs to a takeover. If the frame carries a linger channel, the old process at
/// the other end has ended with the unit, or closes its connections itself.
fn close(frame: Frame) {
    let Frame { message_type, sockets, .. } = frame;
    debug!(?message_type, sockets = sockets.len(), "closing the sockets of an unexpected frame in the store");
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use axum::Router;
    use axum::routing::get;
    use bytes::Bytes;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;
    use tokio::sync::mpsc::unbounded_channel;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;
    use crate::connection::tests::{Served, serve};
    use crate::handover::{SocketRecord, pack, pack_channel, pair, send_frames};
    use crate::registry::Phase;

    /// How long a test waits for an event before it fails.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// The process that adopts.
    async fn successor() -> Served {
        serve(Router::new().route("/", get(async || "ok"))).await
    }

    /// The client of a connection that an old process has handed over.
    struct Client(UnixStream);

    impl Client {
        /// Sends a request, and hands its connection to `server` over through `channel`, whose other end has to be open.
        fn hand_over(server: &Server, channel: &OwnedFd) -> Self {
            let (mut client, socket) =
                std::os::unix::net::UnixStream::pair().expect("could not create a socket pair");
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("could not send");
            client.set_nonblocking(true).expect("could not make a socket non-blocking");
            let connection = Connection::begun(socket.into(), server.endpoints()[0].clone());
            send(channel, MessageType::Connections, &pack(&[connection]));
            Self(UnixStream::from_std(client).expect("could not convert a socket"))
        }

        /// Waits for the response, and checks it.
        async fn expect_answer(mut self) {
            let mut bytes = [0; 12];
            let read = timeout(PATIENCE, self.0.read_exact(&mut bytes)).await;
            read.expect("no process answered").expect("the connection was closed without a response");
            assert_eq!(&bytes, b"HTTP/1.1 200");
        }
    }

    fn send(channel: &OwnedFd, message_type: MessageType, sockets: &[(impl AsFd, SocketRecord)]) {
        let (_, error) = send_frames(channel, message_type, Origin::now(1), sockets, "");
        assert_eq!(error.map(|error| error.to_string()), None, "no process reads the channel");
    }

    /// A channel of a process before the predecessor, which the predecessor passes on through `to_successor`. Returns the
    /// end of that process.
    fn pass_channel_on(to_successor: &OwnedFd) -> OwnedFd {
        let (writer, passed_on) = pair().expect("could not create a socket pair");
        send(to_successor, MessageType::Connections, &pack_channel(&passed_on));
        writer
    }

    /// Waits until an adoption has ended, because the writers of all channels have exited.
    async fn until_ended(adopting: JoinHandle<String>) {
        timeout(PATIENCE, adopting).await.expect("did not see the exit of a writer").expect("panicked");
    }

    #[tokio::test]
    async fn channel_that_was_passed_on_is_read_until_its_writer_exits() {
        let server = successor().await.server;
        let (predecessor, channel) = pair().expect("could not create a socket pair");
        let oldest = pass_channel_on(&predecessor);
        let client = Client::hand_over(&server, &oldest);
        // The predecessor exits.
        drop(predecessor);
        let channel = Channel::new(channel).expect("could not watch a channel");
        let adopting = tokio::spawn(Adopter::new(server.clone()).adopt_from(channel, |_| ()));
        client.expect_answer().await;
        Client::hand_over(&server, &oldest).expect_answer().await;
        assert!(!adopting.is_finished(), "did not wait for the oldest process");
        drop(oldest);
        until_ended(adopting).await;
    }

    #[tokio::test]
    async fn connection_that_arrives_after_the_last_rotation_is_adopted() {
        let server = successor().await.server;
        let (predecessor, channel) = pair().expect("could not create a socket pair");
        server.overflow().keep(channel, ChannelLocation::Process);
        let client = Client::hand_over(&server, &predecessor);
        drop(predecessor);
        Adopter::new(server).finish(close);
        client.expect_answer().await;
    }

    #[tokio::test]
    async fn connections_that_were_passed_on_do_not_wait_for_the_end_of_the_predecessor() {
        let server = successor().await.server;
        let (predecessor, channel) = pair().expect("could not create a socket pair");
        let oldest = pass_channel_on(&predecessor);
        let channel = Channel::new(channel).expect("could not watch a channel");
        let adopting = tokio::spawn(Adopter::new(server.clone()).adopt_from(channel, |_| ()));
        // The first is answered when the channel has arrived, and the second in a rotation.
        for _ in 0..2 {
            Client::hand_over(&server, &oldest).expect_answer().await;
        }
        drop(oldest);
        assert!(!adopting.is_finished(), "did not wait for the predecessor");
        drop(predecessor);
        until_ended(adopting).await;
    }

    #[tokio::test]
    async fn linger_channel_in_a_channel_that_was_passed_on_is_followed() {
        let server = successor().await.server;
        let (predecessor, channel) = pair().expect("could not create a socket pair");
        let oldest = pass_channel_on(&predecessor);
        let (_, linger) = pair().expect("could not create a socket pair");
        let record = SocketRecord::new("linger".to_owned(), Bytes::new());
        send(&oldest, MessageType::Lingering, &[(linger, record)]);
        drop((oldest, predecessor));
        let (lingering, mut followed) = unbounded_channel();
        let on_other = move |frame: Frame| {
            lingering.send((frame.message_type, frame.sockets.len())).expect("the test has ended");
        };
        let channel = Channel::new(channel).expect("could not watch a channel");
        Adopter::new(server).adopt_from(channel, on_other).await;
        assert_eq!(followed.recv().await, Some((MessageType::Lingering, 1)));
    }

    /// A drain must not end between the moment at which a frame leaves its channel and the one at which its connections
    /// are registered.
    #[tokio::test]
    async fn drain_waits_while_a_frame_of_a_process_that_lingers_is_handled() {
        let server = successor().await.server;
        let (lingering, channel) = pair().expect("could not create a socket pair");
        let no_sockets: [(OwnedFd, SocketRecord); 0] = [];
        send(&lingering, MessageType::Lingering, &no_sockets);
        drop(lingering);
        let channel = Channel::new(channel).expect("could not watch a channel");
        let registry = server.registry();
        server.enter(Phase::Quiescing);
        let drained = timeout(PATIENCE, registry.wait_until(|| registry.is_drained())).await;
        drained.expect("a process without connections is not drained");
        let mut was_drained = None;
        let adopter = Adopter::new(server.clone());
        adopter.adopt_late(&channel, || true, |_| was_drained = Some(registry.is_drained())).await;
        assert_eq!(was_drained, Some(false));
        assert!(registry.is_drained());
    }

    #[tokio::test]
    async fn frames_stay_in_a_linger_channel_that_was_passed_on() {
        let server = successor().await.server;
        let (lingering, channel) = pair().expect("could not create a socket pair");
        let client = Client::hand_over(&server, &lingering);
        let channel = Channel::new(channel).expect("could not watch a channel");
        let late = Adopter::new(server.clone()).adopt_late(&channel, || false, |_| ());
        timeout(PATIENCE, late).await.expect("read the channel on");
        drop(lingering);
        Adopter::new(server).adopt_late(&channel, || true, |_| ()).await;
        client.expect_answer().await;
    }

    #[tokio::test]
    async fn connections_of_a_process_that_lingers_are_answered_without_room_for_them() {
        let server = successor().await.server;
        let (lingering, channel) = pair().expect("could not create a socket pair");
        let clients = [(); 2].map(|()| Client::hand_over(&server, &lingering));
        let no_sockets: [(OwnedFd, SocketRecord); 0] = [];
        send(&lingering, MessageType::Lingering, &no_sockets);
        let channel = Channel::new(channel).expect("could not watch a channel");
        let (behind, mut received) = unbounded_channel();
        let mut adopter = Adopter::new(server);
        // Enough to copy a frame, and too few to adopt it.
        adopter.room = FdRoom::counted_by(|| 30);
        let late = adopter.adopt_late(
            &channel,
            || true,
            |frame| behind.send(frame.text).expect("the test has ended"),
        );
        let clients = async {
            for client in clients {
                client.expect_answer().await;
            }
            timeout(PATIENCE, received.recv()).await.expect("did not see the frame behind the connections")
        };
        tokio::select! {
            () = late => panic!("did not wait for the end of the channel"),
            note = clients => assert_eq!(note.as_deref(), Some("")),
        }
    }
}
