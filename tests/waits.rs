//! How long a request waits at the most while `systemctl` restarts or reloads the service: each test has the machine to
//! itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use harness::client::{Connection, get};
use harness::container::{Container, Systemd};
use harness::load::{Load, Report};
use harness::verbs::{again_and_again, times};
use harness::{on_each_systemd, this_package};

on_each_systemd! {
    reloads_under_ten_connections_flat_out_lose_nothing
    reloads_under_fifty_thinking_connections_lose_nothing
    reloads_under_fifty_blind_connections_lose_nothing
    reloads_under_one_connection_a_request_lose_nothing
    reloads_under_posts_lose_nothing
    restarts_with_a_slow_request_in_flight_make_others_wait_for_one_start
}

fn serving(systemd: Systemd) -> (Container, MutexGuard<'static, ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let container = Container::boot(systemd, this_package!()).expect("a container");
    container.ask("/");
    (container, alone)
}

/// No request waits for 100 ms; or, on a machine that is slow itself, twice as long as one does while systemd starts
/// something else, in the same sandbox and as often.
fn reload_under(systemd: Systemd, load: Load) {
    let (container, _alone) = serving(systemd);
    let report = again_and_again("reload", &container, load.clone());
    if report.longest >= Duration::from_millis(100) {
        let quiet = starts_of_a_neighbour_under(&container, load);
        assert!(report.longest < quiet.longest * 2, "{report}, with a neighbour {quiet}");
    }
}

fn starts_of_a_neighbour_under(container: &Container, load: Load) -> Report {
    let unit = format!("{}/systemd/{}", env!("CARGO_MANIFEST_DIR"), container.unit("service"));
    let unit = std::fs::read_to_string(unit).expect("the unit");
    let of_the_service =
        ["Type=", "Notify", "Exec", "Restart", "Watchdog", "Requires=", "After=", "FileDescriptor"];
    let unit = unit.replace("[Service]", "[Service]\nType=oneshot\nExecStart=/bin/true");
    let is_ours = |line: &&str| {
        !of_the_service.iter().any(|start| line.starts_with(start))
            || line.ends_with("/bin/true")
            || line.ends_with("oneshot")
    };
    let neighbour: Vec<&str> = unit.lines().filter(is_ours).collect();
    container.write("etc/systemd/system/neighbour.service", &neighbour.join("\n")).expect("written");
    container.run(&["systemctl", "daemon-reload"]).expect("loaded");
    let running = load.start(container.enter());
    for _ in 0..times() {
        container.run(&["systemctl", "start", "neighbour.service"]).expect("a start");
    }
    running.stop()
}

fn reloads_under_ten_connections_flat_out_lose_nothing(systemd: Systemd) {
    reload_under(systemd, Load::w1(&Container::target()));
}

fn reloads_under_fifty_thinking_connections_lose_nothing(systemd: Systemd) {
    reload_under(systemd, Load::w2(&Container::target()));
}

fn reloads_under_fifty_blind_connections_lose_nothing(systemd: Systemd) {
    reload_under(systemd, Load::w3(&Container::target()));
}

fn reloads_under_one_connection_a_request_lose_nothing(systemd: Systemd) {
    reload_under(systemd, Load::w4(&Container::target()));
}

fn reloads_under_posts_lose_nothing(systemd: Systemd) {
    reload_under(systemd, Load::post(&Container::target()));
}

fn restarts_with_a_slow_request_in_flight_make_others_wait_for_one_start(systemd: Systemd) {
    let (container, _alone) = serving(systemd);
    let running = Load::w2(&Container::target()).start(container.enter());
    for _ in 0..3 {
        let text = container.inside(|| async {
            let mut slow = Connection::open(&Container::target()).await.expect("the port is open");
            slow.send(&get("/sleep?duration=1s")).await.expect("sent");
            container.until("StatusText", |status| status.contains("in flight"));
            std::thread::scope(|scope| scope.spawn(|| container.systemctl("restart")).join())
                .expect("joined")
                .expect("a restart");
            slow.answer().await.expect("the answer").text()
        });
        assert_eq!(text, "slept 1s\n");
    }
    let report = running.stop();
    eprintln!("a request of 1 s in flight at each of 3 restarts: {report}");
    assert_eq!((report.lost(), report.connections), (0, report.asked_for), "{report}");
    assert!(report.longest <= Duration::from_millis(250), "{report}");
}
