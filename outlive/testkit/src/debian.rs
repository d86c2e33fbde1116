//! Debian packages, and modified copies of them as later releases.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The package `name` that `make deb` or `make rpm` built in the repository `folder`; `kind` is `deb` or `rpm`.
pub fn built_package(folder: &Path, name: &str, kind: &str) -> Result<PathBuf> {
    let is_it = |file: &PathBuf| {
        let file = file.file_name().unwrap_or_default().to_string_lossy();
        file.strip_prefix(name).is_some_and(|rest| rest.starts_with(['_', '-']))
            && file.ends_with(&format!(".{kind}"))
    };
    let packages = fs::read_dir(folder.join("target/packages"))?;
    packages
        .flatten()
        .map(|entry| entry.path())
        .find(is_it)
        .with_context(|| format!("no package in target/packages: make {kind}"))
}

/// Copies the package `first` to `to` with another version, after `change` has modified its unpacked files.
pub fn later_release(
    first: &Path,
    to: &Path,
    version: &str,
    change: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let root = tempfile::tempdir()?;
    run(Command::new("dpkg-deb").arg("--raw-extract").arg(first).arg(root.path()))?;
    change(root.path())?;
    let control = root.path().join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let versioned = |line: &str| {
        if line.starts_with("Version: ") { format!("Version: {version}\n") } else { format!("{line}\n") }
    };
    fs::write(&control, text.lines().map(versioned).collect::<String>())?;
    let mut build = Command::new("dpkg-deb");
    run(build.args(["-Znone", "--root-owner-group", "--build"]).arg(root.path()).arg(to))
}

/// Appends to a file. A binary still does the same, because the loader ignores bytes after the end of the ELF sections,
/// but it is a different file, so an upgrade can be told from no upgrade.
pub fn append(file: &Path, text: &str) -> Result<()> {
    let mut bytes = fs::read(file).with_context(|| format!("{}", file.display()))?;
    bytes.extend_from_slice(text.as_bytes());
    Ok(fs::write(file, bytes)?)
}

/// Runs a command; its error contains standard output and standard error.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let text = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    ensure!(output.status.success(), "{command:?}: {text}");
    Ok(())
}
