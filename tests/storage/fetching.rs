//! What a new machine fetches: in which order, how often, and where there is no room for it.

use crate::fixtures::files::{WORKSPACE, plant, put, timeless};
use crate::fixtures::machines::{begun_without, leave, tree};
use cvm_harness::Mode::Sync;
use cvm_harness::machine::PATIENCE;
use cvm_harness::proxy::Entry;
use cvm_harness::{Cloud, Fault, Rule, difference, flush, independent, storage, until};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[test]
fn what_is_small_comes_before_what_is_large_and_the_operator_sees_how_far_it_is() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    let at = machine.path(WORKSPACE);
    for n in 0..400 {
        put(at.join(format!("small/{n}")), format!("{n}"));
    }
    for n in 0..3 {
        put(at.join(format!("a-large/{n}")), vec![n; 1 << 20]);
    }
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let keys =
        |names: Vec<String>| names.into_iter().map(|name| cloud.judge().key(&name)).collect::<Vec<_>>();
    let large = keys((0..3).map(|n| format!("openclaw/workspace/a-large/{n}")).collect());
    let small = cloud.judge().key("openclaw/workspace/small");
    drop(machine);
    cloud.proxy.latency(Duration::from_millis(100));
    cloud.proxy.clear_log();
    let machine = cloud.machine().ready();
    let seen = until("it says how far it is", PATIENCE, || {
        let progress = storage(&machine)["progress"].clone();
        let done = progress["files_done"].as_u64()?;
        (done > 0 && Some(done) < progress["files_total"].as_u64()).then_some(progress)
    });
    assert!(
        seen["files_total"].as_u64() >= Some(403) && seen["bytes_total"].as_u64() > Some(3 << 20),
        "{seen}"
    );
    independent(&machine);
    assert!(storage(&machine)["progress"].is_null());
    let asked: Vec<Entry> = cloud.proxy.log().into_iter().filter(|e| e.method == "GET").collect();
    let first = asked.iter().position(|e| large.iter().any(|key| e.path.contains(key.as_str()))).unwrap();
    let before: std::collections::HashSet<&str> =
        asked[..first].iter().map(|e| e.path.as_str()).filter(|path| path.contains(small.as_str())).collect();
    // Those that other threads have just taken may be asked for later.
    assert!(before.len() >= 400 - 12, "only {} small ones came before it", before.len());
}

#[test]
fn a_file_is_fetched_once_to_be_checked_and_to_be_brought_up() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    plant(&machine.path(WORKSPACE));
    leave(machine);
    cloud.proxy.clear_log();
    let machine = cloud.machine().ready();
    independent(&machine);
    let below = cloud.judge().key("openclaw/workspace/many");
    let mut fetched: BTreeMap<String, usize> = BTreeMap::new();
    for entry in cloud.proxy.log() {
        let given = matches!(entry.status, Some(200 | 206)) && entry.path.contains(&below);
        if given && entry.method == "GET" && !entry.path.contains("list-type") {
            *fetched.entry(entry.path).or_default() += 1;
        }
    }
    let files = fs::read_dir(machine.path(WORKSPACE).join("many"))
        .unwrap()
        .map(|dir| fs::read_dir(dir.unwrap().path()).unwrap().count())
        .sum::<usize>();
    assert_eq!(fetched.len(), files, "{fetched:?}");
    assert!(fetched.values().all(|times| *times == 1), "{fetched:?}");
}

#[test]
fn a_restore_that_was_killed_goes_on_where_it_was_in_sync_mode() {
    let cloud = Cloud::new();
    let machine = Sync.start(&cloud);
    let at = machine.path(WORKSPACE);
    // More than are fetched one by one.
    for n in 0..300 {
        put(at.join(format!("many/{n}")), format!("{n}"));
    }
    put(at.join("one"), "under two names");
    fs::hard_link(at.join("one"), at.join("other")).unwrap();
    put(at.join("last"), "comes last");
    let expected = tree(&machine);
    leave(machine);
    let mut machine = begun_without(&cloud, Sync, "openclaw/workspace/last");
    until("all but one are there", PATIENCE, || {
        let is_there = |name: &str| machine.data().join("openclaw/workspace").join(name).exists();
        let many = (0..300).all(|n| is_there(&format!("many/{n}")));
        (many && is_there("one") && is_there("other")).then_some(())
    });
    until("the operator sees that one is missing", PATIENCE, || {
        let progress = &storage(&machine)["progress"];
        let left = progress["files_total"].as_u64()? - progress["files_done"].as_u64()?;
        (progress["what"] == "restoring from the bucket" && left == 1).then_some(())
    });
    machine.destroy();
    cloud.proxy.heal();
    cloud.proxy.clear_log();
    let machine = machine.again(|builder| builder).ready();
    assert_eq!(difference(&expected, &tree(&machine)), "");
    let fetched = |name: &str| {
        let key = cloud.judge().key(&format!("openclaw/workspace/{name}"));
        cloud.proxy.log().iter().any(|entry| entry.method == "GET" && entry.path.contains(&key))
    };
    assert!(fetched("last") && !fetched("many/7") && !fetched("one"));
}

#[test]
fn what_the_gateway_reads_first_is_fetched_without_what_it_does_not() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    for n in 0..210 {
        put(machine.path(&format!("/data/openclaw/credentials/{n}")), format!("secret {n}"));
    }
    for n in 0..60 {
        put(machine.path(WORKSPACE).join(format!("late/{n}")), format!("late {n}"));
    }
    flush(&machine);
    let expected = tree(&machine);
    assert_eq!(machine.stop(), 0);
    drop(machine);
    // Nothing of it arrives before the gateway runs.
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&cloud.judge().key("openclaw/workspace/late")));
    let machine = cloud.machine().ready();
    assert_eq!(storage(&machine)["independent"], false);
    assert_eq!(machine.read("/data/openclaw/credentials/209"), "secret 209");
    let mounts = machine.ok(&["cat", "/proc/mounts"]);
    assert!(mounts.lines().any(|mount| mount.contains(" fuse.rclone ")), "{mounts}");
    let parts = machine.data().join(".cvm/storage/staging/parts");
    assert!(!parts.exists(), "what was fetched lies on the volume twice");
    cloud.proxy.heal();
    independent(&machine);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn a_volume_on_which_there_can_be_no_overlay_is_kept_in_sync_mode_and_stays_where_it_is() {
    let cloud = Cloud::new();
    let disk = Disk::new(64);
    let layers = ["lower", "upper", "work", "data"].map(|name| disk.0.path().join(name));
    for layer in &layers {
        fs::create_dir(layer).unwrap();
    }
    let [lower, upper, work, data] = layers.map(|layer| layer.display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("overlay"), data.as_str(), Some("overlay"), none, Some(options.as_str())).unwrap();
    let _below = Mounted(PathBuf::from(&data));
    let machine = cloud.machine().unbind("/data").bind(Path::new(&data), "/data");
    let machine = machine.ready();
    let status = storage(&machine);
    assert_eq!(status["mode"], "sync", "{status:#}");
    assert!(status["reason"].as_str().is_some_and(|why| why.contains("overlayfs cannot be mounted")));
    machine.line("overlayfs cannot be mounted");
    put(machine.path(WORKSPACE).join("file"), "kept");
    assert_eq!(fs::read(Path::new(&data).join("openclaw/workspace/file")).unwrap(), b"kept");
    flush(&machine);
    assert_eq!(cloud.judge().text("openclaw/workspace/file").as_deref(), Some("kept"));
    let machine = machine.again(|builder| builder);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read(&format!("{WORKSPACE}/file")), "kept");
}

/// A disk of its own, of so many MiB.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(mib: u32) -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.mount(nix::mount::MsFlags::empty(), mib);
        this
    }

    fn grow(&self, mib: u32) {
        self.mount(nix::mount::MsFlags::MS_REMOUNT, mib);
    }

    fn mount(&self, how: nix::mount::MsFlags, mib: u32) {
        let size = format!("mode=755,size={mib}m");
        nix::mount::mount(Some("tmpfs"), self.0.path(), Some("tmpfs"), how, Some(size.as_str())).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Mounted(self.0.path().to_owned()));
    }
}

/// Dropping it unmounts it.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_a_volume_has_no_room_for_is_said_and_not_read_until_there_is_room() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    put(machine.path(WORKSPACE).join("small"), "small");
    put(machine.path(WORKSPACE).join("large"), vec![7u8; 32 << 20]);
    flush(&machine);
    let expected = tree(&machine);
    assert_eq!(machine.stop(), 0);
    drop(machine);
    let disk = Disk::new(24);
    cloud.proxy.clear_log();
    let machine = cloud.machine().unbind("/data").bind(disk.0.path(), "/data").ready();
    until("it is said", PATIENCE, || {
        storage(&machine)["last_error"].as_str()?.contains("No space left on device").then_some(())
    });
    assert_eq!(storage(&machine)["independent"], false);
    until("what has room is there", PATIENCE, || {
        disk.0.path().join(".cvm/storage/upper/openclaw/workspace/small").exists().then_some(())
    });
    let large = cloud.judge().key("openclaw/workspace/large");
    let read = cloud.proxy.log().iter().any(|entry| entry.method == "GET" && entry.path.contains(&large));
    assert!(!read, "what cannot be kept was read");
    // Under another name it is as much only in the bucket as before, also when all names of old are done.
    machine.ok(&["sh", "-ec", &format!("cd {WORKSPACE}; mv large renamed")]);
    until("the hydrator has nothing to do", PATIENCE, || {
        storage(&machine)["progress"].is_null().then_some(())
    });
    let flushed = machine.exec(&["cvm", "storage", "flush"]);
    assert_eq!(flushed.status.code(), Some(1), "{}", String::from_utf8_lossy(&flushed.stdout));
    assert_eq!(storage(&machine)["independent"], false);
    assert!(cloud.judge().ok(&["lsf", "crypt:openclaw/workspace"]).starts_with(b"large"));
    disk.grow(200);
    independent(&machine);
    machine.ok(&["sh", "-ec", &format!("cd {WORKSPACE}; mv renamed large")]);
    assert_eq!(difference(&timeless(expected), &timeless(tree(&machine))), "");
    flush(&machine);
}
