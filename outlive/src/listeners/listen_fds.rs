//! Sockets that a service manager passes with `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`, as in sd_listen_fds(3).

use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, bail};
use listenfd::ListenFd;
use rustix::net::{AddressFamily, SocketType};

use super::{
    Listen, Listener, ListeningSocket, NOT_LISTENING, NamedSocket, Ownership, number, require_listening,
    variable,
};
use crate::handover;
use crate::os::sys;
use crate::transport::listener_name::{ListenerRole, Name};

/// The sockets that the service manager has passed.
#[derive(Default)]
pub struct Passed {
    pub listeners: Vec<Listener>,
    /// The sockets that the application can claim.
    pub named: Vec<NamedSocket>,
    /// The handover channels from systemd's store.
    pub channels: Vec<anyhow::Result<OwnedFd>>,
}

/// Takes the sockets that the environment names. `addresses` are those of `--listen`.
pub fn inherit(addresses: &[Listen]) -> anyhow::Result<Passed> {
    let mut found = Passed::default();
    let Some(count) = number::<usize>("LISTEN_FDS")? else { return Ok(found) };
    let pid = number::<u32>("LISTEN_PID")?;
    if let Some(pid) = pid
        && pid != std::process::id()
    {
        // The sockets are for another process, as in sd_listen_fds(3). A process with `--listen` does not need them,
        // for example one that a socket-activated service starts.
        if !addresses.is_empty() {
            return Ok(found);
        }
        let advice = if std::process::id() == 1 {
            "systemd 257 passes such a number to a unit with PrivatePIDs=yes; remove that setting, or set --listen"
        } else {
            "if a wrapper script starts this program, start it with `exec`; else set --listen"
        };
        bail!(
            "LISTEN_PID={pid} is not the pid of this process ({}), so LISTEN_FDS={count} is not for it: {advice}",
            std::process::id()
        );
    }
    let first = number::<RawFd>("LISTEN_FDS_FIRST_FD")?.unwrap_or(3);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if limit.is_some_and(|limit| count as u64 > limit) {
        bail!(
            "invalid LISTEN_FDS {count}: this process may have only {} open files (LimitNOFILE=)",
            limit.unwrap_or(0)
        );
    }
    // listenfd adds both numbers. In a build with overflow checks it panics if the sum is out of range.
    let end = RawFd::try_from(count).ok().and_then(|count| first.checked_add(count));
    if first < 0 || end.is_none() {
        bail!(
            "invalid LISTEN_FDS_FIRST_FD {first} with LISTEN_FDS {count}: expected descriptors from 0 to {}",
            RawFd::MAX - 1
        );
    }
    let names = variable("LISTEN_FDNAMES")?;
    let mut passed = ListenFd::from_env();
    if passed.len() == 0 {
        return Ok(found);
    }
    let names: Vec<&str> = match &names {
        Some(names) => names.split(':').collect(),
        None => vec!["unknown"; count],
    };
    if names.len() != count {
        bail!(
            "LISTEN_FDNAMES has {} names, but LISTEN_FDS={count}: expected a name for each socket",
            names.len()
        );
    }
    for (index, name) in names.into_iter().enumerate() {
        let fd = first.saturating_add(RawFd::try_from(index)?);
        let place = || format!("LISTEN_FDS: fd {fd} ({name})");
        if name == handover::STORE_NAME {
            found.channels.push(take_channel(&mut passed, index).with_context(place));
        } else {
            if !is_open(fd) {
                let pid = if pid.is_some() { "names this process" } else { "is not set" };
                bail!("{}: this descriptor is not open (LISTEN_FDS={count}; LISTEN_PID {pid})", place());
            }
            let name = listener_name(name).with_context(place)?;
            if name.role() == ListenerRole::Application {
                let fd = take_any(&mut passed, index).with_context(place)?;
                found.named.push(NamedSocket { name, fd, ownership: Ownership::Inherited });
            } else {
                let socket = take_listener(&mut passed, index).with_context(place)?;
                found.listeners.push(Listener::inherited(name, socket).with_context(place)?);
            }
        }
    }
    Ok(found)
}

/// Whether this process has the descriptor. Without `/proc` that is not known, and true.
fn is_open(fd: RawFd) -> bool {
    let folder = Path::new("/proc/self/fd");
    !folder.exists() || folder.join(fd.to_string()).symlink_metadata().is_ok()
}

fn take_channel(passed: &mut ListenFd, index: usize) -> anyhow::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX.as_raw().into(), SocketType::SEQPACKET.as_raw().try_into()?);
    let channel = passed.take_custom(index, family, kind, "handover channel (a SOCK_SEQPACKET socket)")?;
    channel.context("the socket was already taken")
}

fn take_listener(passed: &mut ListenFd, index: usize) -> anyhow::Result<ListeningSocket> {
    let socket = if let Ok(Some(socket)) = passed.take_tcp_listener(index) {
        require_listening(&socket)?;
        ListeningSocket::Tcp(socket)
    } else if let Ok(Some(socket)) = passed.take_unix_listener(index) {
        require_listening(&socket)?;
        ListeningSocket::Unix(socket)
    } else {
        bail!("{NOT_LISTENING}");
    };
    Ok(socket)
}

fn take_any(passed: &mut ListenFd, index: usize) -> anyhow::Result<OwnedFd> {
    let fd = passed.take_raw_fd(index)?.context("the socket was already taken")?;
    let fd = sys::own(fd)?;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// The listener name for a name in `LISTEN_FDNAMES`. Without `FileDescriptorName=` systemd passes the name of the
/// socket unit, and other service managers pass `unknown` or nothing.
pub(super) fn listener_name(name: &str) -> anyhow::Result<Name> {
    if name.is_empty() || name == "unknown" || Path::new(name).extension().is_some_and(|end| end == "socket")
    {
        Ok(Name::default())
    } else {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_without_a_configured_name_is_http() {
        for name in ["", "unknown", "shop.socket", "http"] {
            assert_eq!(listener_name(name).expect(name).as_str(), "http");
        }
        assert_eq!(listener_name("admin").expect("the name is valid").as_str(), "admin");
        assert!(listener_name("a:b").is_err());
    }
}
