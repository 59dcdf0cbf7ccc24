//! The queue: every accepted event stays in it until it is answered.
//!
//! ```text
//! waiting ── the gateway's answer, split into parts ──> answered ── all parts sent ──> done
//!    └──────────── nothing to answer, or a final refusal ───────────────────────────^
//! ```
//!
//! A change returns when it is on the disk. Of an event that is done the id and the outcome stay, so that
//! a second delivery is known; the words of the message go.

mod database;

use crate::clock::now_ms;
use database::Database;
pub(crate) use database::{Failure, Threads};
use rusqlite::{Connection, OptionalExtension as _, params};
use std::path::Path;

/// A second delivery comes within the server's day. Ids are kept for this long, and when there are very
/// many for the second span at least.
const KEPT_MS: u64 = 7 * 24 * 3600 * 1000;
const KEPT_AT_LEAST_MS: u64 = 2 * 24 * 3600 * 1000;
const DONE_MAX: i64 = 100_000;
/// Free pages of 4 KiB that stay in the file: while events are open, and while none is.
const FREE_BUSY: i64 = 1024;
const FREE_IDLE: i64 = 64;
/// Pages that one transaction gives back: acknowledgements wait for it.
const FREE_ROUND: i64 = 1024;

const SCHEMA_VERSION: i64 = 1;
const SCHEMA: &str = "
CREATE TABLE event (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    session TEXT NOT NULL,
    channel TEXT NOT NULL,
    state INTEGER NOT NULL,      -- 0 waiting, 1 answered, 2 done
    received_ms INTEGER NOT NULL,
    done_ms INTEGER,
    outcome TEXT
);
CREATE INDEX event_open ON event (state, received_ms) WHERE state < 2;
CREATE INDEX event_done ON event (done_ms) WHERE state = 2;
CREATE TABLE body (seq INTEGER NOT NULL, n INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (seq, n));
CREATE TABLE part (
    seq INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL, sent INTEGER NOT NULL,
    PRIMARY KEY (seq, n)
);
";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Accepted {
    New(i64),
    /// The same event once more, with its number and session while it is not done.
    Known(Option<(i64, String)>),
}

/// An event that is not done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OpenEvent {
    pub(crate) id: String,
    pub(crate) session: String,
    pub(crate) channel: String,
    pub(crate) is_answered: bool,
    pub(crate) body: Vec<u8>,
    /// Number and text of the parts that are still to be sent.
    pub(crate) parts: Vec<(i64, String)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Depth {
    pub(crate) waiting: u64,
    pub(crate) answered: u64,
    pub(crate) oldest_ms: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct Queue {
    database: Database,
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

impl Queue {
    /// Opens the queue, and makes it where there is none.
    pub(crate) fn open(path: &Path) -> Result<(Self, Threads), Failure> {
        let (database, threads) = Database::open(path, SCHEMA, SCHEMA_VERSION)?;
        Ok((Self { database }, threads))
    }

    /// Stores an event, whose body comes in pieces, unless it is known.
    pub(crate) async fn accept(
        &self,
        id: String,
        session: String,
        channel: String,
        body: Vec<Vec<u8>>,
    ) -> Result<Accepted, Failure> {
        self.database.write(move |db| {
            let new = db
                .prepare_cached(
                    "INSERT OR IGNORE INTO event (id, session, channel, state, received_ms) VALUES (?, ?, ?, 0, ?)",
                )?
                .execute(params![id, session, channel, signed(now_ms())])?;
            if new == 0 {
                return db
                    .prepare_cached("SELECT seq, session FROM event WHERE id = ? AND state < 2")?
                    .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
                    .optional()
                    .map(Accepted::Known);
            }
            let seq = db.last_insert_rowid();
            let mut insert = db.prepare_cached("INSERT INTO body VALUES (?, ?, ?)")?;
            for (n, bytes) in body.iter().enumerate() {
                insert.execute(params![seq, signed(n as u64), bytes])?;
            }
            Ok(Accepted::New(seq))
        })
        .await
    }

    /// The events that are not done, in the order of their arrival: number, session and size.
    pub(crate) async fn unfinished(&self) -> Result<Vec<(i64, String, u64)>, Failure> {
        self.database
            .read(|db| {
                let mut select = db.prepare("SELECT seq, session FROM event WHERE state < 2 ORDER BY seq")?;
                let mut size =
                    db.prepare("SELECT coalesce(sum(length(bytes)), 0) FROM body WHERE body.seq = ?")?;
                let rows = select.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)))?;
                rows.map(|row| {
                    let (seq, session) = row?;
                    // A damaged body is met by the work on its event, and holds up no start.
                    let size = size.query_row([seq], |row| row.get(0)).unwrap_or_default();
                    Ok((seq, session, unsigned(size)))
                })
                .collect()
            })
            .await
    }

    /// Whether the gateway has answered an event; none for one that is done.
    pub(crate) async fn is_answered(&self, seq: i64) -> Result<Option<bool>, Failure> {
        self.database
            .read(move |db| {
                db.prepare_cached("SELECT state FROM event WHERE seq = ? AND state < 2")?
                    .query_row([seq], |row| Ok(row.get::<_, i64>(0)? == 1))
                    .optional()
            })
            .await
    }

    /// None for an event that is done.
    pub(crate) async fn load(&self, seq: i64) -> Result<Option<OpenEvent>, Failure> {
        self.database
            .read(move |db| {
                let row = db
                    .prepare_cached(
                        "SELECT id, session, channel, state FROM event WHERE seq = ? AND state < 2",
                    )?
                    .query_row([seq], |row| {
                        Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, i64>(3)? == 1))
                    })
                    .optional()?;
                let Some((id, session, channel, is_answered)) = row else { return Ok(None) };
                let size: i64 = db
                    .prepare_cached("SELECT coalesce(sum(length(bytes)), 0) FROM body WHERE seq = ?")?
                    .query_row([seq], |row| row.get(0))?;
                let mut body = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
                let mut pieces = db.prepare_cached("SELECT bytes FROM body WHERE seq = ? ORDER BY n")?;
                let mut rows = pieces.query([seq])?;
                while let Some(row) = rows.next()? {
                    body.extend_from_slice(row.get_ref(0)?.as_blob()?);
                }
                let mut parts =
                    db.prepare_cached("SELECT n, text FROM part WHERE seq = ? AND sent = 0 ORDER BY n")?;
                let parts = parts
                    .query_map([seq], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect::<Result<_, _>>()?;
                Ok(Some(OpenEvent { id, session, channel, is_answered, body, parts }))
            })
            .await
    }

    /// Stores the answer of an event, in parts. After this the gateway is not asked again.
    pub(crate) async fn answered(&self, seq: i64, parts: Vec<String>) -> Result<(), Failure> {
        self.database
            .write(move |db| {
                db.prepare_cached("UPDATE event SET state = 1 WHERE seq = ? AND state = 0")?
                    .execute([seq])?;
                let mut insert = db.prepare_cached("INSERT OR IGNORE INTO part VALUES (?, ?, ?, 0)")?;
                for (n, text) in parts.iter().enumerate() {
                    insert.execute(params![seq, signed(n as u64), text])?;
                }
                Ok(())
            })
            .await
    }

    /// Stores that a part has been sent.
    pub(crate) async fn sent(&self, seq: i64, part: i64) -> Result<(), Failure> {
        self.database
            .write(move |db| {
                db.prepare_cached("UPDATE part SET sent = 1 WHERE seq = ? AND n = ?")?
                    .execute([seq, part])?;
                Ok(())
            })
            .await
    }

    /// Ends an event. Its words go; id and outcome stay.
    pub(crate) async fn done(&self, seq: i64, outcome: String) -> Result<(), Failure> {
        self.database
            .write(move |db| {
                db.prepare_cached("UPDATE event SET state = 2, done_ms = ?, outcome = ? WHERE seq = ?")?
                    .execute(params![signed(now_ms()), outcome, seq])?;
                db.prepare_cached("DELETE FROM body WHERE seq = ?")?.execute([seq])?;
                db.prepare_cached("DELETE FROM part WHERE seq = ?")?.execute([seq])?;
                Ok(())
            })
            .await
    }

    pub(crate) async fn depth(&self) -> Result<Depth, Failure> {
        self.database
            .read(|db| {
                let mut depth = Depth::default();
                let mut select = db.prepare_cached(
                    "SELECT state, count(*), min(received_ms) FROM event WHERE state < 2 GROUP BY state",
                )?;
                let mut rows = select.query([])?;
                while let Some(row) = rows.next()? {
                    let count = unsigned(row.get(1)?);
                    if row.get::<_, i64>(0)? == 0 {
                        depth.waiting = count;
                    } else {
                        depth.answered = count;
                    }
                    let oldest = u64::try_from(row.get::<_, i64>(2)?).ok();
                    depth.oldest_ms = depth.oldest_ms.into_iter().chain(oldest).min();
                }
                Ok(depth)
            })
            .await
    }

    /// Forgets ids for which no second delivery can come.
    pub(crate) async fn prune(&self, now: u64) -> Result<(), Failure> {
        self.database
            .write(move |db| {
                let before = |span: u64| signed(now.saturating_sub(span));
                db.execute("DELETE FROM event WHERE state = 2 AND done_ms < ?", [before(KEPT_MS)])?;
                let done: i64 =
                    db.query_row("SELECT count(*) FROM event WHERE state = 2", [], |r| r.get(0))?;
                if done > DONE_MAX {
                    db.execute(
                    "DELETE FROM event WHERE seq IN (SELECT seq FROM event WHERE state = 2 AND done_ms < ?
                     ORDER BY done_ms LIMIT ?)",
                    [before(KEPT_AT_LEAST_MS), done - DONE_MAX],
                )?;
                }
                Ok(())
            })
            .await
    }

    /// Gives back some of the free pages of the file, which goes to the bucket as it is. Returns whether
    /// there are more.
    pub(crate) async fn shrink(&self) -> Result<bool, Failure> {
        let shrunk = self.database.write_and_then(shrink, |db, shrunk| {
            // The file is as large as ever until the log has been written back to it.
            if *shrunk != Shrunk::Nothing {
                let _ = db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
            }
        });
        Ok(shrunk.await? == Shrunk::More)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shrunk {
    Nothing,
    /// All free pages that need not stay are given back.
    Enough,
    /// There are more to give back.
    More,
}

fn shrink(db: &Connection) -> rusqlite::Result<Shrunk> {
    let free: i64 = db.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    let is_busy: bool = db
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM event WHERE state < 2)")?
        .query_row([], |row| row.get(0))?;
    let kept = if is_busy { FREE_BUSY } else { FREE_IDLE };
    if free <= kept {
        return Ok(Shrunk::Nothing);
    }
    let round = (free - kept).min(FREE_ROUND);
    let mut vacuum = db.prepare(&format!("PRAGMA incremental_vacuum({round})"))?;
    let mut rows = vacuum.query([])?;
    while rows.next()?.is_some() {}
    Ok(if free - round > kept { Shrunk::More } else { Shrunk::Enough })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::database::tests::hold_the_writer;
    use super::*;
    use std::pin::Pin;
    use std::task::Poll;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    async fn put(queue: &Queue, id: &str, session: &str) -> Accepted {
        queue
            .accept(id.into(), session.into(), "telegram".into(), vec![b"{".to_vec(), b"}".to_vec()])
            .await
            .unwrap()
    }

    #[test]
    fn an_event_is_taken_once_and_known_for_as_long_as_it_may_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            assert_eq!(put(&queue, "a", "s").await, Accepted::New(1));
            assert_eq!(put(&queue, "a", "t").await, Accepted::Known(Some((1, "s".to_owned()))));
            queue.done(1, "sent".into()).await.unwrap();
            assert_eq!(put(&queue, "a", "s").await, Accepted::Known(None));
            queue.prune(now_ms() + KEPT_MS - 1000).await.unwrap();
            assert_eq!(put(&queue, "a", "s").await, Accepted::Known(None));
            queue.prune(now_ms() + KEPT_MS + 1000).await.unwrap();
            assert!(matches!(put(&queue, "a", "s").await, Accepted::New(_)));
        });
    }

    #[test]
    fn what_was_accepted_is_there_in_the_next_run_as_far_as_it_had_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            put(&queue, "a", "s").await;
            put(&queue, "b", "s").await;
            queue.answered(1, vec!["one".into(), "two".into()]).await.unwrap();
            queue.sent(1, 0).await.unwrap();
            drop(queue);
            let (queue, _threads) = Queue::open(&path).unwrap();
            assert_eq!(queue.unfinished().await.unwrap(), [(1, "s".to_owned(), 2), (2, "s".to_owned(), 2)]);
            let open = queue.load(1).await.unwrap().unwrap();
            assert_eq!((open.is_answered, open.parts), (true, vec![(1, "two".to_owned())]));
            let open = queue.load(2).await.unwrap().unwrap();
            assert_eq!((open.is_answered, open.body.as_slice()), (false, &b"{}"[..]));
            let depth = queue.depth().await.unwrap();
            assert_eq!((depth.waiting, depth.answered, depth.oldest_ms.is_some()), (1, 1, true));
            queue.done(1, "sent".into()).await.unwrap();
            assert_eq!(queue.load(1).await.unwrap(), None);
        });
    }

    #[test]
    fn the_file_is_small_again_when_all_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            let body = || vec![vec![b'x'; 256 * 1024]; 16];
            for n in 0..6 {
                queue.accept(n.to_string(), "s".into(), "c".into(), body()).await.unwrap();
            }
            let size = || std::fs::metadata(&path).unwrap().len();
            assert!(size() > 20 << 20);
            for seq in 1..=6 {
                queue.done(seq, "sent".into()).await.unwrap();
            }
            while queue.shrink().await.unwrap() {}
            assert!(size() < 1 << 20, "{}", size());
        });
    }

    /// Asks for all of them before the writer goes on.
    async fn in_one_batch<T>(
        queue: &Queue,
        all: impl IntoIterator<Item = Pin<Box<dyn Future<Output = T>>>>,
    ) -> Vec<T> {
        let go = hold_the_writer(&queue.database);
        let mut all: Vec<_> = all.into_iter().collect();
        let mut found: Vec<Option<T>> = all.iter().map(|_| None).collect();
        let mut go = Some(go);
        std::future::poll_fn(|cx| {
            for (one, found) in all.iter_mut().zip(&mut found) {
                if found.is_none()
                    && let Poll::Ready(value) = one.as_mut().poll(cx)
                {
                    *found = Some(value);
                }
            }
            drop(go.take());
            if found.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        found.into_iter().flatten().collect()
    }

    fn accept(queue: &Queue, id: &str, body: Vec<u8>) -> Pin<Box<dyn Future<Output = bool>>> {
        let (queue, id) = (queue.clone(), id.to_owned());
        Box::pin(async move { queue.accept(id, "s".into(), "c".into(), vec![body]).await.is_ok() })
    }

    #[test]
    fn a_job_that_fails_takes_nothing_of_the_others_along() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            let bad = queue.clone();
            let fails: Pin<Box<dyn Future<Output = bool>>> = Box::pin(async move {
                bad.database
                    .write(|db| {
                        db.execute("INSERT INTO part VALUES (77, 0, 'half of it', 0)", [])?;
                        db.execute("INSERT INTO nowhere VALUES (1)", [])
                    })
                    .await
                    .is_ok()
            });
            let all = [accept(&queue, "a", b"{}".to_vec()), fails, accept(&queue, "b", b"{}".to_vec())];
            assert_eq!(in_one_batch(&queue, all).await, [true, false, true]);
            let halves = queue
                .database
                .read(|db| db.query_row("SELECT count(*) FROM part", [], |r| r.get::<_, i64>(0)));
            assert_eq!((halves.await.unwrap(), queue.unfinished().await.unwrap().len()), (0, 2));
        });
    }

    #[test]
    fn what_was_stored_is_there_and_nothing_else_when_the_disk_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            queue.database.write(|db| db.pragma_update(None, "max_page_count", 40)).await.unwrap();
            let all = ["a", "large", "b"]
                .map(|id| accept(&queue, id, vec![b'x'; if id == "large" { 1 << 20 } else { 10 }]));
            let taken = in_one_batch(&queue, all).await;
            assert!(!taken[1] && taken[2], "{taken:?}");
            for (id, taken) in ["a", "large", "b"].into_iter().zip(taken) {
                let there = queue
                    .database
                    .read(move |db| {
                        db.query_row("SELECT count(*) FROM event WHERE id = ?", [id], |r| r.get::<_, i64>(0))
                    })
                    .await;
                assert_eq!(there.unwrap() == 1, taken, "{id}");
            }
        });
    }

    /// Breaks the chain of pages that holds the body with this text.
    pub(crate) fn damage(path: &Path, text: &[u8]) {
        let db = Connection::open(path).unwrap();
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        drop(db);
        let mut bytes = std::fs::read(path).unwrap();
        let at = bytes.windows(text.len()).rposition(|window| window == text).unwrap();
        let page = at / 4096 * 4096;
        bytes[page..page + 4].copy_from_slice(&[0xff; 4]);
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes[page..page + 4], page as u64).unwrap();
    }

    #[test]
    fn a_damaged_row_refuses_nothing_but_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            let long: Vec<u8> = (0..3000).flat_map(|n| format!("word{n:05} ").into_bytes()).collect();
            assert!(accept(&queue, "bad", long).await && accept(&queue, "good", b"{}".to_vec()).await);
            drop(queue);
            damage(&path, b"word01500");
            let (queue, _threads) = Queue::open(&path).unwrap();
            assert_eq!(queue.unfinished().await.unwrap().len(), 2);
            let reader = queue.clone();
            let load: Pin<Box<dyn Future<Output = bool>>> =
                Box::pin(async move { !reader.load(1).await.is_err_and(|failure| failure.is_damage()) });
            let all =
                [accept(&queue, "before", b"{}".to_vec()), load, accept(&queue, "after", b"{}".to_vec())];
            assert_eq!(in_one_batch(&queue, all).await, [true, false, true]);
            assert_eq!(queue.load(2).await.unwrap().unwrap().body, b"{}");
        });
    }

    #[test]
    fn what_is_read_does_not_wait_for_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&dir.path().join("q.sqlite")).unwrap();
            assert!(accept(&queue, "a", b"{}".to_vec()).await);
            let held = hold_the_writer(&queue.database);
            assert_eq!(queue.load(1).await.unwrap().unwrap().body, b"{}");
            assert_eq!(queue.depth().await.unwrap().waiting, 1);
            drop(held);
        });
    }

    #[test]
    fn a_writer_that_is_gone_is_told() {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let (queue, threads) = Queue::open(&dir.path().join("q.sqlite")).unwrap();
            let asked = queue.database.write::<()>(|_| panic!("a bug")).await;
            assert!(asked.is_err());
            threads.ended().await;
            assert!(!accept(&queue, "a", b"{}".to_vec()).await);
        });
    }

    #[test]
    fn a_queue_of_a_later_version_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        drop(Queue::open(&path).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
        assert!(Queue::open(&path).err().unwrap().to_string().contains("version 9"));
    }
}
