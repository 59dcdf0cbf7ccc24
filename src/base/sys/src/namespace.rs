//! A mount namespace of one thread alone: its mounts are seen nowhere else, and end with the thread.
//!
//! The calling thread gets the namespace, and should do nothing else afterwards.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use std::fmt;
use std::path::Path;

/// A step on the way into a container.
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

/// Tries the steps that each container needs, with a directory as its root. Returns the step that is refused.
pub fn change_root(trial: &Path) -> Result<(), (ContainerStep, Errno)> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| (ContainerStep::MountNamespace, errno))?;
    make_private()
        .and_then(|()| mount(Some("tmpfs"), trial, Some("tmpfs"), MsFlags::empty(), Some("size=4k")))
        .map_err(|errno| (ContainerStep::Mount, errno))?;
    match chdir(trial).and_then(|()| pivot_root(".", ".")) {
        Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) => Err((ContainerStep::PivotRoot, errno)),
        // Any other error comes from this root and not from a missing right; dockerd then does it another way.
        _ => Ok(()),
    }
}
