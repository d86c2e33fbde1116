//! The handover channel: sends frames through a `SOCK_SEQPACKET` Unix socket, and receives them.
//!
//! Each frame (`frame.rs`) is one message; its descriptors and the memfd with its records are ancillary data
//! (`SCM_RIGHTS` of unix(7)). The free functions never wait, because at a restart the channel is in systemd's store and
//! there is no reader; [`Channel`] waits, for a reload.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};
use tracing::debug;
use zeroize::Zeroizing;

use super::Origin;
use super::frame::{FIRST_VERSION, FrameError, HEADER_LENGTH, Header, TEXT_LIMIT};
pub use super::frame::{MAX_SOCKETS, MessageType, Secret, SocketRecord};
use crate::os::rlimit::{self, FdRoom};
use crate::os::sys;

/// The maximum size of the records of one frame, in bytes: 252 connections with 2 MiB each. A larger memfd is refused,
/// so that a broken sender cannot make this process allocate any amount of memory.
const RECORDS_LIMIT: u64 = 252 << 21;

/// How many connections one frame carries at least, if there are so many. Smaller frames would need more kernel memory
/// for each connection.
pub const SMALL_FRAME: usize = 32;
/// How many frames with connections the socket's buffer holds, with room for the frames that follow them.
const FRAMES_IN_CHANNEL: usize = 200;

/// How long [`Channel::send`] tries again if file descriptors or memory run short. In a reload, no process serves the
/// connections of the frame meanwhile. A busy successor needs up to this time to receive the descriptors that are already in
/// the channel.
const SHORTAGE_LIMIT: Duration = Duration::from_secs(5);
/// The pause between two of these attempts. It is short, because the shortage usually ends when the other process receives
/// the next frame.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(5);

/// Whether a frame could not be sent because file descriptors or memory have run short: this passes when other descriptors are
/// received or closed. ETOOMANYREFS: too many descriptors of this user are in flight (unix(7)).
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::TOOMANYREFS, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| shortages.contains(&errno))
}

/// A frame that was received.
pub struct Frame {
    pub message_type: MessageType,
    pub origin: Origin,
    pub sockets: Vec<(OwnedFd, SocketRecord)>,
    /// The reason for each connection of the frame that was closed instead.
    pub refused: Vec<String>,
    pub text: String,
}

/// The result of receiving from a channel.
pub enum Next {
    Frame(Frame),
    /// An invalid message: how many connections came with it, which are closed, and what is wrong with it.
    Refused(usize, String),
    /// The next frame carries more sockets than this process may open; it stays in the channel.
    NoRoom,
    /// The channel is empty, and its other end is open.
    Pending,
    /// The channel is empty, and its other end is closed.
    End,
}

/// Creates the two ends of a channel, which are alike.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Whether no process has the other end of a channel open.
pub(super) fn is_hung_up(channel: &OwnedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(channel, PollFlags::empty())];
    retry_on_intr(|| poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))?;
    Ok(polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// Sends as many of `sockets` as fit, in frames of `message_type`; never waits. Returns how many were sent, and the
/// error that prevented the others: `WouldBlock` if the channel is full, or ETOOMANYREFS if too many descriptors of
/// this user are in flight (unix(7)).
pub fn send<S: AsFd>(
    channel: impl AsFd,
    message_type: MessageType,
    origin: Origin,
    sockets: &[(S, SocketRecord)],
    text: &str,
) -> (usize, Option<io::Error>) {
    let length =
        if message_type == MessageType::Connections { frame_length(sockets.len()) } else { MAX_SOCKETS };
    // A message without sockets is one frame, too.
    let frames = sockets.chunks(length).chain(sockets.is_empty().then_some(&[][..]));
    let mut sent = 0;
    for frame in frames {
        if let Err(error) = send_frame(channel.as_fd(), message_type, origin, frame, text) {
            return (sent, Some(error));
        }
        sent += frame.len();
    }
    (sent, None)
}

/// How many of `count` connections travel in one frame. A process with few free descriptors adopts connections by whole
/// frames, so frames are small; but the socket's buffer holds only some 230 messages, so many connections need large
/// ones.
fn frame_length(count: usize) -> usize {
    count.div_ceil(FRAMES_IN_CHANNEL).clamp(SMALL_FRAME, MAX_SOCKETS)
}

fn send_frame<S: AsFd>(
    channel: BorrowedFd<'_>,
    message_type: MessageType,
    origin: Origin,
    sockets: &[(S, SocketRecord)],
    text: &str,
) -> io::Result<()> {
    let count = u16::try_from(sockets.len()).map_err(io::Error::other)?;
    let version = sockets.iter().map(|(_, record)| record.version()).max().unwrap_or(FIRST_VERSION);
    let header = Header { version, message_type, sockets: count, origin, text: text.to_owned() }.encode();
    let records = if sockets.is_empty() { None } else { Some(write_records(version, sockets)?) };
    let mut fds: Vec<BorrowedFd<'_>> = records.iter().map(AsFd::as_fd).collect();
    fds.extend(sockets.iter().map(|(socket, _)| socket.as_fd()));
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS + 1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(channel, &[IoSlice::new(&header)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

fn write_records<S>(version: u16, sockets: &[(S, SocketRecord)]) -> io::Result<File> {
    // The records may contain TLS keys. The buffer has its whole length from the beginning, because a vector that grows
    // leaves copies of them in freed memory that are not wiped.
    let length = sockets.iter().map(|(_, record)| record.length()).sum();
    let mut bytes = Zeroizing::new(Vec::with_capacity(length));
    for (_, record) in sockets {
        record.encode(version, &mut bytes).map_err(io::Error::other)?;
    }
    let mut file = File::from(memfd_create("records", MemfdFlags::CLOEXEC)?);
    file.write_all(&bytes)?;
    Ok(file)
}

/// The sender of the next frame; the frame stays in the channel.
pub(super) fn peek(channel: &OwnedFd) -> Option<Origin> {
    peek_header(channel).map(|header| header.origin)
}

/// The header of the next frame. The frame stays in the channel, and its descriptors are not copied, because recv(2)
/// has no buffer for them.
fn peek_header(channel: impl AsFd) -> Option<Header> {
    let mut bytes = [0; HEADER_LENGTH + TEXT_LIMIT];
    let peeked = past_reset(|| recv(&channel, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT));
    let (length, _) = peeked.ok()?;
    Header::decode(&bytes[..length]).ok()
}

/// The header and the length of the frame that begins `offset` bytes after the start of the next one. None after the
/// last frame, and at a message that is not a frame.
pub(super) fn peek_header_at(channel: impl AsFd, offset: usize) -> io::Result<Option<(Header, usize)>> {
    let mut bytes = [0; HEADER_LENGTH + TEXT_LIMIT];
    let peeked = with_peek_offset(&channel, offset, || {
        past_reset(|| recv(&channel, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT))
    });
    Ok(match peeked? {
        Ok((length, _)) => Header::decode(&bytes[..length]).ok().map(|header| (header, length)),
        Err(_) => None,
    })
}

/// Calls `receive` again if it fails because the other process has exited without reading a message of this one, such as
/// `Stop`. The kernel reports this once, and then returns what that process had sent before.
fn past_reset<T>(mut receive: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    match receive() {
        Err(Errno::CONNRESET) => receive(),
        result => result,
    }
}

/// Calls `peek`, whose `MSG_PEEK` begins `offset` bytes after the start of the next message.
fn with_peek_offset<T>(channel: impl AsFd, offset: usize, peek: impl FnOnce() -> T) -> io::Result<T> {
    sys::set_peek_offset(&channel, Some(offset))?;
    let peeked = peek();
    // The kernel advances the offset, so the next `MSG_PEEK` would begin where this one ended.
    sys::set_peek_offset(&channel, None)?;
    Ok(peeked)
}

/// The result of [`peek_at`].
pub(super) enum Peeked {
    /// A frame with copies of its descriptors, and its length in bytes.
    Frame(Frame, usize),
    /// A frame that was not copied, because there is no room for its sockets, it could not be decoded, or it carries neither
    /// connections nor a linger channel.
    Skipped { message_type: MessageType, sockets: usize, length: usize },
    /// There is no frame at the offset.
    End,
}

/// How many descriptors stay free for handlers while connections of a copied frame are served, each of which needs two
/// descriptors.
const ROOM_OF_HANDLERS: usize = 16;

/// Copies the frame that begins `offset` bytes after the start of the next one, if this process may open copies of its
/// descriptors. The frame stays in the channel.
pub(super) fn peek_at(channel: impl AsFd, offset: usize, room: &mut FdRoom) -> io::Result<Peeked> {
    let Some((header, length)) = peek_header_at(&channel, offset)? else { return Ok(Peeked::End) };
    let (message_type, sockets) = (header.message_type, usize::from(header.sockets));
    let skipped = Peeked::Skipped { message_type, sockets, length };
    if !matches!(message_type, MessageType::Connections | MessageType::Lingering)
        || !room.fits(2 * sockets + ROOM_OF_HANDLERS)
    {
        return Ok(skipped);
    }
    match with_peek_offset(&channel, offset, || receive_with(&channel, RecvFlags::PEEK))?? {
        Next::Frame(frame) => Ok(Peeked::Frame(frame, length)),
        _ => Ok(skipped),
    }
}

/// Receives the next frame if its descriptors fit and leave `reserve` free; never waits. Otherwise the frame stays in
/// the channel, because the kernel would close the descriptors that do not fit, without a response to their peers. A
/// frame that could not fit even into a process without connections is received nevertheless, because it would stay in
/// the channel for ever.
pub fn receive_if_room(channel: impl AsFd, room: &mut FdRoom, reserve: usize) -> io::Result<Next> {
    let sockets = peek_header(&channel).map_or(0, |header| usize::from(header.sockets));
    // One more, for the memfd with the records.
    if sockets == 0 || room.take(sockets + 1, reserve) || !rlimit::could_fit(sockets + 1) {
        receive(channel)
    } else {
        Ok(Next::NoRoom)
    }
}

/// Receives the next frame; never waits.
pub fn receive(channel: impl AsFd) -> io::Result<Next> {
    receive_again_at_end(|| receive_with(&channel, RecvFlags::empty()))
}

/// Calls `receive` once more if it returns `Next::End`. recvmsg(2) first looks for a message, and then checks whether the
/// other process has closed its socket. A frame that the other process sends just before it exits may arrive between these
/// steps: recvmsg(2) then reports the end of the channel although a frame is in it, and its connections would be closed.
fn receive_again_at_end(mut receive: impl FnMut() -> io::Result<Next>) -> io::Result<Next> {
    match receive()? {
        Next::End => receive(),
        next => Ok(next),
    }
}

fn receive_with(channel: impl AsFd, flags: RecvFlags) -> io::Result<Next> {
    // One byte more than the longest frame, so that a longer message is refused and not truncated.
    let mut bytes = [0; HEADER_LENGTH + TEXT_LIMIT + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        let received =
            past_reset(|| recvmsg(&channel, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags));
        match received {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Next::Pending),
            result => break result?,
        }
    };
    let fds: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if message.bytes == 0 && fds.is_empty() {
        return Ok(Next::End);
    }
    let sockets = fds.len().saturating_sub(1);
    Ok(match read_frame(&bytes[..message.bytes], fds) {
        Ok(frame) => Next::Frame(frame),
        Err(error) => Next::Refused(sockets, error.to_string()),
    })
}

fn read_frame(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Frame, FrameError> {
    let Header { version, message_type, sockets, origin, text } = Header::decode(bytes)?;
    let expected = match usize::from(sockets) {
        0 => 0,
        sockets => sockets + 1,
    };
    if fds.is_empty() && expected > 0 || fds.len() > expected {
        return Err(FrameError::Descriptors { received: fds.len(), expected });
    }
    let missing = expected - fds.len();
    let mut fds = fds.into_iter();
    let records = match fds.next() {
        Some(file) => read_records(&file.into()).map_err(|error| FrameError::Records(error.kind()))?,
        None => Zeroizing::default(),
    };
    let mut records = &records[..];
    let mut frame =
        Frame { message_type, origin, sockets: Vec::with_capacity(fds.len()), refused: Vec::new(), text };
    for fd in fds {
        match SocketRecord::decode(version, &mut records) {
            Ok(record) => frame.sockets.push((fd, record)),
            Err(error @ FrameError::UnsupportedProtocols(_)) => frame.refused.push(error.to_string()),
            Err(error) => return Err(error),
        }
    }
    // The kernel has closed the descriptors that exceed the limit of this process, which are the last ones.
    frame.refused.extend((0..missing).map(|_| "out of file descriptors: raise LimitNOFILE=".to_owned()));
    Ok(frame)
}

fn read_records(file: &File) -> io::Result<Zeroizing<Vec<u8>>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > RECORDS_LIMIT {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(metadata.len()).map_err(io::Error::other)?]);
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A channel to a running process, for asynchronous code. tokio has no type for `SOCK_SEQPACKET` sockets; a
/// [`UnixStream`] serves here because it is used only to wait for readiness.
pub struct Channel(UnixStream);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(UnixStream::from_std(fd.into())?))
    }

    /// Waits for the next frame. None if the other end is closed and the channel is empty. An invalid message is an
    /// error.
    pub async fn receive(&self) -> io::Result<Option<Frame>> {
        loop {
            self.0.readable().await?;
            let next = self.0.try_io(Interest::READABLE, || match receive(&self.0)? {
                Next::Pending => Err(io::ErrorKind::WouldBlock.into()),
                next => Ok(next),
            });
            match next {
                Ok(Next::Frame(frame)) => return Ok(Some(frame)),
                Ok(Next::Refused(_, reason)) => return Err(io::Error::other(reason)),
                Ok(Next::End) => return Ok(None),
                Ok(Next::Pending | Next::NoRoom) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until there is a frame to receive, or the other end is closed.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// As the function [`receive_if_room`]. [`Next::Pending`] if there is nothing to receive, although
    /// [`Channel::readable`] has returned.
    pub fn receive_if_room(&self, room: &mut FdRoom, reserve: usize) -> io::Result<Next> {
        let next = self.0.try_io(Interest::READABLE, || match receive_if_room(&self.0, room, reserve)? {
            Next::Pending => Err(io::ErrorKind::WouldBlock.into()),
            next => Ok(next),
        });
        match next {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Next::Pending),
            next => next,
        }
    }

    /// Returns the socket, which the runtime no longer watches.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        Ok(self.0.into_std()?.into())
    }

    /// Sends all of `sockets`. While the channel is full, waits without a limit until the other process reads. While file
    /// descriptors or memory run short, tries again for at most [`SHORTAGE_LIMIT`].
    pub async fn send<S: AsFd>(
        &self,
        message_type: MessageType,
        origin: Origin,
        mut sockets: &[(S, SocketRecord)],
        text: &str,
    ) -> io::Result<()> {
        self.send_from(message_type, origin, &mut sockets, text).await
    }

    /// As [`Channel::send`]. Removes from `unsent` what it has sent, so that the caller knows after an error or a timeout
    /// which sockets the other process does not receive.
    pub async fn send_from<S: AsFd>(
        &self,
        message_type: MessageType,
        origin: Origin,
        unsent: &mut &[(S, SocketRecord)],
        text: &str,
    ) -> io::Result<()> {
        self.retry(|| {
            let (sent, error) = send(&self.0, message_type, origin, unsent, text);
            *unsent = &unsent[sent..];
            (sent, error)
        })
        .await
    }

    /// Calls `attempt`, which returns how many sockets it has sent and what prevented the others, until it has sent all.
    async fn retry(&self, mut attempt: impl FnMut() -> (usize, Option<io::Error>)) -> io::Result<()> {
        // Since when file descriptors or memory run short.
        let mut short_since = None;
        loop {
            self.0.writable().await?;
            let result = self.0.try_io(Interest::WRITABLE, || {
                let (sent, error) = attempt();
                if sent > 0 {
                    short_since = None;
                }
                error.map_or(Ok(()), Err)
            });
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => short_since = None,
                Err(error) if is_shortage(&error) => {
                    let since = *short_since.get_or_insert_with(|| {
                        debug!(%error, "could not send through the handover channel; retrying");
                        Instant::now()
                    });
                    if since.elapsed() >= SHORTAGE_LIMIT {
                        return Err(error);
                    }
                    sleep(SHORTAGE_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    /// Sends a message without sockets.
    pub async fn send_text(&self, message_type: MessageType, origin: Origin, text: &str) -> io::Result<()> {
        self.send::<OwnedFd>(message_type, origin, &[], text).await
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Descriptors of `/dev/null`, with numbers as the names of their listeners.
    fn sockets(count: usize) -> Vec<(File, SocketRecord)> {
        let null = File::open("/dev/null").expect("could not open /dev/null");
        let record = |number: usize| SocketRecord::new(number.to_string(), Bytes::new());
        (0..count)
            .map(|number| (null.try_clone().expect("could not duplicate /dev/null"), record(number)))
            .collect()
    }

    #[test]
    fn sending_to_a_full_channel_returns_how_many_sockets_were_sent() {
        let (write, read) = pair().expect("could not create a socket pair");
        rustix::net::sockopt::set_socket_send_buffer_size(&write, 1).expect("could not set SO_SNDBUF");
        let origin = Origin::now(1);
        let all = sockets(900);
        // Even the smallest buffer holds a few messages.
        let mut fitted = 0;
        let error = loop {
            match send(&write, MessageType::Connections, origin, &all, "") {
                (sent, None) => fitted += sent,
                (sent, Some(error)) => break (fitted += sent, error).1,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut received = 0;
        while let Next::Frame(frame) = receive(&read).expect("could not receive") {
            received += frame.sockets.len();
        }
        assert_eq!(received, fitted);
    }

    /// A channel, and its other end.
    fn channel() -> (Channel, OwnedFd) {
        let (ours, theirs) = pair().expect("could not create a socket pair");
        (Channel::new(ours).expect("could not watch the socket"), theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn send_is_retried_when_files_or_memory_run_short_for_a_moment() {
        let (channel, _theirs) = channel();
        for errno in [Errno::TOOMANYREFS, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
            let mut failures = 3;
            let sent = channel.retry(|| {
                if failures == 0 {
                    return (1, None);
                }
                failures -= 1;
                (0, Some(errno.into()))
            });
            sent.await.unwrap_or_else(|error| panic!("{errno}: gave up: {error}"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn shortage_that_lasts_is_an_error_unless_some_frames_are_sent_meanwhile() {
        let (channel, _theirs) = channel();
        let begun = Instant::now();
        let error = channel.retry(|| (0, Some(Errno::MFILE.into()))).await.expect_err("no frame was sent");
        assert_eq!(Errno::from_io_error(&error), Some(Errno::MFILE));
        assert!(begun.elapsed() >= SHORTAGE_LIMIT && begun.elapsed() < SHORTAGE_LIMIT * 2);
        let mut calls = 0;
        let attempts = SHORTAGE_LIMIT.as_millis() / SHORTAGE_PAUSE.as_millis() * 3;
        let sent = channel.retry(|| {
            calls += 1;
            if calls > attempts {
                (1, None)
            } else {
                (usize::from(calls % 100 == 0), Some(Errno::MFILE.into()))
            }
        });
        sent.await.expect("each frame was sent in time");
    }

    #[tokio::test(start_paused = true)]
    async fn exit_of_the_other_process_is_an_error_at_once() {
        let (channel, theirs) = channel();
        drop(theirs);
        let begun = Instant::now();
        let sent = channel.send(MessageType::Connections, Origin::now(1), &sockets(1), "").await;
        assert_eq!(sent.expect_err("nothing was sent").kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test]
    async fn sending_that_is_cancelled_leaves_the_sockets_that_were_not_sent() {
        let (channel, theirs) = channel();
        rustix::net::sockopt::set_socket_send_buffer_size(&channel.0, 1).expect("could not set SO_SNDBUF");
        let all = sockets(900);
        let mut unsent = &all[..];
        channel.0.writable().await.expect("the socket is watched");
        tokio::select! {
            biased;
            sent = channel.send_from(MessageType::Connections, Origin::now(1), &mut unsent, "") => {
                panic!("the channel holds too many frames: {sent:?}")
            }
            // It has filled the channel when it waits for the first time.
            () = std::future::ready(()) => {}
        }
        let mut received = 0;
        while let Next::Frame(frame) = receive(&theirs).expect("could not receive") {
            received += frame.sockets.len();
        }
        assert!(received > 0);
        assert_eq!(unsent.len(), all.len() - received);
    }

    #[test]
    fn frame_that_arrives_while_the_end_is_reported_is_received() {
        let (write, read) = pair().expect("could not create a socket pair");
        let mut write = Some(write);
        let mut receive = || {
            let next = receive_with(&read, RecvFlags::empty())?;
            let Some(write) = write.take() else { return Ok(next) };
            // As recvmsg(2), which has found no message when the other process sends its last one and exits.
            assert!(matches!(next, Next::Pending), "received a message before one was sent");
            let (sent, _) = send(write, MessageType::Connections, Origin::now(1), &sockets(1), "");
            assert_eq!(sent, 1);
            Ok(Next::End)
        };
        let next = receive_again_at_end(&mut receive).expect("could not receive");
        assert!(matches!(next, Next::Frame(frame) if frame.sockets.len() == 1), "the last frame was dropped");
        let next = receive_again_at_end(receive).expect("could not receive");
        assert!(matches!(next, Next::End), "expected the end");
    }

    #[test]
    fn frames_of_a_process_that_exited_with_unread_messages_are_received_if_there_is_room() {
        let exited = || {
            let (ours, theirs) = pair().expect("could not create a socket pair");
            let (sent, _) = send(&ours, MessageType::Connections, Origin::now(1), &sockets(2), "");
            assert_eq!(sent, 2);
            let (_, error) = send::<OwnedFd>(&theirs, MessageType::Stop, Origin::now(2), &[], "");
            assert_eq!(error.map(|error| error.to_string()), None);
            theirs
        };
        let next = receive(exited()).expect("could not receive");
        assert!(matches!(next, Next::Frame(frame) if frame.sockets.len() == 2), "expected a frame");
        let mut no_room = FdRoom::counted_by(|| 0);
        let next = receive_if_room(exited(), &mut no_room, 0).expect("could not receive");
        assert!(matches!(next, Next::NoRoom), "received a frame without room");
        let (header, _) = peek_header_at(exited(), 0).expect("could not peek").expect("expected a frame");
        assert_eq!(header.sockets, 2);
    }

    #[test]
    fn frames_are_small_unless_the_channel_could_not_hold_so_many() {
        assert_eq!(frame_length(1), SMALL_FRAME);
        assert_eq!(frame_length(SMALL_FRAME * FRAMES_IN_CHANNEL), SMALL_FRAME);
        for count in [7_000_usize, 20_000, 50_000] {
            assert!(count.div_ceil(frame_length(count)) <= FRAMES_IN_CHANNEL, "{count}");
        }
        assert_eq!(frame_length(1_000_000), MAX_SOCKETS);
    }

    #[test]
    fn connections_whose_descriptors_the_kernel_closed_are_refused_and_the_others_received() {
        let (write, read) = pair().expect("could not create a socket pair");
        send(&write, MessageType::Connections, Origin::now(1), &sockets(20), "");
        let mut bytes = [0; HEADER_LENGTH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&read, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags).expect("could not receive");
        let fds = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let frame = read_frame(&bytes, fds.collect()).expect("could not read the frame");
        assert!(!frame.sockets.is_empty() && !frame.refused.is_empty());
        assert_eq!(frame.sockets.len() + frame.refused.len(), 20);
        assert!(read_frame(&bytes, Vec::new()).is_err(), "accepted a frame without its records");
    }

    #[test]
    fn a_thousand_sockets_are_received_in_order_with_their_records() {
        let (write, read) = pair().expect("could not create a socket pair");
        assert_eq!(send(&write, MessageType::Connections, Origin::now(1), &sockets(1000), "").0, 1000);
        drop(write);
        let mut names = Vec::new();
        loop {
            match receive(&read).expect("could not receive") {
                Next::Frame(frame) => {
                    names.extend(frame.sockets.into_iter().map(|(_, record)| record.listener));
                }
                Next::End => break,
                _ => panic!("expected a frame or the end"),
            }
        }
        assert_eq!(names, (0..1000).map(|number| number.to_string()).collect::<Vec<_>>());
    }
}
