//! Why the process could not start or go on, and the exit code that says so.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

/// For what a process has logged, and for what it has said to the service manager, to be written at its end: a restart
/// may take this much longer, while connections wait for the next process. Where journald has not read for as long
/// already, nothing is waited for.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A failure that ends the process, with its exit code.
pub struct Failure {
    exit: Exit,
    error: anyhow::Error,
}

/// The exit codes in use, as in `sysexits.h`; `systemctl status` shows their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Something that we need is taken or gone: an address in use, a missing directory.
    Unavailable = 69,
    /// A fault of our own.
    Software = 70,
    /// A flag, a variable, a unit line or a file that a person must mend.
    Config = 78,
}

/// The result of each step of a start.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
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

/// One line, the causes behind colons.
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
