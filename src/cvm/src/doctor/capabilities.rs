//! Room capabilities: which ones are there? The engine gives them to PID 1, and a login has the same.

use super::finding::{Checks, Outcome, fail, ok, warn};
use super::proc_files;

/// Name, number (linux/capability.h), and the reason. Every engine gives these by default.
const NEEDED: &[(&str, u8, &str)] = &[
    ("CHOWN", 0, "the gateway's files are given to its user"),
    ("DAC_OVERRIDE", 1, "root reads the gateway's files"),
    ("FOWNER", 3, "modes of the gateway's files are set"),
    ("KILL", 5, "services of other users are stopped"),
    ("SETGID", 6, "services run as their own users"),
    ("SETUID", 7, "services run as their own users"),
    ("NET_BIND_SERVICE", 10, "sshd listens on port 22"),
    ("SYS_CHROOT", 18, "sshd locks its parser in"),
];
const WANTED: &[(&str, u8, &str)] = &[
    ("SYS_ADMIN", 21, "mounts: dockerd, and the S3 mode with FUSE"),
    ("NET_ADMIN", 12, "dockerd's bridge and iptables"),
    ("DAC_READ_SEARCH", 2, "the S3 mode knows a file again that was renamed"),
];

pub(crate) fn check(checks: &mut Checks<'_>) {
    let effective = proc_files::read("/proc/self/status").and_then(|text| effective(&text));
    checks.run("needed by every service", || judge(effective, NEEDED, fail));
    checks.run("needed by dockerd and S3 mode", || judge(effective, WANTED, warn));
}

fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn judge(
    effective: Option<u64>,
    list: &[(&str, u8, &str)],
    bad: impl FnOnce(String, String) -> Outcome,
) -> Outcome {
    let Some(effective) = effective else {
        return warn("/proc/self/status has no CapEff", "mount /proc in the container");
    };
    let missing: Vec<_> = list.iter().filter(|(_, number, _)| effective & (1 << number) == 0).collect();
    if missing.is_empty() {
        let names: Vec<&str> = list.iter().map(|(name, ..)| *name).collect();
        return ok(names.join(", "));
    }
    let reasons: Vec<String> = missing.iter().map(|(name, _, why)| format!("{name} ({why})")).collect();
    let names: Vec<&str> = missing.iter().map(|(name, ..)| *name).collect();
    bad(
        format!("missing: {}", reasons.join(", ")),
        format!("in docker-compose.yml: cap_add: [{}]", names.join(", ")),
    )
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_missing_capability_comes_with_its_line_for_compose() {
        // Docker's default.
        let docker = effective("Name:\tx\nCapEff:\t00000000a80425fb\n");
        assert_eq!(judge(docker, NEEDED, fail).verdict, Verdict::Ok);
        let outcome = judge(docker, WANTED, warn);
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert_eq!(
            outcome.remedy.unwrap(),
            "in docker-compose.yml: cap_add: [SYS_ADMIN, NET_ADMIN, DAC_READ_SEARCH]"
        );
        assert_eq!(judge(Some(u64::MAX), WANTED, warn).verdict, Verdict::Ok);
    }
}
