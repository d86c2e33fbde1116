//! The service begins in `app.rs`; all the rest of its life is the library's.

mod app;
mod clicks;
mod store;

use std::process::ExitCode;

fn main() -> ExitCode {
    outlive::run(app::start)
}
