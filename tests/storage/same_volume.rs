//! The next machine has the volume of the last one: after an outage, a kill, or a change of mode.

use crate::fixtures::files::{WORKSPACE, change_names, change_old, plant, put, timeless};
use crate::fixtures::machines::{begun_without, leave, restored, tree};
use cvm_harness::Mode::{Fuse, Sync};
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Rule, difference, digest, flush, independent, storage, until};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

#[test]
fn what_was_not_pushed_is_on_the_volume_and_is_pushed_by_the_next_boot() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    plant(&machine.path(WORKSPACE));
    flush(&machine);
    cloud.proxy.refuse(true);
    change_old(&machine.path(WORKSPACE));
    let _ = fs::remove_file(machine.path(WORKSPACE).join("becomes-pipe"));
    let expected = tree(&machine);
    cloud.proxy.heal();
    // Killed before it could have noticed.
    cloud.proxy.refuse(true);
    let mut machine = machine;
    machine.destroy();
    cloud.proxy.heal();
    let machine = machine.again(|builder| builder).ready();
    assert_eq!(difference(&expected, &tree(&machine)), "");
    flush(&machine);
    let machine = restored(&cloud, machine, Sync);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

fn switches(hydrated: bool) {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    plant(&at);
    for n in 0..250 {
        put(at.join(format!("bulk/{n:03}")), format!("bulk {n}"));
        fs::set_permissions(at.join(format!("bulk/{n:03}")), fs::Permissions::from_mode(0o600)).unwrap();
    }
    flush(&machine);
    let model = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(format!("{}/.", at.display())).arg(model.path()).status();
    assert!(copied.unwrap().success());
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    drop(machine);
    if !hydrated {
        cloud.proxy.latency(Duration::from_millis(150));
    }
    let machine = cloud.machine().ready();
    if hydrated {
        independent(&machine);
    } else {
        cloud.proxy.latency(Duration::from_millis(400));
    }
    // Nothing of what follows can be pushed.
    cloud.proxy.add(Rule::new(Fault::Reset).method("PUT"));
    for at in [&machine.path(WORKSPACE), model.path()] {
        change_names(at);
        put(at.join("elsewhere/new"), "new");
        fs::set_permissions(at.join("elsewhere/new"), fs::Permissions::from_mode(0o644)).unwrap();
        let time = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        File::options().write(true).open(at.join("elsewhere/new")).unwrap().set_modified(time).unwrap();
    }
    let time = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    for at in [&machine.path(WORKSPACE), model.path()] {
        // Where its data is only below and out of reach it cannot be opened.
        let _ = fs::remove_file(at.join("touched"));
        put(at.join("touched"), "anew");
        File::options().write(true).open(at.join("touched")).unwrap().set_modified(time).unwrap();
    }
    // Looks that were changed while the data was only below, and were not pushed, are the overlay's
    // alone; without it the manifest's count again.
    let seen = |lines: Vec<String>| if hydrated { timeless(lines) } else { contents(lines) };
    let expected = seen(digest(model.path(), &[]));
    assert_eq!(storage(&machine)["independent"], hydrated);
    let mut machine = machine;
    for mode in [Sync, Fuse, Sync] {
        machine.destroy();
        cloud.proxy.heal();
        machine = machine
            .again(|builder| match mode {
                Sync => builder.bind(Path::new("/etc/passwd"), "/dev/fuse:ro"),
                Fuse => builder.unbind("/dev/fuse"),
            })
            .ready();
        let status = storage(&machine);
        assert_eq!(status["mode"], if mode == Fuse { "fuse" } else { "sync" }, "{status:#}");
        independent(&machine);
        let found = seen(digest(&machine.path(WORKSPACE), &[]));
        assert_eq!(difference(&expected, &found), "", "in {mode:?}");
    }
    flush(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &seen(digest(&machine.path(WORKSPACE), &[]))), "");
}

/// Files by name, size and hash.
fn contents(lines: Vec<String>) -> Vec<String> {
    let of = |line: String| {
        let (name, rest) = line.split_once("\" file ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        Some(format!("{name}\" {} {}", words.get(2)?, words.get(4)?))
    };
    lines.into_iter().filter_map(of).collect()
}

#[test]
fn the_mode_may_change_on_a_volume_that_has_everything() {
    switches(true);
}

#[test]
fn the_mode_may_change_on_a_volume_that_has_not() {
    switches(false);
}

#[test]
fn a_restore_that_was_killed_deletes_nothing_when_the_mode_changes() {
    let cloud = Cloud::new();
    let machine = Sync.start(&cloud);
    plant(&machine.path(WORKSPACE));
    let expected = tree(&machine);
    leave(machine);
    let mut machine = begun_without(&cloud, Sync, "openclaw/workspace/large");
    until("some files are there", PATIENCE, || {
        machine.data().join("openclaw/workspace/many/d0/f6").exists().then_some(())
    });
    machine.destroy();
    assert!(!machine.data().join("openclaw/workspace/large").exists());
    cloud.proxy.heal();
    let machine = machine.again(|builder| builder.unbind("/dev/fuse")).ready();
    assert_eq!(storage(&machine)["mode"], "fuse");
    independent(&machine);
    flush(&machine);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}
