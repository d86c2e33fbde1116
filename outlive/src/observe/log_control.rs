//! `systemctl service-log-level` and `service-log-target`: org.freedesktop.LogControl1(5) on the system's bus.
//!
//! The name there is `local.NAME`, as `BusName=` of the unit says. At a reload the successor takes it over, with what was
//! set through it; a restart begins with what the configuration says.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future;
use tokio::time::timeout;
use tracing::debug;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use zbus::fdo::{Error, PropertiesProxy, RequestNameFlags, Result};
use zbus::names::InterfaceName;
use zbus::{Connection, connection, interface};

use crate::observe::log::{Control, Target};
use crate::os::lock::lock;

const PATH: &str = "/org/freedesktop/LogControl1";
/// What a successor asks its predecessor on.
const SUCCESSION: &str = "local.outlive.Succession";
/// The bus may be slow.
const LIMIT: Duration = Duration::from_secs(10);
/// For the predecessor's answer: a reload waits for it.
const SUCCESSION_LIMIT: Duration = Duration::from_secs(1);

/// Answers for as long as the process lives, where the bus is there and lets it have its name.
pub async fn serve(control: Control) {
    if !is_for(&control) {
        return;
    }
    match timeout(LIMIT, take_name(control)).await {
        // The connection serves while it is kept.
        Ok(Ok(connection)) => {
            let _: Infallible = future::pending().await;
            drop(connection);
        }
        Ok(Err(error)) => debug!("could not offer log control on D-Bus: {error}"),
        Err(_) => debug!("could not offer log control on D-Bus: no reply in time"),
    }
}

/// Of several instances each would take the name from the other.
fn is_for(control: &Control) -> bool {
    is_unit(&control.name, &std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
}

/// Whether the cgroup is that of the system's unit `name.service`.
fn is_unit(name: &str, cgroups: &str) -> bool {
    let unit = format!("{name}.service");
    let is_it = |path: &str| {
        !path.contains("/user.slice/")
            && Path::new(path).iter().next_back().is_some_and(|last| last == unit.as_str())
    };
    cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(is_it)
}

async fn take_name(control: Control) -> zbus::Result<Connection> {
    let bus_name = bus_name(&control);
    let control = Arc::new(control);
    let flags = RequestNameFlags::ALLOW_REPLACEMENT | RequestNameFlags::REPLACE_EXISTING;
    let connection = connection::Builder::system()
        .serve_at(PATH, LogControl(control.clone()))
        .serve_at(PATH, Succession(control))
        .build()
        .await?;
    connection.request_name_with_flags(bus_name, flags).await?;
    Ok(connection)
}

fn bus_name(control: &Control) -> String {
    format!("local.{}", control.name)
}

/// Goes on with what was set through the predecessor, while that has the name.
pub async fn succeed(control: &Control) {
    if !is_for(control) {
        return;
    }
    match timeout(SUCCESSION_LIMIT, set_before(bus_name(control))).await {
        Ok(Ok((level, target))) => {
            for (set, to) in [(set_level as fn(&_, &_) -> _, level), (set_target, target)] {
                if !to.is_empty()
                    && let Err(error) = set(control, &to)
                {
                    debug!("could not restore the predecessor's log settings: {error}");
                }
            }
        }
        Ok(Err(error)) => debug!("could not read the predecessor's log settings: {error}"),
        Err(_) => debug!("could not read the predecessor's log settings: no reply in time"),
    }
}

async fn set_before(bus_name: String) -> zbus::Result<(String, String)> {
    let connection = Connection::system().await?;
    let predecessor = PropertiesProxy::new(&connection, bus_name, PATH).await?;
    predecessor.get(InterfaceName::try_from(SUCCESSION)?, "Set").await?.try_into()
}

fn set_level(control: &Control, level: &str) -> Result<()> {
    let filter = match level {
        "emerg" | "alert" | "crit" | "err" => "error",
        "warning" => "warn",
        "notice" | "info" => "info",
        "debug" => "debug",
        _ => {
            return Err(Error::InvalidArgs(format!(
                "invalid log level {level:?}: expected a level of syslog(3)"
            )));
        }
    };
    control.filter.reload(filter).map_err(|error| Error::Failed(error.to_string()))?;
    level.clone_into(&mut lock(&control.set).0);
    Ok(())
}

fn set_target(control: &Control, name: &str) -> Result<()> {
    let target = match name {
        "auto" => control.first,
        "console" => Target::Console,
        "null" => Target::Null,
        "journal" if control.first == Target::Journal => Target::Journal,
        _ => {
            return Err(Error::NotSupported(format!(
                "unsupported log target {name:?}: expected journal, console, null or auto"
            )));
        }
    };
    control.target.store(target as u8, Ordering::Relaxed);
    name.clone_into(&mut lock(&control.set).1);
    Ok(())
}

struct LogControl(Arc<Control>);

#[interface(name = "org.freedesktop.LogControl1")]
impl LogControl {
    #[zbus(property)]
    fn log_level(&self) -> &'static str {
        let level = self.0.filter.with_current(EnvFilter::max_level_hint).ok().flatten();
        match level.unwrap_or(LevelFilter::TRACE) {
            LevelFilter::OFF | LevelFilter::ERROR => "err",
            LevelFilter::WARN => "warning",
            LevelFilter::INFO => "info",
            _ => "debug",
        }
    }

    #[zbus(property)]
    fn set_log_level(&mut self, level: &str) -> Result<()> {
        set_level(&self.0, level)
    }

    #[zbus(property)]
    fn log_target(&self) -> &'static str {
        let target = self.0.target.load(Ordering::Relaxed);
        let named = [(Target::Journal, "journal"), (Target::Console, "console"), (Target::Null, "null")];
        named.into_iter().find(|(known, _)| *known as u8 == target).map_or("null", |(_, name)| name)
    }

    #[zbus(property)]
    fn set_log_target(&mut self, target: &str) -> Result<()> {
        set_target(&self.0, target)
    }

    #[zbus(property)]
    fn syslog_identifier(&self) -> &str {
        &self.0.name
    }
}

struct Succession(Arc<Control>);

#[interface(name = "local.outlive.Succession")]
impl Succession {
    #[zbus(property)]
    fn set(&self) -> (String, String) {
        lock(&self.0.set).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_unit_of_the_name_has_it_and_no_other() {
        assert!(is_unit("app", "0::/system.slice/app.service\n"));
        assert!(is_unit("app", "1:name=systemd:/machine/system.slice/app.service\n0::/\n"));
        for other in [
            "",
            "0::/\n",
            "0::/system.slice/app@1.service\n",
            "0::/system.slice/my-app.service\n",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app.service\n",
        ] {
            assert!(!is_unit("app", other), "{other}");
        }
    }
}
