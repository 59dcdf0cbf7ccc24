//! Files that the disk has given back older than the bucket has them.
//!
//! What the bucket has was on the disk first. But a disk may lie about that, and somebody may have put
//! older files back. The index, which is younger than those, shows it at the first start after the volume
//! was mounted anew: then they must not go into the bucket as if they were new. Each is set aside, and
//! what the bucket has takes its place. Nothing is deleted.
//!
//! A volume that was set back as a whole, with its index, is found out by the manifest's generations
//! (`ownership`).

use super::layers::take_over;
use super::{Intended, wanted};
use crate::bucket::Bucket;
use crate::chain::now_ms;
use crate::database::{self, Owner};
use crate::desk::Desk;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::fetch::{self, Fetcher, Got};
use crate::index::{Index, Row};
use crate::lineage::State;
use crate::stage;
use crate::volume::{self, Volume, Within};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path as FsPath;

/// Where the volume was mounted when its tree was last in use, and not given up in order.
const IN_USE: &str = "in_use_at";
const REMEDY: &str = "look at the disk, or at who put older files on it; take what you need from what is set aside and delete the rest; `cvm storage accept` ends this message";
/// The database's own go with it.
const BESIDE: [&str; 4] = ["-wal", "-shm", "-journal", ""];

/// Once the tree stands: `place` is this mount of the volume, in this life of the kernel.
pub(super) fn is_in_use(index: &Index, place: &str) -> Result<(), Fault> {
    index.set_meta(IN_USE, place)
}

/// After a stop that left nothing to do. What is changed on the volume from here on is meant.
pub(crate) fn is_left_in_order(index: &Index) -> Result<(), Fault> {
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
    if index.meta(IN_USE)?.is_none_or(|was| was.is_empty() || was == place) {
        return Ok(());
    }
    let in_layer = fs::read_dir(volume.own.join("upper"))?.next().is_some();
    let volume = if in_layer { volume.overlaid(&volume.tree) } else { Volume::plain(&volume.root)? };
    let mut older = Vec::new();
    for (path, row) in index.all()? {
        if is_older(&volume, index, &path, &row)? && !has_the_same(&volume, &path, &row, intended) {
            older.push((path, row));
        }
    }
    if older.is_empty() { Ok(()) } else { exchange(desk, bucket, index, &volume, intended, &older) }
}

/// Whether what is there shows that it comes from before the bucket was told of this file.
fn is_older(volume: &Volume, index: &Index, path: &Path, row: &Row) -> Result<bool, Fault> {
    let Some(sign) = row.sign.filter(|_| row.entry.is_file() && !row.lower && row.bad.is_none()) else {
        return Ok(false);
    };
    let then = if row.entry.is_database() { index.state(path)? } else { None };
    let changed =
        if row.entry.is_database() { then.map_or(0, |then| then.changed()) } else { sign.changed() };
    let at = path.below(&volume.upper);
    let Some(stat) = volume::look(&at)? else { return is_missing_before(volume, path, changed) };
    if volume::kind_of(&stat) != libc::S_IFREG {
        return Ok(false);
    }
    Ok(match then {
        Some(then) if database::has_magic(&at) || stat.st_size == 0 => {
            State::of(&volume.upper, path).is_some_and(|now| now.is_earlier_than(&then))
        }
        _ => volume::ctime_ns(&stat) < changed,
    })
}

/// Who removes or moves a file changes its directory: one that has not changed since then never had it
/// in this past.
fn is_missing_before(volume: &Volume, path: &Path, changed: i64) -> Result<bool, Fault> {
    let mut above = path.parent();
    loop {
        let at = above.as_ref().map_or_else(|| volume.upper.clone(), |dir| dir.below(&volume.upper));
        match (volume::look(&at)?, above) {
            (Some(stat), _) => {
                let is_directory = volume::kind_of(&stat) == libc::S_IFDIR;
                return Ok(is_directory && volume::ctime_ns(&stat) < changed);
            }
            (None, None) => return Ok(false),
            (None, Some(dir)) => above = dir.parent(),
        }
    }
}

/// Whether it is what the bucket has all the same.
fn has_the_same(volume: &Volume, path: &Path, row: &Row, intended: &Intended) -> bool {
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
    is(&row.entry) || intended.get(path).into_iter().flatten().any(is)
}

fn exchange(
    desk: &Desk,
    bucket: &Bucket,
    index: &Index,
    volume: &Volume,
    intended: &Intended,
    older: &[(Path, Row)],
) -> Result<(), Fault> {
    let name = format!("set-back-{}", now_ms());
    let (aside, scratch) = (volume.own.join("aside").join(&name), volume.staging().join("set-back"));
    let all = older.iter().map(|(path, row)| wanted(path, row, intended)).collect();
    let parts = volume.own.join("staging/parts");
    let fetcher = Fetcher { bucket, whole: index.totals()?, parts, progress: &|_, _| {} };
    let got = fetcher.files(all, &scratch)?;
    // What cannot be had now may be had by the next try, and nothing has been changed yet.
    if let Some(fault) = got.iter().find_map(|one| match one {
        Got::Later(_, fault) => Some(fault.clone()),
        _ => None,
    }) {
        return Err(fault);
    }
    for one in &got {
        let Got::Good(path, entry) = one else { continue };
        put_aside(volume, path, entry.is_database(), &aside)?;
        let dir = directory_of(volume, index, path)?;
        fs::rename(path.below(&scratch), dir.name(path.name()))?;
        let what = format!(
            "the disk had an older state of it than the bucket, as after a loss of power that it does not survive; what the bucket has is in its place, and what was there is in .cvm/storage/aside/{name} on the volume"
        );
        desk.incident(&path.to_string(), &what, REMEDY);
    }
    desk.warn(format!(
        "The disk had {} files older than the bucket; what the bucket has was put in their place, and they are set aside in .cvm/storage/aside/{name} on the volume",
        got.len()
    ));
    let _ = fs::remove_dir_all(&scratch);
    fetch::settle_on_disk(&volume.own)?;
    // Of what is bad in the bucket, the older state is all there is.
    take_over(index, volume, got).map(drop)
}

fn put_aside(volume: &Volume, path: &Path, is_database: bool, aside: &FsPath) -> Result<(), Fault> {
    let Ok(dir) = Within::open(&volume.upper, path.parent().as_ref()) else { return Ok(()) };
    for suffix in if is_database { &BESIDE[..] } else { &BESIDE[3..] } {
        let from = dir.name(&[path.name(), suffix.as_bytes()].concat());
        let is_file = |stat| volume::kind_of(&stat) == libc::S_IFREG;
        if !volume::look(&from)?.is_some_and(is_file) {
            continue;
        }
        let name = [path.as_bytes(), suffix.as_bytes()].concat();
        let to = aside.join(OsStr::from_bytes(&name));
        fs::create_dir_all(to.parent().unwrap_or(aside))?;
        if suffix.is_empty() {
            // It is replaced as one step: were it gone for a moment and we with it, it would be taken for
            // removed.
            fs::hard_link(from, to)?;
        } else {
            fs::rename(from, to)?;
        }
    }
    Ok(())
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
