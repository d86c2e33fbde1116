//! Frames of the handover channel, valid and invalid, written without the library's own encoder so that the tests would
//! notice a change of the format. The layout is described in `outlive/src/handover/frame.rs`.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, recvmsg,
    sendmsg, socket_with,
};

/// Message types, as in `MessageType` of `outlive/src/handover/frame.rs`.
pub const CONNECTIONS: u16 = 0;
pub const HELLO: u16 = 1;
pub const GO: u16 = 2;
pub const LISTENERS: u16 = 3;
pub const READY: u16 = 4;
pub const COMMIT: u16 = 5;
pub const ACCEPTING: u16 = 6;
pub const MAIN: u16 = 7;
pub const REFUSED: u16 = 8;

/// A frame of version 1, from generation 7, for `sockets` file descriptors.
pub fn frame(kind: u16, sockets: u16, text: &str) -> Vec<u8> {
    frame_of(1, kind, sockets, text)
}

/// As [`frame`], of any version.
pub fn frame_of(version: u16, kind: u16, sockets: u16, text: &str) -> Vec<u8> {
    let numbers = [version.to_le_bytes(), kind.to_le_bytes(), sockets.to_le_bytes()].concat();
    [&b"hand"[..], &numbers, &7_u64.to_le_bytes(), &0_u64.to_le_bytes(), text.as_bytes()].concat()
}

/// The type and the text of a frame.
pub fn read(message: &[u8]) -> Result<(u16, String)> {
    ensure!(message.len() >= 26 && message.starts_with(b"hand"), "not a frame: {message:?}");
    Ok((u16::from_le_bytes([message[6], message[7]]), String::from_utf8_lossy(&message[26..]).into_owned()))
}

/// Sends one message with file descriptors (`SCM_RIGHTS`).
pub fn send(channel: impl AsFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ensure!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)), "too many fds");
    sendmsg(channel, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives the next message with its file descriptors; both are empty if the other end has closed the channel.
pub fn receive(channel: impl AsFd) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(channel, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    bytes.truncate(received.bytes);
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((bytes, fds.flatten().collect()))
}

/// Connects to the takeover socket of the service whose runtime directory is `folder`.
pub fn connect_takeover_socket(folder: &Path) -> OwnedFd {
    let path = folder.join("takeover");
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("the socket is created");
    connect(&socket, &SocketAddrUnix::new(&path).expect("the path is short enough"))
        .expect("the service listens");
    socket
}

/// The type and text of the next frame; `None` if the other end has closed the channel.
pub fn recv_message(channel: &OwnedFd) -> Option<(u16, String)> {
    let mut message = [0; 1024];
    let (length, _) = recv(channel, &mut message, RecvFlags::empty()).expect("the channel is readable");
    (length > 0).then(|| read(&message[..length]).expect("the message is a frame"))
}
