//! A model of an encoder and of a decoder with a header table (HPACK, RFC 7541), for tests. The strings in it are decoded.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::header_block::{
    Encoded, Field, INCREMENTAL, INDEXED, Indexing, LAST_STATIC, LITERAL, NEVER_INDEXED, Name, SIZE_UPDATE,
    huffman_code, next_field, put_integer, put_string,
};
use super::header_table::SIZE_LIMIT;

/// RFC 7541 appendix A.
pub const STATIC: [(&str, &str); LAST_STATIC] = [
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
pub const LETTERS: &[u8] = b"aceiost-/dghlmnprvxy";

/// A name and a value.
pub type Pair = (String, String);

pub fn pair((name, value): (&str, &str)) -> Pair {
    (name.to_owned(), value.to_owned())
}

/// The entries of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The newest first.
    pub entries: VecDeque<Pair>,
    pub limit: usize,
}

impl Table {
    pub fn new(limit: usize) -> Self {
        Self { entries: VecDeque::new(), limit }
    }

    /// As RFC 7541 section 4.1 counts it.
    pub fn size(&self) -> usize {
        self.entries.iter().map(|(name, value)| name.len() + value.len() + 32).sum()
    }

    fn resize(&mut self, limit: usize) {
        self.limit = limit;
        while self.size() > limit {
            self.entries.pop_back();
        }
    }

    /// An entry is evicted only if there is no room for the new one (RFC 7541 section 4.4).
    fn enter(&mut self, (name, value): &Pair) {
        self.entries.push_front((name.clone(), value.clone()));
        while self.size() > self.limit {
            self.entries.pop_back();
        }
    }

    fn field(&self, index: usize) -> Option<Pair> {
        match STATIC.get(index.checked_sub(1)?) {
            Some(field) => Some(pair(*field)),
            None => self.entries.get(index - LAST_STATIC - 1).cloned(),
        }
    }
}

/// How a model of an encoder writes a field.
#[derive(Clone, Debug)]
pub struct Written {
    pub how: How,
    /// Selects an entry of the static or of the dynamic table.
    pub entry: usize,
    /// The name of the field. If it is None, the field has the name of the entry.
    pub name: Option<String>,
    pub value: String,
    pub is_huffman: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Index,
    Incremental,
    Without,
    Never,
}

/// A model of an encoder.
#[derive(Clone)]
pub struct Encoder {
    pub table: Table,
}

impl Encoder {
    pub fn new(limit: usize) -> Self {
        Self { table: Table::new(limit) }
    }

    /// Appends a size update.
    pub fn resize(&mut self, size: usize, into: &mut Vec<u8>) {
        put_integer(SIZE_UPDATE, size, 5, into);
        self.table.resize(size);
    }

    /// Appends a field, and returns it.
    pub fn encode(&mut self, written: &Written, into: &mut Vec<u8>) -> Pair {
        // Half of the references go to the dynamic table, unless it is empty.
        let entry = written.entry / 2;
        let index = match (written.entry % 2, self.table.entries.len()) {
            (0, _) | (_, 0) => entry % LAST_STATIC + 1,
            (_, count) => LAST_STATIC + 1 + entry % count,
        };
        let (name, value) = self.table.field(index).expect("the index is in one of the tables");
        if written.how == How::Index {
            put_integer(INDEXED, index, 7, into);
            return (name, value);
        }
        let field = (written.name.clone().unwrap_or(name), written.value.clone());
        let index = if written.name.is_some() { 0 } else { index };
        self.literal(written.how, index, &field, written.is_huffman, into);
        field
    }

    /// Appends a field in the shortest encoding: its index, or the index of its name.
    pub fn shortest(&mut self, field: &Pair, how: How, is_huffman: bool, into: &mut Vec<u8>) {
        let fields = || (1..).map_while(|index| Some((index, self.table.field(index)?)));
        if let Some((index, _)) = fields().find(|(_, other)| other == field) {
            put_integer(INDEXED, index, 7, into);
            return;
        }
        let index = fields().find(|(_, (name, _))| *name == field.0).map_or(0, |(index, _)| index);
        self.literal(how, index, field, is_huffman, into);
    }

    /// `index`: that of the name, or 0.
    fn literal(&mut self, how: How, index: usize, field: &Pair, is_huffman: bool, into: &mut Vec<u8>) {
        let (first, bits) = match how {
            How::Incremental => (INCREMENTAL, 6),
            How::Never => (NEVER_INDEXED, 4),
            How::Index | How::Without => (LITERAL, 4),
        };
        put_integer(first, index, bits, into);
        let mut put = |text: &str| {
            let coded = if is_huffman { huffman(text) } else { text.as_bytes().to_vec() };
            put_string(Encoded { is_huffman, bytes: &coded }, into);
        };
        if index == 0 {
            put(&field.0);
        }
        put(&field.1);
        if how == How::Incremental {
            self.table.enter(field);
        }
    }
}

/// A model of a decoder.
pub struct Decoder {
    pub table: Table,
}

impl Decoder {
    pub fn new() -> Self {
        Self { table: Table::new(SIZE_LIMIT) }
    }

    /// Decodes a block. The bool: whether a field is never indexed.
    pub fn decode_all(&mut self, mut block: &[u8]) -> Vec<(Pair, bool)> {
        let mut fields = Vec::new();
        while !block.is_empty() {
            match next_field(&mut block).expect("the block is valid") {
                Field::Indexed(index) => {
                    fields.push((self.table.field(index).expect("the entry exists"), false));
                }
                Field::Literal { indexing, name, value } => {
                    let name = match name {
                        Name::Indexed(index) => self.table.field(index).expect("the entry exists").0,
                        Name::Literal(name) => text_of(name),
                    };
                    let field = (name, text_of(value));
                    if matches!(indexing, Indexing::Incremental) {
                        self.table.enter(&field);
                    }
                    fields.push((field, matches!(indexing, Indexing::Never)));
                }
                Field::SizeUpdate(size) => {
                    assert!(fields.is_empty() && size <= SIZE_LIMIT, "a size update to {size}");
                    self.table.resize(size);
                }
            }
        }
        fields
    }

    pub fn decode(&mut self, block: &[u8]) -> Vec<Pair> {
        self.decode_all(block).into_iter().map(|(field, _)| field).collect()
    }
}

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

pub fn text(length: impl Strategy<Value = usize>) -> impl Strategy<Value = String> {
    let letter = prop::sample::select(LETTERS).prop_map(char::from);
    length
        .prop_flat_map(move |length| prop::collection::vec(letter.clone(), length))
        .prop_map(|letters| letters.into_iter().collect())
}

fn written() -> impl Strategy<Value = Written> {
    let how = prop::sample::select(&[How::Index, How::Incremental, How::Without, How::Never][..]);
    let value = text(prop_oneof![8 => 0..40_usize, 1 => 1_000..5_000_usize]);
    (how, any::<usize>(), prop::option::of(text(0..20_usize)), value, any::<bool>())
        .prop_map(|(how, entry, name, value, is_huffman)| Written { how, entry, name, value, is_huffman })
}

/// The size updates at the beginning of a block, and its fields.
pub fn blocks() -> impl Strategy<Value = Vec<(Vec<usize>, Vec<Written>)>> {
    let sizes = prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec(prop_oneof![Just(0), Just(SIZE_LIMIT), 0..SIZE_LIMIT], 1..3),
    ];
    prop::collection::vec((sizes, prop::collection::vec(written(), 0..12)), 1..12)
}
