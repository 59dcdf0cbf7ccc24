//! FUSE mode: the frozen mount of the bucket below, what the gateway reads first and all that the
//! mount cannot show above it.

use super::{Intended, Making, Stands, intended, judge, wanted};
use crate::bucket::Bucket;
use crate::desk::Desk;
use crate::entry::{Entry, Kind, Path};
use crate::fault::{Accepted, Fault};
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::{Index, Row};
use crate::manifest::{Line, Word};
use crate::mount::{self, NoMount, StandIn};
use crate::rclone::MountModes;
use crate::volume::{self, Volume, Within};
use crate::{rules, stage};
use cvm_protocol::storage::{Mode, Progress};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path as FsPath;

/// The largest file that is fetched before the gateway starts only because of where it lies.
const EARLY_MAX: u64 = 4 << 20;

impl Making<'_> {
    /// Refusals of the mount are a reason for the other mode; faults of the tree are not.
    pub(super) fn by_mount(
        &self,
        plain: &Volume,
        accepted: &Accepted,
    ) -> Result<Result<Stands, Fault>, NoMount> {
        let Self { desk, bucket, index, intents, continued, owner } = *self;
        let no = |fault: Fault| NoMount(fault.to_string());
        desk.info("Attempting FUSE mount...");
        mount::bind_volume()?;
        let volume = Volume::plain(FsPath::new(cvm_protocol::paths::VOLUME)).map_err(no)?;
        let overlaid = volume.overlaid(&plain.tree);
        // What a boot in sync mode, or a local one, left at the top of the volume is the upper layer.
        let upper_was_empty = fs::read_dir(&overlaid.upper).is_ok_and(|mut entries| entries.next().is_none());
        let at_top = Volume::move_tree(&volume.root, &overlaid.upper).map_err(no)?;
        mount::hide_reserved(&overlaid).map_err(no)?;
        // A tree at the top that was only half restored is not the whole one.
        let whole = at_top > 0 && continued && index.meta("restored").map_err(no)?.is_some();
        let independent = index.meta("independent").map_err(no)?.is_some() || whole;
        if independent || index.totals().map_err(no)?.files == 0 {
            index.set_all_lower(false).map_err(no)?;
            index.set_meta("independent", "1").map_err(no)?;
            mount::overlay(&overlaid, None)?;
            desk.info("The volume holds the whole tree; no mount of the bucket is needed");
            return Ok(Ok(Stands { volume: overlaid, mode: Mode::Fuse, reason: None, stand_in: None }));
        }
        if at_top > 0 && continued {
            // A restore in sync mode did not come to its end.
            let laid = index.meta("laid").map_err(no)?.is_some();
            index.set_unseen_lower(laid).map_err(no)?;
            index.set_meta("lowered", "1").map_err(no)?;
        } else if !continued || upper_was_empty || index.meta("lowered").map_err(no)?.is_none() {
            // Remembered apart: a worker that died before this must not take what it had not even
            // looked at for removed.
            index.set_all_lower(true).map_err(no)?;
            index.set_meta("lowered", "1").map_err(no)?;
        }
        desk.did("volume");
        let layer = Layer::lay(desk, index, &overlaid, intents, owner).map_err(no)?;
        desk.did("layer");
        // One waits for the bucket, the other for the kernel.
        let (mounted, bad) = std::thread::scope(|scope| {
            let mounting = scope.spawn(|| mount::mount_bucket(&bucket.rclone, &layer.names, &layer.modes));
            let bad = layer.fetch(desk, bucket, index, &overlaid);
            let mounted = mounting.join();
            (mounted.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), bad)
        });
        let bad = bad.map_err(no)?;
        desk.did("first files");
        if let Err(fault) = judge(desk, index, &bad, accepted) {
            mount::unmount_bucket().map_err(no)?;
            return Ok(Err(fault));
        }
        mounted?;
        forget_origins(&overlaid.upper).map_err(no)?;
        mount::overlay(&overlaid, Some(cvm_protocol::paths::BUCKET_MOUNT))?;
        desk.info("rclone FUSE mount ready at /data");
        let stand_in = match StandIn::hand_over(&overlaid) {
            Ok(stand_in) => Some(stand_in),
            Err(fault) => {
                desk.warn(format!("Nobody stands in for the mount if this worker dies: {fault}"));
                None
            }
        };
        Ok(Ok(Stands { volume: overlaid, mode: Mode::Fuse, reason: None, stand_in }))
    }
}

/// By these marks overlayfs finds the file below that one above was copied from, by a number that
/// the mount gave it. An earlier mount's numbers are other files' now: two files above would be
/// taken for copies of one, and the second could not be opened (ESTALE). Empty means unknown.
fn forget_origins(top: &FsPath) -> Result<(), Fault> {
    const ORIGIN: &std::ffi::CStr = c"trusted.overlay.origin";
    let mut to_do = vec![top.to_owned()];
    while let Some(dir) = to_do.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            // Nothing of ours is that deep.
            if volume::is_too_long(&path) {
                continue;
            }
            let Some(stat) = volume::look(&path)? else { continue };
            // Links and whiteouts: nobody opens them twice.
            if !matches!(volume::kind_of(&stat), libc::S_IFREG | libc::S_IFDIR) {
                continue;
            }
            if volume::mark(&path, ORIGIN).is_some_and(|handle| !handle.is_empty()) {
                volume::set_mark(&path, ORIGIN, b"")?;
            }
            if volume::kind_of(&stat) == libc::S_IFDIR {
                to_do.push(path);
            }
        }
    }
    Ok(())
}

/// The modes that most files have, so that few need a correction.
fn usual_modes<'a>(lower: impl Iterator<Item = &'a Row>) -> (u32, u32) {
    let mut counts: HashMap<(bool, u32), u32> = HashMap::new();
    for row in lower {
        *counts.entry((row.entry.is_file(), row.entry.mode)).or_default() += 1;
    }
    let most = |files: bool, usual: u32| {
        counts
            .iter()
            .filter(|((f, _), _)| *f == files)
            .max_by_key(|(_, n)| **n)
            .map_or(usual, |((_, mode), _)| *mode)
    };
    (most(true, 0o600), most(false, 0o700))
}

/// Everything that must not wait for the mount, as far as it is in the upper layer before there is
/// one, and what the mount is to show.
struct Layer {
    /// What is fetched and checked before the gateway starts.
    early: Vec<Wanted>,
    /// Directories and links, and those of them that are made here.
    above: Vec<Path>,
    skeleton: Vec<(Path, Entry)>,
    /// Files of several names.
    linked: Vec<(Path, Entry)>,
    names: Vec<u8>,
    modes: MountModes,
}

impl Layer {
    fn lay(
        desk: &Desk,
        index: &Index,
        volume: &Volume,
        intents: &[Line],
        owner: (u32, u32),
    ) -> Result<Self, Fault> {
        let (rows, astray) = index.standing()?;
        // Of these nothing is anywhere: the scan takes them for what they are.
        index.set_lower(&astray, false)?;
        let intended = intended(intents);
        let laid = index.meta("laid")?.is_some();
        if !laid {
            make_way(desk, volume, &rows)?;
        }
        let lower = || rows.iter().filter(|(_, row)| row.lower);
        let (file, directory) = usual_modes(lower().map(|(_, row)| row));
        let modes = MountModes { uid: owner.0, gid: owner.1, file, directory };
        let has_usual = |entry: &Entry| (entry.mode, entry.uid, entry.gid) == (file, owner.0, owner.1);
        let of_several_names =
            |(path, row): &(Path, Row)| row.entry.link.is_some().then(|| (path.clone(), row.entry.clone()));
        let linked = rows.iter().filter_map(of_several_names).collect();
        let mut this = Self {
            early: Vec::new(),
            above: Vec::new(),
            skeleton: Vec::new(),
            linked,
            names: Vec::new(),
            modes,
        };
        let mut stubs = Vec::new();
        let mut upper = Upper::new(volume);
        for (path, row) in lower() {
            let place = if row.bad.is_some() { Place::Hidden } else { upper.place(path)? };
            if !row.entry.is_file() {
                if place != Place::Hidden {
                    if !laid || place == Place::Free {
                        // Those of a restore that was killed too: they are dressed when all is in them.
                        this.skeleton.push((path.clone(), row.entry.clone()));
                    }
                    this.above.push(path.clone());
                }
                continue;
            }
            let is_wanted = match place {
                // Removed or moved on this volume before: the scan says which.
                Place::Hidden => false,
                Place::Taken => !laid && !is_whole(&volume.upper, path, row)?,
                Place::Free => true,
            };
            if is_wanted && is_early(path, row, &intended) {
                this.early.push(wanted(path, row, &intended));
                continue;
            }
            if is_wanted && !has_usual(&row.entry) {
                stubs.push((path, &row.entry));
            }
            if path.is_plain() {
                this.names.extend_from_slice(path.as_bytes());
                this.names.push(b'\n');
            }
        }
        fetch::skeleton(&this.skeleton, &volume.upper)?;
        for (path, entry) in stubs {
            stub(&volume.upper, path, entry)?;
        }
        Ok(this)
    }

    /// Yields what the bucket does not have right.
    pub(super) fn fetch(
        &self,
        desk: &Desk,
        bucket: &Bucket,
        index: &Index,
        volume: &Volume,
    ) -> Result<Vec<(Path, String)>, Fault> {
        let bad = early_files(desk, bucket, index, volume, self.early.clone())?;
        // Their data is where it is; the manifest says the rest.
        index.set_lower(&self.above, false)?;
        let there = |(path, _): &&(Path, Entry)| path.below(&volume.upper).exists();
        let linked: Vec<_> = self.linked.iter().filter(there).cloned().collect();
        fetch::finish(&linked, &volume.upper, &volume.staging())?;
        fetch::dress_directories(&self.skeleton, &volume.upper)?;
        index.set_meta("laid", "1")?;
        Ok(bad)
    }
}

/// Whether a file has to be there, and checked, before the gateway starts.
fn is_early(path: &Path, row: &Row, intended: &Intended) -> bool {
    row.entry.is_database()
        || (rules::is_read_at_start(path) && row.entry.size() <= EARLY_MAX)
        || row.entry.size() == 0
        || row.entry.link.is_some()
        || !path.is_plain()
        || intended.contains_key(path)
        || row.entry.sha().is_none()
}

fn early_files(
    desk: &Desk,
    bucket: &Bucket,
    index: &Index,
    volume: &Volume,
    early: Vec<Wanted>,
) -> Result<Vec<(Path, String)>, Fault> {
    let (total, bytes_total) = fetch::total(&early);
    let progress = |files: u64, bytes: u64| {
        desk.progress(Some(Progress {
            what: "fetching what the gateway reads first".to_owned(),
            files_done: files.min(total),
            files_total: total,
            bytes_done: bytes.min(bytes_total),
            bytes_total,
        }));
    };
    let parts = volume.own.join("staging/parts");
    let fetcher = Fetcher { bucket, whole: index.totals()?, parts: parts.clone(), progress: &progress };
    let got = fetcher.files(early, &volume.upper)?;
    desk.progress(None);
    desk.did("fetch");
    fetch::settle_on_disk(&volume.own)?;
    desk.did("disk");
    let bad = take_over(index, volume, got)?;
    // Of a restore that was killed too: the rest comes through the mount.
    let _ = fs::remove_dir_all(parts);
    Ok(bad)
}

/// A restore that did not come to its end may have made directories where something else belongs, and
/// the other way round. They are nobody's yet, and are set aside all the same.
pub(super) fn make_way(desk: &Desk, volume: &Volume, rows: &[(Path, Row)]) -> Result<(), Fault> {
    let mut upper = Upper::new(volume);
    let aside = volume.own.join("aside").join(format!("in-the-way-{}", crate::chain::now_ms()));
    let mut moved = 0u64;
    for (path, row) in rows {
        if upper.place(path)? != Place::Taken {
            continue;
        }
        let Ok(parent) = Within::open(&volume.upper, path.parent().as_ref()) else { continue };
        let at = parent.name(path.name());
        let Some(stat) = volume::look(&at)?.filter(|stat| !volume::is_whiteout(stat)) else { continue };
        if (volume::kind_of(&stat) == libc::S_IFDIR) != (row.entry.kind == Kind::Directory) {
            fs::create_dir_all(&aside)?;
            moved += 1;
            fs::rename(&at, aside.join(moved.to_string()))?;
        }
    }
    if moved > 0 {
        desk.warn(format!(
            "{moved} files or directories that an unfinished restore left in the way of others are set aside in {}",
            aside.display()
        ));
    }
    Ok(())
}

/// What was fetched is known by its looks from now on; what is bad is remembered as that.
pub(super) fn take_over(index: &Index, volume: &Volume, got: Vec<Got>) -> Result<Vec<(Path, String)>, Fault> {
    let (mut lines, mut known, mut bad) = (Vec::new(), Vec::new(), Vec::new());
    for one in got {
        match one {
            Got::Good(path, entry) => {
                let at = path.below(&volume.upper);
                // One that was adopted as a plain file has to be looked at as what it is, log included.
                let unknown = !entry.is_database() && crate::database::has_magic(&at);
                if let Some(stat) = volume::look(&at)?.filter(|_| !unknown) {
                    known.push((path.clone(), stage::known_now(volume, &at, &stat, entry.is_database())));
                }
                lines.push(Line { path, word: Word::Is(entry) });
            }
            // We died between the promise and the deed: nothing was lost that anybody had.
            Got::Bad(path, _) if index.get(&path)?.is_some_and(|row| row.promised) => index.forget(&path)?,
            Got::Bad(path, why) => bad.push((path, why)),
            Got::Later(_, fault) => return Err(fault),
        }
    }
    index.learn(&lines)?;
    index.set_known(&known)?;
    for (path, why) in &bad {
        index.set_bad(path, Some(why))?;
        index.set_lower(std::slice::from_ref(path), false)?;
    }
    Ok(bad)
}

/// Whether what a boot left that did not get as far as a gateway is whole: the power may have gone.
pub(super) fn is_as_said(root: &FsPath, path: &Path, row: &Row) -> Result<bool, Fault> {
    let at = path.below(root);
    let Some(sha) = row.entry.sha() else { return Ok(true) };
    // A stub of ours has no content that could be wrong.
    Ok(volume::mark(&at, c"trusted.overlay.metacopy").is_some()
        || stage::hash(&at)? == (row.entry.size(), sha))
}

/// The same, where what is not known may be no more than a part.
pub(super) fn is_whole(root: &FsPath, path: &Path, row: &Row) -> Result<bool, Fault> {
    Ok(row.entry.sha().is_some() && is_as_said(root, path, row)?)
}

/// A file of which only mode, owner and times are above, as overlayfs itself would make it.
fn stub(upper: &FsPath, path: &Path, entry: &Entry) -> Result<(), Fault> {
    let parent = Within::make(upper, path.parent().as_ref())?;
    let at = parent.name(path.name());
    let file = File::options().write(true).create_new(true).open(&at)?;
    file.set_len(entry.size())?;
    volume::set_mark(&at, c"trusted.overlay.metacopy", b"")?;
    // It stays when the data has come up: from where, it need not say.
    volume::set_mark(&at, c"trusted.overlay.origin", b"")?;
    volume::dress(&at, entry)
}

/// What the upper layer has at a path of the lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Free,
    Taken,
    /// Whatever is below there is not seen.
    Hidden,
}

/// The upper layer, of which no directory is looked at twice.
pub(super) struct Upper<'a> {
    volume: &'a Volume,
    known: HashMap<Path, Place>,
}

impl<'a> Upper<'a> {
    pub(super) fn new(volume: &'a Volume) -> Self {
        Self { volume, known: HashMap::new() }
    }

    pub(super) fn place(&mut self, path: &Path) -> Result<Place, Fault> {
        match path.parent().map_or(Ok(Place::Taken), |parent| self.of_directory(&parent))? {
            Place::Taken => {}
            // Nothing is in what is not there.
            other => return Ok(other),
        }
        Ok(match volume::look(&path.below(&self.volume.upper))? {
            None => Place::Free,
            Some(stat) if volume::is_whiteout(&stat) => Place::Hidden,
            Some(_) => Place::Taken,
        })
    }

    /// What it is to those in it.
    fn of_directory(&mut self, dir: &Path) -> Result<Place, Fault> {
        if let Some(known) = self.known.get(dir) {
            return Ok(*known);
        }
        let place = match self.place(dir)? {
            Place::Taken if self.shows_nothing_below(dir)? => Place::Hidden,
            other => other,
        };
        self.known.insert(dir.clone(), place);
        Ok(place)
    }

    fn shows_nothing_below(&self, dir: &Path) -> Result<bool, Fault> {
        let at = dir.below(&self.volume.upper);
        let is_directory = volume::look(&at)?.is_some_and(|stat| volume::kind_of(&stat) == libc::S_IFDIR);
        Ok(!is_directory || volume::mark(&at, c"trusted.overlay.opaque").is_some_and(|v| v == b"y"))
    }
}
