//! Room disk: how much space is left, and does /data outlive the container?

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::proc_files::{self, Mount};
use crate::units;
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

const PLACES: [&str; 3] = ["/data", "/var/lib/docker", "/var/log"];
const MIB: u64 = 1024 * 1024;
/// With less, the gateway's databases soon fail to write. The share alone would warn of 20 GiB on a large
/// disk.
const FAIL: Threshold = Threshold { per_cent: 2, bytes: 200 * MIB };
const WARN: Threshold = Threshold { per_cent: 10, bytes: 2048 * MIB };

struct Threshold {
    per_cent: u64,
    bytes: u64,
}

impl Threshold {
    /// Whether the space is small by share and by size, or so small that the share does not matter.
    fn is_crossed(&self, free: u64, total: u64) -> bool {
        free < self.bytes && (share(free, total) < self.per_cent || free < self.bytes / 4)
    }
}

pub(crate) fn share(free: u64, total: u64) -> u64 {
    u64::try_from(u128::from(free) * 100 / u128::from(total.max(1))).unwrap_or(100)
}

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.run("/data is a volume", || {
        let text = proc_files::read("/proc/self/mountinfo").unwrap_or_default();
        volume(&proc_files::mounts(&text))
    });
    for place in PLACES {
        checks.begin(&format!("space on {place}"));
        match statvfs(place) {
            Ok(data) => {
                // Their types differ between architectures.
                #[allow(clippy::useless_conversion)]
                let [size, free, total, inodes_free, inodes] = [
                    u64::from(data.fragment_size()),
                    u64::from(data.blocks_available()),
                    u64::from(data.blocks()),
                    u64::from(data.files_available()),
                    u64::from(data.files()),
                ];
                checks.add(
                    &format!("space on {place}"),
                    space(free.saturating_mul(size), total.saturating_mul(size), place),
                );
                checks.add(&format!("inodes on {place}"), inodes_of(inodes_free, inodes, place));
            }
            Err(Errno::ENOENT) => {
                checks.add(&format!("space on {place}"), skip("there is no such directory"));
            }
            Err(errno) => {
                let remedy = "the disk or its mount is broken: `dmesg | tail`, `mount`";
                checks.add(&format!("space on {place}"), fail(errno.desc(), remedy));
            }
        }
    }
}

fn volume(mounts: &[Mount]) -> Outcome {
    let compose = "in docker-compose.yml: volumes: [data:/data]";
    let Some(mount) = mounts.iter().rev().find(|m| m.point == "/data") else {
        return fail("it is part of the container's own layer, and lost with the container", compose);
    };
    if mount.read_only {
        return fail(
            format!("{}, mounted read-only", mount.kind),
            "remove `:ro` from the volume; `dmesg | tail` if the kernel did it",
        );
    }
    match mount.kind.as_str() {
        "tmpfs" | "ramfs" => {
            fail(format!("{}: it is memory, and lost with the container", mount.kind), compose)
        }
        // The gateway refuses to start on these file systems, and SQLite does not work on them.
        kind if kind.starts_with("fuse") || kind.starts_with("nfs") || kind == "9p" || kind == "cifs" => {
            fail(
                format!("{kind}: the gateway needs a disk with modes, locks and atomic renames"),
                "use a volume on a disk of the machine",
            )
        }
        kind => ok(kind),
    }
}

fn space(free: u64, total: u64, place: &str) -> Outcome {
    let found = format!("{} free of {} ({} %)", units::size(free), units::size(total), share(free, total));
    let remedy =
        format!("find the largest directories: `du -xh -d 2 {place} | sort -h | tail`; {}", relief(place));
    if FAIL.is_crossed(free, total) {
        fail(found, remedy)
    } else if WARN.is_crossed(free, total) {
        warn(found, remedy)
    } else {
        ok(found)
    }
}

fn relief(place: &str) -> &'static str {
    if place == "/var/lib/docker" {
        "`docker system prune` frees unused images"
    } else {
        "or give the CVM a larger disk"
    }
}

fn inodes_of(free: u64, total: u64, place: &str) -> Outcome {
    if total == 0 {
        return skip("this file system has no fixed number of inodes");
    }
    let found = format!("{free} free of {total} ({} %)", share(free, total));
    let remedy =
        format!("many small files: `du --inodes -x -d 2 {place} | sort -n | tail`; {}", relief(place));
    match share(free, total) {
        0 => fail(found, remedy),
        1..5 => warn(found, remedy),
        _ => ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn data_that_is_lost_with_the_container_is_a_failure() {
        let mount = |kind: &str, read_only| Mount {
            point: "/data".into(),
            kind: kind.into(),
            read_only,
            lends_no_rights: true,
        };
        let verdict = |mounts: &[Mount]| volume(mounts).verdict;
        assert_eq!(verdict(&[]), Verdict::Fail);
        assert_eq!(verdict(&[mount("tmpfs", false)]), Verdict::Fail);
        assert_eq!(verdict(&[mount("fuse.rclone", false)]), Verdict::Fail);
        assert_eq!(verdict(&[mount("ext4", true)]), Verdict::Fail);
        assert_eq!(verdict(&[mount("tmpfs", false), mount("ext4", false)]), Verdict::Ok);
        // S3 mode with FUSE.
        assert_eq!(verdict(&[mount("overlay", false)]), Verdict::Ok);
    }

    #[test]
    fn free_space_is_judged_by_size_and_share_together() {
        let gib = 1024 * MIB;
        let verdict = |free, total| space(free, total, "/data").verdict;
        assert_eq!(verdict(50 * gib, 1000 * gib), Verdict::Ok);
        assert_eq!(verdict(gib, 5 * gib), Verdict::Ok);
        assert_eq!(verdict(gib, 20 * gib), Verdict::Warn);
        assert_eq!(verdict(100 * MIB, 20 * gib), Verdict::Fail);
        assert_eq!(verdict(10 * MIB, 20 * MIB), Verdict::Fail);
        assert_eq!(verdict(0, 0), Verdict::Fail);
        assert_eq!(inodes_of(0, 0, "/data").verdict, Verdict::Skip);
        assert_eq!(inodes_of(3, 100, "/data").verdict, Verdict::Warn);
        assert_eq!(inodes_of(0, 100, "/data").verdict, Verdict::Fail);
    }
}
