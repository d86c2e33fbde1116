//! The proof of the promise: one binary, so that tests which wait for something wait beside each other.

mod attacks;
mod clients;
mod clock;
mod containers;
mod contract;
mod copies;
mod handover;
mod instances;
mod listeners;
mod on_systemd;
mod packages;
mod rest;
mod server_starter;
mod takeover;
