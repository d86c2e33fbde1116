//! A soak test: restarts, reloads and faults in random order, under clients that never retry, on each systemd.
//!
//! `faults.rs` has the table of events, and which losses each event may cause. `clients.rs` has the clients, which
//! report to `record.rs`. The soak stops at the first loss that the table does not allow. `make soak TIME=10m` prints a
//! table of the losses and waits for each event, and writes it to `target/soak/` with a picture (`report.rs`).

mod clients;
mod faults;
mod random;
mod record;
mod report;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use testkit::binaries::ROOT;
use testkit::certificate::Certificate;
use testkit::client::Target;
use testkit::container::{Container, Package, Systemd};

use clients::{Clients, Https};
use faults::{Cost, EVENTS, Event, Scene, TAKEOVER_TIMEOUT};
use random::Random;
use record::{Complaint, Record, Seen};
use report::Line;

/// The package of the service in the root workspace.
const NAME: &str = "app";
/// How many sockets the PID 1 of systemd 262 leaks at each `daemon-reexec`, with any service.
const LEAKED_BY_REEXEC: usize = 4;
/// Time limit in which each client must receive responses after an event.
const ANSWERED_WITHIN: Duration = Duration::from_secs(45);

/// Restarts, reloads and faults in random order under load.
#[derive(Parser)]
struct Flags {
    /// Duration on each systemd.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Seed of the order of events; the same seed repeats the order. [default: the current time]
    #[arg(long)]
    seed: Option<u64>,
}

#[expect(clippy::print_stdout, reason = "the report goes to standard output")]
fn main() -> Result<()> {
    let flags = Flags::parse();
    ensure!(
        rustix::process::geteuid().is_root(),
        "root is required, because this boots systemd in containers"
    );
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = flags.seed.unwrap_or(now);
    println!("seed {seed}");
    let folder = Path::new(ROOT).join("target/soak");
    fs::create_dir_all(&folder)?;
    let mut reports = Vec::new();
    for (name, systemd) in [
        ("systemd 252", Systemd::V252),
        ("systemd 257", Systemd::V257),
        ("systemd of Debian unstable", Systemd::Unstable),
    ] {
        let lines = soak(systemd, name, seed, flags.time).with_context(|| format!("{name}, seed {seed}"))?;
        let report = report::table(name, seed, flags.time, &lines);
        println!("{report}");
        report::draw(name, &lines, &folder.join(format!("{}.svg", name.replace(' ', "-"))))?;
        reports.push(report);
    }
    fs::write(folder.join("report.md"), reports.join("\n"))?;
    Ok(())
}

/// The release build, because that is what is deployed.
fn binary() -> PathBuf {
    Path::new(ROOT).join("target/production").join(NAME)
}

fn soak(systemd: Systemd, name: &str, seed: u64, time: Duration) -> Result<Vec<Line>> {
    let binary = binary();
    let certificate = Certificate::new()?;
    let package =
        Package { name: NAME, binary: binary.to_str().context("the path is not valid UTF-8")?, folder: ROOT };
    let container = Container::boot(systemd, package)?;
    container.enable_tls(&certificate)?;
    let variable = format!("{}_TAKEOVER_TIMEOUT", package.name.to_uppercase().replace('-', "_"));
    container.write(&format!("etc/default/{}", package.name), &format!("{variable}={TAKEOVER_TIMEOUT}\n"))?;
    container.start_socket("admin")?;
    container.systemctl("start")?;
    let scene = Scene::new(container, package.name)?;

    let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let https = Https {
        http1: Target::Tls(at(8443), certificate.client(&["http/1.1"])?),
        http1_over_tls12: Target::Tls(at(8443), certificate.client_over_tls12(None, &["http/1.1"])?),
        http2: Target::Tls(at(8443), certificate.client(&["h2"])?),
        http2_over_tls12: Target::Tls(at(8443), certificate.client_over_tls12(None, &["h2"])?),
    };
    let clients = Clients::new(at(8080), &https);
    let record = Arc::new(Record::new(clients.count()));
    let (enter, shared) = (scene.container.enter(), record.clone());
    let load = std::thread::spawn(move || {
        enter();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("the runtime starts").block_on(clients.run(shared));
    });
    let leaked = if matches!(systemd, Systemd::Unstable) { LEAKED_BY_REEXEC } else { 0 };
    let result = events(&scene, &record, name, seed, time, leaked);
    record.stop();
    load.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
    result
}

/// Resources that a soak must not leak: fds of the main process and of PID 1, entries in the file descriptor store,
/// processes of the unit, failed units.
#[derive(Debug, PartialEq, Eq)]
struct Resources {
    fds: usize,
    fds_of_pid_1: usize,
    stored: String,
    processes: usize,
    failed: String,
}

impl Resources {
    /// Restarts the service, and returns its resources and the resident memory of the new process in kB.
    fn measure(scene: &Scene) -> Result<(Self, u64)> {
        let Scene { container, .. } = scene;
        container.systemctl("restart")?;
        // The channel of the backup; see `outlive/src/handover/backup.rs`.
        container.wait_for_property("NFileDescriptorStore", |count| count == "1");
        // The old process may still be exiting.
        let deadline = Instant::now() + Duration::from_secs(10);
        while scene.processes()?.len() > 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let main = scene.main()?.as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{main}/status"))?;
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS in /proc/PID/status")?;
        let resident = resident.trim().trim_end_matches(" kB").parse()?;
        let failed = container.run(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"])?;
        let resources = Self {
            fds: fs::read_dir(format!("/proc/{main}/fd"))?.count(),
            fds_of_pid_1: fs::read_dir(container.path("proc/1/fd"))?.count(),
            stored: container.show("NFileDescriptorStore")?,
            processes: scene.processes()?.len(),
            failed,
        };
        Ok((resources, resident))
    }

    /// Measures until the resources are as `before`, at most ten times, because clients connect and disconnect
    /// meanwhile and PID 1 keeps some fds open for a moment. Returns the resident memory in kB.
    /// `leaked`: how many more descriptors PID 1 may have.
    fn wait_until_as(scene: &Scene, before: &Self, resident_before: u64, leaked: usize) -> Result<u64> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (now, resident) = Self::measure(scene)?;
            // Six more fds are allowed, because the clients with one connection per request have some open at any time.
            let is_back = now.fds <= before.fds + 6
                && now.fds_of_pid_1 <= before.fds_of_pid_1 + leaked
                && (&now.stored, now.processes, &now.failed)
                    == (&before.stored, before.processes, &before.failed);
            if is_back {
                ensure!(resident < resident_before * 3 / 2, "{resident} kB, {resident_before} before");
                return Ok(resident);
            }
            ensure!(tries < 10, "at the end {now:?}, at the beginning {before:?}");
        }
    }
}

/// `leaked`: how many descriptors PID 1 may leak each time that it executes itself again.
fn events(
    scene: &Scene,
    record: &Record,
    name: &str,
    seed: u64,
    time: Duration,
    leaked: usize,
) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = EVENTS.iter().map(Line::new).collect();
    let mut random = Random::new(seed);
    // Not measured: the clients connect, and the first handover allocates memory that later ones reuse.
    scene.container.systemctl("restart")?;
    allow(None, &record.end_event(ANSWERED_WITHIN)?)?;
    let (before, resident) = Resources::measure(scene)?;
    allow(None, &record.end_event(ANSWERED_WITHIN)?)?;

    let progress = ProgressBar::new(time.as_secs());
    progress.set_style(ProgressStyle::with_template("{prefix} {elapsed}/{eta} {wide_bar} {msg}")?);
    progress.set_prefix(name.to_owned());
    let begun = Instant::now();
    let (mut done, mut answered) = (0_u64, 0);
    while begun.elapsed() < time {
        let drawn = draw(&mut random);
        progress.set_position(begun.elapsed().as_secs());
        progress.set_message(format!("{done} events, {answered} answered; {}", EVENTS[drawn].name));
        let event = &EVENTS[drawn];
        let at = Instant::now();
        event.run(scene, &mut random).with_context(|| format!("event {done}: {}", event.name))?;
        let cost =
            record.end_event(ANSWERED_WITHIN).with_context(|| format!("event {done}: {}", event.name))?;
        allow(Some(event), &cost).with_context(|| format!("event {done}"))?;
        (done, answered) = (done + 1, answered + cost.answered);
        lines[drawn].add(&cost, at.elapsed());
    }
    progress.finish_and_clear();
    let after =
        Resources::wait_until_as(scene, &before, resident, leaked * scene.reexecs.load(Ordering::Relaxed))?;
    allow(None, &record.end_event(ANSWERED_WITHIN)?)?;
    eprintln!("{name}: at the end as at the beginning: {before:?}; {resident} kB resident, then {after} kB");
    Ok(lines)
}

/// The index of a random event. The probability of each is proportional to its weight.
fn draw(random: &mut Random) -> usize {
    let all: u32 = EVENTS.iter().map(|event| event.weight).sum();
    let mut left = u32::try_from(random.below(all as usize)).unwrap_or_default();
    for (number, event) in EVENTS.iter().enumerate() {
        if left < event.weight {
            return number;
        }
        left -= event.weight;
    }
    unreachable!("the number is below the sum of the weights")
}

/// Returns an error if the clients saw a loss that `event` must not cause. Without an event no loss is allowed.
fn allow(event: Option<&Event>, seen: &Seen) -> Result<()> {
    let is_allowed = |(_, _, what): &(Complaint, &str, String)| match event.map(|event| event.cost) {
        Some(Cost::CrashedProcess) => !what.contains("refused") && !what.contains("no answer within"),
        _ => false,
    };
    let beyond: Vec<_> = seen.complaints.iter().filter(|(complaint, _)| !is_allowed(complaint)).collect();
    if beyond.is_empty() {
        return Ok(());
    }
    bail!("{}: {beyond:?}", event.map_or("nothing was done", |event| event.name))
}
