//! A copy of this repo under another name is a service of its own.

use std::path::Path;
use std::process::Command;

use harness::client::{Connection, Target, get};
use harness::process::Process;
use rustix::process::Signal;

const FOLDER: &str = env!("CARGO_MANIFEST_DIR");
const OLD_NAME: &str = env!("CARGO_PKG_NAME");
const NEW_NAME: &str = "shop-front";

fn run(command: &mut Command) -> String {
    let output = command.output().expect("started");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

fn copy(to: &Path) {
    let mut make = Command::new("make");
    make.args(["--silent", "new", &format!("NAME={NEW_NAME}"), &format!("DIR={}", to.display())]);
    run(make.current_dir(FOLDER).env_remove("MAKEFLAGS"));
}

#[test]
fn a_copy_has_nothing_of_the_old_name_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let copied = folder.path().join("copy");
    copy(&copied);
    // `app.rs` and `app::` are a room of the house, not the package.
    let words = format!(r"\b{OLD_NAME}\b(?!\.rs|::|;)|\b{}_", OLD_NAME.to_uppercase().replace('-', "_"));
    let found = Command::new("grep").args(["-rnP", &words, "."]).current_dir(&copied).output().expect("grep");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    for kind in ["service", "socket"] {
        assert!(copied.join(format!("systemd/{NEW_NAME}.{kind}")).exists());
        assert!(!copied.join(format!("systemd/{OLD_NAME}.{kind}")).exists());
    }
}

#[test]
fn a_copy_builds_and_passes_its_tests() {
    let folder = tempfile::tempdir().expect("a folder");
    let copied = folder.path().join("copy");
    copy(&copied);
    let mut cargo = Command::new(env!("CARGO"));
    // What was compiled for this repo is good for the copy.
    cargo.args(["test", "--bins", "--test", "contract", "--locked", "--offline"]);
    cargo.env("CARGO_TARGET_DIR", Path::new(FOLDER).join("target")).current_dir(&copied);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_")) {
        if !["CARGO_HOME", "CARGO_TARGET_DIR"].contains(&name.as_str()) {
            cargo.env_remove(name);
        }
    }
    let said = run(&mut cargo);
    assert_eq!(said.matches("test result: ok").count(), 2, "{said}");
}

#[test]
fn make_dev_starts_what_was_changed_and_the_socket_stays_open() {
    let folder = tempfile::tempdir().expect("a folder");
    let copied = folder.path().join("copy");
    copy(&copied);
    let address = harness::free_address();
    let mut make = Command::new("make");
    // systemfd is installed once, here.
    let path = format!("{}:{FOLDER}/target/tools/bin", std::env::var("PATH").expect("a PATH"));
    make.args(["--silent", "dev", &format!("DEV={address}")]).current_dir(&copied);
    make.env("CARGO_TARGET_DIR", Path::new(FOLDER).join("target")).env("PATH", path).env_remove("MAKEFLAGS");
    let make = Process::spawn(&mut make).expect("make dev");
    let target = Target::Tcp(address);
    let ask = || {
        harness::block_on(async {
            let mut connection = Connection::open(&target).await.ok()?;
            Some(connection.ask(&get("/")).await.ok()?.text())
        })
    };
    harness::eventually("the first build", || ask().is_some_and(|text| text.starts_with("pid ")));
    let routes = copied.join("src/app.rs");
    let source = std::fs::read_to_string(&routes).expect("the routes");
    // What does not compile changes nothing; what does is there soon, and until then nothing is refused.
    std::fs::write(&routes, source.replace("pid {pid}", "PID {pid")).expect("written");
    std::fs::write(&routes, source.replace("pid {pid}", "PID {pid}")).expect("written");
    harness::eventually("the change", || ask().expect("never refused").starts_with("PID "));
    make.signal(Signal::TERM);
}

#[test]
fn a_name_that_cargo_or_systemd_would_not_take_is_refused() {
    for (name, folder) in
        [("", "/tmp/x"), ("Shop", "/tmp/x"), ("a b", "/tmp/x"), ("shop", ""), ("shop", "/tmp")]
    {
        let mut make = Command::new("make");
        make.args(["--silent", "new", &format!("NAME={name}"), &format!("DIR={folder}")]);
        let refused = make.current_dir(FOLDER).env_remove("MAKEFLAGS").output().expect("make");
        assert!(!refused.status.success(), "NAME={name} DIR={folder}");
    }
}

#[test]
fn uninstall_removes_all_that_install_brought() {
    let folder = tempfile::tempdir().expect("a folder");
    let make = |goal: &str| {
        let mut make = Command::new("make");
        make.args(["--silent", goal, "PREFIX=/usr", &format!("DESTDIR={}", folder.path().display())]);
        make.arg(format!("BINARY={}", env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME")))));
        run(make.current_dir(FOLDER).env_remove("MAKEFLAGS"));
        let mut find = Command::new("find");
        run(find.args([".", "-type", "f"]).current_dir(folder.path()))
    };
    let installed = make("install");
    for file in ["usr/bin/NAME", "usr/lib/systemd/system/NAME.service", "usr/lib/systemd/system/NAME.socket"]
    {
        assert!(installed.contains(&file.replace("NAME", OLD_NAME)), "{installed}");
    }
    assert_eq!(make("uninstall"), "");
}
