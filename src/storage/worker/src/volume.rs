//! Where everything lies on this machine: the volume, what is ours on it, and the tree.
//!
//! ```text
//! VOLUME/.cvm/storage/index       the index, and the lock that only one worker holds
//! VOLUME/.cvm/storage/staging/    copies that are being sent, parts that are being fetched
//! VOLUME/.cvm/storage/upper/      FUSE mode: what overlayfs writes
//! VOLUME/.cvm/storage/work/       FUSE mode: what overlayfs needs besides
//! VOLUME/.cvm/storage/aside/      volumes of an older epoch, never read again by us
//! VOLUME/*                        sync mode: the tree itself
//! ```
//!
//! Refuses to follow a symbolic link of the tree's. May import: `entry`, `fault`, `lifting`.

use crate::entry::{HARMLESS, Path};
use crate::fault::Fault;
use crate::lifting::Lifting;
use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, AtFlags, OFlag, OpenHow, PosixFadviseAdvice, ResolveFlag, open, openat, openat2, posix_fadvise,
};
use nix::sys::stat::{FileStat, Mode, UtimensatFlags, fstat, lstat, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::fchownat;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path as FsPath, PathBuf};

/// What work that can be left out leaves free for everybody else: a tenth of the disk, and at most so much.
const LEAVES: u64 = 256 << 20;

/// The longest tick of a kernel's clock, twice: kernels before 6.13 stamp files by the tick.
const TICK_NS: i64 = 20_000_000;
/// As fine as any file system stamps: odd seconds, and all digits of a nanosecond.
const FINEST_NS: i64 = 1_000_000_001_999_999_999;

pub(crate) struct Volume {
    /// The volume's own top.
    pub(crate) root: PathBuf,
    /// What is ours on it.
    pub(crate) own: PathBuf,
    /// What the gateway sees.
    pub(crate) tree: PathBuf,
    /// Where the tree's files really are: the tree itself, or the upper layer below it.
    pub(crate) upper: PathBuf,
    pub(crate) overlay: bool,
    pub(crate) lifting: Lifting,
    /// Two changes of a file may have the same time for so long.
    pub(crate) tick_ns: i64,
}

/// Bytes of the volume's file system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) free: u64,
    pub(crate) whole: u64,
}

impl Room {
    /// For what can be left out.
    pub(crate) fn to_spare(self) -> u64 {
        self.free.saturating_sub(self.reserve())
    }

    /// For copies that are to be sent, all at once. Of little room they take half: a disk that is
    /// nearly full is no reason to send nothing.
    pub(crate) fn for_copies(self) -> u64 {
        self.free.saturating_sub(self.reserve().min(self.free / 2))
    }

    fn reserve(self) -> u64 {
        LEAVES.min(self.whole / 10)
    }
}

impl Volume {
    /// The volume at `root`, whose tree is itself.
    pub(crate) fn plain(root: &FsPath) -> Result<Self, Fault> {
        let own = root.join(".cvm/storage");
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&own)?;
        let tick_ns = tick_ns(&own)?;
        let volume = Self {
            root: root.to_owned(),
            own,
            tree: root.to_owned(),
            upper: root.to_owned(),
            overlay: false,
            lifting: Lifting::default(),
            tick_ns,
        };
        for name in ["staging", "upper", "work", "aside"] {
            builder.create(volume.own.join(name))?;
        }
        Ok(volume)
    }

    /// The same volume with an overlay at `tree`.
    pub(crate) fn overlaid(&self, tree: &FsPath) -> Self {
        Self {
            root: self.root.clone(),
            own: self.own.clone(),
            tree: tree.to_owned(),
            upper: self.own.join("upper"),
            overlay: true,
            lifting: Lifting::default(),
            tick_ns: self.tick_ns,
        }
    }

    /// Whether its file system stamps files more coarsely than any kernel's clock ticks: what has just been
    /// looked at may change once more and look the same.
    pub(crate) fn is_coarse(&self) -> bool {
        self.tick_ns > 2 * TICK_NS
    }

    /// What is really at this place, as a path of the tree. The kernel knows none for what has
    /// several, or is moved at this very moment.
    pub(crate) fn path_of(&self, place: &[u8]) -> Option<Path> {
        Path::new(place.strip_prefix(self.upper.as_os_str().as_bytes())?.strip_prefix(b"/")?)
    }

    pub(crate) fn staging(&self) -> PathBuf {
        self.own.join("staging")
    }

    pub(crate) fn room(&self) -> Result<Room, Fault> {
        let stat = nix::sys::statvfs::statvfs(&self.own)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        Ok(Room { free: bytes(stat.blocks_available()), whole: bytes(stat.blocks()) })
    }

    /// Empties the staging area of what a killed worker was sending. What it had fetched stays:
    /// it is checked before it is used.
    pub(crate) fn clear_staging_but_parts(&self) -> Result<(), Fault> {
        for entry in fs::read_dir(self.staging())? {
            let entry = entry?;
            if entry.file_name() != "parts" {
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        Ok(())
    }

    /// Names at the top of a tree that are not part of it.
    pub(crate) fn is_ours(name: &[u8]) -> bool {
        name == crate::entry::RESERVED || name == b"lost+found"
    }

    /// Moves the whole tree between the top of the volume and the upper layer, by renaming.
    /// Repeated after a crash, it goes on where it was.
    pub(crate) fn move_tree(from: &FsPath, to: &FsPath) -> Result<u64, Fault> {
        let mut moved = 0;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            if Self::is_ours(entry.file_name().as_bytes()) {
                continue;
            }
            let target = to.join(entry.file_name());
            // Somebody may have made directories before there was a tree.
            if target.symlink_metadata().is_ok_and(|m| m.is_dir()) && only_directories(&entry.path())? {
                fs::remove_dir_all(entry.path())?;
                continue;
            }
            if target.symlink_metadata().is_ok() {
                tracing::error!(
                    "two trees on the volume: {} is at its top and in the overlay's layer",
                    entry.file_name().to_string_lossy()
                );
                // This one is told to everybody, and names are the agent's.
                return Err(Fault::Disk(
                    "two trees on the volume: a name, which the worker's log has, is at its top and in the overlay's layer; move one of them away"
                        .to_owned(),
                ));
            }
            fs::rename(entry.path(), target)?;
            moved += 1;
        }
        Ok(moved)
    }

    /// Puts the whole tree, with the index that belongs to it, where nobody reads it any more.
    pub(crate) fn set_aside(&self, name: &str) -> Result<PathBuf, Fault> {
        let aside = self.own.join("aside").join(name);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&aside)?;
        Self::move_tree(&self.root, &aside)?;
        let upper = self.own.join("upper");
        if fs::read_dir(&upper)?.next().is_some() {
            fs::rename(&upper, aside.join(".upper"))?;
            fs::DirBuilder::new().mode(0o700).create(&upper)?;
        }
        Ok(aside)
    }

    /// Whether there is a tree at all.
    pub(crate) fn is_empty(&self) -> Result<bool, Fault> {
        let any = |dir: &FsPath| -> Result<bool, Fault> {
            for entry in fs::read_dir(dir)? {
                if !Self::is_ours(entry?.file_name().as_bytes()) {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        Ok(!any(&self.root)? && !any(&self.own.join("upper"))?)
    }
}

/// Measured on a directory of ours, whose time means nothing: some file systems keep seconds only, as
/// ext4 does with inodes of 128 bytes.
fn tick_ns(own: &FsPath) -> Result<i64, Fault> {
    set_mtime(own, FINEST_NS)?;
    let kept = look(own)?.map_or(FINEST_NS, |stat| mtime_ns(&stat));
    Ok(FINEST_NS.saturating_sub(kept).max(0).saturating_add(TICK_NS))
}

fn only_directories(at: &FsPath) -> io::Result<bool> {
    if !at.symlink_metadata()?.is_dir() {
        return Ok(false);
    }
    for entry in fs::read_dir(at)? {
        if !only_directories(&entry?.path())? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the kernel takes a path of this length from nobody.
pub(crate) fn is_too_long(path: &FsPath) -> bool {
    path.as_os_str().len() >= usize::try_from(libc::PATH_MAX).unwrap_or(usize::MAX)
}

/// What the kernel says of a path itself, whatever it is; `None` when nothing is there.
pub(crate) fn look(path: &FsPath) -> Result<Option<FileStat>, Fault> {
    match lstat(path) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens a file for reading, and only a file: no link is followed, and no pipe waited for.
pub(crate) fn open_file(path: &FsPath) -> io::Result<File> {
    let how = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    only_a_file(OpenOptions::new().read(true).custom_flags(how.bits()).open(path)?)
}

/// The same for a path of the tree, whose directories are the agent's to replace by links.
pub(crate) fn open_below(top: &FsPath, path: &Path) -> io::Result<File> {
    let file = beneath(&File::open(top)?, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    only_a_file(file.into())
}

/// Makes the kernel read a file anew: it lets go of what it has of it in memory.
pub(crate) fn forget(file: &File) -> io::Result<()> {
    Ok(posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// Opens what is below a directory, through no link.
fn beneath(top: &File, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlag::O_CLOEXEC;
    let how =
        OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
    match openat2(top, &path.below(FsPath::new("")), how) {
        Err(Errno::ENOSYS | Errno::EPERM) => step_by_step(top, path, flags),
        other => other,
    }
}

/// The same for a kernel before 5.6: a path of ours names neither the top nor what is above it.
fn step_by_step(top: &File, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let open = |at: BorrowedFd<'_>, name: &[u8], flags: OFlag| {
        openat(at, OsStr::from_bytes(name), flags | OFlag::O_NOFOLLOW, Mode::empty())
    };
    let (directories, name) = path.split();
    let mut at: Option<OwnedFd> = None;
    for directory in directories.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        let here = at.as_ref().map_or_else(|| top.as_fd(), AsFd::as_fd);
        at = Some(open(here, directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)?);
    }
    open(at.as_ref().map_or_else(|| top.as_fd(), AsFd::as_fd), name, flags)
}

/// A directory that was reached through no link: what is done by its names is done in it, whatever
/// is put in its place meanwhile.
pub(crate) struct Within(OwnedFd);

impl Within {
    /// One of a tree, or its top.
    pub(crate) fn open(top: &FsPath, dir: Option<&Path>) -> io::Result<Self> {
        let top = File::open(top)?;
        let Some(dir) = dir else { return Ok(Self(top.into())) };
        Ok(Self(beneath(&top, dir, OFlag::O_PATH | OFlag::O_DIRECTORY)?))
    }

    /// The same, and those that are missing are made, as plain ones that lower layers show through.
    pub(crate) fn make(top: &FsPath, dir: Option<&Path>) -> io::Result<Self> {
        let missing = match Self::open(top, dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => error,
            other => return other,
        };
        let Some(dir) = dir else { return Err(missing) };
        let above = Self::make(top, dir.parent().as_ref())?;
        match mkdirat(&above.0, OsStr::from_bytes(dir.name()), Mode::from_bits_truncate(0o777)) {
            Ok(()) | Err(Errno::EEXIST) => Self::open(top, Some(dir)),
            Err(error) => Err(error.into()),
        }
    }

    /// A name in it, for calls that take a path.
    pub(crate) fn name(&self, name: &[u8]) -> PathBuf {
        PathBuf::from(format!("/proc/thread-self/fd/{}", self.0.as_raw_fd())).join(OsStr::from_bytes(name))
    }

    /// Itself, for the same.
    pub(crate) fn itself(&self) -> PathBuf {
        self.name(b".")
    }
}

/// The place of a path of the tree, whatever is there, without opening it.
pub(crate) fn place_below(top: &FsPath, path: &Path) -> io::Result<File> {
    Ok(beneath(&File::open(top)?, path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?.into())
}

/// Opens what is there, if it is a file.
pub(crate) fn open_place(place: &File) -> io::Result<File> {
    if !place.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let number = format!("/proc/thread-self/fd/{}", place.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(number)
}

fn only_a_file(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no file")) }
}

pub(crate) fn kind_of(stat: &FileStat) -> u32 {
    stat.st_mode & libc::S_IFMT
}

/// How overlayfs writes down that something of the lower layer is gone.
pub(crate) fn is_whiteout(stat: &FileStat) -> bool {
    kind_of(stat) == libc::S_IFCHR && stat.st_rdev == 0
}

pub(crate) fn mtime_ns(stat: &FileStat) -> i64 {
    stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec)
}

pub(crate) fn ctime_ns(stat: &FileStat) -> i64 {
    stat.st_ctime.saturating_mul(1_000_000_000).saturating_add(stat.st_ctime_nsec)
}

pub(crate) fn now_ns() -> i64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .map_or(0, |now| now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec()))
}

/// Since its last change; what changed in the future has not changed for long.
pub(crate) fn age_ns(stat: &FileStat) -> u64 {
    u64::try_from(now_ns().saturating_sub(ctime_ns(stat))).unwrap_or(u64::MAX)
}

/// Whether this process may give files to others.
pub(crate) fn gives_away() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// Sets owner, mode and modification time of what lies at a path, and of nothing that takes its name
/// meanwhile. Who may not give files to others keeps them. No file lends its owner's rights to whoever runs it.
pub(crate) fn dress(path: &FsPath, entry: &crate::entry::Entry) -> Result<(), Fault> {
    let place = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    let found = fstat(&place)?;
    if (found.st_uid, found.st_gid) != (entry.uid, entry.gid) {
        let (user, group) = (Some(entry.uid.into()), Some(entry.gid.into()));
        match fchownat(&place, "", user, group, AtFlags::AT_EMPTY_PATH) {
            Err(Errno::EPERM) if !gives_away() => {}
            other => other?,
        }
    }
    // Links have no mode of their own, and no way to their time but their name.
    if kind_of(&found) == libc::S_IFLNK {
        return set_mtime(path, entry.mtime_ns);
    }
    let itself = PathBuf::from(format!("/proc/thread-self/fd/{}", place.as_raw_fd()));
    // After the owner: that takes rights away.
    fs::set_permissions(&itself, fs::Permissions::from_mode(entry.mode & HARMLESS))?;
    Ok(utimensat(
        AT_FDCWD,
        &itself,
        &TimeSpec::UTIME_OMIT,
        &time_of(entry.mtime_ns),
        UtimensatFlags::FollowSymlink,
    )?)
}

pub(crate) fn set_mtime(path: &FsPath, mtime_ns: i64) -> Result<(), Fault> {
    let (kept, time) = (TimeSpec::UTIME_OMIT, time_of(mtime_ns));
    Ok(utimensat(AT_FDCWD, path, &kept, &time, UtimensatFlags::NoFollowSymlink)?)
}

fn time_of(ns: i64) -> TimeSpec {
    TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
}

/// The value of one of overlayfs's marks.
pub(crate) fn mark(path: &FsPath, name: &CStr) -> Option<Vec<u8>> {
    cvm_sys::xattr::get(&CString::new(path.as_os_str().as_bytes()).ok()?, name)
}

pub(crate) fn set_mark(path: &FsPath, name: &CStr, value: &[u8]) -> Result<(), Fault> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Fault::other("a path with NUL"))?;
    Ok(cvm_sys::xattr::set(&path, name, value)?)
}

/// Removes what overlayfs has noted on a directory: it would be read in another overlay.
pub(crate) fn remove_marks(path: &FsPath) {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return };
    for name in [c"trusted.overlay.redirect", c"trusted.overlay.opaque", c"trusted.overlay.origin"] {
        // Most have none.
        let _ = cvm_sys::xattr::remove(&path, name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_there_are_two_trees_is_said_without_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        for at in [&from, &to] {
            fs::create_dir(at).unwrap();
            fs::write(at.join("private-name"), "1").unwrap();
        }
        let said = Volume::move_tree(&from, &to).unwrap_err().to_string();
        assert!(said.contains("two trees") && !said.contains("private-name"), "{said}");
    }

    #[test]
    fn nothing_is_reached_or_made_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let [top, outside] = ["top", "outside"].map(|name| dir.path().join(name));
        fs::create_dir_all(outside.join("in")).unwrap();
        fs::create_dir(&top).unwrap();
        fs::write(outside.join("in/file"), "1").unwrap();
        std::os::unix::fs::symlink(&outside, top.join("l")).unwrap();
        std::os::unix::fs::symlink("../outside", top.join("relative")).unwrap();
        let path = |text: &str| Path::new(text.as_bytes()).unwrap();
        for name in ["l", "l/in", "l/new", "l/in/new", "relative", "relative/in"] {
            assert!(Within::make(&top, Some(&path(name))).is_err(), "{name}");
            assert!(Within::open(&top, Some(&path(name))).is_err(), "{name}");
        }
        assert!(open_below(&top, &path("l/in/file")).is_err());
        assert_eq!(fs::read_dir(outside.join("in")).unwrap().count(), 1);
        let made = Within::make(&top, Some(&path("a/b/c"))).unwrap();
        fs::write(made.name(b"file"), "2").unwrap();
        assert_eq!(fs::read_to_string(top.join("a/b/c/file")).unwrap(), "2");
        // Without the kernel's help it is the same.
        let slow = |name: &str| step_by_step(&File::open(&top).unwrap(), &path(name), OFlag::O_RDONLY);
        assert!(slow("a/b/c/file").is_ok() && slow("a").is_ok());
        assert!(slow("l/in/file").is_err() && slow("l").is_err() && slow("relative/in").is_err());
    }

    #[test]
    fn a_link_that_takes_the_name_of_a_file_leads_no_mode_or_owner_elsewhere() {
        use crate::entry::{Entry, Kind};
        use nix::fcntl::{RenameFlags, renameat2};
        use std::os::unix::fs::MetadataExt as _;
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let [victim, name, link] = ["victim", "name", "link"].map(|name| dir.path().join(name));
        for file in [&victim, &name] {
            fs::write(file, "1").unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
        }
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let own = victim.metadata().unwrap();
        let kind = Kind::File { size: 1, sha: None, database: false };
        let entry = Entry { kind, mode: 0o6777, uid: own.uid(), gid: own.gid(), mtime_ns: 5, link: None };
        let over = AtomicBool::new(false);
        let flip = || renameat2(AT_FDCWD, &name, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
        let dressed: Vec<_> = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    flip();
                }
            });
            let dressed = (0..20_000).map(|_| dress(&name, &entry)).collect();
            over.store(true, Ordering::Relaxed);
            dressed
        });
        assert!(dressed.into_iter().all(|done| done.is_ok()));
        assert_eq!(victim.metadata().unwrap().mode() & 0o7777, 0o600);
        let file =
            [name, link].map(|path| path.symlink_metadata().unwrap()).into_iter().find(fs::Metadata::is_file);
        let file = file.unwrap();
        assert_eq!((file.mode() & 0o7777, file.mtime_nsec()), (0o777, 5), "without the rights of its owner");
    }

    #[test]
    fn copies_leave_room_for_those_who_write_to_the_tree() {
        let for_copies = |free, whole| Room { free, whole }.for_copies();
        assert_eq!(for_copies(1000, 1000), 900, "a tenth stays free");
        assert_eq!(for_copies(150, 1000), 75, "of little, half");
        assert_eq!(for_copies(0, 1000), 0);
        assert_eq!(for_copies(10 * LEAVES, u64::MAX), 9 * LEAVES, "a large disk needs no tenth");
    }

    #[test]
    fn empty_directories_are_no_second_tree() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        fs::create_dir_all(from.join("openclaw/logs")).unwrap();
        fs::create_dir_all(to.join("openclaw")).unwrap();
        fs::write(to.join("openclaw/config"), "1").unwrap();
        assert_eq!(Volume::move_tree(&from, &to).unwrap(), 0);
        assert!(to.join("openclaw/config").exists() && !from.join("openclaw").exists());
        fs::create_dir(from.join("openclaw")).unwrap();
        fs::write(from.join("openclaw/file"), "1").unwrap();
        assert!(Volume::move_tree(&from, &to).is_err());
        assert!(from.join("openclaw/file").exists());
    }
}
