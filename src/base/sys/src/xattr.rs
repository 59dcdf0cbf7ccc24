//! Extended attributes of a path, with links not followed. Overlayfs keeps its marks in them.
//!
//! nix has no functions for them.

use nix::errno::Errno;
use std::ffi::CStr;

/// The longest value that is read. Overlayfs's marks are flags or paths.
const VALUE_MAX: usize = 8192;

/// The value of an attribute, if it has one.
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
