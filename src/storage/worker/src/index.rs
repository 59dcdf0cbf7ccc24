//! The index: what the bucket holds, as the last commit left it, and by which sign each file on
//! this volume is known to be that. Without it a volume is a stranger to its bucket.
//!
//! Refuses: to be ahead of the bucket (rows change after the manifest has been written), and to
//! touch the tree. May import: `entry`, `fault`, `lineage`, `manifest`, `volume`.

use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::lineage::State;
use crate::manifest::{Digest, Head, Line, Word};
use crate::volume::now_ns;
use cvm_sys::file_handle::Handle;
use rusqlite::{Connection, OptionalExtension as _, Row as SqlRow, params};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By what a file is recognised without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sign {
    pub(crate) size: u64,
    pub(crate) mtime_ns: i64,
    /// Of a database: of its log too.
    pub(crate) change: i64,
}

impl Sign {
    /// By which nothing is recognised, though it still says when the file has changed.
    pub(crate) fn of_nothing(self) -> Self {
        Self { change: self.change.max(0).saturating_neg(), ..self }
    }

    /// When a file that is no database has changed; 0 when that is not known.
    pub(crate) fn changed(&self) -> i64 {
        self.change.saturating_abs()
    }
}

/// A file on this volume that is what the bucket has.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) sign: Sign,
    /// By which it is found wherever it is moved; not every file system has one to give.
    pub(crate) handle: Option<Handle>,
    /// Of a database: what shows whether another state of it is an earlier one.
    pub(crate) state: Option<Box<State>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) entry: Entry,
    /// What the file on this volume looked like when it was this entry.
    pub(crate) sign: Option<Sign>,
    /// Its content is only in the mount below the tree.
    pub(crate) lower: bool,
    /// An upload was begun whose end is not known: it is pushed again, whatever it looks like.
    pub(crate) unsure: bool,
    /// Unsure, and never settled before: that nothing has arrived is no loss.
    pub(crate) promised: bool,
    /// The bucket does not have what it should, and why.
    pub(crate) bad: Option<String>,
}

pub(crate) type Rows = Vec<(Path, Row)>;

/// Older files of the volume in whose place newer ones of the bucket are being put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Exchange {
    /// The directory below `aside/` that the older files go to.
    pub(crate) aside: String,
    /// What is put in their place.
    pub(crate) files: HashMap<Path, Digest>,
}

pub(crate) struct Index {
    db: Mutex<Connection>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// What the clock said when files were last made known, and whether it has gone back since the last stop in
/// order.
const CLOCK: &str = "clock";
const CLOCK_WENT_BACK: &str = "clock_went_back";
/// The mount that an exchange began after, and the directory of the older files: one line each.
const EXCHANGE: &str = "exchange";

/// Values of the column `unsure`; 1 is an entry that is settled and about to be another.
const SURE: i64 = 0;
const PROMISED: i64 = 2;
/// What the bucket has was found wrong; nothing is on its way yet.
const DOUBTED: i64 = 3;
/// A value of the column `kind`; those below it are files.
const DIRECTORY: i64 = 2;

const COLUMNS: &str = "dir, name, kind, size, sha, target, mode, uid, gid, mtime, link, s_size, s_mtime, s_change, lower, unsure, bad";

impl Index {
    pub(crate) fn open(file: &std::path::Path) -> Result<Self, Fault> {
        let db = Connection::open(file)?;
        // What it says of this volume's past decides whether its tree may go into the bucket: it must
        // not be older than that past, even after a loss of power.
        db.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -2048;
             CREATE TABLE IF NOT EXISTS entry (
                 dir BLOB NOT NULL, name BLOB NOT NULL, kind INTEGER NOT NULL, size INTEGER NOT NULL, sha BLOB, target BLOB,
                 mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, mtime INTEGER NOT NULL, link INTEGER,
                 s_size INTEGER, s_mtime INTEGER, s_change INTEGER, s_handle BLOB,
                 lower INTEGER NOT NULL DEFAULT 0, unsure INTEGER NOT NULL DEFAULT 0, bad TEXT,
                 PRIMARY KEY (dir, name)) WITHOUT ROWID;
             CREATE INDEX IF NOT EXISTS entry_lower ON entry (lower) WHERE lower = 1;
             CREATE INDEX IF NOT EXISTS entry_handle ON entry (s_handle) WHERE s_handle IS NOT NULL;
             CREATE INDEX IF NOT EXISTS entry_bad ON entry (bad) WHERE bad IS NOT NULL;
             CREATE INDEX IF NOT EXISTS entry_database ON entry (kind) WHERE kind = 1;
             CREATE TABLE IF NOT EXISTS taint (path BLOB PRIMARY KEY, why TEXT NOT NULL) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS untold (dir BLOB NOT NULL, name BLOB NOT NULL, PRIMARY KEY (dir, name)) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS state (path BLOB PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS exchange (path BLOB PRIMARY KEY, sha BLOB NOT NULL) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS tomb (path BLOB PRIMARY KEY) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;",
        )?;
        Ok(Self { db: Mutex::new(db) })
    }

    /// From here on whoever still holds it gets errors.
    pub(crate) fn close(&self) {
        if let Ok(nothing) = Connection::open_in_memory() {
            *self.db() = nothing;
        }
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn meta(&self, name: &str) -> Result<Option<String>, Fault> {
        Ok(self
            .db()
            .prepare_cached("SELECT value FROM meta WHERE name = ?")?
            .query_row([name], |r| r.get(0))
            .optional()?)
    }

    pub(crate) fn set_meta(&self, name: &str, value: &str) -> Result<(), Fault> {
        self.db().prepare_cached("INSERT OR REPLACE INTO meta VALUES (?, ?)")?.execute([name, value])?;
        Ok(())
    }

    pub(crate) fn number(&self, name: &str) -> Result<u64, Fault> {
        Ok(self.meta(name)?.and_then(|v| v.parse().ok()).unwrap_or(0))
    }

    /// With which this volume has last owned the bucket.
    pub(crate) fn own_epoch(&self) -> Result<Option<u64>, Fault> {
        Ok(self.meta("epoch")?.and_then(|v| v.parse().ok()))
    }

    pub(crate) fn head(&self) -> Result<Head, Fault> {
        Ok(self.meta("head")?.and_then(|text| Head::parse(&text)).unwrap_or_default())
    }

    /// Forgets everything about the tree, not who this volume is.
    pub(crate) fn clear(&self) -> Result<(), Fault> {
        self.forget_tree("")
    }

    /// The same. What it is told next is not of the tree that lies on the volume, until
    /// [`Self::has_its_tree`] says that this one is out of the way.
    pub(crate) fn clear_for_another_tree(&self) -> Result<(), Fault> {
        self.forget_tree("INSERT OR REPLACE INTO meta VALUES ('another', '1');")
    }

    fn forget_tree(&self, and: &str) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        transaction.execute_batch(&format!(
            "DELETE FROM entry; DELETE FROM tomb; DELETE FROM taint; DELETE FROM untold; DELETE FROM state;
             DELETE FROM exchange;
             DELETE FROM meta WHERE name IN ('head', 'independent', 'laid', 'lowered', 'restored', '{EXCHANGE}'); {and}"
        ))?;
        transaction.commit()?;
        Ok(())
    }

    pub(crate) fn is_of_another_tree(&self) -> Result<bool, Fault> {
        Ok(self.meta("another")?.is_some())
    }

    pub(crate) fn has_its_tree(&self) -> Result<(), Fault> {
        self.db().execute("DELETE FROM meta WHERE name = 'another'", [])?;
        Ok(())
    }

    /// The volume is nobody's that has ever owned the bucket.
    pub(crate) fn becomes_another_instance(&self, name: &str) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        transaction.execute("DELETE FROM meta WHERE name IN ('epoch', 'met', 'tried')", [])?;
        transaction.execute("INSERT OR REPLACE INTO meta VALUES ('instance', ?)", [name])?;
        transaction.commit()?;
        Ok(())
    }

    /// Lines of the manifest that are now true of the bucket, all or none.
    pub(crate) fn apply(&self, lines: &[Line], head: Option<Head>) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        apply_lines(&transaction, lines, head)?;
        transaction.commit()?;
        Ok(())
    }

    /// Files as they were found in the bucket, all or none. Of those whose digest the manifest does not
    /// know, it is remembered that it has to be told.
    pub(crate) fn learn(&self, lines: &[Line]) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        let new = "INSERT OR IGNORE INTO untold
             SELECT dir, name FROM entry WHERE dir = ? AND name = ? AND kind < 2 AND sha IS NULL";
        for line in lines {
            let (dir, name) = line.path.split();
            transaction.prepare_cached(new)?.execute(params![dir, name])?;
            apply_line(&transaction, line)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// The files whose digests the manifest has to be told.
    pub(crate) fn untold(&self) -> Result<Vec<(Path, Row)>, Fault> {
        self.select("WHERE (dir, name) IN (SELECT dir, name FROM untold)", [])
    }

    pub(crate) fn told(&self, lines: &[Line]) -> Result<(), Fault> {
        self.each(lines, "DELETE FROM untold WHERE dir = ? AND name = ?", |line, run| {
            let (dir, name) = line.path.split();
            run(params![dir, name])
        })
    }

    /// Segments that follow each other, in one transaction. Those before a fault are kept.
    pub(crate) fn apply_each(
        &self,
        segments: impl Iterator<Item = Result<(Vec<Line>, Head), Fault>>,
    ) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        let mut outcome = Ok(());
        for segment in segments {
            match segment {
                Ok((lines, head)) => apply_lines(&transaction, &lines, Some(head))?,
                Err(fault) => {
                    outcome = Err(fault);
                    break;
                }
            }
        }
        transaction.commit()?;
        outcome
    }

    /// By what these files are known from now on.
    pub(crate) fn set_known(&self, files: &[(Path, Known)]) -> Result<(), Fault> {
        let sql = "UPDATE entry SET s_size = ?3, s_mtime = ?4, s_change = ?5, s_handle = ?6, lower = 0
             WHERE dir = ?1 AND name = ?2";
        let mut db = self.db();
        let transaction = db.transaction()?;
        note_clock(&transaction, now_ns())?;
        for (path, Known { sign, handle, state }) in files {
            let (dir, name) = path.split();
            let handle = handle.as_ref().map(Handle::as_bytes);
            let values = params![dir, name, signed(sign.size), sign.mtime_ns, sign.change, handle];
            transaction.prepare_cached(sql)?.execute(values)?;
            match state.as_ref().and_then(|state| serde_json::to_string(state).ok()) {
                Some(state) => transaction
                    .prepare_cached("INSERT OR REPLACE INTO state VALUES (?, ?)")?
                    .execute(params![path.as_bytes(), state])?,
                None => transaction
                    .prepare_cached("DELETE FROM state WHERE path = ?")?
                    .execute([path.as_bytes()])?,
            };
        }
        transaction.commit()?;
        Ok(())
    }

    /// Remembers it when the clock has gone back: times of files do not say any more which change came first.
    pub(crate) fn look_at_clock(&self) -> Result<(), Fault> {
        let mut db = self.db();
        let now = now_ns();
        if last_clock(&db)?.is_some_and(|last| last > now) {
            let transaction = db.transaction()?;
            note_clock(&transaction, now)?;
            transaction.commit()?;
        }
        Ok(())
    }

    /// Up to which time files were made known; nothing, where the clock has gone back.
    pub(crate) fn known_until(&self) -> Result<Option<i64>, Fault> {
        if self.meta(CLOCK_WENT_BACK)?.is_some() {
            return Ok(None);
        }
        Ok(last_clock(&self.db())?.filter(|last| *last <= now_ns()))
    }

    /// Nothing is pending whose time would have to be compared.
    pub(crate) fn forget_that_clock_went_back(&self) -> Result<(), Fault> {
        self.db().execute("DELETE FROM meta WHERE name = ?", [CLOCK_WENT_BACK])?;
        Ok(())
    }

    /// Remembers which files of the volume are older than the bucket has them, before the first of them is
    /// touched. `after` is the mount in which the volume was last in use.
    pub(crate) fn begin_exchange(&self, after: &str, exchange: &Exchange) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        forget_exchange(&transaction)?;
        let Exchange { aside, files } = exchange;
        let value = format!("{after}\n{aside}");
        transaction.execute("INSERT INTO meta VALUES (?, ?)", [EXCHANGE, &value])?;
        for (path, sha) in files {
            transaction
                .prepare_cached("INSERT INTO exchange VALUES (?, ?)")?
                .execute(params![path.as_bytes(), sha.0])?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// The exchange that was cut off, unless the volume has been in use since: then its files are as they are
    /// meant to be.
    pub(crate) fn unfinished_exchange(&self, after: &str) -> Result<Option<Exchange>, Fault> {
        let Some(value) = self.meta(EXCHANGE)? else { return Ok(None) };
        let Some((_, aside)) = value.split_once('\n').filter(|(was, _)| *was == after) else {
            return Ok(None);
        };
        let db = self.db();
        let mut statement = db.prepare_cached("SELECT path, sha FROM exchange")?;
        let rows = statement.query_map([], |r| Ok((r.get::<_, Vec<u8>>(0)?, Digest(r.get(1)?))))?;
        let mut exchange = Exchange { aside: aside.to_owned(), files: HashMap::new() };
        for found in rows {
            let (path, sha) = found?;
            exchange.files.extend(Path::new(&path).map(|path| (path, sha)));
        }
        Ok(Some(exchange))
    }

    pub(crate) fn end_exchange(&self) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        forget_exchange(&transaction)?;
        transaction.commit()?;
        Ok(())
    }

    /// In which state the database was that the bucket has.
    pub(crate) fn state(&self, path: &Path) -> Result<Option<State>, Fault> {
        let text: Option<String> = self
            .db()
            .prepare_cached("SELECT state FROM state WHERE path = ?")?
            .query_row([path.as_bytes()], |r| r.get(0))
            .optional()?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// The handle of the file that was the entry of this path.
    pub(crate) fn handle(&self, path: &Path) -> Result<Option<Handle>, Fault> {
        let (dir, name) = path.split();
        let bytes: Option<Option<Vec<u8>>> = self
            .db()
            .prepare_cached("SELECT s_handle FROM entry WHERE dir = ? AND name = ?")?
            .query_row(params![dir, name], |r| r.get(0))
            .optional()?;
        Ok(bytes.flatten().map(Handle::from_bytes))
    }

    /// Every path whose entry that file was, as the bucket has it.
    pub(crate) fn settled_as(&self, handle: &Handle) -> Result<Vec<Path>, Fault> {
        let rows = self.select("WHERE s_handle = ? AND unsure = 0", [handle.as_bytes()])?;
        Ok(rows.into_iter().map(|(path, _)| path).collect())
    }

    pub(crate) fn set_lower(&self, paths: &[Path], lower: bool) -> Result<(), Fault> {
        self.each(paths, "UPDATE entry SET lower = ?3 WHERE dir = ?1 AND name = ?2", |path, run| {
            let (dir, name) = path.split();
            run(params![dir, name, lower])
        })
    }

    pub(crate) fn set_bad(&self, path: &Path, why: Option<&str>) -> Result<(), Fault> {
        self.each(&[path], "UPDATE entry SET bad = ?3 WHERE dir = ?1 AND name = ?2", |path, run| {
            let (dir, name) = path.split();
            run(params![dir, name, why])
        })
    }

    /// Every entry's content is in the mount, and nowhere else yet.
    pub(crate) fn set_all_lower(&self, lower: bool) -> Result<(), Fault> {
        self.db().execute("UPDATE entry SET lower = ? WHERE bad IS NULL", [lower])?;
        Ok(())
    }

    /// The same, but only of what this volume never had: what was here and is gone stays gone. Where
    /// directories and links have been `laid`, it has had all of those.
    pub(crate) fn set_unseen_lower(&self, laid: bool) -> Result<(), Fault> {
        let unseen =
            "UPDATE entry SET lower = 1 WHERE bad IS NULL AND s_size IS NULL AND (kind < ?1 OR NOT ?2)";
        self.db().execute(unseen, params![DIRECTORY, laid])?;
        Ok(())
    }

    /// As if it had never been heard of.
    pub(crate) fn forget(&self, path: &Path) -> Result<(), Fault> {
        self.each(&[path], "DELETE FROM entry WHERE dir = ?1 AND name = ?2", |path, run| {
            let (dir, name) = path.split();
            run(params![dir, name])
        })
    }

    fn each<T>(
        &self,
        items: &[T],
        sql: &str,
        mut bind: impl FnMut(
            &T,
            &mut dyn FnMut(&[&dyn rusqlite::ToSql]) -> rusqlite::Result<usize>,
        ) -> rusqlite::Result<usize>,
    ) -> Result<(), Fault> {
        let mut db = self.db();
        let transaction = db.transaction()?;
        {
            let mut statement = transaction.prepare_cached(sql)?;
            for item in items {
                bind(item, &mut |values| statement.execute(values))?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    pub(crate) fn get(&self, path: &Path) -> Result<Option<Row>, Fault> {
        let (dir, name) = path.split();
        let sql = format!("SELECT {COLUMNS} FROM entry WHERE dir = ? AND name = ?");
        Ok(self
            .db()
            .prepare_cached(&sql)?
            .query_row(params![dir, name], row)
            .optional()?
            .map(|(_, _, row)| row))
    }

    /// What is directly in a directory; "" is the top.
    pub(crate) fn children(&self, dir: &[u8]) -> Result<Vec<(Vec<u8>, Row)>, Fault> {
        let sql = format!("SELECT {COLUMNS} FROM entry WHERE dir = ?");
        let db = self.db();
        let mut statement = db.prepare_cached(&sql)?;
        let rows = statement.query_map([dir], row)?;
        Ok(rows.map(|r| r.map(|(_, name, row)| (name, row))).collect::<Result<_, _>>()?)
    }

    /// Every path below a directory.
    pub(crate) fn below(&self, dir: &Path) -> Result<Vec<(Path, Row)>, Fault> {
        let [from, to] = further_down(dir);
        self.select("WHERE dir = ?1 OR (dir >= ?2 AND dir < ?3)", params![dir.as_bytes(), from, to])
    }

    pub(crate) fn all(&self) -> Result<Vec<(Path, Row)>, Fault> {
        self.select("", [])
    }

    /// Whether there is anything.
    pub(crate) fn has_below(&self, dir: &Path) -> Result<bool, Fault> {
        let [from, to] = further_down(dir);
        let db = self.db();
        let any = |sql: &str, values: &[&dyn rusqlite::ToSql]| db.prepare_cached(sql)?.exists(values);
        Ok(any("SELECT 1 FROM entry WHERE dir = ? LIMIT 1", params![dir.as_bytes()])?
            || any("SELECT 1 FROM entry WHERE dir >= ? AND dir < ? LIMIT 1", params![from, to])?)
    }

    /// What lies below something that is no directory, as no tree can have it.
    pub(crate) fn astray(&self) -> Result<Vec<(Path, Row)>, Fault> {
        let mut all = Vec::new();
        for dir in self.directories_astray()? {
            all.extend(self.select("WHERE dir = ?", [dir])?);
        }
        Ok(all)
    }

    /// That, and what lies in directories of which nothing is known: a worker that dies has told of
    /// files before it has told of what they lie in.
    pub(crate) fn without_directory(&self) -> Result<Vec<(Path, Row)>, Fault> {
        let mut all = Vec::new();
        for dir in self.directories(|kind| kind == Some(DIRECTORY))? {
            all.extend(self.select("WHERE dir = ?", [dir])?);
        }
        Ok(all)
    }

    fn directories_astray(&self) -> Result<Vec<Vec<u8>>, Fault> {
        self.directories(|kind| kind.is_none_or(|kind| kind == DIRECTORY))
    }

    /// Those in which something lies, and of which they or one above are of a kind that is not fine.
    fn directories(&self, is_fine: impl Fn(Option<i64>) -> bool) -> Result<Vec<Vec<u8>>, Fault> {
        let db = self.db();
        let mut statement = db.prepare_cached("SELECT DISTINCT dir FROM entry")?;
        let mut kind = db.prepare_cached("SELECT kind FROM entry WHERE dir = ? AND name = ?")?;
        let mut known: HashMap<Vec<u8>, bool> = HashMap::new();
        let mut astray = Vec::new();
        for dir in statement.query_map([], |r| r.get::<_, Vec<u8>>(0))? {
            let dir = dir?;
            let mut fine = true;
            let mut above = Path::new(&dir);
            while let Some(path) = above.filter(|_| fine) {
                fine = if let Some(fine) = known.get(path.as_bytes()) {
                    *fine
                } else {
                    let (dir, name) = path.split();
                    let kind: Option<i64> = kind.query_row(params![dir, name], |r| r.get(0)).optional()?;
                    let fine = is_fine(kind);
                    known.insert(path.as_bytes().to_vec(), fine);
                    fine
                };
                above = path.parent();
            }
            if !fine {
                astray.push(dir);
            }
        }
        Ok(astray)
    }

    /// All that a tree can have, and the paths of what is astray.
    pub(crate) fn standing(&self) -> Result<(Rows, Vec<Path>), Fault> {
        let dirs: HashSet<Vec<u8>> = self.directories_astray()?.into_iter().collect();
        let mut astray = Vec::new();
        let mut all = self.all()?;
        all.retain(|(path, _)| {
            let stands = !dirs.contains(path.split().0);
            if !stands {
                astray.push(path.clone());
            }
            stands
        });
        Ok((all, astray))
    }

    pub(crate) fn lower(&self) -> Result<Vec<(Path, Row)>, Fault> {
        self.select("WHERE lower = 1", [])
    }

    pub(crate) fn bad(&self) -> Result<Vec<(Path, Row)>, Fault> {
        self.select("WHERE bad IS NOT NULL", [])
    }

    /// What the gateway has made of this file began as something bad, or the disk had an older state of it.
    /// That stays so, whatever is pushed and removed, until somebody has looked.
    pub(crate) fn taint(&self, path: &Path, why: &str) -> Result<(), Fault> {
        let sql = "INSERT OR REPLACE INTO taint VALUES (?, ?)";
        self.db().prepare_cached(sql)?.execute(params![path.as_bytes(), why])?;
        Ok(())
    }

    pub(crate) fn untaint(&self, path: &Path) -> Result<(), Fault> {
        self.db().prepare_cached("DELETE FROM taint WHERE path = ?")?.execute([path.as_bytes()])?;
        Ok(())
    }

    pub(crate) fn tainted(&self) -> Result<Vec<(Path, String)>, Fault> {
        let db = self.db();
        let mut statement = db.prepare_cached("SELECT path, why FROM taint")?;
        let rows = statement.query_map([], |r| Ok((r.get::<_, Vec<u8>>(0)?, r.get(1)?)))?;
        let mut all = Vec::new();
        for found in rows {
            let (path, why) = found?;
            all.extend(Path::new(&path).map(|path| (path, why)));
        }
        Ok(all)
    }

    fn select(&self, which: &str, values: impl rusqlite::Params) -> Result<Vec<(Path, Row)>, Fault> {
        let sql = format!("SELECT {COLUMNS} FROM entry {which}");
        let db = self.db();
        let mut statement = db.prepare(&sql)?;
        let rows = statement.query_map(values, row)?;
        let mut all = Vec::new();
        for found in rows {
            let (dir, name, row) = found?;
            let bytes = if dir.is_empty() { name } else { [&dir[..], b"/", &name].concat() };
            all.extend(Path::new(&bytes).map(|path| (path, row)));
        }
        Ok(all)
    }

    pub(crate) fn totals(&self) -> Result<Totals, Fault> {
        let sql = "SELECT count(*), coalesce(sum(size), 0) FROM entry WHERE kind <= 1";
        Ok(self
            .db()
            .prepare_cached(sql)?
            .query_row([], |r| Ok(Totals { files: unsigned(r.get(0)?), bytes: unsigned(r.get(1)?) }))?)
    }

    pub(crate) fn count_lower(&self) -> Result<Totals, Fault> {
        let sql = "SELECT count(*), coalesce(sum(size), 0) FROM entry WHERE lower = 1 AND kind <= 1";
        Ok(self
            .db()
            .prepare_cached(sql)?
            .query_row([], |r| Ok(Totals { files: unsigned(r.get(0)?), bytes: unsigned(r.get(1)?) }))?)
    }

    /// Objects whose paths are gone, to be deleted when nothing needs them any more.
    pub(crate) fn tombs(&self, most: usize) -> Result<Vec<Path>, Fault> {
        let db = self.db();
        let mut statement = db.prepare_cached("SELECT path FROM tomb LIMIT ?")?;
        let rows = statement.query_map([signed(most as u64)], |r| r.get::<_, Vec<u8>>(0))?;
        let all: Vec<Vec<u8>> = rows.collect::<Result<_, _>>()?;
        Ok(all.iter().filter_map(|bytes| Path::new(bytes)).collect())
    }

    /// The bucket does not have what it should, and the tree does: it is pushed again.
    pub(crate) fn set_unsure(&self, path: &Path) -> Result<(), Fault> {
        let sql = "UPDATE entry SET unsure = ?3 WHERE dir = ?1 AND name = ?2 AND unsure = 0";
        self.each(&[path], sql, |path, run| {
            let (dir, name) = path.split();
            run(params![dir, name, DOUBTED])
        })
    }
}

fn forget_exchange(db: &Connection) -> rusqlite::Result<()> {
    db.execute("DELETE FROM exchange", [])?;
    db.execute("DELETE FROM meta WHERE name = ?", [EXCHANGE])?;
    Ok(())
}

fn last_clock(db: &Connection) -> rusqlite::Result<Option<i64>> {
    let sql = "SELECT CAST(value AS INTEGER) FROM meta WHERE name = ?";
    db.prepare_cached(sql)?.query_row([CLOCK], |r| r.get(0)).optional()
}

fn note_clock(db: &Connection, now: i64) -> rusqlite::Result<()> {
    let mut set = db.prepare_cached("INSERT OR REPLACE INTO meta VALUES (?, ?)")?;
    if last_clock(db)?.is_some_and(|last| last > now) {
        set.execute([CLOCK_WENT_BACK, "1"])?;
    }
    set.execute([CLOCK, &now.to_string()])?;
    Ok(())
}

/// Between which values of `dir` everything is that lies deeper than directly in a directory.
fn further_down(dir: &Path) -> [Vec<u8>; 2] {
    [b"/", b"0"].map(|end| [dir.as_bytes(), end].concat())
}

fn apply_lines(db: &Connection, lines: &[Line], head: Option<Head>) -> rusqlite::Result<()> {
    lines.iter().try_for_each(|line| apply_line(db, line))?;
    if let Some(head) = head {
        db.execute("INSERT OR REPLACE INTO meta VALUES ('head', ?)", [head.to_string()])?;
    }
    Ok(())
}

fn apply_line(db: &Connection, line: &Line) -> rusqlite::Result<()> {
    let (dir, name) = line.path.split();
    if matches!(&line.word, Word::Is(entry) if !entry.is_file()) {
        // Of a merged segment this may be all that is left of the file's end.
        let sql =
            "INSERT OR IGNORE INTO tomb SELECT ?3 FROM entry WHERE dir = ?1 AND name = ?2 AND kind < ?4";
        db.prepare_cached(sql)?.execute(params![dir, name, line.path.as_bytes(), DIRECTORY])?;
    }
    match &line.word {
        Word::Is(entry) => put(db, dir, name, entry, SURE)?,
        Word::WillBe(entry) => {
            let known = db
                .prepare_cached(
                    "UPDATE entry SET unsure = iif(unsure = ?, unsure, 1) WHERE dir = ? AND name = ?",
                )?
                .execute(params![PROMISED, dir, name])?;
            if known == 0 {
                put(db, dir, name, entry, PROMISED)?;
            }
        }
        Word::Gone => {
            db.prepare_cached("DELETE FROM entry WHERE dir = ? AND name = ?")?.execute(params![dir, name])?;
            db.prepare_cached("INSERT OR IGNORE INTO tomb VALUES (?)")?.execute([line.path.as_bytes()])?;
        }
        Word::Deleted => {
            // Of a merged segment this is all that is left of the path's end.
            db.prepare_cached("DELETE FROM entry WHERE dir = ? AND name = ?")?.execute(params![dir, name])?;
            db.prepare_cached("DELETE FROM tomb WHERE path = ?")?.execute([line.path.as_bytes()])?;
        }
    }
    // A directory or link in place of a file leaves the file's object to be deleted.
    if matches!(&line.word, Word::Is(entry) | Word::WillBe(entry) if entry.is_file()) {
        db.prepare_cached("DELETE FROM tomb WHERE path = ?")?.execute([line.path.as_bytes()])?;
    }
    Ok(())
}

/// A line that says the same content of a file with no upload under way is about its looks: what
/// others have found out about the object meanwhile stands. By what a file of other content was known, the
/// new one is not, until somebody has looked at it.
fn put(db: &Connection, dir: &[u8], name: &[u8], entry: &Entry, unsure: i64) -> rusqlite::Result<()> {
    let (kind, size, sha, target) = match &entry.kind {
        Kind::File { size, sha, database } => (i64::from(*database), *size, sha.map(|d| d.0.to_vec()), None),
        Kind::Directory => (DIRECTORY, 0, None, None),
        Kind::Symlink { target } => (3, 0, None, Some(target)),
    };
    let sql = "INSERT INTO entry (dir, name, kind, size, sha, target, mode, uid, gid, mtime, link, unsure)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
         ON CONFLICT (dir, name) DO UPDATE SET kind = ?3, size = ?4, sha = ?5, target = ?6, mode = ?7, uid = ?8, gid = ?9,
             mtime = ?10, link = ?11,
             bad = iif(unsure IN (0, ?13) AND kind = ?3 AND size = ?4 AND sha IS ?5, bad, NULL),
             unsure = iif(unsure = ?13 AND kind = ?3 AND size = ?4 AND sha IS ?5, unsure, ?12),
             s_change = iif(kind = ?3 AND size = ?4 AND sha IS ?5, s_change, 0)";
    db.prepare_cached(sql)?.execute(params![
        dir,
        name,
        kind,
        signed(size),
        sha,
        target,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
        entry.link.map(u64::cast_signed),
        unsure,
        DOUBTED
    ])?;
    Ok(())
}

fn row(r: &SqlRow<'_>) -> rusqlite::Result<(Vec<u8>, Vec<u8>, Row)> {
    let sha: Option<Vec<u8>> = r.get(4)?;
    let sha = sha.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()).map(Digest);
    let kind = match r.get::<_, i64>(2)? {
        DIRECTORY => Kind::Directory,
        3 => Kind::Symlink { target: r.get::<_, Option<Vec<u8>>>(5)?.unwrap_or_default() },
        kind => Kind::File { size: unsigned(r.get(3)?), sha, database: kind == 1 },
    };
    let entry = Entry {
        kind,
        mode: r.get(6)?,
        uid: r.get(7)?,
        gid: r.get(8)?,
        mtime_ns: r.get(9)?,
        link: r.get::<_, Option<i64>>(10)?.map(i64::cast_unsigned),
    };
    let sign = match (r.get::<_, Option<i64>>(11)?, r.get(12)?, r.get(13)?) {
        (Some(size), Some(mtime_ns), Some(change)) => Some(Sign { size: unsigned(size), mtime_ns, change }),
        _ => None,
    };
    let unsure: i64 = r.get(15)?;
    let (unsure, promised) = (unsure != SURE, unsure == PROMISED);
    Ok((r.get(0)?, r.get(1)?, Row { entry, sign, lower: r.get(14)?, unsure, promised, bad: r.get(16)? }))
}

/// `SQLite`'s integers are signed; sizes stay far below the difference.
fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> Entry {
        Entry {
            kind: Kind::File { size, sha: Some(Digest([9; 32])), database: false },
            mode: 0o600,
            uid: 1,
            gid: 2,
            mtime_ns: 3,
            link: Some(u64::MAX),
        }
    }

    fn line(path: &str, word: Word) -> Line {
        Line { path: Path::new(path.as_bytes()).unwrap(), word }
    }

    fn index() -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(&dir.path().join("index")).unwrap();
        (dir, index)
    }

    #[test]
    fn by_a_sign_of_nothing_nothing_is_recognised_and_a_files_time_is_known() {
        for change in [7, -7, i64::MAX, i64::MIN] {
            let sign = Sign { size: 1, mtime_ns: 2, change };
            assert_ne!(sign.of_nothing(), sign);
        }
        assert_eq!(Sign { size: 1, mtime_ns: 2, change: 7 }.of_nothing().changed(), 7);
    }

    #[test]
    fn what_is_applied_is_found_again() {
        let (_dir, index) = index();
        let head = Head { generation: 4, digest: Digest([1; 32]) };
        index
            .apply(
                &[
                    line("a/b", Word::Is(file(5))),
                    line("a/c", Word::Is(file(6))),
                    line("ab", Word::Is(file(7))),
                ],
                Some(head),
            )
            .unwrap();
        assert_eq!(index.get(&Path::new(b"a/b").unwrap()).unwrap().unwrap().entry, file(5));
        assert_eq!(index.children(b"a").unwrap().len(), 2);
        assert_eq!(index.below(&Path::new(b"a").unwrap()).unwrap().len(), 2);
        assert_eq!(index.head().unwrap(), head);
        assert_eq!(index.totals().unwrap(), Totals { files: 3, bytes: 18 });
    }

    #[test]
    fn an_intent_leaves_the_entry_and_makes_it_unsure() {
        let (_dir, index) = index();
        index.apply(&[line("a", Word::Is(file(5))), line("a", Word::WillBe(file(6)))], None).unwrap();
        let row = index.get(&Path::new(b"a").unwrap()).unwrap().unwrap();
        assert!(row.unsure && !row.promised && row.entry.size() == 5);
        index.apply(&[line("b", Word::WillBe(file(6))), line("b", Word::WillBe(file(7)))], None).unwrap();
        assert!(index.get(&Path::new(b"b").unwrap()).unwrap().unwrap().promised);
        index.apply(&[line("a", Word::Is(file(6)))], None).unwrap();
        let row = index.get(&Path::new(b"a").unwrap()).unwrap().unwrap();
        assert!(!row.unsure && row.entry.size() == 6);
    }

    #[test]
    fn what_an_adopted_file_is_has_to_be_told_once_and_what_the_manifest_says_does_not() {
        let (_dir, index) = index();
        let Kind::File { size, database, .. } = file(5).kind else { unreachable!() };
        let adopted = Entry { kind: Kind::File { size, sha: None, database }, ..file(5) };
        index.apply(&[line("adopted", Word::Is(adopted)), line("known", Word::Is(file(5)))], None).unwrap();
        let untold =
            || index.untold().unwrap().into_iter().map(|(path, _)| path.to_string()).collect::<Vec<_>>();
        assert!(untold().is_empty());
        for _ in 0..2 {
            index.learn(&[line("adopted", Word::Is(file(5))), line("known", Word::Is(file(5)))]).unwrap();
            assert_eq!(untold(), ["adopted"]);
        }
        index.told(&[line("adopted", Word::Is(file(5)))]).unwrap();
        index.learn(&[line("adopted", Word::Is(file(5)))]).unwrap();
        assert!(untold().is_empty());
    }

    #[test]
    fn a_volume_that_parts_from_its_copy_is_one_that_has_never_owned_the_bucket() {
        let (_dir, index) = index();
        for (name, value) in
            [("instance", "one"), ("epoch", "7"), ("met", "7"), ("tried", "a b"), ("kept", "1")]
        {
            index.set_meta(name, value).unwrap();
        }
        index.becomes_another_instance("other").unwrap();
        assert_eq!(index.meta("instance").unwrap().as_deref(), Some("other"));
        assert_eq!((index.own_epoch().unwrap(), index.number("met").unwrap()), (None, 0));
        assert_eq!((index.meta("tried").unwrap(), index.number("kept").unwrap()), (None, 1));
    }

    #[test]
    fn what_was_found_out_about_an_object_stands_until_another_one_is_sent() {
        let (_dir, index) = index();
        let path = Path::new(b"a").unwrap();
        let row = || index.get(&path).unwrap().unwrap();
        let looks = || line("a", Word::Is(Entry { mode: 0o755, ..file(5) }));
        index.apply(&[line("a", Word::Is(file(5)))], None).unwrap();
        // Somebody looked at the tree, then the object was found bad, and only then the line is written.
        index.set_bad(&path, Some("replaced")).unwrap();
        index.apply(&[looks()], None).unwrap();
        assert_eq!((row().entry.mode, row().bad.as_deref()), (0o755, Some("replaced")));
        index.apply(&[line("a", Word::WillBe(file(5))), line("a", Word::Is(file(5)))], None).unwrap();
        assert_eq!((row().bad, row().unsure), (None, false));
        index.set_unsure(&path).unwrap();
        index.apply(&[looks()], None).unwrap();
        assert!(row().unsure && !row().promised, "a drill has found it missing");
        index.apply(&[line("a", Word::WillBe(file(5))), line("a", Word::Is(file(5)))], None).unwrap();
        assert!(!row().unsure);
        index.set_bad(&path, Some("replaced")).unwrap();
        index.apply(&[line("a", Word::Is(file(6)))], None).unwrap();
        assert_eq!(row().bad, None, "another object is good");
    }

    #[test]
    fn where_directories_and_links_were_laid_only_files_can_be_unseen() {
        let (_dir, index) = index();
        let words = [file(5).kind, Kind::Directory, Kind::Symlink { target: b"t".to_vec() }].map(of_kind);
        let lines: Vec<_> =
            ["a", "d", "l"].into_iter().zip(words).map(|(name, word)| line(name, word)).collect();
        index.apply(&lines, None).unwrap();
        let lower = || index.lower().unwrap().len();
        index.set_unseen_lower(true).unwrap();
        assert_eq!(lower(), 1);
        index.set_unseen_lower(false).unwrap();
        assert_eq!(lower(), 3);
    }

    fn of_kind(kind: Kind) -> Word {
        Word::Is(Entry { kind, ..file(0) })
    }

    #[test]
    fn what_lies_below_no_directory_is_astray_and_all_else_stands() {
        let (_dir, index) = index();
        let link = || of_kind(Kind::Symlink { target: b"x".to_vec() });
        let lines = [
            line("d", of_kind(Kind::Directory)),
            line("d/a", Word::Is(file(1))),
            line("nowhere/b", Word::Is(file(1))),
            line("l", link()),
            line("l/a", Word::Is(file(1))),
            line("l/deep/er", Word::Is(file(1))),
            line("f", Word::Is(file(1))),
            line("f/d", of_kind(Kind::Directory)),
            line("f/d/a", Word::Is(file(1))),
            line("f0", Word::Is(file(1))),
        ];
        index.apply(&lines, None).unwrap();
        let names = |rows: Vec<(Path, Row)>| {
            let mut names: Vec<String> = rows.into_iter().map(|(path, _)| path.to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(names(index.astray().unwrap()), ["f/d", "f/d/a", "l/a", "l/deep/er"]);
        assert_eq!(names(index.standing().unwrap().0), ["d", "d/a", "f", "f0", "l", "nowhere/b"]);
        let has = |name: &str| index.has_below(&Path::new(name.as_bytes()).unwrap()).unwrap();
        assert!(has("l") && has("l/deep") && has("nowhere") && !has("d/a") && !has("f0"));
    }

    #[test]
    fn a_file_that_something_else_takes_the_place_of_leaves_an_object_to_be_deleted() {
        let (_dir, index) = index();
        index.apply(&[line("a", Word::Is(file(5))), line("a", of_kind(Kind::Directory))], None).unwrap();
        assert_eq!(index.tombs(10).unwrap(), [Path::new(b"a").unwrap()]);
    }

    #[test]
    fn what_is_gone_waits_for_its_objects_deletion_unless_it_comes_back() {
        let (_dir, index) = index();
        index
            .apply(&[line("a", Word::Is(file(5))), line("a", Word::Gone), line("b", Word::Gone)], None)
            .unwrap();
        assert_eq!(index.tombs(10).unwrap().len(), 2);
        index.apply(&[line("a", Word::Is(file(5))), line("b", Word::Deleted)], None).unwrap();
        assert!(index.tombs(10).unwrap().is_empty());
    }
}
