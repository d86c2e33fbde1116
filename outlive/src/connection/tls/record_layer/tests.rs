//! A rustls client talks to a `RecordLayer` that has taken over its connection from rustls. `move_on` hands it over
//! again.

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
use crate::transport::tls_config::Tls;
use crate::transport::tls_tests::tls_of;
use crate::transport::tls_traffic::{Cipher, Direction, IV_LENGTH};
use crate::transport::traffic_secret::{FirstSecrets, TrafficSecret};

/// The suite of this version with AES-128-GCM.
pub fn aes_128(version: Version) -> Suite {
    Suite { version, cipher: Cipher::Aes128Gcm }
}

fn aes_256(version: Version) -> Suite {
    Suite { version, cipher: Cipher::Aes256Gcm }
}

pub const VERSIONS: [Version; 2] = [Version::Tls13, Version::Tls12];

pub type Client = TlsStream<UnixStream>;

/// The certificate of the server, which all tests share.
pub struct Parties {
    tls: Tls,
    roots: RootCertStore,
}

impl Parties {
    pub fn new() -> Self {
        let certificate = Certificate::new().expect("openssl makes a certificate");
        Self {
            tls: tls_of(&certificate),
            roots: certificate.roots().expect("the certificate is a valid root"),
        }
    }

    /// A connection with `suite` whose server's end was handed over after the handshake.
    async fn connect(&self, suite: Suite) -> (Client, RecordLayer) {
        let (client, server, _) = self.perform_handshake(suite).await;
        let (stream, session, opened) = record_reader::into_parts(server).expect("the secrets are exported");
        assert!(session.suite == suite && opened.is_empty());
        (client, RecordLayer::new(stream, session))
    }

    /// Both ends after the handshake, and the traffic secrets as the client has them with TLS 1.3.
    pub async fn perform_handshake(
        &self,
        suite: Suite,
    ) -> (Client, ServerStream<RecordAligned>, Arc<FirstSecrets>) {
        let mut provider = ring::default_provider();
        provider.cipher_suites.retain(|known| u16::from(known.suite()) == suite.number());
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("the suite belongs to one of the versions")
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        let secrets = Arc::new(FirstSecrets::default());
        config.key_log = secrets.clone();
        config.enable_secret_extraction = true;
        let (ours, theirs) = UnixStream::pair().expect("a socket pair is made");
        let server = record_reader::accept(ours.into(), &self.tls).1;
        let name = "localhost".try_into().expect("the name is valid");
        let client = TlsConnector::from(Arc::new(config)).connect(name, theirs);
        let (server, client) = tokio::join!(server, client);
        (client.expect("the handshake succeeds"), server.expect("the handshake succeeds"), secrets)
    }
}

/// Hands the connection over: its state is encoded and decoded. All decrypted data must have been delivered.
pub fn move_on(records: RecordLayer) -> RecordLayer {
    assert!(records.is_movable());
    let (stream, session, opened) = records.into_parts();
    assert!(opened.is_empty());
    RecordLayer::new(
        stream,
        TlsTrafficState::decode(&session.encode()).expect("the encoded state can be decoded"),
    )
}

pub fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the runtime starts")
        .block_on(work)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|number| number.to_le_bytes()[0]).collect()
}

/// Sends `length` bytes and checks that they are received; both at the same time.
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
    sending.expect("the bytes are sent");
    receiving.expect("the bytes are received");
    assert!(received == sent, "{length} bytes");
}

#[test]
fn data_of_any_size_passes_before_and_after_handovers_in_every_suite() {
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

/// rustls has read a part of a record, has decrypted more than was asked for, or both.
#[test]
fn handover_loses_nothing_that_rustls_has_read_or_decrypted() {
    let parties = Parties::new();
    run(async {
        // All of it has to fit into the socket's buffer, where each small piece takes a whole page.
        let small = [0, 1, 100, 300, 301, 4_000, 15_000].map(|read| (read, 300, 15_000));
        let large =
            [0, 1, 4_096, 16_384, 16_385, 60_000, 100_000].map(|read| (read, FRAGMENT_LIMIT, 100_000));
        let cases = VERSIONS
            .into_iter()
            .flat_map(|version| small.into_iter().chain(large).map(move |case| (version, case)));
        for (version, (read, record, length)) in cases {
            let (mut client, mut server, _) = parties.perform_handshake(aes_256(version)).await;
            let sent = bytes(length);
            for chunk in sent.chunks(record) {
                client.write_all(chunk).await.expect("the bytes are sent");
                client.flush().await.expect("the bytes are sent");
            }
            let mut received = vec![0; read];
            server.read_exact(&mut received).await.expect("the bytes are read");
            let (stream, session, opened) =
                record_reader::into_parts(server).expect("the connection leaves rustls");
            received.extend(opened);
            let left = length - received.len();
            let mut records = RecordLayer::new(stream, session);
            let mut rest = vec![0; left];
            records.read_exact(&mut rest).await.expect("the remainder arrives");
            received.extend(rest);
            assert!(received == sent, "after {read}, in records of {record}");
            pass(&mut records, &mut client, 1000).await;
        }
    });
}

#[test]
fn close_notify_ends_one_direction_only() {
    let parties = Parties::new();
    for version in VERSIONS {
        run(async {
            let (mut client, mut records) = parties.connect(aes_128(version)).await;
            client.shutdown().await.expect("close_notify is sent");
            assert_eq!(records.read(&mut [0]).await.expect("the input ends with close_notify"), 0);
            assert!(!records.is_movable());
            // The direction to the client is still open.
            pass(&mut records, &mut client, 10).await;
            records.shutdown().await.expect("close_notify is sent");
            assert_eq!(client.read(&mut [0]).await.expect("the input ends with close_notify"), 0);
        });
    }
}

#[test]
fn end_without_close_notify_is_an_error() {
    let parties = Parties::new();
    for version in VERSIONS {
        run(async {
            let (mut client, mut records) = parties.connect(aes_128(version)).await;
            // The client reads the session tickets too; otherwise closing its socket would reset the connection.
            pass(&mut records, &mut client, 10).await;
            drop(client.into_inner());
            let error = records.read(&mut [0]).await.expect_err("the data was cut off");
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        });
    }
}

/// rustls follows the KeyUpdates before the handover, `RecordLayer` those after it.
#[test]
fn key_updates_of_both_ends_are_followed_before_and_after_handovers() {
    let parties = Parties::new();
    for suite in Suite::of(Version::Tls13) {
        run(async {
            let (mut client, mut server, _) = parties.perform_handshake(suite).await;
            for length in 1..4 {
                client.get_mut().1.refresh_traffic_keys().expect("the key is updated");
                pass(&mut client, &mut server, length).await;
                server.get_mut().1.refresh_traffic_keys().expect("the key is updated");
                pass(&mut server, &mut client, length).await;
            }
            let (stream, session, _) = record_reader::into_parts(server).expect("the secrets are exported");
            let mut records = RecordLayer::new(stream, session);
            for length in [1, 16_384, 50_000] {
                records = move_on(records);
                client.get_mut().1.refresh_traffic_keys().expect("the key is updated");
                pass(&mut client, &mut records, length).await;
                records = move_on(records);
                pass(&mut records, &mut client, length).await;
                pass(&mut client, &mut records, length).await;
            }
        });
    }
}

/// rustls changes its key when it receives the request, but sends its KeyUpdate only with its next data, of which there
/// is none before the handover.
#[test]
fn handover_from_rustls_sends_the_key_update_that_is_due() {
    let parties = Parties::new();
    run(async {
        let (mut client, mut server, _) = parties.perform_handshake(aes_256(Version::Tls13)).await;
        pass(&mut client, &mut server, 10).await;
        client.get_mut().1.refresh_traffic_keys().expect("the key is updated");
        pass(&mut client, &mut server, 10).await;
        let (stream, session, _) = record_reader::into_parts(server).expect("the secrets are exported");
        let mut records = RecordLayer::new(stream, session);
        pass(&mut records, &mut client, 10).await;
        pass(&mut client, &mut records, 10).await;
    });
}

/// Such a connection comes from a release that did not hand over the secrets.
#[test]
fn key_update_without_known_secrets_ends_the_connection_after_the_response() {
    let parties = Parties::new();
    run(async {
        let (mut client, records) =
            parties.connect(Suite { version: Version::Tls13, cipher: Cipher::ChaCha20Poly1305 }).await;
        let mut records = without_secrets(records);
        pass(&mut client, &mut records, 10).await;
        client.get_mut().1.refresh_traffic_keys().expect("the key is updated");
        client.write_all(b"under another key").await.expect("the bytes are sent");
        client.flush().await.expect("the bytes are sent");
        assert_eq!(records.read(&mut [0]).await.expect("the input ends without an error"), 0);
        assert!(records.is_near_key_limit() && !records.is_movable());
        pass(&mut records, &mut client, 1000).await;
        records.shutdown().await.expect("close_notify is sent");
        assert_eq!(client.read(&mut [0]).await.expect("the input ends with close_notify"), 0);
    });
}

fn without_secrets(records: RecordLayer) -> RecordLayer {
    let (stream, mut session, _) = records.into_parts();
    (session.from_peer.secret, session.to_peer.secret) = (None, None);
    RecordLayer::new(stream, session)
}

#[test]
fn key_at_its_record_limit_is_updated() {
    for suite in Suite::of(Version::Tls13) {
        run(async {
            let (_, mut records, peer) = pair(suite);
            let sequence = records.to_peer.record_limit() - 2;
            let direction = Direction { sequence, ..records.to_peer.direction.clone() };
            let mut half = RecordProtection::new(suite, direction.clone());
            records.to_peer = RecordProtection::new(suite, direction);
            assert!(!records.is_near_key_limit());
            records.write_all(b"the last record of data").await.expect("the bytes are sent");
            records.write_all(b"with the next key").await.expect("the bytes are sent");
            drop(records);
            let mut opened = Vec::new();
            let mut peer = peer;
            let mut bytes = BytesMut::new();
            while peer.read_buf(&mut bytes).await.expect("the bytes are read") > 0 {}
            while let Some((kind, record)) = open_next(&mut half, &mut bytes) {
                if kind == HANDSHAKE {
                    assert!(half.update_keys());
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

/// Decrypts the record that `bytes` begin with.
pub fn open_next(half: &mut RecordProtection, bytes: &mut BytesMut) -> Option<(u8, BytesMut)> {
    let length = sealed_length(bytes).expect("the record header is valid")?;
    let mut header = [0; HEADER_LENGTH];
    bytes.copy_to_slice(&mut header);
    let mut record = bytes.split_to(length);
    let kind = half.open(header, &mut record).expect("the record has the key that is due");
    Some((kind, record))
}

/// A key of TLS 1.2 cannot be updated either.
#[test]
fn key_at_its_record_limit_without_a_secret_encrypts_nothing_more() {
    let parties = Parties::new();
    for suite in Suite::ALL {
        run(async {
            let (_client, records) = parties.connect(suite).await;
            let mut records = without_secrets(records);
            let is_unlimited = suite == (Suite { version: Version::Tls12, cipher: Cipher::ChaCha20Poly1305 });
            records.to_peer.direction.sequence = 1 << 23;
            assert_eq!((records.is_near_key_limit(), records.is_movable()), (!is_unlimited, is_unlimited));
            records.to_peer.direction.sequence = 1 << 24;
            assert_eq!(records.write_all(b"one too many").await.is_ok(), is_unlimited, "{suite:?}");
            // The sequence number never wraps.
            records.to_peer.direction.sequence = u64::MAX;
            assert!(records.is_near_key_limit());
            records.write_all(b"x").await.expect_err("the key has reached its limit");
        });
    }
}

/// RFC 5288 section 3: with AES-GCM a nonce that occurs twice would reveal the key of the authentication. rustls sends the
/// first records, and a handover is between any two of the others.
#[test]
fn explicit_nonces_of_tls_1_2_do_not_repeat_over_handovers() {
    let parties = Parties::new();
    run(async {
        let (client, mut server, _) = parties.perform_handshake(aes_256(Version::Tls12)).await;
        let (mut socket, _) = client.into_inner();
        let mut nonces = std::collections::HashSet::new();
        let mut take_nonce = async || {
            let mut record = [0; HEADER_LENGTH + 8 + 1 + TAG_LENGTH];
            socket.read_exact(&mut record).await.expect("a record arrives");
            assert!(nonces.insert(record[HEADER_LENGTH..][..8].to_vec()), "a nonce repeats");
        };
        for _ in 0..5 {
            server.write_all(b"x").await.expect("the bytes are sent");
            server.flush().await.expect("the bytes are sent");
            take_nonce().await;
        }
        let (stream, session, _) = record_reader::into_parts(server).expect("the secrets are exported");
        let mut records = RecordLayer::new(stream, session);
        for _ in 0..20 {
            records.write_all(b"x").await.expect("the bytes are sent");
            take_nonce().await;
            records = move_on(records);
        }
    });
}

/// The peer requests KeyUpdates again and again, and reads none.
#[test]
fn repeated_key_update_requests_queue_one_answer() {
    run(async {
        let (mut half, mut records, mut peer) = pair(aes_128(Version::Tls13));
        for _ in 0..1000 {
            let mut bytes = seal(&mut half, HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, UPDATE_REQUESTED], 0);
            assert!(half.update_keys());
            bytes.extend(seal(&mut half, APPLICATION_DATA, b"x", 0));
            peer.write_all(&bytes).await.expect("the bytes are sent");
            assert_eq!(records.read(&mut [0]).await.expect("the KeyUpdate is followed"), 1);
            assert!(records.unsent.is_empty());
        }
        records.write_all(b"y").await.expect("the bytes are sent");
        drop(records);
        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.expect("two records arrive");
        assert_eq!(received.len(), 2 * (HEADER_LENGTH + 1 + TAG_LENGTH) + 5 + 1);
    });
}

/// The secrets of one connection must not stay in the TLS configuration, which all connections share.
#[test]
fn secrets_are_referenced_only_by_their_connection() {
    let parties = Parties::new();
    run(async {
        let (_first_client, first, _) = parties.perform_handshake(aes_128(Version::Tls13)).await;
        let (_second_client, second, secrets) = parties.perform_handshake(aes_128(Version::Tls13)).await;
        assert_eq!(second.get_ref().0.secrets(), (1, secrets.from_peer.get(), secrets.to_peer.get()));
        let (_, first, _) = record_reader::into_parts(first).expect("the secrets are exported");
        let (_, second, _) = record_reader::into_parts(second).expect("the secrets are exported");
        assert!(first.from_peer.secret.is_some() && first.from_peer.secret != second.from_peer.secret);
        assert!(first.to_peer.secret.is_some() && first.to_peer.secret != second.to_peer.secret);
    });
}

/// The peer's keys, a `RecordLayer` with the matching keys, and the peer's socket, without a handshake.
fn pair(suite: Suite) -> (RecordProtection, RecordLayer, UnixStream) {
    let direction = |byte: u8| Direction {
        key: vec![byte; suite.key_length()].into(),
        iv: [byte; IV_LENGTH].into(),
        sequence: 7,
        secret: (suite.version == Version::Tls13)
            .then(|| TrafficSecret::new(&vec![byte; suite.secret_length()])),
    };
    let (from_peer, to_peer) = (direction(1), direction(2));
    let session = TlsTrafficState {
        suite,
        from_peer,
        to_peer,
        unread: Bytes::new(),
        peer: PeerState::default(),
        client: None,
    };
    let (ours, theirs) = UnixStream::pair().expect("a socket pair is made");
    (RecordProtection::new(suite, direction(1)), RecordLayer::new(ours.into(), session), theirs)
}

/// Encrypts a record with `padding` zeros. TLS 1.2 has no padding.
pub fn seal(half: &mut RecordProtection, kind: u8, content: &[u8], padding: usize) -> BytesMut {
    let mut record = BytesMut::new();
    // `seal` appends its content type as the last byte, so padding is content that ends with the type and zeros.
    let mut padded = content.to_vec();
    if padding > 0 {
        padded.push(kind);
        padded.resize(content.len() + padding, 0);
        half.seal(0, &padded, &mut record).expect("the record is encrypted");
    } else {
        half.seal(kind, &padded, &mut record).expect("the record is encrypted");
    }
    record
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn records_are_read_whole_however_they_are_split_and_padded(
        suite in 0..Suite::ALL.len(),
        contents in prop::collection::vec((0..20_000_usize, 0..200_usize), 1..6),
        pieces in prop::collection::vec(1..9_000_usize, 1..20),
        moves: u8,
    ) {
        run(async {
            let suite = Suite::ALL[suite];
            let (mut half, mut records, mut peer) = pair(suite);
            let mut sealed = Vec::new();
            let mut wanted = Vec::new();
            for (length, padding) in contents {
                let padding = if suite.version == Version::Tls13 { padding } else { 0 };
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
                peer.write_all(&sealed).await.expect("the bytes are sent");
                sealed = rest;
                // Lets the runtime notice that the socket is readable.
                tokio::task::yield_now().await;
                let mut buffer = [0; 10_000];
                let mut read = ReadBuf::new(&mut buffer);
                let mut cx = Context::from_waker(std::task::Waker::noop());
                while let Poll::Ready(result) = Pin::new(&mut records).poll_read(&mut cx, &mut read) {
                    result.expect("the record is valid");
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

    /// With TLS 1.3 the type and the version in a record header are not authenticated, as in rustls, so a change there has
    /// no effect.
    #[test]
    fn record_with_a_changed_bit_is_refused_or_read_unchanged(
        suite in 0..Suite::ALL.len(), length in 0..300_usize, at: prop::sample::Index, bit in 0..8_u32,
    ) {
        run(async {
            let suite = Suite::ALL[suite];
            let (mut half, mut records, mut peer) = pair(suite);
            let content = bytes(length);
            let mut record = seal(&mut half, APPLICATION_DATA, &content, 0);
            let at = at.index(record.len());
            record[at] ^= 1 << bit;
            peer.write_all(&record).await.expect("the bytes are sent");
            peer.shutdown().await.expect("the bytes are sent");
            let mut received = Vec::new();
            assert!(records.read_to_end(&mut received).await.is_err(), "changed at {at}");
            let is_authenticated = at >= 3 || suite.version == Version::Tls12;
            assert!(received.is_empty() || received == content && !is_authenticated, "changed at {at}");
            // The server sends one alert, and nothing else.
            let _ = records.shutdown().await;
            drop(records);
            let mut received = Vec::new();
            peer.read_to_end(&mut received).await.expect("the alert arrives");
            let overhead = match suite {
                Suite { version: Version::Tls13, .. } => 1,
                Suite { cipher: Cipher::ChaCha20Poly1305, .. } => 0,
                _ => 8,
            };
            assert_eq!(received.len(), HEADER_LENGTH + overhead + 2 + TAG_LENGTH);
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
                    // Some of the pieces are validly encrypted records, of every content type.
                    let bytes = if *is_sealed {
                        let padding = if records.suite.version == Version::Tls13 { 3 } else { 0 };
                        seal(&mut half, kind % 26, content, padding).to_vec()
                    } else {
                        content.clone()
                    };
                    if peer.write_all(&bytes).await.is_err() {
                        break;
                    }
                    // The peer uses its next key after its KeyUpdate.
                    if *is_sealed
                        && records.suite.version == Version::Tls13
                        && kind % 26 == HANDSHAKE
                        && matches!(content[..], [KEY_UPDATE, 0, 0, 1, 0 | 1])
                    {
                        assert!(half.update_keys());
                    }
                }
                let _ = peer.shutdown().await;
                let mut received = Vec::new();
                let _ = records.read_to_end(&mut received).await;
            });
        },
    );
}
