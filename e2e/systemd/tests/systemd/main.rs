//! Tests of the service on real systemds and with other programs, and other tests that need root or a tool besides
//! cargo and systemd.
//!
//! They are one test binary, so that many of them, which mostly wait, run at the same time. `make e2e PART=NAME` runs
//! one module.

mod clock;
mod curl_and_openssl;
mod descriptors;
mod half_heads;
mod instances;
mod java;
mod key_updates;
mod on_systemd;
mod packages;
mod peers;
mod pid1;
mod ports;
mod privileged;
mod server_starter;
mod silent;
mod slow;
mod stalls;
mod template;
mod third_party_clients;
mod upgrades;

use testkit::binaries::root_package;
use testkit::container::Package;

/// The package under test in the root workspace.
const NAME: &str = "app";
/// The root of the repository, where its Makefile is.
const FOLDER: &str = testkit::binaries::ROOT;

fn app_package() -> Package<'static> {
    // The tests of `systemctl service-log-level` need the feature, which the template leaves out.
    root_package(NAME, "outlive/log-control")
}

fn app_binary() -> &'static str {
    app_package().binary
}
