//! The header table beside a model of an encoder and of a decoder (`header_model.rs`), and beside h2.

use hyper::header::{HeaderName, HeaderValue};
use hyper::{HeaderMap, Method, Request, Uri};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::frame::{CONTINUATION, HEAD_LENGTH, SETTINGS, put_oversized_request};
use super::super::header_block::{put_field, with_last_event_id};
use super::super::header_model::{Decoder, Encoder, How, LETTERS, Pair, STATIC, Written, blocks, pair, text};
use super::*;
use crate::connection::PREFACE;

const REQUEST: u8 = END_STREAM | END_HEADERS;

/// Applies a block, and returns its fields as they would be kept.
fn apply(table: &mut HeaderTable, block: &[u8]) -> Result<Option<Bytes>, Untraceable> {
    let mut kept = Kept::default();
    table.apply(block, Some(&mut kept)).map(|()| kept.into_block())
}

fn follow(table: &mut ClientTable, block: &[u8]) -> Result<Option<Bytes>, Untraceable> {
    follow_frame(table, Head::new(HEADERS, REQUEST, block.len()), block)
}

/// Follows a frame, and checks that it changes nothing if its effect is `None`.
fn follow_frame(table: &mut ClientTable, head: Head, payload: &[u8]) -> Result<Option<Bytes>, Untraceable> {
    let (effect, before) = (table.effect(head, payload), table.pack());
    let followed = table.follow(head, payload);
    if effect == Effect::None {
        assert_eq!(followed, Ok(None));
        assert!(table.pack() == before && table.block.is_empty());
    }
    followed
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
            table.apply(&hex(block), None).expect("the block is valid");
            assert_eq!(table.size, size, "{block}");
        }
    }
}

#[test]
fn field_of_the_table_is_kept_as_a_literal_without_indexing() {
    let mut table = HeaderTable::new(SIZE_LIMIT);
    let mut apply = |block: &[u8]| apply(&mut table, block).map(|kept| kept.expect("it is small"));
    // Fields with a new name, with a name of the static table that needs two bytes in a literal without indexing, and
    // with the name of an entry.
    assert_eq!(apply(b"\x3f\xe1\x1f\x40\x01a\x02bc").expect("valid"), &b"\x3f\xe1\x1f\x40\x01a\x02bc"[..]);
    assert_eq!(apply(b"\x53\x01d").expect("valid"), &b"\x53\x01d"[..]);
    assert_eq!(apply(b"\x7f\x00\x01e").expect("valid"), &b"\x40\x01a\x01e"[..]);
    let kept = apply(b"\xbe\xbf\xc0\x0f\x2f\x01f\x1f\x31\x01g\x82").expect("valid");
    assert_eq!(kept, &b"\0\x01a\x01e\x0f\x04\x01d\0\x01a\x02bc\0\x01a\x01f\x10\x01a\x01g\x82"[..]);
    let plain = without_indexing(b"\x3f\xe1\x1f\x40\x01a\x02bc\x53\x01d\x1f\x04\x01g\x82");
    assert_eq!(plain, &b"\0\x01a\x02bc\x0f\x04\x01d\x1f\x04\x01g\x82"[..]);
}

/// Each block has a request, which is one of an event stream or a call in gRPC. The bool says whether DATA follows.
#[test]
fn request_whose_response_may_have_no_end_is_recognized_by_its_fields() {
    let accept =
        |value: &[u8]| [b"\x82\x53", &[u8::try_from(value.len()).expect("short")][..], value].concat();
    let mut table = ClientTable::new();
    let mut is_endless = |block: &[u8], has_body| {
        let flags = if has_body { END_HEADERS } else { REQUEST };
        let head = Head::new(HEADERS, flags, block.len());
        let may_be = table.effect(head, block) == Effect::MayBeEndless;
        let kept = table.follow(head, block).expect("the block is valid");
        assert_eq!(kept.is_some(), may_be);
        may_be
    };
    assert!(is_endless(&accept(b"text/event-stream, */*"), false));
    assert!(!is_endless(&accept(b"text/event-strea"), false));
    assert!(!is_endless(&accept(b"text/html"), false));
    assert!(is_endless(&accept(b"text/event-stream"), false));
    // The same field by its index, and in a block that enters two others before it.
    assert!(is_endless(b"\x82\xbe", false));
    assert!(is_endless(b"\x82\x40\x01a\x01b\x40\x01c\x01d\xc0", false));
    assert!(!is_endless(b"\x82\xc0", true));
    assert!(!is_endless(b"\x83\xc0", false));
    assert!(!is_endless(b"\x82\xc0\x0f\x0d\x011", false), "it has a content-length");
    // A literal with the name of an entry.
    assert!(is_endless(b"\x82\x0f\x31\x11text/event-stream", false));
    assert!(is_endless(b"\x83\x5f\x10application/grpc", true));
    assert!(is_endless(b"\x83\xbe", true));
    assert!(!is_endless(b"\x83\xbe", false));
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
        let mut table = ClientTable::new();
        follow(&mut table, name).expect("the block is valid");
        assert_eq!(follow(&mut table, block), Err(Untraceable), "{block:?}");
    }
}

#[test]
fn entry_that_is_larger_than_the_table_empties_it() {
    let mut table = HeaderTable::new(SIZE_LIMIT);
    let mut large = BytesMut::new();
    put_field(b"a", &[b'x'; SIZE_LIMIT - ENTRY_SIZE - 1], &mut large);
    large[0] = INCREMENTAL;
    table.apply(&large, None).expect("the block is valid");
    assert_eq!((table.size, table.entries.len()), (SIZE_LIMIT, 1));
    let mut larger = BytesMut::new();
    put_field(b"a", &[b'x'; SIZE_LIMIT - ENTRY_SIZE], &mut larger);
    larger[0] = INCREMENTAL;
    table.apply(&larger, None).expect("the block is valid");
    assert_eq!((table.size, table.entries.len()), (0, 0));
}

/// Each reference makes a few thousand bytes out of one.
#[test]
fn block_that_would_be_too_large_is_not_kept_but_followed() {
    let mut table = HeaderTable::new(SIZE_LIMIT);
    let mut block = BytesMut::new();
    put_field(b"a", &[b'x'; 4_000], &mut block);
    block[0] = INCREMENTAL;
    table.apply(&block, None).expect("the block is valid");
    assert!(apply(&mut table, b"\xbe\xbe").expect("the block is valid").is_some());
    assert_eq!(apply(&mut table, b"\xbe\xbe\xbe\x40\x01b\x01c"), Ok(None));
    assert_eq!(apply(&mut table, b"\xbe"), Ok(Some(Bytes::from_static(b"\0\x01b\x01c"))));
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
    assert_eq!(follow(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, padded), Ok(None));
    assert_eq!(follow(HEADERS, PADDED, b"\x01\x40\x01."), Ok(None));
    assert_eq!(follow(CONTINUATION, 0, b""), Ok(None));
    assert_eq!(follow(CONTINUATION, 0, b"c\x01"), Ok(None));
    assert_eq!(follow(CONTINUATION, END_HEADERS, b"d\xbf"), Ok(None));
    assert_eq!(follow(HEADERS, END_HEADERS | PADDED, b"\x03.."), Err(Untraceable));
    assert_eq!(follow(HEADERS, END_HEADERS | WITH_PRIORITY, b"\0\0\0"), Err(Untraceable));
    assert_eq!(follow(HEADERS, END_HEADERS | PADDED, b""), Err(Untraceable));
    let packed = table.pack();
    assert_eq!(packed, &b"\x3f\xe1\x1f\x40\x01a\x01b\x40\x01c\x01d"[..]);
}

/// Each table, and whether its entries are the fields of a well-formed request.
#[test]
fn table_is_well_formed_if_its_pseudo_headers_come_first_and_once() {
    for (block, is_well_formed) in [
        (&b""[..], true),
        (b"\x41\x01h\x44\x01p\x40\x01a\x01b", true),
        (b"\x40\x01a\x01b\x44\x01p", false),
        (b"\x44\x01p\x45\x01q", false),
        (b"\x46\x01s\x42\x01m", true),
        (b"\x48\x03200", false),
        (b"\x40\x02:a\x01b", false),
        // The same name in the Huffman code.
        (b"\x40\x82\xb8\xff\x01b", false),
        (b"\x5f\x01v", true),
    ] {
        let table = ClientTable::unpack(block).expect("the block is valid");
        assert_eq!(table.is_well_formed(), is_well_formed, "{block:?}");
    }
}

#[test]
fn table_is_made_by_the_blocks_that_entered_all_of_its_entries() {
    let blocks = [&b"\x40\x01a\x01b"[..], b"\x20\x3f\xe1\x1f\x40\x01c\x01d"].map(Bytes::from_static);
    let mut table = ClientTable::new();
    assert!(table.is_made_by(&[]));
    for block in &blocks {
        follow(&mut table, block).expect("the block is valid");
    }
    assert!(table.is_made_by(&blocks));
    assert!(table.is_made_by(&blocks[1..]));
    assert!(!table.is_made_by(&blocks[..1]));
    assert!(!table.is_made_by(&[Bytes::from_static(b"\xbe")]));
}

#[test]
fn length_of_a_huffman_code_is_that_of_the_decoded_string() {
    // The example of RFC 7541 appendix C.4.1, and letters with codes of 10, 13 and 30 bits (appendix B).
    for (code, length) in [
        ("f1e3c2e5f23a6ba0ab90f4ff", Some(15)),
        ("fe3f", Some(1)),
        ("ffc7", Some(1)),
        ("fffffff3", Some(1)),
        ("fffffff3fffffff3f1e3c2e5f23a6ba0ab90f4ff", None),
        ("fffffff0", None),
    ] {
        assert_eq!(huffman_length(&hex(code)), length, "{code}");
    }
    assert_eq!(huffman_length(b""), Some(0));
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

/// A header block, its fields, each with whether it is never indexed, and the encoder after it.
type EncodedBlock = (Vec<u8>, Vec<(Pair, bool)>, Encoder);

/// Writes the blocks with the model of an encoder.
fn encode(blocks: &[(Vec<usize>, Vec<Written>)]) -> Vec<EncodedBlock> {
    let mut encoder = Encoder::new(SIZE_LIMIT);
    let mut encode = |(sizes, fields): &(Vec<usize>, Vec<Written>)| {
        let mut block = Vec::new();
        for size in sizes {
            encoder.resize(*size, &mut block);
        }
        let fields =
            fields.iter().map(|field| (encoder.encode(field, &mut block), field.how == How::Never)).collect();
        (block, fields, encoder.clone())
    };
    blocks.iter().map(&mut encode).collect()
}

proptest! {
    #[test]
    fn table_and_kept_fields_are_those_of_the_encoder_after_each_block(blocks in blocks()) {
        let mut table = HeaderTable::new(SIZE_LIMIT);
        let mut decoder = Decoder::new();
        for (block, written, encoder) in encode(&blocks) {
            let scanned = table.scan(&block).expect("the block is valid").changes_table;
            let before = table.pack();
            let kept = apply(&mut table, &block).expect("the block is valid");
            prop_assert!(scanned || table.pack() == before);
            prop_assert_eq!(table.size, encoder.table.size());
            if let Some(kept) = &kept {
                prop_assert!(kept.len() <= BLOCK_LIMIT);
                // It enters the same fields, and refers to none.
                let fields = Decoder::new().decode_all(kept);
                prop_assert_eq!(&fields, &written);
                prop_assert_eq!(&Decoder::new().decode_all(&without_indexing(kept)), &written);
                let mut other = HeaderTable::new(0);
                other.apply(&without_indexing(kept), None).expect("it needs no table");
                prop_assert!(other.entries.is_empty());
            }
            prop_assert_eq!(decoder.decode_all(&block), written);
            let packed = table.pack();
            let mut unpacked = Decoder::new();
            unpacked.decode_all(&packed);
            prop_assert_eq!(&unpacked.table, &encoder.table);
            prop_assert!(packed.len() < 16 * 1024);
            prop_assert_eq!(ClientTable::unpack(&packed).expect("it is valid").pack(), packed);
        }
    }

    #[test]
    fn any_bytes_are_followed_without_a_panic(
        blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..6),
    ) {
        check_blocks(&blocks);
    }

    /// The client of h2 has Huffman codes for all letters.
    #[test]
    fn other_h2_decodes_what_the_client_of_h2_sends_after_a_handover(
        requests in prop::collection::vec(fields_of_a_request(), 1..8), moved in 0..8_usize,
    ) {
        runtime().block_on(async {
            let frames = frames_of_h2(&requests).await;
            assert_decodes(&frames, &requests, moved.min(requests.len())).await;
        });
    }

    /// The model also changes the size of the table, and has other ways to write a field.
    #[test]
    fn other_h2_decodes_what_any_encoder_sends_after_a_handover(
        requests in prop::collection::vec((prop::option::of(0..3_usize), fields_of_a_model()), 1..12),
        moved in 0..12_usize,
    ) {
        let (frames, maps): (Vec<_>, Vec<_>) = {
            let mut encoder = Encoder::new(SIZE_LIMIT);
            requests.iter().map(|(size, fields)| request_of_a_model(&mut encoder, *size, fields)).unzip()
        };
        runtime().block_on(assert_decodes(&frames, &maps, moved.min(maps.len())));
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("the runtime starts")
}

fn check_blocks(blocks: &[Vec<u8>]) {
    let mut table = ClientTable::new();
    for block in blocks {
        let followed = follow(&mut table, block);
        let size = table.table.entries.iter().map(|entry| usize::from(entry.size)).sum::<usize>();
        assert!(table.table.size == size && size <= SIZE_LIMIT);
        let Ok(kept) = followed else { return };
        let packed = table.pack();
        assert_eq!(ClientTable::unpack(&packed).expect("it is valid").pack(), packed);
        let _ = table.is_well_formed();
        let Some(kept) = kept else { continue };
        assert!(kept.len() <= BLOCK_LIMIT);
        let plain = without_indexing(&kept);
        HeaderTable::new(0).apply(&plain, None).expect("it needs no table");
        if let Some(next) = with_last_event_id(&plain, b"7") {
            let effect = ClientTable::new().effect(Head::new(HEADERS, REQUEST, next.len()), &next);
            assert_eq!(effect, Effect::MayBeEndless);
            assert_eq!(with_last_event_id(&next, b"7"), Some(next));
        }
    }
}

#[cfg(feature = "fuzz-tests")]
#[test]
fn fuzzed_header_blocks_keep_their_meaning() {
    crate::fuzz::target!("header_blocks").with_type::<Vec<Vec<u8>>>().for_each(|blocks| check_blocks(blocks));
}

fn fields_of_a_request() -> impl Strategy<Value = HeaderMap> {
    const NAMES: &[&str] = &["accept", "cookie", "user-agent", "x-a", "x-longer", "sec-fetch-mode", "via"];
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

/// The frames with which the client of h2 sends requests.
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

/// The names and values of the fields of a request. They occur again.
fn fields_of_a_model() -> impl Strategy<Value = Vec<(How, Pair, bool)>> {
    let how = prop::sample::select(&[How::Incremental, How::Without, How::Never][..]);
    let name = prop::sample::select(&["accept", "cookie", "x-a", "x-longer", "via"][..]);
    let value = prop_oneof![
        4 => prop::sample::select(&["a", "text/event-stream", ""][..]).prop_map(str::to_owned),
        3 => text(0..40_usize),
        1 => text(1_000..1_500_usize),
    ];
    let field = (how, (name.prop_map(str::to_owned), value), any::<bool>());
    prop::collection::vec(field, 0..5)
}

/// `size`: the new size of the table in thirds of the limit.
fn request_of_a_model(
    encoder: &mut Encoder,
    size: Option<usize>,
    fields: &[(How, Pair, bool)],
) -> ((Head, Vec<u8>), HeaderMap) {
    let mut block = Vec::new();
    if let Some(thirds) = size {
        encoder.resize(SIZE_LIMIT / 2 * thirds, &mut block);
    }
    for field in [(":method", "GET"), (":scheme", "http"), (":path", "/path"), (":authority", "test")] {
        encoder.shortest(&pair(field), How::Incremental, false, &mut block);
    }
    let mut map = HeaderMap::new();
    for (how, field, is_huffman) in fields {
        encoder.shortest(field, *how, *is_huffman, &mut block);
        let (name, value) = field;
        let name: HeaderName = name.parse().expect("the name is valid");
        map.append(name, value.parse().expect("the value is valid"));
    }
    ((Head::new(HEADERS, REQUEST, block.len()), block), map)
}

/// Follows the requests before `moved`, and gives the others to an h2 that receives the table before.
async fn assert_decodes(frames: &[(Head, Vec<u8>)], requests: &[HeaderMap], moved: usize) {
    let mut table = ClientTable::new();
    let mut left = moved;
    let mut frames = frames.iter();
    while left > 0
        && let Some((head, payload)) = frames.next()
    {
        follow_frame(&mut table, *head, payload).expect("the block is valid");
        left -= usize::from(head.has(END_HEADERS));
    }
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let mut bytes = BytesMut::from(PREFACE);
    Head::new(SETTINGS, 0, 0).put(&mut bytes);
    put_oversized_request(1, &table.pack(), HEADER_LIST_LIMIT, &mut bytes);
    let mut stream = 3;
    for (head, payload) in frames {
        Head { stream, ..*head }.put(&mut bytes);
        bytes.extend_from_slice(payload);
        stream += if head.has(END_HEADERS) { 2 } else { 0 };
    }
    far.write_all(&bytes).await.expect("the pipe has room");
    let server = h2::server::Builder::new().max_header_list_size(HEADER_LIST_LIMIT).handshake(near).await;
    let mut server: h2::server::Connection<_, Bytes> = server.expect("the handshake succeeds");
    for fields in &requests[moved..] {
        let (request, _respond) = server.accept().await.expect("a request").expect("it is valid");
        assert_eq!(request.method(), Method::GET);
        assert_eq!(request.uri(), &Uri::from_static("http://test/path"));
        assert_eq!(request.headers(), fields);
    }
}

#[test]
fn decoder_of_the_model_reads_what_its_encoder_writes() {
    let field = ("accept".to_owned(), String::from_utf8(LETTERS.to_vec()).expect("letters"));
    for is_huffman in [false, true] {
        let mut block = Vec::new();
        Encoder::new(0).shortest(&field, How::Without, is_huffman, &mut block);
        assert_eq!(Decoder::new().decode(&block), std::slice::from_ref(&field));
    }
}
