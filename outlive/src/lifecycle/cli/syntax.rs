//! What the command line may contain: the options of the application and those of the library, each with its
//! environment variable, and the commands of both.

use std::convert::Infallible;
use std::ffi::OsString;

use clap::builder::{EnumValueParser, Resettable, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, Id, Subcommand, ValueEnum};

use crate::app::secret;
use crate::lifecycle::config::{Command, Config};

/// The argument that names a command of the library, in a service that has no commands of its own.
const COMMAND: &str = "command";

/// The heading of the options of the library in `--help`.
const HEADING: &str = "Server options";

/// The end of `--help` of each command. Without it a reader would think that a command has no options of the service.
const ALSO_ACCEPTED: &str = "The options of the service are accepted too: see --help without a command.";

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
    command_with::<C, Infallible>()
}

/// As [`command`], for a service with commands of its own: the command line that [`run_with`](crate::run_with) reads.
///
/// ```
/// /// Sells things.
/// #[derive(clap::Parser)]
/// #[command(name = "shop")]
/// struct Config {}
///
/// #[derive(clap::Subcommand)]
/// enum Command {
///     /// Bring the database up to date.
///     Migrate,
/// }
///
/// let command = outlive::command_with::<Config, Command>();
/// let names: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
/// assert_eq!(names, ["check", "takeover", "migrate"]);
/// ```
///
/// # Panics
/// If an option of `C` has the name of an option of the library, if a command of `D` is called `check` or `takeover`, or
/// if an option of such a command has the name of an option of `C` or of the library.
pub fn command_with<C: CommandFactory, D: Subcommand>() -> clap::Command {
    let service = C::command();
    let name = service.get_name().to_owned();
    refuse_options(&service);
    let service = service.mut_args(|arg| {
        if arg.get_help_heading().is_some() { arg } else { arg.help_heading("Application options") }
    });
    let more = format!("{SOURCES}{}.", variable(&name, "drain-timeout"));
    let about = service.get_about().cloned();
    let long_about = service.get_long_about().cloned().or_else(|| about.clone());
    let own = D::augment_subcommands(clap::Command::new("own"));
    let service = service.next_help_heading(HEADING);
    let command = if own.has_subcommands() { service } else { service.arg(library_command()) };
    let command = library_options(command)
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
        .mut_args(|arg| name_credential(hide(arg)));
    if own.has_subcommands() { with_commands(command, &own, D::augment_subcommands) } else { command }
}

/// The argument for a command of the library. It is not a command of clap, because options may stand before and after
/// it.
fn library_command() -> Arg {
    Arg::new(COMMAND)
        .value_name("COMMAND")
        .value_parser(EnumValueParser::<Command>::new())
        .help("What to do instead of serving requests")
}

fn library_options(command: clap::Command) -> clap::Command {
    let command = Config::augment_args(command);
    #[cfg(feature = "config-file")]
    let command = command.arg(super::file::option());
    command
}

/// Adds the commands of the library and those of the application. Each has hidden copies of the options of `command`,
/// so that those may stand before and after it.
fn with_commands(
    command: clap::Command,
    own: &clap::Command,
    augment: impl Fn(clap::Command) -> clap::Command,
) -> clap::Command {
    let copies: Vec<_> = command.get_arguments().filter(|arg| arg.get_long().is_some()).map(copy).collect();
    refuse_commands(own, &copies);
    let ours = Command::value_variants().iter().filter_map(ValueEnum::to_possible_value).map(|value| {
        let name: &'static str = value.get_name().to_owned().leak();
        clap::Command::new(name).about(value.get_help().cloned().unwrap_or_default())
    });
    augment(command.subcommands(ours))
        .subcommand_required(false)
        .arg_required_else_help(false)
        .mut_subcommands(|command| with_copies(command, &copies))
}

fn with_copies(command: clap::Command, copies: &[Arg]) -> clap::Command {
    let command = command.args(copies).mut_args(hide).after_help(ALSO_ACCEPTED);
    command.mut_subcommands(|command| with_copies(command, copies))
}

/// A copy of an option that accepts its values without a check. They are checked as those of the option itself
/// (`given.rs`).
fn copy(arg: &Arg) -> Arg {
    unchecked(alone(arg.clone())).default_value(None::<&'static str>).hide(true)
}

/// An option that neither needs another option, nor excludes one, nor has to be present.
pub fn alone(arg: Arg) -> Arg {
    arg.required(false)
        .exclusive(false)
        .env(None::<&'static str>)
        .requires(Resettable::<Id>::Reset)
        .conflicts_with(Resettable::<Id>::Reset)
        .overrides_with(Resettable::<Id>::Reset)
        .required_unless_present(Resettable::<Id>::Reset)
}

/// An option that accepts every value, and may lack.
fn unchecked(arg: Arg) -> Arg {
    if arg.get_action().takes_values() {
        arg.required(false).value_parser(ValueParser::os_string())
    } else {
        arg
    }
}

/// Keeps the value of a secret out of `--help`.
fn hide(arg: Arg) -> Arg {
    if secret::is_secret(&arg) { arg.hide_env_values(true).hide_default_value(true) } else { arg }
}

/// Names the credential of a secret in `--help`.
fn name_credential(arg: Arg) -> Arg {
    let Some(name) = arg.get_long().filter(|_| secret::is_secret(&arg)) else { return arg };
    let note = format!("[credential: {name}]");
    let help = arg.get_help().map_or_else(|| note.clone(), |help| format!("{help} {note}"));
    let long_help = arg.get_long_help().map(|help| format!("{help} {note}"));
    let arg = arg.help(help);
    if let Some(long_help) = long_help { arg.long_help(long_help) } else { arg }
}

/// As `command`, but every value is accepted, no option has to be present, and errors are ignored. With it the program
/// learns what is on a command line that is not complete or not valid.
pub fn lenient(command: clap::Command) -> clap::Command {
    fn all(command: clap::Command) -> clap::Command {
        command.mut_args(unchecked).mut_subcommands(all)
    }
    all(command.ignore_errors(true))
}

/// As `command`, but the values of the application's options are not checked.
pub fn library_only(command: clap::Command) -> clap::Command {
    let ours = library_options(clap::Command::new("outlive").arg(library_command()));
    let is_ours = |arg: &Arg| ours.get_arguments().any(|our| our.get_id() == arg.get_id());
    command.mut_args(|arg| if is_ours(&arg) { arg } else { unchecked(alone(arg)) })
}

/// The name of the command of the library or of the application that is on the command line.
pub fn command_name(matches: &ArgMatches) -> Option<String> {
    let of_clap = matches.subcommand_name().map(str::to_owned);
    let of_argument = || {
        let mut values = matches.try_get_raw(COMMAND).ok().flatten()?;
        Some(values.next()?.to_string_lossy().into_owned())
    };
    of_clap.or_else(of_argument)
}

/// The index of the command `takeover` in `arguments`, of which the first is the program. The arguments are parsed and
/// not searched, because `takeover` may also be the value of an option.
pub fn position_of_takeover<C: CommandFactory, D: Subcommand>(arguments: &[OsString]) -> Option<usize> {
    let is_takeover = |end: &usize| {
        // The parsed part may lack required options, and an invalid value is reported by the process that uses it.
        let matches = lenient(command_with::<C, D>()).try_get_matches_from(&arguments[..=*end]);
        matches.is_ok_and(|matches| command_name(&matches).as_deref() == Some("takeover"))
    };
    (1..arguments.len()).find(is_takeover)
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
pub fn unknown_variables(command: &clap::Command, variables: impl Iterator<Item = String>) -> Vec<String> {
    let prefix = variable(command.get_name(), "");
    let variables: Vec<_> = variables.collect();
    let is_in_kubernetes = variables.iter().any(|variable| variable == "KUBERNETES_SERVICE_HOST");
    let is_of_kubernetes = |variable: &str| {
        let is_port = |(_, end): (&str, &str)| end.is_empty() || end.starts_with('_');
        variable.ends_with("_SERVICE_HOST")
            || variable.contains("_SERVICE_PORT")
            || variable.rsplit_once("_PORT").is_some_and(is_port)
    };
    let is_option = |variable: &str| {
        let commands = all_commands(command);
        let mut options =
            commands.iter().flat_map(|command| command.get_arguments()).filter_map(Arg::get_env);
        options.any(|known| known == variable)
    };
    let is_known = |variable: &str| {
        is_option(variable)
            || FOREIGN.iter().any(|beginning| variable.starts_with(beginning))
            || is_in_kubernetes && is_of_kubernetes(variable)
    };
    let mut unknown: Vec<_> =
        variables.into_iter().filter(|name| name.starts_with(&prefix) && !is_known(name)).collect();
    unknown.sort();
    unknown
}

/// The command and all commands below it.
fn all_commands(command: &clap::Command) -> Vec<&clap::Command> {
    let below = command.get_subcommands().flat_map(all_commands);
    std::iter::once(command).chain(below).collect()
}

/// Panics if the application has an option of the same name as the library. clap itself reports that in debug builds
/// only.
fn refuse_options(service: &clap::Command) {
    let ours = library_options(clap::Command::new("outlive").arg(library_command()));
    for arg in service.get_arguments() {
        if let Some(our) = ours.get_arguments().find(|our| is_same(our, arg)) {
            panic!(
                "outlive already has an option --{}: rename the application's option",
                our.get_long().unwrap_or(our.get_id().as_str())
            );
        }
    }
}

/// Panics if a command of the application has the name of a command of the library, or an option of a command has the
/// name of one of `options`.
fn refuse_commands(own: &clap::Command, options: &[Arg]) {
    let ours: Vec<_> = Command::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
    for command in own.get_subcommands() {
        for name in std::iter::once(command.get_name()).chain(command.get_all_aliases()) {
            let is_ours = ours.iter().any(|our| our.matches(name, true));
            assert!(!is_ours, "outlive already has a command {name}: rename the application's command");
        }
    }
    for command in all_commands(own) {
        let same = |arg: &&Arg| options.iter().any(|option| is_same(option, arg));
        if let Some(arg) = command.get_arguments().find(same) {
            panic!(
                "the option --{} of the command {} has the name of an option of the service: rename it",
                arg.get_long().unwrap_or(arg.get_id().as_str()),
                command.get_name()
            );
        }
    }
}

fn is_same(one: &Arg, other: &Arg) -> bool {
    let is_long = one.get_long().is_some() && one.get_long() == other.get_long();
    let is_short = one.get_short().is_some() && one.get_short() == other.get_short();
    one.get_id() == other.get_id() || is_long || is_short
}

/// Whether `arg` is an option that has a value, and not one such as `--help`.
pub fn is_option(arg: &Arg) -> bool {
    let prints = matches!(
        arg.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    );
    arg.get_long().is_some() && !prints
}

#[cfg(test)]
mod tests {
    use clap::{FromArgMatches, Parser};

    use super::*;

    /// Links, shortened.
    #[derive(Debug, Parser)]
    #[command(name = "shop-front", version)]
    struct Own {
        /// Where the links are kept.
        #[arg(long)]
        database: String,
    }

    #[derive(Debug, Subcommand)]
    enum OwnCommand {
        /// Bring the database up to date.
        Migrate {
            /// Only print what would be done.
            #[arg(long)]
            dry_run: bool,
        },
    }

    #[test]
    fn command_passes_the_debug_assertions_of_clap() {
        command::<Own>().debug_assert();
        command_with::<Own, OwnCommand>().debug_assert();
    }

    #[test]
    fn long_help_begins_with_the_description_of_the_application() {
        let help = command::<Own>().render_long_help().to_string();
        assert!(help.starts_with("Links, shortened"), "{help}");
    }

    #[test]
    fn help_lists_the_commands_of_the_library_and_of_the_application() {
        let help = command_with::<Own, OwnCommand>().render_help().to_string();
        for command in ["\n  check ", "\n  takeover ", "\n  migrate "] {
            assert!(help.contains(command), "{help}");
        }
        assert!(help.contains("Usage: shop-front [OPTIONS] --database <DATABASE> [COMMAND]"), "{help}");
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
            assert_eq!(
                (command_name(&matches).as_deref(), config.log.as_deref()),
                (Some("check"), Some("info"))
            );
            assert_eq!(Own::from_arg_matches(&matches).expect(line).database, "d");
        }
    }

    fn position<D: Subcommand>(line: &str) -> Option<usize> {
        let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
        position_of_takeover::<Own, D>(&arguments)
    }

    #[test]
    fn position_of_takeover_ignores_the_values_of_options() {
        for position in [position::<Infallible>, position::<OwnCommand>] {
            assert_eq!(position("x takeover"), Some(1));
            assert_eq!(position("x --log takeover"), None);
            assert_eq!(position("x --log takeover takeover --log takeover"), Some(3));
            assert_eq!(position("x takeover --log takeover --database takeover"), Some(1));
            assert_eq!(position("x --database takeover takeover"), Some(3));
            assert_eq!(position("x --idle-timeout soon takeover"), Some(3));
            assert_eq!(position("x check"), None);
            assert_eq!(position("x"), None);
        }
        assert_eq!(position::<OwnCommand>("x migrate --log takeover"), None);
        assert_eq!(position::<OwnCommand>("x migrate takeover"), None);
        assert_eq!(position_of_takeover::<Own, Infallible>(&[]), None);
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

    #[test]
    #[should_panic(expected = "outlive already has a command takeover: rename the application's command")]
    fn command_with_the_name_of_a_library_command_panics() {
        #[derive(Subcommand)]
        enum Colliding {
            Takeover,
        }
        command_with::<Own, Colliding>();
    }

    #[test]
    #[should_panic(expected = "outlive already has a command check: rename the application's command")]
    fn alias_of_a_command_with_the_name_of_a_library_command_panics() {
        #[derive(Subcommand)]
        enum Colliding {
            #[command(alias = "check")]
            Verify,
        }
        command_with::<Own, Colliding>();
    }

    #[test]
    #[should_panic(
        expected = "the option --database of the command dump has the name of an option of the service"
    )]
    fn option_of_a_command_with_the_name_of_an_option_panics() {
        #[derive(Subcommand)]
        enum Colliding {
            Dump {
                #[arg(long)]
                database: Option<String>,
            },
        }
        command_with::<Own, Colliding>();
    }
}
