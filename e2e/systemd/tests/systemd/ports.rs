//! A change of the port with the commands of docs/recipes/change-port.md, and a service that systemd starts without a
//! socket.

use std::net::SocketAddr;

use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::{Load, Report, Running};
use testkit::{on_each_systemd, wait_until};

use crate::{NAME, app_package};

on_each_systemd! {
    adding_a_port_and_closing_the_old_one_loses_no_request
    replacing_a_port_keeps_established_connections
    a_restart_without_the_changed_socket_unit_fails_and_names_it
}

const OLD: u16 = 8080;
const NEW: u16 = 8081;

fn target(port: u16) -> Target {
    Target::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// The three blocks of commands of the recipe, in their order.
fn commands() -> [&'static str; 3] {
    let recipe = include_str!("../../../../docs/recipes/change-port.md");
    let blocks: Vec<_> = recipe.split("```").skip(1).step_by(2).collect();
    let blocks: [&str; 3] = blocks.try_into().expect("the recipe has three blocks of commands");
    blocks.map(|block| block.strip_prefix("sh\n").expect("the block has shell commands"))
}

fn run(container: &Container, commands: &str) {
    // Without the indentation of the list item, which would end up in the files that the commands write.
    let commands: Vec<_> = commands.lines().map(str::trim_start).collect();
    container.run(&["sh", "-ec", &commands.join("\n")]).unwrap_or_else(|error| panic!("{error:#}"));
}

fn generation(container: &Container, port: u16) -> String {
    container.inside(|| async {
        let mut connection = Connection::open(&target(port)).await.expect("the port is open");
        connection.ask(&get("/")).await.expect("the request is answered").text()
    })
}

/// Keep-alive clients and clients of one connection for each request.
fn loads(container: &Container, port: u16) -> [Running; 2] {
    [Load::paced(&target(port)), Load::connection_per_request(&target(port))]
        .map(|load| load.start(container.enter()))
}

/// Stops the loads, and asserts that no request was lost and no kept connection closed.
fn stop(loads: [Running; 2]) {
    let [kept, one_each] = loads.map(Running::stop);
    assert_eq!((kept.lost(), kept.connections), (0, kept.clients), "{kept}");
    assert!(kept.answered > kept.clients && one_each.answered > 0, "{kept}; {one_each}");
    assert_eq!(one_each.lost(), 0, "{one_each}");
}

fn adding_a_port_and_closing_the_old_one_loses_no_request(systemd: Systemd) {
    let [add, close, _] = commands();
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    assert!(generation(&container, OLD).contains("generation 1,"));
    let old = loads(&container, OLD);
    run(&container, add);
    assert!(generation(&container, NEW).contains("generation 2,"));
    stop(old);
    let new = loads(&container, NEW);
    run(&container, close);
    assert!(generation(&container, NEW).contains("generation 3,"));
    stop(new);
    let refused = container.inside(|| async { Connection::open(&target(OLD)).await.is_err() });
    assert!(refused, "the old port is still open");
}

fn replacing_a_port_keeps_established_connections(systemd: Systemd) {
    let [.., replace] = commands();
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    generation(&container, OLD);
    let kept = Load::paced(&target(OLD)).start(container.enter());
    run(&container, replace);
    assert!(generation(&container, NEW).contains("generation 2,"));
    let report: Report = kept.stop();
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
}

fn a_restart_without_the_changed_socket_unit_fails_and_names_it(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    generation(&container, OLD);
    container
        .add_to_unit("socket", "port", "[Socket]\nListenStream=\nListenStream=8081\n")
        .expect("the file is written");
    assert!(container.systemctl("restart").is_err(), "the service started without a socket");
    let wanted =
        format!("systemd passed no listening socket (LISTEN_FDS): run `systemctl restart {NAME}.socket`");
    wait_until("the journal names the remedy", || {
        let entries = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
        entries.iter().any(|entry| entry["MESSAGE"].as_str().is_some_and(|message| message.contains(&wanted)))
    });
    container
        .run(&["systemctl", "restart", &container.unit("socket"), &container.unit("service")])
        .expect("the restart succeeds");
    assert!(generation(&container, NEW).contains("pid "));
}
