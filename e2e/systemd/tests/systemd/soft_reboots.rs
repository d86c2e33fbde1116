//! `systemctl soft-reboot` with the units of docs/recipes/soft-reboot.md, which each test takes from there. 252 has no
//! soft-reboot, so the tests run on 257 and on the newest.

use std::path::Path;

use testkit::certificate::Certificate;
use testkit::client::{Connection, Http2, Target, WEBSOCKET, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::{on_one, wait_until};

use crate::on_systemd::ask_admin;
use crate::{FOLDER, app_package, tls_target};

/// A message of a client in two frames, masked with zeros, and the frame that the service sends back.
const FRAGMENTS: [&[u8]; 2] = [b"\x01\x81\0\0\0\0h", b"\x80\x81\0\0\0\0i"];
const ECHO: &[u8] = b"\x81\x02hi";
// Not on this machine's systemd, which may be too old for soft-reboots.
on_one! { from_257_on_systemd_257 V257
    connections_survive_a_soft_reboot
    new_connections_wait_during_a_soft_reboot
    stop_with_the_recipe_closes_connections
    restart_and_crash_with_the_recipe_keep_connections
}
on_one! { from_257_on_systemd_unstable Unstable
    connections_survive_a_soft_reboot
    new_connections_wait_during_a_soft_reboot
    stop_with_the_recipe_closes_connections
    restart_and_crash_with_the_recipe_keep_connections
}

/// A container whose service serves TLS too, after the commands of the recipe.
fn boot(systemd: Systemd, certificate: &Certificate) -> Container {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.enable_tls(certificate).expect("TLS is enabled");
    container.start_socket("admin").expect("the socket unit starts");
    // The target that the soft-reboot starts at its end contains only enabled units.
    container.run(&["systemctl", "enable", "app-tls.socket"]).expect("the unit is enabled");
    // These folders belong to the root file system elsewhere. Here they are mounts, which a soft-reboot would unmount.
    for mount in ["usr-local", "etc-systemd-system", r"etc-systemd-system\x2dpreset"] {
        let path = format!("run/systemd/system/{mount}.mount.d/keep.conf");
        container.write(&path, "[Unit]\nDefaultDependencies=no\n").expect("the drop-in is written");
    }
    let recipe = Path::new(FOLDER).join("docs/recipes/soft-reboot.md");
    let recipe = std::fs::read_to_string(recipe).expect("the recipe is readable");
    let blocks: Vec<_> =
        recipe.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let [install, ..] = blocks[..] else { panic!("the recipe has no commands") };
    container.run(&["sh", "-ec", install]).expect("the commands of the recipe succeed");
    // The kernel command line of the container replaces the default target, which would contain this one.
    container
        .run(&["systemctl", "add-wants", "basic.target", "multi-user.target"])
        .expect("the target is wanted");
    container
}

/// Runs `systemctl soft-reboot`.
fn begin_soft_reboot(container: &Container) {
    // It may be killed before it has read the answer of PID 1.
    let _ = container.run_during_soft_reboot(&["systemctl", "soft-reboot"]);
}

/// Waits until the soft-reboot with this number has ended.
fn wait_for_soft_reboot(container: &Container, number: usize) {
    // PID 1 accepts no connection for a moment.
    wait_until("the soft-reboot has ended", || {
        let shown = container.run_during_soft_reboot(&["systemctl", "show", "-P", "SoftRebootsCount"]);
        shown.is_ok_and(|count| count.trim() == number.to_string())
            && container.show("SubState").is_ok_and(|state| state == "running")
    });
}

/// The pid in the response of the demo page.
fn pid_in(text: &str) -> String {
    let pid = text.strip_prefix("pid ").and_then(|text| text.split(',').next());
    pid.unwrap_or_else(|| panic!("no pid in {text:?}")).to_owned()
}

async fn pid(connection: &mut Connection) -> String {
    pid_in(&connection.ask(&get("/")).await.expect("the connection is open").text())
}

async fn pid_http2(connection: &mut Http2) -> String {
    let answer = connection.get("/").await.expect("the request is answered");
    pid_in(&answer.expect("the connection is open").1)
}

/// Sends the second half of a message, reads its echo, and sends the first half of the next message.
async fn echo(websocket: &mut Connection) {
    websocket.send(FRAGMENTS[1]).await.expect("the bytes are sent");
    assert_eq!(websocket.take(ECHO.len()).await.expect("the WebSocket is open"), ECHO);
    websocket.send(FRAGMENTS[0]).await.expect("the bytes are sent");
}

/// A WebSocket that has sent the first half of a message, which the next process has to know.
async fn websocket(target: &Target) -> Connection {
    let mut websocket = Connection::open(target).await.expect("the port is open");
    assert_eq!(websocket.ask(WEBSOCKET).await.expect("the request is answered").status, 101);
    websocket.send(FRAGMENTS[0]).await.expect("the bytes are sent");
    echo(&mut websocket).await;
    websocket
}

/// Connections over HTTP/1.1 and HTTP/2, with and without TLS, and WebSockets. No client connects anew.
fn connections_survive_a_soft_reboot(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot(systemd, &certificate);
    let plain = Container::target();
    let (tls_http1, tls_http2) = (tls_target(&certificate, "http/1.1"), tls_target(&certificate, "h2"));
    container.inside(async || {
        let open = async |target| Connection::open(target).await.expect("the port is open");
        let mut connections = [open(&plain).await, open(&tls_http1).await];
        let open_http2 = async |target| Http2::open(target).await.expect("the port is open");
        let mut multiplexed = [open_http2(&plain).await, open_http2(&tls_http2).await];
        let mut websockets = [websocket(&plain).await, websocket(&tls_http1).await];
        let mut busy = open(&plain).await;
        let mut unused = open(&plain).await;
        for number in 1..=2 {
            let before = container.show("MainPID").expect("systemctl show succeeds");
            for connection in &mut connections {
                assert_eq!(pid(connection).await, before);
            }
            for connection in &mut multiplexed {
                assert_eq!(pid_http2(connection).await, before);
            }
            busy.hold().await.expect("the request is in flight");
            begin_soft_reboot(&container);
            wait_until("the service stops", || {
                let show = ["systemctl", "show", "-P", "SubState", &container.unit("service")];
                container.run_during_soft_reboot(&show).is_ok_and(|state| state.trim() == "stop-sigterm")
            });
            busy.release().await.expect("the request in flight finishes");
            wait_for_soft_reboot(&container, number);
            let after = container.show("MainPID").expect("systemctl show succeeds");
            assert_ne!(before, after);
            for connection in connections.iter_mut().chain([&mut busy]) {
                assert_eq!(pid(connection).await, after);
            }
            for connection in &mut multiplexed {
                assert_eq!(pid_http2(connection).await, after);
            }
            for websocket in &mut websockets {
                echo(websocket).await;
            }
        }
        pid(&mut unused).await;
    });
}

/// They wait in the queue of the socket, although systemd cannot start the service for them meanwhile.
fn new_connections_wait_during_a_soft_reboot(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot(systemd, &certificate);
    container.ask("/");
    let kept = Load { clients: 5, ..Load::paced(&Container::target()) }.start(container.enter());
    let new =
        Load { clients: 5, ..Load::connection_per_request(&Container::target()) }.start(container.enter());
    for number in 1..=3 {
        begin_soft_reboot(&container);
        wait_for_soft_reboot(&container, number);
        // Each client has had a response from the new process.
        kept.wait_for(kept.ended() + 50);
        new.wait_for(new.ended() + 50);
    }
    let (kept, new) = (kept.stop(), new.stop());
    eprintln!("3 soft-reboots, open connections: {kept}\n3 soft-reboots, new connections: {new}");
    assert_eq!((kept.lost(), kept.connections), (0, kept.clients), "{kept}");
    assert_eq!(new.lost(), 0, "{new}");
}

fn stop_with_the_recipe_closes_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot(systemd, &certificate);
    container.inside(async || {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        pid(&mut idle).await;
        let mut websocket = websocket(&tls_target(&certificate, "http/1.1")).await;
        container.systemctl("stop").expect("the stop succeeds");
        assert_eq!(container.show("NFileDescriptorStore").expect("systemctl show succeeds"), "0");
        for connection in [&mut idle, &mut websocket] {
            assert_eq!(connection.read_more().await.unwrap_or(0), 0, "the connection is closed");
        }
    });
}

fn restart_and_crash_with_the_recipe_keep_connections(systemd: Systemd) {
    let certificate = Certificate::new().expect("the certificate is created");
    let container = boot(systemd, &certificate);
    container.inside(async || {
        let mut idle = Connection::open(&Container::target()).await.expect("the port is open");
        let first = pid(&mut idle).await;
        container.systemctl("restart").expect("the restart succeeds");
        let second = pid(&mut idle).await;
        assert_ne!(first, second);
        wait_until("the connection has a duplicate", || {
            ask_admin(&container, "/metrics").contains("\noutlive_connections_backed_up 1\n")
        });
        container
            .run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", &container.unit("service")])
            .expect("the signal is sent");
        assert_ne!(pid(&mut idle).await, second);
    });
}
