//! The address of the client behind HAProxy, in the example `who`, which answers with it.

use std::path::Path;

use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::wait_until;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::crashes::{crash, until_backed_up};
use crate::on_systemd::ask_admin;
use crate::{app_binary, app_package};

/// HAProxy passes connections to the first port on with a header of version 2, and requests to the second port with one of
/// version 1.
const HAPROXY: &str = "
    global
        nbthread 1
    defaults
        timeout connect 60s
        timeout client 60s
        timeout server 60s
    listen connections
        mode tcp
        bind 127.0.0.1:8000
        server service 127.0.0.1:8080 send-proxy-v2
    listen requests
        mode http
        bind 127.0.0.1:8001
        server service 127.0.0.1:8080 send-proxy
";
const FRONTS: [([u8; 4], u16); 2] = [([127, 0, 0, 1], 8000), ([127, 0, 0, 1], 8001)];
/// Another address than that of the proxy, which is trusted.
const CLIENT: ([u8; 4], u16) = ([127, 0, 0, 9], 0);

/// Asserts that the service answers with the address of this client.
async fn is_known(stream: &mut TcpStream) {
    let client = stream.local_addr().expect("the socket has an address");
    stream.write_all(&get("/")).await.expect("the connection is open");
    let (mut answer, end) = (Vec::new(), format!("\r\n\r\n{client}\n"));
    while !answer.ends_with(end.as_bytes()) {
        let read = stream.read_buf(&mut answer).await.expect("the connection is open");
        let text = String::from_utf8_lossy(&answer);
        let is_other = text.split_once("\r\n\r\n").is_some_and(|(_, body)| body.ends_with('\n'));
        assert!(read > 0 && (!is_other || text.ends_with(&end)), "{client}: {text}");
    }
}

#[test]
fn clients_behind_haproxy_keep_their_addresses_over_a_restart_a_reload_and_a_crash() {
    let container = Container::boot(Systemd::V257, app_package()).expect("the container boots");
    container.start_socket("admin").expect("the socket unit starts");
    container.inside(|| async {
        let mut direct = Connection::open(&Container::target()).await.expect("the port is open");
        direct.ask(&get("/")).await.expect("the request is answered");
        let examples = Path::new(app_binary()).with_file_name("examples");
        container.replace_binary(&examples.join("who")).expect("the binary is installed");
        let lines = "[Service]\nEnvironment=WHO_PROXY_PROTOCOL=http WHO_TRUSTED_PROXIES=127.0.0.1\n";
        container.add_to_unit("service", "proxies", lines).expect("the file is written");
        container.systemctl("restart").expect("the restart succeeds");
        // No header was expected when this connection began.
        let answer = direct.ask(&get("/")).await.expect("the connection is open").text();
        assert!(answer.starts_with("127.0.0.1:"), "{answer}");
    });
    container.write("run/proxy", HAPROXY).expect("the file is written");
    let command = ["systemd-run", "--quiet", "--unit=proxy", "--", "haproxy", "-db", "-f", "/run/proxy"];
    container.run(&command).expect("systemd-run succeeds");
    wait_until("haproxy listens", || {
        let fronts = FRONTS.map(|front| Target::Tcp(front.into()));
        container.inside(|| async {
            let [connections, requests] = &fronts;
            Connection::open(connections).await.is_ok() && Connection::open(requests).await.is_ok()
        })
    });
    container.inside(|| async {
        let mut clients = Vec::new();
        for front in FRONTS {
            let socket = TcpSocket::new_v4().expect("a socket is made");
            socket.bind(CLIENT.into()).expect("the address is local");
            clients.push(socket.connect(front.into()).await.expect("haproxy listens"));
        }
        for verb in [None, Some("restart"), Some("reload")] {
            if let Some(verb) = verb {
                container.systemctl(verb).unwrap_or_else(|error| panic!("{verb} failed: {error:#}"));
            }
            let [connection, request] = &mut clients[..] else { panic!("there are two") };
            is_known(connection).await;
            is_known(request).await;
        }
        until_backed_up(&container, clients.len());
        crash(&container, 1);
        let [connection, request] = &mut clients[..] else { panic!("there are two") };
        is_known(connection).await;
        is_known(request).await;
        let metrics = ask_admin(&container, "/metrics");
        assert!(metrics.contains("\noutlive_connections_taken_over_total 2\n"), "{metrics}");
    });
}
