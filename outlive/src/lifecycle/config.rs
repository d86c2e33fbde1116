//! The options of the library. Their doc comments are the text of `--help` and of the man page.

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use bytesize::ByteSize;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, ValueEnum};

use crate::listeners::Listen;
use crate::observe::counted;
use crate::observe::log::LogFormat;
use crate::os::credentials::Credentials;
use crate::registry::Limits;
use crate::requests::{ForwardedHeader, Proxies, RequestLimits};
use crate::transport::client_auth::ClientAuthRule;
use crate::transport::listener_name::Name;
use crate::transport::tls_files::TlsFiles;
use crate::transport::trusted_proxies::{TrustedProxies, TrustedProxy};

/// How long a peer may take to read the last response of a connection and to close it.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// The longest time that an option accepts, in days: 100 years. `Instant + Duration` panics if the sum overflows. With this
/// limit, the present plus several such times cannot overflow.
const MAX_DAYS: u64 = 36_500;

/// The options of the library. They are not in a clap group: a group is named after its struct, so that an application
/// whose struct is called `Config` too could not be combined with it.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Config {
    /// Address to listen on: 127.0.0.1:8080, [::1]:8080, /run/x.sock, unix:/run/x.sock or unix:@abstract. Ignored if the
    /// process inherits listening sockets, as from a socket unit. Prefix the address with http=, https= (TLS) or admin=
    /// (/healthz, /readyz, /metrics, /config) to choose the protocol, or with another name that the application uses for a
    /// socket of its own; in a socket unit, FileDescriptorName= is this name. Repeatable; comma-separated in the environment
    /// variable. The default is 127.0.0.1:8080; under systemd there is no default, because the socket unit owns the port.
    #[arg(long, value_name = "[NAME=]ADDR", value_delimiter = ',')]
    pub listen: Vec<Listen>,

    /// Name of a listener on which each connection begins with a PROXY header (version 1 or 2), in which a proxy reports
    /// the address of its client. The process closes a connection that does not come from one of --trusted-proxies, and
    /// one whose header is missing, invalid, or not complete within --head-timeout. Repeatable; comma-separated in the
    /// environment variable.
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "trusted_proxies")]
    pub proxy_protocol: Vec<Name>,

    /// Proxy that may report the addresses of its clients: 192.0.2.1, 10.0.0.0/8, 2001:db8::/32, or `unix` for all peers
    /// on Unix sockets. The process believes a PROXY header and the field of --forwarded-header only if they come from
    /// one of these. Repeatable; comma-separated in the environment variable. There is no default.
    #[arg(long, value_name = "ADDRESS[/PREFIX]|unix", value_delimiter = ',')]
    pub trusted_proxies: Vec<TrustedProxy>,

    /// Header field in which --trusted-proxies report the client of each request. Name a field that they set or append to
    /// on each request. They pass other fields on as the client has sent them, so a client could choose its address there.
    #[arg(long, value_enum, value_name = "FIELD", default_value = "x-forwarded-for")]
    pub forwarded_header: ForwardedHeader,

    /// Certificate chain for https listeners, in PEM format; the default is the unit's credential tls.crt. Repeatable;
    /// comma-separated in the environment variable. With several, each connection uses the one whose names have the server
    /// name that the client asks for, or else the first. Further credentials are tls-2.crt, tls-3.crt and so on.
    #[arg(long, value_name = "FILE", value_delimiter = ',', requires = "tls_key")]
    pub tls_cert: Vec<PathBuf>,

    /// Private key of the certificate, in PEM format; the default is the unit's credential tls.key. Repeatable, in the order
    /// of --tls-cert. Further credentials are tls-2.key, tls-3.key and so on.
    #[arg(long, value_name = "FILE", value_delimiter = ',', requires = "tls_cert")]
    pub tls_key: Vec<PathBuf>,

    /// Look for changed files of --tls-cert, --tls-key and --tls-client-ca at this interval, and use them for new TLS
    /// handshakes. Without it, the next restart or reload uses changed files. Files that cannot be used are logged as an error,
    /// and the former ones stay in use. Credentials of the unit do not change before a restart.
    #[arg(long, value_name = "TIME", value_parser = positive_duration)]
    pub tls_check_interval: Option<Duration>,

    /// Ask clients for certificates: `required` refuses clients without one, `optional` does not; both refuse a certificate
    /// that no authority in --tls-client-ca has issued. It applies to all https listeners, or with NAME= before it to those
    /// of this name. Handlers get the certificate as outlive::ClientCertificate. Repeatable; comma-separated in the
    /// environment variable.
    #[arg(long, value_name = "[NAME=]optional|required", value_delimiter = ',')]
    pub tls_client_auth: Vec<ClientAuthRule>,

    /// Certificates of the authorities that issue certificates of clients, in PEM format; the default is the unit's
    /// credential tls-client-ca.crt.
    #[arg(long, value_name = "FILE", requires = "tls_client_auth")]
    pub tls_client_ca: Option<PathBuf>,

    /// Hand TLS connections, including their traffic keys, to the next process. With `no`, a restart or reload closes
    /// each connection after its requests have finished.
    #[arg(long, value_name = "YES|NO", default_value = "yes", action = ArgAction::Set, value_parser = yes_or_no())]
    pub tls_handover: bool,

    /// Time after SIGTERM in which the process still accepts connections and serves requests while /readyz responds
    /// with 503, so that load balancers stop sending traffic. --drain-timeout starts after it. Not needed if a socket
    /// unit holds the port.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration)]
    pub drain_delay: Duration,

    /// Time that each request may take during a drain, in which a process finishes its requests before it exits, at a stop,
    /// restart or reload. It counts from the start of the drain, or from the start of the request if the request starts
    /// later. The process cuts off requests that take longer; after a reload it does so only at --linger-timeout. Open
    /// connections may still send requests for this time after the start of the drain, and each of those may take this time
    /// again, so a drain can last twice as long. Set TimeoutStopSec= of the unit higher than that.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub drain_timeout: Duration,

    /// Time after a reload for which the old process may still send the responses that take longer than
    /// --drain-timeout, such as downloads. `infinity` sets no limit; with 0s the process cuts them off at
    /// --drain-timeout. Neither the successor nor a further reload waits for such a process; a stop or restart waits up
    /// to one --drain-timeout for it. At most eight such processes run: if a reload adds a ninth, the oldest has to end
    /// within one --drain-timeout.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = TimeLimit::parse)]
    pub linger_timeout: TimeLimit,

    /// Time that the service may take to start.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive_duration)]
    pub start_timeout: Duration,

    /// Time that a successor may take to become ready during a reload; if it takes longer, the reload fails and
    /// the old process keeps serving.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive_duration)]
    pub takeover_timeout: Duration,

    /// Two limits, each of this length: for a client to send the head of a request, measured from its first byte, and for
    /// a TLS handshake.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive_duration)]
    pub head_timeout: Duration,

    /// Time that a connection may stay open without a request, or `infinity`. It does not apply to WebSockets and open
    /// streams.
    #[arg(long, value_name = "TIME", default_value = "infinity", value_parser = TimeLimit::parse_positive)]
    pub idle_timeout: TimeLimit,

    /// Three limits, each of this length: for the service to start its response, for a client to send the next part of a
    /// request body, and for a client to read the next part of a response.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive_duration)]
    pub request_timeout: Duration,

    /// Maximum size of a request body; a larger one is rejected with 413.
    #[arg(long, value_name = "SIZE", default_value = "2MiB", value_parser = size)]
    pub body_limit: ByteSize,

    /// Maximum number of open connections. When it is reached, the process closes those that have been idle longest, if that
    /// is at least 5 s; new connections wait in the accept queue of the socket until there is room. When memory is short
    /// (MemoryPressureWatch= of the unit), the process also closes some of those that have been idle longest.
    #[arg(long, value_name = "N", default_value = "20000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,

    /// Maximum number of requests in flight, or `infinity`. A request counts from its head to the end of its response, so an
    /// event stream counts until it ends; a WebSocket does not count. A request above the limit is answered with 503 and
    /// `Retry-After: 1`, and counted in the metric outlive_requests_refused_total. Admin listeners have no such limit. During
    /// a reload each of the two processes counts its own requests.
    #[arg(long, value_name = "N", default_value = "infinity", value_parser = CountLimit::parse)]
    pub max_requests: CountLimit,

    /// As --max-requests, for the requests of one client: an IPv4 address, or an IPv6 network of 64 bits. All requests
    /// through a proxy that is not in --trusted-proxies count as those of one client. The limit does not apply to requests
    /// over a Unix socket, unless a trusted proxy reports their client.
    #[arg(long, value_name = "N", default_value = "infinity", value_parser = CountLimit::parse)]
    pub max_requests_per_client: CountLimit,

    /// Which messages to log, in the syntax of RUST_LOG: info, debug, or info,request=debug to log each request. If this
    /// option is not set, RUST_LOG is used; if that is not set either, the default is info.
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,

    /// Format of the log. The default is journal if standard error is connected to the journal, otherwise text.
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Log a line for each request when its response begins, with target access and level info: id, method, path, route,
    /// status, time until the response began, peer and protocol version. Requests to admin listeners are left out.
    #[arg(
        long,
        value_name = "YES|NO",
        num_args = 0..=1,
        require_equals = true,
        default_value = "no",
        default_missing_value = "yes",
        action = ArgAction::Set,
        value_parser = yes_or_no()
    )]
    pub access_log: bool,
}

/// The commands of the library.
#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Command {
    /// Check the configuration: start the service and bind the listeners, but serve no request. If that works, print
    /// each option with its value and where it comes from, and exit with 0; otherwise print the reason and fail. It fails if
    /// another process listens on the same address; pass --listen 127.0.0.1:0 to use a free port.
    Check,
    /// Reload the running service: start a successor and wait until it has taken over. Use it in ExecReload=, with
    /// the options of ExecStart=. If the successor cannot start, this command fails and the old process keeps serving.
    Takeover,
}

/// A time limit that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLimit {
    Limited(Duration),
    Unlimited,
}

impl TimeLimit {
    fn parse(text: &str) -> Result<Self, String> {
        Self::parse_by(duration, text)
    }

    fn parse_positive(text: &str) -> Result<Self, String> {
        Self::parse_by(positive_duration, text)
    }

    /// `infinity` is no limit, as in the options of units (systemd.service(5)).
    fn parse_by(duration: fn(&str) -> Result<Duration, String>, text: &str) -> Result<Self, String> {
        if text == "infinity" {
            return Ok(Self::Unlimited);
        }
        duration(text).map(Self::Limited).map_err(|error| format!("{error}, or infinity"))
    }
}

impl fmt::Display for TimeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limited(time) => humantime::format_duration(*time).fmt(f),
            Self::Unlimited => f.write_str("infinity"),
        }
    }
}

/// A number of which there may be at most so many. It can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountLimit {
    Limited(NonZeroU32),
    Unlimited,
}

impl CountLimit {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "infinity" => Ok(Self::Unlimited),
            _ => text
                .parse()
                .map(Self::Limited)
                .map_err(|_| "expected a number above zero, or infinity".into()),
        }
    }

    fn maximum(self) -> Option<NonZeroU32> {
        match self {
            Self::Limited(maximum) => Some(maximum),
            Self::Unlimited => None,
        }
    }
}

impl Config {
    /// The limits of the number of requests. None if there are none.
    pub fn request_limits(&self) -> Option<Arc<RequestLimits>> {
        RequestLimits::new(self.max_requests.maximum(), self.max_requests_per_client.maximum())
    }

    /// The files of https listeners. Fails unless each certificate has a key.
    pub fn tls_files(&self, credentials: &Credentials) -> anyhow::Result<TlsFiles> {
        let (certificates, keys) = (&self.tls_cert, &self.tls_key);
        ensure!(
            certificates.len() == keys.len(),
            "--tls-cert has {} and --tls-key has {}: give the key of each certificate, in the same order",
            counted(certificates.len(), "file"),
            counted(keys.len(), "file")
        );
        Ok(TlsFiles {
            certificates: certificates.iter().cloned().zip(keys.iter().cloned()).collect(),
            client_authority: self.tls_client_ca.clone(),
            asks_clients: !self.tls_client_auth.is_empty(),
            credentials: credentials.clone(),
        })
    }

    /// The proxies before this service.
    pub fn proxies(&self) -> Proxies {
        Proxies { trusted: TrustedProxies(self.trusted_proxies.clone()), header: self.forwarded_header }
    }

    /// The time limits of a connection.
    pub fn limits(&self) -> Limits {
        Limits {
            head: self.head_timeout,
            idle: match self.idle_timeout {
                TimeLimit::Limited(time) => time,
                TimeLimit::Unlimited => Duration::MAX,
            },
            stall: self.request_timeout,
            close: CLOSE_LIMIT,
        }
    }
}

/// Parses `yes` or `no`, and the other spellings that systemd accepts for them (systemd.syntax(7)).
fn yes_or_no() -> impl TypedValueParser<Value = bool> {
    let values = [
        PossibleValue::new("yes").aliases(["y", "true", "t", "on", "1"]),
        PossibleValue::new("no").aliases(["n", "false", "f", "off", "0"]),
    ];
    let is_yes = values[0].clone();
    PossibleValuesParser::new(values).map(move |value| is_yes.matches(&value, true))
}

/// Parses the time of an option. Every option with a time uses this function, so that none exceeds [`MAX_DAYS`].
fn duration(text: &str) -> Result<Duration, String> {
    const MAX: Duration = Duration::from_secs(MAX_DAYS * 24 * 60 * 60);
    match humantime::parse_duration(text) {
        Ok(time) if time <= MAX => Ok(time),
        Ok(_) | Err(humantime::DurationError::NumberOverflow) => {
            Err(format!("expected a time of at most {MAX_DAYS}days"))
        }
        Err(_) => Err("expected a time such as 30s or 1m".into()),
    }
}

fn size(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(|_| "expected a size such as 512KiB or 2MiB".into())
}

fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("expected a time above zero".into()),
        duration => Ok(duration),
    }
}
