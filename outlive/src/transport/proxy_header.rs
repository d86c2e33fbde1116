//! The header of the PROXY protocol, versions 1 and 2, in which a proxy reports the address of its client before it passes
//! on what the client sends ([specification](https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt), section 2).
//!
//! [`parse`] decides on the bytes that have arrived so far, without a copy, so that a caller can peek until the header is
//! complete. The crate `proxy-header` is not used, because it does not report that a client is connected over a Unix
//! socket, and because it takes the first 15 bytes of any other protocol for an incomplete header.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use bytes::Buf;

use super::stream::Peer;

/// The beginning of a header of version 1, which is one line of text.
const V1_START: &[u8] = b"PROXY ";
/// The maximum length of a header of version 1, with the end of its line (section 2.1).
const V1_LIMIT: usize = 107;
/// The beginning of a header of version 2, which is binary.
const V2_START: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// The length of the part of a header of version 2 that each header has. Its last two bytes are the length of the rest.
const V2_HEAD: usize = 16;
/// The maximum length of the rest, addresses and additional fields (TLVs), that is accepted. The protocol permits 64 KiB,
/// but the fields that proxies add, such as the name of the host and the result of TLS, are much shorter.
const V2_REST_LIMIT: usize = 1024;
/// No header is longer than this.
pub const LENGTH_LIMIT: usize = V2_HEAD + V2_REST_LIMIT;

/// The commands of version 2: the proxy connects for itself, for example to check health, or for a client.
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a header.
    Incomplete,
    /// No header that can be accepted.
    Refused(Refusal),
    /// A header of this length, and the client that it reports, if any.
    Complete { length: usize, client: Option<Peer> },
}

impl Parsed {
    fn of(length: usize, client: Result<Option<Peer>, Refusal>) -> Self {
        match client {
            Ok(client) => Self::Complete { length, client },
            Err(refusal) => Self::Refused(refusal),
        }
    }
}

/// Why a connection that has to begin with a PROXY header is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The peer is not one of the trusted proxies.
    Untrusted,
    /// The connection begins with something else.
    Missing,
    Invalid,
    /// The header is longer than [`LENGTH_LIMIT`], or as text longer than 107 bytes.
    TooLong,
    /// The header was not complete in time.
    Late,
    /// The peer has closed the connection within the header.
    Truncated,
}

impl Refusal {
    /// The value of the label `reason` of the metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Untrusted => "untrusted",
            Self::Missing => "missing",
            Self::Invalid => "invalid",
            Self::TooLong => "too_long",
            Self::Late => "late",
            Self::Truncated => "truncated",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untrusted => "its peer is not in --trusted-proxies",
            Self::Missing => "it does not begin with a PROXY header (--proxy-protocol)",
            Self::Invalid => "its PROXY header is invalid",
            Self::TooLong => "its PROXY header is too long",
            Self::Late => "its PROXY header was not complete in time (--head-timeout)",
            Self::Truncated => "its peer closed it within the PROXY header",
        })
    }
}

/// Parses the header at the beginning of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed {
    if V1_START.starts_with(bytes) || V2_START.starts_with(bytes) && bytes.len() < V2_START.len() {
        Parsed::Incomplete
    } else if bytes.starts_with(V1_START) {
        parse_v1(bytes)
    } else if bytes.starts_with(V2_START) {
        parse_v2(bytes)
    } else {
        Parsed::Refused(Refusal::Missing)
    }
}

fn parse_v1(bytes: &[u8]) -> Parsed {
    let within_limit = &bytes[..bytes.len().min(V1_LIMIT)];
    let Some(end) = within_limit.iter().position(|byte| *byte == b'\n') else {
        let is_too_long = bytes.len() >= V1_LIMIT;
        return if is_too_long { Parsed::Refused(Refusal::TooLong) } else { Parsed::Incomplete };
    };
    let line = bytes[V1_START.len()..end].strip_suffix(b"\r");
    let line = line.and_then(|line| std::str::from_utf8(line).ok()).ok_or(Refusal::Invalid);
    Parsed::of(end + 1, line.and_then(client_of_v1))
}

/// The client, if any, in the line of a header of version 1, without `PROXY` and the end of the line.
fn client_of_v1(line: &str) -> Result<Option<Peer>, Refusal> {
    let mut words = line.split(' ');
    let client = match words.next() {
        // All that follows has to be ignored (section 2.1).
        Some("UNKNOWN") => return Ok(None),
        Some("TCP4") => source_of_v1::<Ipv4Addr>(&mut words),
        Some("TCP6") => source_of_v1::<Ipv6Addr>(&mut words),
        _ => None,
    };
    client.filter(|_| words.next().is_none()).map(Some).ok_or(Refusal::Invalid)
}

/// The source in the words `SOURCE DESTINATION SOURCE-PORT DESTINATION-PORT`. The others have to be valid too.
fn source_of_v1<'a, A: FromStr + Into<IpAddr>>(words: &mut impl Iterator<Item = &'a str>) -> Option<Peer> {
    let address = words.next()?.parse::<A>().ok()?;
    words.next()?.parse::<A>().ok()?;
    let port = port(words.next()?)?;
    self::port(words.next()?)?;
    Some(Peer::tcp(address.into(), port))
}

/// A port without a sign and without leading zeros, which the standard library would accept.
fn port(text: &str) -> Option<u16> {
    let is_decimal =
        text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    is_decimal.then(|| text.parse().ok())?
}

fn parse_v2(bytes: &[u8]) -> Parsed {
    // Checked before the header is complete, because the length of another version may mean something else.
    if bytes.get(V2_START.len()).is_some_and(|command| ![LOCAL, PROXY].contains(command)) {
        return Parsed::Refused(Refusal::Invalid);
    }
    let Some((head, rest)) = bytes.split_at_checked(V2_HEAD) else { return Parsed::Incomplete };
    let length = usize::from(u16::from_be_bytes([head[14], head[15]]));
    if length > V2_REST_LIMIT {
        return Parsed::Refused(Refusal::TooLong);
    }
    let Some(rest) = rest.get(..length) else { return Parsed::Incomplete };
    Parsed::of(V2_HEAD + length, client_of_v2(head[12], head[13], rest))
}

/// The client, if any, in the `rest` of a header of version 2. The additional fields after the addresses are ignored.
fn client_of_v2(command: u8, family: u8, rest: &[u8]) -> Result<Option<Peer>, Refusal> {
    /// The lengths of source, destination and both ports; a Unix socket has two paths.
    const IPV4_LENGTH: usize = 4 + 4 + 2 + 2;
    const IPV6_LENGTH: usize = 16 + 16 + 2 + 2;
    const UNIX_LENGTH: usize = 108 + 108;
    if command == LOCAL {
        // The family has to be ignored (section 2.2).
        return Ok(None);
    }
    // The high half is the address family, the low half says stream (1) or datagram (2).
    let client = match family {
        0x00 => return Ok(None),
        0x11 | 0x12 => rest.get(..IPV4_LENGTH).map(|mut addresses| {
            let source = Ipv4Addr::from(addresses.get_u32());
            addresses.advance(4);
            Peer::tcp(source.into(), addresses.get_u16())
        }),
        0x21 | 0x22 => rest.get(..IPV6_LENGTH).map(|mut addresses| {
            let source = Ipv6Addr::from(addresses.get_u128());
            addresses.advance(16);
            Peer::tcp(source.into(), addresses.get_u16())
        }),
        0x31 | 0x32 => rest.get(..UNIX_LENGTH).map(|_| Peer::Unix),
        _ => None,
    };
    client.map(Some).ok_or(Refusal::Invalid)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::proxy_tests::{reported, v1, v2, v2_with};

    fn is_complete_only_as_a_whole(header: &[u8], client: Option<Peer>, after: &[u8]) {
        for length in 0..header.len() {
            assert_eq!(parse(&header[..length]), Parsed::Incomplete, "after {length} bytes");
        }
        let complete = Parsed::Complete { length: header.len(), client };
        assert_eq!(parse(header), complete);
        assert_eq!(parse(&[header, after].concat()), complete);
    }

    proptest! {
        #[test]
        fn header_of_version_1_is_complete_only_as_a_whole(client in reported(), after: Vec<u8>) {
            let reported = match client {
                Peer::Tcp(_) => Some(client),
                Peer::Unix => None,
            };
            is_complete_only_as_a_whole(&v1(client), reported, &after);
        }

        #[test]
        fn header_of_version_2_is_complete_only_as_a_whole(
            client in reported(), fields in prop::collection::vec(any::<u8>(), 0..800), after: Vec<u8>,
        ) {
            is_complete_only_as_a_whole(&v2(client, &fields), Some(client), &after);
        }

        #[test]
        fn local_header_of_version_2_reports_no_client(
            family: u8, rest in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            is_complete_only_as_a_whole(&v2_with(LOCAL, family, &rest), None, b"GET");
        }

        #[test]
        fn garbage_does_not_panic_the_parser(bytes: Vec<u8>, start in 0..V2_HEAD) {
            let _ = parse(&bytes);
            for header in [v1(Peer::Unix), v2(Peer::Unix, b"")] {
                let _ = parse(&[&header[..start.min(header.len())], &bytes].concat());
            }
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_bytes_do_not_panic_the_parser_of_proxy_headers() {
        crate::fuzz::target!("proxy_header").for_each(|bytes| {
            if let Parsed::Complete { length, .. } = parse(bytes) {
                assert!(length <= bytes.len().min(LENGTH_LIMIT));
                assert_eq!(parse(&bytes[..length]), parse(bytes));
            }
        });
    }

    #[test]
    fn unknown_client_of_version_1_is_that_of_the_transport() {
        for header in ["PROXY UNKNOWN\r\n", "PROXY UNKNOWN ffff::1 any text 1 2\r\n"] {
            is_complete_only_as_a_whole(header.as_bytes(), None, b"");
        }
    }

    #[test]
    fn invalid_lines_of_version_1_are_refused() {
        for line in [
            "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1 2 3\r\n",
            "PROXY TCP4  10.0.0.1 10.0.0.2 1 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 +1 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 01 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 65536 2\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2  \r\n",
            "PROXY TCP4 ::1 ::1 1 2\r\n",
            "PROXY TCP4 10.0.0.1 ::1 1 2\r\n",
            "PROXY TCP6 10.0.0.1 10.0.0.2 1 2\r\n",
            "PROXY UDP4 10.0.0.1 10.0.0.2 1 2\r\n",
            "PROXY \u{e4}\r\n",
            "PROXY \r\n",
        ] {
            assert_eq!(parse(line.as_bytes()), Parsed::Refused(Refusal::Invalid), "{line:?}");
        }
    }

    #[test]
    fn other_protocols_are_refused_at_the_first_byte_that_differs() {
        for bytes in [&b"G"[..], b"PRI * HTTP/2.0", b"\x16\x03\x01", b"proxy ", b"\r\n\r\n\r"] {
            assert_eq!(parse(bytes), Parsed::Refused(Refusal::Missing), "{bytes:?}");
        }
    }

    #[test]
    fn headers_above_the_limit_are_refused_before_they_are_complete() {
        let line = [V1_START, &[b'x'; V1_LIMIT]].concat();
        assert_eq!(parse(&line[..V1_LIMIT - 1]), Parsed::Incomplete);
        assert_eq!(parse(&line[..V1_LIMIT]), Parsed::Refused(Refusal::TooLong));
        let header = v2_with(PROXY, 0x11, &[0; V2_REST_LIMIT + 1]);
        assert_eq!(parse(&header[..V2_HEAD]), Parsed::Refused(Refusal::TooLong));
        let longest = v2_with(PROXY, 0x11, &[0; V2_REST_LIMIT]);
        assert!(matches!(parse(&longest), Parsed::Complete { length: LENGTH_LIMIT, .. }));
    }

    #[test]
    fn invalid_headers_of_version_2_are_refused() {
        for (command, family, length) in [
            (0x11, 0x11, 12),
            (0x22, 0x11, 12),
            (PROXY, 0x41, 12),
            (PROXY, 0x13, 12),
            (PROXY, 0x11, 11),
            (PROXY, 0x21, 35),
            (PROXY, 0x31, 215),
        ] {
            let header = v2_with(command, family, &vec![0; length]);
            assert_eq!(parse(&header), Parsed::Refused(Refusal::Invalid), "{command:x} {family:x} {length}");
        }
    }

    #[test]
    fn ipv4_client_in_an_ipv6_header_has_its_ipv4_address() {
        let mapped = Peer::Tcp("[::ffff:192.0.2.1]:5".parse().expect("the address is valid"));
        let client = Some(Peer::Tcp("192.0.2.1:5".parse().expect("the address is valid")));
        for header in [v1(mapped), v2(mapped, b"")] {
            assert_eq!(parse(&header), Parsed::Complete { length: header.len(), client });
        }
    }
}
