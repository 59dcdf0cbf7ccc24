//! Finds the processes below this one in /proc, signals them and ends them.
//!
//! A process that reaps orphans (PID 1, or a subreaper) is the ancestor of everything that
//! descends from it, whatever session, group or environment a descendant gave itself. So a tree is ended
//! by killing children until there are none.
//!
//! `process_stat` is not used here, because it would make PID 1 4 kB larger.

use crate::signals;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A process at the moment when it was seen. Another process may have its pid by now, but never the same start time
/// with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    pid: Pid,
    parent: Pid,
    /// Ticks since the machine booted.
    started: u64,
}

/// Makes every process that is orphaned below this one a child of this one from now on.
pub fn adopt_orphans() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// The children of this process.
pub fn children() -> Vec<Pid> {
    let me = nix::unistd::getpid();
    // A kernel without `CONFIG_PROC_CHILDREN` does not have this file.
    if let Ok(text) = fs::read_to_string(format!("/proc/self/task/{me}/children")) {
        return text.split_ascii_whitespace().filter_map(|w| w.parse().ok()).map(Pid::from_raw).collect();
    }
    scan().filter(|seen| seen.parent == me).map(|seen| seen.pid).collect()
}

/// Every process below this one, nearest first.
pub fn descendants() -> Vec<Pid> {
    seen_below().into_iter().map(|seen| seen.pid).collect()
}

fn seen_below() -> Vec<Seen> {
    let all: Vec<Seen> = scan().collect();
    let below = |parent: Pid| all.iter().filter(move |seen| seen.parent == parent && seen.pid != parent);
    let mut found: Vec<Seen> = below(nix::unistd::getpid()).copied().collect();
    let mut next = 0;
    while let Some(&Seen { pid, .. }) = found.get(next) {
        next += 1;
        found.extend(below(pid));
    }
    found
}

/// Sends `signal` to every process below this one, and returns how many there were.
pub fn signal_descendants(signal: i32) -> u32 {
    let reached = seen_below().into_iter().filter(|seen| send(*seen, signal));
    u32::try_from(reached.count()).unwrap_or(u32::MAX)
}

/// The most walks before killing. Each walk stops the processes that were forked during the last one.
const WALKS_MAX: u32 = 200;

/// Ends every process below this one, and returns how many there were.
///
/// A process that forks faster than one walk through /proc would outrun SIGKILL for ever. So
/// all processes are stopped first, because a stopped process cannot fork, and killed when a walk finds no new one.
pub fn kill_descendants() -> u32 {
    let mut stopped = BTreeSet::new();
    for _ in 0..WALKS_MAX {
        let new: Vec<Seen> =
            seen_below().into_iter().filter(|seen| stopped.insert((seen.pid, seen.started))).collect();
        if new.is_empty() {
            break;
        }
        for seen in new {
            send(seen, libc::SIGSTOP);
        }
    }
    signal_descendants(libc::SIGKILL)
}

/// Signals the process that was seen, but not another process that has its pid now.
fn send(seen: Seen, signal: i32) -> bool {
    match pidfd_of(seen.pid) {
        // The check comes after the open: from then on the pidfd can only mean the process that was checked.
        Ok(process) => is_still(seen) && send_by(&process, signal),
        Err(Errno::ESRCH) => false,
        // An old kernel or the rules of a container: the pid may be reused between the check and the signal.
        Err(_) => is_still(seen) && signals::send(seen.pid, signal),
    }
}

fn is_still(seen: Seen) -> bool {
    look_at(seen.pid.as_raw()).is_some_and(|now| now.started == seen.started)
}

#[allow(unsafe_code)]
fn pidfd_of(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the call has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(|_| Errno::EBADF)?) })
}

#[allow(unsafe_code)]
fn send_by(process: &OwnedFd, signal: i32) -> bool {
    let nothing: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a descriptor that is open, and no further information.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, nothing, 0) == 0 }
}

/// All processes of this pid namespace.
fn scan() -> impl Iterator<Item = Seen> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| look_at(entry.file_name().to_str()?.parse().ok()?))
}

fn look_at(pid: i32) -> Option<Seen> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let (parent, started) = parent_and_start(&String::from_utf8_lossy(&stat))?;
    Some(Seen { pid: Pid::from_raw(pid), parent: Pid::from_raw(parent), started })
}

/// Parent and start time from a line of /proc/PID/stat. The name before them may hold spaces and brackets.
fn parent_and_start(stat: &str) -> Option<(i32, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    Some((parent, fields.nth(17)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    #[test]
    fn a_name_full_of_brackets_hides_nothing() {
        let line = "12 (a) (b c) S 7 11 10 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200";
        assert_eq!(parent_and_start(line), Some((7, 4711)));
        assert_eq!(parent_and_start("12 (cut"), None);
    }

    #[test]
    fn who_has_the_number_of_a_process_that_was_seen_gets_no_signal_of_its() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let seen = look_at(pid).unwrap();
        let before = Seen { started: seen.started - 1, ..seen };
        assert!(!send(before, libc::SIGKILL));
        // If the other signal had reached the child, it would have died of SIGKILL.
        assert!(send(seen, libc::SIGTERM));
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    }
}
