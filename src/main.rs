//! The service begins in `app.rs`; all the rest of its life is the library's: `cargo doc -p outlive --open`.

mod app;

use std::process::ExitCode;

fn main() -> ExitCode {
    outlive::run(app::start)
}
