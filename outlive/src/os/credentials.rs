//! The credentials of the unit (`LoadCredential=`, systemd.exec(5)).
//!
//! systemd mounts them for the process of `ExecStart=`, but not for that of `ExecReload=`. A successor therefore
//! receives their directory from its predecessor, as an open file descriptor.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use rustix::fs::{Mode, OFlags, open, openat};

/// The directory of the credentials, if the unit has any.
#[derive(Clone, Default)]
pub struct Credentials(Option<Arc<OwnedFd>>);

impl Credentials {
    /// The credentials in `$CREDENTIALS_DIRECTORY`.
    pub fn of_environment() -> anyhow::Result<Self> {
        let Some(folder) = std::env::var_os("CREDENTIALS_DIRECTORY") else { return Ok(Self(None)) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open(Path::new(&folder), flags, Mode::empty())
            .with_context(|| format!("could not open CREDENTIALS_DIRECTORY={}", folder.display()))?;
        Ok(Self(Some(Arc::new(fd))))
    }

    /// The credentials in `folder`, which came from the predecessor.
    pub fn of_predecessor(folder: OwnedFd) -> Self {
        Self(Some(Arc::new(folder)))
    }

    /// The directory, for a successor.
    pub fn folder(&self) -> Option<impl AsFd> {
        self.0.as_ref()
    }

    /// Opens the credential `name`. `None` if the unit has no credentials.
    pub fn open(&self, name: &str) -> Option<anyhow::Result<File>> {
        let folder = self.0.as_ref()?;
        let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Some(file.map(File::from).with_context(|| format!("could not read the credential {name:?}")))
    }
}
