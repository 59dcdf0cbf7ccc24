//! Gives a whole tree to one user, once: a volume of the old product belongs to root.
//!
//! The directory at the top is given last, so that a try that is killed half-way is repeated.
//!
//! No link is followed, the file system is not left, and no device is given away. Neither is a
//! file that has another name outside of the tree: it would be given away there too.

use crate::files::{FileError, FileResult, Owner, trouble};
use crate::report;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::fchownat;
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) entries: u64,
    /// Devices, other file systems, and files that are also elsewhere.
    pub(crate) left_alone: u64,
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} entries now belong to the gateway's user", self.entries)?;
        match self.left_alone {
            0 => Ok(()),
            left => {
                write!(f, ", {left} were left alone (devices, mounts, or files that are also outside of it)")
            }
        }
    }
}

/// Gives `top` and everything in it to `owner`.
pub(crate) fn give(top: &Path, owner: Owner) -> FileResult<Given> {
    let mut walk = Walk { owner, device: stat(top)?.dev(), given: Given::default(), linked: HashMap::new() };
    walk.directory(top)?;
    walk.settle_linked()?;
    walk.one(top, &stat(top)?)?;
    Ok(walk.given)
}

struct Walk {
    owner: Owner,
    device: u64,
    given: Given,
    /// Files with several names: how many of them lie in the tree, and one of them.
    linked: HashMap<(u64, u64), (u64, PathBuf)>,
}

impl Walk {
    fn directory(&mut self, path: &Path) -> FileResult<()> {
        for entry in fs::read_dir(path).map_err(trouble("read", path))? {
            let path = entry.map_err(trouble("read", path))?.path();
            let stat = stat(&path)?;
            let kind = stat.file_type();
            if !kind.is_dir() && self.is_given(&stat) {
                continue;
            }
            if kind.is_dir() {
                if stat.dev() != self.device {
                    self.leave(&path);
                    continue;
                }
                self.directory(&path)?;
            } else if kind.is_block_device() || kind.is_char_device() {
                self.leave(&path);
                continue;
            } else if stat.nlink() > 1 {
                self.linked.entry((stat.dev(), stat.ino())).or_insert((0, path)).0 += 1;
                continue;
            }
            self.one(&path, &stat)?;
        }
        Ok(())
    }

    fn settle_linked(&mut self) -> FileResult<()> {
        for (names_here, path) in std::mem::take(&mut self.linked).into_values() {
            let stat = stat(&path)?;
            if stat.nlink() == names_here {
                self.one(&path, &stat)?;
            } else {
                self.leave(&path);
            }
        }
        Ok(())
    }

    fn is_given(&self, stat: &Metadata) -> bool {
        (stat.uid(), stat.gid()) == (self.owner.uid, self.owner.gid)
    }

    fn one(&mut self, path: &Path, stat: &Metadata) -> FileResult<()> {
        if self.is_given(stat) {
            return Ok(());
        }
        let Owner { uid, gid } = self.owner;
        match fchownat(AT_FDCWD, path, Some(uid.into()), Some(gid.into()), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(()) => self.given.entries += 1,
            Err(Errno::ENOENT) => {}
            Err(errno) => {
                return Err(FileError { what: "change the owner of", path: path.to_owned(), errno });
            }
        }
        Ok(())
    }

    fn leave(&mut self, path: &Path) {
        report::detail(format!("not given to the gateway's user: {}", path.display()));
        self.given.left_alone += 1;
    }
}

fn stat(path: &Path) -> FileResult<Metadata> {
    fs::symlink_metadata(path).map_err(trouble("look at", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Another user than whoever runs the test; only root may give files away.
    const STRANGER: Owner = Owner { uid: 54321, gid: 54322 };

    fn uid(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().uid()
    }

    #[test]
    fn everything_below_changes_hands_and_nothing_outside_does() {
        if cvm_needs::lacks_root() {
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let (tree, outside) = (temp.path().join("tree"), temp.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(&outside, "x").unwrap();
        fs::write(tree.join("a/file"), "x").unwrap();
        symlink(&outside, tree.join("a/link")).unwrap();
        fs::hard_link(&outside, tree.join("a/alias-of-outside")).unwrap();
        fs::write(tree.join("twice"), "x").unwrap();
        fs::hard_link(tree.join("twice"), tree.join("a/b/twice")).unwrap();
        let given = give(&tree, STRANGER).unwrap();
        assert_eq!(given, Given { entries: 6, left_alone: 1 });
        for name in ["", "a", "a/b", "a/file", "a/link", "twice"] {
            assert_eq!(uid(&tree.join(name)), STRANGER.uid, "{name}");
        }
        assert_eq!(uid(&outside), 0);
        assert_eq!(give(&tree, STRANGER).unwrap().entries, 0);
    }

    #[test]
    fn a_device_is_never_given_away() {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        let temp = tempfile::tempdir().unwrap();
        let device = temp.path().join("disk");
        let made = mknod(&device, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(7, 200));
        if cvm_needs::lacks_root() {
            return;
        }
        made.unwrap();
        assert_eq!(give(temp.path(), STRANGER).unwrap().left_alone, 1);
        assert_eq!(uid(&device), 0);
    }

    #[test]
    fn the_top_is_given_last_so_that_a_kill_half_way_is_made_good() {
        // What `claim` looks at is the owner of the top: it must not say "done" before it is.
        if cvm_needs::lacks_root() {
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("file"), "x").unwrap();
        let mut walk = Walk { owner: STRANGER, device: 0, given: Given::default(), linked: HashMap::new() };
        walk.directory(temp.path()).unwrap();
        assert_eq!((uid(temp.path()), uid(&temp.path().join("file"))), (0, STRANGER.uid));
    }
}
