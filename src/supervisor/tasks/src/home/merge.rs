//! Moves the content of one directory into another, across file systems if need be.
//!
//! The promise: whatever moment this is killed at, every byte is in one of the two places, and a
//! second run finishes the first. So a file is whole at its new place, and flushed, before it
//! leaves the old one; and what is found at both places with the same content has been moved
//! already.
//!
//! A database and its `-wal`, `-shm` and `-journal` are moved together or not at all: SQLite would apply a log to a
//! database that it does not belong to.
//!
//! Nothing is overwritten: on a clash the target's file stays, and the moved one is put beside it.
//! Sockets, fifos and devices hold nothing and are not moved. Hard links become
//! separate files, and extended attributes are lost, when the move crosses file systems.

use crate::files::{FileError, FileResult, trouble};
use crate::report;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, renameat, renameat2};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, Metadata, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown, symlink};
use std::path::Path;

/// The name of a file that is put beside another: `NAME.from-home-N`.
pub(crate) const SUFFIX: &str = "from-home";
/// A copy that is not whole yet.
const DRAFT: &str = ".cvm-moving";
/// Room for our suffix in a name of at most 255 bytes.
const NAME_MAX: usize = 230;
/// What belongs to a database. The database itself comes last, so it is never alone with half.
const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) entries: u64,
    pub(crate) kept_beside: u64,
    pub(crate) dropped: u64,
}

/// Moves everything in `from` into `to`, and removes `from`. Both are directories.
pub(crate) fn into(from: &Path, to: &Path) -> FileResult<Moved> {
    let mut moved = Moved::default();
    directory(from, to, &mut moved)?;
    Ok(moved)
}

fn directory(from: &Path, to: &Path, moved: &mut Moved) -> FileResult<()> {
    remove(&to.join(DRAFT))?;
    let names: BTreeSet<OsString> = fs::read_dir(from)
        .map_err(trouble("read", from))?
        .map(|entry| entry.map(|e| e.file_name()).map_err(trouble("read", from)))
        .collect::<FileResult<_>>()?;
    for bundle in bundles(&names, from, to) {
        one(from, to, &bundle, moved)?;
    }
    fs::remove_dir(from).map_err(trouble("remove", from))
}

/// One entry of a directory, or a database with what belongs to it.
#[derive(Debug, PartialEq, Eq)]
struct Bundle {
    base: OsString,
    /// What of it is in the source, as endings of the base name.
    endings: Vec<&'static str>,
}

fn bundles(names: &BTreeSet<OsString>, from: &Path, to: &Path) -> Vec<Bundle> {
    let is_file = |path: &Path| fs::symlink_metadata(path).is_ok_and(|m| m.is_file());
    let base_of = |name: &OsStr| {
        let base = COMPANIONS.iter().find_map(|c| name.as_bytes().strip_suffix(c.as_bytes()))?;
        let base = OsStr::from_bytes(base);
        let plain = is_file(&from.join(name)) && (is_file(&from.join(base)) || is_file(&to.join(base)));
        (plain && !base.is_empty()).then(|| base.to_owned())
    };
    let bases: BTreeSet<OsString> =
        names.iter().map(|name| base_of(name).unwrap_or_else(|| name.clone())).collect();
    let here = |base: &OsStr, ending: &str| {
        let name = with_ending(base, ending);
        names.contains(&name) && (ending.is_empty() || base_of(&name).as_deref() == Some(base))
    };
    let endings = |base: &OsStr| COMPANIONS.into_iter().chain([""]).filter(|e| here(base, e)).collect();
    bases.into_iter().map(|base| Bundle { endings: endings(&base), base }).collect()
}

fn with_ending(base: &OsStr, ending: &str) -> OsString {
    let mut name = base.to_owned();
    name.push(ending);
    name
}

fn one(from: &Path, to: &Path, bundle: &Bundle, moved: &mut Moved) -> FileResult<()> {
    let source = from.join(&bundle.base);
    if bundle.endings == [""] {
        let stat = stat(&source)?;
        if !(stat.is_file() || stat.is_dir() || stat.is_symlink()) {
            moved.dropped += 1;
            return remove(&source);
        }
        if stat.is_dir() {
            return subdirectory(&source, to, &bundle.base, &stat, moved);
        }
    }
    for target in candidates(&bundle.base) {
        if place(from, to, bundle, &target)? {
            moved.entries += 1;
            if target != bundle.base {
                moved.kept_beside += 1;
                report::detail(format!("kept beside: {}", to.join(&target).display()));
            }
            return Ok(());
        }
    }
    Err(FileError { what: "find a free name for", path: source, errno: Errno::EEXIST })
}

/// The name itself, then names beside it.
fn candidates(base: &OsStr) -> impl Iterator<Item = OsString> {
    let short = base.as_bytes().get(..NAME_MAX).unwrap_or(base.as_bytes()).to_vec();
    let beside = (1..=u32::MAX).map(move |number| {
        let mut name = OsString::from_vec(short.clone());
        name.push(format!(".{SUFFIX}-{number}"));
        name
    });
    [base.to_owned()].into_iter().chain(beside)
}

/// A directory goes as a whole where it can, else entry by entry into one of the same name.
fn subdirectory(
    source: &Path,
    to: &Path,
    name: &OsStr,
    stat: &Metadata,
    moved: &mut Moved,
) -> FileResult<()> {
    for candidate in candidates(name) {
        let target = to.join(&candidate);
        match fs::symlink_metadata(&target) {
            Ok(there) if there.is_dir() => {
                directory(source, &target, moved)?;
            }
            Ok(_) => continue,
            Err(_) => match rename_if_free(source, &target) {
                Ok(()) => moved.entries += 1,
                Err(Errno::EXDEV) => copy_directory(source, &target, stat, moved)?,
                Err(errno) => return Err(FileError { what: "move", path: source.to_owned(), errno }),
            },
        }
        if candidate != name {
            moved.kept_beside += 1;
            report::detail(format!("kept beside: {}", target.display()));
        }
        return Ok(());
    }
    Ok(())
}

fn copy_directory(source: &Path, target: &Path, stat: &Metadata, moved: &mut Moved) -> FileResult<()> {
    fs::create_dir(target).map_err(trouble("make", target))?;
    let no_link = OFlag::O_NOFOLLOW | OFlag::O_DIRECTORY;
    let made = OpenOptions::new().read(true).custom_flags(no_link.bits()).open(target);
    let made = made.map_err(trouble("open", target))?;
    dress(&made, target, stat)?;
    directory(source, target, moved)?;
    moved.entries += 1;
    // Filling it has changed its time. A directory is no worse for a wrong one.
    let _ = made.set_times(times(stat));
    Ok(())
}

/// Puts the bundle at `target`, if what is there already is a part of the same bundle.
fn place(from: &Path, to: &Path, bundle: &Bundle, target: &OsStr) -> FileResult<bool> {
    let path_of =
        |ending: &str| (from.join(with_ending(&bundle.base, ending)), to.join(with_ending(target, ending)));
    let mut missing = Vec::new();
    for &ending in &bundle.endings {
        let (source, there) = path_of(ending);
        match fs::symlink_metadata(&there) {
            Err(_) => missing.push((source, there)),
            Ok(_) if identical(&source, &there)? => {}
            Ok(_) => return Ok(false),
        }
    }
    let extra = COMPANIONS.iter().chain(&[""]).any(|&ending| {
        !bundle.endings.contains(&ending)
            && fs::symlink_metadata(path_of(ending).1).is_ok_and(|m| m.is_file())
    });
    // Something of another database is there; unless all of ours is there too: then it is the
    // same one, and a run before this one was killed while it removed the source.
    if extra && !missing.is_empty() {
        return Ok(false);
    }
    if let ([(source, there)], [""]) = (&missing[..], &bundle.endings[..]) {
        return move_one(source, there).map(|()| true);
    }
    for (source, there) in &missing {
        copy(source, there)?;
    }
    for &ending in &bundle.endings {
        remove(&path_of(ending).0)?;
    }
    Ok(true)
}

fn move_one(source: &Path, target: &Path) -> FileResult<()> {
    match rename_if_free(source, target) {
        Ok(()) => Ok(()),
        Err(Errno::EXDEV) => {
            copy(source, target)?;
            remove(source)
        }
        Err(errno) => Err(FileError { what: "move", path: source.to_owned(), errno }),
    }
}

fn rename_if_free(source: &Path, target: &Path) -> Result<(), Errno> {
    match renameat2(AT_FDCWD, source, AT_FDCWD, target, RenameFlags::RENAME_NOREPLACE) {
        // File systems without it. That the name is free was just looked up, and nobody else
        // works here before the gateway runs.
        Err(Errno::EINVAL | Errno::ENOSYS) => renameat(AT_FDCWD, source, AT_FDCWD, target),
        other => other,
    }
}

/// A whole, flushed copy at `target`; the source stays.
fn copy(source: &Path, target: &Path) -> FileResult<()> {
    let stat = stat(source)?;
    let (Some(dir), failed) = (target.parent(), |what| trouble(what, target)) else { return Ok(()) };
    let draft = dir.join(DRAFT);
    remove(&draft)?;
    if stat.is_symlink() {
        let words = fs::read_link(source).map_err(trouble("read", source))?;
        symlink(words, &draft).map_err(failed("write"))?;
        lchown(&draft, Some(stat.uid()), Some(stat.gid())).map_err(failed("change the owner of"))?;
    } else {
        let mut input = File::open(source).map_err(trouble("read", source))?;
        let mut options = OpenOptions::new();
        let mut output =
            options.write(true).create_new(true).mode(0o600).open(&draft).map_err(failed("write"))?;
        std::io::copy(&mut input, &mut output).map_err(failed("copy"))?;
        dress(&output, &draft, &stat)?;
        // After the owner: changing that changes nothing here, writing would.
        output.set_times(times(&stat)).map_err(failed("set the time of"))?;
        output.flush().and_then(|()| output.sync_all()).map_err(failed("write"))?;
    }
    rename_if_free(&draft, target).map_err(|errno| FileError {
        what: "write",
        path: target.to_owned(),
        errno,
    })?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(trouble("write", dir))
}

/// Gives a file the owner and mode of another: the file that is open, whatever has its name by now. Whoever runs
/// it gets no rights of its owner's.
fn dress(file: &File, path: &Path, stat: &Metadata) -> FileResult<()> {
    fchown(file, Some(stat.uid()), Some(stat.gid())).map_err(trouble("change the owner of", path))?;
    let mode = fs::Permissions::from_mode(stat.mode() & 0o1777);
    file.set_permissions(mode).map_err(trouble("change the mode of", path))
}

fn times(stat: &Metadata) -> FileTimes {
    let times = FileTimes::new();
    match (stat.accessed(), stat.modified()) {
        (Ok(accessed), Ok(modified)) => times.set_accessed(accessed).set_modified(modified),
        _ => times,
    }
}

/// Whether both are files with the same bytes, or links with the same words.
fn identical(one: &Path, other: &Path) -> FileResult<bool> {
    let (a, b) = (stat(one)?, stat(other)?);
    if a.is_symlink() && b.is_symlink() {
        return Ok(fs::read_link(one).ok() == fs::read_link(other).ok());
    }
    if !(a.is_file() && b.is_file() && a.len() == b.len()) {
        return Ok(false);
    }
    let open = |path: &Path| File::open(path).map_err(trouble("read", path));
    same_bytes(&mut open(one)?, &mut open(other)?).map_err(trouble("read", one))
}

fn same_bytes(one: &mut File, other: &mut File) -> std::io::Result<bool> {
    let (mut a, mut b) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let count = one.read(&mut a)?;
        if count == 0 {
            return Ok(other.read(&mut b)? == 0);
        }
        if other.read_exact(&mut b[..count]).is_err() || a[..count] != b[..count] {
            return Ok(false);
        }
    }
}

fn remove(path: &Path) -> FileResult<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(trouble("remove", path)(error)),
        _ => Ok(()),
    }
}

fn stat(path: &Path) -> FileResult<Metadata> {
    fs::symlink_metadata(path).map_err(trouble("look at", path))
}

#[cfg(test)]
mod tests;
