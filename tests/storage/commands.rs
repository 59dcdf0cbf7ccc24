//! What an operator asks of the storage: `cvm storage`, `cvm logs`, drills, and a restore by hand.

use crate::fixtures::files::{WORKSPACE, plant, put};
use crate::fixtures::machines::{restored, tree};
use crate::fixtures::programs::sqlite_in;
use cvm_harness::Mode::Sync;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Machine, Rule, difference, digest, flush, restore_by_hand, storage, until};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

#[test]
fn an_operator_sees_checks_and_fetches_what_the_bucket_has() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    plant(&at);
    sqlite_in(&machine, "c.execute('create table m(x)');c.commit()", &format!("{WORKSPACE}/a.sqlite"));
    flush(&machine);
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw/workspace/many"]);
    assert_eq!(listed.lines().filter(|l| l.contains("/f")).count(), 60, "{listed}");
    assert_eq!(listed, machine.ok(&["cvm", "storage", "ls", "/data/openclaw/workspace/many"]));
    let path = "openclaw/workspace/many/d0/f6";
    assert_eq!(machine.ok(&["cvm", "storage", "get", path]), machine.read(&format!("/data/{path}")));
    assert!(!machine.exec(&["cvm", "storage", "get", "no/such"]).status.success());
    for words in [&["verify"][..], &["verify", "--deep"], &["drill"]] {
        machine.ok(&[&["cvm", "storage"], words].concat());
    }
    assert_eq!(storage(&machine)["drill"]["good"], true);
    let restore = || restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    let output = restore();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        difference(
            &without_volatile(tree(&machine)),
            &without_volatile(digest(&machine.path("/tmp/whole/openclaw"), &[]))
        ),
        ""
    );
    // Not over what is there.
    assert!(!restore().status.success());
    // One object less: seen by name and size. One replaced by another of its size: by content.
    let one_size = machine.read("/data/openclaw/workspace/deep/er/two/three").len();
    put(at.join("same-size"), "z".repeat(one_size));
    flush(&machine);
    let (one, two) = (
        cloud.judge().key("openclaw/workspace/deep/er/two/three"),
        cloud.judge().key("openclaw/workspace/moved/two/three"),
    );
    let other = cloud.garage.object(&cloud.judge().key("openclaw/workspace/same-size")).unwrap();
    cloud.garage.put_object(&one, &other);
    machine.ok(&["cvm", "storage", "verify"]);
    let deep = machine.exec(&["cvm", "storage", "verify", "--deep"]);
    let said = String::from_utf8_lossy(&deep.stdout).into_owned();
    assert!(!deep.status.success() && said.contains("deep/er/two/three"), "{said}");
    cloud.garage.delete_raw(&two);
    let shallow = machine.exec(&["cvm", "storage", "verify"]);
    let said = String::from_utf8_lossy(&shallow.stdout).into_owned();
    assert!(!shallow.status.success() && said.contains("moved/two/three"), "{said}");
    // A database is read back in any case.
    sqlite_in(&machine, "c.execute('create table t(x)'); c.commit()", "/data/openclaw/workspace/verified.db");
    flush(&machine);
    let database = cloud.judge().key("openclaw/workspace/verified.db");
    let mut bytes = cloud.garage.get_raw(&database).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    cloud.garage.put_raw(&database, &bytes);
    let shallow = machine.exec(&["cvm", "storage", "verify"]);
    let said = String::from_utf8_lossy(&shallow.stdout).into_owned();
    assert!(!shallow.status.success() && said.contains("verified.db"), "{said}");
}

/// Lines without owners.
fn anybodys(lines: &[String]) -> Vec<String> {
    let of = |line: &String| {
        let (name, rest) = line.split_once("\" ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        Some(format!("{name} {} {}", words[..2].join(" "), words[3..].join(" ")))
    };
    lines.iter().map(|line| of(line).unwrap_or_else(|| line.clone())).collect()
}

/// Locks and logs of open databases are nobody's state, and a database's copy is not its bytes.
fn without_volatile(lines: Vec<String>) -> Vec<String> {
    let volatile = |l: &String| {
        l.contains(".sqlite\" file")
            || l.contains("-wal\" file")
            || l.contains("-shm\" file")
            || l.starts_with("\"tmp")
            || l.starts_with("\"cache")
    };
    lines.into_iter().filter(|l| !volatile(l)).collect()
}

#[test]
fn a_restore_by_a_plain_user_brings_back_everything_but_owners() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    plant(&at);
    fs::remove_file(at.join("mode")).unwrap();
    put(at.join("closed/inside"), "inside");
    fs::set_permissions(at.join("closed/inside"), fs::Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(at.join("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    put(at.join("borrows"), "rights");
    std::os::unix::fs::chown(at.join("borrows"), Some(7), Some(8)).unwrap();
    fs::set_permissions(at.join("borrows"), fs::Permissions::from_mode(0o6755)).unwrap();
    flush(&machine);
    let home = machine.path("/tmp/plain");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(1234), Some(1234)).unwrap();
    let user = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"];
    let output = restore_by_hand(&cloud, &machine, &user, "/tmp/plain/state");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("owners come back when root restores").count(), 1, "{said}");
    let restored = machine.path("/tmp/plain/state/openclaw");
    let borrows = fs::metadata(restored.join("workspace/borrows")).unwrap();
    assert_eq!(borrows.permissions().mode() & 0o7777, 0o755, "nobody's rights are lent but the user's");
    let but_that = |lines: Vec<String>| -> Vec<String> {
        anybodys(&without_volatile(lines)).into_iter().filter(|line| !line.contains("borrows")).collect()
    };
    assert_eq!(difference(&but_that(tree(&machine)), &but_that(digest(&restored, &[]))), "");
}

#[test]
fn the_last_words_of_a_lost_machine_are_read_on_its_successor() {
    let cloud = Cloud::new();
    let machine = cloud.machine().environment("CVM_NAME_OF_A_BOOT", "first").start();
    let machine = machine.ready();
    until("its logs are in the bucket", PATIENCE, || {
        let rclone = cloud.judge().run(&["lsf", "-R", "crypt:.cvm/boots"]);
        String::from_utf8_lossy(&rclone.stdout).contains("/supervisor").then_some(())
    });
    let first = machine.read("/var/log/openclaw-cvm/supervisor.log");
    let last_of = |log: &str| log.lines().rfind(|l| l.contains("S3 storage configured")).unwrap().to_owned();
    let first = last_of(&first);
    let machine = restored(&cloud, machine, Sync);
    let said = machine.ok(&["cvm", "logs", "--boot", "-1", "-n", "all"]);
    assert!(said.contains(&first), "{first:?} in:\n{said}");
    let own = machine.read("/var/log/openclaw-cvm/supervisor.log");
    assert!(!said.contains(&last_of(&own)), "{said}");
    let boots = machine.ok(&["cvm", "logs", "--boots"]);
    assert!(boots.contains("--boot -1") && boots.contains("without a last word: lost"), "{boots}");
}

#[test]
fn boots_are_told_with_their_ends_however_often_a_worker_dies_and_whatever_the_clock_said() {
    let cloud = Cloud::new();
    let rclone = cloud.judge();
    let boots = || {
        let said = rclone.ok(&["lsf", "--dirs-only", "crypt:.cvm/boots"]);
        String::from_utf8_lossy(&said).lines().map(|line| line.trim_end_matches('/').to_owned()).collect()
    };
    let has_logs = |machine: &Machine, count: usize| {
        flush(machine);
        until("its logs are in the bucket", PATIENCE, || {
            let all: Vec<String> = boots();
            (all.len() == count).then_some(())
        });
    };
    let mut machine = cloud.machine().ready();
    has_logs(&machine, 1);
    for _ in 0..3 {
        let pid = machine.find("cvm-storage").expect("the worker runs").pid;
        machine.ok(&["kill", "-KILL", &pid.to_string()]);
        until("it is another one, with its tree", PATIENCE, || {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
            let other = machine.find("cvm-storage").is_some_and(|p| p.pid != pid);
            (other && storage(&machine)["phase"] == "ready").then_some(())
        });
    }
    has_logs(&machine, 1);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    // The clock of the one before was years ahead.
    let first: Vec<String> = boots();
    let ahead = format!("{:015}", first[0].parse::<u64>().unwrap() + 100_000_000_000);
    rclone.ok(&["moveto", &format!("crypt:.cvm/boots/{}", first[0]), &format!("crypt:.cvm/boots/{ahead}")]);

    let mut machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "30").ready();
    has_logs(&machine, 2);
    assert!(boots().iter().all(|name| *name >= ahead), "{:?}", boots());
    let said = machine.ok(&["cvm", "logs", "--boots"]);
    assert!(said.contains("stopped, with everything in the bucket"), "{said}");
    cloud.proxy.add(Rule::new(Fault::Status(400)).method("PUT").path(&rclone.key("openclaw/refused")));
    machine.ok(&["sh", "-c", "echo no > /data/openclaw/refused"]);
    assert_eq!(machine.stop(), 75, "{}", machine.output());
    cloud.proxy.heal();
    drop(machine);

    let machine = cloud.machine().ready();
    has_logs(&machine, 3);
    let said = machine.ok(&["cvm", "logs", "--boots"]);
    let ends: Vec<&str> =
        said.lines().filter_map(|line| line.split_once("stopped, ").map(|(_, end)| end)).collect();
    assert_eq!(ends, ["with 1 files (3 bytes) not in the bucket", "with everything in the bucket"], "{said}");
    let last = machine.ok(&["cvm", "logs", "--boot", "-1", "-n", "all"]);
    assert!(last.contains("Stopping: "), "{last}");
}

#[test]
fn drills_come_by_themselves_and_the_last_one_is_remembered() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().environment("S3_DRILL_INTERVAL", "2").ready();
    let drilled = |machine: &Machine| storage(machine)["drill"].clone();
    let one = until("a drill came", PATIENCE, || Some(drilled(&machine)).filter(|drill| !drill.is_null()));
    assert_eq!(one["good"], true, "{one:#}");
    // What it finds wrong is an incident, without anybody having asked.
    put(machine.path(WORKSPACE).join("notes"), "");
    sqlite_in(&machine, "c.execute('create table t(x)'); c.commit()", &format!("{WORKSPACE}/early.sqlite"));
    flush(&machine);
    let database = cloud.judge().key("openclaw/workspace/early.sqlite");
    let good = cloud.garage.get_raw(&database).unwrap();
    cloud.garage.put_raw(&database, &good[..good.len() - 1]);
    until("a drill finds it", PATIENCE, || (drilled(&machine)["good"] == false).then_some(()));
    until("it was sent again, and a drill finds it good", PATIENCE, || {
        (drilled(&machine)["good"] == true).then_some(())
    });
    assert_eq!(machine.stop(), 0);
    let machine = machine.again(|builder| builder.environment("S3_DRILL_INTERVAL", "86400")).ready();
    let last = drilled(&machine);
    assert_eq!(last["good"], true, "the next boot knows of it: {last:#}");
}

#[test]
fn temporary_credentials_are_sent_with_every_request() {
    let cloud = Cloud::new();
    let token = "a/session+token=";
    let mut machine = cloud.machine().environment("AWS_SESSION_TOKEN", token).ready();
    plant(&machine.path(WORKSPACE));
    flush(&machine);
    machine.ok(&["cvm", "storage", "verify"]);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let log = cloud.proxy.log();
    let without: Vec<_> = log.iter().filter(|e| e.session_token.as_deref() != Some(token)).collect();
    assert!(without.is_empty() && log.len() > 20, "{} of {}: {without:#?}", without.len(), log.len());
}
