//! The only `waitpid` of each program.
//!
//! The call is raw, because the wrapper in `nix` cannot express a death by a real-time signal: it returns an error,
//! after the child has been reaped.

use nix::errno::Errno;
use nix::unistd::Pid;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

/// The result of one look for ended children.
#[derive(Debug, PartialEq, Eq)]
pub enum Reaped {
    One(Pid, ExitStatus),
    /// There are children, and none of them has ended.
    Later,
    /// There are no children at all.
    Childless,
}

/// Reaps one child, without waiting. Call it until it finds no ended child, because one SIGCHLD may stand for
/// several.
#[allow(unsafe_code)]
pub fn next() -> Reaped {
    loop {
        let mut status = 0;
        // SAFETY: the status is written to a variable of this frame.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        return match Errno::result(pid) {
            Ok(0) => Reaped::Later,
            Ok(pid) => Reaped::One(Pid::from_raw(pid), ExitStatus::from_raw(status)),
            Err(Errno::EINTR) => continue,
            Err(_) => Reaped::Childless,
        };
    }
}
