//! Header blocks of requests (HPACK, RFC 7541), as far as they can be read without decoding their strings.
//!
//! The interposer follows the client's header table (`header_table.rs`), and keeps the request of a stream that may have
//! no end, to play it to a fresh h2 in another process. Names and values stay as the client has encoded them, so only the
//! boundaries of the fields have to be found. A few names and values are compared in the two ways in which they can be
//! encoded.

use bytes::{BufMut, Bytes, BytesMut};

/// The name of a field that the interposer appends to the request of a stream that may have a response without end. Its
/// value is the number of the stream, which hyper does not tell. A handler never sees it.
pub const STREAM_FIELD: &str = "outlive-stream";
/// How much [`put_stream_field`] appends at most, in bytes.
pub const STREAM_FIELD_LENGTH: usize = 1 + 1 + STREAM_FIELD.len() + 1 + 10;
/// The largest header block that is kept, in bytes. It has to fit into one frame with the fields that are appended.
pub const BLOCK_LIMIT: usize = 8 * 1024;

/// Indices of the static table (RFC 7541 appendix A).
const METHOD_GET: usize = 2;
const METHOD_POST: usize = 3;
const ACCEPT: usize = 19;
const CONTENT_LENGTH: usize = 28;
const CONTENT_TYPE: usize = 31;
pub const LAST_STATIC: usize = 61;

/// A field by its index (RFC 7541 section 6.1).
pub const INDEXED: u8 = 0x80;
/// A literal field with incremental indexing (RFC 7541 section 6.2.1).
pub const INCREMENTAL: u8 = 0x40;
/// The change of the size of the table (RFC 7541 section 6.3).
pub const SIZE_UPDATE: u8 = 0x20;
/// A literal field without indexing, with a literal name (RFC 7541 section 6.2.2).
pub const LITERAL: u8 = 0;
/// The bit that the first byte of a literal field has if intermediaries must not index the field either (RFC 7541
/// section 6.2.3).
pub const NEVER_INDEXED: u8 = 0x10;

/// A text in both of its encodings.
struct Text<const N: usize> {
    plain: &'static str,
    /// The Huffman code (RFC 7541 appendix B), without padding.
    huffman: [u8; N],
    bits: usize,
}

const EVENT_STREAM: Text<12> = Text::new("text/event-stream");
const GRPC: Text<11> = Text::new("application/grpc");
const LAST_EVENT_ID: Text<9> = Text::new("last-event-id");
/// The names of the fields above, which some clients do not encode as indices (grpcio).
const NAMES: (Text<4>, Text<10>, Text<9>) =
    (Text::new("accept"), Text::new("content-length"), Text::new("content-type"));

impl<const N: usize> Text<N> {
    const fn new(plain: &'static str) -> Self {
        let (mut huffman, mut bits) = ([0; N], 0);
        let mut at = 0;
        while at < plain.len() {
            let (code, length) = huffman_code(plain.as_bytes()[at]);
            let mut bit = 0;
            while bit < length {
                if code >> (length - 1 - bit) & 1 == 1 {
                    huffman[bits / 8] |= 0x80 >> (bits % 8);
                }
                bits += 1;
                bit += 1;
            }
            at += 1;
        }
        Self { plain, huffman, bits }
    }

    fn is(&self, string: Encoded<'_>) -> bool {
        // The padding has the bits of a code that is longer, and all of them are set (RFC 7541 section 5.2).
        let is_padded = || {
            let used = self.bits % 8;
            used == 0 || string.bytes[N - 1] | !(0xff >> used) == 0xff
        };
        string.bytes.len() == self.length(string)
            && self.begins(string)
            && (!string.is_huffman || is_padded())
    }

    fn begins(&self, string: Encoded<'_>) -> bool {
        if !string.is_huffman {
            return string.bytes.starts_with(self.plain.as_bytes());
        }
        let (whole, used) = (self.bits / 8, self.bits % 8);
        let mask = !(0xff_u8 >> used);
        string.bytes.get(..whole) == Some(&self.huffman[..whole])
            && (used == 0 || string.bytes.get(whole).is_some_and(|last| last & mask == self.huffman[whole]))
    }

    fn length(&self, string: Encoded<'_>) -> usize {
        if string.is_huffman { N } else { self.plain.len() }
    }
}

/// The code of a letter that occurs in the texts above, and its length in bits (RFC 7541 appendix B).
pub const fn huffman_code(letter: u8) -> (u32, usize) {
    match letter {
        b'a' => (0x3, 5),
        b'c' => (0x4, 5),
        b'e' => (0x5, 5),
        b'i' => (0x6, 5),
        b'o' => (0x7, 5),
        b's' => (0x8, 5),
        b't' => (0x9, 5),
        b'-' => (0x16, 6),
        b'/' => (0x18, 6),
        b'd' => (0x24, 6),
        b'g' => (0x26, 6),
        b'h' => (0x27, 6),
        b'l' => (0x28, 6),
        b'm' => (0x29, 6),
        b'n' => (0x2a, 6),
        b'p' => (0x2b, 6),
        b'r' => (0x2c, 6),
        b'v' => (0x77, 7),
        b'x' => (0x79, 7),
        b'y' => (0x7a, 7),
        _ => panic!("add the code of this letter"),
    }
}

/// A string as it is encoded (RFC 7541 section 5.2).
#[derive(Clone, Copy)]
pub struct Encoded<'a> {
    pub is_huffman: bool,
    pub bytes: &'a [u8],
}

/// One field, or an instruction for the table.
pub enum Field<'a> {
    /// Both name and value, by their index.
    Indexed(usize),
    Literal {
        indexing: Indexing,
        name: Name<'a>,
        value: Encoded<'a>,
    },
    /// The new size of the table.
    SizeUpdate(usize),
}

/// What happens to a literal field (RFC 7541 section 6.2).
#[derive(Clone, Copy)]
pub enum Indexing {
    /// It enters the table.
    Incremental,
    Without,
    /// As `Without`, also where intermediaries pass it on.
    Never,
}

pub enum Name<'a> {
    Indexed(usize),
    Literal(Encoded<'a>),
}

impl Name<'_> {
    /// The index of the name, also if it is encoded as a literal. None for a literal that is not in [`NAMES`].
    pub fn index(&self) -> Option<usize> {
        let (accept, length, content_type) = NAMES;
        match self {
            Self::Indexed(index) => Some(*index),
            Self::Literal(name) if accept.is(*name) => Some(ACCEPT),
            Self::Literal(name) if length.is(*name) => Some(CONTENT_LENGTH),
            Self::Literal(name) if content_type.is(*name) => Some(CONTENT_TYPE),
            Self::Literal(_) => None,
        }
    }
}

/// Splits the first field off the front of `block`. None if the block is malformed.
pub fn next_field<'a>(block: &mut &'a [u8]) -> Option<Field<'a>> {
    let first = *block.first()?;
    match first {
        INDEXED.. => Some(Field::Indexed(take_integer(block, 7)?)),
        SIZE_UPDATE..INCREMENTAL => take_integer(block, 5).map(Field::SizeUpdate),
        _ => {
            let (indexing, bits) = match first {
                INCREMENTAL.. => (Indexing::Incremental, 6),
                NEVER_INDEXED.. => (Indexing::Never, 4),
                _ => (Indexing::Without, 4),
            };
            let name = match take_integer(block, bits)? {
                0 => Name::Literal(take_string(block)?),
                index => Name::Indexed(index),
            };
            Some(Field::Literal { indexing, name, value: take_string(block)? })
        }
    }
}

/// Splits an integer off whose first byte has it in the last `bits` (RFC 7541 section 5.1).
fn take_integer(block: &mut &[u8], bits: u32) -> Option<usize> {
    let limit = (1 << bits) - 1;
    let mut value = usize::from(*block.split_off_first()?) & limit;
    if value < limit {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let byte = *block.split_off_first()?;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_string<'a>(block: &mut &'a [u8]) -> Option<Encoded<'a>> {
    let is_huffman = *block.first()? & 0x80 != 0;
    let length = take_integer(block, 7)?;
    let (bytes, rest) = block.split_at_checked(length)?;
    *block = rest;
    Some(Encoded { is_huffman, bytes })
}

/// What a field says about whether the response to its request may have no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Clue {
    Nothing,
    Get,
    Post,
    /// The request accepts first of all an event stream.
    AcceptsEvents,
    Grpc,
    /// The request has a body of a known length.
    HasLength,
}

impl Clue {
    /// The clue of a field in the static table.
    pub fn of_static(index: usize) -> Self {
        match index {
            METHOD_GET => Self::Get,
            METHOD_POST => Self::Post,
            _ => Self::Nothing,
        }
    }

    /// The clue of a literal field. `name`: the index of its name in the static table, if it has one.
    pub fn of_literal(name: Option<usize>, value: Encoded<'_>) -> Self {
        match name {
            Some(ACCEPT) if EVENT_STREAM.begins(value) => Self::AcceptsEvents,
            Some(CONTENT_TYPE) if GRPC.begins(value) => Self::Grpc,
            Some(CONTENT_LENGTH) => Self::HasLength,
            _ => Self::Nothing,
        }
    }
}

/// The clues of one request: the bit of each [`Clue`] that one of its fields has given.
#[derive(Default)]
pub struct Clues(u8);

impl Clues {
    pub fn add(&mut self, clue: Clue) {
        self.0 |= 1 << clue as u8;
    }

    fn has(&self, clue: Clue) -> bool {
        self.0 >> clue as u8 & 1 == 1
    }

    /// Whether the response may have no end: that to a GET request that accepts an event stream, or to a call in gRPC.
    /// `has_body`: whether DATA follows the fields. A call in gRPC has one, and the request of an event stream has none.
    pub fn may_be_endless(&self, has_body: bool) -> bool {
        let (method, kind) =
            if has_body { (Clue::Post, Clue::Grpc) } else { (Clue::Get, Clue::AcceptsEvents) };
        // The next process answers the request without a body of HTTP/2.
        self.has(method) && self.has(kind) && !self.has(Clue::HasLength)
    }
}

/// The same fields with `last-event-id: id` at the end. A field with an older id is removed, unless it enters the header table:
/// without it the table of the decoder would differ from the client's. None if the block would be too large, or if `id` is
/// not a valid value of a field.
pub fn with_last_event_id(block: &[u8], id: &[u8]) -> Option<Bytes> {
    let is_valid = |byte: &u8| *byte == b'\t' || *byte >= b' ' && *byte != 0x7f;
    if !id.iter().all(is_valid) {
        return None;
    }
    let mut next = BytesMut::with_capacity(block.len() + 4 + LAST_EVENT_ID.plain.len() + id.len());
    let mut rest = block;
    while !rest.is_empty() {
        let before = rest;
        let field = next_field(&mut rest)?;
        let is_old = matches!(
            &field,
            Field::Literal { indexing: Indexing::Without | Indexing::Never, name: Name::Literal(name), .. }
                if LAST_EVENT_ID.is(*name)
        );
        if !is_old {
            next.put_slice(&before[..before.len() - rest.len()]);
        }
    }
    put_field(LAST_EVENT_ID.plain.as_bytes(), id, &mut next);
    (next.len() <= BLOCK_LIMIT).then(|| next.freeze())
}

/// Appends [`STREAM_FIELD`] to a header block.
pub fn put_stream_field(stream: u32, into: &mut impl BufMut) {
    put_field(STREAM_FIELD.as_bytes(), stream.to_string().as_bytes(), into);
}

pub fn put_field(name: &[u8], value: &[u8], into: &mut impl BufMut) {
    into.put_u8(LITERAL);
    for string in [name, value] {
        put_integer(0, string.len(), 7, into);
        into.put_slice(string);
    }
}

/// Appends a string as it is encoded.
pub fn put_string(string: Encoded<'_>, into: &mut impl BufMut) {
    const HUFFMAN: u8 = 0x80;
    put_integer(if string.is_huffman { HUFFMAN } else { 0 }, string.bytes.len(), 7, into);
    into.put_slice(string.bytes);
}

/// Appends an integer with `bits` in its first byte, whose other bits are those of `first`.
pub fn put_integer(first: u8, value: usize, bits: u32, into: &mut impl BufMut) {
    let limit = (1 << bits) - 1;
    let small = |value: usize| u8::try_from(value).expect("at most seven bits");
    if value < limit {
        into.put_u8(first | small(value));
        return;
    }
    into.put_u8(first | small(limit));
    let mut rest = value - limit;
    while rest > 0x7f {
        into.put_u8(0x80 | small(rest & 0x7f));
        rest >>= 7;
    }
    into.put_u8(small(rest));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut block = BytesMut::from(&[0x82, 0x87][..]);
        for (name, value) in fields {
            put_field(name.as_bytes(), value.as_bytes(), &mut block);
        }
        block.to_vec()
    }

    /// The names of literal fields, and the indices of the others.
    fn names(mut block: &[u8]) -> Vec<String> {
        let mut names = Vec::new();
        while !block.is_empty() {
            names.push(match next_field(&mut block).expect("the block is valid") {
                Field::Indexed(index) | Field::Literal { name: Name::Indexed(index), .. } => {
                    index.to_string()
                }
                Field::Literal { name: Name::Literal(name), .. } => {
                    String::from_utf8_lossy(name.bytes).into()
                }
                Field::SizeUpdate(_) => "size".into(),
            });
        }
        names
    }

    /// Whether the block is the request of an event stream, or a call in gRPC. It refers to no table.
    fn may_be_endless(mut block: &[u8], has_body: bool) -> bool {
        let mut clues = Clues::default();
        while !block.is_empty() {
            clues.add(match next_field(&mut block).expect("the block is valid") {
                Field::Indexed(index) => Clue::of_static(index),
                Field::Literal { name, value, .. } => Clue::of_literal(name.index(), value),
                Field::SizeUpdate(_) => Clue::Nothing,
            });
        }
        clues.may_be_endless(has_body)
    }

    /// Texts and their Huffman codes with padding (RFC 7541 section 5.2), from another encoder: hpack 4 of Python.
    const ENCODED: [(&str, &[u8]); 12] = [
        ("accept", b"\x19\x08\x5a\xd3"),
        ("content-length", b"\x21\xea\x49\x6a\x4a\xd4\x16\xa9\x93\x3f"),
        ("content-type", b"\x21\xea\x49\x6a\x4a\xc9\xf5\x59\x7f"),
        ("last-event-id", b"\xa0\x68\x4a\xc5\xee\x5a\x92\xb1\xa4"),
        ("text/event-stream", b"\x49\x7c\xa5\x82\xf7\x2d\x49\x59\x09\xb0\xa3\xa7"),
        ("text/event-stream, */*", b"\x49\x7c\xa5\x82\xf7\x2d\x49\x59\x09\xb0\xa3\xa7\xe9\x4f\x96\x3e\x7f"),
        ("text/html", b"\x49\x7c\xa5\x89\xd3\x4d\x1f"),
        ("application/grpc", b"\x1d\x75\xd0\x62\x0d\x26\x3d\x4c\x4d\x65\x64"),
        ("application/grpc+proto", b"\x1d\x75\xd0\x62\x0d\x26\x3d\x4c\x4d\x65\x64\xff\x75\xd8\x74\x9f"),
        ("application/json", b"\x1d\x75\xd0\x62\x0d\x26\x3d\x4c\x74\x41\xea"),
        ("content-types", b"\x21\xea\x49\x6a\x4a\xc9\xf5\x59\x47"),
        ("1", b"\x0f"),
    ];

    /// `text` in both encodings.
    fn encodings(text: &'static str) -> [Encoded<'static>; 2] {
        let (_, huffman) =
            ENCODED.iter().find(|(known, _)| *known == text).expect("add the code of this text");
        [(false, text.as_bytes()), (true, *huffman)].map(|(is_huffman, bytes)| Encoded { is_huffman, bytes })
    }

    /// Whether the response to a request with a field may have no end, for each encoding of its name and value.
    fn answers(method: u8, name: &'static str, value: &'static str, has_body: bool) -> Vec<bool> {
        let mut answers = Vec::new();
        for (name, value) in
            encodings(name).into_iter().flat_map(|name| encodings(value).map(|value| (name, value)))
        {
            for first in [LITERAL, NEVER_INDEXED, INCREMENTAL] {
                let mut block = BytesMut::from(&[method, first][..]);
                put_string(name, &mut block);
                put_string(value, &mut block);
                answers.push(may_be_endless(&block, has_body));
            }
        }
        answers
    }

    #[test]
    fn names_and_values_are_recognized_in_each_encoding() {
        let (get, post) = (0x82, 0x83);
        for value in ["text/event-stream", "text/event-stream, */*"] {
            assert_eq!(answers(get, "accept", value, false), [true; 12], "{value}");
            assert_eq!(answers(get, "accept", value, true), [false; 12], "{value}");
            assert_eq!(answers(get, "content-type", value, false), [false; 12], "{value}");
        }
        for value in ["application/grpc", "application/grpc+proto"] {
            assert_eq!(answers(post, "content-type", value, true), [true; 12], "{value}");
            assert_eq!(answers(post, "content-type", value, false), [false; 12], "{value}");
            assert_eq!(answers(post, "content-types", value, true), [false; 12], "{value}");
        }
        assert_eq!(answers(get, "accept", "text/html", false), [false; 12]);
        assert_eq!(answers(post, "content-type", "application/json", true), [false; 12]);
        for name in ["accept", "content-length", "content-type", "content-types"] {
            let index = match name {
                "accept" => Some(ACCEPT),
                "content-length" => Some(CONTENT_LENGTH),
                "content-type" => Some(CONTENT_TYPE),
                _ => None,
            };
            assert_eq!(encodings(name).map(|name| Name::Literal(name).index()), [index; 2], "{name}");
        }
        // A shorter string, and a code whose padding is not all ones.
        let [_, Encoded { bytes, .. }] = encodings("content-type");
        let (shorter, unpadded) = (&bytes[..bytes.len() - 1], [&bytes[..bytes.len() - 1], &[0x7e]].concat());
        for bytes in [shorter, &unpadded] {
            assert_eq!(Name::Literal(Encoded { is_huffman: true, bytes }).index(), None, "{bytes:?}");
        }
    }

    #[test]
    fn last_event_id_is_replaced_in_each_encoding() {
        for name in encodings("last-event-id") {
            let mut block = BytesMut::from(&[0x82, LITERAL][..]);
            put_string(name, &mut block);
            put_string(encodings("1")[1], &mut block);
            let next = with_last_event_id(&block, b"123").expect("the id is valid");
            assert_eq!(names(&next), ["2", "last-event-id"]);
        }
    }

    #[test]
    fn last_event_id_replaces_the_one_before() {
        let first = block(&[("last-event-id", "7"), ("x", "y")]);
        let second = with_last_event_id(&first, b"123").expect("the id is valid");
        assert_eq!(names(&second), ["2", "7", "x", "last-event-id"]);
        let third = with_last_event_id(&second, &[b'z'; 300]).expect("the id is valid");
        assert_eq!(names(&third), ["2", "7", "x", "last-event-id"]);
        assert!(third.ends_with(&[b'z'; 300]));
        // A field that enters the table stays.
        let entered = [&first[..2], &[INCREMENTAL], &first[3..]].concat();
        let next = with_last_event_id(&entered, b"123").expect("the id is valid");
        assert_eq!(names(&next), ["2", "7", "last-event-id", "x", "last-event-id"]);
        assert_eq!(with_last_event_id(&first, b"a\nb"), None);
        assert_eq!(with_last_event_id(&first, &[b'z'; BLOCK_LIMIT]), None);
    }

    proptest! {
        #[test]
        fn integers_are_read_as_they_are_written(value in 0..2_000_000_usize, bits in 4..8_u32) {
            let mut bytes = BytesMut::new();
            put_integer(0, value, bits, &mut bytes);
            let mut rest = &bytes[..];
            prop_assert_eq!(take_integer(&mut rest, bits), Some(value));
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), id: Vec<u8>) {
            let _ = with_last_event_id(&bytes, &id);
        }
    }
}
