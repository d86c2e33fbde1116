//! Binaries of other packages. Cargo sets `CARGO_BIN_EXE_...` only for tests of the same package, so these are built
//! here.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

use crate::container::Package;
use crate::process::without_cargo;

/// The root of the repository, whose workspace has the service.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The package `name` of the root workspace, with its binary: the debug one, or under `cargo test --release` the release.
/// It is built with `features`, separated by commas, as in `outlive/log-control`.
pub fn root_package(name: &'static str, features: &str) -> Package<'static> {
    static BINARY: OnceLock<String> = OnceLock::new();
    // With the same features as `cargo test --workspace`: cargo unifies those of dev-dependencies only if it builds
    // something that needs them, such as the examples, and would otherwise compile most dependencies once more.
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let arguments = ["--workspace", "--bins", "--examples", "--profile", profile, "--features", features];
    let binary = BINARY.get_or_init(|| build(Path::new(ROOT), &arguments, name));
    Package { name, binary, folder: ROOT }
}

/// Runs `cargo build` in `folder` and returns the path of the executable `name`. It always runs, because otherwise a
/// test could use a binary that is older than its sources.
pub fn build(folder: &Path, arguments: &[&str], name: &str) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--message-format=json-render-diagnostics"]).args(arguments);
    without_cargo(command.current_dir(folder));
    let output = command.output().expect("cargo is installed");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {log}");
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = artifacts.find_map(|artifact| {
        let is_it = artifact["target"]["name"] == name && artifact["target"]["kind"][0] == "bin";
        artifact["executable"].as_str().filter(|_| is_it).map(str::to_owned)
    });
    executable.unwrap_or_else(|| panic!("{command:?} built no {name}"))
}
