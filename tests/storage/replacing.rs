//! What takes the name of something else: the bucket has both all the time.

use crate::fixtures::files::{WORKSPACE, put};
use crate::fixtures::machines::{comes_back, in_workspace, is_listed};
use cvm_harness::Mode::{Fuse, Sync};
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Machine, Mode, Rule, flush, independent, storage, until};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::time::Duration;

/// Rotates a log while something fails, and yields what the bucket has of it then.
fn rotated(cloud: &Cloud, machine: &Machine, fault: Rule) -> [Option<String>; 2] {
    cloud.proxy.add(fault);
    in_workspace(machine, "mv log log.1; echo new > log; echo $$ > beside");
    // It is of the same round, and goes up.
    is_pushed(cloud, "beside");
    round_fails(machine);
    let seen = ["log", "log.1"].map(|name| cloud.judge().text(&format!("openclaw/workspace/{name}")));
    everything_goes_up(cloud, machine);
    assert_eq!(cloud.judge().text("openclaw/workspace/log").as_deref(), Some("new\n"));
    assert_eq!(cloud.judge().text("openclaw/workspace/log.1").as_deref(), Some("old\n"));
    seen
}

#[test]
fn what_the_bucket_has_is_there_under_its_new_name_before_another_file_takes_the_old_one() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    in_workspace(&machine, "echo old > log");
    flush(&machine);
    let new_name = cloud.judge().key("openclaw/workspace/log.1");
    let fault = Rule::new(Fault::Status(503)).method("PUT").path(&new_name);
    let [log, log_1] = rotated(&cloud, &machine, fault);
    assert_eq!((log.as_deref(), log_1), (Some("old\n"), None));
}

#[test]
fn what_is_only_in_the_bucket_is_not_written_over_there_by_what_takes_its_name() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    in_workspace(&machine, "echo old > log");
    flush(&machine);
    drop(machine);
    // It does not come up: nobody can read it.
    let fault =
        Rule::new(Fault::Status(403)).method("GET").path(&cloud.judge().key("openclaw/workspace/log"));
    cloud.proxy.add(fault.clone());
    let machine = cloud.machine().ready();
    let [log, log_1] = rotated(&cloud, &machine, fault);
    assert_eq!((log.as_deref(), log_1), (Some("old\n"), None));
}

/// These cannot be sent; removals wait for them.
fn cannot_be_sent(cloud: &Cloud, names: &[&str]) {
    for name in names {
        let path = cloud.judge().key(&format!("openclaw/workspace/{name}"));
        cloud.proxy.add(Rule::new(Fault::Status(503)).method("PUT").path(&path));
    }
}

/// The same as [`in_bucket`] for what may be a directory there, which stock rclone reads in full.
fn object(cloud: &Cloud, name: &str) -> Option<String> {
    let name = format!("openclaw/workspace/{name}");
    cloud.garage.object(&cloud.judge().key(&name)).and_then(|_| cloud.judge().text(&name))
}

fn is_pushed(cloud: &Cloud, name: &str) {
    until("it is pushed", PATIENCE, || cloud.judge().text(&format!("openclaw/workspace/{name}")));
}

/// Waits until a round has found that it cannot do everything.
fn round_fails(machine: &Machine) {
    until("something has to wait", PATIENCE, || {
        (!machine.exec(&["cvm", "storage", "flush"]).status.success()).then_some(())
    });
}

fn everything_goes_up(cloud: &Cloud, machine: &Machine) {
    cloud.proxy.heal();
    until("all is pushed", PATIENCE, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
}

fn link_for_a_directory(mode: Mode) {
    let cloud = Cloud::new();
    let machine = mode.start(&cloud);
    in_workspace(&machine, "mkdir -p d e/in g; for n in d/x d/y e/x e/in/y g/x; do echo $n > $n; done");
    flush(&machine);
    cannot_be_sent(&cloud, &["beside", "d2/x", "e2/in/y"]);
    let at = machine.path(WORKSPACE);
    put(at.join("beside"), "1");
    fs::rename(at.join("d"), at.join("d2")).unwrap();
    symlink("d2", at.join("d")).unwrap();
    fs::rename(at.join("e"), at.join("e2")).unwrap();
    put(at.join("e"), "file");
    fs::remove_dir_all(at.join("g")).unwrap();
    symlink("nowhere", at.join("g")).unwrap();
    is_pushed(&cloud, "d2/y");
    round_fails(&machine);
    assert!(is_listed(&machine, "d/x") && is_listed(&machine, "e/in/y"), "what moved is nowhere else yet");
    assert_eq!(object(&cloud, "e"), None, "a file beside what is below it");
    everything_goes_up(&cloud, &machine);
    assert!(!is_listed(&machine, "d/x") && !is_listed(&machine, "e/in/y") && !is_listed(&machine, "g/x"));
    in_workspace(&machine, "echo NEW > d2/x; rm d2/y");
    flush(&machine);
    let machine = comes_back(&cloud, machine, mode);
    assert_eq!(machine.read(&format!("{WORKSPACE}/d/x")), "NEW\n");
}

#[test]
fn a_link_in_place_of_a_directory_hides_nothing_that_comes_back_in_fuse_mode() {
    link_for_a_directory(Fuse);
}

#[test]
fn a_link_in_place_of_a_directory_hides_nothing_that_comes_back_in_sync_mode() {
    link_for_a_directory(Sync);
}

#[test]
fn what_replaces_a_file_waits_until_the_files_removal_does_not() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    in_workspace(&machine, "echo f > f; echo g > g; ln -s f l");
    flush(&machine);
    cannot_be_sent(&cloud, &["beside", "f2", "g2"]);
    let at = machine.path(WORKSPACE);
    put(at.join("beside"), "1");
    fs::rename(at.join("f"), at.join("f2")).unwrap();
    fs::rename(at.join("g"), at.join("g2")).unwrap();
    fs::remove_file(at.join("l")).unwrap();
    symlink("beside", at.join("f")).unwrap();
    put(at.join("g/x"), "in\n");
    put(at.join("l/x"), "in\n");
    is_pushed(&cloud, "l/x");
    round_fails(&machine);
    let has = |name: &str| object(&cloud, name);
    assert_eq!((has("f").as_deref(), has("g").as_deref(), has("g/x")), (Some("f\n"), Some("g\n"), None));
    everything_goes_up(&cloud, &machine);
    assert_eq!((has("f"), has("g"), has("g/x").as_deref()), (None, None, Some("in\n")));
    comes_back(&cloud, machine, Sync);
}

#[test]
fn a_directory_and_a_file_of_its_own_change_places_and_the_bucket_has_the_file_all_the_time() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    in_workspace(&machine, "mkdir d; echo inner > d/x; echo outer > f");
    flush(&machine);
    cannot_be_sent(&cloud, &["d", "f/x"]);
    let at = machine.path(WORKSPACE);
    fs::rename(at.join("d/x"), at.join("t")).unwrap();
    fs::remove_dir(at.join("d")).unwrap();
    fs::rename(at.join("t"), at.join("d")).unwrap();
    fs::rename(at.join("f"), at.join("t")).unwrap();
    fs::create_dir(at.join("f")).unwrap();
    fs::rename(at.join("t"), at.join("f/x")).unwrap();
    round_fails(&machine);
    let has = |name: &str| object(&cloud, name);
    assert_eq!((has("d/x").as_deref(), has("f").as_deref()), (Some("inner\n"), Some("outer\n")));
    everything_goes_up(&cloud, &machine);
    assert_eq!((has("d").as_deref(), has("f/x").as_deref()), (Some("inner\n"), Some("outer\n")));
    comes_back(&cloud, machine, Sync);
}

/// Does something while a round is on its way that has `log` in it, and tells whether what had the
/// name went up before what has it now.
fn rotated_meanwhile(cloud: &Cloud, machine: &Machine, rotate: &str) {
    in_workspace(machine, "head -c 100000 /dev/zero | tr '\\0' x > log");
    independent(machine);
    flush(machine);
    cloud.proxy.latency(Duration::from_millis(150));
    // Where nothing is pushed: all of it comes in one moment, and the log, which is larger, is last.
    let (at, bulk) = (machine.path(WORKSPACE), machine.path("/data/openclaw/cache/many"));
    for n in 0..1500 {
        put(bulk.join(format!("{}/{n}", n % 97)), n.to_string());
    }
    File::options().append(true).open(at.join("log")).unwrap().write_all(b"and more").unwrap();
    fs::rename(&bulk, at.join("many")).unwrap();
    fs::remove_dir(bulk.parent().unwrap()).unwrap();
    let left = || storage(machine)["pending_files"].as_u64().unwrap_or_default();
    until("the bulk is on its way", PATIENCE, || (left() > 700).then_some(()));
    cloud.proxy.clear_log();
    in_workspace(machine, rotate);
    let keys = ["log", "log.1"].map(|name| cloud.judge().key(&format!("openclaw/workspace/{name}")));
    let first_of = |key: &String| {
        let log = cloud.proxy.log();
        log.iter().position(|entry| {
            let path = entry.path.split('?').next().unwrap_or_default();
            entry.method == "PUT" && path.ends_with(key.as_str())
        })
    };
    until("both are sent", PATIENCE, || keys.iter().all(|key| first_of(key).is_some()).then_some(()));
    let order = (first_of(&keys[1]), first_of(&keys[0]));
    assert!(order.0 < order.1, "the log took its own name before it had another: {order:?}");
    everything_goes_up(cloud, machine);
}

#[test]
fn a_log_that_is_rotated_in_a_long_round_keeps_its_name_until_it_has_another() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    rotated_meanwhile(&cloud, &machine, "mv log log.1; echo new > log");
    comes_back(&cloud, machine, Sync);
}

#[test]
fn a_database_in_place_of_a_file_is_not_so_urgent_that_the_file_is_lost() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let rotate = "mv log log.1; python3 -c \"import sqlite3; c=sqlite3.connect('log'); c.execute('create table t(x)'); c.commit()\"";
    rotated_meanwhile(&cloud, &machine, rotate);
}
