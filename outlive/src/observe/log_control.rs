//! Log control over D-Bus: `systemctl service-log-level` and `service-log-target`, org.freedesktop.LogControl1(5) on
//! the system bus.
//!
//! The service has the bus name `local.NAME`, which `BusName=` of the unit gives. In a reload the successor takes over
//! the name and the settings that were made through it; a process after a restart begins with its configuration.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future;
use tokio::time::timeout;
use tracing::debug;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::layer::Filter;
use zbus::fdo::{Error, PropertiesProxy, RequestNameFlags, Result};
use zbus::names::InterfaceName;
use zbus::{Connection, connection, interface};

use crate::observe::log::{Control, Target, parse_filter};
use crate::os::lock::lock;

const PATH: &str = "/org/freedesktop/LogControl1";
/// The interface on which a successor reads the settings of its predecessor.
const SUCCESSION: &str = "local.outlive.Succession";
/// How long the registration on the bus may take. Nothing waits for it.
const LIMIT: Duration = Duration::from_secs(10);
/// How long the predecessor's answer may take. It is short, because the reload waits for it.
const SUCCESSION_LIMIT: Duration = Duration::from_secs(1);

/// Serves log control for the remaining life of the process, if there is a bus and it grants the name.
pub async fn serve(control: Control) {
    if !is_for(&control) {
        return;
    }
    match timeout(LIMIT, take_name(control)).await {
        // The connection serves until it is dropped.
        Ok(Ok(connection)) => {
            let _: Infallible = future::pending().await;
            drop(connection);
        }
        Ok(Err(error)) => debug!("could not offer log control on D-Bus: {error}"),
        Err(_) => debug!("could not offer log control on D-Bus: no reply in time"),
    }
}

/// Whether this process runs as the system unit of that name. Other processes, such as instances of a template unit,
/// must not request the name, because each would take it away from the others.
fn is_for(control: &Control) -> bool {
    is_unit(&control.name, &std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
}

/// Whether one of `cgroups` (the content of `/proc/PID/cgroup`) is that of the system unit `name.service`.
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

/// Adopts the settings that were made through the predecessor, as long as the predecessor has the name.
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
    let filter = parse_filter(filter).ok_or_else(|| Error::Failed("the filter is invalid".into()))?;
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
        "journal" => {
            return Err(Error::NotSupported(
                "unsupported log target \"journal\": this process is not connected to journald (see --log-format); \
                 expected console, null or auto"
                    .into(),
            ));
        }
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
        let level = self.0.filter.with_current(Filter::<Registry>::max_level_hint).ok().flatten();
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
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU8;

    use tracing_subscriber::reload;

    use super::*;

    #[test]
    fn journal_is_refused_as_a_target_if_the_process_is_not_connected_to_journald() {
        for first in [Target::Console, Target::Journal] {
            let control = Control {
                name: "app".into(),
                filter: reload::Layer::new(parse_filter("info").expect("the filter is valid")).1,
                target: Arc::new(AtomicU8::new(first as u8)),
                first,
                set: Mutex::default(),
            };
            let target = || control.target.load(Ordering::Relaxed);
            set_target(&control, "null").expect("the target is known");
            let set = set_target(&control, "journal");
            if first == Target::Journal {
                set.expect("the process is connected to journald");
                assert_eq!(target(), Target::Journal as u8);
            } else {
                let error = set.expect_err("the process is not connected to journald").to_string();
                assert!(error.contains("not connected to journald (see --log-format)"), "{error}");
                assert_eq!(target(), Target::Null as u8, "a refused target changes nothing");
            }
            set_target(&control, "auto").expect("the target is known");
            assert_eq!(target(), first as u8);
        }
    }

    #[test]
    fn only_the_cgroup_of_the_system_unit_of_that_name_is_recognized() {
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
