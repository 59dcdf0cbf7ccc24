//! What the mount shows of a file, beside what the manifest says of it.
//!
//! A file that is written to before it was fetched is built on what the mount gave the kernel, and
//! nobody has checked that yet: it is checked before another object takes its place.
//!
//! Refuses to take what cannot be read for bad. May import: `bucket`, `entry`, `fault`, `fetch`,
//! `manifest`, `stage`, `volume`.

use crate::bucket::Bucket;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::fetch;
use crate::manifest::Digest;
use crate::stage;
use crate::volume::{self, Volume};
use cvm_protocol::paths;
use std::fs::File;
use std::path::Path as FsPath;

/// Nothing, or what is wrong.
pub(crate) type Verdict = Result<(), String>;

pub(crate) const REMEDY: &str =
    "compare it with what it should be, or with older versions of its object; then `cvm storage keep PATH`";

/// What is wrong with a file that the kernel has made of one that is bad.
pub(crate) fn built_on(why: &str) -> String {
    format!("{why}; it was written to before that was known, so what it is now may be built on that")
}

/// Whether the upper layer has content of its own for it.
pub(crate) fn is_written(volume: &Volume, path: &Path) -> bool {
    let above = path.below(&volume.upper);
    volume::look(&above).ok().flatten().is_some()
        && volume::mark(&above, c"trusted.overlay.metacopy").is_none()
}

/// Whether that content began as what is below: a file that was written beside it and renamed, or
/// after it was removed, did not.
pub(crate) fn is_built_on(volume: &Volume, path: &Path) -> bool {
    is_written(volume, path) && volume::mark(&path.below(&volume.upper), c"trusted.overlay.origin").is_some()
}

/// Reads it where the mount shows it.
pub(crate) fn check(path: &Path, entry: &Entry) -> Result<Verdict, Fault> {
    let Kind::File { size, sha: Some(sha), .. } = entry.kind else { return Ok(Ok(())) };
    let at = path.below(FsPath::new(paths::BUCKET_MOUNT));
    if volume::look(&at)?.is_none() {
        return Err(Fault::Missing);
    }
    // The kernel keeps what it reads, so that it copies up what was checked; but what is checked is
    // what the bucket gives now.
    let file = volume::open_file(&at)?;
    volume::forget(&file)?;
    compare(file, size, sha)
}

fn compare(file: File, size: u64, sha: Digest) -> Result<Verdict, Fault> {
    let (found_size, found) = stage::hash_open(file)?;
    Ok(if (found_size, found) == (size, sha) { Ok(()) } else { Err(fetch::unlike(found_size, size)) })
}

/// The same of its object: where the mount does not give it, that says why.
pub(crate) fn check_object(
    bucket: &Bucket,
    volume: &Volume,
    path: &Path,
    entry: &Entry,
) -> Result<Verdict, Fault> {
    let Kind::File { size, sha: Some(sha), .. } = entry.kind else { return Ok(Ok(())) };
    let (staging, name) = (volume.staging(), "below");
    let verdict = bucket
        .rclone
        .download(&path.object(), &staging, name)
        .and_then(|()| compare(volume::open_file(&staging.join(name))?, size, sha));
    let _ = std::fs::remove_file(staging.join(name));
    verdict.or_else(|fault| fetch::lost(&fault).map(|why| Err(why.to_owned())).ok_or(fault))
}
