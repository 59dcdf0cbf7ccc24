//! Room storage: are all changes on their way into the bucket? Only S3 mode has one.

use super::disk::share;
use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::proc_files;
use super::sources;
use crate::storage::{self, InBucket, WorkerAnswer, described_mode, in_bucket};
use crate::units::{count, precise_span, size};
use cvm_protocol::paths;
use cvm_protocol::status::StorageMode;
use cvm_protocol::storage::{Drill, Incident, StorageStatus, WorkerPhase};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};
use std::path::{Path, PathBuf};

/// The program with which rclone mounts.
const FUSERMOUNT: &str = "fusermount3";
/// Changes wait on the volume until they are in the bucket, and databases are copied there.
const FREE_PER_CENT: u64 = 10;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("storage worker");
    let mode = sources::status().map(|status| status.storage.mode);
    let is_there = Path::new(paths::STORAGE_SOCKET).exists();
    match mode {
        Some(StorageMode::S3) => {}
        Some(mode) => return checks.add("storage worker", skip(format!("{mode} mode has none"))),
        // A worker is asked also while the supervisor does not answer.
        None if is_there => {}
        None => {
            return checks.add("storage worker", skip("only the supervisor knows the storage mode"));
        }
    }
    match WorkerAnswer::ask() {
        WorkerAnswer::Status(status) => {
            checks.add("storage worker", ok("it answers"));
            findings(&status, checks);
        }
        WorkerAnswer::None(cause) => {
            let remedy = "`cvm status` shows whether it runs, and `cvm logs storage` its last lines; nothing is pushed meanwhile";
            checks.add("storage worker", fail(cause, remedy));
        }
    }
    checks.run(FUSERMOUNT, || fusermount(paths::PATH));
    checks.run("space for pending changes", space);
}

fn findings(status: &StorageStatus, checks: &mut Checks<'_>) {
    checks.add("phase", phase(status));
    for incident in &status.incidents {
        checks.add(&format!("incident: {}", incident.path), of_incident(incident));
    }
    checks.add("changes in the bucket", replicated(status));
    checks.add("last drill", drill(status.drill.as_ref()));
}

fn phase(status: &StorageStatus) -> Outcome {
    let mode = described_mode(status).map(|m| format!(", {m}")).unwrap_or_default();
    let why = status.why.as_ref().map(|w| format!(": {w}")).unwrap_or_default();
    let found = format!("{}{mode}{why}", status.phase);
    let remedy = "`cvm storage status` shows what to do now";
    match status.phase {
        WorkerPhase::Ready => ok(found),
        WorkerPhase::Opening | WorkerPhase::Restoring | WorkerPhase::Draining | WorkerPhase::Waiting => {
            warn(found, remedy)
        }
        WorkerPhase::Fenced | WorkerPhase::Refused | WorkerPhase::Unknown => fail(found, remedy),
    }
}

fn of_incident(incident: &Incident) -> Outcome {
    fail(format!("{}, since {}", incident.what, precise_span(incident.since_ms_ago)), &incident.remedy)
}

fn replicated(status: &StorageStatus) -> Outcome {
    let missing = match in_bucket(status) {
        InBucket::Yes => return ok("everything is in the bucket"),
        InBucket::Unknown(why) => return skip(why),
        InBucket::No(what) => what,
    };
    let Some(oldest) = status.oldest_unreplicated_ms else { return ok(format!("{missing} on the way")) };
    let found = format!("{missing} not yet in the bucket, oldest change {} ago", precise_span(oldest));
    if oldest < storage::OLD_MS {
        return ok(found);
    }
    match &status.last_error {
        Some(error) => {
            warn(format!("{found}; last error: {error}"), "mend the last error; it is tried again")
        }
        None => warn(found, "`cvm storage flush` pushes now, and names the obstacle"),
    }
}

fn drill(drill: Option<&Drill>) -> Outcome {
    let Some(drill) = drill else { return skip("none yet: `cvm storage drill` makes one") };
    let files = count(drill.files, "file", "files");
    let databases = count(drill.databases, "database", "databases");
    let found =
        format!("{files} and {databases} restored {} ago: {}", precise_span(drill.ago_ms), drill.text);
    if drill.good {
        return ok(found);
    }
    fail(
        found,
        "the bucket would not restore as it is: `cvm storage verify --deep`, then `cvm storage status`",
    )
}

fn fusermount(path: &str) -> Outcome {
    let places = std::env::split_paths(path).map(|directory| directory.join(FUSERMOUNT));
    match places.into_iter().find(|file| access(file, AccessFlags::X_OK).is_ok()) {
        Some(file) => ok(file.display().to_string()),
        None => warn(
            format!("it is not in {path}; without it the S3 mode falls back to sync"),
            "install the package fuse3 in the image",
        ),
    }
}

fn space() -> Outcome {
    // With a FUSE mount at /data, the volume with the upper layer is mounted elsewhere.
    let mounts = proc_files::mounts(&proc_files::read("/proc/self/mountinfo").unwrap_or_default());
    let behind = mounts.iter().any(|m| m.point == paths::VOLUME);
    let place = PathBuf::from(if behind { paths::VOLUME } else { paths::DATA });
    match statvfs(&place) {
        Ok(data) => {
            // Their types differ between architectures.
            #[allow(clippy::useless_conversion)]
            let [block, free, total] = [
                u64::from(data.fragment_size()),
                u64::from(data.blocks_available()),
                u64::from(data.blocks()),
            ];
            judge_space(free.saturating_mul(block), total.saturating_mul(block), &place)
        }
        Err(errno) => fail(format!("{}: {}", place.display(), errno.desc()), "see disk: is there a volume?"),
    }
}

fn judge_space(free: u64, total: u64, place: &Path) -> Outcome {
    let share = share(free, total);
    let found = format!("{} free on {} ({share} %)", size(free), place.display());
    if share >= FREE_PER_CENT {
        return ok(found);
    }
    warn(found, "changes wait there until they are in the bucket, and databases are copied there: see disk")
}

#[cfg(test)]
mod tests {
    use super::super::finding::{Finding, Verdict, findings_of};
    use super::*;
    use crate::storage::samples::{good, pending, troubled};

    fn verdict(all: &[Finding], check: &str) -> Verdict {
        all.iter().find(|f| f.check == check).unwrap_or_else(|| panic!("no {check}: {all:?}")).verdict
    }

    #[test]
    fn every_check_of_a_good_bucket_is_ok() {
        for status in [good(), pending()] {
            let all = findings_of(|n| findings(&status, n));
            assert!(all.iter().all(|f| f.verdict == Verdict::Ok), "{all:?}");
        }
    }

    #[test]
    fn every_fault_of_the_bucket_has_a_remedy() {
        let all = findings_of(|n| findings(&troubled(), n));
        assert_eq!(verdict(&all, "phase"), Verdict::Fail);
        assert_eq!(verdict(&all, "incident: openclaw/agents/main/memory.db"), Verdict::Fail);
        assert_eq!(verdict(&all, "changes in the bucket"), Verdict::Warn);
        assert_eq!(verdict(&all, "last drill"), Verdict::Fail);
        assert!(all.iter().all(|f| f.remedy.is_some()), "{all:?}");
    }

    #[test]
    fn a_change_may_be_a_minute_old() {
        let of = |ms| replicated(&StorageStatus { oldest_unreplicated_ms: Some(ms), ..pending() }).verdict;
        assert_eq!((of(59_999), of(60_000)), (Verdict::Ok, Verdict::Warn));
        let opening = StorageStatus { phase: WorkerPhase::Opening, ..good() };
        assert_eq!(replicated(&opening).verdict, Verdict::Skip);
        assert_eq!(phase(&opening).verdict, Verdict::Warn);
    }

    #[test]
    fn fusermount_is_searched_in_the_path_of_services() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(fusermount(path).verdict, Verdict::Warn);
        let file = dir.path().join(FUSERMOUNT);
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(fusermount(path).verdict, Verdict::Ok);
    }

    #[test]
    fn little_space_is_a_warning() {
        let of = |free| judge_space(free, 1000, Path::new("/data")).verdict;
        assert_eq!((of(100), of(99), of(0)), (Verdict::Ok, Verdict::Warn, Verdict::Warn));
    }
}
