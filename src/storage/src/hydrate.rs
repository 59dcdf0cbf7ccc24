//! From below to above: every file whose data is only in the mount is read, checked, and then
//! copied up by the kernel, which does it as one step whoever else writes at the same moment.
//!
//! Refuses to copy up what does not match the manifest: that is hidden, and an incident.
//! May import: `desk`, `entry`, `fault`, `fetch`, `index`, `lifting`, `manifest`, `moved`, `order`,
//! `scan`, `stage`, `volume`.

use crate::desk::{Desk, Open};
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::{Known, Row};
use crate::manifest::{Line, Word};
use crate::order::Unread;
use crate::volume::{self, Within};
use crate::{lifting, moved, parallel, scan, stage};
use cvm_blueprint::paths;
use cvm_blueprint::storage::Progress;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path as FsPath;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const THREADS: usize = 12;
/// Rows that are marked at once.
const BATCH: usize = 256;
/// Reads of one file that fail before somebody else is asked about it.
const TRIES: u32 = 3;
const AGAIN: Duration = Duration::from_secs(5);

pub(crate) const REMEDY: &str = "look at the object's versions in the bucket; put a good one back and restart storage, or give the file up with `cvm storage accept`";

enum Lifted {
    /// With what it is known by, unless somebody has written to it.
    Up(Path, Option<Known>),
    Bad(Path, String),
    /// The mount says "I/O error" for everything; rclone says what it is.
    Unclear(Path),
    Later,
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
    while !stop.load(Ordering::Relaxed) {
        let mut rows = open.index.lower()?;
        if rows.is_empty() {
            desk.progress(None);
            return Ok(true);
        }
        rows.sort_by_key(|(_, row)| (!row.entry.is_database(), row.entry.size()));
        let mut progressed = false;
        for batch in rows.chunks(BATCH) {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let lifted = parallel::each_apart(batch.to_vec(), THREADS, |(path, row)| {
                let lifted = lift(open, &path, &row);
                if matches!(lifted, Lifted::Up(..)) {
                    files.fetch_add(u64::from(row.entry.is_file()), Ordering::Relaxed);
                    bytes.fetch_add(row.entry.size(), Ordering::Relaxed);
                }
                lifted
            });
            progressed |= settle(open, desk, lifted)?;
            show();
        }
        if !progressed {
            std::thread::sleep(AGAIN);
        }
    }
    Ok(false)
}

fn settle(open: &Open, desk: &Desk, lifted: Vec<Lifted>) -> Result<bool, Fault> {
    let (mut up, mut known) = (Vec::new(), Vec::new());
    let mut progressed = false;
    for one in lifted {
        let one = match one {
            Lifted::Unclear(path) => ask_rclone(open, &path),
            one => one,
        };
        match one {
            Lifted::Up(path, Some(one)) => known.push((path, one)),
            Lifted::Up(path, None) => up.push(path),
            Lifted::Bad(path, why) => {
                progressed = true;
                open.index.set_bad(&path, Some(&why))?;
                open.index.set_lower(std::slice::from_ref(&path), false)?;
                parallel::apart(|| hide(open, &path));
                desk.incident(&path.to_string(), &why, REMEDY);
            }
            Lifted::Later | Lifted::Unclear(_) => {}
        }
    }
    progressed |= !up.is_empty() || !known.is_empty();
    open.index.set_lower(&up, false)?;
    open.index.set_known(&known)?;
    Ok(progressed)
}

/// What is wrong in the bucket is not there for the gateway. What it has already written over is
/// its own and stays.
fn hide(open: &Open, path: &Path) {
    let upper = path.below(&open.volume.upper);
    if written(open, path) {
        return;
    }
    let stub = volume::look(&upper).ok().flatten().is_some();
    let removed = std::fs::remove_file(path.below(&open.volume.tree));
    // Of a stub with nothing below, the overlay finds neither the file nor its absence.
    if removed.is_err() && stub {
        let _ = std::fs::remove_file(&upper);
    }
}

/// Whether the upper layer has content of its own for it.
fn written(open: &Open, path: &Path) -> bool {
    let above = path.below(&open.volume.upper);
    volume::look(&above).ok().flatten().is_some()
        && volume::mark(&above, c"trusted.overlay.metacopy").is_none()
}

fn lift(open: &Open, path: &Path, row: &Row) -> Lifted {
    if !row.entry.is_file() || written(open, path) {
        return Lifted::Up(path.clone(), None);
    }
    match checked_below(path, &row.entry) {
        Some(Ok(())) => {
            copy_up(open, path, &row.entry).map_or(Lifted::Later, |known| Lifted::Up(path.clone(), known))
        }
        // Written over while it was read, and pushed: the object is the new one, and ours.
        Some(Err(_)) if written(open, path) => Lifted::Up(path.clone(), None),
        Some(Err(why)) => Lifted::Bad(path.clone(), why),
        None => Lifted::Unclear(path.clone()),
    }
}

/// What is wrong with it; nothing when that cannot be told.
fn checked_below(path: &Path, entry: &Entry) -> Option<Result<(), String>> {
    for _ in 0..TRIES {
        match check_below(path, entry) {
            Ok(outcome) => return Some(outcome),
            Err(fault @ Fault::Missing) => return fetch::lost(&fault).map(|why| Err(why.to_owned())),
            Err(_) => {}
        }
    }
    None
}

/// Reads it where the mount shows it. The kernel keeps what was read, and copies up from that.
fn check_below(path: &Path, entry: &Entry) -> Result<Result<(), String>, Fault> {
    let Kind::File { size, sha: Some(sha), .. } = entry.kind else { return Ok(Ok(())) };
    let at = path.below(std::path::Path::new(paths::BUCKET_MOUNT));
    if volume::look(&at)?.is_none() {
        return Err(Fault::Missing);
    }
    let (found_size, found) = stage::hash(&at)?;
    Ok(if (found_size, found) == (size, sha) { Ok(()) } else { Err(fetch::unlike(found_size, size)) })
}

fn ask_rclone(open: &Open, path: &Path) -> Lifted {
    let name = format!("look-{:?}", std::thread::current().id()).replace(['(', ')'], "");
    let staging = open.volume.staging();
    let asked = open.bucket.rclone.download(&path.object(), &staging, &name);
    let _ = std::fs::remove_file(staging.join(&name));
    asked.map_or_else(|fault| lost(path, &fault), |()| Lifted::Later)
}

fn lost(path: &Path, fault: &Fault) -> Lifted {
    fetch::lost(fault).map_or(Lifted::Later, |why| Lifted::Bad(path.clone(), why.to_owned()))
}

/// What is up already stays as it is.
fn copy_up(open: &Open, path: &Path, entry: &Entry) -> Result<Option<Known>, Fault> {
    let upper = path.below(&open.volume.upper);
    if !lifting::lift(&open.volume, path, Some(entry.mtime_ns))? {
        // The gateway removed or moved it meanwhile.
        return Ok(None);
    }
    let Some(before) = volume::look(&upper)? else { return Ok(None) };
    let untouched = entry.sha().is_some() && stage::hash(&upper)?.1 == entry.sha().unwrap_or_default();
    let Some(after) = volume::look(&upper)? else { return Ok(None) };
    let same = untouched && scan::sign_of(&upper, &before, false) == scan::sign_of(&upper, &after, false);
    Ok(same.then(|| scan::known_by(&upper, &after, false)))
}

/// What was bad may have been put right in the bucket: it is fetched again, checked, and put where
/// nobody has written anything meanwhile.
pub(crate) fn once_more(open: &Open, desk: &Desk) -> Result<(), Fault> {
    let bad = open.index.bad()?;
    if bad.is_empty() {
        return Ok(());
    }
    let scratch = open.volume.staging().join("again");
    let fetcher = Fetcher { bucket: &open.bucket, parts: scratch.join("parts"), progress: &|_, _| {} };
    let wanted = bad.into_iter().map(|(path, row)| Wanted { path, may_be: vec![row.entry] }).collect();
    let whole = scratch.join("tree");
    for got in fetcher.files(wanted, &whole)? {
        if let Got::Good(path, entry) = got
            && parallel::apart(|| bring_back(open, &path, &path.below(&whole), &entry))?
        {
            desk.settled(&path.to_string());
            // The next scan finds it, and finds that the bucket has it.
            open.index.apply(&[Line { path, word: Word::Is(entry) }], None)?;
        }
    }
    Ok(std::fs::remove_dir_all(&scratch)?)
}

/// By a copy, as the tree may be another file system than the staging area; and through no link,
/// as the directories are the agent's to replace.
fn bring_back(open: &Open, path: &Path, from: &FsPath, entry: &Entry) -> Result<bool, Fault> {
    let Ok(parent) = Within::open(&open.volume.tree, path.parent().as_ref()) else { return Ok(false) };
    let (part, to) = (parent.name(b".cvm-again"), parent.name(path.name()));
    if volume::look(&to)?.is_some() {
        return Ok(false);
    }
    let _ = std::fs::remove_file(&part);
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    std::io::copy(&mut std::fs::File::open(from)?, &mut copy)?;
    volume::dress(&part, entry)?;
    std::fs::rename(part, to)?;
    Ok(true)
}

/// Checks and copies up everything below a directory that was moved while its files were only
/// below, or one file whose name has changed. Yields what could not be read there, and why. What is
/// bad is that under its old name, under which it stays in the manifest.
pub(crate) fn lift_tree(open: &Open, path: &Path) -> Result<Vec<Unread>, Fault> {
    let below = parallel::apart(|| Below::of(open, path))?;
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
            Moved::Bad(why) => Some(why),
            Moved::Later(why) => {
                unread.push(Unread { path: here, data_at: Some(old), why });
                continue;
            }
            Moved::Unclear => match ask_rclone(open, &old) {
                Lifted::Bad(_, why) => Some(why),
                _ => None,
            },
        };
        let Some(why) = bad else {
            let why = "its data, still under another name, is not to be had".to_owned();
            unread.push(Unread { path: here, data_at: Some(old), why });
            continue;
        };
        open.index.set_bad(&old, Some(&why))?;
        open.index.set_lower(std::slice::from_ref(&old), false)?;
        parallel::apart(|| hide(open, &here));
    }
    parallel::apart(|| {
        below.directories.iter().try_for_each(|(at, mtime_ns)| volume::set_mtime(at, *mtime_ns))
    })?;
    Ok(unread)
}

enum Moved {
    /// Or somebody has written over it, or removed it.
    Up,
    Bad(String),
    Unclear,
    Later(String),
}

fn lift_moved(open: &Open, here: &Path, old: &Path, row: &Row) -> Moved {
    if let Some(why) = &row.bad {
        return Moved::Bad(why.clone());
    }
    match checked_below(old, &row.entry) {
        Some(Ok(())) => match lifting::lift(&open.volume, here, Some(row.entry.mtime_ns)) {
            Ok(_) => Moved::Up,
            Err(fault) => Moved::Later(format!("its data cannot be brought up: {fault}")),
        },
        Some(Err(_)) if written(open, here) => Moved::Up,
        // The manifest speaks of that.
        Some(Err(_)) if written(open, old) => Moved::Later("its old name is another file's".to_owned()),
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
    directories: Vec<(std::path::PathBuf, i64)>,
}

impl Below {
    fn of(open: &Open, path: &Path) -> Result<Self, Fault> {
        let mut below = Self::default();
        let from = Self::directory_below(open, path.parent().as_ref());
        below.add(open, path, from.as_deref())?;
        Ok(below)
    }

    /// Where the lower layer's part of a directory lies.
    fn directory_below(open: &Open, dir: Option<&Path>) -> Option<Vec<u8>> {
        let Some(dir) = dir else { return Some(Vec::new()) };
        let from = Self::directory_below(open, dir.parent().as_ref());
        moved::origin(dir, &dir.below(&open.volume.upper), from.as_deref())
    }

    fn add(&mut self, open: &Open, path: &Path, from: Option<&[u8]>) -> Result<(), Fault> {
        use std::os::unix::ffi::OsStrExt as _;
        let at = path.below(&open.volume.tree);
        let old = moved::origin(path, &path.below(&open.volume.upper), from);
        let kind = match volume::look(&at) {
            Ok(Some(stat)) => Ok((volume::kind_of(&stat), volume::mtime_ns(&stat))),
            Ok(None) => return Ok(()),
            // The overlay has no more to say of what is missing below.
            Err(fault) => old.as_ref().map(|_| (libc::S_IFREG, 0)).ok_or(fault),
        };
        let (kind, mtime_ns) = kind?;
        match kind {
            libc::S_IFREG if !written(open, path) => {
                self.files.extend(old.and_then(|old| Path::new(&old)).map(|old| (path.clone(), old)));
            }
            libc::S_IFDIR => {
                for entry in std::fs::read_dir(&at)? {
                    if let Some(child) = Path::child(Some(path), entry?.file_name().as_bytes()) {
                        self.add(open, &child, old.as_deref())?;
                    }
                }
                // So that the scan of the upper layer sees it.
                self.directories.push((at, mtime_ns));
            }
            _ => {}
        }
        Ok(())
    }
}
