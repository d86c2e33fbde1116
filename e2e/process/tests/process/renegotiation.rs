//! OpenSSL begins a renegotiation of TLS 1.2. The service answers with the alert `no_renegotiation` (RFC 5246 section 7.2.2) while
//! rustls serves the connection, and after parking, when the record layer of the library serves it.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use testkit::block_on;
use testkit::process::Process;
use testkit::service::command;
use testkit::tls_service::TlsService;

use crate::app_binary;
use crate::idle_connections::wait_until_parked;

/// Reads lines until one contains `wanted`.
fn read_until(stdout: &mut impl BufRead, wanted: &str) {
    let mut line = String::new();
    while !line.contains(wanted) {
        line.clear();
        assert_ne!(stdout.read_line(&mut line).expect("valid UTF-8"), 0, "openssl ended without {wanted:?}");
    }
}

#[test]
fn renegotiation_of_openssl_is_refused_with_a_warning_before_and_after_parking() {
    for is_parked in [false, true] {
        let service = TlsService::start(app_binary(), &[]).expect("the service starts");
        // `timeout` ends openssl if the service does not answer.
        let mut openssl = command("timeout", &["120", "openssl", "s_client", "-tls1_2", "-connect"]);
        openssl.arg(service.https.to_string());
        openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut openssl = Process::spawn(&mut openssl).expect("openssl is installed");
        let mut stdin = openssl.child().stdin.take().expect("it is piped");
        let mut stdout = BufReader::new(openssl.child().stdout.take().expect("it is piped"));
        let mut ask = || {
            stdin.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n").expect("openssl reads");
            read_until(&mut stdout, ", generation 1, ");
        };
        ask();
        if is_parked {
            block_on(wait_until_parked(&service, 1));
            ask();
        }
        // s_client renegotiates when it reads this line.
        stdin.write_all(b"R\n").expect("openssl reads");
        let mut errors = String::new();
        let stderr = openssl.child().stderr.take().expect("it is piped");
        { stderr }.read_to_string(&mut errors).expect("valid UTF-8");
        assert!(errors.contains("no renegotiation"), "parked: {is_parked}: {errors}");
    }
}
