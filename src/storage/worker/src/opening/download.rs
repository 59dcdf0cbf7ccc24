//! Sync mode: everything is fetched before the gateway starts.

use super::layers::{Place, Upper, is_as_said, is_whole, make_way, take_over};
use super::{Making, intended, wanted};
use crate::below;
use crate::bucket::Bucket;
use crate::entry::{Entry, Path};
use crate::fault::Fault;
use crate::fetch::{self, Fetcher, Got};
use crate::index::{Index, Known, Row, Sign};
use crate::moved;
use crate::parallel;
use crate::volume::{self, Volume};
use cvm_protocol::storage::{Progress, WorkerPhase};
use std::fs;
use std::path::Path as FsPath;

impl Making<'_> {
    /// Yields what the bucket does not have right.
    pub(super) fn by_download(&self, volume: &Volume) -> Result<Vec<(Path, String)>, Fault> {
        let Self { desk, bucket, index, intents, continued, .. } = *self;
        desk.phase(WorkerPhase::Restoring);
        let times = flatten(bucket, index, volume)?;
        let laid = index.meta("laid")?.is_some();
        let ((rows, _), intended) = (index.standing()?, intended(intents));
        if !laid {
            make_way(desk, volume, &rows)?;
        }
        // Once it has all been here, what is not there was removed.
        let whole = continued && index.meta("restored")?.is_some();
        let missing: Vec<&(Path, Row)> = rows
            .iter()
            .filter(|(_, row)| row.bad.is_none() && row.sign.is_none() && (row.lower || !whole))
            .collect();
        let (mut files, mut skeleton, mut to_check) = (Vec::new(), Vec::new(), Vec::new());
        for (path, row) in missing {
            let there = volume::look(&path.below(&volume.tree))?.is_some();
            if row.entry.is_file() {
                if !there {
                    files.push(wanted(path, row, &intended));
                } else if !laid {
                    to_check.push((path, row));
                }
            } else if !laid || row.lower && !there {
                // Those of a restore that was killed too: filling them has changed their times.
                skeleton.push((path.clone(), row.entry.clone()));
            }
        }
        // What a restore that did not come to its end has put in place.
        let mut linked = Vec::new();
        for (path, row, good) in parallel::each(to_check, fetch::CHECKERS, |(path, row)| {
            (path, row, is_whole(&volume.tree, path, row))
        }) {
            if !good? {
                files.push(wanted(path, row, &intended));
            } else if row.entry.link.is_some() {
                linked.push((path.clone(), row.entry.clone()));
            }
        }
        let (total, bytes_total) = fetch::total(&files);
        if total > 0 {
            desk.info(format!(
                "Restoring {total} files ({bytes_total} bytes) from the bucket before the gateway starts"
            ));
        }
        let progress = |done: u64, bytes: u64| {
            desk.progress(Some(Progress {
                what: "restoring from the bucket".to_owned(),
                files_done: done.min(total),
                files_total: total,
                bytes_done: bytes.min(bytes_total),
                bytes_total,
            }));
        };
        fetch::skeleton(&skeleton, &volume.tree)?;
        let parts = volume.own.join("staging/parts");
        let fetcher = Fetcher { bucket, whole: index.totals()?, parts, progress: &progress };
        desk.did("skeleton");
        let got = fetcher.files_in_haste(files, &volume.tree)?;
        desk.progress(None);
        desk.did("fetch");
        let restored: Vec<(Path, Entry)> = got
            .iter()
            .filter_map(|g| match g {
                Got::Good(path, entry) => Some((path.clone(), entry.clone())),
                _ => None,
            })
            .chain(skeleton)
            .chain(linked)
            .collect();
        fetch::finish(&restored, &volume.tree, &volume.staging())?;
        for (path, time) in times {
            // What is gone meanwhile has no time.
            let _ = volume::set_mtime(&path.below(&volume.tree), time);
        }
        desk.did("links");
        fetch::settle_on_disk(&volume.own)?;
        desk.did("disk");
        let bad = take_over(index, volume, got)?;
        check_what_began_below(bucket, index, volume, &rows)?;
        index.set_all_lower(false)?;
        index.set_meta("laid", "1")?;
        Ok(bad)
    }
}

/// What was written to on a mount, and kept, before anybody had looked at what it was.
fn check_what_began_below(
    bucket: &Bucket,
    index: &Index,
    volume: &Volume,
    rows: &[(Path, Row)],
) -> Result<(), Fault> {
    let unchecked = |row: &Row| row.lower && row.entry.is_file() && row.bad.is_none() && !row.unsure;
    for (path, row) in rows.iter().filter(|(_, row)| unchecked(row)) {
        if below::is_built_on(volume, path)
            && !is_as_said(&volume.tree, path, row)?
            && let Err(why) = below::check_object(bucket, volume, path, &row.entry)?
        {
            index.taint(path, &below::built_on(&why))?;
        }
    }
    Ok(())
}

/// Makes a plain tree of an upper layer: what it hides is gone, what it holds is at the top. Yields
/// the times of its directories, which change while files are put into them.
pub(super) fn flatten(bucket: &Bucket, index: &Index, volume: &Volume) -> Result<Vec<(Path, i64)>, Fault> {
    let upper = volume.own.join("upper");
    if fs::read_dir(&upper)?.next().is_none() {
        return Ok(Vec::new());
    }
    let layered = Volume { upper: upper.clone(), overlay: true, ..Volume::plain(&volume.root)? };
    let mut times = Vec::new();
    moved::times(&upper, None, &mut times)?;
    moved::bring_up(bucket, index, &layered)?;
    let mut layers = Upper::new(&layered);
    let mut gone = Vec::new();
    for (path, row) in index.all()? {
        if row.sign.is_none() && layers.place(&path)? == Place::Hidden {
            gone.push(path);
        }
    }
    // Not lower any more, and not there: the next scan takes them for what they are.
    index.set_lower(&gone, false)?;
    let unlike_any = Known { sign: Sign { size: 0, mtime_ns: 0, change: 0 }, handle: None, state: None };
    let known: Vec<_> = gone.into_iter().map(|path| (path, unlike_any.clone())).collect();
    index.set_known(&known)?;
    strip(&upper)?;
    let _ = fs::remove_dir_all(upper.join(".cvm"));
    Volume::move_tree(&upper, &volume.root)?;
    Ok(times)
}

/// Removes what only overlayfs understands. A file whose data is only below is fetched again.
fn strip(top: &FsPath) -> Result<(), Fault> {
    let (mut directories, mut next) = (vec![top.to_owned()], 0);
    while let Some(dir) = directories.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if volume::is_too_long(&path) {
                continue;
            }
            let Some(stat) = volume::look(&path)? else { continue };
            if volume::is_whiteout(&stat) || volume::mark(&path, c"trusted.overlay.metacopy").is_some() {
                fs::remove_file(&path)?;
            } else if volume::kind_of(&stat) == libc::S_IFDIR {
                directories.push(path);
            }
        }
    }
    // Those inside first: a boot that goes on here still needs what is said of those above.
    directories.iter().skip(1).rev().for_each(|dir| volume::remove_marks(dir));
    Ok(())
}
