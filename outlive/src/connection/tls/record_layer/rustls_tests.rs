//! Sends the same bytes to a connection that rustls serves, to one that `RecordLayer` serves, and to one that is handed
//! over before each record. All three must accept the same records, and refuse the others with the same alerts, with TLS 1.3
//! and with TLS 1.2.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use rustix::io::ioctl_fionread;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::tests::{Parties, VERSIONS, aes_128, move_on, open_next, run, seal};
use super::*;
use crate::connection::io::Tls;
use crate::connection::tls::record_reader;
use crate::transport::tls_traffic::Cipher;
use crate::transport::traffic_secret::FirstSecrets;

/// What serves the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Rustls,
    RecordLayer,
    RecordsThatMove,
}

use Version::{Tls12, Tls13};

/// What a client sends in one write.
#[derive(Clone, Debug)]
enum Step {
    /// A validly encrypted record.
    Record { kind: u8, content: Vec<u8>, padding: usize },
    /// An application data record whose header begins with other bytes.
    Header { first: [u8; 3], content: Vec<u8> },
    /// A KeyUpdate with this `request_update`. The client uses its next key afterwards.
    KeyUpdate(u8),
    /// A KeyUpdate in two records, split after so many bytes.
    CutKeyUpdate(u8, usize),
    /// Bytes that are sent without encryption.
    Raw(Vec<u8>),
}

use Step::{CutKeyUpdate, Header, KeyUpdate, Raw};

fn record(kind: u8, content: &[u8]) -> Step {
    padded(kind, content, 0)
}

fn padded(kind: u8, content: &[u8], padding: usize) -> Step {
    Step::Record { kind, content: content.to_vec(), padding }
}

fn data(content: &[u8]) -> Step {
    record(APPLICATION_DATA, content)
}

fn alert(level: u8, description: u8) -> Step {
    record(ALERT, &[level, description])
}

/// How the server's reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    Failed(ErrorKind),
}

#[derive(Debug, PartialEq, Eq)]
struct Reaction {
    read: Vec<u8>,
    end: End,
    /// The types and contents of the server's records. Adjacent application data is merged.
    records: Vec<(u8, Vec<u8>)>,
}

/// The client's end of a connection, which can send invalid records because rustls is not involved.
struct Client {
    socket: UnixStream,
    version: Version,
    from_server: RecordProtection,
    to_server: RecordProtection,
}

impl Client {
    /// Sends as much as the server accepts, which may have closed the connection.
    async fn send(&mut self, step: &Step) {
        let mut bytes = BytesMut::new();
        match step {
            Step::Record { kind, content, padding } => {
                bytes = seal(&mut self.to_server, *kind, content, *padding);
            }
            Header { first, content } => {
                bytes = seal(&mut self.to_server, APPLICATION_DATA, content, 0);
                bytes[..3].copy_from_slice(first);
            }
            KeyUpdate(request) => self.seal_key_update(*request, None, &mut bytes),
            CutKeyUpdate(request, at) => self.seal_key_update(*request, Some(*at), &mut bytes),
            Raw(raw) => bytes.extend_from_slice(raw),
        }
        let _ = self.socket.write_all(&bytes).await;
    }

    fn seal_key_update(&mut self, request: u8, cut: Option<usize>, into: &mut BytesMut) {
        let message = [KEY_UPDATE, 0, 0, 1, request];
        let (first, second) = message.split_at(cut.unwrap_or(0));
        for part in [first, second].iter().filter(|part| cut.is_some() || !part.is_empty()) {
            self.to_server.seal(HANDSHAKE, part, into).expect("the record is encrypted");
        }
        assert!(self.to_server.update_keys());
    }

    /// Reads and decrypts everything that the server has sent.
    async fn receive_all(&mut self) -> Vec<(u8, Vec<u8>)> {
        let mut bytes = Vec::new();
        // The server may reset the connection instead of closing it.
        let _ = self.socket.read_to_end(&mut bytes).await;
        let mut bytes = BytesMut::from(&bytes[..]);
        let mut records: Vec<(u8, Vec<u8>)> = Vec::new();
        loop {
            let header: Vec<u8> = bytes.iter().copied().take(3).collect();
            let Some((kind, record)) = open_next(&mut self.from_server, &mut bytes) else { break };
            assert_eq!(header, [if self.version == Tls13 { APPLICATION_DATA } else { kind }, 3, 3]);
            if kind == HANDSHAKE && record.first() == Some(&KEY_UPDATE) {
                assert!(self.from_server.update_keys());
            }
            match records.last_mut() {
                Some((APPLICATION_DATA, last)) if kind == APPLICATION_DATA => last.extend_from_slice(&record),
                _ => records.push((kind, record.to_vec())),
            }
        }
        assert!(bytes.is_empty());
        records
    }
}

/// Both ends of a new connection, and a descriptor of the server's socket to ask how many bytes are unread.
async fn connect(parties: &Parties, suite: Suite, who: Who) -> (Client, Tls, OwnedFd) {
    let (mut client, mut server, secrets) = parties.perform_handshake(suite).await;
    // rustls handles the session tickets before it delivers this byte.
    server.write_all(b"x").await.expect("the bytes are sent");
    server.flush().await.expect("the bytes are sent");
    client.read_exact(&mut [0]).await.expect("the bytes are read");
    let (socket, session) = client.into_inner();
    // The server's `from_peer` is the client's `to_peer`.
    let reversed = FirstSecrets { from_peer: secrets.to_peer.clone(), to_peer: secrets.from_peer.clone() };
    let extracted = session.dangerous_extract_secrets().expect("the secrets are exported");
    let session = TlsTrafficState::new(suite.version, extracted, &reversed, Bytes::new(), None);
    let session = session.expect("a supported cipher");
    assert_eq!(session.suite, suite);
    let client = Client {
        socket,
        version: suite.version,
        from_server: RecordProtection::new(suite, session.from_peer),
        to_server: RecordProtection::new(suite, session.to_peer),
    };
    let unread =
        server.get_mut().0.stream().as_fd().try_clone_to_owned().expect("the descriptor is duplicated");
    let server = if who == Who::Rustls {
        Tls::Left(Box::new(server))
    } else {
        let (stream, session, _) = record_reader::into_parts(server).expect("the connection leaves rustls");
        Tls::Right(Box::new(RecordLayer::new(stream, session)))
    };
    (client, server, unread)
}

/// Reads all data that has arrived and sends it back.
async fn echo(server: &mut Tls, unread: &OwnedFd, read: &mut Vec<u8>) -> Result<(), End> {
    loop {
        let mut buffer = vec![0; 32 * 1024];
        let mut into = ReadBuf::new(&mut buffer);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match Pin::new(&mut *server).poll_read(&mut cx, &mut into) {
            Poll::Ready(Ok(())) if into.filled().is_empty() => return Err(End::Closed),
            Poll::Ready(Ok(())) => {
                read.extend_from_slice(into.filled());
                server.write_all(into.filled()).await.expect("room in the socket");
                server.flush().await.expect("room in the socket");
            }
            Poll::Ready(Err(error)) => return Err(End::Failed(error.kind())),
            Poll::Pending if ioctl_fionread(unread).expect("the descriptor is a socket") == 0 => {
                return Ok(());
            }
            // Lets the runtime notice that the socket is readable.
            Poll::Pending => tokio::task::yield_now().await,
        }
    }
}

async fn reaction(parties: &Parties, suite: Suite, who: Who, steps: &[Step]) -> Reaction {
    let (mut client, mut server, unread) = connect(parties, suite, who).await;
    let mut read = Vec::new();
    let mut end = None;
    for step in steps {
        client.send(step).await;
        if let Err(reason) = echo(&mut server, &unread, &mut read).await {
            end = Some(reason);
            break;
        }
        server = match server {
            Tls::Right(records) if who == Who::RecordsThatMove && records.is_movable() => {
                Tls::Right(Box::new(move_on(*records)))
            }
            server => server,
        };
    }
    client.socket.shutdown().await.expect("the client closes");
    let end = match end {
        Some(end) => end,
        None => loop {
            if let Err(end) = echo(&mut server, &unread, &mut read).await {
                break end;
            }
            tokio::task::yield_now().await;
        },
    };
    let _ = server.shutdown().await;
    drop(server);
    drop(unread);
    Reaction { read, end, records: client.receive_all().await }
}

/// Checks that all three react in the same way, and returns the reaction.
async fn same(parties: &Parties, suite: Suite, steps: &[Step]) -> Reaction {
    let wanted = reaction(parties, suite, Who::Rustls, steps).await;
    for who in [Who::RecordLayer, Who::RecordsThatMove] {
        let found = reaction(parties, suite, who, steps).await;
        assert_eq!(found, wanted, "{who:?} and rustls differ for {steps:?}");
    }
    wanted
}

const CLOSE_NOTIFY: (u8, &[u8]) = (ALERT, &[WARNING, Alert::CloseNotify as u8]);

/// A case: its name, what the client sends, and the fatal alert with which the server answers.
type Case = (&'static str, Vec<Step>, Option<Alert>);

/// Checks that all three react in the same way to each case, and that their last record is the fatal alert, or
/// `close_notify` if there is none.
fn assert_same(version: Version, cases: Vec<Case>) {
    let parties = Parties::new();
    for (name, steps, wanted) in cases {
        run(async {
            let reaction = same(&parties, aes_128(version), &steps).await;
            let last = reaction.records.last().map(|(kind, content)| (*kind, &content[..]));
            let bytes = wanted.map(|alert| [FATAL, alert as u8]);
            let wanted = bytes.as_ref().map_or(CLOSE_NOTIFY, |bytes| (ALERT, &bytes[..]));
            assert_eq!(last, Some(wanted), "{version:?}, {name}: {reaction:?}");
        });
    }
}

fn user_canceled(times: usize) -> Vec<Step> {
    vec![alert(WARNING, USER_CANCELED); times]
}

#[test]
fn record_lengths_have_the_limits_of_rustls() {
    for version in VERSIONS {
        let overhead = if version == Tls13 { 1 + TAG_LENGTH } else { 8 + TAG_LENGTH };
        assert_same(
            version,
            vec![
                ("nothing", vec![], None),
                ("the most content", vec![data(&vec![7; FRAGMENT_LIMIT])], None),
                (
                    "a byte of content too much",
                    vec![data(&vec![7; FRAGMENT_LIMIT + 1])],
                    Some(Alert::RecordOverflow),
                ),
                (
                    "the longest record that is decrypted",
                    vec![data(&vec![7; SEALED_LIMIT - 1 - overhead])],
                    Some(Alert::RecordOverflow),
                ),
                (
                    "the header of a longer one",
                    vec![Raw(vec![APPLICATION_DATA, 3, 3, 0x48, 0])],
                    Some(Alert::DecodeError),
                ),
                (
                    "a record without a tag",
                    vec![Raw(vec![APPLICATION_DATA, 3, 3, 0, 0])],
                    Some(Alert::BadRecordMac),
                ),
                (
                    "a record that is shorter than a tag",
                    vec![Raw(vec![APPLICATION_DATA, 3, 3, 0, 3, 1, 2, 3])],
                    Some(Alert::BadRecordMac),
                ),
                (
                    "a record that is shorter than a nonce and a tag",
                    vec![Raw([&[APPLICATION_DATA, 3, 3, 0, 23][..], &[0; 23]].concat())],
                    Some(Alert::BadRecordMac),
                ),
            ],
        );
    }
}

#[test]
fn padding_of_tls_1_3_has_the_limits_of_rustls() {
    assert_same(
        Tls13,
        vec![
            ("the most padding", vec![padded(APPLICATION_DATA, b"x", FRAGMENT_LIMIT - 1)], None),
            (
                "a byte of padding too much",
                vec![padded(APPLICATION_DATA, b"x", FRAGMENT_LIMIT)],
                Some(Alert::RecordOverflow),
            ),
            ("only padding", vec![padded(0, b"", 5)], None),
            (
                "33 padded empty records",
                [vec![padded(APPLICATION_DATA, b"", 9); 33], vec![data(b"x")]].concat(),
                None,
            ),
        ],
    );
}

#[test]
fn empty_records_in_a_row_have_the_limit_of_rustls() {
    for version in VERSIONS {
        assert_same(
            version,
            vec![
                ("32 empty records", [vec![data(b""); 32], vec![data(b"x")]].concat(), None),
                (
                    "33 empty records, a byte in between",
                    [vec![data(b""); 32], vec![data(b"x"), data(b""), data(b"y")]].concat(),
                    None,
                ),
                ("33 empty records", [vec![data(b""); 33], vec![data(b"x")]].concat(), None),
                (
                    "33 empty handshake records",
                    [vec![record(HANDSHAKE, b""); 33], vec![data(b"x")]].concat(),
                    None,
                ),
            ],
        );
    }
}

#[test]
fn alerts_are_accepted_and_refused_as_by_rustls() {
    for version in VERSIONS {
        let refused = |alert| (version == Tls13).then_some(alert);
        assert_same(
            version,
            vec![
                ("4 times user_canceled", [user_canceled(4), vec![data(b"x")]].concat(), None),
                ("5 times user_canceled", [user_canceled(5), vec![data(b"x")]].concat(), None),
                (
                    "5 times user_canceled with data in between",
                    [user_canceled(2), vec![data(b"x")], user_canceled(3), vec![data(b"x")]].concat(),
                    None,
                ),
                ("fatal user_canceled", vec![alert(FATAL, USER_CANCELED), data(b"x")], None),
                ("another warning", vec![alert(WARNING, 100), data(b"x")], refused(Alert::DecodeError)),
                (
                    "4 other warnings",
                    [vec![alert(WARNING, 41); 4], vec![data(b"x")]].concat(),
                    refused(Alert::DecodeError),
                ),
                (
                    "5 other warnings",
                    [vec![alert(WARNING, 41); 5], vec![data(b"x")]].concat(),
                    refused(Alert::DecodeError),
                ),
                ("a fatal alert", vec![alert(FATAL, 80), data(b"x")], None),
                ("level 3", vec![alert(3, USER_CANCELED), data(b"x")], Some(Alert::IllegalParameter)),
                ("close_notify of level 0", vec![alert(0, 0), data(b"x")], Some(Alert::IllegalParameter)),
                ("close_notify", vec![data(b"x"), alert(WARNING, 0), data(b"y")], None),
                ("fatal close_notify", vec![data(b"x"), alert(FATAL, 0), data(b"y")], None),
                ("an empty alert", vec![record(ALERT, b"")], Some(Alert::DecodeError)),
                ("half an alert", vec![record(ALERT, &[WARNING])], Some(Alert::DecodeError)),
                ("an alert and a half", vec![record(ALERT, &[WARNING, 90, 1])], Some(Alert::DecodeError)),
                (
                    "an alert that is not encrypted",
                    vec![Raw(vec![ALERT, 3, 3, 0, 2, 1, 0])],
                    Some(Alert::BadRecordMac),
                ),
            ],
        );
    }
}

/// A ClientHello without extensions, with a session id of so many bytes.
fn client_hello(session_id: u8) -> Vec<u8> {
    let mut body = [&[3, 3][..], &[7; 32], &[session_id]].concat();
    body.extend(vec![9; session_id.into()]);
    body.extend([0, 2, 0xc0, 0x2b, 1, 0]);
    let length = u8::try_from(body.len()).expect("the message is short");
    [&[CLIENT_HELLO, 0, 0, length][..], &body].concat()
}

fn renegotiation() -> Step {
    record(HANDSHAKE, &client_hello(0))
}

/// The warning is also sent if no data follow.
#[test]
fn renegotiation_of_tls_1_2_is_refused_as_by_rustls() {
    let hello = client_hello(32);
    let cut = |at: usize| vec![record(HANDSHAKE, &hello[..at]), record(HANDSHAKE, &hello[at..])];
    let mut cases: Vec<Case> = vec![
        ("a ClientHello", vec![renegotiation()], None),
        ("a ClientHello between data", vec![data(b"x"), renegotiation(), data(b"y")], None),
        ("two of them", vec![renegotiation(), data(b"x"), renegotiation(), data(b"y")], None),
        ("two of them in a record", vec![record(HANDSHAKE, &hello.repeat(2)), data(b"x")], None),
        (
            "a ClientHello and Finished in a record",
            vec![record(HANDSHAKE, &[&hello[..], &[20, 0, 0, 1, 0]].concat()), data(b"x")],
            Some(Alert::UnexpectedMessage),
        ),
        ("data in the middle of a ClientHello", vec![record(HANDSHAKE, &hello[..20]), data(b"x")], None),
        ("data in the middle of its header", vec![record(HANDSHAKE, &hello[..2]), data(b"x")], None),
        (
            "close_notify in the middle of a ClientHello",
            vec![record(HANDSHAKE, &hello[..20]), alert(WARNING, 0)],
            None,
        ),
        (
            "change_cipher_spec in the middle of a ClientHello",
            vec![record(HANDSHAKE, &hello[..20]), Raw(vec![CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1])],
            Some(Alert::BadRecordMac),
        ),
        (
            "an encrypted change_cipher_spec in the middle of a ClientHello",
            vec![record(HANDSHAKE, &hello[..20]), record(CHANGE_CIPHER_SPEC, &[1])],
            None,
        ),
        (
            "an empty record in the middle of a ClientHello",
            {
                vec![
                    record(HANDSHAKE, &hello[..20]),
                    record(HANDSHAKE, b""),
                    record(HANDSHAKE, &hello[20..]),
                    data(b"x"),
                ]
            },
            None,
        ),
        ("a ClientHello that is too long", vec![record(HANDSHAKE, &[CLIENT_HELLO, 1, 0, 0])], None),
    ];
    cases.extend(
        (1..hello.len())
            .map(|at| ("a ClientHello in two records", [cut(at), vec![data(b"x")]].concat(), None)),
    );
    assert_same(Tls12, cases);
    let parties = Parties::new();
    run(async {
        let reaction = same(&parties, aes_128(Tls12), &[data(b"x"), renegotiation(), data(b"y")]).await;
        assert_eq!(reaction.read, b"xy");
        let warning = (ALERT, vec![WARNING, NO_RENEGOTIATION]);
        let data = |content: &[u8]| (APPLICATION_DATA, content.to_vec());
        assert_eq!(reaction.records[..3], [data(b"x"), warning, data(b"y")]);
    });
}

#[test]
fn key_updates_are_followed_and_refused_as_by_rustls() {
    assert_same(
        Tls13,
        vec![
            ("a KeyUpdate", vec![data(b"x"), KeyUpdate(0), data(b"y")], None),
            ("a KeyUpdate that requests one", vec![data(b"x"), KeyUpdate(1), data(b"y")], None),
            (
                "KeyUpdates that request one, without an answer in between",
                [vec![KeyUpdate(1); 32], vec![data(b"x")]].concat(),
                None,
            ),
            ("33 KeyUpdates", [vec![KeyUpdate(0); 33], vec![data(b"x")]].concat(), None),
            (
                "33 KeyUpdates, an empty record in between",
                [vec![KeyUpdate(1); 32], vec![data(b""), KeyUpdate(1), data(b"x")]].concat(),
                None,
            ),
            (
                "a KeyUpdate with an unknown request_update",
                vec![KeyUpdate(2), data(b"x")],
                Some(Alert::IllegalParameter),
            ),
            (
                "a KeyUpdate that requests one, and then a fault",
                vec![KeyUpdate(1), alert(WARNING, 100)],
                Some(Alert::DecodeError),
            ),
            ("a KeyUpdate in two records", vec![CutKeyUpdate(1, 3), data(b"x")], None),
            ("a KeyUpdate behind an empty record", vec![CutKeyUpdate(1, 0), data(b"x")], None),
            (
                "a KeyUpdate before an empty record",
                vec![CutKeyUpdate(0, 5), data(b"x")],
                Some(Alert::BadRecordMac),
            ),
            (
                "data in the middle of a KeyUpdate",
                vec![record(HANDSHAKE, &[KEY_UPDATE, 0]), data(b"x")],
                None,
            ),
            (
                "close_notify in the middle of a KeyUpdate",
                vec![record(HANDSHAKE, &[KEY_UPDATE, 0]), alert(WARNING, 0)],
                None,
            ),
            (
                "change_cipher_spec in the middle of a KeyUpdate",
                vec![record(HANDSHAKE, &[KEY_UPDATE, 0]), Raw(vec![CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1])],
                Some(Alert::BadRecordMac),
            ),
            (
                "two KeyUpdates in a record",
                vec![record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE, 0, 0, 1, 0])],
                Some(Alert::UnexpectedMessage),
            ),
            ("an empty KeyUpdate", vec![record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 0])], Some(Alert::DecodeError)),
            (
                "a KeyUpdate that is too long",
                vec![record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 2, 0, 0])],
                Some(Alert::DecodeError),
            ),
            ("a handshake message that is too long", vec![record(HANDSHAKE, &[KEY_UPDATE, 1, 0, 0])], None),
        ],
    );
}

#[test]
fn handshake_messages_and_unknown_records_are_refused_as_by_rustls() {
    for version in VERSIONS {
        // TLS 1.2 has the type in the header, so this record is taken for a change_cipher_spec that is not encrypted.
        let change_cipher_spec = if version == Tls13 { Alert::UnexpectedMessage } else { Alert::DecodeError };
        let mut cases: Vec<Case> = vec![
            ("Finished", vec![record(HANDSHAKE, &[20, 0, 0, 1, 0])], Some(Alert::UnexpectedMessage)),
            ("HelloRequest", vec![record(HANDSHAKE, &[0, 0, 0, 0])], Some(Alert::UnexpectedMessage)),
            (
                "a message of an unknown type",
                vec![record(HANDSHAKE, &[99, 0, 0, 0])],
                Some(Alert::UnexpectedMessage),
            ),
            (
                "an encrypted change_cipher_spec",
                vec![record(CHANGE_CIPHER_SPEC, &[1])],
                Some(change_cipher_spec),
            ),
            (
                "change_cipher_spec",
                vec![Raw(vec![CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1])],
                Some(Alert::UnexpectedMessage),
            ),
            (
                "another change_cipher_spec",
                vec![Raw(vec![CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 2])],
                Some(Alert::DecodeError),
            ),
            ("a heartbeat", vec![record(HEARTBEAT, &[1, 2, 3])], Some(Alert::DecodeError)),
            ("a record of an unknown type", vec![record(99, &[1, 2, 3])], Some(Alert::DecodeError)),
        ];
        if version == Tls12 {
            let update = vec![record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0])];
            cases.push(("a KeyUpdate", update, Some(Alert::UnexpectedMessage)));
        }
        assert_same(version, cases);
    }
}

#[test]
fn record_headers_are_accepted_and_refused_as_by_rustls() {
    for version in VERSIONS {
        // TLS 1.2 authenticates the type and the version.
        let forged = (version == Tls12).then_some(Alert::BadRecordMac);
        assert_same(
            version,
            vec![
                (
                    "a header of TLS 1.0",
                    vec![Header { first: [APPLICATION_DATA, 3, 1], content: b"x".to_vec() }],
                    forged,
                ),
                (
                    "a header of a handshake",
                    vec![Header { first: [HANDSHAKE, 3, 3], content: b"x".to_vec() }],
                    forged,
                ),
                (
                    "a header with an invalid version",
                    vec![Header { first: [APPLICATION_DATA, 4, 3], content: b"x".to_vec() }],
                    Some(Alert::DecodeError),
                ),
                (
                    "a header with an invalid type",
                    vec![Raw(vec![25, 3, 3, 0, 1, 1])],
                    Some(Alert::DecodeError),
                ),
                (
                    "an empty handshake record",
                    vec![Raw(vec![HANDSHAKE, 3, 3, 0, 0])],
                    Some(Alert::DecodeError),
                ),
                ("HTTP without TLS", vec![Raw(b"GET / HTTP/1.1\r\n\r\n".to_vec())], Some(Alert::DecodeError)),
                ("the first byte of HTTP without TLS", vec![Raw(b"G".to_vec())], Some(Alert::DecodeError)),
                ("half a record", vec![Raw(vec![APPLICATION_DATA, 3, 3, 0, 100, 1])], None),
            ],
        );
    }
}

/// Checks the limits themselves: the tests above compare reactions, and would also pass if no data were read at all.
#[test]
fn data_is_read_at_each_limit_and_not_above_it() {
    let parties = Parties::new();
    let key_updates = |count| [vec![KeyUpdate(1); count], vec![data(b"x")]].concat();
    let empty = |count| [vec![data(b""); count], vec![data(b"x")]].concat();
    let warnings = |count| [vec![alert(WARNING, USER_CANCELED); count], vec![data(b"x")]].concat();
    let renegotiations = |count| [vec![renegotiation(); count], vec![data(b"x")]].concat();
    for (versions, steps, is_read) in [
        (&VERSIONS[..1], key_updates(32), true),
        (&VERSIONS[..1], key_updates(33), false),
        (&VERSIONS[..], empty(32), true),
        (&VERSIONS[..], empty(33), false),
        (&VERSIONS[..], warnings(4), true),
        (&VERSIONS[..], warnings(5), false),
        (&VERSIONS[1..], renegotiations(1), true),
        (&VERSIONS[1..], renegotiations(2), false),
    ] {
        run(async {
            for version in versions {
                let suite = Suite { version: *version, cipher: Cipher::ChaCha20Poly1305 };
                let reaction = same(&parties, suite, &steps).await;
                assert_eq!(reaction.read, if is_read { b"x".to_vec() } else { Vec::new() }, "{steps:?}");
                let answers = reaction.records.iter().filter(|(kind, _)| *kind == HANDSHAKE).count();
                assert!(answers <= 1, "{answers} answers to {} KeyUpdates", steps.len() - 1);
            }
        });
    }
}

#[test]
fn response_uses_the_key_that_the_client_requested_in_every_suite() {
    let parties = Parties::new();
    let steps = [data(b"a"), KeyUpdate(1), data(b"b"), KeyUpdate(0), data(b"c"), KeyUpdate(1), data(b"d")];
    for suite in Suite::of(Tls13) {
        run(async {
            let reaction = same(&parties, suite, &steps).await;
            let update = || (HANDSHAKE, vec![KEY_UPDATE, 0, 0, 1, UPDATE_NOT_REQUESTED]);
            let data = |content: &[u8]| (APPLICATION_DATA, content.to_vec());
            let end = (CLOSE_NOTIFY.0, CLOSE_NOTIFY.1.to_vec());
            assert_eq!(reaction.records, [data(b"a"), update(), data(b"bc"), update(), data(b"d"), end]);
        });
    }
}

fn is_handshake(step: &Step) -> bool {
    matches!(step, Step::Record { kind: HANDSHAKE, .. } | KeyUpdate(_) | CutKeyUpdate(..))
}

/// Any steps except those for which SECURITY.md lists a difference: handshake messages other than a KeyUpdate or a valid
/// ClientHello, and incomplete messages with a wrong header.
fn steps(version: Version) -> impl Strategy<Value = Vec<Step>> {
    let message = match version {
        Tls13 => vec![KEY_UPDATE, 0, 0, 1],
        Tls12 => client_hello(0),
    };
    let part = (1..5_usize).prop_map(move |length| record(HANDSHAKE, &message[..length]));
    let part = (part, step(version).prop_filter("another message", |step| !is_handshake(step)));
    let one = step(version).prop_map(|step| vec![step]);
    let several = prop_oneof![12 => one, 1 => part.prop_map(|(part, other)| vec![part, other])];
    prop::collection::vec(several, 0..24).prop_map(|steps| steps.concat())
}

fn step(version: Version) -> BoxedStrategy<Step> {
    let bytes = |limit| prop::collection::vec(any::<u8>(), 0..limit);
    let kind = any::<u8>().prop_filter("see `steps`", |kind| *kind != HANDSHAKE);
    let few = prop_oneof![Just(0), 0..64_usize, FRAGMENT_LIMIT - 64..FRAGMENT_LIMIT + 4];
    let common = prop_oneof![
        8 => bytes(40).prop_map(|content| data(&content)),
        2 => (0..4_u8, prop_oneof![Just(0), Just(90), any::<u8>()]).prop_map(|(level, description)| alert(level, description)),
        1 => (any::<[u8; 3]>(), bytes(6)).prop_map(|(first, content)| Header { first, content }),
        1 => prop::collection::vec(any::<u8>(), 1..40).prop_map(Raw),
    ];
    match version {
        Tls13 => {
            let key_update = (bytes(4), bytes(3)).prop_map(|(body, rest)| {
                let length = u8::try_from(body.len()).expect("the body has fewer than 256 bytes");
                record(HANDSHAKE, &[&[KEY_UPDATE, 0, 0, length][..], &body, &rest].concat())
            });
            prop_oneof![
                12 => common,
                8 => prop_oneof![Just(0), Just(1), any::<u8>()].prop_map(KeyUpdate),
                2 => (0..2_u8, 0..5_usize).prop_map(|(request, at)| CutKeyUpdate(request, at)),
                1 => (kind, bytes(6), few).prop_map(|(kind, content, padding)| padded(kind, &content, padding)),
                1 => key_update,
            ]
            .boxed()
        }
        Tls12 => prop_oneof![
            12 => common,
            1 => (kind, bytes(6), few).prop_map(|(kind, content, more)| record(kind, &[&content[..], &vec![0; more]].concat())),
            2 => (0..32_u8).prop_map(|session_id| record(HANDSHAKE, &client_hello(session_id))),
        ]
        .boxed(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn handed_over_connection_reacts_to_any_records_as_rustls_does(
        (suite, steps) in prop::sample::select(&Suite::ALL[..])
            .prop_flat_map(|suite| (Just(suite), steps(suite.version))),
    ) {
        static PARTIES: std::sync::LazyLock<Parties> = std::sync::LazyLock::new(Parties::new);
        run(same(&PARTIES, suite, &steps));
    }
}
