//! What of the tree differs from what the bucket holds.
//!
//! Looks at the upper layer, not at the merged tree: what is only below is what the bucket has,
//! and asking for it would fetch it. In sync mode both are the same directory.
//!
//! ```text
//! in the upper layer              in the index       is
//! a file with the known sign      yes                unchanged
//! a file                          -                  to be read
//! a file whose data is below      at the same path   a change of mode, owner or time
//! a directory moved from below    -                  to be fetched whole, then looked at again
//! a whiteout, or nothing          yes, and not only below    gone
//! ```
//!
//! Refuses to read a file's content and to follow a link. May import: `copying`, `entry`, `fault`,
//! `index`, `lifting`, `rules`, `volume`.

use crate::copying;
use crate::entry::{Entry, HARMLESS, Kind, Path};
use crate::fault::Fault;
use crate::index::{Index, Known, Row, Sign};
use crate::lifting::Seen;
use crate::rules;
use crate::volume::{self, Volume};
use cvm_sys::file_handle::Handle;
use nix::sys::stat::FileStat;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path as FsPath;

const REDIRECT: &CStr = c"trusted.overlay.redirect";
const METACOPY: &CStr = c"trusted.overlay.metacopy";
const OPAQUE: &CStr = c"trusted.overlay.opaque";

/// One path that has to be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Its content may be new.
    Read {
        path: Path,
        database: bool,
        was: Option<Box<Row>>,
        /// As what it was seen.
        handle: Option<Handle>,
    },
    /// Only what the manifest says of it is new.
    Meta {
        path: Path,
        entry: Entry,
    },
    Gone {
        path: Path,
    },
}

impl Change {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Read { path, .. } | Self::Meta { path, .. } | Self::Gone { path } => path,
        }
    }
}

/// Why something cannot be in the bucket as it is, and what can be done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unfit {
    pub(crate) why: String,
    pub(crate) remedy: &'static str,
}

impl Unfit {
    fn by_name(why: impl Into<String>) -> Self {
        Self { why: why.into(), remedy: "give it a shorter name" }
    }

    fn by_size() -> Self {
        let why = "it is larger than the volume that it would be restored to".to_owned();
        Self { why, remedy: "make it smaller; holes count too" }
    }
}

impl From<Fault> for Unfit {
    fn from(fault: Fault) -> Self {
        Self { why: fault.to_string(), remedy: fault.remedy() }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) changes: Vec<Change>,
    /// Paths whose data must come up from below before they can be read here.
    pub(crate) to_fetch: Vec<Path>,
    /// Directories that were not in the index: somebody may want to watch them.
    pub(crate) new_directories: Vec<Path>,
    /// What cannot be in the bucket. What the bucket has there, and below, stays.
    pub(crate) impossible: Vec<(Path, Unfit)>,
    /// How many files were looked at.
    pub(crate) seen: u64,
    /// What was listed was not there to be looked at: it may have gone where the look had been already.
    pub(crate) slipped: bool,
}

/// What was moved and has been brought up as far as it could be had. A name is not enough: something
/// else may be moved to it later.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fetched(HashMap<Path, Moved>);

/// What is above under that name, and where it says that its data is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Moved {
    inode: u64,
    from: Option<Vec<u8>>,
}

impl Moved {
    fn of(stat: &FileStat, at: &FsPath) -> Self {
        Self { inode: stat.st_ino, from: volume::mark(at, REDIRECT) }
    }
}

impl Fetched {
    fn has(&self, path: &Path, moved: &Moved) -> bool {
        self.0.get(path) == Some(moved)
    }

    /// Before it is brought up: what is moved there meanwhile is something else.
    pub(crate) fn note(&mut self, upper: &FsPath, path: &Path) {
        let at = path.below(upper);
        // What cannot be looked at, no scan comes to.
        if let Ok(Some(stat)) = volume::look(&at) {
            self.0.insert(path.clone(), Moved::of(&stat, &at));
        }
    }

    /// What was to be had there is not there any more: it may come back, and what it is in with it.
    pub(crate) fn forget(&mut self, path: &Path) {
        let mut at = Some(path.clone());
        while let Some(path) = at {
            self.0.remove(&path);
            at = path.parent();
        }
    }
}

/// Where a path would lie.
enum Above {
    Directories,
    /// Not above; whatever is below is seen.
    Nothing,
    /// What hides whatever is below.
    SomethingElse,
}

pub(crate) struct Scanner<'a> {
    pub(crate) volume: &'a Volume,
    pub(crate) index: &'a Index,
    pub(crate) prefix: &'a str,
    fetched: &'a Fetched,
    /// Bytes of the volume, which the next one need not exceed.
    whole: u64,
    /// Directories that have not been looked at yet: as deep as a tree may be, no stack is.
    to_do: Vec<Path>,
    found: Found,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(volume: &'a Volume, index: &'a Index, prefix: &'a str, fetched: &'a Fetched) -> Self {
        let whole = volume.room().map_or(u64::MAX, |room| room.whole);
        Self { volume, index, prefix, fetched, whole, to_do: Vec::new(), found: Found::default() }
    }

    /// Everything.
    pub(crate) fn full(mut self) -> Result<Found, Fault> {
        self.directory(None, true)?;
        self.go_down()?;
        self.astray()?;
        Ok(self.found)
    }

    fn go_down(&mut self) -> Result<(), Fault> {
        while let Some(dir) = self.to_do.pop() {
            self.directory(Some(&dir), true)?;
        }
        Ok(())
    }

    fn unfit(&mut self, path: Path, why: impl Into<Unfit>) {
        self.found.impossible.push((path, why.into()));
    }

    /// What is known of places that cannot be, or of which only what lies there is known, and that no
    /// look at a directory comes to.
    fn astray(&mut self) -> Result<(), Fault> {
        let rows = self.index.without_directory()?;
        if rows.is_empty() {
            return Ok(());
        }
        let astray: HashSet<Path> = self.index.astray()?.into_iter().map(|(path, _)| path).collect();
        let said: HashSet<Path> = self.found.changes.iter().map(|change| change.path().clone()).collect();
        for (path, row) in rows.into_iter().filter(|(path, _)| !said.contains(path)) {
            let gone = match self.above(&path) {
                Above::Directories => false,
                Above::Nothing => astray.contains(&path) || row.bad.is_none() && !row.lower,
                Above::SomethingElse => astray.contains(&path) || row.bad.is_none(),
            };
            if gone {
                self.found.changes.push(Change::Gone { path });
            }
        }
        Ok(())
    }

    fn above(&self, path: &Path) -> Above {
        let bytes = path.as_bytes();
        let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let mut opaque = !self.volume.overlay;
        for dir in ends.filter_map(|end| Path::new(bytes.get(..end)?)) {
            let at = dir.below(&self.volume.upper);
            match volume::look(&at) {
                Ok(Some(stat)) if volume::kind_of(&stat) == libc::S_IFDIR => {
                    opaque |= volume::mark(&at, OPAQUE).is_some_and(|v| v == b"y");
                }
                Ok(None) if !opaque => return Above::Nothing,
                Ok(_) => return Above::SomethingElse,
                // What cannot be looked at is not known to be gone.
                Err(_) => return Above::Directories,
            }
        }
        Above::Directories
    }

    /// Only these directories, without what is below them unless it is new. "" is the top.
    pub(crate) fn some(mut self, directories: &BTreeSet<Vec<u8>>) -> Result<Found, Fault> {
        for bytes in directories {
            let dir = Path::new(bytes);
            if dir.is_none() && !bytes.is_empty() {
                continue;
            }
            if let Some(dir) = &dir {
                if rules::is_volatile(dir) {
                    continue;
                }
                if rules::too_deep(dir) {
                    continue;
                }
                let stat = match volume::look(&dir.below(&self.volume.upper)) {
                    Ok(Some(stat)) if volume::kind_of(&stat) == libc::S_IFDIR => stat,
                    // Its parent's own change says so.
                    Ok(_) => continue,
                    Err(fault) => {
                        self.unfit(dir.clone(), fault);
                        continue;
                    }
                };
                self.own_entry(dir, &stat)?;
            }
            self.directory(dir.as_ref(), false)?;
            self.go_down()?;
        }
        Ok(self.found)
    }

    /// What is said of a directory itself.
    fn own_entry(&mut self, dir: &Path, stat: &FileStat) -> Result<(), Fault> {
        let row = self.index.get(dir)?;
        if let Some(row) = row.as_ref().filter(|row| row.entry.is_file()) {
            self.gone(dir.clone(), row)?;
        }
        self.plain(dir, Kind::Directory, stat, row);
        Ok(())
    }

    fn directory(&mut self, dir: Option<&Path>, deep: bool) -> Result<(), Fault> {
        let at = dir.map_or_else(|| self.volume.upper.clone(), |d| d.below(&self.volume.upper));
        let children = self.index.children(dir.map_or(b"", Path::as_bytes))?;
        let mut known: HashMap<Vec<u8>, Row> = children.into_iter().collect();
        let names = match (names_in(&at), dir) {
            (Ok(names), _) => names,
            // Removed or replaced while we looked; its parent has changed too.
            (Err(error), _) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                self.found.slipped = true;
                return Ok(());
            }
            (Err(error), Some(dir)) if is_about_the_place(&error) => {
                self.unfit(dir.clone(), Fault::from(error));
                return Ok(());
            }
            (Err(error), _) => return Err(error.into()),
        };
        let mut whiteouts = HashSet::new();
        for name in names {
            let Some(path) = Path::child(dir, &name) else { continue };
            if rules::too_deep(&path) {
                known.remove(&name);
                self.unfit(path, Unfit::by_name("its path is too long for some machines"));
                continue;
            }
            let stat = match volume::look(&path.below(&self.volume.upper)) {
                Ok(Some(stat)) => stat,
                Ok(None) => {
                    self.found.slipped |= !rules::may_stay_out(&path);
                    continue;
                }
                Err(fault) => {
                    known.remove(&name);
                    self.unfit(path, fault);
                    continue;
                }
            };
            if self.volume.overlay && volume::is_whiteout(&stat) {
                whiteouts.insert(name);
                continue;
            }
            let file = volume::kind_of(&stat) == libc::S_IFREG;
            if rules::is_volatile(&path) || file && self.is_log(&path, &name) {
                continue;
            }
            let row = known.remove(&name);
            self.one(&path, &stat, row, deep)?;
        }
        let opaque = self.volume.overlay && volume::mark(&at, OPAQUE).is_some_and(|v| v == b"y");
        for (name, row) in known {
            let hidden = opaque || whiteouts.contains(&name);
            let Some(path) = Path::child(dir, &name) else { continue };
            if row.bad.is_some() || (row.lower && !hidden) {
                continue;
            }
            self.gone(path, &row)?;
        }
        Ok(())
    }

    fn one(&mut self, path: &Path, stat: &FileStat, row: Option<Row>, deep: bool) -> Result<(), Fault> {
        self.found.seen += 1;
        match volume::kind_of(stat) {
            libc::S_IFDIR => {
                if self.volume.overlay {
                    let moved = Moved::of(stat, &path.below(&self.volume.upper));
                    if moved.from.is_some() && !self.fetched.has(path, &moved) {
                        self.found.to_fetch.push(path.clone());
                    }
                }
                let new = row.as_ref().is_none_or(|r| r.entry.kind != Kind::Directory);
                if let Some(row) = row.as_ref().filter(|r| r.entry.is_file()) {
                    self.gone(path.clone(), row)?;
                }
                self.plain(path, Kind::Directory, stat, row);
                if new {
                    self.found.new_directories.push(path.clone());
                }
                if new || deep {
                    self.to_do.push(path.clone());
                }
            }
            libc::S_IFREG => self.file(path, stat, row)?,
            libc::S_IFLNK => {
                let Ok(target) = std::fs::read_link(path.below(&self.volume.upper)) else { return Ok(()) };
                self.replaced_directory(path, row.as_ref())?;
                if let Some(row) = row.as_ref().filter(|r| r.entry.is_file()) {
                    self.gone(path.clone(), row)?;
                }
                let target = target.as_os_str().as_bytes().to_vec();
                self.plain(path, Kind::Symlink { target }, stat, row);
            }
            // Sockets, pipes and devices mean nothing on another machine.
            _ => {
                if let Some(row) = row {
                    self.gone(path.clone(), &row)?;
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, stat: &FileStat, row: Option<Row>) -> Result<(), Fault> {
        let at = path.below(&self.volume.upper);
        let mut stat = *stat;
        if let Some(row) = row.as_ref().filter(|row| row.lower) {
            match self.volume.lifting.look(path, &at)? {
                Seen::Is(Some(now)) => stat = now,
                Seen::Is(None) => {
                    self.found.slipped = true;
                    return Ok(());
                }
                Seen::InTheMaking => {
                    stat.st_mtime = row.entry.mtime_ns.div_euclid(1_000_000_000);
                    stat.st_mtime_nsec = row.entry.mtime_ns.rem_euclid(1_000_000_000);
                }
            }
        }
        let stat = &stat;
        if self.volume.overlay && stat.st_nlink > 0 && volume::mark(&at, METACOPY).is_some() {
            self.data_below(path, stat, row.as_ref(), &at);
            return Ok(());
        }
        self.replaced_directory(path, row.as_ref())?;
        if let Some(why) = rules::too_long(self.prefix, path) {
            self.unfit(path.clone(), Unfit::by_name(why));
            return Ok(());
        }
        let known = row.as_ref().filter(|r| r.entry.is_file() && !r.unsure && r.bad.is_none());
        if let Some(known) = known
            && known.sign.is_some_and(|sign| sign == self.sign(path, stat, known.entry.is_database()))
        {
            let entry = dressed(known.entry.kind.clone(), stat);
            if differs(&known.entry, &entry) {
                self.found.changes.push(Change::Meta { path: path.clone(), entry });
            }
            return Ok(());
        }
        if size_of(stat) > self.whole {
            self.unfit(path.clone(), Unfit::by_size());
            return Ok(());
        }
        let handle = handle_of(&at);
        let database = self.is_database(path, stat);
        let was = row.map(|row| Box::new(if database { row } else { of_any_file(row) }));
        self.found.changes.push(Change::Read { path: path.clone(), database, was, handle });
        Ok(())
    }

    /// Its data is still only below: at the same path nothing but mode, owner and times is new.
    fn data_below(&mut self, path: &Path, stat: &FileStat, row: Option<&Row>, at: &FsPath) {
        match row {
            // What it is made of is bad: there is nothing to be had from below.
            Some(row) if row.bad.is_some() && volume::mark(at, REDIRECT).is_none() => {}
            Some(row) if row.lower && volume::mark(at, REDIRECT).is_none() => {
                let entry = dressed(row.entry.kind.clone(), stat);
                if differs(&row.entry, &entry) {
                    self.found.changes.push(Change::Meta { path: path.clone(), entry });
                }
            }
            _ if self.fetched.has(path, &Moved::of(stat, at)) => {}
            _ => self.found.to_fetch.push(path.clone()),
        }
    }

    /// Directories and links: the manifest holds all there is to them.
    fn plain(&mut self, path: &Path, kind: Kind, stat: &FileStat, row: Option<Row>) {
        let entry = dressed(kind, stat);
        if row.is_none_or(|row| differs(&row.entry, &entry) || row.entry.kind != entry.kind) {
            self.found.changes.push(Change::Meta { path: path.clone(), entry });
        }
    }

    /// What is no directory has nothing below it: not even what is bad, which could be put right.
    fn replaced_directory(&mut self, path: &Path, row: Option<&Row>) -> Result<(), Fault> {
        let was_one = row.is_none_or(|row| row.entry.kind == Kind::Directory);
        if was_one && self.index.has_below(path)? {
            let gone = self.index.below(path)?.into_iter().map(|(path, _)| Change::Gone { path });
            self.found.changes.extend(gone);
        }
        Ok(())
    }

    fn gone(&mut self, path: Path, row: &Row) -> Result<(), Fault> {
        if row.entry.kind == Kind::Directory {
            self.gone_below(&path)?;
        }
        self.found.changes.push(Change::Gone { path });
        Ok(())
    }

    fn gone_below(&mut self, dir: &Path) -> Result<(), Fault> {
        for (path, row) in self.index.below(dir)? {
            if row.bad.is_none() {
                self.found.changes.push(Change::Gone { path });
            }
        }
        Ok(())
    }

    /// The log of a database beside it, or one that looks like it without.
    fn is_log(&self, path: &Path, name: &[u8]) -> bool {
        let Some(base) = rules::database_of(name) else { return false };
        let Some(base) = Path::child(path.parent().as_ref(), base) else { return false };
        if self.index.get(&base).ok().flatten().is_some_and(|row| row.entry.is_database()) {
            return true;
        }
        if self.begins_like_a_database(&base) {
            return true;
        }
        let mut head = [0u8; 8];
        let read =
            copying::open(&self.volume.upper, path, |mut file| std::io::Read::read(&mut file, &mut head));
        let Ok(Some(Ok(n))) = read else { return false };
        let head = head.get(..n).unwrap_or_default();
        match volume::look(&base.below(&self.volume.upper)) {
            Ok(Some(base)) if volume::kind_of(&base) == libc::S_IFREG => {
                // That of a database that is being created may have no header yet. Beside a file that
                // holds something else, it is one like any other.
                base.st_size == 0 && (head.iter().all(|b| *b == 0) || rules::is_database_log(head))
            }
            _ => rules::is_database_log(head),
        }
    }

    /// By its first bytes; an empty file with a log beside it is one that is being created.
    fn is_database(&self, path: &Path, stat: &FileStat) -> bool {
        if stat.st_size == 0 {
            return is_begun(&path.below(&self.volume.upper));
        }
        self.begins_like_a_database(path)
    }

    fn begins_like_a_database(&self, path: &Path) -> bool {
        // One that is copied just now is one.
        copying::open(&self.volume.upper, path, |file| crate::database::begins_like_one(&file))
            .is_ok_and(|begins| begins.unwrap_or(true))
    }

    fn sign(&self, path: &Path, stat: &FileStat, database: bool) -> Sign {
        sign_of(&path.below(&self.volume.upper), stat, database)
    }
}

fn names_in(dir: &FsPath) -> std::io::Result<Vec<Vec<u8>>> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_vec())).collect()
}

/// And not about a machine that has no more of something just now.
fn is_about_the_place(error: &std::io::Error) -> bool {
    !matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// The write-ahead log beside a database.
pub(crate) fn log_of(database: &FsPath) -> Option<FileStat> {
    let mut name = database.as_os_str().to_owned();
    name.push("-wal");
    volume::look(FsPath::new(&name)).ok().flatten().filter(|log| volume::kind_of(log) == libc::S_IFREG)
}

/// Whether an empty file is a database all the same: all there is of it is in its log.
pub(crate) fn is_begun(database: &FsPath) -> bool {
    log_of(database).is_some_and(|log| log.st_size > 0)
}

/// By what a file is known again. A change of a database shows in its log first.
pub(crate) fn sign_of(at: &FsPath, stat: &FileStat, database: bool) -> Sign {
    let mut sign =
        Sign { size: size_of(stat), mtime_ns: volume::mtime_ns(stat), change: volume::ctime_ns(stat) };
    if database && let Some(log) = log_of(at) {
        // Not its change time: SQLite as root gives the log to the database's owner with each opening,
        // and so would every copy of ours. Mixed by a multiplication that keeps the two apart.
        for part in [log.st_size, volume::mtime_ns(&log)] {
            sign.change = sign.change.wrapping_mul(0x100_0000_01b3).wrapping_add(part);
        }
    }
    sign
}

/// The same, with what stays when it moves.
pub(crate) fn known_by(at: &FsPath, stat: &FileStat, database: bool) -> Known {
    Known { sign: sign_of(at, stat, database), handle: handle_of(at), state: None }
}

pub(crate) fn handle_of(at: &FsPath) -> Option<Handle> {
    Handle::of(&CString::new(at.as_os_str().as_bytes()).ok()?)
}

pub(crate) fn size_of(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// What the manifest says of a path, with what the kernel says of it now.
pub(crate) fn dressed(kind: Kind, stat: &FileStat) -> Entry {
    let shared = stat.st_nlink > 1 && volume::kind_of(stat) == libc::S_IFREG;
    let mode = if volume::kind_of(stat) == libc::S_IFLNK { 0o777 } else { stat.st_mode & HARMLESS };
    Entry {
        kind,
        mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_ns: volume::mtime_ns(stat),
        link: shared.then_some(stat.st_ino),
    }
}

/// A database that was empty when it was pushed need not be one.
fn of_any_file(mut row: Row) -> Row {
    if let Kind::File { size: 0, database, .. } = &mut row.entry.kind {
        *database = false;
    }
    row
}

/// A database's time changes with each commit; that alone is not worth a line.
fn differs(old: &Entry, new: &Entry) -> bool {
    let mut old = old.clone();
    if old.is_database() {
        old.mtime_ns = new.mtime_ns;
    }
    old != *new
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Digest, Line, Word};
    use std::fs;

    struct Bench {
        dir: tempfile::TempDir,
        volume: Volume,
        index: Index,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let volume = Volume::plain(dir.path()).unwrap();
            let index = Index::open(&volume.own.join("index")).unwrap();
            Self { dir, volume, index }
        }

        fn write(&self, path: &str, text: &str) {
            let at = self.dir.path().join(path);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            fs::write(at, text).unwrap();
        }

        fn scan(&self) -> Found {
            Scanner::new(&self.volume, &self.index, "p", &Fetched::default()).full().unwrap()
        }

        fn words(&self) -> Vec<String> {
            let mut words: Vec<String> = self
                .scan()
                .changes
                .iter()
                .map(|c| match c {
                    Change::Read { path, database, .. } => {
                        format!("{} {path}", if *database { "db" } else { "read" })
                    }
                    Change::Meta { path, .. } => format!("meta {path}"),
                    Change::Gone { path } => format!("gone {path}"),
                })
                .collect();
            words.sort();
            words
        }

        /// As if all that is there had been pushed.
        fn push(&self) {
            for change in self.scan().changes {
                let (path, entry) = match change {
                    Change::Read { path, database, .. } => {
                        let stat = volume::look(&path.below(&self.volume.upper)).unwrap().unwrap();
                        let kind = Kind::File { size: size_of(&stat), sha: Some(Digest([0; 32])), database };
                        let known = known_by(&path.below(&self.volume.upper), &stat, database);
                        self.index
                            .apply(&[Line { path: path.clone(), word: Word::Is(dressed(kind, &stat)) }], None)
                            .unwrap();
                        self.index.set_known(&[(path, known)]).unwrap();
                        continue;
                    }
                    Change::Meta { path, entry } => (path, Word::Is(entry)),
                    Change::Gone { path } => (path, Word::Gone),
                };
                self.index.apply(&[Line { path, word: entry }], None).unwrap();
            }
        }
    }

    #[test]
    fn what_is_new_is_found_and_then_known() {
        let bench = Bench::new();
        bench.write("openclaw/a", "1");
        bench.write("openclaw/sub/b", "2");
        bench.write("openclaw/cache/x", "3");
        assert_eq!(
            bench.words(),
            ["meta openclaw", "meta openclaw/sub", "read openclaw/a", "read openclaw/sub/b"]
        );
        bench.push();
        assert_eq!(bench.words(), Vec::<String>::new());
    }

    #[test]
    fn a_directory_that_is_gone_takes_everything_with_it() {
        let bench = Bench::new();
        bench.write("d/e/f", "1");
        bench.push();
        fs::remove_dir_all(bench.dir.path().join("d")).unwrap();
        assert_eq!(bench.words(), ["gone d", "gone d/e", "gone d/e/f"]);
        bench.write("d", "now a file");
        assert_eq!(bench.words(), ["gone d/e", "gone d/e/f", "read d"]);
    }

    #[test]
    fn what_a_look_at_directories_does_not_come_to_is_gone_all_the_same() {
        let bench = Bench::new();
        bench.write("d/e/f", "1");
        bench.write("g/f", "1");
        bench.push();
        // As one that was cut short has left it: the link is known, and what was below it too.
        for name in ["d", "g"] {
            fs::rename(bench.dir.path().join(name), bench.dir.path().join(format!("{name}2"))).unwrap();
            std::os::unix::fs::symlink(format!("{name}2"), bench.dir.path().join(name)).unwrap();
            let stat = volume::look(&bench.dir.path().join(name)).unwrap().unwrap();
            let entry = dressed(Kind::Symlink { target: format!("{name}2").into_bytes() }, &stat);
            let line = Line { path: Path::new(name.as_bytes()).unwrap(), word: Word::Is(entry) };
            bench.index.apply(&[line], None).unwrap();
        }
        bench.index.set_bad(&Path::new(b"g/f").unwrap(), Some("damaged")).unwrap();
        let gone: Vec<String> = bench.words().into_iter().filter(|word| word.starts_with("gone")).collect();
        assert_eq!(gone, ["gone d/e", "gone d/e/f", "gone g/f"]);
    }

    #[test]
    fn a_database_is_known_by_its_first_bytes_and_its_log_is_left_out() {
        let bench = Bench::new();
        let db = rusqlite::Connection::open(bench.dir.path().join("any name")).unwrap();
        db.execute_batch("PRAGMA journal_mode=WAL; CREATE TABLE t(x)").unwrap();
        bench.write("notes-wal", "not a log");
        assert_eq!(bench.words(), ["db any name", "read notes-wal"]);
        bench.push();
        assert_eq!(bench.words(), Vec::<String>::new());
        db.execute_batch("INSERT INTO t VALUES (1)").unwrap();
        assert_eq!(bench.words(), ["db any name"]);
        bench.push();
        // A tick of the file system's clock later, a copy of ours is no change.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let at = bench.dir.path().join("any name");
        let path = Path::new(b"any name").unwrap();
        let owner =
            crate::database::Owner::of(bench.dir.path(), &path, &fs::File::open(&at).unwrap()).unwrap();
        crate::database::copy(&at, &bench.volume.staging().join("copy"), owner).unwrap();
        assert_eq!(bench.words(), Vec::<String>::new());
    }

    #[test]
    fn the_time_of_a_file_whose_data_is_brought_up_is_not_taken_for_its_own() {
        let bench = Bench::new();
        bench.write("a", "1");
        bench.push();
        let path = Path::new(b"a").unwrap();
        bench.index.set_all_lower(true).unwrap();
        // Of a stub, what the kernel does when the data is wanted.
        let at = bench.dir.path().join("a");
        let mark = c"trusted.overlay.metacopy";
        assert_eq!(volume::set_mark(&at, mark, b""), Ok(()), "this test needs root and a disk with marks");
        let volume = Volume { overlay: true, ..Volume::plain(bench.dir.path()).unwrap() };
        let scan = || Scanner::new(&volume, &bench.index, "p", &Fetched::default()).full().unwrap().changes;
        assert_eq!(scan(), []);
        volume.lifting.during(&path, || {
            volume::set_mtime(&at, 1).unwrap();
            assert_eq!(scan(), []);
        });
        assert!(matches!(scan().as_slice(), [Change::Meta { .. }]), "{:?}", scan());
    }

    #[test]
    fn what_is_moved_to_a_name_is_fetched_although_something_else_was_fetched_there() {
        let bench = Bench::new();
        let volume = Volume { overlay: true, ..Volume::plain(bench.dir.path()).unwrap() };
        let y = Path::new(b"y").unwrap();
        let at = y.below(&volume.upper);
        let scan =
            |fetched: &Fetched| Scanner::new(&volume, &bench.index, "p", fetched).full().unwrap().to_fetch;
        let directory = |from: &str| {
            let _ = fs::remove_dir(&at);
            fs::create_dir(&at).unwrap();
            assert_eq!(volume::set_mark(&at, REDIRECT, from.as_bytes()), Ok(()), "this test needs root");
        };
        let mut fetched = Fetched::default();
        for from in ["a", "b"] {
            directory(from);
            assert_eq!(scan(&fetched), std::slice::from_ref(&y), "of {from}");
            fetched.note(&volume.upper, &y);
            assert_eq!(scan(&fetched), []);
        }
        // What of it could not be had is still to be had, by whatever name.
        fetched.forget(&Path::new(b"y/d/f").unwrap());
        assert_eq!(scan(&fetched), std::slice::from_ref(&y));
        fs::remove_dir(&at).unwrap();
        for from in ["a", "b"] {
            let _ = fs::remove_file(&at);
            fs::write(&at, "").unwrap();
            volume::set_mark(&at, REDIRECT, from.as_bytes()).unwrap();
            volume::set_mark(&at, METACOPY, b"").unwrap();
            assert_eq!(scan(&fetched), std::slice::from_ref(&y), "of {from}");
            fetched.note(&volume.upper, &y);
            assert_eq!(scan(&fetched), []);
        }
    }

    #[test]
    fn the_log_of_what_only_its_application_can_read_is_a_file_like_any_other() {
        let bench = Bench::new();
        bench.write("sealed", "a database with a header that nobody knows");
        for name in ["sealed-wal", "gone-wal", "begun-wal"] {
            fs::write(bench.dir.path().join(name), b"\x37\x7f\x06\x82 and frames").unwrap();
        }
        bench.write("begun", "");
        assert_eq!(bench.words(), ["db begun", "read sealed", "read sealed-wal"]);
    }

    #[test]
    fn what_is_no_file_is_neither_waited_for_nor_followed() {
        let bench = Bench::new();
        let at = bench.dir.path().to_owned();
        let db = rusqlite::Connection::open(at.join("elsewhere")).unwrap();
        db.execute_batch("CREATE TABLE t(x)").unwrap();
        for pipe in ["x-wal", "y", "z-journal"] {
            nix::unistd::mkfifo(&at.join(pipe), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        bench.write("y-wal", "beside a pipe");
        bench.write("link-wal", "beside a link to a database");
        std::os::unix::fs::symlink("elsewhere", at.join("link")).unwrap();
        let (tell, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(bench.words()));
        let words = done.recv_timeout(std::time::Duration::from_secs(10)).expect("no scan waits for a pipe");
        assert_eq!(words, ["db elsewhere", "meta link", "read link-wal", "read y-wal"]);
    }

    #[test]
    fn files_go_with_a_directory_of_which_nothing_was_known() {
        let bench = Bench::new();
        bench.write("d/e/a", "1");
        bench.push();
        // As a worker leaves it that dies after the files and before what they lie in.
        for dir in ["d", "d/e"] {
            bench.index.forget(&Path::new(dir.as_bytes()).unwrap()).unwrap();
        }
        assert_eq!(bench.words(), ["meta d", "meta d/e"]);
        let [old, new] = ["d", "x"].map(|name| bench.dir.path().join(name));
        fs::rename(&old, new).unwrap();
        assert_eq!(bench.words(), ["gone d/e/a", "meta x", "meta x/e", "read x/e/a"]);
        // What is only below is seen where nothing above hides it.
        let volume = Volume { overlay: true, ..Volume::plain(bench.dir.path()).unwrap() };
        let gone = || {
            let changes =
                Scanner::new(&volume, &bench.index, "p", &Fetched::default()).full().unwrap().changes;
            changes.iter().any(|change| matches!(change, Change::Gone { .. }))
        };
        assert!(gone());
        bench.index.set_all_lower(true).unwrap();
        assert!(!gone());
        fs::write(old, "in its place").unwrap();
        assert!(gone());
    }

    #[test]
    fn what_is_bad_in_the_bucket_is_not_taken_for_a_deletion() {
        let bench = Bench::new();
        bench.write("a", "1");
        bench.push();
        bench.index.set_bad(&Path::new(b"a").unwrap(), Some("damaged")).unwrap();
        fs::remove_file(bench.dir.path().join("a")).unwrap();
        assert_eq!(bench.words(), Vec::<String>::new());
        bench.write("a", "2");
        assert_eq!(bench.words(), ["read a"]);
    }

    #[test]
    fn a_file_that_is_larger_than_the_volume_is_not_read() {
        let bench = Bench::new();
        bench.write("sparse", "1");
        bench.push();
        let file = fs::File::options().write(true).open(bench.dir.path().join("sparse")).unwrap();
        file.set_len(bench.volume.room().unwrap().whole + (1 << 20)).unwrap();
        bench.write("x", "1");
        let found = bench.scan();
        assert_eq!(found.impossible.len(), 1);
        assert_eq!(bench.words(), ["read x"]);
    }

    /// Directories of this name in each other, deeper than any path can say; a loop of the agent's does it.
    /// Yields the last.
    fn dig(top: &FsPath, name: &str, levels: usize) -> std::os::fd::OwnedFd {
        use nix::fcntl::{OFlag, open, openat};
        use nix::sys::stat::{Mode, mkdirat};
        let mut at = open(top, OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..levels {
            mkdirat(&at, name, Mode::S_IRWXU).unwrap();
            at = openat(&at, name, OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty()).unwrap();
        }
        at
    }

    fn fill_in(mut at: std::os::fd::OwnedFd, name: &str, levels: usize) {
        use nix::fcntl::{OFlag, openat};
        use nix::unistd::{UnlinkatFlags, unlinkat};
        for _ in 0..levels {
            at = openat(&at, "..", OFlag::O_DIRECTORY, nix::sys::stat::Mode::empty()).unwrap();
            unlinkat(&at, name, UnlinkatFlags::RemoveDir).unwrap();
        }
    }

    #[test]
    fn a_path_that_the_kernel_does_not_take_does_not_stop_the_rest() {
        let bench = Bench::new();
        bench.write("x", "1");
        bench.write("long/kept", "1");
        bench.push();
        bench.write("x", "22");
        drop(dig(&bench.dir.path().join("long"), &"y".repeat(250), 20));
        // Known from a tree that was mounted at a shorter path.
        let deep = ["long".to_owned(), vec!["y".repeat(250); 16].join("/")].join("/");
        let deep = Path::new(deep.as_bytes()).unwrap();
        let row = bench.index.get(&Path::new(b"long").unwrap()).unwrap().unwrap();
        bench.index.apply(&[Line { path: deep.clone(), word: Word::Is(row.entry) }], None).unwrap();
        let found = bench.scan();
        assert_eq!(found.impossible.iter().map(|(path, _)| path).collect::<Vec<_>>(), [&deep]);
        assert!(
            found.changes.iter().any(|c| matches!(c, Change::Read { path, .. } if path.as_bytes() == b"x"))
        );
        assert!(!found.changes.iter().any(|c| matches!(c, Change::Gone { .. })));
        let dirs = [&b"long"[..], deep.as_bytes()].map(<[u8]>::to_vec).into();
        let found = Scanner::new(&bench.volume, &bench.index, "p", &Fetched::default()).some(&dirs).unwrap();
        assert!(!found.changes.iter().any(|c| matches!(c, Change::Gone { .. })));
    }

    #[test]
    fn directories_as_deep_as_they_can_be_take_no_stack_and_no_descriptors() {
        let bench = Bench::new();
        let last = dig(bench.dir.path(), "d", 1990);
        let scanned = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(192 * 1024);
            thread.spawn_scoped(scope, || bench.scan().changes.len()).unwrap().join()
        });
        fill_in(last, "d", 1990);
        assert_eq!(scanned.unwrap(), 1990);
    }

    #[test]
    fn a_name_that_cannot_be_encrypted_does_not_stop_the_rest() {
        let bench = Bench::new();
        let long = ["y".repeat(250), "z".repeat(250), "w".repeat(250)].join("/");
        bench.write(&long, "1");
        bench.write("ok", "2");
        let found = bench.scan();
        assert_eq!(found.impossible.len(), 1);
        assert!(found.changes.iter().any(|c| c.path().as_bytes() == b"ok"));
    }
}
