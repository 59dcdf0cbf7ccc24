//! A mount namespace of one thread alone: what is mounted in it is seen nowhere else, and goes with
//! the thread.
//!
//! Refuses to make that thread: whoever calls is it, and has no other use for it afterwards.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use std::path::Path;

pub fn enter() -> Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    make_private()
}

/// Or what is mounted here would also be mounted where it was copied from.
fn make_private() -> Result<(), Errno> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}

/// Tries what is done for each container, with a directory as its root: says what is refused, and how.
pub fn change_root(trial: &Path) -> Result<(), (&'static str, Errno)> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| ("a mount namespace", errno))?;
    make_private()
        .and_then(|()| mount(Some("tmpfs"), trial, Some("tmpfs"), MsFlags::empty(), Some("size=4k")))
        .map_err(|errno| ("mounting", errno))?;
    match chdir(trial).and_then(|()| pivot_root(".", ".")) {
        Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) => Err(("pivot_root", errno)),
        // Of this root, and not of a right: dockerd has another way there.
        _ => Ok(()),
    }
}
