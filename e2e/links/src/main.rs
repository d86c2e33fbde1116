//! A link shortener on PostgreSQL. `app.rs` has the configuration, the start and the routes; `outlive::run` does
//! everything else, from the command line to the handover of connections.

mod app;
mod clicks;
mod store;

use std::process::ExitCode;

fn main() -> ExitCode {
    outlive::run(app::start)
}
