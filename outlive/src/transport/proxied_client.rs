//! [`ProxiedClient`], what a proxy has reported of a connection's client. It travels with the connection to the next
//! process, because a PROXY header is sent only once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::{Buf, BufMut, Bytes};

use super::stream::Peer;

/// The client of a connection that begins with a PROXY header. Without such a header, and if it reports none, the other end
/// of the socket is the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxiedClient {
    /// The header has not been read yet, and nothing else either.
    Awaited,
    Reported(Peer),
}

/// The first byte of an encoded address.
const AWAITED: u8 = 0;
const UNIX: u8 = 1;
const IPV4: u8 = 4;
const IPV6: u8 = 6;

impl ProxiedClient {
    /// Its encoding in the record of a handover: a byte for the kind, and of an IP address the address in network byte
    /// order and the port in little-endian.
    pub fn encode(self) -> Bytes {
        let mut bytes = Vec::with_capacity(19);
        match self {
            Self::Awaited => bytes.put_u8(AWAITED),
            Self::Reported(Peer::Unix) => bytes.put_u8(UNIX),
            Self::Reported(Peer::Tcp(address)) => {
                match address.ip() {
                    IpAddr::V4(ip) => {
                        bytes.put_u8(IPV4);
                        bytes.put_slice(&ip.octets());
                    }
                    IpAddr::V6(ip) => {
                        bytes.put_u8(IPV6);
                        bytes.put_slice(&ip.octets());
                    }
                }
                bytes.put_u16_le(address.port());
            }
        }
        bytes.into()
    }

    /// None if the encoding is invalid, or of a later release.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let client = match bytes.try_get_u8().ok()? {
            AWAITED => Self::Awaited,
            UNIX => Self::Reported(Peer::Unix),
            IPV4 => {
                let ip = Ipv4Addr::from(bytes.try_get_u32().ok()?);
                Self::Reported(Peer::tcp(ip.into(), bytes.try_get_u16_le().ok()?))
            }
            IPV6 => {
                let ip = Ipv6Addr::from(bytes.try_get_u128().ok()?);
                Self::Reported(Peer::tcp(ip.into(), bytes.try_get_u16_le().ok()?))
            }
            _ => return None,
        };
        bytes.is_empty().then_some(client)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::proxy_tests::reported;

    fn client() -> impl Strategy<Value = ProxiedClient> {
        prop_oneof![1 => Just(ProxiedClient::Awaited), 4 => reported().prop_map(ProxiedClient::Reported)]
    }

    proptest! {
        #[test]
        fn decode_reverses_encode(client in client()) {
            let bytes = client.encode();
            prop_assert_eq!(ProxiedClient::decode(&bytes), Some(client));
            for length in 0..bytes.len() {
                prop_assert_eq!(ProxiedClient::decode(&bytes[..length]), None);
            }
            prop_assert_eq!(ProxiedClient::decode(&[&bytes[..], &[0]].concat()), None);
        }

        #[test]
        fn garbage_does_not_panic_the_decoder(bytes in prop::collection::vec(any::<u8>(), 0..24)) {
            let _ = ProxiedClient::decode(&bytes);
        }
    }
}
