//! Connections for which this process has no file descriptors, because `LimitNOFILE=` was lowered or a handler has many
//! files open. [`Overflow`] keeps their channels.
//!
//! The connections stay in the channel through which they were sent, as messages that the kernel keeps; systemd's store
//! keeps its copy of the channel as well. This process cannot move them to another channel, because an unprivileged
//! process may send descriptors only while no more than `RLIMIT_NOFILE` descriptors of its user are in flight (unix(7),
//! ETOOMANYREFS).
//!
//! At short intervals (`takeover/adopter.rs`) the process receives the messages for which there is room by now, and
//! copies the others with `MSG_PEEK` (`SO_PEEK_OFF` of socket(7)), which returns duplicates of their descriptors. It
//! serves each connection that is readable or closed by its peer, and closes it after that response. So each of them is
//! answered soon, however long others stay idle, and none is closed without a response. WebSockets and responses without
//! end are closed in the same way at once, so that their clients reconnect. A linger channel among the messages is copied
//! too, because an old process sends its last connections through it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt;
use tracing::warn;

use super::channel::{self, Frame, Next, Peeked};
use super::{MessageType, STORE_NAME};
use crate::connection::Connection;
use crate::os::lock::lock;
use crate::os::rlimit::FdRoom;
use crate::os::systemd;

/// How many descriptors an adoption leaves free: for one message that is copied, for those of its connections that are
/// served, and for the files of handlers.
pub const WINDOW: usize = 96;

/// Which processes have a copy of a channel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ChannelLocation {
    /// systemd's store has a copy of it, so the connections in it survive this process.
    Store,
    /// Only this process has it.
    Process,
}

/// The channels that still hold connections, or whose writers still run.
#[derive(Default)]
pub struct Overflow(Mutex<State>);

enum State {
    Open(Vec<Waiting>),
    /// The next process has the channels. These are copies of the channels whose writers may still run. They only show
    /// whether a writer has exited, because this process must not exit before the writers do.
    HandedOver(Vec<OwnedFd>),
}

impl Default for State {
    fn default() -> Self {
        Self::Open(Vec::new())
    }
}

/// A channel that is kept.
struct Waiting {
    channel: OwnedFd,
    location: ChannelLocation,
    copies: Copies,
}

/// What is known about the frames in a channel from copies of them.
#[derive(Default)]
pub struct Copies {
    /// How many connections in them wait for descriptors.
    waiting: usize,
    /// How many frames of the type Lingering were copied. They are the first frames of this type in the channel.
    lingering: usize,
}

impl Copies {
    /// Whether `frame`, which this process has just received, was handled before as a copy, so that it must not be handled
    /// again. Call this once for each frame that is received, because it counts down the copied frames.
    pub fn had(&mut self, frame: &Frame) -> bool {
        let had = frame.message_type == MessageType::Lingering && self.lingering > 0;
        self.lingering -= usize::from(had);
        had
    }

    /// Copies the frames in `channel`. Calls `finish` with each connection that is readable or closed by its peer, and
    /// `adopt` with each frame of the type Lingering, but only once. `unpack` decodes the connections of a frame.
    pub fn serve(
        &mut self,
        channel: impl AsFd,
        room: &mut FdRoom,
        mut adopt: impl FnMut(Next),
        unpack: impl Fn(Frame) -> Vec<Connection>,
        mut finish: impl FnMut(Connection),
    ) {
        self.waiting = 0;
        let mut offset = 0;
        let mut lingering = 0;
        loop {
            match channel::peek_at(&channel, offset, room) {
                Ok(Peeked::Frame(frame, length)) if frame.message_type == MessageType::Lingering => {
                    offset += length;
                    // If an earlier one could not be copied, this one is adopted in a later rotation, because
                    // `self.lingering` counts only the first frames.
                    if lingering == self.lingering {
                        self.lingering += 1;
                        adopt(Next::Frame(frame));
                    }
                    lingering += 1;
                }
                Ok(Peeked::Frame(frame, length)) => {
                    offset += length;
                    for connection in unpack(frame) {
                        if is_claimed(&connection) {
                            continue;
                        }
                        if !is_ready(&connection) {
                            self.waiting += 1;
                        } else if claim(&connection).is_ok() {
                            finish(connection);
                        }
                    }
                }
                Ok(Peeked::Skipped { message_type, sockets, length }) => {
                    offset += length;
                    match message_type {
                        MessageType::Connections => self.waiting += sockets,
                        MessageType::Lingering => lingering += 1,
                        _ => {}
                    }
                }
                Ok(Peeked::End) | Err(_) => return,
            }
        }
    }
}

impl Overflow {
    /// Keeps a channel whose next message carries more descriptors than this process may open, or whose writer still runs.
    pub fn keep(&self, channel: OwnedFd, location: ChannelLocation) {
        let copies = Copies { waiting: count(&channel), lingering: 0 };
        let waiting = Waiting { channel, location, copies };
        match &mut *lock(&self.0) {
            State::Open(channels) => channels.push(waiting),
            // The drain has handed the other channels over already; the next process finds this one in the store.
            State::HandedOver(written) => {
                let mut waiting = [waiting];
                store(&mut waiting);
                written.extend(waiting.map(|waiting| waiting.channel));
            }
        }
    }

    /// Whether any channel is kept. It can be empty as long as its writer has not exited.
    pub fn has_channels(&self) -> bool {
        match &*lock(&self.0) {
            State::Open(channels) => !channels.is_empty(),
            State::HandedOver(_) => false,
        }
    }

    /// How many connections wait for descriptors.
    pub fn len(&self) -> usize {
        match &*lock(&self.0) {
            State::Open(channels) => channels.iter().map(|waiting| waiting.copies.waiting).sum(),
            State::HandedOver(_) => 0,
        }
    }

    /// Whether the writing ends of all channels are closed, so that no more connections arrive through them. Once the
    /// channels are handed over, the connections would arrive in the next process.
    pub fn is_complete(&self) -> bool {
        match &mut *lock(&self.0) {
            State::Open(channels) => channels.iter().all(|waiting| is_hung_up(&waiting.channel)),
            State::HandedOver(written) => {
                written.retain(|channel| !is_hung_up(channel));
                written.is_empty()
            }
        }
    }

    /// Stores the channels with systemd that only this process has, so that a restart or a crash does not close their
    /// connections.
    pub fn store(&self) {
        if let State::Open(channels) = &mut *lock(&self.0) {
            store(channels);
        }
    }

    /// Calls `adopt` with each frame for which there is room. Of the other frames, calls `finish` with each connection
    /// that is readable or closed by its peer, and `adopt` with each linger channel, but only once. `unpack` decodes the
    /// connections of a frame. Returns the number of channels that are not empty yet; such a channel can hold counters
    /// after connections that were all served. None once the channels are handed over.
    pub fn rotate(
        &self,
        room: &mut FdRoom,
        mut adopt: impl FnMut(Next),
        unpack: impl Fn(Frame) -> Vec<Connection>,
        mut finish: impl FnMut(Connection),
    ) -> Option<usize> {
        let mut state = lock(&self.0);
        let State::Open(channels) = &mut *state else { return None };
        channels.retain_mut(|waiting| {
            loop {
                match channel::receive_if_room(&waiting.channel, room, WINDOW) {
                    Ok(Next::NoRoom) => break,
                    // The channel is kept even if its writer has exited meanwhile, because the writer may have sent a last
                    // frame before it exited. The next rotation receives that frame, or the end.
                    Ok(Next::Pending) => {
                        waiting.copies.waiting = 0;
                        return true;
                    }
                    Ok(Next::End) | Err(_) => return false,
                    Ok(Next::Frame(frame)) if waiting.copies.had(&frame) => {}
                    Ok(next) => adopt(next),
                }
            }
            waiting.copies.serve(&waiting.channel, room, &mut adopt, &unpack, &mut finish);
            true
        });
        Some(channels.len())
    }

    /// Removes the channels of earlier processes from systemd's store, unless they still hold connections, or the drain
    /// has begun: it stores a channel under the same name, which this call would remove. A predecessor that drains can
    /// store one, too, so this must be called after its exit.
    pub fn clear_store(&self) {
        if let State::Open(channels) = &*lock(&self.0)
            && channels.is_empty()
        {
            systemd::unstore(STORE_NAME);
        }
    }

    /// Calls `store`, which stores a channel with systemd for the case of a crash, unless the drain has begun.
    pub fn store_beside(&self, store: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match &*lock(&self.0) {
            State::Open(_) => store(),
            State::HandedOver(_) => Ok(()),
        }
    }

    /// Stores the channels with systemd and returns them, so that they can be sent to a successor. From then on this
    /// process no longer serves the connections in them.
    pub fn hand_over(&self) -> Vec<OwnedFd> {
        let mut state = lock(&self.0);
        let State::Open(channels) = &mut *state else { return Vec::new() };
        store(channels);
        let channels: Vec<_> = std::mem::take(channels).into_iter().map(|waiting| waiting.channel).collect();
        let written = channels.iter().filter(|channel| !is_hung_up(channel));
        let copies = written.filter_map(|channel| match channel.try_clone() {
            Ok(copy) => Some(copy),
            Err(error) => {
                warn!(
                    %error,
                    "could not duplicate the channel of an old process, so this process may exit before the old process; raise LimitNOFILE="
                );
                None
            }
        });
        *state = State::HandedOver(copies.collect());
        channels
    }
}

fn store(channels: &mut [Waiting]) {
    for waiting in channels.iter_mut().filter(|waiting| waiting.location == ChannelLocation::Process) {
        match systemd::store(STORE_NAME, waiting.channel.as_fd()) {
            Ok(()) => waiting.location = ChannelLocation::Store,
            Err(error) => warn!(
                %error,
                connections = waiting.copies.waiting,
                "could not store {} connections that wait for file descriptors; a restart will close them",
                waiting.copies.waiting,
            ),
        }
    }
}

/// How many connections are in `channel`.
fn count(channel: &OwnedFd) -> usize {
    let mut offset = 0;
    let mut count = 0;
    while let Ok(Some((header, length))) = channel::peek_header_at(channel, offset) {
        offset += length;
        if header.message_type == MessageType::Connections {
            count += usize::from(header.sockets);
        }
    }
    count
}

/// Whether a connection has unread bytes, is readable, or is closed by its peer. One whose response has no end cannot wait:
/// its client sends nothing, and would receive nothing for as long as there are no descriptors.
fn is_ready(connection: &Connection) -> bool {
    connection.has_endless_response()
        || !connection.unread.is_empty()
        || polls(connection.socket.as_fd(), PollFlags::IN | PollFlags::RDHUP)
}

/// An error counts as the end, because nothing could be read after it.
fn is_hung_up(channel: &OwnedFd) -> bool {
    channel::is_hung_up(channel).unwrap_or(true)
}

/// Whether poll(2) reports one of `flags` on `socket`, or a hang-up or an error.
fn polls(socket: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(socket, flags)];
    // If poll(2) fails, the caller uses the socket, and the error shows there.
    let polled = retry_on_intr(|| poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })));
    polled.map_or(true, |count| count > 0)
}

/// Marks a connection that is served while a channel still has a descriptor of it, so that neither this process nor the
/// next one serves it a second time. The mark is SO_BROADCAST, because all duplicates of a descriptor share a socket
/// option, and this one has no effect on stream sockets.
fn claim(connection: &Connection) -> io::Result<()> {
    Ok(sockopt::set_socket_broadcast(&connection.socket, true)?)
}

/// Whether another descriptor of this connection is or was served.
pub fn is_claimed(connection: &Connection) -> bool {
    sockopt::socket_broadcast(&connection.socket).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;

    use axum::Router;
    use bytes::Bytes;

    use super::super::{Origin, SocketRecord, pack};
    use super::*;
    use crate::connection::tests::endpoint;
    use crate::transport::replay::Replay;

    /// How often a writer exits during a rotation. With fewer, a frame might never arrive at the critical moment.
    const EXITS: u32 = 4000;

    /// A channel with one frame of `count` connections, and the clients' ends of these.
    fn channel_of(count: usize) -> (OwnedFd, Vec<UnixStream>) {
        channel_with(count, None)
    }

    /// As [`channel_of`]. `replay`: the request of each connection, if its response has no end.
    fn channel_with(count: usize, replay: Option<&Replay>) -> (OwnedFd, Vec<UnixStream>) {
        let (_, read, clients) = open_channel_of(count, replay);
        (read, clients)
    }

    /// As [`channel_with`], with the end of the writer.
    fn open_channel_of(count: usize, replay: Option<&Replay>) -> (OwnedFd, OwnedFd, Vec<UnixStream>) {
        let (write, read) = channel::pair().expect("could not create a socket pair");
        let (clients, connections): (Vec<_>, Vec<_>) = (0..count)
            .map(|_| {
                let (client, server) = UnixStream::pair().expect("could not create a socket pair");
                let connection = Connection {
                    replay: replay.cloned().map(Box::new),
                    ..Connection::begun(server.into(), endpoint(Router::new(), None))
                };
                (client, connection)
            })
            .unzip();
        let (sent, error) =
            channel::send(&write, MessageType::Connections, Origin::now(1), &pack(&connections), "");
        assert_eq!((sent, error.map(|error| error.to_string())), (count, None));
        (write, read, clients)
    }

    fn unpack(frame: Frame) -> Vec<Connection> {
        let endpoints = [endpoint(Router::new(), None)];
        let unpacked =
            frame.sockets.into_iter().map(|(fd, record)| super::super::unpack(fd, record, &endpoints));
        unpacked.map(|connection| connection.expect("could not unpack")).collect()
    }

    /// One rotation: returns the adopted connections, the finished ones, and how many wait, which is None once the
    /// channels are handed over.
    fn rotate_once(
        overflow: &Overflow,
        room: fn() -> usize,
    ) -> (Vec<Connection>, Vec<Connection>, Option<usize>) {
        let (mut adopted, mut finished) = (Vec::new(), Vec::new());
        let adopt = |next| match next {
            Next::Frame(frame) => adopted.extend(unpack(frame)),
            _ => panic!("expected a frame"),
        };
        let waiting = overflow.rotate(&mut FdRoom::counted_by(room), adopt, unpack, |connection| {
            finished.push(connection);
        });
        (adopted, finished, waiting.map(|_| overflow.len()))
    }

    /// Enough descriptors to copy a frame of three connections, and too few to adopt it.
    const LITTLE: fn() -> usize = || 30;
    const NONE: fn() -> usize = || 0;
    const ENOUGH: fn() -> usize = || 1000;

    #[test]
    fn waiting_connections_are_finished_once_when_their_peers_send_or_close() {
        let (channel, mut clients) = channel_of(3);
        let overflow = Overflow::default();
        overflow.keep(channel, ChannelLocation::Store);
        assert_eq!(overflow.len(), 3);
        let (adopted, finished, waiting) = rotate_once(&overflow, LITTLE);
        assert_eq!((adopted.len(), finished.len(), waiting), (0, 0, Some(3)));
        clients[1].write_all(b"GET").expect("could not send");
        let (_, finished, waiting) = rotate_once(&overflow, LITTLE);
        assert_eq!((finished.len(), waiting), (1, Some(2)));
        let (_, again, waiting) = rotate_once(&overflow, LITTLE);
        assert_eq!((again.len(), waiting), (0, Some(2)), "a connection was finished twice");
        drop(clients.remove(0));
        let (_, finished, waiting) = rotate_once(&overflow, LITTLE);
        assert_eq!((finished.len(), waiting), (1, Some(1)));
    }

    #[test]
    fn connections_whose_response_has_no_end_do_not_wait() {
        let head = Bytes::from_static(b"GET / HTTP/1.1\r\n\r\n");
        let replay = Replay { head, agreement: Bytes::new(), state: Bytes::new() };
        let (channel, _clients) = channel_with(3, Some(&replay));
        let overflow = Overflow::default();
        overflow.keep(channel, ChannelLocation::Store);
        let (adopted, finished, waiting) = rotate_once(&overflow, LITTLE);
        assert_eq!((adopted.len(), finished.len(), waiting), (0, 3, Some(0)));
    }

    #[test]
    fn waiting_connections_are_adopted_when_there_is_room_and_finished_ones_are_marked() {
        let (channel, mut clients) = channel_of(3);
        let overflow = Overflow::default();
        overflow.keep(channel, ChannelLocation::Store);
        clients[2].write_all(b"GET").expect("could not send");
        assert_eq!(rotate_once(&overflow, LITTLE).1.len(), 1);
        let (adopted, finished, waiting) = rotate_once(&overflow, ENOUGH);
        assert_eq!((finished.len(), waiting), (0, Some(0)));
        assert_eq!(adopted.iter().map(is_claimed).collect::<Vec<_>>(), [false, false, true]);
    }

    /// The writer sends its last connection and exits at any moment of a rotation.
    #[test]
    fn last_frame_before_the_exit_of_the_writer_is_adopted() {
        for round in 0..EXITS {
            let overflow = Overflow::default();
            let (write, read) = channel::pair().expect("could not create a socket pair");
            overflow.keep(read, ChannelLocation::Process);
            let (frame, _clients) = channel_of(1);
            let Ok(Next::Frame(frame)) = channel::receive(&frame) else { panic!("expected a frame") };
            let begin = Barrier::new(2);
            let mut adopted = 0;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    let (sent, _) =
                        channel::send(&write, MessageType::Connections, Origin::now(1), &frame.sockets, "");
                    assert_eq!(sent, 1);
                    drop(write);
                });
                begin.wait();
                while overflow.has_channels() {
                    adopted += rotate_once(&overflow, ENOUGH).0.len();
                    // If both threads run on one processor, the writer would wait for the end of a time slice.
                    std::thread::yield_now();
                }
            });
            assert_eq!(adopted, 1, "lost a connection in round {round}");
        }
    }

    #[test]
    fn connections_that_cannot_be_copied_stay_in_the_channel() {
        let (channel, mut clients) = channel_of(3);
        let overflow = Overflow::default();
        overflow.keep(channel, ChannelLocation::Store);
        clients[0].write_all(b"GET").expect("could not send");
        let (adopted, finished, waiting) = rotate_once(&overflow, NONE);
        assert_eq!((adopted.len(), finished.len(), waiting), (0, 0, Some(3)));
        let [channel] = <[OwnedFd; 1]>::try_from(overflow.hand_over()).expect("expected one channel");
        assert_eq!(count(&channel), 3);
        assert_eq!(rotate_once(&overflow, ENOUGH).2, None, "rotated channels that were handed over");
    }

    /// systemd sends SIGTERM to an old process a second time when the process that serves has exited.
    #[test]
    fn channels_that_were_handed_over_are_complete_when_their_writers_have_exited() {
        let overflow = Overflow::default();
        let (before, read) = channel::pair().expect("could not create a socket pair");
        overflow.keep(read, ChannelLocation::Process);
        drop(overflow.hand_over());
        assert!(!overflow.is_complete(), "did not wait for a channel that was kept before");
        let (after, read) = channel::pair().expect("could not create a socket pair");
        overflow.keep(read, ChannelLocation::Process);
        drop(before);
        assert!(!overflow.is_complete(), "did not wait for a channel that was kept after");
        drop(after);
        assert!(overflow.is_complete());
    }

    /// Sends the other end of a linger channel. `responses` is the text by which the test recognizes it.
    fn send_linger_channel(write: &OwnedFd, responses: &str) {
        let (_, other_end) = channel::pair().expect("could not create a socket pair");
        let record = SocketRecord::new("linger".to_owned(), Bytes::new());
        let sockets = [(other_end, record)];
        let (sent, _) = channel::send(write, MessageType::Lingering, Origin::now(1), &sockets, responses);
        assert_eq!(sent, 1);
    }

    #[test]
    fn linger_channels_behind_waiting_connections_are_copied_once() {
        let overflow = Overflow::default();
        let (write, read, _clients) = open_channel_of(3, None);
        send_linger_channel(&write, "1");
        send_linger_channel(&write, "2");
        overflow.keep(read, ChannelLocation::Process);
        let rotate = |room| {
            let mut lingering = Vec::new();
            let adopt = |next| match next {
                Next::Frame(frame) if frame.message_type == MessageType::Lingering => {
                    lingering.push(frame.text);
                }
                _ => {}
            };
            overflow.rotate(&mut FdRoom::counted_by(room), adopt, unpack, |_| ());
            lingering
        };
        assert_eq!(rotate(NONE), [""; 0]);
        assert_eq!(rotate(LITTLE), ["1", "2"]);
        assert_eq!(rotate(LITTLE), [""; 0], "copied a linger channel twice");
        send_linger_channel(&write, "3");
        assert_eq!(rotate(LITTLE), ["3"]);
        send_linger_channel(&write, "4");
        assert_eq!(rotate(ENOUGH), ["4"], "received a linger channel that was copied before");
        send_linger_channel(&write, "5");
        assert_eq!(rotate(ENOUGH), ["5"]);
    }
}
