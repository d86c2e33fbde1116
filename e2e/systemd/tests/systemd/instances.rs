//! Instances of the service on one machine, and the service of a user without root.

use std::net::SocketAddr;

use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::process::make;
use testkit::{on_each_debian, on_each_systemd};

use crate::{FOLDER, NAME, app_binary, app_package};

on_each_systemd! {
    restarting_an_instance_does_not_affect_the_others
}

on_each_debian! {
    user_service_restarts_and_reloads_without_loss
}

fn target(port: u16) -> Target {
    Target::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))
}

fn ask(container: &Container, port: u16) -> String {
    container.inside(|| async {
        let mut connection = Connection::open(&target(port)).await.expect("the port is open");
        connection.ask(&get("/")).await.expect("the request is answered").text()
    })
}

/// Does `work` under a load on each port, and asserts that no request is lost and no connection closed.
fn assert_no_client_impact(container: &Container, ports: &[u16], work: impl FnOnce()) {
    let loads: Vec<_> =
        ports.iter().map(|&port| Load::paced(&target(port)).start(container.enter())).collect();
    work();
    for load in loads {
        let report = load.stop();
        assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
    }
}

fn restarting_an_instance_does_not_affect_the_others(systemd: Systemd) {
    let recipe = crate::pid1::recipe("instances", "sh");
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.run(&["sh", "-ec", &recipe]).expect("the commands of docs/recipes/instances.md succeed");
    let variable = format!("{}_NAP", NAME.to_uppercase().replace('-', "_"));
    container
        .write(&format!("etc/default/{NAME}"), &format!("{variable}=3ms\n"))
        .expect("the file is written");
    container
        .write(&format!("etc/default/{NAME}@8081"), &format!("{variable}=2ms\n"))
        .expect("the file is written");
    for port in [8080, 8081, 8082] {
        assert!(ask(&container, port).contains("generation 1,"));
    }
    let instance = |port: u16| format!("{NAME}@{port}.service");
    let pid = |unit: &str| {
        container
            .run(&["systemctl", "show", "-P", "MainPID", unit])
            .expect("the value is a pid")
            .trim()
            .to_owned()
    };
    let others = [pid(&format!("{NAME}.service")), pid(&instance(8082))];
    assert_no_client_impact(&container, &[8080, 8081, 8082], || {
        for verb in ["restart", "reload"].repeat(5) {
            container.run(&["systemctl", verb, &instance(8081)]).expect(verb);
        }
    });
    assert_eq!(others, [pid(&format!("{NAME}.service")), pid(&instance(8082))]);
    assert!(ask(&container, 8081).contains("generation 11,"));
    // Each instance has the variables of all instances and those of its own file.
    for (port, nap) in [(8080, "3ms"), (8081, "2ms"), (8082, "3ms")] {
        let slept = container.inside(|| async move {
            let mut connection = Connection::open(&target(port)).await.expect("the port is open");
            connection.ask(&get("/sleep")).await.expect("the request is answered").text()
        });
        assert_eq!(slept, format!("slept {nap}\n"), "{port}");
    }
}

fn user_service_restarts_and_reloads_without_loss(systemd: Systemd) {
    let home = tempfile::tempdir().expect("the folder is created");
    let mut install = make(FOLDER, &["install-user"]);
    install
        .arg(format!("BINARY={}", app_binary()))
        .arg(format!("HOME={}", home.path().display()))
        .arg(format!("SYSTEMD={}", systemd.version(app_package()).expect("the version is known")))
        .env_remove("XDG_CONFIG_HOME");
    assert!(install.status().expect("make runs").success());
    let container = Container::boot_debian(systemd, app_package(), home.path()).expect("the container boots");
    let run =
        |command: &str| container.run(&["sh", "-ec", command]).unwrap_or_else(|error| panic!("{error:#}"));
    run("useradd --create-home tester");
    run("cp -r /packages/.config /packages/.local /home/tester && chown -R tester: /home/tester");
    // As systemd does at boot after `loginctl enable-linger`.
    run("systemctl start user@$(id -u tester).service");
    let user = |command: &str| {
        let systemctl = format!("XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user {command}");
        run(&format!("runuser -u tester -- sh -ec '{systemctl}'"))
    };
    user(&format!("enable --now {NAME}.socket"));
    assert!(ask(&container, 8080).contains("generation 1"));
    assert_no_client_impact(&container, &[8080], || {
        for verb in ["restart", "reload"].repeat(5) {
            user(&format!("{verb} {NAME}.service"));
        }
    });
    assert!(ask(&container, 8080).contains("generation 11"));
    // No warning about a setting of the unit that the systemd of a user cannot apply.
    let unit = format!("_SYSTEMD_USER_UNIT={NAME}.service");
    assert!(!container.journal(&[&unit]).expect("journalctl succeeds").is_empty());
    let warnings = container.journal(&[&unit, "PRIORITY=3", "PRIORITY=4"]).expect("journalctl succeeds");
    assert!(warnings.is_empty(), "{warnings:?}");
}
