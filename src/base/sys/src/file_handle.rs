//! File handles: the file system's own identity of a file, which survives every rename and ends with the file.
//!
//! Taking a handle needs no right. Asking whether its file still exists needs `CAP_DAC_READ_SEARCH`; without that
//! right, and on file systems without handles, there is no answer.

use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;

/// The kernel's `MAX_HANDLE_SZ`.
const LONGEST: u32 = 128;

/// The kernel's `struct file_handle` with room for the longest.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    handle: [u8; LONGEST as usize],
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Handle(Vec<u8>);

/// What has become of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The file still exists. Its path, if the kernel knows one.
    Lives(Vec<u8>),
    Gone,
    /// The kernel does not answer: the right is missing, or the file system has no handles.
    Unknown,
}

impl Handle {
    /// The handle of the file at `path`; a link is not followed.
    #[allow(unsafe_code)]
    pub fn of(path: &CStr) -> Option<Self> {
        let mut raw = Raw { bytes: LONGEST, kind: 0, handle: [0; LONGEST as usize] };
        let mut mount = 0;
        // SAFETY: the path ends with NUL; `Raw` begins as the kernel's structure does, and says
        // how many bytes there are for the handle behind it.
        let done = unsafe {
            libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), (&raw mut raw).cast(), &raw mut mount, 0)
        };
        Errno::result(done).ok()?;
        let mut all = raw.kind.to_ne_bytes().to_vec();
        all.extend_from_slice(raw.handle.get(..usize::try_from(raw.bytes).ok()?)?);
        Some(Self(all))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// From [`Self::as_bytes`]. A handle of another file system finds nothing, or another file.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// What has become of the file. `anything` is any open file on the handle's file system.
    pub fn fate(&self, anything: impl AsFd) -> Fate {
        match self.open(anything) {
            Ok(file) => named(&file),
            Err(Errno::ESTALE | Errno::ENOENT) => Fate::Gone,
            Err(_) => Fate::Unknown,
        }
    }

    #[allow(unsafe_code)]
    fn open(&self, anything: impl AsFd) -> Result<OwnedFd, Errno> {
        let (kind, handle) = self.0.split_first_chunk::<4>().ok_or(Errno::EINVAL)?;
        let mut raw = Raw { bytes: 0, kind: i32::from_ne_bytes(*kind), handle: [0; LONGEST as usize] };
        raw.handle.get_mut(..handle.len()).ok_or(Errno::EINVAL)?.copy_from_slice(handle);
        raw.bytes = u32::try_from(handle.len()).map_err(|_| Errno::EINVAL)?;
        // SAFETY: as above; the descriptor is open while the call lasts.
        let file = unsafe {
            libc::open_by_handle_at(
                anything.as_fd().as_raw_fd(),
                (&raw mut raw).cast(),
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        Errno::result(file).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

fn named(file: &OwnedFd) -> Fate {
    match nix::sys::stat::fstat(file) {
        Ok(stat) if stat.st_nlink == 0 => Fate::Gone,
        Ok(_) => {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
            Fate::Lives(link.map_or_else(|_| Vec::new(), |path| path.into_os_string().into_vec()))
        }
        Err(_) => Fate::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::fs::{self, File};
    use std::os::unix::ffi::OsStrExt as _;
    use std::path::Path;

    fn handle(path: &Path) -> Handle {
        Handle::of(&CString::new(path.as_os_str().as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn a_file_is_found_under_any_name_until_its_last_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let top = File::open(dir.path()).unwrap();
        let (old, new, link) = (dir.path().join("old"), dir.path().join("new"), dir.path().join("link"));
        fs::write(&old, "1").unwrap();
        let known = handle(&old);
        fs::rename(&old, &new).unwrap();
        assert_eq!(known, handle(&new));
        assert_eq!(known.fate(&top), Fate::Lives(new.as_os_str().as_bytes().to_vec()));
        fs::hard_link(&new, &link).unwrap();
        fs::remove_file(&new).unwrap();
        assert!(matches!(known.fate(&top), Fate::Lives(_)));
        let open = File::open(&link).unwrap();
        fs::remove_file(&link).unwrap();
        assert_eq!(known.fate(&top), Fate::Gone, "open, and without a name");
        drop(open);
        assert_eq!(known.fate(&top), Fate::Gone);
        fs::write(&old, "2").unwrap();
        assert_ne!(known, handle(&old), "another file, even with the same number");
    }

    #[test]
    fn nonsense_lives_nowhere() {
        let top = File::open("/proc").unwrap();
        assert_eq!(Handle::from_bytes(vec![1, 2]).fate(&top), Fate::Unknown);
        assert_eq!(Handle::from_bytes(vec![0; 500]).fate(&top), Fate::Unknown);
    }
}
