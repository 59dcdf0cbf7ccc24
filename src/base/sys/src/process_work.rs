//! Measures how much the processes below this one have worked, in processor time and in bytes to and from disks.

use crate::as_user::AsUser;
use crate::process_stat::Process;
use crate::process_tree;
use nix::unistd::{Gid, Pid, Uid};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

/// The work of several processes so far. The sum shrinks when one of them ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    pub processor: Duration,
    pub disk_bytes: u64,
}

/// The work of every process below this one, and of the children that these have waited for.
pub fn below() -> Work {
    process_tree::descendants().into_iter().map(of).fold(Work::default(), |sum, work| Work {
        processor: sum.processor + work.processor,
        disk_bytes: sum.disk_bytes + work.disk_bytes,
    })
}

fn of(pid: Pid) -> Work {
    /// One tick of the clocks in /proc, on every architecture that we run on.
    const TICK_MS: u64 = 10;
    let ticks = Process::of(pid.as_raw()).map_or(0, |process| process.processor_ticks);
    Work {
        processor: Duration::from_millis(ticks * TICK_MS),
        disk_bytes: disk_bytes(pid).unwrap_or_default(),
    }
}

/// Reads `io` as the user of the process, because root may read it only with a capability that a container does not
/// have.
fn disk_bytes(pid: Pid) -> Option<u64> {
    let about = fs::metadata(format!("/proc/{pid}")).ok()?;
    let _acting = AsUser::of(Uid::from_raw(about.uid()), Gid::from_raw(about.gid())).ok()?;
    disk_bytes_in(&fs::read_to_string(format!("/proc/{pid}/io")).ok()?)
}

fn disk_bytes_in(io: &str) -> Option<u64> {
    let number = |name: &str| io.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some(number("read_bytes:")? + number("write_bytes:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reaches_a_disk_counts() {
        let io = "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 9\n";
        assert_eq!(disk_bytes_in(io), Some(12_288));
        assert_eq!(disk_bytes_in(""), None);
    }

    #[test]
    fn a_child_that_computes_is_seen_to_work() {
        let before = below().processor;
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        while below().processor < before + Duration::from_millis(100) {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
