//! [`Connection`], a TCP or Unix connection with all of its state: as a plain socket while it is parked or handed over,
//! as a [`Stream`] of the runtime while it is served.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;

use super::Endpoint;
use super::tls::record_layer::begins_with_record;
use crate::registry::Protocols;
use crate::transport::client_certificate::ClientCertificate;
use crate::transport::http2_state::Http2State;
use crate::transport::proxied_client::ProxiedClient;
use crate::transport::replay::{Kind, Replay};
use crate::transport::stream::{Peer, Stream};
use crate::transport::stream_replay::StreamReplay;
use crate::transport::tls_traffic::{TlsTrafficState, Version};

/// A connection with everything that is needed to continue it, in this or in the next process.
///
/// `Connection<OwnedFd>` is quiescent: a plain socket that the runtime does not watch. [`Connection::watched`]
/// registers it with the runtime to serve it as a `Connection<Stream>`, and [`Connection::unwatched`] does the reverse.
pub struct Connection<S = OwnedFd> {
    pub socket: S,
    /// The endpoint of the listener that accepted it.
    pub endpoint: Arc<Endpoint>,
    /// The bytes that were read from the socket and not consumed.
    pub unread: Bytes,
    /// The HTTP/2 state, if it is an HTTP/2 connection that has been served before.
    pub http2: Option<Box<Http2State>>,
    /// The TLS state, if it is a TLS connection whose handshake is complete.
    pub tls: Option<Box<TlsTrafficState>>,
    /// What begins it anew, if it is an upgraded connection.
    pub replay: Option<Box<Replay>>,
    /// See [`Stream::has_duplicate`].
    pub has_duplicate: bool,
    /// Its client, if it began with a PROXY header. None if that is the other end of the socket.
    pub client: Option<Box<ProxiedClient>>,
}

impl Connection {
    /// The protocols that a process has to adopt to continue it.
    pub fn required(&self) -> Protocols {
        let tls = self.tls.as_ref().map_or(Protocols::PlainHttp1, |session| match session.suite.version {
            Version::Tls12 => Protocols::Tls12,
            Version::Tls13 if session.client.is_some() => Protocols::CertificatesAndTables,
            Version::Tls13 => Protocols::Http2AndTls,
        });
        // Earlier releases adopt HTTP/2 connections, but not with the header table that this release permits the client.
        let http2 = self.http2.as_ref().map_or(Protocols::PlainHttp1, |_| Protocols::CertificatesAndTables);
        let upgraded = self.replay.as_ref().map_or(Protocols::PlainHttp1, |_| Protocols::Upgrades);
        tls.max(http2).max(upgraded)
    }

    /// Whether bytes that were read have to be processed although no further ones arrive: bytes that hyper has not consumed,
    /// or a TLS record.
    pub fn has_input(&self) -> bool {
        !self.unread.is_empty()
            || self.tls.as_ref().is_some_and(|session| begins_with_record(&session.unread))
    }

    /// The certificate of its client, if it has presented one.
    pub fn client_certificate(&self) -> Option<&ClientCertificate> {
        self.tls.as_ref()?.client.as_ref()
    }

    /// The open streams of an HTTP/2 connection. None if there are none.
    pub fn open_streams(&self) -> Option<&[StreamReplay]> {
        self.http2.as_ref().map(|state| &state.streams[..]).filter(|streams| !streams.is_empty())
    }

    /// How many responses of requests in flight the next process continues. A connection that was upgraded has none.
    pub fn moving_responses(&self) -> usize {
        let is_event_stream = |replay: &Replay| replay.kind() == Kind::EventStream;
        usize::from(self.replay.as_deref().is_some_and(is_event_stream))
            + self.open_streams().map_or(0, <[StreamReplay]>::len)
    }

    /// Registers the socket with the current runtime. Returns the connection and its client, or an error if the peer has
    /// disconnected.
    pub fn watched(self) -> io::Result<(Connection<Stream>, Peer)> {
        let Self { socket, endpoint, unread, http2, tls, replay, has_duplicate, client } = self;
        // The socket may come from another process, which may have left it in blocking mode.
        rustix::io::ioctl_fionbio(&socket, true)?;
        let peer = Peer::at(rustix::net::getpeername(&socket)?)?;
        let socket = Stream::new(socket, peer, has_duplicate)?;
        let peer = match client.as_deref() {
            Some(ProxiedClient::Reported(client)) => *client,
            Some(ProxiedClient::Awaited) | None => peer,
        };
        Ok((Connection { socket, endpoint, unread, http2, tls, replay, has_duplicate, client }, peer))
    }
}

impl<S> Connection<S> {
    /// A connection that was just accepted.
    pub fn begun(socket: S, endpoint: Arc<Endpoint>) -> Self {
        Self {
            socket,
            client: endpoint.client.map(Box::new),
            endpoint,
            unread: Bytes::new(),
            http2: None,
            tls: None,
            replay: None,
            has_duplicate: false,
        }
    }

    /// Whether this process must keep the connection because of `--tls-handover no`, although an earlier one handed it over.
    pub fn keeps_keys(&self) -> bool {
        self.tls.is_some() && self.endpoint.tls().is_some_and(|tls| !tls.hands_over())
    }

    /// Whether its PROXY header has not been read yet.
    pub fn awaits_header(&self) -> bool {
        self.client.as_deref() == Some(&ProxiedClient::Awaited)
    }

    /// Whether a response of it has no end, so that the handler has to be called before the client sends anything.
    pub fn has_endless_response(&self) -> bool {
        self.replay.is_some() || self.http2.as_ref().is_some_and(|state| !state.streams.is_empty())
    }
}

impl Connection<Stream> {
    /// Deregisters the socket from the runtime.
    pub fn unwatched(self) -> io::Result<Connection> {
        let Self { socket, endpoint, unread, http2, tls, replay, has_duplicate, client } = self;
        let socket = socket.into_socket()?;
        Ok(Connection { socket, endpoint, unread, http2, tls, replay, has_duplicate, client })
    }
}
