//! Writes the man page, completions and environment file of the package. `make deb` and `make rpm` run it.

#[path = "../src/app.rs"]
mod app;

fn main() -> anyhow::Result<()> {
    // Only `Config` is needed here. This use of `start` avoids the warning that it is never used.
    let _ = app::start;
    let root = std::env::args_os()
        .nth(1)
        .ok_or(anyhow::anyhow!("missing argument: the folder of the package's files"))?;
    packaging::documents(&outlive::command::<app::Config>(), root.as_ref())
}
