//! Reloads of the example under the gRPC client of tonic.

use futures_util::FutureExt;
use rustix::process::Signal;
use testkit::process::{signal, terminate};
use testkit::service::Service;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Eight tasks call on one channel without retries, beside an open stream. No call may fail, and the stream must not end:
/// it receives the status once, and then nothing.
#[test]
fn a_grpc_client_loses_no_call_and_no_stream_over_reloads() {
    let folder = tempfile::tempdir().expect("a temporary folder is made");
    let mut service =
        Service::start_in(env!("CARGO_BIN_EXE_grpc"), &[], folder.path()).expect("the service starts");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("the runtime starts").block_on(async {
        let address = format!("http://{}", service.address());
        let endpoint = tonic::transport::Endpoint::from_shared(address).expect("a valid address");
        let client = HealthClient::new(endpoint.connect().await.expect("the service listens"));
        let stop = tokio_util::sync::CancellationToken::new();
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (mut client, stop) = (client.clone(), stop.clone());
            callers.spawn(async move {
                loop {
                    let is_last = stop.is_cancelled();
                    let answer =
                        client.check(HealthCheckRequest::default()).await.expect("the server answers");
                    assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
                    if is_last {
                        return;
                    }
                }
            });
        }
        let mut watcher = client.clone();
        let stream = watcher.watch(HealthCheckRequest::default()).await.expect("the stream opens");
        let mut stream = stream.into_inner();
        stream.message().await.expect("the stream has no error").expect("the current status arrives");
        let mut main: Option<String> = None;
        for _ in 0..3 {
            match &main {
                None => service.signal(Signal::HUP),
                Some(main) => signal(main, Signal::HUP).expect("the process runs"),
            }
            let next = tokio::task::block_in_place(|| service.notifications.wait_for("MAINPID="));
            main = Some(next.expect("a successor takes over").trim_start_matches("MAINPID=").to_owned());
        }
        // Each task calls once more after the last reload.
        stop.cancel();
        callers.join_all().await;
        let next = stream.message().now_or_never();
        assert!(next.is_none(), "the stream has ended, or has repeated the status: {next:?}");
        terminate(&main.expect("at least one reload was done")).expect("the process runs");
    });
}
