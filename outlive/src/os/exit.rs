//! [`Failure`], an error that ends the process, and its exit code.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

/// How long a process at its end waits for its log, and for its messages to the service manager, to be written.
/// Connections wait for the next process meanwhile, so it is short. A reader that has not read for as long already is
/// not waited for.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A failure that ends the process, with its exit code.
pub struct Failure {
    exit: Exit,
    error: anyhow::Error,
}

/// The exit codes in use. Those other than 1 are of `sysexits.h`; `systemctl status` shows their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A command of the application failed.
    Command = 1,
    /// A resource is not available, for example an address that is in use, or the application's database.
    Unavailable = 69,
    /// An internal error.
    Software = 70,
    /// An invalid option, environment variable, unit setting or file, which a person has to correct.
    Config = 78,
}

/// The result of each step of a start.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub fn command(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Command, error: error.into() }
    }

    pub fn config(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Config, error: error.into() }
    }

    pub fn software(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Software, error: error.into() }
    }

    pub fn unavailable(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Unavailable, error: error.into() }
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::software(error)
    }
}

/// The error and its causes in one line, separated by colons.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.exit)
    }
}
