//! Room for as many file descriptors as there may be connections.

use std::io;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit, setrlimit};

/// What the process has open besides connections, about.
const OTHERS: u64 = 64;

/// Raises the soft limit of open files to the hard one, and makes the kernel's table of them large enough
/// for `connections` at once.
///
/// To be called before any thread exists. A table that threads share grows by doublings, each of which
/// waits for all CPUs: the connections of a predecessor, thousands at once, would wait 100 ms for it.
pub fn make_room(connections: u32) {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // What cannot be had is no reason not to start: accepting waits where fds run out, and says so.
    let _ = setrlimit(Resource::Nofile, limit);
    let wanted = u64::from(connections) + OTHERS;
    let highest = limit.current.map_or(wanted, |limit| wanted.min(limit)).saturating_sub(1);
    let highest = i32::try_from(highest).unwrap_or(i32::MAX);
    // Any open fd will do; the table does not shrink when the copy is closed.
    let _ = fcntl_dupfd_cloexec(io::stderr(), highest);
}

/// With more free descriptors than this, an estimate of their number is good enough; counting takes a system call for
/// a hundred of them.
const COUNTED_BELOW: usize = 1024;

/// How many file descriptors this process may still open, as an estimate that is counted anew near the limit.
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
    /// Room as `count` gives it, whatever this process may open.
    #[cfg(test)]
    pub fn counted_by(count: fn() -> usize) -> Self {
        Self { free: 0, count }
    }

    /// Whether `count` more descriptors fit and leave `reserve` free; then they count as open.
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

    /// Whether `count` descriptors fit at the moment; they do not count as open.
    pub fn fits(&mut self, count: usize) -> bool {
        self.take(0, count)
    }
}

/// The limit of open files (`LimitNOFILE=`).
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Whether `count` descriptors fit into a process that has no connections.
pub fn could_fit(count: usize) -> bool {
    u64::try_from(count).is_ok_and(|count| count + OTHERS <= limit())
}

/// The limit of open files, without those that are open. Without a limit, or without `/proc`, nothing is known to be
/// missing.
fn free_descriptors() -> usize {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return usize::MAX };
    match std::fs::read_dir("/proc/self/fd") {
        Ok(open) => usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(open.count()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => usize::MAX,
        // To look takes a descriptor.
        Err(_) => 0,
    }
}
