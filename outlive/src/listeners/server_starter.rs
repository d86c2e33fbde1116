//! Sockets that Server::Starter's `start_server` passes with `SERVER_STARTER_PORT`.

use std::collections::HashSet;
use std::os::fd::RawFd;

use anyhow::{Context, bail};

use super::{Listener, ListeningSocket, listening, variable};
use crate::os::sys;
use crate::transport::listener_name::Name;

/// Takes the sockets of `SERVER_STARTER_PORT`, whose format is `host:port=fd;port=fd;/path.sock=fd`.
pub fn inherit() -> anyhow::Result<Vec<Listener>> {
    let Some(text) = variable("SERVER_STARTER_PORT")? else { return Ok(Vec::new()) };
    let mut seen = HashSet::new();
    text.split(';')
        .map(|pair| {
            let (place, fd) = server_starter_pair(pair).with_context(|| {
                format!("invalid SERVER_STARTER_PORT {text:?}: expected host:port=fd, got {pair:?}")
            })?;
            if !seen.insert(fd) {
                bail!("invalid SERVER_STARTER_PORT {text:?}: fd {fd} is listed twice");
            }
            adopt(fd)
                .and_then(|socket| Listener::inherited(Name::default(), socket))
                .with_context(|| format!("SERVER_STARTER_PORT: fd {fd} ({place})"))
        })
        .collect()
}

pub(super) fn server_starter_pair(pair: &str) -> Option<(&str, RawFd)> {
    let (place, fd) = pair.rsplit_once('=')?;
    let fd = fd.parse().ok().filter(|fd| *fd > 2)?;
    (!place.is_empty()).then_some((place, fd))
}

fn adopt(fd: RawFd) -> anyhow::Result<ListeningSocket> {
    let socket = sys::own(fd)?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    listening(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_split_at_the_last_equals_sign() {
        assert_eq!(server_starter_pair("127.0.0.1:80=4"), Some(("127.0.0.1:80", 4)));
        assert_eq!(server_starter_pair("/run/a=b.sock=5"), Some(("/run/a=b.sock", 5)));
        for pair in ["", "80", "80=", "=4", "80=x", "80=-1", "80=2", "80=99999999999"] {
            assert_eq!(server_starter_pair(pair), None, "{pair}");
        }
    }
}
