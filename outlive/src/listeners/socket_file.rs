//! The files of Unix sockets that a process of this service bound. The process that serves on them removes them before
//! its listener closes, so that the next process that binds the path finds either a listener or no file.
//!
//! During a reload two processes have the same listeners. [`SocketFiles`] decides which of them may remove the files.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process may remove the socket files. It may not before it has taken over from its predecessor, nor
/// after its successor has taken over, because the other process serves on them then.
#[derive(Clone)]
pub struct SocketFiles(Arc<AtomicBool>);

impl SocketFiles {
    /// The socket files of a process that has no predecessor.
    pub fn owned() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    /// The socket files of a predecessor, which still serves on them.
    pub fn of_predecessor() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// Must be called when this process has taken over.
    pub fn claim(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Must be called when the successor has taken over.
    pub fn release(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    fn is_owned(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Adds the file at `path`, to which a listener of this service is bound.
    pub fn add(&self, path: PathBuf) -> SocketFile {
        let identity = SocketFile::identity(&path);
        SocketFile { path, identity, files: self.clone(), is_removed: AtomicBool::new(false) }
    }
}

/// The file of one listener. It is removed on drop.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode number. Another process may have put another file in its place, which must not be removed.
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

    /// Removes the file if this process serves on it. Further calls do nothing.
    pub fn remove(&self) {
        if !self.files.is_owned() || self.is_removed.swap(true, Ordering::SeqCst) {
            return;
        }
        // If the file is gone, or belongs to another process, nothing has to be removed.
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
