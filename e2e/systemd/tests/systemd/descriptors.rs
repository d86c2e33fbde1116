//! A process that may open fewer file descriptors than its predecessor has connections (`LimitNOFILE=`).

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use futures_util::future::join_all;
use testkit::client::{Connection, get};
use testkit::container::{Container, Systemd};
use testkit::{on_each_systemd, wait_until};

use crate::app_package;

on_each_systemd! {
    restart_with_too_few_descriptors_answers_each_connection
    reload_with_too_few_descriptors_answers_each_connection
    second_restart_with_enough_descriptors_keeps_waiting_connections
}

const CONNECTIONS: usize = 700;

/// A limit below half the number of connections. The idle timeout is shorter than by default, because waiting
/// connections get a descriptor only when adopted ones are closed.
const FEW: &str = "[Service]\nLimitNOFILE=300\nEnvironment=APP_IDLE_TIMEOUT=15s\n";
/// A limit above the number of connections, but by less than what the process needs besides, so that some have to wait.
/// Below the number of connections, the kernel would refuse to pass all of them on at the next restart.
const NEARLY_ENOUGH: &str = "[Service]\nLimitNOFILE=760\n";

/// Boots a service with a user of its own. The kernel limits the number of descriptors in flight per user (unix(7)),
/// also across containers, so a service of another test with the same user would change the result.
fn boot(systemd: Systemd) -> Container {
    static BOOTED: AtomicU32 = AtomicU32::new(0);
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    let (test, number) = (std::process::id(), BOOTED.fetch_add(1, Relaxed));
    let user = format!("[Service]\nUser=descriptors{test}-{number}\n");
    container.add_to_unit("service", "user", &user).expect("the drop-in is written");
    container
}

async fn open_idle() -> Vec<Connection> {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection =
            Connection::open(&Container::target()).await.expect("the connection is established");
        assert!(!connection.ask(&get("/")).await.expect("the request is answered").closes());
        connections.push(connection);
    }
    connections
}

/// Sends a request on all of `connections` at once; returns how many of them the server closes after its response.
async fn ask_all(connections: &mut [Connection]) -> usize {
    let answers = join_all(connections.iter_mut().rev().map(async |connection| {
        let answer = connection.ask(&get("/")).await.expect("the request is answered");
        assert_eq!(answer.status, 200);
        answer.closes()
    }));
    answers.await.into_iter().filter(|closes| *closes).count()
}

/// The log messages of the service so far.
fn messages(container: &Container) -> Vec<String> {
    let entries = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
    entries.iter().filter_map(|entry| Some(entry["MESSAGE"].as_str()?.to_owned())).collect()
}

fn wait_for_message(container: &Container, text: &str) -> String {
    let mut found = None;
    wait_until(text, || {
        found = messages(container).into_iter().find(|message| message.contains(text));
        found.is_some()
    });
    found.expect("the message was found")
}

fn assert_each_connection_is_answered_after(systemd: Systemd, verb: &str) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connections = open_idle().await;
        container.add_to_unit("service", "descriptors", FEW).expect("the drop-in is written");
        container.systemctl(verb).expect("systemctl succeeds");
        let message = wait_for_message(&container, "wait for file descriptors");
        let mut numbers = message.split(' ').filter_map(|word| word.parse::<usize>().ok());
        let (adopted, waiting) =
            (numbers.next().expect("the value is a number"), numbers.next().expect("the value is a number"));
        assert_eq!(adopted + waiting, CONNECTIONS, "{message}");
        wait_for_message(&container, &format!("handed over {CONNECTIONS} connections"));
        let ended = ask_all(&mut connections).await;
        assert!(ended <= waiting, "{ended} connections were closed, and only {waiting} waited");
        let message = wait_for_message(&container, "no connection waits for file descriptors anymore");
        assert!(message.ends_with(&format!(" {ended} closed after a response")), "{message}: {ended}");
        let closed = messages(&container)
            .into_iter()
            .find(|message| message.contains("of an old process, and closed them:"));
        assert_eq!(closed, None);
    });
}

fn restart_with_too_few_descriptors_answers_each_connection(systemd: Systemd) {
    assert_each_connection_is_answered_after(systemd, "restart");
}

fn reload_with_too_few_descriptors_answers_each_connection(systemd: Systemd) {
    assert_each_connection_is_answered_after(systemd, "reload");
}

fn second_restart_with_enough_descriptors_keeps_waiting_connections(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(|| async {
        let mut connections = open_idle().await;
        container.add_to_unit("service", "descriptors", NEARLY_ENOUGH).expect("the drop-in is written");
        container.systemctl("restart").expect("the restart succeeds");
        wait_for_message(&container, "wait for file descriptors");
        container.add_to_unit("service", "descriptors", "").expect("the drop-in is written");
        container.systemctl("restart").expect("the restart succeeds");
        assert_eq!(ask_all(&mut connections).await, 0);
        assert_eq!(ask_all(&mut connections).await, 0);
    });
}
