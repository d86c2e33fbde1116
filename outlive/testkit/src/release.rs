//! Executables that replace the installed one, good and bad.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Result;
use tempfile::{NamedTempFile, TempPath};

use crate::container::Container;
use crate::process::copy_program;

/// An executable file that is removed when this is dropped. `Container::replace_binary` copies it, so the copy remains.
pub struct Release(TempPath);

impl Release {
    /// A copy of the installed binary.
    pub fn copy_of(container: &Container) -> Result<Self> {
        let file = NamedTempFile::new()?.into_temp_path();
        fs::copy(container.binary(), &file)?;
        Self::executable(file)
    }

    /// A bash script.
    pub fn script(lines: &str) -> Result<Self> {
        let file = NamedTempFile::new()?.into_temp_path();
        fs::write(&file, format!("#!/bin/bash\n{lines}\n"))?;
        Self::executable(file)
    }

    /// A release whose takeover command works, but whose successor runs the bash commands `instead` of serving. The
    /// takeover command is run from a copy of the binary that is installed at the first call: `/usr/local/lib/good`.
    pub fn bad_successor(container: &Container, instead: &str) -> Result<Self> {
        let good = container.path("usr/local/lib/good");
        if !good.exists() {
            copy_program(&container.binary(), &good)?;
        }
        // The good binary would start itself as the intermediate process and the successor, so the script plays both.
        // In the background, bash replaces standard input, which is the takeover channel, unless it is redirected.
        Self::script(&format!(
            "case $TAKEOVER_ROLE in\n\
             middle) TAKEOVER_ROLE=successor \"$0\" <&0 & echo pid $!;;\n\
             successor) {instead};;\n\
             *) exec -a \"$0\" /usr/local/lib/good \"$@\";;\n\
             esac"
        ))
    }

    fn executable(file: TempPath) -> Result<Self> {
        fs::set_permissions(&file, PermissionsExt::from_mode(0o755))?;
        Ok(Self(file))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}
