//! The database of the queue, with one thread that writes and one that reads.
//!
//! What comes in while the writer waits for the disk goes into the next transaction together, so that
//! one fsync is paid for many. Each job has a savepoint, so that one that fails undoes nothing of the
//! others. The reader has a connection of its own: a row that cannot be read holds up no write.

use rusqlite::{Connection, ErrorCode};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Jobs that share one transaction.
const BATCH: usize = 128;
const BUSY_TIME: Duration = Duration::from_secs(5);

/// Work in a transaction: whether it is kept, and what follows the transaction.
type Job = Box<dyn FnOnce(&Connection) -> (bool, Finish) + Send>;
type Finish = Box<dyn FnOnce(&Connection, Result<(), Failure>)>;
type Read = Box<dyn FnOnce(&Connection) + Send>;

/// The queue has not stored or not found something, and has not changed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    why: String,
    /// The file is broken, so that trying again does not help.
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

#[derive(Clone)]
pub(super) struct Database {
    jobs: mpsc::Sender<Job>,
    reads: mpsc::Sender<Read>,
}

/// The threads of a database. They end with its last handle, or by a panic.
pub(crate) struct Threads(Arc<Notify>);

impl Threads {
    /// Waits until one of them has ended. From then on the queue stores or finds nothing.
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

/// A thread with a small stack, since all it does is SQL.
fn start(name: &str, ended: &Arc<Notify>, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let ending = Ending(Arc::clone(ended));
    let work = move || {
        let _ending = ending;
        work();
    };
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(256 * 1024);
    builder.spawn(work).map(drop).map_err(|e| Failure::new(e.to_string()))
}

impl Database {
    /// Opens the file, and makes it with these tables where there is none.
    pub(super) fn open(path: &Path, schema: &str, version: i64) -> Result<(Self, Threads), Failure> {
        let (writer, reader) = (connect(path, schema, version)?, connect_to_read(path)?);
        let (jobs, queued_jobs) = mpsc::channel::<Job>();
        let (reads, queued_reads) = mpsc::channel::<Read>();
        let ended = Arc::new(Notify::new());
        start("queue", &ended, move || {
            while let Ok(first) = queued_jobs.recv() {
                let more = std::iter::from_fn(|| queued_jobs.try_recv().ok()).take(BATCH - 1);
                run_batch(&writer, std::iter::once(first).chain(more).collect());
            }
        })?;
        start("queue-reader", &ended, move || queued_reads.iter().for_each(|read| read(&reader)))?;
        Ok((Self { jobs, reads }, Threads(ended)))
    }

    /// Does `work` in the next transaction, and returns when that is on the disk.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        self.write_and_then(work, |_, _| ()).await
    }

    /// Like `write`, with something to do after the transaction, before the next one.
    pub(super) async fn write_and_then<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
        then: impl FnOnce(&Connection, &T) + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |db| {
            let done = work(db).map_err(Failure::from);
            let is_kept = done.is_ok();
            let finish: Finish = Box::new(move |db, committed| {
                let outcome = done.and_then(|value| committed.map(|()| value));
                if let Ok(value) = &outcome {
                    then(db, value);
                }
                // The task that asked may be gone.
                drop(tell.send(outcome));
            });
            (is_kept, finish)
        });
        self.jobs.send(job).map_err(|_| Failure::new("its writer has ended"))?;
        told.await.map_err(|_| Failure::new("it cannot begin to write"))?
    }

    /// What `work` reads in one transaction, in which all is that was stored before.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (tell, told) = oneshot::channel();
        let read: Read = Box::new(move |db| {
            let found = db.unchecked_transaction().and_then(|snapshot| work(&snapshot));
            drop(tell.send(found.map_err(Failure::from)));
        });
        self.reads.send(read).map_err(|_| Failure::new("its reader has ended"))?;
        told.await.map_err(|_| Failure::new("it cannot be read"))?
    }
}

fn connect(path: &Path, schema: &str, known: i64) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(BUSY_TIME)?;
    let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == 0 {
        // Only a database without tables takes this.
        db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    }
    db.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledgement is a promise that outlives a loss of power.
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "cache_size", -1024)?;
    // What a savepoint may have to undo stays in memory, so that words of a message are in this file only.
    db.pragma_update(None, "temp_store", "MEMORY")?;
    db.pragma_update(None, "journal_size_limit", 4 * 1024 * 1024)?;
    if version == 0 {
        db.execute_batch(&format!("BEGIN IMMEDIATE;{schema}PRAGMA user_version = {known};COMMIT;"))?;
    } else if version != known {
        return Err(rusqlite::Error::ToSqlConversionFailure(
            format!("it has version {version}, and this program knows {known}; use the image that wrote it")
                .into(),
        ));
    }
    Ok(db)
}

fn connect_to_read(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(BUSY_TIME)?;
    db.pragma_update(None, "query_only", true)?;
    db.pragma_update(None, "cache_size", -256)?;
    Ok(db)
}

/// One transaction for all jobs. A job that fails is undone alone. A transaction that fails undoes the
/// jobs that are in it, and the rest of the batch gets another one.
fn run_batch(db: &Connection, batch: Vec<Job>) {
    let mut jobs = batch.into_iter().peekable();
    while jobs.peek().is_some() {
        let mut finishes = Vec::with_capacity(jobs.len());
        let outcome = transact(db, &mut jobs, &mut finishes);
        if outcome.is_err() && !db.is_autocommit() {
            let _ = db.execute_batch("ROLLBACK");
        }
        if finishes.is_empty() {
            // No transaction can begin. The jobs are dropped, and those who asked get no answer.
            return;
        }
        let committed = outcome.map_err(Failure::from);
        for finish in finishes {
            finish(db, committed.clone());
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
        let (is_kept, finish) = job(db);
        finishes.push(finish);
        if !is_kept {
            // A full disk may have ended the whole transaction, and then this fails.
            db.execute_batch("ROLLBACK TO job")?;
        }
        db.execute_batch("RELEASE job")?;
    }
    db.execute_batch("COMMIT")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Makes one batch of all that is asked meanwhile: the writer waits until the sender is dropped.
    pub(crate) fn hold_the_writer(database: &Database) -> mpsc::Sender<()> {
        let (go, wait) = mpsc::channel::<()>();
        let job: Job = Box::new(move |_| {
            let _ = wait.recv();
            let finish: Finish = Box::new(|_, _| {});
            (true, finish)
        });
        database.jobs.send(job).unwrap();
        go
    }
}
