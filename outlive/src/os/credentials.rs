//! The credentials of the unit (`LoadCredential=`, systemd.exec(5)).
//!
//! systemd mounts them for the process of `ExecStart=`, but not for that of `ExecReload=`. A successor therefore
//! receives their directory from its predecessor, as an open file descriptor.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use zeroize::Zeroizing;

/// The maximum size of a credential in bytes. It is systemd's limit for all credentials of a unit together
/// (systemd.exec(5)).
const LIMIT: u64 = 1024 * 1024;

/// The directory of the credentials, if the unit has any.
#[derive(Clone, Default)]
pub struct Credentials(Folder);

#[derive(Clone, Default)]
enum Folder {
    #[default]
    None,
    Open(Arc<OwnedFd>),
    /// The unit has credentials, but this process may not read them.
    Denied(Arc<str>),
}

impl Credentials {
    /// The credentials in `$CREDENTIALS_DIRECTORY`. An empty variable counts as not set.
    pub fn of_environment() -> anyhow::Result<Self> {
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY").filter(|folder| !folder.is_empty());
        let Some(folder) = folder else { return Ok(Self::default()) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open(Path::new(&folder), flags, Mode::empty())
            .with_context(|| format!("could not open CREDENTIALS_DIRECTORY={}", folder.display()))?;
        Ok(Self(Folder::Open(Arc::new(fd))))
    }

    /// The credentials of a command. It may have been started by `ExecReload=`, for which systemd 252 denies access to the
    /// directory. Then only the use of a credential fails, because most commands need none.
    pub fn of_command() -> anyhow::Result<Self> {
        match Self::of_environment() {
            Err(error) if matches!(error.downcast_ref(), Some(&Errno::ACCESS | &Errno::NOENT)) => {
                Ok(Self(Folder::Denied(format!("{error:#}").into())))
            }
            credentials => credentials,
        }
    }

    /// The credentials in `folder`, which came from the predecessor.
    pub fn of_predecessor(folder: OwnedFd) -> Self {
        Self(Folder::Open(Arc::new(folder)))
    }

    /// The directory, for a successor.
    pub fn folder(&self) -> Option<impl AsFd> {
        match &self.0 {
            Folder::Open(folder) => Some(folder),
            Folder::None | Folder::Denied(_) => None,
        }
    }

    /// Opens the credential `name`. `None` if the unit has no credentials.
    pub fn open(&self, name: &str) -> Option<anyhow::Result<File>> {
        let could_not = || format!("could not read the credential {name:?}");
        match &self.0 {
            Folder::None => None,
            Folder::Open(folder) => {
                // NONBLOCK, because otherwise the open of a FIFO would wait for a writer.
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file =
                    openat(folder, name, flags, Mode::empty()).map(File::from).map_err(anyhow::Error::from);
                let file = file.and_then(|file| {
                    ensure!(file.metadata()?.is_file(), "expected a regular file");
                    Ok(file)
                });
                Some(file.with_context(could_not))
            }
            Folder::Denied(reason) => Some(Err(anyhow!("{reason}")).with_context(could_not)),
        }
    }

    /// The content of the credential `name`. `None` if the unit has no credentials. Fails if it is larger than
    /// [`LIMIT`].
    pub fn read(&self, name: &str) -> Option<anyhow::Result<Zeroizing<Vec<u8>>>> {
        Some(self.open(name)?.and_then(|file| {
            // Enough room for all, because a vector that grows leaves a copy in memory that is not overwritten.
            let length = file.metadata().map_or(0, |metadata| metadata.len().min(LIMIT));
            let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(length)? + 1));
            let could_not = || format!("could not read the credential {name:?}");
            file.take(LIMIT + 1).read_to_end(&mut content).with_context(could_not)?;
            ensure!(content.len() as u64 <= LIMIT, "the credential {name:?} is larger than 1 MiB");
            Ok(content)
        }))
    }

    /// The text of the credential `name`, without one newline at its end. `None` if the unit does not have it. Fails if
    /// it is not valid UTF-8.
    pub fn text(&self, name: &str) -> anyhow::Result<Option<String>> {
        let content = match self.read(name) {
            None => return Ok(None),
            Some(Err(error)) if error.downcast_ref() == Some(&Errno::NOENT) => return Ok(None),
            Some(content) => content?,
        };
        let text = std::str::from_utf8(&content);
        let text = text.with_context(|| format!("invalid credential {name:?}: expected UTF-8"))?;
        Ok(Some(text.strip_suffix('\n').unwrap_or(text).to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    fn credentials(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Credentials) {
        let folder = tempfile::tempdir().expect("a temporary folder is made");
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).expect("the file is written");
        }
        let fd = File::open(folder.path()).expect("the folder opens");
        (folder, Credentials::of_predecessor(fd.into()))
    }

    #[test]
    fn text_of_a_credential_lacks_one_newline_at_its_end() {
        for (content, text) in [("a b\n", "a b"), ("a\n\n", "a\n"), ("a", "a"), ("", ""), ("\n", "")] {
            let (_folder, credentials) = credentials(&[("x", content.as_bytes())]);
            assert_eq!(credentials.text("x").expect("valid UTF-8").as_deref(), Some(text));
        }
    }

    #[test]
    fn credential_that_is_a_fifo_is_refused_without_a_wait_for_a_writer() {
        let folder = tempfile::tempdir().expect("a temporary folder is made");
        let fifo = folder.path().join("x");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("the FIFO is made");
        let fd = File::open(folder.path()).expect("the folder opens");
        let credentials = Credentials::of_predecessor(fd.into());
        let (to_result, result) = mpsc::channel();
        std::thread::spawn(move || {
            to_result.send(credentials.text("x").map_err(|error| format!("{error:#}")))
        });
        let read = result.recv_timeout(Duration::from_secs(60)).expect("the read does not wait for a writer");
        assert_eq!(read, Err("could not read the credential \"x\": expected a regular file".to_owned()));
    }

    #[test]
    fn only_the_use_of_a_credential_fails_if_the_directory_is_denied() {
        let credentials = Credentials(Folder::Denied("permission denied".into()));
        assert!(credentials.folder().is_none());
        let error = format!("{:#}", credentials.text("x").expect_err("it is denied"));
        assert_eq!(error, "could not read the credential \"x\": permission denied");
    }

    #[test]
    fn missing_credential_has_no_text() {
        let (_folder, credentials) = credentials(&[]);
        assert_eq!(credentials.text("x").expect("it is not an error"), None);
        assert_eq!(Credentials::default().text("x").expect("it is not an error"), None);
    }

    #[test]
    fn credential_that_is_not_text_or_too_large_is_refused_without_its_content() {
        let large = vec![b'x'; usize::try_from(LIMIT).expect("a small number") + 1];
        let (_folder, credentials) = credentials(&[("binary", b"hunter\xff"), ("large", &large)]);
        for name in ["binary", "large"] {
            let error = format!("{:#}", credentials.text(name).expect_err("it is refused"));
            assert!(error.contains(&format!("{name:?}")) && !error.contains("hunter"), "{error}");
        }
    }
}
