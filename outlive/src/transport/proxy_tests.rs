//! Clients and PROXY headers for tests.

use std::net::IpAddr;

use proptest::prelude::*;

use super::stream::Peer;

/// A client that a proxy may report.
pub fn reported() -> impl Strategy<Value = Peer> {
    let tcp = (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| Peer::tcp(ip, port));
    prop_oneof![1 => Just(Peer::Unix), 4 => tcp]
}

/// A header of version 2. Its destination is address 0, port 443.
pub fn v2(client: Peer, fields: &[u8]) -> Vec<u8> {
    let (family, addresses) = match client {
        Peer::Unix => (0x31, vec![b'x'; 216]),
        Peer::Tcp(address) => {
            let ports = [address.port().to_be_bytes(), 443_u16.to_be_bytes()].concat();
            match address.ip() {
                IpAddr::V4(ip) => (0x11, [&ip.octets()[..], &[0; 4], &ports].concat()),
                IpAddr::V6(ip) => (0x21, [&ip.octets()[..], &[0; 16], &ports].concat()),
            }
        }
    };
    v2_with(0x21, family, &[&addresses[..], fields].concat())
}

/// A header of version 2 with any content.
pub fn v2_with(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).expect("the rest is short").to_be_bytes();
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, rest].concat()
}

/// A header of version 1, which cannot report Unix sockets.
pub fn v1(client: Peer) -> Vec<u8> {
    let Peer::Tcp(address) = client else { return b"PROXY UNKNOWN\r\n".to_vec() };
    let (ip, port) = (address.ip(), address.port());
    let (protocol, destination) = if ip.is_ipv4() { ("TCP4", "0.0.0.0") } else { ("TCP6", "::") };
    format!("PROXY {protocol} {ip} {destination} {port} 443\r\n").into_bytes()
}
