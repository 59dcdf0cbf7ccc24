//! Is there memory left, and has the kernel killed for want of it? May import: `facts`, `finding`, `words`.

use super::facts;
use super::finding::{Notebook, Outcome, fail, ok, skip, warn};
use crate::words;

const MIB: u64 = 1024 * 1024;
/// Below this the next allocation of the gateway may be its last.
const FAIL: u64 = 100 * MIB;
/// The gateway grows by about this much when it is busy.
const WARN: u64 = 400 * MIB;
const REMEDY: &str = "give the CVM more memory; `ps aux --sort=-rss | head` shows who has it";

pub(crate) fn check(notebook: &mut Notebook<'_>) {
    notebook.check("available", || available(&facts::read("/proc/meminfo").unwrap_or_default()));
    notebook.check("container limit", || {
        let read = |path: &str| facts::read(path)?.trim().parse().ok();
        let of = |used: &str, limit: &str| Some((read(used)?, read(limit)?));
        // Version 2, then version 1.
        let found = of("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max").or_else(|| {
            of("/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
        });
        limit(found)
    });
    notebook.check("killed for want of it", || kills(&facts::read("/proc/vmstat").unwrap_or_default()));
}

fn available(meminfo: &str) -> Outcome {
    let of = |name| facts::number(meminfo, name).map(|kib| kib * 1024);
    let (Some(available), Some(total)) = (of("MemAvailable"), of("MemTotal")) else {
        return skip("/proc/meminfo does not say");
    };
    judge(available, total)
}

fn limit(used_and_limit: Option<(u64, u64)>) -> Outcome {
    match used_and_limit {
        // Without a limit version 1 says a number near 2^63.
        Some((used, limit)) if limit < 1 << 60 => judge(limit.saturating_sub(used), limit),
        _ => skip("none is set"),
    }
}

fn judge(free: u64, total: u64) -> Outcome {
    let found = format!("{} free of {}", words::size(free), words::size(total));
    match free {
        0..FAIL => fail(found, REMEDY),
        FAIL..WARN => warn(found, REMEDY),
        _ => ok(found),
    }
}

fn kills(vmstat: &str) -> Outcome {
    match facts::number(vmstat, "oom_kill") {
        Some(0) => ok("never since this kernel started"),
        Some(times) => {
            let found = format!("{} since this kernel started", words::count(times, "time", "times"));
            warn(found, "`dmesg | grep -i 'killed process'` says whom; give the CVM more memory")
        }
        None => skip("this kernel does not count"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn want_of_memory_is_told_before_it_kills() {
        let verdict =
            |mib: u64| available(&format!("MemTotal: 4194304 kB\nMemAvailable: {} kB\n", mib * 1024)).verdict;
        assert_eq!([50, 200, 3000].map(verdict), [Verdict::Fail, Verdict::Warn, Verdict::Ok]);
        assert_eq!(kills("oom_kill 0\n").verdict, Verdict::Ok);
        assert_eq!(kills("oom_kill 2\n").found, "2 times since this kernel started");
        assert_eq!(limit(Some((1, 9_223_372_036_854_771_712))).verdict, Verdict::Skip);
        assert_eq!(limit(Some((300 * MIB, 350 * MIB))).verdict, Verdict::Fail);
    }
}
