//! Keeps the environment out of `/proc`: PID 1 executes itself once more, without it.
//!
//! `/proc/1/environ` shows what PID 1 was exec'd with for as long as it lives, so PID 1 execs
//! itself once more with a clean environment and finds the old one in a sealed memory file.
//! The second life reads it, closes it, and keeps it only in memory that is wiped.

use cvm_sys::{descriptor, memfd};
use cvm_system::env::Environment;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use zeroize::Zeroizing;

/// Names the descriptor in the second life's environment; nothing else is in there.
const HANDOVER: &str = "CVM_HANDOVER_FD";
/// The kernel's own limit for arguments and environment together lies below this.
const ENVIRONMENT_MAX: usize = 16 * 1024 * 1024;

/// Which life this is.
pub(crate) enum Life {
    First,
    Second(OwnedFd),
}

pub(crate) fn life() -> Life {
    let fd = std::env::var(HANDOVER).ok().and_then(|n| n.parse().ok());
    match fd.and_then(|fd| descriptor::inherited(fd).ok()) {
        Some(fd) => Life::Second(fd),
        None => Life::First,
    }
}

/// Ends the first life. Returns only when that fails, with the reason.
pub(crate) fn begin_second_life() -> String {
    let mut bytes = Zeroizing::new(Vec::with_capacity(64 * 1024));
    for (name, value) in std::env::vars_os() {
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(b'=');
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
    }
    let fd = match memfd::sealed(c"environment", &bytes) {
        Ok(fd) => fd,
        Err(error) => return format!("putting the environment aside: {error}"),
    };
    if let Err(error) = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())) {
        return format!("handing the environment over: {error}");
    }
    let arguments: Vec<CString> =
        std::env::args_os().filter_map(|a| CString::new(a.as_bytes()).ok()).collect();
    let Ok(handover) = CString::new(format!("{HANDOVER}={}", fd.as_raw_fd())) else {
        return "handing the environment over".to_owned();
    };
    let program: &CStr = c"/proc/self/exe";
    match nix::unistd::execve(program, &arguments, &[handover]) {
        Ok(never) => match never {},
        Err(error) => format!("executing itself again: {error}"),
    }
}

/// What the first life was given.
pub(crate) fn receive(fd: OwnedFd) -> std::io::Result<Environment> {
    let bytes = memfd::read_all(fd, ENVIRONMENT_MAX)?;
    let pairs = bytes.split(|b| *b == 0).filter(|entry| !entry.is_empty()).map(|entry| {
        // A name may begin with `=`.
        let equals = entry.iter().skip(1).position(|b| *b == b'=').map_or(entry.len(), |i| i + 1);
        let (name, value) = entry.split_at(equals);
        (name.to_vec(), value.get(1..).unwrap_or_default().to_vec())
    });
    Ok(Environment::new(pairs))
}

/// The environment as it is, for a check that changes nothing.
pub(crate) fn current() -> Environment {
    Environment::new(std::env::vars_os().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec())))
}
