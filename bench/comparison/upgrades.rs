//! Upgrades of a Debian package under load: this service, and bare `axum::serve` in a package with the defaults of
//! cargo-deb.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Package, Systemd};
use testkit::debian::{append, built_package, later_release, run};
use testkit::load::{Connections, Load};
use testkit::process::make;

use crate::Extent;
use crate::costs::round;
use crate::servers::{FOLDER, NAME, OURS};

pub fn measure(extent: &Extent, progress: &ProgressBar) -> Result<Value> {
    let packages = tempfile::tempdir()?;
    build(packages.path())?;
    let mut rows = Vec::new();
    for (label, name, port) in [("this service", NAME, 8080), ("bare axum::serve", "baseline", 8081)] {
        let target = Target::Tcp(SocketAddr::from(([127, 0, 0, 1], port)));
        for (load, of) in [
            ("10 keep-alive connections, flat out", Load::saturating as fn(&Target) -> Load),
            ("50 connections, 5 ms between requests", Load::paced),
            ("the same, sending blindly", Load::paced_blind),
            ("one connection per request", Load::connection_per_request),
        ] {
            progress.set_message(format!("upgrades of {label}: {load}"));
            let package = Package { name, binary: OURS, folder: FOLDER };
            let container = Container::boot_debian(Systemd::V252, package, packages.path())?;
            let install = |release: u32| {
                container.run(&["dpkg", "--install", &format!("/packages/{name}-{release}.deb")])
            };
            install(1)?;
            testkit::wait_until("the port is open", || {
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
            // Each connection beyond those that the load asked for replaced one that was closed.
            let closed = is_kept.then(|| report.connections.saturating_sub(report.clients));
            rows.push(json!({
                "package": label, "load": load, "upgrades": extent.starts, "answered": report.answered,
                "lost": report.lost(), "connections closed": closed,
                "longest ms": round(report.longest.as_secs_f64() * 1e3),
            }));
            ensure!(name == "baseline" || report.lost() == 0, "{report}");
        }
    }
    Ok(rows.into())
}

/// Builds two releases of both packages.
fn build(folder: &Path) -> Result<()> {
    let path = format!("{}:{FOLDER}/target/tools/bin", std::env::var("PATH").unwrap_or_default());
    run(&mut make(FOLDER, &["deb", "SYSTEMD=252", &format!("BINARY={OURS}")]))?;
    fs::copy(built_package(Path::new(FOLDER), NAME, "deb")?, folder.join(format!("{NAME}-1.deb")))?;
    let mut baseline = Command::new("cargo");
    baseline.args(["deb", "--no-build", "--package", "bench", "--output"]).arg(folder.join("baseline-1.deb"));
    // In the folder e2e, because cargo-deb finds the build folder of the workspace only from there.
    run(baseline.current_dir(Path::new(FOLDER).join("e2e")).env("PATH", path))?;
    for name in [NAME, "baseline"] {
        let release = |number: u32| folder.join(format!("{name}-{number}.deb"));
        let binary = format!("usr/bin/{}", if name == NAME { NAME } else { "baseline_axum" });
        later_release(&release(1), &release(2), "2", |root| append(&root.join(&binary), "another"))?;
    }
    Ok(())
}
