//! A private copy of one file at one moment, with its hash: what is sent is what was hashed.
//!
//! Refuses to call a copy good that was torn by a writer while it was made, as long as trying
//! again can help. May import: `database`, `entry`, `fault`, `lifting`, `manifest`,
//! `scan`, `volume`.

use crate::database::{self, NoCopy};
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::index::{Known, Sign};
use crate::lifting::Seen;
use crate::manifest::Digest;
use crate::scan;
use crate::volume::{self, Volume};
use nix::fcntl::OFlag;
use sha2::{Digest as _, Sha256};
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path as FsPath;

/// Copies of a file that changes under our hands before the last one is taken as it is: a log that
/// is always written to is never still, and its beginning is as good as any.
const TRIES: u32 = 3;
/// The longest tick of a kernel's clock, twice.
const TICK_NS: i64 = 20_000_000;
const PIECE: usize = 256 * 1024;

/// A copy that can be sent.
pub(crate) struct Staged {
    pub(crate) path: Path,
    pub(crate) entry: Entry,
    pub(crate) known: Known,
    /// It has to be looked at once more.
    pub(crate) young: bool,
    /// Name in the staging area.
    pub(crate) name: String,
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

/// `database` is what the scan saw, and `was_database` what the bucket has.
pub(crate) fn stage(
    volume: &Volume,
    path: &Path,
    mut database: bool,
    was_database: bool,
    name: String,
) -> Result<Outcome, Fault> {
    let at = path.below(&volume.upper);
    let to = volume.staging().join(&name);
    for attempt in 1..=TRIES {
        let before = match volume.lifting.look(path, &at)? {
            Seen::Is(Some(stat)) => stat,
            Seen::Is(None) => return Ok(Outcome::Vanished),
            Seen::InTheMaking => return Ok(Outcome::Later("its data is just brought up".to_owned())),
        };
        if volume::kind_of(&before) != libc::S_IFREG {
            return Ok(Outcome::Vanished);
        }
        if before.st_size > 0 {
            // It may have been replaced since the scan.
            database = database::has_magic(&at);
            if was_database && !database {
                return Ok(Outcome::Damaged("it does not begin like one any more".to_owned()));
            }
        }
        let Known { sign, handle } = scan::known_by(&at, &before, database);
        let _ = std::fs::remove_file(&to);
        let (size, sha) = if database {
            // Through the merged tree: SQLite's locks live on the path that its writers use.
            match database::copy(&path.below(&volume.tree), &to) {
                Ok(()) => hash(&to)?,
                Err(NoCopy::Later(why)) => return Ok(Outcome::Later(why)),
                Err(NoCopy::Damaged(why)) => return Ok(Outcome::Damaged(why)),
            }
        } else {
            match copy(&at, &to) {
                Err(Fault::Missing) => return Ok(Outcome::Vanished),
                // Made in this moment: bytes of it are not a state of it.
                Ok(_) if database::has_magic(&to) && attempt < TRIES => continue,
                other => other?,
            }
        };
        let Some(after) = volume::look(&at)? else { return Ok(Outcome::Vanished) };
        let still = database || scan::sign_of(&at, &after, false) == sign;
        if still || attempt == TRIES {
            let mut entry = scan::dressed(Kind::File { size, sha: Some(sha), database }, &before);
            if database {
                entry.link = None;
            }
            // It goes up with the object, for those who read the bucket with stock rclone.
            volume::set_mtime(&to, entry.mtime_ns)?;
            // A file that changed meanwhile is not known by any sign, and so looked at again.
            let young = !still || is_young(&at, &before);
            let sign = if young { Sign { change: 0, ..sign } } else { sign };
            let known = Known { sign, handle };
            return Ok(Outcome::Ready(Staged { path: path.clone(), entry, known, young, name }));
        }
    }
    Ok(Outcome::Vanished)
}

/// Whether the next change may carry the same time: kernels before 6.13 stamp files by the tick.
/// Such a file is read once more.
fn is_young(at: &FsPath, stat: &nix::sys::stat::FileStat) -> bool {
    let changed = scan::log_of(at).map_or(0, |log| volume::ctime_ns(&log)).max(volume::ctime_ns(stat));
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .map_or(0, |now| now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec()));
    now.saturating_sub(changed) < TICK_NS
}

/// Copies up to where the file ended when it was opened; holes stay holes.
fn copy(from: &FsPath, to: &FsPath) -> Result<(u64, Digest), Fault> {
    let opened =
        OpenOptions::new().read(true).custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(from);
    let source = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Fault::Missing),
        Err(error) => return Err(error.into()),
    };
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
    let source = OpenOptions::new().read(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(file)?;
    hash_of(source, |_| Ok(()))
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
