//! [`Name`], the name of a socket, which selects the protocol that is served on it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// What a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerRole {
    /// The application's routes.
    Http,
    /// The application's routes over TLS.
    Https,
    /// The admin routes: health, readiness, metrics.
    Admin,
    /// What the application does with it, which claims it by its name.
    Application,
}

/// The maximum length of a name in bytes, which is systemd's.
const LENGTH_LIMIT: usize = 255;
/// Names of the library: of the handover channels in systemd's store, and of the credentials in a takeover.
const RESERVED: [&str; 2] = ["connections", "credentials"];

/// The name of a listener: `FileDescriptorName=` of a socket unit, the first half of `--listen NAME=ADDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    text: Arc<str>,
    role: ListenerRole,
}

impl Name {
    pub fn role(&self) -> ListenerRole {
        self.role
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The name of a listener for which none is configured: `http`.
impl Default for Name {
    fn default() -> Self {
        Self { text: Arc::from("http"), role: ListenerRole::Http }
    }
}

impl FromStr for Name {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        // systemd requires the same of FileDescriptorName= (systemd.socket(5)).
        if !(1..=LENGTH_LIMIT).contains(&text.len()) || !text.bytes().all(is_in_names) {
            anyhow::bail!(
                "invalid socket name {text:?}: expected 1 to {LENGTH_LIMIT} visible ASCII characters without a colon"
            );
        }
        let role = match text {
            "admin" => ListenerRole::Admin,
            _ if text.starts_with("https") => ListenerRole::Https,
            _ if text.starts_with("http") => ListenerRole::Http,
            _ if RESERVED.contains(&text) => {
                anyhow::bail!("invalid socket name {text:?}: the library uses this name itself")
            }
            _ => ListenerRole::Application,
        };
        Ok(Self { text: Arc::from(text), role })
    }
}

fn is_in_names(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte) && byte != b':'
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn role_follows_from_the_beginning_of_the_name_and_invalid_names_are_refused() {
        let role = |text: &str| text.parse::<Name>().map(|name| name.role()).ok();
        assert_eq!(role("http"), Some(ListenerRole::Http));
        assert_eq!(role("http-internal"), Some(ListenerRole::Http));
        assert_eq!(role("https"), Some(ListenerRole::Https));
        assert_eq!(role("https-8443"), Some(ListenerRole::Https));
        assert_eq!(role("admin"), Some(ListenerRole::Admin));
        for text in ["HTTP", "web", "administration", "ingest-2", "x.y_z"] {
            assert_eq!(role(text), Some(ListenerRole::Application), "{text}");
        }
        for text in ["", "a:b", "a\n", "\u{e4}", "connections", "credentials", &"x".repeat(256)] {
            assert_eq!(role(text), None, "{text}");
        }
        for text in ["http:x", "https\n", "http\u{e4}", &format!("http{}", "x".repeat(252))] {
            assert_eq!(role(text), None, "{text}");
        }
    }
}
