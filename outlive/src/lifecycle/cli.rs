//! The command line: the options of the application and those of the library in one parser. Each option can also be set
//! by an environment variable, because units and containers are configured with these, and in the file of `--config`.
//!
//! - `syntax.rs`: the options and commands
//! - `given.rs`: values from the file, from credentials and after a command, as words of the command line
//! - `file.rs`: reads the file, with the feature `config-file`
//! - `origin.rs`: where each value comes from
//! - `message.rs`: errors in one line

#[cfg(feature = "config-file")]
mod file;
mod given;
mod message;
mod origin;
mod syntax;

use std::ffi::OsString;
use std::marker::PhantomData;

use anyhow::anyhow;
use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches, Id, Subcommand};
use tracing::warn;

use self::given::Given;
use self::syntax::lenient;
use crate::app::secret;
use crate::lifecycle::config::Config;
use crate::os::credentials::Credentials;
use crate::os::exit::{Failure, Result};

#[cfg(test)]
pub use self::origin::Origin;
pub use self::origin::{OptionValue, table};
pub use self::syntax::{command, command_with, position_of_takeover};

/// The command line and environment: the application's options are `C`, and its commands `D`. [`CommandLine::service`]
/// returns these, because a successor has its credentials later than the options of the library.
pub struct CommandLine<C, D> {
    /// The name of the service; see [`name`].
    pub name: String,
    pub action: Action,
    pub config: Config,
    /// The environment variables that begin like those of the options, but belong to none.
    unknown_variables: Vec<String>,
    input: Input,
    service: PhantomData<fn() -> (C, D)>,
}

/// What the process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Serve,
    Check,
    Takeover,
    /// A command of the application.
    Own,
}

/// The part of the command line that belongs to the application, and the values of all options.
pub struct Service<C, D> {
    pub options: C,
    /// Present for [`Action::Own`].
    pub command: Option<D>,
    pub values: Vec<OptionValue>,
}

/// The name of the service: that of the clap command, by default the name of the package that defines `C`.
pub fn name<C: CommandFactory>() -> String {
    C::command().get_name().to_owned()
}

impl<C: CommandFactory + FromArgMatches, D: Subcommand> CommandLine<C, D> {
    /// Reads the command line, the environment and the file. `--help` and `--version` print and exit.
    pub fn read() -> Result<Self> {
        Self::of(Input::read(command_with::<C, D>(), std::env::args_os().collect())?)
    }

    fn of(input: Input) -> Result<Self> {
        let (matches, _) = input.parse(None)?;
        let config = Config::from_arg_matches(&matches).map_err(|error| unreadable(&error))?;
        let action = match syntax::command_name(&matches).as_deref() {
            Some("check") => Action::Check,
            Some("takeover") => Action::Takeover,
            Some(name) if D::has_subcommand(name) => Action::Own,
            // The options can have commands too, which `start` interprets.
            Some(_) | None => Action::Serve,
        };
        let variables = std::env::vars_os().map(|(variable, _)| variable.to_string_lossy().into_owned());
        let unknown_variables = syntax::unknown_variables(&input.syntax, variables);
        Ok(Self { name: name::<C>(), action, config, unknown_variables, input, service: PhantomData })
    }

    /// The application's part. Secrets that nothing else sets come from `credentials`.
    pub fn service(&self, credentials: &Credentials) -> Result<Service<C, D>> {
        let (matches, given) = self.input.parse(Some(credentials))?;
        let options = C::from_arg_matches(&matches).map_err(|error| unreadable(&error))?;
        let command = (self.action == Action::Own).then(|| D::from_arg_matches(&matches)).transpose();
        let command = command.map_err(|error| unreadable(&error))?;
        Ok(Service { options, command, values: origin::values(&self.input.syntax, &matches, &given) })
    }
}

fn unreadable(error: &clap::Error) -> Failure {
    Failure::config(anyhow!("{}", message::text(error)))
}

impl<C, D> CommandLine<C, D> {
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

/// What was passed to the process.
struct Input {
    syntax: clap::Command,
    /// The command line, of which the first word is the program.
    line: Vec<OsString>,
    /// The options on it, except those after a command of clap.
    on_line: Vec<Id>,
    /// The values after a command of clap, and those of the file that nothing else sets.
    given: Vec<Given>,
}

impl Input {
    #[cfg_attr(
        not(feature = "config-file"),
        expect(clippy::unnecessary_wraps, reason = "only a file is invalid")
    )]
    fn read(syntax: clap::Command, line: Vec<OsString>) -> Result<Self> {
        let mut input = Self { syntax, line, on_line: Vec::new(), given: Vec::new() };
        // An error here is --help or --version, which need no file, because those of other kinds are ignored.
        let Ok(seen) = lenient(input.syntax.clone()).try_get_matches_from(&input.line) else {
            return Ok(input);
        };
        let options: Vec<&Arg> = input.syntax.get_arguments().collect();
        let on_line =
            options.iter().map(|arg| arg.get_id()).filter(|id| given::is_on_command_line(&seen, id));
        let (on_line, given) = (on_line.cloned().collect(), given::after_command(&seen, &options));
        (input.on_line, input.given) = (on_line, given);
        #[cfg(feature = "config-file")]
        input.read_file(&seen)?;
        Ok(input)
    }

    #[cfg(feature = "config-file")]
    fn read_file(&mut self, seen: &ArgMatches) -> Result<()> {
        let after = self.given.iter().find(|given| given.id == file::OPTION);
        let path = match after.map(|given| &given.value) {
            Some(given::Value::Texts(paths)) => paths.first().cloned(),
            _ => seen.get_raw(file::OPTION).and_then(|mut paths| paths.next().map(OsString::from)),
        };
        // clap refuses an empty value, and its error names the option or the variable.
        let Some(path) = path.filter(|path| !path.is_empty()) else { return Ok(()) };
        let mut values = file::read(&path, &self.syntax).map_err(Failure::config)?;
        values.retain(|given| !self.sets(&given.id));
        self.given.extend(values);
        Ok(())
    }

    /// Whether the command line, the environment or, when that has been read, the file sets the option.
    fn sets(&self, id: &Id) -> bool {
        let arg = self.syntax.get_arguments().find(|arg| arg.get_id() == id);
        let variable = arg.and_then(Arg::get_env);
        self.on_line.contains(id)
            || self.given.iter().any(|given| given.id == *id)
            || variable.is_some_and(|variable| std::env::var_os(variable).is_some())
    }

    /// The secrets that have to come from credentials.
    fn missing_secrets(&self) -> Vec<&Arg> {
        let is_missing =
            |arg: &&Arg| syntax::is_option(arg) && secret::is_secret(arg) && !self.sets(arg.get_id());
        self.syntax.get_arguments().filter(is_missing).collect()
    }

    /// Parses everything. Returns also the values that are not in front of the command line. Without `credentials`, the
    /// options of the application are not checked if one of them has to come from a credential.
    fn parse(&self, credentials: Option<&Credentials>) -> Result<(ArgMatches, Vec<Given>)> {
        let mut given = self.given.clone();
        let mut command = self.syntax.clone();
        let missing = self.missing_secrets();
        let is_pending = credentials.is_none() && !missing.is_empty();
        match credentials {
            None if is_pending => command = syntax::library_only(command),
            None => {}
            Some(credentials) => {
                for arg in missing {
                    let name = arg.get_long().unwrap_or_default();
                    let secret = credentials.text(name).map_err(Failure::config)?;
                    given.extend(secret.map(|text| given::from_credential(arg, text.into())));
                }
            }
        }
        let mut line = self.line.iter().take(1).cloned().collect::<Vec<_>>();
        for value in &given {
            let arg = self.syntax.get_arguments().find(|arg| arg.get_id() == &value.id);
            line.extend(arg.map(|arg| value.words(arg)).unwrap_or_default());
            command = command.mut_arg(value.id.clone(), |arg| value.understood_by(arg));
        }
        line.extend(self.line.iter().skip(1).cloned());
        let parsed = command.clone().try_get_matches_from(&line).or_else(|error| {
            let lacks =
                matches!(error.kind(), ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict);
            // A secret may be what lacks, so this is an error only when the credentials are known.
            if is_pending && lacks {
                command.ignore_errors(true).try_get_matches_from(line)
            } else {
                Err(error)
            }
        });
        match parsed {
            Ok(matches) => Ok((matches, given)),
            Err(error) if error.use_stderr() => {
                let value_of = |variable: &std::ffi::OsStr| std::env::var_os(variable);
                let error = message::one_line(&error, self.syntax.clone(), &self.line, value_of, &given);
                Err(Failure::config(error))
            }
            Err(help) => help.exit(),
        }
    }
}

#[cfg(test)]
mod tests;
