//! A thread of a root process uses the file system with the rights of another user: it can open, create and unlink
//! only what that user may.
//!
//! The supplementary groups are set by system call, because nix's function changes them for all threads.

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, getgroups, setfsgid, setfsuid};
use std::marker::PhantomData;

/// The calling thread has the other user's rights until this value is dropped.
pub struct AsUser {
    user: Uid,
    group: Gid,
    groups: Vec<libc::gid_t>,
    /// Makes the type `!Send`: the thread that took the rights has to give them back.
    here: PhantomData<*const ()>,
}

impl AsUser {
    /// The kernel takes root's capabilities over files away with its user number, and gives them back with it.
    pub fn of(user: Uid, group: Gid) -> nix::Result<Self> {
        let groups = getgroups()?.into_iter().map(Gid::as_raw).collect();
        set_groups(&[])?;
        let acting = Self { group: setfsgid(group), user: setfsuid(user), groups, here: PhantomData };
        // The calls do not say whether they succeeded; a second call returns the current value.
        if (setfsuid(user), setfsgid(group)) == (user, group) { Ok(acting) } else { Err(Errno::EPERM) }
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        setfsuid(self.user);
        setfsgid(self.group);
        // Does not fail: the same thread was allowed to set groups before.
        let _ = set_groups(&self.groups);
    }
}

/// Sets the supplementary groups of the calling thread only.
#[allow(unsafe_code)]
fn set_groups(groups: &[libc::gid_t]) -> nix::Result<()> {
    // SAFETY: the kernel reads as many numbers as the slice has.
    let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    Errno::result(done).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::mpsc;
    use std::{fs, thread};

    #[test]
    fn what_is_roots_is_out_of_reach_until_it_is_over() {
        if cvm_needs::lacks_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("roots");
        fs::write(&file, "1").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let (tell, told) = mpsc::channel();
        let other = {
            let file = file.clone();
            thread::spawn(move || told.recv().is_ok() && fs::read(file).is_ok())
        };
        let acting = AsUser::of(Uid::from_raw(990), Gid::from_raw(990)).unwrap();
        assert!(fs::read(&file).is_err() && fs::remove_file(&file).is_err());
        tell.send(()).unwrap();
        assert!(other.join().unwrap(), "it is this thread's alone");
        drop(acting);
        assert!(fs::read(&file).is_ok());
        fs::remove_file(&file).unwrap();
    }
}
