//! Moves the socket of dstack's guest agent to where only root can reach it, before anything else runs.
//!
//! A process that can connect to it gets quotes over any data and keys of any path, and upstream the socket's mode
//! allows every user. The compose file mounts it in a directory that only root may enter. An older one
//! mounts it at a usual place: from there it is moved into that directory.
//!
//! The gateway's boot step checks the result: what could not be moved keeps the gateway from starting,
//! and no shell.
//!
//! The mode of a mounted file is never changed: it is the host's.

use cvm_protocol::paths;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod};
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

/// One mount may lie over another.
const LAYERS_MAX: usize = 8;

/// Whether this is a machine of dstack's. The compose file, which mounts the socket, is measured: an
/// environment cannot hide it. Asked before [`put_away`], which may not be able to keep it.
pub(crate) fn is_here() -> bool {
    std::iter::once(paths::DSTACK_SOCKET).chain(paths::DSTACK_USUAL_SOCKETS).any(is_socket)
}

/// Returns what an operator should know.
pub(crate) fn put_away() -> Vec<String> {
    let usual: Vec<&str> = paths::DSTACK_USUAL_SOCKETS.into_iter().filter(|path| is_socket(path)).collect();
    if usual.is_empty() && !Path::new(paths::DSTACK_DIRECTORY).exists() {
        return Vec::new();
    }
    let mut remarks = Vec::new();
    if let Err(why) = close_directory() {
        remarks.push(format!("{} cannot be closed to others: {why}", paths::DSTACK_DIRECTORY));
    }
    // Two names may lead to one place: what is gone with the first is not looked for again.
    remarks.extend(usual.into_iter().filter(|path| is_socket(path)).map(move_away));
    remarks
}

fn move_away(usual: &str) -> String {
    let kept = keep(usual);
    let there = paths::DSTACK_SOCKET;
    let was = format!("dstack's socket was mounted at {usual}, where the agent can use it");
    match (unmount(usual), kept) {
        (Err(errno), _) => format!("dstack's socket at {usual} cannot be unmounted: {}", errno.desc()),
        (Ok(()), Ok(())) => format!(
            "{was}; it is moved to {there}: mount it there, as docker-compose.yml of this version does"
        ),
        (Ok(()), Err(errno)) => {
            format!("{was}, and is unmounted; it cannot be kept at {there}: {}", errno.desc())
        }
    }
}

fn is_socket(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

fn close_directory() -> Result<(), &'static str> {
    let closed = Mode::from_bits_truncate(0o700);
    match nix::unistd::mkdir(paths::DSTACK_DIRECTORY, closed) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno.desc()),
    }
    if is_mount_point(paths::DSTACK_DIRECTORY) {
        return Err("it is a directory of the host's; mount the socket alone, and no directory");
    }
    let directory = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(paths::DSTACK_DIRECTORY, directory, Mode::empty())
        .and_then(|directory| fchmod(directory, closed))
        .map_err(Errno::desc)
}

fn is_mount_point(path: &str) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().any(|line| line.split(' ').nth(4) == Some(path))
}

/// A second way to the socket, in the closed directory; the first of several is kept.
fn keep(usual: &str) -> Result<(), Errno> {
    if is_socket(paths::DSTACK_SOCKET) {
        return Ok(());
    }
    let flags = OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    drop(open(paths::DSTACK_SOCKET, flags, Mode::from_bits_truncate(0o600))?);
    mount(Some(usual), paths::DSTACK_SOCKET, None::<&str>, MsFlags::MS_BIND, None::<&str>)
}

/// The socket's own mount, or the one of its directory, until no socket is there.
fn unmount(usual: &str) -> Result<(), Errno> {
    let directory = Path::new(usual).parent().filter(|directory| directory.ends_with("dstack"));
    for _ in 0..LAYERS_MAX {
        if !is_socket(usual) {
            return Ok(());
        }
        let own = umount2(usual, MntFlags::MNT_DETACH);
        match (own, directory) {
            (Err(Errno::EINVAL), Some(directory)) => umount2(directory, MntFlags::MNT_DETACH)?,
            (own, _) => own?,
        }
    }
    Err(Errno::EBUSY)
}
