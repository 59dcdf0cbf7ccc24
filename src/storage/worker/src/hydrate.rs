//! From below to above: every file whose data is only in the mount is read, checked, and then
//! copied up by the kernel, which does it as one step whoever else writes at the same moment.
//!
//! Refuses to copy up what does not match the manifest: that is hidden, and an incident.
//! May import: `below`, `desk`, `entry`, `fault`, `fetch`, `index`, `lifting`, `manifest`, `moved`, `order`,
//! `owner`, `scan`, `stage`, `volume`.

use crate::below::{self, is_written};
use crate::desk::{Desk, Open};
use crate::entry::{Entry, Path};
use crate::fault::Fault;
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::{Known, Row};
use crate::manifest::{Line, Word};
use crate::order::Unread;
use crate::owner::{self, uptime};
use crate::volume::{self, Within};
use crate::{lifting, moved, parallel, scan, stage};
use cvm_protocol::storage::Progress;
use std::collections::HashSet;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path as FsPath;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

const THREADS: usize = 12;
/// Rows that are marked at once. Until they are, a round takes what has come up for new.
const BATCH: usize = 64;
/// Reads of one file that fail before somebody else is asked about it.
const TRIES: u32 = 3;
/// Between two passes in which nothing came up: the first time, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// So many reads that fail in a row, and the rest is not asked for in this pass.
const ENOUGH: u32 = 12;
/// So many files of a batch that rclone has been asked about in vain, and no more.
const ASKED: usize = 3;
/// Names of those in the log.
const NAMED: usize = 5;

pub(crate) const REMEDY: &str = "look at the object's versions in the bucket; put a good one back and restart storage, or give the file up with `cvm storage forget PATH`";

enum Lifted {
    /// With what it is known by, unless somebody has written to it.
    Up(Path, Option<Known>),
    /// And what was known of it then.
    Bad(Path, String, Row),
    /// The mount says "I/O error" for everything; rclone says what it is.
    Unclear(Path, Row),
    Later(Path, Fault),
    /// Not tried, because others could not be had.
    Skipped,
}

/// What the threads of one pass know of each other's luck.
struct Pass {
    failed_in_a_row: AtomicU32,
    /// The volume has no room for a file of this size, nor for a larger one.
    too_large: AtomicU64,
}

impl Pass {
    fn new() -> Self {
        Self { failed_in_a_row: AtomicU32::new(0), too_large: AtomicU64::new(u64::MAX) }
    }

    fn is_over(&self) -> bool {
        self.failed_in_a_row.load(Ordering::Relaxed) >= ENOUGH
    }

    fn failed(&self) {
        self.failed_in_a_row.fetch_add(1, Ordering::Relaxed);
    }

    fn skips(&self, size: u64) -> bool {
        self.is_over() || size >= self.too_large.load(Ordering::Relaxed)
    }

    fn note(&self, size: u64, lifted: &Lifted) {
        match lifted {
            Lifted::Later(_, fault) if fault.is_no_room() => {
                self.too_large.fetch_min(size, Ordering::Relaxed);
            }
            Lifted::Later(..) | Lifted::Unclear(..) => self.failed(),
            Lifted::Up(..) | Lifted::Bad(..) => self.failed_in_a_row.store(0, Ordering::Relaxed),
            Lifted::Skipped => {}
        }
    }
}

/// What a pass has come to.
#[derive(Default)]
struct Outcome {
    progressed: bool,
    later: Vec<(Path, Fault)>,
}

/// Goes on until nothing is only below, or `stop` is set. True when all is above.
pub(crate) fn run(open: &Open, desk: &Desk, stop: &AtomicBool) -> Result<bool, Fault> {
    let total = open.index.count_lower()?;
    let (files, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    let show = || {
        desk.progress(Some(Progress {
            what: "fetching what is still only in the bucket".to_owned(),
            files_done: files.load(Ordering::Relaxed).min(total.files),
            files_total: total.files,
            bytes_done: bytes.load(Ordering::Relaxed).min(total.bytes),
            bytes_total: total.bytes,
        }));
    };
    show();
    let (mut idle, mut failed) = (0, HashSet::new());
    while !stop.load(Ordering::Relaxed) {
        let mut rows = open.index.lower()?;
        if rows.is_empty() {
            desk.progress(None);
            return Ok(true);
        }
        // What could not be had keeps nothing back that can.
        rows.sort_by_cached_key(|(path, row)| (failed.contains(path), turn(&row.entry), path.clone()));
        let (pass, mut outcome) = (Pass::new(), Outcome::default());
        for batch in rows.chunks(BATCH) {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let lifted = parallel::each_apart(batch.to_vec(), THREADS, |(path, row)| {
                let size = row.entry.size();
                let skipped = row.entry.is_file() && pass.skips(size);
                let lifted = if skipped { Lifted::Skipped } else { lift(open, &path, &row, &pass) };
                pass.note(size, &lifted);
                if matches!(lifted, Lifted::Up(..)) {
                    files.fetch_add(u64::from(row.entry.is_file()), Ordering::Relaxed);
                    bytes.fetch_add(size, Ordering::Relaxed);
                }
                lifted
            });
            settle(open, desk, lifted, &mut outcome)?;
            show();
            if pass.is_over() {
                break;
            }
        }
        let other = outcome.later.iter().filter(|(_, fault)| !fault.is_no_room());
        failed = other.map(|(path, _)| path.clone()).collect();
        idle = if outcome.progressed { 0 } else { idle + 1 };
        if idle > 0 {
            let wait = pause(idle);
            say(desk, &outcome.later, wait);
            sleep(stop, wait);
        }
    }
    Ok(false)
}

/// Databases come first, and small files before large ones. Those of about one size come as they lie:
/// what happens in a directory is looked at there while it lasts, and not again and again.
fn turn(entry: &Entry) -> u32 {
    if entry.is_database() { 0 } else { 1 + entry.size().max(1 << 14).ilog2() / 2 }
}

/// After so many passes in a row in which nothing came up.
fn pause(idle: u32) -> Duration {
    AGAIN.0.saturating_mul(1 << idle.saturating_sub(1).min(8)).min(AGAIN.1)
}

/// No longer than until `stop` is set.
fn sleep(stop: &AtomicBool, wait: Duration) {
    let until = uptime() + wait;
    while !stop.load(Ordering::Relaxed) && uptime() < until {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Why nothing comes up. A full volume is what somebody can do something about.
fn say(desk: &Desk, later: &[(Path, Fault)], wait: Duration) {
    for (path, fault) in later.iter().take(NAMED) {
        tracing::warn!("still only in the bucket: {path}: {fault}");
    }
    let telling = later.iter().find(|(_, fault)| fault.is_no_room()).or(later.first());
    if let Some((_, fault)) = telling {
        desk.failed(fault, Some(wait));
    }
}

/// What rclone says of a file that the mount does not give. `in_vain` is what it said of others, and
/// an outage is not found out with each of them.
fn explain(open: &Open, path: Path, row: Row, in_vain: &mut Vec<Fault>) -> Lifted {
    if let Some(fault) = in_vain.last().filter(|_| in_vain.len() >= ASKED) {
        return Lifted::Later(path, fault.clone());
    }
    match ask_rclone(open, &path) {
        Ok(why) => Lifted::Bad(path, why, row),
        Err(fault) => {
            in_vain.push(fault.clone());
            Lifted::Later(path, fault)
        }
    }
}

fn settle(open: &Open, desk: &Desk, lifted: Vec<Lifted>, outcome: &mut Outcome) -> Result<(), Fault> {
    let (mut up, mut known) = (Vec::new(), Vec::new());
    let mut in_vain: Vec<Fault> = Vec::new();
    for one in lifted {
        let one = match one {
            Lifted::Unclear(path, row) => explain(open, path, row, &mut in_vain),
            one => one,
        };
        match one {
            Lifted::Up(path, Some(one)) => known.push((path, one)),
            Lifted::Up(path, None) => up.push(path),
            Lifted::Bad(path, why, row) => match condemn(open, desk, &path, &row, &why)? {
                Sentence::Hidden => outcome.progressed = true,
                Sentence::Stays => up.push(path),
                Sentence::NotTheSame => {}
            },
            Lifted::Later(path, fault) => outcome.later.push((path, fault)),
            Lifted::Unclear(..) | Lifted::Skipped => {}
        }
    }
    outcome.progressed |= !up.is_empty() || !known.is_empty();
    open.index.set_lower(&up, false)?;
    open.index.set_known(&known)
}

enum Sentence {
    Hidden,
    /// What is above is the gateway's.
    Stays,
    /// It was pushed or removed meanwhile.
    NotTheSame,
}

/// What is done about a bad object. Since it was read, a round may have put another in its place: that
/// is ours, and what was there before was checked then.
fn condemn(open: &Open, desk: &Desk, path: &Path, row: &Row, why: &str) -> Result<Sentence, Fault> {
    if open.index.get(path)?.as_ref() != Some(row) {
        return Ok(Sentence::NotTheSame);
    }
    if is_another(open, path) {
        return Ok(Sentence::Stays);
    }
    if is_written(&open.volume, path) {
        if below::is_built_on(&open.volume, path) && !row.unsure {
            let why = below::built_on(why);
            open.index.taint(path, &why)?;
            desk.incident(&path.to_string(), &why, below::REMEDY);
        }
        return Ok(Sentence::Stays);
    }
    open.index.set_bad(path, Some(why))?;
    open.index.set_lower(std::slice::from_ref(path), false)?;
    parallel::apart(|| hide(open, path, path));
    desk.incident(&path.to_string(), why, REMEDY);
    Ok(Sentence::Hidden)
}

/// What is wrong in the bucket is not there for the gateway. What it has already written over is
/// its own and stays, and so does what it has moved there: it is `old` that is bad.
fn hide(open: &Open, path: &Path, old: &Path) {
    if is_written(&open.volume, path) || !lies_at(open, path, old) {
        return;
    }
    // Its directories are the agent's to replace by links.
    let remove = |top: &FsPath| {
        let dir = Within::open(top, path.parent().as_ref())?;
        std::fs::remove_file(dir.name(path.name()))
    };
    // Of a stub with nothing below, the overlay finds neither the file nor its absence.
    if remove(&open.volume.tree).is_err() {
        let _ = remove(&open.volume.upper);
    }
}

fn lift(open: &Open, path: &Path, row: &Row, pass: &Pass) -> Lifted {
    if !row.entry.is_file() {
        return Lifted::Up(path.clone(), None);
    }
    if is_another(open, path) {
        return Lifted::Up(path.clone(), None);
    }
    if is_written(&open.volume, path) {
        return leave(open, path, row, pass);
    }
    if has_no_room(open, row) {
        return Lifted::Later(path.clone(), nix::errno::Errno::ENOSPC.into());
    }
    match checked_below(path, &row.entry, pass) {
        Some(Ok(())) => copy_up(open, path, row).unwrap_or_else(|fault| Lifted::Later(path.clone(), fault)),
        Some(Err(why)) => Lifted::Bad(path.clone(), why, row.clone()),
        None => Lifted::Unclear(path.clone(), row.clone()),
    }
}

/// Whether something else has been moved there, or into the place of its directory. Who looks for what
/// was moved brings it up, by the name that it had.
fn is_another(open: &Open, path: &Path) -> bool {
    !lies_at(open, path, path)
}

/// Whether that is where the lower part of what is there now lies.
fn lies_at(open: &Open, path: &Path, old: &Path) -> bool {
    let from = Below::directory_below(open, path.parent().as_ref());
    let lies = moved::origin(path, &path.below(&open.volume.upper), from.as_deref());
    lies.as_deref() == Some(old.as_bytes())
}

/// It would be read for nothing, and what the kernel had brought up by then would stay and fill the
/// volume.
fn has_no_room(open: &Open, row: &Row) -> bool {
    open.volume.room().is_ok_and(|room| room.free < row.entry.size())
}

/// What is above is the gateway's, and stays as it is. Of an upload whose end is not known, what is
/// below may be the new object: it was checked before that was begun.
fn leave(open: &Open, path: &Path, row: &Row, pass: &Pass) -> Lifted {
    if row.unsure || !below::is_built_on(&open.volume, path) {
        return Lifted::Up(path.clone(), None);
    }
    match checked_below(path, &row.entry, pass) {
        Some(Ok(())) => Lifted::Up(path.clone(), None),
        Some(Err(why)) => Lifted::Bad(path.clone(), why, row.clone()),
        None => Lifted::Unclear(path.clone(), row.clone()),
    }
}

/// What is wrong with it; nothing when that cannot be told.
fn checked_below(path: &Path, entry: &Entry, pass: &Pass) -> Option<Result<(), String>> {
    for attempt in 0..TRIES {
        if attempt > 0 {
            pass.failed();
            if pass.is_over() {
                break;
            }
        }
        match below::check(path, entry) {
            Ok(outcome) => return Some(outcome),
            Err(fault @ Fault::Missing) => return fetch::lost(&fault).map(|why| Err(why.to_owned())),
            Err(_) => {}
        }
    }
    None
}

/// Why it is bad, or what keeps us from knowing.
fn ask_rclone(open: &Open, path: &Path) -> Result<String, Fault> {
    let name = format!("look-{:?}", std::thread::current().id()).replace(['(', ')'], "");
    let staging = open.volume.staging();
    let asked = open.bucket.rclone.download(&path.object(), &staging, &name);
    let _ = std::fs::remove_file(staging.join(&name));
    match asked {
        Ok(()) => Err(Fault::other("the mount of the bucket did not give it, and the bucket does")),
        Err(fault) => fetch::lost(&fault).map(str::to_owned).ok_or(fault),
    }
}

/// What is up already stays as it is.
fn copy_up(open: &Open, path: &Path, row: &Row) -> Result<Lifted, Fault> {
    let upper = path.below(&open.volume.upper);
    Ok(match bring_up(open, path, row)? {
        CameUp::Gone | CameUp::Untold => Lifted::Up(path.clone(), None),
        CameUp::AsItShould(stat) => {
            Lifted::Up(path.clone(), Some(stage::known_now(&open.volume, &upper, &stat, false)))
        }
        CameUp::Unlike(why) => Lifted::Bad(path.clone(), why, row.clone()),
        // Whoever pushes it, or the next pass, looks at what is below.
        CameUp::Written => Lifted::Skipped,
    })
}

/// What is above after the kernel has brought it up.
enum CameUp {
    AsItShould(nix::sys::stat::FileStat),
    /// The gateway has removed or moved it.
    Gone,
    /// The manifest does not say what it should be.
    Untold,
    /// Something else than what was checked, and nobody has written to it: the bucket gave the kernel
    /// another answer than us.
    Unlike(String),
    /// The gateway was there first.
    Written,
}

fn bring_up(open: &Open, path: &Path, row: &Row) -> Result<CameUp, Fault> {
    let upper = path.below(&open.volume.upper);
    let above = volume::look(&upper)?.map_or(row.entry.mtime_ns, |stat| volume::mtime_ns(&stat));
    if !lifting::lift(&open.volume, path, Some(row.entry.mtime_ns))? {
        return Ok(CameUp::Gone);
    }
    let Some(before) = volume::look(&upper)? else { return Ok(CameUp::Gone) };
    let Some(wanted) = row.entry.sha() else { return Ok(CameUp::Untold) };
    let (size, found) = stage::hash(&upper)?;
    let Some(after) = volume::look(&upper)? else { return Ok(CameUp::Gone) };
    let still = scan::sign_of(&upper, &before, false) == scan::sign_of(&upper, &after, false);
    Ok(if still && found == wanted {
        CameUp::AsItShould(after)
    } else if still && volume::mtime_ns(&after) == above {
        CameUp::Unlike(fetch::unlike(size, row.entry.size()))
    } else {
        CameUp::Written
    })
}

/// What was bad may have been put right in the bucket: it is fetched again, checked, and put where
/// nobody has written anything meanwhile.
pub(crate) fn once_more(open: &Open, desk: &Desk) -> Result<(), Fault> {
    let bad = open.index.bad()?;
    if bad.is_empty() {
        return Ok(());
    }
    let scratch = open.volume.staging().join("again");
    let (whole, parts) = (open.index.totals()?, scratch.join("parts"));
    let fetcher = Fetcher { bucket: &open.bucket, whole, parts, progress: &|_, _| {} };
    let wanted = bad.into_iter().map(|(path, row)| Wanted { path, may_be: vec![row.entry] }).collect();
    let whole = scratch.join("tree");
    // A name that nobody else has. Not made apart: there the random numbers' file is closed.
    let part = format!(".cvm-again-{}", owner::random_name()?);
    for got in fetcher.files(wanted, &whole)? {
        if let Got::Good(path, entry) = got
            && parallel::apart(|| bring_back(open, &path, &path.below(&whole), &part, &entry))?
        {
            desk.settled(&path.to_string());
            // The next scan finds it, and finds that the bucket has it.
            open.index.set_bad(&path, None)?;
            open.index.learn(&[Line { path, word: Word::Is(entry) }])?;
        }
    }
    Ok(std::fs::remove_dir_all(&scratch)?)
}

/// By a copy, as the tree may be another file system than the staging area; and through no link,
/// as the directories are the agent's to replace.
fn bring_back(open: &Open, path: &Path, from: &FsPath, part: &str, entry: &Entry) -> Result<bool, Fault> {
    let Ok(parent) = Within::open(&open.volume.tree, path.parent().as_ref()) else { return Ok(false) };
    let to = parent.name(path.name());
    if volume::look(&to)?.is_some() {
        return Ok(false);
    }
    let part = parent.name(part.as_bytes());
    let put = put_in_place(from, &part, &to, entry);
    if put.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    put.map(|()| true)
}

fn put_in_place(from: &FsPath, part: &FsPath, to: &FsPath, entry: &Entry) -> Result<(), Fault> {
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(part)?;
    std::io::copy(&mut std::fs::File::open(from)?, &mut copy)?;
    volume::dress(part, entry)?;
    Ok(std::fs::rename(part, to)?)
}

/// Checks and copies up everything below a directory that was moved while its files were only
/// below, or one file whose name has changed. Yields what could not be read there, and why, or nothing
/// where nothing is any more. What is bad is that under its old name, under which it stays in the
/// manifest.
pub(crate) fn lift_tree(open: &Open, path: &Path) -> Result<Option<Vec<Unread>>, Fault> {
    let Some(below) = parallel::apart(|| Below::of(open, path))? else { return Ok(None) };
    let (mut known, mut unread) = (Vec::new(), Vec::new());
    for (here, old) in below.files {
        if let Some(row) = open.index.get(&old)?.filter(|row| row.entry.is_file()) {
            known.push((here, old, row));
        } else {
            let why = "nothing is known of what it was".to_owned();
            unread.push(Unread { path: here, data_at: None, why });
        }
    }
    let lifted = parallel::each_apart(known, THREADS, |(here, old, row)| {
        let lifted = lift_moved(open, &here, &old, &row);
        (here, old, lifted)
    });
    for (here, old, lifted) in lifted {
        let bad = match lifted {
            Moved::Up => continue,
            Moved::Tainted(why) => {
                open.index.taint(&here, &why)?;
                continue;
            }
            Moved::Bad(why) => Some(why),
            Moved::Later(why) => {
                unread.push(Unread { path: here, data_at: Some(old), why });
                continue;
            }
            Moved::Unclear => ask_rclone(open, &old).ok(),
        };
        let Some(why) = bad else {
            let why = "its data, still under another name, is not to be had".to_owned();
            unread.push(Unread { path: here, data_at: Some(old), why });
            continue;
        };
        open.index.set_bad(&old, Some(&why))?;
        open.index.set_lower(std::slice::from_ref(&old), false)?;
        parallel::apart(|| hide(open, &here, &old));
    }
    parallel::apart(|| {
        below.directories.iter().try_for_each(|(dir, mtime_ns)| {
            let above = volume::look(&dir.below(&open.volume.upper))?;
            if above.is_some_and(|stat| volume::mtime_ns(&stat) == *mtime_ns) {
                return Ok(());
            }
            volume::set_mtime(&dir.below(&open.volume.tree), *mtime_ns)
        })
    })?;
    Ok(Some(unread))
}

enum Moved {
    /// Or somebody has written over it, or removed it.
    Up,
    /// It is above already.
    Tainted(String),
    Bad(String),
    Unclear,
    Later(String),
}

fn lift_moved(open: &Open, here: &Path, old: &Path, row: &Row) -> Moved {
    if let Some(why) = &row.bad {
        return Moved::Bad(why.clone());
    }
    if has_no_room(open, row) {
        return Moved::Later("the volume has no room for its data".to_owned());
    }
    match checked_below(old, &row.entry, &Pass::new()) {
        Some(Ok(())) => match bring_up(open, here, row) {
            // It may be back by the next look, or under another name.
            Ok(CameUp::Gone) => Moved::Later("it was moved on".to_owned()),
            Ok(CameUp::Unlike(_)) if !lies_at(open, here, old) => Moved::Later("it was moved on".to_owned()),
            Ok(CameUp::Unlike(why)) => Moved::Tainted(below::built_on(&why)),
            Ok(_) => Moved::Up,
            Err(fault) => Moved::Later(format!("its data cannot be brought up: {fault}")),
        },
        Some(Err(_)) if is_written(&open.volume, here) => Moved::Up,
        // The manifest speaks of that.
        Some(Err(_)) if is_written(&open.volume, old) => {
            Moved::Later("its old name is another file's".to_owned())
        }
        Some(Err(why)) => Moved::Bad(why),
        None => Moved::Unclear,
    }
}

/// What of a moved directory is only below.
#[derive(Default)]
struct Below {
    /// By their present names and by those that they have there.
    files: Vec<(Path, Path)>,
    /// The deepest first, and when they were last changed.
    directories: Vec<(Path, i64)>,
}

impl Below {
    fn of(open: &Open, path: &Path) -> Result<Option<Self>, Fault> {
        let mut below = Self::default();
        let from = Self::directory_below(open, path.parent().as_ref());
        Ok(below.add(open, path, from.as_deref())?.then_some(below))
    }

    /// Where the lower layer's part of a directory lies.
    fn directory_below(open: &Open, dir: Option<&Path>) -> Option<Vec<u8>> {
        let Some(dir) = dir else { return Some(Vec::new()) };
        let from = Self::directory_below(open, dir.parent().as_ref());
        moved::origin(dir, &dir.below(&open.volume.upper), from.as_deref())
    }

    /// Whether anything is there.
    fn add(&mut self, open: &Open, path: &Path, from: Option<&[u8]>) -> Result<bool, Fault> {
        use std::os::unix::ffi::OsStrExt as _;
        let at = path.below(&open.volume.tree);
        let old = moved::origin(path, &path.below(&open.volume.upper), from);
        let kind = match volume::look(&at) {
            Ok(Some(stat)) => Ok((volume::kind_of(&stat), volume::mtime_ns(&stat))),
            Ok(None) => return Ok(false),
            // The overlay has no more to say of what is missing below.
            Err(fault) => old.as_ref().map(|_| (libc::S_IFREG, 0)).ok_or(fault),
        };
        let (kind, mtime_ns) = kind?;
        match kind {
            libc::S_IFREG if !is_written(&open.volume, path) => {
                self.files.extend(old.and_then(|old| Path::new(&old)).map(|old| (path.clone(), old)));
            }
            libc::S_IFDIR => {
                let cannot = |error: std::io::Error| {
                    let why = Fault::from(error);
                    Fault::other(format!("what was moved to {path} cannot be listed in the bucket: {why}"))
                };
                for entry in std::fs::read_dir(&at).map_err(cannot)? {
                    let name = entry.map_err(cannot)?.file_name();
                    let Some(child) = Path::child(Some(path), name.as_bytes()) else { continue };
                    // Of a directory that has gone on its way, nothing was seen that is still below.
                    if !self.add(open, &child, old.as_deref())? && volume::look(&at)?.is_none() {
                        return Err(Fault::other(format!("{path} was moved on while it was looked into")));
                    }
                }
                // So that the scan of the upper layer sees it.
                self.directories.push((path.clone(), mtime_ns));
            }
            _ => {}
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Kind;

    fn path() -> Path {
        Path::new(b"a").unwrap()
    }

    fn row() -> Row {
        let kind = Kind::File { size: 0, sha: None, database: false };
        let entry = Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime_ns: 0, link: None };
        Row { entry, sign: None, lower: true, unsure: false, promised: false, bad: None }
    }

    #[test]
    fn passes_in_which_nothing_comes_up_are_ever_further_apart_up_to_a_minute() {
        let pauses: Vec<u64> = (1..8).map(|idle| pause(idle).as_secs()).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60, 60]);
        assert_eq!(pause(u32::MAX).as_secs(), 60);
    }

    #[test]
    fn a_pass_ends_when_nothing_can_be_had_and_not_because_of_some() {
        let pass = Pass::new();
        for n in 0..4 * ENOUGH {
            pass.note(1, &Lifted::Unclear(path(), row()));
            if n % 3 == 0 {
                pass.note(1, &Lifted::Up(path(), None));
            }
        }
        assert!(!pass.is_over());
        for _ in 0..ENOUGH {
            pass.note(1, &Lifted::Later(path(), Fault::Busy(503)));
        }
        assert!(pass.is_over() && pass.skips(0));
    }

    #[test]
    fn where_one_file_has_no_room_only_smaller_ones_are_read() {
        let pass = Pass::new();
        pass.note(100, &Lifted::Later(path(), nix::errno::Errno::ENOSPC.into()));
        assert!(pass.skips(100) && pass.skips(101) && !pass.skips(99));
    }
}
