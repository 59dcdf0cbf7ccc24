//! The directory of the queue, which root makes, and the user that the client runs as after that.
//!
//! The user is nobody else's: the agent, which runs as the gateway's user, must reach neither the memory
//! of this process nor the queue.

use nix::unistd::{Gid, Uid};
use std::fs::{DirBuilder, Permissions};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, lchown};
use std::path::Path;

/// Makes the directory, gives it to `uid`, and becomes `uid`. Without root the directory is only made.
pub(crate) fn give_up(dir: &Path, uid: u32) -> Result<(), String> {
    let fail = |what: &str, e: Error| format!("{what} {}: {e}", dir.display());
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(fail("making", e)),
        _ => {}
    }
    let found = std::fs::symlink_metadata(dir).map_err(|e| fail("looking at", e))?;
    if !found.is_dir() {
        return Err(format!("{} is not a directory; move it away", dir.display()));
    }
    if !Uid::effective().is_root() {
        return Ok(());
    }
    // After a restore its files may be another user's.
    if found.uid() != uid {
        own(dir, uid).map_err(|e| fail("taking over", e))?;
    }
    std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(|e| fail("closing", e))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setresgid(group, group, group))
        .and_then(|()| nix::unistd::setresuid(user, user, user))
        .map_err(|e| format!("giving up root's rights: {}", e.desc()))?;
    // The change of the user has made this process undumpable, unless the kernel is configured otherwise.
    let _ = nix::sys::prctl::set_dumpable(false);
    Ok(())
}

/// The directory and the files in it.
fn own(dir: &Path, uid: u32) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        lchown(entry?.path(), Some(uid), Some(uid))?;
    }
    lchown(dir, Some(uid), Some(uid))
}
