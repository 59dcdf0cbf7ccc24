//! A disk of one's own whose power can be cut: ext4 in a file, behind a loop device. What the kernel
//! has only in memory is not in the file.

use crate::machine::PATIENCE;
use crate::wait::until;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 256;

/// Dropping it unmounts it.
pub struct Disk {
    scratch: tempfile::TempDir,
}

impl Disk {
    /// An empty one, made with these options of `mkfs.ext4`.
    #[track_caller]
    pub fn new(options: &[&str]) -> Self {
        let this = Self::unformatted();
        let file = std::fs::File::create(this.file()).expect("room on the disk");
        file.set_len(MIB << 20).expect("a file may have holes");
        run(Command::new("mkfs.ext4").arg("-qF").args(options).arg(this.file()));
        this.mount();
        this
    }

    fn unformatted() -> Self {
        let scratch = tempfile::Builder::new().prefix("cvm-disk-").tempdir().expect("a temporary directory");
        std::fs::create_dir(scratch.path().join("mount")).expect("a directory can be made");
        Self { scratch }
    }

    fn file(&self) -> PathBuf {
        self.scratch.path().join("disk")
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("mount")
    }

    #[track_caller]
    fn mount(&self) {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.file()).arg(self.path()));
    }

    /// A machine that starts at this moment has a copy of every mount until it has left the old root. As long
    /// as one has, the kernel keeps the file system in memory, and writes it to the file later.
    #[track_caller]
    fn unmount(&self) {
        until("the disk is unmounted", PATIENCE, || {
            nix::mount::umount2(&self.path(), nix::mount::MntFlags::empty()).ok()
        });
        until("nobody else has the disk mounted", PATIENCE, || {
            let devices = Command::new("losetup").arg("-j").arg(self.file()).output().expect("losetup runs");
            (devices.status.success() && devices.stdout.is_empty()).then_some(())
        });
    }

    /// What would be left if the power went now, as another disk. Nobody may write to this one meanwhile;
    /// the kernel may, and then it is copied again.
    #[track_caller]
    #[must_use]
    pub fn cut(&self) -> Self {
        let other = Self::unformatted();
        loop {
            run(Command::new("cp").arg("--sparse=always").arg(self.file()).arg(other.file()));
            let same = Command::new("cmp").arg("-s").arg(self.file()).arg(other.file()).status();
            if same.expect("cmp runs").success() {
                break;
            }
        }
        other.mount();
        other
    }

    /// Sets the times of a file back or forth, as no program can: to seconds since 1970.
    #[track_caller]
    pub fn set_times(&self, below: &Path, seconds: i64) {
        self.unmount();
        for field in ["ctime", "mtime"] {
            let request = format!("set_inode_field /{} {field} @{seconds}", below.display());
            run(Command::new("debugfs").args(["-w", "-R", &request]).arg(self.file()));
        }
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().expect("a program of the system runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
