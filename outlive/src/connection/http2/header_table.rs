//! The header table of the client's encoder (the dynamic table of RFC 7541 section 2.3.2).
//!
//! h2 decodes the header blocks of the client, but does not show its table. So the interposer follows the table too. When the
//! connection continues with another h2, the table is written as one header block ([`ClientTable::pack`]). A request with
//! this block, which h2 refuses, gives the decoder of that h2 the same table.
//!
//! Names and values stay as the client has encoded them. Only the length of a Huffman code has to be known, because it
//! counts for the size of the table.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};

use super::HEADER_LIST_LIMIT;
use super::frame::{END_HEADERS, END_STREAM, HEADERS, Head};
use super::header_block::{
    BLOCK_LIMIT, Clue, Clues, Encoded, Field, INCREMENTAL, Indexing, LAST_STATIC, LITERAL, NEVER_INDEXED,
    Name, SIZE_UPDATE, next_field, put_integer, put_string,
};
use crate::transport::http2_state::FIRST_HEADER_TABLE_SIZE;

/// The largest size of the table, as RFC 7541 section 4.1 counts it. The server announces it in its settings.
pub const SIZE_LIMIT: usize = FIRST_HEADER_TABLE_SIZE as usize;
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
/// The last index of the static table whose name begins with a colon.
const LAST_PSEUDO: u8 = 14;

/// A header block that h2 does not accept either, or that cannot be followed. The table is not known after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Untraceable;

/// What a frame of a header block does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It need not be passed to [`ClientTable::follow`].
    None,
    /// It may change the table, so `follow` has to read it.
    MayChangeTable,
    /// It is a request whose response may have no end. `follow` has to read it too.
    MayBeEndless,
}

/// The table of a client, and the beginning of a header block.
pub struct ClientTable {
    table: HeaderTable,
    /// The block so far, if CONTINUATION follows.
    block: Vec<u8>,
}

impl ClientTable {
    /// The table of a client that has sent no header block.
    pub fn new() -> Self {
        Self { table: HeaderTable::new(SIZE_LIMIT), block: Vec::new() }
    }

    /// The table that was packed. Fails if it is not a header block.
    pub fn unpack(packed: &[u8]) -> Result<Self, Untraceable> {
        let mut table = Self::new();
        table.table.apply(packed, None)?;
        Ok(table)
    }

    /// The table as a header block that gives an empty table the same entries and the same limit. Empty if it is that of
    /// a client that has sent no header block.
    pub fn pack(&self) -> Bytes {
        self.table.pack()
    }

    /// Whether h2 accepts the packed table as the fields of a request, so that it refuses the request only because of its
    /// size: no pseudo-header field follows another field or occurs twice (RFC 9113 section 8.3).
    pub fn is_well_formed(&self) -> bool {
        self.table.is_well_formed()
    }

    /// Whether an empty table would become this one, if it followed these blocks.
    pub fn is_made_by(&self, blocks: &[Bytes]) -> bool {
        let mut table = HeaderTable::new(SIZE_LIMIT);
        blocks.iter().all(|block| table.apply(block, None).is_ok()) && table.pack() == self.pack()
    }

    /// What a frame of a header block would do.
    pub fn effect(&self, head: Head, payload: &[u8]) -> Effect {
        match head.whole_block(payload).map(|block| self.table.scan(block)) {
            Some(Ok(scan)) if scan.clues.may_be_endless(!head.has(END_STREAM)) => Effect::MayBeEndless,
            Some(Ok(scan)) if !scan.changes_table => Effect::None,
            Some(Ok(_) | Err(Untraceable)) | None => Effect::MayChangeTable,
        }
    }

    /// Follows the next frame of a header block, HEADERS or CONTINUATION. If the frame is a request whose response may have
    /// no end, this returns its fields in an encoding that refers to no table, and enters the same fields into one. None
    /// if they would be too large to be kept.
    pub fn follow(&mut self, head: Head, payload: &[u8]) -> Result<Option<Bytes>, Untraceable> {
        let fragment = head.fragment(payload).ok_or(Untraceable)?;
        if head.frame_type == HEADERS && head.has(END_HEADERS) {
            let Scan { changes_table, clues } = self.table.scan(fragment)?;
            let mut kept = clues.may_be_endless(!head.has(END_STREAM)).then(Kept::default);
            if changes_table || kept.is_some() {
                self.table.apply(fragment, kept.as_mut())?;
            }
            return Ok(kept.and_then(Kept::into_block));
        }
        if self.block.len() + fragment.len() > COLLECTED_LIMIT {
            return Err(Untraceable);
        }
        self.block.extend_from_slice(fragment);
        if head.has(END_HEADERS) {
            self.table.apply(&std::mem::take(&mut self.block), None)?;
        }
        Ok(None)
    }
}

/// Fields in an encoding that refers to no table. None if they have become too large to be kept.
struct Kept(Option<BytesMut>);

impl Default for Kept {
    fn default() -> Self {
        Self(Some(BytesMut::new()))
    }
}

impl Kept {
    fn put(&mut self, field: &[u8]) {
        self.0 = self.0.take().filter(|kept| kept.len() + field.len() <= BLOCK_LIMIT);
        if let Some(kept) = &mut self.0 {
            kept.put_slice(field);
        }
    }

    fn into_block(self) -> Option<Bytes> {
        self.0.map(BytesMut::freeze)
    }
}

/// What a header block would do.
struct Scan {
    changes_table: bool,
    clues: Clues,
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
    name_end: u16,
    /// The length of the name when it is decoded.
    name_length: u16,
    size: u16,
    /// The index of the name in the static table. None if the name is a literal that need not be known.
    name: Option<u8>,
    clue: Clue,
}

impl HeaderTable {
    fn new(limit: usize) -> Self {
        Self { entries: VecDeque::new(), size: 0, limit }
    }

    /// Reads a block without changing the table. The clues of a field that refers to an entry of the same block are
    /// ignored.
    fn scan(&self, mut block: &[u8]) -> Result<Scan, Untraceable> {
        let mut clues = Clues::default();
        let mut changes_table = false;
        let mut entered = 0;
        while !block.is_empty() {
            let clue = match next_field(&mut block).ok_or(Untraceable)? {
                Field::SizeUpdate(_) => {
                    changes_table = true;
                    continue;
                }
                Field::Indexed(index @ 1..=LAST_STATIC) => Clue::of_static(index),
                Field::Indexed(index) => {
                    self.earlier(index, entered)?.map_or(Clue::Nothing, |entry| entry.clue)
                }
                Field::Literal { indexing, name, value } => {
                    let name = match name {
                        Name::Indexed(index) if index > LAST_STATIC => {
                            self.earlier(index, entered)?.and_then(|entry| entry.name.map(usize::from))
                        }
                        name => name.index(),
                    };
                    if matches!(indexing, Indexing::Incremental) {
                        changes_table = true;
                        entered += 1;
                    }
                    Clue::of_literal(name, value)
                }
            };
            clues.add(clue);
        }
        Ok(Scan { changes_table, clues })
    }

    /// The entry with an index that counts `entered` newer entries, which are not in the table yet. None if it is one of
    /// these.
    fn earlier(&self, index: usize, entered: usize) -> Result<Option<&Entry>, Untraceable> {
        match index.checked_sub(entered) {
            Some(index) if index > LAST_STATIC => self.entry(index).map(Some),
            _ if index > LAST_STATIC => Ok(None),
            _ => Err(Untraceable),
        }
    }

    /// Applies what a block says about the table. `kept` receives its fields, as static indices and as literals.
    fn apply(&mut self, mut block: &[u8], mut kept: Option<&mut Kept>) -> Result<(), Untraceable> {
        let mut has_field = false;
        while !block.is_empty() {
            let before = block;
            let field = next_field(&mut block).ok_or(Untraceable)?;
            let bytes = &before[..before.len() - block.len()];
            match field {
                // It belongs at the beginning, and may not exceed our setting (RFC 7541 sections 4.2 and 6.3).
                Field::SizeUpdate(limit) if !has_field && limit <= SIZE_LIMIT => {
                    self.limit = limit;
                    self.evict(0);
                    if let Some(kept) = &mut kept {
                        kept.put(bytes);
                    }
                    continue;
                }
                Field::SizeUpdate(_) => return Err(Untraceable),
                Field::Indexed(1..=LAST_STATIC) => {
                    if let Some(kept) = &mut kept {
                        kept.put(bytes);
                    }
                }
                Field::Indexed(index) => {
                    let entry = self.entry(index)?;
                    if let Some(kept) = &mut kept {
                        kept.put(&entry.field);
                    }
                }
                Field::Literal { indexing: Indexing::Incremental, name, value } => {
                    let literal = self.enter(&name, value)?;
                    if let Some(kept) = &mut kept {
                        let mut field = BytesMut::with_capacity(literal.len());
                        put_incremental(&literal, &mut field);
                        kept.put(&field);
                    }
                }
                Field::Literal { indexing, name, value } => {
                    let mut literal = Vec::with_capacity(value.bytes.len() + 8);
                    self.put_name(&name, &mut literal)?;
                    put_string(value, &mut literal);
                    if matches!(indexing, Indexing::Never) {
                        literal[0] |= NEVER_INDEXED;
                    }
                    if let Some(kept) = &mut kept {
                        kept.put(&literal);
                    }
                }
            }
            has_field = true;
        }
        Ok(())
    }

    /// Enters a field, and returns it as a literal without indexing. A field that is larger than the table empties it
    /// (RFC 7541 section 4.4).
    fn enter(&mut self, name: &Name<'_>, value: Encoded<'_>) -> Result<Box<[u8]>, Untraceable> {
        let mut literal = Vec::with_capacity(value.bytes.len() + 8);
        self.put_name(name, &mut literal)?;
        let name_end = literal.len();
        put_string(value, &mut literal);
        let literal = literal.into_boxed_slice();
        let (name_length, name) = match *name {
            Name::Indexed(index) if index > LAST_STATIC => {
                let entry = self.entry(index)?;
                (usize::from(entry.name_length), entry.name.map(usize::from))
            }
            Name::Indexed(index) => (STATIC_NAME_LENGTHS[index - 1].into(), Some(index)),
            Name::Literal(text) => (decoded_length(text)?, name.index()),
        };
        let size = name_length + decoded_length(value)? + ENTRY_SIZE;
        self.evict(size);
        if size <= self.limit {
            self.size += size;
            let small = |length: usize| u16::try_from(length).expect("at most 3.75 times SIZE_LIMIT");
            self.entries.push_front(Entry {
                field: literal.clone(),
                name_end: small(name_end),
                name_length: small(name_length),
                size: small(size),
                name: name.map(|index| u8::try_from(index).expect("at most LAST_STATIC")),
                clue: Clue::of_literal(name, value),
            });
        }
        Ok(literal)
    }

    fn entry(&self, index: usize) -> Result<&Entry, Untraceable> {
        let at = index.checked_sub(LAST_STATIC + 1).ok_or(Untraceable)?;
        self.entries.get(at).ok_or(Untraceable)
    }

    /// Appends the beginning of a literal field without indexing, up to its value.
    fn put_name(&self, name: &Name<'_>, into: &mut Vec<u8>) -> Result<(), Untraceable> {
        match *name {
            Name::Indexed(index @ 1..=LAST_STATIC) => put_integer(LITERAL, index, 4, into),
            Name::Indexed(index) => {
                let entry = self.entry(index)?;
                into.put_slice(&entry.field[..entry.name_end.into()]);
            }
            Name::Literal(name) => {
                into.put_u8(LITERAL);
                put_string(name, into);
            }
        }
        Ok(())
    }

    /// Removes the oldest entries until there is room for so many bytes.
    fn evict(&mut self, needed: usize) {
        while self.size + needed > self.limit
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= usize::from(oldest.size);
        }
    }

    fn pack(&self) -> Bytes {
        if self.entries.is_empty() && self.limit == SIZE_LIMIT {
            return Bytes::new();
        }
        let length = self.entries.iter().map(|entry| entry.field.len()).sum::<usize>();
        let mut packed = BytesMut::with_capacity(3 + length);
        put_integer(SIZE_UPDATE, self.limit, 5, &mut packed);
        for entry in self.entries.iter().rev() {
            put_incremental(&entry.field, &mut packed);
        }
        packed.freeze()
    }

    fn is_well_formed(&self) -> bool {
        let mut seen = [false; 4];
        let mut has_other = false;
        self.entries.iter().rev().all(|entry| {
            let pseudo = match entry.name {
                Some(1) => 0,
                Some(2 | 3) => 1,
                Some(4 | 5) => 2,
                Some(6 | 7) => 3,
                // A request has no other pseudo-header fields.
                Some(8..=LAST_PSEUDO) => return false,
                None if entry.has_pseudo_name() => return false,
                Some(_) | None => {
                    has_other = true;
                    return true;
                }
            };
            let is_first = !std::mem::replace(&mut seen[pseudo], true);
            is_first && !has_other
        })
    }
}

impl Entry {
    /// Whether a literal name begins with a colon.
    fn has_pseudo_name(&self) -> bool {
        // The code of the colon has seven bits (RFC 7541 appendix B).
        const COLON: u8 = 0x5c;
        let mut field = &self.field[..];
        match next_field(&mut field) {
            Some(Field::Literal { name: Name::Literal(Encoded { is_huffman, bytes }), .. }) => bytes
                .first()
                .is_some_and(|first| if is_huffman { first >> 1 == COLON } else { *first == b':' }),
            _ => false,
        }
    }
}

/// Appends a literal field without indexing as one with incremental indexing.
fn put_incremental(literal: &[u8], into: &mut BytesMut) {
    if let Some(Field::Literal { name: Name::Indexed(index), value, .. }) = next_field(&mut { literal }) {
        put_integer(INCREMENTAL, index, 6, into);
        put_string(value, into);
    } else {
        into.put_u8(literal[0] | INCREMENTAL);
        into.put_slice(&literal[1..]);
    }
}

/// The same fields without indexing, and without size updates. `block` refers to no table.
pub fn without_indexing(mut block: &[u8]) -> BytesMut {
    let mut plain = BytesMut::with_capacity(block.len() + 8);
    while !block.is_empty() {
        let before = block;
        let Some(field) = next_field(&mut block) else { break };
        match field {
            Field::SizeUpdate(_) => {}
            Field::Literal { indexing: Indexing::Incremental, name, value } => {
                match name {
                    Name::Indexed(index) => put_integer(LITERAL, index, 4, &mut plain),
                    Name::Literal(name) => {
                        plain.put_u8(LITERAL);
                        put_string(name, &mut plain);
                    }
                }
                put_string(value, &mut plain);
            }
            Field::Indexed(_) | Field::Literal { .. } => {
                plain.put_slice(&before[..before.len() - block.len()]);
            }
        }
    }
    plain
}

fn decoded_length(string: Encoded<'_>) -> Result<usize, Untraceable> {
    if string.is_huffman { huffman_length(string.bytes).ok_or(Untraceable) } else { Ok(string.bytes.len()) }
}

/// The longest code of a letter, in bits (RFC 7541 appendix B).
const LONGEST_CODE: usize = 30;
/// `CODE_ENDS[n]` is the last code of `n` bits plus one. The Huffman code is canonical: the codes of one length are
/// consecutive, and the first of them is the last shorter code plus one, with zero bits appended. So `n` bits are a
/// whole code if their value is below `CODE_ENDS[n]`.
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
/// The length in bits of the code that begins with a byte, by that byte. It is 0 if the code is longer than eight bits.
const SHORT_CODES: [u8; 256] = {
    let mut lengths = [0; 256];
    let mut byte = 0_u32;
    while byte < 256 {
        let mut bits = 8_u8;
        while bits > 0 {
            if byte >> (8 - bits) < CODE_ENDS[bits as usize] {
                lengths[byte as usize] = bits;
            }
            bits -= 1;
        }
        byte += 1;
    }
    lengths
};

/// How many letters a Huffman code has. None if it is invalid (RFC 7541 section 5.2).
fn huffman_length(bytes: &[u8]) -> Option<usize> {
    let mut bytes = bytes.iter();
    // The next bits, the first of them as the highest, and how many they are.
    let (mut next, mut have, mut letters) = (0_u64, 0, 0);
    loop {
        while have <= 56
            && let Some(byte) = bytes.next()
        {
            next |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        let code = match SHORT_CODES[usize::from(next.to_be_bytes()[0])] {
            0 => (9..=LONGEST_CODE).find(|bits| next >> (64 - bits) < u64::from(CODE_ENDS[*bits]))?,
            bits => bits.into(),
        };
        if code > have {
            break;
        }
        next <<= code;
        have -= code;
        letters += 1;
    }
    // The padding is the beginning of a code of ones.
    let is_padding = have < 8 && next == !(u64::MAX >> have);
    is_padding.then_some(letters)
}

#[cfg(test)]
mod tests;
