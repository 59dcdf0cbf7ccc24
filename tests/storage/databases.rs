//! Databases that are written to, replaced, locked, damaged or only begun.

use crate::fixtures::TURNS;
use crate::fixtures::machines::{give_to_gateway, logs, no_incidents, not_all_there};
use crate::fixtures::programs::{Running, committed, entries, now_us, number};
use cvm_harness::machine::PATIENCE;
use cvm_harness::sqlite::examine_bytes;
use cvm_harness::{Cloud, Judge, Machine, flush, rounds, storage, until};
use cvm_protocol::accounts::GATEWAY_ID;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

#[track_caller]
fn in_the_bucket(rclone: &Judge<'_>, path: &str) -> i64 {
    examine_bytes(&rclone.ok(&["cat", &format!("crypt:{path}")]))
        .unwrap_or_else(|why| panic!("{path}: {why}"))
}

#[test]
fn every_database_in_the_bucket_opens_at_any_moment_and_has_what_was_flushed() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let outside = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(outside.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))
        .expect("it is ours");
    let machine = cloud.machine().bind(outside.path(), "/outside").ready();
    give_to_gateway(&machine, "/data/openclaw/agents/deep/er");
    let modes = ["wal", "delete", "truncate", "persist"];
    let place = |mode: &str| format!("openclaw/agents/deep/er/{mode} base.bin");
    let mut writers = Vec::new();
    for (index, mode) in modes.iter().chain(&modes[..2]).enumerate() {
        let (db, log) = (format!("/data/{}", place(mode)), format!("/outside/{mode}"));
        let every = (50 + index * 10).to_string();
        writers.push(Running::as_agent(&machine, &["cvm-victim", "rows", &db, mode, &every, &log]));
    }
    let log = |mode: &str| outside.path().join(mode);
    until("all of them write", PATIENCE, || {
        modes.iter().all(|mode| committed(&log(mode), i64::MAX) > 3).then_some(())
    });
    let rclone = cloud.judge();
    flush(&machine);
    for _ in 0..rounds(4, 60) {
        let before = now_us();
        flush(&machine);
        for mode in modes {
            let (rows, promised) = (in_the_bucket(&rclone, &place(mode)), committed(&log(mode), before));
            assert!(rows >= promised, "{mode}: {rows} rows, {promised} were committed before the flush");
        }
        // And while nobody asks.
        let got = machine.exec(&["cvm", "storage", "get", &place("wal")]);
        assert!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
        examine_bytes(&got.stdout).expect("what is fetched is whole");
        for mode in modes {
            in_the_bucket(&rclone, &place(mode));
        }
    }
    let listed = rclone.names("");
    let logs_of_databases: Vec<_> =
        listed.iter().filter(|n| ["-wal", "-shm", "-journal"].iter().any(|s| n.ends_with(s))).collect();
    assert_eq!(logs_of_databases, Vec::<&String>::new());
    for entry in fs::read_dir(machine.path("/data/openclaw/agents/deep/er")).expect("it is there").flatten() {
        if let Ok(stat) = entry.metadata() {
            assert_eq!(stat.uid(), GATEWAY_ID, "{} belongs to somebody else", entry.path().display());
        }
    }
    for mode in modes {
        let all = entries(&log(mode));
        let slowest = all.iter().filter(|(_, w)| w[0] == "end").map(|(_, w)| number(&w[2])).max();
        eprintln!(
            "{mode}: {} rows, the slowest commit took {} ms",
            committed(&log(mode), i64::MAX),
            slowest.unwrap_or(0) / 1000
        );
        assert!(all.iter().all(|(_, w)| w[0] != "error"), "{mode}: a writer was kept out for 20 s");
    }
    no_incidents(&machine);
}

const MAKE: &str = "CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, w TEXT, sum INTEGER)";
const ROW: &str = "INSERT INTO t VALUES ((SELECT coalesce(max(n), 0) + 1 FROM t), 'x', 5)";

/// Where the gateway may make them, and who looks at them in the bucket.
fn machine_for_databases(cloud: &Cloud) -> (Machine, Judge<'_>) {
    let machine = cloud.machine().ready();
    give_to_gateway(&machine, "/data/openclaw/x");
    (machine, cloud.judge())
}

fn place(name: &str) -> String {
    format!("/data/openclaw/x/{name}")
}

/// In a database of the bucket that is whole.
fn rows(rclone: &Judge<'_>, name: &str) -> i64 {
    let bytes = rclone.ok(&["cat", &format!("crypt:openclaw/x/{name}")]);
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("it has room");
    let db = rusqlite::Connection::open(file.path()).expect("it opens");
    let check = db.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0));
    assert_eq!(check.as_deref(), Ok("ok"));
    db.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).expect("the table is there")
}

#[test]
fn what_can_happen_to_a_database_happens_in_the_bucket_too() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let (machine, rclone) = machine_for_databases(&cloud);
    let (make, row) = (MAKE, ROW);
    let rows = |name: &str| rows(&rclone, name);
    // Written once, never checkpointed, never closed; and one whose transaction stays open.
    let quiet = format!("PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; {make}; {row}; {row};");
    let mut held = Running::as_agent(&machine, &["cvm-victim", "sql", &place("quiet"), &quiet]);
    held.says("done");
    let mut open = Running::as_agent(
        &machine,
        &[
            "cvm-victim",
            "sql",
            &place("open"),
            &format!("PRAGMA journal_mode=wal; {make}; {row}; BEGIN; {row};"),
        ],
    );
    open.says("done");
    let look = |name: &str| {
        let m = fs::metadata(machine.path(&place(name))).expect("it is there");
        (m.len(), m.mtime(), m.mtime_nsec())
    };
    let before = (look("quiet"), look("quiet-wal"));
    flush(&machine);
    flush(&machine);
    assert_eq!((rows("quiet"), rows("open")), (2, 1));
    assert_eq!((look("quiet"), look("quiet-wal")), before, "a snapshot must not write a writer's log back");

    // Locked: everything else goes on, and it is pushed when it is free again.
    let exclusive = format!("{make}; {row}; PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; {row};");
    let mut locked = Running::as_agent(&machine, &["cvm-victim", "sql", &place("locked"), &exclusive]);
    locked.says("done");
    machine.ok(&["sh", "-c", "echo goes on > /data/openclaw/x/beside"]);
    until("a file goes up beside a locked database", PATIENCE, || {
        rclone.names("").contains("openclaw/x/beside").then_some(())
    });
    machine.ok(&["rm", "/data/openclaw/x/beside"]);
    until("and goes", PATIENCE, || (!rclone.names("").contains("openclaw/x/beside")).then_some(()));
    not_all_there(&machine, &["openclaw/x/locked"]);
    // Longer than between any two tries.
    until("its age is that of its change", PATIENCE, || {
        storage(&machine)["oldest_unreplicated_ms"].as_u64().filter(|ms| *ms > 12_500).map(drop)
    });
    drop(locked);
    until("it is pushed when it is free", PATIENCE, || {
        rclone.names("").contains("openclaw/x/locked").then_some(())
    });
    flush(&machine);
    assert_eq!(rows("locked"), 1);

    // Replaced by another one.
    let replace = format!("cp {0} {1}.new && mv {1}.new {1}", place("locked"), place("replaced"));
    machine.ok(&["sh", "-c", &replace]);
    flush(&machine);
    assert_eq!(rows("replaced"), 1);

    // Damaged in place, in its middle and at its head; repaired; deleted.
    for (name, from) in [("locked", "4096"), ("replaced", "0")] {
        let good = fs::read(machine.path(&place(name))).expect("it is there");
        machine.ok(&[
            "sh",
            "-c",
            &format!(
                "yes bad | head -c 4096 | dd of={} bs=1 seek={from} conv=notrunc status=none",
                place(name)
            ),
        ]);
        until("it is an incident", PATIENCE, || {
            let all = storage(&machine)["incidents"].as_array().cloned().unwrap_or_default();
            all.iter().any(|i| i["path"] == format!("openclaw/x/{name}")).then_some(())
        });
        machine.ok(&["sh", "-c", "echo more > /data/elsewhere"]);
        not_all_there(&machine, &[name, "damaged"]);
        assert_eq!(storage(&machine)["incidents"].as_array().map(Vec::len), Some(1), "{}", logs(&machine));
        assert_eq!(rows(name), 1, "the bucket keeps the last good one");
        fs::write(machine.path(&place(name)), good).expect("it can be repaired");
        until("the incident is over", PATIENCE, || {
            (storage(&machine)["incidents"].as_array().map(Vec::len) == Some(0)).then_some(())
        });
    }
    // What is no database takes the name of one.
    machine.ok(&["sh", "-ec", &format!("echo text > {0}.new; mv {0}.new {0}", place("locked"))]);
    flush(&machine);
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/x/locked"]), b"text\n");
    machine.ok(&["rm", &place("replaced")]);
    until("it is gone", PATIENCE, || (!rclone.names("").contains("openclaw/x/replaced")).then_some(()));
}

#[test]
fn a_database_that_is_exchanged_or_only_begun_is_never_half_in_the_bucket() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let (machine, rclone) = machine_for_databases(&cloud);
    let (make, row) = (MAKE, ROW);
    let rows = |name: &str| rows(&rclone, name);
    let first = format!("PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; {make}; {row};");
    let mut before = Running::as_agent(&machine, &["cvm-victim", "sql", &place("exchanged"), &first]);
    before.says("done");
    flush(&machine);
    assert_eq!(rows("exchanged"), 1);
    let other = format!("{make}; {row}; {row}; {row};");
    Running::as_agent(&machine, &["cvm-victim", "sql", &place("other"), &other]).says("done");
    machine.ok(&["mv", &place("other"), &place("exchanged")]);
    drop(before);
    machine.ok(&["rm", "-f", &place("exchanged-wal"), &place("exchanged-shm")]);
    flush(&machine);
    assert_eq!(rows("exchanged"), 3);
    assert!(!rclone.names("").contains("openclaw/x/other"));

    // Being created, by somebody who takes his time: all there is of it is in its journal.
    let slowly = format!("PRAGMA journal_mode=delete; PRAGMA cache_size=1; BEGIN IMMEDIATE; {make}; {row};");
    let mut creating = Running::as_agent(&machine, &["cvm-victim", "sql", &place("slow"), &slowly]);
    creating.says("done");
    assert!(machine.path(&place("slow-journal")).exists(), "it is in the middle of it");
    machine.ok(&["sh", "-c", "echo goes on > /data/openclaw/x/beside"]);
    until("a file goes up beside it", PATIENCE, || {
        rclone.names("").contains("openclaw/x/beside").then_some(())
    });
    let of_it: Vec<String> = rclone.names("").into_iter().filter(|name| name.contains("/slow")).collect();
    for name in of_it {
        assert_eq!(name, "openclaw/x/slow");
        assert_eq!(rclone.ok(&["cat", &format!("crypt:{name}")]), b"", "nothing is committed yet");
    }
    drop(creating);
    let done = format!("{make}; {row};");
    Running::as_agent(&machine, &["cvm-victim", "sql", &place("slow"), &done]).says("done");
    flush(&machine);
    assert_eq!(rows("slow"), 1);
}
