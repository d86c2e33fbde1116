//! All `unsafe` code of the library: system calls, settings of jemalloc and a method of tracing for which there is no
//! safe crate.

use std::any::TypeId;
use std::io;
use std::iter::successors;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest as CallsiteInterest;
use tracing::{Event, Metadata};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::Registry;

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
/// system after one second. With the feature `heap-profile` it also records the stack of one allocation in 512 KiB.
#[cfg(feature = "jemalloc")]
#[expect(
    unsafe_code,
    reason = "jemalloc looks up this symbol, a pointer to a text that ends with a zero byte"
)]
// SAFETY: jemalloc, as tikv-jemalloc-sys builds it, declares a symbol of this name and type.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR: &[u8; ALLOCATOR_SETTINGS.len()] = ALLOCATOR_SETTINGS;

#[cfg(all(feature = "jemalloc", not(feature = "heap-profile")))]
const ALLOCATOR_SETTINGS: &[u8; 37] = b"dirty_decay_ms:1000,muzzy_decay_ms:0\0";
#[cfg(feature = "heap-profile")]
const ALLOCATOR_SETTINGS: &[u8; 65] = b"dirty_decay_ms:1000,muzzy_decay_ms:0,prof:true,lg_prof_sample:19\0";

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

/// Sends the signal of the profiler's timer, SIGPROF, to this thread. It is handled before this returns. Without a handler it
/// would end the process.
#[cfg(feature = "cpu-profile")]
#[expect(unsafe_code, reason = "no safe crate sends a signal to a thread")]
pub fn raise_profiling_signal() {
    // SAFETY: it has no preconditions.
    unsafe {
        libc::raise(libc::SIGPROF);
    }
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

/// A list of layers to which layers can be added while their subscriber is in use. Each must have a filter of its own
/// ([`Filtered`](tracing_subscriber::filter::Filtered)), because the list itself disables nothing.
///
/// It is here because `downcast_raw` is unsafe. tracing-opentelemetry needs that method, and the `reload::Layer` of
/// tracing-subscriber, which could also be filled later, does not have it.
pub struct LayerList<L> {
    layers: Rest<L>,
    /// A layer that is never used. When a subscriber is built, it looks for the type of filters in each layer, and treats
    /// this list as one of filters only if it finds it.
    sample: L,
}

struct Rest<L>(OnceLock<Box<(L, Rest<L>)>>);

/// A layer around another one.
pub trait Wrapper {
    /// The layer inside, whose parts a dispatcher can find by their type (`Dispatch::downcast_ref`).
    fn wrapped(&self) -> &(dyn Layer<Registry> + Send + Sync);
}

impl<L> LayerList<L> {
    pub fn new(sample: L) -> Self {
        Self { layers: Rest(OnceLock::new()), sample }
    }

    /// Adds a layer at the end. If two threads add layers at once, both are added.
    pub fn push(&self, layer: L) {
        let mut rest = &self.layers;
        let mut added = Box::new((layer, Rest(OnceLock::new())));
        while let Err(refused) = rest.0.set(added) {
            added = refused;
            rest = &rest.0.get().expect("it refused the layer because it has one").1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &L> {
        successors(self.layers.0.get(), |added| added.1.0.get()).map(|added| &added.0)
    }
}

impl<L: Layer<Registry> + Wrapper> Layer<Registry> for &'static LayerList<L> {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> CallsiteInterest {
        for layer in self.iter() {
            layer.register_callsite(metadata);
        }
        // Each filter has reported its interest to tracing-subscriber; `never` here would disable all other layers.
        CallsiteInterest::always()
    }

    fn enabled(&self, metadata: &Metadata<'_>, context: Context<'_, Registry>) -> bool {
        for layer in self.iter() {
            layer.enabled(metadata, context.clone());
        }
        true
    }

    fn event_enabled(&self, event: &Event<'_>, context: Context<'_, Registry>) -> bool {
        for layer in self.iter() {
            layer.event_enabled(event, context.clone());
        }
        true
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        self.iter().try_fold(LevelFilter::OFF, |most, layer| Some(most.max(layer.max_level_hint()?)))
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_new_span(attributes, id, context.clone()));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_record(id, values, context.clone()));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_follows_from(id, follows, context.clone()));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_event(event, context.clone()));
    }

    fn on_enter(&self, id: &Id, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_enter(id, context.clone()));
    }

    fn on_exit(&self, id: &Id, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_exit(id, context.clone()));
    }

    fn on_close(&self, id: Id, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_close(id.clone(), context.clone()));
    }

    fn on_id_change(&self, old: &Id, new: &Id, context: Context<'_, Registry>) {
        self.iter().for_each(|layer| layer.on_id_change(old, new, context.clone()));
    }

    #[expect(unsafe_code, reason = "the method of the trait is unsafe")]
    unsafe fn downcast_raw(&self, id: TypeId) -> Option<*const ()> {
        // SAFETY: each layer returns a pointer to a value of the type `id`, as its contract demands. The value lives as
        // long as `self`, because the list is static and no layer is ever removed or moved.
        unsafe {
            let find = |layer: &L| layer.wrapped().downcast_raw(id);
            self.iter().find_map(find).or_else(|| self.sample.downcast_raw(id))
        }
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
