//! A manifest that is older, of another prefix, changed, or without its end.

use crate::fixtures::bucket::{all, put_back};
use crate::fixtures::files::{content, read, write};
use crate::fixtures::machines::{
    accept_older, adopt, anchor, command_is_refused, history, incidents, of_another, refuses_to_start,
    volumes_set_aside,
};
use cvm_harness::evidence::contains;
use cvm_harness::judge::PREFIX;
use cvm_harness::machine::{MASTER_KEY, PATIENCE};
use cvm_harness::tools::python;
use cvm_harness::{
    Cloud, Fault, Garage, Judge, Machine, Rule, flush, independent, restore_by_hand, storage, until,
};

/// A bucket, and a machine that has pushed one file to it and does not need the mount any more.
fn with_one_file() -> (Cloud, Machine) {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    write(&machine, &["openclaw/workspace/one"], "words");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    (cloud, machine)
}

#[test]
fn a_bucket_that_was_rolled_back_is_refused_by_who_knows_better() {
    let (cloud, machine) = with_one_file();
    let early = all(&cloud.garage);
    let earlier = anchor(&machine);
    write(&machine, &["openclaw/workspace/two"], "words");
    flush(&machine);
    let later = anchor(&machine);
    assert_ne!(earlier, later);
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    // Only the newest segments go; the record of the owner stays.
    let now = all(&cloud.garage);
    let bucket = cloud.judge();
    let segments = bucket.segments();
    let old: Vec<String> = segments.iter().filter(|s| early.contains_key(&bucket.key(s))).cloned().collect();
    for segment in segments.iter().filter(|s| !old.contains(s)) {
        bucket.delete(segment);
    }
    // The same volume knows its own generation.
    let machine = machine.again(|b| b);
    refuses_to_start(&machine, &["older than this volume", "cvm storage accept-older"]);
    drop(machine);
    // Without a volume, the operator's anchor knows.
    let machine = cloud.machine().environment("STATE_ANCHOR", &later).start();
    refuses_to_start(&machine, &["STATE_ANCHOR"]);
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
    drop(machine);
    // As it was, both anchors are good: it is neither older than the one nor than the other.
    put_back(&cloud.garage, &now);
    for anchor in [&later, &earlier] {
        let mut machine = cloud.machine().environment("STATE_ANCHOR", anchor).ready();
        independent(&machine);
        assert!(read(&machine, "openclaw/workspace/two").is_some());
        assert_eq!(machine.stop(), 0);
    }
    // Another history of the same length is none.
    for part in [1, 2] {
        let machine = cloud.machine().environment("STATE_ANCHOR", &of_another(&later, part)).start();
        refuses_to_start(&machine, &["STATE_ANCHOR"]);
    }
    // Those of older versions have no third part.
    for (anchor, is_good) in [(later.clone(), true), (of_another(&later, 1), false)] {
        let (old, _) = anchor.rsplit_once(':').expect("an anchor has three parts");
        let machine = cloud.machine().environment("STATE_ANCHOR", old).start();
        if is_good {
            machine.service_in("gateway", &["ready"]);
        } else {
            refuses_to_start(&machine, &["STATE_ANCHOR"]);
        }
    }
}

/// The same bucket under another prefix, as somebody can have it who has no key.
fn copy_to(garage: &Garage, prefix: &str) {
    for (key, _) in garage.objects(&format!("{PREFIX}/")) {
        let object = garage.object(&key).expect("it is listed");
        garage.put_object(&key.replacen(PREFIX, prefix, 1), &object);
    }
}

#[test]
fn a_prefix_is_not_served_as_another_of_the_same_key() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let other = "other-data";
    copy_to(&cloud.garage, other);
    let elsewhere = || cloud.machine().environment("S3_PREFIX", other);
    let machine = elsewhere().start();
    refuses_to_start(&machine, &["ownership record", "S3_PREFIX=openclaw-data"]);
    for verb in ["adopt", "accept-older"] {
        command_is_refused(&machine, &[verb, "--yes"], "not decided by this");
    }
    drop(machine);
    // Nor without the record, when nobody renews it; and no word of the environment's helps.
    let record = cloud.judge().key(".cvm/owner").replacen(PREFIX, other, 1);
    cloud.garage.delete_raw(&record);
    let machine = elsewhere().environment("S3_ADOPT", "1").start();
    refuses_to_start(&machine, &["the manifest in the bucket", "S3_PREFIX=openclaw-data"]);
    drop(machine);
    let said =
        restore_by_hand(&cloud, &cloud.machine().ready(), &["env", &format!("S3_PREFIX={other}")], "/tmp/w");
    assert!(!said.status.success() && contains(&said.stderr, "S3_PREFIX=openclaw-data"), "{said:?}");
}

/// What an older version has left: nothing of it says of which prefix it is.
fn as_an_older_version_left_it(bucket: &Judge<'_>) {
    const PROGRAM: &str = "
import gzip, hashlib, hmac, json, os, sys
top, master = sys.argv[1:]
mac = lambda key, text: hmac.new(key, text, hashlib.sha256).digest()
key = mac(mac(bytes(32), master.encode()), b'openclaw-cvm-manifest-v1\\x01')
def tag(purpose, *parts):
    return mac(key, purpose + b''.join(len(p).to_bytes(8, 'little') + p for p in parts)).hex()
dense = lambda value: json.dumps(value, separators=(',', ':')).encode()
for name in os.listdir(top + '/manifest'):
    path = top + '/manifest/' + name
    header, lines = gzip.decompress(open(path, 'rb').read().split(b'\\n', 1)[1]).split(b'\\n', 1)
    header = json.loads(header)
    del header['prefix'], header['state']
    packed = gzip.compress(dense(header) + b'\\n' + lines)
    open(path, 'wb').write(b'openclaw-cvm-manifest 1 ' + tag(b'segment', packed).encode() + b'\\n' + packed)
record = json.load(open(top + '/owner'))['record']
del record['prefix'], record['mark']
open(top + '/owner', 'wb').write(dense({'record': record, 'tag': tag(b'owner', dense(record))}))
";
    let dir = tempfile::tempdir().expect("a temporary directory");
    let top = dir.path().join("cvm").display().to_string();
    bucket.ok(&["copy", "crypt:.cvm", &top]);
    python(PROGRAM, &[&top, MASTER_KEY]);
    bucket.ok(&["copy", "--ignore-times", &top, "crypt:.cvm"]);
}

#[test]
fn a_manifest_that_does_not_say_of_which_prefix_it_is_is_written_anew_and_no_other_is_taken_then() {
    let cloud = Cloud::new();
    let mut volume = history(&cloud).again(|b| b);
    volume.service_in("gateway", &["ready"]);
    let anchor = anchor(&volume);
    assert_eq!(volume.stop(), 0, "{}", volume.output());
    let bucket = cloud.judge();
    let is_bound = || {
        let segments = bucket.segments();
        let says = |name: &String| {
            bucket.ok(&["cat", &format!("crypt:{name}")]).starts_with(b"openclaw-cvm-manifest 2 ")
        };
        !segments.is_empty() && segments.iter().all(says)
    };
    assert!(is_bound());
    as_an_older_version_left_it(&bucket);
    let old = all(&cloud.garage);
    assert!(!is_bound());
    copy_to(&cloud.garage, "other-data");
    // This volume has seen it say so, and who has a new anchor has.
    let mut volume = volume.again(|b| b);
    refuses_to_start(&volume, &["this volume knows a newer one"]);
    volume.destroy();
    refuses_to_start(
        &cloud.machine().environment("STATE_ANCHOR", &anchor).start(),
        &["STATE_ANCHOR is of a newer one"],
    );
    // A new machine has only the operator to ask: nothing tells it from that of another prefix.
    let elsewhere = cloud.machine().environment("S3_PREFIX", "other-data").start();
    refuses_to_start(&elsewhere, &["does not say of which S3_PREFIX it is", "cvm storage adopt"]);
    adopt(&elsewhere);
    elsewhere.service_in("gateway", &["ready"]);
    assert!(read(&elsewhere, "openclaw/workspace/1").is_some());
    drop(elsewhere);
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &["cvm storage adopt"]);
    adopt(&machine);
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    assert!(is_bound() && storage(&machine)["state"].is_string(), "{:#}", storage(&machine));
    assert_eq!(anchor_parts(&machine), 3);
    drop(machine);
    // A volume that an older version has left does not ask.
    put_back(&cloud.garage, &old);
    let index = volume.data().join(".cvm/storage/index");
    let index = rusqlite::Connection::open(index).expect("the index is a database");
    index.execute("DELETE FROM meta WHERE name IN ('state', 'another')", []).expect("it is not held");
    drop(index);
    let volume = volume.again(|b| b);
    volume.service_in("gateway", &["ready"]);
    assert_eq!(volumes_set_aside(&volume), 0);
    flush(&volume);
    assert!(is_bound());
    assert_eq!(anchor_parts(&volume), 3);
    let mut volume = volume;
    assert_eq!(volume.stop(), 0, "{}", volume.output());
    let machine = cloud.machine().ready();
    independent(&machine);
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

fn anchor_parts(machine: &Machine) -> usize {
    anchor(machine).split(':').count()
}

#[test]
fn a_write_that_was_given_up_and_arrives_late_changes_nothing() {
    let (cloud, machine) = with_one_file();
    let bucket = cloud.judge();
    let segment = bucket.key(&bucket.segments()[0]);
    let manifest = segment.rsplit_once('/').expect("it is in a directory").0;
    cloud.proxy.clear_log();
    cloud.proxy.add(Rule::new(Fault::Late).method("PUT").path(manifest).times(1));
    let kept = || cloud.proxy.log().into_iter().find(|entry| entry.fault == Some(Fault::Late));
    write(&machine, &["openclaw/workspace/two"], "other words");
    until("a segment is lost on its way", PATIENCE, kept);
    // What is written in its place is not the same.
    for name in ["two", "three", "four"] {
        write(&machine, &[&format!("openclaw/workspace/{name}")], "words");
        until("it is in the bucket in spite of all", PATIENCE, || {
            machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
        });
    }
    assert_eq!(kept().expect("a segment was written").status, None);
    cloud.proxy.heal();
    until("it has arrived", PATIENCE, || kept().is_some_and(|e| e.status == Some(200)).then_some(()));
    drop(machine);
    let machine = cloud.machine().ready();
    for name in ["one", "two", "three", "four"] {
        let path = format!("openclaw/workspace/{name}");
        until("it is fetched", PATIENCE, || {
            (read(&machine, &path)? == content(&path, "words")).then_some(())
        });
    }
    assert!(incidents(&machine).is_empty(), "{:?}", incidents(&machine));
}

#[test]
fn a_manifest_without_its_end_is_refused_by_a_machine_that_knows_nothing() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let bucket = cloud.judge();
    let segments = bucket.segments();
    bucket.delete(segments.last().expect("there is a history"));
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &["end of the manifest is missing", "cvm storage accept-older"]);
    // Nor does a restore by hand call what there is all there was.
    let restore = |before: &[&str]| restore_by_hand(&cloud, &machine, before, "/tmp/whole");
    for _ in 0..2 {
        let said = restore(&[]);
        let words = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.status.success(), "{words}");
        let told = "end of the manifest is missing";
        assert!(words.contains(told) && words.contains("cvm storage restore --accept"), "{words}");
    }
    let said = restore(&["sh", "-c", "exec \"$@\" --accept", "sh"]);
    let words = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.success() && words.contains("is missing"), "{words}");
    assert!(machine.path("/tmp/whole/openclaw").is_dir());
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
}

/// Something that is done to the bucket behind everybody's back.
type Attack<'a> = &'a dyn Fn(&Judge<'_>);

#[test]
fn a_manifest_that_was_tampered_with_is_refused_until_the_operator_accepts() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let good = all(&cloud.garage);
    let bucket = cloud.judge();
    let segments = bucket.segments();
    assert!(segments.len() > 5, "{segments:?}");
    let middle = segments.len() / 2;
    let forge = |bucket: &Judge<'_>| {
        let mut bytes = bucket.get(&segments[middle]);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        bucket.put(&segments[middle], &bytes);
    };
    let swap = |bucket: &Judge<'_>| {
        let (a, b) = (bucket.get(&segments[middle]), bucket.get(&segments[middle + 1]));
        bucket.put(&segments[middle], &b);
        bucket.put(&segments[middle + 1], &a);
    };
    let hole = |bucket: &Judge<'_>| bucket.delete(&segments[middle]);
    let first = |bucket: &Judge<'_>| bucket.delete(&segments[0]);
    let attacks: [(&str, Attack<'_>, &str); 4] = [
        ("forged", &forge, "does not decrypt"),
        ("swapped", &swap, "swapped"),
        ("with a hole", &hole, "gap"),
        ("without a beginning", &first, "gap"),
    ];
    for (name, attack, words) in attacks {
        put_back(&cloud.garage, &good);
        attack(&bucket);
        let machine = cloud.machine().start();
        refuses_to_start(&machine, &[words]);
        accept_older(&machine);
        machine.service_in("gateway", &["ready"]);
        write(&machine, &["openclaw/workspace/after"], name);
        flush(&machine);
        let mut machine = machine;
        assert_eq!(machine.stop(), 0);
        // What was accepted is a history like any other.
        let mut machine = cloud.machine().ready();
        independent(&machine);
        assert_eq!(
            read(&machine, "openclaw/workspace/after"),
            Some(content("openclaw/workspace/after", name))
        );
        assert_eq!(machine.stop(), 0);
    }
}
