//! The backup of parked connections: duplicates of them in systemd's store, for the process that starts after a crash.
//!
//! A crash closes the descriptors of the process, and a connection closes with its last descriptor. A parked connection
//! does not change until it is unparked, so a duplicate of its socket and its record are all that another process needs
//! to continue it. [`Backup`] sends them through a channel whose reading end systemd keeps, many to a frame. The process
//! that starts after a crash reads the frames with [`take`].
//!
//! A frame that was sent cannot be changed, but most of its connections are unparked some time later. So each duplicate
//! has a mark, a byte in a memfd that every frame carries ([`Marks`]). The process sets it after it has sent the frame,
//! and clears it before it reads, hands over or closes the connection. The next process continues only duplicates that
//! are marked, and clears the mark before it continues the connection, so it continues none twice or from an old state.
//!
//! ```text
//! memfd    8  generation of the process; 0 once its connections are handed over
//!          .  a mark for each duplicate, by its number: 1 or 0
//! ```
//!
//! When most duplicates in the channel are stale, or the channel is nearly full, the process takes the oldest frames out
//! of it. Before that, it sends those connections of these frames that are still parked again, in one frame and under the
//! same numbers. If it crashes in between, such a connection is in two frames; the next process continues the first
//! duplicate that it finds, and thereby clears the mark of both.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::net::{RecvFlags, recv};
use tracing::warn;

use super::{Frame, MAX_SOCKETS, MessageType, Origin, STORE_NAME, SocketRecord, channel, pack};
use crate::connection::Connection;
use crate::os::systemd;

/// How many connections one frame carries at most; its first socket is the memfd with the marks.
const MAX_BACKED_UP: usize = MAX_SOCKETS - 1;
/// The channel has room for some 230 frames. Tests have few connections.
const MAX_FRAMES: usize = if cfg!(test) { 10 } else { 160 };
/// A frame is removed when the channel has more than twice as many duplicates as are valid, plus this number. Tests
/// have few connections.
const STALE_LIMIT: usize = if cfg!(test) { 4 } else { 1024 };
/// The memory of old marks is released in steps of this many bytes.
const RELEASE_STEP: u64 = 1 << 20;

const MARKED: u8 = 1;
const UNMARKED: u8 = 0;

/// The marks of the duplicates, by their numbers.
struct Marks {
    file: File,
}

impl Marks {
    const FIRST: u64 = size_of::<u64>() as u64;

    fn new(generation: u64) -> io::Result<Self> {
        let file = File::from(memfd_create("marks", MemfdFlags::CLOEXEC)?);
        file.write_all_at(&generation.to_le_bytes(), 0)?;
        Ok(Self { file })
    }

    fn generation(&self) -> io::Result<u64> {
        let mut bytes = [0; size_of::<u64>()];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn mark(&self, numbers: std::ops::Range<u64>) -> io::Result<()> {
        let count = usize::try_from(numbers.end - numbers.start).map_err(io::Error::other)?;
        self.file.write_all_at(&vec![MARKED; count], Self::FIRST + numbers.start)
    }

    /// The duplicate is stale from now on.
    fn clear(&self, number: u64) -> io::Result<()> {
        self.file.write_all_at(&[UNMARKED], Self::FIRST + number)
    }

    /// All duplicates are stale from now on.
    fn clear_all(&self) -> io::Result<()> {
        self.file.write_all_at(&[0; size_of::<u64>()], 0)
    }

    /// Clears the mark, and returns whether it was set.
    fn take(&self, number: u64) -> io::Result<bool> {
        let mut mark = [UNMARKED];
        let position = Self::FIRST.checked_add(number).ok_or(io::ErrorKind::InvalidInput)?;
        if self.file.read_at(&mut mark, position)? == 0 || mark == [UNMARKED] {
            return Ok(false);
        }
        self.clear(number)?;
        Ok(true)
    }
}

/// The duplicates in systemd's store.
pub struct Backup {
    /// The writing and the reading end. systemd has a copy of the reading end.
    channel: (OwnedFd, OwnedFd),
    generation: u64,
    marks: Marks,
    /// The frames in the channel, the oldest first: the sockets and numbers of their duplicates.
    frames: VecDeque<Vec<(RawFd, u64)>>,
    /// How many duplicates are in the channel.
    count: usize,
    next_number: u64,
    /// All marks before this number are released.
    released: u64,
    /// How many duplicates may be in the channel.
    limit: usize,
}

/// The parked connections, as [`Backup`] sees them.
pub trait ParkedSockets {
    /// The number of connections that have a valid duplicate.
    fn backed_up(&self) -> usize;
    /// The connection with this socket, if its duplicate has this number.
    fn backed_up_as(&self, socket: RawFd, number: u64) -> Option<&Connection>;
    /// The smallest number of a valid duplicate.
    fn oldest_number(&self) -> Option<u64>;
}

impl Backup {
    /// A backup of a process that may have `limit` duplicates in it.
    pub fn new(generation: u64, limit: usize) -> io::Result<Self> {
        Ok(Self {
            channel: channel::pair()?,
            generation,
            marks: Marks::new(generation)?,
            frames: VecDeque::new(),
            count: 0,
            // 0 is left out, so that a parked connection can keep its number in 8 bytes (`Option<NonZeroU64>`).
            next_number: 1,
            released: 0,
            limit,
        })
    }

    /// A backup without systemd, and a copy of its reading end.
    #[cfg(test)]
    pub fn in_memory(generation: u64, limit: usize) -> (Self, OwnedFd) {
        let backup = Self::new(generation, limit).expect("could not create a channel");
        let reading_end = backup.channel.1.try_clone().expect("the descriptor is duplicated");
        (backup, reading_end)
    }

    /// Stores the channel with systemd, also again after the descriptors of its name were removed.
    pub fn store(&self) -> io::Result<()> {
        systemd::store(STORE_NAME, self.channel.1.as_fd())
    }

    /// The oldest frames whose connections that are still parked fit into one frame together. None unless the channel has too
    /// many frames or too many stale duplicates.
    fn stale_frames(&self, parked: &impl ParkedSockets) -> impl Iterator<Item = &[(RawFd, u64)]> {
        let valid = parked.backed_up();
        let has_no_room = self.count > valid && self.count + MAX_BACKED_UP > self.limit;
        let is_stale = self.count > 2 * valid + STALE_LIMIT || has_no_room;
        let mut again = 0;
        let fit = move |frame: &&[(RawFd, u64)]| {
            again += still_parked(frame, parked).count();
            again <= MAX_BACKED_UP
        };
        let frames = self.frames.iter().map(Vec::as_slice);
        let frames = frames.take(if is_stale || self.has_too_many_frames(parked) { usize::MAX } else { 0 });
        frames.take_while(fit)
    }

    /// Whether the channel has too many frames, and two adjacent ones can be merged into one. Without the second condition, the
    /// process would replace each frame by another one again and again.
    fn has_too_many_frames(&self, parked: &impl ParkedSockets) -> bool {
        if self.frames.len() < MAX_FRAMES {
            return false;
        }
        let counts: Vec<_> = self.frames.iter().map(|frame| still_parked(frame, parked).count()).collect();
        counts.windows(2).any(|two| two.iter().sum::<usize>() <= MAX_BACKED_UP)
    }

    /// How many connections the next frame can carry beside those that are sent again. None if there is no room for them in
    /// the channel. `is_stale`: see [`Backup::is_stale`].
    pub fn room(&self, parked: &impl ParkedSockets, is_stale: bool) -> Option<usize> {
        let again = match (is_stale, self.frames.len() >= MAX_FRAMES) {
            (true, _) => self.stale_frames(parked).flat_map(|frame| still_parked(frame, parked)).count(),
            (false, true) => return None,
            (false, false) => 0,
        };
        let room = self.limit.checked_sub(self.count + again)?;
        Some(room.min(MAX_BACKED_UP - again))
    }

    /// Whether [`Backup::add`] has work even without new connections.
    pub fn is_stale(&self, parked: &impl ParkedSockets) -> bool {
        self.stale_frames(parked).next().is_some()
    }

    /// Adds duplicates of the connections with these sockets, which are at most [`Backup::room`]. Returns their numbers, in
    /// the same order. If the channel has become stale, also takes its oldest frames out of it.
    ///
    /// # Errors
    ///
    /// If the channel is full or too many descriptors of this user are in flight (unix(7)). Then nothing has changed.
    pub fn add(
        &mut self,
        new: &[(RawFd, &Connection)],
        parked: &impl ParkedSockets,
    ) -> io::Result<std::ops::Range<u64>> {
        // Releases old marks first: `parked` knows the new numbers only after this function returns, so a later release would
        // clear their marks.
        self.release(parked);
        let numbers = self.next_number..self.next_number + new.len() as u64;
        let new = new
            .iter()
            .zip(numbers.clone())
            .map(|(&(socket, connection), number)| (socket, number, connection));
        let mut members: Vec<_> = new.collect();
        let stale: Vec<_> = self.stale_frames(parked).collect();
        let taken_out = stale.len();
        members.extend(stale.into_iter().flat_map(|frame| still_parked(frame, parked)));
        if !members.is_empty() {
            let marks = (self.marks.file.as_fd(), SocketRecord::new(String::new(), Bytes::new()));
            let duplicates = members.iter().flat_map(|&(_, number, connection)| {
                pack(std::slice::from_ref(connection)).into_iter().map(move |(socket, record)| {
                    let payload = Bytes::copy_from_slice(&number.to_le_bytes());
                    (socket, SocketRecord { payload, ..record })
                })
            });
            let sockets: Vec<(BorrowedFd<'_>, SocketRecord)> =
                std::iter::once(marks).chain(duplicates).collect();
            let origin = Origin::now(self.generation);
            if let (_, Some(error)) =
                channel::send(&self.channel.0, MessageType::Backup, origin, &sockets, "")
            {
                return Err(error);
            }
            self.count += members.len();
            self.next_number = numbers.end;
            self.frames.push_back(members.into_iter().map(|(socket, number, _)| (socket, number)).collect());
        }
        let finished = self
            .marks
            .mark(numbers.clone())
            .and_then(|()| (0..taken_out).try_for_each(|_| self.take_oldest()));
        if let Err(error) = finished {
            // The frame is in the channel already, so its numbers are in use. Clearing the generation makes all
            // duplicates invalid.
            warn!(%error, "could not update the backup of idle connections, so discarded it; until the next restart, a crash closes idle connections too");
            self.marks.clear_all()?;
        }
        Ok(numbers)
    }

    fn take_oldest(&mut self) -> io::Result<()> {
        // Without a buffer for its descriptors, the kernel closes them, and this process needs none.
        recv(&self.channel.1, &mut [0_u8; 1], RecvFlags::DONTWAIT)?;
        self.count -= self.frames.pop_front().map_or(0, |frame| frame.len());
        Ok(())
    }

    /// Releases the memory of the marks before the oldest valid number.
    fn release(&mut self, parked: &impl ParkedSockets) {
        if self.next_number - self.released < 2 * RELEASE_STEP {
            return;
        }
        let oldest = parked.oldest_number().unwrap_or(self.next_number);
        let until = oldest / RELEASE_STEP * RELEASE_STEP;
        // The page with the generation is kept.
        let from = self.released.max(RELEASE_STEP);
        if until > from {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // After an error the memory is still allocated, and the next step tries again.
            if fallocate(&self.marks.file, flags, from, until - from).is_ok() {
                self.released = until;
            }
        }
    }

    /// Makes the duplicate with this number stale. Afterwards its connection may be read or closed.
    pub fn clear(&self, number: u64) -> io::Result<()> {
        self.marks.clear(number)
    }

    /// Makes all duplicates stale and closes them, before their connections are handed over. Otherwise they would count
    /// as descriptors in flight; the kernel limits these for each user to the file limit of the process (unix(7)).
    pub fn end(mut self) -> io::Result<()> {
        self.marks.clear_all()?;
        while !self.frames.is_empty() {
            self.take_oldest()?;
        }
        Ok(())
    }
}

/// The connections of a frame whose duplicates are valid.
fn still_parked<'p>(
    frame: &[(RawFd, u64)],
    parked: &'p impl ParkedSockets,
) -> impl Iterator<Item = (RawFd, u64, &'p Connection)> {
    frame.iter().filter_map(|&(socket, number)| Some((socket, number, parked.backed_up_as(socket, number)?)))
}

/// Whether systemd keeps descriptors for this unit. systemd before 254 does not report this. There the function stores
/// one end of a channel, and the other end shows whether systemd has kept it.
pub async fn has_store() -> io::Result<bool> {
    if let Some(known) = systemd::has_store() {
        return Ok(known);
    }
    let (ours, stored) = channel::pair()?;
    systemd::store(STORE_NAME, stored.as_fd())?;
    tokio::time::timeout(systemd::BARRIER_LIMIT, systemd::barrier()).await??;
    drop(stored);
    Ok(!channel::is_hung_up(&ours)?)
}

/// Leaves the connections in a frame of the type `Backup` that were parked when its process crashed.
pub fn take(mut frame: Frame) -> Frame {
    let mut sockets = std::mem::take(&mut frame.sockets).into_iter();
    let Some((marks, _)) = sockets.next() else { return frame };
    let marks = Marks { file: marks.into() };
    if marks.generation().ok() != Some(frame.origin.generation) {
        return frame;
    }
    frame.sockets = sockets
        .filter_map(|(socket, record)| {
            let number = u64::from_le_bytes(record.payload.as_ref().try_into().ok()?);
            let is_valid = marks.take(number).unwrap_or(false);
            is_valid.then(|| (socket, SocketRecord { payload: Bytes::new(), ..record }))
        })
        .collect();
    frame
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use axum::Router;

    use super::*;
    use crate::connection::tests::endpoint;
    use crate::handover::{Next, receive_frame};

    struct Nothing;

    impl ParkedSockets for Nothing {
        fn backed_up(&self) -> usize {
            0
        }

        fn backed_up_as(&self, _: RawFd, _: u64) -> Option<&Connection> {
            None
        }

        fn oldest_number(&self) -> Option<u64> {
            None
        }
    }

    fn connection() -> (Connection, UnixStream) {
        let (ours, peer) = UnixStream::pair().expect("a socket pair is made");
        let connection = Connection::begun(ours.into(), endpoint(Router::new(), None));
        (connection, peer)
    }

    /// How many connections of each frame are continued.
    fn continued(reading_end: &OwnedFd) -> Vec<usize> {
        let mut counts = Vec::new();
        while let Next::Frame(frame) = receive_frame(reading_end).expect("the channel is readable") {
            counts.push(take(frame).sockets.len());
        }
        counts
    }

    /// As after a crash between the two steps of `add`: a connection was sent again, and its old frame was not taken.
    #[tokio::test]
    async fn connection_in_two_frames_is_continued_once() {
        let (connection, _peer) = connection();
        let (mut backup, reading_end) = Backup::in_memory(3, 1000);
        let socket = connection.socket.as_raw_fd();
        for _ in 0..2 {
            backup.next_number = 0;
            backup.add(&[(socket, &connection)], &Nothing).expect("the channel has room");
        }
        assert_eq!(continued(&reading_end), [1, 0]);
    }

    #[tokio::test]
    async fn backup_of_another_generation_is_stale() {
        let (connection, _peer) = connection();
        let (mut backup, reading_end) = Backup::in_memory(3, 1000);
        backup.generation = 4;
        backup.add(&[(connection.socket.as_raw_fd(), &connection)], &Nothing).expect("the channel has room");
        assert_eq!(continued(&reading_end), [0]);
    }

    #[tokio::test]
    async fn marks_of_old_numbers_are_released_and_newer_ones_kept() {
        let (connection, _peer) = connection();
        let (mut backup, reading_end) = Backup::in_memory(3, 1000);
        let socket = connection.socket.as_raw_fd();
        let allocated = |backup: &Backup| {
            let stat = rustix::fs::fstat(&backup.marks.file).expect("the memfd is open");
            stat.st_blocks * 512
        };
        backup.marks.mark(0..4 * RELEASE_STEP).expect("the memfd is writable");
        backup.next_number = 4 * RELEASE_STEP;
        let before = allocated(&backup);
        backup.add(&[(socket, &connection)], &Nothing).expect("the channel has room");
        backup.release(&Nothing);
        assert!(allocated(&backup) < before / 2, "{} of {before} bytes are left", allocated(&backup));
        assert_eq!(continued(&reading_end), [1]);
    }

    #[tokio::test]
    async fn marks_of_new_duplicates_are_not_released() {
        let connections: Vec<_> = (0..30).map(|_| connection()).collect();
        let new = connections.iter().map(|(connection, _)| (connection.socket.as_raw_fd(), connection));
        let new: Vec<_> = new.collect();
        let (mut backup, reading_end) = Backup::in_memory(3, 1000);
        backup.next_number = 3 * RELEASE_STEP - 20;
        backup.add(&new, &Nothing).expect("the channel has room");
        assert_eq!(continued(&reading_end), [30]);
    }

    #[tokio::test]
    async fn invalid_numbers_are_refused_without_a_panic() {
        let marks = Marks::new(3).expect("the memfd is made");
        marks.mark(0..1).expect("the memfd is writable");
        for number in [1, u64::MAX, u64::MAX - 8, 1 << 62] {
            assert!(!marks.take(number).unwrap_or(false), "{number}");
        }
        assert!(marks.take(0).expect("it is marked"));
    }
}
