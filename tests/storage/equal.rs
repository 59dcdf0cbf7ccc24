//! The tree and the bucket stay equal, whatever is done to the tree: on new machines and in both modes.

use crate::fixtures::files::{WORKSPACE, add_new, change_old, plant, put};
use crate::fixtures::machines::{leave, restored, tree};
use cvm_harness::Mode::{Fuse, Sync};
use cvm_harness::machine::{HEALTHY, PATIENCE};
use cvm_harness::{
    Builder, Cloud, Fault, Mode, Rule, difference, digest, flush, independent, storage, until,
};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::time::Duration;

fn without_specials(lines: Vec<String>) -> Vec<String> {
    lines.into_iter().filter(|l| !l.contains("\" socket ") && !l.contains("\" pipe ")).collect()
}

/// What a tree comes to that nobody replicates, and that has never been anywhere else.
fn on_a_plain_directory() -> Vec<String> {
    let top = tempfile::tempdir().unwrap();
    let at = top.path().join("workspace");
    plant(&at);
    change_old(&at);
    add_new(&at);
    workspace_but_times(&digest(top.path(), &[]))
}

/// What is below the workspace, but for when it was changed.
fn workspace_but_times(lines: &[String]) -> Vec<String> {
    let of_workspace = lines.iter().filter_map(|line| line.strip_prefix("\"workspace/")?.split_once("\" "));
    of_workspace
        .map(|(name, about)| {
            let mut words: Vec<&str> = about.splitn(6, ' ').collect();
            words.remove(4);
            format!("{name} {}", words.join(" "))
        })
        .collect()
}

fn battery(mode: Mode) {
    let cloud = Cloud::new();
    let machine = mode.start(&cloud);
    plant(&machine.path(WORKSPACE));
    flush(&machine);
    let before = tree(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    drop(machine);
    // Slow enough that most is only below while it is changed.
    cloud.proxy.latency(Duration::from_millis(60));
    let machine = mode.start(&cloud);
    let status = storage(&machine);
    if mode == Fuse {
        assert_eq!((&status["mode"], &status["independent"]), (&"fuse".into(), &false.into()), "{status:#}");
    } else {
        assert_eq!(status["mode"], "sync");
        let reason = "/dev/fuse cannot be opened (Read-only file system)";
        assert_eq!(status["reason"], reason);
        assert!(machine.output().contains("FUSE mount failed, falling back to sync mode."));
        assert!(machine.output().contains(reason));
        assert_eq!(difference(&before, &tree(&machine)), "");
    }
    let options = machine.ok(&["findmnt", "--noheadings", "--output", "OPTIONS", "/data"]);
    assert!(options.lines().last().is_some_and(|on_top| on_top.contains("nosuid,nodev")), "{options}");
    let at = machine.path(WORKSPACE);
    change_old(&at);
    add_new(&at);
    cloud.proxy.heal();
    flush(&machine);
    assert_eq!(difference(&on_a_plain_directory(), &workspace_but_times(&tree(&machine))), "");
    let expected = without_specials(tree(&machine));
    let machine = restored(&cloud, machine, mode);
    assert_eq!(difference(&expected, &tree(&machine)), "");
    let owners = |name: &str| {
        let found = fs::metadata(machine.path(WORKSPACE).join(name)).unwrap();
        (found.mode() & 0o7000, found.uid(), found.gid())
    };
    assert_eq!(owners("new/setuid"), (0, 990, 990));
    assert_eq!(owners("owner"), (0, 990, 990));
    assert_eq!(owners("new/containers"), (0, 200_123, 200_124));
    assert!(machine.ok(&["cvm", "storage", "verify", "--deep"]).contains("equal"));
}

#[test]
fn whatever_is_done_to_the_tree_is_restored_in_fuse_mode() {
    battery(Fuse);
}

#[test]
fn whatever_is_done_to_the_tree_is_restored_in_sync_mode() {
    battery(Sync);
}

#[test]
fn times_of_files_stay_when_their_data_comes_up_behind_the_gateway() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    plant(&machine.path(WORKSPACE));
    leave(machine);
    let data = Rule::new(Fault::Hang).method("GET").path(&cloud.judge().key("openclaw/workspace/many"));
    cloud.proxy.add(data);
    let machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    let modified = |name: &str| fs::metadata(at.join(name)).unwrap().modified().unwrap();
    let before = modified("many/d1/f7");
    fs::rename(at.join("many/d1"), at.join("many/d7")).unwrap();
    let time = nix::sys::time::TimeSpec::new(1_234_567_890, 987_654_321);
    let no_links = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &at.join("many/d2/f8"), &time, &time, no_links).unwrap();
    cloud.proxy.heal();
    independent(&machine);
    flush(&machine);
    assert_eq!(modified("many/d7/f7"), before, "of a file whose directory was moved");
    let time = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    assert_eq!(modified("many/d2/f8"), time, "of one whose time was set");
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

/// The same without a bucket: what the two modes are measured by.
#[test]
fn whatever_is_done_to_the_tree_stays_on_the_volume_in_local_mode() {
    let machine = Builder::product().fake_gateway(HEALTHY).ready();
    plant(&machine.path(WORKSPACE));
    let machine = machine.again(|builder| builder).ready();
    let at = machine.path(WORKSPACE);
    change_old(&at);
    add_new(&at);
    let expected = tree(&machine);
    let machine = machine.again(|builder| builder).ready();
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn a_name_that_is_too_long_is_an_incident_until_it_is_shorter() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    let dir = at.join("l".repeat(250)).join("o".repeat(250));
    put(dir.join("n".repeat(250)), "too far");
    put(at.join("short"), "near");
    let incidents = || storage(&machine)["incidents"].as_array().cloned().unwrap_or_default();
    let told = machine.exec(&["cvm", "storage", "flush"]);
    let words = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
    assert_eq!(told.status.code(), Some(1), "{words}");
    assert!(words.contains("cannot be in the bucket"), "{words}");
    assert_eq!(incidents().len(), 1, "{:#?}", incidents());
    // A change elsewhere does not end it.
    let generation = storage(&machine)["generation"].as_u64();
    put(at.join("elsewhere"), "x");
    until("the change is pushed", PATIENCE, || {
        let status = storage(&machine);
        (status["generation"].as_u64() > generation && status["pending_files"] == 0).then_some(())
    });
    assert_eq!(incidents().len(), 1, "{:#?}", incidents());
    fs::rename(dir.join("n".repeat(250)), at.join("now-short")).unwrap();
    until("the incident is over", PATIENCE, || incidents().is_empty().then_some(()));
    flush(&machine);
    assert_eq!(incidents().len(), 0);
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Sync);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn the_mode_that_most_files_have_is_restored_whatever_it_lets_others_do() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    for n in 0..200 {
        put(at.join(format!("shared/{n}")), n.to_string());
        fs::set_permissions(at.join(format!("shared/{n}")), PermissionsExt::from_mode(0o666)).unwrap();
    }
    fs::set_permissions(at.join("shared"), PermissionsExt::from_mode(0o777)).unwrap();
    flush(&machine);
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}
