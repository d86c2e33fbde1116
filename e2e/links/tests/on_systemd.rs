//! The link shortener with PostgreSQL, on this machine's systemd and on systemd 257.

use testkit::client::{Answer, Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::{on_each_systemd, this_package, wait_until};

/// Number of restarts and of reloads under load.
const TIMES: usize = 10;

/// A unit for the PostgreSQL of Debian. Debian's own units start a wrapper for several clusters, which needs files in
/// /etc that the container does not have.
const POSTGRESQL: &str = r#"
[Service]
Type=notify
DynamicUser=yes
User=postgres
StateDirectory=database
StateDirectoryMode=0700
RuntimeDirectory=postgresql
Environment=PGDATA=/var/lib/database/data PGHOST=/run/postgresql
ExecStartPre=/bin/sh -c '[ -e $PGDATA ] || /usr/lib/postgresql/*/bin/initdb --auth=peer --locale=C --encoding=UTF8'
ExecStart=/bin/sh -c 'exec /usr/lib/postgresql/*/bin/postgres -c listen_addresses= -c unix_socket_directories=$PGHOST'
ExecStartPost=/bin/sh -c 'psql --quiet -d postgres -c "create role links login" -c "create database links owner links" || :'
"#;

on_each_systemd! {
    clicks_in_the_database_equal_redirects_over_restarts_and_reloads
    the_service_recovers_after_the_database_was_unavailable
    the_unit_passes_systemd_analyze
}

fn boot(systemd: Systemd) -> Container {
    let container = Container::boot(systemd, this_package!()).expect("the container boots");
    // Names of dynamic users need nss-systemd(8). The container has an empty /etc, so it must be enabled here.
    container
        .write("etc/nsswitch.conf", "passwd: files systemd\ngroup: files systemd\n")
        .expect("the file is written");
    container.write("etc/systemd/system/postgresql.service", POSTGRESQL).expect("the file is written");
    container.run(&["systemctl", "daemon-reload"]).expect("systemd loads the new unit");
    database(&container, "start");
    container
}

fn database(container: &Container, verb: &str) {
    container.run(&["systemctl", verb, "postgresql.service"]).expect(verb);
}

fn ask(container: &Container, request: &[u8]) -> Answer {
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port accepts");
        connection.ask(request).await.expect("the server answers")
    })
}

fn add(container: &Container, json: &str) -> Answer {
    let head = "POST /links HTTP/1.1\r\nhost: test\r\ncontent-type: application/json";
    ask(container, format!("{head}\r\ncontent-length: {}\r\n\r\n{json}", json.len()).as_bytes())
}

/// The number of clicks of a link on the HTML page.
fn clicks(container: &Container, code: &str) -> u64 {
    let page = ask(container, &get("/")).text();
    let row = page
        .split("<tr>")
        .find(|row| row.contains(&format!("\"/{code}\"")))
        .expect("the page has a row for the link");
    row.rsplit("<td>")
        .next()
        .and_then(|cell| cell.split('<').next())
        .expect("the row has cells")
        .parse()
        .expect("a valid number")
}

fn clicks_in_the_database_equal_redirects_over_restarts_and_reloads(systemd: Systemd) {
    let container = boot(systemd);
    let answer = add(&container, r#"{"url": "https://example.org/?a=1&b=<b>", "code": "here"}"#);
    assert_eq!((answer.status, answer.header("location")), (201, Some("/here")), "{}", answer.text());
    assert_eq!(add(&container, r#"{"url": "https://example.org/", "code": "here"}"#).status, 409);
    assert_eq!(add(&container, r#"{"url": "javascript:alert(1)"}"#).status, 422);
    let load = Load { request: get("/here"), status: 307, ..Load::paced(&Container::target()) };
    let running = load.start(container.enter());
    for verb in ["restart", "reload"].repeat(TIMES) {
        container.systemctl(verb).expect(verb);
    }
    running.wait_for(1000);
    let report = running.stop();
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
    // The current process adds its clicks within a second.
    wait_until("the last clicks", || clicks(&container, "here") >= report.answered);
    container.systemctl("restart").expect("the restart succeeds");
    assert_eq!(clicks(&container, "here"), report.answered);
    let page = ask(&container, b"GET / HTTP/1.1\r\nhost: test\r\naccept-encoding: gzip\r\n\r\n");
    assert_eq!(page.header("content-encoding"), Some("gzip"));
    assert!(ask(&container, &get("/")).text().contains("?a=1&amp;b=%3Cb%3E"));
}

fn the_service_recovers_after_the_database_was_unavailable(systemd: Systemd) {
    let container = boot(systemd);
    let admin = "[Socket]\nListenStream=/run/admin.sock\nFileDescriptorName=admin\nService=links.service\n";
    container.write("etc/systemd/system/links-admin.socket", admin).expect("the file is written");
    container.run(&["systemctl", "daemon-reload"]).expect("systemd loads the new unit");
    container.run(&["systemctl", "start", "links-admin.socket"]).expect("the admin socket starts");
    assert_eq!(add(&container, r#"{"url": "https://example.org/", "code": "here"}"#).status, 201);
    let pid = container.show("MainPID").expect("the unit has a main process");
    let admin = Target::Unix(container.path("run/admin.sock"));
    let from_admin = |path: &str| {
        testkit::block_on(async {
            let mut connection = Connection::open(&admin).await.expect("the service listens");
            connection.ask(&get(path)).await.expect("the server answers").text()
        })
    };
    assert_eq!(from_admin("/readyz"), "ready\ndatabase: ok\n");
    assert_eq!(ask(&container, &get("/here")).status, 307);
    assert!(from_admin("/metrics").contains("links_followed_total 1\n"));

    database(&container, "stop");
    wait_until("the check fails", || from_admin("/readyz").starts_with("not ready\ndatabase: "));
    assert_eq!(ask(&container, &get("/here")).status, 503);
    let refused = container.systemctl("reload").expect_err("it cannot start");
    assert!(format!("{refused:#}").contains("Job for links.service failed"), "{refused:#}");
    assert_eq!(container.show("MainPID").expect("the unit has a main process"), pid);
    let reason = "could not reach the database at /run/postgresql (--database-url)";
    assert!(container.show("StatusText").expect("the unit has a status").contains(reason));
    // The same process recovers without a restart, and writes the click that it kept in memory.
    database(&container, "start");
    wait_until("the check succeeds", || from_admin("/readyz") == "ready\ndatabase: ok\n");
    assert_eq!(ask(&container, &get("/here")).status, 307);
    wait_until("both clicks", || clicks(&container, "here") == 2);
    container.systemctl("reload").expect("the reload succeeds");
    assert_ne!(container.show("MainPID").expect("the unit has a main process"), pid);

    // A failed start logs one line. The port stays open, and a client that connects waits for a successful start.
    database(&container, "stop");
    container.systemctl("restart").expect_err("it cannot start");
    let lines = container.journal(&["-u", "links.service", "-p", "err"]).expect("the journal can be read");
    let lines: Vec<&str> = lines.iter().filter_map(|entry| entry["MESSAGE"].as_str()).collect();
    assert!(lines.iter().any(|line| line.contains(reason)), "{lines:?}");
    assert!(lines.iter().all(|line| !line.contains('\n')), "{lines:?}");
    let waits = std::thread::scope(|scope| {
        let waits = scope.spawn(|| ask(&container, &get("/here")).status);
        container.wait_for_property("NRestarts", |count| count != "0");
        database(&container, "start");
        waits.join().expect("the server answers")
    });
    assert_eq!(waits, 307);
    wait_until("three clicks", || clicks(&container, "here") == 3);
}

fn the_unit_passes_systemd_analyze(systemd: Systemd) {
    let container = boot(systemd);
    let units = ["links.service", "links.socket"].map(|unit| format!("/usr/local/lib/systemd/system/{unit}"));
    let said = container
        .command(&["systemd-analyze", "verify", &units[0], &units[1]])
        .output()
        .expect("the command runs");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.contains("/links."), "{said}");
    container
        .run(&["systemd-analyze", "security", "--threshold=5", "--no-pager", "links.service"])
        .expect("the exposure is below the threshold");
}
