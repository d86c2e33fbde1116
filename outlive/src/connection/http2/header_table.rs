//! The header table of the client's encoder (the dynamic table of RFC 7541 section 2.3.2), and header blocks that need none.
//!
//! This server permits its clients no header table. A client that has not received our settings yet uses one all the
//! same: it enters fields of its first requests, and refers to them in the next ones. h2 decodes these requests, but does
//! not show its table. So the interposer follows the table too, until the client acknowledges our settings, and keeps the
//! requests of streams without an end in an encoding that another decoder can read.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};

use super::HEADER_LIST_LIMIT;
use super::frame::{END_HEADERS, HEADERS, Head};
use super::header_block::{
    BLOCK_LIMIT, Encoded, Field, INDEXED, Indexing, LAST_STATIC, LITERAL, NEVER_INDEXED, Name, next_field,
    put_integer, put_string,
};
use crate::transport::http2_state::FIRST_HEADER_TABLE_SIZE;

/// The largest size of the table, as RFC 7541 section 4.1 counts it.
const SIZE_LIMIT: usize = FIRST_HEADER_TABLE_SIZE as usize;
/// What an entry counts beside its name and its value (RFC 7541 section 4.1).
const ENTRY_SIZE: usize = 32;
/// The largest header block whose frames are collected, in bytes. h2 usually refuses longer blocks: its limit counts
/// the decoded fields, and these are normally larger than their encoding.
const COLLECTED_LIMIT: usize = HEADER_LIST_LIMIT as usize;

/// The lengths of the names in the static table (RFC 7541 appendix A).
const STATIC_NAME_LENGTHS: [u8; LAST_STATIC] = [
    10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13,
    12, 6, 4, 4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3,
    16,
];

/// The longest code of a letter, in bits (RFC 7541 appendix B).
const LONGEST_CODE: usize = 30;
/// For each length in bits, the number after the last code of that length. The Huffman code is canonical: the codes of
/// one length are consecutive, and the first follows the last shorter code, with a zero bit appended. So the bits read
/// so far are a whole code if they are below this number.
const CODE_ENDS: [u32; LONGEST_CODE + 1] = {
    // The number of letters whose code has this length. The end-of-string symbol is left out, because no string may
    // have it.
    const LETTERS: [u32; LONGEST_CODE + 1] = [
        0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 3,
    ];
    let mut ends = LETTERS;
    let mut bits = 1;
    while bits <= LONGEST_CODE {
        ends[bits] += ends[bits - 1] << 1;
        bits += 1;
    }
    ends
};

/// A header block that h2 does not accept either, or that cannot be followed. The table is not known after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Untraceable;

/// The table of a client that has not acknowledged our settings, and the beginning of a header block.
pub struct ClientTable {
    table: HeaderTable,
    /// The block so far, if CONTINUATION follows.
    block: Vec<u8>,
}

impl ClientTable {
    pub fn new() -> Self {
        Self { table: HeaderTable::new(SIZE_LIMIT), block: Vec::new() }
    }

    /// Follows the next frame of a header block, HEADERS or CONTINUATION. When the block is complete, this returns it in an
    /// encoding that refers to no table. None if the block is incomplete, or would be too large to be kept.
    pub fn follow(&mut self, head: Head, payload: &[u8]) -> Result<Option<Bytes>, Untraceable> {
        let fragment = head.fragment(payload).ok_or(Untraceable)?;
        if head.frame_type == HEADERS && head.has(END_HEADERS) {
            return self.table.follow(fragment);
        }
        if self.block.len() + fragment.len() > COLLECTED_LIMIT {
            return Err(Untraceable);
        }
        self.block.extend_from_slice(fragment);
        if !head.has(END_HEADERS) {
            return Ok(None);
        }
        self.table.follow(&std::mem::take(&mut self.block))
    }
}

/// The fields of `block` in an encoding that refers to no table, for a block of a client that has none. None if it refers
/// to one, or would be too large to be kept.
pub fn independent(block: &[u8]) -> Option<Bytes> {
    HeaderTable::new(0).follow(block).ok().flatten()
}

/// Its entries have at most [`SIZE_LIMIT`] bytes, and 3.75 times as many if the client has encoded them in the least
/// favourable way.
struct HeaderTable {
    /// The newest first.
    entries: VecDeque<Entry>,
    /// The size of all entries.
    size: usize,
    /// The size that the client permits itself.
    limit: usize,
}

struct Entry {
    /// A literal field without indexing.
    field: Box<[u8]>,
    /// How many bytes of it encode the name.
    name_end: usize,
    /// The length of the name when it is decoded.
    name_length: usize,
    size: usize,
}

impl HeaderTable {
    fn new(limit: usize) -> Self {
        Self { entries: VecDeque::new(), size: 0, limit }
    }

    /// Applies what the block says about the table. Returns its fields, as static indices and as literals without indexing.
    /// None if they are too large to be kept.
    fn follow(&mut self, mut block: &[u8]) -> Result<Option<Bytes>, Untraceable> {
        let mut kept = Some(BytesMut::with_capacity(block.len()));
        let mut keep = |field: &[u8]| {
            kept = kept.take().filter(|kept| kept.len() + field.len() <= BLOCK_LIMIT);
            if let Some(kept) = &mut kept {
                kept.put_slice(field);
            }
        };
        let mut has_field = false;
        while !block.is_empty() {
            match next_field(&mut block).ok_or(Untraceable)? {
                // It belongs at the beginning, and may not exceed our setting (RFC 7541 sections 4.2 and 6.3).
                Field::SizeUpdate(limit) if !has_field && limit <= SIZE_LIMIT => {
                    self.limit = limit;
                    self.evict(0);
                    continue;
                }
                Field::SizeUpdate(_) => return Err(Untraceable),
                Field::Indexed(index @ 1..=LAST_STATIC) => {
                    keep(&[INDEXED | u8::try_from(index).expect("at most LAST_STATIC")]);
                }
                Field::Indexed(index) => keep(&self.entry(index)?.field),
                Field::Literal { indexing, name, value } => {
                    let mut literal = Vec::with_capacity(value.bytes.len() + 8);
                    self.put_name(&name, &mut literal)?;
                    let name_end = literal.len();
                    put_string(value, &mut literal);
                    match indexing {
                        Indexing::Incremental => {
                            let name_length = self.name_length(&name)?;
                            let size = name_length + decoded_length(value)? + ENTRY_SIZE;
                            let field = literal.clone().into_boxed_slice();
                            self.insert(Entry { field, name_end, name_length, size });
                        }
                        Indexing::Without => {}
                        Indexing::Never => literal[0] |= NEVER_INDEXED,
                    }
                    keep(&literal);
                }
            }
            has_field = true;
        }
        Ok(kept.map(BytesMut::freeze))
    }

    fn entry(&self, index: usize) -> Result<&Entry, Untraceable> {
        let at = index.checked_sub(LAST_STATIC + 1).ok_or(Untraceable)?;
        self.entries.get(at).ok_or(Untraceable)
    }

    /// Appends the beginning of a literal field without indexing, up to its value.
    fn put_name(&self, name: &Name<'_>, into: &mut Vec<u8>) -> Result<(), Untraceable> {
        match *name {
            Name::Indexed(index @ 1..=LAST_STATIC) => put_integer(index, 4, into),
            Name::Indexed(index) => {
                let entry = self.entry(index)?;
                into.put_slice(&entry.field[..entry.name_end]);
            }
            Name::Literal(name) => {
                into.put_u8(LITERAL);
                put_string(name, into);
            }
        }
        Ok(())
    }

    fn name_length(&self, name: &Name<'_>) -> Result<usize, Untraceable> {
        match *name {
            Name::Indexed(index @ 1..=LAST_STATIC) => Ok(STATIC_NAME_LENGTHS[index - 1].into()),
            Name::Indexed(index) => Ok(self.entry(index)?.name_length),
            Name::Literal(name) => decoded_length(name),
        }
    }

    /// An entry that is larger than the table empties it (RFC 7541 section 4.4).
    fn insert(&mut self, entry: Entry) {
        self.evict(entry.size);
        if entry.size <= self.limit {
            self.size += entry.size;
            self.entries.push_front(entry);
        }
    }

    /// Removes the oldest entries until there is room for so many bytes.
    fn evict(&mut self, needed: usize) {
        while self.size + needed > self.limit
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= oldest.size;
        }
    }
}

fn decoded_length(string: Encoded<'_>) -> Result<usize, Untraceable> {
    if string.is_huffman { huffman_length(string.bytes).ok_or(Untraceable) } else { Ok(string.bytes.len()) }
}

/// How many letters a Huffman code has. None if it is invalid (RFC 7541 section 5.2).
fn huffman_length(bytes: &[u8]) -> Option<usize> {
    let (mut length, mut code, mut bits) = (0, 0, 0);
    for byte in bytes {
        for at in (0..8).rev() {
            code = code << 1 | u32::from(byte >> at & 1);
            bits += 1;
            if code < *CODE_ENDS.get(bits)? {
                length += 1;
                (code, bits) = (0, 0);
            }
        }
    }
    let is_padding = bits < 8 && code == (1 << bits) - 1;
    is_padding.then_some(length)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use hyper::header::{HeaderName, HeaderValue};
    use hyper::{HeaderMap, Method, Request, Uri};
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::frame::{CONTINUATION, END_STREAM, HEAD_LENGTH, SETTINGS};
    use super::super::header_block::{
        huffman_code, may_have_endless_response, put_field, with_last_event_id,
    };
    use super::*;
    use crate::connection::PREFACE;

    /// RFC 7541 appendix A.
    const STATIC: [(&str, &str); LAST_STATIC] = [
        (":authority", ""),
        (":method", "GET"),
        (":method", "POST"),
        (":path", "/"),
        (":path", "/index.html"),
        (":scheme", "http"),
        (":scheme", "https"),
        (":status", "200"),
        (":status", "204"),
        (":status", "206"),
        (":status", "304"),
        (":status", "400"),
        (":status", "404"),
        (":status", "500"),
        ("accept-charset", ""),
        ("accept-encoding", "gzip, deflate"),
        ("accept-language", ""),
        ("accept-ranges", ""),
        ("accept", ""),
        ("access-control-allow-origin", ""),
        ("age", ""),
        ("allow", ""),
        ("authorization", ""),
        ("cache-control", ""),
        ("content-disposition", ""),
        ("content-encoding", ""),
        ("content-language", ""),
        ("content-length", ""),
        ("content-location", ""),
        ("content-range", ""),
        ("content-type", ""),
        ("cookie", ""),
        ("date", ""),
        ("etag", ""),
        ("expect", ""),
        ("expires", ""),
        ("from", ""),
        ("host", ""),
        ("if-match", ""),
        ("if-modified-since", ""),
        ("if-none-match", ""),
        ("if-range", ""),
        ("if-unmodified-since", ""),
        ("last-modified", ""),
        ("link", ""),
        ("location", ""),
        ("max-forwards", ""),
        ("proxy-authenticate", ""),
        ("proxy-authorization", ""),
        ("range", ""),
        ("referer", ""),
        ("refresh", ""),
        ("retry-after", ""),
        ("server", ""),
        ("set-cookie", ""),
        ("strict-transport-security", ""),
        ("transfer-encoding", ""),
        ("user-agent", ""),
        ("vary", ""),
        ("via", ""),
        ("www-authenticate", ""),
    ];
    /// The letters of which `huffman_code` knows the code.
    const LETTERS: &[u8] = b"aceiost-/dghlmnprvxy";

    type Pair = (String, String);

    fn huffman(text: &str) -> Vec<u8> {
        let mut bits: Vec<u32> = Vec::new();
        for letter in text.bytes() {
            let (code, length) = huffman_code(letter);
            bits.extend((0..length).rev().map(|at| code >> at & 1));
        }
        bits.resize(bits.len().next_multiple_of(8), 1);
        let byte = |bits: &[u32]| bits.iter().fold(0, |byte, bit| byte << 1 | bit);
        bits.chunks(8).map(|bits| u8::try_from(byte(bits)).expect("eight bits")).collect()
    }

    fn text_of(string: Encoded<'_>) -> String {
        if !string.is_huffman {
            return String::from_utf8(string.bytes.to_vec()).expect("the test writes text");
        }
        let (mut text, mut code, mut bits) = (String::new(), 0, 0);
        for at in 0..string.bytes.len() * 8 {
            code = code << 1 | u32::from(string.bytes[at / 8] >> (7 - at % 8) & 1);
            bits += 1;
            if let Some(letter) = LETTERS.iter().find(|letter| huffman_code(**letter) == (code, bits)) {
                text.push(char::from(*letter));
                (code, bits) = (0, 0);
            }
        }
        text
    }

    /// Decodes a block that refers to no table, and enters nothing into one. The bool: whether a field is never indexed.
    fn decode(mut block: &[u8]) -> Vec<(Pair, bool)> {
        let mut fields = Vec::new();
        while !block.is_empty() {
            fields.push(match next_field(&mut block).expect("the block is valid") {
                Field::Indexed(index) => (own(STATIC[index - 1]), false),
                Field::Literal { indexing, name, value } => {
                    assert!(!matches!(indexing, Indexing::Incremental), "a field enters the table");
                    let name = match name {
                        Name::Indexed(index) => STATIC[index - 1].0.to_owned(),
                        Name::Literal(name) => text_of(name),
                    };
                    ((name, text_of(value)), matches!(indexing, Indexing::Never))
                }
                Field::SizeUpdate(_) => panic!("a size update"),
            });
        }
        fields
    }

    fn own((name, value): (&str, &str)) -> Pair {
        (name.to_owned(), value.to_owned())
    }

    fn plain(fields: Vec<(Pair, bool)>) -> Vec<Pair> {
        fields.into_iter().map(|(field, _)| field).collect()
    }

    fn hex(digits: &str) -> Vec<u8> {
        let digits: Vec<u8> = digits.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair).expect("digits");
            u8::from_str_radix(pair, 16).expect("two digits")
        };
        digits.chunks(2).map(byte).collect()
    }

    #[test]
    fn names_of_the_static_table_have_their_lengths() {
        for ((name, _), length) in STATIC.iter().zip(STATIC_NAME_LENGTHS) {
            assert_eq!(name.len(), usize::from(length), "{name}");
        }
    }

    /// RFC 7541 appendices C.4 and C.6.
    #[test]
    fn table_has_the_sizes_of_the_examples_of_the_rfc() {
        let requests = [
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", 57),
            ("8286 84be 5886 a8eb 1064 9cbf", 110),
            ("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", 164),
        ];
        let responses = [
            (
                "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e
                919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
                222,
            ),
            ("4883 640e ffc1 c0bf", 222),
            (
                "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7
                821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed
                4ee5 b106 3d50 07",
                215,
            ),
        ];
        for (blocks, limit) in [(requests, SIZE_LIMIT), (responses, 256)] {
            let mut table = HeaderTable::new(limit);
            for (block, size) in blocks {
                let kept = table.follow(&hex(block)).expect("the block is valid").expect("it is small");
                assert_eq!(table.size, size, "{block}");
                assert_eq!(independent(&kept), Some(kept.clone()), "{block}");
            }
        }
    }

    #[test]
    fn field_of_the_table_becomes_a_literal_without_indexing() {
        let mut table = HeaderTable::new(SIZE_LIMIT);
        let mut follow = |block: &[u8]| table.follow(block).map(|kept| kept.expect("it is small"));
        // Fields with a new name, with a name of the static table that needs two bytes in a literal without indexing, and
        // with the name of an entry.
        assert_eq!(follow(b"\x40\x01a\x02bc").expect("valid"), &b"\0\x01a\x02bc"[..]);
        assert_eq!(follow(b"\x53\x01d").expect("valid"), &b"\x0f\x04\x01d"[..]);
        assert_eq!(follow(b"\x7f\x00\x01e").expect("valid"), &b"\0\x01a\x01e"[..]);
        assert_eq!(
            follow(b"\xbe\xbf\xc0\x0f\x2f\x01f\x1f\x31\x01g\x82").expect("valid"),
            &b"\0\x01a\x01e\x0f\x04\x01d\0\x01a\x02bc\0\x01a\x01f\x10\x01a\x01g\x82"[..],
        );
    }

    #[test]
    fn invalid_block_makes_the_table_untraceable() {
        let name = b"\x40\x01a\x01b";
        for block in [
            &b"\xbf"[..],
            b"\x80",
            b"\x7f\x01\x01e",
            // Size updates after a field, and above the limit.
            b"\x82\x20",
            b"\x3f\xe2\x1f",
            // An entry that a size update has removed.
            b"\x20\xbe",
            b"\x20\x3f\xe1\x1f\xbe",
            // Huffman codes with a padding of a whole byte, of zeros, and with the end-of-string symbol.
            b"\x40\x82\x1f\xff\x01b",
            b"\x40\x81\x18\x01b",
            b"\x40\x01a\x84\xff\xff\xff\xff",
            b"\x40\x01",
        ] {
            let mut table = HeaderTable::new(SIZE_LIMIT);
            table.follow(name).expect("the block is valid");
            assert_eq!(table.follow(block), Err(Untraceable), "{block:?}");
        }
    }

    #[test]
    fn entry_that_is_larger_than_the_table_empties_it() {
        let mut table = HeaderTable::new(SIZE_LIMIT);
        let mut large = BytesMut::new();
        put_field(b"a", &[b'x'; SIZE_LIMIT - ENTRY_SIZE - 1], &mut large);
        large[0] = 0x40;
        table.follow(&large).expect("the block is valid");
        assert_eq!((table.size, table.entries.len()), (SIZE_LIMIT, 1));
        let mut larger = BytesMut::new();
        put_field(b"a", &[b'x'; SIZE_LIMIT - ENTRY_SIZE], &mut larger);
        larger[0] = 0x40;
        table.follow(&larger).expect("the block is valid");
        assert_eq!((table.size, table.entries.len()), (0, 0));
    }

    /// Each reference makes a few thousand bytes out of one.
    #[test]
    fn block_that_would_be_too_large_is_not_kept_but_followed() {
        let mut table = HeaderTable::new(SIZE_LIMIT);
        let mut block = BytesMut::new();
        put_field(b"a", &[b'x'; 4_000], &mut block);
        block[0] = 0x40;
        table.follow(&block).expect("the block is valid");
        assert!(table.follow(b"\xbe\xbe").expect("the block is valid").is_some());
        assert_eq!(table.follow(b"\xbe\xbe\xbe\x40\x01b\x01c"), Ok(None));
        assert_eq!(table.follow(b"\xbe"), Ok(Some(Bytes::from_static(b"\0\x01b\x01c"))));
    }

    #[test]
    fn block_is_followed_in_frames_with_padding_and_priority_and_in_parts() {
        const PADDED: u8 = 8;
        const WITH_PRIORITY: u8 = 0x20;
        let mut table = ClientTable::new();
        let mut follow = |frame_type, flags, payload: &[u8]| {
            table.follow(Head::new(frame_type, flags, payload.len()), payload)
        };
        let padded = b"\x02\0\0\0\0\x09\x40\x01a\x01b..";
        assert!(
            follow(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, padded).is_ok_and(|kept| kept.is_some())
        );
        assert_eq!(follow(HEADERS, PADDED, b"\x01\x40\x01."), Ok(None));
        assert_eq!(follow(CONTINUATION, 0, b""), Ok(None));
        assert_eq!(follow(CONTINUATION, 0, b"c\x01"), Ok(None));
        let kept = Bytes::from_static(b"\0\x01c\x01d\0\x01a\x01b");
        assert_eq!(follow(CONTINUATION, END_HEADERS, b"d\xbf"), Ok(Some(kept)));
        assert_eq!(follow(HEADERS, END_HEADERS | PADDED, b"\x03.."), Err(Untraceable));
        assert_eq!(follow(HEADERS, END_HEADERS | WITH_PRIORITY, b"\0\0\0"), Err(Untraceable));
        assert_eq!(follow(HEADERS, END_HEADERS | PADDED, b""), Err(Untraceable));
    }

    #[test]
    fn parts_of_a_block_are_collected_up_to_a_limit() {
        let mut table = ClientTable::new();
        let part = [0x82; COLLECTED_LIMIT / 2];
        let head = |frame_type| Head::new(frame_type, 0, part.len());
        assert_eq!(table.follow(head(HEADERS), &part), Ok(None));
        assert_eq!(table.follow(head(CONTINUATION), &part), Ok(None));
        assert_eq!(table.follow(head(CONTINUATION), &part), Err(Untraceable));
    }

    /// How a model of an encoder writes a field.
    #[derive(Clone, Debug)]
    struct Written {
        /// 0: by its index; 1 to 3: as a literal with incremental indexing, without indexing, never indexed.
        how: u8,
        /// Selects an entry of the static or of the dynamic table.
        entry: usize,
        /// None: the name of the entry.
        name: Option<String>,
        value: String,
        is_huffman: bool,
    }

    /// A model of an encoder.
    struct Encoder {
        entries: VecDeque<Pair>,
        limit: usize,
    }

    impl Encoder {
        fn size((name, value): &Pair) -> usize {
            name.len() + value.len() + 32
        }

        fn evict(&mut self, needed: usize) {
            while self.entries.iter().map(Self::size).sum::<usize>() + needed > self.limit {
                if self.entries.pop_back().is_none() {
                    return;
                }
            }
        }

        fn put(text: &str, is_huffman: bool, into: &mut Vec<u8>) {
            let coded = if is_huffman { huffman(text) } else { text.as_bytes().to_vec() };
            put_string(Encoded { is_huffman, bytes: &coded }, into);
        }

        /// Appends a field, and returns it.
        fn encode(&mut self, written: &Written, into: &mut Vec<u8>) -> Pair {
            // Half of the references go to the dynamic table, unless it is empty.
            let entry = written.entry / 2;
            let index = match (written.entry % 2, self.entries.len()) {
                (0, _) | (_, 0) => entry % LAST_STATIC + 1,
                (_, count) => LAST_STATIC + 1 + entry % count,
            };
            let (name, value) = match STATIC.get(index - 1) {
                Some(field) => own(*field),
                None => self.entries[index - LAST_STATIC - 1].clone(),
            };
            let first = into.len();
            if written.how == 0 {
                put_integer(index, 7, into);
                into[first] |= 0x80;
                return (name, value);
            }
            let (bits, mask) = [(6, 0x40), (4, 0), (4, 0x10)][usize::from(written.how) - 1];
            put_integer(if written.name.is_some() { 0 } else { index }, bits, into);
            into[first] |= mask;
            if let Some(name) = &written.name {
                Self::put(name, written.is_huffman, into);
            }
            Self::put(&written.value, written.is_huffman, into);
            let field = (written.name.clone().unwrap_or(name), written.value.clone());
            if written.how == 1 {
                let size = Self::size(&field);
                self.evict(size);
                if size <= self.limit {
                    self.entries.push_front(field.clone());
                }
            }
            field
        }
    }

    fn text(length: impl Strategy<Value = usize>) -> impl Strategy<Value = String> {
        let letter = prop::sample::select(LETTERS).prop_map(char::from);
        length
            .prop_flat_map(move |length| prop::collection::vec(letter.clone(), length))
            .prop_map(|letters| letters.into_iter().collect())
    }

    fn written() -> impl Strategy<Value = Written> {
        let value = text(prop_oneof![8 => 0..40_usize, 1 => 1_000..5_000_usize]);
        (0..4_u8, any::<usize>(), prop::option::of(text(0..20_usize)), value, any::<bool>())
            .prop_map(|(how, entry, name, value, is_huffman)| Written { how, entry, name, value, is_huffman })
    }

    /// The size updates at the beginning of a block, and its fields.
    fn blocks() -> impl Strategy<Value = Vec<(Vec<usize>, Vec<Written>)>> {
        let sizes = prop_oneof![
            3 => Just(Vec::new()),
            1 => prop::collection::vec(prop_oneof![Just(0), Just(SIZE_LIMIT), 0..SIZE_LIMIT], 1..3),
        ];
        prop::collection::vec((sizes, prop::collection::vec(written(), 0..12)), 1..12)
    }

    proptest! {
        #[test]
        fn kept_block_has_the_fields_that_the_encoder_has_written(blocks in blocks()) {
            let mut encoder = Encoder { entries: VecDeque::new(), limit: SIZE_LIMIT };
            let mut table = HeaderTable::new(SIZE_LIMIT);
            for (sizes, fields) in blocks {
                let mut block = Vec::new();
                for size in sizes {
                    put_integer(size, 5, &mut block);
                    let first = block.len() - if size < 31 { 1 } else if size < 31 + 128 { 2 } else { 3 };
                    block[first] |= 0x20;
                    encoder.limit = size;
                    encoder.evict(0);
                }
                let written: Vec<_> = fields
                    .iter()
                    .map(|field| (encoder.encode(field, &mut block), field.how == 3))
                    .collect();
                let kept = table.follow(&block).expect("the block is valid");
                prop_assert_eq!(table.size, encoder.entries.iter().map(Encoder::size).sum::<usize>());
                prop_assert_eq!(table.entries.len(), encoder.entries.len());
                if let Some(kept) = kept {
                    prop_assert!(kept.len() <= BLOCK_LIMIT);
                    prop_assert_eq!(decode(&kept), written);
                }
            }
        }

        #[test]
        fn any_bytes_are_followed_without_a_panic(
            blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..6),
        ) {
            check_blocks(&blocks);
        }

        /// The client of h2 has Huffman codes for all letters, and enters fields into its table until it has our settings.
        #[test]
        fn kept_blocks_of_the_client_of_h2_have_the_fields_of_its_requests(
            requests in prop::collection::vec(fields_of_a_request(), 1..8),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("the runtime starts");
            runtime.block_on(keeps_the_fields(requests));
        }
    }

    fn check_blocks(blocks: &[Vec<u8>]) {
        let mut table = HeaderTable::new(SIZE_LIMIT);
        for block in blocks {
            let followed = table.follow(block);
            let size = table.entries.iter().map(|entry| entry.size).sum::<usize>();
            assert!(table.size == size && size <= SIZE_LIMIT);
            let Ok(kept) = followed else { return };
            let Some(kept) = kept else { continue };
            assert!(kept.len() <= BLOCK_LIMIT);
            assert_eq!(independent(&kept), Some(kept.clone()), "it needs a table");
            for has_body in [false, true] {
                if !may_have_endless_response(&kept, has_body) {
                    continue;
                }
                if let Some(next) = with_last_event_id(&kept, b"7") {
                    assert!(may_have_endless_response(&next, has_body));
                    assert_eq!(with_last_event_id(&next, b"7"), Some(next));
                }
            }
        }
    }

    #[cfg(feature = "fuzz-tests")]
    #[test]
    fn fuzzed_header_blocks_keep_their_meaning() {
        crate::fuzz::target!("header_blocks").with_type::<Vec<Vec<u8>>>().for_each(|blocks| {
            check_blocks(blocks);
            let Some(first) = blocks.first() else { return };
            for has_body in [false, true] {
                if may_have_endless_response(first, has_body)
                    && let Some(kept) = independent(first)
                {
                    assert!(may_have_endless_response(&kept, has_body));
                }
            }
        });
    }

    fn fields_of_a_request() -> impl Strategy<Value = HeaderMap> {
        const NAMES: &[&str] =
            &["accept", "cookie", "user-agent", "x-a", "x-longer", "sec-fetch-mode", "via"];
        // So that fields occur again.
        const VALUES: &[&[u8]] = &[b"*/*", b"text/event-stream", b"\xc3\xa4\x09"];
        let byte = prop_oneof![4 => b' '..=b'~', 1 => 0x80..=0xff_u8];
        let value = prop_oneof![
            4 => prop::sample::select(VALUES).prop_map(<[u8]>::to_vec),
            2 => prop::collection::vec(byte.clone(), 0..40),
            // The code of a block stays below the limit, although h2 also codes letters whose codes are long.
            1 => prop::collection::vec(byte, 1_000..1_500),
        ];
        let field = (prop::sample::select(NAMES), value, prop::bool::weighted(0.1));
        prop::collection::vec(field, 0..6).prop_map(|fields| {
            let fields = fields.into_iter().map(|(name, value, is_sensitive)| {
                let mut value = HeaderValue::from_bytes(&value).expect("the value is valid");
                value.set_sensitive(is_sensitive);
                (HeaderName::from_static(name), value)
            });
            let mut map = HeaderMap::new();
            for (name, value) in fields {
                map.append(name, value);
            }
            map
        })
    }

    /// The frames with which the client of h2 sends requests before it has received our settings.
    async fn frames_of_h2(requests: &[HeaderMap]) -> Vec<(Head, Vec<u8>)> {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let (mut sender, connection) = h2::client::handshake(near).await.expect("the handshake succeeds");
        let connection = tokio::spawn(connection);
        let mut responses = Vec::new();
        for fields in requests {
            let mut request = Request::get("http://test/path").body(()).expect("the request is valid");
            *request.headers_mut() = fields.clone();
            std::future::poll_fn(|cx| sender.poll_ready(cx)).await.expect("the connection is open");
            responses.push(sender.send_request(request, true).expect("the request is sent"));
        }
        let mut preface = [0; PREFACE.len()];
        far.read_exact(&mut preface).await.expect("the preface arrives");
        let mut frames = Vec::new();
        let mut missing = requests.len();
        while missing > 0 {
            let mut head = [0; HEAD_LENGTH];
            far.read_exact(&mut head).await.expect("a frame arrives");
            let head = Head::decode(head);
            let mut payload = vec![0; head.length];
            far.read_exact(&mut payload).await.expect("its payload arrives");
            if matches!(head.frame_type, HEADERS | CONTINUATION) {
                missing -= usize::from(head.has(END_HEADERS));
                frames.push((head, payload));
            }
        }
        connection.abort();
        frames
    }

    /// Follows requests of the client of h2, and decodes what is kept with the server of h2.
    async fn keeps_the_fields(requests: Vec<HeaderMap>) {
        let mut table = ClientTable::new();
        let mut kept = Vec::new();
        for (head, payload) in frames_of_h2(&requests).await {
            let block = table.follow(head, &payload).expect("h2 writes valid blocks");
            if head.has(END_HEADERS) {
                kept.push(block);
            }
        }
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut bytes = BytesMut::from(PREFACE);
        Head::new(SETTINGS, 0, 0).put(&mut bytes);
        for (stream, block) in (1..).step_by(2).zip(kept.iter().flatten()) {
            Head { stream, ..Head::new(HEADERS, END_HEADERS | END_STREAM, block.len()) }.put(&mut bytes);
            bytes.extend_from_slice(block);
        }
        far.write_all(&bytes).await.expect("the pipe has room");
        let mut server = h2::server::handshake(near).await.expect("the handshake succeeds");
        for (fields, _) in requests.iter().zip(&kept).filter(|(_, block)| block.is_some()) {
            let (request, _respond) = server.accept().await.expect("a request").expect("it is valid");
            assert_eq!(request.method(), Method::GET);
            assert_eq!(request.uri(), &Uri::from_static("http://test/path"));
            assert_eq!(request.headers(), fields);
        }
    }

    /// Without such references the property above would not test the table.
    #[tokio::test]
    async fn h2_client_refers_to_its_table_before_it_has_our_settings() {
        let fields = HeaderMap::from_iter([(HeaderName::from_static("x-a"), HeaderValue::from_static("b"))]);
        let frames = frames_of_h2(&[fields.clone(), fields]).await;
        let mut block = &frames[1].1[..];
        let mut indices = Vec::new();
        while !block.is_empty() {
            if let Some(Field::Indexed(index)) = next_field(&mut block) {
                indices.push(index);
            }
        }
        assert!(indices.iter().any(|index| *index > LAST_STATIC), "{indices:?}");
    }

    #[test]
    fn decoder_of_this_test_reads_what_its_encoder_writes() {
        let mut encoder = Encoder { entries: VecDeque::new(), limit: 0 };
        for is_huffman in [false, true] {
            let (name, value) = ("accept", String::from_utf8(LETTERS.to_vec()).expect("letters"));
            let written =
                Written { how: 2, entry: 0, name: Some(name.into()), value: value.clone(), is_huffman };
            let mut block = Vec::new();
            encoder.encode(&written, &mut block);
            assert_eq!(plain(decode(&block)), [(name.into(), value)]);
        }
    }
}
