//! The worker and its stand-in are killed: before all is fetched, later, at any write, in an outage.
//!
//! `CVM_SOAK=1` makes more rounds. Moments are chosen by a seed.

use crate::fixtures::TURNS;
use crate::fixtures::load::Load;
use crate::fixtures::machines::{logs, no_incidents, tree};
use crate::fixtures::programs::now_us;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{
    Cloud, Dice, Fault, Judge, Machine, Mode, Rule, difference, digest, flush, independent, restore_by_hand,
    rounds, storage, until,
};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

/// Kills it and waits until it is another one.
fn kill(machine: &Machine, program: &str) {
    let Some(old) = machine.find(program) else { return };
    machine.kill(old.pid.into(), "KILL");
    until(&format!("{program} is dead"), PATIENCE, || {
        machine.processes().iter().all(|p| p.pid != old.pid || p.state == 'Z').then_some(())
    });
}

fn gateway(machine: &Machine) -> i64 {
    machine.service_in("gateway", &["ready"])["pid"].as_i64().expect("a running gateway has a pid")
}

/// Waits until the worker has a tree again, without its backoff.
#[track_caller]
fn worker_is_back(machine: &Machine) {
    until("the worker is up", PATIENCE, || {
        let state = machine.service("storage")["state"].clone();
        if state == "waiting" {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
        }
        (state == "up" || state == "ready").then_some(())
    });
    until("the worker has its tree", PATIENCE, || (storage(machine)["phase"] == "ready").then_some(()));
}

/// A state in the bucket with more files than are fetched before the gateway starts.
fn bucket_with_files(cloud: &Cloud, files: u32) -> Vec<String> {
    let mut machine = cloud.machine().ready();
    let script = format!(
        "mkdir -p /data/openclaw/workspace/many; cd /data/openclaw/workspace/many; for i in $(seq {files}); do echo $i > $i; done"
    );
    machine.ok(&["sh", "-c", &script]);
    flush(&machine);
    let before = tree(&machine);
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    before
}

#[test]
fn a_worker_killed_before_all_is_fetched_costs_the_gateway_a_restart_and_nothing_else() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let rounds = rounds(4, 30);
    let files = 100 * rounds;
    let before = bucket_with_files(&cloud, files);
    cloud.proxy.latency(Duration::from_millis(200));
    let mut dice = Dice(0xc0ff_ee00_0000_0002);
    let machine = cloud.machine().start();
    let mut killed = 0;
    for round in 0..rounds {
        let old = gateway(&machine);
        machine.ok(&["sh", "-c", &format!("echo {round} > /data/openclaw/workspace/new-{round}")]);
        dice.pause(Duration::from_millis(600));
        if storage(&machine)["independent"] == true {
            break;
        }
        kill(&machine, "cvm-storage");
        until("the gateway stands on another tree", PATIENCE, || {
            let gateway = machine.service("gateway");
            (gateway["state"] == "ready" && gateway["pid"] != old).then_some(())
        });
        killed += 1;
    }
    assert!(killed >= rounds / 2, "all was fetched after {killed} kills");
    cloud.proxy.heal();
    worker_is_back(&machine);
    independent(&machine);
    no_incidents(&machine);
    let many =
        |lines: Vec<String>| lines.into_iter().filter(|l| l.contains("workspace/many/")).collect::<Vec<_>>();
    assert_eq!(difference(&many(before), &many(tree(&machine))), "");
    flush(&machine);
    let rclone = cloud.judge();
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/workspace/new-0"]), b"0\n");
    assert_eq!(rclone.names("").iter().filter(|n| n.contains("/many/")).count(), files as usize);
}

#[test]
fn a_worker_killed_later_is_not_missed() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    drop(bucket_with_files(&cloud, 20));
    let outside = tempfile::tempdir().expect("a temporary directory");
    let mut dice = Dice(0xc0ff_ee00_0000_0003);
    let machine = cloud.machine().bind(outside.path(), "/outside").start();
    let pid = gateway(&machine);
    independent(&machine);
    let load = Load::start(&machine, 0, 7);
    for round in 0..rounds(8, 100) {
        dice.pause(Duration::from_millis(1500));
        kill(&machine, "cvm-storage");
        let file = format!("/data/openclaw/workspace/meanwhile-{round}");
        machine.ok(&[
            "sh",
            "-c",
            &format!(
                "echo {round} > {file}.part && mv {file}.part {file} && cat /data/openclaw/workspace/many/1"
            ),
        ]);
        assert_eq!(machine.service("gateway")["pid"], pid, "{}", logs(&machine));
        worker_is_back(&machine);
    }
    let began = now_us();
    flush(&machine);
    no_incidents(&machine);
    let rclone = cloud.judge();
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/workspace/meanwhile-1"]), b"1\n");
    let mut machine = machine;
    machine.destroy();
    let machine = cloud.machine().ready();
    load.compare(&machine, outside.path(), began, now_us());
    no_incidents(&machine);
}

/// Content and names of all files, as the bucket has them in the eyes of stock rclone.
fn objects_below(rclone: &Judge<'_>, below: &str) -> BTreeMap<String, Vec<u8>> {
    let all = rclone.names("").into_iter().filter(|name| name.starts_with(below));
    all.map(|name| (name.clone(), rclone.ok(&["cat", &format!("crypt:{name}")]))).collect()
}

const BEFORE: &str = "set -e; mkdir -p /data/openclaw/workspace; cd /data/openclaw/workspace; rm -rf w; mkdir -p w/from w/stays
for i in 1 2 3; do echo old $i > w/$i; echo $i > w/from/$i; done; cvm storage flush";

/// A change of every kind at once: what is written, what takes a name, what moves, what goes.
const CHANGES: &str = "set -e; cd /data/openclaw/workspace/w
echo new > 1.part; mv 1.part 1; rm 2; mv from to; echo more > 4; mv 3 stays/3; ln -s 1 link";

#[test]
fn a_worker_killed_at_any_write_of_a_push_loses_nothing_and_leaves_no_half() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let rclone = cloud.judge();
    // Nothing else writes meanwhile.
    let machine = cloud.machine().environment("S3_HEARTBEAT", "600").start();
    let pid = gateway(&machine);
    independent(&machine);
    for fault in [Fault::Hang, Fault::NoResponse] {
        let mut writes = 0;
        loop {
            machine.ok(&["sh", "-c", BEFORE]);
            writes += 1;
            cloud.proxy.clear_log();
            cloud.proxy.add(Rule::new(fault).method("PUT").every(writes).times(1));
            machine.ok(&["sh", "-c", CHANGES]);
            let mut flush = machine.command(&["cvm", "storage", "flush"]);
            flush.stdout(Stdio::null()).stderr(Stdio::null());
            let mut flush = flush.spawn().expect("nsenter runs");
            let hit = until("a write goes wrong, or none is left", PATIENCE, || {
                let hit = cloud.proxy.log().iter().any(|entry| entry.fault.is_some());
                (hit || flush.try_wait().expect("it is our child").is_some()).then_some(hit)
            });
            if hit {
                kill(&machine, "cvm-storage");
            }
            drop(flush.wait());
            cloud.proxy.heal();
            // Whatever had come so far: each file is an old one or a new one, or goes while we look.
            for (name, content) in objects_below(&rclone, "openclaw/workspace/w/") {
                let text = String::from_utf8_lossy(&content).into_owned();
                let known = ["", "old 1", "old 2", "old 3", "1", "2", "3", "new", "more"];
                assert!(known.contains(&text.trim_end()), "{name} is {text:?} at write {writes}");
            }
            worker_is_back(&machine);
            self::flush(&machine);
            machine.ok(&["cvm", "storage", "verify", "--deep"]);
            no_incidents(&machine);
            assert_eq!(machine.service("gateway")["pid"], pid, "{}", logs(&machine));
            let found: Vec<_> = objects_below(&rclone, "openclaw/workspace/w/").into_iter().collect();
            let wanted = [
                ("1", "new"),
                ("4", "more"),
                ("stays/3", "old 3"),
                ("to/1", "1"),
                ("to/2", "2"),
                ("to/3", "3"),
            ];
            let wanted = wanted.map(|(name, text)| {
                (format!("openclaw/workspace/w/{name}"), format!("{text}\n").into_bytes())
            });
            assert_eq!(found, wanted, "write {writes} and {fault:?}");
            if !hit {
                break;
            }
        }
        assert!(writes > 4, "only {writes} writes were met");
    }
    let output = restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let workspace = |lines: Vec<String>| -> Vec<String> {
        lines.into_iter().filter(|line| line.starts_with("\"workspace/")).collect()
    };
    let restored = workspace(digest(&machine.path("/tmp/whole/openclaw"), &[]));
    assert_eq!(difference(&workspace(tree(&machine)), &restored), "");
    assert!(restored.iter().any(|line| line.contains("w/link")), "{restored:#?}");
}

/// Nothing begins and nothing goes on, and the worker dies of something else.
fn kill_in_an_outage(cloud: &Cloud, machine: &Machine) {
    cloud.proxy.refuse(true);
    kill(machine, "cvm-storage");
    until("the next worker finds no bucket", PATIENCE, || {
        if machine.service("storage")["state"] == "waiting" {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
        }
        let status = storage(machine);
        (status["phase"] == "opening" && !status["why"].is_null()).then_some(())
    });
}

#[test]
fn a_worker_killed_in_an_outage_is_not_missed_where_the_tree_is_whole() {
    let _turn = TURNS.take();
    for mode in [Mode::Fuse, Mode::Sync] {
        let cloud = Cloud::new();
        let mut machine = mode.of(cloud.machine()).start();
        let pid = gateway(&machine);
        independent(&machine);
        flush(&machine);
        let write = |machine: &Machine, name: &str| {
            machine.ok(&[
                "sh",
                "-c",
                &format!(
                    "mkdir -p /data/openclaw/workspace && echo {name} > /data/openclaw/workspace/{name}"
                ),
            ]);
        };
        kill_in_an_outage(&cloud, &machine);
        write(&machine, "meanwhile");
        machine.line("Nothing is replicated: ");
        assert_eq!(gateway(&machine), pid, "{}", logs(&machine));
        cloud.proxy.refuse(false);
        worker_is_back(&machine);
        flush(&machine);
        assert_eq!(cloud.judge().ok(&["cat", "crypt:openclaw/workspace/meanwhile"]), b"meanwhile\n");
        assert_eq!(gateway(&machine), pid, "{}", logs(&machine));
        no_incidents(&machine);

        // A worker that has had no bucket knows all the same what is missing there.
        kill_in_an_outage(&cloud, &machine);
        write(&machine, "late");
        assert_eq!(machine.stop(), 75, "{}", logs(&machine));
        let output = machine.output();
        let last = output.lines().last().unwrap_or_default();
        assert!(last.contains("Not everything is in the bucket: 1 files, 5 bytes"), "{output}");
    }
}

#[track_caller]
fn the_tree_is_whole_and_can_be_written(machine: &Machine, before: &[String]) {
    let words = "echo new > /data/openclaw/workspace/new && cat /data/openclaw/workspace/many/*";
    machine.ok(&["sh", "-c", words]);
    flush(machine);
    no_incidents(machine);
    let changed = difference(before, &tree(machine));
    assert!(!changed.contains("many/"), "{changed}");
}

#[test]
fn a_stand_in_killed_alone_is_succeeded_by_one_that_knows_as_much() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    drop(bucket_with_files(&cloud, 50));
    let machine = cloud.machine().start();
    let pid = gateway(&machine);
    independent(&machine);
    kill(&machine, "cvm-standin");
    machine.line("The stand-in for the mount was told again");
    kill(&machine, "cvm-storage");
    machine.ok(&[
        "sh",
        "-c",
        "echo new > /data/openclaw/workspace/new && cat /data/openclaw/workspace/many/*",
    ]);
    worker_is_back(&machine);
    assert_eq!(machine.service("gateway")["pid"], pid, "{}", logs(&machine));
    flush(&machine);
    no_incidents(&machine);
}

#[test]
fn a_stand_in_killed_after_its_worker_costs_a_restart_and_nothing_else() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let before = bucket_with_files(&cloud, 50);
    let machine = cloud.machine().start();
    let pid = gateway(&machine);
    independent(&machine);
    kill(&machine, "cvm-storage");
    worker_is_back(&machine);
    assert_eq!(machine.service("gateway")["pid"], pid);
    kill(&machine, "cvm-standin");
    until("the gateway stands on a tree that was rebuilt", PATIENCE, || {
        let gateway = machine.service("gateway");
        (gateway["state"] == "ready" && gateway["pid"] != pid).then_some(())
    });
    worker_is_back(&machine);
    the_tree_is_whole_and_can_be_written(&machine, &before);
}

#[test]
fn worker_and_stand_in_killed_together_leave_a_gateway_that_runs_on_the_whole_tree() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let before = bucket_with_files(&cloud, 50);
    let machine = cloud.machine().ready();
    independent(&machine);
    let pids: Vec<String> = ["cvm-storage", "cvm-standin"]
        .iter()
        .filter_map(|name| machine.find(name))
        .map(|p| p.pid.to_string())
        .collect();
    machine.ok(&["kill", "-KILL", &pids[0], &pids[1]]);
    until("the worker has its tree, and the gateway is well", PATIENCE, || {
        let other = machine.find("cvm-storage").is_some_and(|p| p.pid.to_string() != pids[0]);
        let well = storage(&machine)["phase"] == "ready" && machine.service("gateway")["state"] == "ready";
        (other && well).then_some(())
    });
    the_tree_is_whole_and_can_be_written(&machine, &before);
}
