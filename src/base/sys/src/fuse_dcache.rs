//! Reads what the kernel's cache knows about the files of a FUSE mount, and never asks the mount's server: the server
//! may be dead, or may be this program. So no function here waits.

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// A FUSE file: the node by which its server and the kernel know it, and the attributes that the server last gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    pub nodeid: u64,
    pub generation: u32,
    pub inode: u64,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub blocks: u64,
    /// When the content changed last: seconds and nanoseconds.
    pub modified: (u64, u32),
}

/// Opens `path` below `directory`, if every name on the path is in the kernel's cache.
pub fn find<F: AsFd>(directory: F, path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::from_bits_retain(libc::RESOLVE_CACHED) | ResolveFlag::RESOLVE_BENEATH;
    openat2(directory, path, OpenHow::new().flags(flags).resolve(resolve))
}

/// The kernel's `struct file_handle`, with room for the longest handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    words: [u32; 32],
}

/// The handle of a FUSE file without its parent, `FILEID_INO64_GEN`.
const INO64_GEN: i32 = 0x81;
/// A flag of `name_to_handle_at` since Linux 6.5: the handle only identifies the file, and need not open it.
const AT_HANDLE_FID: i32 = 0x200;

/// What the cache knows about a FUSE file. The descriptor may be `O_PATH`.
pub fn known<F: AsFd>(file: F) -> nix::Result<Known> {
    let handle = handle(&file)?;
    if handle.kind != INO64_GEN || handle.bytes != 12 {
        return Err(Errno::EOPNOTSUPP);
    }
    let stat = attributes(&file)?;
    Ok(Known {
        nodeid: u64::from(handle.words[0]) << 32 | u64::from(handle.words[1]),
        generation: handle.words[2],
        inode: stat.stx_ino,
        mode: u32::from(stat.stx_mode),
        links: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        modified: (stat.stx_mtime.tv_sec.cast_unsigned(), stat.stx_mtime.tv_nsec),
    })
}

/// Whether a directory of an overlay's upper layer hides the directory below it. The descriptor has to be open for
/// reading.
#[allow(unsafe_code)]
pub fn is_opaque<F: AsFd>(directory: F) -> bool {
    let mut value = 0u8;
    // SAFETY: a constant name, and one byte of this frame for the value.
    let length = unsafe {
        libc::fgetxattr(
            directory.as_fd().as_raw_fd(),
            c"trusted.overlay.opaque".as_ptr(),
            (&raw mut value).cast(),
            1,
        )
    };
    length == 1 && value == b'y'
}

const EMPTY: &CStr = c"";

#[allow(unsafe_code)]
fn handle<F: AsFd>(file: F) -> nix::Result<Handle> {
    let ask = |flags: i32| {
        let mut handle = Handle { bytes: 128, kind: 0, words: [0; 32] };
        let mut mount = 0i32;
        // SAFETY: an empty constant path, and two variables of this frame; the first says how
        // many bytes it has room for.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file.as_fd().as_raw_fd(),
                EMPTY.as_ptr(),
                &raw mut handle,
                &raw mut mount,
                flags,
            )
        };
        Errno::result(outcome).map(|_| handle)
    };
    match ask(libc::AT_EMPTY_PATH | AT_HANDLE_FID) {
        Err(Errno::EINVAL) => ask(libc::AT_EMPTY_PATH),
        other => other,
    }
}

/// The attributes from the cache; `fstat` would ask the server once they have expired.
#[allow(unsafe_code)]
fn attributes<F: AsFd>(file: F) -> nix::Result<libc::statx> {
    let mut stat = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: an empty constant path, and a structure of this frame.
    let outcome = unsafe {
        libc::statx(
            file.as_fd().as_raw_fd(),
            EMPTY.as_ptr(),
            flags,
            libc::STATX_BASIC_STATS,
            stat.as_mut_ptr(),
        )
    };
    Errno::result(outcome)?;
    // SAFETY: the structure consists of integers only, and was zeroed.
    Ok(unsafe { stat.assume_init() })
}
