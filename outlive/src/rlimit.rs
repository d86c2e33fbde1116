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
