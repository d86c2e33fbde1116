//! Connections that rustls has made, and that have moved: what its client says is heard, and what we say it hears.

use std::io::ErrorKind;
use std::sync::Arc;

use harness::certificate::Certificate;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_rustls::server::TlsStream as ServerStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::connection::whole_records::{self, WholeRecords};
use crate::credentials::Credentials;
use crate::tls;

/// `change_cipher_spec`, which belongs into a handshake.
const CHANGE_CIPHER_SPEC: u8 = 20;

type Client = TlsStream<UnixStream>;

/// One certificate for all.
struct Parties {
    acceptor: TlsAcceptor,
    roots: RootCertStore,
}

impl Parties {
    fn new() -> Self {
        let certificate = Certificate::new().expect("a certificate");
        let (chain, key) = (certificate.chain(), certificate.key());
        let acceptor = tls::acceptor(Some(&chain), Some(&key), &Credentials::default(), true);
        Self { acceptor: acceptor.expect("an acceptor").acceptor, roots: certificate.roots().expect("roots") }
    }

    /// A connection of `suite`, made and moved.
    async fn connect(&self, suite: Suite) -> (Client, Records) {
        let (client, server) = self.shake_hands(suite).await;
        let (stream, session, opened) = whole_records::into_parts(server).expect("secrets");
        assert!(session.suite == suite && opened.is_empty());
        (client, Records::new(stream, session))
    }

    async fn shake_hands(&self, suite: Suite) -> (Client, ServerStream<WholeRecords>) {
        let mut provider = ring::default_provider();
        provider.cipher_suites.retain(|known| u16::from(known.suite()) == suite as u16);
        let config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let server = self.acceptor.accept(WholeRecords::new(Stream::Unix(ours)));
        let name = "localhost".try_into().expect("a name");
        let client = TlsConnector::from(Arc::new(config)).connect(name, theirs);
        let (server, client) = tokio::join!(server, client);
        (client.expect("a handshake"), server.expect("a handshake"))
    }
}

/// As through the handover, with nothing read that is not given on.
fn move_on(records: Records) -> Records {
    assert!(records.is_movable());
    let (stream, session, opened) = records.into_parts();
    assert!(opened.is_empty());
    Records::new(stream, TlsSession::decode(&session.encode()).expect("it comes back"))
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|number| number.to_le_bytes()[0]).collect()
}

const SUITES: [Suite; 3] = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::ChaCha20Poly1305];

/// What the one writes the other reads, whole, while both are at it.
async fn pass(from: &mut (impl AsyncWrite + Unpin), to: &mut (impl AsyncRead + Unpin), length: usize) {
    let sent = bytes(length);
    let mut received = vec![0; length];
    let (sending, receiving) = tokio::join!(
        async {
            from.write_all(&sent).await?;
            from.flush().await
        },
        to.read_exact(&mut received)
    );
    sending.expect("sent");
    receiving.expect("received");
    assert!(received == sent, "{length} bytes");
}

#[test]
fn every_suite_goes_on_over_moves_with_every_size() {
    let parties = Parties::new();
    for suite in SUITES {
        run(async {
            let (mut client, mut records) = parties.connect(suite).await;
            for length in [1, 2, 5, 100, 16_383, 16_384, 16_385, 50_000, 300_000] {
                pass(&mut client, &mut records, length).await;
                pass(&mut records, &mut client, length).await;
                records = move_on(records);
                pass(&mut records, &mut client, length).await;
                pass(&mut client, &mut records, length).await;
            }
        });
    }
}

/// rustls has read the beginning of a record, opened more than was asked for, or both.
#[test]
fn what_rustls_has_begun_goes_on_elsewhere() {
    let parties = Parties::new();
    run(async {
        // No more than a socket takes that nobody reads: it counts each piece as a page.
        let small = [0, 1, 100, 300, 301, 4_000, 15_000].map(|read| (read, 300, 15_000));
        let large =
            [0, 1, 4_096, 16_384, 16_385, 60_000, 100_000].map(|read| (read, FRAGMENT_LIMIT, 100_000));
        for (read, record, length) in small.into_iter().chain(large) {
            let (mut client, mut server) = parties.shake_hands(Suite::Aes256Gcm).await;
            let sent = bytes(length);
            for chunk in sent.chunks(record) {
                client.write_all(chunk).await.expect("sent");
                client.flush().await.expect("sent");
            }
            let mut received = vec![0; read];
            server.read_exact(&mut received).await.expect("read");
            let (stream, session, opened) = whole_records::into_parts(server).expect("it moves");
            received.extend(opened);
            let left = length - received.len();
            let mut records = Records::new(stream, session);
            let mut rest = vec![0; left];
            records.read_exact(&mut rest).await.expect("the others");
            received.extend(rest);
            assert!(received == sent, "after {read}, in records of {record}");
            pass(&mut records, &mut client, 1000).await;
        }
    });
}

#[test]
fn close_notify_ends_what_comes_and_what_goes() {
    let parties = Parties::new();
    run(async {
        let (mut client, mut records) = parties.connect(Suite::Aes128Gcm).await;
        client.shutdown().await.expect("close_notify");
        assert_eq!(records.read(&mut [0]).await.expect("a clean end"), 0);
        assert!(!records.is_movable());
        // The other way is still open.
        pass(&mut records, &mut client, 10).await;
        records.shutdown().await.expect("close_notify");
        assert_eq!(client.read(&mut [0]).await.expect("a clean end"), 0);
    });
}

#[test]
fn an_end_without_close_notify_is_no_end_of_a_body() {
    let parties = Parties::new();
    run(async {
        let (mut client, mut records) = parties.connect(Suite::Aes128Gcm).await;
        // It has read the tickets too: its end is no reset.
        pass(&mut records, &mut client, 10).await;
        drop(client.into_inner());
        let error = records.read(&mut [0]).await.expect_err("cut off");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_key_update_ends_the_connection_after_the_answer_in_flight() {
    let parties = Parties::new();
    run(async {
        let (mut client, mut records) = parties.connect(Suite::ChaCha20Poly1305).await;
        pass(&mut client, &mut records, 10).await;
        client.get_mut().1.refresh_traffic_keys().expect("a KeyUpdate");
        client.write_all(b"under another key").await.expect("sent");
        client.flush().await.expect("sent");
        assert_eq!(records.read(&mut [0]).await.expect("an end, and no error"), 0);
        assert!(records.is_worn() && !records.is_movable());
        pass(&mut records, &mut client, 1000).await;
        records.shutdown().await.expect("close_notify");
        assert_eq!(client.read(&mut [0]).await.expect("a clean end"), 0);
    });
}

#[test]
fn a_key_that_has_sealed_as_much_as_is_safe_seals_no_more() {
    let parties = Parties::new();
    run(async {
        let (_client, records) = parties.connect(Suite::Aes128Gcm).await;
        let (stream, mut session, _) = records.into_parts();
        session.to_peer.sequence = WORN_AT;
        let mut records = Records::new(stream, session);
        assert!(records.is_worn());
        records.to_peer.direction.sequence = SEALED_RECORDS_LIMIT;
        records.write_all(b"one too many").await.expect_err("refused");
    });
}

/// Both ends with the same keys, without a handshake.
fn pair(suite: Suite) -> (Half, Records, UnixStream) {
    let direction = |byte: u8| Direction {
        key: vec![byte; suite.key_length()].into(),
        iv: [byte; IV_LENGTH].into(),
        sequence: 7,
    };
    let session = TlsSession { suite, from_peer: direction(1), to_peer: direction(2), unread: Bytes::new() };
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    (Half::new(suite, direction(1)), Records::new(Stream::Unix(ours), session), theirs)
}

/// A record with padding.
fn seal(half: &mut Half, kind: u8, content: &[u8], padding: usize) -> BytesMut {
    let mut record = BytesMut::new();
    // The last byte that is sealed is taken for the content's type by `seal`.
    let mut padded = content.to_vec();
    if padding > 0 {
        padded.push(kind);
        padded.resize(content.len() + padding, 0);
        half.seal(0, &padded, &mut record).expect("sealed");
    } else {
        half.seal(kind, &padded, &mut record).expect("sealed");
    }
    record
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn records_come_whole_however_they_are_cut_and_padded(
        suite in 0..3_usize,
        contents in prop::collection::vec((0..20_000_usize, 0..200_usize), 1..6),
        pieces in prop::collection::vec(1..9_000_usize, 1..20),
        moves: u8,
    ) {
        run(async {
            let (mut half, mut records, mut peer) = pair(SUITES[suite]);
            let mut sealed = Vec::new();
            let mut wanted = Vec::new();
            for (length, padding) in contents {
                let content = bytes(length.min(FRAGMENT_LIMIT - padding));
                sealed.extend(seal(&mut half, APPLICATION_DATA, &content, padding));
                wanted.extend(content);
            }
            let mut received = Vec::new();
            for (at, piece) in pieces.iter().cycle().enumerate() {
                if sealed.is_empty() {
                    break;
                }
                let rest = sealed.split_off((*piece).min(sealed.len()));
                peer.write_all(&sealed).await.expect("sent");
                sealed = rest;
                // For the runtime to see that it has come.
                tokio::task::yield_now().await;
                let mut buffer = [0; 10_000];
                let mut read = ReadBuf::new(&mut buffer);
                let mut cx = Context::from_waker(std::task::Waker::noop());
                while let Poll::Ready(result) = Pin::new(&mut records).poll_read(&mut cx, &mut read) {
                    result.expect("a record");
                    received.extend_from_slice(read.filled());
                    read.clear();
                }
                if at % 8 == usize::from(moves % 8) {
                    records = move_on(records);
                }
            }
            drop(peer);
            let mut rest = Vec::new();
            let _ = records.read_to_end(&mut rest).await;
            received.extend(rest);
            assert!(received == wanted, "{} of {} bytes", received.len(), wanted.len());
        });
    }

    #[test]
    fn a_record_with_any_bit_changed_is_refused(
        suite in 0..3_usize, length in 0..300_usize, at: prop::sample::Index, bit in 0..8_u32,
    ) {
        run(async {
            let (mut half, mut records, mut peer) = pair(SUITES[suite]);
            let mut record = seal(&mut half, APPLICATION_DATA, &bytes(length), 0);
            let at = at.index(record.len());
            record[at] ^= 1 << bit;
            peer.write_all(&record).await.expect("sent");
            peer.shutdown().await.expect("sent");
            let mut received = Vec::new();
            assert!(records.read_to_end(&mut received).await.is_err(), "changed at {at}");
            assert!(received.is_empty());
            // It says so, once, and no more.
            let _ = records.shutdown().await;
            drop(records);
            let mut said = Vec::new();
            peer.read_to_end(&mut said).await.expect("an alert, or the end");
            assert!(said.is_empty() || said.len() == HEADER_LENGTH + 2 + 1 + TAG_LENGTH, "{}", said.len());
        });
    }
}

#[test]
fn no_bytes_of_a_peer_are_too_much() {
    bolero::check!().with_type::<(u8, Vec<(u8, Vec<u8>, bool)>)>().for_each(|(suite, pieces)| {
        run(async {
            let (mut half, mut records, mut peer) = pair(SUITES[usize::from(*suite) % SUITES.len()]);
            for (kind, content, is_sealed) in pieces {
                // Also content of every type that is sealed as it should be.
                let bytes = if *is_sealed {
                    seal(&mut half, kind % 26, content, 3).to_vec()
                } else {
                    content.clone()
                };
                if peer.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            let _ = peer.shutdown().await;
            let mut received = Vec::new();
            let _ = records.read_to_end(&mut received).await;
        });
    });
}

#[test]
fn what_is_no_record_of_this_time_is_refused_for_its_reason() {
    let inner = |kind: u8, content: &[u8], padding: usize| {
        let (mut half, records, peer) = pair(Suite::Aes256Gcm);
        (seal(&mut half, kind, content, padding).to_vec(), records, peer)
    };
    let outer = |bytes: &[u8]| {
        let (_, records, peer) = pair(Suite::Aes256Gcm);
        (bytes.to_vec(), records, peer)
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _entered = runtime.enter();
    for ((bytes, mut records, mut peer), reason) in vec![
        // All padding.
        (inner(0, b"", 5), "UnexpectedMessage"),
        (inner(CHANGE_CIPHER_SPEC, b"\x01", 0), "UnexpectedMessage"),
        // A Finished, a NewSessionTicket.
        (inner(HANDSHAKE, b"\x14\0\0\0", 0), "UnexpectedMessage"),
        (inner(HANDSHAKE, b"\x04\0\0\0", 0), "UnexpectedMessage"),
        (inner(HANDSHAKE, b"", 0), "UnexpectedMessage"),
        (inner(ALERT, b"\x01", 0), "DecodeError"),
        (inner(APPLICATION_DATA, &bytes(FRAGMENT_LIMIT + 1), 0), "RecordOverflow"),
        (outer(&[APPLICATION_DATA, 3, 3, 0x41, 1]), "RecordOverflow"),
        (outer(&[HANDSHAKE, 3, 3, 0, 4, 24, 0, 0, 1]), "UnexpectedMessage"),
        (outer(&[CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1]), "UnexpectedMessage"),
        (outer(b"GET / HTTP/1.1\r\n"), "UnexpectedMessage"),
        (outer(&[APPLICATION_DATA, 3, 3, 0, 3, 1, 2, 3]), "BadRecordMac"),
    ] {
        runtime.block_on(async {
            peer.write_all(&bytes).await.expect("sent");
            let error = records.read(&mut [0]).await.expect_err(reason);
            assert!(error.to_string().contains(reason), "{error}, where {reason} is expected");
        });
    }
}
