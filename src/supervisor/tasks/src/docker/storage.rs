//! Finds a storage driver that works on the file system of docker's data: overlay2, else
//! fuse-overlayfs, else vfs, which always works and copies every layer whole.
//!
//! The driver whose data is there is kept while it works: with another one docker would not see
//! its images.
//!
//! No mount or directory of the trial is left behind.

use crate::files::trouble;
use crate::programs;
use crate::report::{self, Outcome};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::path::{Path, PathBuf};

const TRIAL: &str = ".cvm-trial";
const FUSE_OVERLAYFS: [&str; 2] = ["/usr/bin/fuse-overlayfs", "/usr/local/bin/fuse-overlayfs"];
/// Best first.
const DRIVERS: [&str; 3] = ["overlay2", "fuse-overlayfs", "vfs"];

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) driver: &'static str,
    /// What the user should know about it.
    pub(crate) remark: Option<String>,
}

pub(crate) fn choose(data_root: &Path) -> Outcome<Choice> {
    let trial = Trial::begin(data_root)?;
    let mut reasons = Vec::new();
    let mut works = |driver: &str| {
        let outcome = trial.of(driver);
        if let Err(why) = &outcome {
            report::detail(format!("storage driver {driver}: {why}"));
            reasons.push(format!("{driver}: {why}"));
        }
        outcome.is_ok()
    };
    let there: Vec<&'static str> = DRIVERS.into_iter().filter(|d| has_data(data_root, d)).collect();
    if let Some(driver) = there.iter().copied().find(|driver| works(driver)) {
        return Ok(Choice { driver, remark: None });
    }
    let driver =
        DRIVERS.into_iter().filter(|d| !there.contains(d)).find(|driver| works(driver)).unwrap_or("vfs");
    let lost = (!there.is_empty()).then(|| {
        format!(
            "docker's images are in {}, which does not work here any more, and are not seen",
            there.join(" and ")
        )
    });
    let slow = (driver == "vfs").then(|| {
        format!("docker stores images with vfs, which takes much space and time ({})", reasons.join("; "))
    });
    let remark: Vec<String> = lost.into_iter().chain(slow).collect();
    Ok(Choice { driver, remark: (!remark.is_empty()).then(|| remark.join("; ")) })
}

/// Whether docker has stored images with this driver.
fn has_data(data_root: &Path, driver: &str) -> bool {
    data_root.join("image").join(driver).is_dir()
}

/// A place for trials inside the data root, which is the file system in question.
struct Trial {
    top: PathBuf,
}

impl Trial {
    fn begin(data_root: &Path) -> Outcome<Self> {
        let trial = Self { top: data_root.join(TRIAL) };
        trial.clear();
        for name in ["lower", "upper", "work", "merged"] {
            let path = trial.at(name);
            fs::create_dir_all(&path).map_err(trouble("make", &path))?;
        }
        let below = trial.at("lower/below");
        fs::write(&below, "x").map_err(trouble("write", &below))?;
        Ok(trial)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.top.join(name)
    }

    fn of(&self, driver: &str) -> Result<(), String> {
        let mounted = match driver {
            "overlay2" => self.overlay(),
            "fuse-overlayfs" => self.fuse_overlay(),
            _ => return Ok(()),
        };
        let outcome = mounted.and_then(|()| self.use_it());
        self.unmount();
        outcome
    }

    fn layers(&self) -> String {
        let (lower, upper, work) = (self.at("lower"), self.at("upper"), self.at("work"));
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display())
    }

    fn overlay(&self) -> Result<(), String> {
        let layers = self.layers();
        mount(Some("overlay"), &self.at("merged"), Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .map_err(|errno| match errno {
                Errno::ENODEV => "this kernel has no overlayfs".to_owned(),
                Errno::EINVAL => "overlayfs refuses the file system of docker's data".to_owned(),
                other => format!("mount: {}", other.desc()),
            })
    }

    fn fuse_overlay(&self) -> Result<(), String> {
        if !Path::new("/dev/fuse").exists() {
            return Err("no /dev/fuse".into());
        }
        let Some(program) = programs::find(FUSE_OVERLAYFS.map(PathBuf::from)) else {
            return Err("not in this image".into());
        };
        let (layers, merged) = (self.layers(), self.at("merged"));
        programs::must(&program, &["-o", &layers, &merged.to_string_lossy()], "").map(drop)
    }

    /// What docker does with layers: write, replace what is below, and delete it.
    fn use_it(&self) -> Result<(), String> {
        let merged = self.at("merged");
        let below = merged.join("below");
        fs::write(merged.join("new"), "x")
            .and_then(|()| fs::write(&below, "changed"))
            .and_then(|()| fs::remove_file(&below))
            .map_err(|e| format!("mounted, but cannot be written ({e})"))?;
        if below.exists() || !self.at("lower/below").exists() {
            return Err("mounted, but does not hide what was deleted".into());
        }
        Ok(())
    }

    fn unmount(&self) {
        // Detached if it is busy: no other process knows this directory.
        let _ = umount2(&self.at("merged"), MntFlags::MNT_DETACH);
    }

    /// Also what a killed trial has left.
    fn clear(&self) {
        self.unmount();
        let _ = fs::remove_dir_all(&self.top);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_driver_always_works_and_the_trial_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let first = choose(temp.path()).unwrap();
        assert_eq!(choose(temp.path()).unwrap(), first);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_driver_whose_data_is_there_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("image/vfs")).unwrap();
        assert_eq!(choose(temp.path()).unwrap(), Choice { driver: "vfs", remark: None });
    }

    #[test]
    fn a_trial_that_was_killed_is_in_nobodys_way() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join(TRIAL).join("work/work")).unwrap();
        fs::write(temp.path().join(TRIAL).join("merged"), "not even a directory").unwrap();
        choose(temp.path()).unwrap();
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }
}
