//! The proof of the promise: one binary, so that tests which wait for something wait beside each other.

mod attacks;
mod clients;
mod clock;
mod containers;
mod contract;
mod copies;
mod descriptors;
mod half_heads;
mod handover;
mod instances;
mod java;
mod key_updates;
mod listeners;
mod on_systemd;
mod packages;
mod peers;
mod ports;
mod rest;
mod server_starter;
mod silent;
mod slow;
mod stalls;
mod takeover;
mod upgrades;

use harness::container::Package;
use harness::this_package;

/// What is proved.
const PACKAGE: Package = this_package!();
const NAME: &str = PACKAGE.name;
const BINARY: &str = PACKAGE.binary;
/// That of the Makefile.
const FOLDER: &str = PACKAGE.folder;
