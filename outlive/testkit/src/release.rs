//! Executables to be put in the place of the installed one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Result;
use tempfile::{NamedTempFile, TempPath};

use crate::container::Container;

/// Gone when it is dropped; what was put in its place stays.
pub struct Release(TempPath);

impl Release {
    /// The one that is installed.
    pub fn copy_of(container: &Container) -> Result<Self> {
        let file = NamedTempFile::new()?.into_temp_path();
        fs::copy(container.binary(), &file)?;
        Self::executable(file)
    }

    pub fn script(lines: &str) -> Result<Self> {
        let file = NamedTempFile::new()?.into_temp_path();
        fs::write(&file, format!("#!/bin/bash\n{lines}\n"))?;
        Self::executable(file)
    }

    /// One whose takeover command works, and whose successor does `instead` of serving. What is installed when the
    /// first of them is made is a good one, and stays at hand as `/usr/local/lib/good`.
    pub fn bad_successor(container: &Container, instead: &str) -> Result<Self> {
        let good = container.path("usr/local/lib/good");
        if !good.exists() {
            fs::copy(container.binary(), &good)?;
        }
        // The good one would start itself again: the script speaks for its intermediate process. What bash starts in the
        // background has no standard input, unless it is told.
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
