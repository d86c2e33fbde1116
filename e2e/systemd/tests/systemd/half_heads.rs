//! A client that sends the beginning of its next request together with a request, and the rest much later: the connection
//! is parked or moves meanwhile.

use testkit::certificate::Certificate;
use testkit::client::{Connection, Target, get};
use testkit::container::{Container, Systemd};
use testkit::on_each_systemd;

use crate::app_package;

on_each_systemd! {
    half_a_pipelined_head_is_completed_after_a_move
    half_a_pipelined_head_over_tls_is_completed_after_a_move
}

/// Longer than an idle connection stays unparked, which is 1.5 s and a look at the clock.
const IDLE: std::time::Duration = std::time::Duration::from_secs(3);

fn is_completed(container: &Container, target: &Target) {
    container.inside(|| async {
        for verb in [None, Some("restart"), Some("reload")] {
            for cut in [1, 10, get("/").len() - 1] {
                let mut connection = Connection::open(target).await.expect("the port is open");
                let (first, rest) = (get("/"), get("/"));
                connection.send(&[&first[..], &rest[..cut]].concat()).await.expect("sent");
                assert_eq!(connection.answer().await.expect("the first answer").status, 200);
                match verb {
                    Some(verb) => drop(container.systemctl(verb).expect("the verb")),
                    // Nothing announces that the connection has been idle for so long.
                    None => tokio::time::sleep(IDLE).await,
                }
                connection.send(&rest[cut..]).await.expect("sent");
                let answer = connection.answer().await;
                let answer = answer.unwrap_or_else(|error| panic!("{verb:?}, cut at {cut}: {error:#}"));
                assert_eq!(answer.status, 200, "{verb:?}, cut at {cut}");
            }
        }
    });
}

fn half_a_pipelined_head_is_completed_after_a_move(systemd: Systemd) {
    let container = Container::boot(systemd, app_package()).expect("a container");
    is_completed(&container, &Container::target());
}

fn half_a_pipelined_head_over_tls_is_completed_after_a_move(systemd: Systemd) {
    let certificate = Certificate::new().expect("a certificate");
    let container = Container::boot(systemd, app_package()).expect("a container");
    container.speak_tls(&certificate).expect("a certificate");
    container.systemctl("start").expect("a start");
    let client = certificate.client(&["http/1.1"]).expect("a client");
    is_completed(&container, &Target::Tls(([127, 0, 0, 1], 8443).into(), client));
}
