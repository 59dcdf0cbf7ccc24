//! The names of the lower layer that the kernel still has in its cache, and the nodes that it knows them by.
//!
//! Most names may be answered with "does not exist": the overlay then takes what it has in its
//! upper layer. Not so the names that it has found in the lower layer before. Before `mkdir` of a
//! directory that exists, before creating exclusively, and before a rename onto a name, the
//! kernel asks again for the name in the lower layer, however long the last answer was valid; and if the answer is
//! not the same node as before, the overlay fails with ESTALE. So `mkdir -p` and every
//! replacement of a file by rename would fail.
//!
//! Besides the dead server only the kernel knows these nodes, and it answers from its cache without asking the
//! server. The cache cannot be listed, so the names to try come from the upper layer:
//! everything has been copied there, and every deleted file has left a whiteout there.
//!
//! Where the kernel does not know whether a name of the upper layer is in the lower layer too, the answer is yes,
//! with a made-up node. When the name is removed, the overlay asks whether it has to leave a whiteout: one too many
//! hides nothing, one too few brings back a deleted file when the layers are mounted again.

use cvm_sys::fuse_dcache::{self, Known};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The root of every FUSE file system.
const ROOT: u64 = 1;

/// Numbers of made-up nodes. Servers count from 1 and do not get here.
const MADE_UP: u64 = 1 << 63;
const MADE_UP_DIRECTORY: u64 = MADE_UP | 1 << 62;

/// Requests wait while names are gathered. Names not reached by then count as absent.
const GATHERING_MAX: Duration = Duration::from_secs(20);

/// Of `st_mode`: the type, and a directory.
const TYPE: u32 = 0o17_0000;
const DIRECTORY: u32 = 0o4_0000;
const REGULAR: u32 = 0o10_0000;

/// The two trees that are compared: the mount itself, and the upper layer above it.
pub(crate) struct Trees {
    pub(crate) mount: OwnedFd,
    pub(crate) upper: OwnedFd,
}

#[derive(Default)]
pub(crate) struct Names {
    children: HashMap<u64, HashMap<Box<[u8]>, u64>>,
    nodes: HashMap<u64, Known>,
    made_up: u64,
}

impl Names {
    pub(crate) fn child(&self, parent: u64, name: &[u8]) -> Option<Known> {
        self.node(*self.children.get(&parent)?.get(name)?)
    }

    /// A made-up node is described by its number alone: there may be many.
    pub(crate) fn node(&self, node: u64) -> Option<Known> {
        let mode = match self.nodes.get(&node) {
            Some(known) => return Some(*known),
            None if node == ROOT || node & MADE_UP_DIRECTORY == MADE_UP_DIRECTORY => DIRECTORY | 0o755,
            None if Self::is_made_up(node) => REGULAR | 0o644,
            None => return None,
        };
        let inode = node & !MADE_UP_DIRECTORY;
        Some(Known {
            nodeid: node,
            generation: 0,
            inode,
            mode,
            links: 1,
            uid: 0,
            gid: 0,
            size: 0,
            blocks: 0,
            modified: (0, 0),
        })
    }

    /// Everything that the kernel knows by a name of the upper layer, and what it does not know.
    pub(crate) fn gather(trees: &Trees) -> Self {
        let mut names = Self::default();
        if let Ok(root) = fuse_dcache::known(&trees.mount)
            && root.nodeid == ROOT
        {
            names.nodes.insert(ROOT, root);
        }
        let deadline = Instant::now() + GATHERING_MAX;
        let mut left = vec![(PathBuf::from("."), ROOT)];
        while let Some((directory, node)) = left.pop() {
            for (name, is_directory) in listing(&trees.upper, &directory) {
                let path = directory.join(std::ffi::OsStr::from_bytes(&name));
                let below = match fuse_dcache::find(&trees.mount, &path).and_then(fuse_dcache::known) {
                    Ok(known) => names.insert(known),
                    // The kernel knows that the lower layer does not have it.
                    Err(Errno::ENOENT) => continue,
                    Err(_) => names.make_up(is_directory),
                };
                if is_directory && names.is_directory(below) {
                    left.push((path, below));
                }
                names.children.entry(node).or_default().insert(name, below);
            }
            if Instant::now() > deadline {
                eprintln!("cvm-standin: not all names could be gathered in {} s", GATHERING_MAX.as_secs());
                break;
            }
        }
        names
    }

    fn insert(&mut self, known: Known) -> u64 {
        self.nodes.insert(known.nodeid, known);
        known.nodeid
    }

    fn make_up(&mut self, is_directory: bool) -> u64 {
        self.made_up += 1;
        self.made_up | if is_directory { MADE_UP_DIRECTORY } else { MADE_UP }
    }

    /// Whether nobody knows the content of this node.
    pub(crate) fn is_made_up(node: u64) -> bool {
        node & MADE_UP != 0
    }

    fn is_directory(&self, node: u64) -> bool {
        self.node(node).is_some_and(|known| known.mode & TYPE == DIRECTORY)
    }

    /// How many names the kernel knew, and how many it did not.
    pub(crate) fn count(&self) -> (usize, u64) {
        (self.nodes.len(), self.made_up)
    }
}

/// The names in a directory of the upper layer, and which are directories. Empty if the directory hides the lower
/// layer's, or cannot be listed.
fn listing(upper: &OwnedFd, directory: &Path) -> Vec<(Box<[u8]>, bool)> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(fd) = openat(upper.as_fd(), directory, flags, Mode::empty()) else { return Vec::new() };
    if fuse_dcache::is_opaque(&fd) {
        return Vec::new();
    }
    let entries = std::fs::read_dir(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let parts = entries.into_iter().flatten().flatten().map(|entry| {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        (entry.file_name().as_bytes().into(), is_directory)
    });
    parts.collect()
}
