//! `SQLite`: telling a database from other files, taking a consistent copy of one that is in use,
//! and knowing whether a copy is good.
//!
//! A copy is taken through `SQLite`'s own backup, which reads one committed state under `SQLite`'s own
//! locks. So a database is opened here through the same path as its writers, and by nobody else in
//! this process meanwhile: POSIX drops all locks of a process on a file with its first close.
//!
//! Refuses to change a database: no checkpoint, no schema. May import: `fault`, `rules`.

use crate::fault::Fault;
use crate::rules::SQLITE_MAGIC;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

/// How long a writer may hold a database before this try is given up; there is a next one.
const BUSY: Duration = Duration::from_secs(2);

/// Why there is no good copy now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoCopy {
    /// It was busy, or is gone: the next try may succeed.
    Later(String),
    /// It is damaged; the bucket keeps the last good one.
    Damaged(String),
}

pub(crate) fn has_magic(file: &Path) -> bool {
    let mut head = [0u8; 16];
    File::open(file).and_then(|mut f| f.read_exact(&mut head)).is_ok() && head == *SQLITE_MAGIC
}

/// Writes one committed state of the database at `from` to `to`, which is new.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), NoCopy> {
    let source = open(from).map_err(|e| judge(&e))?;
    let mut target = Connection::open(to).map_err(|e| judge(&e))?;
    // Nobody else sees it, and it is thrown away if we die.
    target.execute_batch("PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF;").map_err(|e| judge(&e))?;
    {
        let backup = rusqlite::backup::Backup::new(&source, &mut target).map_err(|e| judge(&e))?;
        // All pages in one step: one state, and a reader of the log like any other.
        match backup.step(-1).map_err(|e| judge(&e))? {
            rusqlite::backup::StepResult::Done => {}
            _ => return Err(NoCopy::Later("another program holds it".to_owned())),
        }
    }
    drop(source);
    let verdict = check_open(&target);
    drop(target);
    verdict.map_err(NoCopy::Damaged)
}

/// Writable, because a journal that a crash left behind must be rolled back first, as `SQLite` does
/// for whoever comes first; and without a checkpoint when we close.
fn open(file: &Path) -> rusqlite::Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let source = Connection::open_with_flags(file, flags)?;
    source.busy_timeout(BUSY)?;
    source.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    source.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    Ok(source)
}

/// Whether a database that nobody writes to is whole.
pub(crate) fn check(file: &Path) -> Result<(), String> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(file, flags).map_err(|e| words(&e))?;
    check_open(&db)
}

fn check_open(db: &Connection) -> Result<(), String> {
    let _ = db.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false);
    let verdict: String =
        db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(|e| words(&e))?;
    if verdict == "ok" { Ok(()) } else { Err("integrity_check finds damage".to_owned()) }
}

fn judge(error: &rusqlite::Error) -> NoCopy {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => NoCopy::Damaged(words(error)),
        _ => NoCopy::Later(words(error)),
    }
}

/// `SQLite`'s code, not its message, which may quote the schema.
fn words(error: &rusqlite::Error) -> String {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => "it is not a database".to_owned(),
        Some(ErrorCode::DatabaseCorrupt) => "it is damaged".to_owned(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => "another program holds it".to_owned(),
        Some(ErrorCode::CannotOpen) => "it cannot be opened".to_owned(),
        Some(ErrorCode::DiskFull) => "the disk is full".to_owned(),
        Some(code) => format!("{code:?}"),
        None => "it cannot be read".to_owned(),
    }
}

impl From<NoCopy> for Fault {
    fn from(no: NoCopy) -> Self {
        match no {
            NoCopy::Later(why) | NoCopy::Damaged(why) => Self::Other(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        (dir, a, b)
    }

    fn count(file: &Path) -> i64 {
        Connection::open(file).unwrap().query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
    }

    #[test]
    fn what_is_committed_but_only_in_the_log_is_in_the_copy() {
        for mode in ["WAL", "DELETE", "TRUNCATE", "PERSIST"] {
            let (_dir, a, b) = files();
            let db = Connection::open(&a).unwrap();
            db.execute_batch(&format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES (1);"
            ))
            .unwrap();
            db.execute_batch("BEGIN; INSERT INTO t VALUES (2);").unwrap();
            if mode == "WAL" {
                copy(&a, &b).unwrap();
                assert_eq!(count(&b), 1, "an open transaction is not in the copy");
                std::fs::remove_file(&b).unwrap();
            }
            db.execute_batch("COMMIT").unwrap();
            copy(&a, &b).unwrap();
            assert_eq!(count(&b), 2, "{mode}");
            assert!(has_magic(&b) && check(&b).is_ok());
        }
    }

    #[test]
    fn a_copy_does_not_touch_its_source() {
        let (_dir, a, b) = files();
        let db = Connection::open(&a).unwrap();
        db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);").unwrap();
        let wal = a.with_extension("-wal").with_file_name("a-wal");
        let before = (std::fs::read(&a).unwrap(), std::fs::read(&wal).unwrap());
        copy(&a, &b).unwrap();
        assert!(before == (std::fs::read(&a).unwrap(), std::fs::read(&wal).unwrap()));
    }

    #[test]
    fn damage_is_told_from_being_busy() {
        let (_dir, a, b) = files();
        let db = Connection::open(&a).unwrap();
        db.execute_batch(
            "CREATE TABLE t(x); PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; INSERT INTO t VALUES (1);",
        )
        .unwrap();
        assert!(matches!(copy(&a, &b), Err(NoCopy::Later(_))));
        drop(db);
        let mut bytes = std::fs::read(&a).unwrap();
        bytes[100..].fill(0xaa);
        std::fs::write(&a, bytes).unwrap();
        let _ = std::fs::remove_file(&b);
        assert!(matches!(copy(&a, &b), Err(NoCopy::Damaged(_))));
    }
}
