//! The queue: a `SQLite` database in which every accepted event lives until it is answered.
//!
//! ```text
//! waiting ── the gateway's answer, cut into parts ──> answered ── all parts sent ──> done
//!    └──────────── nothing to answer, or a final refusal ───────────────────────────^
//! ```
//!
//! One thread writes. What comes in while it waits for the disk goes into the next transaction
//! together, so that an fsync is paid once for many; each job has a savepoint in it, so that one that
//! fails takes nothing of the others along. Another thread reads, on a connection of its own: what
//! cannot be read refuses nothing that is to be written. Of what is done the id and the outcome stay,
//! so that a second delivery is known; the words go.
//!
//! Refuses to yield before a commit is on the disk. May import: `desk` (the clock).

use crate::desk::now_ms;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, params};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use tokio::sync::{Notify, oneshot};

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
type Read = Box<dyn FnOnce(&Connection) + Send>;

/// The queue did not take or yield something; nothing of it has happened.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    why: String,
    /// What the file holds is broken: trying again does not help.
    is_damage: bool,
}

impl Failure {
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), is_damage: false }
    }

    pub(crate) fn is_damage(&self) -> bool {
        self.is_damage
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType};
        let code = error.sqlite_error_code();
        let is_damage = matches!(code, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
            || matches!(
                error,
                FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..)
            );
        Self { why: error.to_string(), is_damage }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = if self.is_damage {
            "it is damaged; stop the machine and move the file away to go on with an empty one"
        } else {
            "look at the room on the volume (`cvm doctor`)"
        };
        write!(f, "the queue: {}; {remedy}", self.why)
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
    reads: mpsc::Sender<Read>,
}

/// The threads of a queue. They end when its last handle is gone, and by a bug.
pub(crate) struct Threads(Arc<Notify>);

impl Threads {
    /// Waits until one of them has ended. From then on the queue takes or yields nothing.
    pub(crate) async fn ended(&self) {
        self.0.notified().await;
    }
}

/// Tells of the end of a thread, however it comes.
struct Ending(Arc<Notify>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

/// A thread with a small stack, since all it does is SQL.
fn thread(name: &str, ended: &Arc<Notify>, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let ending = Ending(Arc::clone(ended));
    let work = move || {
        let _ending = ending;
        work();
    };
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(256 * 1024);
    builder.spawn(work).map(drop).map_err(|e| Failure::new(e.to_string()))
}

impl Queue {
    /// Opens it, and makes it where there is none.
    pub(crate) fn open(path: &Path) -> Result<(Self, Threads), Failure> {
        let (writes, reader) = (connect(path)?, connect_to_read(path)?);
        let (jobs, orders) = mpsc::channel::<Job>();
        let (reads, questions) = mpsc::channel::<Read>();
        let ended = Arc::new(Notify::new());
        let write = move || {
            while let Ok(first) = orders.recv() {
                let more = std::iter::from_fn(|| orders.try_recv().ok()).take(BATCH - 1);
                carry_out(&writes, std::iter::once(first).chain(more).collect());
            }
        };
        let read = move || questions.iter().for_each(|question| question(&reader));
        thread("queue", &ended, write)?;
        thread("queue-reader", &ended, read)?;
        Ok((Self { jobs, reads }, Threads(ended)))
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
                    let failure = Failure::from(error);
                    return (false, Box::new(move |_, _| drop(tell.send(Err(failure)))));
                }
            };
            (true, finish)
        });
        self.send(job, told).await
    }

    async fn send<T>(&self, job: Job, told: oneshot::Receiver<Result<T, Failure>>) -> Result<T, Failure> {
        self.jobs.send(job).map_err(|_| Failure::new("it is closed"))?;
        told.await.map_err(|_| Failure::new("it cannot begin to write"))?
    }

    /// What `work` reads in one transaction: everything that was yielded before is in it.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = oneshot::channel();
        let read: Read = Box::new(move |db| {
            let found = db.unchecked_transaction().and_then(|snapshot| work(&snapshot));
            drop(tell.send(found.map_err(Failure::from)));
        });
        self.reads.send(read).map_err(|_| Failure::new("it is closed"))?;
        told.await.map_err(|_| Failure::new("it cannot be read"))?
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
        self.read(|db| {
            let mut select = db.prepare("SELECT seq, session FROM event WHERE state < 2 ORDER BY seq")?;
            let mut size =
                db.prepare("SELECT coalesce(sum(length(bytes)), 0) FROM body WHERE body.seq = ?")?;
            let rows = select.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)))?;
            rows.map(|row| {
                let (seq, session) = row?;
                // One whose body is damaged holds up no start: who works on it will see.
                let size: i64 = size.query_row([seq], |row| row.get(0)).unwrap_or_default();
                Ok((seq, session, u64::try_from(size).unwrap_or_default()))
            })
            .collect()
        })
        .await
    }

    /// Whether the gateway has answered it; none when it is done.
    pub(crate) async fn is_answered(&self, seq: i64) -> Result<Option<bool>, Failure> {
        self.read(move |db| {
            db.prepare_cached("SELECT state FROM event WHERE seq = ? AND state < 2")?
                .query_row([seq], |row| Ok(row.get::<_, i64>(0)? == 1))
                .optional()
        })
        .await
    }

    /// None when it is done.
    pub(crate) async fn load(&self, seq: i64) -> Result<Option<Open>, Failure> {
        self.read(move |db| {
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
        self.read(|db| {
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
                let outcome = outcome.map_err(Failure::from);
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
    // What a savepoint may have to take back stays in memory: words of a message are in this file only.
    db.pragma_update(None, "temp_store", "MEMORY")?;
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

fn connect_to_read(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(std::time::Duration::from_secs(5))?;
    db.pragma_update(None, "query_only", true)?;
    db.pragma_update(None, "cache_size", -256)?;
    Ok(db)
}

/// One transaction for all. A job that fails is taken back alone; a transaction that fails takes
/// those along that are in it, and what is left of the batch gets another one.
fn carry_out(db: &Connection, batch: Vec<Job>) {
    let mut jobs = batch.into_iter().peekable();
    while jobs.peek().is_some() {
        let mut finishes = Vec::with_capacity(jobs.len());
        let outcome = transact(db, &mut jobs, &mut finishes);
        if outcome.is_err() && !db.is_autocommit() {
            let _ = db.execute_batch("ROLLBACK");
        }
        if finishes.is_empty() {
            // It cannot begin: who asked sees that nobody answers.
            return;
        }
        let verdict = outcome.map_err(Failure::from);
        for finish in finishes {
            finish(db, verdict.clone());
        }
    }
}

fn transact(
    db: &Connection,
    jobs: &mut impl Iterator<Item = Job>,
    finishes: &mut Vec<Finish>,
) -> rusqlite::Result<()> {
    db.execute_batch("BEGIN IMMEDIATE")?;
    for job in jobs {
        db.execute_batch("SAVEPOINT job")?;
        let (good, finish) = job(db);
        finishes.push(finish);
        if !good {
            // A full disk may have ended the whole transaction, and then this fails.
            db.execute_batch("ROLLBACK TO job")?;
        }
        db.execute_batch("RELEASE job")?;
    }
    db.execute_batch("COMMIT")
}

#[cfg(test)]
pub(crate) mod tests {
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
    fn what_was_accepted_is_there_in_the_next_life_as_far_as_it_had_come() {
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

    /// Makes all that is asked meanwhile one batch: the writer waits until `go` is dropped.
    fn hold_the_writer(queue: &Queue) -> mpsc::Sender<()> {
        let (go, wait) = mpsc::channel::<()>();
        let finish: Finish = Box::new(|_, _| {});
        let job: Job = Box::new(move |_| {
            let _ = wait.recv();
            (true, finish)
        });
        queue.jobs.send(job).unwrap();
        go
    }

    /// Asks for all of them before the writer goes on.
    async fn in_one_batch<T>(
        queue: &Queue,
        all: impl IntoIterator<Item = Pin<Box<dyn Future<Output = T>>>>,
    ) -> Vec<T> {
        let go = hold_the_writer(queue);
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
                bad.run(|db| {
                    db.execute("INSERT INTO part VALUES (77, 0, 'half of it', 0)", [])?;
                    db.execute("INSERT INTO nowhere VALUES (1)", [])
                })
                .await
                .is_ok()
            });
            let all = [accept(&queue, "a", b"{}".to_vec()), fails, accept(&queue, "b", b"{}".to_vec())];
            assert_eq!(in_one_batch(&queue, all).await, [true, false, true]);
            let halves =
                queue.read(|db| db.query_row("SELECT count(*) FROM part", [], |r| r.get::<_, i64>(0)));
            assert_eq!((halves.await.unwrap(), queue.unfinished().await.unwrap().len()), (0, 2));
        });
    }

    #[test]
    fn what_was_yielded_is_there_and_nothing_else_when_the_disk_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        runtime().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            queue.run(|db| db.pragma_update(None, "max_page_count", 40)).await.unwrap();
            let all = ["a", "large", "b"]
                .map(|id| accept(&queue, id, vec![b'x'; if id == "large" { 1 << 20 } else { 10 }]));
            let taken = in_one_batch(&queue, all).await;
            assert!(!taken[1] && taken[2], "{taken:?}");
            for (id, taken) in ["a", "large", "b"].into_iter().zip(taken) {
                let there = queue
                    .read(move |db| {
                        db.query_row("SELECT count(*) FROM event WHERE id = ?", [id], |r| r.get::<_, i64>(0))
                    })
                    .await;
                assert_eq!(there.unwrap() == 1, taken, "{id}");
            }
        });
    }

    /// Breaks the chain of pages on which the body of this event lies.
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
            let held = hold_the_writer(&queue);
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
            let asked = queue.run::<()>(|_| panic!("a bug")).await;
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
