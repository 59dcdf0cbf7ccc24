//! How `SQLite` opens what it opens in this process. The journal of a database may name any other
//! path, and `SQLite` would wait for ever for a pipe that lies there.
//!
//! Refuses what is no file. May import: nothing of ours.

use nix::errno::Errno;
use rusqlite::ffi;
use std::ffi::{CStr, c_char, c_int};
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::sync::Once;

type Open = unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int;

/// What `SQLite` itself needs: random bytes, and what it puts in place of descriptors 0 to 2.
const DEVICES: [&CStr; 2] = [c"/dev/urandom", c"/dev/null"];

pub(crate) fn only_files() {
    static ONCE: Once = Once::new();
    ONCE.call_once(replace);
}

#[allow(unsafe_code)]
fn replace() {
    // SAFETY: SQLite keeps its default VFS for ever, and calls what stands for "open" with a
    // string, the flags and the mode, as its own `posixOpen`, whatever the table's type says.
    unsafe {
        let vfs = ffi::sqlite3_vfs_find(std::ptr::null());
        if let Some(set) = vfs.as_ref().and_then(|vfs| vfs.xSetSystemCall) {
            let call = std::mem::transmute::<Open, unsafe extern "C" fn()>(open);
            set(vfs, c"open".as_ptr(), Some(call));
        }
    }
}

#[allow(unsafe_code)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: SQLite's path is a string that lives as long as the call.
    let (path, raw) = unsafe { (CStr::from_ptr(path), libc::open(path, flags | libc::O_NONBLOCK, mode)) };
    if raw < 0 {
        return raw;
    }
    // SAFETY: it has just been opened, and nobody else has it.
    let opened = unsafe { OwnedFd::from_raw_fd(raw) };
    let kind = nix::sys::stat::fstat(&opened).map_or(0, |stat| stat.st_mode & libc::S_IFMT);
    // Directories, it makes durable.
    if matches!(kind, libc::S_IFREG | libc::S_IFDIR) || DEVICES.contains(&path) {
        return opened.into_raw_fd();
    }
    drop(opened);
    Errno::EACCES.set();
    -1
}
