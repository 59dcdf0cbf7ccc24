//! A private copy of one file at one moment, with its hash: what is sent is what was hashed.
//!
//! Refuses to call a copy good that was torn by a writer while it was made, as long as trying
//! again can help. May import: `copying`, `database`, `disk`, `entry`, `fault`, `lifting`,
//! `lineage`, `manifest`, `rules`, `scan`, `volume`.

use crate::copying;
use crate::database::{self, NoCopy, Remark};
use crate::disk;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::index::Known;
use crate::lifting::Seen;
use crate::lineage::State;
use crate::manifest::Digest;
use crate::rules::SQLITE_MAGIC;
use crate::scan;
use crate::volume::{self, Volume};
use cvm_sys::file_handle::Handle;
use nix::sys::stat::{FileStat, fstat};
use sha2::{Digest as _, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path as FsPath, PathBuf};

/// Copies of a file that changes under our hands before the last one is taken as it is: a log that
/// is always written to is never still, and its beginning is as good as any.
const TRIES: u32 = 3;
const PIECE: usize = 256 * 1024;
/// How long a database that is made anew may be empty.
const NEW_NS: u64 = 5_000_000_000;

/// A copy in the staging area, which is gone when nobody holds it any more.
pub(crate) struct Private {
    at: PathBuf,
    name: String,
}

impl Private {
    fn new(volume: &Volume, name: String) -> Self {
        Self { at: volume.staging().join(&name), name }
    }

    /// In the staging area.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // What cannot be removed is swept with the staging area at the next start.
        let _ = std::fs::remove_file(&self.at);
    }
}

/// A copy that can be sent.
pub(crate) struct Staged {
    pub(crate) path: Path,
    pub(crate) entry: Entry,
    pub(crate) known: Known,
    /// It has to be looked at once more.
    pub(crate) young: bool,
    /// Of a database that is not as its schema wants it.
    pub(crate) remark: Option<Remark>,
    pub(crate) copy: Private,
}

pub(crate) enum Outcome {
    Ready(Staged),
    /// It is gone again; its directory's next scan says so.
    Vanished,
    /// There is no copy now, and why; the next scan tries again.
    Later(String),
    /// There is no good copy until somebody repairs it.
    Damaged(String),
}

/// What the bucket has under the same name.
pub(crate) enum Before {
    AnyFile,
    /// Of this file here, as far as that is known.
    Database(Option<Handle>),
}

impl Before {
    /// Whether another file has taken the name since.
    fn is_not(&self, at: &FsPath) -> bool {
        let Self::Database(Some(was)) = self else { return false };
        scan::handle_of(at).is_some_and(|is| is != *was)
    }
}

/// What is copied, and how.
enum Source {
    Plain(File),
    Database(database::Owner),
}

/// `database` is what the scan saw, and `was` what the bucket has. The copy may have so much
/// `room`: what fills the volume stops those who write to it. `since` is when all of the volume began to
/// be written out, if it was; otherwise the file is.
pub(crate) fn stage(
    volume: &Volume,
    path: &Path,
    mut database: bool,
    was: &Before,
    room: u64,
    since: Option<i64>,
    name: String,
) -> Result<Outcome, Fault> {
    let at = path.below(&volume.upper);
    let private = Private::new(volume, name);
    let to = &private.at;
    // Its first bytes may be all that it has of a database.
    let mut only_begins_like_one = false;
    for attempt in 1..=TRIES {
        let looked = since.filter(|_| attempt == 1).unwrap_or_else(volume::now_ns);
        if since.is_none() || attempt > 1 {
            // A store to a page that is written out shows in the file's times, as none does to one that
            // waits for that; so from here on nothing is missed.
            disk::write_out(volume, path)?;
        }
        let before = match volume.lifting.look(path, &at)? {
            Seen::Is(Some(stat)) => stat,
            Seen::Is(None) => return Ok(Outcome::Vanished),
            Seen::InTheMaking => return Ok(Outcome::Later("its data is just brought up".to_owned())),
        };
        if volume::kind_of(&before) != libc::S_IFREG {
            return Ok(Outcome::Vanished);
        }
        // It may have been replaced since the scan.
        let empty = before.st_size == 0;
        let opened = copying::open(&volume.upper, path, |source| -> Result<_, Fault> {
            // Directories on the way are the agent's to replace by links, which the look above goes through.
            let is_the_same = {
                let opened = fstat(&source)?;
                (opened.st_dev, opened.st_ino) == (before.st_dev, before.st_ino)
            };
            if !is_the_same {
                return Ok(None);
            }
            let is = if empty {
                database && scan::is_begun(&at)
            } else {
                !only_begins_like_one && database::begins_like_one(&source)
            };
            // Closed before SQLite has it.
            Ok(Some(if is {
                Source::Database(database::Owner::of(&volume.tree, path, &source)?)
            } else {
                Source::Plain(source)
            }))
        });
        let source = match opened {
            Ok(Some(source)) => match source? {
                Some(source) => source,
                None if attempt < TRIES => continue,
                None => return Ok(Outcome::Later("another file takes its name all the time".to_owned())),
            },
            Ok(None) => return Ok(Outcome::Later("it is copied under another name".to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Outcome::Vanished),
            Err(error) => return Err(error.into()),
        };
        database = matches!(source, Source::Database(_));
        if let Some(outcome) = is_one_no_more(was, &source, &at, &before) {
            return Ok(outcome);
        }
        let Known { sign, handle, .. } = scan::known_by(&at, &before, database);
        if takes(&at, &before, database) > room {
            return Ok(Outcome::Later("the volume has no room for a copy of it".to_owned()));
        }
        let _ = std::fs::remove_file(to);
        // Before the copy: what is sent is this state or a later one, and on the disk before it is sent. Only the
        // commit of this very moment may be in the log and not in the copy; who compares looks at the content too.
        let state = if database { state_of(volume, path, looked) } else { None };
        let mut remark = None;
        let (size, sha) = match source {
            // Through the merged tree: SQLite's locks live on the path that its writers use.
            Source::Database(owner) => match database::copy(&path.below(&volume.tree), to, owner) {
                Ok(says) => {
                    remark = says;
                    hash(to)?
                }
                Err(NoCopy::Later(why)) => return Ok(Outcome::Later(why)),
                // What was a database is one with damage, as long as it is the same file.
                Err(NoCopy::NotOne)
                    if attempt < TRIES && (matches!(was, Before::AnyFile) || was.is_not(&at)) =>
                {
                    only_begins_like_one = true;
                    continue;
                }
                Err(NoCopy::NotOne) => return Ok(Outcome::Damaged(database::NOT_ONE.to_owned())),
                Err(NoCopy::Damaged(why)) => return Ok(Outcome::Damaged(why)),
            },
            Source::Plain(source) => match copy(source, to) {
                // Made in this moment: bytes of it are not a state of it.
                Ok(_) if !only_begins_like_one && database::has_magic(to) && attempt < TRIES => continue,
                other => other?,
            },
        };
        let Some(after) = volume::look(&at)? else { return Ok(Outcome::Vanished) };
        let still = database || scan::sign_of(&at, &after, false) == sign;
        if still || attempt == TRIES {
            let mut entry = scan::dressed(Kind::File { size, sha: Some(sha), database }, &before);
            if database {
                entry.link = None;
            }
            // It goes up with the object, for those who read the bucket with stock rclone.
            volume::set_mtime(to, entry.mtime_ns)?;
            // A file that changed meanwhile is not known by any sign, and so looked at again.
            let young = !still || is_young(volume, &at, &before, database, [looked, volume::now_ns()]);
            let sign = if young { sign.of_nothing() } else { sign };
            let known = Known { sign, handle, state };
            let path = path.clone();
            return Ok(Outcome::Ready(Staged { path, entry, known, young, remark, copy: private }));
        }
    }
    Ok(Outcome::Vanished)
}

/// What was a database and does not begin like one any more, unless another file has taken its name.
fn is_one_no_more(was: &Before, source: &Source, at: &FsPath, stat: &FileStat) -> Option<Outcome> {
    let (Before::Database(_), Source::Plain(file)) = (was, source) else { return None };
    // Another file that begins like something is what it is.
    if begins_with_nothing(file) {
        let what = if stat.st_size == 0 { "it is empty" } else { "it begins with zeros" };
        return Some(emptied(volume::age_ns(stat), what));
    }
    (!was.is_not(at)).then(|| Outcome::Damaged("it does not begin like one any more".to_owned()))
}

/// The state of a database. Where the next change of its file may carry the same time, its log tells nothing.
fn state_of(volume: &Volume, path: &Path, looked: i64) -> Option<Box<State>> {
    let state = State::of(&volume.upper, path)?;
    let is_settled = state.changed() < looked.saturating_sub(volume.tick_ns);
    Some(Box::new(if is_settled { state } else { state.without_log() }))
}

/// On the disk: holes stay holes. What a database's log holds may be in the copy besides.
fn takes(at: &FsPath, stat: &FileStat, database: bool) -> u64 {
    let log = if database { scan::log_of(at) } else { None };
    let blocks = |stat: &FileStat| u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    blocks(stat).saturating_add(log.map_or(0, |log| blocks(&log)))
}

/// By what a file is known that has just been put in place or brought up. By nothing for now, where the
/// next change may carry the same time.
pub(crate) fn known_now(volume: &Volume, at: &FsPath, stat: &FileStat, database: bool) -> Known {
    let mut known = scan::known_by(at, stat, database);
    if volume.is_coarse() && is_young(volume, at, stat, database, [volume::now_ns(); 2]) {
        known.sign = known.sign.of_nothing();
    }
    known
}

/// Whether the next change may carry the same time. Such a file is read once more. Of a log it is the time of
/// its content that counts: each copy that is taken as root gives the log to the database's owner, and is
/// itself no change. A time far in the future, which anybody can give a log, is no time that the next change
/// will carry.
/// `looked` is when the look began, and when it ended: what changed after that, in the same tick, may have
/// been missed by a copy that began then, however long it took.
fn is_young(volume: &Volume, at: &FsPath, stat: &FileStat, database: bool, looked: [i64; 2]) -> bool {
    let log = if database { scan::log_of(at) } else { None };
    let mut changed = log.iter().map(volume::mtime_ns).chain([volume::ctime_ns(stat)]);
    let [from, to] = looked;
    let tick = volume.tick_ns;
    changed.any(|changed| changed > from.saturating_sub(tick) && changed < to.saturating_add(tick))
}

/// As one that is made anew does, or copied back to a place that was reserved for it.
fn begins_with_nothing(file: &File) -> bool {
    let mut head = [0u8; SQLITE_MAGIC.len()];
    file.read_at(&mut head, 0).is_ok() && head.iter().all(|byte| *byte == 0)
}

/// A database that has had nothing in it for so long.
fn emptied(age_ns: u64, what: &str) -> Outcome {
    if age_ns < NEW_NS { Outcome::Later(format!("{what} yet")) } else { Outcome::Damaged(what.to_owned()) }
}

/// Copies up to where the file ended when it was opened; holes stay holes.
fn copy(source: File, to: &FsPath) -> Result<(u64, Digest), Fault> {
    let length = source.metadata()?.len();
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let copied = hash_of(source.take(length), |bytes| {
        if bytes.iter().all(|b| *b == 0) {
            target.seek(SeekFrom::Current(i64::try_from(bytes.len()).unwrap_or(0))).map(drop)
        } else {
            target.write_all(bytes)
        }
    })?;
    target.set_len(copied.0)?;
    Ok(copied)
}

/// Size and hash of a file as it is.
pub(crate) fn hash(file: &FsPath) -> Result<(u64, Digest), Fault> {
    hash_open(volume::open_file(file)?)
}

/// The same of what follows in one that is open.
pub(crate) fn hash_open(file: File) -> Result<(u64, Digest), Fault> {
    hash_of(file, |_| Ok(()))
}

fn hash_of(
    mut source: impl Read,
    mut and: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<(u64, Digest), Fault> {
    let mut piece = vec![0u8; PIECE];
    let (mut hasher, mut size) = (Sha256::new(), 0u64);
    loop {
        let n = source.read(&mut piece)?;
        let Some(bytes) = piece.get(..n).filter(|b| !b.is_empty()) else { break };
        hasher.update(bytes);
        size += n as u64;
        and(bytes)?;
    }
    Ok((size, Digest(hasher.finalize().into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Sign;
    use std::fs;

    fn staged(volume: &Volume, name: &str, database: bool, was_database: bool) -> Outcome {
        let path = Path::new(name.as_bytes()).unwrap();
        let was = if was_database { Before::Database(None) } else { Before::AnyFile };
        stage(volume, &path, database, &was, u64::MAX, None, "copy".to_owned()).unwrap()
    }

    fn lie_there(volume: &Volume) -> usize {
        fs::read_dir(volume.staging()).unwrap().count()
    }

    #[test]
    fn a_copy_that_is_not_sent_takes_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let db = rusqlite::Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch("CREATE TABLE t(x); INSERT INTO t VALUES (zeroblob(100000));").unwrap();
        drop(db);
        let mut bytes = fs::read(dir.path().join("db")).unwrap();
        bytes[5000..].fill(0xaa);
        fs::write(dir.path().join("db"), bytes).unwrap();
        assert!(matches!(staged(&volume, "db", true, true), Outcome::Damaged(_)));
        assert_eq!(lie_there(&volume), 0);
        fs::write(dir.path().join("file"), "1").unwrap();
        let copy = staged(&volume, "file", false, false);
        assert!(matches!(copy, Outcome::Ready(_)));
        assert_eq!(lie_there(&volume), 1);
        drop(copy);
        assert_eq!(lie_there(&volume), 0);
    }

    #[test]
    fn of_a_database_whose_time_the_next_change_may_carry_the_log_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let mut volume = Volume::plain(dir.path()).unwrap();
        let db = rusqlite::Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        for (tick_ns, is_remembered) in [(3_600_000_000_000, false), (0, true)] {
            volume.tick_ns = tick_ns;
            let Outcome::Ready(staged) = staged(&volume, "db", true, false) else { panic!("no copy") };
            let state = serde_json::to_value(staged.known.state.unwrap()).unwrap();
            assert_eq!(state["log"].is_object(), is_remembered, "{state}");
        }
    }

    #[test]
    fn the_state_of_a_database_that_is_written_to_all_the_time_is_none_after_its_copy() {
        use rusqlite::Connection;
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let mut volume = Volume::plain(dir.path()).unwrap();
        volume.tick_ns = 0;
        let db = Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch(
            "PRAGMA page_size=512; PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA wal_autocheckpoint=0;
             CREATE TABLE t(x); INSERT INTO t VALUES (0);
             CREATE TABLE what_takes_a_while_to_copy(x);
             WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000)
             INSERT INTO what_takes_a_while_to_copy SELECT randomblob(400) FROM n",
        )
        .unwrap();
        let copy = || match staged(&volume, "db", true, true) {
            Outcome::Ready(copy) => copy,
            _ => panic!("there is a copy of a database with a log"),
        };
        let frames = |copy: &Staged| {
            let state = serde_json::to_value(copy.known.state.as_ref().unwrap()).unwrap();
            state["log"]["frames"].as_i64().unwrap()
        };
        let before = frames(&copy());
        let over = &AtomicBool::new(false);
        let copied: Vec<(i64, i64)> = std::thread::scope(|scope| {
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    // One frame each.
                    db.execute("UPDATE t SET x = x + 1", []).unwrap();
                    std::thread::sleep(std::time::Duration::from_micros(500));
                }
            });
            let copied = (0..10).map(|_| {
                let copy = copy();
                let of_copy = Connection::open(volume.staging().join("copy")).unwrap();
                let commits = of_copy.query_row("SELECT x FROM t", [], |row| row.get(0)).unwrap();
                (frames(&copy) - before, commits)
            });
            let copied = copied.collect();
            over.store(true, Ordering::Relaxed);
            copied
        });
        // A commit is in the log before others read it.
        assert!(copied.iter().all(|(of_state, of_copy)| *of_state <= of_copy + 1), "{copied:?}");
        assert!(copied.iter().any(|(of_state, of_copy)| of_state < of_copy), "nobody wrote: {copied:?}");
    }

    #[test]
    fn what_the_volume_has_no_room_for_a_copy_of_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        fs::write(dir.path().join("file"), vec![7; 3 << 20]).unwrap();
        File::create(dir.path().join("sparse")).unwrap().set_len(3 << 20).unwrap();
        let stage = |name: &str| {
            let path = Path::new(name.as_bytes()).unwrap();
            stage(&volume, &path, false, &Before::AnyFile, 1 << 20, None, "copy".to_owned()).unwrap()
        };
        assert!(matches!(stage("file"), Outcome::Later(why) if why.contains("no room")));
        assert_eq!(lie_there(&volume), 0);
        assert!(matches!(stage("sparse"), Outcome::Ready(_)), "holes take none");
    }

    #[test]
    fn a_database_that_is_empty_now_is_not_sent_in_place_of_the_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let at = dir.path().join("db");
        fs::write(&at, "").unwrap();
        assert!(matches!(staged(&volume, "db", false, false), Outcome::Ready(_)), "it never was one");
        assert!(!matches!(staged(&volume, "db", false, true), Outcome::Ready(_)));
        assert!(!matches!(staged(&volume, "db", true, true), Outcome::Ready(_)), "its log is gone again");
        // One that is made anew gets its time.
        assert!(
            matches!(emptied(NEW_NS - 1, "it is empty"), Outcome::Later(why) if why == "it is empty yet")
        );
        assert!(matches!(emptied(NEW_NS, "it is empty"), Outcome::Damaged(_)));
        // All there is of it is in its log.
        let db = rusqlite::Connection::open(&at).unwrap();
        db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        assert!(
            matches!(staged(&volume, "db", true, true), Outcome::Ready(Staged { entry, .. }) if entry.size() > 0)
        );
    }

    #[test]
    fn what_only_begins_like_a_database_is_a_file_unless_it_was_one() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let content = [SQLITE_MAGIC.as_slice(), b"and then a story"].concat();
        fs::write(dir.path().join("file"), &content).unwrap();
        let copy = staged(&volume, "file", true, false);
        assert!(matches!(&copy, Outcome::Ready(copy) if !copy.entry.is_database()));
        assert_eq!(fs::read(volume.staging().join("copy")).unwrap(), content);
        drop(copy);
        assert!(matches!(staged(&volume, "file", true, true), Outcome::Damaged(_)));
    }

    #[test]
    fn another_file_that_took_the_name_of_a_database_is_sent_as_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let (at, path) = (dir.path().join("db"), Path::new(b"db").unwrap());
        let content = b"what is no database, and longer than a database's first bytes";
        let db = rusqlite::Connection::open(&at).unwrap();
        db.execute_batch("CREATE TABLE t(x)").unwrap();
        drop(db);
        let handle = scan::handle_of(&at);
        assert!(handle.is_some(), "this test needs a file system with handles");
        let stage = |handle: Option<Handle>| {
            let was = Before::Database(handle);
            stage(&volume, &path, false, &was, u64::MAX, None, "copy".to_owned()).unwrap()
        };
        // The same file with another first page.
        fs::write(&at, content).unwrap();
        assert!(matches!(stage(handle.clone()), Outcome::Damaged(_)));
        let replace = |content: &[u8]| {
            fs::write(dir.path().join("new"), content).unwrap();
            fs::rename(dir.path().join("new"), &at).unwrap();
        };
        replace(content);
        assert!(matches!(stage(None), Outcome::Damaged(_)), "nobody knows whether it is another");
        assert!(matches!(stage(handle.clone()), Outcome::Ready(staged) if !staged.entry.is_database()));
        replace(&[0; 8192]);
        assert!(!matches!(stage(handle), Outcome::Ready(_)), "one that is copied back begins like this");
    }

    #[test]
    fn a_database_that_nobody_writes_to_is_known_after_a_while_however_often_it_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let db = rusqlite::Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        let copy = || match staged(&volume, "db", true, true) {
            Outcome::Ready(staged) => staged,
            _ => panic!("there is a copy of a database that is at rest"),
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while copy().young {
            assert!(
                std::time::Instant::now() < deadline,
                "it is taken for one that has just been written to"
            );
        }
        assert!(!copy().young);
    }

    #[test]
    fn a_log_from_the_future_makes_nothing_young_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let db = rusqlite::Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        fs::write(dir.path().join("file"), "1").unwrap();
        fs::write(dir.path().join("file-wal"), "what has nothing to do with it").unwrap();
        for (name, database) in [("db", true), ("file", false)] {
            volume::set_mtime(&dir.path().join(format!("{name}-wal")), 4_070_908_800_000_000_000).unwrap();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
            while matches!(staged(&volume, name, database, database), Outcome::Ready(copy) if copy.young) {
                assert!(std::time::Instant::now() < deadline, "{name} is copied again and again");
            }
            assert!(matches!(staged(&volume, name, database, database), Outcome::Ready(_)), "{name}");
        }
    }

    /// A mapping that is written to as other programs do, in whose page a store may not show.
    struct Mapping(*mut u8);

    #[allow(unsafe_code)]
    impl Mapping {
        fn of(at: &FsPath) -> Self {
            let file = OpenOptions::new().read(true).write(true).open(at).unwrap();
            let (rights, fd) = (libc::PROT_READ | libc::PROT_WRITE, std::os::fd::AsRawFd::as_raw_fd(&file));
            // SAFETY: a new mapping of one page of a file that has so many bytes.
            let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, libc::MAP_SHARED, fd, 0) };
            assert!(page != libc::MAP_FAILED);
            Self(page.cast())
        }

        fn store(&self, byte: u8) {
            // SAFETY: the page is mapped until this is dropped.
            unsafe { self.0.write_volatile(byte) };
        }
    }

    #[allow(unsafe_code)]
    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: nobody else has it.
            unsafe { libc::munmap(self.0.cast(), 4096) };
        }
    }

    /// Copies it until it is known by its looks.
    fn known(volume: &Volume, name: &str) -> Sign {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let Outcome::Ready(copy) = staged(volume, name, false, false) else { panic!("there is a file") };
            if !copy.young {
                return copy.known.sign;
            }
            assert!(std::time::Instant::now() < deadline, "{name} is copied again and again");
        }
    }

    fn sign(at: &FsPath) -> Sign {
        scan::sign_of(at, &volume::look(at).unwrap().unwrap(), false)
    }

    #[test]
    fn a_store_through_a_mapping_that_comes_after_the_copy_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let at = dir.path().join("mapped");
        fs::write(&at, [1; 4096]).unwrap();
        let mapping = Mapping::of(&at);
        mapping.store(2);
        // Nothing but the store has dirtied it since it was written out.
        let copied = known(&volume, "mapped");
        assert_eq!(sign(&at), copied, "this test needs a file system on a disk");
        mapping.store(3);
        assert_ne!(sign(&at), copied);
    }

    /// ext4 that keeps whole seconds.
    struct Coarse(tempfile::TempDir);

    impl Coarse {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (image, at) = (dir.path().join("image"), dir.path().join("mount"));
            File::create(&image).unwrap().set_len(16 << 20).unwrap();
            fs::create_dir(&at).unwrap();
            let run = |program: &str, words: &[&str], last: &FsPath| {
                let done = std::process::Command::new(program).args(words).arg(&image).arg(last).output();
                let done = done.unwrap();
                assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            };
            run("mkfs.ext4", &["-qF", "-I", "128"], FsPath::new("16m"));
            run("mount", &["-o", "loop"], &at);
            Self(dir)
        }

        fn at(&self) -> PathBuf {
            self.0.path().join("mount")
        }
    }

    impl Drop for Coarse {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.at(), nix::mount::MntFlags::MNT_DETACH);
        }
    }

    #[test]
    fn a_second_change_of_the_same_size_is_seen_where_files_have_whole_seconds() {
        let disk = Coarse::new();
        let volume = Volume::plain(&disk.at()).unwrap();
        assert!(volume.is_coarse() && volume.tick_ns >= 1_000_000_000, "{}", volume.tick_ns);
        let at = disk.at().join("file");
        // Until both changes fall into one second.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            assert!(std::time::Instant::now() < deadline, "no two changes in one second");
            fs::write(&at, "1").unwrap();
            std::thread::sleep(std::time::Duration::from_millis(100));
            let (before, was) = (sign(&at), volume::look(&at).unwrap().unwrap());
            let Outcome::Ready(copy) = staged(&volume, "file", false, false) else { panic!("it is there") };
            let put_in_place = known_now(&volume, &at, &was, false);
            fs::write(&at, "2").unwrap();
            if sign(&at) == before {
                assert_ne!(copy.known.sign, sign(&at), "the second change is missed");
                assert_ne!(put_in_place.sign, sign(&at), "a change after a restore is missed");
                assert!(copy.young);
                break;
            }
        }
        // And when it is at rest, it is known.
        assert_eq!(known(&volume, "file"), sign(&at));
    }

    #[test]
    fn a_copy_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let content = b"what is no database, and longer than a database's first bytes";
        fs::write(dir.path().join("file"), content).unwrap();
        let copy = staged(&volume, "file", false, false);
        assert!(matches!(copy, Outcome::Ready(_)));
        assert_eq!(fs::read(volume.staging().join("copy")).unwrap(), content);
    }

    #[test]
    fn what_is_said_of_a_file_is_of_the_one_that_was_read() {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        use std::collections::BTreeSet;
        use std::os::unix::fs::{PermissionsExt as _, symlink};
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let [agents, roots, link] = ["d", "roots", "link"].map(|name| dir.path().join(name));
        for (at, mode) in [(&agents, 0o640), (&roots, 0o755)] {
            fs::create_dir(at).unwrap();
            fs::write(at.join("file"), "1").unwrap();
            fs::set_permissions(at.join("file"), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink(&roots, &link).unwrap();
        let over = AtomicBool::new(false);
        let flip = || renameat2(AT_FDCWD, &agents, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
        let modes: BTreeSet<u32> = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    flip();
                }
            });
            let path = Path::new(b"d/file").unwrap();
            let (was, name) = (Before::AnyFile, "copy");
            let stage = |_| stage(&volume, &path, false, &was, u64::MAX, Some(0), name.to_owned());
            let copies = (0..10_000).map(stage).filter_map(Result::ok);
            let modes =
                copies.filter_map(
                    |copy| if let Outcome::Ready(copy) = copy { Some(copy.entry.mode) } else { None },
                );
            let modes = modes.collect();
            over.store(true, Ordering::Relaxed);
            modes
        });
        assert_eq!(modes, BTreeSet::from([0o640]));
    }

    #[test]
    fn no_rights_of_the_owners_are_recorded() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "1").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o6755)).unwrap();
        let Outcome::Ready(copy) = staged(&volume, "file", false, false) else { panic!("it is at rest") };
        assert_eq!(copy.entry.mode, 0o755);
    }

    #[test]
    fn nothing_is_read_through_a_link_that_stands_where_a_directory_was() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "1").unwrap();
        std::os::unix::fs::symlink("outside", dir.path().join("d")).unwrap();
        let path = Path::new(b"d/file").unwrap();
        assert!(!matches!(
            stage(&volume, &path, false, &Before::AnyFile, u64::MAX, None, "copy".to_owned()),
            Ok(Outcome::Ready(_))
        ));
    }
}
