//! Room overlay: does overlayfs work? The check mounts one and writes through it, in a mount namespace of
//! this process, so that no other process sees it and no mount is left behind.

use super::finding::{Checks, Outcome, ok, skip, warn};
use super::proc_files::{self, Mount};
use cvm_protocol::paths::{DATA, VOLUME};
use cvm_sys::namespace;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::{Path, PathBuf};

/// A directory of every image, covered in this namespace only.
const COVERED: &str = "/mnt";
/// The next check uses the leftovers of one that was killed.
const SCRATCH: &str = ".cvm-doctor-scratch";
/// The directory of a volume that is never pushed into a bucket.
const OURS: &str = ".cvm";
const RIGHT: &str =
    "in docker-compose.yml: cap_add: [SYS_ADMIN]; where that is there: security_opt: [seccomp=unconfined]";
const APPARMOR: &str = "in docker-compose.yml: security_opt: [apparmor=unconfined]";

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("mount namespace");
    if let Err(errno) = namespace::enter() {
        let found = format!("mounting is not allowed: {}; neither dockerd nor FUSE can work", errno.desc());
        return checks.add("mount namespace", warn(found, compose(errno)));
    }
    checks.run("on tmpfs", || {
        let covered = Path::new(COVERED);
        let options = Some("mode=700,size=1m");
        match mount(Some("tmpfs"), covered, Some("tmpfs"), MsFlags::empty(), options) {
            Ok(()) => judge(try_in(&covered.join(SCRATCH)), "tmpfs"),
            Err(errno) => warn(format!("mounting a tmpfs: {}", errno.desc()), compose(errno)),
        }
    });
    let mounts = proc_files::mounts(&proc_files::read("/proc/self/mountinfo").unwrap_or_default());
    // In S3 mode /data is an overlay itself, and the volume with its upper layer is mounted elsewhere.
    let volume = mounts.iter().any(|m| m.point == VOLUME).then_some(VOLUME);
    for place in [DATA, "/var/lib/docker"].into_iter().chain(volume) {
        checks.run(&format!("on {place}"), || on_volume(place, &mounts));
    }
}

/// The line of docker-compose.yml that is missing when mounting fails with `errno`.
pub(super) fn compose(errno: Errno) -> &'static str {
    if errno == Errno::EACCES { APPARMOR } else { RIGHT }
}

fn on_volume(place: &str, mounts: &[Mount]) -> Outcome {
    match mounts.iter().rev().find(|m| m.point == place) {
        None => skip("it is no volume of its own"),
        Some(mount) if mount.kind == "overlay" => skip("it is an overlay already"),
        Some(mount) => {
            let scratch = scratch_on(Path::new(place));
            let outcome = judge(try_in(&scratch), &mount.kind);
            let _ = std::fs::remove_dir_all(&scratch);
            outcome
        }
    }
}

fn scratch_on(volume: &Path) -> PathBuf {
    let ours = volume.join(OURS);
    let is_there = ours.symlink_metadata().is_ok_and(|data| data.is_dir());
    if is_there { ours.join(SCRATCH) } else { volume.join(SCRATCH) }
}

/// The stage at which an overlay failed, and the error.
type Fault = (&'static str, Errno);

fn try_in(scratch: &Path) -> Result<(), Fault> {
    let _ = std::fs::remove_dir_all(scratch);
    let at = |name: &str| scratch.join(name);
    let io = |stage| move |error: std::io::Error| (stage, Errno::from_raw(error.raw_os_error().unwrap_or(0)));
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir_all(at(name)).map_err(io("making its directories"))?;
    }
    std::fs::write(at("lower/file"), "below").map_err(io("writing its lower layer"))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower").display(),
        at("upper").display(),
        at("work").display()
    );
    let merged: PathBuf = at("merged");
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|errno| ("mounting it", errno))?;
    let used = use_it(&merged, scratch).map_err(io("writing through it"));
    let _ = umount2(&merged, MntFlags::MNT_DETACH);
    used
}

/// Changes a file of the lower layer and removes it: copy-up and whiteout.
fn use_it(merged: &Path, scratch: &Path) -> std::io::Result<()> {
    std::fs::write(merged.join("file"), "above")?;
    let above = std::fs::read_to_string(scratch.join("upper/file"))?;
    if above != "above" {
        return Err(std::io::Error::from_raw_os_error(Errno::EIO as i32));
    }
    std::fs::remove_file(merged.join("file"))
}

fn judge(outcome: Result<(), Fault>, kind: &str) -> Outcome {
    let Err((stage, errno)) = outcome else { return ok(format!("an overlay on {kind} works")) };
    let found = format!("{stage}: {}", errno.desc());
    let remedy = match errno {
        Errno::EPERM | Errno::EACCES => compose(errno).to_owned(),
        Errno::ENODEV => {
            "this kernel has no overlayfs (modprobe overlay on the host); dockerd uses vfs".to_owned()
        }
        Errno::EINVAL => format!(
            "{kind} cannot be an upper layer here; dockerd uses another driver and the S3 mode falls back to sync"
        ),
        Errno::ENOSPC => "make room: see disk".to_owned(),
        Errno::EROFS => "the volume is read-only: see disk".to_owned(),
        _ => "`dmesg | tail` shows more; dockerd uses another driver and the S3 mode falls back to sync"
            .to_owned(),
    };
    warn(found, remedy)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_missing_capability_comes_with_its_line_for_compose() {
        let outcome = judge(Err(("mounting it", Errno::EPERM)), "ext4");
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert!(outcome.remedy.unwrap().contains("cap_add: [SYS_ADMIN]"));
        let outcome = judge(Err(("mounting it", Errno::EACCES)), "ext4");
        assert!(outcome.remedy.unwrap().contains("security_opt: [apparmor=unconfined]"));
    }

    #[test]
    fn nothing_is_tried_where_it_would_be_pushed_into_the_bucket() {
        let volume = tempfile::tempdir().unwrap();
        assert_eq!(scratch_on(volume.path()), volume.path().join(SCRATCH));
        std::fs::create_dir(volume.path().join(OURS)).unwrap();
        assert_eq!(scratch_on(volume.path()), volume.path().join(OURS).join(SCRATCH));
    }

    #[test]
    fn only_a_volume_that_is_no_overlay_is_tried() {
        let mount = |kind: &str| Mount {
            point: "/data".into(),
            kind: kind.into(),
            read_only: false,
            lends_no_rights: true,
        };
        assert_eq!(on_volume("/data", &[]).verdict, Verdict::Skip);
        assert_eq!(on_volume("/data", &[mount("ext4"), mount("overlay")]).verdict, Verdict::Skip);
    }
}
