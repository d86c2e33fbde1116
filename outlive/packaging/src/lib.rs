//! Generates the files of a package from the command line of the service (`documents`): man page, shell completions,
//! and the environment file `/etc/default/NAME`. The folders `deb/` and `rpm/` have the maintainer scripts, which
//! reload the service at an upgrade.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Arg, Command};
use clap_complete::{Shell, generate_to};

/// The shells and the directories of their completions in Debian. Cargo.toml of the service maps them for rpm.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "usr/share/bash-completion/completions"),
    (Shell::Zsh, "usr/share/zsh/vendor-completions"),
    (Shell::Fish, "usr/share/fish/vendor_completions.d"),
];
const WIDTH: usize = 100;

/// Writes all files below `root`, at the paths where a package installs them.
///
/// # Errors
///
/// If a folder or a file cannot be written.
pub fn documents(command: &Command, root: &Path) -> Result<()> {
    let name = command.get_name().to_owned();
    for (shell, folder) in COMPLETIONS {
        let folder = made(&root.join(folder))?;
        let file = generate_to(shell, &mut command.clone(), &name, &folder)?;
        if matches!(shell, Shell::Bash) {
            // bash finds the completions of a command in a file with exactly its name.
            fs::rename(file, folder.join(&name))?;
        }
    }
    clap_mangen::generate_to(command.clone(), made(&root.join("usr/share/man/man1"))?)?;
    fs::write(made(&root.join("etc/default"))?.join(&name), variables(command))?;
    Ok(())
}

/// Creates `folder`, and returns it.
fn made(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    Ok(folder.to_owned())
}

/// The content for `EnvironmentFile=` (systemd.exec(5)): each variable in a comment, with its default value.
fn variables(command: &Command) -> String {
    let name = command.get_name();
    let mut text = format!(
        "# Configuration of {name}. Uncomment a line to change it, then run `systemctl reload {name}`. If {name} cannot\n\
         # start with the new values, the reload fails and the running process keeps the old ones.\n"
    );
    for arg in command.get_arguments() {
        let Some(variable) = arg.get_env() else { continue };
        let words = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
        let _ = write!(text, "\n{}", comment(&words));
        let _ = writeln!(text, "#{}={}", variable.display(), value(arg));
    }
    text
}

fn value(arg: &Arg) -> String {
    let values: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    values.join(",")
}

/// Wraps the text into comment lines of at most `WIDTH` characters.
fn comment(words: &str) -> String {
    let mut text = String::new();
    let mut line = String::from("#");
    for word in words.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            text += &line;
            text += "\n";
            line = String::from("#");
        }
        line += " ";
        line += word;
    }
    text + &line + "\n"
}
