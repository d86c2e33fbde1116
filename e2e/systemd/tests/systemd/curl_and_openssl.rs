//! curl and openssl as clients of the binary, without systemd.

use std::process::{Command, Stdio};

use rustix::process::Signal;
use testkit::client::Target;
use testkit::service::Service;
use testkit::tls_service::TlsService;

use crate::app_binary;

/// The standard output of curl, or its exit code.
fn curl(arguments: &[&str]) -> Result<String, i32> {
    let output =
        Command::new("curl").args(["--silent", "--show-error", "--max-time", "120"]).args(arguments).output();
    let output = output.expect("curl runs");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(output.status.code().unwrap_or(-1))
    }
}

#[test]
fn curl_is_answered_on_each_listener_in_each_protocol() {
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    let certificate = service.certificate.chain();
    let trust = ["--cacert", certificate.to_str().expect("the path is UTF-8")];
    let version = ["--output", "/dev/null", "--write-out", "%{http_version} %{response_code}"];
    let ask = |flags: &[&str], url: &str| curl(&[flags, &trust, &version, &[url]].concat());
    let http = format!("http://{}/", service.http);
    let https = format!("https://localhost:{}/", service.https.port());
    assert_eq!(ask(&["--http1.1"], &http).as_deref(), Ok("1.1 200"));
    assert_eq!(ask(&["--http2-prior-knowledge"], &http).as_deref(), Ok("2 200"));
    assert_eq!(ask(&["--http1.1"], &https).as_deref(), Ok("1.1 200"));
    assert_eq!(ask(&["--http2"], &https).as_deref(), Ok("2 200"));
    assert_eq!(ask(&["--no-alpn"], &https).as_deref(), Ok("1.1 200"));
    let Target::Unix(admin) = service.admin() else { panic!("the admin listener is a Unix socket") };
    let socket = ["--unix-socket", admin.to_str().expect("the path is UTF-8")];
    assert_eq!(ask(&socket, "http://localhost/healthz").as_deref(), Ok("1.1 200"));
    // Each listener has its own routes.
    assert_eq!(ask(&socket, "http://localhost/echo").as_deref(), Ok("1.1 404"));
    assert_eq!(ask(&[], &format!("{http}metrics")).as_deref(), Ok("1.1 404"));
    // Without --cacert curl refuses the certificate (exit code 60), so it did verify it above.
    assert_eq!(curl(&[&https]), Err(60));
}

#[test]
fn http_1_and_http_2_are_served_on_the_same_port() {
    let service = Service::start(app_binary(), &[]).expect("the service starts");
    let url = format!("http://{}/", service.address());
    let version = ["-o", "/dev/null", "-w", "%{http_version} %{http_code}"];
    assert_eq!(curl(&[&version[..], &[&url]].concat()).as_deref(), Ok("1.1 200"));
    assert_eq!(curl(&[&version[..], &["--http2-prior-knowledge", &url]].concat()).as_deref(), Ok("2 200"));
}

#[test]
fn too_large_a_head_is_refused_over_http_2() {
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    // Above the limit of HTTP/2 and below that of HTTP/1.1; curl itself sends no header above 64 KiB.
    let large = "x".repeat(40 * 1024);
    for (protocol, status) in [("--http2-prior-knowledge", "431"), ("--http1.1", "200")] {
        let output = Command::new("curl")
            .args(["--silent", "--max-time", "120", "--output", "/dev/null", protocol])
            .args(["--write-out", "%{response_code}", "--header", &format!("x-large: {large}")])
            .arg(format!("http://{}/", service.http))
            .output()
            .expect("curl runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), status, "{protocol}");
    }
}

#[test]
fn http_2_request_in_flight_finishes_without_a_store() {
    let mut service = Service::start(app_binary(), &[]).expect("the service starts");
    let url = format!("http://{}/sleep?duration=5s", service.address());
    let client = std::thread::spawn(move || curl(&["--http2-prior-knowledge", &url]));
    service.wait_for_in_flight(1).expect("the request is in flight");
    service.signal(Signal::TERM);
    assert_eq!(client.join().expect("the thread does not panic").as_deref(), Ok("slept 5s\n"));
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success(), "{status}: {log}");
}

#[test]
fn http_2_request_in_flight_finishes_with_a_store() {
    let mut service = Service::start_with_store(app_binary(), &[]).expect("the service starts");
    let url = format!("http://{}/sleep?duration=5s", service.address());
    let client = std::thread::spawn(move || {
        Command::new("curl").args(["-sSv", "--http2-prior-knowledge", &url]).output().expect("curl runs")
    });
    service.wait_for_in_flight(1).expect("the request is in flight");
    service.signal(Signal::TERM);
    let answer = client.join().expect("the thread does not panic");
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "slept 5s\n");
    let (status, log) = service.end().expect("the process ends");
    assert!(status.success() && log.contains("1 request in flight finished, 0 cut off"), "{log}");
}

#[test]
fn openssl_connects_with_tls_1_2_and_1_3_but_not_1_1() {
    let service = TlsService::start(app_binary(), &[]).expect("the service starts");
    let shake = |version: &str| {
        Command::new("openssl")
            .args(["s_client", "-brief", "-alpn", "h2,http/1.1", "-verify_return_error", version])
            .args(["-connect", &format!("localhost:{}", service.https.port())])
            .arg("-CAfile")
            .arg(service.certificate.chain())
            .stdin(Stdio::null())
            .output()
            .expect("openssl runs")
    };
    for (version, name) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let output = shake(version);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && text.contains(name), "{text}");
    }
    assert!(!shake("-tls1_1").status.success());
}
