//! All `unsafe` code of the library: system calls and settings of jemalloc for which there is no safe crate.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes ownership of a file descriptor of which only the number is known (`SERVER_STARTER_PORT`).
///
/// Must be called once at most for each number, and before other code could open a file with that number. Otherwise two
/// owners would close it.
#[expect(unsafe_code, reason = "no safe crate turns a number into an owned fd")]
pub fn own(fd: RawFd) -> anyhow::Result<OwnedFd> {
    anyhow::ensure!(Path::new(&format!("/proc/self/fd/{fd}")).exists(), "not open in this process");
    // SAFETY: the fd is open, and was passed to this process for it to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of connections that wait to be accepted on a listening TCP socket, which is `tcpi_unacked` of `TCP_INFO`
/// (tcp(7)). `None` for other sockets.
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

/// Sets the offset at which `MSG_PEEK` begins, in bytes of the data that was received and not read (`SO_PEEK_OFF`,
/// socket(7)). `None` restores the default, which is to begin at the first byte.
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

/// Registers a file descriptor with the runtime, for example a listening socket, so that a task can wait for a connection
/// without accepting it.
#[expect(unsafe_code, reason = "no safe crate waits for a connection without accepting it")]
pub fn watch(file: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps the same file descriptor open as long as it lives, and has sole ownership of it.
    let watched = unsafe { AsyncFd::register_with_interest(file, interest) };
    Ok(watched?)
}

/// The settings that jemalloc reads when the process starts (`malloc_conf`, jemalloc(3)): freed memory returns to the
/// system after one second.
#[cfg(feature = "jemalloc")]
#[expect(
    unsafe_code,
    reason = "jemalloc looks up this symbol, a pointer to a text that ends with a zero byte"
)]
// SAFETY: jemalloc, as tikv-jemalloc-sys builds it, declares a symbol of this name and type.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR: &[u8; 37] = b"dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// Lets jemalloc return memory in a background thread. Otherwise a thread returns freed memory only at its next
/// allocations, and an idle service has none.
#[cfg(feature = "jemalloc")]
#[expect(unsafe_code, reason = "the safe crate for it depends on a crate that is no longer maintained")]
pub fn give_memory_back() -> io::Result<()> {
    let mut yes = true;
    // SAFETY: the name ends with a zero byte, its value is a bool, and no old value is requested (jemalloc(3)).
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
    fn accept_queue_is_the_number_of_connections_that_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the listener can be bound");
        assert_eq!(accept_queue(&listener), Some(0));
        let address = listener.local_addr().expect("the listener has an address");
        let waiting = [(); 3].map(|()| TcpStream::connect(address).expect("the connection succeeds"));
        assert_eq!(accept_queue(&listener), Some(3));
        drop(listener.accept().expect("a connection waits"));
        assert_eq!(accept_queue(&listener), Some(2));
        drop(waiting);
    }

    #[test]
    fn accept_queue_of_a_unix_socket_is_none() {
        let folder = tempfile::tempdir().expect("the temporary folder can be created");
        let listener = UnixListener::bind(folder.path().join("socket")).expect("the listener can be bound");
        assert_eq!(accept_queue(&listener), None);
    }
}
