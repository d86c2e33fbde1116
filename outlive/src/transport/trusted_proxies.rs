//! [`TrustedProxies`], the peers that may report the addresses of their clients.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context, ensure};

use super::stream::Peer;

/// A proxy, or a network of proxies: `ADDRESS[/PREFIX]` or `unix`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustedProxy {
    /// The addresses whose first bits are those of `address`.
    Network { address: IpAddr, prefix: u32 },
    /// All peers that are connected over a Unix socket.
    Unix,
}

impl TrustedProxy {
    fn contains(self, peer: Peer) -> bool {
        let (address, prefix, other) = match (self, peer) {
            (Self::Unix, Peer::Unix) => return true,
            (Self::Network { address, prefix }, Peer::Tcp(other)) => (address, prefix, other.ip()),
            (Self::Unix, Peer::Tcp(_)) | (Self::Network { .. }, Peer::Unix) => return false,
        };
        match (address, other) {
            (IpAddr::V4(address), IpAddr::V4(other)) => {
                (address.to_bits() ^ other.to_bits()).checked_shr(Ipv4Addr::BITS - prefix).is_none_or(is_zero)
            }
            (IpAddr::V6(address), IpAddr::V6(other)) => {
                (address.to_bits() ^ other.to_bits()).checked_shr(Ipv6Addr::BITS - prefix).is_none_or(is_zero)
            }
            _ => false,
        }
    }
}

/// Whether no bit differs.
fn is_zero(difference: impl Into<u128>) -> bool {
    difference.into() == 0
}

impl FromStr for TrustedProxy {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let (address, prefix) =
            text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().ok().context(
            "expected an address such as 192.0.2.1 or 2001:db8::1, a network such as 10.0.0.0/8, or unix",
        )?;
        let bits = if address.is_ipv4() { Ipv4Addr::BITS } else { Ipv6Addr::BITS };
        let prefix = match prefix {
            Some(prefix) => prefix
                .parse()
                .ok()
                .filter(|prefix| *prefix <= bits)
                .with_context(|| format!("expected a prefix of 0 to {bits} bits after the slash"))?,
            None => bits,
        };
        ensure!(
            address == address.to_canonical(),
            "expected {}, because an IPv4 peer has its IPv4 address also on an IPv6 socket",
            address.to_canonical()
        );
        let first = first_address(address, prefix);
        ensure!(address == first, "the address has bits after its prefix: expected {first}/{prefix}");
        Ok(Self::Network { address, prefix })
    }
}

/// The address with zeros after its first `prefix` bits.
fn first_address(address: IpAddr, prefix: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(Ipv4Addr::BITS - prefix).unwrap_or(0);
            Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(Ipv6Addr::BITS - prefix).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    }
}

/// The value of `--trusted-proxies`.
#[derive(Clone, Debug, Default)]
pub struct TrustedProxies(pub Vec<TrustedProxy>);

impl TrustedProxies {
    pub fn contain(&self, peer: Peer) -> bool {
        self.0.iter().any(|proxy| proxy.contains(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(proxy: &str, peer: &str) -> bool {
        let peer = match peer {
            "unix" => Peer::Unix,
            ip => Peer::tcp(ip.parse().expect("the address is valid"), 1),
        };
        proxy.parse::<TrustedProxy>().expect("the proxy is valid").contains(peer)
    }

    #[test]
    fn proxy_contains_exactly_the_peers_of_its_network() {
        for (proxy, inside, outside) in [
            ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("192.0.2.128/25", "::ffff:192.0.2.128", "192.0.2.127"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("::/0", "ffff::", "1.2.3.4"),
            ("2001:db8::/33", "2001:db8:7fff::1", "2001:db8:8000::1"),
            ("::1", "::1", "unix"),
            ("unix", "unix", "127.0.0.1"),
        ] {
            assert!(contains(proxy, inside), "{proxy} contains {inside}");
            assert!(!contains(proxy, outside), "{proxy} does not contain {outside}");
        }
    }

    #[test]
    fn invalid_proxies_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "expected an address"),
            ("proxy.example", "expected an address"),
            ("10.0.0.1:80", "expected an address"),
            ("10.0.0.0/33", "0 to 32 bits"),
            ("::/129", "0 to 128 bits"),
            ("10.0.0.0/", "0 to 32 bits"),
            ("10.0.0.1/8", "expected 10.0.0.0/8"),
            ("2001:db8::1/32", "expected 2001:db8::/32"),
            ("::ffff:10.0.0.1", "expected 10.0.0.1"),
        ] {
            let error = text.parse::<TrustedProxy>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
