//! Room agent: do the restrictions of the agent work on this machine?

use super::finding::{Checks, Outcome, ok, skip, warn};
use super::proc_files::{self, Mount};
use super::sources;
use cvm_protocol::paths::DATA;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.run("rights of files on /data", || {
        rights(&proc_files::mounts(&proc_files::read("/proc/self/mountinfo").unwrap_or_default()))
    });
    checks.run("ports below 1024", || {
        ports(proc_files::read("/proc/sys/net/ipv4/ip_unprivileged_port_start").as_deref())
    });
    checks.run("limits of the gateway", || {
        let status = sources::status();
        let pid = sources::service(status.as_ref(), "gateway").and_then(|gateway| gateway.pid);
        let Some(pid) = pid else { return skip("the gateway does not run") };
        limits(proc_files::read(&format!("/proc/{pid}/limits")).as_deref())
    });
}

fn rights(mounts: &[Mount]) -> Outcome {
    match mounts.iter().rfind(|mount| mount.point == DATA) {
        None => skip("/data is not a volume"),
        Some(mount) if mount.lends_no_rights => ok("no file there lends its owner's rights (nosuid, nodev)"),
        Some(_) => warn(
            "a set-user-ID file on /data lends its owner's rights (the mount is not nosuid and nodev)",
            "in docker-compose.yml: cap_add: [SYS_ADMIN], so that the boot can remount it",
        ),
    }
}

fn ports(start: Option<&str>) -> Outcome {
    match start.and_then(|text| text.trim().parse::<u16>().ok()) {
        None => skip("this kernel does not show the limit"),
        Some(1024..) => ok("only root may take them"),
        Some(_) => warn(
            "the agent may take them, also sshd's port while sshd restarts",
            "in docker-compose.yml: sysctls: [net.ipv4.ip_unprivileged_port_start=1024]",
        ),
    }
}

fn limits(text: Option<&str>) -> Outcome {
    let soft = |name: &str| {
        let line = text?.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next().map(str::to_owned)
    };
    match (soft("Max processes"), soft("Max core file size")) {
        (Some(processes), Some(core)) if core == "0" && processes != "unlimited" => {
            ok(format!("{processes} processes and threads of its user, no core files"))
        }
        (Some(_), Some(_)) => warn("there are none", "`cvm restart gateway` sets them"),
        _ => skip("they cannot be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_missing_restriction_comes_with_its_line_for_compose() {
        let mount = |lends_no_rights| {
            [Mount { point: DATA.into(), kind: "ext4".into(), read_only: false, lends_no_rights }]
        };
        assert_eq!([true, false].map(|on| rights(&mount(on)).verdict), [Verdict::Ok, Verdict::Warn]);
        assert_eq!(rights(&[]).verdict, Verdict::Skip);
        let verdicts = ["1024\n", "0\n", "80\n"].map(|start| ports(Some(start)).verdict);
        assert_eq!(verdicts, [Verdict::Ok, Verdict::Warn, Verdict::Warn]);
        let of = |processes: &str, core: &str| {
            limits(Some(&format!(
                "Limit                     Soft Limit           Hard Limit           Units\n\
                 Max core file size        {core}                    {core}                    bytes\n\
                 Max processes             {processes}                 {processes}                 processes\n"
            )))
        };
        assert_eq!(of("4096", "0").found, "4096 processes and threads of its user, no core files");
        assert_eq!([of("unlimited", "0").verdict, of("4096", "unlimited").verdict], [Verdict::Warn; 2]);
    }
}
