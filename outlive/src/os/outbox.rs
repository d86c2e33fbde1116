//! [`Outbox`], a bounded queue of messages to a process that may hang, and one thread that writes them.
//!
//! A caller only adds to the queue, so it does not wait when journald, PID 1 or the reader of standard error does not
//! read. The thread writes in order, and waits in place of the caller. Messages that do not fit into the queue are
//! dropped and counted. `observe/log.rs` and `os/systemd.rs` have one outbox each.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::os::lock::lock;

/// An empty queue keeps its memory for this many messages.
const KEPT: usize = 64;

/// A message in an [`Outbox`].
pub trait Message: Send + 'static {
    /// The memory that it holds, in bytes.
    fn size(&self) -> usize;

    /// Whether it is a detail. Details may not use the last quarter of the bounds, so that a stall during which many
    /// details are logged does not lose the few important messages.
    fn is_detail(&self) -> bool;
}

/// The limits of an [`Outbox`]; they include the message that is being written.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub messages: usize,
    pub bytes: usize,
}

/// The queue is full, so the message was dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many messages are queued")
    }
}

impl Error for Full {}

pub struct Outbox<M> {
    bounds: Bounds,
    state: Mutex<State<M>>,
    /// Notified when there is work for the writer.
    work: Condvar,
    /// Notified when the writer has no work left.
    idle: Condvar,
    writer: OnceLock<ThreadId>,
}

struct State<M> {
    queue: VecDeque<M>,
    /// The size of the messages in the queue and of the one that is being written.
    bytes: usize,
    writer: Writer,
    /// The number of dropped messages that the writer has not reported yet.
    dropped: u64,
}

/// The state of the writer.
///
/// ```text
/// NotStarted --start--> Waiting --next--> Writing --success--> Waiting
///                                            |
///                                            `------failure--> Failed --next--> Writing
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    NotStarted,
    /// It waits for messages.
    Waiting,
    /// It is writing a message, and is blocked until the reader reads.
    Writing {
        since: Instant,
    },
    /// The last message could not be written. A report of the loss would fail too, so the report waits until a message
    /// has been written.
    Failed,
}

impl<M> State<M> {
    /// Whether the writer has to report dropped messages: there are any, and the reader has read all queued messages.
    fn has_report(&self) -> bool {
        self.queue.is_empty() && self.dropped > 0 && self.writer == Writer::Waiting
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.is_writing() && !self.has_report()
    }

    fn is_writing(&self) -> bool {
        matches!(self.writer, Writer::Writing { .. })
    }

    fn length(&self) -> usize {
        self.queue.len() + usize::from(self.is_writing())
    }
}

/// The next step of the writer.
enum Work<M> {
    Write(M),
    Report(u64),
}

impl<M: Message> Outbox<M> {
    pub const fn new(bounds: Bounds) -> Self {
        let state = State { queue: VecDeque::new(), bytes: 0, writer: Writer::NotStarted, dropped: 0 };
        Self {
            bounds,
            state: Mutex::new(state),
            work: Condvar::new(),
            idle: Condvar::new(),
            writer: OnceLock::new(),
        }
    }

    /// Starts the writer, a thread called `name`, unless it was started before. `write` may wait. `report` is called
    /// with the number of dropped messages when messages are written again. A message that `report` adds to this queue
    /// is accepted even if the queue is full by then.
    pub fn start(
        &'static self,
        name: &str,
        write: impl FnMut(M) -> io::Result<()> + Send + 'static,
        report: impl FnMut(u64) + Send + 'static,
    ) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.writer == Writer::NotStarted {
            thread::Builder::new().name(name.to_owned()).spawn(move || self.write(write, report))?;
            state.writer = Writer::Waiting;
        }
        Ok(())
    }

    /// Adds `message`. Never waits.
    pub fn push(&self, message: M) -> Result<(), Full> {
        self.add_within_bounds(lock(&self.state), message)
    }

    /// Removes the queued messages that `message` `replaces`, and adds `message`. Takes time linear in the queue.
    pub fn push_instead(&self, message: M, replaces: impl Fn(&M) -> bool) -> Result<(), Full> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        state.queue.retain(|queued| {
            let is_replaced = replaces(queued);
            if is_replaced {
                state.bytes -= queued.size();
            }
            !is_replaced
        });
        self.add_within_bounds(guard, message)
    }

    fn add_within_bounds(&self, mut state: MutexGuard<'_, State<M>>, message: M) -> Result<(), Full> {
        let Bounds { mut messages, mut bytes } = self.bounds;
        if message.is_detail() {
            messages -= messages / 4;
            bytes -= bytes / 4;
        }
        let fits = state.length() < messages && message.size() <= bytes.saturating_sub(state.bytes);
        if !fits && self.writer.get() != Some(&thread::current().id()) {
            state.dropped += 1;
            return Err(Full);
        }
        self.add(state, message);
        Ok(())
    }

    /// Adds the last message of this process, which is accepted even if the queue is full.
    pub fn push_last(&self, message: M) {
        self.add(lock(&self.state), message);
    }

    fn add(&self, mut state: MutexGuard<'_, State<M>>, message: M) {
        state.bytes += message.size();
        state.queue.push_back(message);
        // A writer that is writing checks the queue before it waits, and need not be notified.
        let is_awaited = !state.is_writing();
        drop(state);
        if is_awaited {
            self.work.notify_one();
        }
    }

    /// Whether all messages are written.
    pub fn is_idle(&self) -> bool {
        lock(&self.state).is_idle()
    }

    /// Waits until all messages are written, but no longer than `limit`. Returns at once if no writer was started, or
    /// if the current message has been blocked for `limit` already, because the reader then hangs.
    pub fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = lock(&self.state);
        while state.writer != Writer::NotStarted && !state.is_idle() {
            let deadline =
                if let Writer::Writing { since } = state.writer { end.min(since + limit) } else { end };
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return;
            }
            (state, _) = self.idle.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The loop of the writer.
    fn write(&self, mut write: impl FnMut(M) -> io::Result<()>, mut report: impl FnMut(u64)) -> ! {
        let _ = self.writer.set(thread::current().id());
        loop {
            match self.next() {
                Work::Write(message) => {
                    let size = message.size();
                    let written = write(message);
                    self.done(size, written.is_ok());
                }
                Work::Report(dropped) => {
                    report(dropped);
                    self.done(0, true);
                }
            }
        }
    }

    fn next(&self) -> Work<M> {
        let mut state = lock(&self.state);
        loop {
            if let Some(message) = state.queue.pop_front() {
                state.writer = Writer::Writing { since: Instant::now() };
                return Work::Write(message);
            }
            if state.has_report() {
                state.writer = Writer::Writing { since: Instant::now() };
                return Work::Report(std::mem::take(&mut state.dropped));
            }
            // Frees the memory of a queue that has grown during a stall. Without the minimum, each message would
            // allocate it anew.
            state.queue.shrink_to(KEPT);
            self.idle.notify_all();
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, size: usize, is_written: bool) {
        let mut state = lock(&self.state);
        state.bytes -= size;
        state.writer = if is_written { Writer::Waiting } else { Writer::Failed };
        state.dropped += u64::from(!is_written);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;

    use super::*;

    impl Message for String {
        fn size(&self) -> usize {
            self.len()
        }

        fn is_detail(&self) -> bool {
            self.starts_with("detail")
        }
    }

    /// A limit that no step reaches unless it hangs.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[derive(Debug, PartialEq, Eq)]
    enum Seen {
        Written(String),
        Reported(u64),
    }

    /// An outbox whose reader reads one message for each result that it is sent.
    struct Reader {
        outbox: &'static Outbox<String>,
        writing: Receiver<()>,
        results: Sender<io::Result<()>>,
        seen: Receiver<Seen>,
    }

    impl Reader {
        fn new(messages: usize, bytes: usize) -> Self {
            let outbox: &Outbox<String> = Box::leak(Box::new(Outbox::new(Bounds { messages, bytes })));
            let ((begin, writing), (results, taken), (see, seen)) = (channel(), channel(), channel());
            let written = see.clone();
            let write = move |message| {
                let _ = begin.send(());
                let result: io::Result<()> = taken.recv().unwrap_or(Ok(()));
                if result.is_ok() {
                    let _ = written.send(Seen::Written(message));
                }
                result
            };
            let report = move |dropped| {
                let _ = see.send(Seen::Reported(dropped));
            };
            outbox.start("test", write, report).expect("the thread can be started");
            Self { outbox, writing, results, seen }
        }

        fn push(&self, text: &str) -> Result<(), Full> {
            self.outbox.push(text.to_owned())
        }

        /// Waits until the writer has begun to write a message.
        fn wait_for_writer(&self) {
            self.writing.recv_timeout(PATIENCE).expect("the writer begins to write");
        }

        fn take(&self, count: usize) {
            for _ in 0..count {
                self.results.send(Ok(())).expect("the writer runs");
            }
        }

        fn fail(&self) {
            self.results.send(Err(io::ErrorKind::BrokenPipe.into())).expect("the writer runs");
        }

        fn expect_next(&self, wanted: &[Seen]) {
            for wanted in wanted {
                assert_eq!(self.seen.recv_timeout(PATIENCE).as_ref(), Ok(wanted));
            }
        }
    }

    fn written(text: &str) -> Seen {
        Seen::Written(text.to_owned())
    }

    #[test]
    fn messages_above_the_limit_are_dropped_and_reported_once_after_the_others() {
        let reader = Reader::new(3, 1000);
        assert_eq!(reader.push("first"), Ok(()));
        reader.wait_for_writer();
        assert_eq!([reader.push("second"), reader.push("third")], [Ok(()); 2]);
        assert_eq!([(); 5].map(|()| reader.push("dropped")), [Err(Full); 5]);
        reader.take(3);
        reader.expect_next(&[written("first"), written("second"), written("third"), Seen::Reported(5)]);
        assert_eq!(reader.push("fourth"), Ok(()));
        reader.take(1);
        reader.expect_next(&[written("fourth")]);
        reader.outbox.flush(PATIENCE);
        assert!(reader.seen.try_recv().is_err(), "there is a second report");
    }

    #[test]
    fn messages_above_the_limit_of_bytes_are_dropped_and_smaller_ones_are_accepted() {
        let reader = Reader::new(100, 10);
        assert_eq!(reader.push("12345678901"), Err(Full));
        assert_eq!(reader.push("1234567890"), Ok(()));
        reader.wait_for_writer();
        // The message that is being written counts too.
        assert_eq!(reader.push("1"), Err(Full));
        reader.take(1);
        reader.expect_next(&[written("1234567890"), Seen::Reported(2)]);
        assert_eq!(reader.push("123456"), Ok(()));
        assert_eq!(reader.push("12345"), Err(Full));
        assert_eq!(reader.push("1234"), Ok(()));
        reader.take(2);
        reader.expect_next(&[written("123456"), written("1234"), Seen::Reported(1)]);
    }

    #[test]
    fn details_leave_a_quarter_of_the_queue_to_other_messages() {
        for (messages, bytes) in [(4, 1000), (100, 32)] {
            let reader = Reader::new(messages, bytes);
            assert_eq!(reader.push("detail 1"), Ok(()));
            reader.wait_for_writer();
            let pushed =
                ["detail 2", "detail 3", "detail 4", "an error", "an error"].map(|text| reader.push(text));
            assert_eq!(pushed, [Ok(()), Ok(()), Err(Full), Ok(()), Err(Full)]);
            reader.take(4);
            let all = ["detail 1", "detail 2", "detail 3", "an error"].map(written);
            reader.expect_next(&all);
            reader.expect_next(&[Seen::Reported(2)]);
        }
    }

    #[test]
    fn push_and_flush_return_while_the_reader_hangs() {
        let reader = Reader::new(2, 1000);
        assert_eq!(reader.push("hangs"), Ok(()));
        reader.wait_for_writer();
        assert_eq!(reader.push("waits"), Ok(()));
        assert_eq!(reader.push("dropped"), Err(Full));
        let (begun, limit) = (Instant::now(), Duration::from_millis(50));
        // In the second call the first message has been blocked for the limit already; neither call waits for the
        // second message.
        reader.outbox.flush(limit);
        reader.outbox.flush(limit);
        assert!(begun.elapsed() < PATIENCE);
        assert!(reader.seen.try_recv().is_err(), "the reader does not hang");
    }

    #[test]
    fn flush_does_not_wait_for_a_reader_that_hangs_already() {
        let reader = Reader::new(2, 1000);
        assert_eq!(reader.push("hangs"), Ok(()));
        reader.wait_for_writer();
        let hung = Instant::now().checked_sub(PATIENCE).expect("the machine has been up for longer");
        lock(&reader.outbox.state).writer = Writer::Writing { since: hung };
        let begun = Instant::now();
        reader.outbox.flush(PATIENCE);
        assert!(begun.elapsed() < PATIENCE);
    }

    #[test]
    fn flush_returns_when_all_messages_are_written_and_drops_are_reported() {
        let reader = Reader::new(2, 1000);
        let pushed = ["first", "second", "dropped"].map(|text| reader.push(text));
        assert_eq!(pushed, [Ok(()), Ok(()), Err(Full)]);
        reader.take(2);
        reader.outbox.flush(PATIENCE);
        let seen: Vec<_> = reader.seen.try_iter().collect();
        assert_eq!(seen, [written("first"), written("second"), Seen::Reported(1)]);
    }

    #[test]
    fn flush_returns_at_once_if_no_writer_was_started() {
        let outbox = Outbox::new(Bounds { messages: 2, bytes: 1000 });
        assert_eq!(outbox.push("waits".to_owned()), Ok(()));
        let begun = Instant::now();
        outbox.flush(PATIENCE);
        assert!(begun.elapsed() < PATIENCE);
    }

    #[test]
    fn last_message_is_accepted_by_a_full_queue() {
        let reader = Reader::new(1, 10);
        assert_eq!(reader.push("first"), Ok(()));
        reader.wait_for_writer();
        assert_eq!(reader.push("x"), Err(Full));
        reader.outbox.push_last("the last of all".to_owned());
        reader.take(2);
        reader.expect_next(&[written("first"), written("the last of all"), Seen::Reported(1)]);
    }

    #[test]
    fn failed_write_is_reported_after_the_next_successful_one() {
        let reader = Reader::new(10, 1000);
        for text in ["fails", "fails too"] {
            assert_eq!(reader.push(text), Ok(()));
            reader.fail();
        }
        reader.outbox.flush(PATIENCE);
        assert!(reader.seen.try_recv().is_err(), "a report would fail too");
        assert_eq!(reader.push("works"), Ok(()));
        reader.take(1);
        reader.expect_next(&[written("works"), Seen::Reported(2)]);
    }

    #[test]
    fn message_that_a_report_adds_is_accepted_by_a_full_queue() {
        static OUTBOX: Outbox<String> = Outbox::new(Bounds { messages: 1, bytes: 1000 });
        let ((begin, writing), (go, may_go), (see, seen)) = (channel(), channel(), channel());
        let write = move |message: String| {
            let _ = begin.send(());
            let _ = may_go.recv();
            see.send(message).map_err(io::Error::other)
        };
        let report = |dropped| {
            // The queue is full before the report adds its message.
            OUTBOX.push_last("other".to_owned());
            OUTBOX.push(format!("{dropped} dropped")).expect("the report is accepted");
        };
        OUTBOX.start("test", write, report).expect("the thread can be started");
        assert_eq!(OUTBOX.push("first".to_owned()), Ok(()));
        writing.recv_timeout(PATIENCE).expect("the writer begins to write");
        assert_eq!(OUTBOX.push("dropped".to_owned()), Err(Full));
        let all = [(); 3].map(|()| {
            go.send(()).expect("the writer runs");
            seen.recv_timeout(PATIENCE).expect("the message is written")
        });
        assert_eq!(all, ["first", "other", "1 dropped"]);
    }

    #[test]
    fn message_replaces_queued_ones_and_uses_their_space() {
        let reader = Reader::new(3, 12);
        assert_eq!(reader.push("hangs"), Ok(()));
        reader.wait_for_writer();
        let is_status = |queued: &String| queued.starts_with("s ");
        for text in ["s 1", "other", "s 2", "s 3"] {
            let pushed = if text == "other" {
                reader.outbox.push("o".to_owned())
            } else {
                reader.outbox.push_instead(text.to_owned(), is_status)
            };
            assert_eq!(pushed, Ok(()), "{text}");
        }
        reader.take(3);
        reader.expect_next(&[written("hangs"), written("o"), written("s 3")]);
    }

    proptest! {
        /// For any messages and any pauses of the reader, the bounds are kept too.
        #[test]
        fn each_message_is_written_in_order_or_counted(
            steps in proptest::collection::vec((0_usize..40, 0_usize..4), 1..60),
        ) {
            let outbox = Outbox::new(Bounds { messages: 5, bytes: 64 });
            let (mut accepted, mut dropped, mut seen) = (Vec::new(), 0, Vec::new());
            lock(&outbox.state).writer = Writer::Waiting;
            for (number, (length, reads)) in steps.into_iter().enumerate() {
                let message = format!("{number:03}{}", "x".repeat(length));
                match outbox.push(message.clone()) {
                    Ok(()) => accepted.push(message),
                    Err(Full) => dropped += 1,
                }
                for _ in 0..reads {
                    if lock(&outbox.state).is_idle() {
                        break;
                    }
                    match outbox.next() {
                        Work::Write(message) => {
                            let size = message.size();
                            seen.push(message);
                            outbox.done(size, true);
                        }
                        Work::Report(count) => {
                            dropped -= count;
                            outbox.done(0, true);
                        }
                    }
                }
                let state = lock(&outbox.state);
                prop_assert!(state.length() <= 5 && state.bytes <= 64);
                prop_assert_eq!(state.bytes, state.queue.iter().map(String::len).sum::<usize>());
                prop_assert_eq!(state.dropped, dropped);
            }
            let waiting = lock(&outbox.state).queue.iter().cloned().collect::<Vec<_>>();
            seen.extend(waiting);
            prop_assert_eq!(seen, accepted);
        }
    }
}
