//! [`ClientAuth`], whether an https listener asks its clients for certificates, and [`ClientAuthRule`], a value of
//! `--tls-client-auth`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail, ensure};

use super::listener_name::{ListenerRole, Name};

/// Which certificates an https listener asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// A client may present one. An invalid one is refused.
    Optional,
    /// A client without one is refused.
    Required,
}

impl FromStr for ClientAuth {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "optional" => Ok(Self::Optional),
            "required" => Ok(Self::Required),
            _ => bail!(
                "expected optional or required, or the name of an https listener before it: https=required"
            ),
        }
    }
}

/// `[NAME=]optional|required`. Without a name it applies to all https listeners that no other value names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientAuthRule {
    listener: Option<Name>,
    auth: ClientAuth,
}

impl FromStr for ClientAuthRule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let Some((name, auth)) = text.rsplit_once('=') else {
            return Ok(Self { listener: None, auth: text.parse()? });
        };
        let listener: Name = name.parse()?;
        ensure!(
            listener.role() == ListenerRole::Https,
            "listener {name} does not use TLS; the names of those that do begin with https"
        );
        Ok(Self { listener: Some(listener), auth: auth.parse()? })
    }
}

impl fmt::Display for ClientAuthRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(listener) = &self.listener {
            write!(f, "{listener}=")?;
        }
        f.write_str(match self.auth {
            ClientAuth::Optional => "optional",
            ClientAuth::Required => "required",
        })
    }
}

/// What `rules` say about the listener `name`. None if it asks for no certificates.
pub fn client_auth_of(name: &Name, rules: &[ClientAuthRule]) -> Option<ClientAuth> {
    let named = rules.iter().find(|rule| rule.listener.as_ref() == Some(name));
    named.or_else(|| rules.iter().find(|rule| rule.listener.is_none())).map(|rule| rule.auth)
}

/// Fails if two of the `rules` are for the same listeners, or if one is for none of the https listeners with these names.
pub fn check_client_auth(rules: &[ClientAuthRule], https: &[&Name]) -> anyhow::Result<()> {
    for (at, rule) in rules.iter().enumerate() {
        let is_same = |other: &&ClientAuthRule| other.listener == rule.listener;
        if let Some(other) = rules[..at].iter().find(is_same) {
            bail!("invalid --tls-client-auth: {other} and {rule} are for the same listeners");
        }
        let mut known: Vec<_> = https.iter().map(|name| name.as_str()).collect();
        known.sort_unstable();
        known.dedup();
        known
            .first()
            .with_context(|| format!("invalid --tls-client-auth {rule}: there is no https listener"))?;
        ensure!(
            rule.listener.as_ref().is_none_or(|listener| https.contains(&listener)),
            "invalid --tls-client-auth {rule}: no https listener has this name; the https listeners are {}",
            known.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<ClientAuthRule> {
        texts.iter().map(|text| text.parse().expect("the value is valid")).collect()
    }

    fn name(text: &str) -> Name {
        text.parse().expect("the name is valid")
    }

    #[test]
    fn named_listener_has_its_own_rule_and_the_others_the_one_without_a_name() {
        let both = rules(&["optional", "https-partners=required"]);
        assert_eq!(client_auth_of(&name("https"), &both), Some(ClientAuth::Optional));
        assert_eq!(client_auth_of(&name("https-partners"), &both), Some(ClientAuth::Required));
        assert_eq!(client_auth_of(&name("https"), &both[1..]), None);
        assert_eq!(client_auth_of(&name("https"), &[]), None);
    }

    #[test]
    fn invalid_values_are_refused_with_what_is_expected() {
        for (text, reason) in [
            ("", "expected optional or required"),
            ("none", "expected optional or required"),
            ("https=", "expected optional or required"),
            ("=required", "invalid socket name"),
            ("http=required", "does not use TLS"),
            ("admin=required", "does not use TLS"),
        ] {
            let error = text.parse::<ClientAuthRule>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }

    #[test]
    fn rules_for_no_listener_or_for_the_same_listeners_are_refused() {
        let (https, partners) = (name("https"), name("https-partners"));
        let all = [&https, &partners, &https];
        let check = |texts: &[&str], all: &[&Name]| match check_client_auth(&rules(texts), all) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(check(&["optional", "https-partners=required"], &all), "");
        assert_eq!(check(&[], &[]), "");
        assert_eq!(
            check(&["https-partner=required"], &all),
            "invalid --tls-client-auth https-partner=required: no https listener has this name; the https listeners are \
             https, https-partners"
        );
        assert_eq!(
            check(&["required"], &[]),
            "invalid --tls-client-auth required: there is no https listener"
        );
        assert_eq!(
            check(&["https=optional", "https=required"], &all),
            "invalid --tls-client-auth: https=optional and https=required are for the same listeners"
        );
        assert!(check(&["optional", "optional"], &all).contains("same listeners"));
    }
}
