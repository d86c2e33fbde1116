//! Counts the instructions that a server executes for one request, as callgrind (valgrind) sees them: those of its own
//! process, without the kernel. The counts of several runs differ by less than 1 %, also while other processes use the machine.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// The protocol of the client, which sends one request after the other on one connection.
#[derive(Clone, Copy, Debug)]
pub enum Protocol {
    Http1,
    Http2,
}

/// How many requests are counted. Timers can take 500,000 instructions more in one process than in another, because their
/// work depends on the time that the process takes. Divided by fewer requests that would be too much.
const REQUESTS: u32 = 8_000;

/// The instructions of the server `binary` for one `GET /`. The server takes its listener from `LISTEN_FDS`.
pub fn instructions_of_request(binary: &Path, protocol: Protocol) -> Result<f64> {
    // The difference of two runs, because it has neither start and end of the process nor its first requests.
    let few = instructions_of_process(binary, protocol, REQUESTS)?;
    let many = instructions_of_process(binary, protocol, 2 * REQUESTS)?;
    let difference =
        u32::try_from(many.saturating_sub(few)).context("a request cannot take so many instructions")?;
    Ok(f64::from(difference) / f64::from(REQUESTS))
}

/// The instructions of a process that answers `requests` requests.
fn instructions_of_process(binary: &Path, protocol: Protocol, requests: u32) -> Result<u64> {
    let folder = tempfile::tempdir()?;
    let counts = folder.path().join("callgrind.out");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut server = Command::new("valgrind")
        .args(["--quiet", "--tool=callgrind"])
        .arg(format!("--callgrind-out-file={}", counts.display()))
        .arg(binary)
        // Otherwise the count would depend on the scheduling of the threads.
        .envs([("TOKIO_WORKER_THREADS", "1"), ("LISTEN_FDS", "1"), ("LISTEN_FDS_FIRST_FD", "0")])
        .env_remove("LISTEN_FDNAMES")
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("could not start valgrind: make e2e-deps installs it")?;
    let asked = ask(address, protocol, requests);
    kill_process(Pid::from_child(&server), Signal::TERM)?;
    server.wait()?;
    asked.with_context(|| format!("{} did not answer", binary.display()))?;
    let counts = std::fs::read_to_string(&counts).context("callgrind has written no counts")?;
    let total = counts.lines().find_map(|line| line.strip_prefix("totals: "));
    total.context("the counts have no total")?.trim().parse().context("the total is not a number")
}

/// Sends the requests. The connection waits in the accept queue of the listener until the server is ready.
fn ask(address: SocketAddr, protocol: Protocol, requests: u32) -> Result<()> {
    let mut h2load = Command::new("h2load");
    if let Protocol::Http1 = protocol {
        h2load.arg("--h1");
    }
    h2load.args(["-c1", "-m1", "-t1"]).arg(format!("-n{requests}")).arg(format!("http://{address}/"));
    let output = h2load.output().context("could not start h2load: make e2e-deps installs it")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains(&format!(" {requests} 2xx")), "h2load: {said}");
    Ok(())
}
