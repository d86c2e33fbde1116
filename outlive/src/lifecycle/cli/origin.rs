//! Where the value of each option comes from, as `check` prints it and the admin listeners show it.

use std::fmt;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches};

use super::given::Given;
use super::syntax::is_option;
use crate::app::secret::{self, HIDDEN};

/// The widest value after which the origins are still aligned. A wider one moves its own origin only.
const WIDEST: usize = 40;

/// Where a value comes from, in the order in which one replaces another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag,
    /// The environment variable of this name.
    Variable(String),
    /// The line of the file.
    #[cfg_attr(not(feature = "config-file"), expect(dead_code, reason = "only files give values with lines"))]
    File(PathBuf, usize),
    Credential,
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::File(path, line) => write!(f, "file {}:{line}", path.display()),
            Self::Credential => f.write_str("credential"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// An option, its value as text, and where that comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionValue {
    pub name: String,
    /// None for an option without a value.
    pub value: Option<String>,
    pub origin: Origin,
}

impl OptionValue {
    /// The value as it is shown.
    fn shown(&self) -> &str {
        self.value.as_deref().unwrap_or("-")
    }
}

/// The values of all options of `command` in the order of `--help`. Secrets are hidden.
pub fn values(command: &clap::Command, matches: &ArgMatches, given: &[Given]) -> Vec<OptionValue> {
    let options = command.get_arguments().filter(|arg| is_option(arg));
    options
        .map(|arg| OptionValue {
            name: arg.get_long().unwrap_or_default().to_owned(),
            value: value(arg, matches),
            origin: origin(arg, matches, given),
        })
        .collect()
}

fn origin(arg: &Arg, matches: &ArgMatches, given: &[Given]) -> Origin {
    if let Some(given) = given.iter().find(|given| given.id == *arg.get_id()) {
        return given.origin.clone();
    }
    match matches.value_source(arg.get_id().as_str()) {
        Some(ValueSource::CommandLine) => Origin::Flag,
        Some(ValueSource::EnvVariable) => {
            let name = arg.get_env().unwrap_or_default();
            Origin::Variable(name.to_string_lossy().into_owned())
        }
        _ => Origin::Default,
    }
}

/// Control characters are escaped, so that each option has one line.
fn value(arg: &Arg, matches: &ArgMatches) -> Option<String> {
    let values = matches.get_raw(arg.get_id().as_str())?;
    if secret::is_secret(arg) || arg.is_hide_env_values_set() {
        return Some(HIDDEN.into());
    }
    let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
    let text = values.join(",");
    Some(if text.is_empty() || text.contains(char::is_control) { format!("{text:?}") } else { text })
}

/// One line for each option, in columns.
pub fn table(values: &[OptionValue]) -> String {
    let width = |text: &str| text.chars().count();
    let names = values.iter().map(|option| width(&option.name)).max().unwrap_or_default();
    let widths = values.iter().map(|option| width(option.shown())).filter(|width| *width <= WIDEST);
    let widest = widths.max().unwrap_or_default();
    let line = |option: &OptionValue| {
        let (OptionValue { name, origin, .. }, value) = (option, option.shown());
        format!("{name:names$}  {value:widest$}  {origin}\n")
    };
    values.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_aligned_columns_although_one_value_is_long() {
        let option = |name: &str, value: Option<&str>, origin| OptionValue {
            name: name.into(),
            value: value.map(Into::into),
            origin,
        };
        let long = "x".repeat(WIDEST + 1);
        let values = [
            option("listen", Some("127.0.0.1:0"), Origin::Flag),
            option("drain-timeout", Some("1s"), Origin::Variable("SHOP_DRAIN_TIMEOUT".into())),
            option("url", Some(&long), Origin::File("/etc/shop.toml".into(), 3)),
            option("log", None, Origin::Default),
        ];
        let expected = format!(
            "listen         127.0.0.1:0  flag\n\
             drain-timeout  1s           variable SHOP_DRAIN_TIMEOUT\n\
             url            {long}  file /etc/shop.toml:3\n\
             log            -            default\n"
        );
        assert_eq!(table(&values), expected);
    }
}
