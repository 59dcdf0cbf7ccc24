//! A stop in order: what is pending goes into the bucket, or the last line says what is missing there.

use crate::fixtures::TURNS;
use crate::fixtures::machines::{logs, no_incidents, not_all_there, tree};
use crate::fixtures::programs::number;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Fault, Rule, difference, flush, independent, rounds, storage, until};
use std::time::{Duration, Instant};

#[test]
fn a_stop_pushes_what_is_pending_and_gives_the_bucket_away() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    // Sixty seconds between beats: a machine that had to wait for a dead one would wait for minutes.
    let mut machine = cloud.machine().environment("S3_HEARTBEAT", "60").ready();
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && cd /data/openclaw/workspace || exit; for i in $(seq 500); do echo $i > $i; done; mkdir sub; mv 1 sub/one; rm 2"]);
    let before = tree(&machine);
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    drop(machine);
    let machine = cloud.machine().ready();
    independent(&machine);
    assert_eq!(difference(&before, &tree(&machine)), "");
    assert!(!machine.output().contains("owns the bucket"), "{}", machine.output());
}

#[test]
fn a_stop_without_a_bucket_ends_in_its_time_and_says_what_is_missing() {
    let _turn = TURNS.take();
    for (hangs, is_pushing) in [(false, false), (true, false), (true, true)] {
        let cloud = Cloud::new();
        let mut machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "2").ready();
        flush(&machine);
        if hangs {
            cloud.proxy.fault(Fault::Hang);
        } else {
            cloud.proxy.refuse(true);
        }
        machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && cd /data/openclaw/workspace || exit; for i in 1 2 3 4 5 6 7; do echo $i > late-$i; done"]);
        if !hangs {
            let told = machine.exec(&["cvm", "storage", "flush"]);
            let words = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
            assert_eq!(told.status.code(), Some(1), "{words}");
            assert!(words.contains("Not everything is in the bucket"), "{words}");
        }
        if is_pushing {
            until("a push hangs", PATIENCE, || {
                cloud
                    .proxy
                    .log()
                    .iter()
                    // The first request of a push asks whether the bucket is still ours.
                    .any(|e| e.fault == Some(Fault::Hang))
                    .then_some(())
            });
        }
        let began = Instant::now();
        assert_eq!(machine.stop(), 75, "{}", logs(&machine));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(12), "it took {took:?}, hanging: {hangs}, pushing: {is_pushing}");
        let output = machine.output();
        let last = output.lines().last().unwrap_or_default();
        assert!(last.contains("Not everything is in the bucket: 7 files"), "{output}");
        cloud.proxy.heal();
        // A machine that was stopped, on the same volume: it pushes what it kept.
        let machine = machine.again(|b| b);
        machine.service_in("gateway", &["ready"]);
        flush(&machine);
        let rclone = cloud.judge();
        assert_eq!(rclone.names("").iter().filter(|n| n.contains("/late-")).count(), 7);
        no_incidents(&machine);
    }
}

#[test]
fn a_stop_does_not_wait_for_a_name_that_cannot_be_there() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let mut machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "3600").ready();
    let at = "/data/openclaw/workspace";
    machine.ok(&["sh", "-ec", &format!("mkdir -p {at}; cd {at}; echo near > near")]);
    flush(&machine);
    let far = format!("{0}/{0}/{0}", "n".repeat(250));
    machine.ok(&["sh", "-ec", &format!("cd {at}; mkdir -p {far}; mv near {far}/file")]);
    not_all_there(&machine, &["cannot be in", "nnn/file"]);
    // The kernel's hint of the change that was just looked at may come late.
    until("it is not counted as pending", PATIENCE, || {
        (storage(&machine)["pending_files"] == 0).then_some(())
    });
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    let output = machine.output();
    assert!(output.contains("Not everything is in the bucket: 1 files, 5 bytes"), "{output}");
    assert!(cloud.judge().names("").contains("openclaw/workspace/near"), "all that the bucket has of it");
}

#[test]
fn a_stop_leaves_out_what_the_server_refuses_and_nothing_else() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let mut machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "30").ready();
    let at = "/data/openclaw/workspace";
    machine.ok(&["sh", "-ec", &format!("mkdir -p {at}; cd {at}; echo old > log; echo 1 > gone")]);
    flush(&machine);
    let rclone = cloud.judge();
    let key = rclone.key("openclaw/workspace/refused");
    cloud.proxy.add(Rule::new(Fault::Status(400)).method("PUT").path(&key));
    let change = format!("cd {at}; echo no > refused; mv log log.1; echo new > log; rm gone; echo 2 > other");
    machine.ok(&["sh", "-ec", &change]);
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    let output = machine.output();
    assert!(output.contains("Not everything is in the bucket: 1 files"), "{output}");
    let there: Vec<String> = rclone.names("").into_iter().filter(|n| n.contains("/workspace/")).collect();
    assert_eq!(there, ["log", "log.1", "other"].map(|name| format!("openclaw/workspace/{name}")));
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/workspace/log"]), b"new\n");
}

#[test]
fn a_stop_knows_that_a_mode_is_missing_in_the_bucket_and_a_name_that_cannot_be_there() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let mut machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "2").ready();
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && echo x > /data/openclaw/workspace/x"]);
    flush(&machine);
    cloud.proxy.refuse(true);
    machine.ok(&["chmod", "600", "/data/openclaw/workspace/x"]);
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    assert!(machine.output().contains("Not everything is in the bucket: 1 files"), "{}", machine.output());
    cloud.proxy.refuse(false);
    let mut machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    let far = format!("/data/openclaw/{0}/{0}/{0}", "n".repeat(250));
    machine.ok(&["sh", "-c", &format!("mkdir -p {far} && echo far > {far}/file")]);
    not_all_there(&machine, &["cannot be in", "nnn/file"]);
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    let output = machine.output();
    assert!(output.contains("Not everything is in the bucket: 1 files, 4 bytes"), "{output}");
}

#[test]
fn thousands_of_changes_without_a_bucket_cost_no_memory_and_all_of_them_arrive() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    flush(&machine);
    let used = || -> i64 {
        let pid = machine.find("cvm-storage").expect("the worker runs").pid;
        let status = machine.read(&format!("/proc/{pid}/status"));
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("it has memory");
        number(line.trim().trim_end_matches(" kB")) / 1024
    };
    let pid = machine.find("cvm-storage").expect("the worker runs").pid;
    cloud.proxy.refuse(true);
    let rounds = rounds(4, 40);
    let mut memory = vec![used()];
    for round in 0..rounds {
        let script = format!(
            "mkdir -p /data/openclaw/workspace/day; cd /data/openclaw/workspace/day; for i in $(seq 1500); do echo {round} $i > $i; done; rm -f 1{round}*; mkdir -p d{round}; mv 2* d{round}/"
        );
        machine.ok(&["sh", "-c", &script]);
        memory.push(used());
    }
    let status = storage(&machine);
    assert!(status["oldest_unreplicated_ms"].as_u64().is_some(), "{status:#}");
    cloud.proxy.heal();
    until("everything is there again", PATIENCE, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
    memory.push(used());
    eprintln!("MiB in use: {memory:?}");
    let (first, last) = (memory[1], memory[memory.len() - 2]);
    assert!(last - first < 40, "memory grows with what is pending: {memory:?}");
    assert_eq!(machine.find("cvm-storage").map(|p| p.pid), Some(pid), "the worker has survived");
    let before = tree(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    let machine = cloud.machine().ready();
    independent(&machine);
    assert_eq!(difference(&before, &tree(&machine)), "");
    no_incidents(&machine);
}
