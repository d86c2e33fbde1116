//! [`Container`]: a real systemd in a systemd-nspawn container, which boots in half a second and is removed with the
//! test.
//!
//! [`Container::boot`] installs the service into it with `make install`; [`Container::boot_debian`] boots a Debian into
//! which a test installs packages. Loopback is its only network. Needs root.

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
use crate::process::{Notifications, Process, copy_program, make};

/// The systemd that a container boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Systemd {
    /// This machine's, from the host's `/usr`.
    Host,
    /// 257 of Debian 13, from a root file system that `make e2e-deps` creates.
    V257,
    /// 252 of Debian 12, likewise.
    V252,
    /// The newest: that of Debian unstable, likewise. Its version changes over time.
    Unstable,
}

impl Systemd {
    /// The root file system that the container boots from.
    fn root(self, package: Package<'_>) -> Result<PathBuf> {
        let name = match self {
            Self::Host => return Ok("/".into()),
            Self::V257 => "target/systemd-257",
            Self::V252 => "target/systemd-252",
            Self::Unstable => "target/systemd-unstable",
        };
        let mut roots = Path::new(package.folder).ancestors().map(|folder| folder.join(name));
        let root = roots.find(|root| root.join("usr").is_dir());
        root.with_context(|| format!("{name} is missing: make e2e-deps creates it"))
    }

    /// The version that `systemctl --version` prints in its root file system.
    pub fn version(self, package: Package<'_>) -> Result<u32> {
        needs_root()?;
        let root = self.root(package)?;
        let mut systemctl = Command::new("unshare");
        systemctl.arg(format!("--root={}", root.display())).args(["systemctl", "--version"]);
        let output = String::from_utf8_lossy(&systemctl.output()?.stdout).into_owned();
        let version =
            output.strip_prefix("systemd ").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        let version = version.and_then(|version| version.parse().ok());
        version.with_context(|| format!("systemctl --version in {}: {output:?}", root.display()))
    }
}

fn needs_root() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "booting a systemd in a container needs root: sudo -E env PATH=\"$PATH\" make e2e"
    );
    Ok(())
}

/// The [`Package`](container::Package) of the crate whose test uses this macro.
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

/// A package of the repository, as its Makefile installs it.
#[derive(Clone, Copy, Debug)]
pub struct Package<'a> {
    /// The name of the package, of its binary and of its units.
    pub name: &'a str,
    /// The path of the binary to install.
    pub binary: &'a str,
    /// The folder of the Makefile. The root file systems, such as `target/systemd-257`, are in it or in a folder above
    /// it.
    pub folder: &'a str,
}

/// A running container. Dropping it kills it; if the test has failed, the end of its journal is printed first.
pub struct Container {
    /// PID 1 of the container, as a pid of the host.
    leader: Pid,
    nspawn: Process,
    /// Declared after `nspawn`, because fields are dropped in this order and a cgroup can only be removed when it is
    /// empty.
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
        // At its first boot systemd enables every unit that has an [Install] section, unless a preset disables it.
        let presets = stage.path().join("etc/systemd/system-preset");
        fs::create_dir_all(&presets)?;
        fs::write(presets.join("00-none.preset"), "disable *\n")?;
        let folders = ["usr/local", "etc/systemd/system", "etc/systemd/system-preset"];
        let folders = folders.map(|folder| (stage.path().join(folder), format!("/{folder}")));
        Self::boot_with(systemd, package, stage, &folders)
    }

    /// Boots a Debian without the service; `folder` is mounted as `/packages`.
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
        // Built before the wait, so that a container that does not become ready is killed too.
        let container = Self { leader, nspawn, _cgroups: cgroups, stage, name: package.name.to_owned() };
        notifications.wait_for("READY=1")?;
        Ok(container)
    }

    /// Runs a command inside. Returns its standard output; the error contains both outputs.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let output = self.command(command).output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{command:?}: {}: {stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(stdout)
    }

    /// As [`Container::run`], but fails after ten seconds. For commands during a soft-reboot: systemd stops all processes
    /// inside before it kills them, and nsenter stops itself when its child is stopped.
    pub fn run_during_soft_reboot(&self, command: &[&str]) -> Result<String> {
        let mut limited = Command::new("timeout");
        limited.args(["--kill-after=1", "10", "nsenter"]).args(self.entering()).args(command);
        let output = limited.stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{command:?}: {}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command that will run inside.
    pub fn command(&self, command: &[&str]) -> Command {
        let mut entered = Command::new("nsenter");
        entered.args(self.entering()).args(command).stdin(Stdio::null());
        entered
    }

    /// The arguments of nsenter(1).
    fn entering(&self) -> [String; 3] {
        [format!("--target={}", self.leader.as_raw_nonzero()), "--all".to_owned(), "--".to_owned()]
    }

    /// A command with the host's file system and the network of the container.
    pub fn outside(&self, command: &[&str]) -> Command {
        let mut entered = Command::new("nsenter");
        let target = format!("--target={}", self.leader.as_raw_nonzero());
        entered.args([&target, "--net", "--"]).args(command).stdin(Stdio::null());
        entered
    }

    /// Sends a signal to PID 1 of the container. From inside, the kernel would ignore SIGSTOP and SIGKILL to PID 1.
    pub fn signal_pid_1(&self, signal: Signal) {
        kill_process(self.leader, signal).expect("the container runs");
    }

    /// Runs `systemctl VERB` on the service. Before a reload it waits until systemd has read READY=1, because the service can
    /// answer earlier, and until then systemd would merge a reload job into the start job and not reload the service.
    pub fn systemctl(&self, verb: &str) -> Result<String> {
        if verb == "reload" {
            self.wait_for_property("ActiveState", |state| state != "activating");
        }
        self.run(&["systemctl", verb, &self.unit("service")])
    }

    /// The name of a unit of the package: `service` or `socket`.
    pub fn unit(&self, kind: &str) -> String {
        format!("{}.{kind}", self.name)
    }

    /// A property of the service, as `systemctl show` prints it.
    pub fn show(&self, property: &str) -> Result<String> {
        let value = self.run(&["systemctl", "show", "-P", property, &self.unit("service")])?;
        Ok(value.trim().to_owned())
    }

    /// Waits until `wanted` is true of a property of the service.
    pub fn wait_for_property(&self, property: &str, wanted: impl Fn(&str) -> bool) {
        crate::wait_until(property, || wanted(&self.show(property).expect("systemctl show succeeds")));
    }

    /// The entries of the journal that match, after everything logged so far has been written.
    pub fn journal(&self, matches: &[&str]) -> Result<Vec<Value>> {
        self.run(&["journalctl", "--sync"])?;
        let entries = self.run(&[&["journalctl", "-o", "json"], matches].concat())?;
        entries.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Adds the drop-in `name` to a unit of the package, and reloads systemd so that it takes effect.
    pub fn add_to_unit(&self, kind: &str, name: &str, lines: &str) -> Result<()> {
        let folder = format!("etc/systemd/system/{}.d", self.unit(kind));
        self.write(&format!("{folder}/{name}.conf"), lines)?;
        self.run(&["systemctl", "daemon-reload"])?;
        Ok(())
    }

    /// Copies a certificate to where LoadCredential= of the unit reads it.
    pub fn install_certificate(&self, certificate: &Certificate) -> Result<()> {
        for path in [certificate.chain(), certificate.key()] {
            let file =
                path.file_name().and_then(|name| name.to_str()).context("the path has no file name")?;
            self.write(&format!("etc/{}/{file}", self.name), &fs::read_to_string(&path)?)?;
        }
        Ok(())
    }

    /// Installs a certificate, enables the LoadCredential= lines that the installed unit has as comments, and starts
    /// the TLS socket.
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

    /// Starts another socket unit of the service: `tls` or `admin`.
    pub fn start_socket(&self, kind: &str) -> Result<()> {
        self.run(&["systemctl", "start", &format!("{}-{kind}.socket", self.name)])?;
        Ok(())
    }

    /// Writes a file inside; `path` is relative to the root of the container.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path(path);
        fs::create_dir_all(path.parent().context("the path has no parent folder")?)?;
        fs::write(&path, text).with_context(|| format!("{}", path.display()))
    }

    /// A path inside, as a path of the host.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.leader.as_raw_nonzero().to_string()).join("root").join(path)
    }

    /// The installed binary, as a path of the host.
    pub fn binary(&self) -> PathBuf {
        self.stage.path().join("usr/local/bin").join(&self.name)
    }

    /// Replaces the binary by renaming a copy over it, as an upgrade does: a running process keeps the old file.
    pub fn replace_binary(&self, with: &Path) -> Result<()> {
        let aside = self.binary().with_extension("new");
        copy_program(with, &aside)?;
        Ok(fs::rename(&aside, self.binary())?)
    }

    /// A function with which a thread moves into the network of the container.
    pub fn enter(&self) -> impl FnOnce() + Send + 'static {
        let network = format!("/proc/{}/ns/net", self.leader.as_raw_nonzero());
        move || {
            let network = fs::File::open(network).expect("the container runs");
            let network = std::os::fd::AsFd::as_fd(&network);
            move_into_link_name_space(network, Some(LinkNameSpaceType::Network))
                .expect("the test runs as root");
        }
    }

    /// Runs `work` in the network of the container, on a thread of its own because a namespace belongs to a thread.
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

    /// The body of the response to a GET on a new connection.
    pub fn ask(&self, path: &str) -> String {
        self.inside(|| async {
            let mut connection = Connection::open(&Self::target()).await.expect("the port is open");
            connection.ask(&get(path)).await.expect("the request is answered").text()
        })
    }

    /// The address on which the socket unit as shipped listens.
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
        // No orderly shutdown, which would take seconds. When PID 1 ends, the kernel kills all other processes inside.
        let _ = kill_process(self.leader, Signal::KILL);
        let _ = self.nspawn.wait();
    }
}

fn nspawn(systemd: Systemd, package: Package<'_>, cgroups: &Cgroups) -> Result<Command> {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
    let mut command = Command::new("sh");
    // The shell moves itself into the cgroups of the container before it becomes systemd-nspawn.
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
        // On a host with the legacy cgroup layout nspawn would pass it on, and systemd 257 and later refuse to boot
        // with it.
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

/// Control groups of one container. Two containers in the same cgroup would see each other's processes as their own.
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
            // The unified hierarchy and, on a host with the legacy layout, that of systemd.
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
    // The kernel empties a cgroup a moment after its last process has ended. It does not panic, because a panic in a
    // destructor of a failing test would abort all other tests.
    let deadline = Instant::now() + TEST_TIMEOUT;
    while let Err(error) = fs::remove_dir(folder) {
        if Instant::now() >= deadline {
            eprintln!("could not remove the cgroup {}: {error}; remove it by hand", folder.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
