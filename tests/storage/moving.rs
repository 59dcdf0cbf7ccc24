//! Files and directories that are moved before their data has come from the bucket.

use crate::fixtures::files::{WORKSPACE, put};
use crate::fixtures::machines::{leave, restored, tree};
use cvm_harness::Mode::Fuse;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Machine, Rule, difference, flush, independent, storage, until};
use std::fs;
use std::time::Duration;

/// The last part of it, in the bucket.
fn name(cloud: &Cloud, path: &str) -> String {
    let key = cloud.judge().key(&format!("openclaw/workspace/{path}"));
    key.rsplit('/').next().unwrap().to_owned()
}

/// Of a machine that has stopped. What has one of these in its path is not to be had.
fn started_without(cloud: &Cloud, machine: Machine, fault: Fault, paths: &[&str]) -> Machine {
    leave(machine);
    for path in paths {
        cloud.proxy.add(Rule::new(fault).method("GET").path(&name(cloud, path)));
    }
    cloud.machine().ready()
}

/// Under these names, also on a machine that has nothing but the bucket.
fn are_there(cloud: &Cloud, machine: Machine, files: &[(&str, &str)]) {
    cloud.proxy.heal();
    independent(&machine);
    flush(&machine);
    let expected = tree(&machine);
    let look = |machine: &Machine| {
        for (path, content) in files {
            let at = machine.path(WORKSPACE).join(path);
            assert_eq!(fs::read_to_string(at).ok().as_deref(), Some(*content), "{path}");
        }
    };
    look(&machine);
    let machine = restored(cloud, machine, Fuse);
    look(&machine);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn what_is_moved_to_one_name_after_another_is_kept_although_its_data_is_not_there_yet() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    for path in ["first", "second", "one/in-one", "two/in-two"] {
        put(machine.path(WORKSPACE).join(path), path);
    }
    let paths = ["second", "two/in-two", "first", "one/in-one"];
    let machine = started_without(&cloud, machine, Fault::Hang, &paths);
    let at = machine.path(WORKSPACE);
    fs::rename(at.join("first"), at.join("file")).unwrap();
    fs::rename(at.join("one"), at.join("dir")).unwrap();
    for path in &paths[2..] {
        cloud.proxy.spare(&name(&cloud, path));
    }
    flush(&machine);
    fs::rename(at.join("second"), at.join("file")).unwrap();
    fs::rename(at.join("dir"), at.join("away")).unwrap();
    fs::rename(at.join("two"), at.join("dir")).unwrap();
    let files = [("file", "second"), ("away/in-one", "one/in-one"), ("dir/in-two", "two/in-two")];
    are_there(&cloud, machine, &files);
}

#[test]
fn what_was_moved_in_an_outage_is_not_forgotten_where_another_directory_cannot_be_looked_into() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    for path in ["seen/of-seen", "unseen/of-unseen"] {
        put(machine.path(WORKSPACE).join(path), path);
    }
    let machine = started_without(&cloud, machine, Fault::Status(403), &["seen/of-seen", "unseen"]);
    let at = machine.path(WORKSPACE);
    assert_eq!(fs::read_dir(at.join("seen")).unwrap().count(), 1);
    fs::rename(at.join("seen"), at.join("to")).unwrap();
    let said = |what: &str| {
        until("the trouble is told", PATIENCE, || {
            storage(&machine)["last_error"].as_str()?.contains(what).then_some(())
        });
    };
    said("still under another name");
    fs::rename(at.join("unseen"), at.join("there")).unwrap();
    said("cannot be listed");
    are_there(&cloud, machine, &[("to/of-seen", "seen/of-seen"), ("there/of-unseen", "unseen/of-unseen")]);
}

#[test]
fn a_directory_that_is_moved_to_and_fro_while_its_files_come_up_is_all_there() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let names: Vec<String> = (0..200).map(|n| format!("to/{}/{n}", n % 10)).collect();
    for name in &names {
        put(machine.path(WORKSPACE).join(name), name);
    }
    let machine = started_without(&cloud, machine, Fault::Latency(Duration::from_millis(20)), &["to"]);
    let at = machine.path(WORKSPACE);
    let (to, fro) = (at.join("to"), at.join("fro"));
    // As long as it takes, and no longer than it can.
    for _ in 0..500 {
        fs::rename(&to, &fro).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        fs::rename(&fro, &to).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
    are_there(&cloud, machine, &files);
}

#[test]
fn what_is_moved_into_the_place_of_a_bad_file_is_not_taken_for_it() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    for path in ["bad", "good", "other"] {
        put(machine.path(WORKSPACE).join(path), path.repeat(100));
    }
    let [bad, other] = ["bad", "other"].map(|name| cloud.judge().key(&format!("openclaw/workspace/{name}")));
    let machine = started_without(&cloud, machine, Fault::Hang, &["bad", "good"]);
    let object = cloud.garage.get_raw(&other).unwrap();
    cloud.garage.put_raw(&bad, &object);
    let at = machine.path(WORKSPACE);
    fs::rename(at.join("good"), at.join("bad")).unwrap();
    let files = [("bad", &*"good".repeat(100)), ("other", &*"other".repeat(100))];
    are_there(&cloud, machine, &files);
}
