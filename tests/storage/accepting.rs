//! What an operator accepts or adopts, and what becomes of the volume then.

use crate::fixtures::bucket::{all, put_back};
use crate::fixtures::files::{PLACES, content, read, write};
use crate::fixtures::machines::{
    accept_older, adopt, anchor, command_is_refused, decide, history, incidents, of_another,
    refuses_to_start, volumes_set_aside,
};
use crate::fixtures::programs::commit;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Machine, Mode, Rule, flush, independent, until};
use std::collections::BTreeMap;
use std::io::Write as _;

#[test]
fn a_volume_that_was_rolled_back_does_not_take_the_bucket_back_with_it() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let write = |machine: &Machine, text: &str| {
        let at = machine.path("/data/openclaw/workspace/one");
        std::fs::create_dir_all(at.parent().expect("below /data")).expect("a directory");
        std::fs::write(at, text).expect("a file");
        flush(machine);
    };
    write(&machine, "old");
    independent(&machine);
    flush(&machine);
    // Nothing changes now: a copy is what a snapshot of the disk would be.
    let copy = tempfile::tempdir().expect("a directory");
    let cp = |from: &std::path::Path, to: &std::path::Path| {
        let status = std::process::Command::new("cp").arg("-aT").arg(from).arg(to).status();
        assert!(status.expect("cp is there").success());
    };
    cp(&machine.data(), &copy.path().join("data"));
    for text in ["newer", "newer still", "new"] {
        write(&machine, text);
    }
    let machine = machine.again(|builder| {
        let data = builder.scratch().join("data");
        std::fs::remove_dir_all(&data).expect("nobody uses it");
        cp(&copy.path().join("data"), &data);
        builder
    });
    machine.service_in("gateway", &["ready"]);
    machine.line("neither merged nor pushed");
    assert_eq!(machine.read("/data/openclaw/workspace/one"), "new");
    assert_eq!(volumes_set_aside(&machine), 1);
}

/// The machine is lost, and its volume meets a bucket that is older than it.
fn meets_again(cloud: &Cloud, mut machine: Machine, early: &BTreeMap<String, Vec<u8>>) -> Machine {
    machine.destroy();
    put_back(&cloud.garage, early);
    let machine = machine.again(|b| b);
    refuses_to_start(&machine, &["older than this volume"]);
    machine
}

fn an_older_bucket_is_accepted(mode: Mode) {
    let cloud = Cloud::new();
    let machine = mode.start(&cloud);
    write(&machine, &["openclaw/workspace/one", "openclaw/workspace/goes"], "early");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    let early = all(&cloud.garage);
    write(&machine, &["openclaw/workspace/one", "openclaw/workspace/two"], "late");
    machine.ok(&["rm", "/data/openclaw/workspace/goes"]);
    flush(&machine);
    let machine = meets_again(&cloud, machine, &early);
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
    // All of the one, and all of the other beside it.
    let early_one = Some(content("openclaw/workspace/one", "early"));
    assert_eq!(read(&machine, "openclaw/workspace/one"), early_one);
    assert!(read(&machine, "openclaw/workspace/goes").is_some());
    assert_eq!(read(&machine, "openclaw/workspace/two"), None);
    assert_eq!(volumes_set_aside(&machine), 1);
    let mut find = std::process::Command::new("find");
    let found = find.arg(machine.data().join(".cvm/storage/aside")).args(["-name", "two"]).output();
    let found = String::from_utf8(found.expect("find runs").stdout).expect("a path");
    let kept = std::fs::read(found.trim_end()).expect("it is there once");
    assert_eq!(kept, content("openclaw/workspace/two", "late"));
    flush(&machine);
}

#[test]
fn an_older_bucket_that_is_accepted_while_the_network_breaks_is_not_merged_either() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    for name in ["one", "two", "goes"] {
        write(&machine, &[&format!("openclaw/workspace/{name}")], "early");
        flush(&machine);
    }
    independent(&machine);
    flush(&machine);
    let early = all(&cloud.garage);
    write(&machine, &["openclaw/workspace/one", "openclaw/workspace/three"], "late");
    flush(&machine);
    let machine = meets_again(&cloud, machine, &early);
    // What comes before the last segment is read, and it is not.
    let bucket = cloud.judge();
    let last = bucket.key(bucket.segments().last().expect("there is a manifest"));
    cloud.proxy.clear_log();
    cloud.proxy.add(Rule::new(Fault::Status(503)).method("GET").path(&last));
    accept_older(&machine);
    until("a try has failed", PATIENCE, || {
        (cloud.proxy.log().iter().filter(|entry| entry.path.contains(&last)).count() > 4).then_some(())
    });
    cloud.proxy.heal();
    machine.service_in("gateway", &["ready"]);
    assert_eq!(volumes_set_aside(&machine), 1);
    let path = "openclaw/workspace/one";
    assert!(read(&machine, path) == Some(content(path, "early")), "{path} is not the bucket's");
    assert!(read(&machine, "openclaw/workspace/three").is_none(), "two histories are one");
}

#[test]
fn an_anchor_that_was_wrong_costs_the_volume_nothing() {
    let cloud = Cloud::new();
    let machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "1").ready();
    let file = "/data/openclaw/some.sqlite";
    let rows = |machine: &Machine| {
        machine.inside(|| {
            let db = rusqlite::Connection::open(file).expect("a database");
            db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).expect("a table")
        })
    };
    commit(&machine, file, "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    let anchor = anchor(&machine);
    cloud.proxy.refuse(true);
    commit(&machine, file, "INSERT INTO t VALUES (2)");
    let mut machine = machine;
    assert_eq!(machine.stop(), 75, "{}", machine.output());
    cloud.proxy.refuse(false);
    let machine = machine.again(|b| b.environment("STATE_ANCHOR", &of_another(&anchor, 1)));
    refuses_to_start(&machine, &["STATE_ANCHOR"]);
    let machine = machine.again(|b| b.environment("STATE_ANCHOR", &anchor));
    machine.service_in("gateway", &["ready"]);
    assert_eq!(rows(&machine), 2);
    assert_eq!(volumes_set_aside(&machine), 0);
    flush(&machine);
}

#[test]
fn an_older_bucket_that_is_accepted_is_not_merged_with_the_volume_in_fuse_mode() {
    an_older_bucket_is_accepted(Mode::Fuse);
}

#[test]
fn an_older_bucket_that_is_accepted_is_not_merged_with_the_volume_in_sync_mode() {
    an_older_bucket_is_accepted(Mode::Sync);
}

#[test]
fn an_operator_accepts_what_was_shown_and_nothing_else() {
    let cloud = Cloud::new();
    let vital = format!("{}/vital", PLACES[0]);
    let mut machine = cloud.machine().ready();
    write(&machine, &[&vital], "first");
    flush(&machine);
    write(&machine, &["openclaw/workspace/later"], "first");
    flush(&machine);
    independent(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let bucket = cloud.judge();
    let last = bucket.segments().pop().expect("there is a manifest");
    let mut bytes = bucket.get(&last);
    *bytes.last_mut().expect("it is not empty") ^= 1;
    bucket.put(&last, &bytes);
    bucket.delete(&vital);
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &["does not decrypt"]);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    // Not what is there now.
    let mut stream =
        std::os::unix::net::UnixStream::connect(machine.path(cvm_protocol::paths::STORAGE_SOCKET))
            .expect("the worker listens");
    writeln!(stream, r#"{{"v":1,"verb":"accept-older","seen":"something else"}}"#).expect("it reads");
    let said = std::io::read_to_string(&stream).expect("it answers");
    assert!(said.contains("refused") && said.contains("look at it again"), "{said}");
    accept_older(&machine);
    refuses_to_start(&machine, &["1 files that the gateway reads while it starts"]);
    assert_eq!(incidents(&machine), [vital.as_str()]);
    decide(&machine, "forget", std::slice::from_ref(&vital));
    machine.service_in("gateway", &["ready"]);
    assert_eq!(read(&machine, &vital), None);
}

#[test]
fn what_was_accepted_is_not_that_the_manifest_has_lost_its_end_meanwhile() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let bucket = cloud.judge();
    let owner = bucket.get(".cvm/owner");
    let segments = bucket.segments();
    // Something is accepted before the manifest is read.
    let mut damaged = owner.clone();
    damaged[40] ^= 1;
    bucket.put(".cvm/owner", &damaged);
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &[".cvm/owner"]);
    bucket.put(".cvm/owner", &owner);
    bucket.delete(segments.last().expect("there is a history"));
    accept_older(&machine);
    refuses_to_start(&machine, &["end of the manifest is missing"]);
}

#[test]
fn objects_without_their_manifest_are_not_adopted_by_who_knows_of_one() {
    let cloud = Cloud::new();
    let machine = history(&cloud);
    let good = all(&cloud.garage);
    let bucket = cloud.judge();
    let ours = bucket.key(".cvm");
    let volume = machine;
    let without = |what: &str| {
        put_back(&cloud.garage, &good);
        for key in good.keys().filter(|k| k.starts_with(what)) {
            cloud.garage.delete_raw(key);
        }
    };
    // Everything of ours: the volume knows, and so does the operator.
    without(&ours);
    let machine = volume.again(|b| b);
    refuses_to_start(&machine, &["nothing of what this volume has written"]);
    drop(machine);
    let machine = cloud.machine().environment("STATE_ANCHOR", &format!("1:{}", "a".repeat(64))).start();
    refuses_to_start(&machine, &["STATE_ANCHOR"]);
    drop(machine);
    // Only the manifest: the owner's record says that there was one.
    without(&bucket.key(".cvm/manifest"));
    let before = all(&cloud.garage);
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &["manifest is gone", "cvm storage adopt"]);
    assert_eq!(before, all(&cloud.garage));
    command_is_refused(&machine, &["accept-older", "--yes"], "not decided by this");
    adopt(&machine);
    machine.service_in("gateway", &["ready"]);
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    drop(machine);
    // Nothing is known to anybody: only the operator can say whose it is.
    without(&ours);
    let before = all(&cloud.garage);
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &["no manifest", "cvm storage adopt", "S3_ADOPT=1"]);
    assert_eq!(before, all(&cloud.garage));
    adopt(&machine);
    machine.service_in("gateway", &["ready"]);
    machine.line("The bucket has no manifest");
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    drop(machine);
    // Or whoever has written the environment, as often as it is read.
    without(&ours);
    let machine = cloud.machine().environment("S3_ADOPT", "1").ready();
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    machine.line("Open door: S3_ADOPT=1: a bucket that nobody can check is taken over");
}
