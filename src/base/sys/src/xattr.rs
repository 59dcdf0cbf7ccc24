//! Extended attributes of a path itself, links not followed: overlayfs keeps its marks there.
//!
//! nix has no call for them.

use nix::errno::Errno;
use std::ffi::CStr;

/// Overlayfs's marks are flags or paths.
const VALUE_MAX: usize = 8192;

/// The value, when there is one.
#[allow(unsafe_code)]
pub fn get(path: &CStr, name: &CStr) -> Option<Vec<u8>> {
    let mut value = vec![0u8; VALUE_MAX];
    // SAFETY: both names end with NUL, and the kernel writes at most the given length.
    let length =
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(length).ok()?);
    Some(value)
}

#[allow(unsafe_code)]
pub fn set(path: &CStr, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: both names end with NUL, and the kernel reads exactly the given length.
    let done =
        unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(done).map(drop)
}

#[allow(unsafe_code)]
pub fn remove(path: &CStr, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both names end with NUL.
    Errno::result(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}
