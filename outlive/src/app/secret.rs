//! [`Secret`], the type of an option whose value must not be shown.

use std::ffi::OsStr;
use std::fmt;

use clap::builder::{TypedValueParser, ValueParser, ValueParserFactory};
use clap::error::ErrorKind;
use clap::{Arg, Command};
use zeroize::Zeroizing;

/// What is shown instead of a secret.
pub const HIDDEN: &str = "[secret]";

/// The value of an option that must not be shown, such as a password.
///
/// If the command line, the environment and the file of `--config` do not set the option, its value is the credential of
/// the unit that has the name of the option (`LoadCredential=`, systemd.exec(5)); one newline at the end is removed. A
/// reload does not change it, because systemd reads credentials only when it starts the unit. `Option<Secret>` is `None` if
/// no source has a value; with `Secret` the process then does not start.
///
/// `{}` and `{:?}` print `[secret]`; `check`, `/config` of the admin listeners, `--help` and errors do not show the value
/// either. The memory is overwritten when the value is dropped. The library cannot overwrite copies of the value in the command line and the environment of
/// the process, which other processes of the same user can read, and copies that the application makes of the result of
/// [`expose`](Self::expose). Therefore prefer a credential to an option or a variable.
///
/// ```
/// /// Sells things.
/// #[derive(clap::Parser)]
/// #[command(name = "shop")]
/// struct Config {
///     /// Password of the database.
///     #[arg(long)]
///     database_password: outlive::Secret,
/// }
///
/// let config = <Config as clap::Parser>::parse_from(["shop", "--database-password=open sesame"]);
/// assert_eq!(config.database_password.expose(), "open sesame");
/// assert_eq!(format!("{:?}", config.database_password), "[secret]");
/// ```
///
/// This line in the service unit makes the content of the file the password:
///
/// ```ini
/// LoadCredential=database-password:/etc/shop/database-password
/// ```
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The value. Do not log it, and do not copy it without need.
    ///
    /// ```
    /// let secret = outlive::Secret::from(String::from("open sesame"));
    /// assert_eq!(secret.expose(), "open sesame");
    /// ```
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl ValueParserFactory for Secret {
    type Parser = ValueParser;

    fn value_parser() -> ValueParser {
        ValueParser::new(SecretParser)
    }
}

/// Takes a value as it is. Its error does not contain the value.
#[derive(Clone)]
struct SecretParser;

impl TypedValueParser for SecretParser {
    type Value = Secret;

    fn parse_ref(&self, command: &Command, _: Option<&Arg>, value: &OsStr) -> Result<Secret, clap::Error> {
        let text =
            value.to_str().ok_or_else(|| clap::Error::new(ErrorKind::InvalidUtf8).with_cmd(command))?;
        Ok(text.to_owned().into())
    }
}

/// Returns the secret that it was made with, and ignores what stands on the command line. In this way a secret from a
/// file or a credential reaches the parser without a copy on the command line, which would not be overwritten.
#[derive(Clone)]
struct Held(Secret);

impl TypedValueParser for Held {
    type Value = Secret;

    fn parse_ref(&self, _: &Command, _: Option<&Arg>, _: &OsStr) -> Result<Secret, clap::Error> {
        Ok(self.0.clone())
    }
}

/// A parser that returns `secret` for each value.
pub fn held(secret: Secret) -> ValueParser {
    ValueParser::new(Held(secret))
}

/// Whether the value of `arg` is a [`Secret`].
pub fn is_secret(arg: &Arg) -> bool {
    arg.get_value_parser().type_id() == std::any::TypeId::of::<Secret>()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Own {
        #[arg(long)]
        password: Secret,
        #[arg(long)]
        token: Option<Secret>,
        #[arg(long)]
        user: Option<String>,
    }

    #[test]
    fn secret_is_shown_in_no_format() {
        let own = Own::parse_from(["x", "--password", "hunter2", "--token=hunter3"]);
        let shown = format!("{own:?} {} {:#?}", own.password, own.token);
        assert!(!shown.contains("hunter"), "{shown}");
        assert_eq!(own.token.expect("it is set").expose(), "hunter3");
        assert!(own.user.is_none());
    }

    #[test]
    fn option_of_the_type_secret_is_recognized_in_an_option_too() {
        let command = <Own as clap::CommandFactory>::command();
        let secrets: Vec<_> = command.get_arguments().filter(|arg| is_secret(arg)).map(Arg::get_id).collect();
        assert_eq!(secrets, ["password", "token"]);
    }

    #[test]
    fn error_for_a_secret_that_is_not_utf8_does_not_show_it() {
        let value = OsString::from_vec(b"--password=hunter\xff".to_vec());
        let error = Own::try_parse_from([OsString::from("x"), value]).expect_err("it is not UTF-8");
        assert!(!format!("{error} {error:?}").contains("hunter"), "{error}");
    }
}
