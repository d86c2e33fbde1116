//! What a package has beside the binary and the units: `make deb` and `make rpm` run this.

#[path = "../src/app.rs"]
mod app;

fn main() -> anyhow::Result<()> {
    // It is run by the binary; here its flags are looked at.
    let _ = app::start;
    let root = std::env::args_os()
        .nth(1)
        .ok_or(anyhow::anyhow!("missing argument: the folder of the package's files"))?;
    packaging::documents(&outlive::command::<app::Config>(), root.as_ref())
}
