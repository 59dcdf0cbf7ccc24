//! Files whose data the kernel is bringing up. Of a file of which only mode, owner and times are
//! above, it writes the data into what is there, and the file has the time of that until whoever
//! asked for it has put its own back. Nobody takes that time for the file's.
//!
//! Refuses to make a scan wait: data may come over the network. May import: `entry`, `fault`, `volume`.

use crate::entry::Path;
use crate::fault::Fault;
use crate::volume::{self, Volume, Within};
use nix::fcntl::OFlag;
use nix::sys::stat::FileStat;
use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::fs::{File, OpenOptions};
use std::hash::{Hash as _, Hasher as _};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path as FsPath;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Lifting {
    files: Mutex<HashSet<Path>>,
    /// For each directory one of these.
    directories: [Mutex<()>; 32],
}

impl Lifting {
    /// What is above of a file, unless its data is just brought up.
    pub(crate) fn look(&self, path: &Path, at: &FsPath) -> Result<Seen, Fault> {
        let set = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if set.contains(path) { Ok(Seen::InTheMaking) } else { Ok(Seen::Is(volume::look(at)?)) }
    }

    pub(crate) fn during<T>(&self, path: &Path, work: impl FnOnce() -> T) -> T {
        let mut set = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        set.insert(path.clone());
        drop(set);
        let outcome = work();
        self.files.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
        outcome
    }

    /// Until it is dropped, nobody else brings up a file in this directory. The kernel puts back the time of
    /// the directory when it has made a file there; of two at once the second would put back the time that
    /// the first has made.
    fn alone_in(&self, directory: Option<&Path>) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        directory.map(Path::as_bytes).hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % self.directories.len() as u64).unwrap_or_default();
        self.directories[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) enum Seen {
    Is(Option<FileStat>),
    InTheMaking,
}

/// Makes the kernel bring a file's data up, with the time that the file has had above or, when there
/// was nothing of it above, the one that is given. False when the file is not there any more.
pub(crate) fn lift(volume: &Volume, path: &Path, mtime_ns: Option<i64>) -> Result<bool, Fault> {
    let dir = match Within::open(&volume.tree, path.parent().as_ref()) {
        // Removed, or replaced by something that its files are not in.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => {
            return Ok(false);
        }
        other => other?,
    };
    let (at, upper) = (dir.name(path.name()), path.below(&volume.upper));
    volume.lifting.during(path, || {
        let above = volume::look(&upper)?.map(|stat| volume::mtime_ns(&stat));
        let alone = above.is_none().then(|| volume.lifting.alone_in(path.parent().as_ref()));
        match open_for_writing(&at) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                return Err(Fault::other("it is a program that runs: it is brought up when it has ended"));
            }
            other => other?,
        };
        drop(alone);
        let now = volume::look(&upper)?.map(|stat| volume::mtime_ns(&stat));
        if let Some(time) = above.or(mtime_ns).filter(|time| now.is_some_and(|now| now != *time)) {
            volume::set_mtime(&at, time)?;
        }
        Ok(true)
    })
}

/// Which makes the kernel copy up what is only below.
fn open_for_writing(at: &FsPath) -> io::Result<File> {
    let how = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    OpenOptions::new().read(true).write(true).custom_flags(how.bits()).open(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_making_is_not_looked_at_and_others_are() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let [a, b] = ["a", "b"].map(|name| Path::new(name.as_bytes()).unwrap());
        let seen = |path: &Path| volume.lifting.look(path, &path.below(&volume.upper)).unwrap();
        volume.lifting.during(&a, || {
            assert!(matches!(seen(&a), Seen::InTheMaking));
            assert!(matches!(seen(&b), Seen::Is(None)));
        });
        assert!(matches!(seen(&a), Seen::Is(None)));
    }

    #[test]
    fn a_program_that_runs_is_told_from_a_broken_disk() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let path = Path::new(b"program").unwrap();
        let at = path.below(&volume.upper);
        std::fs::copy("/bin/sleep", &at).unwrap();
        let mut child = std::process::Command::new(&at).arg("600").spawn().unwrap();
        let outcome = lift(&volume, &path, None);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(&outcome, Err(Fault::Other(why)) if why.contains("runs")), "{outcome:?}");
        assert!(lift(&volume, &path, None).unwrap());
    }

    #[test]
    fn nothing_is_brought_up_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let [top, outside] = ["top", "outside"].map(|name| dir.path().join(name));
        for at in [&top, &outside] {
            std::fs::create_dir(at).unwrap();
        }
        let volume = Volume::plain(&top).unwrap();
        std::fs::write(outside.join("a"), "1").unwrap();
        let time = || volume::mtime_ns(&volume::look(&outside.join("a")).unwrap().unwrap());
        let before = time();
        std::os::unix::fs::symlink(&outside, top.join("d")).unwrap();
        std::fs::write(top.join("f"), "1").unwrap();
        for name in ["d/a", "f/a", "none/a"] {
            let path = Path::new(name.as_bytes()).unwrap();
            assert!(!lift(&volume, &path, Some(1_234)).unwrap(), "{name}");
        }
        assert_eq!(time(), before);
    }

    #[test]
    fn a_file_keeps_the_time_that_it_had_above() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let path = Path::new(b"a").unwrap();
        let at = path.below(&volume.upper);
        std::fs::write(&at, "1").unwrap();
        volume::set_mtime(&at, 1_234).unwrap();
        assert!(lift(&volume, &path, Some(5_678)).unwrap());
        assert_eq!(volume::mtime_ns(&volume::look(&at).unwrap().unwrap()), 1_234);
    }
}
