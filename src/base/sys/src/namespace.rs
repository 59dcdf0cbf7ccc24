//! A mount namespace for the calling thread only: its mounts are seen nowhere else, and end with the thread.
//!
//! A thread with such a namespace should do nothing else afterwards.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use std::fmt;
use std::path::Path;

/// A system call that every container needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerStep {
    MountNamespace,
    Mount,
    PivotRoot,
}

impl fmt::Display for ContainerStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MountNamespace => "a mount namespace",
            Self::Mount => "mounting",
            Self::PivotRoot => "pivot_root",
        })
    }
}

pub fn enter() -> Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    make_private()
}

/// Keeps mounts made here from appearing in the namespace that this one was copied from.
fn make_private() -> Result<(), Errno> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}

/// Tries the calls that each container needs, with `trial` as its root. Returns the call that is refused.
pub fn change_root(trial: &Path) -> Result<(), (ContainerStep, Errno)> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| (ContainerStep::MountNamespace, errno))?;
    make_private()
        .and_then(|()| mount(Some("tmpfs"), trial, Some("tmpfs"), MsFlags::empty(), Some("size=4k")))
        .map_err(|errno| (ContainerStep::Mount, errno))?;
    match chdir(trial).and_then(|()| pivot_root(".", ".")) {
        Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) => Err((ContainerStep::PivotRoot, errno)),
        // Any other error comes from this root and not from a missing right, and dockerd has another way then.
        _ => Ok(()),
    }
}
