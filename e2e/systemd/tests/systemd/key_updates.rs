//! Clients that send KeyUpdates (RFC 8446 section 4.6.3) in the middle of a request, on real systemds. Each request is
//! answered, on a parked connection and on one that was handed over, and the connection can be handed over again.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::io::ioctl_fionread;
use testkit::certificate::Certificate;
use testkit::client::Connection;
use testkit::container::{Container, Systemd};
use testkit::process::Process;
use testkit::{on_each_systemd, wait_until};

use crate::{NAME, app_package, tls_target};

on_each_systemd! {
    requests_with_key_updates_of_rustls_are_answered_on_parked_and_moved_connections
    requests_with_key_updates_of_openssl_are_answered_on_parked_and_moved_connections
}

/// What happens between two requests: the connection is parked, and then handed over if a verb is given.
const VERBS: [Option<&str>; 6] =
    [None, Some("restart"), Some("reload"), None, Some("reload"), Some("restart")];
/// A request in three parts. No part begins with a letter that is a command of `openssl s_client`.
const PARTS: [&str; 3] = ["GET / HT", "TP/1.1\r\nho", "st: x\r\n\r\n"];

fn boot(systemd: Systemd) -> (Container, Certificate) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.enable_tls(&certificate).expect("TLS is enabled");
    container.start_socket("admin").expect("the socket unit starts");
    container.systemctl("start").expect("the start succeeds");
    (container, certificate)
}

/// Waits until the only connection is parked, and then runs the verb and waits until the next process has parked it. Without
/// the second wait the old process could answer the next request, because `systemctl reload` returns before the handover.
/// Returns the generation that answers afterwards.
fn park_and_move(container: &Container, generation: u64, verb: Option<&str>) -> u64 {
    wait_until_parked(container, generation);
    let Some(verb) = verb else { return generation };
    container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
    wait_until_parked(container, generation + 1);
    generation + 1
}

fn wait_until_parked(container: &Container, generation: u64) {
    let socket = container.path(&format!("run/{NAME}-admin.sock"));
    wait_until(&format!("generation {generation} has parked the connection"), || {
        let mut curl = container.outside(&["curl", "--silent", "--max-time", "10", "--unix-socket"]);
        let metrics = curl.arg(&socket).arg("http://localhost/metrics").output().expect("curl runs").stdout;
        let metrics = String::from_utf8_lossy(&metrics);
        metrics.contains("\noutlive_connections{stage=\"parked\"} 1\n")
            && metrics.contains(&format!("\noutlive_generation {generation}\n"))
    });
}

fn requests_with_key_updates_of_rustls_are_answered_on_parked_and_moved_connections(systemd: Systemd) {
    let (container, certificate) = boot(systemd);
    let target = tls_target(&certificate, "http/1.1");
    container.inside(|| async {
        let mut connection = Connection::open(&target).await.expect("the port is open");
        let mut generation = 1;
        // The first request reaches rustls itself, because the connection has not been parked yet.
        for number in 0..=VERBS.len() {
            for part in PARTS {
                connection.update_keys().expect("the keys are updated");
                connection.send(part.as_bytes()).await.expect("the bytes are sent");
            }
            let answer = connection.answer().await.expect("the request is answered");
            let text = answer.text();
            assert!(text.contains(&format!("generation {generation},")) && !answer.closes(), "{text}");
            if let Some(verb) = VERBS.get(number) {
                generation = park_and_move(&container, generation, *verb);
            }
        }
    });
}

/// A running `openssl s_client`. A line that begins with certain letters is a command.
struct OpenSsl {
    process: Process,
    output: Arc<Mutex<String>>,
}

impl OpenSsl {
    fn start(container: &Container) -> Self {
        let script = "exec openssl s_client -connect 127.0.0.1:8443 -tls1_3 2>&1";
        let mut command = container.outside(&["sh", "-c", script]);
        let mut process =
            Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).expect("openssl runs");
        let mut output = process.child().stdout.take().expect("the stream is piped");
        let output_text = Arc::new(Mutex::new(String::new()));
        let shared = output_text.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                shared
                    .lock()
                    .expect("the lock is not poisoned")
                    .push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        Self { process, output: output_text }
    }

    /// Writes `text` and waits until openssl has read it. A command is only recognized at the beginning of a read.
    fn send(&mut self, text: &str) {
        let input = self.process.child().stdin.as_mut().expect("the stream is piped");
        input.write_all(text.as_bytes()).expect("the process runs");
        wait_until("openssl has read it", || ioctl_fionread(&*input).expect("the ioctl succeeds") == 0);
    }

    fn wait_for(&self, what: &str, times: usize) {
        let count = || self.output.lock().expect("the lock is not poisoned").matches(what).count();
        let wait = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until(what, || count() >= times);
        }));
        assert!(
            wait.is_ok(),
            "{what}, {} of {times} times: {}",
            count(),
            self.output.lock().expect("the lock is not poisoned")
        );
    }
}

fn requests_with_key_updates_of_openssl_are_answered_on_parked_and_moved_connections(systemd: Systemd) {
    let (container, _certificate) = boot(systemd);
    let mut client = OpenSsl::start(&container);
    let mut generation = 1;
    let mut updates = 0;
    for number in 0..=VERBS.len() {
        // `k` updates the keys of the client, `K` also requests an update from the server.
        for (command, part) in ["k\n", "K\n", "k\n"].into_iter().zip(PARTS) {
            client.send(command);
            updates += 1;
            client.wait_for("KEYUPDATE", updates);
            client.send(part);
        }
        client.wait_for("\r\n\r\npid ", number + 1);
        client.wait_for(&format!("generation {generation},"), 1);
        if let Some(verb) = VERBS.get(number) {
            generation = park_and_move(&container, generation, *verb);
        }
    }
}
