//! The file of `--config` in a process that serves: at a start, over reloads, and what `check` prints about it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;
use testkit::block_on;
use testkit::client::{Connection, get};
use testkit::process::terminate;
use testkit::service::{Service, command, run_to_end};

use crate::reload::{end, pid_of_generation, process_on, reload};
use crate::{NAME, app_binary};

/// A folder for the file and the takeover socket.
struct Folder(TempDir);

impl Folder {
    fn new(config: &str) -> Self {
        let folder = Self(tempfile::tempdir().expect("a temporary folder is made"));
        folder.write(config);
        folder
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("app.toml")
    }

    fn write(&self, config: &str) {
        fs::write(self.path(), config).expect("the file is written");
    }

    fn flags(&self) -> [String; 2] {
        ["--config".into(), self.path().display().to_string()]
    }

    fn start(&self) -> Service {
        let flags = self.flags();
        let flags = flags.each_ref().map(String::as_str);
        Service::start_in(app_binary(), &flags, self.0.path()).expect("the service starts")
    }

    /// Runs the takeover command with the options of the service.
    fn reload(&self, service: &Service) -> (Option<i32>, String) {
        let flags = self.flags();
        reload(self.0.path(), &service.notifications.path(), &flags.each_ref().map(String::as_str))
    }
}

/// What `/sleep` answers, which contains the option --nap.
async fn slept(connection: &mut Connection) -> String {
    connection.ask(&get("/sleep")).await.expect("the server answers").text()
}

/// A connection to the process of this generation, and its pid. If the old process accepted it just
/// before the end of the reload, it is handed over before it is returned.
async fn next(service: &Service, wanted: u64) -> (Connection, i32) {
    let mut connection = service.connect().await;
    let pid = pid_of_generation(&mut connection, wanted).await;
    (connection, pid)
}

#[test]
fn reload_applies_a_changed_file() {
    let folder = Folder::new("nap = \"1ms\"\n");
    let service = folder.start();
    block_on(async {
        let mut connection = service.connect().await;
        assert_eq!(slept(&mut connection).await, "slept 1ms\n");
        folder.write("nap = \"2ms\"\n");
        assert_eq!(slept(&mut connection).await, "slept 1ms\n");
        let (code, log) = folder.reload(&service);
        assert_eq!(code, Some(0), "{log}");
        let (mut next, pid) = next(&service, 2).await;
        assert_eq!(slept(&mut next).await, "slept 2ms\n");
        end(pid);
    });
}

#[test]
fn sighup_applies_a_changed_file() {
    let folder = Folder::new("nap = \"1ms\"\n");
    let mut service = folder.start();
    folder.write("nap = \"2ms\"\n");
    service.signal(Signal::HUP);
    let main = service.notifications.wait_for("MAINPID=").expect("a successor takes over");
    block_on(async {
        let (mut next, _) = next(&service, 2).await;
        assert_eq!(slept(&mut next).await, "slept 2ms\n");
    });
    terminate(main.trim_start_matches("MAINPID=")).expect("the process runs");
}

#[test]
fn reload_fails_with_an_invalid_file_and_the_old_process_keeps_serving() {
    let folder = Folder::new("nap = \"1ms\"\n");
    let mut service = folder.start();
    folder.write("nap = \"2ms\"\ndrian-timeout = \"1s\"\n");
    let reason = format!("{}:2: unknown key \"drian-timeout\"", folder.path().display());
    block_on(async {
        let mut connection = service.connect().await;
        let (code, log) = folder.reload(&service);
        assert_eq!(code, Some(78), "{log}");
        assert!(log.contains(&reason), "{log}");
        service.notifications.wait_for_status(&reason).expect("the status names the reason");
        assert_eq!(slept(&mut connection).await, "slept 1ms\n");
        service.signal(Signal::HUP);
        service.notifications.wait_for("READY=1").expect("READY=1 follows the failed reload");
        assert_eq!(process_on(&mut connection).await, (service.pid(), 1));
        folder.write("nap = \"3ms\"\n");
        let (code, log) = folder.reload(&service);
        assert_eq!(code, Some(0), "{log}");
        let (mut next, pid) = next(&service, 2).await;
        assert_eq!(slept(&mut next).await, "slept 3ms\n");
        end(pid);
    });
}

#[test]
fn check_prints_each_option_with_its_origin_before_the_listeners() {
    let folder = Folder::new("nap = \"1ms\"\ndrain-timeout = \"5s\"\nhead-timeout = \"6s\"\n");
    let [config, path] = folder.flags();
    let mut check = command(app_binary(), &["check", "--listen", "127.0.0.1:0", "--drain-timeout", "7s"]);
    let variable = format!("{}_HEAD_TIMEOUT", NAME.to_uppercase());
    let (code, output, log) =
        run_to_end(check.args([&config, &path]).env(&variable, "8s")).expect("the process ends");
    assert_eq!(code, Some(0), "{log}");
    let words: Vec<Vec<&str>> = output.lines().map(|line| line.split_whitespace().collect()).collect();
    let file = format!("{path}:1");
    for line in [
        &["nap", "1ms", "file", &file][..],
        &["listen", "127.0.0.1:0", "flag"],
        &["drain-timeout", "7s", "flag"],
        &["head-timeout", "8s", "variable", &variable],
        &["body-limit", "2MiB", "default"],
        &["tls-cert", "-", "default"],
        &["config", &path, "flag"],
    ] {
        assert!(words.iter().any(|words| words == line), "{line:?} is not in {output}");
    }
    assert!(
        output.lines().last().is_some_and(|line| line.starts_with("ready to serve on http(")),
        "{output}"
    );
}

#[test]
fn file_can_be_named_by_a_variable_and_an_invalid_one_is_refused_in_one_line() {
    let folder = Folder::new("drain-timeout = \"soon\"\n");
    let path = folder.path().display().to_string();
    let variable = format!("{}_CONFIG", NAME.to_uppercase());
    for arguments in [&[][..], &["check"], &["takeover"]] {
        let mut command = command(app_binary(), arguments);
        let (code, output, log) = run_to_end(command.env(&variable, &path)).expect("the process ends");
        assert_eq!((code, output.as_str()), (Some(78), ""), "{log}");
        let reason = "invalid value 'soon' for \"drain-timeout\": expected a time such as 30s or 1m";
        assert_eq!(log, format!("{NAME}: {path}:1: {reason}\n"));
    }
    let mut help = command(app_binary(), &["--help"]);
    let (code, output, log) = run_to_end(help.env(&variable, &path)).expect("the process ends");
    assert!(code == Some(0) && output.contains("--config <FILE>"), "{log}");
}

#[test]
fn empty_path_of_config_is_refused_by_its_option_and_variable() {
    let reason = "a value is required for '--config <FILE>' but none was supplied; see --help";
    let refused = |command: &mut Command| {
        let (code, _, log) = run_to_end(command).expect("the process ends");
        assert_eq!(code, Some(78), "{log}");
        log
    };
    let log = refused(&mut command(app_binary(), &["--config", ""]));
    assert_eq!(log, format!("{NAME}: {reason}\n"));
    let variable = format!("{}_CONFIG", NAME.to_uppercase());
    let log = refused(command(app_binary(), &["check"]).env(&variable, ""));
    assert_eq!(log, format!("{NAME}: {variable}: {reason}\n"));
}

#[test]
fn fifo_as_file_is_refused_at_once() {
    let folder = Folder::new("");
    let path = folder.0.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).expect("the FIFO is made");
    let path = path.display().to_string();
    let (code, _, log) =
        run_to_end(&mut command(app_binary(), &["--config", &path])).expect("the process ends");
    assert_eq!(code, Some(78), "{log}");
    assert_eq!(log, format!("{NAME}: could not read {path} (--config): expected a regular file\n"));
}
