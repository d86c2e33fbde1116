//! The errors of clap in one line: clap formats them for a terminal, but each line would be an entry of its own in the
//! journal.

use std::ffi::{OsStr, OsString};

use anyhow::anyhow;
use clap::Arg;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::given::Given;
use super::origin::Origin;
use crate::app::secret;

/// clap's message, which names the option. If the invalid value comes from an environment variable or a file, the message
/// also names that, because a reader of the journal would look for the option on the command line in vain.
pub fn one_line(
    error: &clap::Error,
    mut command: clap::Command,
    mut line: impl Iterator<Item = OsString>,
    is_set: impl Fn(&OsStr) -> bool,
    given: &[Given],
) -> anyhow::Error {
    let text = text(error);
    command.build();
    if error.kind() == ErrorKind::MissingRequiredArgument {
        let is_missing = |arg: &&Arg| secret::is_secret(arg) && text.contains(&arg.to_string());
        let missing = command.get_arguments().find(is_missing).and_then(Arg::get_long);
        let remedy = missing.map(|name| format!("; a unit sets it with LoadCredential={name}:FILE"));
        return anyhow!("{text}{}", remedy.unwrap_or_default());
    }
    let Some(ContextValue::String(invalid)) = error.get(ContextKind::InvalidArg) else {
        return anyhow!(text);
    };
    let arg = command.get_arguments().find(|arg| arg.to_string() == *invalid);
    let origin = arg.and_then(|arg| given.iter().find(|given| given.id == *arg.get_id()));
    if let Some(Given { origin: Origin::File(path, number), .. }) = origin {
        return anyhow!("{}:{number}: {text}", path.display());
    }
    let variable = arg.and_then(Arg::get_env).filter(|variable| is_set(variable));
    let flag = arg.and_then(Arg::get_long).map(|flag| format!("--{flag}")).unwrap_or_default();
    match variable {
        Some(variable) if !line.any(|word| word.to_string_lossy().starts_with(&flag)) => {
            anyhow!("{}: {text}", variable.display())
        }
        _ => anyhow!(text),
    }
}

/// clap's message in one line.
pub fn text(error: &clap::Error) -> String {
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

    use super::super::syntax::command;
    use super::*;
    use crate::app::secret::Secret;

    #[derive(Debug, Parser)]
    #[command(name = "shop-front", version)]
    struct Own {
        #[arg(long)]
        database: String,
        #[arg(long)]
        password: Secret,
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
    fn value_of_a_misspelled_secret_is_not_in_the_error() {
        let line = ["shop-front", "--passwrod=hunter2"];
        let error = command::<Own>().try_get_matches_from(line).expect_err("it is unknown");
        assert!(!text(&error).contains("hunter2"), "{}", text(&error));
    }

    #[test]
    fn missing_secret_is_reported_with_its_credential() {
        let line = ["shop-front", "--database", "d"];
        let error = command::<Own>().try_get_matches_from(line).expect_err("the password is missing");
        let message = one_line(&error, command::<Own>(), std::iter::empty(), |_| false, &[]).to_string();
        let expected = "the following required arguments were not provided: --password <PASSWORD>; see --help; a unit \
                        sets it with LoadCredential=password:FILE";
        assert_eq!(message, expected);
    }

    #[test]
    fn invalid_value_is_reported_in_one_line_with_its_option_or_variable() {
        let line = ["x", "--database", "d", "--password", "p", "--idle-timeout", "0s"];
        let command = command::<Own>();
        let error = command.clone().try_get_matches_from(line).expect_err("zero is refused");
        let message_for = |words: &[&str], is_set: bool| {
            one_line(&error, command.clone(), words.iter().map(OsString::from), |_| is_set, &[]).to_string()
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
}
