//! The handover: how quiescent connections reach the next process, with the bytes that were read and not consumed, and
//! their HTTP/2 and TLS state.
//!
//! [`pack`] and [`unpack`] convert between a [`Connection`] and a [`SocketRecord`]. Records are sent in frames
//! (`frame.rs`) through the handover channel, a pair of `SOCK_SEQPACKET` sockets (`channel.rs`). At a restart the next
//! process does not run yet, so the channel waits, filled, in systemd's file descriptor store (`store.rs`). At a reload
//! the successor reads it directly (`takeover/`). Connections for which the next process has no file descriptors stay
//! in the channel (`overflow.rs`). Duplicates of parked connections lie in the store at all times, for the process that
//! starts after a crash (`backup.rs`). `lifecycle/drain.rs` writes the channel, and `takeover/adopter.rs` reads it.

mod backup;
mod channel;
mod frame;
mod overflow;
mod store;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

pub use backup::{Backup, ParkedSockets, has_store, take as take_backed_up};
use bytes::Bytes;
pub use channel::{
    Channel, Frame, MAX_SOCKETS, MessageType, Next, SMALL_FRAME, Secret, SocketRecord, pair,
    receive as receive_frame, receive_if_room, send as send_frames,
};
pub use overflow::{ChannelLocation, Copies, Overflow, WINDOW, is_claimed};
use rustix::time::{ClockId, clock_gettime};
pub use store::FdStore;
use tracing::debug;

use crate::connection::{Connection, Endpoint, EndpointKind};
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::http2_state::Http2State;
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::replay::{Kind, Replay};
use crate::transport::stream_replay;
use crate::transport::tls_traffic::TlsTrafficState;

/// The name of the channel in systemd's file descriptor store (`FDNAME=` of sd_notify(3)).
pub const STORE_NAME: &str = "connections";

/// The sender of a frame; each frame carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Number of the process in the chain of handovers; the first is 1.
    pub generation: u64,
    /// When the sender had sent its last response, in nanoseconds of `CLOCK_MONOTONIC`, which both processes share.
    pub last_response_at: u64,
}

impl Origin {
    /// The origin of a sender whose last response is sent now.
    pub fn now(generation: u64) -> Self {
        Self { generation, last_response_at: monotonic_now() }
    }

    pub fn pause(&self) -> Duration {
        Duration::from_nanos(monotonic_now().saturating_sub(self.last_response_at))
    }
}

fn monotonic_now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// The generation after the newest one that wrote to `channels`. Reads nothing from them. None if they are empty.
pub fn next_generation(channels: &[anyhow::Result<OwnedFd>]) -> Option<u64> {
    let senders = channels.iter().flatten().filter_map(channel::peek);
    senders.map(|origin| origin.generation.saturating_add(1)).max()
}

/// Restores a connection from its record. If the certificate of its client is not accepted, the endpoint of the connection
/// refuses all requests. Fails, with the reason for the log, if none of `endpoints` has the
/// name of its listener, its state cannot be decoded, or its protocol does not match its listener: the connection is then
/// closed.
pub fn unpack(
    socket: OwnedFd,
    record: SocketRecord,
    endpoints: &[Arc<Endpoint>],
) -> Result<Connection, String> {
    let Some(endpoint) = endpoints.iter().find(|endpoint| endpoint.name.as_str() == record.listener) else {
        return Err(format!("this process has no listener named {:?}", record.listener));
    };
    let http2 = match record.http2.as_deref().map(Http2State::decode) {
        Some(None) => return Err("could not decode the state of an HTTP/2 connection".into()),
        Some(Some(state)) => Some(Box::new(state)),
        None => None,
    };
    let http2 = match (http2, record.streams.as_ref().map(stream_replay::decode)) {
        (_, Some(None)) => return Err("could not decode the open streams of an HTTP/2 connection".into()),
        (None, Some(Some(_))) => return Err("only an HTTP/2 connection can have open streams".into()),
        (Some(http2), Some(Some(streams))) => {
            if streams.last().is_some_and(|last| last.stream > http2.last_stream) {
                return Err("an HTTP/2 connection has an open stream after its last one".into());
            }
            Some(Box::new(Http2State { streams, ..*http2 }))
        }
        (http2, None) => http2,
    };
    let tls = match record.tls.map(|secret| TlsTrafficState::decode(&secret.0)) {
        Some(None) => return Err("could not decode the keys of a TLS connection".into()),
        session => session.flatten(),
    };
    let client_certificate = match record.client_certificate.as_deref().map(ClientCertificate::decode) {
        Some(None) => return Err("could not decode the certificate of a client".into()),
        Some(certificate) => certificate,
        None => None,
    };
    let tls = match (tls, client_certificate) {
        (None, Some(_)) => return Err("only a TLS connection can have a client certificate".into()),
        (Some(session), client) => Some(Box::new(TlsTrafficState { client, ..session })),
        (None, None) => None,
    };
    let replay = match record.replay.as_ref().map(Replay::decode) {
        Some(None) => return Err("could not decode the request of an upgraded connection".into()),
        Some(Some(replay)) => Some(Box::new(replay)),
        None => None,
    };
    if replay.is_some() && http2.is_some() {
        return Err("an upgraded connection cannot have HTTP/2 state".into());
    }
    let client = match record.client.as_deref().map(ProxiedClient::decode) {
        Some(None) => return Err("could not decode the client of a proxied connection".into()),
        Some(Some(client)) => Some(Box::new(client)),
        None => None,
    };
    // Nothing was read from a connection whose PROXY header is awaited, so its protocol has not begun.
    let is_new = client.as_deref() == Some(&ProxiedClient::Awaited);
    if is_new && (http2.is_some() || tls.is_some() || replay.is_some() || !record.payload.is_empty()) {
        return Err("a connection in use cannot wait for a PROXY header".into());
    }
    let is_socket = matches!(endpoint.kind, EndpointKind::Socket(_)) && !is_new;
    if is_socket != replay.as_deref().is_some_and(|replay| replay.kind() == Kind::Socket) {
        return Err(format!("listener {} does not match the connection's protocol", endpoint.name));
    }
    let is_https = endpoint.tls().is_some();
    if tls.is_some() && !is_https || tls.is_none() && is_https && (http2.is_some() || replay.is_some()) {
        return Err(format!(
            "listener {} does not match the connection's protocol: one of them is without TLS",
            endpoint.name
        ));
    }
    let certificate = tls.as_ref().and_then(|session| session.client.as_ref());
    let is_established = tls.is_some();
    let endpoint = match endpoint.tls().filter(|_| is_established).map(|tls| tls.may_continue(certificate)) {
        Some(Err(refusal)) => {
            debug!(listener = %endpoint.name, "closing a connection of an old process: {refusal}");
            endpoint.refusing()
        }
        Some(Ok(())) | None => endpoint.clone(),
    };
    Ok(Connection {
        socket,
        endpoint,
        unread: record.payload,
        http2,
        tls,
        replay,
        has_duplicate: false,
        client,
    })
}

/// Encodes TLS session ticket keys as a record. It has a descriptor of `/dev/null`, because each record in a frame
/// needs one.
pub fn pack_tickets(keys: Secret) -> io::Result<Vec<(OwnedFd, SocketRecord)>> {
    let record = SocketRecord { tls: Some(keys), ..SocketRecord::new(String::new(), Bytes::new()) };
    Ok(vec![(File::open("/dev/null")?.into(), record)])
}

/// The TLS session ticket keys in a frame of the type `Tickets`.
pub fn unpack_tickets(frame: Frame) -> Option<Secret> {
    frame.sockets.into_iter().find_map(|(_, record)| record.tls)
}

/// Encodes a channel that holds connections, to send it through another channel. Its record has the name
/// [`STORE_NAME`] in the place of a listener's.
pub fn pack_channel(channel: &OwnedFd) -> Vec<(BorrowedFd<'_>, SocketRecord)> {
    vec![(channel.as_fd(), SocketRecord::new(STORE_NAME.into(), Bytes::new()))]
}

pub fn pack(connections: &[Connection]) -> Vec<(BorrowedFd<'_>, SocketRecord)> {
    let pack = |connection: &Connection| SocketRecord {
        listener: connection.endpoint.name.to_string(),
        payload: connection.unread.clone(),
        http2: connection.http2.as_deref().map(|state| state.encode().into()),
        tls: connection.tls.as_deref().map(|session| Secret(session.encode())),
        replay: connection.replay.as_deref().map(|replay| replay.encode().into()),
        client: connection.client.as_deref().map(|client| client.encode()),
        client_certificate: connection.client_certificate().map(ClientCertificate::encode),
        streams: connection.open_streams().map(|streams| stream_replay::encode(streams).into()),
    };
    connections.iter().map(|connection| (connection.socket.as_fd(), pack(connection))).collect()
}
