//! The library's own flags.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, ValueEnum};

use crate::listeners::Listen;
use crate::registry::Limits;

/// For a peer to take the last answer of a connection and close it.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// How the service lives. No group of clap, whose name a service could want for its own.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Config {
    /// What to do instead of serving.
    #[arg(value_enum)]
    pub command: Option<Command>,

    /// Address to listen on if the process inherits no listening socket: 127.0.0.1:8080, [::1]:8080, /run/x.sock,
    /// unix:/run/x.sock or unix:@abstract. A NAME= prefix selects the protocol, as FileDescriptorName= of a socket
    /// unit does: http, https (TLS) or admin (/healthz, /readyz, /metrics). Repeatable; comma-separated in the
    /// environment variable. The default is 127.0.0.1:8080; under systemd there is no default, because the socket
    /// unit owns the port.
    #[arg(long, value_name = "[NAME=]ADDR", value_delimiter = ',')]
    pub listen: Vec<Listen>,

    /// The certificate chain for https, PEM; by default tls.crt of the unit's credentials.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Its key, PEM; by default tls.key of the unit's credentials.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Whether TLS connections go on in the next process; their keys go there with them.
    #[arg(long, value_name = "YES|NO", default_value = "yes", action = ArgAction::Set, value_parser = yes_or_no())]
    pub tls_handover: bool,

    /// How long to accept and serve on after SIGTERM, while /readyz says 503, for a load balancer to take
    /// notice; --drain-timeout counts from its end. Not needed where a socket unit holds the port.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub drain_delay: Duration,

    /// How long a request may take after SIGTERM, counted from its own beginning if it begins later. The drain takes up
    /// to twice as long: keep TimeoutStopSec= of the unit above that.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_timeout: Duration,

    /// How long the service may take to start.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive_duration)]
    pub start_timeout: Duration,

    /// How long a successor may take to be ready, at a reload; after that the old process stays.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive_duration)]
    pub takeover_timeout: Duration,

    /// How long a client may take to send the head of a request, from its first byte, and for a TLS
    /// handshake.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive_duration)]
    pub head_timeout: Duration,

    /// How long a connection may stay open with no request.
    #[arg(long, value_name = "TIME", default_value = "75s", value_parser = positive_duration)]
    pub idle_timeout: Duration,

    /// How long the service may take to begin its answer, and a client to send the next chunk of a
    /// body or to take the next chunk of an answer.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive_duration)]
    pub request_timeout: Duration,

    /// The largest request body.
    #[arg(long, value_name = "SIZE", default_value = "2MiB")]
    pub body_limit: ByteSize,

    /// How many connections may be open; further ones wait in the socket's queue.
    #[arg(long, value_name = "N", default_value = "20000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,

    /// What to log, as in RUST_LOG (which is read when this is not given): info, debug, or
    /// info,request=debug to see each request.
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Command {
    /// Do everything a start does short of serving; exit 0, or say why not.
    Check,
    /// Start a successor to the service that runs here, and wait until it has taken over: for ExecReload=,
    /// with the flags of ExecStart=. Where it cannot start, the old process stays, and this fails.
    Takeover,
}

impl Config {
    /// The time limits of a connection.
    pub fn limits(&self) -> Limits {
        Limits {
            head: self.head_timeout,
            idle: self.idle_timeout,
            stall: self.request_timeout,
            close: CLOSE_LIMIT,
        }
    }
}

/// `yes` or `no`, and what else systemd takes for these (systemd.syntax(7)).
fn yes_or_no() -> impl TypedValueParser<Value = bool> {
    let values = [
        PossibleValue::new("yes").aliases(["y", "true", "t", "on", "1"]),
        PossibleValue::new("no").aliases(["n", "false", "f", "off", "0"]),
    ];
    let is_yes = values[0].clone();
    PossibleValuesParser::new(values).map(move |value| is_yes.matches(&value, true))
}

fn positive_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be above zero".into()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}
