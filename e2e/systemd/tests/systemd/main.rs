//! Tests of the service on real systemds and with other programs, and other tests that need root or a tool besides
//! cargo and systemd.
//!
//! They are one test binary, so that many of them, which mostly wait, run at the same time. `make e2e PART=NAME` runs
//! one module. The runner starts the tests in the order of their names. Those of `copies` compile for minutes, so that name
//! is near the beginning: at the end, no other tests would be left to run meanwhile.

mod client_certificates;
mod clock;
mod collector;
mod copies;
mod crashes;
mod curl_and_openssl;
mod descriptors;
mod downloads;
mod event_streams;
mod half_heads;
mod instances;
mod java;
mod key_updates;
mod named_sockets;
mod on_systemd;
mod otlp;
mod packages;
mod peers;
mod pid1;
mod ports;
mod privileged;
mod proxies;
mod server_starter;
mod silent;
mod slow;
mod soft_reboots;
mod stalls;
mod third_party_clients;
mod upgrades;
mod websockets;

use testkit::binaries::root_package;
use testkit::certificate::Certificate;
use testkit::client::Target;
use testkit::container::{Container, Package, Systemd};

/// The package under test in the root workspace.
const NAME: &str = "app";
/// The root of the repository, where its Makefile is.
const FOLDER: &str = testkit::binaries::ROOT;

fn app_package() -> Package<'static> {
    // The tests of `systemctl service-log-level` and of traces need these features, which the template leaves out.
    root_package(NAME, "outlive/log-control,outlive/otlp")
}

fn app_binary() -> &'static str {
    app_package().binary
}

/// A container whose service serves TLS too, with this certificate.
fn boot_with_tls(systemd: Systemd, certificate: &Certificate) -> Container {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.enable_tls(certificate).expect("TLS is enabled");
    container.systemctl("start").expect("the start succeeds");
    container
}

/// The TLS port of the service, for a client that speaks TLS 1.2 only.
fn tls12_target(certificate: &Certificate, protocol: &str) -> Target {
    let client = certificate.client_over_tls12(None, &[protocol]).expect("the client configuration is valid");
    Target::Tls(([127, 0, 0, 1], 8443).into(), client)
}

/// The TLS port of the service, for a client that offers this ALPN protocol.
fn tls_target(certificate: &Certificate, protocol: &str) -> Target {
    let client = certificate.client(&[protocol]).expect("the client configuration is valid");
    Target::Tls(([127, 0, 0, 1], 8443).into(), client)
}
