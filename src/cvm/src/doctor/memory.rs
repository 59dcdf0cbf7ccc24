//! Room memory: is some left, and has the kernel killed processes because there was none?

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::proc_files;
use crate::units;

const MIB: u64 = 1024 * 1024;
/// With less, the next allocation of the gateway may be its last.
const FAIL: u64 = 100 * MIB;
/// The gateway grows by about this much when it is busy.
const WARN: u64 = 400 * MIB;
const REMEDY: &str = "give the CVM more memory; `ps aux --sort=-rss | head` shows who has it";

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.run("available", || available(&proc_files::read("/proc/meminfo").unwrap_or_default()));
    checks.run("container limit", || {
        let read = |path: &str| proc_files::read(path)?.trim().parse().ok();
        let of = |used: &str, limit: &str| Some((read(used)?, read(limit)?));
        // The files of cgroup version 2, then of version 1.
        let found = of("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max").or_else(|| {
            of("/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
        });
        limit(found)
    });
    checks.run("killed for want of it", || kills(&proc_files::read("/proc/vmstat").unwrap_or_default()));
}

fn available(meminfo: &str) -> Outcome {
    let of = |name| proc_files::number(meminfo, name).map(|kib| kib * 1024);
    let (Some(available), Some(total)) = (of("MemAvailable"), of("MemTotal")) else {
        return skip("/proc/meminfo does not show it");
    };
    judge(available, total)
}

fn limit(used_and_limit: Option<(u64, u64)>) -> Outcome {
    match used_and_limit {
        // Without a limit cgroup version 1 shows a number near 2^63.
        Some((used, limit)) if limit < 1 << 60 => judge(limit.saturating_sub(used), limit),
        _ => skip("none is set"),
    }
}

fn judge(free: u64, total: u64) -> Outcome {
    let found = format!("{} free of {}", units::size(free), units::size(total));
    match free {
        0..FAIL => fail(found, REMEDY),
        FAIL..WARN => warn(found, REMEDY),
        _ => ok(found),
    }
}

fn kills(vmstat: &str) -> Outcome {
    match proc_files::number(vmstat, "oom_kill") {
        Some(0) => ok("never since this kernel started"),
        Some(times) => {
            let found = format!("{} since this kernel started", units::count(times, "time", "times"));
            warn(found, "`dmesg | grep -i 'killed process'` names the processes; give the CVM more memory")
        }
        None => skip("this kernel does not count"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn little_memory_is_a_warning_before_the_kernel_kills() {
        let verdict =
            |mib: u64| available(&format!("MemTotal: 4194304 kB\nMemAvailable: {} kB\n", mib * 1024)).verdict;
        assert_eq!([50, 200, 3000].map(verdict), [Verdict::Fail, Verdict::Warn, Verdict::Ok]);
        assert_eq!(kills("oom_kill 0\n").verdict, Verdict::Ok);
        assert_eq!(kills("oom_kill 2\n").found, "2 times since this kernel started");
        assert_eq!(limit(Some((1, 9_223_372_036_854_771_712))).verdict, Verdict::Skip);
        assert_eq!(limit(Some((300 * MIB, 350 * MIB))).verdict, Verdict::Fail);
    }
}
