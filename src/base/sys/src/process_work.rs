//! How much the processes below this one have worked: processor time, and bytes to and from disks.

use crate::as_user::AsUser;
use crate::process_tree;
use nix::unistd::{Gid, Pid, Uid};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

/// What all of them have done so far. It shrinks when one of them ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    pub processor: Duration,
    pub disk_bytes: u64,
}

/// The work of every process below this one, and of those that they have waited for.
pub fn below() -> Work {
    process_tree::descendants().into_iter().map(of).fold(Work::default(), |sum, work| Work {
        processor: sum.processor + work.processor,
        disk_bytes: sum.disk_bytes + work.disk_bytes,
    })
}

fn of(pid: Pid) -> Work {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let processor = processor_in(&stat).unwrap_or_default();
    Work { processor, disk_bytes: disk_bytes(pid).unwrap_or_default() }
}

/// The kernel shows this file to the user whose process it is. Root may look only with a capability that a
/// container does not have.
fn disk_bytes(pid: Pid) -> Option<u64> {
    let about = fs::metadata(format!("/proc/{pid}")).ok()?;
    let _acting = AsUser::of(Uid::from_raw(about.uid()), Gid::from_raw(about.gid())).ok()?;
    disk_bytes_in(&fs::read_to_string(format!("/proc/{pid}/io")).ok()?)
}

/// User and system time in a line of /proc/PID/stat, with that of the children that were waited for.
fn processor_in(stat: &str) -> Option<Duration> {
    /// The kernel shows every clock to user space in ticks of 10 ms, on each architecture that we run on.
    const TICK: Duration = Duration::from_millis(10);
    let after_name = stat.rsplit_once(')')?.1;
    let ticks = after_name.split_ascii_whitespace().skip(11).take(4).map(str::parse::<u32>);
    ticks.sum::<Result<u32, _>>().ok().map(|ticks| TICK * ticks)
}

fn disk_bytes_in(io: &str) -> Option<u64> {
    let number = |name: &str| io.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some(number("read_bytes:")? + number("write_bytes:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_times_of_a_process_count_whatever_its_name() {
        let stat = "12 (a) b) (c) S 7 12 12 0 -1 4194560 1 2 3 4 100 20 3 1 20 0 1 0 12345";
        assert_eq!(processor_in(stat), Some(Duration::from_millis(1240)));
        assert_eq!(processor_in("12 nonsense"), None);
    }

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
