//! Flags and their variables. Each flag is also an environment variable: `--drain-timeout` of a
//! package named `shop` is `SHOP_DRAIN_TIMEOUT`. A flag wins over its variable.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::failure::{Failure, Result};
use crate::listeners::Listen;
use crate::registry::Limits;

/// For a peer to take the last answer of a connection and close it.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// An HTTP service that lives under systemd.
///
/// Sockets come from the first of these that has any: LISTEN_FDS (a systemd socket unit),
/// SERVER_STARTER_PORT (Server::Starter), --listen, 127.0.0.1:8080.
///
/// SIGTERM and SIGINT drain: requests in flight finish, up to --drain-timeout; a second one ends the
/// drain at once. SIGHUP reloads: a successor with the binary now at the same path takes over the sockets
/// and connections, and this process ends; without systemd, whoever started it sees its pid go.
#[derive(Clone, Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Config {
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen when no socket was inherited: 127.0.0.1:8080, [::1]:8080, /run/x.sock,
    /// unix:/run/x.sock or unix:@abstract. A name before it decides what is spoken there, as
    /// FileDescriptorName= of a socket unit does: http, https (TLS) or admin (/healthz, /readyz, /metrics). May be
    /// repeated; the variable takes commas.
    #[arg(long, value_name = "[NAME=]ADDR", value_delimiter = ',', default_value = "127.0.0.1:8080")]
    pub listen: Vec<Listen>,

    /// The certificate chain for https, PEM; by default tls.crt of the unit's credentials.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Its key, PEM; by default tls.key of the unit's credentials.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// How long to accept and serve on after SIGTERM, while /readyz says 503, for a load balancer to take
    /// notice; --drain-timeout counts from its end. Not needed where a socket unit holds the port.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub drain_delay: Duration,

    /// How long requests in flight may go on after SIGTERM. Keep TimeoutStopSec= of the unit above it.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_timeout: Duration,

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

    /// How long the service may take to begin its answer, and a client to send the next piece of a
    /// body or to take the next piece of an answer.
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

#[derive(Clone, Copy, Debug, Subcommand, PartialEq, Eq)]
pub enum Command {
    /// Do everything a start does short of serving; exit 0, or say why not.
    Check,
    /// Start a successor to the service that runs here, and wait until it has taken over: for ExecReload=,
    /// with the flags of ExecStart=. Where it cannot start, the old process stays, and this fails.
    Takeover,
}

impl Config {
    /// Reads the command line and the environment. `--help` and `--version` print and exit.
    pub fn from_environment() -> Result<Self> {
        let matches = match command().try_get_matches() {
            Ok(matches) => matches,
            Err(error) if error.use_stderr() => return Err(Failure::config(one_line(&error))),
            Err(help) => help.exit(),
        };
        Self::from_arg_matches(&matches).map_err(|error| Failure::config(one_line(&error)))
    }

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

/// The command line, each flag with its variable.
fn command() -> clap::Command {
    let prefix = env!("CARGO_PKG_NAME").to_uppercase().replace('-', "_");
    Config::command().mut_args(|arg| match arg.get_long() {
        Some("help" | "version") | None => arg,
        Some(flag) => {
            let variable = format!("{prefix}_{}", flag.to_uppercase().replace('-', "_"));
            // clap wants a name that lives as long as the process.
            arg.env(variable.leak() as &'static str).global(true)
        }
    })
}

/// Where among the arguments, of which the first is the program, the subcommand `takeover` stands. A flag may have
/// the same word for its value.
pub fn position_of_takeover(arguments: &[OsString]) -> Option<usize> {
    let is_takeover = |end: &usize| {
        // What is missing or wrong in the part that is looked at does not matter.
        let matches = command().ignore_errors(true).try_get_matches_from(&arguments[..=*end]);
        matches.is_ok_and(|matches| matches.subcommand_name() == Some("takeover"))
    };
    (1..arguments.len()).find(is_takeover)
}

/// clap's message for a terminal spreads over lines; a journal line is one.
fn one_line(error: &clap::Error) -> anyhow::Error {
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let words: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with("For more")).collect();
    anyhow::anyhow!("{}; see --help", words.join(" ").trim_start_matches("error: "))
}

fn positive_duration(text: &str) -> std::result::Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be above zero".into()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn each_flag_has_a_variable() {
        let prefix = env!("CARGO_PKG_NAME").to_uppercase().replace('-', "_");
        let command = command();
        let variable = |flag| {
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(flag)).expect("a flag");
            arg.get_env().and_then(|name| name.to_str()).map(str::to_owned)
        };
        assert_eq!(variable("drain-timeout"), Some(format!("{prefix}_DRAIN_TIMEOUT")));
        assert_eq!(variable("listen"), Some(format!("{prefix}_LISTEN")));
        assert_eq!(variable("log"), Some(format!("{prefix}_LOG")));
    }

    #[test]
    fn the_subcommand_is_found_and_no_value_is_taken_for_it() {
        let position = |line: &str| {
            let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
            position_of_takeover(&arguments)
        };
        assert_eq!(position("x takeover"), Some(1));
        assert_eq!(position("x --log takeover"), None);
        assert_eq!(position("x --log takeover takeover --log takeover"), Some(3));
        assert_eq!(position("x takeover --log takeover"), Some(1));
        assert_eq!(position("x --idle-timeout soon takeover"), Some(3));
        assert_eq!(position("x check"), None);
        assert_eq!(position("x"), None);
        assert_eq!(position_of_takeover(&[]), None);
    }

    #[test]
    fn a_wrong_value_is_one_line_that_names_the_flag() {
        let error = command().try_get_matches_from(["x", "--idle-timeout", "0s"]).expect_err("zero");
        let line = one_line(&error).to_string();
        assert!(line.contains("--idle-timeout") && line.contains("above zero"), "{line}");
        assert!(!line.contains('\n'), "{line}");
    }
}
