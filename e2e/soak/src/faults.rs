//! The events of the soak, and which losses each of them may cause (`EVENTS`). `Scene` is the container in which they
//! run.

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use testkit::client::{Connection, get};
use testkit::container::Container;
use testkit::release::Release;

use crate::random::Random;

/// Which losses an event may cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// No lost request and no closed connection.
    Nothing,
    /// Requests in flight and connections of the process that crashed. New connections must still be accepted and
    /// answered.
    CrashedProcess,
}

impl Cost {
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::CrashedProcess => "requests and connections of the crashed process",
        }
    }
}

/// What becomes of parked connections in a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// They stay open.
    Kept,
    /// They may be closed.
    Unknown,
}

/// A restart, a reload or a fault.
pub struct Event {
    pub name: &'static str,
    pub cost: Cost,
    /// Relative probability of the event.
    pub weight: u32,
    run: fn(&Scene, &mut Random) -> Result<()>,
}

/// `--takeover-timeout` of the service. It is short, because events with a release that never becomes ready wait for
/// it.
pub const TAKEOVER_TIMEOUT: &str = "1s";
/// Time limit of one event.
const LIMIT: Duration = Duration::from_secs(30);
/// Connections that are parked at a crash and must not be lost.
const PARKED: usize = 20;

pub const EVENTS: &[Event] = &[
    event("restart", Cost::Nothing, 12, |scene, _| scene.verb("restart")),
    event("reload", Cost::Nothing, 12, |scene, _| scene.verb("reload")),
    event("reload and restart at once", Cost::Nothing, 4, |scene, random| {
        let mut verbs = ["reload", "restart"];
        verbs.rotate_left(random.below(2));
        let children = verbs.map(|verb| scene.begin(&["systemctl", verb, &scene.unit]));
        for child in children {
            // The exit codes are ignored, because the second job may replace the first one in systemd's queue.
            child?.wait()?;
        }
        Ok(())
    }),
    event("HUP", Cost::Nothing, 4, |scene, _| {
        let main = scene.main()?;
        kill_process(main, Signal::HUP)?;
        scene.until("another main process", || Ok(scene.main()? != main))
    }),
    event("daemon-reload", Cost::Nothing, 2, |scene, _| scene.run(&["systemctl", "daemon-reload"])),
    event("daemon-reexec", Cost::Nothing, 2, |scene, _| scene.reexec()),
    event("daemon-reexec during a reload", Cost::Nothing, 4, |scene, random| {
        let reload = scene.begin(&["systemctl", "reload", &scene.unit])?;
        scene.pause(random, 100);
        scene.reexec()?;
        // systemctl loses its connection to PID 1 and fails, but the reload itself continues.
        let _ = finish(reload);
        Ok(())
    }),
    event("a release that exits", Cost::Nothing, 2, |scene, _| scene.failing_reload("exit 3")),
    event("a release that hangs before READY=1", Cost::Nothing, 1, |scene, _| {
        scene.failing_reload("exec sleep 100")
    }),
    event("a release without memory", Cost::Nothing, 2, |scene, _| {
        scene.failing_reload("ulimit -v 20000; exec -a \"$0\" /usr/local/lib/good \"$@\"")
    }),
    event("a release that is killed at its start", Cost::Nothing, 2, |scene, _| {
        scene.failing_reload("kill -KILL $$")
    }),
    event("a release that dies after READY=1", Cost::CrashedProcess, 2, |scene, random| {
        let after = 0.1 + 0.05 * f64::from(u32::try_from(random.below(6))?);
        scene.put_bad(&format!(
            "(sleep {after}; kill -ABRT $$) <&- >&- 2>&- & exec -a \"$0\" /usr/local/lib/good \"$@\""
        ))?;
        let (main, before) = (scene.main()?, scene.processes()?);
        let reload = scene.begin(&["systemctl", "reload", &scene.unit])?;
        let _ = finish(reload);
        scene.put_good()?;
        scene.until("the bad release's end", || {
            let now = scene.main()?;
            Ok(now != main && !before.contains(&now) && scene.is_good(now))
        })
    }),
    event("KILL of the successor", Cost::CrashedProcess, 6, |scene, random| {
        let before = scene.processes()?;
        let reload = scene.begin(&["systemctl", "reload", &scene.unit])?;
        scene.pause(random, 120);
        if let Some(successor) = scene.successor(&before)? {
            let _ = kill_process(successor, Signal::KILL);
        }
        let _ = finish(reload);
        Ok(())
    }),
    event("KILL of the predecessor after the takeover", Cost::CrashedProcess, 3, |scene, random| {
        let main = scene.main()?;
        scene.verb("reload")?;
        scene.pause(random, 5);
        let _ = kill_process(main, Signal::KILL);
        Ok(())
    }),
    event("KILL of the main process", Cost::CrashedProcess, 2, |scene, _| {
        scene.crash(Signal::KILL).map(drop)
    }),
    event("KILL of the main process with parked connections", Cost::CrashedProcess, 3, |scene, _| {
        scene.with_parked(async || scene.crash(Signal::KILL))
    }),
    event("ABRT of the main process with parked connections", Cost::CrashedProcess, 2, |scene, _| {
        scene.with_parked(async || scene.crash(Signal::ABORT))
    }),
    event("KILL of the successor with parked connections", Cost::CrashedProcess, 3, |scene, random| {
        scene.with_parked(async || {
            let (main, before) = (scene.main()?, scene.processes()?);
            let reload = scene.begin(&["systemctl", "reload", &scene.unit])?;
            scene.pause(random, 120);
            if let Some(successor) = scene.successor(&before)? {
                let _ = kill_process(successor, Signal::KILL);
            }
            let _ = finish(reload);
            // If it was killed after the takeover, systemd starts the service again, and the connections were those of the
            // successor, which had no duplicates yet.
            scene.settle()?;
            Ok(if scene.main()? == main { Fate::Kept } else { Fate::Unknown })
        })
    }),
    event("two KILLs at random moments of the backup", Cost::CrashedProcess, 3, |scene, random| {
        scene.container.inside(async || {
            let mut connections = scene.connections().await?;
            for limit in [10_000, 1_000] {
                scene.pause(random, limit);
                scene.crash(Signal::KILL)?;
            }
            // Each connection is either closed, or answers as if nothing had happened.
            for connection in &mut connections {
                if let Ok(answer) = connection.ask(&get("/")).await {
                    ensure!(answer.status == 200, "a connection received {} after a crash", answer.status);
                    connection
                        .ask(&get("/"))
                        .await
                        .context("a connection was answered once and then closed")?;
                }
            }
            Ok(())
        })
    }),
    event("STOP and CONT of the main process", Cost::Nothing, 3, |scene, random| {
        let main = scene.main()?;
        kill_process(main, Signal::STOP)?;
        scene.pause(random, 300);
        Ok(kill_process(main, Signal::CONT)?)
    }),
    event("STOP and CONT of the main process during a reload", Cost::Nothing, 3, |scene, random| {
        let main = scene.main()?;
        let reload = scene.begin(&["systemctl", "reload", &scene.unit])?;
        scene.pause(random, 100);
        // The old process may have exited already.
        let is_stopped = kill_process(main, Signal::STOP).is_ok();
        scene.pause(random, 300);
        if is_stopped {
            let _ = kill_process(main, Signal::CONT);
        }
        let _ = finish(reload);
        Ok(())
    }),
    event("STOP and CONT of the successor", Cost::Nothing, 3, |scene, random| {
        let before = scene.processes()?;
        let reload = scene.begin(&["systemctl", "reload", &scene.unit])?;
        scene.pause(random, 100);
        let successor = scene.successor(&before)?.filter(|pid| kill_process(*pid, Signal::STOP).is_ok());
        scene.pause(random, 300);
        if let Some(successor) = successor {
            let _ = kill_process(successor, Signal::CONT);
        }
        let _ = finish(reload);
        Ok(())
    }),
    event("journald restarted", Cost::Nothing, 2, |scene, _| {
        scene.run(&["systemctl", "restart", "systemd-journald.service"])
    }),
    event("journald's socket gone", Cost::Nothing, 1, |scene, _| {
        let (socket, aside) = ("/run/systemd/journal/socket", "/run/systemd/journal/aside");
        scene.run(&["mv", socket, aside])?;
        let done = scene.verb("reload").and_then(|()| scene.verb("restart"));
        scene.run(&["mv", aside, socket])?;
        done
    }),
    event("D-Bus gone", Cost::Nothing, 1, |scene, _| {
        scene.run(&["systemctl", "stop", "dbus.socket", "dbus.service"])?;
        let done = scene.verb("reload").and_then(|()| scene.verb("restart"));
        scene.run(&["systemctl", "start", "dbus.socket"])?;
        done
    }),
    event("the runtime directory removed", Cost::Nothing, 1, |scene, _| {
        scene.run(&["rm", "-r", &format!("/run/{}", scene.name)])?;
        ensure!(scene.verb("reload").is_err(), "the reload succeeded without a takeover socket");
        scene.verb("restart")?;
        scene.verb("reload")
    }),
    event("no fd left", Cost::Nothing, 2, |scene, random| {
        let main = scene.main()?;
        let open = fs::read_dir(format!("/proc/{}/fd", main.as_raw_nonzero()))?.count() as u64;
        let before = fd_limit(main)?;
        set_fd_limit(main, Rlimit { current: Some(open), ..before })?;
        scene.pause(random, 300);
        set_fd_limit(main, before)
    }),
    event("/run full", Cost::Nothing, 1, |scene, _| {
        let left = scene.container.run(&["df", "--output=avail", "--block-size=1", "/run"])?;
        let left = left.lines().last().context("df printed nothing")?.trim().to_owned();
        scene.run(&["fallocate", "--length", &left, "/run/full"])?;
        let done = scene.verb("reload").and_then(|()| scene.verb("restart"));
        scene.run(&["rm", "/run/full"])?;
        done
    }),
];

const fn event(
    name: &'static str,
    cost: Cost,
    weight: u32,
    run: fn(&Scene, &mut Random) -> Result<()>,
) -> Event {
    Event { name, cost, weight, run }
}

impl Event {
    pub fn run(&self, scene: &Scene, random: &mut Random) -> Result<()> {
        (self.run)(scene, random)?;
        scene.settle()
    }
}

/// Waits for a command. Events whose command may fail ignore the result.
fn finish(mut command: Child) -> Result<()> {
    ensure!(command.wait()?.success(), "the command failed");
    Ok(())
}

/// The container with the service in which the events run.
pub struct Scene {
    pub container: Container,
    name: String,
    unit: String,
    good: Release,
    /// `cgroup.procs` of the service, as a path outside the container.
    processes: PathBuf,
    /// How often systemd has executed itself again.
    pub reexecs: AtomicUsize,
}

impl Scene {
    /// The service must be active, because its control group exists only then.
    pub fn new(container: Container, name: &str) -> Result<Self> {
        let group = container.show("ControlGroup")?;
        let mounts = ["sys/fs/cgroup", "sys/fs/cgroup/systemd", "sys/fs/cgroup/unified"];
        let mut files =
            mounts.map(|mount| container.path(&format!("{mount}{group}/cgroup.procs"))).into_iter();
        let processes = files.find(|file| file.exists()).context("the service has no control group")?;
        let unit = container.unit("service");
        let good = Release::copy_of(&container)?;
        Ok(Self { container, name: name.to_owned(), unit, good, processes, reexecs: AtomicUsize::new(0) })
    }

    /// Whether all parked connections, which are at least [`PARKED`], have duplicates in the store.
    fn has_backup(&self) -> Result<bool> {
        let socket = self.container.path(&format!("run/{}-admin.sock", self.name));
        let mut curl = self.container.outside(&["curl", "--silent", "--max-time", "10", "--unix-socket"]);
        let metrics = curl.arg(socket).arg("http://localhost/metrics").output()?.stdout;
        let metrics = String::from_utf8(metrics)?;
        let value = |name: &str| {
            let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.with_context(|| format!("no {name} in the metrics"))
        };
        let parked = value("outlive_connections{stage=\"parked\"}")?;
        Ok(parked == value("outlive_connections_backed_up")? && parked.parse::<usize>()? >= PARKED)
    }

    /// New connections, each of which has been used once.
    async fn connections(&self) -> Result<Vec<Connection>> {
        let mut connections = Vec::new();
        for _ in 0..PARKED {
            let mut connection = Connection::open(&Container::target()).await?;
            connection.ask(&get("/")).await?;
            connections.push(connection);
        }
        Ok(connections)
    }

    /// Runs `fault` when parked connections have duplicates in the store. They must be answered afterwards, unless their
    /// fate is unknown.
    fn with_parked(&self, fault: impl AsyncFnOnce() -> Result<Fate> + Send) -> Result<()> {
        self.container.inside(async || {
            let mut parked = self.connections().await?;
            self.until("duplicates of the parked connections", || self.has_backup())?;
            if fault().await? == Fate::Kept {
                for connection in &mut parked {
                    connection.ask(&get("/")).await.context("a parked connection was lost in a crash")?;
                }
            }
            Ok(())
        })
    }

    /// Sends a deadly signal to the main process, and waits until systemd has started the next one.
    fn crash(&self, signal: Signal) -> Result<Fate> {
        let main = self.main()?;
        kill_process(main, signal)?;
        self.until("another main process", || Ok(self.main()? != main))?;
        Ok(Fate::Kept)
    }

    fn run(&self, command: &[&str]) -> Result<()> {
        self.container.run(command).map(drop)
    }

    fn reexec(&self) -> Result<()> {
        self.reexecs.fetch_add(1, Ordering::Relaxed);
        self.run(&["systemctl", "daemon-reexec"])
    }

    fn verb(&self, verb: &str) -> Result<()> {
        self.container.systemctl(verb).map(drop)
    }

    fn begin(&self, command: &[&str]) -> Result<Child> {
        let mut command = self.container.command(command);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        Ok(command.spawn()?)
    }

    /// Sleeps for a random time of at most `limit` milliseconds.
    #[expect(clippy::unused_self, reason = "it reads like the other steps of an event")]
    fn pause(&self, random: &mut Random, limit: usize) {
        let micros = random.below(limit * 1000);
        std::thread::sleep(Duration::from_micros(micros as u64));
    }

    fn until(&self, what: &str, done: impl Fn() -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        loop {
            let now = done();
            if let Ok(true) = now {
                return Ok(());
            }
            if begun.elapsed() > LIMIT {
                let state = self.container.run(&[
                    "systemctl",
                    "status",
                    "--full",
                    "--no-pager",
                    "--lines=40",
                    &self.unit,
                ]);
                bail!(
                    "timed out waiting for {what} ({now:?})\n{}",
                    state.unwrap_or_else(|error| format!("{error:#}"))
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the service is active and systemd has no job for it.
    fn settle(&self) -> Result<()> {
        let properties = "ActiveState,SubState,Job";
        self.until("the service to be active", || {
            let shown = self.container.run(&["systemctl", "show", "--property", properties, &self.unit])?;
            let has = |wanted: &str| shown.lines().any(|line| line == wanted);
            let has_job =
                shown.lines().any(|line| line.starts_with("Job=") && !["Job=", "Job=0"].contains(&line));
            ensure!(has("ActiveState=active") && has("SubState=running") && !has_job, "{shown}");
            Ok(self.main().is_ok())
        })
    }

    /// The processes of the service, with their pids outside the container.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let text = fs::read_to_string(&self.processes)?;
        Ok(text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect())
    }

    /// The main process, with its pid outside the container. systemd reports the inner pid, which `NSpid:` maps
    /// (proc(5)).
    pub fn main(&self) -> Result<Pid> {
        let inside = self.container.show("MainPID")?;
        let is_main = |pid: &Pid| {
            let status =
                fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            numbers.split_whitespace().last() == Some(inside.as_str())
        };
        self.processes()?.into_iter().find(is_main).context("no main process")
    }

    /// The successor of the running reload, which is not among the processes in `before`.
    fn successor(&self, before: &[Pid]) -> Result<Option<Pid>> {
        let is_successor = |pid: &Pid| {
            let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
            !before.contains(pid)
                && environment.split(|byte| *byte == 0).any(|variable| variable == b"TAKEOVER_ROLE=successor")
        };
        Ok(self.processes()?.into_iter().find(is_successor))
    }

    /// Whether the process runs the good release, not a script around it.
    fn is_good(&self, pid: Pid) -> bool {
        let file = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).unwrap_or_default();
        file.ends_with(&self.name)
    }

    /// Installs a release whose successor runs the shell commands `instead` of serving.
    fn put_bad(&self, instead: &str) -> Result<()> {
        self.container.replace_binary(Release::bad_successor(&self.container, instead)?.path())
    }

    fn put_good(&self) -> Result<()> {
        self.container.replace_binary(self.good.path())
    }

    /// Reloads to a release whose successor never serves. The reload must fail, and the old process must stay.
    fn failing_reload(&self, instead: &str) -> Result<()> {
        let main = self.main()?;
        self.put_bad(instead)?;
        let failed = self.verb("reload").is_err();
        self.put_good()?;
        ensure!(failed, "the reload to a bad release succeeded");
        ensure!(self.main()? == main, "the old process was replaced");
        Ok(())
    }
}

/// The limit of open files of another process, from /proc/PID/limits (proc(5)).
fn fd_limit(pid: Pid) -> Result<Rlimit> {
    let limits = fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero()))?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .context("no Max open files in /proc/PID/limits")?;
    let mut limits = line.split_whitespace().map(|limit| limit.parse().ok());
    Ok(Rlimit { current: limits.next().flatten(), maximum: limits.next().flatten() })
}

fn set_fd_limit(pid: Pid, limit: Rlimit) -> Result<()> {
    prlimit(Some(pid), Resource::Nofile, limit)?;
    Ok(())
}
