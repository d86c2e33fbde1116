//! Frames onto a `SOCK_SEQPACKET` socket, and off it. Neither ever waits.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};

use super::Sender;
use super::frame::{HEADER_LENGTH, Header, MAX_CONNECTIONS, Record};
use crate::connection::Connection;

/// The records of one frame: 252 connections with 1 MiB unread each.
const RECORDS_LIMIT: u64 = 252 << 20;

/// A frame read.
pub(super) struct Frame {
    pub(super) sender: Sender,
    pub(super) connections: Vec<(OwnedFd, Record)>,
}

/// A frame that makes no sense.
pub(super) struct Refusal {
    /// The fds that came with it.
    pub(super) connections: usize,
    pub(super) reason: String,
}

/// The two ends of a channel: the one to write to, and the one to read from.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends all that fits; gives the number of connections sent, and why there are no more of them (the
/// channel or the process's limit of fds is full).
pub(super) fn send(
    channel: &OwnedFd,
    sender: Sender,
    connections: &[Connection],
) -> (usize, Option<io::Error>) {
    // At least one frame, so that the next process learns its generation.
    let frames = connections.chunks(MAX_CONNECTIONS).chain(connections.is_empty().then_some(&[][..]));
    let mut sent = 0;
    for frame in frames {
        if let Err(error) = send_frame(channel.as_fd(), sender, frame) {
            return (sent, Some(error));
        }
        sent += frame.len();
    }
    (sent, None)
}

fn send_frame(channel: BorrowedFd<'_>, sender: Sender, connections: &[Connection]) -> io::Result<()> {
    let count = u16::try_from(connections.len()).map_err(io::Error::other)?;
    let header = Header { connections: count, sender }.encode();
    let records = if connections.is_empty() { None } else { Some(write_records(connections)?) };
    let mut fds: Vec<BorrowedFd<'_>> = records.iter().map(AsFd::as_fd).collect();
    fds.extend(connections.iter().map(|connection| connection.stream.as_fd()));
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_CONNECTIONS + 1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(channel, &[IoSlice::new(&header)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

fn write_records(connections: &[Connection]) -> io::Result<File> {
    let mut bytes = Vec::new();
    for connection in connections {
        let Connection { listener, unread, .. } = connection;
        let record = Record { listener: listener.to_string(), unread: unread.clone() };
        record.encode(&mut bytes).map_err(io::Error::other)?;
    }
    let mut file = File::from(memfd_create("connections", MemfdFlags::CLOEXEC)?);
    file.write_all(&bytes)?;
    Ok(file)
}

/// What the next frame says of its sender; the frame stays.
pub(super) fn peek(channel: &OwnedFd) -> Option<Sender> {
    let mut bytes = [0; HEADER_LENGTH];
    let (length, _) = recv(channel, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT).ok()?;
    Header::decode(&bytes[..length]).ok().map(|header| header.sender)
}

/// Takes the next frame; none where there is no further one.
pub(super) fn receive(channel: &OwnedFd) -> io::Result<Option<Result<Frame, Refusal>>> {
    // One more than a header, to see a message that is too long.
    let mut bytes = [0; HEADER_LENGTH + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_CONNECTIONS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match recvmsg(channel, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
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
        return Ok(None);
    }
    let connections = fds.len().saturating_sub(1);
    let frame = read_frame(&bytes[..message.bytes], fds);
    Ok(Some(frame.map_err(|reason| Refusal { connections, reason })))
}

fn read_frame(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Frame, String> {
    let header = Header::decode(bytes)?;
    let expected = match usize::from(header.connections) {
        0 => 0,
        connections => connections + 1,
    };
    if fds.len() != expected {
        return Err(format!("{} fds with a frame of {} connections", fds.len(), header.connections));
    }
    let mut fds = fds.into_iter();
    let mut records = match fds.next() {
        Some(file) => read_records(&file.into()).map_err(|error| format!("its records: {error}"))?,
        None => Bytes::new(),
    };
    let connections =
        fds.map(|fd| Ok((fd, Record::decode(&mut records)?))).collect::<Result<Vec<_>, String>>()?;
    Ok(Frame { sender: header.sender, connections })
}

fn read_records(file: &File) -> io::Result<Bytes> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > RECORDS_LIMIT {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; usize::try_from(metadata.len()).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes.into())
}
