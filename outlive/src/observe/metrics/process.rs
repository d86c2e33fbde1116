//! The metrics that Prometheus's client libraries report of each process: processor time, memory, file descriptors.
//!
//! Read here instead of by the feature `process` of the prometheus crate, because that compiles procfs and a second
//! rustix, and finds no start time where the unit hides `/proc/stat` (`ProcSubset=pid`).

use std::io;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, SystemTime};

use prometheus::{Counter, IntGauge};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::os::lock::lock;

static CPU_SECONDS: LazyLock<Counter> =
    metric!(Counter, "process_cpu_seconds_total", "Total user and system CPU time spent in seconds.");
static OPEN_FDS: LazyLock<IntGauge> =
    metric!(IntGauge, "process_open_fds", "Number of open file descriptors.");
static MAX_FDS: LazyLock<IntGauge> =
    metric!(IntGauge, "process_max_fds", "Maximum number of open file descriptors.");
static VIRTUAL_MEMORY: LazyLock<IntGauge> =
    metric!(IntGauge, "process_virtual_memory_bytes", "Virtual memory size in bytes.");
static RESIDENT_MEMORY: LazyLock<IntGauge> =
    metric!(IntGauge, "process_resident_memory_bytes", "Resident memory size in bytes.");
static THREADS: LazyLock<IntGauge> =
    metric!(IntGauge, "process_threads", "Number of OS threads in the process.");
static START_TIME: LazyLock<IntGauge> =
    metric!(IntGauge, "process_start_time_seconds", "Start time of the process since unix epoch in seconds.");

pub fn register() {
    LazyLock::force(&CPU_SECONDS);
    for gauge in [&OPEN_FDS, &MAX_FDS, &VIRTUAL_MEMORY, &RESIDENT_MEMORY, &THREADS, &START_TIME] {
        LazyLock::force(gauge);
    }
}

/// Reads all of them. A value that cannot be read keeps the one it had.
pub fn update() {
    // Otherwise two scrapes at the same time would both add what the counter lacks.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = lock(&ALONE);
    if let Ok(stat) = Stat::read() {
        // Computed once, because it would follow each change of the wall clock.
        if START_TIME.get() == 0 {
            START_TIME.set(number(start_time(&stat)));
        }
        CPU_SECONDS.inc_by((seconds(stat.user + stat.system) - CPU_SECONDS.get()).max(0.0));
        VIRTUAL_MEMORY.set(number(stat.virtual_bytes));
        RESIDENT_MEMORY.set(number(stat.resident_pages.saturating_mul(page_size() as u64)));
        THREADS.set(number(stat.threads));
    }
    if let Ok(open) = open_fds() {
        OPEN_FDS.set(number(open));
    }
    // Without a limit the metric is 0, as in the prometheus crate.
    MAX_FDS.set(getrlimit(Resource::Nofile).current.map_or(0, number));
}

/// What is read from `/proc/self/stat`; proc(5) numbers its fields from 1.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// Fields 14 and 15, in clock ticks.
    user: u64,
    system: u64,
    /// Field 20.
    threads: u64,
    /// Field 22, in clock ticks since the system booted.
    started: u64,
    /// Field 23.
    virtual_bytes: u64,
    /// Field 24.
    resident_pages: u64,
}

impl Stat {
    fn read() -> io::Result<Self> {
        // As bytes, because the name of a process need not be UTF-8.
        let text = std::fs::read("/proc/self/stat")?;
        Self::parse(&String::from_utf8_lossy(&text)).ok_or(io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        // Field 2 is the name of the process in parentheses, which may itself contain spaces and parentheses.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<_> = rest.split_ascii_whitespace().collect();
        let field = |index: usize| fields.get(index - 3)?.parse().ok();
        Some(Self {
            user: field(14)?,
            system: field(15)?,
            threads: field(20)?,
            started: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "ticks of 10 ms are exact for a million years")]
fn seconds(ticks: u64) -> f64 {
    ticks as f64 / clock_ticks_per_second() as f64
}

/// Seconds since the Unix epoch. Computed from the time since the system booted, because `/proc/stat`, which has the
/// time of the boot, is hidden in the sandbox.
fn start_time(stat: &Stat) -> u64 {
    let booted = clock_gettime(ClockId::Boottime);
    let since_boot = Duration::try_from(booted).unwrap_or_default();
    let age = since_boot.saturating_sub(Duration::from_secs_f64(seconds(stat.started)));
    let started = SystemTime::now() - age;
    started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Without the one that this takes to look.
fn open_fds() -> io::Result<u64> {
    let entries = std::fs::read_dir("/proc/self/fd")?.count();
    Ok(u64::try_from(entries).unwrap_or(u64::MAX).saturating_sub(1))
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// The first number behind `name` in a file of `/proc/self`.
    fn shown(file: &str, name: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/self/{file}")).expect("readable");
        let rest = text.lines().find_map(|line| line.strip_prefix(name)).expect("the line");
        rest.split_whitespace().next().expect("a value").parse().expect("a number")
    }

    fn near(one: u64, other: u64, tolerance: u64) -> bool {
        one.abs_diff(other) <= tolerance
    }

    #[test]
    fn memory_threads_and_start_agree_with_what_the_kernel_shows_elsewhere() {
        let stat = Stat::read().expect("readable");
        // Other tests allocate and start threads at the same time.
        assert!(near(stat.virtual_bytes / 1024, shown("status", "VmSize:"), 1 << 20), "{stat:?}");
        let resident = stat.resident_pages * page_size() as u64;
        assert!(near(resident / 1024, shown("status", "VmRSS:"), 64 << 10), "{stat:?}");
        assert!(near(stat.threads, shown("status", "Threads:"), 64), "{stat:?}");
        let booted = shown("../stat", "btime");
        let started = booted + stat.started / clock_ticks_per_second();
        assert!(near(start_time(&stat), started, 2), "{} {started}", start_time(&stat));
    }

    #[test]
    fn processor_time_grows_with_what_the_process_computes() {
        update();
        let before = CPU_SECONDS.get();
        while CPU_SECONDS.get() < before + 0.05 {
            update();
        }
    }

    #[test]
    fn descriptors_are_those_of_the_kernel() {
        update();
        assert_eq!(u64::try_from(MAX_FDS.get()), Ok(shown("limits", "Max open files")));
        // Standard input, output and error at least.
        assert!(OPEN_FDS.get() >= 3, "{}", OPEN_FDS.get());
    }

    proptest! {
        #[test]
        fn any_process_name_leaves_the_numbers_readable(
            name in ".{0,20}|[() 0-9]{0,20}",
            numbers in prop::collection::vec(any::<u64>(), 49),
        ) {
            let rest: Vec<_> = numbers.iter().map(u64::to_string).collect();
            let stat = Stat::parse(&format!("7 ({name}) S {}\n", rest.join(" "))).expect("a stat");
            // The first number is field 4.
            let field = |index: usize| numbers[index - 4];
            prop_assert_eq!(stat, Stat {
                user: field(14),
                system: field(15),
                threads: field(20),
                started: field(22),
                virtual_bytes: field(23),
                resident_pages: field(24),
            });
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in any::<String>(), fields in "[() 0-9]{0,200}") {
            let _ = Stat::parse(&text);
            let _ = Stat::parse(&fields);
        }
    }
}
