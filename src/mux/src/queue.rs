//! The queue: a `SQLite` database in which every accepted event lives until it is answered.
//!
//! ```text
//! waiting ── the gateway's answer, cut into parts ──> answered ── all parts sent ──> done
//!    └──────────── nothing to answer, or a final refusal ───────────────────────────^
//! ```
//!
//! One thread writes. What comes in while it waits for the disk goes into the next transaction
//! together, so that an fsync is paid once for many. Of what is done the id and the outcome stay, so
//! that a second delivery is known; the words go.
//!
//! Refuses to yield before a commit is on the disk. May import: `desk` (the clock).

use crate::desk::now_ms;
use rusqlite::{Connection, OptionalExtension as _, params};
use std::fmt;
use std::path::Path;
use std::sync::mpsc;
use tokio::sync::oneshot;

/// Jobs that share one transaction.
const BATCH: usize = 128;
/// A second delivery comes within the server's day. Ids are kept this long, and when there are very
/// many no longer than the second.
const KEPT_MS: u64 = 7 * 24 * 3600 * 1000;
const KEPT_AT_LEAST_MS: u64 = 2 * 24 * 3600 * 1000;
const DONE_MAX: i64 = 100_000;
/// Free pages of 4 KiB that stay for what comes next, while something is open and while nothing is.
const FREE_BUSY: i64 = 1024;
const FREE_IDLE: i64 = 64;
/// Pages in one transaction: acknowledgements wait for it.
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

/// What follows the transaction, whatever became of it.
type Finish = Box<dyn FnOnce(&Connection, Result<(), Failure>) + Send>;
type Job = Box<dyn FnOnce(&Connection) -> (bool, Finish) + Send>;

/// The queue did not take or yield something; nothing of it has happened.
#[derive(Debug, Clone)]
pub(crate) struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the queue: {}; look at the room on the volume (`cvm doctor`)", self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Accepted {
    New(i64),
    /// The same event once more, with its number and session while it is not done.
    Known(Option<(i64, String)>),
}

/// An event that is not done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) id: String,
    pub(crate) session: String,
    pub(crate) channel: String,
    pub(crate) answered: bool,
    pub(crate) body: Vec<u8>,
    /// Number and text of what is still to be sent.
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
    jobs: mpsc::Sender<Job>,
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

impl Queue {
    /// Opens it, and makes it where there is none. The thread ends when the last handle is gone.
    pub(crate) fn open(path: &Path) -> Result<(Self, std::thread::JoinHandle<()>), Failure> {
        let mut db = connect(path).map_err(|e| Failure(e.to_string()))?;
        let (jobs, orders) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new()
            .name("queue".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                while let Ok(first) = orders.recv() {
                    let more = std::iter::from_fn(|| orders.try_recv().ok()).take(BATCH - 1);
                    let batch: Vec<Job> = std::iter::once(first).chain(more).collect();
                    carry_out(&mut db, batch);
                }
            })
            .map_err(|e| Failure(e.to_string()))?;
        Ok((Self { jobs }, thread))
    }

    /// Does `work` in the next transaction, and yields when that is on the disk.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |db| {
            let done = work(db);
            let finish: Finish = match done {
                // Whoever asked may be gone.
                Ok(value) => Box::new(move |_, committed| drop(tell.send(committed.map(|()| value)))),
                Err(error) => {
                    let failure = Failure(error.to_string());
                    return (false, Box::new(move |_, _| drop(tell.send(Err(failure)))));
                }
            };
            (true, finish)
        });
        self.send(job, told).await
    }

    async fn send<T>(&self, job: Job, told: oneshot::Receiver<Result<T, Failure>>) -> Result<T, Failure> {
        self.jobs.send(job).map_err(|_| Failure("it is closed".to_owned()))?;
        told.await.map_err(|_| Failure("it cannot begin to write".to_owned()))?
    }

    pub(crate) async fn accept(
        &self,
        id: String,
        session: String,
        channel: String,
        body: Vec<Vec<u8>>,
    ) -> Result<Accepted, Failure> {
        self.run(move |db| {
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

    /// What is not done, in the order of its arrival, with its session and size.
    pub(crate) async fn unfinished(&self) -> Result<Vec<(i64, String, u64)>, Failure> {
        self.run(|db| {
            let mut select = db.prepare(
                "SELECT seq, session, (SELECT coalesce(sum(length(bytes)), 0) FROM body WHERE body.seq = event.seq)
                 FROM event WHERE state < 2 ORDER BY seq",
            )?;
            let rows = select.query_map([], |row| {
                Ok((row.get(0)?, row.get(1)?, u64::try_from(row.get::<_, i64>(2)?).unwrap_or_default()))
            })?;
            rows.collect()
        })
        .await
    }

    /// Whether the gateway has answered it; none when it is done.
    pub(crate) async fn is_answered(&self, seq: i64) -> Result<Option<bool>, Failure> {
        self.run(move |db| {
            db.prepare_cached("SELECT state FROM event WHERE seq = ? AND state < 2")?
                .query_row([seq], |row| Ok(row.get::<_, i64>(0)? == 1))
                .optional()
        })
        .await
    }

    /// None when it is done.
    pub(crate) async fn load(&self, seq: i64) -> Result<Option<Open>, Failure> {
        self.run(move |db| {
            let row = db
                .prepare_cached("SELECT id, session, channel, state FROM event WHERE seq = ? AND state < 2")?
                .query_row([seq], |row| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, i64>(3)? == 1))
                })
                .optional()?;
            let Some((id, session, channel, answered)) = row else { return Ok(None) };
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
            let parts =
                parts.query_map([seq], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
            Ok(Some(Open { id, session, channel, answered, body, parts }))
        })
        .await
    }

    /// The answer, in parts. From here on the gateway is not asked again.
    pub(crate) async fn answered(&self, seq: i64, parts: Vec<String>) -> Result<(), Failure> {
        self.run(move |db| {
            db.prepare_cached("UPDATE event SET state = 1 WHERE seq = ? AND state = 0")?.execute([seq])?;
            let mut insert = db.prepare_cached("INSERT OR IGNORE INTO part VALUES (?, ?, ?, 0)")?;
            for (n, text) in parts.iter().enumerate() {
                insert.execute(params![seq, signed(n as u64), text])?;
            }
            Ok(())
        })
        .await
    }

    pub(crate) async fn sent(&self, seq: i64, part: i64) -> Result<(), Failure> {
        self.run(move |db| {
            db.prepare_cached("UPDATE part SET sent = 1 WHERE seq = ? AND n = ?")?.execute([seq, part])?;
            Ok(())
        })
        .await
    }

    /// The end of an event. Its words go; id and outcome stay.
    pub(crate) async fn done(&self, seq: i64, outcome: String) -> Result<(), Failure> {
        self.run(move |db| {
            db.prepare_cached("UPDATE event SET state = 2, done_ms = ?, outcome = ? WHERE seq = ?")?
                .execute(params![signed(now_ms()), outcome, seq])?;
            db.prepare_cached("DELETE FROM body WHERE seq = ?")?.execute([seq])?;
            db.prepare_cached("DELETE FROM part WHERE seq = ?")?.execute([seq])?;
            Ok(())
        })
        .await
    }

    pub(crate) async fn depth(&self) -> Result<Depth, Failure> {
        self.run(|db| {
            let mut depth = Depth::default();
            let mut select = db.prepare_cached(
                "SELECT state, count(*), min(received_ms) FROM event WHERE state < 2 GROUP BY state",
            )?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let count = u64::try_from(row.get::<_, i64>(1)?).unwrap_or_default();
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

    /// Forgets ids that no second delivery can come for, and gives room back.
    pub(crate) async fn prune(&self, now: u64) -> Result<(), Failure> {
        self.run(move |db| {
            let before = |span: u64| signed(now.saturating_sub(span));
            db.execute("DELETE FROM event WHERE state = 2 AND done_ms < ?", [before(KEPT_MS)])?;
            let done: i64 = db.query_row("SELECT count(*) FROM event WHERE state = 2", [], |r| r.get(0))?;
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

    /// Gives some of the room back that nothing needs: all but a little when nothing is open. With a
    /// bucket the file goes there as it is. Yields whether there is more.
    pub(crate) async fn shrink(&self) -> Result<bool, Failure> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |db| {
            let outcome = shrink(db);
            let good = outcome.is_ok();
            let finish: Finish = Box::new(move |db, committed| {
                let outcome = outcome.map_err(|e| Failure(e.to_string()));
                let outcome = committed.and(outcome).map(|left| {
                    // The file is as large as ever until the log has been written back to it.
                    if left.is_some() {
                        let _ = db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
                    }
                    left == Some(true)
                });
                drop(tell.send(outcome));
            });
            (good, finish)
        });
        self.send(job, told).await
    }
}

/// Whether there is more to give back; none when nothing was.
fn shrink(db: &Connection) -> rusqlite::Result<Option<bool>> {
    let free: i64 = db.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    let busy: bool = db
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM event WHERE state < 2)")?
        .query_row([], |row| row.get(0))?;
    let kept = if busy { FREE_BUSY } else { FREE_IDLE };
    if free <= kept {
        return Ok(None);
    }
    let round = (free - kept).min(FREE_ROUND);
    let mut vacuum = db.prepare(&format!("PRAGMA incremental_vacuum({round})"))?;
    let mut rows = vacuum.query([])?;
    while rows.next()?.is_some() {}
    Ok(Some(free - round > kept))
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(std::time::Duration::from_secs(5))?;
    let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == 0 {
        // Only a database without tables takes this.
        db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    }
    db.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledgement is a promise that outlives a loss of power.
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "cache_size", -1024)?;
    db.pragma_update(None, "journal_size_limit", 4 * 1024 * 1024)?;
    if version == 0 {
        let version = SCHEMA_VERSION;
        db.execute_batch(&format!("BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version = {version};COMMIT;"))?;
    } else if version != SCHEMA_VERSION {
        return Err(rusqlite::Error::ToSqlConversionFailure(
            format!("it has version {version}, and this program knows {SCHEMA_VERSION}; use the image that wrote it").into(),
        ));
    }
    Ok(db)
}

/// One transaction for all; when one fails, none has happened.
fn carry_out(db: &mut Connection, batch: Vec<Job>) {
    let mut finishes = Vec::with_capacity(batch.len());
    let outcome = (|| {
        let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut good = true;
        for job in batch {
            let (ok, finish) = job(&transaction);
            good &= ok;
            finishes.push(finish);
        }
        if good { transaction.commit().map(|()| true) } else { transaction.rollback().map(|()| false) }
    })();
    let verdict = match outcome {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure("another write of the same moment failed".to_owned())),
        Err(error) => Err(Failure(rusqlite::Error::to_string(&error))),
    };
    for finish in finishes {
        finish(db, verdict.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let (queue, _thread) = Queue::open(&path).unwrap();
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
    fn what_was_accepted_is_there_in_the_next_life_as_far_as_it_had_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, thread) = Queue::open(&path).unwrap();
            put(&queue, "a", "s").await;
            put(&queue, "b", "s").await;
            queue.answered(1, vec!["one".into(), "two".into()]).await.unwrap();
            queue.sent(1, 0).await.unwrap();
            drop(queue);
            thread.join().unwrap();
            let (queue, _thread) = Queue::open(&path).unwrap();
            assert_eq!(queue.unfinished().await.unwrap(), [(1, "s".to_owned(), 2), (2, "s".to_owned(), 2)]);
            let open = queue.load(1).await.unwrap().unwrap();
            assert_eq!((open.answered, open.parts), (true, vec![(1, "two".to_owned())]));
            let open = queue.load(2).await.unwrap().unwrap();
            assert_eq!((open.answered, open.body.as_slice()), (false, &b"{}"[..]));
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
            let (queue, _thread) = Queue::open(&path).unwrap();
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

    #[test]
    fn a_queue_of_a_later_version_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        drop(Queue::open(&path).unwrap());
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
        assert!(Queue::open(&path).err().unwrap().to_string().contains("version 9"));
    }
}
