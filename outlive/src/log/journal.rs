//! Entries for the journal, in its native protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
//!
//! The names of the fields and their values are those of the crate tracing-journald. That one cannot be used here: it
//! writes an entry where the event happens, and an entry waits for as long as journald does not read.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, sendmsg_addr};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Where journald reads.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// journald notes when it gets an entry. One that has waited for longer says when it was logged.
const DELAY: Duration = Duration::from_secs(1);

/// Makes entries of events, each of which goes to `send` with its level.
pub struct Entries<F> {
    /// The fields that all entries have.
    common: Vec<u8>,
    send: F,
}

impl<F> Entries<F> {
    /// Entries of a program called `identifier`.
    pub fn new(identifier: &str, generation: u64, send: F) -> Self {
        let mut common = Vec::new();
        put(&mut common, "SYSLOG_IDENTIFIER", identifier);
        put(&mut common, "GENERATION", &generation.to_string());
        Self { common, send }
    }
}

/// The fields of a span, as they stand in the entries of its events.
struct SpanFields(Vec<u8>);

impl<S, F> Layer<S> for Entries<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: Fn(Vec<u8>, Level) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Vec::with_capacity(256);
        put(&mut fields, "SPAN_NAME", span.name());
        put_place(&mut fields, span.metadata(), ["SPAN_TARGET", "SPAN_CODE_FILE", "SPAN_CODE_LINE"]);
        attributes.record(&mut Fields(&mut fields));
        span.extensions_mut().insert(SpanFields(fields));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(SpanFields(fields)) = span.extensions_mut().get_mut() {
            values.record(&mut Fields(fields));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut entry = Vec::with_capacity(512);
        for span in context.lookup_current().into_iter().flat_map(|span| span.scope().from_root()) {
            if let Some(SpanFields(fields)) = span.extensions().get() {
                entry.extend_from_slice(fields);
            }
        }
        put(&mut entry, "PRIORITY", priority(*event.metadata().level()));
        put_place(&mut entry, event.metadata(), ["TARGET", "CODE_FILE", "CODE_LINE"]);
        entry.extend_from_slice(&self.common);
        event.record(&mut Fields(&mut entry));
        (self.send)(entry, *event.metadata().level());
    }
}

/// The level of `syslog(3)`.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// Where in the sources it happened.
fn put_place(fields: &mut Vec<u8>, metadata: &Metadata<'_>, [target, file, line]: [&str; 3]) {
    put(fields, target, metadata.target());
    if let Some(name) = metadata.file() {
        put(fields, file, name);
    }
    if let Some(number) = metadata.line() {
        put(fields, line, &number.to_string());
    }
}

/// Adds the fields of an event or a span.
struct Fields<'a>(&'a mut Vec<u8>);

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        put(self.0, field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing into a vector does not fail.
        put_with(self.0, field.name(), |fields| drop(write!(fields, "{value:?}")));
    }
}

fn put(fields: &mut Vec<u8>, name: &str, value: &str) {
    put_with(fields, name, |fields| fields.extend_from_slice(value.as_bytes()));
}

/// Adds a field with the length of its value, which may then have any bytes, line ends too.
fn put_with(fields: &mut Vec<u8>, name: &str, put_value: impl FnOnce(&mut Vec<u8>)) {
    put_name(fields, name);
    fields.push(b'\n');
    let length_at = fields.len();
    fields.extend_from_slice(&[0; 8]);
    let start = fields.len();
    put_value(fields);
    let length = (fields.len() - start) as u64;
    fields[length_at..start].copy_from_slice(&length.to_le_bytes());
    fields.push(b'\n');
}

/// Upper case letters, digits and underscores, with no underscore at the beginning, because journald drops such a field.
fn put_name(fields: &mut Vec<u8>, name: &str) {
    let bytes = name.bytes().map(|byte| if byte == b'.' { b'_' } else { byte.to_ascii_uppercase() });
    let bytes = bytes.filter(|byte| *byte == b'_' || byte.is_ascii_alphanumeric());
    fields.extend(bytes.skip_while(|byte| *byte == b'_'));
}

/// Writes entries to journald.
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Journal {
    /// An error where nothing reads at `path`. Never waits.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Not the socket that is kept: a connected one would not find a socket that was bound anew.
        UnixDatagram::unbound()?.connect(path)?;
        Ok(Self { socket: UnixDatagram::unbound()?, path: path.to_owned() })
    }

    /// Writes an entry that was logged at `at`. Waits for as long as journald does not read.
    pub fn write(&self, mut entry: Vec<u8>, at: Instant) -> io::Result<()> {
        let delay = at.elapsed();
        if delay >= DELAY {
            // A clock that begins in 1970 at each boot may not be that far yet.
            let logged_at = SystemTime::now().checked_sub(delay).unwrap_or(UNIX_EPOCH).max(UNIX_EPOCH);
            let logged_at = humantime::format_rfc3339_micros(logged_at);
            put(&mut entry, "LOGGED_AT", &logged_at.to_string());
        }
        loop {
            match self.socket.send_to(&entry, &self.path) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) => {
                    return self.write_large(&entry);
                }
                sent => return sent.map(drop),
            }
        }
    }

    /// What is too large for a datagram goes in a file in memory, sealed so that journald reads it.
    fn write_large(&self, entry: &[u8]) -> io::Result<()> {
        let mut file =
            File::from(memfd_create("journal-entry", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.write_all(entry)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let address = SocketAddrUnix::new(&self.path)?;
        loop {
            let nothing: &[IoSlice<'_>] = &[];
            match sendmsg_addr(&self.socket, &address, nothing, &mut ancillary, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                sent => return Ok(sent.map(drop)?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::IoSliceMut;
    use std::os::unix::fs::FileExt;
    use std::sync::mpsc::{Sender, channel};

    use proptest::prelude::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use tempfile::TempDir;
    use tracing::{info, info_span, trace, warn};
    use tracing_subscriber::prelude::*;

    use super::*;

    /// As journald reads an entry; a field may come more than once.
    fn decode(mut entry: &[u8]) -> BTreeMap<String, Vec<String>> {
        let mut fields = BTreeMap::<String, Vec<String>>::new();
        while !entry.is_empty() {
            let end = entry.iter().position(|byte| *byte == b'\n').expect("a name ends");
            let name = String::from_utf8(entry[..end].to_vec()).expect("a name is text");
            let (length, rest) = entry[end + 1..].split_first_chunk().expect("a length");
            let length = usize::try_from(u64::from_le_bytes(*length)).expect("small");
            fields.entry(name).or_default().push(String::from_utf8_lossy(&rest[..length]).into_owned());
            assert_eq!(rest[length], b'\n');
            entry = &rest[length + 1..];
        }
        fields
    }

    fn entry_of(log: impl FnOnce()) -> BTreeMap<String, Vec<String>> {
        let (to_test, received): (Sender<Vec<u8>>, _) = channel();
        let entries = Entries::new("shop", 7, move |entry, _| to_test.send(entry).expect("a channel"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(entries), log);
        let entries: Vec<_> = received.try_iter().collect();
        assert_eq!(entries.len(), 1);
        decode(&entries[0])
    }

    #[test]
    fn an_event_has_its_fields_its_place_and_those_of_its_spans() {
        let fields = entry_of(|| {
            let outer = info_span!("request", id = 5, late = tracing::field::Empty);
            let _outer = outer.enter();
            outer.record("late", "yes");
            let _inner = info_span!("step", _private.name = "x").entered();
            warn!(message_id = "abc", number = -3, text = ?"a\nb", "two\nlines {}", 1);
        });
        let all = |name: &str| fields.get(name).map(|values| values.join(" ")).unwrap_or_default();
        assert_eq!(all("MESSAGE"), "two\nlines 1");
        assert_eq!((all("PRIORITY"), all("GENERATION")), ("4".into(), "7".into()));
        assert_eq!((all("SYSLOG_IDENTIFIER"), all("MESSAGE_ID")), ("shop".into(), "abc".into()));
        assert_eq!((all("NUMBER"), all("TEXT")), ("-3".into(), r#""a\nb""#.into()));
        assert_eq!((all("SPAN_NAME"), all("ID")), ("request step".into(), "5".into()));
        assert_eq!((all("LATE"), all("PRIVATE_NAME")), ("yes".into(), "x".into()));
        assert_eq!(all("TARGET"), module_path!());
        assert_eq!(all("CODE_FILE"), file!());
        assert!(all("CODE_LINE").parse::<u32>().is_ok(), "{fields:?}");
        assert_eq!(all("SPAN_CODE_FILE"), [file!(); 2].join(" "));
    }

    #[test]
    fn levels_are_those_of_syslog() {
        let priority = |log: fn()| entry_of(log)["PRIORITY"].join(" ");
        assert_eq!(priority(|| tracing::error!("x")), "3");
        assert_eq!(priority(|| info!("x")), "6");
        assert_eq!(priority(|| trace!("x")), "7");
    }

    proptest! {
        #[test]
        fn any_value_is_read_back_as_it_was(value in ".*", number in any::<i64>()) {
            let fields = entry_of(|| info!(value, number, "{value}"));
            prop_assert_eq!(&fields["VALUE"], std::slice::from_ref(&value));
            prop_assert_eq!(&fields["MESSAGE"], &[value]);
            prop_assert_eq!(&fields["NUMBER"], &[number.to_string()]);
        }

        #[test]
        fn a_name_is_one_that_journald_takes(name in ".*") {
            let mut fields = Vec::new();
            put_name(&mut fields, &name);
            prop_assert!(!fields.starts_with(b"_"));
            prop_assert!(fields.iter().all(|byte| *byte == b'_' || byte.is_ascii_digit() || byte.is_ascii_uppercase()));
        }
    }

    struct Reader {
        socket: UnixDatagram,
        folder: TempDir,
    }

    impl Reader {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let socket = UnixDatagram::bind(folder.path().join("socket")).expect("a socket");
            Self { socket, folder }
        }

        fn journal(&self) -> Journal {
            Journal::open(&self.folder.path().join("socket")).expect("it is read")
        }

        /// The next datagram, or what is in the file that came instead of one.
        fn read(&self) -> Vec<u8> {
            let mut bytes = vec![0; 1 << 20];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let read = recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            bytes.truncate(read.expect("a message").bytes);
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                    let file = File::from(fds.next().expect("a file"));
                    let length = file.metadata().expect("its length").len();
                    bytes = vec![0; usize::try_from(length).expect("small")];
                    file.read_exact_at(&mut bytes, 0).expect("read");
                    assert!(file.write_at(b"x", 0).is_err(), "sealed");
                }
            }
            bytes
        }
    }

    #[test]
    fn an_entry_is_one_datagram_and_a_large_one_is_a_sealed_file() {
        let reader = Reader::new();
        let journal = reader.journal();
        for length in [1, 100_000, 8 << 20] {
            let mut entry = Vec::new();
            put(&mut entry, "MESSAGE", &"x".repeat(length));
            journal.write(entry.clone(), Instant::now()).expect("written");
            assert!(reader.read() == entry, "{length}");
        }
    }

    #[test]
    fn an_entry_that_has_waited_says_when_it_was_logged() {
        let reader = Reader::new();
        let journal = reader.journal();
        let at = Instant::now().checked_sub(Duration::from_secs(30)).expect("the machine runs for longer");
        journal.write(Vec::new(), at).expect("written");
        let fields = decode(&reader.read());
        let logged_at = humantime::parse_rfc3339(&fields["LOGGED_AT"][0]).expect("a time");
        let ago = SystemTime::now().duration_since(logged_at).expect("in the past");
        assert!(ago >= Duration::from_secs(29) && ago < Duration::from_secs(1000), "{ago:?}");
    }

    #[test]
    fn a_socket_that_is_bound_anew_is_found_again_and_an_absent_one_is_an_error() {
        let Reader { socket, folder } = Reader::new();
        let path = folder.path().join("socket");
        let journal = Journal::open(&path).expect("it is read");
        drop(socket);
        let write = || journal.write(b"A=b\n".to_vec(), Instant::now());
        assert!(write().is_err() && Journal::open(&path).is_err(), "nothing reads there");
        std::fs::remove_file(&path).expect("removed");
        assert!(write().is_err() && Journal::open(&path).is_err(), "nothing is there");
        let reader = Reader { socket: UnixDatagram::bind(&path).expect("a socket"), folder };
        write().expect("written");
        assert_eq!(reader.read(), b"A=b\n");
    }
}
