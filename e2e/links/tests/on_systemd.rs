//! The link shortener with PostgreSQL, on this machine's systemd and on systemd 257.

#[path = "../../systemd/tests/systemd/collector.rs"]
mod collector;

use std::collections::BTreeSet;

use serde_json::Value;
use testkit::certificate::{Authority, Certificate};
use testkit::client::{Answer, Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::{TEST_TIMEOUT, on_each_systemd, this_package, wait_until};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::collector::{Collector, hexadecimal};

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
    openapi_document_has_each_route_with_the_statuses_that_it_answers
    each_line_of_the_ingest_port_is_answered_once_over_restarts_and_reloads
    partners_with_a_certificate_read_the_links_over_a_restart_and_a_reload
    each_request_is_a_span_at_the_collector_over_a_restart_and_a_reload
    release_starts_only_after_its_migrations_which_a_reload_applies
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

/// The lines of the service in the journal, which are JSON.
fn logged(container: &Container, matches: &[&str]) -> Vec<Value> {
    let service = ["_SYSTEMD_UNIT=links.service"];
    let entries = container.journal(&[&service, matches].concat()).expect("the journal can be read");
    let lines = entries.iter().filter_map(|entry| entry["MESSAGE"].as_str());
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
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
    let lines = logged(&container, &["-p", "err"]);
    assert!(
        lines.iter().any(|line| line["message"].as_str().is_some_and(|text| text.contains(reason))),
        "{lines:?}"
    );
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

/// Each operation is asked so that the service answers with each status that can be reached without a fault.
fn openapi_document_has_each_route_with_the_statuses_that_it_answers(systemd: Systemd) {
    let container = boot(systemd);
    let document: Value =
        serde_json::from_str(&container.ask("/openapi.json")).expect("the document is JSON");
    let paths = document["paths"].as_object().expect("the document has paths");
    let operations = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().expect("a path has operations").keys();
        methods.map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    assert!(operations.eq(["GET /", "GET /links", "POST /links", "GET /{code}"]), "{document:#}");
    let new = r#"{"url": "https://example.org/", "code": "here"}"#;
    let json = "content-type: application/json\r\n";
    for (method, path, route, headers, body, status) in [
        ("GET", "/", "/", "", "", 200),
        ("GET", "/links", "/links", "", "", 403),
        ("POST", "/links", "/links", json, new, 201),
        ("POST", "/links", "/links", json, "{", 400),
        ("POST", "/links", "/links", json, new, 409),
        ("POST", "/links", "/links", "", new, 415),
        ("POST", "/links", "/links", json, r#"{"url": "here"}"#, 422),
        ("GET", "/here", "/{code}", "", "", 307),
        ("GET", "/there", "/{code}", "", "", 404),
    ] {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\n{headers}content-length: {length}\r\n\r\n{body}"
        );
        let answer = ask(&container, request.as_bytes());
        assert_eq!(answer.status, status, "{request}: {}", answer.text());
        let documented = &document["paths"][route][method.to_lowercase()]["responses"][status.to_string()];
        assert!(documented.is_object(), "{method} {route} {status}: {document:#}");
    }
    // An operation that is not in the document.
    assert_eq!(ask(&container, b"DELETE /links HTTP/1.1\r\nhost: test\r\n\r\n").status, 405);
    let page = container.ask("/openapi.html");
    assert!(
        page.contains("<td>POST /links</td><td>Adds a link</td><td>201 400 409 415 422 503 </td>"),
        "{page}"
    );
}

/// A line is incomplete when the connection moves.
fn each_line_of_the_ingest_port_is_answered_once_over_restarts_and_reloads(systemd: Systemd) {
    let container = boot(systemd);
    // The request starts the service, which has the port as a requirement.
    assert_eq!(ask(&container, &get("/")).status, 200);
    container.inside(async || {
        let stream = TcpStream::connect("127.0.0.1:9000").await.expect("the port is open");
        let mut stream = BufReader::new(stream);
        for (number, verb) in ["restart", "reload"].repeat(TIMES).into_iter().enumerate() {
            let lines = format!("https://example.org/ code{number}\nhttps://exam");
            stream.write_all(lines.as_bytes()).await.expect("the connection is open");
            assert_eq!(next_line(&mut stream).await, format!("added code{number}\n"));
            container.systemctl(verb).expect(verb);
            let rest = format!("ple.org/ code{number}\n");
            stream.write_all(rest.as_bytes()).await.expect("the connection is open");
            assert_eq!(next_line(&mut stream).await, "refused: this code is already in use\n");
        }
    });
    assert_eq!(ask(&container, &get("/code0")).header("location"), Some("https://example.org/"));
}

/// The comments of the socket unit have the lines of the drop-in.
fn partners_with_a_certificate_read_the_links_over_a_restart_and_a_reload(systemd: Systemd) {
    const UNIT: &str = include_str!("../systemd/links-partners.socket");
    let authority = Authority::new("CA").expect("openssl runs");
    let partner = authority.issue("/CN=partner", "DNS:partner.example.org").expect("openssl runs");
    let server = Certificate::new().expect("openssl runs");
    let container = boot(systemd);
    container.install_certificate(&server).expect("the certificate is installed");
    let authority = std::fs::read_to_string(authority.certificate()).expect("the file is readable");
    container.write("etc/links/tls-client-ca.crt", &authority).expect("the file is written");
    let comments = UNIT.lines().filter_map(|line| line.strip_prefix('#'));
    let lines: Vec<_> = comments.filter(|line| !line.starts_with(' ')).collect();
    assert_eq!(lines.len(), 5, "{UNIT}");
    container.add_to_unit("service", "partners", &(lines.join("\n") + "\n")).expect("the file is written");
    container.start_socket("partners").expect("the socket unit starts");
    assert_eq!(add(&container, r#"{"url": "https://example.org/", "code": "here"}"#).status, 201);
    let target = |client| Target::Tls(([127, 0, 0, 1], 8443).into(), client);
    let known = target(server.client_as(&partner, &["http/1.1"]).expect("the configuration is valid"));
    let anonymous = target(server.client(&["http/1.1"]).expect("the configuration is valid"));
    container.inside(async || {
        let mut connection = Connection::open(&known).await.expect("the certificate is accepted");
        for verb in ["start", "restart", "reload"] {
            container.systemctl(verb).expect(verb);
            let answer = connection.ask(&get("/links")).await.expect("the connection is open");
            assert!(
                answer.status == 200 && answer.text().contains(r#""code":"here""#),
                "{verb}: {}",
                answer.text()
            );
        }
        // In TLS 1.3 the client learns of the refusal only when it reads.
        if let Ok(mut connection) = Connection::open(&anonymous).await {
            assert!(
                connection.ask(&get("/links")).await.is_err(),
                "a client without a certificate is served"
            );
        }
    });
    let lines = logged(&container, &[]);
    assert!(lines.iter().any(|line| line.to_string().contains(r#""partner":"partner""#)), "{lines:?}");
}

async fn next_line(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    timeout(TEST_TIMEOUT, stream.read_line(&mut line))
        .await
        .expect("in time")
        .expect("the connection is open");
    line
}

/// A process keeps its spans until it ends, because the time between two exports is longer than the test.
fn each_request_is_a_span_at_the_collector_over_a_restart_and_a_reload(systemd: Systemd) {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let container = boot(systemd);
    let collector = container.inside(async || Collector::start(true));
    // The changes that the comments of the unit name for a database over TCP.
    let network = "PrivateNetwork=no\nRestrictAddressFamilies=AF_INET AF_INET6\nIPAddressAllow=127.0.0.1";
    let variables =
        format!("OTEL_EXPORTER_OTLP_ENDPOINT={} OTEL_BSP_SCHEDULE_DELAY=3600000", collector.endpoint);
    container
        .add_to_unit("service", "traces", &format!("[Service]\n{network}\nEnvironment={variables}\n"))
        .expect("the drop-in is written");
    let parents: Vec<String> = (1..=30).map(|number| format!("{number:016x}")).collect();
    container.inside(async || {
        let mut connection = Connection::open(&Container::target()).await.expect("the port is open");
        for (round, parents) in parents.chunks(10).enumerate() {
            for parent in parents {
                let parent = format!("traceparent: 00-{TRACE}-{parent}-01");
                let request = format!("GET /missing HTTP/1.1\r\nhost: test\r\n{parent}\r\n\r\n");
                assert_eq!(
                    connection.ask(request.as_bytes()).await.expect("the service answers").status,
                    404
                );
            }
            if let Some(verb) = ["restart", "reload"].get(round) {
                container.systemctl(verb).expect(verb);
            }
        }
    });
    container.run(&["systemctl", "stop", "links.socket", "links.service"]).expect("the service stops");
    let spans = collector.spans();
    let received: BTreeSet<_> = spans.iter().map(|(_, span)| hexadecimal(&span.parent_span_id)).collect();
    assert_eq!((spans.len(), received), (parents.len(), parents.iter().cloned().collect()));
    for (_, span) in &spans {
        assert_eq!((&*span.name, hexadecimal(&span.trace_id)), ("GET /{code}", TRACE.to_owned()));
    }
    // The three processes have logged lines of JSON.
    let generations: BTreeSet<_> =
        logged(&container, &[]).iter().filter_map(|line| line["generation"].as_u64()).collect();
    assert_eq!(generations, BTreeSet::from([1, 2, 3]));
}

fn release_starts_only_after_its_migrations_which_a_reload_applies(systemd: Systemd) {
    let container = boot(systemd);
    container
        .add_to_unit("service", "later", "[Service]\nExecStartPre=\nRestart=no\n")
        .expect("the drop-in is written");
    let as_user = |user: &str, command: &[&str]| {
        let user = format!("--property=User={user}");
        let run = ["systemd-run", "--quiet", "--wait", "--pipe", "--property=DynamicUser=yes", &user];
        container.run(&[&run[..], command].concat()).expect("the command succeeds");
    };
    let refused = |reason: &str| {
        container.systemctl("restart").expect_err("it cannot start");
        let lines = logged(&container, &["-p", "err"]);
        let last = lines.last().expect("a line was logged")["message"].to_string();
        assert!(last.contains(reason), "{last}");
    };
    refused("could not read which migrations were applied: run `links migrate`");
    as_user("links", &["links", "migrate"]);
    container.systemctl("restart").expect("the service starts");
    let psql = |sql: &str| {
        as_user("postgres", &["psql", "--quiet", "--host=/run/postgresql", "-d", "links", "-c", sql]);
    };
    // A reload applies the migrations of the new release before its start.
    psql("drop table links, flushes, _sqlx_migrations");
    container.systemctl("reload").expect("the reload succeeds");
    assert_eq!(add(&container, r#"{"url": "https://example.org/", "code": "here"}"#).status, 201);
    psql("update _sqlx_migrations set success = false");
    refused("the database lacks 1 migrations: run `links migrate`");
}
