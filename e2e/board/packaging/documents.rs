//! Writes the man page, completions and environment file of the package. `make deb` and `make rpm` run it.

#[path = "../src/app.rs"]
mod app;
#[path = "../src/store.rs"]
mod store;

fn main() -> anyhow::Result<()> {
    // Only `Config` and `Command` are needed here. These uses avoid the warning that the functions are never used.
    let _ = (app::start, app::execute);
    let root = std::env::args_os()
        .nth(1)
        .ok_or(anyhow::anyhow!("missing argument: the folder of the package's files"))?;
    packaging::documents(&outlive::command_with::<app::Config, app::Command>(), root.as_ref())
}
