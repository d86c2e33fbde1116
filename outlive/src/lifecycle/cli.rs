//! The command line: the options of the application and those of the library in one parser. Each option can also be set
//! by an environment variable, because units and containers are configured with these.

use std::ffi::{OsStr, OsString};

use anyhow::anyhow;
use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Args, CommandFactory, FromArgMatches};
use tracing::warn;

use crate::lifecycle::config::{Command, Config};
use crate::os::exit::{Failure, Result};

/// The parsed command line and environment.
pub struct CommandLine<C> {
    /// The name of the service; see [`name`].
    pub name: String,
    pub command: Option<Command>,
    pub config: Config,
    /// The application's options.
    pub service: C,
    /// The environment variables that begin like those of the options, but belong to none.
    pub unknown_variables: Vec<String>,
}

/// The name of the service: that of the clap command, by default the name of the package that defines `C`.
pub fn name<C: CommandFactory>() -> String {
    C::command().get_name().to_owned()
}

impl<C: CommandFactory + FromArgMatches> CommandLine<C> {
    /// Reads the command line and the environment. `--help` and `--version` print and exit.
    pub fn read() -> Result<Self> {
        let matches = match command::<C>().try_get_matches() {
            Ok(matches) => matches,
            Err(error) if error.use_stderr() => {
                let is_set = |variable: &OsStr| std::env::var_os(variable).is_some();
                return Err(Failure::config(one_line(&error, command::<C>(), std::env::args_os(), is_set)));
            }
            Err(help) => help.exit(),
        };
        let config = Config::from_arg_matches(&matches);
        let service = C::from_arg_matches(&matches);
        let unreadable = |error: clap::Error| Failure::config(anyhow!("{}", text(&error)));
        let config = config.map_err(unreadable)?;
        let service = service.map_err(unreadable)?;
        let variables = std::env::vars_os().map(|(variable, _)| variable.to_string_lossy().into_owned());
        let unknown_variables = unknown_variables(&command::<C>(), variables);
        Ok(Self { name: name::<C>(), command: config.command, config, service, unknown_variables })
    }
}

impl<C> CommandLine<C> {
    /// Logs the variables that no option has, such as a misspelled one. Call it when logging is set up.
    pub fn warn_of_unknown_variables(&self) {
        if !self.unknown_variables.is_empty() {
            let variables = self.unknown_variables.join(" ");
            warn!(
                "ignored environment variables, because no option has these names (see --help): {variables}"
            );
        }
    }
}

const SOURCES: &str = "\
The process listens on the sockets that it inherits from systemd: LISTEN_FDS is their number, and LISTEN_PID the \
process that they are for. If there are none, it listens on the sockets of SERVER_STARTER_PORT (Server::Starter); if \
there are none either, on the addresses of --listen.

SIGTERM and SIGINT start a drain: each request may take up to --drain-timeout to finish. Without a file descriptor \
store of systemd, a drain also waits up to --drain-timeout for idle HTTP/1.1 connections, because a request may be \
under way on them. A second signal ends the drain at once. SIGHUP reloads: a successor, started from the binary that is \
now at the same path, takes over the sockets and connections, and then this process exits. Responses that take longer \
than --drain-timeout delay that exit by up to --linger-timeout. The successor has another \
pid. A process supervisor other than systemd knows only the pid that it started, so it takes the exit of that process \
for the end of the service.

Each option can also be set by an environment variable, such as ";

/// The command line that [`run`](crate::run) reads: the options of the application and those of the library, each with
/// its environment variable. Use it to generate a man page, shell completions, or a list of the variables.
///
/// ```
/// /// Says hello.
/// #[derive(clap::Parser)]
/// #[command(name = "shop")]
/// struct Config {}
///
/// let command = outlive::command::<Config>();
/// let drain = command.get_arguments().find(|arg| arg.get_long() == Some("drain-timeout")).unwrap();
/// assert_eq!(drain.get_env().unwrap(), "SHOP_DRAIN_TIMEOUT");
/// ```
///
/// # Panics
/// If an option of `C` has the name of an option of the library.
pub fn command<C: CommandFactory>() -> clap::Command {
    let service = C::command();
    let name = service.get_name().to_owned();
    refuse_collisions(&service);
    let service = service.mut_args(|arg| {
        if arg.get_help_heading().is_some() { arg } else { arg.help_heading("Application options") }
    });
    let more = format!("{SOURCES}{}.", variable(&name, "drain-timeout"));
    let about = service.get_about().cloned();
    let long_about = service.get_long_about().cloned().or_else(|| about.clone());
    Config::augment_args(service.next_help_heading("Server options"))
        .about(about.unwrap_or_default())
        .long_about(long_about.unwrap_or_default())
        .after_long_help(more)
        .max_term_width(100)
        .mut_args(|arg| match arg.get_long() {
            Some(flag) if arg.get_env().is_none() => {
                let variable: &'static str = variable(&name, flag).leak();
                arg.env(variable)
            }
            _ => arg,
        })
}

/// `SHOP_DRAIN_TIMEOUT`
fn variable(name: &str, flag: &str) -> String {
    format!("{name}_{flag}").to_uppercase().replace('-', "_")
}

/// The beginnings of variables that systemd, `Server::Starter` and this library set. The name of a service may be such a
/// beginning too.
const FOREIGN: [&str; 20] = [
    "CACHE_DIRECTORY",
    "CARGO_",
    "CONFIGURATION_DIRECTORY",
    "CREDENTIALS_DIRECTORY",
    "EXIT_",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_",
    "LOGS_DIRECTORY",
    "MANAGER_",
    "MEMORY_PRESSURE_",
    "NOTIFY_SOCKET",
    "RUNTIME_DIRECTORY",
    "RUST_",
    "SERVER_STARTER_",
    "SERVICE_RESULT",
    "STATE_DIRECTORY",
    "SYSTEMD_",
    "TAKEOVER_",
    "WATCHDOG_",
];

/// Which of the `variables` begin with the prefix of the options of `command`, but belong to none of them. Kubernetes sets
/// such variables for each of its services (`SHOP_PORT`, `SHOP_SERVICE_HOST`); they are left out there.
fn unknown_variables(command: &clap::Command, variables: impl Iterator<Item = String>) -> Vec<String> {
    let prefix = variable(command.get_name(), "");
    let variables: Vec<_> = variables.collect();
    let is_in_kubernetes = variables.iter().any(|variable| variable == "KUBERNETES_SERVICE_HOST");
    let is_of_kubernetes = |variable: &str| {
        let is_port = |(_, end): (&str, &str)| end.is_empty() || end.starts_with('_');
        variable.ends_with("_SERVICE_HOST")
            || variable.contains("_SERVICE_PORT")
            || variable.rsplit_once("_PORT").is_some_and(is_port)
    };
    let is_known = |variable: &str| {
        command.get_arguments().filter_map(Arg::get_env).any(|known| known == variable)
            || FOREIGN.iter().any(|beginning| variable.starts_with(beginning))
            || is_in_kubernetes && is_of_kubernetes(variable)
    };
    let mut unknown: Vec<_> =
        variables.into_iter().filter(|name| name.starts_with(&prefix) && !is_known(name)).collect();
    unknown.sort();
    unknown
}

/// Panics if the application has an option of the same name as the library. clap itself reports that in debug builds
/// only.
fn refuse_collisions(service: &clap::Command) {
    let ours = Config::augment_args(clap::Command::new("outlive"));
    for arg in service.get_arguments() {
        let is_same = |our: &&Arg| {
            our.get_id() == arg.get_id() || arg.get_long().is_some_and(|long| our.get_long() == Some(long))
        };
        if let Some(our) = ours.get_arguments().find(is_same) {
            panic!(
                "outlive already has an option --{}: rename the application's option",
                our.get_long().unwrap_or(our.get_id().as_str())
            );
        }
    }
}

/// The index of the command `takeover` in `arguments`, of which the first is the program. The arguments are parsed and
/// not searched, because `takeover` may also be the value of an option.
pub fn position_of_takeover<C: CommandFactory>(arguments: &[OsString]) -> Option<usize> {
    let is_takeover = |end: &usize| {
        // The parsed part may lack required options, and an invalid value is reported by the process that uses it.
        let lenient = command::<C>().ignore_errors(true).mut_args(|arg| {
            let takes_values = arg.get_action().takes_values();
            if takes_values { arg.required(false).value_parser(ValueParser::os_string()) } else { arg }
        });
        let matches = lenient.try_get_matches_from(&arguments[..=*end]);
        let is_it = |command: &OsString| command == "takeover";
        matches.is_ok_and(|matches| matches.get_one("command").is_some_and(is_it))
    };
    (1..arguments.len()).find(is_takeover)
}

/// clap's message, which names the option. If the invalid value comes from an environment variable, the message also
/// names the variable, because a reader of the journal would look for the option on the command line in vain.
fn one_line(
    error: &clap::Error,
    mut command: clap::Command,
    mut line: impl Iterator<Item = OsString>,
    is_set: impl Fn(&OsStr) -> bool,
) -> anyhow::Error {
    let text = text(error);
    let Some(ContextValue::String(invalid)) = error.get(ContextKind::InvalidArg) else {
        return anyhow!(text);
    };
    command.build();
    let arg = command.get_arguments().find(|arg| arg.to_string() == *invalid);
    let variable = arg.and_then(Arg::get_env).filter(|variable| is_set(variable));
    let flag = arg.and_then(Arg::get_long).map(|flag| format!("--{flag}")).unwrap_or_default();
    match variable {
        Some(variable) if !line.any(|word| word.to_string_lossy().starts_with(&flag)) => {
            anyhow!("{}: {text}", variable.display())
        }
        _ => anyhow!(text),
    }
}

/// clap's message in one line: clap formats it for a terminal, but each line would be an entry of its own in the
/// journal.
fn text(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    // The tip to write an unknown option as a value is wrong, because the only values are commands.
    let words = lines.filter(|line| {
        !line.is_empty() && !line.starts_with("For more") && !line.starts_with("tip: to pass")
    });
    let words: Vec<&str> = words.collect();
    let line = words.join(" ").replace(" found tip: ", "; ");
    let line = line.strip_suffix(" found").unwrap_or(&line);
    format!("{}; see --help", line.trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    /// Links, shortened.
    #[derive(Debug, Parser)]
    #[command(name = "shop-front", version)]
    struct Own {
        /// Where the links are kept.
        #[arg(long)]
        database: String,
    }

    #[test]
    fn command_passes_the_debug_assertions_of_clap() {
        command::<Own>().debug_assert();
    }

    #[test]
    fn unknown_option_is_reported_with_the_similar_option_only() {
        for (option, message) in [
            ("--no-such", "unexpected argument '--no-such'; see --help"),
            (
                "--drain-timeouts",
                "unexpected argument '--drain-timeouts'; a similar argument exists: '--drain-timeout'; see --help",
            ),
        ] {
            let error =
                command::<Own>().try_get_matches_from(["shop-front", option]).expect_err("it is unknown");
            assert_eq!(text(&error), message);
        }
    }

    #[test]
    fn long_help_begins_with_the_description_of_the_application() {
        let help = command::<Own>().render_long_help().to_string();
        assert!(help.starts_with("Links, shortened"), "{help}");
    }

    #[test]
    fn each_option_has_a_variable_with_the_prefix_of_the_service() {
        let command = command::<Own>();
        let variable = |flag| {
            let arg =
                command.get_arguments().find(|arg| arg.get_long() == Some(flag)).expect("the option exists");
            arg.get_env().and_then(|name| name.to_str()).map(str::to_owned)
        };
        assert_eq!(variable("drain-timeout"), Some("SHOP_FRONT_DRAIN_TIMEOUT".into()));
        assert_eq!(variable("database"), Some("SHOP_FRONT_DATABASE".into()));
    }

    #[test]
    fn variable_with_the_prefix_of_the_service_that_no_option_has_is_unknown() {
        #[derive(Parser)]
        #[command(name = "shop-front")]
        struct Own {
            /// Where the links are kept.
            #[arg(long)]
            _database: Option<String>,
            /// A variable with another name than its option.
            #[arg(long, env = "SHOP_FRONT_KEY")]
            _secret: Option<String>,
        }
        let unknown = |variables: &[&str]| {
            unknown_variables(&command::<Own>(), variables.iter().map(ToString::to_string))
        };
        let variables = [
            "SHOP_FRONT_DRIAN_TIMEOUT",
            "SHOP_FRONT_DRAIN_TIMEOUT",
            "SHOP_FRONT_DATABASE",
            "SHOP_FRONT_SECRET",
            "SHOP_FRONT_KEY",
            "SHOP_LOG",
            "HOME",
            "SHOP_FRONT_COMMAND",
        ];
        let misspelled = ["SHOP_FRONT_COMMAND", "SHOP_FRONT_DRIAN_TIMEOUT", "SHOP_FRONT_SECRET"];
        assert_eq!(unknown(&variables), misspelled);
        let of_kubernetes =
            ["SHOP_FRONT_PORT_80_TCP", "SHOP_FRONT_SERVICE_HOST", "SHOP_FRONT_SERVICE_PORT_HTTP"];
        assert_eq!(unknown(&of_kubernetes), of_kubernetes);
        assert_eq!(unknown(&[&of_kubernetes[..], &["KUBERNETES_SERVICE_HOST"]].concat()), [""; 0]);
    }

    #[test]
    fn variables_of_systemd_are_known_to_a_service_whose_prefix_they_have() {
        #[derive(Parser)]
        #[command(name = "state")]
        struct Own {}
        let variables = ["STATE_DIRECTORY", "STATE_FILE"].map(str::to_owned);
        assert_eq!(unknown_variables(&command::<Own>(), variables.into_iter()), ["STATE_FILE"]);
    }

    #[test]
    fn options_have_two_headings_and_are_accepted_before_and_after_the_command() {
        let help = command::<Own>().render_help().to_string();
        let own = help.find("Application options:").expect("the heading exists");
        let ours = help.find("Server options:").expect("the heading exists");
        // The usage line names each option too, before the headings.
        assert!(own < help.rfind("--database").expect("the option exists"), "{help}");
        assert!(ours < help.rfind("--listen").expect("the option exists"), "{help}");
        for line in ["x check --database d --log info", "x --database d --log info check"] {
            let matches = command::<Own>().try_get_matches_from(line.split(' ')).expect(line);
            let config = Config::from_arg_matches(&matches).expect(line);
            assert_eq!((config.command, config.log.as_deref()), (Some(Command::Check), Some("info")));
            assert_eq!(Own::from_arg_matches(&matches).expect(line).database, "d");
        }
    }

    #[test]
    fn position_of_takeover_ignores_the_values_of_options() {
        let position = |line: &str| {
            let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
            position_of_takeover::<Own>(&arguments)
        };
        assert_eq!(position("x takeover"), Some(1));
        assert_eq!(position("x --log takeover"), None);
        assert_eq!(position("x --log takeover takeover --log takeover"), Some(3));
        assert_eq!(position("x takeover --log takeover --database takeover"), Some(1));
        assert_eq!(position("x --database takeover takeover"), Some(3));
        assert_eq!(position("x --idle-timeout soon takeover"), Some(3));
        assert_eq!(position("x check"), None);
        assert_eq!(position("x"), None);
        assert_eq!(position_of_takeover::<Own>(&[]), None);
    }

    #[test]
    fn invalid_value_is_reported_in_one_line_with_its_option_or_variable() {
        let line = ["x", "--database", "d", "--idle-timeout", "0s"];
        let command = command::<Own>();
        let error = command.clone().try_get_matches_from(line).expect_err("zero is refused");
        let message_for = |words: &[&str], is_set: bool| {
            one_line(&error, command.clone(), words.iter().map(OsString::from), |_| is_set).to_string()
        };
        let message = message_for(&line, true);
        assert!(
            message.starts_with("invalid value '0s' for '--idle-timeout <TIME>': expected a time above zero"),
            "{message}"
        );
        assert!(!message.contains('\n'), "{message}");
        assert_eq!(message_for(&["x"], false), message);
        assert_eq!(message_for(&["x"], true), format!("SHOP_FRONT_IDLE_TIMEOUT: {message}"));
    }

    #[test]
    #[should_panic(expected = "outlive already has an option --log")]
    fn option_with_the_name_of_a_library_option_panics() {
        #[derive(Parser)]
        struct Colliding {
            #[arg(long)]
            log: Option<String>,
        }
        command::<Colliding>();
    }
}
