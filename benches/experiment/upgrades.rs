//! Upgrades of a Debian package under load: ours, and bare `axum::serve` as cargo-deb packages it by default.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use harness::client::{Connection, Target, get};
use harness::container::{Container, Package, Systemd};
use harness::debian::{append, later_release, made, run};
use harness::load::{Connections, Load};
use harness::process::make;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::Extent;
use crate::costs::round;
use crate::servers::OURS;

const NAME: &str = env!("CARGO_PKG_NAME");
const FOLDER: &str = env!("CARGO_MANIFEST_DIR");

pub fn measure(extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    let packages = tempfile::tempdir()?;
    build(packages.path())?;
    let mut rows = Vec::new();
    for (label, name, port) in [("this service", NAME, 8080), ("bare axum::serve", "bare", 8081)] {
        let target = Target::Tcp(SocketAddr::from(([127, 0, 0, 1], port)));
        for (load, of) in [
            ("10 keep-alive connections, flat out", Load::w1 as fn(&Target) -> Load),
            ("50 connections, 5 ms between requests", Load::w2),
            ("the same, sending blindly", Load::w3),
            ("one connection a request", Load::w4),
        ] {
            progress.set_message(format!("upgrades of {label}: {load}"));
            let package = Package { name, binary: OURS, folder: FOLDER };
            let container = Container::boot_debian(Systemd::V252, package, packages.path())?;
            let install = |release: u32| {
                container.run(&["dpkg", "--install", &format!("/packages/{name}-{release}.deb")])
            };
            install(1)?;
            harness::eventually("the port is open", || {
                container.inside(|| async {
                    let Ok(mut connection) = Connection::open(&target).await else { return false };
                    connection.ask(&get("/")).await.is_ok()
                })
            });
            let clients = of(&target);
            let is_kept = clients.connections != Connections::OneEach;
            let running = clients.start(container.enter());
            for upgrade in 0..extent.starts {
                install(2 - u32::try_from(upgrade % 2)?)?;
            }
            let report = running.stop();
            // Of what was made, all but those that would have done had to be made because another was closed.
            let closed = is_kept.then(|| report.connections.saturating_sub(report.asked_for));
            rows.push(json!({
                "package": label, "load": load, "upgrades": extent.starts, "answered": report.answered,
                "lost": report.lost(), "connections closed": closed,
                "longest ms": round(report.longest.as_secs_f64() * 1e3),
            }));
            ensure!(name == "bare" || report.lost() == 0, "{report}");
        }
    }
    Ok(rows.into())
}

/// Two releases of each.
fn build(folder: &Path) -> Result<()> {
    let path = format!("{}:{FOLDER}/target/tools/bin", std::env::var("PATH").unwrap_or_default());
    run(&mut make(FOLDER, &["deb", "SYSTEMD=252", &format!("BINARY={OURS}")]))?;
    fs::copy(made(Path::new(FOLDER), NAME, "deb")?, folder.join(format!("{NAME}-1.deb")))?;
    let mut bare = Command::new("cargo");
    bare.args(["deb", "--no-build", "--variant", "bare", "--output"]).arg(folder.join("bare-1.deb"));
    run(bare.current_dir(FOLDER).env("PATH", path))?;
    for name in [NAME, "bare"] {
        let release = |number: u32| folder.join(format!("{name}-{number}.deb"));
        let binary = format!("usr/bin/{name}");
        later_release(&release(1), &release(2), "2", |root| append(&root.join(&binary), "another"))?;
    }
    Ok(())
}
