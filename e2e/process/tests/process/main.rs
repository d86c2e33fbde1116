//! Tests of the debug binary without systemd and without root: options and limits, the configuration file, listeners,
//! restarts and reloads.
//!
//! They form one test binary, because cargo runs test binaries one after the other. Most of these tests wait for
//! timeouts, and only tests of the same binary can wait at the same time.

mod abuse;
mod certificates;
mod cli_and_limits;
mod client_certificates;
mod configuration;
mod goaway;
mod idle_connections;
mod linger;
mod listeners;
mod proxies;
mod reload;
mod renegotiation;
mod restart;

/// The package of the binary in the root workspace.
const NAME: &str = "app";

fn app_binary() -> &'static str {
    testkit::binaries::root_package(NAME, "").binary
}
