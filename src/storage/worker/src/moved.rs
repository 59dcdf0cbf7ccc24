//! Out of an upper layer without its overlay: what was moved while its data was only below is
//! fetched by its old name and put under its new one.
//!
//! ```text
//! in the upper layer                          stands for
//! a directory marked "redirect" to another    the files that the other has in the manifest, less what is here
//! a file marked "metacopy" and "redirect"     the content of the other, with the looks of this one
//! ```
//!
//! Refuses to bring back what was removed: there a whiteout stands, or the volume has had it.
//! May import: `bucket`, `entry`, `fault`, `fetch`, `index`, `scan`, `volume`.

use crate::bucket::Bucket;
use crate::entry::Path;
use crate::fault::Fault;
use crate::fetch::{Fetcher, Got, Wanted};
use crate::index::Index;
use crate::scan;
use crate::volume::{self, Volume, Within};
use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path as FsPath;

/// Every directory of an upper layer, and when it was last changed.
pub(crate) fn times(upper: &FsPath, dir: Option<&Path>, into: &mut Vec<(Path, i64)>) -> Result<(), Fault> {
    for path in directories(upper, dir)? {
        if let Some(stat) = volume::look(&path.below(upper))? {
            times(upper, Some(&path), into)?;
            into.push((path, volume::mtime_ns(&stat)));
        }
    }
    Ok(())
}

fn names(upper: &FsPath, dir: Option<&Path>) -> Result<Vec<Path>, Fault> {
    let at = dir.map_or_else(|| upper.to_owned(), |d| d.below(upper));
    let mut all = Vec::new();
    for entry in fs::read_dir(at)? {
        all.extend(Path::child(dir, entry?.file_name().as_bytes()));
    }
    Ok(all)
}

fn directories(upper: &FsPath, dir: Option<&Path>) -> Result<Vec<Path>, Fault> {
    let mut all = names(upper, dir)?;
    all.retain(|path| path.below(upper).symlink_metadata().is_ok_and(|m| m.is_dir()));
    Ok(all)
}

/// Puts the data of everything that was moved into the upper layer. Repeated after a crash, it
/// goes on where it was.
pub(crate) fn bring_up(bucket: &Bucket, index: &Index, volume: &Volume) -> Result<(), Fault> {
    let mut missing = Vec::new();
    Search { index, upper: &volume.upper, missing: &mut missing }.directory(None, Some(b""))?;
    if missing.is_empty() {
        return Ok(());
    }
    let scratch = volume.staging().join("moved");
    let _ = fs::remove_dir_all(&scratch);
    let (mut wanted, mut places) = (HashMap::new(), HashMap::<Path, Vec<Path>>::new());
    for (from, to) in missing {
        if let Some(row) = index.get(&from)?.filter(|row| row.entry.is_file() && row.bad.is_none()) {
            wanted.insert(from.clone(), Wanted { path: from.clone(), may_be: vec![row.entry] });
            places.entry(from).or_default().push(to);
        }
    }
    let (whole, parts) = (index.totals()?, volume.staging().join("moved-parts"));
    let fetcher = Fetcher { bucket, whole, parts, progress: &|_, _| {} };
    for got in fetcher.files(wanted.into_values().collect(), &scratch)? {
        match got {
            Got::Good(from, _) => {
                for to in places.remove(&from).unwrap_or_default() {
                    place(&from.below(&scratch), &to, &volume.upper)?;
                }
            }
            // An incident under its old name, under which it stays in the manifest.
            Got::Bad(path, why) => {
                index.set_bad(&path, Some(&why))?;
                index.set_lower(std::slice::from_ref(&path), false)?;
            }
            Got::Later(_, fault) => return Err(fault),
        }
    }
    let _ = fs::remove_dir_all(scratch);
    let _ = fs::remove_dir_all(volume.staging().join("moved-parts"));
    Ok(())
}

/// A stub that is there already knows how the file has to look.
fn place(from: &FsPath, to: &Path, upper: &FsPath) -> Result<(), Fault> {
    let parent = Within::make(upper, to.parent().as_ref())?;
    let to = parent.name(to.name());
    if let Some(stub) = volume::look(&to)? {
        let kind = crate::entry::Kind::File { size: 0, sha: None, database: false };
        volume::dress(from, &scan::dressed(kind, &stub))?;
    }
    Ok(fs::rename(from, to)?)
}

struct Search<'a> {
    index: &'a Index,
    upper: &'a FsPath,
    /// Old name, new name.
    missing: &'a mut Vec<(Path, Path)>,
}

impl Search<'_> {
    /// `from` is where the lower layer's part of this directory lies: "" is the top, and nothing
    /// when it has none.
    fn directory(&mut self, here: Option<&Path>, from: Option<&[u8]>) -> Result<(), Fault> {
        let own = here.map_or(&b""[..], Path::as_bytes);
        if let (Some(here), Some(from)) = (here, from)
            && from != own
        {
            for (name, row) in self.index.children(from)? {
                let (Some(old), Some(new)) = (joined(from, &name), Path::child(Some(here), &name)) else {
                    continue;
                };
                if volume::is_too_long(&new.below(self.upper)) {
                    continue;
                }
                let unseen = row.entry.is_file() && row.sign.is_none() && row.bad.is_none();
                if unseen && volume::look(&new.below(self.upper))?.is_none() {
                    self.missing.push((old, new));
                }
            }
        }
        for path in names(self.upper, here)? {
            let at = path.below(self.upper);
            if volume::is_too_long(&at) {
                continue;
            }
            let Some(stat) = volume::look(&at)? else { continue };
            let origin = origin(&path, &at, from);
            match volume::kind_of(&stat) {
                libc::S_IFDIR => self.directory(Some(&path), origin.as_deref())?,
                libc::S_IFREG if volume::mark(&at, c"trusted.overlay.metacopy").is_some() => {
                    let old = origin.and_then(|o| Path::new(&o)).filter(|old| *old != path);
                    self.missing.extend(old.map(|old| (old, path)));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn joined(dir: &[u8], name: &[u8]) -> Option<Path> {
    Path::child(Path::new(dir).as_ref(), name)
}

/// Where the lower part of something lies, as overlayfs has it: a mark with a whole path, one
/// with a name beside it, or the same name.
pub(crate) fn origin(path: &Path, at: &FsPath, from: Option<&[u8]>) -> Option<Vec<u8>> {
    if volume::mark(at, c"trusted.overlay.opaque").is_some_and(|v| v == b"y") {
        return None;
    }
    let name = match volume::mark(at, c"trusted.overlay.redirect") {
        Some(redirect) => match redirect.strip_prefix(b"/") {
            Some(whole) => return Some(whole.to_vec()),
            None => redirect,
        },
        None => path.name().to_vec(),
    };
    joined(from?, &name).map(|path| path.as_bytes().to_vec())
}
