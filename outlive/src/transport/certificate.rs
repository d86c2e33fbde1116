//! What is read from an X.509 certificate (RFC 5280): its names, and when it expires. rustls has verified a certificate
//! before anything is read from it here, and compares the names of server certificates itself.
//!
//! A certificate whose encoding is not understood has no names and no expiry, and a client with it is refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Tags of DER (ITU-T X.690 section 8.1.2).
const OCTET_STRING: u8 = 0x04;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// Tags of optional fields of a certificate (RFC 5280 section 4.1).
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
/// The attribute `commonName`, 2.5.4.3, and the extension `subjectAltName`, 2.5.29.17.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// A kind of subject alternative name. The value of each variant is its tag (RFC 5280 section 4.2.1.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NameKind {
    Email = 0x81,
    Dns = 0x82,
    Uri = 0x86,
}

/// The fields of a certificate that are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields<'a> {
    /// The content of the subject, a sequence of sets of attributes.
    subject: &'a [u8],
    /// The content of the subject alternative names; empty without that extension.
    alternative_names: &'a [u8],
    /// The end of its validity. None if it cannot be understood.
    pub expires_at: Option<SystemTime>,
}

impl<'a> Fields<'a> {
    /// The fields of the certificate in `der`. They are empty if it is not understood.
    pub fn of(der: &'a [u8]) -> Self {
        Self::read(der).unwrap_or_default()
    }

    fn read(der: &'a [u8]) -> Option<Self> {
        let mut certificate = Der(Der(der).expect(SEQUENCE)?);
        let mut fields = Der(certificate.expect(SEQUENCE)?);
        let (first, _) = fields.next()?;
        if first == VERSION {
            let _serial_number = fields.next()?;
        }
        let _signature_algorithm = fields.expect(SEQUENCE)?;
        let _issuer = fields.expect(SEQUENCE)?;
        let mut validity = Der(fields.expect(SEQUENCE)?);
        let _begin = validity.next()?;
        let (tag, end) = validity.next()?;
        let subject = fields.expect(SEQUENCE)?;
        let extensions = std::iter::from_fn(|| fields.next()).find(|(tag, _)| *tag == EXTENSIONS);
        let extensions = extensions.and_then(|(_, content)| Der(content).expect(SEQUENCE));
        Some(Self {
            subject,
            alternative_names: extensions.and_then(alternative_names).unwrap_or_default(),
            expires_at: time(tag, end),
        })
    }

    /// The common name of the subject; the last one if there are several, because that is the most specific one.
    pub fn common_name(&self) -> Option<&'a str> {
        let sets = Der(self.subject).filter(|(tag, _)| *tag == SET);
        let attributes = sets.flat_map(|(_, set)| Der(set)).filter(|(tag, _)| *tag == SEQUENCE);
        let names = attributes.filter_map(|(_, attribute)| {
            let mut attribute = Der(attribute);
            let is_name = attribute.expect(OBJECT_IDENTIFIER)? == COMMON_NAME;
            let (tag, text) = attribute.next()?;
            let is_text = matches!(tag, UTF8_STRING | PRINTABLE_STRING | IA5_STRING);
            std::str::from_utf8(text).ok().filter(|_| is_name && is_text)
        });
        names.last()
    }

    /// The subject alternative names of one kind. Those that are not UTF-8 are left out.
    pub fn alternative_names(&self, kind: NameKind) -> impl Iterator<Item = &'a str> + use<'a> {
        let names = Der(self.alternative_names).filter(move |(tag, _)| *tag == kind as u8);
        names.filter_map(|(_, name)| std::str::from_utf8(name).ok())
    }
}

/// The content of the subject alternative names in the content of the extensions.
fn alternative_names(extensions: &[u8]) -> Option<&[u8]> {
    let mut values = Der(extensions).filter_map(|(_, extension)| {
        let mut extension = Der(extension);
        let is_it = extension.expect(OBJECT_IDENTIFIER)? == SUBJECT_ALT_NAME;
        // A boolean may precede the value: whether the extension is critical.
        let value = extension.find(|(tag, _)| *tag == OCTET_STRING)?.1;
        is_it.then_some(value)
    });
    Der(values.next()?).expect(SEQUENCE)
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`, depending on `tag` (RFC 5280 section 4.1.2.5).
fn time(tag: u8, text: &[u8]) -> Option<SystemTime> {
    let (year_digits, digits) = match tag {
        UTC_TIME => (2, 12),
        GENERALIZED_TIME => (4, 14),
        _ => return None,
    };
    let text =
        text.strip_suffix(b"Z").filter(|text| text.len() == digits && text.iter().all(u8::is_ascii_digit))?;
    let number = |digits: &[u8]| digits.iter().fold(0, |number, digit| number * 10 + i64::from(digit - b'0'));
    let (year, rest) = text.split_at(year_digits);
    let year = match (tag, number(year)) {
        (UTC_TIME, year @ 50..) => 1900 + year,
        (UTC_TIME, year) => 2000 + year,
        (_, year) => year,
    };
    let [month, day, hour, minute, second] = [0, 2, 4, 6, 8].map(|at| number(&rest[at..at + 2]));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = ((days_until(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) }
}

/// The days from 0000-03-01 to 1970-01-01.
const BEFORE_1970: i64 = 719_468;

/// The days from 1970-01-01 to a date of the Gregorian calendar. Years begin in March here, so that the leap day is the last
/// day of a year.
fn days_until(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + day_of_year - BEFORE_1970
}

/// Elements of DER that follow one another. As an iterator it returns the tag and the content of each, and ends at the first
/// one that is invalid.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The content of the next element. None if it has another tag.
    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, _)| *found == tag).map(|(_, content)| content)
    }
}

impl<'a> Iterator for Der<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let [tag, length, rest @ ..] = self.0 else { return None };
        let (length, rest) = match length {
            0..=0x7f => (usize::from(*length), rest),
            // The number of bytes of the length follows. rustls accepts no certificate of 64 KiB or more.
            0x81 | 0x82 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(length & 0x7f))?;
                (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, content))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use testkit::certificate::Authority;
    use tokio_rustls::rustls::pki_types::CertificateDer;
    use tokio_rustls::rustls::pki_types::pem::PemObject;

    use super::*;

    /// A certificate that openssl has made, with these arguments.
    fn issued(subject: &str, names: &str) -> Vec<u8> {
        let client = Authority::new("CA").and_then(|authority| authority.issue(subject, names));
        let client = client.expect("openssl makes a certificate");
        CertificateDer::from_pem_file(client.chain()).expect("the file is PEM").to_vec()
    }

    fn seconds(time: Option<SystemTime>) -> Option<u64> {
        time?.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
    }

    #[test]
    fn names_and_expiry_of_a_certificate_of_openssl_are_read() {
        let names = "URI:spiffe://example.org/shop,DNS:shop.example.org,email:shop@example.org,IP:192.0.2.7,DNS:b.example.org";
        let der = issued("/O=Example/CN=first/CN=Bücher & Co", names);
        let fields = Fields::of(&der);
        let all = |kind| fields.alternative_names(kind).collect::<Vec<_>>();
        assert_eq!(fields.common_name(), Some("Bücher & Co"));
        assert_eq!(all(NameKind::Dns), ["shop.example.org", "b.example.org"]);
        assert_eq!(all(NameKind::Email), ["shop@example.org"]);
        assert_eq!(all(NameKind::Uri), ["spiffe://example.org/shop"]);
        let day = 24 * 60 * 60;
        let remaining = fields.expires_at.and_then(|end| end.duration_since(SystemTime::now()).ok());
        let remaining = remaining.expect("it has not expired").as_secs();
        assert!((29 * day..=30 * day).contains(&remaining), "{remaining}");
    }

    #[test]
    fn certificate_without_names_has_none() {
        let der = issued("/O=Example", "IP:192.0.2.7");
        let fields = Fields::of(&der);
        assert_eq!(fields.common_name(), None);
        assert!(
            [NameKind::Dns, NameKind::Email, NameKind::Uri]
                .map(|kind| fields.alternative_names(kind).count())
                == [0; 3]
        );
        assert!(fields.expires_at.is_some());
    }

    #[test]
    fn times_of_both_formats_are_read_and_invalid_ones_refused() {
        for (tag, text, expected) in [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (GENERALIZED_TIME, "20000301000000Z", Some(951_868_800)),
            (GENERALIZED_TIME, "20240229120000Z", Some(1_709_208_000)),
            (GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799)),
            (GENERALIZED_TIME, "20241301000000Z", None),
            (GENERALIZED_TIME, "2024022912000Z", None),
            (GENERALIZED_TIME, "20240229120000", None),
            (UTC_TIME, "20240229120000Z", None),
            (OCTET_STRING, "700101000000Z", None),
        ] {
            assert_eq!(seconds(time(tag, text.as_bytes())), expected, "{text}");
        }
        assert!(time(UTC_TIME, b"500101000000Z").is_some_and(|time| time < UNIX_EPOCH));
    }

    static VALID: LazyLock<Vec<u8>> =
        LazyLock::new(|| issued("/CN=a", "DNS:a.example.org,email:a@example.org"));

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(der: Vec<u8>, cut in 0..2000_usize, changed in 0..600_usize, to: u8) {
            let _ = Fields::of(&der);
            let mut valid = VALID.clone();
            valid.truncate(cut.max(1));
            let at = changed % valid.len();
            valid[at] = to;
            let fields = Fields::of(&valid);
            let _ = fields.common_name();
            fields.alternative_names(NameKind::Dns).for_each(drop);
        }
    }
}
