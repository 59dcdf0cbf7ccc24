//! Objects that somebody has changed, swapped, set back or deleted: noticed, named, and not served.

use crate::fixtures::bucket::{BLOCK, HEADER, all};
use crate::fixtures::files::{PLACES, content, read, write};
use crate::fixtures::machines::{
    command_is_refused, decide, gateway_runs, incidents, refuses_to_start, volumes_set_aside,
};
use crate::fixtures::programs::commit;
use cvm_harness::evidence::contains;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Judge, Machine, Mode, Rule, flush, independent, storage, until};
use std::collections::BTreeMap;
use std::time::Duration;

const ATTACKED: [&str; 10] =
    ["swap1", "swap2", "cut", "cut-header", "cut-short", "cut-empty", "gone", "old", "flip", "flip-first"];

fn attack(bucket: &Judge<'_>, place: &str, old: &[u8]) {
    let at = |name: &str| format!("{place}/{name}");
    let (one, two) = (bucket.get(&at("swap1")), bucket.get(&at("swap2")));
    bucket.put(&at("swap1"), &two);
    bucket.put(&at("swap2"), &one);
    for (name, length) in
        [("cut", HEADER + BLOCK), ("cut-header", HEADER), ("cut-short", 10), ("cut-empty", 0)]
    {
        let mut bytes = bucket.get(&at(name));
        bytes.truncate(length);
        bucket.put(&at(name), &bytes);
    }
    bucket.delete(&at("gone"));
    bucket.put(&at("old"), old);
    for (name, offset) in [("flip", HEADER + BLOCK + 500), ("flip-first", HEADER + 40)] {
        let mut bytes = bucket.get(&at(name));
        bytes[offset] ^= 1;
        bucket.put(&at(name), &bytes);
    }
}

fn objects_are_checked(mode: Mode) {
    let cloud = Cloud::new();
    let mut machine = mode.start(&cloud);
    let bucket = cloud.judge();
    let names: Vec<String> = PLACES
        .iter()
        .flat_map(|p| ATTACKED.iter().chain(&["good"]).map(move |n| format!("{p}/{n}")))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    write(&machine, &names, "first");
    write(&machine, &["openclaw/workspace/removed"], "first");
    flush(&machine);
    let old = PLACES.map(|p| bucket.get(&format!("{p}/old")));
    let removed = bucket.key("openclaw/workspace/removed");
    let removed_object = cloud.garage.object(&removed).expect("it was pushed");
    write(&machine, &PLACES.map(|p| format!("{p}/old")).each_ref().map(String::as_str), "second");
    std::fs::remove_file(machine.path("/data/openclaw/workspace/removed")).expect("it was there");
    flush(&machine);
    independent(&machine);
    until("its object is deleted", PATIENCE, || cloud.garage.object(&removed).is_none().then_some(()));
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let good = all(&cloud.garage);
    for (place, old) in PLACES.iter().zip(&old) {
        attack(&bucket, place, old);
    }
    cloud.garage.put_object(&removed, &removed_object);

    // Without what the gateway reads while it starts it does not: it would make it anew.
    let machine = mode.of(cloud.machine()).start();
    let [vital, ordinary] = PLACES;
    let of = |place: &str, names: &[&str]| -> Vec<String> {
        let mut paths: Vec<String> = names.iter().map(|n| format!("{place}/{n}")).collect();
        paths.sort();
        paths
    };
    refuses_to_start(&machine, &["10 files that the gateway reads while it starts", "cvm storage status"]);
    // In sync mode all has been looked at by then.
    let mut told = incidents(&machine);
    told.retain(|path| path.starts_with(vital));
    assert_eq!(told, of(vital, &ATTACKED));
    for name in ["flip", "gone"] {
        let key = bucket.key(&format!("{vital}/{name}"));
        cloud.garage.put_raw(&key, &good[&key]);
    }
    machine.ok(&["cvm", "restart", "storage", "--no-wait"]);
    refuses_to_start(&machine, &["8 files that the gateway reads while it starts", "cvm storage forget"]);
    command_is_refused(&machine, &["accept-older", "--yes"], "not decided by this");
    command_is_refused(
        &machine,
        &["forget", "--yes", "openclaw/elsewhere"],
        "no incident names openclaw/elsewhere",
    );
    let mut lost = told.clone();
    lost.retain(|path| !path.ends_with("/flip") && !path.ends_with("/gone"));
    // Only these go: one that is not given up keeps the gateway from starting.
    let kept_back = lost.pop().expect("eight files");
    decide(&machine, "forget", &lost);
    refuses_to_start(&machine, &["1 files that the gateway reads while it starts"]);
    decide(&machine, "forget", &[kept_back]);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(volumes_set_aside(&machine), 0, "a try that failed is no other owner");
    for name in ATTACKED {
        let path = format!("{vital}/{name}");
        let right = ["flip", "gone"].contains(&name).then(|| content(&path, "first"));
        assert_eq!(read(&machine, &path), right, "{path} when the gateway started");
    }
    let expected = of(ordinary, &ATTACKED);
    ordinary_objects_are_incidents(&cloud, &machine, &good, &expected);
}

#[test]
fn what_is_written_on_top_of_an_older_version_is_pushed_and_an_incident_until_somebody_looks() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    let bucket = cloud.judge();
    let place = "openclaw/workspace";
    let paths = ["appended", "rewritten", "replaced", "fine"].map(|name| format!("{place}/{name}"));
    write(&machine, &paths.each_ref().map(String::as_str), "first");
    machine.ok(&[
        "sh",
        "-ec",
        &format!(
            "mkdir /data/{place}/small; cd /data/{place}/small; for n in $(seq 300); do echo $n > $n; done"
        ),
    ]);
    flush(&machine);
    let old = paths.each_ref().map(|path| bucket.get(path));
    // The largest come up last.
    let long = |path: &str| content(path, "second").repeat(4);
    for path in &paths {
        std::fs::write(machine.path(&format!("/data/{path}")), long(path)).expect("it is there");
    }
    // And one is a stub above, before its data is.
    machine.ok(&["chmod", "751", &format!("/data/{}", paths[1])]);
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    for (path, old) in paths.iter().zip(&old).take(3) {
        bucket.put(path, old);
    }
    cloud.proxy.latency(Duration::from_millis(300));
    let mut machine = cloud.machine().ready();
    machine.ok(&[
        "sh",
        "-ec",
        "cd /data/openclaw/workspace; echo more >> appended; echo new > rewritten; echo more >> fine;
         echo new > other; mv other replaced",
    ]);
    assert_ne!(storage(&machine)["independent"], true, "it was written to before it was fetched");
    cloud.proxy.heal();
    // The second might be built on what was there: nobody can tell. The third is not.
    let tainted = paths[..2].to_vec();
    until("both are incidents", PATIENCE, || (incidents(&machine) == tainted).then_some(()));
    flush(&machine);
    independent(&machine);
    let content_of = |path: &str| bucket.ok(&["cat", &format!("crypt:{path}")]);
    // Whatever the kernel has made of what was there.
    let appended = read(&machine, &paths[0]).expect("it is there");
    assert!(appended.starts_with(&content(&paths[0], "first")) && appended.ends_with(b"more\n"));
    let fine = [&long(&paths[3])[..], b"more\n"].concat();
    for (path, wanted) in paths.iter().zip([&appended[..], b"new\n", b"new\n", &fine]) {
        let found = content_of(path);
        assert!(found == wanted, "{path} in the bucket has {} bytes, not {}", found.len(), wanted.len());
    }
    let told = machine.exec(&["cvm", "storage", "status"]).stdout;
    assert!(contains(&told, "may be built on that"), "{}", String::from_utf8_lossy(&told));
    // Neither another version nor another worker makes that forgotten.
    machine.ok(&["sh", "-c", "echo again >> /data/openclaw/workspace/appended"]);
    flush(&machine);
    machine.ok(&["cvm", "restart", "storage"]);
    flush(&machine);
    assert_eq!(incidents(&machine), tainted);
    command_is_refused(&machine, &["forget", "--yes", &tainted[0]], "the tree has");
    decide(&machine, "keep", &tainted[1..]);
    flush(&machine);
    assert_eq!(incidents(&machine), tainted[..1]);
    decide(&machine, "keep", &[format!("/data/{}", tainted[0])]);
    flush(&machine);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    let now = read(&machine, &paths[0]).expect("it is there");
    assert!(now == [&appended[..], b"again\n"].concat(), "it has {} bytes", now.len());
    assert_eq!(machine.stop(), 0, "{}", machine.output());
}

#[test]
fn what_was_written_on_top_of_an_older_version_is_noticed_in_the_other_mode_too() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    let bucket = cloud.judge();
    let path = "openclaw/workspace/appended";
    write(&machine, &[path], "first");
    machine.ok(&[
        "sh",
        "-ec",
        "mkdir /data/openclaw/small; cd /data/openclaw/small; for n in $(seq 300); do echo $n > $n; done",
    ]);
    flush(&machine);
    let old = bucket.get(path);
    write(&machine, &[path], "later");
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    bucket.put(path, &old);
    cloud.proxy.latency(Duration::from_millis(300));
    let mut machine = cloud.machine().ready();
    cloud.proxy.add(Rule::new(Fault::Hang).method("PUT"));
    machine.ok(&["sh", "-c", &format!("echo more >> /data/{path}")]);
    assert_eq!(incidents(&machine), Vec::<String>::new(), "nobody has come to it yet");
    machine.destroy();
    cloud.proxy.heal();
    let machine = machine.again(|builder| Mode::Sync.of(builder));
    machine.service_in("gateway", &["ready"]);
    until("it is an incident", PATIENCE, || (incidents(&machine) == [path]).then_some(()));
    assert!(read(&machine, path).is_some_and(|bytes| bytes.ends_with(b"more\n")));
    flush(&machine);
    assert_eq!(incidents(&machine), [path]);
    gives_the_bucket_away(&cloud, machine);
}

/// Beside a gateway that runs.
fn ordinary_objects_are_incidents(
    cloud: &Cloud,
    machine: &Machine,
    good: &BTreeMap<String, Vec<u8>>,
    expected: &[String],
) {
    let bucket = cloud.judge();
    until("all is detected", PATIENCE, || (incidents(machine).len() >= expected.len()).then_some(()));
    assert_eq!(incidents(machine), expected);
    for path in expected {
        assert_eq!(read(machine, path), None, "{path} is served");
        until(&format!("the worker's log names {path}"), PATIENCE, || {
            let incident = format!("incident: {path}: ");
            machine.read("/var/log/openclaw-cvm/storage.log").contains(&incident).then_some(())
        });
        assert!(!machine.output().contains(path.as_str()), "{path} is incident in the public log");
    }
    assert_eq!(read(machine, "openclaw/workspace/removed"), None, "what was deleted is back");
    for place in PLACES {
        let path = format!("{place}/good");
        assert_eq!(read(machine, &path), Some(content(&path, "first")));
    }
    // What is bad and not given up has not been deleted, and nothing was taken for a deletion.
    independent(machine);
    flush(machine);
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw"]);
    for path in expected {
        assert!(listed.contains(path.as_str()), "{path} was taken for a deletion:\n{listed}");
    }
    for (key, bytes) in good {
        let ours = [bucket.key(".cvm"), bucket.key(PLACES[0])];
        assert!(
            cloud.garage.get_raw(key).is_some()
                || ours.iter().any(|k| key.starts_with(k))
                || bytes.is_empty()
                || key == &bucket.key("openclaw/workspace/gone"),
            "{key} was deleted"
        );
    }
    // What is put right comes back when the storage starts again.
    let key = bucket.key("openclaw/workspace/flip");
    cloud.garage.put_raw(&key, &good[&key]);
    machine.ok(&["cvm", "restart", "storage"]);
    until("what was put right is back", PATIENCE, || {
        let path = "openclaw/workspace/flip";
        (read(machine, path) == Some(content(path, "first"))).then_some(())
    });
    flush(machine);
    until("the rest is still known", PATIENCE, || {
        (incidents(machine).len() == expected.len() - 1).then_some(())
    });
    let left = incidents(machine);
    command_is_refused(machine, &["keep", "--yes", &left[0]], "nothing to keep");
    let (some, others) = left.split_at(2);
    decide(machine, "forget", some);
    flush(machine);
    assert_eq!(incidents(machine), others, "only what was named is given up");
    decide(machine, "forget", others);
    flush(machine);
    assert_eq!(incidents(machine), Vec::<String>::new());
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw"]);
    assert!(
        !listed.contains("swap1") && listed.contains("workspace/good") && listed.contains("workspace/flip"),
        "{listed}"
    );
    assert!(gateway_runs(machine));
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn what_is_bad_in_the_bucket_does_not_become_good_by_being_moved() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    let bucket = cloud.judge();
    let at = |name: &str| format!("openclaw/workspace/{name}");
    let names = ["d/swap1", "d/swap2", "d/flip", "d/gone", "d/good", "d/sub/good"].map(at);
    write(&machine, &names.each_ref().map(String::as_str), "first");
    flush(&machine);
    independent(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    drop(machine);
    let (one, two) = (bucket.get(&at("d/swap1")), bucket.get(&at("d/swap2")));
    bucket.put(&at("d/swap1"), &two);
    bucket.put(&at("d/swap2"), &one);
    let mut bytes = bucket.get(&at("d/flip"));
    bytes[HEADER + 40] ^= 1;
    bucket.put(&at("d/flip"), &bytes);
    bucket.delete(&at("d/gone"));

    // Nobody has read them when they are moved.
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&bucket.key(&at("d"))));
    let machine = cloud.machine().ready();
    let there = |name: &str| machine.path(&format!("/data/{}", at(name)));
    std::fs::rename(there("d"), there("e")).expect("a directory may be moved");
    cloud.proxy.heal();
    let expected = ["d/flip", "d/gone", "d/swap1", "d/swap2"].map(at);
    until("all is detected", PATIENCE, || (incidents(&machine).len() >= expected.len()).then_some(()));
    independent(&machine);
    flush(&machine);
    assert_eq!(incidents(&machine), expected);
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw/workspace"]);
    for name in ["swap1", "swap2", "flip", "gone"] {
        assert_eq!(read(&machine, &at(&format!("e/{name}"))), None, "{name} is served");
        assert!(!listed.contains(&format!("e/{name}")), "{name} was taken for good:\n{listed}");
        assert!(listed.contains(&format!("d/{name}")), "{name} was taken for a deletion:\n{listed}");
    }
    for name in ["good", "sub/good"] {
        let is = content(&at(&format!("d/{name}")), "first");
        assert!(read(&machine, &at(&format!("e/{name}"))) == Some(is), "{name}");
        assert!(listed.contains(&format!("e/{name}")), "{listed}");
    }
    gives_the_bucket_away(&cloud, machine);
}

/// A stop has nothing to push: whatever incidents there are, the next machine does not wait.
fn gives_the_bucket_away(cloud: &Cloud, mut machine: Machine) {
    assert_ne!(incidents(&machine), Vec::<String>::new());
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let bucket = cloud.judge();
    let record = bucket.ok(&["cat", "crypt:.cvm/owner"]);
    assert!(contains(&record, r#""released":true"#), "{}", String::from_utf8_lossy(&record));
}

#[test]
fn a_changed_object_is_noticed_named_and_not_served_in_fuse_mode() {
    objects_are_checked(Mode::Fuse);
}

#[test]
fn a_changed_object_is_noticed_named_and_not_served_in_sync_mode() {
    objects_are_checked(Mode::Sync);
}

#[test]
fn the_tests_have_both_modes() {
    let cloud = Cloud::new();
    for (mode, name) in [(Mode::Fuse, "fuse"), (Mode::Sync, "sync")] {
        let mut machine = mode.start(&cloud);
        assert_eq!(storage(&machine)["mode"], name, "{}", machine.output());
        write(&machine, &["openclaw/workspace/a"], "words");
        assert_eq!(machine.stop(), 0);
    }
}

fn a_database_that_was_set_back_stops_the_start(mode: Mode) {
    let cloud = Cloud::new();
    let path = "openclaw/workspace/somewhere/own.sqlite";
    let mut machine = mode.start(&cloud);
    let file = format!("/data/{path}");
    std::fs::create_dir_all(machine.path("/data/openclaw/workspace/somewhere")).expect("a directory");
    commit(&machine, &file, "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    flush(&machine);
    let bucket = cloud.judge();
    let old = bucket.get(path);
    commit(&machine, &file, "INSERT INTO t VALUES (2)");
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    drop(machine);
    bucket.put(path, &old);
    let machine = mode.of(cloud.machine()).start();
    refuses_to_start(&machine, &["that the gateway reads while it starts", "cvm storage status"]);
    assert_eq!(incidents(&machine), [path]);
}

#[test]
fn a_database_that_was_set_back_keeps_the_gateway_from_starting_wherever_it_lies() {
    for mode in [Mode::Fuse, Mode::Sync] {
        a_database_that_was_set_back_stops_the_start(mode);
    }
}
