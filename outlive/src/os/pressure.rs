//! Memory pressure: the kernel tells services that memory is short, before it has to kill processes.
//!
//! systemd 254 or later sets `MEMORY_PRESSURE_WATCH` and `MEMORY_PRESSURE_WRITE` for a service
//! (`MemoryPressureWatch=` of systemd.resource-control(5), <https://systemd.io/MEMORY_PRESSURE/>).

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustix::fs::OFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::os::sys;

/// A file that does not report any pressure, by which systemd says that it must not be watched.
const NOTHING: &str = "/dev/null";

/// Reports when memory is short.
pub struct MemoryPressure {
    file: AsyncFd<OwnedFd>,
    /// `PRIORITY` for a file of the kernel, `READABLE` for a FIFO.
    interest: Interest,
}

impl MemoryPressure {
    /// Watches what the environment names. None if it names nothing.
    pub fn of_environment() -> anyhow::Result<Option<Self>> {
        let Some(path) = std::env::var_os("MEMORY_PRESSURE_WATCH") else { return Ok(None) };
        if path.is_empty() || path == NOTHING {
            return Ok(None);
        }
        let request = std::env::var("MEMORY_PRESSURE_WRITE").unwrap_or_default();
        let watched = Self::watch(&path, &request);
        watched.map(Some).with_context(|| format!("could not watch MEMORY_PRESSURE_WATCH={}", path.display()))
    }

    /// `request`: what to write to the file first, in base64. For a file of the kernel, it is the threshold.
    fn watch(path: &OsStr, request: &str) -> anyhow::Result<Self> {
        let request = BASE64_STANDARD
            .decode(request)
            .with_context(|| format!("invalid MEMORY_PRESSURE_WRITE {request:?}: expected base64"))?;
        // Open for writing too, because otherwise a FIFO would be at its end whenever no other process has it open.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)?;
        let kind = file.metadata()?.file_type();
        let interest = if kind.is_file() {
            Interest::PRIORITY
        } else if kind.is_fifo() {
            Interest::READABLE
        } else {
            bail!("expected a file of the kernel or a FIFO");
        };
        file.write_all(&request)?;
        Ok(Self { file: sys::watch(file.into(), interest)?, interest })
    }

    /// Waits for the next report. The kernel sends at most one in each window of the threshold, by default 2 s.
    pub async fn reported(&mut self) -> io::Result<()> {
        self.file.ready_mut(self.interest).await?.clear_ready();
        if self.interest == Interest::READABLE {
            // The bytes have no meaning.
            while matches!(rustix::io::read(self.file.get_ref(), &mut [0; 64]), Ok(1..)) {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn request_that_is_not_base64_and_files_of_other_kinds_are_refused() {
        let error =
            MemoryPressure::watch("/proc/pressure/memory".as_ref(), "?").err().expect("it is refused");
        assert_eq!(error.to_string(), "invalid MEMORY_PRESSURE_WRITE \"?\": expected base64");
        let error = MemoryPressure::watch("/dev/zero".as_ref(), "").err().expect("it is refused");
        assert_eq!(error.to_string(), "expected a file of the kernel or a FIFO");
        assert!(MemoryPressure::watch("/missing".as_ref(), "").is_err());
    }
}
