//! Buckets that nobody can check, because something else has written them.

use crate::fixtures::files::{WORKSPACE, put};
use crate::fixtures::machines::restored;
use crate::fixtures::programs::{sqlite, sqlite_in};
use cvm_harness::Mode::{Fuse, Sync};
use cvm_harness::judge::PREFIX;
use cvm_harness::machine::{CRYPT_PASSWORD, CRYPT_SALT, PATIENCE};
use cvm_harness::tools::written_by_rclone_crypt_python;
use cvm_harness::{Builder, Cloud, Fault, Mode, Rule, flush, independent, storage, until};
use std::fs::{self, File};

/// Committed, with the log left beside it as a killed writer leaves it, and cut short.
const TORN: &str = "c.execute('pragma journal_mode=wal')
c.execute('pragma wal_autocheckpoint=0')
c.execute('create table t(x)')
for n in range(50):
    c.execute('insert into t values(?)', ('y'*500,)); c.commit()
os.truncate(sys.argv[1]+'-wal', os.path.getsize(sys.argv[1]+'-wal')-2000)
sys.stdout.flush(); os._exit(0)";

/// On a bucket that nobody can check.
fn adopts(cloud: &Cloud, mode: Mode) -> Builder {
    mode.of(cloud.machine()).environment("S3_ADOPT", "1")
}

#[test]
fn what_was_adopted_is_checked_and_not_waited_for_from_the_next_machine_on() {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    let names = ["one", "two", "large"].map(|name| format!("openclaw/workspace/{name}"));
    for (name, content) in names.iter().zip(["1", "2", "3"]) {
        put(old.path().join(name), content.repeat(1000));
    }
    cloud.judge().ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    let mut machine = adopts(&cloud, Fuse).ready();
    machine.line("The manifest says of 3 adopted files what is in them");
    assert_eq!(machine.stop(), 0);
    drop(machine);
    let [one, two, large] = names.each_ref().map(|name| cloud.judge().key(name));
    let [first, second] = [&one, &two].map(|key| cloud.garage.object(key).unwrap());
    cloud.garage.put_raw(&one, &second.bytes);
    cloud.garage.put_raw(&two, &first.bytes);
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&large));
    let machine = cloud.machine().ready();
    assert_eq!(storage(&machine)["independent"], false);
    assert!(!machine.output().contains("adopted"), "{}", machine.output());
    cloud.proxy.heal();
    independent(&machine);
    let incidents = storage(&machine)["incidents"].to_string();
    assert!(incidents.contains(&names[0]) && incidents.contains(&names[1]), "{incidents}");
    assert!(!machine.path(WORKSPACE).join("one").exists(), "what was swapped is served");
    assert_eq!(machine.read(&format!("{WORKSPACE}/large")), "3".repeat(1000));
}

#[test]
fn what_was_bad_when_it_was_adopted_is_told_once_it_has_been_put_right() {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    for name in ["one", "two", "bad"] {
        put(old.path().join("openclaw/workspace").join(name), name);
    }
    cloud.judge().ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    let bad = cloud.judge().key("openclaw/workspace/bad");
    let good = cloud.garage.get_raw(&bad).unwrap();
    cloud.garage.put_raw(&bad, &vec![0; good.len()]);
    let mut machine = adopts(&cloud, Fuse).ready();
    machine.line("The manifest says of 2 adopted files what is in them");
    assert_eq!(machine.stop(), 0);
    cloud.garage.put_raw(&bad, &good);
    let mut machine = machine.again(|builder| builder).ready();
    assert_eq!(machine.read(&format!("{WORKSPACE}/bad")), "bad");
    assert_eq!(machine.stop(), 0);
    let machine = machine.again(|builder| builder).ready();
    machine.line("The manifest says of 1 adopted files what is in them");
}

/// An adoption that a loss of power ends: nobody knows yet what the files have to be.
fn adoption_cut_short(mode: Mode) {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    put(old.path().join("openclaw/workspace/first"), "whole");
    put(old.path().join("openclaw/workspace/last"), "comes last");
    cloud.judge().ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&cloud.judge().key("openclaw/workspace/last")));
    let mut machine = adopts(&cloud, mode).start();
    let first = machine.data().join("openclaw/workspace/first");
    until("one file is there", PATIENCE, || first.exists().then_some(()));
    machine.destroy();
    // It was not on the disk yet.
    File::create(&first).unwrap();
    cloud.proxy.heal();
    let machine = machine.again(|builder| builder).ready();
    assert_eq!(machine.read(&format!("{WORKSPACE}/first")), "whole");
    assert_eq!(machine.read(&format!("{WORKSPACE}/last")), "comes last");
    flush(&machine);
    assert_eq!(cloud.judge().text("openclaw/workspace/first").as_deref(), Some("whole"));
}

#[test]
fn an_adoption_that_a_loss_of_power_ends_overwrites_nothing_in_fuse_mode() {
    adoption_cut_short(Fuse);
}

#[test]
fn an_adoption_that_a_loss_of_power_ends_overwrites_nothing_in_sync_mode() {
    adoption_cut_short(Sync);
}

#[test]
fn a_bucket_of_the_old_entrypoint_is_adopted() {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    put(old.path().join("openclaw/openclaw.json"), "{}");
    put(old.path().join("openclaw/workspace/notes.md"), "from before");
    put(old.path().join(".config/tool/settings"), "kept");
    fs::create_dir_all(old.path().join("sqlite")).unwrap();
    sqlite(
        "c.execute('create table m(x)');c.execute('insert into m values(42)');c.commit()",
        &old.path().join("sqlite/main-memory.db"),
    );
    sqlite(TORN, &old.path().join("openclaw/workspace/x.sqlite"));
    assert!(old.path().join("openclaw/workspace/x.sqlite-wal").exists());
    let rclone = cloud.judge();
    rclone.ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    // And what was written by a program that shares no code with rclone, with more than a block in it.
    let (by_another, of_another) = ("openclaw/workspace/größer/als ein Block", "64 KiB ".repeat(10_000));
    let (name, bytes) = written_by_rclone_crypt_python(by_another, &of_another, CRYPT_PASSWORD, CRYPT_SALT);
    cloud.garage.put_raw(&format!("{PREFIX}/{name}"), &bytes);
    let machine = adopts(&cloud, Fuse).ready();
    assert!(
        machine.read("/var/log/openclaw-cvm/supervisor.log").contains("adopted")
            || machine.output().contains("adopted"),
        "{}",
        machine.output()
    );
    let data = machine.path("/data");
    for (path, content) in [
        ("openclaw/workspace/notes.md", "from before"),
        (".config/tool/settings", "kept"),
        (by_another, &of_another),
    ] {
        assert_eq!(fs::read_to_string(data.join(path)).unwrap(), content);
    }
    flush(&machine);
    let memory = "openclaw/agents/main/memory.db";
    let memory_at = format!("/data/{memory}");
    assert_eq!(sqlite_in(&machine, "print(c.execute('select x from m').fetchone()[0])", &memory_at), "42");
    let rows = "print(c.execute('select count(*) from t').fetchone()[0], c.execute('pragma integrity_check').fetchone()[0])";
    let mut machine = machine;
    for mode in [Fuse, Sync] {
        machine = restored(&cloud, machine, mode);
        assert!(!machine.output().contains("adopted"), "{}", machine.output());
        assert_eq!(
            sqlite_in(&machine, "print(c.execute('select x from m').fetchone()[0])", &memory_at),
            "42"
        );
        let found = sqlite_in(&machine, rows, &format!("{WORKSPACE}/x.sqlite"));
        let (count, check) = found.split_once(' ').unwrap();
        assert!(count.parse::<u32>().unwrap() >= 45 && check == "ok", "{found}");
    }
    // What the old one wrote is where it was.
    let listed = String::from_utf8(rclone.ok(&["lsf", "-R", "crypt:"])).unwrap();
    for kept in ["sqlite/main-memory.db", memory, "openclaw/openclaw.json"] {
        assert!(listed.lines().any(|l| l == kept), "{kept} in:\n{listed}");
    }
}
