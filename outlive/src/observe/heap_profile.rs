//! A profile of the memory of this process: the stacks that have allocated what is in use, as jemalloc has sampled them since
//! the process started (`os/sys.rs` has its settings).

use anyhow::Context;
use jemalloc_pprof::PROF_CTL;

/// The profile in the format of pprof, compressed with gzip: the bytes that each stack has allocated and that are in use. It
/// blocks while it looks up the names of functions.
///
/// Fails if `_RJEM_MALLOC_CONF` has switched the sampling off, or if the temporary directory is not writable, through which
/// jemalloc passes the samples.
pub fn take() -> anyhow::Result<Vec<u8>> {
    let control =
        PROF_CTL.as_ref().context("_RJEM_MALLOC_CONF has switched the sampling off (prof:false)")?;
    // Two dumps at once would wait for each other in jemalloc too.
    let mut control = control.blocking_lock();
    control
        .dump_pprof()
        .context("could not write the samples; it needs a writable temporary directory (TMPDIR)")
}
