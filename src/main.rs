//! The entry point. The application is in `app.rs`; the library does everything else: `cargo doc -p outlive --open`.

mod app;

use std::process::ExitCode;

fn main() -> ExitCode {
    outlive::run(app::start)
}
