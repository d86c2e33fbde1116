//! Frames onto a `SOCK_SEQPACKET` socket, and off it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::Origin;
use super::frame::{FIRST_VERSION, HEADER_LENGTH, Header, TEXT_LIMIT};
pub use super::frame::{Kind, MAX_SOCKETS, Record, Secret};

/// The records of one frame: 252 connections with 2 MiB unread each.
const RECORDS_LIMIT: u64 = 252 << 21;

/// A frame read.
pub struct Frame {
    pub kind: Kind,
    pub origin: Origin,
    pub sockets: Vec<(OwnedFd, Record)>,
    /// Why further sockets that came with it were closed, one by one.
    pub refused: Vec<String>,
    pub text: String,
}

/// What was to be read next.
pub enum Next {
    Frame(Frame),
    /// A message that makes no sense, and the number of sockets that came with it.
    Refused(usize, String),
    /// Nothing yet.
    Pending,
    /// The other end is closed, and all that it sent has been read.
    End,
}

/// The two ends of a channel.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends as many of `sockets` as fit, in frames of `kind`; never waits. Gives their number, and why there
/// are no more of them (the channel or the process's limit of fds is full).
pub fn send<S: AsFd>(
    channel: impl AsFd,
    kind: Kind,
    origin: Origin,
    sockets: &[(S, Record)],
    text: &str,
) -> (usize, Option<io::Error>) {
    // At least one frame, so that its kind, its sender and its text are said.
    let frames = sockets.chunks(MAX_SOCKETS).chain(sockets.is_empty().then_some(&[][..]));
    let mut sent = 0;
    for frame in frames {
        if let Err(error) = send_frame(channel.as_fd(), kind, origin, frame, text) {
            return (sent, Some(error));
        }
        sent += frame.len();
    }
    (sent, None)
}

fn send_frame<S: AsFd>(
    channel: BorrowedFd<'_>,
    kind: Kind,
    origin: Origin,
    sockets: &[(S, Record)],
    text: &str,
) -> io::Result<()> {
    let count = u16::try_from(sockets.len()).map_err(io::Error::other)?;
    let version = sockets.iter().map(|(_, record)| record.version()).max().unwrap_or(FIRST_VERSION);
    let header = Header { version, kind, sockets: count, origin, text: text.to_owned() }.encode();
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

fn write_records<S>(version: u16, sockets: &[(S, Record)]) -> io::Result<File> {
    // There may be keys among them: of its whole length at once, since what grows leaves copies behind.
    let length = sockets.iter().map(|(_, record)| record.length()).sum();
    let mut bytes = Zeroizing::new(Vec::with_capacity(length));
    for (_, record) in sockets {
        record.encode(version, &mut bytes).map_err(io::Error::other)?;
    }
    let mut file = File::from(memfd_create("records", MemfdFlags::CLOEXEC)?);
    file.write_all(&bytes)?;
    Ok(file)
}

/// What the next frame says of its sender; the frame stays.
pub(super) fn peek(channel: &OwnedFd) -> Option<Origin> {
    let mut bytes = [0; HEADER_LENGTH + TEXT_LIMIT];
    let (length, _) = recv(channel, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT).ok()?;
    Header::decode(&bytes[..length]).ok().map(|header| header.origin)
}

/// Takes the next frame; never waits.
pub fn receive(channel: impl AsFd) -> io::Result<Next> {
    // One more than a header, to see a message that is too long.
    let mut bytes = [0; HEADER_LENGTH + TEXT_LIMIT + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match recvmsg(&channel, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
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
        Err(reason) => Next::Refused(sockets, reason),
    })
}

fn read_frame(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Frame, String> {
    let Header { version, kind, sockets, origin, text } = Header::decode(bytes)?;
    let expected = match usize::from(sockets) {
        0 => 0,
        sockets => sockets + 1,
    };
    if fds.len() != expected {
        return Err(format!("{} fds with a frame of {sockets} sockets", fds.len()));
    }
    let mut fds = fds.into_iter();
    let records = match fds.next() {
        Some(file) => read_records(&file.into()).map_err(|error| format!("its records: {error}"))?,
        None => Zeroizing::default(),
    };
    let mut records = &records[..];
    let mut frame = Frame { kind, origin, sockets: Vec::with_capacity(fds.len()), refused: Vec::new(), text };
    for fd in fds {
        match Record::decode(version, &mut records)? {
            Ok(record) => frame.sockets.push((fd, record)),
            Err(reason) => frame.refused.push(reason),
        }
    }
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

/// A channel to somebody who is there, as tokio waits for it: to tokio, which only polls it, one Unix
/// socket is as good as another.
pub struct Channel(UnixStream);

impl Channel {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(UnixStream::from_std(fd.into())?))
    }

    /// The next frame; none at the end. A message that makes no sense is an error.
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
                Ok(Next::Pending) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends all of `sockets`, waiting for the other side to read where need be.
    pub async fn send<S: AsFd>(
        &self,
        kind: Kind,
        origin: Origin,
        mut sockets: &[(S, Record)],
        text: &str,
    ) -> io::Result<()> {
        loop {
            self.0.writable().await?;
            let sent = self.0.try_io(Interest::WRITABLE, || {
                let (sent, error) = send(&self.0, kind, origin, sockets, text);
                sockets = &sockets[sent..];
                error.map_or(Ok(()), Err)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    /// Says one thing, with no sockets.
    pub async fn say(&self, kind: Kind, origin: Origin, text: &str) -> io::Result<()> {
        self.send::<OwnedFd>(kind, origin, &[], text).await
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Sockets that are worth nothing, to be sent.
    fn sockets(count: usize) -> Vec<(File, Record)> {
        let null = File::open("/dev/null").expect("a file");
        let record = |number: usize| Record {
            listener: number.to_string(),
            payload: Bytes::new(),
            http2: None,
            tls: None,
        };
        (0..count).map(|number| (null.try_clone().expect("a file"), record(number))).collect()
    }

    #[test]
    fn a_full_channel_takes_what_fits_and_says_how_many_that_are() {
        let (write, read) = pair().expect("a pair");
        rustix::net::sockopt::set_socket_send_buffer_size(&write, 1).expect("the smallest");
        let origin = Origin::now(1);
        let all = sockets(900);
        // The smallest buffer takes a few messages: fill it.
        let mut fitted = 0;
        let error = loop {
            match send(&write, Kind::Connections, origin, &all, "") {
                (sent, None) => fitted += sent,
                (sent, Some(error)) => break (fitted += sent, error).1,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut received = 0;
        while let Next::Frame(frame) = receive(&read).expect("a frame") {
            received += frame.sockets.len();
        }
        assert_eq!(received, fitted);
    }

    #[test]
    fn a_thousand_sockets_come_back_in_order_with_their_records() {
        let (write, read) = pair().expect("a pair");
        assert_eq!(send(&write, Kind::Connections, Origin::now(1), &sockets(1000), "").0, 1000);
        drop(write);
        let mut names = Vec::new();
        loop {
            match receive(&read).expect("readable") {
                Next::Frame(frame) => {
                    names.extend(frame.sockets.into_iter().map(|(_, record)| record.listener));
                }
                Next::End => break,
                _ => panic!("neither a frame nor the end"),
            }
        }
        assert_eq!(names, (0..1000).map(|number| number.to_string()).collect::<Vec<_>>());
    }
}
