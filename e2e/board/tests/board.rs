//! The board on this machine's systemd and on systemd 257, over restarts and reloads while clients write and read.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use testkit::client::Http2;
use testkit::container::{Container, Systemd};
use testkit::events::EventStream;
use testkit::process::make;
use testkit::{TEST_TIMEOUT, exclusive_cpu, on_each_debian, on_each_systemd, this_package, wait_until};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// Number of clients. Each has a WebSocket and an event stream, every other stream over HTTP/2.
const CLIENTS: usize = 10;
/// Number of restarts and of reloads.
const TIMES: usize = 20;
/// Number of notes that each client writes between two of them, at least.
const NOTES: u64 = 3;

on_each_systemd! {
    notes_are_not_lost_or_repeated_and_no_connection_ends_over_restarts_and_reloads
    export_prints_all_notes_beside_the_service_and_after_it
    the_unit_passes_systemd_analyze
}

on_each_debian! {
    service_of_a_user_keeps_notes_and_connections
}

fn boot(systemd: Systemd) -> Container {
    Container::boot(systemd, this_package!()).expect("the container boots")
}

struct Client {
    name: String,
    socket: WebSocketStream<TcpStream>,
    events: EventStream,
    /// All notes that it has received, of all clients.
    notes: Vec<Value>,
    /// Number of notes that it has written.
    written: u64,
}

impl Client {
    async fn open(number: usize) -> Self {
        let stream = TcpStream::connect("127.0.0.1:8080").await.expect("the port is open");
        let opened = tokio_tungstenite::client_async("ws://localhost/socket", stream).await;
        let events = if number.is_multiple_of(2) {
            EventStream::http1(&Container::target()).await
        } else {
            EventStream::http2(&mut Http2::open(&Container::target()).await.expect("the port is open")).await
        };
        let mut client = Self {
            name: format!("client {number}"),
            socket: opened.expect("the WebSocket opens").0,
            events: events.expect("the response begins"),
            notes: Vec::new(),
            written: 0,
        };
        let name = client.name.clone();
        assert_eq!(client.ask(&name).await, json!({ "name": name }));
        client
    }

    /// Sends a message through the WebSocket, and returns the next one, which has to be the answer.
    async fn ask(&mut self, text: &str) -> Value {
        self.socket.send(Message::text(text)).await.expect("the WebSocket is open");
        let answer = timeout(TEST_TIMEOUT, self.socket.next()).await.expect("an answer arrives in time");
        let answer = answer.expect("the WebSocket is open").expect("the connection has no error");
        serde_json::from_str(answer.to_text().expect("the answer is text")).expect("the answer is JSON")
    }

    /// Writes a note, and reads events until it has received the note.
    async fn write(&mut self) {
        let answer = self.ask(&self.written.to_string()).await;
        let id = answer["note"].as_u64().unwrap_or_else(|| panic!("{}: {answer}", self.name));
        self.written += 1;
        self.read_until(id).await;
    }

    /// Reads events up to the note with this id. Each has to have the id that follows that of the one before.
    async fn read_until(&mut self, id: u64) {
        while (self.notes.len() as u64) < id {
            let event = timeout(TEST_TIMEOUT, self.events.next()).await.expect("an event arrives in time");
            let event = event.expect("the connection has no error").expect("the response has not ended");
            let data =
                event.lines().find_map(|line| line.strip_prefix("data: ")).expect("the event has data");
            let note: Value = serde_json::from_str(data).expect("the data is JSON");
            assert_eq!(note["id"], self.notes.len() + 1, "{} received {note}", self.name);
            self.notes.push(note);
        }
    }
}

/// The clients write without a pause, and never connect again.
fn notes_are_not_lost_or_repeated_and_no_connection_ends_over_restarts_and_reloads(systemd: Systemd) {
    let container = boot(systemd);
    let _alone = exclusive_cpu();
    // The number of notes that each client has sent.
    let written: Arc<[AtomicU64; CLIENTS]> = Arc::default();
    let is_over = Arc::new(AtomicBool::new(false));
    let (enter, counts, over) = (container.enter(), written.clone(), is_over.clone());
    let clients = std::thread::spawn(move || {
        enter();
        testkit::block_on(async {
            let mut clients = join_all((0..CLIENTS).map(Client::open)).await;
            let write = async |(client, count): (&mut Client, &AtomicU64)| {
                while !over.load(Acquire) {
                    client.write().await;
                    count.store(client.written, Release);
                }
            };
            join_all(clients.iter_mut().zip(&*counts).map(write)).await;
            let all = clients.iter().map(|client| client.written).sum();
            join_all(clients.iter_mut().map(|client| client.read_until(all))).await;
            clients
        })
    });
    let wait_for_notes = || {
        let wanted = written.each_ref().map(|count| count.load(Acquire) + NOTES);
        wait_until("each client writes and receives its notes", || {
            let has_all = written.iter().zip(wanted).all(|(count, wanted)| count.load(Acquire) >= wanted);
            has_all || clients.is_finished()
        });
    };
    wait_for_notes();
    let mut main = container.show("MainPID").expect("systemctl show succeeds");
    for verb in ["restart", "reload"].repeat(TIMES) {
        container.systemctl(verb).expect(verb);
        let next = container.show("MainPID").expect("systemctl show succeeds");
        assert_ne!(main, next, "another process serves after {verb}");
        main = next;
        wait_for_notes();
    }
    is_over.store(true, Release);
    let clients = clients.join().expect("no client fails");
    for client in &clients {
        assert_eq!(
            client.notes, clients[0].notes,
            "{} and another one received different notes",
            client.name
        );
        let own = client.notes.iter().filter(|note| note["author"] == client.name);
        let numbers: Vec<_> = own.filter_map(|note| note["text"].as_str()?.parse::<u64>().ok()).collect();
        assert!(numbers.iter().copied().eq(0..client.written), "{}: {numbers:?}", client.name);
    }
    eprintln!("{TIMES} restarts and reloads: {} notes", clients[0].notes.len());
}

/// As the recipe `docs/recipes/commands.md` runs a command.
fn export_prints_all_notes_beside_the_service_and_after_it(systemd: Systemd) {
    let container = boot(systemd);
    container.inside(async || {
        let mut client = Client::open(0).await;
        for _ in 0..3 {
            client.write().await;
        }
    });
    let export = || {
        let properties = ["DynamicUser=yes", "User=board", "StateDirectory=board"];
        let properties = properties.map(|property| format!("--property={property}"));
        let mut command = vec!["systemd-run", "--quiet", "--wait", "--pipe"];
        command.extend(properties.iter().map(String::as_str));
        container.run(&[&command[..], &["board", "export"]].concat()).expect("the command succeeds")
    };
    let line = |number| format!("{{\"id\":{},\"author\":\"client 0\",\"text\":\"{number}\"}}\n", number + 1);
    let expected: String = (0..3).map(line).collect();
    assert_eq!(export(), expected);
    container.run(&["systemctl", "stop", "board.socket", "board.service"]).expect("the service stops");
    assert_eq!(export(), expected);
    // The service can use what the command has left.
    container.run(&["systemctl", "start", "board.socket"]).expect("the socket starts");
    container.inside(async || {
        let mut client = Client::open(0).await;
        client.read_until(3).await;
        client.write().await;
        assert_eq!(client.notes.len(), 4);
    });
}

fn the_unit_passes_systemd_analyze(systemd: Systemd) {
    let container = boot(systemd);
    let units = ["board.service", "board.socket"].map(|unit| format!("/usr/local/lib/systemd/system/{unit}"));
    let verify = container.command(&["systemd-analyze", "verify", &units[0], &units[1]]).output();
    let said = String::from_utf8_lossy(&verify.expect("the command runs").stderr).into_owned();
    assert!(!said.contains("/board."), "{said}");
    let security = ["systemd-analyze", "security", "--threshold=5", "--no-pager", "board.service"];
    container.run(&security).expect("the exposure is below the threshold");
    assert!(container.ask("/").contains("<title>Board</title>"));
}

/// As `make install-user` installs it.
fn service_of_a_user_keeps_notes_and_connections(systemd: Systemd) {
    let package = this_package!();
    let home = tempfile::tempdir().expect("the folder is created");
    let mut install = make(package.folder, &["install-user"]);
    install.arg(format!("BINARY={}", package.binary)).arg(format!("HOME={}", home.path().display()));
    install.arg(format!("SYSTEMD={}", systemd.version(package).expect("the version is known")));
    assert!(install.env_remove("XDG_CONFIG_HOME").status().expect("make runs").success());
    let container = Container::boot_debian(systemd, package, home.path()).expect("the container boots");
    let run = |command: &str| container.run(&["sh", "-ec", command]).expect("the command succeeds");
    run("useradd --create-home tester");
    run("cp -r /packages/.config /packages/.local /home/tester && chown -R tester: /home/tester");
    run("systemctl start user@$(id -u tester).service");
    let user = |verb: &str| {
        run(&format!(
            "runuser -u tester -- env XDG_RUNTIME_DIR=/run/user/$(id -u tester) systemctl --user {verb}"
        ))
    };
    user("enable --now board.socket");
    container.inside(async || {
        let mut client = Client::open(0).await;
        for verb in ["restart", "reload"].repeat(2) {
            client.write().await;
            user(&format!("{verb} board.service"));
        }
        client.write().await;
        // The notes of the same file.
        let mut later = Client::open(1).await;
        later.read_until(5).await;
        assert_eq!(later.notes, client.notes);
    });
}
