//! Room fuse: can FUSE be used? Only S3 mode needs it, and falls back to sync without.

use super::finding::{Checks, Outcome, ok, warn};
use crate::text;
use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

const DEVICE: &str = "/dev/fuse";
/// A device that this check makes for a moment, as the storage worker makes a missing /dev/fuse.
const TRIAL: &str = "/dev/.cvm-doctor-fuse";
const CONSEQUENCE: &str = "without it the S3 mode falls back to sync";
const COMPOSE: &str = "in docker-compose.yml: device_cgroup_rules: [\"c 10:229 rwm\"]";

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.run(DEVICE, || judge(Path::new(DEVICE), Path::new(TRIAL)));
}

fn judge(device: &Path, trial: &Path) -> Outcome {
    match device.metadata() {
        Ok(data) if data.file_type().is_char_device() => opened(device, "it opens"),
        Ok(_) => warn(format!("it is no device; {CONSEQUENCE}"), COMPOSE),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let _ = std::fs::remove_file(trial);
            let outcome =
                match mknod(trial, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(10, 229)) {
                    Ok(()) => opened(trial, "it is not there yet, and can be made"),
                    Err(errno) => warn(
                        format!("it is not there and cannot be made: {}; {CONSEQUENCE}", errno.desc()),
                        "in docker-compose.yml: cap_add: [MKNOD]",
                    ),
                };
            let _ = std::fs::remove_file(trial);
            outcome
        }
        Err(error) => warn(format!("{}; {CONSEQUENCE}", text::io_error(&error)), COMPOSE),
    }
}

fn opened(device: &Path, well: &str) -> Outcome {
    let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(device) else {
        return ok(well);
    };
    let found = format!("it does not open: {}; {CONSEQUENCE}", text::io_error(&error));
    let remedy = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENODEV | Errno::ENXIO) => "load the kernel's module on the host: modprobe fuse",
        _ => COMPOSE,
    };
    warn(found, remedy)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn an_unusable_device_comes_with_its_line_for_compose() {
        let outcome = judge(Path::new("/etc/passwd"), Path::new("/no/such/place"));
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert!(outcome.remedy.unwrap().contains("device_cgroup_rules: [\"c 10:229 rwm\"]"));
        let outcome = judge(Path::new("/no/such/device"), Path::new("/no/such/place"));
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert!(outcome.found.contains("cannot be made"), "{}", outcome.found);
        assert_eq!(judge(Path::new("/dev/null"), Path::new("/no/such/place")).verdict, Verdict::Ok);
    }

    #[test]
    fn the_trial_leaves_no_device() {
        let temp = tempfile::tempdir().unwrap();
        judge(&temp.path().join("fuse"), &temp.path().join("trial"));
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }
}
