//! A client that sends a request together with the beginning of the next one, and the remainder much later. In between,
//! the connection is parked or handed over, so the bytes that were already read have to be kept.

use testkit::certificate::Certificate;
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::on_each_systemd;

use crate::{app_package, boot_with_tls, tls_target};

on_each_systemd! {
    request_split_by_a_handover_is_answered
    request_over_tls_split_by_a_handover_is_answered
}

/// Longer than the time after which an idle connection is parked: 1.5 s, and the interval of the registry's checks.
const IDLE: std::time::Duration = std::time::Duration::from_secs(3);

fn assert_split_request_is_answered(container: &Container, target: &Target) {
    container.inside(|| async {
        for verb in [None, Some("restart"), Some("reload")] {
            for cut in [1, 10, get("/").len() - 1] {
                let mut connection = Connection::open(target).await.expect("the port is open");
                let (first, rest) = (get("/"), get("/"));
                connection.send(&[&first[..], &rest[..cut]].concat()).await.expect("the bytes are sent");
                assert_eq!(connection.answer().await.expect("the first request is answered").status, 200);
                match verb {
                    Some(verb) => drop(container.systemctl(verb).expect("systemctl succeeds")),
                    // Nothing announces that the connection has been idle for so long.
                    None => tokio::time::sleep(IDLE).await,
                }
                connection.send(&rest[cut..]).await.expect("the bytes are sent");
                let answer = connection.answer().await;
                let answer = answer.unwrap_or_else(|error| panic!("{verb:?}, cut at {cut}: {error:#}"));
                assert_eq!(answer.status, 200, "{verb:?}, cut at {cut}");
            }
        }
    });
}

fn request_split_by_a_handover_is_answered(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("the container boots");
    assert_split_request_is_answered(&container, &Container::target());
}

fn request_over_tls_split_by_a_handover_is_answered(systemd: Systemd) {
    let certificate = Certificate::new().expect("openssl creates a certificate");
    let container = boot_with_tls(systemd, &certificate);
    assert_split_request_is_answered(&container, &tls_target(&certificate, "http/1.1"));
}
