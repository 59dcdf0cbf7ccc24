//! Which databases are copied in this moment, and how other files are opened meanwhile.
//!
//! POSIX drops all locks that a process has on a file when any thread closes it. A thread that is
//! apart counts as another process there; but where a container may not unshare, none is, and a scan
//! that looks at a database's first bytes would take the locks from under a copy of it: two states
//! could get into one copy. So a file that is copied is not opened: what it is is known.
//!
//! Refuses to make anybody wait for a copy. May import: `entry`, `volume`.

use crate::entry;
use crate::volume;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// By device and number, whatever their names are.
static COPIED: Mutex<BTreeSet<(u64, u64)>> = Mutex::new(BTreeSet::new());

/// As long as it is held, nobody here opens the file.
pub(crate) struct Copying((u64, u64));

impl Copying {
    /// Not while another copy of it is made, under another of its names.
    pub(crate) fn begin(at: &Path) -> io::Result<Option<Self>> {
        let file = at.symlink_metadata()?;
        let file = (file.dev(), file.ino());
        let new = COPIED.lock().unwrap_or_else(PoisonError::into_inner).insert(file);
        Ok(new.then(|| Self(file)))
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        COPIED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// Opens a file of the tree for a moment. Nothing, if it is a database that is copied just now.
pub(crate) fn open<T>(top: &Path, path: &entry::Path, work: impl FnOnce(File) -> T) -> io::Result<Option<T>> {
    let copied = COPIED.lock().unwrap_or_else(PoisonError::into_inner);
    // Closing this one drops no lock.
    let place = volume::place_below(top, path)?;
    let file = place.metadata()?;
    if copied.contains(&(file.dev(), file.ino())) {
        return Ok(None);
    }
    let done = work(volume::open_place(&place)?);
    drop(copied);
    Ok(Some(done))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, fcntl};
    use std::os::fd::AsRawFd as _;

    /// Asked by another process, as far as locks go.
    fn is_locked(file: &Path) -> bool {
        let file = file.to_owned();
        let asked = std::thread::spawn(move || {
            cvm_sys::descriptor::own_table().unwrap();
            let file = File::options().write(true).read(true).open(file).unwrap();
            let mut lock = libc::flock {
                l_type: i16::try_from(libc::F_WRLCK).unwrap(),
                l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            fcntl(&file, FcntlArg::F_GETLK(&mut lock)).unwrap();
            assert!(file.as_raw_fd() > 2);
            i32::from(lock.l_type) != libc::F_UNLCK
        });
        asked.join().unwrap()
    }

    #[test]
    fn a_look_at_a_database_takes_no_lock_from_a_copy_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (at, path) = (dir.path().join("db"), entry::Path::new(b"db").unwrap());
        let db = rusqlite::Connection::open(&at).unwrap();
        db.execute_batch("CREATE TABLE t(x); INSERT INTO t VALUES (1);").unwrap();
        drop(db);
        std::fs::hard_link(&at, dir.path().join("other")).unwrap();
        let other = entry::Path::new(b"other").unwrap();
        let look = |path| open(dir.path(), path, |file| crate::database::begins_like_one(&file)).unwrap();
        assert_eq!(look(&path), Some(true));
        let copying = Copying::begin(&at).unwrap().unwrap();
        let source = rusqlite::Connection::open(&at).unwrap();
        source.execute_batch("BEGIN; SELECT * FROM t;").unwrap();
        assert!(is_locked(&at));
        assert_eq!([look(&path), look(&other)], [None, None]);
        assert!(Copying::begin(&dir.path().join("other")).unwrap().is_none());
        assert!(is_locked(&at), "the locks of a copy are gone");
        drop(source);
        drop(copying);
        assert_eq!([look(&path), look(&other)], [Some(true), Some(true)]);
    }

    #[test]
    fn what_is_no_file_is_neither_followed_nor_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        std::fs::write(top.join("file"), "1").unwrap();
        std::os::unix::fs::symlink("file", top.join("link")).unwrap();
        nix::unistd::mkfifo(&top.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["link", "pipe", "missing"] {
            let path = entry::Path::new(name.as_bytes()).unwrap();
            assert!(open(top, &path, drop).is_err(), "{name}");
        }
        assert!(open(top, &entry::Path::new(b"file").unwrap(), drop).unwrap().is_some());
    }
}
