//! The longest time that a request waits while `systemctl` restarts or reloads the service. A test binary of its own,
//! because other tests would take processor time and change the result; a lock keeps these tests apart.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use testkit::binaries::{ROOT, root_package};
use testkit::client::Connection;
use testkit::container::{Container, Systemd};
use testkit::load::{Connections, Load, Report, Running, Sample};
use testkit::on_each_systemd;
use testkit::verbs::iterations;

on_each_systemd! {
    reloads_under_saturating_load_lose_and_delay_no_request
    reloads_under_paced_load_lose_and_delay_no_request
    reloads_under_paced_blind_load_lose_and_delay_no_request
    reloads_under_one_connection_per_request_lose_and_delay_no_request
    reloads_under_post_requests_lose_and_delay_no_request
    restart_beside_a_slow_request_delays_others_by_one_start_only
}

fn serving(systemd: Systemd) -> (Container, MutexGuard<'static, ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let container = Container::boot(systemd, root_package("app", "")).expect("the container boots");
    container.ask("/");
    (container, alone)
}

/// The beginning and the end of an action, counted from the beginning of the load.
type Window = (Duration, Duration);

/// Does `work`, and returns the time from its beginning until 100 more requests have ended after it.
fn window(running: &Running, work: impl FnOnce()) -> Window {
    let begun = running.begun.elapsed();
    work();
    running.wait_for(running.ended() + 100);
    (begun, running.begun.elapsed())
}

/// The longest wait of a request in each of these windows, in ascending order.
fn longest_in(report: &Report, windows: &[Window]) -> Vec<Duration> {
    let micros = |micros: u32| Duration::from_micros(micros.into());
    let longest = |&(begun, ended): &Window| {
        let sent =
            |sample: &&Sample| micros(sample.at) < ended && micros(sample.at) + micros(sample.took) > begun;
        report.samples.iter().filter(sent).map(|sample| micros(sample.took)).max().unwrap_or_default()
    };
    let mut all: Vec<_> = windows.iter().map(longest).collect();
    all.sort();
    all
}

/// Asserts that all of the waits `measured` but one are below `limit`, and that one below ten times `limit`, because
/// on a busy machine any process may be delayed once. If the machine as a whole is slow, the limit follows the waits
/// `compared`, measured in the same run: the median may be twice theirs, and the others four times their longest.
fn assert_short(limit: Duration, measured: &[Duration], compared: &[Duration], report: &Report) {
    eprintln!("{report}; the waits {measured:.1?}, compared with {compared:.1?}");
    let middle = |waits: &[Duration]| waits[waits.len() / 2];
    let slow = *compared.last().expect("a wait was measured") * 4;
    let (median, last) = (middle(measured), measured.len() - 1);
    assert!(
        median < limit.max(middle(compared) * 2),
        "median {median:.1?} of {measured:.1?}: {compared:.1?}"
    );
    assert!(measured[last] < (limit * 10).max(slow), "the longest of {measured:.1?}: {compared:.1?}");
    assert!(measured[last.saturating_sub(1)] < limit.max(slow), "several of {measured:.1?}: {compared:.1?}");
}

/// Asserts that no request waits for 100 ms during a reload or, on a slow machine, not much longer than while systemd
/// starts another unit in the same sandbox.
fn reload_under(systemd: Systemd, load: Load) {
    let (container, _alone) = serving(systemd);
    install_neighbour(&container);
    let one_each = load.connections == Connections::OneEach;
    let running = load.start(container.enter());
    let (mut reloads, mut starts) = (Vec::new(), Vec::new());
    for _ in 0..iterations() {
        reloads.push(window(&running, || {
            container.systemctl("reload").expect("the reload succeeds");
        }));
        starts.push(window(&running, || {
            container.run(&["systemctl", "start", "neighbour.service"]).expect("the start succeeds");
        }));
    }
    let report = running.stop();
    assert_eq!(report.lost(), 0, "{report}");
    let wanted = if one_each { report.answered } else { report.clients };
    assert_eq!(report.connections, wanted, "{report}");
    let [reloads, starts] = [reloads, starts].map(|windows| longest_in(&report, &windows));
    assert_short(Duration::from_millis(100), &reloads, &starts, &report);
}

/// Installs a unit that runs /bin/true in the same sandbox as the service.
fn install_neighbour(container: &Container) {
    let unit = format!("{ROOT}/systemd/{}", container.unit("service"));
    let unit = std::fs::read_to_string(unit).expect("the unit file is readable");
    let of_the_service =
        ["Type=", "Notify", "Exec", "Restart", "Watchdog", "Requires=", "After=", "FileDescriptor"];
    let unit = unit.replace("[Service]", "[Service]\nType=oneshot\nExecStart=/bin/true");
    let is_ours = |line: &&str| {
        !of_the_service.iter().any(|start| line.starts_with(start))
            || line.ends_with("/bin/true")
            || line.ends_with("oneshot")
    };
    let neighbour: Vec<&str> = unit.lines().filter(is_ours).collect();
    container
        .write("etc/systemd/system/neighbour.service", &neighbour.join("\n"))
        .expect("the file is written");
    container.run(&["systemctl", "daemon-reload"]).expect("the units are loaded");
}

fn reloads_under_saturating_load_lose_and_delay_no_request(systemd: Systemd) {
    reload_under(systemd, Load::saturating(&Container::target()));
}

fn reloads_under_paced_load_lose_and_delay_no_request(systemd: Systemd) {
    reload_under(systemd, Load::paced(&Container::target()));
}

fn reloads_under_paced_blind_load_lose_and_delay_no_request(systemd: Systemd) {
    reload_under(systemd, Load::paced_blind(&Container::target()));
}

fn reloads_under_one_connection_per_request_lose_and_delay_no_request(systemd: Systemd) {
    reload_under(systemd, Load::connection_per_request(&Container::target()));
}

fn reloads_under_post_requests_lose_and_delay_no_request(systemd: Systemd) {
    reload_under(systemd, Load::post(&Container::target()));
}

/// Other requests are served until the slow one is answered, and then wait for the start of the next process, about as
/// long as at a restart without a slow request.
fn restart_beside_a_slow_request_delays_others_by_one_start_only(systemd: Systemd) {
    let (container, _alone) = serving(systemd);
    let running = Load::paced(&Container::target()).start(container.enter());
    let (mut beside, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        alone.push(window(&running, || {
            container.systemctl("restart").expect("the restart succeeds");
        }));
        let restart_beside_a_slow_request = async || {
            let mut slow = Connection::open(&Container::target()).await.expect("the port is open");
            slow.hold().await.expect("the request is in flight");
            let before = container.show("MainPID").expect("systemctl show succeeds");
            container
                .run(&["systemctl", "restart", "--no-block", &container.unit("service")])
                .expect("the job is queued");
            container.wait_for_property("ActiveState", |state| state == "deactivating");
            // Enough that each of the other clients is served several times.
            running.wait_for(running.ended() + 200);
            slow.release().await.expect("the request is answered");
            container.wait_for_property("ActiveState", |state| state == "active");
            assert_ne!(container.show("MainPID").expect("systemctl show succeeds"), before);
        };
        beside.push(window(&running, || container.inside(restart_beside_a_slow_request)));
    }
    let report = running.stop();
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
    let [beside, alone] = [beside, alone].map(|windows| longest_in(&report, &windows));
    assert_short(Duration::from_millis(250), &beside, &alone, &report);
}
