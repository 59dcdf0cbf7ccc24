//! One owner of a bucket at a time: two machines at once, a successor, a frozen owner, and the record of who it is.

use crate::fixtures::files::{content, read, write};
use crate::fixtures::machines::{
    accept_older, epoch, everything, gateway_runs, refuses_to_start, storage_says, volumes_set_aside,
};
use cvm_harness::machine::{HEALTHY, PATIENCE};
use cvm_harness::{
    Builder, Cloud, Fault, Machine, Mode, Network, Proxy, Rule, flush, independent, storage, until,
};
use std::time::Duration;

/// Another machine on the same bucket, in a network of its own.
struct Elsewhere {
    network: Network,
    proxy: Proxy,
}

impl Elsewhere {
    fn new(cloud: &Cloud) -> Self {
        let network = Network::new();
        let proxy = Proxy::start_in(&network, cloud.garage.address());
        Self { network, proxy }
    }

    fn machine(&self, cloud: &Cloud) -> Builder {
        Builder::product().fake_gateway(HEALTHY).s3(&self.network, &self.proxy.endpoint(), &cloud.garage)
    }
}

/// Two machines of one network differ by the port of their sshd.
fn two_at_once(conditional: bool) {
    let cloud = Cloud::new();
    cloud.proxy.conditional_puts(conditional.then(|| cloud.garage.s3()));
    // Both have read that there is no record before either of them writes one.
    cloud.proxy.add(Rule::new(Fault::Latency(Duration::from_millis(1500))).method("PUT").times(2));
    let two = cloud.machine().environment("SSH_PORT", "2222");
    let (mut one, mut two) = (cloud.machine().start(), two.start());
    until("one of them runs its gateway", PATIENCE, || {
        (gateway_runs(&one) || gateway_runs(&two)).then_some(())
    });
    if gateway_runs(&two) {
        std::mem::swap(&mut one, &mut two);
    }
    let why = storage_says(&two, "waiting", &["owns the bucket", "cvm storage takeover"]);
    let owner = storage(&one)["instance"].as_str().expect("an owner has a name").to_owned();
    assert!(why.contains(&owner[..8]), "{why}");
    write(&one, &["openclaw/workspace/a"], "words");
    flush(&one);
    assert!(gateway_runs(&one) && !gateway_runs(&two));
    let first = epoch(&one);
    // Lost: succeeded after three beats.
    one.destroy();
    two.service_in("gateway", &["ready"]);
    assert!(epoch(&two) > first);
    assert!(read(&two, "openclaw/workspace/a").is_some());
    // Stopped in order: succeeded without waiting for anything.
    independent(&two);
    let slow = cloud.machine().environment("S3_HEARTBEAT", "60").start();
    storage_says(&slow, "waiting", &["owns the bucket"]);
    assert_eq!(two.stop(), 0);
    slow.service_in("gateway", &["ready"]);
    assert!(read(&slow, "openclaw/workspace/a").is_some());
}

#[test]
fn of_two_that_start_at_once_one_runs_where_writes_have_conditions() {
    two_at_once(true);
}

#[test]
fn of_two_that_start_at_once_one_runs_where_writes_have_none() {
    two_at_once(false);
}

#[test]
fn an_impatient_machine_counts_the_beats_of_the_owner() {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    let owner = cloud.machine().environment("S3_HEARTBEAT", "60").ready();
    flush(&owner);
    let other = elsewhere.machine(&cloud).start();
    let why = storage_says(&other, "waiting", &["180 s"]);
    assert!(why.contains("takeover"), "{why}");
    // By force, and the owner finds out before anything of its successor's is at stake.
    other.ok(&["cvm", "storage", "takeover", "--yes"]);
    other.service_in("gateway", &["ready"]);
    write(&owner, &["openclaw/workspace/late"], "too late");
    storage_says(&owner, "waiting", &["owns the bucket"]);
    until("the old owner's gateway is stopped", PATIENCE, || (!gateway_runs(&owner)).then_some(()));
    write(&other, &["openclaw/workspace/mine"], "words");
    flush(&other);
    independent(&other);
    assert_eq!(read(&other, "openclaw/workspace/late"), None);
}

#[test]
fn an_owner_with_a_successor_stops_its_gateway_although_its_push_hangs() {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    // A beat of the owner's must not undo the takeover.
    for proxy in [&cloud.proxy, &elsewhere.proxy] {
        proxy.conditional_puts(Some(cloud.garage.s3()));
    }
    let owner = cloud.machine().environment("S3_HEARTBEAT", "2").ready();
    independent(&owner);
    flush(&owner);
    let stuck = "openclaw/workspace/stuck";
    let key = cloud.judge().key(stuck);
    cloud.proxy.add(Rule::new(Fault::Hang).method("PUT").path(&key));
    write(&owner, &[stuck], "words");
    until("its push hangs", PATIENCE, || {
        storage(&owner)["oldest_unreplicated_ms"].as_u64().filter(|ms| *ms > 1500).map(drop)
    });
    let other = elsewhere.machine(&cloud).environment("S3_HEARTBEAT", "2").start();
    storage_says(&other, "waiting", &["owns the bucket"]);
    other.ok(&["cvm", "storage", "takeover", "--yes"]);
    until("the old owner's gateway is stopped", PATIENCE, || (!gateway_runs(&owner)).then_some(()));
    let status = storage(&owner);
    assert_eq!((&status["phase"], &status["last_error"]), (&"fenced".into(), &serde_json::Value::Null));
    cloud.proxy.heal();
    other.service_in("gateway", &["ready"]);
    storage_says(&owner, "waiting", &["owns the bucket"]);
}

/// Every process of a machine, process 1 last when it is frozen and first when it goes on.
fn freeze(machine: &Machine, signal: &str) {
    for process in machine.processes() {
        if process.pid != 1 {
            machine.kill(process.pid.into(), signal);
        }
    }
}

fn a_frozen_owner(mode: Mode, pushes: bool) {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    let old = mode.start(&cloud);
    old.ok(&["sh", "-c", "mkdir -m 711 /data/openclaw/empty && ln -s empty /data/openclaw/link"]);
    write(&old, &["openclaw/workspace/a"], "words");
    flush(&old);
    independent(&old);
    flush(&old);
    if pushes {
        cloud.proxy.latency(Duration::from_millis(100));
        cloud.proxy.clear_log();
        let many: Vec<String> = (0..300).map(|n| format!("openclaw/workspace/many/{n}")).collect();
        write(&old, &many.iter().map(String::as_str).collect::<Vec<_>>(), "half");
        let in_the_middle = || cloud.proxy.log().iter().filter(|e| e.method == "PUT").count() > 60;
        until("it is in the middle of a push", PATIENCE, || in_the_middle().then_some(()));
    }
    freeze(&old, "STOP");
    let new = mode.of(elsewhere.machine(&cloud)).ready();
    independent(&new);
    write(&new, &["openclaw/workspace/a"], "the new owner's");
    flush(&new);
    // Written while nobody looked: it belongs to nobody's history.
    write(&old, &["openclaw/workspace/a", "openclaw/workspace/frozen"], "the old owner's");
    cloud.proxy.clear_log();
    freeze(&old, "CONT");
    storage_says(&old, "waiting", &["owns the bucket"]);
    let writes = cloud.proxy.log().iter().filter(|e| e.method != "GET" && e.method != "HEAD").count();
    // What a thread had been told that it may write when it was frozen, nobody can take back.
    let told = if pushes { 16 } else { 0 };
    assert!(writes <= told, "{writes} writes without asking");
    until("the old owner's gateway is stopped", PATIENCE, || (!gateway_runs(&old)).then_some(()));
    new.ok(&["cvm", "storage", "verify", "--deep"]);
    let before = everything(&new);
    let mut new = new;
    assert_eq!(new.stop(), 0, "{}", new.output());
    // The old owner comes after it: its volume is set aside, and it goes on with the bucket's.
    old.service_in("gateway", &["ready"]);
    old.line("neither merged nor pushed");
    independent(&old);
    assert_eq!(read(&old, "openclaw/workspace/a"), Some(content("openclaw/workspace/a", "the new owner's")));
    assert_eq!(read(&old, "openclaw/workspace/frozen"), None);
    assert_eq!(everything(&old), before);
    // The find of a path that is only there in one of the modes ends with an error.
    let aside = old.exec(&[
        "find",
        "/run/openclaw-cvm/volume/.cvm",
        "/data/.cvm",
        "-path",
        "*aside*",
        "-name",
        "frozen",
    ]);
    assert!(String::from_utf8_lossy(&aside.stdout).contains("frozen"), "what was set aside is there");
}

#[test]
fn an_owner_that_was_frozen_stops_when_it_finds_its_successor_in_fuse_mode() {
    a_frozen_owner(Mode::Fuse, false);
}

#[test]
fn an_owner_that_was_frozen_in_the_middle_of_a_push_writes_nothing_more() {
    a_frozen_owner(Mode::Fuse, true);
}

#[test]
fn an_owner_that_was_frozen_stops_when_it_finds_its_successor_in_sync_mode() {
    a_frozen_owner(Mode::Sync, false);
}

#[test]
fn a_volume_of_an_earlier_owner_is_not_merged_when_the_record_of_the_later_one_is_gone() {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    let mut old = cloud.machine().ready();
    write(&old, &["openclaw/workspace/a", "openclaw/workspace/goes"], "words");
    flush(&old);
    independent(&old);
    flush(&old);
    old.destroy();
    let mut new = elsewhere.machine(&cloud).ready();
    independent(&new);
    write(&new, &["openclaw/workspace/a", "openclaw/workspace/b"], "the new owner's");
    new.ok(&["rm", "/data/openclaw/workspace/goes"]);
    flush(&new);
    assert_eq!(new.stop(), 0, "{}", new.output());
    cloud.judge().delete(".cvm/owner");
    let old = old.again(|b| b);
    old.service_in("gateway", &["ready"]);
    independent(&old);
    for name in ["a", "b"] {
        let path = format!("openclaw/workspace/{name}");
        assert!(read(&old, &path) == Some(content(&path, "the new owner's")), "{path} is older");
    }
    assert!(read(&old, "openclaw/workspace/goes").is_none(), "it has come back");
    assert_eq!(volumes_set_aside(&old), 1);
    flush(&old);
    old.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn an_ownership_record_that_was_rolled_back_or_deleted_is_noticed() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    write(&machine, &["openclaw/workspace/a"], "words");
    flush(&machine);
    let bucket = cloud.judge();
    let early = bucket.get(".cvm/owner");
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    let mut machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    write(&machine, &["openclaw/workspace/b"], "words");
    flush(&machine);
    let late = epoch(&machine);
    assert_eq!(machine.stop(), 0);
    // Older than the manifest: a new machine sees it too.
    bucket.put(".cvm/owner", &early);
    let other = cloud.machine().start();
    refuses_to_start(&other, &["ownership record is older"]);
    drop(other);
    let machine = machine.again(|b| b);
    refuses_to_start(&machine, &["ownership record is older"]);
    // Damaged: nobody's, until the operator accepts.
    let mut bytes = early.clone();
    bytes[40] ^= 1;
    bucket.put(".cvm/owner", &bytes);
    drop(machine);
    let machine = cloud.machine().start();
    refuses_to_start(&machine, &[".cvm/owner"]);
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
    assert!(epoch(&machine) > late);
    write(&machine, &["openclaw/workspace/c"], "words");
    flush(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    // Deleted: as good as held, for as long as somebody may be there.
    bucket.delete(".cvm/owner");
    let machine = cloud.machine().environment("S3_HEARTBEAT", "3").start();
    storage_says(&machine, "waiting", &["vanished"]);
    machine.service_in("gateway", &["ready"]);
    assert!(epoch(&machine) > late + 1);
}
