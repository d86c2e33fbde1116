//! [`TlsFiles`], the files with the certificates of https listeners, and [`TlsTexts`], what they contained when they were
//! read. A file that no option names is a credential of the unit.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use ring::digest::{Context as Digest, SHA256, SHA256_OUTPUT_LEN};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use zeroize::Zeroizing;

use crate::os::credentials::Credentials;

/// The names of the files as credentials of the unit (`LoadCredential=`).
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const CLIENT_AUTHORITY: &str = "tls-client-ca.crt";
/// How many certificates are loaded from credentials at most. systemd limits all credentials together to 1 MiB.
const CREDENTIALS_LIMIT: usize = 100;
/// The maximum size of a file in bytes. It prevents reading a wrong, endless file such as a device.
const FILE_LIMIT: u64 = 1024 * 1024;

/// Where the certificates are.
#[derive(Clone, Default)]
pub struct TlsFiles {
    /// A certificate chain and its key each, the default first. If there are none, they are credentials: `tls.crt` and
    /// `tls.key`, then `tls-2.crt` and `tls-2.key`, and so on.
    pub certificates: Vec<(PathBuf, PathBuf)>,
    pub client_authority: Option<PathBuf>,
    /// Whether a listener asks its clients for certificates, so that their authorities are needed.
    pub asks_clients: bool,
    pub credentials: Credentials,
}

/// The name of a file or credential, for errors, and its content.
pub struct NamedText {
    pub name: String,
    pub text: Zeroizing<Vec<u8>>,
}

/// What the files contain.
pub struct TlsTexts {
    /// Certificate chains with their keys.
    pub certificates: Vec<(NamedText, NamedText)>,
    pub client_authority: Option<NamedText>,
}

impl TlsFiles {
    /// Reads all files. Fails if one of them is missing or too large.
    pub fn read(&self) -> anyhow::Result<TlsTexts> {
        let certificates = if self.certificates.is_empty() {
            self.certificates_in_credentials()?
        } else {
            let pair = |(certificate, key): &(PathBuf, PathBuf)| Ok((read(certificate)?, read(key)?));
            self.certificates.iter().map(pair).collect::<anyhow::Result<_>>()?
        };
        let client_authority = match &self.client_authority {
            _ if !self.asks_clients => None,
            Some(path) => Some(read(path)?),
            None => Some(self.credential(CLIENT_AUTHORITY, "--tls-client-auth needs", "--tls-client-ca")?),
        };
        Ok(TlsTexts { certificates, client_authority })
    }

    fn certificates_in_credentials(&self) -> anyhow::Result<Vec<(NamedText, NamedText)>> {
        let open = |name: &str| self.credential(name, "an https listener needs", "--tls-cert and --tls-key");
        let mut certificates = vec![(open(CERTIFICATE)?, open(KEY)?)];
        for number in 2..=CREDENTIALS_LIMIT {
            match open(&format!("tls-{number}.crt")) {
                Ok(certificate) => certificates.push((certificate, open(&format!("tls-{number}.key"))?)),
                Err(error) if error.downcast_ref() == Some(&Errno::NOENT) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(certificates)
    }

    /// `what` needs the credential, or else `options`.
    fn credential(&self, name: &str, what: &str, options: &str) -> anyhow::Result<NamedText> {
        let file = self.credentials.open(name).with_context(|| {
            format!("{what} {name}: add LoadCredential={name}:/path/to/{name} to the unit, or set {options}")
        })??;
        read_file(name.to_owned(), file)
    }
}

fn read(path: &Path) -> anyhow::Result<NamedText> {
    let name = path.display().to_string();
    // Without NONBLOCK, opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).with_context(|| format!("could not read {name}"))?;
    read_file(name, file.into())
}

fn read_file(name: String, file: File) -> anyhow::Result<NamedText> {
    let mut text = Zeroizing::new(Vec::new());
    file.take(FILE_LIMIT + 1).read_to_end(&mut text).with_context(|| format!("could not read {name}"))?;
    ensure!(
        text.len() as u64 <= FILE_LIMIT,
        "{name}: larger than {FILE_LIMIT} bytes, so not a certificate or a key"
    );
    Ok(NamedText { name, text })
}

impl TlsTexts {
    /// Differs if any of the contents does.
    pub fn digest(&self) -> [u8; SHA256_OUTPUT_LEN] {
        let mut digest = Digest::new(&SHA256);
        let pairs = self.certificates.iter().flat_map(|(certificate, key)| [certificate, key]);
        for NamedText { name, text } in pairs.chain(&self.client_authority) {
            for part in [name.as_bytes(), text] {
                digest.update(&(part.len() as u64).to_le_bytes());
                digest.update(part);
            }
        }
        digest.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}
