//! The unit's `LoadCredential=` files (`systemd.exec(5)`).
//!
//! systemd shows them to what `ExecStart=` starts, and not to what `ExecReload=` starts. So a successor
//! gets their folder from its predecessor, as an open file.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use rustix::fs::{Mode, OFlags, open, openat};

/// The folder of them, where there are any.
#[derive(Default)]
pub struct Credentials(Option<OwnedFd>);

impl Credentials {
    /// `$CREDENTIALS_DIRECTORY`.
    pub fn of_environment() -> anyhow::Result<Self> {
        let Some(folder) = std::env::var_os("CREDENTIALS_DIRECTORY") else { return Ok(Self(None)) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open(Path::new(&folder), flags, Mode::empty())
            .with_context(|| format!("could not open CREDENTIALS_DIRECTORY={}", folder.display()))?;
        Ok(Self(Some(fd)))
    }

    /// What `folder` gave a predecessor.
    pub fn of_predecessor(folder: OwnedFd) -> Self {
        Self(Some(folder))
    }

    /// For a successor.
    pub fn folder(&self) -> Option<impl AsFd> {
        self.0.as_ref()
    }

    /// The file `name`. None where the unit has no credentials.
    pub fn open(&self, name: &str) -> Option<anyhow::Result<File>> {
        let folder = self.0.as_ref()?;
        let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Some(file.map(File::from).with_context(|| format!("could not read the credential {name:?}")))
    }
}
