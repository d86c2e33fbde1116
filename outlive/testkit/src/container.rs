//! A real systemd in a container of its own: booted in half a second, thrown away at the end.
//!
//! The service is installed into it with `make install`, or it is a Debian for packages to be installed into; loopback
//! inside is its only network.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use tempfile::TempDir;

use crate::TEST_TIMEOUT;
use crate::certificate::Certificate;
use crate::client::{Connection, Target, get};
use crate::process::{Notifications, Process, make};

/// Whose systemd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Systemd {
    /// This machine's, from its own /usr.
    Host,
    /// 257, from a root that `make e2e-deps` makes: Debian 13.
    V257,
    /// 252, the same: Debian 12.
    V252,
    /// The newest, the same: Debian unstable's, whose version moves.
    Unstable,
}

impl Systemd {
    /// The file system that it is booted from.
    fn root(self, package: Package<'_>) -> Result<PathBuf> {
        let name = match self {
            Self::Host => return Ok("/".into()),
            Self::V257 => "target/systemd-257",
            Self::V252 => "target/systemd-252",
            Self::Unstable => "target/systemd-unstable",
        };
        let mut roots = Path::new(package.folder).ancestors().map(|folder| folder.join(name));
        let root = roots.find(|root| root.join("usr").is_dir());
        root.with_context(|| format!("{name} is missing: make {name}"))
    }

    /// As `systemctl --version` in its file system says.
    pub fn version(self, package: Package<'_>) -> Result<u32> {
        needs_root()?;
        let root = self.root(package)?;
        let mut systemctl = Command::new("unshare");
        systemctl.arg(format!("--root={}", root.display())).args(["systemctl", "--version"]);
        let said = String::from_utf8_lossy(&systemctl.output()?.stdout).into_owned();
        let version =
            said.strip_prefix("systemd ").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        let version = version.and_then(|version| version.parse().ok());
        version.with_context(|| format!("systemctl --version in {}: {said:?}", root.display()))
    }
}

fn needs_root() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "a real systemd is booted in a container, and that takes root: sudo -E env PATH=\"$PATH\" make e2e"
    );
    Ok(())
}

/// The package whose test this stands in.
#[macro_export]
macro_rules! this_package {
    () => {
        $crate::container::Package {
            name: env!("CARGO_PKG_NAME"),
            binary: env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME"))),
            folder: env!("CARGO_MANIFEST_DIR"),
        }
    };
}

/// What is to be installed.
#[derive(Clone, Copy, Debug)]
pub struct Package<'a> {
    pub name: &'a str,
    pub binary: &'a str,
    /// The folder of the Makefile; in it or above it stand the roots that it makes, such as `target/systemd-257`.
    pub folder: &'a str,
}

pub struct Container {
    /// The container's PID 1, seen from here.
    leader: Pid,
    nspawn: Process,
    /// Removed after the container has ended: fields are dropped in this order.
    _cgroups: Cgroups,
    stage: TempDir,
    name: String,
}

impl Container {
    /// Boots a systemd with the package installed and its socket enabled.
    pub fn boot(systemd: Systemd, package: Package<'_>) -> Result<Self> {
        let stage = tempfile::tempdir()?;
        let install = make(package.folder, &["install"])
            .arg(format!("SYSTEMD={}", systemd.version(package)?))
            .arg(format!("DESTDIR={}", stage.path().display()))
            .arg(format!("BINARY={}", package.binary))
            .output()
            .context("make install")?;
        ensure!(install.status.success(), "make install: {}", String::from_utf8_lossy(&install.stderr));
        let enabled = Command::new("systemctl")
            .arg(format!("--root={}", stage.path().display()))
            .args(["enable", "--quiet", &format!("{}.socket", package.name)])
            .output()
            .context("systemctl enable")?;
        ensure!(enabled.status.success(), "systemctl enable: {}", String::from_utf8_lossy(&enabled.stderr));
        // At its first boot a systemd enables whatever has an [Install] section, unless told not to.
        let presets = stage.path().join("etc/systemd/system-preset");
        fs::create_dir_all(&presets)?;
        fs::write(presets.join("00-none.preset"), "disable *\n")?;
        let folders = ["usr/local", "etc/systemd/system", "etc/systemd/system-preset"];
        let folders = folders.map(|folder| (stage.path().join(folder), format!("/{folder}")));
        Self::boot_with(systemd, package, stage, &folders)
    }

    /// Boots a Debian, with nothing installed, in which `folder` is seen as `/packages`.
    pub fn boot_debian(systemd: Systemd, package: Package<'_>, folder: &Path) -> Result<Self> {
        Self::boot_with(
            systemd,
            package,
            tempfile::tempdir()?,
            &[(folder.to_owned(), "/packages".to_owned())],
        )
    }

    fn boot_with(
        systemd: Systemd,
        package: Package<'_>,
        stage: TempDir,
        folders: &[(PathBuf, String)],
    ) -> Result<Self> {
        needs_root()?;
        let mut notifications = Notifications::new()?;
        let cgroups = Cgroups::new()?;
        let mut command = nspawn(systemd, package, &cgroups)?;
        for (outside, inside) in folders {
            command.arg(format!("--bind={}:{inside}", outside.display()));
        }
        command
            .args(["systemd.firstboot=off", "systemd.unit=basic.target"])
            .env("NOTIFY_SOCKET", notifications.path());
        let nspawn = Process::spawn(&mut command)?;
        let leader = notifications.wait_for("X_NSPAWN_LEADER_PID=")?;
        let leader = leader.rsplit('=').next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
        let leader = leader.context("the container's PID 1")?;
        // Owned before the wait: if that fails, the container ends all the same.
        let container = Self { leader, nspawn, _cgroups: cgroups, stage, name: package.name.to_owned() };
        notifications.wait_for("READY=1")?;
        Ok(container)
    }

    /// Runs a command inside; gives its standard output, or fails with its standard error.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let output = self.command(command).output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{command:?}: {}: {stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(stdout)
    }

    /// A command to be run inside.
    pub fn command(&self, command: &[&str]) -> Command {
        let mut entered = Command::new("nsenter");
        entered
            .arg(format!("--target={}", self.leader.as_raw_nonzero()))
            .args(["--all", "--"])
            .args(command)
            .stdin(Stdio::null());
        entered
    }

    /// A command of this machine's, to be run on the container's network.
    pub fn outside(&self, command: &[&str]) -> Command {
        let mut entered = Command::new("nsenter");
        let target = format!("--target={}", self.leader.as_raw_nonzero());
        entered.args([&target, "--net", "--"]).args(command).stdin(Stdio::null());
        entered
    }

    /// Signals the container's PID 1, as the kernel of the machine may.
    pub fn signal_pid_1(&self, signal: Signal) {
        kill_process(self.leader, signal).expect("the container runs");
    }

    /// `systemctl VERB` the service.
    pub fn systemctl(&self, verb: &str) -> Result<String> {
        self.run(&["systemctl", verb, &self.unit("service")])
    }

    pub fn unit(&self, kind: &str) -> String {
        format!("{}.{kind}", self.name)
    }

    /// A property of the service.
    pub fn show(&self, property: &str) -> Result<String> {
        let value = self.run(&["systemctl", "show", "-P", property, &self.unit("service")])?;
        Ok(value.trim().to_owned())
    }

    /// Waits until a property of the service is as `wanted`.
    pub fn wait_for_property(&self, property: &str, wanted: impl Fn(&str) -> bool) {
        crate::wait_until(property, || wanted(&self.show(property).expect("systemctl show succeeds")));
    }

    /// The journal's entries that match, each with its fields.
    pub fn journal(&self, matches: &[&str]) -> Result<Vec<Value>> {
        self.run(&["journalctl", "--sync"])?;
        let entries = self.run(&[&["journalctl", "-o", "json"], matches].concat())?;
        entries.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Adds lines to a unit of the package: a drop-in, in force at once.
    pub fn add_to_unit(&self, kind: &str, name: &str, lines: &str) -> Result<()> {
        let folder = format!("etc/systemd/system/{}.d", self.unit(kind));
        self.write(&format!("{folder}/{name}.conf"), lines)?;
        self.run(&["systemctl", "daemon-reload"])?;
        Ok(())
    }

    /// Puts a certificate where the service finds its credentials.
    pub fn install_certificate(&self, certificate: &Certificate) -> Result<()> {
        for path in [certificate.chain(), certificate.key()] {
            let file =
                path.file_name().and_then(|name| name.to_str()).context("the path has no file name")?;
            self.write(&format!("etc/{}/{file}", self.name), &fs::read_to_string(&path)?)?;
        }
        Ok(())
    }

    /// The TLS socket, a certificate, and the lines of the unit that go with them, which are comments as shipped.
    pub fn enable_tls(&self, certificate: &Certificate) -> Result<()> {
        self.install_certificate(certificate)?;
        let unit = self.stage.path().join("usr/local/lib/systemd/system").join(self.unit("service"));
        let unit = fs::read_to_string(&unit).with_context(|| format!("{}", unit.display()))?;
        let commented = unit.lines().filter_map(|line| line.strip_prefix("#LoadCredential="));
        let lines: Vec<String> = commented.map(|line| format!("LoadCredential={line}\n")).collect();
        ensure!(lines.len() == 2, "{unit}");
        self.add_to_unit("service", "tls", &format!("[Service]\n{}", lines.concat()))?;
        self.start_socket("tls")
    }

    /// Starts a socket that the service has besides its first one.
    pub fn start_socket(&self, kind: &str) -> Result<()> {
        self.run(&["systemctl", "start", &format!("{}-{kind}.socket", self.name)])?;
        Ok(())
    }

    /// Writes a file inside; the path is from its root.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path(path);
        fs::create_dir_all(path.parent().context("the path has no parent folder")?)?;
        fs::write(&path, text).with_context(|| format!("{}", path.display()))
    }

    /// A path inside, as seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.leader.as_raw_nonzero().to_string()).join("root").join(path)
    }

    /// The installed binary, as seen from here.
    pub fn binary(&self) -> PathBuf {
        self.stage.path().join("usr/local/bin").join(&self.name)
    }

    /// Puts another file in the place of the binary, as an upgrade does: the old one stays open where it runs.
    pub fn replace_binary(&self, with: &Path) -> Result<()> {
        let aside = self.binary().with_extension("new");
        fs::copy(with, &aside)?;
        Ok(fs::rename(&aside, self.binary())?)
    }

    /// What a thread does first to use the container's network.
    pub fn enter(&self) -> impl FnOnce() + Send + 'static {
        let network = format!("/proc/{}/ns/net", self.leader.as_raw_nonzero());
        move || {
            let network = fs::File::open(network).expect("the container runs");
            let network = std::os::fd::AsFd::as_fd(&network);
            move_into_link_name_space(network, Some(LinkNameSpaceType::Network))
                .expect("the test runs as root");
        }
    }

    /// Does `work` in the container's network.
    pub fn inside<T: Send, F: Future<Output = T>>(&self, work: impl FnOnce() -> F + Send) -> T {
        let enter = self.enter();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter();
                crate::block_on(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The text of the answer to one request, on a connection of its own.
    pub fn ask(&self, path: &str) -> String {
        self.inside(|| async {
            let mut connection = Connection::open(&Self::target()).await.expect("the port is open");
            connection.ask(&get(path)).await.expect("the request is answered").text()
        })
    }

    /// The socket that the unit as shipped listens on.
    pub fn target() -> Target {
        Target::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self
                .run(&["journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic"])
                .unwrap_or_default();
            eprintln!("---- the container's journal\n{journal}----");
        }
        // Nothing inside is worth an orderly end, and with PID 1 the kernel ends all the others.
        let _ = kill_process(self.leader, Signal::KILL);
        let _ = self.nspawn.wait();
    }
}

fn nspawn(systemd: Systemd, package: Package<'_>, cgroups: &Cgroups) -> Result<Command> {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
    let mut command = Command::new("sh");
    // Into its own cgroups first.
    command.args([
        "-c",
        "for file; do shift; [ \"$file\" = -- ] && break; echo $$ >\"$file\"; done; exec \"$@\"",
        "sh",
    ]);
    command.args(cgroups.folders.iter().map(|folder| folder.join("cgroup.procs")));
    command.args(["--", "systemd-nspawn"]);
    command.arg(format!("--directory={}", systemd.root(package)?.display()));
    if systemd == Systemd::Host {
        command.arg("--volatile=yes");
    } else {
        command.arg("--volatile=overlay");
        // Where the host has the legacy cgroup layout, systemd 257 and later would refuse it.
        command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
    }
    command
        .args(["--boot", "--register=no", "--keep-unit", "--console=pipe", "--private-network"])
        .args(["--notify-ready=yes", "--quiet"])
        .arg(format!("--machine={}", cgroups.name))
        .arg(format!("--uuid={id}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok(command)
}

/// Control groups for one container: two in the same would find each other's processes in theirs.
struct Cgroups {
    name: String,
    folders: Vec<PathBuf>,
}

impl Cgroups {
    fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut cgroups = Self { name, folders: Vec::new() };
        for line in fs::read_to_string("/proc/self/cgroup")?.lines() {
            let (hierarchy, path) = line.rsplit_once(':').context("/proc/self/cgroup")?;
            // The unified hierarchy and, on a host with the legacy layout, systemd's own.
            let mounts: &[&str] = match hierarchy.split_once(':') {
                Some(("0", "")) => &["/sys/fs/cgroup/unified", "/sys/fs/cgroup"],
                Some((_, "name=systemd")) => &["/sys/fs/cgroup/systemd"],
                _ => continue,
            };
            let mount = mounts.iter().find(|mount| Path::new(mount).join("cgroup.procs").exists());
            let Some(mount) = mount else { continue };
            let folder = Path::new(mount).join(path.trim_start_matches('/')).join(&cgroups.name);
            fs::create_dir(&folder).with_context(|| format!("{}", folder.display()))?;
            cgroups.folders.push(folder);
        }
        Ok(cgroups)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for folder in &self.folders {
            remove_cgroup(folder);
        }
    }
}

fn remove_cgroup(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // The kernel empties a cgroup a moment after its last process has gone. No panic: this runs while a test ends.
    let deadline = Instant::now() + TEST_TIMEOUT;
    while let Err(error) = fs::remove_dir(folder) {
        if Instant::now() >= deadline {
            eprintln!("could not remove the cgroup {}: {error}; remove it by hand", folder.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
