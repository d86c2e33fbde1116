//! The errors of clap in one line: clap formats them for a terminal, but each line would be an entry of its own in the
//! journal.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use anyhow::anyhow;
use clap::Arg;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::given::Given;
use super::origin::Origin;
use super::syntax::is_option;
use crate::app::secret;

/// clap's message, which names the option. If the invalid value comes from an environment variable or a file, the message
/// also names that, because a reader of the journal would look for the option on the command line in vain.
pub fn one_line(
    error: &clap::Error,
    mut command: clap::Command,
    line: &[OsString],
    value_of: impl Fn(&OsStr) -> Option<OsString>,
    given: &[Given],
) -> anyhow::Error {
    let text = text(error);
    command.build();
    if error.kind() == ErrorKind::InvalidUtf8 {
        return anyhow!(not_utf8(&command, line, value_of).unwrap_or(text));
    }
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
    let variable = arg.and_then(Arg::get_env).filter(|variable| value_of(variable).is_some());
    match variable {
        Some(variable) if !arg.is_some_and(|arg| is_on_line(arg, line)) => {
            anyhow!("{}: {text}", variable.display())
        }
        _ => anyhow!(text),
    }
}

fn is_on_line(arg: &Arg, line: &[OsString]) -> bool {
    let Some(flag) = arg.get_long().map(|flag| format!("--{flag}")) else { return !line.is_empty() };
    line.iter().any(|word| {
        let word = word.to_string_lossy();
        word.strip_prefix(&flag).is_some_and(|value| value.is_empty() || value.starts_with('='))
    })
}

/// The message for a value that is not UTF-8. clap's message names neither an option nor a variable. The message does not
/// contain the value, which may be a secret.
fn not_utf8(
    command: &clap::Command,
    line: &[OsString],
    value_of: impl Fn(&OsStr) -> Option<OsString>,
) -> Option<String> {
    let expects_text = |arg: &&Arg| {
        let kind = arg.get_value_parser().type_id();
        is_option(arg) && kind != TypeId::of::<PathBuf>() && kind != TypeId::of::<OsString>()
    };
    let options: Vec<&Arg> = command.get_arguments().filter(expects_text).collect();
    let reason = |arg: &Arg| format!("invalid value for '{arg}': expected UTF-8; see --help");
    let words: Vec<usize> = (1..line.len()).filter(|number| line[*number].to_str().is_none()).collect();
    let is_value_of = |arg: &Arg, number: usize| {
        let flag = format!("--{}", arg.get_long().unwrap_or_default());
        let word = line[number].to_string_lossy();
        word.strip_prefix(&flag).is_some_and(|rest| rest.starts_with('='))
            || arg.get_action().takes_values() && line[number - 1] == *flag
    };
    if let Some(arg) = options.iter().find(|arg| words.iter().any(|number| is_value_of(arg, *number))) {
        return Some(reason(arg));
    }
    let is_invalid = |variable: &OsStr| value_of(variable).is_some_and(|value| value.to_str().is_none());
    let mut variables = options.iter().filter_map(|arg| Some((arg, arg.get_env()?)));
    if let Some((arg, variable)) =
        variables.find(|(arg, variable)| is_invalid(variable) && !is_on_line(arg, line))
    {
        return Some(format!("{}: {}", variable.display(), reason(arg)));
    }
    // The word belongs to no long option: for example, it is the value of a short option, or of an option of a command.
    words.first().map(|number| format!("invalid argument {number}: expected UTF-8; see --help"))
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
    use std::os::unix::ffi::OsStringExt;

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
        let message = one_line(&error, command::<Own>(), &[], |_| None, &[]).to_string();
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
            let words: Vec<_> = words.iter().map(OsString::from).collect();
            let value_of = |_: &OsStr| is_set.then(|| "0s".into());
            one_line(&error, command.clone(), &words, value_of, &[]).to_string()
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
    fn error_for_a_value_that_is_not_utf8_names_its_option_variable_or_position_without_the_value() {
        let not_text = |text: &[u8]| OsString::from_vec([text, b"hunter\xff"].concat());
        let command = command::<Own>();
        let invalid = ["x".into(), "--database=d".into(), not_text(b"--password=")];
        let error = command.clone().try_get_matches_from(&invalid).expect_err("it is not UTF-8");
        let message_for = |line: &[OsString], variable: &str| {
            let value_of = |name: &OsStr| (name == variable).then(|| not_text(b""));
            one_line(&error, command.clone(), line, value_of, &[]).to_string()
        };
        let password = "invalid value for '--password <PASSWORD>': expected UTF-8; see --help";
        assert_eq!(message_for(&invalid, ""), password);
        // The path of a file may have any bytes.
        let file = not_text(b"--tls-cert=");
        let line = ["x".into(), file.clone(), "--password".into(), not_text(b"")];
        assert_eq!(message_for(&line, "SHOP_FRONT_DATABASE"), password);
        let database =
            "SHOP_FRONT_DATABASE: invalid value for '--database <DATABASE>': expected UTF-8; see --help";
        assert_eq!(message_for(&["x".into(), file], "SHOP_FRONT_DATABASE"), database);
        let line = ["x".into(), "--database=d".into(), not_text(b"")];
        assert_eq!(
            message_for(&line, "SHOP_FRONT_DATABASE"),
            "invalid argument 2: expected UTF-8; see --help"
        );
    }
}
