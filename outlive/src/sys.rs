//! What no safe crate does: all the unsafe code that there is.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The owner of an fd that is known by its number alone (`SERVER_STARTER_PORT`). To be called before any
/// other code could have come to hold it, and once for each number.
#[expect(unsafe_code, reason = "no safe crate turns a number into an owned fd")]
pub fn own(fd: RawFd) -> anyhow::Result<OwnedFd> {
    anyhow::ensure!(Path::new(&format!("/proc/self/fd/{fd}")).exists(), "not open in this process");
    // SAFETY: the fd is open, and was passed to this process for it to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How many connections wait to be accepted on a listening TCP socket; `tcp_info` of `tcp(7)` has it in
/// `tcpi_unacked`. None for other sockets.
#[expect(unsafe_code, reason = "no safe crate reads TCP_INFO, and a sandbox leaves no other way")]
pub fn accept_queue(socket: impl AsFd) -> Option<u32> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
    // SAFETY: the kernel writes up to `length` bytes, which `info` has; any bytes make a `tcp_info`.
    let info = unsafe {
        let result = libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        );
        if result != 0 {
            return None;
        }
        info.assume_init()
    };
    Some(info.tcpi_unacked)
}

/// Has `MSG_PEEK` begin so many bytes behind the start of what is next to be read (`SO_PEEK_OFF` of `socket(7)`), or
/// with None at its start, as it does by default.
#[expect(unsafe_code, reason = "no safe crate sets SO_PEEK_OFF")]
pub fn set_peek_offset(socket: impl AsFd, offset: Option<usize>) -> io::Result<()> {
    let offset = match offset {
        Some(offset) => libc::c_int::try_from(offset).map_err(io::Error::other)?,
        None => -1,
    };
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes, which `offset` has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// To wait until a listening socket has somebody to accept, without accepting.
#[expect(unsafe_code, reason = "no safe crate waits for a listener but to accept from it")]
pub fn watch(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open fd for as long as it lives, and gives it to nobody.
    let watched = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
    Ok(watched?)
}

/// What jemalloc is told when the process begins (`malloc_conf` of jemalloc(3)): memory that is free goes back to the
/// system after a second.
#[cfg(feature = "jemalloc")]
#[expect(unsafe_code, reason = "it looks for a symbol of this name, a pointer to text that ends with a zero")]
// SAFETY: the name is of jemalloc's own, as tikv-jemallocator builds it, and so is the type.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR: &[u8; 37] = b"dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// Has jemalloc do so in a thread of its own, and not when the thread that freed it has something to do again.
#[cfg(feature = "jemalloc")]
#[expect(unsafe_code, reason = "the safe crate for it rests on one that is no longer kept")]
pub fn give_memory_back() -> io::Result<()> {
    let mut yes = true;
    // SAFETY: the name ends with a zero, its value is a bool, and none is asked for (jemalloc(3)).
    let error = unsafe {
        tikv_jemalloc_sys::mallctl(
            c"background_thread".as_ptr(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            (&raw mut yes).cast(),
            size_of::<bool>(),
        )
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Gives the free pages of the C library's heap back to the system (`malloc_trim(3)`). Other C libraries than glibc
/// cannot.
#[cfg(not(feature = "jemalloc"))]
#[cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "no safe crate trims the heap"))]
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time, by any thread (MT-Safe), and moves no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_accept_queue_is_as_long_as_connections_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        assert_eq!(accept_queue(&listener), Some(0));
        let address = listener.local_addr().expect("an address");
        let waiting = [(); 3].map(|()| TcpStream::connect(address).expect("a connection"));
        assert_eq!(accept_queue(&listener), Some(3));
        drop(listener.accept().expect("one of them"));
        assert_eq!(accept_queue(&listener), Some(2));
        drop(waiting);
    }

    #[test]
    fn a_socket_that_is_not_tcp_has_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("socket")).expect("a listener");
        assert_eq!(accept_queue(&listener), None);
    }
}
