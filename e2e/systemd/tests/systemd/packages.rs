//! Install, upgrade, removal and purge of the package on real Debians, and of the rpm. Upgrades have no impact on
//! clients of the service, and a purge leaves no file.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Result;
use auditable_info::Limits;
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::debian::{append, built_package, later_release, run};
use testkit::load::{Load, Running};
use testkit::{exclusive_cpu, on_each_debian, on_one, wait_until};

use crate::{FOLDER, NAME, app_binary, app_package};

on_each_debian! {
    install_opens_the_port_and_the_first_request_starts_the_service
    policy_rc_d_and_presets_are_respected
    install_without_systemd_prints_nothing_about_systemd
    upgrades_and_a_downgrade_under_load_have_no_client_impact
    upgrade_with_changed_units_prints_a_hint_and_does_not_restart
    failed_upgrade_keeps_the_old_process_until_a_good_release
    invalid_conffile_line_is_printed_and_configure_succeeds_after_the_fix
    upgrade_on_a_full_disk_keeps_the_old_process
    upgrade_during_a_reload_loses_no_request
    upgrade_keeps_stopped_disabled_and_masked_units_as_they_are
    upgrade_reloads_the_instances
    upgraded_process_runs_the_installed_file
    systemctl_sets_what_is_logged_and_a_reload_keeps_it
    removal_drains_and_purge_leaves_no_file
}

// The tests that depend on the maintainer scripts and on systemd together; the others take minutes more on each Debian.
on_one! { debian_unstable Unstable
    install_opens_the_port_and_the_first_request_starts_the_service
    upgrades_and_a_downgrade_under_load_have_no_client_impact
    upgrade_keeps_stopped_disabled_and_masked_units_as_they_are
    removal_drains_and_purge_leaves_no_file
}

#[test]
fn lintian_reports_nothing() {
    let exceptions = [
        // The template has no address of a maintainer; a copy has one.
        "bogus-mail-host",
        "bogus-mail-host-in-debian-changelog",
        // Debian's helpers restart services and cannot reload them by takeover.
        "maintainer-script-calls-systemctl",
    ];
    let package = packages(Systemd::V252).join("one.deb");
    let output = Command::new("lintian")
        .args(["--allow-root", "--fail-on=error,warning", "--suppress-tags", &exceptions.join(",")])
        .arg(package)
        .output()
        .expect("lintian runs: make e2e-deps installs it");
    assert!(output.status.success() && output.stdout.is_empty(), "{}", stdout_and_stderr(&output));
}

/// Scanners for known vulnerabilities read this list from the installed binary.
#[test]
fn packaged_binary_has_the_list_of_its_crates() {
    let _alone = lock();
    let mut make = testkit::process::make(FOLDER, &["package-files"]);
    run(make.arg(format!("BINARY={}", crate::pid1::static_binary().display()))).expect("make runs");
    let packaged = Path::new(FOLDER).join("target/packages/files/usr/bin").join(NAME);
    let list =
        auditable_info::audit_info_from_file(&packaged, Limits::default()).expect("the list is present");
    let has = |name: &str| list.packages.iter().any(|package| package.name == name);
    assert!(has(NAME) && has("outlive") && has("axum") && has("rustls"), "{list:?}");
    assert!(!has("tempfile"), "the list contains dependencies of tests: {list:?}");
}

/// With the rpm of Debian, because no system that is based on rpm is available to the tests.
#[test]
fn rpm_is_installed_upgraded_refused_and_removed_under_load() {
    let container =
        Container::boot_debian(Systemd::V252, app_package(), &build_rpms()).expect("the container boots");
    let rpm = |arguments: &[&str]| {
        let output =
            container.command(&[&["rpm", "--nodeps"], arguments].concat()).output().expect("rpm runs");
        (output.status.success(), stdout_and_stderr(&output))
    };
    let (succeeded, output) = rpm(&["--install", "/packages/one.rpm"]);
    assert!(succeeded, "{output}");
    let [socket, service] = ["socket", "service"].map(|kind| container.unit(kind));
    assert_eq!(unit_state(&container, "is-enabled", &socket), "enabled", "not as presets say: {output}");
    container.run(&["systemctl", "start", &socket]).expect("the socket starts");
    container.ask("/");
    let running = under_load(&container);
    let pid = main_pid(&container);
    let (succeeded, output) = rpm(&["--upgrade", "/packages/two.rpm"]);
    assert!(succeeded && main_pid(&container) != pid, "{output}");
    assert_runs_installed_binary(&container);
    let pid = main_pid(&container);
    let (_, output) = rpm(&["--upgrade", "/packages/broken.rpm"]);
    assert!(output.contains("the new version failed to start; the old process keeps serving"), "{output}");
    assert_eq!(main_pid(&container), pid, "{output}");
    let (succeeded, output) = rpm(&["--upgrade", "--oldpackage", "/packages/one.rpm"]);
    assert!(succeeded && main_pid(&container) != pid, "{output}");
    assert_runs_installed_binary(&container);
    assert_no_client_impact(running);
    let (succeeded, output) = rpm(&["--erase", NAME]);
    assert!(succeeded, "{output}");
    assert_ne!(unit_state(&container, "is-active", &service), "active");
    container.inside(|| async {
        assert!(Connection::open(&Container::target()).await.is_err(), "the port is open");
    });
    let find = ["find", "/etc", "/usr", "/run", "-name", &format!("{NAME}*"), "!", "-name", "app.slice"];
    assert_eq!(container.run(&find).expect("the files are listed"), "");
}

// ---- packages ----

/// The folder of all releases: `one.deb` and later ones. They are built once without the drop-in that needs systemd
/// 254, and once with it.
fn packages(systemd: Systemd) -> &'static Path {
    static BUILT: OnceLock<[PathBuf; 2]> = OnceLock::new();
    let built = BUILT.get_or_init(|| ["252", "257"].map(build));
    if systemd.version(app_package()).expect("the version is known") < 254 { &built[0] } else { &built[1] }
}

fn build(systemd: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("packages-{systemd}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder is created");
    let _alone = lock();
    // Without compression, which would take most of the time.
    make(&["deb", "DEB=--fast", &format!("SYSTEMD={systemd}")]);
    let package = built_package(Path::new(FOLDER), NAME, "deb").expect("the package is built");
    fs::copy(package, folder.join("one.deb")).expect("the file is copied");
    let binary = format!("usr/bin/{NAME}");
    let release = |name: &str, version: &str, change: &dyn Fn(&Path) -> Result<()>| {
        let (first, package) = (folder.join("one.deb"), folder.join(format!("{name}.deb")));
        later_release(&first, &package, version, change).expect("the release is created");
    };
    release("two", "0.2.0", &|root| append(&root.join(&binary), "two"));
    release("three", "0.3.0", &|root| append(&root.join(&binary), "three"));
    release("units", "0.4.0", &|root| {
        append(&root.join(format!("usr/lib/systemd/system/{NAME}.service")), "LimitCORE=0\n")
    });
    release("broken", "0.5.0", &|root| Ok(fs::write(root.join(&binary), "#!/bin/sh\nexit 1\n")?));
    release("cured", "0.6.0", &|root| append(&root.join(&binary), "cured"));
    folder
}

fn build_rpms() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rpms");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder is created");
    let _alone = lock();
    let uncompressed = "--payload-compress=none";
    make(&["rpm", &format!("RPM={uncompressed}"), "SYSTEMD=252"]);
    let package = built_package(Path::new(FOLDER), NAME, "rpm").expect("the package is built");
    fs::copy(package, folder.join("one.rpm")).expect("the file is copied");
    let binary = Path::new(FOLDER).join(format!("target/packages/files/usr/bin/{NAME}"));
    let release = |name: &str, version: &str| {
        let tools = Path::new(FOLDER).join("target/tools/bin/cargo-generate-rpm");
        let mut generate = Command::new(if tools.exists() { tools } else { "cargo-generate-rpm".into() });
        generate.current_dir(FOLDER).arg("generate-rpm");
        generate.arg(uncompressed);
        generate.args(["--set-metadata", &format!("version = \"{version}\""), "--output"]);
        run(generate.arg(folder.join(format!("{name}.rpm")))).expect("cargo generate-rpm succeeds");
    };
    append(&binary, "two").expect("the file is written");
    release("two", "0.2.0");
    fs::write(&binary, "#!/bin/sh\nexit 1\n").expect("the file is written");
    release("broken", "0.3.0");
    folder
}

/// A lock for `make deb` and `make rpm`, which write to the same folder.
fn lock() -> MutexGuard<'static, ()> {
    static MAKING: Mutex<()> = Mutex::new(());
    MAKING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn make(arguments: &[&str]) {
    let mut make = testkit::process::make(FOLDER, arguments);
    run(make.arg(format!("BINARY={}", app_binary()))).expect("make runs");
}

fn stdout_and_stderr(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat()
}

// ---- containers and loads ----

fn boot(systemd: Systemd) -> Container {
    Container::boot_debian(systemd, app_package(), packages(systemd)).expect("the container boots")
}

/// Runs `dpkg`; returns whether it succeeded, and its output.
fn dpkg(container: &Container, arguments: &[&str]) -> (bool, String) {
    let output = container.command(&[&["dpkg"], arguments].concat()).output().expect("dpkg runs");
    (output.status.success(), stdout_and_stderr(&output))
}

fn install(container: &Container, release: &str) -> String {
    let (succeeded, output) = dpkg(container, &["--install", &format!("/packages/{release}.deb")]);
    assert!(succeeded, "{release}: {output}");
    output
}

fn unit_state(container: &Container, verb: &str, unit: &str) -> String {
    let output = container.command(&["systemctl", verb, unit]).output().expect("systemctl runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A container in which the first release is installed and serves.
fn serving(systemd: Systemd) -> Container {
    let container = boot(systemd);
    install(&container, "one");
    container.ask("/");
    container
}

fn main_pid(container: &Container) -> String {
    container.show("MainPID").expect("systemctl show succeeds")
}

/// The invocation id, which is the same as long as systemd has not started the service again.
fn invocation(container: &Container) -> String {
    container.show("InvocationID").expect("systemctl show succeeds")
}

/// Running loads, and the lock if they use all processor time.
type UnderLoad = (Vec<Running>, Option<MutexGuard<'static, ()>>);

/// Clients of each kind, which together use all processor time.
fn under_load(container: &Container) -> UnderLoad {
    let alone = exclusive_cpu();
    let target = Container::target();
    let loads = [
        Load::saturating(&target),
        Load::paced(&target),
        Load::paced_blind(&target),
        Load::connection_per_request(&target),
    ];
    (loads.map(|load| load.start(container.enter())).into(), Some(alone))
}

/// A few clients with kept connections and pauses.
fn light_load(container: &Container) -> UnderLoad {
    let target = Container::target();
    let some = |load| Load { clients: 10, think: Duration::from_millis(20), ..load };
    let loads = [Load::paced(&target), Load::paced_blind(&target)].map(some);
    (loads.map(|load| load.start(container.enter())).into(), None)
}

/// Stops the loads, and asserts that no request was lost and no connection closed.
fn assert_no_client_impact((running, _alone): UnderLoad) {
    for running in running {
        let is_kept = |report: &testkit::load::Report| report.connections == report.clients;
        let report = running.stop();
        eprintln!("{report}");
        assert!(report.answered > 0 && report.lost() == 0, "{report}: {:?}", report.lost);
        let one_each = report.connections == report.answered;
        assert!(one_each || is_kept(&report), "{report}");
    }
}

fn assert_runs_installed_binary(container: &Container) {
    let runs =
        fs::metadata(container.path(&format!("proc/{}/exe", main_pid(container)))).expect("the process runs");
    let installed = fs::metadata(container.path(&format!("usr/bin/{NAME}"))).expect("the file is installed");
    assert_eq!((runs.dev(), runs.ino()), (installed.dev(), installed.ino()));
}

fn write_executable(container: &Container, path: &str, text: &str) {
    container.write(path, text).expect("the file is written");
    fs::set_permissions(container.path(path), PermissionsExt::from_mode(0o755)).expect("the mode is set");
}

// ---- tests ----

fn install_opens_the_port_and_the_first_request_starts_the_service(systemd: Systemd) {
    let container = boot(systemd);
    let output = install(&container, "one");
    let [socket, service] = ["socket", "service"].map(|kind| container.unit(kind));
    assert_eq!(unit_state(&container, "is-enabled", &socket), "enabled", "{output}");
    assert_eq!(unit_state(&container, "is-active", &socket), "active", "{output}");
    assert_eq!(unit_state(&container, "is-active", &service), "inactive", "{output}");
    for other in ["tls", "admin"] {
        assert_eq!(unit_state(&container, "is-enabled", &format!("{NAME}-{other}.socket")), "disabled");
    }
    assert!(container.ask("/").contains("generation 1"));
    // As at boot.
    container.run(&["systemctl", "stop", &socket, &service]).expect("the units are stopped");
    container.run(&["systemctl", "restart", "sockets.target"]).expect("sockets.target restarts");
    assert!(container.ask("/").contains("generation 1"));
    for file in ["man1/app.1.gz", "bash-completion/completions/app"] {
        assert!(
            container
                .run(&["dpkg", "--listfiles", NAME])
                .expect("the files are listed")
                .contains(&file.replace("app", NAME))
        );
    }
    let variables =
        fs::read_to_string(container.path(&format!("etc/default/{NAME}"))).expect("the conffile is readable");
    assert!(variables.contains("_DRAIN_TIMEOUT=30s\n"), "{variables}");
    assert!(variables.lines().all(|line| line.is_empty() || line.starts_with('#')), "{variables}");
}

fn policy_rc_d_and_presets_are_respected(systemd: Systemd) {
    let socket = format!("{NAME}.socket");
    let container = boot(systemd);
    write_executable(&container, "usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n");
    install(&container, "one");
    assert_eq!(unit_state(&container, "is-enabled", &socket), "enabled");
    assert_eq!(unit_state(&container, "is-active", &socket), "inactive");
    container.run(&["systemctl", "start", &socket]).expect("the socket starts");
    container.ask("/");
    let pid = main_pid(&container);
    install(&container, "two");
    assert_eq!(main_pid(&container), pid, "the service was reloaded");

    let container = boot(systemd);
    container.write("etc/systemd/system-preset/00-none.preset", "disable *\n").expect("the file is written");
    install(&container, "one");
    assert_eq!(unit_state(&container, "is-enabled", &socket), "disabled");
    assert_eq!(unit_state(&container, "is-active", &socket), "inactive");
}

fn install_without_systemd_prints_nothing_about_systemd(systemd: Systemd) {
    let container = boot(systemd);
    let mut output = String::new();
    for release in ["one", "two"] {
        let command = format!(
            "mount -t tmpfs none /run && mount --bind /dev/null /usr/bin/systemctl &&
             dpkg --install /packages/{release}.deb 2>&1"
        );
        output += &container.run(&["unshare", "--mount", "sh", "-c", &command]).expect("dpkg succeeds");
    }
    let unit_words = ["systemd", "systemctl", "reload", "warning", "error"];
    assert!(unit_words.iter().all(|word| !output.contains(word)), "{output}");
    assert_eq!(container.run(&[NAME, "--version"]).expect("the process runs"), format!("{NAME} 0.1.0\n"));
}

fn upgrades_and_a_downgrade_under_load_have_no_client_impact(systemd: Systemd) {
    let container = serving(systemd);
    let running = under_load(&container);
    let begun = invocation(&container);
    let mut pids = BTreeSet::from([main_pid(&container)]);
    for release in ["two", "three", "one", "two"] {
        let output = install(&container, release);
        assert!(pids.insert(main_pid(&container)), "the upgrade did not take over: {output}");
        assert!(!output.contains("unit files have changed"), "{output}");
        assert_runs_installed_binary(&container);
    }
    assert_eq!(invocation(&container), begun, "the service was restarted");
    assert_no_client_impact(running);
}

fn upgrade_with_changed_units_prints_a_hint_and_does_not_restart(systemd: Systemd) {
    let container = serving(systemd);
    let running = light_load(&container);
    let begun = invocation(&container);
    let output = install(&container, "units");
    let hints: Vec<_> = output.lines().filter(|line| line.contains("unit files have changed")).collect();
    assert!(matches!(hints[..], [line] if line.contains(&format!("systemctl restart {NAME}"))), "{output}");
    assert_eq!(container.show("NeedDaemonReload").expect("systemctl show succeeds"), "no");
    assert_eq!(invocation(&container), begun, "the service was restarted");
    assert_eq!(container.show("LimitCORE").expect("systemctl show succeeds"), "0");
    assert_no_client_impact(running);
}

fn failed_upgrade_keeps_the_old_process_until_a_good_release(systemd: Systemd) {
    let container = serving(systemd);
    let running = light_load(&container);
    let pid = main_pid(&container);
    let (succeeded, output) = dpkg(&container, &["--install", "/packages/broken.deb"]);
    assert!(
        !succeeded && output.contains("the new version failed to start; the old process keeps serving"),
        "{output}"
    );
    assert_eq!(main_pid(&container), pid, "{output}");
    let (succeeded, _) = dpkg(&container, &["--configure", "--pending"]);
    assert!(!succeeded, "the broken release was configured");
    install(&container, "cured");
    assert_ne!(main_pid(&container), pid);
    assert_runs_installed_binary(&container);
    let (_, state) = dpkg(&container, &["--audit"]);
    assert_eq!(state, "");
    assert_no_client_impact(running);
}

fn invalid_conffile_line_is_printed_and_configure_succeeds_after_the_fix(systemd: Systemd) {
    let container = serving(systemd);
    let variable = format!("{}_IDLE_TIMEOUT", NAME.to_uppercase().replace('-', "_"));
    let conffile = format!("etc/default/{NAME}");
    container.write(&conffile, &format!("# one\n# two\n{variable}=soon\n")).expect("the file is written");
    let running = light_load(&container);
    let pid = main_pid(&container);
    let (succeeded, output) = dpkg(&container, &["--install", "/packages/two.deb"]);
    assert!(!succeeded, "{output}");
    assert!(output.contains(&format!("/{conffile}:3:{variable}=soon")), "{output}");
    assert!(output.contains("invalid value 'soon'"), "{output}");
    assert_eq!(main_pid(&container), pid);
    // A conffile that cannot be read is an error too.
    fs::remove_file(container.path(&conffile)).expect("the file is removed");
    fs::create_dir(container.path(&conffile)).expect("the folder is created");
    let (succeeded, output) = dpkg(&container, &["--configure", "--pending"]);
    assert!(!succeeded && output.contains(&format!("/{conffile}: ")), "{output}");
    assert_eq!(main_pid(&container), pid);
    fs::remove_dir(container.path(&conffile)).expect("the folder is removed");
    container.write(&conffile, &format!("{variable}=5min\n")).expect("the file is written");
    let (succeeded, output) = dpkg(&container, &["--configure", "--pending"]);
    assert!(succeeded, "{output}");
    assert_ne!(main_pid(&container), pid);
    assert_runs_installed_binary(&container);
    assert_no_client_impact(running);
}

fn upgrade_on_a_full_disk_keeps_the_old_process(systemd: Systemd) {
    let container = serving(systemd);
    let running = light_load(&container);
    let pid = main_pid(&container);
    let folder = "/usr/share/fish/vendor_completions.d";
    let fill = format!("mount -t tmpfs -o size=4k none {folder} && head -c 4096 /dev/zero >{folder}/full");
    container.run(&["sh", "-c", &fill]).expect("the file system is full");
    let (succeeded, output) = dpkg(&container, &["--install", "/packages/two.deb"]);
    assert!(!succeeded && output.contains("No space left"), "{output}");
    assert_eq!(main_pid(&container), pid);
    container.run(&["umount", folder]).expect("the file system is unmounted");
    install(&container, "two");
    assert_ne!(main_pid(&container), pid);
    assert_runs_installed_binary(&container);
    assert_no_client_impact(running);
}

fn upgrade_during_a_reload_loses_no_request(systemd: Systemd) {
    let container = serving(systemd);
    let running = under_load(&container);
    for release in ["two", "three", "one"] {
        container
            .run(&["systemctl", "reload", "--no-block", &container.unit("service")])
            .expect("the job is queued");
        install(&container, release);
        assert_runs_installed_binary(&container);
    }
    assert_no_client_impact(running);
}

fn upgrade_keeps_stopped_disabled_and_masked_units_as_they_are(systemd: Systemd) {
    let [socket, service] = ["socket", "service"].map(|kind| format!("{NAME}.{kind}"));
    let container = serving(systemd);
    // When a unit is masked while it runs, systemd forgets NotifyAccess=, ignores the messages of the service, and
    // kills it when WatchdogSec= has passed. Without the watchdog the service runs for as long as the test takes.
    container
        .add_to_unit("service", "watchdog", "[Service]\nWatchdogSec=0\n")
        .expect("the drop-in is written");
    let states = || {
        let units = [&socket, &service];
        [
            units.map(|unit| unit_state(&container, "is-active", unit)),
            units.map(|unit| unit_state(&container, "is-enabled", unit)),
        ]
    };
    let unchanged = |release: &str| {
        let before = states();
        let output = install(&container, release);
        assert_eq!(states(), before, "{release}");
        output
    };
    container.run(&["systemctl", "stop", &service]).expect("the units are stopped");
    unchanged("two");
    assert_eq!(unit_state(&container, "is-active", &socket), "active");
    container.run(&["systemctl", "stop", &socket, &service]).expect("the units are stopped");
    unchanged("three");
    container.run(&["systemctl", "disable", &socket]).expect("the unit is disabled");
    unchanged("one");
    assert_eq!(unit_state(&container, "is-enabled", &socket), "disabled");
    container.run(&["systemctl", "enable", "--now", &socket]).expect("the unit is enabled");
    container.ask("/");
    let pid = main_pid(&container);
    container.run(&["systemctl", "mask", &service]).expect("the unit is masked");
    let output = unchanged("two");
    assert!(output.contains(&format!("{service} is masked, so it was not upgraded")), "{output}");
    assert_eq!(
        (unit_state(&container, "is-enabled", &service), main_pid(&container)),
        ("masked".into(), pid)
    );
    container.run(&["systemctl", "stop", &socket, &service]).expect("the units are stopped");
    container.run(&["systemctl", "mask", &socket]).expect("the unit is masked");
    unchanged("three");
    assert_eq!(unit_state(&container, "is-enabled", &socket), "masked");
}

fn upgrade_reloads_the_instances(systemd: Systemd) {
    let container = serving(systemd);
    let recipe = crate::pid1::recipe("instances", "sh");
    container.run(&["sh", "-ec", &recipe]).expect("the commands of docs/recipes/instances.md succeed");
    let target = Target::Tcp(SocketAddr::from(([127, 0, 0, 1], 8081)));
    let generation = async || {
        let mut connection = Connection::open(&target).await.expect("the port is open");
        connection.ask(&get("/")).await.expect("the request is answered").text()
    };
    assert!(container.inside(generation).contains("generation 1,"));
    let mut running = light_load(&container);
    running.0.push(Load::paced(&target).start(container.enter()));
    install(&container, "two");
    assert!(container.inside(generation).contains("generation 2,"));
    assert!(container.ask("/").contains("generation 2,"));
    assert_no_client_impact(running);
}

fn upgraded_process_runs_the_installed_file(systemd: Systemd) {
    let container = serving(systemd);
    install(&container, "two");
    assert_runs_installed_binary(&container);
    // needrestart lists processes whose files were replaced.
    let output = container.run(&["needrestart", "-b", "-r", "l"]).expect("needrestart succeeds");
    assert!(!output.contains(NAME), "{output}");
}

fn systemctl_sets_what_is_logged_and_a_reload_keeps_it(systemd: Systemd) {
    let container = serving(systemd);
    let service = container.unit("service");
    let get = |what: &str| {
        let output = container.command(&["systemctl", what, &service]).output().expect("systemctl runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let set = |what: &str, to: &str| container.run(&["systemctl", what, &service, to]);
    // Waits until the main process owns the bus name, so that a former process cannot answer.
    let assert_settings = |level: &str, target: &str| {
        wait_until("the main process owns the bus name", || {
            let owner = container.run(&["busctl", "status", &format!("local.{NAME}")]).unwrap_or_default();
            owner.lines().any(|line| line == format!("PID={}", main_pid(&container)))
        });
        assert_eq!((get("service-log-level"), get("service-log-target")), (level.into(), target.into()));
    };
    assert_settings("info", "journal");
    set("service-log-level", "debug").expect("systemctl succeeds");
    set("service-log-target", "console").expect("systemctl succeeds");
    assert_settings("debug", "console");
    container.systemctl("reload").expect("the reload succeeds");
    assert_settings("debug", "console");
    let failed = set("service-log-level", "loud").expect_err("the level does not exist");
    assert!(failed.to_string().contains("loud"), "{failed}");
    set("service-log-target", "kmsg").expect_err("kmsg is not supported");
    set("service-log-target", "auto").expect("systemctl succeeds");
    assert_settings("debug", "journal");
    let name = format!("local.{NAME}");
    let as_nobody = ["runuser", "-u", "nobody", "--", "busctl", "set-property", &name];
    let level = ["/org/freedesktop/LogControl1", "org.freedesktop.LogControl1", "LogLevel", "s", "info"];
    let denied =
        container.run(&[&as_nobody[..], &level].concat()).expect_err("only root may set the property");
    assert!(denied.to_string().contains("denied"), "{denied}");
    // A start uses the configuration, and so does a reload if nothing was set over the bus.
    container.systemctl("restart").expect("the restart succeeds");
    assert_settings("info", "journal");
    let variable = format!("{}_LOG", NAME.to_uppercase().replace('-', "_"));
    container
        .write(&format!("etc/default/{NAME}"), &format!("{variable}=warn\n"))
        .expect("the file is written");
    container.systemctl("reload").expect("the reload succeeds");
    assert_settings("warning", "journal");
    // Without a bus the service starts too.
    container.run(&["systemctl", "stop", "dbus.socket", "dbus.service"]).expect("the units are stopped");
    container.systemctl("restart").expect("the restart succeeds");
    assert!(container.ask("/").contains("generation"));
}

fn removal_drains_and_purge_leaves_no_file(systemd: Systemd) {
    let container = boot(systemd);
    let files = || -> BTreeSet<String> {
        let command = [
            "find",
            "/",
            "-xdev",
            "(",
            "-path",
            "/var/lib/dpkg",
            "-o",
            "-path",
            "/var/log",
            ")",
            "-prune",
            "-o",
            "-print",
        ];
        container.run(&command).expect("the files are listed").lines().map(str::to_owned).collect()
    };
    container.run(&["systemctl", "is-system-running", "--wait"]).unwrap_or_default();
    let before = files();
    install(&container, "one");
    let socket = container.unit("socket");
    container.inside(|| async {
        let mut slow = Connection::open(&Container::target()).await.expect("the port is open");
        slow.send(&get("/sleep?duration=5s")).await.expect("the bytes are sent");
        container.wait_for_property("StatusText", |status| status.contains("1 in flight"));
        let (succeeded, output) = dpkg(&container, &["--remove", NAME]);
        assert!(succeeded, "{output}");
        assert_eq!(slow.answer().await.expect("the request in flight is answered").text(), "slept 5s\n");
        assert!(Connection::open(&Container::target()).await.is_err(), "the port is open");
    });
    assert_ne!(unit_state(&container, "is-active", &socket), "active");
    assert!(container.path(&format!("etc/default/{NAME}")).exists(), "the removal removed the conffile");
    let (succeeded, output) = dpkg(&container, &["--purge", NAME]);
    assert!(succeeded, "{output}");
    wait_until("systemd no longer knows the socket unit", || {
        unit_state(&container, "is-enabled", &socket) != "enabled"
    });
    // A created system user stays, as is usual in Debian, and so do the backups of /etc/passwd and the like.
    let of_users =
        |file: &String| file.starts_with("/etc/") && (file.ends_with('-') || file.ends_with("/.pwd.lock"));
    let left: Vec<_> = files().difference(&before).filter(|file| !of_users(file)).cloned().collect();
    assert!(left.is_empty(), "{left:?}");
    // Another install has the same result as the first.
    install(&container, "two");
    assert_eq!(unit_state(&container, "is-enabled", &socket), "enabled");
    assert!(container.ask("/").contains("generation 1"));
}
