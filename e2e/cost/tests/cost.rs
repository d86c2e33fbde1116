//! Compares the user instructions for a request with those of bare `axum::serve`. It checks the ratio, because the
//! counts also depend on the processor, for which glibc chooses functions, and on the versions of the compiler and the
//! crates.

use std::path::Path;

use e2e_cost::{Protocol, instructions_of_request};

/// The ratios as they were measured. A change that needs more has to set them anew, with the reason in its commit message.
const HTTP1: f64 = 1.187;
const HTTP2: f64 = 1.293;
/// A larger increase fails the test. Thirteen runs of the same binaries on a busy machine differed by up to 1.8 %.
const TOLERANCE: f64 = 1.02;

#[test]
fn http1_request_costs_no_more_than_recorded() {
    assert_cost(Protocol::Http1, HTTP1);
}

#[test]
fn http2_request_costs_no_more_than_recorded() {
    assert_cost(Protocol::Http2, HTTP2);
}

fn assert_cost(protocol: Protocol, recorded: f64) {
    let of = |binary| instructions_of_request(Path::new(binary), protocol).expect("the requests are counted");
    let (ours, bare) = (of(env!("CARGO_BIN_EXE_cost_service")), of(env!("CARGO_BIN_EXE_cost_bare")));
    let ratio = ours / bare;
    let measured = format!("{protocol:?}: {ours:.0} instructions, bare axum::serve {bare:.0}: {ratio:.3}");
    eprintln!("{measured}");
    assert!(
        ratio <= recorded * TOLERANCE,
        "{measured}, but {recorded} is recorded. To see which functions take them, run callgrind_annotate on the files of \
         `valgrind --tool=callgrind target/release/cost_service` for two numbers of requests. If the change is worth the cost, \
         record the new ratio in e2e/cost/tests/cost.rs."
    );
}
