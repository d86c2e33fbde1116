//! The file of `--config`, in TOML: <https://toml.io/en/v1.1.0>. Its keys are the long names of options.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command, value_parser};
use rustix::fs::{Mode, OFlags, open};
use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use super::given::{Given, Value};
use super::message;
use super::origin::Origin;
use super::syntax::{alone, is_option};
use crate::app::secret::{self, Secret};

/// The maximum size of a file in bytes. It is far above that of every sensible configuration, and keeps a wrong path
/// from filling the memory.
const LIMIT: u64 = 1024 * 1024;

/// The name of the option that names the file.
pub const OPTION: &str = "config";

/// The option that names the file.
pub fn option() -> Arg {
    Arg::new(OPTION).long(OPTION).value_name("FILE").value_parser(value_parser!(PathBuf)).help(
        "File with values of options, in TOML format, such as drain-timeout = \"1min\". The keys are the names of the \
         options, without the dashes. An environment variable or an option of the command line replaces a value of the \
         file. A reload reads the file again",
    )
}

/// Reads the file at `path`. Fails, with one line that names the file, the line and the key, if a value does not fit its
/// option in `command`.
pub fn read(path: &OsStr, command: &Command) -> Result<Vec<Given>> {
    let path = Path::new(path);
    let text = text(path).with_context(|| format!("could not read {} (--config)", path.display()))?;
    parse(path, &text, command)
}

/// The content of the file. Only a regular file is accepted, because a read from a pipe or a device could block the start
/// without a limit.
fn text(path: &Path) -> Result<Zeroizing<String>> {
    // Without NONBLOCK, opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    ensure!(!metadata.is_dir(), "it is a directory, expected a regular file");
    ensure!(metadata.is_file(), "expected a regular file");
    let too_large = "it is larger than 1 MiB";
    ensure!(metadata.len() <= LIMIT, too_large);
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len())? + 1));
    // The file may grow meanwhile.
    file.take(LIMIT + 1).read_to_end(&mut content)?;
    ensure!(content.len() as u64 <= LIMIT, too_large);
    Ok(Zeroizing::new(std::str::from_utf8(&content).context("expected UTF-8")?.to_owned()))
}

/// The values in `text`, in the order of their lines.
fn parse(path: &Path, text: &str, command: &Command) -> Result<Vec<Given>> {
    // How many values an option takes is known only when the command is built.
    let mut built = command.clone();
    built.build();
    let lines = Lines { path, text };
    let table = DeTable::parse(text).map_err(|error| lines.syntax_error(&error))?.into_inner();
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let mut values = Vec::new();
    for (key, value) in entries {
        let name: &str = key.get_ref();
        let error = |reason: &str| lines.error(&key.span(), reason);
        let find = |arg: &&Arg| is_option(arg) && arg.get_long() == Some(name) && name != OPTION;
        let Some(arg) = built.get_arguments().find(find) else {
            return Err(error(&unknown(name, value.get_ref(), command)));
        };
        let value = match value_of(arg, value.get_ref()) {
            Ok(value) => value,
            Err(reason) => return Err(error(&format!("invalid value for {name:?}: {reason}"))),
        };
        let origin = Origin::File(path.to_owned(), lines.number(&key.span()));
        if let Some(value) = value {
            values.push(Given { id: arg.get_id().clone(), value, origin });
        }
    }
    check(&values, command)?;
    Ok(values)
}

/// Why there is no option `name`.
fn unknown(name: &str, value: &DeValue<'_>, command: &Command) -> String {
    if let DeValue::Table(_) = value {
        return format!("unknown table {name:?}: expected all options outside tables");
    }
    // clap knows which option is similar.
    let line = [command.get_name().to_owned(), format!("--{name}")];
    let error = command.clone().try_get_matches_from(line).err();
    match error.as_ref().and_then(|error| error.get(ContextKind::SuggestedArg)) {
        Some(ContextValue::String(similar)) => {
            let similar = similar.trim_start_matches('-');
            format!("unknown key {name:?}: a similar option exists: {similar:?}")
        }
        _ => format!("unknown key {name:?}: no option has this name; see --help"),
    }
}

/// The value for `arg`; `None` if it is the same as no value.
fn value_of(arg: &Arg, value: &DeValue<'_>) -> Result<Option<Value>> {
    if secret::is_secret(arg) {
        let DeValue::String(text) = value else { bail!("expected a string, got {}", kind(value)) };
        return Ok(Some(Value::Secret(Secret::from(text.clone().into_owned()))));
    }
    Ok(match (arg.get_action(), value) {
        (ArgAction::SetTrue | ArgAction::SetFalse, DeValue::Boolean(is_given)) => {
            is_given.then_some(Value::Count(1))
        }
        (ArgAction::SetTrue | ArgAction::SetFalse, other) => {
            bail!("expected true or false, got {}", kind(other))
        }
        (ArgAction::Count, DeValue::Integer(number)) => {
            let number = u8::from_str_radix(number.as_str(), number.radix()).ok();
            Some(Value::Count(number.context("expected a number from 0 to 255")?.into()))
        }
        (ArgAction::Count, other) => bail!("expected a number, got {}", kind(other)),
        (_, value) => texts_of(arg, value)?.map(Value::Texts),
    })
}

/// The values for an option that takes some; `None` for an empty array.
fn texts_of(arg: &Arg, value: &DeValue<'_>) -> Result<Option<Vec<OsString>>> {
    let count = arg.get_num_args().unwrap_or_default();
    let is_repeatable = matches!(arg.get_action(), ArgAction::Append) && count.min_values() <= 1;
    let texts = match value {
        DeValue::Array(items) if is_repeatable || count.max_values() > 1 => {
            items.iter().map(|item| scalar(item.get_ref())).collect::<Result<_>>()?
        }
        DeValue::Array(_) => bail!("expected one value, got an array"),
        value => vec![scalar(value)?],
    };
    if texts.is_empty() {
        return Ok(None);
    }
    let fits = is_repeatable || (count.min_values()..=count.max_values()).contains(&texts.len());
    ensure!(fits, "expected {count} values, got {}", texts.len());
    Ok(Some(texts.into_iter().map(OsString::from).collect()))
}

/// The text that would stand on the command line.
fn scalar(value: &DeValue<'_>) -> Result<String> {
    let text = match value {
        DeValue::String(text) => text.clone().into_owned(),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .context("the number is too large")?
            .to_string(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(_) | DeValue::Table(_) => bail!("expected a string or a number, got {}", kind(value)),
    };
    ensure!(!text.contains('\0'), "it contains a NUL character");
    Ok(text)
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

/// Checks each value with the parser of its option. Values that a variable or a flag replaces are checked too, because
/// they apply as soon as that variable or flag is removed.
fn check(values: &[Given], command: &Command) -> Result<()> {
    let mut line = vec![command.get_name().into()];
    let mut checked = command.clone().mut_args(alone);
    for given in values {
        checked = checked.mut_arg(given.id.clone(), |arg| given.understood_by(arg));
        let arg = command.get_arguments().find(|arg| arg.get_id() == &given.id);
        line.extend(arg.map(|arg| given.words(arg)).unwrap_or_default());
    }
    let Err(error) = checked.try_get_matches_from_mut(line) else { return Ok(()) };
    let is_of_value = matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation);
    let Some(ContextValue::String(name)) = error.get(ContextKind::InvalidArg).filter(|_| is_of_value) else {
        // Another error says nothing about the values: a required argument may be on the command line.
        return Ok(());
    };
    let arg = checked.get_arguments().find(|arg| arg.to_string() == *name);
    let given = arg.and_then(|arg| values.iter().find(|given| given.id == *arg.get_id()));
    let Some((arg, Given { origin: Origin::File(path, line), .. })) = arg.zip(given) else { return Ok(()) };
    let key = format!("{:?}", arg.get_long().unwrap_or_default());
    let text = message::text(&error).replace(&format!("'{name}'"), &key);
    Err(anyhow!("{}:{line}: {}", path.display(), text.trim_end_matches("; see --help")))
}

/// The lines of the file, for errors.
struct Lines<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Lines<'_> {
    /// The number of the line with the beginning of `part`, from 1.
    fn number(&self, part: &Range<usize>) -> usize {
        let before = &self.text.as_bytes()[..part.start.min(self.text.len())];
        before.split(|byte| *byte == b'\n').count()
    }

    fn error(&self, part: &Range<usize>, reason: &str) -> anyhow::Error {
        anyhow!("{}:{}: {reason}", self.path.display(), self.number(part))
    }

    /// The error of the parser without the line itself, which can contain a secret.
    fn syntax_error(&self, error: &toml::de::Error) -> anyhow::Error {
        let part = error.span().unwrap_or_default();
        let reason = error.message();
        match self.text.get(part.clone()) {
            Some(key) if reason == "duplicate key" => self.error(&part, &format!("duplicate key {key:?}")),
            _ => self.error(&part, &format!("invalid TOML: {reason}")),
        }
    }
}
