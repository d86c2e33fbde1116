//! A test of the installed service on a real systemd: the one of this machine, booted in a container. It needs root, so
//! only `make test-systemd` runs it.

use testkit::client::{Connection, get};
use testkit::container::{Container, Systemd};
use testkit::load::Load;
use testkit::this_package;

#[test]
fn restarts_and_reloads_lose_no_request_and_no_connection() {
    let container = Container::boot(Systemd::Host, this_package!()).expect("the container boots");
    // The first request after boot starts the service.
    container.inside(|| async {
        let mut connection = Connection::open(&Container::target()).await.expect("the port accepts");
        assert_eq!(connection.ask(&get("/")).await.expect("the server answers").status, 200);
    });
    // Fifty connections whose clients never retry, and accept any body.
    let running = Load { root: "", ..Load::paced(&Container::target()) }.start(container.enter());
    for verb in ["restart", "reload"].repeat(5) {
        container.systemctl(verb).expect(verb);
    }
    let report = running.stop();
    assert_eq!((report.lost(), report.connections), (0, report.clients), "{report}");
}
