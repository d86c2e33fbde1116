//! Sockets of the application beside those of HTTP, in the example `ingest`: a TCP port whose connections move with their
//! state, and a UDP port that one process reads at a time.

use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

use testkit::client::{Connection, get};
use testkit::container::{Container, Systemd};
use testkit::{on_each_systemd, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{NAME, app_binary, app_package};

on_each_systemd! {
    named_sockets_lose_no_line_and_no_datagram_over_restarts_and_reloads
    socket_unit_that_the_service_does_not_use_fails_the_start_and_is_named
}

const LINES: (&str, u16) = ("127.0.0.1", 9000);
const READINGS: (&str, u16) = ("127.0.0.1", 9001);
const DEVICES: usize = 8;
const ROUNDS: usize = 30;

/// Boots a container, and turns the running service into the example `ingest` with its two socket units by a restart, as
/// docs/recipes/sockets.md describes. An established connection stays open.
fn boot(systemd: Systemd) -> Container {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    container.inside(|| async {
        let mut established = Connection::open(&Container::target()).await.expect("the port is open");
        established.ask(&get("/")).await.expect("the request is answered");
        let examples = Path::new(app_binary()).with_file_name("examples");
        container.replace_binary(&examples.join("ingest")).expect("the binary is installed");
        let lines =
            format!("[Service]\nStateDirectory=%N\nEnvironment=INGEST_FILE=/var/lib/{NAME}/readings\n");
        container.add_to_unit("service", "file", &lines).expect("the file is written");
        // The buffer takes more datagrams than are sent while no process reads.
        add_socket(&container, "readings", "ListenDatagram=9001\nReceiveBuffer=32M");
        add_socket(&container, "lines", "ListenStream=9000");
        container.systemctl("restart").expect("the restart succeeds");
        assert_eq!(established.ask(&get("/")).await.expect("the request is answered").text(), "ingest\n");
    });
    container
}

/// Adds a socket unit to the service, which receives its socket at the next restart.
fn add_socket(container: &Container, name: &str, lines: &str) {
    let unit = format!("{NAME}-{name}.socket");
    let text = format!(
        "[Socket]\n{lines}\nFileDescriptorName={name}\nService={NAME}.service\nTriggerLimitIntervalSec=0\n"
    );
    container.write(&format!("etc/systemd/system/{unit}"), &text).expect("the file is written");
    let lines = format!("[Unit]\nRequires={unit}\nAfter={unit}\n");
    container.add_to_unit("service", name, &lines).expect("the file is written");
}

struct Device {
    stream: TcpStream,
    lines: u32,
}

impl Device {
    async fn connect() -> Self {
        Self { stream: TcpStream::connect(LINES).await.expect("the port is open"), lines: 0 }
    }

    /// Sends the end of a line, a whole line and the beginning of the next one. Reads that both are confirmed.
    async fn sends(&mut self) {
        self.stream.write_all(b" of a line\nwhole\nhalf").await.expect("the connection is open");
        let expected = format!("{}\n{}\n", self.lines + 1, self.lines + 2);
        self.lines += 2;
        let mut answer = vec![0; expected.len()];
        self.stream.read_exact(&mut answer).await.expect("the lines are confirmed");
        assert_eq!(String::from_utf8_lossy(&answer), expected);
    }
}

fn named_sockets_lose_no_line_and_no_datagram_over_restarts_and_reloads(systemd: Systemd) {
    let container = boot(systemd);
    let is_over = Arc::new(AtomicBool::new(false));
    let (enter, over) = (container.enter(), is_over.clone());
    let sender = std::thread::spawn(move || {
        enter();
        let socket = UdpSocket::bind("127.0.0.1:0").expect("the port is bound");
        let mut sent = 0_u32;
        while !over.load(Acquire) {
            sent += 1;
            socket.send_to(sent.to_string().as_bytes(), READINGS).expect("the datagram is sent");
            std::thread::sleep(Duration::from_millis(1));
        }
        sent
    });
    container.inside(|| async {
        let mut devices = Vec::new();
        for _ in 0..DEVICES {
            devices.push(Device::connect().await);
        }
        for round in 0..2 * ROUNDS {
            for device in &mut devices {
                device.sends().await;
            }
            container.systemctl(["restart", "reload"][round % 2]).expect("the verb succeeds");
        }
        for device in &mut devices {
            device.sends().await;
        }
    });
    is_over.store(true, Release);
    let sent = sender.join().expect("the sender does not panic");
    let expected = (1..=sent).map(|number| number.to_string()).collect::<Vec<_>>().join("\n") + "\n";
    let file = format!("/var/lib/{NAME}/readings");
    let written = || container.run(&["cat", &file]).expect("the file exists");
    wait_until("the last datagram is written", || written().len() >= expected.len());
    assert!(written() == expected, "datagrams are lost, repeated or out of order");
}

fn socket_unit_that_the_service_does_not_use_fails_the_start_and_is_named(systemd: Systemd) {
    let container = boot(systemd);
    add_socket(&container, "raedings", "ListenDatagram=9002");
    assert!(
        container.systemctl("restart").is_err(),
        "the service started with a socket that it does not use"
    );
    wait_until("the journal names the socket", || {
        let entries = container.journal(&["-u", &container.unit("service")]).expect("journalctl succeeds");
        let wanted = "this service does not use a socket with the name raedings: expected one of admin";
        entries.iter().any(|entry| entry["MESSAGE"].as_str().is_some_and(|message| message.contains(wanted)))
    });
}
