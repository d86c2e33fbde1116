//! Profiles of the processor time and of the memory, which the admin listeners have with the features `cpu-profile` and
//! `heap-profile`: in the sandbox of the unit, and over restarts and reloads. A test binary of its own, because the binary
//! of the service has other features than in the other tests.

use std::process::Command;
use std::time::{Duration, Instant};

use testkit::binaries::{ROOT, root_package};
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::on_each_systemd;

on_each_systemd! {
    cpu_profile_ends_when_the_process_drains_and_delays_no_restart_and_no_reload
    heap_profile_has_the_memory_of_each_process_over_a_restart_and_a_reload
    heap_profile_is_refused_with_the_reason_if_the_sampling_is_off
}

const NAME: &str = "app";
const FEATURES: &str = "outlive/cpu-profile,outlive/heap-profile,outlive/log-control,outlive/otlp";

/// A container whose service has an admin socket, and the variable for jemalloc.
fn boot(systemd: Systemd, allocator: &str) -> Container {
    let container = Container::boot(systemd, root_package(NAME, FEATURES)).expect("the container boots");
    let line = format!("[Service]\nEnvironment=_RJEM_MALLOC_CONF={allocator}\n");
    container.add_to_unit("service", "allocator", &line).expect("the file is written");
    container.start_socket("admin").expect("the socket unit starts");
    container.systemctl("start").expect("the start succeeds");
    container
}

async fn admin(container: &Container) -> Connection {
    let socket = Target::Unix(container.path(&format!("run/{NAME}-admin.sock")));
    Connection::open(&socket).await.expect("the admin listener accepts")
}

/// A profile, as Go's tool prints it.
fn printed(profile: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().expect("the file is created");
    std::fs::write(file.path(), profile).expect("the file is written");
    let mut pprof = Command::new(format!("{ROOT}/target/tools/bin/pprof"));
    let output = pprof.args(["-raw", "-symbolize=none"]).arg(file.path()).output().expect("the tool runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Asserts that a profile has samples of this type and names functions of the service.
fn assert_profile(profile: &[u8], sample_type: &str) {
    let text = printed(profile);
    let mut lines = text.lines().skip_while(|line| *line != "Samples:");
    assert_eq!(lines.nth(1), Some(sample_type), "{text}");
    let samples = lines.take_while(|line| *line != "Locations");
    let mut values = samples.filter_map(|line| line.split(':').next()?.trim().parse::<u64>().ok());
    assert!(values.any(|value| value > 0), "{text}");
    assert!(text.contains("outlive::"), "{text}");
}

fn cpu_profile_ends_when_the_process_drains_and_delays_no_restart_and_no_reload(systemd: Systemd) {
    const TYPE: &str = "cpu/nanoseconds";
    let container = boot(systemd, "");
    let load = Load::saturating(&Container::target()).start(container.enter());
    testkit::block_on(async {
        let mut kept = admin(&container).await;
        for verb in ["restart", "reload"] {
            let short = kept.ask(&get("/debug/pprof/profile?seconds=1")).await.expect("the server answers");
            assert_eq!(short.status, 200, "{}", short.text());
            assert_profile(&short.body, TYPE);
            let mut long = admin(&container).await;
            long.send(&get("/debug/pprof/profile?seconds=60")).await.expect("the bytes are sent");
            let begun = Instant::now();
            assert_eq!(long.head().await.expect("the server answers").status, 200);
            let refused = kept.ask(&get("/debug/pprof/profile")).await.expect("the server answers");
            assert_eq!(refused.status, 409);
            assert!(refused.text().starts_with("another profile"), "{}", refused.text());
            // These requests take at least half a second of processor time, so the profile has about 50 samples. With a few
            // samples, all of them could be in the runtime, and none in the library.
            load.wait_for(load.ended() + 30_000);
            container.systemctl(verb).expect("systemctl succeeds");
            let mut profile = Vec::new();
            while let Some(chunk) = long.chunk().await.expect("the response is whole") {
                profile.extend(chunk);
            }
            assert!(begun.elapsed() < Duration::from_secs(45), "the drain waited: {:?}", begun.elapsed());
            assert_profile(&profile, TYPE);
        }
    });
    let report = load.stop();
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
}

fn heap_profile_has_the_memory_of_each_process_over_a_restart_and_a_reload(systemd: Systemd) {
    // One allocation in 4 KiB, so that all that the library keeps is sampled.
    let container = boot(systemd, "lg_prof_sample:12");
    testkit::block_on(async {
        let mut kept = admin(&container).await;
        for verb in ["restart", "reload", "status"] {
            let profile = kept.ask(&get("/debug/pprof/heap")).await.expect("the server answers");
            assert_eq!(profile.status, 200, "{}", profile.text());
            assert_profile(&profile.body, "inuse_space/bytes");
            container.systemctl(verb).expect("systemctl succeeds");
        }
    });
}

fn heap_profile_is_refused_with_the_reason_if_the_sampling_is_off(systemd: Systemd) {
    let container = boot(systemd, "prof:false");
    let answer = testkit::block_on(async {
        admin(&container).await.ask(&get("/debug/pprof/heap")).await.expect("the server answers")
    });
    assert_eq!(answer.status, 500);
    assert!(answer.text().contains("_RJEM_MALLOC_CONF has switched the sampling off"), "{}", answer.text());
}
