//! Where something is mounted, and with which rights.
//!
//! The table is read by hand: the crate `procfs` leaves a space in a name as `\040`, and reads nothing of a table that
//! has one name that is no text.

use crate::root_dir::RootDir;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

pub(crate) struct Mounts(Vec<PathBuf>);

impl Mounts {
    pub(crate) fn read(root_dir: &RootDir) -> Self {
        let text = std::fs::read(root_dir.at("/proc/self/mountinfo")).unwrap_or_default();
        let points = text.split(|b| *b == b'\n').filter_map(mount_point);
        Self(points.map(|point| root_dir.at(&point)).collect())
    }

    pub(crate) fn is_mount_point(&self, path: &Path) -> bool {
        self.0.iter().any(|point| point == path)
    }

    /// The first mount point at `path` or below it.
    pub(crate) fn at_or_below(&self, path: &Path) -> Option<PathBuf> {
        self.0.iter().find(|point| point.starts_with(path)).cloned()
    }
}

/// From now on set-user-id bits and devices on this mount have no effect. The other flags of the mount stay.
pub(crate) fn lend_no_rights(point: &Path) -> Result<(), Errno> {
    let has = statvfs(point)?.flags();
    if has.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV) {
        return Ok(());
    }
    let kept = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
    ];
    let kept = kept.iter().filter(|(is, _)| has.contains(*is)).map(|(_, flag)| *flag);
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(None::<&str>, point, None::<&str>, flags | kept.collect(), None::<&str>)
}

/// `36 35 98:0 /root /mount/point options …`, with `\040` for a space.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|b| *b == b' ').nth(4)?;
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escape = (byte == b'\\').then(|| octal(after.get(..3)?)).flatten();
        plain.push(escape.unwrap_or(byte));
        rest = if escape.is_some() { &after[3..] } else { after };
    }
    Some(PathBuf::from(OsString::from_vec(plain)))
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read_whole() {
        let line = br"36 35 98:0 / /root/.config/my\040things\134x rw - ext4 /dev/vda rw";
        assert_eq!(mount_point(line).unwrap(), Path::new(r"/root/.config/my things\x"));
        assert_eq!(mount_point(b"short"), None);
    }

    #[test]
    fn below_means_whole_names() {
        let mounts = Mounts(vec!["/data".into(), "/root/.config/gcloud".into()]);
        assert!(mounts.is_mount_point(Path::new("/data")));
        assert!(!mounts.is_mount_point(Path::new("/dat")));
        assert!(mounts.at_or_below(Path::new("/root/.config")).is_some());
        assert!(mounts.at_or_below(Path::new("/root/.conf")).is_none());
    }
}
