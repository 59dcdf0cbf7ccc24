//! Files and directories, written so that a kill at any moment leaves the old or the new.
//!
//! Everything goes through [`Dir`], an open directory, one name at a time and never through a
//! symbolic link: some of these files lie in trees that the agent owns, and root following a
//! link of the agent's would write where the agent cannot.
//!
//! It follows no link in the last component of a path, opens only plain files, and reads at most as much as it is
//! told to.

use crate::report::{Failure, shown};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, fchown, fsync, getegid, geteuid, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Who a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// How a file is, once it is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) mode: u32,
    /// None: the user that this process runs as.
    pub(crate) owner: Option<Owner>,
    /// Whether it must outlive a power cut. Files of this boot in /run need not, and a flush of
    /// a container's disk costs more than the rest of a boot.
    pub(crate) durable: bool,
}

impl Kind {
    /// Readable by us alone, until the next boot writes it anew.
    pub(crate) const OF_THIS_BOOT: Self = Self { mode: 0o600, owner: None, durable: false };
    /// Readable by us alone, kept.
    pub(crate) const KEPT: Self = Self { mode: 0o600, owner: None, durable: true };

    pub(crate) const fn kept_by(owner: Owner) -> Self {
        Self { mode: 0o600, owner: Some(owner), durable: true }
    }
}

/// What could not be done to which file, and why.
#[derive(Debug)]
pub(crate) struct FileError {
    pub(crate) what: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) errno: Errno,
}

impl FileError {
    fn words(&self) -> String {
        let remedy = match self.errno {
            Errno::EROFS => "; mount the volume writable",
            Errno::ENOSPC | Errno::EDQUOT => "; make room on the volume",
            Errno::ELOOP | Errno::ENOTDIR => "; move away what lies in its place",
            _ => "",
        };
        format!("cannot {} {}: {}{remedy}", self.what, shown(&self.path), self.errno.desc())
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Self::again(error.words())
    }
}

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.words())
    }
}

pub(crate) type FileResult<T> = Result<T, FileError>;

/// An error of `std` about a path.
pub(crate) fn trouble(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FileError {
    let path = path.to_owned();
    move |error| FileError { what, path, errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw) }
}

/// An open directory.
pub(crate) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

const DIRECTORY: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_CLOEXEC).union(OFlag::O_NOFOLLOW);

impl Dir {
    /// The directory at `path`, which must not be a symbolic link itself.
    pub(crate) fn open(path: &Path) -> FileResult<Self> {
        let fd = nix::fcntl::open(path, DIRECTORY, Mode::empty()).map_err(|errno| FileError {
            what: "open",
            path: path.to_owned(),
            errno,
        })?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// The directory at `path`, made if it is missing, and brought to `mode` and `owner`.
    pub(crate) fn ensure(path: &Path, mode: u32, owner: Option<Owner>) -> FileResult<Self> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Self::open(path) };
        let parent = match Self::open(parent) {
            Ok(dir) => dir,
            Err(_) => Self::open_or_make_parents(parent)?,
        };
        let dir = parent.ensure_sub(name, mode, owner)?;
        dir.settle(mode, owner)?;
        Ok(dir)
    }

    fn open_or_make_parents(path: &Path) -> FileResult<Self> {
        std::fs::create_dir_all(path).map_err(trouble("make", path))?;
        // Links are followed: /var/run is one, and an image may have more.
        let real = std::fs::canonicalize(path).map_err(trouble("find", path))?;
        Self::open(&real)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn trouble(&self, what: &'static str, name: &OsStr) -> impl FnOnce(Errno) -> FileError + use<> {
        let path = self.path.join(name);
        move |errno| FileError { what, path, errno }
    }

    /// The directory `name` in this one.
    pub(crate) fn sub(&self, name: &OsStr) -> FileResult<Self> {
        let fd = openat(&self.fd, name, DIRECTORY, Mode::empty()).map_err(self.trouble("open", name))?;
        Ok(Self { fd, path: self.path.join(name) })
    }

    /// The directory `name` in this one, made if it is missing. One that exists stays as it is.
    pub(crate) fn ensure_sub(&self, name: &OsStr, mode: u32, owner: Option<Owner>) -> FileResult<Self> {
        match mkdirat(&self.fd, name, Mode::from_bits_truncate(0o700)) {
            Err(Errno::EEXIST) => self.sub(name),
            Ok(()) => {
                let dir = self.sub(name)?;
                dir.settle(mode, owner)?;
                Ok(dir)
            }
            Err(errno) => Err(self.trouble("make", name)(errno)),
        }
    }

    /// Brings the directory itself to `mode` and `owner`.
    fn settle(&self, mode: u32, owner: Option<Owner>) -> FileResult<()> {
        let own = |what: &'static str| self.trouble(what, OsStr::new(""));
        let now = fstat(&self.fd).map_err(own("look at"))?;
        if let Some(Owner { uid, gid }) = owner
            && (now.st_uid, now.st_gid) != (uid, gid)
        {
            fchown(&self.fd, Some(uid.into()), Some(gid.into())).map_err(own("change the owner of"))?;
        }
        if now.st_mode & 0o7777 != mode {
            fchmod(&self.fd, Mode::from_bits_truncate(mode)).map_err(own("change the mode of"))?;
        }
        Ok(())
    }

    /// Makes sure that no other user can rename or replace our files in this directory. Says whether one could before.
    pub(crate) fn shut(&self) -> FileResult<bool> {
        const OF_OTHERS: u32 = 0o022;
        const STICKY: u32 = 0o1000;
        let own = |what: &'static str| self.trouble(what, OsStr::new(""));
        let now = fstat(&self.fd).map_err(own("look at"))?;
        let (us, group) = (geteuid(), getegid());
        let is_ours = now.st_uid == us.as_raw();
        if is_ours && (now.st_mode & OF_OTHERS == 0 || now.st_mode & STICKY != 0) {
            return Ok(false);
        }
        if !is_ours {
            fchown(&self.fd, Some(us), Some(group)).map_err(own("change the owner of"))?;
        }
        let mode = now.st_mode & 0o7777 & !OF_OTHERS;
        fchmod(&self.fd, Mode::from_bits_truncate(mode)).map_err(own("change the mode of"))?;
        Ok(true)
    }

    /// Kind, mode, owner and times of `name`. A link is not followed.
    pub(crate) fn stat(&self, name: &OsStr) -> FileResult<Option<FileStat>> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.trouble("look at", name)(errno)),
        }
    }

    /// Whether `name` exists, also as a link that leads nowhere.
    pub(crate) fn has(&self, name: &str) -> FileResult<bool> {
        Ok(self.stat(OsStr::new(name))?.is_some())
    }

    /// The plain file `name`, if there is one, if it has at most `limit` bytes.
    pub(crate) fn read(&self, name: &str, limit: usize) -> FileResult<Option<Zeroizing<Vec<u8>>>> {
        let name = OsStr::new(name);
        let Some(file) = self.open_plain(name)? else { return Ok(None) };
        read_plain(file.into(), limit).map(Some).map_err(self.trouble("read", name))
    }

    /// The plain file `name`, if there is one, to be read.
    pub(crate) fn open_plain(&self, name: &OsStr) -> FileResult<Option<File>> {
        // Without O_NONBLOCK a fifo would keep us waiting for its writer.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let open = || -> Result<File, Errno> {
            let fd = openat(&self.fd, name, flags, Mode::empty())?;
            if is_kind(&fstat(&fd)?, SFlag::S_IFREG) { Ok(fd.into()) } else { Err(Errno::EINVAL) }
        };
        match open() {
            Ok(file) => Ok(Some(file)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.trouble("read", name)(errno)),
        }
    }

    /// Puts `bytes` at `name`, in the place of what is there.
    pub(crate) fn write(&self, name: &str, bytes: &[u8], kind: Kind) -> FileResult<()> {
        let name = OsStr::new(name);
        let draft = self.draft(name, bytes, kind)?;
        renameat(&self.fd, draft.as_os_str(), &self.fd, name).map_err(self.trouble("write", name))?;
        self.sync(kind)
    }

    /// Puts `bytes` at `name` unless there is something; says whether it did.
    pub(crate) fn create(&self, name: &OsStr, bytes: &[u8], kind: Kind) -> FileResult<bool> {
        if self.stat(name)?.is_some() {
            return Ok(false);
        }
        let draft = self.draft(name, bytes, kind)?;
        let moved =
            match renameat2(&self.fd, draft.as_os_str(), &self.fd, name, RenameFlags::RENAME_NOREPLACE) {
                // This file system cannot do it. Before the gateway runs, nothing else writes here.
                Err(Errno::EINVAL | Errno::ENOSYS) => renameat(&self.fd, draft.as_os_str(), &self.fd, name),
                other => other,
            };
        match moved {
            Ok(()) => self.sync(kind).map(|()| true),
            Err(Errno::EEXIST) => self.remove(&draft).map(|()| false),
            Err(errno) => Err(self.trouble("write", name)(errno)),
        }
    }

    /// Writes the whole file under a name beside its final one. A file that a killed try has left there is replaced.
    fn draft(&self, name: &OsStr, bytes: &[u8], kind: Kind) -> FileResult<OsString> {
        let mut draft = OsString::from(".");
        draft.push(name);
        draft.push(".cvm-new");
        self.remove(&draft)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let at = |what: &'static str| self.trouble(what, name);
        let fd = openat(&self.fd, draft.as_os_str(), flags, Mode::from_bits_truncate(0o600))
            .map_err(at("write"))?;
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(trouble("write", &self.path.join(name)))?;
        if let Some(Owner { uid, gid }) = kind.owner {
            fchown(&file, Some(uid.into()), Some(gid.into())).map_err(at("change the owner of"))?;
        }
        fchmod(&file, Mode::from_bits_truncate(kind.mode)).map_err(at("change the mode of"))?;
        if kind.durable {
            fsync(&file).map_err(at("write"))?;
        }
        Ok(draft)
    }

    fn sync(&self, kind: Kind) -> FileResult<()> {
        if kind.durable {
            fsync(&self.fd).map_err(self.trouble("write", OsStr::new("")))?;
        }
        Ok(())
    }

    /// Removes the file `name`; that there is none is fine.
    pub(crate) fn remove(&self, name: &OsStr) -> FileResult<()> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(self.trouble("remove", name)(errno)),
        }
    }

    /// Gives `name` another name that is not taken yet: `NAME.SUFFIX-1`, or a higher number.
    pub(crate) fn set_aside(&self, name: &OsStr, suffix: &str) -> FileResult<OsString> {
        for number in 1..=u32::MAX {
            let mut aside = name.to_owned();
            aside.push(format!(".{suffix}-{number}"));
            if self.stat(&aside)?.is_none() {
                renameat(&self.fd, name, &self.fd, aside.as_os_str())
                    .map_err(self.trouble("rename", name))?;
                return Ok(aside);
            }
        }
        Err(self.trouble("rename", name)(Errno::EEXIST))
    }
}

/// Whether `stat` is of this kind of file.
pub(crate) fn is_kind(stat: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == kind
}

/// A plain file of at most `limit` bytes, at any path of the machine; links are followed.
pub(crate) fn read_following(path: &Path, limit: usize) -> FileResult<Option<Zeroizing<Vec<u8>>>> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let error = |errno| FileError { what: "read", path: path.to_owned(), errno };
    match nix::fcntl::open(path, flags, Mode::empty()) {
        Ok(fd) => read_plain(fd, limit).map(Some).map_err(error),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(error(errno)),
    }
}

fn read_plain(fd: OwnedFd, limit: usize) -> Result<Zeroizing<Vec<u8>>, Errno> {
    let stat = fstat(&fd)?;
    if !is_kind(&stat, SFlag::S_IFREG) {
        return Err(Errno::EINVAL);
    }
    // Sized beforehand, so that growing leaves no copies of a secret behind. Files of /proc say 0.
    let size = usize::try_from(stat.st_size).unwrap_or(0);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size.min(limit) + 1));
    let wanted = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    File::from(fd)
        .take(wanted)
        .read_to_end(&mut bytes)
        .map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if bytes.len() > limit { Err(Errno::EFBIG) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn room() -> (tempfile::TempDir, Dir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        (temp, dir)
    }

    #[test]
    fn a_write_replaces_the_whole_file_and_leaves_no_draft() {
        let (temp, dir) = room();
        dir.write("f", b"long old content", Kind::KEPT).unwrap();
        dir.write("f", b"new", Kind { mode: 0o640, ..Kind::KEPT }).unwrap();
        assert_eq!(fs::read(temp.path().join("f")).unwrap(), b"new");
        assert_eq!(fs::metadata(temp.path().join("f")).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_draft_left_by_a_kill_is_in_nobodys_way() {
        let (temp, dir) = room();
        fs::write(temp.path().join(".f.cvm-new"), "half").unwrap();
        dir.write("f", b"whole", Kind::OF_THIS_BOOT).unwrap();
        assert_eq!(fs::read(temp.path().join("f")).unwrap(), b"whole");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_planted_in_the_place_of_a_file_is_replaced_and_not_followed() {
        let (temp, dir) = room();
        let victim = temp.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, temp.path().join("f")).unwrap();
        symlink(&victim, temp.path().join(".f.cvm-new")).unwrap();
        dir.write("f", b"ours", Kind::KEPT).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert!(fs::symlink_metadata(temp.path().join("f")).unwrap().is_file());
    }

    #[test]
    fn create_never_replaces_not_even_a_link_to_nowhere() {
        let (temp, dir) = room();
        symlink("/nowhere", temp.path().join("link")).unwrap();
        fs::write(temp.path().join("file"), "old").unwrap();
        for name in ["link", "file"] {
            assert!(!dir.create(OsStr::new(name), b"new", Kind::KEPT).unwrap());
        }
        assert!(dir.create(OsStr::new("fresh"), b"new", Kind::KEPT).unwrap());
        assert_eq!(fs::read(temp.path().join("file")).unwrap(), b"old");
    }

    #[test]
    fn what_is_not_a_plain_file_is_not_read() {
        let (temp, dir) = room();
        nix::unistd::mkfifo(&temp.path().join("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
        fs::write(temp.path().join("file"), "12345").unwrap();
        symlink("file", temp.path().join("link")).unwrap();
        assert!(dir.read("fifo", 10).is_err());
        assert!(dir.read("link", 10).is_err());
        assert!(dir.read("file", 4).is_err());
        assert_eq!(dir.read("file", 5).unwrap().unwrap().as_slice(), b"12345");
        assert!(dir.read("absent", 5).unwrap().is_none());
    }

    #[test]
    fn an_error_names_the_file_and_the_remedy() {
        let error = FileError { what: "write", path: "/data/x".into(), errno: Errno::EROFS };
        assert_eq!(
            error.to_string(),
            "cannot write /data/x: Read-only file system; mount the volume writable"
        );
    }

    #[test]
    fn setting_aside_takes_the_first_free_number() {
        let (temp, dir) = room();
        for expected in ["f.old-1", "f.old-2"] {
            fs::write(temp.path().join("f"), "x").unwrap();
            assert_eq!(dir.set_aside(OsStr::new("f"), "old").unwrap(), OsString::from(expected));
        }
    }
}
