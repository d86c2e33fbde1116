//! Adopts the connections that a predecessor handed over: at a restart from systemd's store, at a reload from the
//! predecessor itself. Connections for which this process has no file descriptors wait (`handover/overflow.rs`).

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::handover::{
    self, Channel, ChannelLocation, Frame, MessageType, Next, Origin, STORE_NAME, WINDOW, is_claimed, unpack,
    unpack_tickets,
};
use crate::observe::log::message_id;
use crate::observe::metrics;
use crate::os::rlimit::{self, FdRoom};
use crate::os::systemd;
use crate::server::Server;
use crate::transport::listener_name::Name;

/// How often the connections that wait for descriptors are looked at while their peers are idle.
const ROTATION_INTERVAL: Duration = Duration::from_millis(50);
/// How soon they are looked at again after one of them has been answered. A client that asks on one connection after the
/// other waits so long for each response; a look at 2,000 connections takes some 4 ms.
const BUSY_ROTATION_INTERVAL: Duration = Duration::from_millis(10);

/// What a channel still holds.
#[derive(PartialEq, Eq)]
enum Remainder {
    None,
    /// Connections for which there are no descriptors.
    Waits,
}

pub struct Adopter {
    server: Server,
    /// Those of this process's listeners.
    names: Vec<Name>,
    room: FdRoom,
    /// Connections that this process serves.
    adopted: usize,
    /// Connections that were answered while they waited for descriptors, and ended with that.
    finished: usize,
    /// Connections closed because this process cannot serve them.
    refused: usize,
    /// Why the last one was refused.
    reason: Option<String>,
    origin: Option<Origin>,
    /// Channels in which connections waited in the predecessor.
    nested: Vec<OwnedFd>,
}

impl Adopter {
    pub fn new(server: Server, names: Vec<Name>) -> Self {
        Self {
            server,
            names,
            room: FdRoom::default(),
            adopted: 0,
            finished: 0,
            refused: 0,
            reason: None,
            origin: None,
            nested: Vec::new(),
        }
    }

    /// Adopts what `channels` of the store hold; says how many connections that is.
    pub fn adopt_stored(mut self, channels: Vec<anyhow::Result<OwnedFd>>) -> String {
        for channel in channels {
            let emptied = channel.and_then(|channel| {
                self.empty(channel, ChannelLocation::Store).context("could not read a handover channel")
            });
            if let Err(error) = emptied {
                self.refuse(0, format!("{error:#}"));
            }
        }
        self.empty_nested();
        let taken_over = self.adopted;
        if let Some(origin) = self.origin {
            let rest_ms = u64::try_from(origin.pause().as_millis()).unwrap_or(u64::MAX);
            let note = self.note();
            info!(
                message_id = message_id::TOOK_OVER,
                taken_over, rest_ms, "{note}, {rest_ms} ms after the predecessor's last response",
            );
        }
        if self.server.overflow().len() == 0 {
            systemd::unstore(STORE_NAME);
        }
        self.finish()
    }

    /// Adopts connections from a predecessor that runs beside this process, until it has ended; says how many these
    /// were. `on_other` gets the frames that are not about connections.
    pub async fn adopt_from(mut self, channel: Channel, mut on_other: impl FnMut(Frame)) -> String {
        let begun = Instant::now();
        if self.adopt_while_room(&channel, &mut on_other).await == Remainder::Waits {
            match channel.into_socket() {
                Ok(channel) => self.server.overflow().keep(channel, ChannelLocation::Process),
                Err(error) => self.refuse(0, error.to_string()),
            }
            while !self.server.overflow().is_complete() {
                sleep(ROTATION_INTERVAL).await;
                self.rotate_once();
            }
        }
        self.empty_nested();
        let (taken_over, took_ms) =
            (self.adopted, u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        let note = self.note();
        info!(
            message_id = message_id::TOOK_OVER,
            taken_over, took_ms, "{note}; the predecessor exited after {took_ms} ms",
        );
        self.server.overflow().store();
        self.finish()
    }

    async fn adopt_while_room(&mut self, channel: &Channel, mut on_other: impl FnMut(Frame)) -> Remainder {
        loop {
            let next = match channel.readable().await {
                Ok(()) => channel.receive_if_room(&mut self.room, WINDOW),
                Err(error) => Err(error),
            };
            match next {
                Ok(Next::Frame(frame)) if is_of_connections(frame.message_type) => self.on_frame(frame),
                Ok(Next::Frame(frame)) => on_other(frame),
                Ok(Next::Refused(connections, reason)) => self.refuse(connections, reason),
                Ok(Next::NoRoom) => return Remainder::Waits,
                Ok(Next::Pending) => {}
                Ok(Next::End) => return Remainder::None,
                Err(error) => {
                    self.refuse(0, error.to_string());
                    return Remainder::None;
                }
            }
        }
    }

    /// Adopts what the channel's writer has sent, and keeps the channel where that is more than there is room for. A
    /// frame that cannot be decoded costs the connections in it, and no others.
    fn empty(&mut self, channel: OwnedFd, location: ChannelLocation) -> std::io::Result<()> {
        loop {
            match handover::receive_if_room(&channel, &mut self.room, WINDOW)? {
                Next::NoRoom => {
                    self.server.overflow().keep(channel, location);
                    return Ok(());
                }
                // The writer has ended, so nothing more comes.
                Next::Pending | Next::End => return Ok(()),
                next => self.on_next(next),
            }
        }
    }

    /// Channels in which connections waited in the predecessor.
    fn empty_nested(&mut self) {
        for channel in std::mem::take(&mut self.nested) {
            if let Err(error) = self.empty(channel, ChannelLocation::Process) {
                self.refuse(0, error.to_string());
            }
        }
    }

    fn on_next(&mut self, next: Next) {
        match next {
            Next::Frame(frame) => self.on_frame(frame),
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
            _ => self.adopt(frame),
        }
    }

    fn adopt(&mut self, frame: Frame) {
        self.origin = Some(frame.origin);
        for reason in frame.refused {
            self.refuse(1, reason);
        }
        for (fd, record) in frame.sockets {
            if record.listener == STORE_NAME {
                self.nested.push(fd);
                continue;
            }
            match unpack(fd, record, &self.names) {
                Ok(connection) if is_claimed(&connection) => {}
                Ok(connection) => {
                    self.adopted += 1;
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

    /// What became of the connections.
    fn note(&self) -> String {
        let (adopted, waiting) = (self.adopted, self.server.overflow().len());
        match waiting {
            0 => format!("took over {adopted} connections"),
            _ => format!("took over {adopted} connections, and {waiting} wait for file descriptors"),
        }
    }

    /// Logs what could not be adopted, and begins to look after what waits.
    fn finish(mut self) -> String {
        let note = self.note();
        self.log_refused();
        let waiting = self.server.overflow().len();
        if waiting > 0 {
            warn!(
                waiting,
                "{waiting} connections wait for file descriptors and will be closed after their next response: \
                 raise LimitNOFILE= (now {})",
                rlimit::limit()
            );
            tokio::spawn(self.rotate());
        }
        note
    }

    fn log_refused(&mut self) {
        let refused = std::mem::take(&mut self.refused);
        if let Some(reason) = self.reason.take() {
            warn!(refused, "closed {refused} of the predecessor's connections: {reason}");
        }
    }

    /// Serves the connections that wait, until their channels are empty or the next process has them.
    async fn rotate(mut self) {
        let adopted_before = self.adopted;
        let mut interval = ROTATION_INTERVAL;
        loop {
            sleep(interval).await;
            let finished_before = self.finished;
            let channels = self.rotate_once();
            let is_busy = self.finished > finished_before;
            interval = if is_busy { BUSY_ROTATION_INTERVAL } else { ROTATION_INTERVAL };
            match channels {
                Some(0) => break,
                Some(_) => {}
                None => return,
            }
        }
        let (adopted, finished) = (self.adopted - adopted_before, self.finished);
        info!(
            adopted,
            finished,
            "no connection waits for file descriptors anymore: {adopted} adopted, {finished} closed after a response"
        );
        self.log_refused();
    }

    /// Adopts what fits by now, and serves those of the others that have something to say. Gives how many
    /// channels are not empty yet.
    fn rotate_once(&mut self) -> Option<usize> {
        let server = self.server.clone();
        // A connection between the channel and the registry would be counted by neither.
        let _accepting = server.registry().accepting();
        let (mut room, names) = (std::mem::take(&mut self.room), self.names.clone());
        let unpacked = |frame: Frame| {
            let connections =
                frame.sockets.into_iter().filter_map(|(fd, record)| unpack(fd, record, &names).ok());
            connections.collect()
        };
        let mut finished = 0;
        let channels = server.overflow().rotate(
            &mut room,
            |next| self.on_next(next),
            unpacked,
            |connection| {
                finished += 1;
                metrics::TAKEN_OVER.inc();
                server.finish(connection);
            },
        );
        self.room = room;
        self.finished += finished;
        // Each of these can have become one more channel that waits.
        let nested = self.nested.len();
        self.empty_nested();
        channels.map(|channels| channels + nested)
    }
}

/// Whether a frame also occurs in the store; the others are steps of a takeover.
fn is_of_connections(kind: MessageType) -> bool {
    matches!(kind, MessageType::Connections | MessageType::Tickets | MessageType::Totals)
}
