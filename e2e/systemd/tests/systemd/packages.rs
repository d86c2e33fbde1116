//! The life of a package, on real Debians: what an upgrade does to the clients of the service, and what is left when a
//! package has gone.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Result;
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::debian::{append, built_package, later_release, run};
use testkit::load::{Load, Running};
use testkit::{exclusive_cpu, on_each_debian, wait_until};

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

#[test]
fn lintian_reports_nothing() {
    // Each exception, and why.
    let exceptions = [
        // Whoever copies this has an address.
        "bogus-mail-host",
        "bogus-mail-host-in-debian-changelog",
        // Debian's helpers know no takeover.
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

/// Debian has rpm too, though no system of Fedora's.
#[test]
fn rpm_is_installed_upgraded_refused_and_removed_under_load() {
    let container =
        Container::boot_debian(Systemd::V252, app_package(), &build_rpms()).expect("the container boots");
    let rpm = |arguments: &[&str]| {
        let output =
            container.command(&[&["rpm", "--nodeps"], arguments].concat()).output().expect("rpm runs");
        (output.status.success(), stdout_and_stderr(&output))
    };
    let (is_done, said) = rpm(&["--install", "/packages/one.rpm"]);
    assert!(is_done, "{said}");
    let [socket, service] = ["socket", "service"].map(|kind| container.unit(kind));
    assert_eq!(is(&container, "is-enabled", &socket), "enabled", "as presets say: {said}");
    container.run(&["systemctl", "start", &socket]).expect("the socket starts");
    container.ask("/");
    let running = under_load(&container);
    let pid = main_pid(&container);
    let (is_done, said) = rpm(&["--upgrade", "/packages/two.rpm"]);
    assert!(is_done && main_pid(&container) != pid, "{said}");
    assert_runs_installed_binary(&container);
    let pid = main_pid(&container);
    let (_, said) = rpm(&["--upgrade", "/packages/broken.rpm"]);
    assert!(said.contains("the new version failed to start; the old process keeps serving"), "{said}");
    assert_eq!(main_pid(&container), pid, "{said}");
    let (is_done, said) = rpm(&["--upgrade", "--oldpackage", "/packages/one.rpm"]);
    assert!(is_done && main_pid(&container) != pid, "{said}");
    assert_runs_installed_binary(&container);
    assert_no_client_impact(running);
    let (is_done, said) = rpm(&["--erase", NAME]);
    assert!(is_done, "{said}");
    assert_ne!(is(&container, "is-active", &service), "active");
    container.inside(|| async {
        assert!(Connection::open(&Container::target()).await.is_err(), "the port is closed");
    });
    let find = ["find", "/etc", "/usr", "/run", "-name", &format!("{NAME}*"), "!", "-name", "app.slice"];
    assert_eq!(container.run(&find).expect("the files are listed"), "");
}

// ---- packages ----

/// The folder of all releases: `one.deb`, and what follows it. Built once for the systemds before 254, which lack the
/// drop-in, and once for all others.
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
    // Compression takes longer than all else.
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

/// They are all made in one folder.
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

// ---- a machine ----

fn boot(systemd: Systemd) -> Container {
    Container::boot_debian(systemd, app_package(), packages(systemd)).expect("the container boots")
}

/// What `dpkg` says, whether it does what it is told or not.
fn dpkg(container: &Container, arguments: &[&str]) -> (bool, String) {
    let output = container.command(&[&["dpkg"], arguments].concat()).output().expect("dpkg runs");
    (output.status.success(), stdout_and_stderr(&output))
}

fn install(container: &Container, release: &str) -> String {
    let (is_done, said) = dpkg(container, &["--install", &format!("/packages/{release}.deb")]);
    assert!(is_done, "{release}: {said}");
    said
}

fn is(container: &Container, state: &str, unit: &str) -> String {
    let output = container.command(&["systemctl", state, unit]).output().expect("systemctl runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// With the first release serving.
fn serving(systemd: Systemd) -> Container {
    let container = boot(systemd);
    install(&container, "one");
    container.ask("/");
    container
}

fn main_pid(container: &Container) -> String {
    container.show("MainPID").expect("systemctl show succeeds")
}

/// As long as this is the same, nothing was started anew.
fn invocation(container: &Container) -> String {
    container.show("InvocationID").expect("systemctl show succeeds")
}

/// Loads at work, and the machine where they have it to themselves.
type UnderLoad = (Vec<Running>, Option<MutexGuard<'static, ()>>);

/// All that a client can be, flat out.
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

/// Connections that are kept, by some clients that think.
fn light_load(container: &Container) -> UnderLoad {
    let target = Container::target();
    let some = |load| Load { clients: 10, think: Duration::from_millis(20), ..load };
    let loads = [Load::paced(&target), Load::paced_blind(&target)].map(some);
    (loads.map(|load| load.start(container.enter())).into(), None)
}

/// Nothing was lost, and no connection closed.
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

// ---- the promises ----

fn install_opens_the_port_and_the_first_request_starts_the_service(systemd: Systemd) {
    let container = boot(systemd);
    let said = install(&container, "one");
    let [socket, service] = ["socket", "service"].map(|kind| container.unit(kind));
    assert_eq!(is(&container, "is-enabled", &socket), "enabled", "{said}");
    assert_eq!(is(&container, "is-active", &socket), "active", "{said}");
    assert_eq!(is(&container, "is-active", &service), "inactive", "{said}");
    for other in ["tls", "admin"] {
        assert_eq!(is(&container, "is-enabled", &format!("{NAME}-{other}.socket")), "disabled");
    }
    assert!(container.ask("/").contains("generation 1"));
    // As a boot does it.
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
    assert_eq!(is(&container, "is-enabled", &socket), "enabled");
    assert_eq!(is(&container, "is-active", &socket), "inactive");
    container.run(&["systemctl", "start", &socket]).expect("the socket starts");
    container.ask("/");
    let pid = main_pid(&container);
    install(&container, "two");
    assert_eq!(main_pid(&container), pid, "no reload either");

    let container = boot(systemd);
    container.write("etc/systemd/system-preset/00-none.preset", "disable *\n").expect("the file is written");
    install(&container, "one");
    assert_eq!(is(&container, "is-enabled", &socket), "disabled");
    assert_eq!(is(&container, "is-active", &socket), "inactive");
}

fn install_without_systemd_prints_nothing_about_systemd(systemd: Systemd) {
    let container = boot(systemd);
    let mut said = String::new();
    for release in ["one", "two"] {
        let command = format!(
            "mount -t tmpfs none /run && mount --bind /dev/null /usr/bin/systemctl &&
             dpkg --install /packages/{release}.deb 2>&1"
        );
        said += &container.run(&["unshare", "--mount", "sh", "-c", &command]).expect("dpkg succeeds");
    }
    let unit_words = ["systemd", "systemctl", "reload", "warning", "error"];
    assert!(unit_words.iter().all(|word| !said.contains(word)), "{said}");
    assert_eq!(container.run(&[NAME, "--version"]).expect("the process runs"), format!("{NAME} 0.1.0\n"));
}

fn upgrades_and_a_downgrade_under_load_have_no_client_impact(systemd: Systemd) {
    let container = serving(systemd);
    let running = under_load(&container);
    let begun = invocation(&container);
    let mut pids = BTreeSet::from([main_pid(&container)]);
    for release in ["two", "three", "one", "two"] {
        let said = install(&container, release);
        assert!(pids.insert(main_pid(&container)), "no takeover: {said}");
        assert!(!said.contains("unit files have changed"), "{said}");
        assert_runs_installed_binary(&container);
    }
    assert_eq!(invocation(&container), begun, "reloaded, not restarted");
    assert_no_client_impact(running);
}

fn upgrade_with_changed_units_prints_a_hint_and_does_not_restart(systemd: Systemd) {
    let container = serving(systemd);
    let running = light_load(&container);
    let begun = invocation(&container);
    let said = install(&container, "units");
    let told: Vec<_> = said.lines().filter(|line| line.contains("unit files have changed")).collect();
    assert!(matches!(told[..], [line] if line.contains(&format!("systemctl restart {NAME}"))), "{said}");
    assert_eq!(container.show("NeedDaemonReload").expect("systemctl show succeeds"), "no");
    assert_eq!(invocation(&container), begun, "reloaded, not restarted");
    assert_eq!(container.show("LimitCORE").expect("systemctl show succeeds"), "0");
    assert_no_client_impact(running);
}

fn failed_upgrade_keeps_the_old_process_until_a_good_release(systemd: Systemd) {
    let container = serving(systemd);
    let running = light_load(&container);
    let pid = main_pid(&container);
    let (is_done, said) = dpkg(&container, &["--install", "/packages/broken.deb"]);
    assert!(
        !is_done && said.contains("the new version failed to start; the old process keeps serving"),
        "{said}"
    );
    assert_eq!(main_pid(&container), pid, "{said}");
    let (is_done, _) = dpkg(&container, &["--configure", "--pending"]);
    assert!(!is_done, "it is as broken as before");
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
    let (is_done, said) = dpkg(&container, &["--install", "/packages/two.deb"]);
    assert!(!is_done, "{said}");
    assert!(said.contains(&format!("/{conffile}:3:{variable}=soon")), "{said}");
    assert!(said.contains("invalid value 'soon'"), "{said}");
    assert_eq!(main_pid(&container), pid);
    // What cannot be read is not passed over.
    fs::remove_file(container.path(&conffile)).expect("the file is removed");
    fs::create_dir(container.path(&conffile)).expect("the folder is created");
    let (is_done, said) = dpkg(&container, &["--configure", "--pending"]);
    assert!(!is_done && said.contains(&format!("/{conffile}: ")), "{said}");
    assert_eq!(main_pid(&container), pid);
    fs::remove_dir(container.path(&conffile)).expect("the folder is removed");
    container.write(&conffile, &format!("{variable}=5min\n")).expect("the file is written");
    let (is_done, said) = dpkg(&container, &["--configure", "--pending"]);
    assert!(is_done, "{said}");
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
    let (is_done, said) = dpkg(&container, &["--install", "/packages/two.deb"]);
    assert!(!is_done && said.contains("No space left"), "{said}");
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
    // With a unit that is masked while it runs systemd forgets NotifyAccess=, refuses the service's messages, and ends
    // it when the watchdog's time is over. Here it is to run for as long as the test takes.
    container
        .add_to_unit("service", "watchdog", "[Service]\nWatchdogSec=0\n")
        .expect("the drop-in is written");
    let states = || {
        let units = [&socket, &service];
        [
            units.map(|unit| is(&container, "is-active", unit)),
            units.map(|unit| is(&container, "is-enabled", unit)),
        ]
    };
    let unchanged = |release: &str| {
        let before = states();
        let said = install(&container, release);
        assert_eq!(states(), before, "{release}");
        said
    };
    container.run(&["systemctl", "stop", &service]).expect("the units are stopped");
    unchanged("two");
    assert_eq!(is(&container, "is-active", &socket), "active");
    container.run(&["systemctl", "stop", &socket, &service]).expect("the units are stopped");
    unchanged("three");
    container.run(&["systemctl", "disable", &socket]).expect("the unit is disabled");
    unchanged("one");
    assert_eq!(is(&container, "is-enabled", &socket), "disabled");
    container.run(&["systemctl", "enable", "--now", &socket]).expect("the unit is enabled");
    container.ask("/");
    let pid = main_pid(&container);
    container.run(&["systemctl", "mask", &service]).expect("the unit is masked");
    let said = unchanged("two");
    assert!(said.contains(&format!("{service} is masked, so it was not upgraded")), "{said}");
    assert_eq!((is(&container, "is-enabled", &service), main_pid(&container)), ("masked".into(), pid));
    container.run(&["systemctl", "stop", &socket, &service]).expect("the units are stopped");
    container.run(&["systemctl", "mask", &socket]).expect("the unit is masked");
    unchanged("three");
    assert_eq!(is(&container, "is-enabled", &socket), "masked");
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
    // What runs from a file that has gone: nothing of ours.
    let said = container.run(&["needrestart", "-b", "-r", "l"]).expect("needrestart succeeds");
    assert!(!said.contains(NAME), "{said}");
}

fn systemctl_sets_what_is_logged_and_a_reload_keeps_it(systemd: Systemd) {
    let container = serving(systemd);
    let service = container.unit("service");
    let say = |what: &str| {
        let output = container.command(&["systemctl", what, &service]).output().expect("systemctl runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let set = |what: &str, to: &str| container.run(&["systemctl", what, &service, to]);
    // The main process's, and no former one's.
    let is = |level: &str, target: &str| {
        wait_until("the bus has asked the main process", || {
            let owner = container.run(&["busctl", "status", &format!("local.{NAME}")]).unwrap_or_default();
            owner.lines().any(|line| line == format!("PID={}", main_pid(&container)))
        });
        assert_eq!((say("service-log-level"), say("service-log-target")), (level.into(), target.into()));
    };
    is("info", "journal");
    set("service-log-level", "debug").expect("systemctl succeeds");
    set("service-log-target", "console").expect("systemctl succeeds");
    is("debug", "console");
    container.systemctl("reload").expect("the reload succeeds");
    is("debug", "console");
    let failed = set("service-log-level", "loud").expect_err("the level does not exist");
    assert!(failed.to_string().contains("loud"), "{failed}");
    set("service-log-target", "kmsg").expect_err("kmsg is not supported");
    set("service-log-target", "auto").expect("systemctl succeeds");
    is("debug", "journal");
    let name = format!("local.{NAME}");
    let by_nobody = ["runuser", "-u", "nobody", "--", "busctl", "set-property", &name];
    let level = ["/org/freedesktop/LogControl1", "org.freedesktop.LogControl1", "LogLevel", "s", "info"];
    let denied =
        container.run(&[&by_nobody[..], &level].concat()).expect_err("only root may set the property");
    assert!(denied.to_string().contains("denied"), "{denied}");
    // A start begins with what the configuration says; so does a reload where nothing was set.
    container.systemctl("restart").expect("the restart succeeds");
    is("info", "journal");
    let variable = format!("{}_LOG", NAME.to_uppercase().replace('-', "_"));
    container
        .write(&format!("etc/default/{NAME}"), &format!("{variable}=warn\n"))
        .expect("the file is written");
    container.systemctl("reload").expect("the reload succeeds");
    is("warning", "journal");
    // No bus: nothing is said of it.
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
        let (is_done, said) = dpkg(&container, &["--remove", NAME]);
        assert!(is_done, "{said}");
        assert_eq!(slow.answer().await.expect("the request in flight is answered").text(), "slept 5s\n");
        assert!(Connection::open(&Container::target()).await.is_err(), "the port is closed");
    });
    assert_ne!(is(&container, "is-active", &socket), "active");
    assert!(container.path(&format!("etc/default/{NAME}")).exists(), "a removal keeps the configuration");
    let (is_done, said) = dpkg(&container, &["--purge", NAME]);
    assert!(is_done, "{said}");
    wait_until("units are forgotten", || is(&container, "is-enabled", &socket) != "enabled");
    // A user that was made stays, as Debian has it, and so do the copies that this makes of its lists.
    let of_users =
        |file: &String| file.starts_with("/etc/") && (file.ends_with('-') || file.ends_with("/.pwd.lock"));
    let left: Vec<_> = files().difference(&before).filter(|file| !of_users(file)).cloned().collect();
    assert!(left.is_empty(), "{left:?}");
    // It comes back as it came first.
    install(&container, "two");
    assert_eq!(is(&container, "is-enabled", &socket), "enabled");
    assert!(container.ask("/").contains("generation 1"));
}
