//! What is spoken on a listener: its name decides.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// What a connection is served with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// The application.
    Http,
    /// The application, behind TLS.
    Https,
    /// Health, readiness, metrics.
    Admin,
}

/// The name of a listener: `FileDescriptorName=` of a socket unit, the first half of `--listen NAME=ADDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    text: Arc<str>,
    kind: ListenerKind,
}

impl Name {
    pub fn kind(&self) -> ListenerKind {
        self.kind
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Of a listener that nobody named.
impl Default for Name {
    fn default() -> Self {
        Self { text: Arc::from("http"), kind: ListenerKind::Http }
    }
}

impl FromStr for Name {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let kind = match text {
            "admin" => ListenerKind::Admin,
            _ if text.starts_with("https") => ListenerKind::Https,
            _ if text.starts_with("http") => ListenerKind::Http,
            _ => anyhow::bail!(
                "invalid listener name {text:?}: expected admin or a name that starts with http or https"
            ),
        };
        Ok(Self { text: Arc::from(text), kind })
    }
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
    fn the_name_decides() {
        let kind = |text: &str| text.parse::<Name>().map(|name| name.kind()).ok();
        assert_eq!(kind("http"), Some(ListenerKind::Http));
        assert_eq!(kind("http-internal"), Some(ListenerKind::Http));
        assert_eq!(kind("https"), Some(ListenerKind::Https));
        assert_eq!(kind("https-8443"), Some(ListenerKind::Https));
        assert_eq!(kind("admin"), Some(ListenerKind::Admin));
        for text in ["", "HTTP", "web", "administration"] {
            assert_eq!(kind(text), None, "{text}");
        }
    }
}
