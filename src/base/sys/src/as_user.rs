//! Lets one thread of root's use the file system with the rights of another user: what that user may not open, create
//! or unlink, the thread may not either.
//!
//! nix has the calls for user and group; its call for the supplementary groups changes all threads at once.

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, getgroups, setfsgid, setfsuid};
use std::marker::PhantomData;

/// The thread that makes it has the other user's rights until this is dropped.
pub struct AsUser {
    user: Uid,
    group: Gid,
    groups: Vec<libc::gid_t>,
    /// Not to be dropped by another thread.
    here: PhantomData<*const ()>,
}

impl AsUser {
    /// Root's capabilities over files go with its user number, and come back with it.
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
        // It has just been allowed to give them up.
        let _ = set_groups(&self.groups);
    }
}

/// The supplementary groups of this thread alone.
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
