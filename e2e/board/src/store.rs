//! The SQLite database: its connection, its migrations and all queries.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::{Stream, TryStreamExt, stream};
use rusqlite::{Connection, TransactionBehavior};
use serde::Serialize;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

/// Number of notes that the board keeps: each new note removes the oldest one.
const KEPT: i64 = 10_000;
/// Number of notes that one query reads.
const BATCH: i64 = 100;
/// How long a query waits for the write lock of another process.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// Time between two looks for notes of another process.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A release adds its migrations at the end. During a reload two releases use the tables, and a release may be rolled
/// back, so a migration must not remove anything that the previous release needs.
const MIGRATIONS: [&str; 1] = [include_str!("migrations/1_notes.sql")];

#[derive(Clone)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
    /// Changes when there may be new notes.
    news: watch::Sender<()>,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct Note {
    pub id: i64,
    pub author: String,
    pub text: String,
}

impl Store {
    /// Opens the database, and migrates its tables to the form that this release needs.
    pub fn open(file: &Path) -> anyhow::Result<Self> {
        let connection =
            connect(file).with_context(|| format!("could not open {} (--database)", file.display()))?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)), news: watch::Sender::new(()) })
    }

    /// Runs `work` on a thread that may block. The others wait without a thread.
    async fn query<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let mut connection = self.connection.clone().lock_owned().await;
        Ok(tokio::task::spawn_blocking(move || work(&mut connection)).await??)
    }

    pub async fn ping(self) -> anyhow::Result<()> {
        self.query(|connection| connection.execute_batch("select id from notes limit 1")).await
    }

    /// Adds a note, and returns its id. The note is on the disk when this returns.
    pub async fn add(&self, author: String, text: String) -> anyhow::Result<i64> {
        let add = move |connection: &mut Connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute("insert into notes (author, text) values (?, ?)", (author, text))?;
            let id = transaction.last_insert_rowid();
            transaction.execute("delete from notes where id <= ?", [id - KEPT])?;
            transaction.commit()?;
            Ok(id)
        };
        let id = self.query(add).await?;
        self.news.send_replace(());
        Ok(id)
    }

    /// The first notes after the one with the id `last`, in their order; none if there are no more.
    pub async fn after(&self, last: i64) -> anyhow::Result<Vec<Note>> {
        self.query(move |connection| {
            let sql = "select id, author, text from notes where id > ? order by id limit ?";
            let mut query = connection.prepare(sql)?;
            let note = |row: &rusqlite::Row<'_>| {
                Ok(Note { id: row.get(0)?, author: row.get(1)?, text: row.get(2)? })
            };
            query.query_map([last, BATCH], note)?.collect()
        })
        .await
    }

    /// All notes after the one with the id `last`, and then each new one.
    pub fn follow(&self, last: i64) -> impl Stream<Item = anyhow::Result<Note>> + use<> {
        let begin = (self.clone(), self.news.subscribe(), last);
        let batches = stream::try_unfold(begin, async |(store, mut news, last)| {
            loop {
                let notes = store.after(last).await?;
                if let Some(newest) = notes.last().map(|note| note.id) {
                    let notes = stream::iter(notes.into_iter().map(anyhow::Ok));
                    return anyhow::Ok(Some((notes, (store, news, newest))));
                }
                // Resolves at once if there was news since the query began.
                news.changed().await?;
            }
        });
        batches.try_flatten()
    }

    /// Looks for notes of another process until `end` is cancelled. During a reload two processes use the file, and
    /// SQLite does not tell one of them what the other has written.
    pub async fn watch(self, end: CancellationToken) -> anyhow::Result<()> {
        let mut seen = 0;
        while end.run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL)).await.is_some() {
            // A number that changes when another connection has written.
            let version: i64 = self
                .query(|connection| connection.pragma_query_value(None, "data_version", |row| row.get(0)))
                .await?;
            if version != seen {
                seen = version;
                self.news.send_replace(());
            }
        }
        Ok(())
    }
}

fn connect(file: &Path) -> anyhow::Result<Connection> {
    let folder = file.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // Without this lock SQLite fails, and does not wait, if two processes change the journal mode of a new database.
    let lock = File::open(folder).with_context(|| folder.display().to_string())?;
    lock.lock().with_context(|| format!("could not lock {}", folder.display()))?;
    let mut connection = Connection::open(file)?;
    connection.busy_timeout(LOCK_LIMIT)?;
    // Readers and the writer do not wait for each other, in one process and in two.
    connection.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let applied: u32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for (number, migration) in (1..).zip(MIGRATIONS).filter(|(number, _)| *number > applied) {
        transaction.execute_batch(migration).with_context(|| format!("migration {number}"))?;
        transaction.pragma_update(None, "user_version", number)?;
    }
    transaction.commit()?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    /// Two processes of a reload, and the folder of their database.
    fn two_processes() -> (Store, Store, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("the folder is created");
        let file = folder.path().join("state/notes.sqlite");
        let open = || Store::open(&file).expect("the database opens");
        (open(), open(), folder)
    }

    async fn add(store: &Store, text: &str) -> i64 {
        store.add("ada".to_owned(), text.to_owned()).await.expect("the note is added")
    }

    #[test]
    fn new_database_opens_in_each_of_the_threads_that_create_it() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().expect("the folder is created");
            let file = folder.path().join("state/notes.sqlite");
            let open = || Store::open(&file).map(drop).expect("the database opens");
            std::thread::scope(|threads| (0..8).for_each(|_| drop(threads.spawn(open))));
        }
    }

    #[tokio::test]
    async fn note_of_another_process_is_noticed_and_followed_in_order_with_own_notes() {
        let (old, new, _folder) = two_processes();
        let end = CancellationToken::new();
        let watch = tokio::spawn(new.clone().watch(end.clone()));
        let mut news = new.news.subscribe();
        let mut next_news = async || {
            let changed = tokio::time::timeout(Duration::from_secs(60), news.changed()).await;
            changed.expect("the change is noticed").expect("the store exists");
        };
        // The first look notices a change in any case.
        next_news().await;
        assert_eq!(add(&old, "1").await, 1);
        next_news().await;
        assert_eq!((add(&new, "2").await, add(&old, "3").await), (2, 3));
        let notes: Vec<_> = new.follow(0).take(3).try_collect().await.expect("the notes can be read");
        let note = |id: i64| Note { id, author: "ada".to_owned(), text: id.to_string() };
        assert_eq!(notes, [note(1), note(2), note(3)]);
        end.cancel();
        watch.await.expect("it does not panic").expect("the database can be read");
    }

    #[tokio::test]
    async fn all_notes_of_several_batches_are_followed() {
        let (store, _, _folder) = two_processes();
        for number in 0..=BATCH * 2 {
            add(&store, &number.to_string()).await;
        }
        let notes: Vec<_> =
            store.follow(1).take(usize::try_from(BATCH * 2).expect("it is small")).collect().await;
        let numbers =
            notes.into_iter().map(|note| note.expect("the note can be read").text.parse::<i64>().ok());
        assert!(numbers.eq((1..=BATCH * 2).map(Some)));
    }

    #[tokio::test]
    async fn oldest_notes_are_removed_and_their_ids_are_not_used_again() {
        let (store, again, _folder) = two_processes();
        let far = |connection: &mut Connection| {
            connection.execute("insert into notes (id, author, text) values (?, 'ada', 'hi')", [KEPT])
        };
        add(&store, "oldest").await;
        store.query(far).await.expect("the note is added");
        assert_eq!(add(&store, "newest").await, KEPT + 1);
        let kept: Vec<_> =
            store.after(0).await.expect("it can be read").into_iter().map(|note| note.id).collect();
        assert_eq!(kept, [KEPT, KEPT + 1]);
        store
            .query(|connection| connection.execute("delete from notes", []))
            .await
            .expect("it can be written");
        assert_eq!(add(&again, "hi").await, KEPT + 2);
    }

    #[tokio::test]
    async fn database_of_a_later_release_opens_and_is_not_changed() {
        let (store, _, folder) = two_processes();
        store
            .query(|connection| connection.pragma_update(None, "user_version", 7))
            .await
            .expect("it can be written");
        let again = Store::open(&folder.path().join("state/notes.sqlite")).expect("the database opens");
        let version = |connection: &mut Connection| {
            connection.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0))
        };
        assert_eq!(again.query(version).await.expect("it can be read"), 7);
    }

    #[test]
    fn file_that_is_not_a_database_is_refused_with_its_path() {
        let folder = tempfile::tempdir().expect("the folder is created");
        let file = folder.path().join("notes.sqlite");
        std::fs::write(&file, "not a database, and longer than a header of SQLite".repeat(9))
            .expect("it is written");
        let error = format!("{:#}", Store::open(&file).err().expect("it is refused"));
        assert!(error.starts_with(&format!("could not open {} (--database): ", file.display())), "{error}");
    }
}
