//! Files that the disk has given back older than the bucket has them.
//!
//! What the bucket has was on the disk first. But a disk may lie about that, and somebody may have put
//! older files back. The index, which is younger than those, shows it at the first start after the volume
//! was mounted anew: then they must not go into the bucket as if they were new. Each is set aside, and
//! what the bucket has takes its place. Nothing is deleted.
//!
//! Only what is proven to be older is. Most of that is by the times of files, which nobody but the clock
//! sets; so where the clock has gone back, nothing is. An older file that somebody has put in the place of
//! a newer one is another file, or has just been written to: it is meant.
//!
//! Who looks at the clock is the worker: at each change of the tree, and before each try to reach the bucket.
//! What is written between two such looks, or where no worker runs (in local mode, or in the seconds until the
//! next worker), while the clock is behind, is taken for older if the clock has caught up before the next look,
//! nothing has been sent since, and the machine ends without a stop in order. Then it is set aside and named
//! like all others. To see that too, somebody would have to watch the clock for as long as the machine runs, and
//! write to the volume what he saw.
//!
//! A volume that was set back as a whole, with its index, is found out by the manifest's generations
//! (`ownership`).

use super::layers::take_over;
use super::{Intended, wanted};
use crate::below;
use crate::bucket::Bucket;
use crate::chain::now_ms;
use crate::database::{self, Owner};
use crate::desk::Desk;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::{Exchange, Index, Row, Rows};
use crate::lineage::State;
use crate::manifest::Digest;
use crate::volume::{self, Volume, Within};
use crate::{scan, stage};
use nix::sys::stat::FileStat;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path as FsPath, PathBuf};

/// Where the volume was mounted when its tree was last in use, and not given up in order.
const IN_USE: &str = "in_use_at";
/// A database, and what belongs to it.
const OF_A_DATABASE: [&str; 4] = ["", "-wal", "-shm", "-journal"];

/// Once the tree stands: `place` is this mount of the volume, in this life of the kernel.
pub(super) fn is_in_use(index: &Index, place: &str) -> Result<(), Fault> {
    index.look_at_clock()?;
    index.set_meta(IN_USE, place)
}

/// Before each try to reach the bucket: the tree that the worker before this one has left in this mount may be
/// written to for as long as the bucket does not answer, which it does not when the clock is far behind.
pub(super) fn look_at_clock_of_the_waiting(index: &Index, place: &str) -> Result<(), Fault> {
    if index.meta(IN_USE)?.is_some_and(|was| was == place) {
        index.look_at_clock()?;
    }
    Ok(())
}

/// After a stop that left nothing to do. What is changed on the volume from here on is meant.
pub(crate) fn is_left_in_order(index: &Index) -> Result<(), Fault> {
    index.forget_that_clock_went_back()?;
    index.set_meta(IN_USE, "")
}

/// Puts right what the disk has set back since, where it may have been cut from its power.
pub(super) fn put_right(
    desk: &Desk,
    bucket: &Bucket,
    index: &Index,
    volume: &Volume,
    place: &str,
    intended: &Intended,
) -> Result<(), Fault> {
    let Some(last) = index.meta(IN_USE)?.filter(|last| !last.is_empty() && last != place) else {
        return Ok(());
    };
    let in_layer = fs::read_dir(volume.own.join("upper"))?.next().is_some();
    let volume = if in_layer { volume.overlaid(&volume.tree) } else { Volume::plain(&volume.root)? };
    let begun = index.unfinished_exchange(&last)?;
    let older = older(&volume, index, intended, begun.as_ref())?;
    if older.is_empty() && begun.is_none() {
        return Ok(());
    }
    let aside = begun.map_or_else(|| format!("set-back-{}", now_ms()), |begun| begun.aside);
    let exchange = Exchanging { index, volume: &volume, last: &last, aside: &aside };
    let all = older.iter().map(|(path, row)| wanted(path, row, intended)).collect();
    exchange.files(fetch_all(bucket, index, &volume, all, &exchange.scratch())?, &mut || Ok(()))?;
    if older.is_empty() {
        return Ok(());
    }
    for (path, _) in &older {
        desk.incident(&path.to_string(), &exchange.why(), below::REMEDY);
    }
    desk.warn(format!(
        "The disk had {} files older than the bucket; what the bucket has was put in their place, and they are set aside in .cvm/storage/aside/{aside} on the volume",
        older.len()
    ));
    Ok(())
}

/// `begun`: an exchange that was cut off. It has changed the times by which its files were found to be older.
fn older(
    volume: &Volume,
    index: &Index,
    intended: &Intended,
    begun: Option<&Exchange>,
) -> Result<Rows, Fault> {
    let mut older = Vec::new();
    let until = index.known_until()?.filter(|_| !keeps_times_in_memory(volume));
    if until.is_none() && begun.is_none() {
        return Ok(older);
    }
    for (path, row) in index.all()? {
        if !is_below_directories(volume, &path)? {
            continue;
        }
        let put_there = begun.and_then(|begun| begun.files.get(&path));
        let is_older = match until {
            // What is no file, somebody has put there since.
            _ if put_there.is_some() => {
                volume::look(&path.below(&volume.upper))?.is_none_or(|stat| is_file(&stat))
            }
            Some(until) => is_older(volume, index, &path, &row, until)?,
            None => false,
        };
        if is_older && !has_the_same(volume, &path, &row, intended, put_there) {
            older.push((path, row));
        }
    }
    Ok(older)
}

/// Whether each directory above a path is one, or missing. A link or a file in its place, somebody has put
/// there: what is behind it is not the file of this path.
fn is_below_directories(volume: &Volume, path: &Path) -> Result<bool, Fault> {
    match Within::open(&volume.upper, path.parent().as_ref()) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => Ok(false),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(true),
    }
}

fn is_file(stat: &FileStat) -> bool {
    volume::kind_of(stat) == libc::S_IFREG
}

/// Mounted with `lazytime`: what is written to a file is on the disk long before its new time.
fn keeps_times_in_memory(volume: &Volume) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let (Ok(mounts), Ok(at)) = (fs::read_to_string("/proc/self/mountinfo"), fs::metadata(&volume.upper))
    else {
        return true;
    };
    let (major, minor) = (nix::sys::stat::major(at.dev()), nix::sys::stat::minor(at.dev()));
    let device = format!("{major}:{minor}");
    let is_lazy = |line: &str| line.split(' ').any(|word| word.split(',').any(|option| option == "lazytime"));
    mounts.lines().any(|line| line.split(' ').nth(2) == Some(&device) && is_lazy(line))
}

/// Whether what is there shows that it comes from before the bucket was told of this file. `until` is when
/// the index was last told of any: a later time in it is one of a clock that was wrong.
fn is_older(volume: &Volume, index: &Index, path: &Path, row: &Row, until: i64) -> Result<bool, Fault> {
    let Some(sign) = row.sign.filter(|_| row.entry.is_file() && !row.lower && row.bad.is_none()) else {
        return Ok(false);
    };
    let then = if row.entry.is_database() { index.state(path)? } else { None };
    let changed =
        if row.entry.is_database() { then.map_or(0, |then| then.changed()) } else { sign.changed() };
    if changed > until {
        return Ok(false);
    }
    let at = path.below(&volume.upper);
    let Some(stat) = volume::look(&at)? else { return no_name_was_changed_since(volume, path, changed) };
    if !is_file(&stat) {
        return Ok(false);
    }
    let is_the_same_file = index.handle(path)?.is_some_and(|was| scan::handle_of(&at) == Some(was));
    Ok(match then {
        Some(then) if database::has_magic(&at) || stat.st_size == 0 => {
            is_the_same_file && State::of(&volume.upper, path).is_some_and(|now| now.is_earlier_than(&then))
        }
        // Of another file the directories have to show that nobody has put it there since.
        _ => {
            volume::ctime_ns(&stat) < changed
                && (is_the_same_file || no_name_was_changed_since(volume, path, changed)?)
        }
    })
}

/// Who makes, removes or moves something changes the directory that it is in. Where none on the way to a
/// path has changed since, nobody has done that to it, or to a directory that it is in.
fn no_name_was_changed_since(volume: &Volume, path: &Path, changed: i64) -> Result<bool, Fault> {
    let is_older_directory =
        |stat| volume::kind_of(&stat) == libc::S_IFDIR && volume::ctime_ns(&stat) < changed;
    let mut above = path.parent();
    while let Some(dir) = above {
        if volume::look(&dir.below(&volume.upper))?.is_some_and(|stat| !is_older_directory(stat)) {
            return Ok(false);
        }
        above = dir.parent();
    }
    Ok(volume::look(&volume.upper)?.is_some_and(is_older_directory))
}

/// Whether it is what the bucket has all the same, or what an exchange has put there.
fn has_the_same(
    volume: &Volume,
    path: &Path,
    row: &Row,
    intended: &Intended,
    put_there: Option<&Digest>,
) -> bool {
    let at = path.below(&volume.upper);
    let copy = volume.staging().join("older");
    let of_copy = |file: &FsPath| {
        let source = volume::open_file(file).ok()?;
        let owner = Owner::of(&volume.upper, path, &source).ok()?;
        drop(source);
        database::copy(file, &copy, owner).ok()?;
        stage::hash(&copy).ok()
    };
    let found = if row.entry.is_database() { of_copy(&at) } else { stage::hash(&at).ok() };
    let _ = fs::remove_file(&copy);
    let is =
        |entry: &Entry| found.is_some_and(|(size, sha)| entry.size() == size && entry.sha() == Some(sha));
    is(&row.entry)
        || intended.get(path).into_iter().flatten().any(is)
        || put_there.is_some_and(|put| found.is_some_and(|(_, sha)| sha == *put))
}

/// All of these, or none: what cannot be had now may be had by the next try, and nothing has been changed yet.
fn fetch_all(
    bucket: &Bucket,
    index: &Index,
    volume: &Volume,
    all: Vec<Wanted>,
    to: &FsPath,
) -> Result<Vec<Got>, Fault> {
    let parts = volume.own.join("staging/parts");
    let fetcher = Fetcher { bucket, whole: index.totals()?, parts, progress: &|_, _| {} };
    let got = fetcher.files(all, to)?;
    match got.iter().find_map(|one| if let Got::Later(_, fault) = one { Some(fault) } else { None }) {
        Some(fault) => Err(fault.clone()),
        None => Ok(got),
    }
}

/// Puts what was fetched in the place of what is older.
///
/// Each step changes the times by which the next boot would judge, of files and of directories. So the
/// judgement is in the index before the first step, and a boot that finds it there goes on with it.
struct Exchanging<'a> {
    index: &'a Index,
    volume: &'a Volume,
    /// The mount in which the volume was last in use.
    last: &'a str,
    aside: &'a str,
}

/// Called before each step; an error ends the exchange there, as a loss of power does.
type Step<'a> = &'a mut dyn FnMut() -> Result<(), Fault>;

impl Exchanging<'_> {
    fn scratch(&self) -> PathBuf {
        self.volume.staging().join("set-back")
    }

    fn why(&self) -> String {
        format!(
            "the disk had an older state of it than the bucket, as after a loss of power that it does not survive; what the bucket has is in its place, and what was there is in .cvm/storage/aside/{} on the volume",
            self.aside
        )
    }

    fn files(&self, got: Vec<Got>, step: Step<'_>) -> Result<(), Fault> {
        let Self { index, volume, last, aside } = *self;
        let good = || {
            got.iter()
                .filter_map(|one| if let Got::Good(path, entry) = one { Some((path, entry)) } else { None })
        };
        // What an earlier try has put there may not be on the disk yet: the loss of power that follows may
        // still take it.
        let mut files = index.unfinished_exchange(last)?.unwrap_or_default().files;
        files.extend(good().filter_map(|(path, entry)| Some((path.clone(), entry.sha()?))));
        step()?;
        index.begin_exchange(last, &Exchange { aside: aside.to_owned(), files })?;
        for (path, entry) in good() {
            step()?;
            // Until an operator has looked.
            index.taint(path, &self.why())?;
            self.put_aside(path, entry.is_database(), step)?;
            let dir = directory_of(volume, index, path)?;
            step()?;
            fs::rename(path.below(&self.scratch()), dir.name(path.name()))?;
        }
        let _ = fs::remove_dir_all(self.scratch());
        step()?;
        fetch::settle_on_disk(&volume.own)?;
        step()?;
        // Of what is bad in the bucket, the older state is all there is.
        take_over(index, volume, got)?;
        step()?;
        index.end_exchange()
    }

    /// The directory of the older files, with the directories of this path. Where another older file has the
    /// name of one of those (`NAME.2` may be one), it is a directory `2` in it, and so on.
    fn directory_aside(&self, path: &Path) -> Result<PathBuf, Fault> {
        use io::ErrorKind::{AlreadyExists, NotADirectory};
        let top = self.volume.own.join("aside").join(self.aside);
        fs::create_dir_all(&top)?;
        let (mut aside, mut number) = (top.clone(), 1);
        while let Err(error) = fs::create_dir_all(path.below(&aside).parent().unwrap_or(&aside)) {
            if !matches!(error.kind(), AlreadyExists | NotADirectory) {
                return Err(error.into());
            }
            number += 1;
            aside = top.join(number.to_string());
        }
        Ok(aside)
    }

    /// Gives what is there a name in the directory of the older files. Nothing there is ever replaced: where an
    /// earlier try has left another file of the same name, this one becomes `NAME.2`, and so on. A database
    /// and what is beside it get the same number, so that they still belong together.
    fn put_aside(&self, path: &Path, is_database: bool, step: Step<'_>) -> Result<(), Fault> {
        let volume = self.volume;
        let Ok(dir) = Within::open(&volume.upper, path.parent().as_ref()) else { return Ok(()) };
        let suffixes = if is_database { &OF_A_DATABASE[..] } else { &OF_A_DATABASE[..1] };
        let mut all = Vec::new();
        for suffix in suffixes {
            let from = dir.name(&[path.name(), suffix.as_bytes()].concat());
            let file = volume::look(&from)?.filter(is_file);
            all.push((*suffix, from, file));
        }
        if all.iter().all(|(.., file)| file.is_none()) {
            return Ok(());
        }
        let aside = self.directory_aside(path)?;
        let mut number = 1;
        while !is_free_for(&aside, path, number, &all)? {
            number += 1;
        }
        for (suffix, from, _) in all.iter().filter(|(.., file)| file.is_some()) {
            let to = numbered(&aside, path, number, suffix);
            step()?;
            if !suffix.is_empty() {
                fs::rename(from, to)?;
            } else if volume::look(&to)?.is_none() {
                // The database itself comes first: its inode is how the next try knows whose number this is.
                // It is replaced as one step: were it gone for a moment and we with it, it would be taken for
                // removed.
                fs::hard_link(from, to)?;
            }
        }
        Ok(())
    }
}

/// A suffix, where the file with it is, and what the kernel says of that, if it is a file.
type Beside = (&'static str, PathBuf, Option<FileStat>);

/// Whether these files can have the names with this number: none is taken by another file, and files beside a
/// database do not come to another database.
fn is_free_for(aside: &FsPath, path: &Path, number: u32, all: &[Beside]) -> Result<bool, Fault> {
    let (mut has_itself, mut has_beside) = (false, false);
    for (suffix, _, file) in all {
        let Some(taken) = volume::look(&numbered(aside, path, number, suffix))? else { continue };
        let is_itself = suffix.is_empty();
        let same = |file: &FileStat| (file.st_dev, file.st_ino) == (taken.st_dev, taken.st_ino);
        if file.as_ref().is_some_and(|file| !(is_itself && same(file))) {
            return Ok(false);
        }
        has_itself |= is_itself;
        has_beside |= !is_itself;
    }
    let is_there = all.iter().any(|(suffix, _, file)| suffix.is_empty() && file.is_some());
    Ok(has_itself || !has_beside || !is_there)
}

fn numbered(aside: &FsPath, path: &Path, number: u32, suffix: &str) -> PathBuf {
    let at = path.below(aside);
    if number == 1 {
        return at.with_file_name(OsStr::from_bytes(&[path.name(), suffix.as_bytes()].concat()));
    }
    // A name has 255 bytes at most.
    let name = path.name().get(..230).unwrap_or(path.name());
    at.with_file_name(OsStr::from_bytes(&[name, format!(".{number}{suffix}").as_bytes()].concat()))
}

/// In which the file belongs; those that are missing are as the bucket has them.
fn directory_of(volume: &Volume, index: &Index, path: &Path) -> Result<Within, Fault> {
    let (mut missing, mut above) = (Vec::new(), path.parent());
    while let Some(dir) = above {
        above = dir.parent();
        if volume::look(&dir.below(&volume.upper))?.is_none() {
            missing.push(dir);
        }
    }
    let within = Within::make(&volume.upper, path.parent().as_ref())?;
    for dir in missing {
        if let Some(row) = index.get(&dir)?.filter(|row| row.entry.kind == Kind::Directory) {
            volume::dress(&Within::open(&volume.upper, Some(&dir))?.itself(), &row.entry)?;
        }
    }
    Ok(within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Known, Sign};
    use crate::manifest::{Line, Word};
    use rusqlite::Connection;
    use std::collections::HashMap;

    const HOUR_NS: i64 = 3_600_000_000_000;

    struct Bench {
        _dir: tempfile::TempDir,
        volume: Volume,
        index: Index,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let volume = Volume::plain(dir.path()).unwrap();
            let index = Index::open(&volume.own.join("index")).unwrap();
            Self { _dir: dir, volume, index }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.volume.upper.join(name)
        }

        fn ctime(&self, name: &str) -> i64 {
            volume::ctime_ns(&volume::look(&self.at(name)).unwrap().unwrap())
        }

        /// Until changes carry another time.
        fn tick(&self) {
            let at = self.volume.own.join("ticks");
            let touch = || {
                fs::write(&at, "1").unwrap();
                volume::ctime_ns(&volume::look(&at).unwrap().unwrap())
            };
            let before = touch();
            while touch() == before {}
        }

        /// The bucket has another state of the file that is there now, which had changed at that time.
        fn has_pushed(&self, name: &str, database: bool, changed: i64) {
            let (path, at) = (Path::new(name.as_bytes()).unwrap(), self.at(name));
            let kind = Kind::File { size: 9, sha: Some(Digest([9; 32])), database };
            let entry = Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime_ns: 0, link: None };
            self.index.apply(&[Line { path: path.clone(), word: Word::Is(entry) }], None).unwrap();
            let stat = volume::look(&at).unwrap().unwrap();
            let known = scan::known_by(&at, &stat, database);
            let state = database.then(|| {
                let mut state = serde_json::to_value(State::of(&self.volume.upper, &path).unwrap()).unwrap();
                state["changed"] = changed.into();
                serde_json::from_value(state).unwrap()
            });
            let known = Known { sign: Sign { change: changed, ..known.sign }, state, ..known };
            self.index.set_known(&[(path, known)]).unwrap();
        }

        fn older(&self) -> Vec<String> {
            let older = older(&self.volume, &self.index, &Intended::new(), None).unwrap();
            older.into_iter().map(|(path, _)| path.to_string()).collect()
        }

        /// The bucket has this content of a file. It had this state, if it is a database.
        fn has_pushed_this(&self, name: &str, content: &[u8], state: Option<State>) {
            let path = Path::new(name.as_bytes()).unwrap();
            let copy = self.volume.own.join("content");
            fs::write(&copy, content).unwrap();
            let (size, sha) = stage::hash(&copy).unwrap();
            let kind = Kind::File { size, sha: Some(sha), database: state.is_some() };
            let entry = Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime_ns: 0, link: None };
            self.index.apply(&[Line { path: path.clone(), word: Word::Is(entry) }], None).unwrap();
            let handle = scan::handle_of(&self.at(name));
            let changed = volume::now_ns();
            let state = state.map(|state| {
                let mut state = serde_json::to_value(state).unwrap();
                state["changed"] = changed.into();
                serde_json::from_value(state).unwrap()
            });
            let known = Known { sign: Sign { size, mtime_ns: 0, change: changed }, handle, state };
            self.index.set_known(&[(path, known)]).unwrap();
        }
    }

    /// A volume on which a file, a database and its log are older than the bucket has them, and another file
    /// is missing.
    struct SetBack {
        bench: Bench,
        newer: HashMap<&'static str, Vec<u8>>,
    }

    impl SetBack {
        fn new() -> Self {
            let bench = Bench::new();
            fs::create_dir(bench.at("d")).unwrap();
            let db = Connection::open(bench.at("db")).unwrap();
            let keep_log = rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
            db.set_db_config(keep_log, true).unwrap();
            db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1)").unwrap();
            let old_log = fs::read(bench.at("db-wal")).unwrap();
            db.execute_batch("INSERT INTO t VALUES (2)").unwrap();
            let state = State::of(&bench.volume.upper, &Path::new(b"db").unwrap()).unwrap();
            db.backup("main", bench.volume.own.join("newer"), None).unwrap();
            drop(db);
            let newer_db = fs::read(bench.volume.own.join("newer")).unwrap();
            fs::write(bench.at("db-wal"), old_log).unwrap();
            fs::write(bench.at("d/plain"), "older").unwrap();
            bench.tick();
            bench.has_pushed_this("db", &newer_db, Some(state));
            bench.has_pushed_this("d/plain", b"newer", None);
            bench.has_pushed_this("d/missing", b"was there", None);
            is_in_use(&bench.index, "before").unwrap();
            let newer =
                [("db", newer_db), ("d/plain", b"newer".to_vec()), ("d/missing", b"was there".to_vec())];
            Self { bench, newer: newer.into() }
        }

        /// A boot that is cut off before its step with that number, if it has so many. True when it was.
        fn boots(&self, steps: usize) -> bool {
            let Bench { index, volume, .. } = &self.bench;
            volume.clear_staging_but_parts().unwrap();
            let begun = index.unfinished_exchange("before").unwrap();
            let older = older(volume, index, &Intended::new(), begun.as_ref()).unwrap();
            let aside = begun.map_or_else(|| "first".to_owned(), |begun| begun.aside);
            let exchange = Exchanging { index, volume, last: "before", aside: &aside };
            let got = older.into_iter().map(|(path, row)| {
                let to = path.below(&exchange.scratch());
                fs::create_dir_all(to.parent().unwrap()).unwrap();
                fs::write(to, &self.newer[path.to_string().as_str()]).unwrap();
                Got::Good(path, row.entry)
            });
            let mut left = steps;
            let mut step = || {
                left = left.checked_sub(1).ok_or_else(|| Fault::other("the power is gone"))?;
                Ok(())
            };
            exchange.files(got.collect(), &mut step).is_err()
        }
    }

    /// Of three boots the first two are cut off after so many steps, and a file loses what may not have settled
    /// on the disk. True if the first was cut.
    fn finishes_after_cuts(first: usize, second: usize) -> bool {
        let disk = SetBack::new();
        let bench = &disk.bench;
        assert_eq!(bench.older(), ["db", "d/missing", "d/plain"]);
        let is_cut = disk.boots(first);
        if is_cut {
            disk.boots(second);
        }
        let plain = bench.at("d/plain");
        let is_begun = bench.index.unfinished_exchange("before").unwrap().is_some();
        if is_begun && fs::read(&plain).unwrap() == b"newer" {
            fs::write(&plain, "").unwrap();
        }
        assert!(!disk.boots(usize::MAX));
        for (name, newer) in &disk.newer {
            assert!(&fs::read(bench.at(name)).unwrap() == newer, "cuts {first}, {second}: {name}");
        }
        assert!(!bench.at("db-wal").exists(), "cuts {first}, {second}");
        let aside = bench.volume.own.join("aside/first");
        assert_eq!(fs::read(aside.join("d/plain")).unwrap(), b"older", "cuts {first}, {second}");
        assert!(!aside.join("d/missing").exists());
        let rows: i64 = Connection::open(aside.join("db"))
            .unwrap()
            .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
            .unwrap();
        assert_eq!(rows, 1, "cuts {first}, {second}: with its own log");
        assert!(!aside.join("db.2").exists(), "cuts {first}, {second}");
        assert_eq!(bench.index.tainted().unwrap().len(), 3, "cuts {first}, {second}");
        assert_eq!(bench.index.unfinished_exchange("before").unwrap(), None);
        is_cut
    }

    #[test]
    fn an_exchange_that_is_cut_off_at_any_step_and_once_more_is_finished_by_the_next_boot() {
        // The second cut: none, the first step after the exchange has begun anew, and a later one.
        for second in [usize::MAX, 1, 4] {
            let mut first = 0;
            while finishes_after_cuts(first, second) {
                first += 1;
            }
            assert!(first > 10, "{first} steps");
        }
    }

    /// What lies below a directory, but for directories.
    fn contents(dir: &FsPath) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                all.extend(contents(&entry.path()));
            } else {
                all.push(fs::read(entry.path()).unwrap());
            }
        }
        all
    }

    #[test]
    fn what_somebody_puts_there_between_two_boots_is_set_aside_too() {
        let (mut cuts, mut numbered) = (0, 0);
        while {
            let disk = SetBack::new();
            let bench = &disk.bench;
            let is_cut = disk.boots(cuts);
            if is_cut && bench.index.unfinished_exchange("before").unwrap().is_some() {
                for name in ["d/plain", "db", "db-wal"] {
                    fs::write(bench.at("draft"), format!("edited {name}")).unwrap();
                    fs::rename(bench.at("draft"), bench.at(name)).unwrap();
                }
                let was_aside = contents(&bench.volume.own.join("aside"));
                assert!(!disk.boots(usize::MAX));
                let aside = bench.volume.own.join("aside/first");
                let all = contents(&aside);
                let edits = ["d/plain", "db", "db-wal"].map(|name| format!("edited {name}").into_bytes());
                for content in was_aside.iter().chain(&edits) {
                    let text = String::from_utf8_lossy(content);
                    assert!(all.contains(content), "cut {cuts}: {text:.20}");
                }
                for (name, newer) in &disk.newer {
                    assert!(&fs::read(bench.at(name)).unwrap() == newer, "cut {cuts}: {name}");
                }
                assert!(!bench.at("db-wal").exists(), "cut {cuts}");
                if aside.join("d/plain.2").exists() {
                    assert_eq!(fs::read(aside.join("d/plain")).unwrap(), b"older", "cut {cuts}");
                    assert_eq!(fs::read(aside.join("d/plain.2")).unwrap(), edits[0], "cut {cuts}");
                    numbered += 1;
                }
                if aside.join("db.2").exists() {
                    assert_eq!(fs::read(aside.join("db.2")).unwrap(), edits[1], "cut {cuts}");
                    assert_eq!(fs::read(aside.join("db.2-wal")).unwrap(), edits[2], "cut {cuts}");
                    numbered += 1;
                }
            }
            is_cut
        } {
            cuts += 1;
        }
        assert!(numbered > 2, "{numbered} with a number");
    }

    #[test]
    fn an_exchange_is_not_finished_on_a_volume_that_was_in_use_since() {
        let disk = SetBack::new();
        assert!(disk.boots(8));
        let index = &disk.bench.index;
        let begun = index.unfinished_exchange("before").unwrap().unwrap();
        assert_eq!((begun.aside.as_str(), begun.files.len()), ("first", 3));
        assert_eq!(index.unfinished_exchange("another mount").unwrap(), None);
        index.clear().unwrap();
        assert_eq!(index.unfinished_exchange("before").unwrap(), None);
    }

    #[test]
    fn what_is_no_file_any_more_between_two_boots_is_left_there() {
        let disk = SetBack::new();
        let bench = &disk.bench;
        assert!(disk.boots(1));
        fs::remove_file(bench.at("d/plain")).unwrap();
        std::os::unix::fs::symlink("elsewhere", bench.at("d/plain")).unwrap();
        assert!(!disk.boots(usize::MAX));
        assert_eq!(fs::read_link(bench.at("d/plain")).unwrap(), FsPath::new("elsewhere"));
        assert_eq!(fs::read(bench.at("d/missing")).unwrap(), b"was there");
    }

    #[test]
    fn what_takes_the_place_of_a_directory_between_two_boots_is_left_there() {
        type Put = fn(&Bench);
        let link_to_where_it_was_moved: Put = |bench| {
            fs::rename(bench.at("d"), bench.at("moved")).unwrap();
            std::os::unix::fs::symlink("moved", bench.at("d")).unwrap();
        };
        let link_to_itself: Put = |bench| {
            fs::remove_dir_all(bench.at("d")).unwrap();
            std::os::unix::fs::symlink("d", bench.at("d")).unwrap();
        };
        let file: Put = |bench| {
            fs::remove_dir_all(bench.at("d")).unwrap();
            fs::write(bench.at("d"), "somebody's").unwrap();
        };
        for (what, put) in [("moved", link_to_where_it_was_moved), ("itself", link_to_itself), ("file", file)]
        {
            let mut cuts = 0;
            while {
                let disk = SetBack::new();
                let bench = &disk.bench;
                let is_cut = disk.boots(cuts);
                put(bench);
                let there = || {
                    let is = (fs::read_link(bench.at("d")).ok(), fs::read(bench.at("d")).ok());
                    (is, fs::read(bench.at("moved/plain")).ok())
                };
                let before = there();
                assert!(!disk.boots(usize::MAX), "{what}, cut {cuts}");
                assert_eq!(there(), before, "{what}, cut {cuts}");
                assert!(fs::read(bench.at("db")).unwrap() == disk.newer["db"], "{what}, cut {cuts}");
                is_cut
            } {
                cuts += 1;
            }
            assert!(cuts > 10, "{what}: {cuts} steps");
        }
    }

    #[test]
    fn a_file_with_a_number_is_not_in_the_way_of_a_directory_of_that_name() {
        let (mut cuts, mut in_the_way) = (0, 0);
        while {
            let mut disk = SetBack::new();
            fs::create_dir(disk.bench.at("db.2")).unwrap();
            fs::write(disk.bench.at("db.2/plain"), "older below").unwrap();
            disk.bench.tick();
            disk.bench.has_pushed_this("db.2/plain", b"newer below", None);
            disk.newer.insert("db.2/plain", b"newer below".to_vec());
            let (bench, aside) = (&disk.bench, disk.bench.volume.own.join("aside/first"));
            let is_cut = disk.boots(cuts);
            if is_cut && aside.join("db").exists() {
                fs::write(bench.at("draft"), "edited").unwrap();
                fs::rename(bench.at("draft"), bench.at("db")).unwrap();
                assert!(!disk.boots(usize::MAX), "cut {cuts}");
                assert_eq!(fs::read(bench.at("db.2/plain")).unwrap(), b"newer below", "cut {cuts}");
                let all = contents(&aside);
                for content in ["edited", "older below"] {
                    assert!(all.contains(&content.as_bytes().to_vec()), "cut {cuts}: {content}");
                }
                in_the_way += usize::from(aside.join("2/db.2/plain").exists());
            }
            is_cut
        } {
            cuts += 1;
        }
        assert!(in_the_way > 0);
    }

    const NONE: [&str; 0] = [];

    #[test]
    fn where_the_clock_has_gone_back_nothing_is_older_until_a_stop_in_order() {
        let bench = Bench::new();
        fs::write(bench.at("f"), "1").unwrap();
        let later = bench.ctime("f") + 1;
        bench.tick();
        // A time that is later than that of any commit is one of a clock that was wrong.
        bench.has_pushed("f", false, later + HOUR_NS);
        assert_eq!(bench.older(), NONE);
        bench.has_pushed("f", false, later);
        assert_eq!(bench.older(), ["f"], "a disk that gives back what was there before");
        // The last commit was made in what is the future now: the clock has gone back meanwhile.
        bench.index.set_meta("clock", &(volume::now_ns() + HOUR_NS).to_string()).unwrap();
        assert_eq!(bench.older(), NONE);
        // It is remembered, also when later commits have the time of now.
        bench.has_pushed("f", false, later);
        assert_eq!(bench.older(), NONE);
        is_in_use(&bench.index, "here").unwrap();
        assert_eq!(bench.older(), NONE);
        is_left_in_order(&bench.index).unwrap();
        assert_eq!(bench.older(), ["f"]);
        // Whoever begins to use the volume, or looks after it, notices too.
        let future = || bench.index.set_meta("clock", &(volume::now_ns() + HOUR_NS).to_string()).unwrap();
        future();
        is_in_use(&bench.index, "here").unwrap();
        assert_eq!(bench.older(), NONE);
        is_left_in_order(&bench.index).unwrap();
        future();
        bench.index.look_at_clock().unwrap();
        assert_eq!(bench.older(), NONE);
        is_left_in_order(&bench.index).unwrap();
        // Also who waits for the bucket, if the tree is there already: nothing else can have been written.
        for (place, is_noticed) in [("a mount of later", false), ("here", true)] {
            is_in_use(&bench.index, "here").unwrap();
            bench.has_pushed("f", false, later);
            let clock = bench.index.meta("clock").unwrap().unwrap();
            future();
            look_at_clock_of_the_waiting(&bench.index, place).unwrap();
            // It has caught up.
            bench.index.set_meta("clock", &clock).unwrap();
            assert_eq!(bench.older().is_empty(), is_noticed, "{place}");
        }
    }

    #[test]
    fn a_database_that_another_has_taken_the_place_of_is_believed() {
        let bench = Bench::new();
        let open = |name: &str| Connection::open(bench.at(name)).unwrap();
        open("db").execute_batch("CREATE TABLE t(x); INSERT INTO t VALUES (1)").unwrap();
        fs::copy(bench.at("db"), bench.at("backup")).unwrap();
        open("db").execute_batch("INSERT INTO t VALUES (2); INSERT INTO t VALUES (3)").unwrap();
        bench.has_pushed("db", true, bench.ctime("db"));
        bench.tick();
        // Its own file, as an earlier state of it: the times are those of a disk that has forgotten.
        fs::write(bench.at("db"), fs::read(bench.at("backup")).unwrap()).unwrap();
        assert_eq!(bench.older(), NONE, "restored by a copy");
        bench.tick();
        let state = || bench.index.state(&Path::new(b"db").unwrap()).unwrap().unwrap();
        let told = |changed: i64| {
            let mut then = serde_json::to_value(state()).unwrap();
            then["changed"] = changed.into();
            let handle = bench.index.handle(&Path::new(b"db").unwrap()).unwrap();
            let sign = Sign { size: 9, mtime_ns: 0, change: changed };
            let known = Known { sign, handle, state: serde_json::from_value(then).unwrap() };
            bench.index.set_known(&[(Path::new(b"db").unwrap(), known)]).unwrap();
        };
        told(bench.ctime("db") + 1);
        assert_eq!(bench.older(), ["db"]);
        // Restored by a rename.
        fs::rename(bench.at("backup"), bench.at("db")).unwrap();
        bench.tick();
        told(bench.ctime("db") + 1);
        assert_eq!(bench.older(), NONE);
    }

    #[test]
    fn what_came_with_a_directory_that_was_moved_is_believed() {
        let bench = Bench::new();
        for name in ["b", "b/d", "a", "a/d"] {
            fs::create_dir(bench.at(name)).unwrap();
        }
        fs::write(bench.at("b/d/other"), "1").unwrap();
        bench.tick();
        for name in ["a/d/other", "a/d/gone"] {
            fs::write(bench.at(name), "2").unwrap();
            bench.has_pushed(name, false, bench.ctime(name));
        }
        bench.tick();
        fs::rename(bench.at("a"), bench.at("c")).unwrap();
        fs::rename(bench.at("b"), bench.at("a")).unwrap();
        assert_eq!(bench.older(), NONE);
        // Had no directory changed since, nobody could have put it there.
        bench.tick();
        fs::write(bench.at("late"), "3").unwrap();
        bench.tick();
        let now = volume::now_ns();
        for name in ["a/d/other", "a/d/gone"] {
            let path = Path::new(name.as_bytes()).unwrap();
            let handle = bench.index.handle(&path).unwrap();
            let known = Known { sign: Sign { size: 9, mtime_ns: 0, change: now }, handle, state: None };
            bench.index.set_known(&[(path, known)]).unwrap();
        }
        assert_eq!(bench.older(), ["a/d/gone", "a/d/other"]);
    }
}
