//! What the tests and the benchmark share.

pub mod binaries;
pub mod certificate;
pub mod client;
pub mod container;
pub mod debian;
pub mod frames;
pub mod load;
pub mod process;
pub mod release;
pub mod service;
pub mod svg;
pub mod tls_service;
pub mod verbs;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Each promise, a function of a [`Systemd`](container::Systemd), as a test on each of them.
#[macro_export]
macro_rules! on_each_systemd {
    ($($promise:ident)*) => {
        $crate::on_one! { this_systemd Host $($promise)* }
        $crate::on_one! { systemd_257 V257 $($promise)* }
    };
}

/// The same where a promise depends on what systemd does itself: on Debian unstable's too, the newest.
#[macro_export]
macro_rules! on_each_systemd_and_unstable {
    ($($promise:ident)*) => {
        $crate::on_each_systemd! { $($promise)* }
        $crate::on_one! { systemd_unstable Unstable $($promise)* }
    };
}

/// The same about packages, on each Debian.
#[macro_export]
macro_rules! on_each_debian {
    ($($promise:ident)*) => {
        $crate::on_one! { debian_12 V252 $($promise)* }
        $crate::on_one! { debian_13 V257 $($promise)* }
        $crate::on_one! { debian_unstable Unstable $($promise)* }
    };
}

/// Each promise as a test on one of them, in a module of this name.
#[macro_export]
macro_rules! on_one {
    ($module:ident $systemd:ident $($promise:ident)*) => {
        mod $module {
            $(#[test] fn $promise() { super::$promise($crate::container::Systemd::$systemd); })*
        }
    };
}

/// How long a test waits for an event before it fails. No test measures with it: it only ends a test that hangs, so it
/// is far longer than any event takes on a slow machine that is busy with something else.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(120);

/// Held by a test whose load takes all that the machine has: one of them at a time, while others wait for something.
pub fn exclusive_cpu() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` to its end on a runtime of this thread.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the runtime is built")
        .block_on(async {
            tokio::time::timeout(TEST_TIMEOUT * 5, work).await.expect("the work ends within the limit")
        })
}

/// An address for a server that binds it itself. Its port is below those that connections are given
/// (`ip_local_port_range` of ip(7)): a load opens thousands, and one of them could take it first.
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

/// Waits until `done`, which nothing announces. It looks a sixth of the time: others have something to do.
pub fn wait_until(what: &str, done: impl FnMut() -> bool) {
    wait_until_within(TEST_TIMEOUT, what, done);
}

/// As `wait_until`, for what takes far longer, such as a compiler's work beside that of others.
pub fn wait_until_within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if done() {
            return;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2).max(begun.elapsed() * 5));
    }
}
