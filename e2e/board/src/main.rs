//! The entry point. The application is in `app.rs`; the library does everything else: `cargo doc -p outlive --open`.

mod app;
mod store;

use std::process::ExitCode;

fn main() -> ExitCode {
    outlive::run_with(app::start, app::execute)
}
