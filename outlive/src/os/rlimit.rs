//! The limit of open files (`LimitNOFILE=`, getrlimit(2)): each connection needs a file descriptor.

use std::io;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit, setrlimit};

/// About the number of files that the process has open besides connections.
const OTHERS: u64 = 64;

/// Raises the soft limit of open files to the hard limit, and makes the kernel's descriptor table of this process large
/// enough for `connections`.
///
/// Must be called before any thread exists. A table that threads share grows by doubling, and each time the kernel
/// waits for all CPUs. The adoption of thousands of connections from a predecessor would take 100 ms longer.
pub fn make_room(connections: u32) {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // An error does not prevent the start. If descriptors run out later, accepting waits and logs it.
    let _ = setrlimit(Resource::Nofile, limit);
    let wanted = u64::from(connections) + OTHERS;
    let highest = limit.current.map_or(wanted, |limit| wanted.min(limit)).saturating_sub(1);
    let highest = i32::try_from(highest).unwrap_or(i32::MAX);
    // Duplicates some open file to the highest number. The table does not shrink when the duplicate is closed.
    let _ = fcntl_dupfd_cloexec(io::stderr(), highest);
}

/// With more free descriptors than this, an estimate of their number is accurate enough. Counting is expensive: it
/// takes a system call for about a hundred open descriptors.
const COUNTED_BELOW: usize = 1024;

/// An estimate of the number of file descriptors that this process may still open. Near the limit it is counted.
pub struct FdRoom {
    free: usize,
    count: fn() -> usize,
}

impl Default for FdRoom {
    fn default() -> Self {
        Self { free: 0, count: free_descriptors }
    }
}

impl FdRoom {
    /// An estimate that calls `count` instead of counting the descriptors of this process.
    #[cfg(test)]
    pub fn counted_by(count: fn() -> usize) -> Self {
        Self { free: 0, count }
    }

    /// Reserves `count` descriptors if `reserve` more remain free; returns whether they do.
    pub fn take(&mut self, count: usize, reserve: usize) -> bool {
        if self.free < count + reserve + COUNTED_BELOW {
            self.free = (self.count)();
        }
        let fits = self.free >= count + reserve;
        if fits {
            self.free -= count;
        }
        fits
    }

    /// Whether `count` descriptors are free. It does not reserve them.
    pub fn fits(&mut self, count: usize) -> bool {
        self.take(0, count)
    }
}

/// The soft limit of open files.
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Whether `count` descriptors would be free if this process had no connections.
pub fn could_fit(count: usize) -> bool {
    u64::try_from(count).is_ok_and(|count| count + OTHERS <= limit())
}

/// The limit of open files minus the number of open ones. Without a limit, or without `/proc`, it is taken as
/// unlimited.
fn free_descriptors() -> usize {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return usize::MAX };
    match std::fs::read_dir("/proc/self/fd") {
        Ok(open) => usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(open.count()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => usize::MAX,
        // Reading the directory needs a descriptor itself, so none is free.
        Err(_) => 0,
    }
}
