//! The service closes a TLS 1.2 connection with a response (`Connection: close`) before its key has sealed as many records as
//! permitted. At that limit rustls would close the connection within a response.

use testkit::certificate::Certificate;
use testkit::client::{Connection, Target};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::CipherSuiteCommon;
use tokio_rustls::rustls::crypto::ring::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256;
use tokio_rustls::rustls::{SupportedCipherSuite, Tls12CipherSuite};

use crate::connection::tests::{move_to, serve_with};
use crate::connection::unread_tests::{FIRST, PATIENCE, router};
use crate::registry::{Phase, Stage};
use crate::transport::tls_tests::tls_of;

/// How many records rustls seals with one key in this test, including the record of its last handshake message.
const LIMIT: u64 = 12;
/// Half of the limit of the record layer, which continues a connection that was handed over.
const HALF: u64 = 2048;

/// The suite that the test certificate permits, with this limit.
fn suite(limit: u64) -> SupportedCipherSuite {
    let SupportedCipherSuite::Tls12(suite) = TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 else {
        panic!("the suite is of TLS 1.2");
    };
    let common = CipherSuiteCommon { confidentiality_limit: limit, ..suite.common };
    let limited = Tls12CipherSuite {
        common,
        prf_provider: suite.prf_provider,
        kx: suite.kx,
        sign: suite.sign,
        aead_alg: suite.aead_alg,
    };
    SupportedCipherSuite::Tls12(Box::leak(Box::new(limited)))
}

#[tokio::test]
async fn tls_1_2_response_closes_the_connection_at_half_of_the_limit_of_its_suite() {
    let certificate = Certificate::new().expect("openssl runs");
    let tls = tls_of(&certificate);
    tls.use_suite(suite(LIMIT));
    let served = serve_with(router(), Some(tls)).await;
    let config = certificate.client_over_tls12(None, &["http/1.1"]).expect("the configuration is valid");
    let target = Target::Tls(served.address, config);
    let mut client = Connection::open(&target).await.expect("the client connects");
    let mut answered = 0;
    let mut closes = false;
    while !closes {
        let answer = timeout(PATIENCE, client.ask(FIRST)).await.expect("the answer arrives in time");
        closes = answer.expect("the response is complete").closes();
        answered += 1;
        assert!(answered < LIMIT, "no response closes the connection");
    }
    // Each response is one record. The service checks the limit when it reads the next request.
    assert_eq!(answered, LIMIT / 2 + 1);
}

/// The key of the connection reaches half of its limit with a response, so a drain does not hand the connection over.
#[tokio::test]
async fn idle_tls_1_2_connection_near_the_limit_of_its_key_is_closed_with_a_response() {
    let certificate = Certificate::new().expect("openssl runs");
    let tls = tls_of(&certificate);
    tls.use_suite(suite(u64::MAX));
    let served = serve_with(router(), Some(tls.clone())).await;
    let config = certificate.client_over_tls12(None, &["http/1.1"]).expect("the configuration is valid");
    let mut client =
        Connection::open(&Target::Tls(served.address, config)).await.expect("the client connects");
    let mut ask = async || {
        let answer = timeout(PATIENCE, client.ask(FIRST)).await.expect("the answer arrives in time");
        answer.expect("the response is complete").closes()
    };
    assert!(!ask().await);
    let next = serve_with(router(), Some(tls)).await;
    move_to(&next, served).await;
    // The record of the last handshake message and that of the first response count too.
    for _ in 2..HALF {
        assert!(!ask().await);
    }
    next.until_stage(Stage::Waiting).await;
    next.server.enter(Phase::Quiescing);
    assert!(ask().await);
    assert_eq!(next.count_quiescent().await, 0);
}
