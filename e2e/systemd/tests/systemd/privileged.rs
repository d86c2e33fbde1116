//! Tests of the binary without systemd that need root.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use testkit::frames::{connect_takeover_socket, recv_message};
use testkit::process::{Process, copy_program};
use testkit::service::command;
use testkit::wait_until;

use crate::app_binary;

/// A shell below a unit, such as a terminal or a CI runner, has `INVOCATION_ID` too, so the variable does not mean that
/// systemd passes sockets. The process has its own network namespace, because the default port may be in use.
#[test]
fn start_from_a_shell_below_a_unit_listens_on_the_default_address() {
    let mut command = command("unshare", &["--net", app_binary()]);
    command.env("INVOCATION_ID", "0123456789abcdef0123456789abcdef").env("SYSTEMD_EXEC_PID", "1");
    let mut process = Process::spawn(&mut command).expect("the service starts");
    let sockets = format!("/proc/{}/net/tcp", process.child().id());
    wait_until("127.0.0.1:8080 listens", || {
        std::fs::read_to_string(&sockets)
            .is_ok_and(|sockets| sockets.contains("0100007F:1F90 00000000:0000 0A"))
    });
    process.signal(Signal::TERM);
    assert!(process.wait().expect("the process ends").success());
}

#[test]
fn takeover_connection_of_another_user_is_rejected() {
    let folder = tempfile::tempdir().expect("the folder is created");
    let other_user = 65_534;
    std::os::unix::fs::chown(folder.path(), Some(other_user), Some(other_user))
        .expect("the test runs as root");
    let readable = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755));
    // A copy that this user can read.
    let binary = folder.path().join("copy");
    copy_program(Path::new(app_binary()), &binary).expect("the file is copied");
    readable(folder.path()).and_then(|()| readable(&binary)).expect("the mode is set");
    let address = format!("unix:@rejected-{}", std::process::id());
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--clear-groups"]).arg(&binary).args(["--listen", &address]);
    command.env("RUNTIME_DIRECTORY", folder.path()).stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command).expect("the service starts");
    wait_until("the takeover socket exists", || folder.path().join("takeover").exists());
    let channel = connect_takeover_socket(folder.path());
    assert_eq!(recv_message(&channel), None);
    process.signal(Signal::TERM);
    process.wait().expect("the process ends");
    let mut log = String::new();
    let mut stderr = process.child().stderr.take().expect("the stream is piped");
    std::io::Read::read_to_string(&mut stderr, &mut log).expect("the file is readable");
    assert!(log.contains("rejected a takeover connection from another user"), "{log}");
}
