//! Connections that rustls has made, and that have moved: what its client says is heard, and what we say it hears.

use std::io::ErrorKind;
use std::sync::Arc;

use proptest::prelude::*;
use testkit::certificate::Certificate;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_rustls::server::TlsStream as ServerStream;

use super::*;
use crate::connection::tls::record_reader::{self, RecordAligned};
use crate::os::credentials::Credentials;
use crate::transport::tls_config;
use crate::transport::traffic_secret::{FirstSecrets, TrafficSecret};

pub type Client = TlsStream<UnixStream>;

/// One certificate for all.
pub struct Parties {
    tls: tls_config::Tls,
    roots: RootCertStore,
}

impl Parties {
    pub fn new() -> Self {
        let certificate = Certificate::new().expect("a certificate");
        let (chain, key) = (certificate.chain(), certificate.key());
        let tls = tls_config::acceptor(Some(&chain), Some(&key), &Credentials::default(), true);
        Self { tls: tls.expect("an acceptor"), roots: certificate.roots().expect("roots") }
    }

    /// A connection of `suite`, made and moved.
    async fn connect(&self, suite: Suite) -> (Client, RecordLayer) {
        let (client, server, _) = self.shake_hands(suite).await;
        let (stream, session, opened) = record_reader::into_parts(server).expect("secrets");
        assert!(session.suite == suite && opened.is_empty());
        (client, RecordLayer::new(stream, session))
    }

    /// Both ends, and the secrets as the client knows them.
    pub async fn shake_hands(
        &self,
        suite: Suite,
    ) -> (Client, ServerStream<RecordAligned>, Arc<FirstSecrets>) {
        let mut provider = ring::default_provider();
        provider.cipher_suites.retain(|known| u16::from(known.suite()) == suite as u16);
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        let secrets = Arc::new(FirstSecrets::default());
        config.key_log = secrets.clone();
        config.enable_secret_extraction = true;
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let server = record_reader::accept(Stream::Unix(ours), &self.tls);
        let name = "localhost".try_into().expect("a name");
        let client = TlsConnector::from(Arc::new(config)).connect(name, theirs);
        let (server, client) = tokio::join!(server, client);
        (client.expect("a handshake"), server.expect("a handshake"), secrets)
    }
}

/// As through the handover, with nothing read that is not given on.
pub fn move_on(records: RecordLayer) -> RecordLayer {
    assert!(records.is_movable());
    let (stream, session, opened) = records.into_parts();
    assert!(opened.is_empty());
    RecordLayer::new(stream, TlsTrafficState::decode(&session.encode()).expect("it comes back"))
}

pub fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|number| number.to_le_bytes()[0]).collect()
}

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
    for suite in Suite::ALL {
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
            let (mut client, mut server, _) = parties.shake_hands(Suite::Aes256Gcm).await;
            let sent = bytes(length);
            for chunk in sent.chunks(record) {
                client.write_all(chunk).await.expect("sent");
                client.flush().await.expect("sent");
            }
            let mut received = vec![0; read];
            server.read_exact(&mut received).await.expect("read");
            let (stream, session, opened) = record_reader::into_parts(server).expect("it moves");
            received.extend(opened);
            let left = length - received.len();
            let mut records = RecordLayer::new(stream, session);
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

/// rustls follows the KeyUpdates before the connection moves, `RecordLayer` those after it.
#[test]
fn both_ends_update_their_keys_over_moves() {
    let parties = Parties::new();
    for suite in Suite::ALL {
        run(async {
            let (mut client, mut server, _) = parties.shake_hands(suite).await;
            for length in 1..4 {
                client.get_mut().1.refresh_traffic_keys().expect("a KeyUpdate");
                pass(&mut client, &mut server, length).await;
                server.get_mut().1.refresh_traffic_keys().expect("a KeyUpdate");
                pass(&mut server, &mut client, length).await;
            }
            let (stream, session, _) = record_reader::into_parts(server).expect("secrets");
            let mut records = RecordLayer::new(stream, session);
            for length in [1, 16_384, 50_000] {
                records = move_on(records);
                client.get_mut().1.refresh_traffic_keys().expect("a KeyUpdate");
                pass(&mut client, &mut records, length).await;
                records = move_on(records);
                pass(&mut records, &mut client, length).await;
                pass(&mut client, &mut records, length).await;
            }
        });
    }
}

/// rustls has changed its key by then, and sends its KeyUpdate with what it sends next, which never comes.
#[test]
fn a_connection_that_leaves_rustls_answers_the_last_key_update_first() {
    let parties = Parties::new();
    run(async {
        let (mut client, mut server, _) = parties.shake_hands(Suite::Aes256Gcm).await;
        pass(&mut client, &mut server, 10).await;
        client.get_mut().1.refresh_traffic_keys().expect("a KeyUpdate");
        pass(&mut client, &mut server, 10).await;
        let (stream, session, _) = record_reader::into_parts(server).expect("secrets");
        let mut records = RecordLayer::new(stream, session);
        pass(&mut records, &mut client, 10).await;
        pass(&mut client, &mut records, 10).await;
    });
}

/// A release that did not keep the secrets had it.
#[test]
fn a_key_update_ends_a_connection_without_secrets_after_the_answer_in_flight() {
    let parties = Parties::new();
    run(async {
        let (mut client, records) = parties.connect(Suite::ChaCha20Poly1305).await;
        let mut records = without_secrets(records);
        pass(&mut client, &mut records, 10).await;
        client.get_mut().1.refresh_traffic_keys().expect("a KeyUpdate");
        client.write_all(b"under another key").await.expect("sent");
        client.flush().await.expect("sent");
        assert_eq!(records.read(&mut [0]).await.expect("an end, and no error"), 0);
        assert!(records.is_near_key_limit() && !records.is_movable());
        pass(&mut records, &mut client, 1000).await;
        records.shutdown().await.expect("close_notify");
        assert_eq!(client.read(&mut [0]).await.expect("a clean end"), 0);
    });
}

fn without_secrets(records: RecordLayer) -> RecordLayer {
    let (stream, mut session, _) = records.into_parts();
    (session.from_peer.secret, session.to_peer.secret) = (None, None);
    RecordLayer::new(stream, session)
}

#[test]
fn a_key_that_has_sealed_as_much_as_is_safe_is_updated() {
    for suite in Suite::ALL {
        run(async {
            let (_, mut records, peer) = pair(suite);
            let direction =
                Direction { sequence: SEALED_RECORDS_LIMIT - 2, ..records.to_peer.direction.clone() };
            let mut half = DirectionState::new(suite, direction.clone());
            records.to_peer = DirectionState::new(suite, direction);
            assert!(!records.is_near_key_limit());
            records.write_all(b"the last record of data").await.expect("sent");
            records.write_all(b"with the next key").await.expect("sent");
            drop(records);
            let mut opened = Vec::new();
            let mut peer = peer;
            let mut bytes = BytesMut::new();
            while peer.read_buf(&mut bytes).await.expect("read") > 0 {}
            while let Some(length) = sealed_length(&bytes).expect("a header") {
                bytes.advance(HEADER_LENGTH);
                let mut record = bytes.split_to(length);
                let kind = half.open(&mut record).expect("its key");
                if kind == HANDSHAKE {
                    assert!(half.update_keys(suite));
                }
                opened.push((kind, record.to_vec()));
            }
            let update = [KEY_UPDATE, 0, 0, 1, UPDATE_REQUESTED].to_vec();
            let data = |content: &[u8]| (APPLICATION_DATA, content.to_vec());
            let wanted = [data(b"the last record of data"), (HANDSHAKE, update), data(b"with the next key")];
            assert_eq!(opened, wanted);
        });
    }
}

#[test]
fn a_key_without_its_secret_seals_no_more_than_is_safe() {
    let parties = Parties::new();
    run(async {
        let (_client, records) = parties.connect(Suite::Aes128Gcm).await;
        let mut records = without_secrets(records);
        records.to_peer.direction.sequence = KEY_LIMIT_SOFT;
        assert!(records.is_near_key_limit());
        records.to_peer.direction.sequence = SEALED_RECORDS_LIMIT;
        records.write_all(b"one too many").await.expect_err("refused");
    });
}

/// The peer asks for an answer again and again, and takes none.
#[test]
fn key_updates_that_ask_for_answers_queue_one() {
    run(async {
        let (mut half, mut records, mut peer) = pair(Suite::Aes128Gcm);
        for _ in 0..1000 {
            let mut bytes = seal(&mut half, HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, UPDATE_REQUESTED], 0);
            assert!(half.update_keys(Suite::Aes128Gcm));
            bytes.extend(seal(&mut half, APPLICATION_DATA, b"x", 0));
            peer.write_all(&bytes).await.expect("sent");
            assert_eq!(records.read(&mut [0]).await.expect("followed"), 1);
            assert!(records.unsent.is_empty());
        }
        records.write_all(b"y").await.expect("sent");
        drop(records);
        let mut said = Vec::new();
        peer.read_to_end(&mut said).await.expect("two records");
        assert_eq!(said.len(), 2 * (HEADER_LENGTH + 1 + TAG_LENGTH) + 5 + 1);
    });
}

/// They belong to a connection, so none may stay in the configuration that all share.
#[test]
fn secrets_are_held_by_their_connection_alone() {
    let parties = Parties::new();
    run(async {
        let (_first_client, first, _) = parties.shake_hands(Suite::Aes128Gcm).await;
        let (_second_client, second, secrets) = parties.shake_hands(Suite::Aes128Gcm).await;
        assert_eq!(second.get_ref().0.secrets(), (1, secrets.from_peer.get(), secrets.to_peer.get()));
        let (_, first, _) = record_reader::into_parts(first).expect("secrets");
        let (_, second, _) = record_reader::into_parts(second).expect("secrets");
        assert!(first.from_peer.secret.is_some() && first.from_peer.secret != second.from_peer.secret);
        assert!(first.to_peer.secret.is_some() && first.to_peer.secret != second.to_peer.secret);
    });
}

/// Both ends with the same keys, without a handshake.
fn pair(suite: Suite) -> (DirectionState, RecordLayer, UnixStream) {
    let direction = |byte: u8| Direction {
        key: vec![byte; suite.key_length()].into(),
        iv: [byte; IV_LENGTH].into(),
        sequence: 7,
        secret: Some(TrafficSecret::new(&vec![byte; suite.secret_length()])),
    };
    let (from_peer, to_peer) = (direction(1), direction(2));
    let session =
        TlsTrafficState { suite, from_peer, to_peer, unread: Bytes::new(), peer: PeerState::default() };
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    (DirectionState::new(suite, direction(1)), RecordLayer::new(Stream::Unix(ours), session), theirs)
}

/// A record with padding.
pub fn seal(half: &mut DirectionState, kind: u8, content: &[u8], padding: usize) -> BytesMut {
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
            let (mut half, mut records, mut peer) = pair(Suite::ALL[suite]);
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

    /// The type and the version in a record's header are ignored, as in rustls: what is sealed is not what they say.
    #[test]
    fn a_record_with_any_bit_changed_is_refused_or_the_same(
        suite in 0..3_usize, length in 0..300_usize, at: prop::sample::Index, bit in 0..8_u32,
    ) {
        run(async {
            let (mut half, mut records, mut peer) = pair(Suite::ALL[suite]);
            let content = bytes(length);
            let mut record = seal(&mut half, APPLICATION_DATA, &content, 0);
            let at = at.index(record.len());
            record[at] ^= 1 << bit;
            peer.write_all(&record).await.expect("sent");
            peer.shutdown().await.expect("sent");
            let mut received = Vec::new();
            assert!(records.read_to_end(&mut received).await.is_err(), "changed at {at}");
            assert!(received.is_empty() || received == content && at < 3, "changed at {at}");
            // It says so, once, and no more.
            let _ = records.shutdown().await;
            drop(records);
            let mut said = Vec::new();
            peer.read_to_end(&mut said).await.expect("an alert");
            assert_eq!(said.len(), HEADER_LENGTH + 2 + 1 + TAG_LENGTH);
        });
    }
}

#[cfg(feature = "fuzz-tests")]
#[test]
fn fuzzed_records_of_a_peer_do_not_panic() {
    crate::fuzz::target!("tls_records").with_type::<(u8, Vec<(u8, Vec<u8>, bool)>)>().for_each(
        |(suite, pieces)| {
            run(async {
                let (mut half, mut records, mut peer) =
                    pair(Suite::ALL[usize::from(*suite) % Suite::ALL.len()]);
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
                    // As a peer that goes on with its next key.
                    if *is_sealed
                        && kind % 26 == HANDSHAKE
                        && matches!(content[..], [KEY_UPDATE, 0, 0, 1, 0 | 1])
                    {
                        assert!(half.update_keys(records.suite));
                    }
                }
                let _ = peer.shutdown().await;
                let mut received = Vec::new();
                let _ = records.read_to_end(&mut received).await;
            });
        },
    );
}
