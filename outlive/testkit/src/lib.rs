//! Helpers that the tests, the soak and the benchmarks share: systemds in containers, clients, loads.
//!
//! - [`container`] boots a real systemd with the service installed; [`service`] and [`tls_service`] start the binary
//!   without systemd, with a socket passed to it or with listeners of its own; [`threads`] starts it as a process to which
//!   the kernel refuses threads.
//! - [`client`] has clients for HTTP/1.1 and HTTP/2 that never retry, and [`events`] one for an event stream; [`load`]
//!   runs many clients and reports lost requests and closed connections; [`verbs`] restarts or reloads the service under
//!   a load.
//! - [`binaries`], [`certificate`], [`debian`] and [`release`] make what is installed: the binary, a certificate,
//!   packages, and bad releases.
//! - [`frames`] writes frames of the handover channel, valid and invalid; [`http2_frames`] encodes and reads single
//!   frames of HTTP/2; [`process`] ends child processes with the test.

pub mod binaries;
pub mod certificate;
pub mod client;
pub mod container;
pub mod debian;
pub mod events;
pub mod frames;
pub mod http2_frames;
pub mod load;
pub mod process;
pub mod release;
pub mod service;
pub mod svg;
pub mod threads;
pub mod tls_service;
pub mod verbs;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Makes each function, which takes a [`Systemd`](container::Systemd), a test on this machine's systemd and on 257.
#[macro_export]
macro_rules! on_each_systemd {
    ($($promise:ident)*) => {
        $crate::on_one! { this_systemd Host $($promise)* }
        $crate::on_one! { systemd_257 V257 $($promise)* }
    };
}

/// As [`on_each_systemd`], and on the newest systemd (Debian unstable): for tests whose result depends on what systemd
/// itself does.
#[macro_export]
macro_rules! on_each_systemd_and_unstable {
    ($($promise:ident)*) => {
        $crate::on_each_systemd! { $($promise)* }
        $crate::on_one! { systemd_unstable Unstable $($promise)* }
    };
}

/// As [`on_each_systemd`], for tests of packages: on Debian 12 and 13.
#[macro_export]
macro_rules! on_each_debian {
    ($($promise:ident)*) => {
        $crate::on_one! { debian_12 V252 $($promise)* }
        $crate::on_one! { debian_13 V257 $($promise)* }
    };
}

/// Makes each function a test on one systemd, in a module of the given name. `e2e/run` counts tests by that name.
#[macro_export]
macro_rules! on_one {
    ($module:ident $systemd:ident $($promise:ident)*) => {
        mod $module {
            $(#[test] fn $promise() { super::$promise($crate::container::Systemd::$systemd); })*
        }
    };
}

/// How long a test waits for an event before it fails. It only ends a test that hangs. No test measures with it, so it
/// is far longer than any event takes on a slow and busy machine.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(120);

/// A lock for tests whose load takes all processor time. Without it, two such tests at once would miss each other's
/// time limits. Tests that mostly wait run beside it without the lock.
pub fn exclusive_cpu() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` to its end on a runtime of this thread; panics after five times [`TEST_TIMEOUT`].
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the runtime is built")
        .block_on(async {
            tokio::time::timeout(TEST_TIMEOUT * 5, work).await.expect("the work ends within the limit")
        })
}

/// A free address for a server that binds it itself. Its port is below the range from which the kernel chooses local
/// ports of connections (`ip_local_port_range` of ip(7)), because a load opens thousands of connections and one of them
/// could take the port first.
pub fn free_address() -> SocketAddr {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = std::process::id().wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + next % COUNT).expect("the port fits into 16 bits");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// Polls `done` until it is true; panics with `what` after [`TEST_TIMEOUT`]. It sleeps five times as long as a poll
/// takes, so that polling uses at most a sixth of a core and does not slow down what it waits for.
pub fn wait_until(what: &str, done: impl FnMut() -> bool) {
    wait_until_within(TEST_TIMEOUT, what, done);
}

/// As [`wait_until`], with another limit: a compiler beside other tests needs more than [`TEST_TIMEOUT`].
pub fn wait_until_within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if done() {
            return;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(2).max(begun.elapsed() * 5));
    }
}
