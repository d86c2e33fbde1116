//! The wall clock is set an hour forward and back while the service runs. No time limit may depend on it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use tempfile::TempDir;
use testkit::block_on;
use testkit::client::{Connection, Target, get};
use testkit::service::Service;
use testkit::tls_service::{Client, TlsService};

use crate::{NAME, app_binary};

/// A little less than an hour, because the test itself takes time.
const HOUR: Duration = Duration::from_secs(3540);

/// A wall clock for the service alone, by `libfaketime`. Setting the clock of the machine would affect everything on
/// it.
struct Clock {
    folder: TempDir,
}

impl Clock {
    fn new() -> Self {
        let clock = Self { folder: tempfile::tempdir().expect("the folder is created") };
        clock.set("+0");
        let library = format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
        assert!(fs::exists(&library).is_ok_and(|exists| exists), "{library} is missing: make e2e-deps");
        let script = format!(
            "#!/bin/sh\nexport LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={} FAKETIME_NO_CACHE=1 \
             FAKETIME_DONT_FAKE_MONOTONIC=1 DONT_FAKE_MONOTONIC=1\nexec {} \"$@\"\n",
            clock.file().display(),
            app_binary()
        );
        fs::write(clock.binary(), script).expect("the file is written");
        fs::set_permissions(clock.binary(), PermissionsExt::from_mode(0o755)).expect("the mode is set");
        clock
    }

    /// A script that starts the service with this clock.
    fn binary(&self) -> String {
        self.folder.path().join(NAME).to_str().expect("the path is UTF-8").to_owned()
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("clock")
    }

    fn set(&self, difference: &str) {
        let aside = self.file().with_extension("new");
        fs::write(&aside, difference).expect("the file is written");
        fs::rename(aside, self.file()).expect("the file is renamed");
    }
}

/// How far the clock of the service is ahead of ours, according to the `date` of a response.
async fn clock_lead(connection: &mut Connection) -> Duration {
    let answer = connection.ask(&get("/")).await.expect("the request is answered");
    let date = httpdate::parse_http_date(answer.header("date").expect("the date is valid"))
        .expect("the date is valid");
    date.duration_since(SystemTime::now()).unwrap_or_default()
}

#[test]
fn setting_the_clock_closes_no_connection_and_cuts_off_no_request() {
    let clock = Clock::new();
    // Far longer than a round takes on a slow machine, and far shorter than the hour.
    let limits = ["--idle-timeout", "10min", "--request-timeout", "10min"];
    let service = TlsService::start(&clock.binary(), &limits).expect("the service starts");
    block_on(async {
        let mut clients = Vec::new();
        for kind in 0..8 {
            let mut client = Client::open(&service, kind).await;
            client.is_answered().await;
            clients.push(client);
        }
        let mut slow =
            Connection::open(&Target::Tcp(service.http)).await.expect("the connection is established");
        let mut admin = Connection::open(&service.admin()).await.expect("the connection is established");
        let mut watch =
            Connection::open(&Target::Tcp(service.http)).await.expect("the connection is established");
        for difference in ["+3600", "-3600", "+0"] {
            slow.send(&get("/sleep?duration=2s")).await.expect("the bytes are sent");
            clock.set(difference);
            if difference == "+3600" {
                while clock_lead(&mut watch).await < HOUR {}
            }
            assert_eq!(slow.answer().await.expect("the request is answered").text(), "slept 2s\n");
            for client in &mut clients {
                client.is_answered().await;
            }
            let metrics = admin.ask(&get("/metrics")).await.expect("the request is answered").text();
            let uptime = metrics.lines().find_map(|line| line.strip_prefix("outlive_uptime_seconds "));
            let uptime: u32 = uptime.expect("the metric exists").parse().expect("the value is a number");
            assert!((2..3000).contains(&uptime), "{uptime}");
        }
    });
}

#[test]
fn setting_the_clock_during_a_drain_keeps_connections() {
    let clock = Clock::new();
    let mut service = Service::start_with_store(&clock.binary(), &[]).expect("the service starts");
    block_on(async {
        let mut idle = service.connect().await;
        let mut slow = service.connect().await;
        assert!(clock_lead(&mut idle).await < Duration::from_secs(60));
        for (difference, fast) in [("+3600", true), ("+0", false), ("-3600", false), ("+3600", true)] {
            slow.send(&get("/sleep?duration=4s")).await.expect("the bytes are sent");
            service.wait_for_in_flight(1).expect("the request is in flight");
            service.signal(Signal::TERM);
            service.notifications.wait_for("STOPPING=1").expect("the drain begins");
            clock.set(difference);
            service = service.restart(&clock.binary()).expect("the next process starts");
            assert_eq!(slow.answer().await.expect("the request is answered").text(), "slept 4s\n");
            for connection in [&mut idle, &mut slow] {
                let difference = clock_lead(connection).await;
                assert_eq!(difference > HOUR, fast, "{difference:?}");
            }
        }
    });
}
