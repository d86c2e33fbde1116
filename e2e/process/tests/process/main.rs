//! The debug binary without systemd and without root: options and limits, listeners, restarts and reloads.
//!
//! One test binary, so that tests that wait for something wait at the same time.

mod abuse;
mod cli_and_limits;
mod idle_connections;
mod listeners;
mod reload;
mod restart;

/// The package in the root workspace.
const NAME: &str = "app";

fn app_binary() -> &'static str {
    testkit::binaries::root_package(NAME).binary
}
