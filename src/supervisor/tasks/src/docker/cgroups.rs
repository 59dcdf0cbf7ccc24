//! Control groups that dockerd can write to. A container often sees them read-only, or not at
//! all; with `CAP_SYS_ADMIN` both can be helped.
//!
//! It never fails: what does not work here becomes a note, and dockerd says what it lacks.

use crate::report::Report;
use crate::root_dir::RootDir;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use std::fs;
use std::path::{Path, PathBuf};

const CGROUPS: &str = "/sys/fs/cgroup";
/// Where this container's own processes go, so that the group they were in can have controllers.
const OWN_GROUP: &str = "openclaw-cvm";
/// A process may fork between two looks.
const ROUNDS: u32 = 10;

pub(crate) fn prepare(root_dir: &RootDir, report: &mut Report) {
    let root = root_dir.at(CGROUPS);
    if let Err(why) = version_two(&root).or_else(|_| version_one(root_dir, &root)) {
        report.warn(format!("control groups: {why}; limits for containers may not work"));
        return;
    }
    if is_version_two(&root)
        && let Err(why) = hand_down_controllers(&root)
    {
        report.warn(format!("control groups: {why}; limits for containers may not work"));
    }
}

fn is_version_two(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Fails only when this machine does not have version 2.
fn version_two(root: &Path) -> Result<(), String> {
    if !is_version_two(root) {
        return Err("not version 2".into());
    }
    writable(root)
}

fn version_one(root_dir: &RootDir, root: &Path) -> Result<(), String> {
    let hierarchies = existing_hierarchies(root);
    if !hierarchies.is_empty() {
        return hierarchies.iter().try_for_each(|path| writable(path));
    }
    let table = fs::read_to_string(root_dir.at("/proc/cgroups")).unwrap_or_default();
    let controllers = version_one_controllers(&table);
    fs::create_dir_all(root).map_err(|e| format!("{CGROUPS} cannot be made ({e})"))?;
    if controllers.is_empty() {
        return mount_at(root, "cgroup2", None);
    }
    mount_at(root, "tmpfs", Some("mode=755"))?;
    for controller in controllers {
        let at = root.join(controller);
        fs::create_dir(&at).map_err(|e| format!("{} cannot be made ({e})", at.display()))?;
        mount_at(&at, "cgroup", Some(controller))?;
    }
    Ok(())
}

/// Directories of /sys/fs/cgroup that are hierarchies: they list their processes.
fn existing_hierarchies(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
    entries.filter(|path| path.join("cgroup.procs").exists()).collect()
}

/// Controllers that belong to a hierarchy of version 1, from /proc/cgroups: `name hierarchy groups
/// enabled`. With version 2 every hierarchy is 0.
fn version_one_controllers(table: &str) -> Vec<&str> {
    let rows = table.lines().filter(|line| !line.starts_with('#'));
    rows.filter_map(|row| {
        let fields: Vec<&str> = row.split_ascii_whitespace().collect();
        let [name, hierarchy, _, enabled] = fields[..] else { return None };
        (hierarchy != "0" && enabled == "1").then_some(name)
    })
    .collect()
}

fn mount_at(path: &Path, kind: &str, data: Option<&str>) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(kind), path, Some(kind), flags, data)
        .map_err(|errno| format!("{} cannot be mounted ({})", path.display(), errno.desc()))
}

/// Makes this one mount writable.
fn writable(path: &Path) -> Result<(), String> {
    let flags = statvfs(path).map_or(FsFlags::empty(), |s| s.flags());
    if !flags.contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let kept = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let kept = kept.into_iter().filter(|(now, _)| flags.contains(*now)).map(|(_, keep)| keep);
    let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | kept.collect();
    mount(None::<&str>, path, None::<&str>, remount, None::<&str>)
        .map_err(|errno| format!("{} is read-only and stays so ({})", path.display(), errno.desc()))
}

/// In version 2 a group with processes in it cannot give controllers to groups below. dockerd puts
/// containers below this one, so this container's own processes move into a group beside them.
fn hand_down_controllers(root: &Path) -> Result<(), String> {
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
    let given = read("cgroup.subtree_control");
    let missing: Vec<String> = read("cgroup.controllers")
        .split_ascii_whitespace()
        .filter(|c| !given.split_ascii_whitespace().any(|g| g == *c))
        .map(|c| format!("+{c}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    for _ in 0..ROUNDS {
        match fs::write(root.join("cgroup.subtree_control"), missing.join(" ")) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => make_room(root)?,
            Err(error) => return Err(format!("controllers cannot be handed down ({error})")),
        }
    }
    Err("controllers cannot be handed down (processes keep coming)".into())
}

fn make_room(root: &Path) -> Result<(), String> {
    let own = root.join(OWN_GROUP);
    fs::create_dir_all(&own).map_err(|e| format!("{} cannot be made ({e})", own.display()))?;
    let pids = fs::read_to_string(root.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.split_ascii_whitespace() {
        // A process that has just ended has left the group too.
        let _ = fs::write(own.join("cgroup.procs"), pid);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_of_version_one_are_those_with_a_hierarchy() {
        let table = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n\
            cpu\t1\t2\t1\nmemory\t0\t2\t1\npids\t8\t1\t0\ndevices\t5\t1\t1\n";
        assert_eq!(version_one_controllers(table), ["cpu", "devices"]);
    }

    #[test]
    fn controllers_that_are_handed_down_already_are_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        fs::write(temp.path().join("cgroup.subtree_control"), "memory cpu\n").unwrap();
        hand_down_controllers(temp.path()).unwrap();
        assert_eq!(fs::read_to_string(temp.path().join("cgroup.subtree_control")).unwrap(), "memory cpu\n");
        assert!(!temp.path().join(OWN_GROUP).exists());
    }

    #[test]
    fn only_what_is_missing_is_asked_for() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        fs::write(temp.path().join("cgroup.subtree_control"), "memory\n").unwrap();
        hand_down_controllers(temp.path()).unwrap();
        assert_eq!(fs::read_to_string(temp.path().join("cgroup.subtree_control")).unwrap(), "+cpu +pids");
    }
}
