//! The processes below one process, from /proc.
//!
//! A process that reaps orphans (PID 1, or a subreaper) is the ancestor of everything that
//! descends from it, whatever session, group or environment a descendant gave itself. So
//! killing children until there are none is the whole of ending a tree.

use crate::signals;
use nix::unistd::Pid;
use std::fs;

/// From now on orphans below us become our children.
pub fn adopt_orphans() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// The children of this process.
pub fn children() -> Vec<Pid> {
    let me = nix::unistd::getpid();
    // One line that the kernel keeps, where it is configured to.
    if let Ok(text) = fs::read_to_string(format!("/proc/self/task/{me}/children")) {
        return text.split_ascii_whitespace().filter_map(|w| w.parse().ok()).map(Pid::from_raw).collect();
    }
    scan().filter(|(_, parent)| *parent == me).map(|(pid, _)| pid).collect()
}

/// Every process below this one, nearest first.
pub fn descendants() -> Vec<Pid> {
    let all: Vec<(Pid, Pid)> = scan().collect();
    let mut found = vec![nix::unistd::getpid()];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        next += 1;
        let below = all.iter().filter(|(pid, above)| *above == parent && *pid != parent);
        found.extend(below.map(|(pid, _)| *pid));
    }
    found.split_off(1)
}

/// Sends `signal` to every process below this one, and says to how many.
pub fn signal_descendants(signal: i32) -> u32 {
    let reached = descendants().into_iter().filter(|pid| signals::send(*pid, signal));
    u32::try_from(reached.count()).unwrap_or(u32::MAX)
}

/// Walks until nobody new turns up, at most. Each walk stops whoever forked during the last.
const WALKS_MAX: u32 = 200;

/// Ends every process below this one, and says how many they were.
///
/// A process that forks faster than one walk through /proc would outrun SIGKILL for ever. So
/// all are stopped first, since a stopped process cannot fork, and killed when no walk finds
/// anyone new.
pub fn kill_descendants() -> u32 {
    let mut stopped = std::collections::BTreeSet::new();
    for _ in 0..WALKS_MAX {
        let new: Vec<Pid> = descendants().into_iter().filter(|pid| !stopped.contains(pid)).collect();
        if new.is_empty() {
            break;
        }
        for pid in new {
            signals::send(pid, libc::SIGSTOP);
            stopped.insert(pid);
        }
    }
    signal_descendants(libc::SIGKILL)
}

/// All processes with their parents.
fn scan() -> impl Iterator<Item = (Pid, Pid)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((Pid::from_raw(pid), Pid::from_raw(parent_in(&stat)?)))
    })
}

/// The parent in a line of /proc/PID/stat. The name before it may hold spaces and brackets.
fn parent_in(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_brackets_does_not_hide_the_parent() {
        assert_eq!(parent_in("12 (a) b) (c) S 7 12 12 0"), Some(7));
        assert_eq!(parent_in("12 nonsense"), None);
    }
}
