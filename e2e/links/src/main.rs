//! A link shortener on PostgreSQL. `app.rs` has the configuration, the start and the routes; `outlive::run_with` does
//! everything else, from the command line to the handover of connections.

mod api;
mod app;
mod clicks;
mod ingest;
mod store;

use std::process::ExitCode;

fn main() -> ExitCode {
    outlive::run_with(app::start, app::execute)
}
