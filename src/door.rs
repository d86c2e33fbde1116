//! What is spoken on a listener: its name decides.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// What a connection is served with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
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
    door: Door,
}

impl Name {
    pub fn door(&self) -> Door {
        self.door
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Of a listener that nobody named.
impl Default for Name {
    fn default() -> Self {
        Self { text: Arc::from("http"), door: Door::Http }
    }
}

impl FromStr for Name {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let door = match text {
            "admin" => Door::Admin,
            _ if text.starts_with("https") => Door::Https,
            _ if text.starts_with("http") => Door::Http,
            _ => anyhow::bail!("a listener's name decides what is spoken there: http…, https… or admin"),
        };
        Ok(Self { text: Arc::from(text), door })
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
        let door = |text: &str| text.parse::<Name>().map(|name| name.door()).ok();
        assert_eq!(door("http"), Some(Door::Http));
        assert_eq!(door("http-internal"), Some(Door::Http));
        assert_eq!(door("https"), Some(Door::Https));
        assert_eq!(door("https-8443"), Some(Door::Https));
        assert_eq!(door("admin"), Some(Door::Admin));
        for text in ["", "HTTP", "web", "administration"] {
            assert_eq!(door(text), None, "{text}");
        }
    }
}
