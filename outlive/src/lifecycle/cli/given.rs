//! The values of options that are not in front of the command line, but in the file of `--config`, in a credential, or
//! after a command. They are put in front of the command line as words, so that clap treats them like all others:
//! values are checked, and options may require or exclude each other.

use std::ffi::OsString;

use clap::builder::ValueRange;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Id};

use super::origin::Origin;
use super::syntax::is_option;
use crate::app::secret::{self, HIDDEN, Secret};

/// Separates the values of one option. No value from a command line or a file contains it.
const SEPARATOR: char = '\0';

/// The value of one option.
#[derive(Clone, Debug)]
pub struct Given {
    pub id: Id,
    pub value: Value,
    pub origin: Origin,
}

#[derive(Clone, Debug)]
pub enum Value {
    /// The values of an option that takes some.
    Texts(Vec<OsString>),
    /// How often an option without values is given.
    Count(usize),
    Secret(Secret),
}

impl Given {
    /// The words that set the option.
    pub fn words(&self, arg: &Arg) -> Vec<OsString> {
        let Some(long) = arg.get_long() else { return Vec::new() };
        let flag = OsString::from(format!("--{long}"));
        let with = |value: OsString| {
            let mut word = flag.clone();
            word.push("=");
            word.push(value);
            word
        };
        match &self.value {
            Value::Count(count) => vec![flag; *count],
            Value::Secret(_) => vec![with(HIDDEN.into())],
            Value::Texts(texts) if matches!(arg.get_action(), ArgAction::Append) => {
                texts.iter().cloned().map(with).collect()
            }
            Value::Texts(texts) => {
                vec![with(texts.join(OsString::from(String::from(SEPARATOR)).as_os_str()))]
            }
        }
    }

    /// The option, changed so that it understands [`words`](Self::words).
    pub fn understood_by(&self, arg: Arg) -> Arg {
        match &self.value {
            Value::Count(_) => arg,
            Value::Secret(secret) => arg.value_parser(secret::held(secret.clone())),
            Value::Texts(_) => arg.num_args(ValueRange::SINGLE).value_delimiter(SEPARATOR),
        }
    }
}

/// Whether the option is on the command line.
pub fn is_on_command_line(matches: &ArgMatches, id: &Id) -> bool {
    let is_known = matches.try_contains_id(id.as_str()).is_ok();
    is_known && matches.value_source(id.as_str()) == Some(ValueSource::CommandLine)
}

/// The options among `options` that stand after a command of clap in `matches`.
pub fn after_command(matches: &ArgMatches, options: &[&Arg]) -> Vec<Given> {
    let Some((_, below)) = matches.subcommand() else { return Vec::new() };
    let is_below = |arg: &&&Arg| is_option(arg) && is_on_command_line(below, arg.get_id());
    let here = options.iter().filter(is_below).map(|arg| {
        let id = arg.get_id().clone();
        let raw: Vec<_> = below.get_raw(id.as_str()).into_iter().flatten().map(OsString::from).collect();
        let value = match arg.get_action() {
            ArgAction::Count => Value::Count(below.get_count(id.as_str()).into()),
            action if action.takes_values() => Value::Texts(raw),
            _ => Value::Count(1),
        };
        Given { id, value, origin: Origin::Flag }
    });
    let mut given: Vec<_> = here.collect();
    given.extend(after_command(below, options));
    given
}

/// The option of the type [`Secret`] with the value `secret` of the credential.
pub fn from_credential(arg: &Arg, secret: Secret) -> Given {
    Given { id: arg.get_id().clone(), value: Value::Secret(secret), origin: Origin::Credential }
}
