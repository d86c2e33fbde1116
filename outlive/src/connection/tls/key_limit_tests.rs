//! The service closes a TLS 1.2 connection with a response (`Connection: close`) before its key has sealed as many records as
//! permitted. At that limit rustls would close the connection within a response.

use testkit::certificate::Certificate;
use testkit::client::{Connection, Target};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::CipherSuiteCommon;
use tokio_rustls::rustls::crypto::ring::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256;
use tokio_rustls::rustls::{SupportedCipherSuite, Tls12CipherSuite};

use crate::connection::tests::serve_with;
use crate::connection::unread_tests::{FIRST, PATIENCE, router};
use crate::transport::tls_tests::tls_of;

/// How many records rustls seals with one key in this test, including the record of its last handshake message.
const LIMIT: u64 = 12;

/// The suite that the test certificate permits, with a limit of [`LIMIT`].
fn suite() -> SupportedCipherSuite {
    let SupportedCipherSuite::Tls12(suite) = TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 else {
        panic!("the suite is of TLS 1.2");
    };
    let common = CipherSuiteCommon { confidentiality_limit: LIMIT, ..suite.common };
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
    tls.use_suite(suite());
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
