//! The service on real systemds, with other programs, and what takes root or a tool that cargo and systemd do not bring.
//!
//! One test binary, so that tests that wait for something wait at the same time. `make e2e PART=NAME` runs one module.

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

/// The package in the root workspace.
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
