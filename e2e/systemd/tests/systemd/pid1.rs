//! The static binary as PID 1 of a container whose file system has no other file, as `FROM scratch` gives it; and the
//! recipes for containers.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Once;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use testkit::client::{Connection, Target, get};
use testkit::process::{Process, copy_program, make};
use testkit::service::{command, run_to_end};
use testkit::{block_on, wait_until};

use crate::{FOLDER, NAME, app_binary};

/// A container made with unshare(1), with the service as its only process.
struct Container {
    unshare: Process,
    target: Target,
    log: tempfile::NamedTempFile,
    _root: tempfile::TempDir,
}

/// The binary of `make static`.
pub fn static_binary() -> PathBuf {
    // Once, because two builds at the same time would write the same file.
    static MADE: Once = Once::new();
    MADE.call_once(|| {
        let mut build = make(FOLDER, &["static"]);
        // The test only shows that the binary needs no other file, so it is built without expensive optimizations.
        build
            .envs([("CARGO_PROFILE_RELEASE_LTO", "off"), ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")])
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        let made = build.output().expect("make runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    });
    Path::new(FOLDER).join("target/static").join(NAME)
}

impl Container {
    fn start() -> Self {
        let root = tempfile::tempdir().expect("the folder is created");
        copy_program(&static_binary(), &root.path().join(NAME)).expect("the file is copied");
        std::fs::create_dir(root.path().join("proc")).expect("the folder is created");
        let address = testkit::free_address();
        let mut unshare = command("unshare", &["--fork", "--pid", "--kill-child"]);
        unshare
            .arg("--mount-proc")
            .arg(format!("--root={}", root.path().display()))
            .args(["--setgid=65534", "--setuid=65534", &format!("/{NAME}"), &format!("--listen={address}")])
            .env_clear()
            .stdout(Stdio::null());
        let log = tempfile::NamedTempFile::new().expect("the file is created");
        unshare.stderr(log.reopen().expect("the file is created"));
        let unshare = Process::spawn(&mut unshare).expect("unshare starts");
        let mut container = Self { unshare, target: Target::Tcp(address), log, _root: root };
        wait_until("the service listens", || {
            let has_ended =
                container.unshare.ends_within(Duration::ZERO).expect("the process can be watched");
            assert!(!has_ended, "{}", container.stderr());
            std::net::TcpStream::connect(address).is_ok()
        });
        container
    }

    /// The standard error so far.
    fn stderr(&self) -> String {
        std::fs::read_to_string(self.log.path()).expect("the file is readable")
    }

    /// Sends a signal to PID 1 of the container.
    fn signal(&self, signal: Signal) {
        let parent = self.unshare.pid().as_raw_nonzero();
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))
            .expect("the children are listed");
        let child = children.trim().parse().ok().and_then(Pid::from_raw).expect(&children);
        kill_process(child, signal).expect("the process runs");
    }

    /// Waits until the service exits with success; returns its standard error.
    fn wait_for_exit(mut self) -> String {
        let status = self.unshare.wait().expect("the process ends");
        let log = self.stderr();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

#[test]
fn static_binary_as_pid_1_finishes_the_request_in_flight() {
    let container = Container::start();
    block_on(async {
        let mut slow = Connection::open(&container.target).await.expect("the connection is established");
        assert!(slow.ask(&get("/")).await.expect("the request is answered").text().starts_with("pid 1, "));
        slow.send(&get("/sleep?duration=1s")).await.expect("the bytes are sent");
        let mut other = Connection::open(&container.target).await.expect("the connection is established");
        other.ask(&get("/")).await.expect("the request is answered");
        container.signal(Signal::TERM);
        assert_eq!(slow.answer().await.expect("the request is answered").text(), "slept 1s\n");
        assert!(other.ask(&get("/")).await.expect("the request is answered").closes());
    });
    let log = container.wait_for_exit();
    assert!(log.contains("draining: ") && log.contains(" 0 cut off"), "{log}");
}

#[test]
fn sighup_to_pid_1_is_refused_and_the_service_keeps_serving() {
    let container = Container::start();
    container.signal(Signal::HUP);
    block_on(async {
        let mut connection =
            Connection::open(&container.target).await.expect("the connection is established");
        assert!(
            connection
                .ask(&get("/sleep?duration=100ms"))
                .await
                .expect("the request is answered")
                .text()
                .contains("slept")
        );
        assert!(
            connection.ask(&get("/")).await.expect("the request is answered").text().contains("generation 1")
        );
    });
    wait_until("SIGHUP is refused", || {
        container.stderr().contains("PID 1 of a container or of a unit with PrivatePIDs=yes cannot reload")
    });
    container.signal(Signal::INT);
    container.wait_for_exit();
}

/// The kernel would end the successor together with PID 1. `docker exec` starts the command beside PID 1 of a container.
#[test]
fn takeover_of_pid_1_and_by_pid_1_is_refused_and_the_service_keeps_serving() {
    for service_is_pid_1 in [true, false] {
        let folder = tempfile::tempdir().expect("the folder is created");
        let address = testkit::free_address();
        let app = |is_pid_1: bool, flags: &[&str]| {
            let mut command = if is_pid_1 {
                command("unshare", &["--fork", "--pid", "--kill-child", "--mount-proc", app_binary()])
            } else {
                command(app_binary(), &[])
            };
            command.args(flags).env("RUNTIME_DIRECTORY", folder.path());
            command
        };
        let mut service = app(service_is_pid_1, &[&format!("--listen={address}")]);
        let mut service = Process::spawn(service.stderr(Stdio::null())).expect("the service starts");
        wait_until("the takeover socket exists", || folder.path().join("takeover").exists());
        let mut takeover = app(!service_is_pid_1, &["takeover"]);
        let (code, _, log) = run_to_end(&mut takeover).expect("the process ends");
        assert!(code != Some(0) && log.contains("PrivatePIDs=yes cannot reload"), "{code:?}: {log}");
        block_on(async {
            let mut connection =
                Connection::open(&Target::Tcp(address)).await.expect("the connection is established");
            let answer = connection.ask(&get("/")).await.expect("the request is answered");
            assert!(answer.text().contains("generation 1"), "{}", answer.text());
        });
        service.signal(Signal::KILL);
        service.wait().expect("the process ends");
    }
}

// ---- docs/recipes ----

/// The first block in this language of the recipe in `docs/recipes/NAME.md`.
pub fn recipe(name: &str, language: &str) -> String {
    let path = Path::new(FOLDER).join(format!("docs/recipes/{name}.md"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let block = text.split(&format!("```{language}\n")).nth(1).and_then(|rest| rest.split("```").next());
    block.unwrap_or_else(|| panic!("{} has no block in {language}", path.display())).to_owned()
}

/// The word after `before`, up to the next blank or brace.
fn value(text: &str, before: &str) -> String {
    let rest = text.split(before).nth(1).expect(before);
    rest.split([' ', '\n', '}']).find(|word| !word.is_empty()).expect(before).to_owned()
}

#[test]
fn container_recipes_use_options_that_the_binary_accepts() {
    let read = |path: &str| std::fs::read_to_string(Path::new(FOLDER).join(path)).expect(path);
    let (file, deployment) = (read("Dockerfile"), read("docs/recipes/kubernetes.yaml"));
    assert!(file.contains("make -C /src static "), "{file}");
    let variable = format!("{}_LISTEN=", NAME.to_uppercase().replace('-', "_"));
    let listen = value(&file, &variable);
    let mut check = command(app_binary(), &["check"]);
    // Port 0, because the ports of the recipe may be in use on this machine.
    check.env(variable.trim_end_matches('='), listen.replace(":8080", ":0").replace(":9090", ":0"));
    let prefix = variable.trim_end_matches("LISTEN=");
    let time = |name: &str| {
        let value = value(&deployment, &format!("{prefix}{name}, value: "));
        (
            format!("{prefix}{name}"),
            value.clone(),
            humantime::parse_duration(&value).expect("the value is a duration"),
        )
    };
    let times = [time("DRAIN_DELAY"), time("DRAIN_TIMEOUT")];
    for (name, value, _) in &times {
        check.env(name, value);
    }
    let (code, stdout, log) = run_to_end(&mut check).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    assert!(stdout.contains("http(") && stdout.contains("admin("), "{stdout}");
    let grace: u64 =
        value(&deployment, "terminationGracePeriodSeconds: ").parse().expect("the value is in seconds");
    // Twice the drain timeout, because a request that arrives at the end of the first period has a whole one of its
    // own.
    let [(_, _, delay), (_, _, limit)] = &times;
    assert!(grace > delay.as_secs() + 2 * limit.as_secs(), "{deployment}");
    // Docker and Podman kill the container at the same time as systemd kills the service.
    let stop = value(&read(&format!("systemd/{NAME}.service")), "\nTimeoutStopSec=");
    assert_eq!(value(&read("compose.yaml"), "stop_grace_period: "), stop);
    assert_eq!(value(&read("docs/recipes/app.container"), "TimeoutStopSec="), stop);
    let admin = listen.rsplit(':').next().expect("the port is known");
    for probe in ["/readyz", "/healthz"] {
        assert!(deployment.contains(&format!("path: {probe}, port: {admin} ")), "{deployment}");
    }
}
