//! A profile of the processor time of this process ([`Sampling`]): the stacks of its threads, 99 times for each second that
//! they compute. They are sampled by a handler of SIGPROF, which setitimer(2) sends; nothing runs while nobody samples.
//!
//! The handler must not allocate and must take no lock, because it interrupts a thread at any instruction. Therefore the
//! `pprof` crate unwinds the stacks with framehop, and not with libgcc, which it uses by default and which can deadlock or
//! crash in a handler. Interrupted system calls continue (SA_RESTART), except poll(2), whose callers try again.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, anyhow};
use pprof::{ProfilerGuard, ProfilerGuardBuilder};
use pprof_util::{StackProfile, WeightedStack};
use tokio::sync::{Mutex, MutexGuard};

use crate::os::sys;

/// How often a thread is sampled for each second of processor time. Not 100, because much work is done in steps of 10 ms,
/// of which each sample would hit the same part.
const FREQUENCY: i32 = 99;

/// There is one timer and one handler in a process.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Samples until it is dropped.
pub struct Sampling {
    guard: ProfilerGuard<'static>,
    _alone: MutexGuard<'static, ()>,
}

impl Sampling {
    /// Begins to sample. None if this process is sampled already. It blocks for up to a second, to read the symbols and the
    /// unwind tables of the binary.
    ///
    /// Fails if the temporary directory is not writable, in which `pprof` keeps stacks for which it has no memory.
    pub fn begin() -> anyhow::Result<Option<Self>> {
        let Ok(alone) = ALONE.try_lock() else { return Ok(None) };
        load_unwind_tables()?;
        let guard = start(FREQUENCY)?;
        Ok(Some(Self { guard, _alone: alone }))
    }

    /// Ends the sampling. Returns the profile in the format of pprof, compressed with gzip: the nanoseconds that were spent in
    /// each stack. It blocks while it looks up the names of functions.
    pub fn finish(self) -> anyhow::Result<Vec<u8>> {
        let report = self.guard.report().build_unresolved().context("could not read the samples")?;
        // Before the symbols are looked up, which would be sampled too.
        drop(self);
        let mut profile = StackProfile::default();
        for (stack, count) in report.data {
            let addrs = addresses(stack.frames.iter().map(|frame| frame.ip));
            let count = u32::try_from(count).unwrap_or_default();
            let weight = Duration::from_secs(count.into()).as_secs_f64() * 1e9 / f64::from(FREQUENCY);
            profile.push_stack(WeightedStack { addrs, weight }, None);
        }
        let unit = ("cpu", "nanoseconds");
        Ok(profile.to_pprof(unit, unit, None))
    }
}

/// The addresses of a stack from its root, of which `pprof_util` expects the one behind each call. In `frames` the first one
/// is that of the interrupted instruction itself; a 0 is the end of the stack.
fn addresses(frames: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut addresses: Vec<_> = frames.take_while(|address| *address != 0).collect();
    if let Some(first) = addresses.first_mut() {
        *first = first.saturating_add(1);
    }
    addresses.reverse();
    addresses
}

fn start(frequency: i32) -> anyhow::Result<ProfilerGuard<'static>> {
    let guard = ProfilerGuardBuilder::default().frequency(frequency).build();
    guard.map_err(|error| anyhow!("{error}; it needs a writable temporary directory (TMPDIR)"))
}

/// Makes `pprof` read the unwind tables of the binary and its libraries. It does so at its first sample, in the handler,
/// where it could wait forever for a lock of the allocator. Here the handler runs at a point at which this thread has none.
fn load_unwind_tables() -> anyhow::Result<()> {
    static LOADED: OnceLock<()> = OnceLock::new();
    if LOADED.get().is_none() {
        // The first signal of the timer comes only when the threads have computed for a second.
        let guard = start(1)?;
        sys::raise_profiling_signal();
        drop(guard);
        let _ = LOADED.set(());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_begin_at_the_root_and_only_the_leaf_is_moved_behind_its_instruction() {
        assert_eq!(addresses([7, 20, 30].into_iter()), [30, 20, 8]);
        assert_eq!(addresses([7, 20, 0, 30].into_iter()), [20, 8]);
        assert_eq!(addresses([usize::MAX].into_iter()), [usize::MAX]);
        assert_eq!(addresses([0].into_iter()), [0_usize; 0]);
    }
}
