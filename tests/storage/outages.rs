//! A network and a server that fail while the gateway runs.

use crate::fixtures::bucket::BLOCK;
use crate::fixtures::files::write;
use crate::fixtures::machines::{everything, incidents};
use cvm_harness::machine::{PATIENCE, binary};
use cvm_harness::{Builder, Cloud, Fault, Machine, Rule, flush, independent, storage, until};
use std::time::{Duration, Instant};

fn gateway_pid(machine: &Machine) -> i64 {
    machine.service("gateway")["pid"].as_i64().unwrap_or_default()
}

/// Kilobytes of memory that are the worker's alone or shared with its binary.
fn resident(machine: &Machine) -> u64 {
    let worker = machine.find("cvm-storage").expect("the worker runs");
    let text = machine.read(&format!("/proc/{}/status", worker.pid));
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("a process has a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn the_gateway_does_not_notice_an_outage_and_nothing_is_lost_by_it() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    independent(&machine);
    flush(&machine);
    let pid = gateway_pid(&machine);
    let faults = [
        Fault::Reset,
        Fault::Hang,
        Fault::Status(403),
        Fault::Status(429),
        Fault::Status(503),
        Fault::HalfRequest,
        Fault::HalfResponse,
        Fault::NoResponse,
    ];
    for (round, fault) in faults.iter().map(Some).chain([None]).enumerate() {
        let path = format!("openclaw/workspace/{round}");
        match fault {
            Some(fault) => cloud.proxy.fault(*fault),
            None => cloud.proxy.refuse(true),
        }
        write(&machine, &[&path], "written meanwhile");
        until(&format!("{fault:?} is seen"), PATIENCE, || {
            let status = storage(&machine);
            let waits = status["oldest_unreplicated_ms"].as_u64().is_some_and(|ms| ms > 1500);
            (waits && status["pending_files"].as_u64() > Some(0) && status["phase"] == "ready").then_some(())
        });
        cloud.proxy.heal();
        until(&format!("after {fault:?} all is pushed"), PATIENCE, || {
            let status = storage(&machine);
            (status["pending_files"] == 0 && status["oldest_unreplicated_ms"].is_null()).then_some(())
        });
        assert_eq!(gateway_pid(&machine), pid, "the gateway has noticed {fault:?}");
    }
    // One of twenty, for as long as a hundred files take.
    cloud.proxy.add(Rule::new(Fault::Status(503)).some(50, 1));
    for n in 0..100 {
        write(&machine, &[&format!("openclaw/workspace/many/{n}")], "one of many");
    }
    until("a hundred files arrive in spite of it", PATIENCE, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
    cloud.proxy.heal();
    assert!(resident(&machine) < 400 * 1024, "{} kB", resident(&machine));
    let before = everything(&machine);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    let machine = cloud.machine().ready();
    independent(&machine);
    assert_eq!(everything(&machine), before);
}

#[test]
fn a_review_of_the_bucket_holds_up_no_push_and_takes_none_for_a_fault() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let bucket = cloud.judge();
    let path = "openclaw/workspace/changing";
    write(&machine, &[path], "first");
    flush(&machine);
    independent(&machine);
    let before = bucket.get(path);
    cloud.proxy.clear_log();
    // The drill reads files, and a push asks only whether the bucket is still its own.
    let slow = Rule::new(Fault::Latency(Duration::from_secs(8))).method("GET").path(&bucket.key("openclaw"));
    cloud.proxy.add(slow);
    let mut drill = machine.command(&["cvm", "storage", "drill"]).spawn().expect("nsenter runs");
    let verb = || Some(()).filter(|()| cloud.proxy.log().iter().any(|e| e.method == "GET"));
    until("the drill has asked for something", PATIENCE, verb);
    write(&machine, &[path], "second");
    until("what was written meanwhile is in the bucket", PATIENCE, || {
        (bucket.get(path) != before).then_some(())
    });
    assert!(drill.try_wait().expect("it is our child").is_none(), "the push waited for the drill");
    let other = machine.exec(&["cvm", "storage", "verify"]);
    assert!(!other.status.success(), "two reviews at once");
    cloud.proxy.heal();
    assert!(
        drill.wait().expect("it is our child").success(),
        "{}",
        machine.read("/var/log/openclaw-cvm/storage.log")
    );
    assert_eq!(incidents(&machine), Vec::<String>::new());
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn damage_in_the_bucket_is_mended_from_the_tree_and_an_outage_is_none() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let bucket = cloud.judge();
    let [flip, gone] = ["openclaw/workspace/flip", "openclaw/workspace/gone"];
    write(&machine, &[flip, gone], "words");
    independent(&machine);
    flush(&machine);
    cloud.proxy.add(Rule::new(Fault::Status(503)).method("GET").path(&bucket.key("openclaw")));
    assert!(!machine.exec(&["cvm", "storage", "drill"]).status.success());
    assert_eq!(incidents(&machine), Vec::<String>::new(), "an outage is no damage");
    cloud.proxy.heal();

    let mut bytes = bucket.get(flip);
    bytes[BLOCK] ^= 1;
    bucket.put(flip, &bytes);
    assert!(!machine.exec(&["cvm", "storage", "drill"]).status.success());
    until("it is sent again", PATIENCE, || (bucket.get(flip) != bytes).then_some(()));
    until("the incident is over", PATIENCE, || incidents(&machine).is_empty().then_some(()));
    let log = machine.read("/var/log/openclaw-cvm/storage.log");
    assert!(log.contains(&format!("incident: {flip}: a restore drill found")), "{log}");

    bucket.delete(gone);
    assert!(!machine.exec(&["cvm", "storage", "verify"]).status.success());
    let key = bucket.key(gone);
    until("it is there again", PATIENCE, || cloud.garage.get_raw(&key).map(drop));
    flush(&machine);
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn a_server_that_is_overrun_for_a_moment_fails_no_flush() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    flush(&machine);
    let bucket = cloud.judge();
    for (name, status) in [("a", 503), ("b", 429), ("c", 503)] {
        let path = format!("openclaw/workspace/{name}");
        let rule = Rule::new(Fault::Status(status)).method("PUT").path(&bucket.key(&path)).times(1);
        cloud.proxy.add(rule);
        write(&machine, &[&path], "words");
    }
    flush(&machine);
    let told = cloud.proxy.log().iter().filter(|entry| entry.fault.is_some()).count();
    assert!(told >= 3, "only {told} were told so");
}

/// Uploads in parts from 5 MiB on, with a provider whose parts rclone would compare by `ETag`.
fn in_parts(builder: Builder) -> Builder {
    let worker = "/usr/local/lib/openclaw-cvm/cvm-storage";
    let script = "#!/bin/sh\nexport RCLONE_S3_UPLOAD_CUTOFF=5M RCLONE_S3_CHUNK_SIZE=5M\nexec /opt/cvm-storage \"$@\"\n";
    let builder = builder.unbind(worker).bind(&binary("cvm-storage"), "/opt/cvm-storage");
    builder.file(worker, script, 0o755).environment("S3_PROVIDER", "Minio")
}

/// As with SSE-KMS. Neither an object nor its earlier version is lost by it, and it costs no request more.
#[test]
fn nothing_is_lost_where_the_tags_of_objects_are_no_md5() {
    let cloud = Cloud::new();
    let machine = in_parts(cloud.machine()).ready();
    flush(&machine);
    let bucket = cloud.judge();
    let (small, large) = ("openclaw/workspace/small", "openclaw/workspace/large");
    let keys = bucket.keys([small, large]);
    // A server need not say why.
    for (version, says_so) in [("first", true), ("second", true), ("third", false)] {
        cloud.proxy.foreign_etags(says_so);
        cloud.proxy.clear_log();
        write(&machine, &[small], version);
        let content: Vec<u8> = version.bytes().cycle().take(12 << 20).collect();
        std::fs::write(machine.path(&format!("/data/{large}")), content).expect("a file");
        let flushed = machine.exec(&["cvm", "storage", "flush"]);
        for key in &keys {
            assert!(cloud.garage.get_raw(key).is_some(), "{key} is gone after the {version} version");
        }
        assert!(flushed.status.success(), "the {version} version: {flushed:?}");
        // Sent, and not asked for again; and the store can tell what arrives by the head.
        let log = cloud.proxy.log();
        let about = |key: &str| log.iter().filter(|e| e.path.contains(key)).collect::<Vec<_>>();
        let [one, parts] = keys.each_ref().map(|key| about(key));
        assert!(one.iter().all(|e| e.method == "PUT" && e.has_md5), "{one:?}");
        assert!(parts.iter().all(|e| e.method == "POST" || e.method == "PUT" && e.has_md5), "{parts:?}");
        assert!(parts.iter().any(|e| e.method == "POST"), "it was not sent in parts: {parts:?}");
    }
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn retries_are_few() {
    let cloud = Cloud::new();
    let machine = cloud.machine().environment("S3_HEARTBEAT", "60").ready();
    flush(&machine);
    cloud.proxy.fault(Fault::Status(503));
    cloud.proxy.clear_log();
    let began = Instant::now();
    write(&machine, &["openclaw/workspace/a"], "words");
    until("three tries have failed", PATIENCE, || {
        (storage(&machine)["retry_in_ms"].as_u64() > Some(5000)).then_some(())
    });
    let (requests, seconds) = (cloud.proxy.log().len() as u64, began.elapsed().as_secs());
    // Waits of 2, 4 and 8 s, and a few requests for each try.
    assert!(seconds >= 5, "three tries took {seconds} s");
    assert!(requests < 60, "{requests} requests in {seconds} s");
}
