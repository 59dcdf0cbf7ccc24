//! `SQLite`: telling a database from other files, taking a consistent copy of one that is in use,
//! and knowing whether a copy is good.
//!
//! A copy is taken through `SQLite`'s own backup, which reads one committed state under `SQLite`'s own
//! locks. So a database is opened here through the same path as its writers, and by nobody else in
//! this process meanwhile: see `copying`.
//!
//! `SQLite` rolls a journal back that it finds, and removes what the journal names. Both are the
//! agent's to write, so a database is only opened with the rights of its owner over files, and
//! root's only as root where nobody else may put a journal.
//!
//! Refuses to change a database: no checkpoint, no schema. May import: `copying`, `entry`, `fault`,
//! `opened`, `rules`, `volume`.

use crate::copying::Copying;
use crate::entry;
use crate::fault::Fault;
use crate::opened;
use crate::rules::SQLITE_MAGIC;
use crate::volume;
use cvm_sys::as_user::AsUser;
use nix::sys::stat::FileStat;
use nix::unistd::{Gid, Uid};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

/// How long a writer may hold a database before this try is given up; there is a next one.
const BUSY: Duration = Duration::from_secs(2);
/// How old a database and the journal of a transaction that was cut off are when nobody is about to finish
/// copying them.
const SETTLES: Duration = Duration::from_secs(5);
/// With this `integrity_check` begins what it says of pages.
const ABOUT_PAGES: &[u8] = b"*** in database";
pub(crate) const NOT_ONE: &str = "it is not a database";

/// Why there is no good copy now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoCopy {
    /// It was busy, or is gone: the next try may succeed.
    Later(String),
    /// It is damaged; the bucket keeps the last good one.
    Damaged(String),
    /// It begins like a database, and nothing else of it is as in one.
    NotOne,
}

/// What is wrong with a database that can be read: that is its application's to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remark {
    /// `integrity_check` finds rows that break a rule, or an index that lacks some.
    BreaksItsRules,
    OnlyItsApplicationChecks,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BreaksItsRules => "integrity_check finds rows that break a rule of its schema",
            Self::OnlyItsApplicationChecks => "only its application can check it",
        })
    }
}

pub(crate) fn has_magic(file: &Path) -> bool {
    volume::open_file(file).is_ok_and(|file| begins_like_one(&file))
}

/// Leaves it where it is to be read from.
pub(crate) fn begins_like_one(file: &File) -> bool {
    let mut head = [0u8; 16];
    file.read_exact_at(&mut head, 0).is_ok() && head == *SQLITE_MAGIC
}

/// Whose rights a database is opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    user: Uid,
    group: Gid,
}

const NOBODY: Owner = Owner { user: Uid::from_raw(65534), group: Gid::from_raw(65534) };

impl Owner {
    /// For the database at `path`, which has just been opened.
    pub(crate) fn of(top: &Path, path: &entry::Path, file: &File) -> Result<Self, Fault> {
        let of = file.metadata()?;
        let owner = Self { user: Uid::from_raw(of.uid()), group: Gid::from_raw(of.gid()) };
        if !owner.user.is_root() {
            return Ok(owner);
        }
        // Whoever may write to a directory on the way may put another one, and a journal, there.
        let mut next = path.parent();
        loop {
            let dir = next.as_ref().map_or_else(|| top.to_owned(), |dir| dir.below(top));
            let other = volume::look(&dir)?.and_then(|stat| Self::but_root(&stat));
            match (other, next) {
                (Some(other), _) => return Ok(other),
                (None, None) => return Ok(owner),
                (None, Some(dir)) => next = dir.parent(),
            }
        }
    }

    /// Who besides root may write to it.
    fn but_root(stat: &FileStat) -> Option<Self> {
        let shared = stat.st_mode & 0o002 != 0 || stat.st_mode & 0o020 != 0 && stat.st_gid != 0;
        match stat.st_uid {
            0 => shared.then_some(NOBODY),
            user => Some(Self { user: Uid::from_raw(user), group: Gid::from_raw(stat.st_gid) }),
        }
    }
}

/// Writes one committed state of the database at `from`, which is `owner`'s, to `to`, which is new.
pub(crate) fn copy(from: &Path, to: &Path, owner: Owner) -> Result<Option<Remark>, NoCopy> {
    copy_unless_new(from, to, owner, SETTLES)
}

/// What is beside it is rolled back only when neither has changed for so long.
fn copy_unless_new(
    from: &Path,
    to: &Path,
    owner: Owner,
    settles: Duration,
) -> Result<Option<Remark>, NoCopy> {
    let log = beside(from, "-wal")?;
    beside(from, "-shm")?;
    let journal = beside(from, "-journal")?;
    let owner = match journal.filter(|_| owner.user.is_root()).and_then(|stat| Owner::but_root(&stat)) {
        Some(other) => other,
        None => owner,
    };
    let copying = Copying::begin(from).map_err(|e| NoCopy::Later(Fault::from(e).to_string()))?;
    let Some(_copying) = copying else {
        return Err(NoCopy::Later("it is copied under another name".to_owned()));
    };
    // It is opened while we are root, in a directory of root's.
    let mut target = Connection::open(to).map_err(|e| judge(&e))?;
    // Nobody else sees it, and it is thrown away if we die.
    target.execute_batch("PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF;").map_err(|e| judge(&e))?;
    let acting = (owner.user != Uid::effective())
        .then(|| AsUser::of(owner.user, owner.group))
        .transpose()
        .map_err(|e| NoCopy::Later(format!("it cannot be opened as its owner: {}", e.desc())))?;
    if log.is_none() && journal.is_none() && is_at_rest(from, &mut target)? {
        drop(acting);
        return check_open(&target);
    }
    let is_new = |stat: &FileStat| Duration::from_nanos(volume::age_ns(stat)) < settles;
    match back_up(from, &mut target, OpenFlags::SQLITE_OPEN_READ_ONLY) {
        // A transaction was cut off, or somebody is copying both of them to here: to roll back what is half
        // copied would damage what becomes of it.
        Err(error) if wants_rolling_back(&error) => {
            let database = volume::look(from).map_err(|e| NoCopy::Later(e.to_string()))?;
            if database.iter().chain(&journal).any(is_new) {
                return Err(NoCopy::Later("a journal that is new lies beside it".to_owned()));
            }
            back_up(from, &mut target, OpenFlags::SQLITE_OPEN_READ_WRITE)
        }
        other => other,
    }
    .map_err(|e| judge(&e))?;
    drop(acting);
    check_open(&target)
}

/// Copies one that keeps a log when it is open, and has none: nobody has it open. So it is read as it is, for
/// who opens it otherwise makes the log and what belongs to it. True when nobody has opened it meanwhile.
fn is_at_rest(from: &Path, to: &mut Connection) -> Result<bool, NoCopy> {
    let look = || volume::look(from).map_err(|e| NoCopy::Later(e.to_string()));
    let mut head = [0; 20];
    let has_head = volume::open_file(from).is_ok_and(|file| file.read_exact_at(&mut head, 0).is_ok());
    if !has_head || !head.ends_with(&[2, 2]) {
        return Ok(false);
    }
    let before = look()?;
    let as_it_is = Path::new(OsStr::new(&as_it_is(from))).to_owned();
    let outcome = back_up(&as_it_is, to, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI);
    let is_same = match (before, look()?) {
        (Some(before), Some(after)) => {
            volume::ctime_ns(&before) == volume::ctime_ns(&after) && before.st_ino == after.st_ino
        }
        _ => false,
    };
    let is_at_rest = is_same && beside(from, "-wal")?.is_none() && beside(from, "-journal")?.is_none();
    if is_at_rest { outcome.map(|()| true).map_err(|e| judge(&e)) } else { Ok(false) }
}

/// Opened without writing, `SQLite` says this of a journal that it would have to roll back.
fn wants_rolling_back(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_READONLY_ROLLBACK)
}

/// All pages in one step: one state, and a reader of the log like any other.
fn back_up(from: &Path, to: &mut Connection, how: OpenFlags) -> rusqlite::Result<()> {
    let source = open(from, how)?;
    let backup = rusqlite::backup::Backup::new(&source, to)?;
    match backup.step(-1)? {
        rusqlite::backup::StepResult::Done => Ok(()),
        _ => Err(rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY), None)),
    }
}

/// What `SQLite` keeps beside a database.
fn beside(database: &Path, suffix: &str) -> Result<Option<FileStat>, NoCopy> {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    let found = volume::look(Path::new(&name)).map_err(|e| NoCopy::Later(e.to_string()))?;
    match found {
        Some(found) if volume::kind_of(&found) != libc::S_IFREG => {
            Err(NoCopy::Damaged(format!("what lies at its {suffix} is no file")))
        }
        found => Ok(found),
    }
}

/// Writable only where a journal that a crash left behind must be rolled back first, as `SQLite` does
/// for whoever comes first; and without a checkpoint when we close.
fn open(file: &Path, how: OpenFlags) -> rusqlite::Result<Connection> {
    opened::only_files();
    let flags = how | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let source = Connection::open_with_flags(file, flags)?;
    source.busy_timeout(BUSY)?;
    source.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    source.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    Ok(source)
}

/// Whether a database that nobody writes to is whole. As it is: what lies beside it may be a
/// journal of the agent's.
pub(crate) fn check(file: &Path) -> Result<(), String> {
    opened::only_files();
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let db = Connection::open_with_flags(as_it_is(file), flags).map_err(|e| words(&e))?;
    check_open(&db).map(drop).map_err(|no| match no {
        NoCopy::Damaged(why) | NoCopy::Later(why) => why,
        NoCopy::NotOne => NOT_ONE.to_owned(),
    })
}

fn as_it_is(file: &Path) -> String {
    let mut uri = "file:".to_owned();
    for byte in file.as_os_str().as_encoded_bytes() {
        // A String takes whatever is written to it.
        let _ = write!(uri, "%{byte:02X}");
    }
    uri + "?immutable=1"
}

/// Damage is what keeps pages from being read. Whatever else is wrong is its application's to mend.
fn check_open(db: &Connection) -> Result<Option<Remark>, NoCopy> {
    let _ = db.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false);
    // It quotes names, which may be damaged too.
    let verdict = |row: &rusqlite::Row<'_>| {
        Ok(row.get_ref(0)?.as_bytes().map_or(Verdict::Other, |words| match words {
            b"ok" => Verdict::Fine,
            words if words.starts_with(ABOUT_PAGES) => Verdict::Damaged,
            _ => Verdict::Other,
        }))
    };
    // What it says of pages comes first.
    match db.query_row("PRAGMA integrity_check(1)", [], verdict) {
        Ok(Verdict::Fine) => Ok(None),
        Ok(Verdict::Damaged) => Err(NoCopy::Damaged("integrity_check finds damage".to_owned())),
        Ok(Verdict::Other) => Ok(Some(Remark::BreaksItsRules)),
        // A function, an order or a tokenizer that its application has.
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::Unknown) => {
            read_tables(db)?;
            Ok(Some(Remark::OnlyItsApplicationChecks))
        }
        Err(error) => Err(judge(&error)),
    }
}

enum Verdict {
    Fine,
    Damaged,
    Other,
}

fn read_tables(db: &Connection) -> Result<(), NoCopy> {
    let tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0";
    let names =
        || db.prepare(tables)?.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>();
    let is_unknown = |error: &rusqlite::Error| error.sqlite_error_code() == Some(ErrorCode::Unknown);
    let names = names().map_err(|error| match error {
        // A format that nobody has.
        error if is_unknown(&error) => NoCopy::Damaged("SQLite does not know its format".to_owned()),
        error => judge(&error),
    })?;
    for name in names {
        let all = format!("SELECT count(*) FROM \"{}\" NOT INDEXED", name.replace('"', "\"\""));
        match db.query_row(&all, [], |_| Ok(())) {
            Err(error) if !is_unknown(&error) => return Err(judge(&error)),
            _ => {}
        }
    }
    Ok(())
}

fn judge(error: &rusqlite::Error) -> NoCopy {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => NoCopy::NotOne,
        Some(ErrorCode::DatabaseCorrupt) => NoCopy::Damaged(words(error)),
        _ => NoCopy::Later(words(error)),
    }
}

/// `SQLite`'s code, not its message, which may quote the schema.
fn words(error: &rusqlite::Error) -> String {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => NOT_ONE.to_owned(),
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
            NoCopy::NotOne => Self::other(NOT_ONE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, chown};

    fn files() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        (dir, a, b)
    }

    fn copied(from: &Path, to: &Path) -> Result<Option<Remark>, NoCopy> {
        let name = entry::Path::new(from.file_name().unwrap().as_encoded_bytes()).unwrap();
        let owner = Owner::of(from.parent().unwrap(), &name, &volume::open_file(from).unwrap()).unwrap();
        // Whatever is beside it, nobody is about to copy more of it.
        copy_unless_new(from, to, owner, Duration::ZERO)
    }

    fn may_be_entered(dir: &Path) {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A journal of a database with so many pages that was left behind, and names another file.
    fn hot_journal(pages: u32, names: &Path) -> Vec<u8> {
        let name = names.as_os_str().as_encoded_bytes();
        let magic = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
        let mut bytes = magic.to_vec();
        for number in [0, 0, pages, 512, 4096] {
            bytes.extend(u32::to_be_bytes(number));
        }
        bytes.resize(512, 0);
        bytes.extend(u32::to_be_bytes(0x4000_0000 / 4096 + 1));
        bytes.extend(name);
        bytes.extend(u32::to_be_bytes(u32::try_from(name.len()).unwrap()));
        bytes.extend(u32::to_be_bytes(name.iter().map(|b| u32::from(*b)).sum()));
        bytes.extend(magic);
        bytes
    }

    fn count(file: &Path) -> i64 {
        Connection::open(file).unwrap().query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
    }

    #[test]
    fn a_database_that_only_its_application_can_check_is_copied() {
        let (_dir, a, b) = files();
        let db = Connection::open(&a).unwrap();
        db.execute_batch(
            "CREATE TABLE t(x); CREATE INDEX i ON t(x COLLATE NOCASE); INSERT INTO t VALUES ('A');
             PRAGMA writable_schema = ON;
             UPDATE sqlite_schema SET sql = replace(sql, 'NOCASE', 'unicase') WHERE name = 'i';",
        )
        .unwrap();
        drop(db);
        let asked = Connection::open(&a).unwrap().query_row("PRAGMA integrity_check", [], |_| Ok(()));
        assert!(asked.unwrap_err().to_string().contains("no such collation"));
        copied(&a, &b).unwrap();
        assert_eq!(count(&b), 1);
        assert_eq!(check(&b), Ok(()));
        // What can be told without its application is told.
        let mut bytes = std::fs::read(&b).unwrap();
        bytes[4096..4104].fill(0xff);
        std::fs::write(&b, &bytes).unwrap();
        assert_eq!(check(&b), Err("it is damaged".to_owned()));
        bytes[44..48].fill(0xff);
        std::fs::write(&b, &bytes).unwrap();
        assert!(check(&b).is_err(), "a format that SQLite does not know is not its application's");
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
                copied(&a, &b).unwrap();
                assert_eq!(count(&b), 1, "an open transaction is not in the copy");
                std::fs::remove_file(&b).unwrap();
            }
            db.execute_batch("COMMIT").unwrap();
            copied(&a, &b).unwrap();
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
        copied(&a, &b).unwrap();
        assert!(before == (std::fs::read(&a).unwrap(), std::fs::read(&wal).unwrap()));
    }

    #[test]
    fn a_journal_that_has_just_been_copied_beside_it_is_not_rolled_back() {
        let (dir, a, b) = files();
        let db = Connection::open(&a).unwrap();
        // A transaction that does not fit into memory: what it has changed is in the file already.
        db.execute_batch("PRAGMA cache_size=5; CREATE TABLE t(x); INSERT INTO t VALUES (1); BEGIN;").unwrap();
        for _ in 0..100 {
            db.execute("INSERT INTO t VALUES (zeroblob(3000))", []).unwrap();
        }
        let half = dir.path().join("half");
        let journal = dir.path().join("half-journal");
        std::fs::copy(&a, &half).unwrap();
        std::fs::copy(dir.path().join("a-journal"), &journal).unwrap();
        let both = || [&half, &journal].map(|file| std::fs::read(file).ok());
        let before = both();
        let owner = Owner::of(dir.path(), &entry::Path::new(b"half").unwrap(), &File::open(&half).unwrap());
        let outcome = copy(&half, &b, owner.unwrap());
        assert!(matches!(&outcome, Err(NoCopy::Later(why)) if why.contains("journal")), "{outcome:?}");
        assert!(both() == before, "it is somebody else's, who is not done yet");
        // When nobody touches them any more, what is committed goes up.
        std::fs::remove_file(&b).unwrap();
        assert_eq!(copied(&half, &b), Ok(None));
        assert_eq!(count(&b), 1);
        // Of one that is in use nothing is rolled back, however new its journal is.
        db.execute_batch("ROLLBACK; BEGIN; INSERT INTO t VALUES (2)").unwrap();
        std::fs::remove_file(&b).unwrap();
        let owner = Owner::of(dir.path(), &entry::Path::new(b"a").unwrap(), &File::open(&a).unwrap());
        assert_eq!(copy(&a, &b, owner.unwrap()), Ok(None));
        assert_eq!(count(&b), 1);
    }

    #[test]
    fn nothing_is_made_beside_a_database_that_nobody_has_open() {
        let (dir, a, b) = files();
        Connection::open(&a).unwrap().execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        assert_eq!(copied(&a, &b), Ok(None));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "the database, and the copy");
    }

    #[test]
    fn what_breaks_a_rule_of_its_schema_is_no_damage_and_is_remarked_on() {
        for (what, make) in [
            (
                "CHECK",
                "CREATE TABLE t(x CHECK (x > 0)); PRAGMA ignore_check_constraints=ON; INSERT INTO t VALUES (-1)",
            ),
            (
                "NOT NULL",
                "CREATE TABLE t(x); INSERT INTO t VALUES (NULL); PRAGMA writable_schema=ON;
                 UPDATE sqlite_schema SET sql = 'CREATE TABLE t(x NOT NULL)' WHERE name = 't'",
            ),
            (
                "STRICT",
                "CREATE TABLE t(x TEXT); INSERT INTO t VALUES (x'00'); PRAGMA writable_schema=ON;
                 UPDATE sqlite_schema SET sql = 'CREATE TABLE t(x INT) STRICT' WHERE name = 't'",
            ),
            (
                "a tokenizer that only its application has",
                "CREATE TABLE t(x); INSERT INTO t VALUES (1); PRAGMA writable_schema=ON;
                 INSERT INTO sqlite_schema VALUES ('table', 'f', 'f', 0,
                     'CREATE VIRTUAL TABLE f USING fts5(y, tokenize = ''its own'')')",
            ),
        ] {
            let (_dir, a, b) = files();
            Connection::open(&a).unwrap().execute_batch(make).unwrap();
            let outcome = copied(&a, &b);
            assert!(outcome.is_ok(), "{what}: {outcome:?}");
            assert!(matches!(&outcome, Ok(Some(_))), "{what}: {outcome:?}");
            assert_eq!((count(&b), check(&b)), (1, Ok(())), "{what}");
            // Pages that cannot be read are damage all the same.
            let mut bytes = std::fs::read(&a).unwrap();
            let last = bytes.len() - 4096;
            bytes[last..].fill(0xaa);
            std::fs::write(&a, bytes).unwrap();
            std::fs::remove_file(&b).unwrap();
            assert!(matches!(copied(&a, &b), Err(NoCopy::Damaged(_))), "{what}");
        }
    }

    #[test]
    fn damage_is_told_from_being_busy() {
        let (_dir, a, b) = files();
        let db = Connection::open(&a).unwrap();
        db.execute_batch(
            "CREATE TABLE t(x); PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; INSERT INTO t VALUES (1);",
        )
        .unwrap();
        assert!(matches!(copied(&a, &b), Err(NoCopy::Later(_))));
        drop(db);
        let mut bytes = std::fs::read(&a).unwrap();
        bytes[100..].fill(0xaa);
        std::fs::write(&a, bytes).unwrap();
        let _ = std::fs::remove_file(&b);
        assert!(matches!(copied(&a, &b), Err(NoCopy::Damaged(_))));
    }

    #[test]
    fn a_journal_of_the_agents_removes_nothing_of_roots() {
        if cvm_needs::lacks_root() {
            return;
        }
        // Whose are the directory, the database, and the journal. One of root's may have been moved there.
        for (directory, database, of_journal) in [(0, 990, 990), (0, 0, 990), (990, 990, 0), (990, 0, 0)] {
            let (dir, _, b) = files();
            let own = dir.path().join("own");
            std::fs::create_dir(&own).unwrap();
            may_be_entered(dir.path());
            may_be_entered(&own);
            let a = own.join("a");
            let db = Connection::open(&a).unwrap();
            db.execute_batch("PRAGMA page_size=4096; CREATE TABLE t(x); INSERT INTO t VALUES (1);").unwrap();
            drop(db);
            let pages = u32::try_from(std::fs::metadata(&a).unwrap().len() / 4096).unwrap();
            let roots = dir.path().join("roots");
            std::fs::write(&roots, "precious").unwrap();
            let journal = own.join("a-journal");
            std::fs::write(&journal, hot_journal(pages, &roots)).unwrap();
            for (at, user) in [(&own, directory), (&a, database), (&journal, of_journal)] {
                chown(at, Some(user), Some(user)).unwrap();
            }
            let outcome = copied(&a, &b);
            let case = format!("{directory} {database} {of_journal}: {outcome:?}");
            assert!(std::fs::read(&roots).is_ok_and(|text| text == b"precious"), "{case}");
            assert!(matches!(outcome, Err(NoCopy::Later(_))), "{case}");
        }
    }

    #[test]
    fn a_database_is_checked_without_what_lies_beside_it() {
        let (dir, _, _) = files();
        let a = dir.path().join("a ?#%41");
        let db = Connection::open(&a).unwrap();
        db.execute_batch("PRAGMA page_size=4096; PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        drop(db);
        let pages = u32::try_from(std::fs::metadata(&a).unwrap().len() / 4096).unwrap();
        let roots = dir.path().join("roots");
        std::fs::write(&roots, "precious").unwrap();
        std::fs::write(dir.path().join("a ?#%41-journal"), hot_journal(pages, &roots)).unwrap();
        assert_eq!(check(&a), Ok(()));
        assert!(roots.exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        let mut bytes = std::fs::read(&a).unwrap();
        bytes[100..].fill(0xaa);
        std::fs::write(&a, bytes).unwrap();
        assert!(check(&a).is_err());
    }

    #[test]
    fn the_owner_of_a_database_is_enough_to_copy_it() {
        if cvm_needs::lacks_root() {
            return;
        }
        for mode in ["WAL", "DELETE"] {
            let (dir, _, b) = files();
            let own = dir.path().join("own");
            std::fs::create_dir(&own).unwrap();
            may_be_entered(dir.path());
            let at = own.join("db");
            let db = Connection::open(&at).unwrap();
            let make = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
            db.execute_batch(&make).unwrap();
            let all = || std::fs::read_dir(&own).unwrap().map(|e| e.unwrap().path());
            for path in all().chain([own.clone()]) {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
                chown(path, Some(990), Some(990)).unwrap();
            }
            copied(&at, &b).unwrap();
            assert_eq!(count(&b), 1, "{mode}, in use");
            drop(db);
            std::fs::remove_file(&b).unwrap();
            copied(&at, &b).unwrap();
            assert_eq!(count(&b), 1, "{mode}, at rest");
            for file in all() {
                assert_eq!(std::fs::metadata(&file).unwrap().uid(), 990, "{mode}: {}", file.display());
            }
        }
    }

    #[test]
    fn a_database_of_roots_among_files_of_the_agents_is_copied_with_the_agents_rights() {
        if cvm_needs::lacks_root() {
            return;
        }
        for mode in ["WAL", "DELETE"] {
            let (dir, a, b) = files();
            let db = Connection::open(&a).unwrap();
            let make = format!("PRAGMA journal_mode={mode}; CREATE TABLE t(x); INSERT INTO t VALUES (1);");
            db.execute_batch(&make).unwrap();
            may_be_entered(dir.path());
            chown(dir.path(), Some(990), Some(990)).unwrap();
            copied(&a, &b).unwrap();
            assert_eq!(count(&b), 1, "{mode}, in use");
            drop(db);
            std::fs::remove_file(&b).unwrap();
            copied(&a, &b).unwrap();
            assert_eq!(count(&b), 1, "{mode}, at rest");
            let db = Connection::open(&a).unwrap();
            db.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        }
    }

    #[test]
    fn who_may_put_a_journal_beside_a_database_of_roots_is_whose_rights_it_is_opened_with() {
        if cvm_needs::lacks_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        let path = entry::Path::new(b"a/b/db").unwrap();
        let file = File::create(path.below(top)).unwrap();
        let user = || Owner::of(top, &path, &file).unwrap().user.as_raw();
        assert_eq!(user(), 0);
        std::fs::set_permissions(top.join("a/b"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(user(), 65534);
        may_be_entered(&top.join("a/b"));
        chown(top.join("a"), Some(990), None).unwrap();
        assert_eq!(user(), 990);
        chown(path.below(top), Some(991), None).unwrap();
        assert_eq!(user(), 991);
    }

    /// What it says, from a thread that may wait for ever.
    fn at_once(
        what: impl FnOnce() -> Result<Option<Remark>, NoCopy> + Send + 'static,
    ) -> Result<Option<Remark>, NoCopy> {
        let (tell, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(what()));
        done.recv_timeout(Duration::from_secs(60)).expect("nobody waits")
    }

    #[test]
    fn a_log_that_is_no_file_is_not_waited_for() {
        for suffix in ["-journal", "-wal", "-shm"] {
            let (dir, a, b) = files();
            Connection::open(&a)
                .unwrap()
                .execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x);")
                .unwrap();
            let pipe = dir.path().join(format!("a{suffix}"));
            nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let told = at_once(move || copied(&a, &b));
            assert!(matches!(told, Err(NoCopy::Damaged(_))), "{suffix}: {told:?}");
        }
    }

    #[test]
    fn a_pipe_that_a_journal_names_is_not_waited_for() {
        let (dir, a, b) = files();
        Connection::open(&a).unwrap().execute_batch("PRAGMA page_size=4096; CREATE TABLE t(x)").unwrap();
        let pages = u32::try_from(std::fs::metadata(&a).unwrap().len() / 4096).unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(dir.path().join("a-journal"), hot_journal(pages, &pipe)).unwrap();
        let told = at_once(move || copied(&a, &b));
        assert!(matches!(told, Err(NoCopy::Later(_))), "{told:?}");
    }
}
