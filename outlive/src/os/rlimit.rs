//! The limit of open files (`LimitNOFILE=`, getrlimit(2)): each connection needs a file descriptor.

use std::io;
use std::time::Duration;

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::time::Instant;

/// About the number of files that the process has open besides connections.
const OTHERS: u64 = 64;

/// The open descriptors of this process.
const OPEN: &str = "/proc/self/fd";

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

/// An estimate with more free descriptors than this is used for [`MAX_AGE`] without a new count, because other tasks open
/// fewer files within this time.
const COUNTED_BELOW: usize = 1024;
/// How long an estimate is valid after a fast count. After that, the descriptors are counted anew, because the process may
/// have accepted connections meanwhile.
const MAX_AGE: Duration = Duration::from_millis(20);
/// An estimate stays valid for at least this many times the duration of its count, because a count without `st_size` takes
/// several milliseconds with thousands of open files, and would delay the adoption of thousands of connections.
const MAX_AGE_IN_COUNTS: u32 = 20;

/// How many descriptors stay free when connections are accepted. A restart or reload needs about ten: for the handover channel,
/// the records of a frame, the messages to systemd, and the successor. Without them it would close all connections.
const SPARE: u64 = 16;
/// At a low limit only `limit / SPARE_SHARE` descriptors stay free, because `SPARE` would leave too few for connections.
const SPARE_SHARE: u64 = 16;

/// An estimate of the number of file descriptors that this process may still open. The descriptors are counted anew near the
/// limit, and when the estimate is no longer valid ([`MAX_AGE`], [`MAX_AGE_IN_COUNTS`]).
pub struct FdRoom {
    free: usize,
    /// Until when the estimate may be used. None: there is no estimate.
    valid_until: Option<Instant>,
    /// How long the last count took.
    took: Duration,
    count: fn() -> usize,
}

impl Default for FdRoom {
    fn default() -> Self {
        Self::counted_by(free_descriptors)
    }
}

impl FdRoom {
    /// An estimate that calls `count` to count the free descriptors.
    pub fn counted_by(count: fn() -> usize) -> Self {
        Self { free: 0, valid_until: None, took: Duration::ZERO, count }
    }

    /// Reserves `count` descriptors if `reserve` more remain free; returns whether they do.
    pub fn take(&mut self, count: usize, reserve: usize) -> bool {
        if self.is_old() || self.free < count + reserve + COUNTED_BELOW {
            self.recount();
        }
        let fits = self.free >= count + reserve;
        if fits {
            self.free -= count;
        }
        fits
    }

    /// Reserves a descriptor for a connection if enough remain free for a restart or reload; returns whether they do.
    pub fn take_for_connection(&mut self) -> bool {
        let spare = usize::try_from(SPARE.min(limit() / SPARE_SHARE)).unwrap_or(usize::MAX);
        let is_slow = self.took * MAX_AGE_IN_COUNTS > MAX_AGE;
        if is_slow && !self.is_old() && self.free > spare {
            // The descriptors are not counted for each connection near the limit, because that would delay all connections.
            // Too many are accepted only if other tasks open files at the same time.
            self.free -= 1;
            return true;
        }
        self.take(1, spare)
    }

    fn is_old(&self) -> bool {
        self.valid_until.is_none_or(|until| until < Instant::now())
    }

    fn recount(&mut self) {
        let begun = Instant::now();
        self.free = (self.count)();
        self.took = begun.elapsed();
        self.valid_until = Some(begun + MAX_AGE.max(self.took * MAX_AGE_IN_COUNTS));
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

/// The limit of open files minus the number of open ones. Without a limit, or if `/proc` cannot be read, it is taken as
/// unlimited.
fn free_descriptors() -> usize {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return usize::MAX };
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    match open_descriptors() {
        Ok(open) => limit.saturating_sub(open),
        // Listing the directory needs a descriptor itself, so none is free.
        Err(error) if [Errno::MFILE, Errno::NFILE].map(Some).contains(&Errno::from_io_error(&error)) => 0,
        Err(_) => usize::MAX,
    }
}

/// The number of open descriptors. Since Linux 6.2 it is the size of `/proc/self/fd` (proc_pid_fd(5)): reading the size takes a
/// few microseconds and needs no descriptor. On older kernels the size is 0, so the directory is listed, which takes one system
/// call per about a hundred descriptors.
fn open_descriptors() -> io::Result<usize> {
    match std::fs::metadata(OPEN)?.len() {
        0 => listed_descriptors(),
        count => Ok(usize::try_from(count).unwrap_or(usize::MAX)),
    }
}

fn listed_descriptors() -> io::Result<usize> {
    Ok(std::fs::read_dir(OPEN)?.count())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    static FREE: AtomicUsize = AtomicUsize::new(0);

    #[tokio::test(start_paused = true)]
    async fn old_estimate_is_counted_anew_also_far_from_the_limit() {
        let mut room = FdRoom::counted_by(|| FREE.load(Relaxed));
        FREE.store(10_000, Relaxed);
        assert!(room.take(100, 0), "there is room");
        // Other tasks have opened all of them.
        FREE.store(0, Relaxed);
        tokio::time::advance(MAX_AGE * 2).await;
        assert!(!room.take(100, 0), "the estimate is older than {MAX_AGE:?}");
        FREE.store(10_000, Relaxed);
        assert!(room.take(100, 0), "near the limit it is always counted");
        FREE.store(0, Relaxed);
        assert!(room.take(100, 0), "a recent estimate was counted again");
    }

    #[test]
    fn slow_count_is_not_repeated_for_each_accepted_connection() {
        const ACCEPTED: usize = 100;
        static COUNTS: AtomicUsize = AtomicUsize::new(0);
        let mut room = FdRoom::counted_by(|| {
            COUNTS.fetch_add(1, Relaxed);
            std::thread::sleep(MAX_AGE);
            COUNTED_BELOW
        });
        for _ in 0..ACCEPTED {
            assert!(room.take_for_connection(), "there is room");
        }
        let counts = COUNTS.load(Relaxed);
        assert!(counts < ACCEPTED / 2, "counted {counts} times");
    }

    /// Only a lower bound, because other tests open and close files meanwhile.
    #[test]
    fn open_descriptors_are_counted() {
        const FILES: usize = 200;
        let null = File::open("/dev/null").expect("the file opens");
        let _files: Vec<_> = (0..FILES).map(|_| null.try_clone().expect("it is duplicated")).collect();
        for count in [open_descriptors, listed_descriptors] {
            let open = count().expect("they are counted");
            assert!(open > FILES && u64::try_from(open).is_ok_and(|open| open <= limit()), "{open}");
        }
    }
}
