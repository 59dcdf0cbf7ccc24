//! Where something is mounted. Refuses to mount. May import: `places`.

use crate::places::Places;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

pub(crate) struct Mounts(Vec<PathBuf>);

impl Mounts {
    pub(crate) fn read(places: &Places) -> Self {
        let text = std::fs::read(places.at("/proc/self/mountinfo")).unwrap_or_default();
        let points = text.split(|b| *b == b'\n').filter_map(mount_point);
        Self(points.map(|point| places.at(&point)).collect())
    }

    pub(crate) fn is_mount_point(&self, path: &Path) -> bool {
        self.0.iter().any(|point| point == path)
    }

    /// The first mount point at `path` or below it.
    pub(crate) fn at_or_below(&self, path: &Path) -> Option<PathBuf> {
        self.0.iter().find(|point| point.starts_with(path)).cloned()
    }
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
