//! The files of Unix sockets that a process of this service bound. The process that serves on them removes them before
//! its listener closes, so that a process that binds the path next finds either a listener or nothing.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The socket files, and whether this process may remove them: not before it has taken over from the process that serves
/// on them, nor after it has passed them on.
#[derive(Clone)]
pub struct SocketFiles(Arc<AtomicBool>);

impl SocketFiles {
    /// Those of a process that has no predecessor.
    pub fn owned() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    /// Those of a predecessor that still serves on them.
    pub fn of_predecessor() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// From here on this process serves on them.
    pub fn claim(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// From here on the successor serves on them.
    pub fn release(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    fn is_owned(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// The file at `path`, to which a listener of this service is bound.
    pub fn add(&self, path: PathBuf) -> SocketFile {
        let identity = SocketFile::identity(&path);
        SocketFile { path, identity, files: self.clone(), is_removed: AtomicBool::new(false) }
    }
}

/// The file of one listener. Dropped, it is removed.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode number, because another process may have put another file in its place.
    identity: Option<(u64, u64)>,
    files: SocketFiles,
    is_removed: AtomicBool,
}

impl SocketFile {
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
    }

    /// Removes the file, once, if this process serves on it.
    pub fn remove(&self) {
        if !self.files.is_owned() || self.is_removed.swap(true, Ordering::SeqCst) {
            return;
        }
        // If the file is gone, or is another process's, nothing is left to do.
        if self.identity.is_some() && Self::identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}
