//! The client of a request, as the proxies before this service report it: in `X-Forwarded-For`, or in `Forwarded`
//! (RFC 7239).
//!
//! Each proxy appends the address of its own peer, so only the elements that trusted proxies have appended can be believed.
//! [`Proxies::client_of`] walks from the last element, which the peer of the connection has appended, to the first address
//! that is no trusted proxy. The client itself can have sent all elements before that. Only one of the two fields is read,
//! because a proxy that appends to one of them passes the other one on as the client has sent it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use clap::ValueEnum;
use hyper::HeaderMap;
use hyper::header::{FORWARDED, HeaderName};

use crate::transport::stream::Peer;
use crate::transport::trusted_proxies::TrustedProxies;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// How many elements are read at most. No request passes so many trusted proxies.
const ELEMENT_LIMIT: usize = 32;

/// The field that trusted proxies set.
#[derive(Clone, Copy, Debug, Default, ValueEnum, PartialEq, Eq)]
pub enum ForwardedHeader {
    /// X-Forwarded-For: the addresses, separated by commas
    #[default]
    XForwardedFor,
    /// Forwarded: the parameters `for` (RFC 7239)
    Forwarded,
    /// None: the peer of a connection is the client of its requests
    None,
}

/// The proxies before this service, and how they report the client of a request.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    pub trusted: TrustedProxies,
    pub header: ForwardedHeader,
}

impl Proxies {
    /// Whether `peer` reports the client of each request.
    pub fn report_clients_of(&self, peer: Peer) -> bool {
        self.header != ForwardedHeader::None && self.trusted.contain(peer)
    }

    /// The client of a request with these `headers` from `peer`, which is a trusted proxy. An element that is no IP address,
    /// such as `unknown`, ends the walk: the client is then the last proxy before it.
    pub fn client_of(&self, peer: Peer, headers: &HeaderMap) -> Peer {
        let (name, address): (_, fn(&str) -> Option<Peer>) = match self.header {
            ForwardedHeader::XForwardedFor => (X_FORWARDED_FOR, node),
            ForwardedHeader::Forwarded => (FORWARDED, |element| node(&parameter_for(element)?)),
            ForwardedHeader::None => return peer,
        };
        // Several fields of one name are one list (RFC 9110 section 5.3).
        let fields = headers.get_all(name).iter().rev();
        let elements = fields.flat_map(|field| Elements::of(field.as_bytes())).take(ELEMENT_LIMIT);
        let mut client = peer;
        for element in elements {
            let address = std::str::from_utf8(element).ok().map(str::trim_ascii).and_then(address);
            let Some(address) = address else { break };
            client = address;
            if !self.trusted.contain(address) {
                break;
            }
        }
        client
    }
}

/// The elements of a list, the last one first. They are separated by commas outside quoted strings (RFC 9110 section 5.6.1).
/// What a client has sent before the last element, such as a quote without an end, cannot change how that is read.
struct Elements<'a>(Option<&'a [u8]>);

impl<'a> Elements<'a> {
    fn of(list: &'a [u8]) -> Self {
        Self(Some(list))
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let list = self.0.take()?;
        let mut is_quoted = false;
        for (at, byte) in list.iter().enumerate().rev() {
            match byte {
                b'"' if !is_escaped(list, at) => is_quoted = !is_quoted,
                b',' if !is_quoted => {
                    self.0 = Some(&list[..at]);
                    return Some(&list[at + 1..]);
                }
                _ => {}
            }
        }
        Some(list)
    }
}

/// Whether the byte at `at` follows an odd number of backslashes (quoted-pair in RFC 9110 section 5.6.4).
fn is_escaped(list: &[u8], at: usize) -> bool {
    list[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// The value of the parameter `for` in an element of `Forwarded`. None if there is not exactly one, or if the element is
/// invalid (RFC 7239 section 4).
fn parameter_for(element: &str) -> Option<String> {
    let mut found = None;
    let mut rest = element;
    loop {
        let (name, after) = rest.split_once('=')?;
        let (value, after) = value(after)?;
        if name.eq_ignore_ascii_case("for") && found.replace(value).is_some() {
            return None;
        }
        match after.strip_prefix(';') {
            Some(after) => rest = after,
            None => return found.filter(|_| after.is_empty()),
        }
    }
}

/// The token or quoted string at the beginning of `text`, and what follows it.
fn value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        // Tokens cannot have a colon, but some proxies send `for=192.0.2.1:80` without the quotes.
        let end = text.find(|c: char| c == ';' || c == '"' || c.is_ascii_whitespace()).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.chars();
    loop {
        match characters.next()? {
            '"' => return Some((value, characters.as_str())),
            '\\' => value.push(characters.next()?),
            character => value.push(character),
        }
    }
}

/// An IP address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
/// Without a port, that of the result is 0.
fn node(text: &str) -> Option<Peer> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(Peer::tcp(ip, 0));
    }
    if let Some(ip) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        return Some(Peer::tcp(ip.parse::<Ipv6Addr>().ok()?.into(), 0));
    }
    let address: SocketAddr = text.parse().ok()?;
    Some(Peer::tcp(address.ip(), address.port()))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const PROXY: &str = "10.0.0.1:1";

    fn peer(text: &str) -> Peer {
        if text == "unix" { Peer::Unix } else { node(text).expect("the address is valid") }
    }

    fn proxies(header: ForwardedHeader) -> Proxies {
        let trusted = ["10.0.0.0/8", "fd00::/8", "unix"].map(|proxy| proxy.parse().expect("a valid proxy"));
        Proxies { trusted: TrustedProxies(trusted.into()), header }
    }

    /// The client of a request from [`PROXY`] with one field for each of `values`.
    fn client(header: ForwardedHeader, values: &[&str]) -> String {
        let name = if header == ForwardedHeader::Forwarded { FORWARDED } else { X_FORWARDED_FOR };
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&name, HeaderValue::from_bytes(value.as_bytes()).expect("a valid value"));
        }
        proxies(header).client_of(peer(PROXY), &headers).to_string()
    }

    #[test]
    fn client_is_the_last_address_of_x_forwarded_for_that_is_no_trusted_proxy() {
        for (values, expected) in [
            (&["192.0.2.1"][..], "192.0.2.1:0"),
            (&["192.0.2.1:80"], "192.0.2.1:80"),
            (&["203.0.113.9, 192.0.2.1"], "192.0.2.1:0"),
            (&["203.0.113.9,192.0.2.1 ,10.9.9.9, fd00::1"], "192.0.2.1:0"),
            (&["203.0.113.9", "192.0.2.1", "10.9.9.9"], "192.0.2.1:0"),
            (&["2001:db8::1"], "[2001:db8::1]:0"),
            (&["[2001:db8::1]"], "[2001:db8::1]:0"),
            (&["[2001:db8::1]:80"], "[2001:db8::1]:80"),
            (&["::ffff:192.0.2.1"], "192.0.2.1:0"),
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.3:0"),
        ] {
            assert_eq!(client(ForwardedHeader::XForwardedFor, values), expected, "{values:?}");
        }
    }

    #[test]
    fn element_that_is_no_address_ends_the_walk_at_the_proxy_before_it() {
        for (values, expected) in [
            (&[][..], PROXY),
            (&[""], PROXY),
            (&["192.0.2.1, unknown"], PROXY),
            (&["192.0.2.1, "], PROXY),
            (&["192.0.2.1, _hidden, 10.0.0.2"], "10.0.0.2:0"),
            (&["192.0.2.1", "\u{e4}", "10.0.0.2"], "10.0.0.2:0"),
            (&["192.0.2.256"], PROXY),
            (&["192.0.2.1:"], PROXY),
            (&["192.0.2.1:65536"], PROXY),
            (&["[192.0.2.1]"], PROXY),
            (&["for=192.0.2.1"], PROXY),
        ] {
            assert_eq!(client(ForwardedHeader::XForwardedFor, values), expected, "{values:?}");
        }
    }

    #[test]
    fn client_is_the_last_address_of_forwarded_that_is_no_trusted_proxy() {
        for (values, expected) in [
            (&["for=192.0.2.1"][..], "192.0.2.1:0"),
            (&["For=\"192.0.2.1:80\";proto=https;by=10.0.0.1"], "192.0.2.1:80"),
            (&["proto=http;for=192.0.2.1:80"], "192.0.2.1:80"),
            (&["for=203.0.113.9, for=192.0.2.1, for=\"[fd00::1]:4711\""], "192.0.2.1:0"),
            (&["for=\"[2001:db8::1]\""], "[2001:db8::1]:0"),
            (&["for=192.0.2.1;host=\"a,b;for=1.2.3.4\\\"\""], "192.0.2.1:0"),
            (&["for=\"192.0.2.\\1\""], "192.0.2.1:0"),
        ] {
            assert_eq!(client(ForwardedHeader::Forwarded, values), expected, "{values:?}");
        }
    }

    #[test]
    fn obfuscated_or_invalid_element_of_forwarded_ends_the_walk() {
        for value in [
            "for=unknown",
            "for=_hidden",
            "for=\"_hidden:80\"",
            "proto=https",
            "for=192.0.2.1;for=192.0.2.2",
            "for=192.0.2.1;",
            "for=192.0.2.1;proto",
            "for = 192.0.2.1",
            "for=\"192.0.2.1",
            "for=\"192.0.2.1\"x",
            "for=192.0.2.1, ",
            "192.0.2.1",
        ] {
            assert_eq!(client(ForwardedHeader::Forwarded, &[value]), PROXY, "{value}");
        }
    }

    /// The proxy appends its element to what the client has sent.
    #[test]
    fn client_cannot_hide_the_element_of_the_proxy() {
        for sent in
            ["for=1.2.3.4", "for=\"1.2.3.4", "\"", "\\", "for=1.2.3.4;host=\"\\", ",,", "for=\"a\\\\\""]
        {
            for appended in ["for=192.0.2.1", "for=\"192.0.2.1\"", "for=\"192.0.2.1\";host=\"a,\\\"b\""] {
                let value = format!("{sent}, {appended}");
                assert_eq!(client(ForwardedHeader::Forwarded, &[&value]), "192.0.2.1:0", "{value}");
            }
        }
    }

    #[test]
    fn other_field_is_not_read() {
        let mut headers = HeaderMap::new();
        headers.insert(FORWARDED, HeaderValue::from_static("for=1.2.3.4"));
        headers.insert(X_FORWARDED_FOR, HeaderValue::from_static("192.0.2.1"));
        let client = |header| proxies(header).client_of(peer(PROXY), &headers).to_string();
        assert_eq!(client(ForwardedHeader::XForwardedFor), "192.0.2.1:0");
        assert_eq!(client(ForwardedHeader::Forwarded), "1.2.3.4:0");
        assert_eq!(client(ForwardedHeader::None), PROXY);
    }

    #[test]
    fn only_trusted_peers_report_clients() {
        let with = |header, address| proxies(header).report_clients_of(peer(address));
        assert!(with(ForwardedHeader::XForwardedFor, PROXY));
        assert!(with(ForwardedHeader::Forwarded, "unix"));
        assert!(!with(ForwardedHeader::XForwardedFor, "192.0.2.1"));
        assert!(!with(ForwardedHeader::None, PROXY));
        assert!(!Proxies::default().report_clients_of(peer(PROXY)));
    }

    #[test]
    fn walk_ends_at_the_limit_of_elements() {
        let chain = |proxies: usize| format!("192.0.2.1{}", ", 10.0.0.2".repeat(proxies));
        let client = |proxies| client(ForwardedHeader::XForwardedFor, &[&chain(proxies)]);
        assert_eq!(client(ELEMENT_LIMIT - 1), "192.0.2.1:0");
        assert_eq!(client(ELEMENT_LIMIT), "10.0.0.2:0");
    }

    proptest! {
        #[test]
        fn garbage_does_not_panic_the_walk(values in prop::collection::vec("[\\x20-\\x7e]{0,60}", 0..5)) {
            let values: Vec<_> = values.iter().map(String::as_str).collect();
            for header in [ForwardedHeader::XForwardedFor, ForwardedHeader::Forwarded] {
                client(header, &values);
            }
        }

        #[test]
        fn any_text_before_the_last_element_changes_nothing(sent in "[\\x20-\\x7e]{0,60}") {
            let value = format!("{sent},for=192.0.2.1");
            prop_assert_eq!(client(ForwardedHeader::Forwarded, &[&value]), "192.0.2.1:0");
            let value = format!("{sent}, 192.0.2.1");
            prop_assert_eq!(client(ForwardedHeader::XForwardedFor, &[&value]), "192.0.2.1:0");
        }
    }
}
